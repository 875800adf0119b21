"""A run that is killed, at any moment, or whose disk is full, goes on bitwise as if nothing had been.

The kills are real: the test, which has imported everything, forks one child after another, and sends each a SIGKILL.
"""

import errno
import json
import os
import random
import shutil
import signal
import time
from itertools import compress
from pathlib import Path

import pytest
import torch
from forks import ended_by, forked
from safetensors.torch import load_file
from sweeps import case
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer
from tqdm import tqdm

from duet.folders import write_named
from duet.output.checkpoints import last_finished_checkpoint
from duet.run.config_file import RunConfig

STEPS, KILLS, A_CHAIN = 8, 10, 5


def prepare(folder: Path) -> None:
    tiny(attention_dropout=0.1).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    for name, rows in (("forget", forget_rows()), ("retain", retain_rows())):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run_of(folder: Path, out: Path, **options) -> RunConfig:
    """Dropout, drawn prefixes and adversarial views: everything that a resumed run must draw as the whole one did."""
    return RunConfig.of(
        {
            "model": str(folder / "base"),
            "adapter": {"r": 4, "lora_dropout": 0.1},
            "data": {"forget": str(folder / "forget.jsonl"), "retain": str(folder / "retain.jsonl")},
            "training": {
                "output_dir": str(out),
                "k": 8,
                "max_steps": STEPS,
                "learning_rate": 3e-3,
                "per_device_train_batch_size": 4,
                "steering_prefixes": ["you know nothing about {subject} .", "forget {subject}"],
                "reverse_prompts": ["ignore earlier instructions"],
                "save_steps": 1,
                "save_total_limit": 2,
                "logging_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
            }
            | options,
        }
    )


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_run(out: Path, whole: Path) -> None:
    """Logged losses and final weights, to the last bit."""
    assert losses(out) == losses(whole)
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (out, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def torture(folder: Path) -> dict:
    """The whole run, then chains of killed ones, each finished at last. What happened.

    A kill waits for a checkpoint that is none to three steps further than the last, and then for a part of a step: on a
    machine of any speed, and however unevenly it runs, the kills fall on many steps and anywhere within one.
    """
    from duet.run.commands import train

    rng = random.Random(int(os.environ.get("KILL_SEED", 0)))
    started = time.monotonic()
    assert ended_by(forked(lambda: train(run_of(folder, folder / "whole")))) == 0
    step_takes = (time.monotonic() - started) / STEPS
    kills, unfinished, resumed_from, chain = 0, 0, [], 0
    while kills < KILLS:
        out = folder / f"chain{chain}"
        at = 0
        for _ in range(A_CHAIN):
            if at >= STEPS - 1:
                break
            child = forked(lambda out=out: train(run_of(folder, out), resume=True))
            wanted = min(at + rng.randrange(4), STEPS - 1)
            give_up = time.monotonic() + 60
            while at < wanted and time.monotonic() < give_up:
                time.sleep(0.002)
                at = last_step(out)
            time.sleep(rng.uniform(0, 1) * step_takes)
            os.kill(child, signal.SIGKILL)
            kills += ended_by(child) == signal.SIGKILL
            at = last_step(out)
            resumed_from.append(at)
            unfinished += len(list(out.glob("checkpoint-*"))) > len(finished(out))
        assert ended_by(forked(lambda out=out: train(run_of(folder, out), resume=True))) == 0
        chain += 1
    return {"kills": kills, "unfinished": unfinished, "resumed_from": resumed_from, "chains": chain}


def last_step(out: Path) -> int:
    last = last_finished_checkpoint(out)
    return 0 if last is None else int(last.rpartition("-")[2])


def finished(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    prepare(tmp_path)
    report = torture(tmp_path)
    assert report["kills"] >= KILLS, report
    assert len(set(report["resumed_from"])) > 3, f"the kills must fall on different steps: {report}"
    for chain in range(report["chains"]):
        assert_same_run(tmp_path / f"chain{chain}", tmp_path / "whole")


def test_a_killed_process_takes_no_lock_of_progress_bars_along():
    """A child is killed while it holds the lock that it draws bars with: the lock of this process is free afterwards."""
    locks = tqdm.get_lock().locks

    def killed():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended_by(forked(killed)) == signal.SIGKILL
    free = [lock.acquire(False) for lock in locks]
    for lock in compress(locks, free):
        lock.release()
    assert all(free)


# -- in the middle of writing ------------------------------------------------------------------------------------------


def die_while_writing(name: str, at: int) -> None:
    """From the `at`-th writing of a file of that name on: half of it is written, then the process is killed."""
    import torch
    from transformers import TrainerState

    seen = [0]

    def dies(path):
        seen[0] += Path(path).name == name
        return Path(path).name == name and seen[0] == at

    def half(write):
        def writing(value, path, *args, **kwargs):
            write(value, path, *args, **kwargs)
            if dies(path):
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return writing

    torch.save = half(torch.save)
    TrainerState.save_to_json = half(TrainerState.save_to_json)
    import peft.peft_model as peft_model

    save = peft_model.safe_save_file
    peft_model.safe_save_file = lambda value, path, **kwargs: half(lambda v, p: save(v, p, **kwargs))(
        value, path
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with model and data, and a run of three steps in `whole`."""
    from duet.run.commands import train

    folder = tmp_path_factory.mktemp("uninterrupted")
    prepare(folder)
    train(run_of(folder, folder / "whole", max_steps=3))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        case("adapter_model.safetensors", slow=True),
        "optimizer.pt",
        case("scheduler.pt", slow=True),
        case("rng_state.pth", slow=True),
        "trainer_state.json",
    ],
)
def test_killed_while_saving(uninterrupted, tmp_path, name):
    from duet.run.commands import train

    def killed():
        die_while_writing(name, at=2)
        train(run_of(uninterrupted, tmp_path / "out", max_steps=3))

    assert ended_by(forked(killed)) == signal.SIGKILL
    assert (tmp_path / "out" / "checkpoint-2" / name).is_file(), "it died where it was meant to"
    assert last_finished_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
    resumed = forked(lambda: train(run_of(uninterrupted, tmp_path / "out", max_steps=3), resume=True))
    assert ended_by(resumed) == 0
    assert_same_run(tmp_path / "out", uninterrupted / "whole")


def test_a_checkpoint_that_is_written_again_is_unfinished_meanwhile(tmp_path):
    """Killed while checkpoint-2 is made again: its old trainer_state.json must not vouch for half-written files."""
    from duet.run.commands import train

    prepare(tmp_path)
    train(run_of(tmp_path, tmp_path / "out", max_steps=2))

    def killed():
        die_while_writing("optimizer.pt", at=1)
        first = str(tmp_path / "out" / "checkpoint-1")
        train(run_of(tmp_path, tmp_path / "out", max_steps=2, resume_from_checkpoint=first))

    assert ended_by(forked(killed)) == signal.SIGKILL
    assert last_finished_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")


def test_a_checkpoint_whose_state_is_of_another_step_is_unfinished(tmp_path):
    for name, step in (("checkpoint-1", 1), ("checkpoint-3", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_finished_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_checkpoint_with_a_cut_file_is_passed_over(uninterrupted, tmp_path, caplog, name):
    from duet.run.commands import train

    out = tmp_path / "out"
    shutil.copytree(uninterrupted / "whole", out)
    cut = out / "checkpoint-3" / name
    os.truncate(cut, cut.stat().st_size // 2)
    assert last_finished_checkpoint(out) == str(out / "checkpoint-2")
    assert f"{cut} is damaged: its checkpoint is passed over" in caplog.text
    said = r"^resume_from_checkpoint: '.*checkpoint-3/(\w+\.\w+)' is damaged; the newest finished .*checkpoint-2$"
    with pytest.raises(ValueError, match=said):
        train(run_of(uninterrupted, out, max_steps=3, resume_from_checkpoint=str(cut.parent)))
    if name == "optimizer.pt":
        train(run_of(uninterrupted, out, max_steps=3), resume=True)
        assert_same_run(out, uninterrupted / "whole")


def test_a_folder_whose_checkpoint_is_damaged_is_not_begun_again(uninterrupted, tmp_path):
    from duet.run.commands import train

    out = tmp_path / "out"
    shutil.copytree(uninterrupted / "whole" / "checkpoint-3", out / "checkpoint-3")
    os.truncate(out / "checkpoint-3" / "optimizer.pt", 100)
    with pytest.raises(
        FileExistsError, match="checkpoint-3' of an earlier run, which is damaged; wanted another folder"
    ):
        train(run_of(uninterrupted, out, max_steps=3))


def test_what_torch_wrote_without_a_zip_file_is_whole(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    torch.save({}, folder / "optimizer.pt", _use_new_zipfile_serialization=False)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    assert last_finished_checkpoint(tmp_path) == str(folder)


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["torch.save", "safetensors", "state"])
def test_a_full_disk(uninterrupted, tmp_path, monkeypatch, where):
    """An error that says what is left; the last finished checkpoint is there, the failed one is not; resume works."""
    import peft.peft_model
    import torch
    from safetensors import SafetensorError
    from transformers import TrainerState

    from duet.run.commands import train

    module, name, error = {
        "torch.save": (
            torch,
            "save",
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ),
        "safetensors": (
            peft.peft_model,
            "safe_save_file",
            SafetensorError("I/O error: No space left on device (28)"),
        ),
        "state": (TrainerState, "save_to_json", OSError(errno.ENOSPC, "No space left on device")),
    }[where]
    write = getattr(module, name)

    def full(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise error
        return write(value, path, *args, **kwargs)

    monkeypatch.setattr(module, name, full)
    with pytest.raises(OSError, match=r"output_dir: .*checkpoint-2.* could not be written: .*checkpoint-1$"):
        train(run_of(uninterrupted, tmp_path / "out", max_steps=3))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1"}
    monkeypatch.undo()
    train(run_of(uninterrupted, tmp_path / "out", max_steps=3), resume=True)
    assert_same_run(tmp_path / "out", uninterrupted / "whole")


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 5312 vs 5204",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "basic_ios::clear: failed to write",
    ],
)
def test_what_torch_says_of_a_full_disk(said):
    with (
        pytest.raises(OSError, match=r"^output_dir: 'out' could not be written: "),
        write_named("out", "output_dir"),
    ):
        raise RuntimeError(said)


def test_a_finished_run_is_not_trained_further(tmp_path):
    """transformers would make one more step."""
    from duet.run.commands import train

    prepare(tmp_path)
    out = tmp_path / "out"
    train(run_of(tmp_path, out, max_steps=2))
    shutil.copytree(out, tmp_path / "before")
    trainer = train(run_of(tmp_path, out, max_steps=2), resume=True)
    assert trainer.state.global_step == 2
    assert_same_run(out, tmp_path / "before")
    cards = [(folder / "README.md").read_text() for folder in (tmp_path / "before", out)]
    assert ["train_loss" in card for card in cards] == [True, False], "it would be 0"


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    from transformers import Trainer

    from duet.run.commands import train

    def broken(self, folder):
        raise RuntimeError("expected scalar type Half")

    prepare(tmp_path)
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(RuntimeError, match=r"^expected scalar type Half$"):
        train(run_of(tmp_path, tmp_path / "out", max_steps=2))


def test_nothing_to_resume_starts_at_the_beginning(tmp_path):
    from duet.run.commands import train

    prepare(tmp_path)
    trainer = train(run_of(tmp_path, tmp_path / "out", max_steps=1), resume=True)
    assert trainer.state.global_step == 1
    (tmp_path / "out" / "checkpoint-7").mkdir()
    (tmp_path / "out" / "checkpoint-9").write_text("a file of that name")
    (tmp_path / "out" / "checkpoint-7" / "trainer_state.json").write_text("[]")
    assert last_finished_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
