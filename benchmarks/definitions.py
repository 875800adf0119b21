"""Every operation in plain torch over full logits: the eager provider, and in fp64 the truth of the correctness gate.

`project(hidden, weight)` makes the logits z = h W^T: `fp32_logits` as well as torch can, `exact_logits` for the gate's
baseline. A loss is a mean over tokens (0-d); `linear_topk` gives (values, ids, log-sum-exp), `linear_token_stats`
(log-sum-exp, entropy, variance of log p, log p(label)), `linear_logsumexp` a tuple of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs
from duet_kernels import TopK

Projection = Callable[[Tensor, Tensor], Tensor]


class _Logits(torch.autograd.Function):
    """h W^T with operands in half precision and logits in fp32: the best that plain torch offers on a GPU."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        needs = ctx.needs_input_grad
        return grad @ weight if needs[0] else None, grad.T @ hidden if needs[1] else None


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in fp32 (fp64 for fp64) without rounding them to the operands' half precision."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    return _Logits.apply(hidden, weight) if hidden.is_cuda else hidden.float() @ weight.float().T


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits of the rounded operands in fp32: slow in half precision, but with exact gradients."""
    return hidden.float() @ weight.float().T


def gathered_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """`[N, K]` logits at the ids from their rows of W alone, `[N, K, D]`; sums in fp32."""
    return (F.embedding(ids, weight) * hidden[:, None, :]).sum(-1, dtype=torch.float32)


def topk_loss(case: Case, z: Tensor, teacher: TopK) -> Tensor:
    """`[N]` loss at the teacher's ids from full student logits z."""
    s = z.gather(-1, teacher.indices)
    if not case.has_tail:
        return loss_at_ids(case, s, teacher.values)
    rest = z.scatter(-1, teacher.indices, -torch.inf).logsumexp(-1, keepdim=True)
    t = torch.cat([teacher.values, teacher.tail_logsumexp[:, None]], -1)
    return loss_at_ids(case, torch.cat([s, rest], -1), t)


def loss_at_ids(case: Case, s: Tensor, t: Tensor) -> Tensor:
    """`[N]` loss of student's and teacher's logits in the same slots."""
    t = t.to(s.dtype)
    if case.divergence == "huber":
        return F.huber_loss(s, t, reduction="none").sum(-1)
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _dense_loss(case: Case, x: Inputs, project: Projection) -> Tensor:
    with torch.no_grad():
        logp = project(x.teacher_hidden, x.teacher_weight).log_softmax(-1)
    logq = project(x.hidden, x.weight).log_softmax(-1)
    return DENSE[case.divergence](logp, logq)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return F.kl_div(logq, logp, reduction="batchmean", log_target=True)


def _jsd(logp: Tensor, logq: Tensor) -> Tensor:
    logm = torch.logaddexp(logp, logq) - math.log(2)
    return 0.5 * (_kl(logp, logm) + _kl(logq, logm))


# Of the teacher's and the student's log-probabilities, at beta = 1/2.
DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _kl,
    "jsd": _jsd,
    "symmetric_kl": lambda logp, logq: 0.5 * (_kl(logp, logq) + _kl(logq, logp)),
}


def _topk(case: Case, x: Inputs, project: Projection) -> tuple[Tensor, Tensor, Tensor]:
    z = project(x.teacher_hidden, x.teacher_weight)
    values, ids = torch.topk(z, case.k)
    return values, ids, z.logsumexp(-1)


def _token_stats(case: Case, x: Inputs, project: Projection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = project(x.hidden, x.weight)
    logsumexp = z.logsumexp(-1)
    logp = z - logsumexp[:, None]
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    variance = (p * (logp + entropy[:, None]).square()).sum(-1)
    return logsumexp, entropy, variance, logp.gather(-1, x.labels[:, None])[:, 0]


def _logsumexp(case: Case, x: Inputs, project: Projection) -> tuple[Tensor]:
    z = project(x.hidden, x.weight)
    if case.divergence == "exclude":
        z = z.scatter(-1, x.teacher.indices, -torch.inf)
    return (z.logsumexp(-1),)


DEFINITIONS: dict[str, Callable[[Case, Inputs, Projection], Any]] = {
    "linear_topk": _topk,
    "topk_distill_loss": lambda case, x, project: topk_loss(
        case, project(x.hidden, x.weight), x.teacher
    ).mean(),
    "linear_distill_loss": _dense_loss,
    "linear_cross_entropy": lambda case, x, project: F.cross_entropy(project(x.hidden, x.weight), x.labels),
    "linear_token_stats": _token_stats,
    "linear_logsumexp": _logsumexp,
}
