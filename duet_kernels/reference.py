"""The definition: every operation in plain differentiable torch with full logits.

Everything else in this package must agree with this room, judged in fp64. Half precisions are upcast to fp32,
fp64 is kept; autograd differentiates. Never fast, never small.

Legend: N tokens, D hidden size, V vocabulary, K selected ids, T temperature; z student logits, p teacher's and q
student's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import acc_dtype, exact_dtypes
from .head import LMHead
from .options import DISTRIBUTION, RAW, Divergence, require_every


def logits(hidden_nd: Tensor, head: LMHead) -> Tensor:
    """`[N, V]` z = softcap(scale * (h W^T + b))."""
    head = head.narrowed()
    acc = acc_dtype(hidden_nd.dtype)
    with exact_dtypes(hidden_nd.device):
        z = hidden_nd.to(acc) @ head.weight.to(acc).T
    if head.bias is not None:
        z = z + head.bias.to(acc)
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def linear_topk(hidden_nd: Tensor, head: LMHead, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    # stable: equal logits stay in order of their ids
    order = torch.sort(logits(hidden_nd, head), dim=-1, descending=True, stable=True)
    tail = torch.logsumexp(order.values[:, k:] / temperature, -1)
    return order.values[:, :k], order.indices[:, :k], tail


def linear_gather(hidden_nd: Tensor, head: LMHead, indices_nk: Tensor) -> Tensor:
    """`[N, K]` z at the ids. An id below 0 is read as id 0."""
    return logits(hidden_nd, head).gather(-1, indices_nk.clamp(min=0))


def _among(ids_nk: Tensor, v: int) -> Tensor:
    """`[N, V]` whether an id is one of its row's; an id below 0 is none."""
    marked = torch.zeros(ids_nk.shape[0], v + 1, dtype=torch.bool, device=ids_nk.device)
    return marked.scatter_(1, ids_nk.masked_fill(ids_nk < 0, v), True)[:, :-1]  # absent slots mark the last


