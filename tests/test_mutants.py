"""The planted faults of `make mutants` can be planted today; running them takes minutes and is no part of the tests."""

from mutants import ROOT, faults, problem


def test_every_fault_can_be_planted():
    assert not list(filter(None, map(problem, faults())))


def test_every_catcher_is_there():
    for fault in faults():
        file, _, name = fault.catcher.partition("::")
        name = name.partition("[")[0].rpartition("::")[2]
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), fault.catcher
        assert fault.old != fault.new


def test_there_are_enough_of_them_and_each_is_one():
    planted = faults()
    assert len({(fault.file, fault.old, fault.new) for fault in planted}) == len(planted)
    assert len({(fault.file, fault.what) for fault in planted}) == len(planted)
    assert sum(fault.file.startswith("duet_kernels/") for fault in planted) >= 30
    assert sum(fault.file.startswith("duet/") for fault in planted) >= 30
