"""Every divergence as terms of its ids: the kernels' one place for their arithmetic, for K slots and for the vocabulary.

    d = z_student - z_teacher            L = sum of terms                             dL/dz

    huber           d^2 / 2 where |d| <= delta, delta (|d| - delta / 2) beyond        clamp(d, -delta, delta)
    mse             d^2                                                               2 d
    l1              |d|                                                               sign(d)

    w = log q - log p,  x = z / T        L = sum of terms                             a,  dL/dx = a - q sum a

    forward_kl      (q - p) - p w                     (sum p (log p - log q))         q - p
    reverse_kl      q w - (q - p)                     (sum q (log q - log p))         q w
    symmetric_kl    beta of the first and 1 - beta of the second, terms and a alike
    jsd             beta p log(p / m) + (1 - beta) q log(q / m)                       (1 - beta) q log(q / m)
                    m = beta p + (1 - beta) q
    tvd             |q - p| / 2                                                       q sign(q - p) / 2

p is the teacher's distribution and q the student's, over the same ids. `a` is the loss's derivative in log q (MATH.md);
any multiple of q may be left out of it. q - p has the sum 0. With it in the terms of a KL, a rounding that all w of a row
share changes the loss by its square only. `noise` is what |d| or |w| must exceed to have a sign (l1, tvd).

Where digits would be lost: q - p is p expm1(w) where w is small, and log(q / m) comes from log1p(beta expm1(-|w|)).

A divergence is chosen when a kernel is compiled, and what a kernel does not use is not computed. The last branch refuses
a name that no branch knows; `BOUNDS` is checked on import.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..options import DIVERGENCES, Divergence, require_every
from .primitives import expm1_near_zero, log_to_mixture, number, sign


@triton.jit
def minus(q, p, w):
    """q - p, given w = log(q / p)."""
    return tl.where(tl.abs(w) <= 0.5, p * expm1_near_zero(w), q - p)


@triton.jit
def expected(p, x):
    """p x, 0 where p is 0 (0 log 0 = 0)."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def of_logits(d, noise, delta, DIVERGENCE: tl.constexpr):
    """(terms of the loss, dL/dz) of differences of logits."""
    if DIVERGENCE == "huber":
        bound = number(delta, d.dtype)
        size = tl.abs(d)
        small = size <= bound
        terms = tl.where(small, 0.5 * d * d, bound * (size - 0.5 * bound))
        dz = tl.where(small, d, bound * sign(d))
    elif DIVERGENCE == "mse":
        terms = d * d
        dz = 2.0 * d
    elif DIVERGENCE == "l1":
        quiet = tl.abs(d) <= noise
        terms = tl.where(quiet, 0.0, tl.abs(d))
        dz = tl.where(quiet, 0.0, sign(d))
    else:
        tl.static_assert(False, "triton/terms.py: of_logits has no branch for this divergence")
    return terms, dz


@triton.jit
def of_distributions(p, q, w, noise, beta, DIVERGENCE: tl.constexpr, HALF: tl.constexpr):
    """(terms of the loss, a) of probabilities; HALF says that beta is 1/2."""
    if DIVERGENCE == "forward_kl":
        a = minus(q, p, w)
        terms = a - expected(p, w)
    elif DIVERGENCE == "reverse_kl":
        a = expected(q, w)
        terms = a - minus(q, p, w)
    elif DIVERGENCE == "symmetric_kl":
        b = number(beta, p.dtype)
        gap = minus(q, p, w)
        moved = expected(q, w)
        terms = b * (gap - expected(p, w)) + (1.0 - b) * (moved - gap)
        a = b * gap + (1.0 - b) * moved
    elif DIVERGENCE == "jsd":
        b = number(beta, p.dtype)
        p_to_m, q_to_m = log_to_mixture(w, b, HALF)
        a = (1.0 - b) * expected(q, q_to_m)
        # In this order of the two: for sm_90 the compiler of triton 3.8 crashes on the other.
        terms = a + b * expected(p, p_to_m)
    elif DIVERGENCE == "tvd":
        gap = tl.where(tl.abs(w) <= noise, 0.0, minus(q, p, w))
        terms = 0.5 * tl.abs(gap)
        a = 0.5 * q * sign(gap)
    else:
        tl.static_assert(False, "triton/terms.py: of_distributions has no branch for this divergence")
    return terms, a


@triton.jit
def clipped(terms, a, clip):
    """No term above the clip, and no derivative of a term that was above; a NaN stays."""
    above = terms > number(clip, terms.dtype)
    return tl.where(above, number(clip, terms.dtype), terms), tl.where(above, 0.0, a)


@triton.jit
def gradient(a, q, total):
    """dL/dx of an id, `total` the sum of its row's a."""
    return a - expected(q, total)


class Bound(NamedTuple):
    """What no |dL/dz| of a row exceeds; fp16 gradients are brought into their range by it."""

    at: Callable[[Divergence, Tensor], Tensor | float]  # from the losses of rows
    of_loss: Callable[[Divergence], bool] = lambda spec: False  # it reads them, and so has to wait for them


_CONSTANT = Bound(lambda spec, loss: 2.0 / spec.temperature)
# q w >= -1/e where q < p, so no term of KL(q || p) = sum q w is above KL(q || p) + 1/e. A generalized KL over a part of the
# ids may be lower than that sum by 1.
_OF_LOSS = Bound(lambda spec, loss: (loss + 2.0) / spec.temperature, of_loss=lambda spec: True)


def _far(spec: Divergence) -> bool:
    """Whether fp16 scaled by delta alone has fewer digits of a difference of logits of 2^-16."""
    return spec.delta > 2**12


def _huber(spec: Divergence, loss: Tensor) -> Tensor | float:
    """The loss is at least half the square of each derivative."""
    return (2.0 * loss).sqrt().clamp(max=spec.delta) if _far(spec) else spec.delta


BOUNDS: dict[str, Bound] = {
    "huber": Bound(_huber, of_loss=_far),
    "mse": Bound(lambda spec, loss: 2.0 * loss.sqrt(), of_loss=lambda spec: True),
    "l1": _CONSTANT,
    "forward_kl": _CONSTANT,
    "reverse_kl": _OF_LOSS,
    "symmetric_kl": _OF_LOSS,  # at most beta + (1 - beta) (KL(q || p) + 1), and the loss is at least (1 - beta) KL(q || p)
    "jsd": _CONSTANT,
    "tvd": _CONSTANT,
}
require_every("triton.terms.BOUNDS", BOUNDS, DIVERGENCES)
