"""The teacher: frozen weights, run without gradients. It alone sees the steering prefix.

    AdapterOffTeacher   the student's own weights with its adapter switched off: one copy in memory
    FrozenTeacher       another module: a copy of the student before training, or a model that was passed in
    EarlyTeacher        the student itself, asked everything before its first step: one copy in memory
    store.CachedTeacher   no module: what a teacher said before, read from a TopKStore

A teacher with a model is given a function and calls it with that model; what the function computes is up to the caller.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import TrainerCallback
from transformers.utils import logging

from duet_kernels import LMHead

from ..data.dataset import UnlearnDataset
from .adapters import check_base_stays
from .lm import base_language_model, call_through, check_head
from .loading import load_model
from .switches import Switches, evaluating

logger = logging.get_logger(__name__)

Function = Callable[[nn.Module], Any]
# (rows, how many positions each has, targets): N positions in all, one row after the other, and a tree whose tensors are [N, ...]
RowTargets = tuple[list[int], list[int], Any]


class Teacher:
    """What every kind of teacher does.

    Attributes:
        watched: whether it could change while the student is trained, so that `TeacherGuard` watches it.
        asks_first: whether everything must be asked before the first step.
        under_fsdp1: whether it works there.
    """

    watched, asks_first, under_fsdp1 = True, False, True

    def to(self, device: torch.device) -> None:
        """Moves a model of its own."""

    def run(self, function: Function, student: nn.Module, wrapped: nn.Module) -> Any:
        """`function(model)` of the frozen model, without gradients, dropout off.

        Args:
            function: is given the model.
            student: the model that is trained.
            wrapped: the same as the Trainer calls it, inside DDP, FSDP or DeepSpeed.
        """
        raise NotImplementedError

    def serve(self, dataset: UnlearnDataset, ask: Callable[[UnlearnDataset], Iterable[RowTargets]]) -> None:
        """Called before `dataset` is used, each time until its rows carry targets; `ask(dataset)` gives those of all its rows, batch
        by batch."""

    def targets(self, stored: Any, function: Function, student: nn.Module, wrapped: nn.Module) -> Any:
        """What the objective wants of one micro-batch.

        Args:
            stored: what came with the batch, if `serve` put something beside its rows.
            function: makes the targets, given the model.
            student, wrapped: as in `run`.
        """
        return self.run(function, student, wrapped)


class FrozenTeacher(Teacher):
    """A module of its own, whole on every device: only the student is sharded by FSDP or DeepSpeed."""

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False).eval()
        self._switches = Switches(self.model)

    @classmethod
    def copy_of(cls, student: nn.Module, share: bool = False) -> "FrozenTeacher":
        """A copy of the student as it is; with `share` parameters that require no gradient are the student's own."""
        shared = {id(p): p for p in student.parameters() if share and not p.requires_grad}
        return cls(copy.deepcopy(student, shared))

    def to(self, device: torch.device) -> None:
        if any(p.device != device for p in self.model.parameters()):
            self.model.to(device)

    def run(self, function: Function, student: nn.Module, wrapped: nn.Module) -> Any:
        with torch.no_grad(), self._switches.evaluating():
            return function(self.model)


class AdapterOffTeacher(Teacher):
    """The student without its adapter: what it was before training, in the same memory.

    Runs inside the wrapper's forward, which gathers sharded parameters. Whether the adapter really was off is checked by
    `TeacherGuard`: under FSDP1 an adapter has been seen to stay on.
    """

    under_fsdp1 = False

    def __init__(self) -> None:
        self._switches: Switches | None = None

    def run(self, function: Function, student: Any, wrapped: nn.Module) -> Any:
        if self._switches is None or self._switches.model is not student:
            self._switches = Switches(student)
        with torch.no_grad(), self._switches.base_model():
            return call_through(wrapped, student, lambda: function(student))


class EarlyTeacher(Teacher):
    """The student itself before its first step: its targets are stored beside the rows, in the CPU's memory.

    For targets that are a few numbers a position, of rows that are shown in one way: `views.asked_before_training`.
    """

    watched = False

    def __init__(self) -> None:
        self.gone = False  # set when the first step is near: from then on the student is another model

    @property
    def asks_first(self) -> bool:
        return not self.gone

    def run(self, function: Function, student: nn.Module, wrapped: nn.Module) -> Any:
        """Only before the first step.

        Raises:
            RuntimeError: training has begun.
        """
        if self.gone:
            raise RuntimeError(
                "eval_dataset: what the untrained model says to these rows was wanted, but training has begun and no copy "
                "was kept; give all rows to DuetTrainer(eval_dataset=...), or pass teacher_model"
            )
        with torch.no_grad(), evaluating(student):
            return function(student)

    def serve(self, dataset: UnlearnDataset, ask: Callable[[UnlearnDataset], Iterable[RowTargets]]) -> None:
        """From now on the rows of `dataset` carry what the untrained model says to them."""
        stored: dict[tuple[int, int], dict[str, Tensor]] = {}
        for rows, lengths, targets in ask(dataset):
            leaves, self._tree = tree_flatten(targets)
            self._plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            parts = {
                str(n): leaf.cpu().split(lengths) for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
            }
            for place, row in enumerate(rows):
                stored[row, 0] = {name: part[place] for name, part in parts.items()}
        dataset.cached_targets = stored.__getitem__

    def targets(self, stored: Any, function: Function, student: nn.Module, wrapped: nn.Module) -> Any:
        if stored is None:
            return self.run(function, student, wrapped)
        return tree_unflatten([stored.get(str(n), leaf) for n, leaf in enumerate(self._plain)], self._tree)


