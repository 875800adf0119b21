"""Objectives that imitate a teacher: DUET and its divergences, pull + push, and UNDO's second phase.

    C_K     the teacher's K largest logits, g the raw logits, p the teacher's and q the student's distribution
    pull    the student's logits at C_K become the teacher's
    push    what the student is sure of outside C_K goes down

Every number comes from public names of `duet_kernels`; no full logits.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from duet_kernels import (
    LMHead,
    TopK,
    linear_distill_loss,
    linear_gather,
    linear_token_stats,
    linear_topk,
    topk_distill_loss,
)

from ...options import InnerShare, MaybePositive, NotNegative, Positive
from .record import CommonOptions, Step


@dataclass
class DistillationOptions(CommonOptions):
    """Options of `duet*` and `bidirectional`.

    Attributes:
        delta: where Huber turns linear, in logits (`duet`, `duet_adversarial`, `bidirectional`).
        temperature: T of the distributions of `duet_forward_kl` (= `duet_kl`), `duet_reverse_kl`, `duet_symmetric_kl` and
            `duet_jsd`. Raw logits have none, the others are defined at T = 1 and refuse another.
        beta: weight of the teacher in the mixture of `duet_jsd`, of KL(teacher || student) in `duet_symmetric_kl`; in (0, 1).
        normalization: of the top-k distributions of the objectives that read `temperature`: None or `renormalize`, `tail` (one more bucket for
            the rest of the vocabulary); `truncated` and `generalized` exist for forward and reverse KL, `zeroed` for
            `duet_forward_kl`.
        clip: most nats that one id adds at a position, in the objectives that read `temperature`; None: no limit. Not with
            `zeroed` and `truncated`, whose terms may be negative.
        entropy_weighting: weigh every distilled token by sigma(H_student - H_teacher), the entropies of the whole
            distributions (TSD-KD): uncertain tokens count more.
        push_weight: factor on the push of `bidirectional`.
    """

    delta: Positive = 1.0
    temperature: Positive = 1.0
    beta: InnerShare = 0.5
    normalization: Literal["renormalize", "tail", "zeroed", "truncated", "generalized"] | None = None
    clip: MaybePositive = None
    entropy_weighting: bool = False
    push_weight: NotNegative = 1.0


class WeighedTopK(NamedTuple):
    """The teacher's top-k, and the entropy of its whole distribution `[N]` in nats."""

    top: TopK
    entropy: Tensor


def teacher_topk(
    hidden: Tensor, head: LMHead, labels: Tensor, args: DistillationOptions
) -> TopK | WeighedTopK:
    """The teacher's k largest logits at every scored position (with its entropy for `entropy_weighting`)."""
    top = linear_topk(hidden, head, args.k, temperature=args.temperature, impl=args.impl)
    if not args.entropy_weighting:
        return top
    return WeighedTopK(top, linear_token_stats(hidden, head, impl=args.impl).entropy)


def teacher_states(
    hidden: Tensor, head: LMHead, labels: Tensor, args: DistillationOptions
) -> tuple[Tensor, LMHead]:
    """The teacher's hidden states and head themselves: what a dense divergence compares with."""
    return hidden, head


def duet(step: Step) -> dict[str, Tensor]:
    """DUET (arXiv 2601.21283, equation 3): Huber between raw logits at the teacher's top-k ids C_K.

    sum_{i in C_K} Huber_delta(z_student,i(x) - z_teacher,i(c + x)), averaged over scored positions; forget and retain
    queries weigh alike.
    """
    return step.mean(_distil(step, divergence="huber", delta=step.args.delta))


def duet_forward_kl(step: Step) -> dict[str, Tensor]:
    """KL(p_teacher || p_student) on the teacher's top-k, nats per position."""
    return step.mean(_distil(step, divergence="forward_kl", **_distribution(step)))


