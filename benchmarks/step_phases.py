"""Where the time and the memory of a DuetTrainer's step go: marks within the step, and what lies between two of them.

    batch | adapter off | teacher forward | top-k | adapter on | targets | student forward | loss | loss backward | backward |
    clip | optimizer | end

Each phase has its milliseconds (by the GPU's events, which are read after the run; by the clock on a CPU), what was
allocated at its end, and the most that was allocated within it. `targets`: those of a cached teacher are put together.

Marks sit where the trainer calls what it was given: its teacher, its objective, its model, its accelerator, its callbacks.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from duet import DuetTrainer
from duet.model.lm import find_backbone


class Mark(NamedTuple):
    """The end of a phase."""

    phase: str
    event: Any  # of the GPU, or None
    clock: float
    allocated: int
    peak: int  # since the mark before


@dataclasses.dataclass(frozen=True)
class Phases:
    """The median of some steps: milliseconds and bytes by phase, the whole step, and what a step looked like."""

    ms: dict[str, float]
    after: dict[str, int]
    peak: dict[str, int]
    step_ms: float
    host_ms: float
    standing: int
    steps: int
    student_tokens: int
    teacher_tokens: int
    n: int

    @property
    def loss_share(self) -> float:
        """Of a step: the loss's forward and backward, and the teacher's top-k."""
        return sum(self.ms.get(name, 0) for name in ("loss", "loss backward", "top-k")) / self.step_ms

    def above(self, *phases: str) -> int:
        """The most bytes in these phases beyond those that were there when the step began."""
        return max(0, *(self.peak.get(name, 0) - self.standing for name in phases))


class Watch(TrainerCallback):
    """Marks the steps of one trainer, from `Watch(trainer)` on."""

    def __init__(self, trainer: DuetTrainer):
        self.cuda = trainer.args.device.type == "cuda"
        self.steps: list[list[Mark]] = []
        self._now: list[Mark] | None = None
        self._sizes = (0, 0, 0)
        self._attach(trainer)
        trainer.add_callback(self)

    def mark(self, phase: str) -> None:
        if self._now is None:
            return
        event, allocated, peak = None, 0, 0
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._now.append(Mark(phase, event, time.perf_counter(), allocated, peak))

    def _attach(self, trainer: DuetTrainer) -> None:
        teacher, objective, accelerator = trainer.teacher, trainer.objective, trainer.accelerator
        run, backward, compute_loss = teacher.run, accelerator.backward, trainer.compute_loss
        loss, targets = objective.loss, objective.targets

        def watched_run(function, *args):
            self.mark("batch")

            def watched(model):
                self.mark("adapter off")
                return function(model)

            out = run(watched, *args)
            self.mark("adapter on")
            return out

        def watched_compute_loss(model, inputs, *args, **kwargs):
            teacher_ids = inputs.get("teacher_input_ids")
            read = 0 if teacher_ids is None else teacher_ids.numel()
            self._sizes = inputs["input_ids"].numel(), read, inputs["positions"].numel()
            if teacher_ids is None:
                self.mark("batch")
            return compute_loss(model, inputs, *args, **kwargs)

        def watched_targets(*args):
            self.mark("teacher forward")
            out = targets(*args)
            self.mark("top-k")
            return out

        def watched_loss(step):
            self.mark("student forward")
            if step.hidden.requires_grad:
                step.hidden.register_hook(lambda grad: self.mark("loss backward"))
            out = loss(step)
            self.mark("loss")
            return out

        def watched_backward(*args, **kwargs):
            backward(*args, **kwargs)
            self.mark("backward")

        def before_backbone(*_):
            if torch.is_grad_enabled():
                self.mark("targets")

        teacher.run, accelerator.backward, trainer.compute_loss = (
            watched_run,
            watched_backward,
            watched_compute_loss,
        )
        trainer.objective = dataclasses.replace(objective, loss=watched_loss, targets=watched_targets)
        self._handle = find_backbone(trainer.model).register_forward_pre_hook(before_backbone)

    def detach(self) -> None:
        """The model runs without marks again."""
        self._handle.remove()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._now = []
        self.mark("begin")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("clip")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("optimizer")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.mark("end")
        self.steps.append(self._now)
        self._now = None

    def phases(self, last: int) -> Phases:
        """Of the last so many steps."""
        steps = self.steps[-last:]
        if self.cuda:
            torch.cuda.synchronize()
        names = list(dict.fromkeys(mark.phase for step in steps for mark in step[1:]))
        ms: dict[str, list[float]] = {name: [] for name in names}
        for step in steps:
            for before, mark in itertools.pairwise(step):
                ms[mark.phase].append(self._ms(before, mark))
        of_steps = {
            name: [mark for step in steps for mark in step[1:] if mark.phase == name] for name in names
        }
        student, teacher, n = self._sizes
        return Phases(
            ms={name: statistics.median(values) for name, values in ms.items()},
            after={name: marks[-1].allocated for name, marks in of_steps.items()},
            peak={name: max(mark.peak for mark in marks) for name, marks in of_steps.items()},
            step_ms=statistics.median(self._ms(step[0], step[-1]) for step in steps),
            host_ms=statistics.median(1e3 * (step[-1].clock - step[0].clock) for step in steps),
            standing=steps[-1][0].allocated,
            steps=len(steps),
            student_tokens=student,
            teacher_tokens=teacher,
            n=n,
        )

    def _ms(self, before: Mark, after: Mark) -> float:
        return before.event.elapsed_time(after.event) if self.cuda else 1e3 * (after.clock - before.clock)


def bytes_of(tensors: Any) -> int:
    """Of storages; shared ones count once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)
    }
    return sum(storages.values())