def live_teacher(
    student: nn.Module,
    teacher_model: Any,
    head: LMHead,
    init_kwargs: Any = None,
    device: torch.device | None = None,
    *,
    early: bool = False,
    share: bool = False,
) -> Teacher:
    """The teacher of a student: another model, the student's base, or the student as it is now.

    Args:
        student: before training.
        teacher_model: another model or its name; None: the student itself.
        head: the student's.
        init_kwargs, device: for loading `teacher_model` by name (`load_model`).
        early: whether a student without adapter can be asked everything before the first step.
        share: whether a copy may share the weights that are not trained.

    Raises:
        TypeError, ValueError, OSError: naming `teacher_model`.
    """
    if teacher_model is None:
        if hasattr(student, "disable_adapter"):
            check_base_stays(student)
            return AdapterOffTeacher()
        return EarlyTeacher() if early else FrozenTeacher.copy_of(student, share)
    teacher = load_model(teacher_model, "teacher_model", init_kwargs, device)
    if teacher is student or teacher is base_language_model(student):
        raise ValueError(
            "teacher_model: wanted another model than the one that is trained; None makes a copy"
        )
    size = check_head(teacher).num_ids
    if size != head.num_ids:
        raise ValueError(
            f"teacher_model: wanted the model's vocabulary of {head.num_ids} ids, got {size}; the teacher's top-k "
            "ids must mean the same tokens"
        )
    return FrozenTeacher(teacher)


class TeacherGuard(TrainerCallback):
    """Watches that the teacher is, and stays, the model that training started from.

    On a few plain forget queries (no prefix), with dropout off, it compares hidden states: bitwise on a CPU, within
    rounding elsewhere.

    * Before the first step the teacher equals the student (unless it is another model, or training is resumed).
    * Once the student has moved, and at the end, the teacher is what it was: an adapter that was not really off, or a
      copy that shares memory with the student, is caught after one step instead of training the student on itself.

    Args:
        probe: returns (student's, teacher's) hidden states on the plain queries.
        starts_equal: whether teacher and student are the same model before training.
        rounding: how far they may then be apart, as a share of the states' root mean square.
    """

    def __init__(self, probe: Callable[[], tuple[Tensor, Tensor]], starts_equal: bool, rounding: float = 0.0):
        self.probe, self.starts_equal, self.rounding = probe, starts_equal, rounding
        self.teacher_before: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.student_before, teacher = self.probe()
        self.student_moved, self.began_at = False, state.global_step
        if self.teacher_before is not None:  # train() again: the student may have moved, the teacher may not
            self._compare()
            return
        self.teacher_before = teacher
        if self.starts_equal and state.global_step == 0 and not self._starts_equal(teacher):
            raise RuntimeError(
                "teacher: before the first step, teacher and student differ on plain queries by up to "
                f"{_distance(self.student_before, self.teacher_before):.3g}. With an adapter this means that switching "
                "it off does not give the base model back (an initialisation that changes the base, such as PiSSA, or "
                "an adapter that is not zero at the start): pass teacher_model instead"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if not self.student_moved:  # a warm-up step has learning rate 0
            self._compare()

    def on_train_end(self, args, state, control, **kwargs):
        self._compare()
        if not self.student_moved and state.global_step > self.began_at:  # a finished run makes no step
            logger.warning(
                "the student did not change during training: is learning_rate 0, or everything frozen?"
            )

    def _starts_equal(self, teacher: Tensor) -> bool:
        if _same(self.student_before, teacher):
            return True
        states = teacher.float()
        return bool((self.student_before.float() - states).norm() <= self.rounding * states.norm())

    def _compare(self) -> None:
        student, teacher = self.probe()
        if not _same(teacher, self.teacher_before):
            raise RuntimeError(
                "teacher: it changed while the student was trained (hidden states on plain queries moved by up to "
                f"{_distance(teacher, self.teacher_before):.3g}): its adapter is not really switched off, or it shares "
                "weights with the student. Pass teacher_model, a model of its own"
            )
        self.student_moved = not torch.equal(student, self.student_before)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "cpu":
        return torch.equal(a, b)
    return _distance(a, b) <= 1e-3 * float(b.abs().amax())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().amax())
