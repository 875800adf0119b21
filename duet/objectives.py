"""OBJECTIVES: what the student minimises. A plain dict; add one with a function and one line:

    OBJECTIVES["mine"] = Objective(my_loss, targets=teacher_topk)

`my_loss(step)` returns a dict of 0-d tensors with "loss" in it; everything else in it is logged. Sums over the tokens of
a micro-batch are divided by `step.counts`, which count the **whole** accumulated step over all processes: a mean over
each micro-batch would weigh short and long answers differently under gradient accumulation.

Every loss here comes from public names of `duet_kernels`. Must not know models, tokenizers or the Trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from duet_kernels import LMHead, TopK, linear_cross_entropy, linear_topk, topk_distill_loss

if TYPE_CHECKING:
    from .config import DuetConfig


class Counts(NamedTuple):
    """How much one optimizer step holds, over all its micro-batches and processes. 0-d tensors, at least 1."""

    positions: Tensor
    forget_positions: Tensor
    retain_positions: Tensor
    forget_queries: Tensor
    retain_queries: Tensor


@dataclass(frozen=True)
class Step:
    """One micro-batch, as an objective sees it: B queries with N scored positions in all.

    Attributes:
        hidden: `[N, D]` the student's hidden states where the answer's tokens are predicted.
        head: the student's LM head.
        targets: what `Objective.targets` made of the teacher; None without.
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


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs.

    Attributes:
        loss: `loss(step) -> {"loss": ..., ...}`.
        targets: `targets(hidden, head, labels, args)`, run on the teacher without gradients; None: no teacher.
        teacher_sees: `steered` (prefix + plain query) or `student` (exactly the student's input).
        needs_answers: whether it scores the dataset's answers.
    """

    loss: Callable[[Step], dict[str, Tensor]]
    targets: Callable[[Tensor, LMHead, Tensor, "DuetConfig"], Any] | None = None
    teacher_sees: str = "steered"
    needs_answers: bool = False

    @property
    def positions(self) -> str:
        """The default of `DuetConfig.positions`."""
        return "answer" if self.needs_answers else "first"


# -- targets: teacher hidden states -> plain data -------------------------------------------------------------------


def teacher_topk(hidden: Tensor, head: LMHead, labels: Tensor, args: "DuetConfig") -> TopK:
    """The teacher's k largest logits at every scored position."""
    return linear_topk(hidden, head, args.k, temperature=args.temperature, impl=args.impl)


def answer_nll(hidden: Tensor, head: LMHead, labels: Tensor, args: "DuetConfig") -> Tensor:
    """`[N]` -log p(answer token), nats; 0 where there is no token."""
    return linear_cross_entropy(hidden, head, labels, reduction="none", impl=args.impl)


# -- losses ---------------------------------------------------------------------------------------------------------


def duet(step: Step) -> dict[str, Tensor]:
    """DUET (arXiv 2601.21283, equation 3): Huber between raw logits at the teacher's top-k ids C_K.

    sum_{i in C_K} Huber_delta(z_student,i(x) - z_teacher,i(c + x)), averaged over scored positions; forget and retain
    queries weigh alike.
    """
    return _distil(step, divergence="huber", delta=step.args.delta)


def duet_forward_kl(step: Step) -> dict[str, Tensor]:
    """KL(p_teacher || p_student) on the teacher's top-k, nats per position."""
    return _distil(step, divergence="forward_kl", **_distribution(step))


def duet_reverse_kl(step: Step) -> dict[str, Tensor]:
    """KL(p_student || p_teacher) on the teacher's top-k, nats per position."""
    return _distil(step, divergence="reverse_kl", **_distribution(step))


def duet_jsd(step: Step) -> dict[str, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, on the teacher's top-k, nats per position."""
    return _distil(step, divergence="jsd", beta=step.args.beta, **_distribution(step))


def gradient_ascent(step: Step) -> dict[str, Tensor]:
    """GA: -NLL(forget answers) + retain_weight * NLL(retain answers), each per token (GradDiff with retain rows)."""
    nll = answer_nll(step.hidden, step.head, step.labels, step.args)
    forget = -_sum_where(step.of_forget, nll) / step.counts.forget_positions
    return _with_retain(forget, nll, step)


def npo(step: Step) -> dict[str, Tensor]:
    """NPO (arXiv 2404.05868): -(2 / beta) log sigma(-beta (log p_student(y | x) - log p_base(y | x))) per forget query.

    On log-probabilities of whole answers, sums over their tokens. Plus retain_weight * NLL per retain token.
    """
    nll = answer_nll(step.hidden, step.head, step.labels, step.args)
    log_ratio = torch.zeros_like(nll[: len(step.forget)]).index_add(0, step.query, step.targets - nll)
    beta = step.args.npo_beta
    per_query = -2 / beta * F.logsigmoid(-beta * log_ratio)
    forget = _sum_where(step.forget, per_query) / step.counts.forget_queries
    return _with_retain(forget, nll, step)


def _distribution(step: Step) -> dict[str, Any]:
    return {"temperature": step.args.temperature, "normalization": step.args.normalization}


def _distil(step: Step, **options: Any) -> dict[str, Tensor]:
    losses = topk_distill_loss(
        step.hidden, step.head, step.targets, reduction="none", impl=step.args.impl, **options
    )
    counts = step.counts
    with torch.no_grad():
        forget = _sum_where(step.of_forget, losses) / counts.forget_positions
        retain = _sum_where(~step.of_forget, losses) / counts.retain_positions
    return {"loss": losses.sum() / counts.positions, "forget_loss": forget, "retain_loss": retain}


def _with_retain(forget: Tensor, nll: Tensor, step: Step) -> dict[str, Tensor]:
    retain = _sum_where(~step.of_forget, nll) / step.counts.retain_positions
    return {"loss": forget + step.args.retain_weight * retain, "forget_loss": forget, "retain_loss": retain}


def _sum_where(condition: Tensor, losses: Tensor) -> Tensor:
    return torch.where(
        condition, losses, 0
    ).sum()  # a product with 0 would let a NaN of the other kind through


OBJECTIVES: dict[str, Objective] = {
    "duet": Objective(duet, teacher_topk),
    "duet_forward_kl": Objective(duet_forward_kl, teacher_topk),
    "duet_reverse_kl": Objective(duet_reverse_kl, teacher_topk),
    "duet_jsd": Objective(duet_jsd, teacher_topk),
    "ga": Objective(gradient_ascent, needs_answers=True),
    "npo": Objective(npo, answer_nll, teacher_sees="student", needs_answers=True),
}


def find_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: there is none; the nearest name is suggested.

    Example:
        >>> find_objective("npo").positions
        'answer'
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    close = get_close_matches(str(name), OBJECTIVES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"objective: wanted one of {', '.join(OBJECTIVES)}, got {name!r}{hint}")
