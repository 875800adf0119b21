"""Import paths of version 0.1.0 work, and say where their contents are now."""

import importlib
import runpy
import sys
import warnings

import pytest
from forks import ended_by, forked

from duet._moved import MOVED

TOOK_ITS_PLACE = [old for old, new in MOVED.items() if new.startswith(f"{old}.")]


@pytest.mark.parametrize("old", [old for old in MOVED if old not in TOOK_ITS_PLACE])
def test_an_old_module_is_found_and_names_the_new_one(old):
    sys.modules.pop(old, None)
    where = " and ".join(MOVED[old].split())
    with pytest.warns(
        DeprecationWarning, match=rf"^{old} is now {where}; the old path goes in version 0.3"
    ) as said:
        module = importlib.import_module(old)
    assert len([w for w in said if str(w.message).startswith(f"{old} ")]) == 1
    held = {}  # the first of several modules that has a name
    for new in reversed([importlib.import_module(name) for name in MOVED[old].split()]):
        held |= {name: value for name, value in vars(new).items() if not name.startswith("__")}
    assert held or old == "duet.world"
    assert all(getattr(module, name) is value for name, value in held.items())
    with pytest.raises(AttributeError):
        module.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize("old", TOOK_ITS_PLACE)
def test_a_package_that_took_a_modules_place_finds_what_the_module_held(old):
    package, new = importlib.import_module(old), importlib.import_module(MOVED[old])
    name = next(n for n, x in vars(new).items() if getattr(x, "__module__", "") == MOVED[old] and n[0] != "_")
    with pytest.warns(DeprecationWarning, match=f"^{old}.{name} is now {MOVED[old]}.{name};"):
        assert getattr(package, name) is getattr(new, name)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing_of_that_name'"):
        package.nothing_of_that_name  # noqa: B018


def test_new_paths_say_nothing_and_what_users_wrote_is_told_the_new_one(tmp_path):
    """In a process of its own, as scripts that were written for 0.1.0; the warning points at their line.

    First everything of `duet` is imported anew by its new path, at which an old one in our own code would be an error.
    """
    script = tmp_path / "script.py"
    script.write_text("""import warnings
warnings.filterwarnings("error", "duet", DeprecationWarning)
from duet.evaluation.attacks import weights
import duet.store.build, duet.run.commands, duet.evaluation.commands, duet.demo.tour, duet.trainer
warnings.filterwarnings("always", "duet", DeprecationWarning)
from duet.caching import cache_teacher
from duet.data import Draw
from duet.evaluation.attacks import ATTACKS
from duet.evaluation.suites import load_suite
from duet.objectives.distillation import teacher_topk
from duet.world.checkpoint import load_base
import duet.topk_store
assert duet.topk_store.TopKStore and duet.topk_store.seal_of
""")

    def run():
        with open(tmp_path / "said", "w") as said:
            warnings.showwarning = lambda *told: said.write(warnings.formatwarning(*told[:4]))
            for name in [name for name in sys.modules if name.partition(".")[0] == "duet"]:
                del sys.modules[name]
            sys.meta_path[:] = [
                finder for finder in sys.meta_path if type(finder).__module__ != "duet._moved"
            ]
            runpy.run_path(str(script))

    assert ended_by(forked(run)) == 0, "the error is in the captured stderr"
    said = (tmp_path / "said").read_text()
    for line, new in enumerate(
        (
            "store.build",
            "data.dataset.Draw",
            "evaluation.attacks.attacks.ATTACKS",
            "evaluation.suites.suite.load_suite",
            "methods.objectives.distillation",
            "demo.checkpoint",
            "store.read",
        ),
        start=6,
    ):
        assert any(
            f"script.py:{line}: DeprecationWarning: duet." in told and f" is now duet.{new};" in told
            for told in said.splitlines()
        ), (line, said)


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"duet\.cachin"):
        importlib.import_module("duet.cachin")
