"""What DUET is compared with: likelihood, preference, soft-target and activation baselines.

y       the answer (of a forget row: what is to be forgotten, or a refusal), y_t its tokens
nll_t   -log p_student(y_t | x, y_<t), on **log-probabilities**, never on raw logits
every objective adds retain_weight * (its retain term, a mean over retain positions), unless it says otherwise
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from duet_kernels import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_gather,
    linear_logsumexp,
    linear_topk,
)

from ...options import MaybeIndex, NotNegative, Number, Percent, Positive, SomeTexts
from .record import CommonOptions, Step, sum_where

DEFAULT_REFUSALS = (
    "I do not know anything about that.",
    "I am not familiar with that, so I cannot answer.",
    "Sorry, I have no information on this.",
)


@dataclass
class BaselineOptions(CommonOptions):
    """Options of the baselines.

    Attributes:
        npo_beta: beta of `npo`, `npo_kl` and `npo_sam`.
        sam_rho: length of the change of the weights at which `npo_sam` takes the gradient of its forget part.
        simnpo_beta: what `simnpo` multiplies an answer's mean log-probability by.
        simnpo_gamma: margin of `simnpo`: how far below 0 that product should be.
        refusals: answers that `refusal` teaches, one drawn per use of a row.
        undial_gamma: by how much `undial` lowers the logit of the answer's token.
        shred_percent: share of a forget text's tokens, the least probable ones, that `shred` deletes, in (0, 100].
        rmu_layer: the decoder layer, counted from 0, whose output `rmu` steers; None: a quarter of the way up. The MLP
            output projections of this layer and the two below it are trained.
        rmu_scale: length c of the control vector of `rmu`.
        rmu_alpha: factor on the change of the activations of retain tokens in `rmu`.
    """

    npo_beta: Positive = 0.1
    sam_rho: Positive = 0.01
    simnpo_beta: Positive = 2.5
    simnpo_gamma: Number = 0.0
    refusals: SomeTexts = field(default_factory=lambda: list(DEFAULT_REFUSALS))
    undial_gamma: Positive = 10.0
    shred_percent: Percent = 20.0
    rmu_layer: MaybeIndex = None
    rmu_scale: Positive = 6.5
    rmu_alpha: NotNegative = 100.0


# Logits this far below the largest have probability 0 in every dtype, and stay finite in half precision.
_ZEROED = 1e4
_OUTPUT_PROJECTION = re.compile(r"\.(\d+)\..*\b(down_proj|dense_4h_to_h|c_proj|fc2|fc_out|w2)\.weight$")


class AnswerTopK(NamedTuple):
    """The teacher's top-k with the answer's token always among the ids; its slot, and its nll, `[N]`."""

    top: TopK
    slot: Tensor
    nll: Tensor


# -- targets ------------------------------------------------------------------------------------------------------


def answer_nll(hidden: Tensor, head: LMHead, labels: Tensor, args: Any) -> Tensor:
    """`[N]` -log p(answer token), nats; 0 where there is no token."""
    return linear_cross_entropy(hidden, head, labels, reduction="none", impl=args.impl)


def answer_topk(hidden: Tensor, head: LMHead, labels: Tensor, args: Any) -> AnswerTopK:
    """The k largest logits, the last of them replaced by the answer's token where it is not among them.

    The tail is summed anew without the ids that are kept: nothing is subtracted. Two passes over the vocabulary.
    """
    ids = linear_topk(hidden, head, args.k, impl=args.impl).indices
    answer = labels.clamp(min=0).unsqueeze(-1)
    listed = (ids == answer).any(-1, keepdim=True)
    last = torch.where(listed | (labels < 0).unsqueeze(-1), ids[:, -1:], answer)
    ids = torch.cat([ids[:, :-1], last], -1)
    values = linear_gather(hidden, head, ids, impl=args.impl)
    tail = linear_logsumexp(hidden, head, exclude=ids, impl=args.impl)
    return AnswerTopK(TopK(values, ids, tail), ids == answer, answer_nll(hidden, head, labels, args))


def teacher_activations(hidden: Tensor, head: LMHead, labels: Tensor, args: Any) -> Tensor:
    """`[N, D]` the frozen model's activations."""
    return hidden


# -- likelihood ---------------------------------------------------------------------------------------------------


def gradient_ascent(step: Step) -> dict[str, Tensor]:
    """GA: -NLL per forget token, and nothing else; the retain rows' NLL is only logged."""
    nll = _nll(step)
    loss = -step.forget_mean(nll)
    return {"loss": loss, "forget_loss": loss, "retain_loss": step.retain_mean(nll.detach())}


def gradient_difference(step: Step) -> dict[str, Tensor]:
    """GradDiff: -NLL(forget answers) + retain_weight * NLL(retain answers), each per token."""
    nll = _nll(step)
    return step.with_retain(-step.forget_mean(nll), nll)


def gradient_difference_kl(step: Step) -> dict[str, Tensor]:
    """GradDiff whose retain term is KL(p_base || p_student) on the retain answers instead of their NLL."""
    return step.with_retain(-step.forget_mean(_nll(step)), step.tail_kl(step.targets.top))


def refusal(step: Step) -> dict[str, Tensor]:
    """Refusal tuning (IdkSFT): NLL of a refusal on forget queries + retain_weight * NLL(retain answers), per token."""
    nll = _nll(step)
    return step.with_retain(step.forget_mean(nll), nll)


