"""Every divergence as terms of its ids: torch's one place for their arithmetic, for K slots and for the vocabulary.

Of logits:           d = z_student - z_teacher        (sum of the terms, dL/dz)
Of distributions:    w = log q - log p                (sum of the terms, a)        dL/dx = a - q sum a

p is the teacher's distribution and q the student's, over the same ids; x = z / T. `a` is the loss's derivative in log q
(MATH.md), of which any multiple of q may be left out. A KL has q - p added to its terms or taken from them: its sum is
0, and so a rounding that all w of a row share changes the loss by its square only.

Inputs are made by the caller, so that w keeps the digits of a close student; some are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..options import DISTRIBUTION, RAW, Divergence, require_every
from . import cuts

Terms = tuple[Tensor, Tensor]  # `[R]` sums, and `[R, C]` dL/dz or a

# --- of logits: d, the row's noise `[R, 1]` ---------------------------------------------------------------------


def _huber(d: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    clamped = d.clamp(-spec.delta, spec.delta)
    # With c the clamped difference: c (d - c / 2) is both branches of the Huber loss.
    return (d - 0.5 * clamped).mul_(clamped).sum(1), clamped


def _mse(d: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    return d.square().sum(1), 2 * d


def _l1(d: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    sign = _sign(d, noise)
    return (sign * d).sum(1), sign


# --- of distributions: p, q, w, the noise of w `[R, 1]` ---------------------------------------------------------


def _forward_kl(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    a = difference(q, p, w)
    return (a - expected(p, w)).sum(1), a


def _reverse_kl(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    a = expected(q, w)
    return (a - difference(q, p, w)).sum(1), a


def _symmetric_kl(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    gap, moved = difference(q, p, w), expected(q, w)
    forward, reverse = (gap - expected(p, w)).sum(1), (moved - gap).sum(1)
    a = gap.mul_(spec.beta).add_(moved, alpha=1 - spec.beta)
    return spec.beta * forward + (1 - spec.beta) * reverse, a


def _jsd(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    log_p_over_m, log_q_over_m = _log_to_mixture(w, spec.beta)
    a = log_q_over_m.mul_(q).mul_(1 - spec.beta)
    return spec.beta * log_p_over_m.mul_(p).sum(1) + a.sum(1), a


def _tvd(p: Tensor, q: Tensor, w: Tensor, noise: Tensor, spec: Divergence) -> Terms:
    sign = _sign(w, noise)
    return 0.5 * difference(q, p, w).mul_(sign).sum(1), sign.mul_(q).mul_(0.5)


OF_LOGITS: dict[str, Callable[[Tensor, Tensor, Divergence], Terms]] = {
    "huber": _huber,
    "mse": _mse,
    "l1": _l1,
}
OF_DISTRIBUTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Divergence], Terms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "symmetric_kl": _symmetric_kl,
    "jsd": _jsd,
    "tvd": _tvd,
}
require_every("portable.terms.OF_LOGITS", OF_LOGITS, RAW)
require_every("portable.terms.OF_DISTRIBUTIONS", OF_DISTRIBUTIONS, DISTRIBUTION)


# --- what they are made of --------------------------------------------------------------------------------------


def difference(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """a - b of two positive numbers, to the digits of log(a / b)."""
    return log_ratio.abs().neg_().expm1_().mul_(torch.maximum(a, b)).copysign_(log_ratio)


def expected(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 although x may be infinite."""
    return (p * x).masked_fill_(p == 0, 0) if infinite(x) else p * x


def infinite(x: Tensor) -> bool:
    """Whether there may be infinities (in rows without a NaN). Looking would synchronise a GPU."""
    if cuts.asynchronous(x.device) or not x.numel():
        return True
    return bool(torch.maximum(x.amax(1), -x.amin(1)).isposinf().any())


def _log_to_mixture(ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log(p / m), log(q / m)) of m = beta p + (1 - beta) q, given ratio = log q - log p; both are finite."""
    ratio = ratio.clamp(-80, 80)  # beyond, one of p and q is nothing beside the other
    log_q_over_m = ratio.neg().expm1_().mul_(beta).log1p_().neg_()
    return log_q_over_m - ratio, log_q_over_m


def _sign(x: Tensor, noise: Tensor) -> Tensor:
    """The sign of x, 0 within the noise."""
    return x.abs().sub_(noise).clamp_(min=0).sign_().copysign_(x)
