"""What an objective is: a loss over one micro-batch, the targets it needs of the teacher, and the rows it scores.

A loss is a function `loss(step) -> {"loss": ..., ...}`; everything else in the dict is logged. Sums over the tokens of a
micro-batch are divided by `step.counts`, which count the **whole** accumulated step over all processes: a mean over
each micro-batch would weigh short and long answers differently under gradient accumulation.

Legend: B queries of a micro-batch, N their scored positions, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from duet_kernels import LMHead, TopK, topk_distill_loss
from duet_kernels.dispatch import Impl

from ...options import Count, NotNegative


@dataclass
class CommonOptions:
    """Options that several methods read.

    Attributes:
        k: how many of the teacher's largest logits the student imitates.
        retain_weight: factor on the retain term of `graddiff*`, `npo*`, `simnpo`, `refusal`, `undial` and `duet_deep`
            (`ga` has none, `rmu` its own; the others weigh all queries alike).
        impl: implementation of the losses: `auto`, `triton`, `chunked` or `reference`.
    """

    k: Count = 32
    retain_weight: NotNegative = 1.0
    impl: Impl = "auto"


class Counts(NamedTuple):
    """How much one optimizer step holds, over all its micro-batches and processes. 0-d tensors, at least 1."""

    positions: Tensor
    forget_positions: Tensor
    retain_positions: Tensor
    forget_queries: Tensor
    retain_queries: Tensor
    own: Sequence[Tensor] = ()  # what `Objective.counts` counts

    @classmethod
    def of(cls, totals: Tensor) -> "Counts":
        """Of the added counts `[5 + own]` of micro-batches and processes; a count of 0 becomes 1."""
        positions, forget, retain, forget_queries, retain_queries, *own = totals.clamp(min=1).unbind()
        return cls(positions, forget, retain, forget_queries, retain_queries, own)


@dataclass(frozen=True)
class Step:
    """The inputs of a loss for one micro-batch: B queries with N scored positions in all.

    Attributes:
        hidden: `[N, D]` the student's hidden states where the answer's tokens are predicted.
        head: the student's LM head.
        targets: what `Objective.targets` made of the teacher, or what `Objective.prepare` put beside the rows; None
            without either.
        labels: `[N]` the answer's tokens, -100 where there is none.
        query: `[N]` which of the B queries a position belongs to.
        forget: `[B]` bool, True on forget queries.
        counts: of the whole accumulated step.
        args: the options, a `DuetConfig`.
    """

    hidden: Tensor
    head: LMHead
    targets: Any
    labels: Tensor
    query: Tensor
    forget: Tensor
    counts: Counts
    args: Any

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

    def tail_kl(self, teacher: TopK) -> Tensor:
        """`[N]` KL(p_teacher || p_student) on the teacher's top-k and a bucket for the rest, nats."""
        how: Any = {"divergence": "forward_kl", "normalization": "tail", "impl": self.args.impl}
        return topk_distill_loss(self.hidden, self.head, teacher, reduction="none", **how)

    def forget_mean(self, losses: Tensor) -> Tensor:
        """The mean of `losses` `[N]` over the forget positions of the whole step: this micro-batch's part of it."""
        return sum_where(self.of_forget, losses) / self.counts.forget_positions

    def retain_mean(self, losses: Tensor) -> Tensor:
        """The same over the retain positions."""
        return sum_where(~self.of_forget, losses) / self.counts.retain_positions

    def mean(self, losses: Tensor) -> dict[str, Tensor]:
        """The loss that is the mean of `losses` `[N]` over all positions; logged are both kinds alone."""
        logged = losses.detach()
        parts = {"forget_loss": self.forget_mean(logged), "retain_loss": self.retain_mean(logged)}
        return {"loss": losses.sum() / self.counts.positions} | parts

    def with_retain(self, forget: Tensor, retain_losses: Tensor) -> dict[str, Tensor]:
        """The loss forget + retain_weight * (mean of `retain_losses` `[N]` over the retain positions)."""
        retain = self.retain_mean(retain_losses)
        return {
            "loss": forget + self.args.retain_weight * retain,
            "forget_loss": forget,
            "retain_loss": retain,
        }


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
        reads: the options of `DuetConfig` that shape the loss. `temperature`, `normalization` and `clip` are refused where
            they are not among them; the model card shows all.
        raw_logits: the loss compares logits themselves: a temperature, a normalization, a clip and a store of
            log-probabilities are refused.
        counts: `counts(inputs) -> [E]` int64: further counts of a micro-batch of the collator; they are summed over the
            step as `Step.counts.own`.
        sharp: the gradient of the forget part is taken at weights that are moved by `sam_rho` along it, that of the retain
            part where they are (`duet.methods.sharpness`). The loss is `forget_loss` + retain_weight `retain_loss`.
        direction: `direction(trainer)`, run once on the untrained model: the gradient of every trained parameter, along which
            all steps are made. The loss is then only measured.
        keeps: whether retain rows are what its loss keeps; training without any is then warned of.
    """

    loss: Callable[[Step], dict[str, Tensor]] | None
    targets: Callable[[Tensor, LMHead, Tensor, Any], Any] | None = None
    teacher_sees: Literal["steered", "student"] = "steered"
    needs_answers: bool = False
    positions: str = ""
    refuses: bool = False
    adversarial: bool = False
    storable: bool = False
    layer: bool = False
    trains: Callable[[str, Any], bool] | None = None
    start: Callable[[Any, Any], None] | None = None
    prepare: Callable[[Any, Any], None] | None = None
    starts_at_teacher: bool = True
    reads: tuple[str, ...] = (
        "k",
        "delta",
        "temperature",
        "beta",
        "normalization",
        "clip",
        "npo_beta",
        "retain_weight",
    )
    raw_logits: bool = False
    counts: Callable[[dict[str, Any]], Tensor] | None = None
    sharp: bool = False
    direction: Callable[[Any], list[Tensor]] | None = None
    keeps: bool = True

    def __post_init__(self) -> None:
        if not self.positions:
            object.__setattr__(self, "positions", "answer" if self.needs_answers else "first")

    @property
    def has_teacher(self) -> bool:
        return self.targets is not None or self.prepare is not None

    @property
    def is_steered(self) -> bool:
        """Whether the student imitates a teacher behind a steering prefix."""
        return self.targets is not None and self.teacher_sees == "steered"

    @property
    def shows_prefix(self) -> bool:
        """Whether the steering prefix is used: a teacher, `prepare` or the model that is saved (`in_context`) sees it."""
        return self.teacher_sees == "steered" and (self.targets is not None or not self.needs_answers)

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """`[5 + E]` int64: the counts of one micro-batch, which add up over micro-batches and processes."""
        of_forget = inputs["forget"][inputs["query"]]
        each = (torch.ones_like(of_forget), of_forget, ~of_forget, inputs["forget"], ~inputs["forget"])
        common = torch.stack([one.sum() for one in each])
        return common if self.counts is None else torch.cat([common, self.counts(inputs)])


def sum_where(condition: Tensor, losses: Tensor) -> Tensor:
    """The sum of `losses` where `condition` holds. A product with 0 would let a NaN of the other kind through."""
    return torch.where(condition, losses, 0).sum()