def duet_reverse_kl(step: Step) -> dict[str, Tensor]:
    """KL(p_student || p_teacher) on the teacher's top-k, nats per position."""
    return step.mean(_distil(step, divergence="reverse_kl", **_distribution(step)))


def duet_symmetric_kl(step: Step) -> dict[str, Tensor]:
    """beta KL(p_teacher || p_student) + (1 - beta) KL(p_student || p_teacher) on the teacher's top-k, nats per position."""
    return step.mean(_distil(step, divergence="symmetric_kl", beta=step.args.beta, **_distribution(step)))


def duet_jsd(step: Step) -> dict[str, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, on the teacher's top-k, nats per position."""
    return step.mean(_distil(step, divergence="jsd", beta=step.args.beta, **_distribution(step)))


def bidirectional(step: Step) -> dict[str, Tensor]:
    """Pull + push on raw logits, after arXiv 2604.15482, whose own equation is not public to us: this push is ours.

        pull = sum_{i in C_K} Huber_delta(z_student,i - z_teacher,i)                     as DUET
        push = sum_{i in S_K \\ C_K} max(0, z_student,i - z_teacher,(K))

    with S_K the student's own k largest logits and z_teacher,(K) the teacher's k-th: an id that the teacher does not
    support may not stand above the least that it does support. loss = mean(pull + push_weight * push). The push needs
    nothing of the teacher but its top-k, so that a cached teacher serves; it costs one pass over the vocabulary.
    """
    pull = _distil(step, divergence="huber", delta=step.args.delta)
    teacher = _top(step.targets)
    own = linear_topk(step.hidden, step.head, step.args.k, impl=step.args.impl).indices
    supported = (own.unsqueeze(-1) == teacher.indices.unsqueeze(-2)).any(-1)
    logits = linear_gather(step.hidden, step.head, own, impl=step.args.impl)
    excess = (logits - teacher.values.amin(-1, keepdim=True)).clamp(min=0)
    push = torch.where(supported, 0, excess).sum(-1)
    logged = {"pull_loss": pull.detach(), "push_loss": push.detach()}
    each = {name: losses.sum() / step.counts.positions for name, losses in logged.items()}
    return step.mean(pull + step.args.push_weight * push) | each


def undo(step: Step) -> dict[str, Tensor]:
    """UNDO (arXiv 2506.06278), third stage: KL(p_teacher || p_student) over the whole vocabulary, T = 1, every token.

    The teacher is the unlearned model, the student its perturbed copy (`duet.methods.noising`). nats per position.
    """
    losses = linear_distill_loss(step.hidden, step.head, *step.targets, reduction="none", impl=step.args.impl)
    return step.mean(losses)


def _distribution(step: Step) -> dict[str, Any]:
    return {name: getattr(step.args, name) for name in ("temperature", "normalization", "clip")}


def _top(targets: TopK | WeighedTopK) -> TopK:
    return targets.top if isinstance(targets, WeighedTopK) else targets


def _distil(step: Step, **options: Any) -> Tensor:
    """`[N]` divergence at every position, weighed by uncertainty if so wanted."""
    weights = entropy_weights(step) if step.args.entropy_weighting else None
    return topk_distill_loss(
        step.hidden,
        step.head,
        _top(step.targets),
        reduction="none",
        weights=weights,
        impl=step.args.impl,
        **options,
    )


def entropy_weights(step: Step) -> Tensor:
    """`[N]` sigma(H_student - H_teacher), constants in (0, 1) (TSD-KD, arXiv 2603.13260).

    Tokens at which the student is less certain than the teacher count most.
    """
    if not isinstance(step.targets, WeighedTopK):
        raise ValueError(
            "entropy_weighting: wanted a live teacher, whose entropy is taken over the whole vocabulary; a stored top-k "
            "does not hold it"
        )
    own = linear_token_stats(step.hidden, step.head, impl=step.args.impl).entropy
    return torch.sigmoid(own - step.targets.entropy)