def complement_and_values(
    hidden_nd: Tensor, head: LMHead, indices_nk: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(`[N]` log-sum-exp of z / T over the ids not in `indices_nk`, `[N, K]` z at the ids).

    An index below 0 is an absent slot: its value is -inf and it excludes nothing.
    """
    z = logits(hidden_nd, head)
    values = z.gather(-1, indices_nk.clamp(min=0)).masked_fill(indices_nk < 0, -torch.inf)
    rest = z.masked_fill(_among(indices_nk, z.shape[1]), -torch.inf) / temperature
    nothing = (rest == -torch.inf).all(-1, keepdim=True)  # its log-sum-exp is -inf, without a gradient
    tail = torch.logsumexp(rest.masked_fill(nothing, 0), -1)
    return tail.masked_fill(nothing[:, 0], -torch.inf), values


def token_stats(
    hidden_nd: Tensor, head: LMHead, labels_n: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    z = logits(hidden_nd, head)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    finite_logp = logp.masked_fill(logp == -torch.inf, 0)  # 0 log 0 = 0
    entropy = -(p * finite_logp).sum(-1)
    variance = (p * (finite_logp + entropy[:, None]).square()).sum(-1)
    label = None if labels_n is None else logp.gather(-1, labels_n[:, None])[:, 0]
    return torch.logsumexp(z, -1), entropy, variance, label


def topk_loss(
    hidden_nd: Tensor,
    head: LMHead,
    ids: Tensor,
    teacher_nk: Tensor,
    teacher_tail_n: Tensor | None,
    spec: Divergence,
) -> Tensor:
    """`[N]` divergence at the ids (below 0: an absent slot)."""
    tail = None
    if spec.needs_student_logsumexp:
        tail, values = complement_and_values(hidden_nd, head, ids, spec.temperature)
    else:
        values = linear_gather(hidden_nd, head, ids)
    return divergence(values, teacher_nk, tail, teacher_tail_n, spec)


def topk_stats(
    hidden_nd: Tensor,
    head: LMHead,
    ids: Tensor,
    teacher_nk: Tensor,
    teacher_tail_n: Tensor | None,
    token_ids: Tensor | None,
    spec: Divergence,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(divergence, log q(token), the student's mass on the ids, which count once, and its entropy), each `[N]`."""
    logq = torch.log_softmax(logits(hidden_nd, head) / spec.temperature, -1)
    q = logq.detach().exp()
    mass = q.masked_fill(~_among(ids, logq.shape[1]), 0).sum(-1)
    entropy = -(q * logq.detach().masked_fill(q == 0, 0)).sum(-1)  # 0 log 0 = 0
    logprob = None if token_ids is None else logq.gather(-1, token_ids[:, None])[:, 0]
    return topk_loss(hidden_nd, head, ids, teacher_nk, teacher_tail_n, spec), logprob, mass, entropy


def dense_loss(
    hidden_nd: Tensor,
    head: LMHead,
    teacher_nd: Tensor,
    teacher_head: LMHead,
    spec: Divergence,
    skip_n: Tensor | None = None,
) -> Tensor:
    """`[N]` divergence over the whole vocabulary; 0 in the rows of `skip_n`, whose logits are not read."""
    z_s, z_t = logits(hidden_nd, head), logits(teacher_nd, teacher_head)
    if skip_n is not None:
        z_s, z_t = (z.masked_fill(skip_n[:, None], 0) for z in (z_s, z_t))
    return divergence(z_s, z_t.to(z_s.dtype), None, None, spec, absent_slots=False)


def divergence(
    student_nk: Tensor,
    teacher_nk: Tensor,
    student_tail_n: Tensor | None,
    teacher_tail_n: Tensor | None,
    spec: Divergence,
    *,
    absent_slots: bool = True,
) -> Tensor:
    """`[N]` divergence between logits given at the same K ids (tails: log-sum-exp of z / T elsewhere).

    With `absent_slots` a teacher logit of -inf takes its slot out of the comparison. Without (the dense loss: K = V) it
    is a probability of 0, and raw logits are compared where not both are -inf.
    """
    present = teacher_nk != -torch.inf if absent_slots else torch.ones_like(teacher_nk, dtype=torch.bool)
    if spec.raw:
        if not absent_slots:
            present = (student_nk != -torch.inf) | (teacher_nk != -torch.inf)
        d = (student_nk - teacher_nk).masked_fill(~present, 0)
        noise = _noise(student_nk.masked_fill(~present, 0), teacher_nk.masked_fill(~present, 0))
        return _OF_LOGITS[spec.name](d, noise, spec).sum(-1)
    x_s = student_nk / spec.temperature
    x_t = teacher_nk / spec.temperature
    slots_s = x_s.masked_fill(~present, -torch.inf)
    slots_t = x_t.masked_fill(~present, -torch.inf)
    if spec.normalization == "tail":
        assert student_tail_n is not None and teacher_tail_n is not None
        slots_s = torch.cat([slots_s, student_tail_n[:, None]], -1)
        slots_t = torch.cat([slots_t, teacher_tail_n[:, None]], -1)
        present = torch.cat([present, torch.ones_like(present[:, :1])], -1)
    total_s = torch.logsumexp(slots_s, -1, keepdim=True)
    total_t = torch.logsumexp(slots_t, -1, keepdim=True)
    if spec.normalization in ("zeroed", "truncated", "generalized"):
        assert student_tail_n is not None
        total_s = torch.logaddexp(total_s, student_tail_n[:, None])
    if spec.normalization in ("truncated", "generalized"):
        assert teacher_tail_n is not None
        total_t = torch.logaddexp(total_t, teacher_tail_n[:, None])
    # Slots that are absent get log-probabilities of 0 on both sides and probabilities of 0: they add nothing.
    logq = (slots_s - total_s).masked_fill(~present, 0)
    logp = (slots_t - total_t).masked_fill(~present, 0)
    q = logq.exp().masked_fill(~present, 0)
    p = logp.exp().masked_fill(~present, 0)
    pair = _Pair(p, q, logp, logq, _noise(slots_s, slots_t))
    terms = _OF_DISTRIBUTIONS[spec.name](pair, spec)
    if spec.clip < torch.inf:  # a clipped term has no gradient: through an infinite one it would be NaN
        over = terms.detach().isposinf()
        p, q, logp, logq = (x.masked_fill(over, 0) for x in (p, q, logp, logq))
        finite = _Pair(p, q, logp, logq, pair.noise)
        terms = _OF_DISTRIBUTIONS[spec.name](finite, spec).masked_fill(over, torch.inf)
    return terms.clamp(max=spec.clip).sum(-1)


def _noise(s: Tensor, t: Tensor) -> Tensor:
    """`[N, 1]` 8 eps of the row's largest logit: a difference below it is rounding and has no sign."""
    with torch.no_grad():
        scale = torch.maximum(s.abs().masked_fill(s.isinf(), 0), t.abs().masked_fill(t.isinf(), 0))
        if scale.shape[-1] == 0:
            return scale.new_zeros(scale.shape[0], 1)
        return 8 * torch.finfo(s.dtype).eps * scale.amax(-1, keepdim=True)


# --- one function per divergence --------------------------------------------------------------------------------


def _huber(d: Tensor, noise: Tensor, spec: Divergence) -> Tensor:
    clamped = d.clamp(-spec.delta, spec.delta)
    return clamped * (d - 0.5 * clamped)


def _mse(d: Tensor, noise: Tensor, spec: Divergence) -> Tensor:
    return d.square()


def _l1(d: Tensor, noise: Tensor, spec: Divergence) -> Tensor:
    return torch.where(d.abs() <= noise, torch.zeros_like(d), d.abs())


class _Pair(NamedTuple):
    """The teacher's p and the student's q over the same slots, their logarithms, and `[N, 1]` the noise of those."""

    p: Tensor
    q: Tensor
    logp: Tensor
    logq: Tensor
    noise: Tensor


def _forward_kl(pair: _Pair, spec: Divergence) -> Tensor:
    return _kl(pair.p, pair.q, pair.logp, pair.logq, spec)


def _reverse_kl(pair: _Pair, spec: Divergence) -> Tensor:
    return _kl(pair.q, pair.p, pair.logq, pair.logp, spec)


def _symmetric_kl(pair: _Pair, spec: Divergence) -> Tensor:
    return spec.beta * _forward_kl(pair, spec) + (1 - spec.beta) * _reverse_kl(pair, spec)


def _jsd(pair: _Pair, spec: Divergence) -> Tensor:
    m = spec.beta * pair.p + (1 - spec.beta) * pair.q
    logm = m.masked_fill(m == 0, 1).log()  # where m is 0 so are p and q, and nothing is added
    to_m = _kl(pair.p, m, pair.logp, logm, spec), _kl(pair.q, m, pair.logq, logm, spec)
    return spec.beta * to_m[0] + (1 - spec.beta) * to_m[1]


def _tvd(pair: _Pair, spec: Divergence) -> Tensor:
    ratio = pair.logq - pair.logp
    apart = (ratio.abs() > pair.noise) | ratio.isnan()
    return 0.5 * torch.where(apart, (pair.p - pair.q).abs(), torch.zeros_like(pair.p))


def _kl(p: Tensor, q: Tensor, logp: Tensor, logq: Tensor, spec: Divergence) -> Tensor:
    """p (log p - log q) with 0 log 0 = 0, in a form whose derivative is finite there too; q - p added on demand."""
    zero = p == 0
    terms = p * (logp.masked_fill(zero, 0) - logq.masked_fill(zero, 0))
    return terms + (q - p) if spec.nonnegative else terms


# What a divergence sums over the slots.
_OF_LOGITS: dict[str, Callable[[Tensor, Tensor, Divergence], Tensor]] = {
    "huber": _huber,
    "mse": _mse,
    "l1": _l1,
}
_OF_DISTRIBUTIONS: dict[str, Callable[[_Pair, Divergence], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "symmetric_kl": _symmetric_kl,
    "jsd": _jsd,
    "tvd": _tvd,
}
require_every("reference._OF_LOGITS", _OF_LOGITS, RAW)
require_every("reference._OF_DISTRIBUTIONS", _OF_DISTRIBUTIONS, DISTRIBUTION)
