"""Complete checkpoints: one that a killed process or a full disk left unfinished is never resumed from.

The Trainer writes `trainer_state.json` last, so a checkpoint is finished when that file exists and is valid. Two cases
need care: a checkpoint that is overwritten loses that file first, and one whose writing failed is removed. One of which a
file was cut afterwards is passed over with a warning.
"""

import json
import os
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..folders import write_named

logger = logging.get_logger(__name__)


def last_finished_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest finished checkpoint in a folder whose files are whole; None: there is none."""
    for _, path in sorted(_saved(output_dir).items(), reverse=True):
        if not (cut := _cut_file(path)):
            return str(path)
        logger.warning_once(f"{cut} is damaged: its checkpoint is passed over")
    return None


def damaged_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """A checkpoint that was written to its end and of which a file is cut now; None: there is none."""
    saved = _saved(output_dir).values()
    return next((path for path in saved if _cut_file(path)), None)


def _saved(output_dir: str | os.PathLike) -> dict[int, Path]:
    """Step -> the checkpoint in a folder that was written to its end."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and _of_step(path, int(step)):
            found[int(step)] = path
    return found


def _of_step(checkpoint: Path, step: int) -> bool:
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step


def _cut_file(checkpoint: Path) -> Path | None:
    """A file of tensors in a checkpoint that is not whole."""
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in (".pt", ".pth") and not (zipfile.is_zipfile(path) or _old_format(path)):
            return path
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except (OSError, SafetensorError):
                return path
    return None


def _old_format(path: Path) -> bool:
    """Whether torch wrote it in its old format, which is no zip file; a cut zip file begins with PK."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def resumed_checkpoint(resume_from: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint that `Trainer.train(resume_from)` goes on with, for True the newest finished one; None: it goes on with none.

    Raises:
        ValueError: there is none; it is not finished; a file of it is damaged; or it has no optimizer and scheduler: the Trainer
            would begin with new ones and say nothing.
    """
    if not resume_from:
        return None
    last = last_finished_checkpoint(output_dir)
    checkpoint = last if resume_from is True else os.path.expanduser(os.fspath(resume_from))
    if checkpoint is None:
        raise ValueError(f"resume_from_checkpoint: there is no finished checkpoint in {output_dir!r}")
    folder = Path(checkpoint)
    if folder.is_dir() and not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint!r} is not finished: it has no {TRAINER_STATE_NAME}, which is written last; "
            f"the newest finished one in {output_dir!r} is {last}"
        )
    if cut := _cut_file(folder):
        raise ValueError(
            f"resume_from_checkpoint: {str(cut)!r} is damaged; the newest finished checkpoint in {output_dir!r} is {last}"
        )
    whole = (any(folder.glob("optimizer*")) and (folder / SCHEDULER_NAME).is_file()) or any(
        folder.glob("global_step*")  # DeepSpeed's
    )
    if folder.is_dir() and not whole:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint!r} holds the weights, but not the optimizer and the learning rate (as "
            "with save_only_model: true), which would start anew; wanted a whole checkpoint, or a new run whose model is "
            "that folder"
        )
    return checkpoint


def check_output_dir(path: str) -> None:
    """Refuses a folder that cannot be written to: now, rather than at the first checkpoint."""
    while not os.path.exists(path):  # the nearest folder that is there decides
        path = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(path):
        raise NotADirectoryError(f"output_dir: wanted a folder, but {path!r} is a file")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output_dir: wanted a folder that can be written to, but {path!r} cannot")


class ResumableTrainer(Trainer):
    """transformers' Trainer with complete checkpoints; resumed from its last one, it makes no further step."""

    def _save_checkpoint(self, model, trial):
        """`Trainer._save_checkpoint`; if it fails, the checkpoint is removed and the error names the last finished one."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with write_named(folder, "output_dir"):
                super()._save_checkpoint(model, trial)
        except OSError as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            last = last_finished_checkpoint(folder.parent)
            earlier = f"the last finished checkpoint is {last}" if last else "there is no earlier checkpoint"
            raise OSError(f"{error}; what was written of it was removed, {earlier}") from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process has written before the file that says "finished"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model: Any = self.model
        broken = any(not x.isfinite().all() for x in model.parameters() if x.requires_grad and not x.is_meta)
        count: Any = self.accelerator.reduce(torch.tensor(float(broken), device=self.args.device))
        if count > 0:  # every process says so
            raise ValueError(
                f"learning_rate: after step {self.state.global_step} trained weights are NaN or infinite, which are not saved; wanted "
                f"a smaller one than {self.args.learning_rate:g}, or fp32 in place of fp16"
            )
        # Within a checkpoint `_save_checkpoint` reports the error.
        named = write_named(output_dir or str(self.args.output_dir), "output_dir")
        with nullcontext() if _internal_call else named:
            super().save_model(output_dir, _internal_call)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last checkpoint, the Trainer would make one step too many before it looks at max_steps.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
