"""Who sees the steering prefix: frozen weights, run without gradients.

    AdapterOffTeacher   the student's own weights with its adapter switched off: one copy in memory
    FrozenTeacher       another module: a copy of the student before training, or a model that was passed in
    EarlyTeacher        the student itself, asked everything before its first step: one copy in memory
    CachedTeacher       no module: what a teacher said before, read from a TopKStore

A live teacher is called with a function and runs it on its model. Which numbers are wanted is not its business; it must
not know objectives. A cached one puts its numbers into the rows of a dataset.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import TrainerCallback
from transformers.utils import logging

from duet_kernels import TopK

from ..store.read import TopKStore, fingerprint
from .lm import call_through, evaluating
from .switches import Switches

if TYPE_CHECKING:
    from ..data.dataset import UnlearnDataset

logger = logging.get_logger(__name__)


class FrozenTeacher:
    """A module of its own. `FrozenTeacher.copy_of(student)` copies the student as it is now.

    The whole module lies on every device; only the student is sharded by FSDP or DeepSpeed.
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False).eval()
        self._switches = Switches(self.model)

    @classmethod
    def copy_of(cls, student: nn.Module, share: bool = False) -> "FrozenTeacher":
        """A copy of the student as it is now.

        Args:
            student: the model that will be trained.
            share: whether parameters that require no gradient are the student's own instead of copies.
        """
        kept = {id(p): p for p in student.parameters() if share and not p.requires_grad}
        return cls(copy.deepcopy(student, kept))

    def to(self, device: torch.device) -> None:
        if any(p.device != device for p in self.model.parameters()):
            self.model.to(device)

    def run(self, function: Callable[[nn.Module], Any], student: nn.Module, wrapped: nn.Module) -> Any:
        """`function(model)` of the frozen model, without gradients."""
        with torch.no_grad(), self._switches.evaluating():
            return function(self.model)


class AdapterOffTeacher:
    """The student without its adapter: what it was before training, in the same memory."""

    def __init__(self) -> None:
        self._switches: Switches | None = None

    def to(self, device: torch.device) -> None:
        """Nothing to move: the student's weights are where the student is."""

    def run(self, function: Callable[[nn.Module], Any], student: nn.Module, wrapped: nn.Module) -> Any:
        """`function(student)` with the adapter off, dropout off, without gradients.

        Runs inside the wrapper's forward, which gathers sharded parameters. Whether the adapter really was off is
        checked by `TeacherGuard`: under FSDP1 an adapter has been seen to stay on.
        """
        if self._switches is None or self._switches.model is not student:
            self._switches = Switches(student)
        with torch.no_grad(), self._switches.base_model():
            return call_through(wrapped, student, lambda: function(student))


class EarlyTeacher:
    """The student itself before its first step: what is wanted of it then is kept beside the rows, in the CPU's memory.

    For targets that are a few numbers a position, of rows that are shown in one way: `views.asked_before_training`.
    """

    def __init__(self) -> None:
        self.gone = False  # set when the first step is near: from then on the student is another model

    def to(self, device: torch.device) -> None:
        """Nothing to move: it is the student."""

    def run(self, function: Callable[[nn.Module], Any], student: nn.Module, wrapped: nn.Module) -> Any:
        """`function(student)`, dropout off, without gradients; only before the first step.

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

    def serve(self, dataset: "UnlearnDataset", batches: Iterable[tuple[list[int], list[int], Any]]) -> None:
        """From now on the rows of `dataset` carry what the untrained model says to them.

        Args:
            dataset: whose rows.
            batches: (rows, how many positions each has, targets): N positions in all, one row after the other, and a
                tree whose tensors are `[N, ...]`.
        """
        kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        for rows, lengths, targets in batches:
            leaves, self._tree = tree_flatten(targets)
            self._plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            parts = {
                str(n): leaf.cpu().split(lengths) for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
            }
            for place, row in enumerate(rows):
                kept[row, 0] = {name: part[place] for name, part in parts.items()}
        dataset.cached_targets = kept.__getitem__

    def targets(self, kept: dict[str, Tensor]) -> Any:
        """The tree of a batch."""
        return tree_unflatten([kept.get(str(n), leaf) for n, leaf in enumerate(self._plain)], self._tree)


class CachedTeacher:
    """A TopKStore in the place of a teacher: training runs without one, and without its forward.

    The targets are read where the rows are (in the data loader's processes), and travel with the batch as `values`,
    `indices` and `tail_logsumexp`; `topk` puts them together again.

    Args:
        store: opened; whether it fits the run is for the caller to check.
        k: so many of the stored logits are used.
    """

    def __init__(self, store: TopKStore, k: int):
        self.store, self.k = store, k

    def serve(self, dataset: "UnlearnDataset") -> None:
        """From now on the rows of `dataset` carry this teacher's targets, and its answers where it was asked for them.

        Raises:
            ValueError: a row whose targets are not in the store; the row is named.
        """
        places = {}
        for asked in dataset.asked():
            print_ = fingerprint(asked.plain, asked.steered, asked.answer)
            if print_ not in self.store:
                made = self.store.rows.get(asked.name)
                why = (
                    "it has no row of that name" if made is None else "that row was another when it was made"
                )
                raise ValueError(
                    f"teacher_store: rows: {self.store.folder} has nothing for {asked.name} under steering_prefixes"
                    f"[{asked.key[1]}]: {why}. The dataset differs from the one that was cached; cache this one"
                )
            places[asked.key] = print_
            if dataset.answers == "teacher":
                dataset.teacher_answers[asked.key] = self.store.read(print_).answer
        dataset.cached_targets = _Stored(self.store, self.k, places)

    def topk(self, targets: dict[str, Tensor]) -> TopK:
        """The TopK of a batch."""
        return TopK(**targets, temperature=self.store.provenance.temperature)

    def to(self, device: torch.device) -> None:
        """Nothing to move: the targets come with the batches."""

    def run(self, function: Callable[[nn.Module], Any], student: nn.Module, wrapped: nn.Module) -> Any:
        """There is no model to run `function` on."""
        raise RuntimeError(
            "teacher_store: this run has no teacher model, only its stored targets, and something asked the model; "
            "train without teacher_store"
        )


class _Stored:
    """(row, prefix) -> its targets as plain tensors; small enough to be sent to the data loader's processes."""

    def __init__(self, store: TopKStore, k: int, places: dict[tuple[int, int], bytes]):
        self.store, self.k, self.places = store, k, places

    def __call__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        targets = self.store.read(self.places[key], self.k).targets
        return {
            "values": targets.values,
            "indices": targets.indices,
            "tail_logsumexp": targets.tail_logsumexp,
        }


Teacher = FrozenTeacher | AdapterOffTeacher | EarlyTeacher | CachedTeacher


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
        self.teacher_before: Tensor | None = None

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
