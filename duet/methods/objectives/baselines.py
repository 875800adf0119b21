"""What DUET is compared with: likelihood, preference, soft-target and activation baselines.

    y       the answer (of a forget row: what is to be forgotten, or a refusal), y_t its tokens
    nll_t   -log p_student(y_t | x, y_<t), on **log-probabilities**, never on raw logits
    every objective adds retain_weight * (its retain term, a mean over retain positions), unless it says otherwise

Must not know models or the Trainer; every number comes from public names of `duet_kernels`.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

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
    topk_distill_loss,
)

from .record import Step, sum_where, with_retain

if TYPE_CHECKING:
    from ...config import DuetConfig

# Logits this far below the largest have probability 0 in every dtype, and stay finite in half precision.
_ZEROED = 1e4
_OUTPUT_PROJECTION = re.compile(r"\.(\d+)\..*\b(down_proj|dense_4h_to_h|c_proj|fc2|fc_out|w2)\.weight$")


class AnswerTopK(NamedTuple):
    """The teacher's top-k with the answer's token always among the ids; its slot, and its nll, `[N]`."""

    top: TopK
    slot: Tensor
    nll: Tensor


# -- targets ------------------------------------------------------------------------------------------------------


def answer_nll(hidden: Tensor, head: LMHead, labels: Tensor, args: "DuetConfig") -> Tensor:
    """`[N]` -log p(answer token), nats; 0 where there is no token."""
    return linear_cross_entropy(hidden, head, labels, reduction="none", impl=args.impl)


def answer_topk(hidden: Tensor, head: LMHead, labels: Tensor, args: "DuetConfig") -> AnswerTopK:
    """The k largest logits, the last of them replaced by the answer's token where it is not among them.

    The tail is summed anew without the ids that are kept: nothing is subtracted. Two passes over the vocabulary.
    """
    ids = linear_topk(hidden, head, args.k, impl=args.impl).indices
    answer = labels.clamp(min=0).unsqueeze(-1)
    found = (ids == answer).any(-1, keepdim=True)
    last = torch.where(found | (labels < 0).unsqueeze(-1), ids[:, -1:], answer)
    ids = torch.cat([ids[:, :-1], last], -1)
    values = linear_gather(hidden, head, ids, impl=args.impl)
    tail = linear_logsumexp(hidden, head, exclude=ids, impl=args.impl)
    return AnswerTopK(TopK(values, ids, tail), ids == answer, answer_nll(hidden, head, labels, args))


def teacher_activations(hidden: Tensor, head: LMHead, labels: Tensor, args: "DuetConfig") -> Tensor:
    """`[N, D]` the frozen model's activations."""
    return hidden


# -- likelihood ---------------------------------------------------------------------------------------------------


def gradient_ascent(step: Step) -> dict[str, Tensor]:
    """GA: -NLL per forget token, and nothing else; the retain rows' NLL is only logged."""
    nll = _nll(step)
    loss = -sum_where(step.of_forget, nll) / step.counts.forget_positions
    with torch.no_grad():
        retain = sum_where(~step.of_forget, nll) / step.counts.retain_positions
    return {"loss": loss, "forget_loss": loss, "retain_loss": retain}


def gradient_difference(step: Step) -> dict[str, Tensor]:
    """GradDiff: -NLL(forget answers) + retain_weight * NLL(retain answers), each per token."""
    nll = _nll(step)
    return with_retain(-sum_where(step.of_forget, nll) / step.counts.forget_positions, nll, step)


def gradient_difference_kl(step: Step) -> dict[str, Tensor]:
    """GradDiff whose retain term is KL(p_base || p_student) on the retain answers instead of their NLL."""
    forget = -sum_where(step.of_forget, _nll(step)) / step.counts.forget_positions
    return with_retain(forget, _tail_kl(step, step.targets.top), step)


def refusal(step: Step) -> dict[str, Tensor]:
    """Refusal tuning (IdkSFT): NLL of a refusal on forget queries + retain_weight * NLL(retain answers), per token."""
    nll = _nll(step)
    return with_retain(sum_where(step.of_forget, nll) / step.counts.forget_positions, nll, step)


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
    return _preference(step, _tail_kl(step, step.targets.top), log_ratio, step.args.npo_beta)


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
    return with_retain(forget, retain_losses, step)


# -- edited soft targets --------------------------------------------------------------------------------------------


def undial(step: Step) -> dict[str, Tensor]:
    """UNDIAL (arXiv 2402.10052): KL(softmax(g_base - gamma onehot(y_t)) || p_student) on the answer's tokens.

    The k largest logits and a bucket for the rest; the answer's own token is always one of them, so that lowering its
    logit is exact. Plus retain_weight * NLL per retain token.
    """
    target: AnswerTopK = step.targets
    values = target.top.values - step.args.undial_gamma * target.slot
    losses = _tail_kl(step, target.top._replace(values=values))
    forget = sum_where(step.of_forget, losses) / step.counts.forget_positions
    return with_retain(forget, _nll(step), step)


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
    losses = _tail_kl(step, target.top._replace(values=values))
    with torch.no_grad():
        forget = sum_where(step.of_forget, losses) / step.counts.forget_positions
        retain = sum_where(~step.of_forget, losses) / step.counts.retain_positions
    return {"loss": losses.sum() / step.counts.positions, "forget_loss": forget, "retain_loss": retain}


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


def _tail_kl(step: Step, teacher: TopK) -> Tensor:
    return topk_distill_loss(
        step.hidden,
        step.head,
        teacher,
        divergence="forward_kl",
        normalization="tail",
        reduction="none",
        impl=step.args.impl,
    )


# -- activations ----------------------------------------------------------------------------------------------------


def rmu(step: Step) -> dict[str, Tensor]:
    """RMU (arXiv 2403.03218): at layer l, mean |h - c u|^2 / D on forget tokens + alpha mean |h - h_base|^2 / D on retain.

    u is a unit vector with uniform random direction in the positive orthant, drawn from `seed`; c = `rmu_scale`,
    alpha = `rmu_alpha`. As in the published code squares are averaged over the hidden size too.
    """
    width = step.hidden.shape[-1]
    generator = torch.Generator().manual_seed(step.args.seed)
    control = F.normalize(torch.rand(width, generator=generator, dtype=torch.float64), dim=0)
    acc = torch.promote_types(
        step.hidden.dtype, torch.float32
    )  # sums of half precision squares would be rounded to it
    hidden = step.hidden.to(acc)
    control = step.args.rmu_scale * control.to(hidden)
    moved = (hidden - control).square().mean(-1)
    kept = (hidden - step.targets.to(acc)).square().mean(-1)
    forget = sum_where(step.of_forget, moved) / step.counts.forget_positions
    retain = sum_where(~step.of_forget, kept) / step.counts.retain_positions
    return {
        "loss": forget + step.args.rmu_alpha * retain,
        "forget_loss": forget,
        "retain_loss": retain,
    }


def rmu_parameters(name: str, args: "DuetConfig") -> bool:
    """The MLP output projections of layers l - 2, l - 1 and l."""
    found = _OUTPUT_PROJECTION.search(name)
    return found is not None and "attn" not in name and 0 <= args.rmu_layer - int(found[1]) <= 2


def _nll(step: Step) -> Tensor:
    return answer_nll(step.hidden, step.head, step.labels, step.args)
