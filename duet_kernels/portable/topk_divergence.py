"""A divergence between two small rows of logits and its gradient, in one sweep: the torch side of the loss.

Serves the top-k losses (`[N, K]`); whole rows of the vocabulary are `dense_rows`. The derivatives are worked out in
MATH.md; `reference.divergence` is the definition.

Legend: N tokens, K slots, T temperature, x = z / T; p the teacher's and q the student's distribution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Divergence
from .terms import OF_DISTRIBUTIONS, OF_LOGITS, Terms, expected


def divergence_and_gradient(
    student: Tensor,
    teacher: Tensor,
    student_tail: Tensor | None,
    teacher_tail: Tensor | None,
    factor: Tensor,
    spec: Divergence,
) -> tuple[Tensor, Tensor, Tensor]:
    """(`[N]` factor * loss, `[N, K]` its gradient in the student's logits, `[N]` in the student's tail, or empty).

    A row whose factor is 0 is skipped: it gives exactly 0, whatever its logits are.
    """
    present = teacher != -torch.inf
    if spec.raw:
        d = (student - teacher).masked_fill_(~present, 0)
        noise = _noise(student, teacher, present) if spec.noise else d.new_zeros(())
        loss, dz = OF_LOGITS[spec.name](d, noise, spec)
        dtail = student.new_empty(0)
    else:
        loss, dz, dtail = _distributions(student, teacher, student_tail, teacher_tail, present, spec)
    skip = factor == 0
    loss = (factor * loss).masked_fill(skip, 0)
    dz.mul_(factor[:, None]).masked_fill_(skip[:, None], 0)
    if dtail.numel():
        dtail = (factor * dtail).masked_fill(skip, 0)
    return loss, dz, dtail


def _noise(s: Tensor, t: Tensor, present: Tensor) -> Tensor:
    """`[N, 1]` 8 eps of the row's largest logit: a difference below it is rounding and has no sign."""
    if s.shape[-1] == 0:
        return s.new_zeros(s.shape[0], 1)
    scale = torch.maximum(s.abs(), t.abs())
    scale.masked_fill_(scale.isinf() | ~present, 0)
    return 8 * torch.finfo(s.dtype).eps * scale.amax(-1, keepdim=True)


def _distributions(
    s: Tensor,
    t: Tensor,
    s_tail: Tensor | None,
    t_tail: Tensor | None,
    present: Tensor,
    spec: Divergence,
) -> tuple[Tensor, Tensor, Tensor]:
    k = s.shape[-1]
    xs, xt = s / spec.temperature, t / spec.temperature
    xs.masked_fill_(~present, -torch.inf)
    if spec.needs_student_logsumexp:  # the tail is one more slot; `zeroed` gives the teacher none
        assert s_tail is not None
        t_tail = torch.full_like(s_tail, -torch.inf) if t_tail is None else t_tail
        xs, xt = torch.cat([xs, s_tail[:, None]], -1), torch.cat([xt, t_tail[:, None]], -1)
    noise = _noise(xs, xt, torch.ones_like(xs, dtype=torch.bool)) if spec.noise else xs.new_zeros(())
    total_s = torch.logsumexp(xs, -1, keepdim=True)
    total_t = torch.logsumexp(xt, -1, keepdim=True)
    # Logits are compared before they are normalised: with a close student the difference of two log-probabilities
    # has lost the digits that the difference of two logits still has.
    difference = (xs - xt).masked_fill_((xs == -torch.inf) & (xt == -torch.inf), 0)
    # Where a total is -inf (a row without any slot) nothing has probability.
    q = (xs - total_s).exp_().masked_fill_(total_s == -torch.inf, 0)
    p = (xt - total_t).exp_().masked_fill_(total_t == -torch.inf, 0)
    w = _log_ratio(difference, p, total_s - total_t)
    terms = OF_DISTRIBUTIONS[spec.name]
    if spec.normalization in ("zeroed", "truncated"):
        terms = _bare_kl
    elif spec.clip < torch.inf:
        terms = _clipped
    if spec.normalization in ("zeroed", "truncated", "generalized"):  # the tail has a probability and no term
        loss, a = terms(p[:, :k], q[:, :k], w[:, :k], noise, spec)
        a = F.pad(a, (0, 1))
    else:
        loss, a = terms(p, q, w, noise, spec)
    dx = a.sub_(q * a.sum(-1, keepdim=True))
    # A slot or tail with nearly all of q: a - q sum a has no digits left there. The gradients of a row have the sum 0.
    lead = q > 0.75
    dx = torch.where(lead, -dx.masked_fill(lead, 0).sum(-1, keepdim=True), dx)
    dtail = dx[:, k].clone() if spec.needs_student_logsumexp else s.new_empty(0)
    return loss, dx[:, :k].div(spec.temperature), dtail


def _bare_kl(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    """A KL and a without the q - p of `terms`, whose sum is not 0 over a part of the ids; no multiple of q is left out."""
    if spec.name == "forward_kl":
        return -expected(p, w).sum(1), -p
    moved = expected(q, w)
    return moved.sum(1), moved + q


def _clipped(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    """No term above `clip`, and no gradient of a term that was above. Every id is a row of its own: its sum is its term."""
    each_p, each_q, each_w, each_noise = (x.reshape(-1, 1) for x in (p, q, w, noise.expand_as(p)))
    terms, a = OF_DISTRIBUTIONS[spec.name](each_p, each_q, each_w, each_noise, spec)
    terms, a = terms.view(p.shape), a.view(p.shape)
    return terms.clamp(max=spec.clip).sum(1), a.masked_fill(terms > spec.clip, 0)


def _log_ratio(difference: Tensor, p: Tensor, totals: Tensor) -> Tensor:
    """log q - log p = d - log E_p[exp d] with d the difference of the logits; `totals` is that logarithm, rounded.

    The mean under p says nothing of ids that the teacher gives (almost) no mass and the student gives much.
    """
    if difference.shape[-1] == 0:
        return difference
    growth = (p * torch.expm1(difference)).sum(-1, keepdim=True)
    close = (growth.abs() < 0.5) & (difference.amax(-1, keepdim=True) < 60)
    return difference.sub_(torch.where(close, growth.log1p(), totals))
