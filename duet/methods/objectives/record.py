"""What an objective is: a loss over one micro-batch, what it wants from the teacher, and what it wants to see.

A loss is a function `loss(step) -> {"loss": ..., ...}`; everything else in the dict is logged. Sums over the tokens of a
micro-batch are divided by `step.counts`, which count the **whole** accumulated step over all processes: a mean over
each micro-batch would weigh short and long answers differently under gradient accumulation.

Legend: B queries of a micro-batch, N their scored positions, D hidden size. Must not know models, tokenizers or the
Trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from duet_kernels import LMHead

if TYPE_CHECKING:
    from ...config import DuetConfig


class Counts(NamedTuple):
    """How much one optimizer step holds, over all its micro-batches and processes. 0-d tensors, at least 1.

    `pushed_queries` and `refusal_positions` split the forget queries of `duet_deep` into those that carry the base's own
    answer and those that carry a refusal.
    """

    positions: Tensor
    forget_positions: Tensor
    retain_positions: Tensor
    forget_queries: Tensor
    retain_queries: Tensor
    pushed_queries: Tensor
    refusal_positions: Tensor

    @classmethod
    def of(cls, query: Tensor, forget: Tensor, targets: Any = None) -> Tensor:
        """`[7]` int64 counts of one micro-batch, not yet clamped: they add up over micro-batches and processes."""
        of_forget = forget[query]
        pushed = (targets or {}).get("pushed", torch.zeros_like(of_forget)).to(query.device)
        by_query = torch.zeros_like(forget, dtype=torch.int64).index_add(0, query, pushed.long()) > 0
        counted = (
            torch.ones_like(query),
            of_forget,
            ~of_forget,
            forget,
            ~forget,
            by_query,
            of_forget & ~pushed,
        )
        return torch.stack([each.sum() for each in counted])


@dataclass(frozen=True)
class Step:
    """One micro-batch, as an objective sees it: B queries with N scored positions in all.

    Attributes:
        hidden: `[N, D]` the student's hidden states where the answer's tokens are predicted.
        head: the student's LM head.
        targets: what `Objective.targets` made of the teacher, or what `Objective.prepare` put beside the rows; None
            without either.
        labels: `[N]` the answer's tokens, -100 where there is none.
        query: `[N]` which of the B queries a position belongs to.
        forget: `[B]` bool, True on forget queries.
        counts: of the whole accumulated step.
        args: the options.
    """

    hidden: Tensor
    head: LMHead
    targets: Any
    labels: Tensor
    query: Tensor
    forget: Tensor
    counts: Counts
    args: "DuetConfig"

    @property
    def of_forget(self) -> Tensor:
        """`[N]` bool, True on positions of forget queries."""
        return self.forget[self.query]

    @property
    def is_first(self) -> Tensor:
        """`[N]` bool, True on the first scored position of every query."""
        before = torch.cat([self.query.new_full((1,), -1), self.query[:-1]])
        return self.query != before

    def per_query(self, values: Tensor) -> Tensor:
        """`[N]` summed over the positions of each query: `[B]`."""
        return values.new_zeros(len(self.forget)).index_add(0, self.query, values)

    def lengths(self) -> Tensor:
        """`[B]` how many scored positions each query has."""
        return self.per_query(torch.ones_like(self.query))


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs.

    Attributes:
        loss: `loss(step) -> {"loss": ..., ...}`; None: nothing is trained (`in_context`).
        targets: `targets(hidden, head, labels, args)`, run on the teacher without gradients at every step; None: the
            loss reads no teacher, or only what `prepare` made.
        teacher_sees: `steered` (prefix + plain query) or `student` (exactly the student's input).
        needs_answers: whether it scores the dataset's answers.
        positions: the default of `DuetConfig.positions`; empty: `answer` where answers are needed, else `first`.
        refuses: the answers of forget rows are drawn from `DuetConfig.refusals` instead.
        adversarial: reverse prompts belong to it; the package's own are used where none are given.
        storable: `targets` makes a few numbers a position (all its tensors are `[N, ...]`): where a row is shown to the
            student in one way only, they are made before the first step, and no teacher runs after it.
        layer: `hidden` are the activations after decoder layer `DuetConfig.rmu_layer`, not those that the head reads.
        trains: `trains(parameter_name, args)`: which parameters are trained; None: all that require a gradient.
        start: `start(student, args)`: what is done to the student before it is trained, once the teacher has been copied.
        prepare: `prepare(trainer, dataset)`, run once before a dataset is used: what is made of the frozen teacher
            before training (and could be cached).
        starts_at_teacher: whether the student equals the teacher before the first step (watched by a guard).
        reads: the options of `DuetConfig` that shape the loss. `temperature` and `normalization` are refused where they
            are not among them; the model card shows all.
    """

    loss: Callable[[Step], dict[str, Tensor]] | None
    targets: Callable[[Tensor, LMHead, Tensor, "DuetConfig"], Any] | None = None
    teacher_sees: str = "steered"
    needs_answers: bool = False
    positions: str = ""
    refuses: bool = False
    adversarial: bool = False
    storable: bool = False
    layer: bool = False
    trains: Callable[[str, "DuetConfig"], bool] | None = None
    start: Callable[[Any, "DuetConfig"], None] | None = None
    prepare: Callable[[Any, Any], None] | None = None
    starts_at_teacher: bool = True
    reads: tuple[str, ...] = (
        "k",
        "delta",
        "temperature",
        "beta",
        "normalization",
        "npo_beta",
        "retain_weight",
    )

    def __post_init__(self) -> None:
        if not self.positions:
            object.__setattr__(self, "positions", "answer" if self.needs_answers else "first")

    @property
    def has_teacher(self) -> bool:
        return self.targets is not None or self.prepare is not None


def sum_where(condition: Tensor, losses: Tensor) -> Tensor:
    """The sum of `losses` where `condition` holds. A product with 0 would let a NaN of the other kind through."""
    return torch.where(condition, losses, 0).sum()


def with_retain(forget: Tensor, retain_losses: Tensor, step: Step) -> dict[str, Tensor]:
    """forget + retain_weight * (mean over retain positions of `retain_losses` `[N]`)."""
    retain = sum_where(~step.of_forget, retain_losses) / step.counts.retain_positions
    return {"loss": forget + step.args.retain_weight * retain, "forget_loss": forget, "retain_loss": retain}
