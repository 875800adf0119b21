"""A new adapter on a model that may have had one before: where the model below it is written, and how both are saved.

merged    the earlier adapter is in the weights, which are written to `output_dir/base`; the new one lies beside that folder
kept      it is beside the weights (`duet.model.kept`); both are saved as one adapter, the new one alone in `on_top` too
"""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from ..folders import write_named
from ..model.adapters import (
    ADAPTER,
    BASE,
    absolute,
    add_adapter,
    check_no_other_base,
    save_base,
    trained_adapter,
)
from ..model.kept import ON_TOP, WEIGHTS, check_on_top, keeps, save_sum
from .checkpoints import ResumableTrainer
from .record import read_record

logger = logging.get_logger(__name__)


def check_earlier_adapter(option: str, new: bool, sharded: bool, argument: str = "earlier_adapter") -> None:
    """Refuses to keep an earlier adapter where no new one is put on top, or where the model is sharded."""
    why = "FSDP and DeepSpeed shard the model" if new else "no new adapter is put on top"
    if option == "keep" and (sharded or not new):
        raise ValueError(f"{argument}: wanted 'merge', got 'keep', because {why}")


def add_new_adapter(model: Any, tokenizer: Any, peft_config: Any, output_dir: str, writes: bool) -> nn.Module:
    """`model` with a new adapter; what it is trained on top of is written to `output_dir/base`, where no folder holds it."""
    earlier, kept = getattr(model, "earlier_model", None), keeps(model)
    base = Path(output_dir, BASE)
    if earlier and read_record(earlier) is not None:
        logger.warning(
            f"{earlier} is an unlearned model: what it has forgotten may come back unless its forget rows are among those of "
            "this run, too"
        )
    if earlier is None or kept:
        check_no_other_base(base, model)
    elif writes:
        logger.info(f"the adapter of {earlier or 'model'} was merged; the sum is saved as {base}")
        with write_named(base, "output_dir"):
            save_base(model, tokenizer, base)
    adapted: Any = add_adapter(model, peft_config)
    if kept:
        check_on_top(adapted)
    for config in adapted.peft_config.values():
        if earlier is not None:
            config.base_model_name_or_path, config.revision = os.fspath(earlier if kept else base), None
        # The adapter may be loaded from another working directory.
        config.base_model_name_or_path = absolute(config.base_model_name_or_path)
    return adapted


class AdapterTrainer(ResumableTrainer):
    """A trainer whose folders hold the one adapter that was trained.

    Its model may keep an earlier adapter: then they hold the sum, and in `on_top` what is resumed.
    """

    args: Any
    model: Any

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """`Trainer._save`, and of a model's adapters the trained one alone, whatever it is called."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or str(self.args.output_dir))
        if not (self.args.should_save and hasattr(model, "peft_config")):
            return
        _leave_trained(model, folder)
        if not keeps(model):
            return
        (folder / ON_TOP).mkdir(exist_ok=True)
        for name in (ADAPTER, WEIGHTS):
            os.replace(folder / name, folder / ON_TOP / name)
        save_sum(model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(self._trained_part(resume_from_checkpoint), model)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = self._trained_part(best)
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def _trained_part(self, checkpoint: str) -> str:
        """Where in a checkpoint the weights are that were trained."""
        kept = keeps(self.accelerator.unwrap_model(self.model))
        return os.path.join(checkpoint, ON_TOP) if kept else checkpoint


def _leave_trained(model: Any, folder: Path) -> None:
    """Leaves the trained adapter, in `folder`. Peft saves "default" there, and every other one in a folder of its name."""
    trained = trained_adapter(model)
    others = [name for name in model.peft_config if name != trained]
    if not others and trained == "default":  # it lies there already
        return
    for name in (*others, trained):  # the trained one last: it takes the place of "default"
        below = folder if name == "default" else folder / name
        for file in (ADAPTER, WEIGHTS):
            if name == trained:
                os.replace(below / file, folder / file)
            else:
                (below / file).unlink()
        if below != folder and not any(below.iterdir()):
            below.rmdir()