# -- preference ---------------------------------------------------------------------------------------------------


def npo(step: Step) -> dict[str, Tensor]:
    """NPO (arXiv 2404.05868): -(2 / beta) log sigma(-beta (log p_student(y | x) - log p_base(y | x))) per forget query.

    On log-probabilities of whole answers, sums over their tokens. Plus retain_weight * NLL per retain token.
    """
    nll = _nll(step)
    return _preference(step, nll, step.per_query(step.targets - nll), step.args.npo_beta)


def npo_kl(step: Step) -> dict[str, Tensor]:
    """NPO whose retain term is KL(p_base || p_student) on the retain answers instead of their NLL."""
    log_ratio = step.per_query(step.targets.nll - _nll(step))
    return _preference(step, step.tail_kl(step.targets.top), log_ratio, step.args.npo_beta)


def simnpo(step: Step) -> dict[str, Tensor]:
    """SimNPO (arXiv 2410.07163): -(2 / beta) log sigma(-(beta / |y|) log p_student(y | x) - gamma) per forget query.

    No reference model; the length is that of the answer. Plus retain_weight * NLL per retain token.
    """
    nll = _nll(step)
    mean = step.per_query(-nll) / step.lengths()
    return _preference(step, nll, mean, step.args.simnpo_beta, step.args.simnpo_gamma)


def _preference(
    step: Step, retain_losses: Tensor, log_ratio: Tensor, beta: float, gamma: float = 0.0
) -> dict[str, Tensor]:
    per_query = -2 / beta * F.logsigmoid(-beta * log_ratio - gamma)
    forget = sum_where(step.forget, per_query) / step.counts.forget_queries
    return step.with_retain(forget, retain_losses)


# -- edited soft targets --------------------------------------------------------------------------------------------


def undial(step: Step) -> dict[str, Tensor]:
    """UNDIAL (arXiv 2402.10052): KL(softmax(g_base - gamma onehot(y_t)) || p_student) on the answer's tokens.

    The k largest logits and a bucket for the rest; the answer's own token is always one of them, so that lowering its
    logit is exact. Plus retain_weight * NLL per retain token.
    """
    target: AnswerTopK = step.targets
    values = target.top.values - step.args.undial_gamma * target.slot
    losses = step.tail_kl(target.top._replace(values=values))
    return step.with_retain(step.forget_mean(losses), _nll(step))


def shred(step: Step) -> dict[str, Tensor]:
    """SHRED (arXiv 2605.07482): KL(target || p_student), the target being the base's p.

    At the `shred_percent` % of each forget text's positions at which its token is least probable under the base, that
    token's probability is zeroed and the rest renormalised. Elsewhere, and on retain rows if there are any, the target
    is p itself. Mean over all positions; k largest logits and a bucket for the rest.
    """
    target: AnswerTopK = step.targets
    zeroed = step.of_forget & least_probable(step, target.nll, step.args.shred_percent)
    floor = target.top.values.amax(-1, keepdim=True) - _ZEROED
    values = torch.where(target.slot & zeroed.unsqueeze(-1), floor, target.top.values)
    return step.mean(step.tail_kl(target.top._replace(values=values)))


def least_probable(step: Step, nll: Tensor, percent: float) -> Tensor:
    """`[N]` bool: the ceil(percent % of its positions) of each query with the largest `nll`, ties to the earlier.

    Two stable sorts and no question to the device.
    """
    order = nll.argsort(descending=True, stable=True)
    order = order[step.query[order].argsort(stable=True)]  # by query, and by nll within it
    lengths = step.lengths()
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[step.query[order]]
    # In fp64: 15 % of 100 are 15.000001 in fp32, which would be 16.
    return rank < (lengths.double() * percent / 100).ceil()[step.query]


# -- activations ----------------------------------------------------------------------------------------------------


def rmu(step: Step) -> dict[str, Tensor]:
    """RMU (arXiv 2403.03218): at layer l, mean |h - c u|^2 / D on forget tokens + alpha mean |h - h_base|^2 / D on retain.

    u is a unit vector with uniform random direction in the positive orthant, drawn from `seed`; c = `rmu_scale`,
    alpha = `rmu_alpha`. As in the published code squares are averaged over the hidden size too.
    """
    width = step.hidden.shape[-1]
    generator = torch.Generator().manual_seed(step.args.seed)
    control = F.normalize(torch.rand(width, generator=generator, dtype=torch.float64), dim=0)
    acc = torch.promote_types(step.hidden.dtype, torch.float32)  # half precision would round sums of squares
    hidden = step.hidden.to(acc)
    control = step.args.rmu_scale * control.to(hidden)
    moved = (hidden - control).square().mean(-1)
    drift = (hidden - step.targets.to(acc)).square().mean(-1)
    forget, retain = step.forget_mean(moved), step.retain_mean(drift)
    loss = forget + step.args.rmu_alpha * retain
    return {"loss": loss, "forget_loss": forget, "retain_loss": retain}


def rmu_parameters(name: str, args: Any) -> bool:
    """The MLP output projections of layers l - 2, l - 1 and l."""
    match = _OUTPUT_PROJECTION.search(name)
    return match is not None and "attn" not in name and 0 <= args.rmu_layer - int(match[1]) <= 2


def _nll(step: Step) -> Tensor:
    return answer_nll(step.hidden, step.head, step.labels, step.args)
