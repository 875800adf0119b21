"""The folder of a command: no other process writes to it, and a full disk is an error that names it."""

import errno
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from forks import ended_by, forked, run_ranks
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from test_crashes import prepare, run_of
from tiny_models import tiny, word_tokenizer

from duet import folders
from duet.evaluation.commands import literal_console, resumable
from duet.evaluation.journal import write_json
from duet.folders import disk_named, lock, unlock, written
from duet.output.record import RECORD, write_record
from duet.run import commands, shrink

ON_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked on Windows")
REFUSED = "another process is writing to .*; wanted its end, or another folder"
FULL = "No space left on device"


def full_disk(*_, **__):
    """What a write says on a full disk, which knows no file's name."""
    raise OSError(errno.ENOSPC, FULL)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with base, rows and, in `adapter`, a trained adapter."""
    folder = tmp_path_factory.mktemp("given")
    prepare(folder)
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    word_tokenizer().save_pretrained(folder / "adapter")
    return folder


# name: (what it does with given and out, where it is after its beginning, the argument)
COMMANDS = {
    "train": (
        lambda given, out: commands.train(run_of(given, out)),
        (commands, "make_trainer"),
        "training.output_dir",
    ),
    "cache": (
        lambda given, out: commands.cache(run_of(given, given / "none", teacher_store=str(out))),
        (commands, "load_asked"),
        "training.teacher_store",
    ),
    "merge": (
        lambda given, out: commands.merge_adapter(given / "adapter", out),
        (commands, "tokenizer_at"),
        "out",
    ),
    "shrink": (
        lambda given, out: shrink.run_shrink(given / "adapter", given, out),
        (shrink, "read_record"),
        "out",
    ),
}


@ON_POSIX
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_folder_for_itself(given, tmp_path, monkeypatch, name):
    """From its beginning to its end, however it ends; then an empty folder that it made is gone, and the next one begins."""
    command, place, argument = COMMANDS[name]
    out, inside = tmp_path / "new" / "out", []

    def again():
        with pytest.raises(ValueError, match=f"^{argument}: {REFUSED}"):
            command(given, out)

    def meanwhile(*_, **__):
        inside.append(out.is_dir())
        assert len(inside) == 1, "a second one has begun"
        again()
        assert ended_by(forked(again)) == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, meanwhile)
    with pytest.raises(KeyboardInterrupt):
        command(given, out)
    assert inside == [True] and not (tmp_path / "new").exists()
    monkeypatch.setattr(*place, full_disk)
    with pytest.raises(OSError, match=f"^{argument}: .*out' could not be written: .*{FULL}"):
        command(given, out)
    assert not (tmp_path / "new").exists()


@ON_POSIX
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_the_processes_of_a_launch_lock_once_and_are_refused_together(given, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "make_trainer", lambda run: 1 / 0)
    monkeypatch.setattr(commands, "load_asked", lambda run: 1 / 0)

    def ends(kind, match):
        def one():
            for name in ("train", "cache"):
                with pytest.raises(kind, match=match):
                    COMMANDS[name][0](given, tmp_path / name)
                torch.distributed.barrier()

        return one

    with written(tmp_path / "train", "out"), written(tmp_path / "cache", "out"):
        run_ranks(2, ends(ValueError, REFUSED))
    run_ranks(2, ends(ZeroDivisionError, "division"))


@ON_POSIX
def test_a_folder_that_was_removed_meanwhile_is_not_what_is_locked(tmp_path, monkeypatch):
    """Who had it locked removes it, since it is empty, after this one has opened it."""
    out, take = tmp_path / "out", folders.fcntl.flock

    def removed(*args):
        monkeypatch.undo()
        out.rmdir()
        out.mkdir()
        take(*args)

    monkeypatch.setattr(folders.fcntl, "flock", removed)
    taken = lock(out, "out")
    with pytest.raises(ValueError, match=REFUSED):
        lock(out, "out")
    unlock(taken)
    unlock(lock(out, "out"))


@ON_POSIX
def test_a_child_that_lives_on_keeps_no_folder(tmp_path):
    """A worker of a data loader, say."""
    taken = lock(tmp_path, "out")
    child = forked(lambda: time.sleep(60))
    try:
        unlock(taken)
        unlock(lock(tmp_path, "out"))
    finally:
        os.kill(child, signal.SIGKILL)
        ended_by(child)


def test_without_locks_a_folder_is_made_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "fcntl", None)
    with written(tmp_path / "out", "out"), written(tmp_path / "out", "out"):
        (tmp_path / "out" / "a").write_text("kept")
    assert (tmp_path / "out" / "a").is_file()
    with pytest.raises(NotADirectoryError, match=r"^out: .*a is a file, wanted a folder"):
        written(tmp_path / "out" / "a", "out").__enter__()


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_has_a_name_and_other_errors_stay():
    with (
        pytest.raises(OSError, match=rf"^out: 'here' could not be written: .*{FULL}"),
        disk_named("here", "out"),
    ):
        full_disk()
    for error in (
        OSError(errno.ENOSPC, FULL, "a file"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError("forget: said already"),
    ):
        with pytest.raises(OSError) as raised, disk_named("here", "out"):
            raise error
        assert raised.value is error


def test_a_full_disk_has_a_name_in_eval_attack_and_elicit(tmp_path):
    said = rf"^out: '.*' could not be written: .*{FULL}"
    with pytest.raises(OSError, match=said), resumable(tmp_path, literal_console()):
        full_disk()


def test_a_file_that_could_not_be_written_whole_is_removed(tmp_path, monkeypatch):
    write_record(tmp_path, {"k": 8})
    before = (tmp_path / RECORD).read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)  # after the bytes were written
    with pytest.raises(OSError, match=rf"^output_dir: '.*' could not be written: .*{FULL}"):
        write_record(tmp_path, {"k": 9})
    with pytest.raises(OSError, match=FULL):
        write_json(tmp_path / "summary.json", {})
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]
    assert (tmp_path / RECORD).read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, FULL), SafetensorError(f"I/O error: {FULL} (28)")])
def test_a_full_disk_while_merging(given, tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(type(word_tokenizer()), "save_pretrained", fails)
    with pytest.raises(OSError, match=rf"^out: '.*merged' could not be written: .*{FULL}"):
        commands.merge_adapter(given / "adapter", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_shrinking(given, tmp_path, monkeypatch):
    def fails(*_):
        raise SafetensorError(f"I/O error: {FULL} (28)")

    monkeypatch.setattr(shrink, "load", lambda *_: (None, None))
    monkeypatch.setattr(shrink, "AdapterSize", lambda _: SimpleNamespace(save=fails))
    monkeypatch.setattr(shrink, "shrink", lambda *_, **__: SimpleNamespace(best=SimpleNamespace(size=1.0)))
    with pytest.raises(OSError, match=rf"^out: '.*small' could not be written: .*{FULL}"):
        shrink.run_shrink(given / "adapter", given, tmp_path / "small")
