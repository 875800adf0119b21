"""Parts of the loss, averaged over the steps since they were last logged."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

# What the Trainer logs beside the loss.
_TAKEN = (
    "epoch",
    "grad_norm",
    "learning_rate",
    "num_input_tokens_seen",
    "step",
    "train_loss",
    "train_runtime",
)


def checked_parts(parts: Any, objective: str, needed: Sequence[str] = ("loss",)) -> dict[str, Tensor]:
    """`parts`, if they are what the loss of an objective must return.

    Raises:
        TypeError, ValueError: they are no dict of 0-d tensors, lack one that is `needed`, or one has the name of something else in
            the log; naming the objective.
    """
    named = f"objective {objective!r}: its loss must return"
    if not isinstance(parts, dict):
        raise TypeError(f"{named} a dict of 0-d tensors with 'loss' in it, got {type(parts).__name__}")
    for name in needed:
        if name not in parts:
            raise ValueError(f"{named} {name!r}, got the keys {list(parts)}")
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{named} a 0-d tensor as {name!r}, got {got}")
        if name in _TAKEN:
            raise ValueError(f"{named} {name!r} under another name, which the log uses itself")
    return parts


class LossParts(TrainerCallback):
    """Adds up on the device; only a log asks for numbers."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.since = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.sums = {}  # an attempt that ended in an error may have left some

    def add(self, parts: dict[str, Tensor], step: int) -> None:
        """The parts of one micro-batch of optimizer step `step`: its share of the whole step's means."""
        if not self.sums:
            self.since = step
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self, step: int, gathered: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Their means up to `step`, summed over processes; then counting starts anew.

        Args:
            step: how many optimizer steps have been made.
            gathered: `[parts]` -> `[processes, parts]`.
        """
        if not self.sums:
            return {}
        values = gathered(torch.stack([value.float() for value in self.sums.values()])).sum(0)
        means = (values / max(1, step - self.since)).tolist()
        names, self.sums = list(self.sums), {}
        return dict(zip(names, means, strict=True))


class LogsLastStep(TrainerCallback):
    """The last step is logged, too, where `max_steps` is no multiple of `logging_steps`: a short run has at least one log."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.logging_strategy == "steps":
            control.should_log = True
