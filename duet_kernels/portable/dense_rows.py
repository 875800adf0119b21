"""A divergence between rows of logits and its gradient, a strip of columns at a time: torch's side of the dense losses.

    e = exp((z - O) / T)    S = sum e    u = (s - t) / T - (O_s - O_t) / T    B = sum (e_s - e_t)    A = sum e_t u
    q = e_s / S_s    p = e_t / S_t    r = log(S_s / S_t) = log1p(B / S_t)    w = log q - log p = u - r

O is any origin of a row; reverse KL has A = sum e_s u. As e_s = e_t exp u, a difference of the two is max(e_s, e_t)
(1 - exp(-|u|)) with the sign of u. So logits are compared before they are normalised, and a student close to its teacher
keeps its digits (MATH.md).

`RunningKL` sees every strip once: the gradients of both KLs are linear in sums that need no normaliser. `DenseRows` has
whole rows at hand and reads them again. On a CPU a strip stays in the cache while it is worked on, and choosing by a mask
takes longer than an exponential: masks are for what is rare. On a GPU every operation is a pass over memory: few of them
count. No temporary is as long as a row. The definition is `reference.divergence`.

Legend: R rows, C columns of a strip, V vocabulary, D hidden size, T temperature, s / t student's and teacher's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..dispatch import workspace_bytes
from ..options import Divergence
from . import cuts
from .cuts import multiply_, row_chunks
from .terms import OF_DISTRIBUTIONS, OF_LOGITS, Terms, difference, expected, infinite

_STRIP_BYTES = 2**19  # of one temporary: half a dozen of them lie in a core's share of the cache


def strip_bytes(device: torch.device) -> int:
    """Of one temporary; on a GPU eight of them lie in the half of the workspace that rows of logits leave."""
    if cuts.asynchronous(device):
        return workspace_bytes(device) // 16
    return min(_STRIP_BYTES, workspace_bytes(device) // 64)


# --- strips that are seen once ----------------------------------------------------------------------------------


class RunningKL:
    """A KL and its gradient in h, where logits are h W^T, from strips that are seen once and the rows of W behind them.

    S, B and A are `[R, 1]`. An origin is the log-sum-exp so far (at first, of the strip itself) or the strip's maximum,
    whichever is larger: nothing overflows, S_s and S_t are of one size, and u is nearly w. When origins rise from O to O',
    f = exp((O - O') / T), and u rises by shift = (O_s - O_t - O_s' + O_t') / T:

        S' = f S        B' = f_s B + (f_s - f_t) S_t        A' = f_t (A + shift S_t)        (reverse KL: f_s and S_s)

        forward    dh = (sum (e_s - e_t) W - (B / S_t) sum e_t W) / (T S_s)
        reverse    dh = (sum e_s u W       - (A / S_s) sum e_s W) / (T S_s)

    The first sum is small where the student is close, and so is the factor of the second: nothing cancels. Both are
    sums of W as B, A and S are sums of 1, and fall alike when origins rise.
    """

    NAMES = ("forward_kl", "reverse_kl")

    def __init__(self, hidden: Tensor, spec: Divergence, with_gradient: bool = True) -> None:
        self.inverse = 1.0 / spec.temperature
        self.side = int(spec.name == "forward_kl")  # whose mean of u is A: 0 the student's, 1 the teacher's
        self.first, zero = True, hidden.new_zeros(len(hidden), 1)
        self.origins, self.sums, self.change, self.moment = (zero, zero), (zero, zero), zero, zero
        rows = 2 * len(hidden) if with_gradient else 0  # the first sum over the second
        self.vectors = hidden.new_zeros(rows, hidden.shape[1])

    def add(self, s: Tensor, t: Tensor, weight: Tensor | None = None, slope: Tensor | float = 1.0) -> None:
        """Take in a strip of logits, for the gradient with its rows of W `[C, D]` and with dz / d(h W^T)."""
        s_fall, t_fall, shift = self._move_origins(s, t)
        e_s, e_t = (
            multiply_(z - origin, self.inverse).exp_() for z, origin in zip((s, t), self.origins, strict=True)
        )
        u = s - t
        if infinite(s) and infinite(t):  # where both are -inf u is of no account, but not NaN
            u.masked_fill_((s == -torch.inf) & (t == -torch.inf), 0)
        u = multiply_(u, self.inverse).sub_(self._gap())
        change, moment = difference(e_s, e_t, u), expected((e_s, e_t)[self.side], u)
        del u  # a strip's memory
        fall, fall_change = (s_fall, t_fall)[self.side], difference(s_fall, t_fall, shift)
        s_sum, t_sum = self.sums
        self.moment = expected(fall, self.moment + shift * self.sums[self.side]) + _sum(moment)
        self.change = s_fall * self.change + fall_change * t_sum + _sum(change)
        self.sums = s_fall * s_sum + _sum(e_s), t_fall * t_sum + _sum(e_t)
        if weight is None:
            return
        pair, mixed = ([change, e_t], fall_change) if self.side else ([moment, e_s], s_fall * shift)
        first, second = self.vectors.chunk(2)
        first.mul_(s_fall).addcmul_(second, mixed)
        second.mul_(fall)
        if isinstance(slope, Tensor):
            pair, slope = [x.mul_(slope) for x in pair], 1.0
        self.vectors.addmm_(torch.cat(pair), weight, alpha=slope)  # faster than two products of half the rows

    def _move_origins(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Let the origins rise to what the strip needs; (f_s, f_t, shift)."""
        before, after = [], []
        for z, origin, total in zip((s, t), self.origins, self.sums, strict=True):
            if self.first:
                top = (z * self.inverse).logsumexp(1, keepdim=True) / self.inverse
            else:
                top = torch.maximum(origin + total.log() / self.inverse, z.amax(1, keepdim=True))
            after.append(cuts.origin(top))
            before.append(torch.where(total == 0, after[-1], origin))  # without a sum nothing falls
        s_fall, t_fall = (multiply_(x - y, self.inverse).exp_() for x, y in zip(before, after, strict=True))
        self.origins, self.first = (after[0], after[1]), False
        return s_fall, t_fall, multiply_(before[0] - before[1], self.inverse) - self._gap()

    def _gap(self) -> Tensor:
        return multiply_(self.origins[0] - self.origins[1], self.inverse)

    @property
    def loss(self) -> Tensor:
        """`[R]` forward KL = r - A / S_t, or reverse KL = A / S_s - r."""
        (s_sum, t_sum), mean = self.sums, self.moment / self.sums[self.side]
        relative = self.change / t_sum
        r = torch.where(relative.abs() <= 0.5, relative.log1p(), (s_sum / t_sum).log())
        return (r - mean if self.side else mean - r)[:, 0]

    def gradient(self) -> Tensor:
        """`[R, D]`"""
        first, second = self.vectors.chunk(2)
        part = (self.change if self.side else self.moment) / self.sums[self.side]
        return first.addcmul(second, part, value=-1).mul_(self.inverse / self.sums[0])


# --- whole rows -------------------------------------------------------------------------------------------------


class DenseRows:
    """Student's and teacher's logits `[R, V]` at hand, compared in as few passes over them as their digits allow.

        dloss/ds = (a - m q) / T        a of every logit (`terms`), m the sum of a

    w = (s - t) / T - r needs no B here: r is the difference of the rounded normalisers that p and q are made with, and
    its rounding cancels to first order in the losses, which add up terms like q - p - p w. A normaliser is an origin, the row's
    largest logit, and what is left, T log sum exp((z - origin) / T). As one number it would be rounded as large logits are: where
    the student is certain, its q would not add up to 1, and little is left of a - m q beside that. Both logits are overwritten.
    `ruled_out`: raw logits may be -inf in both (`subtract_`). Where the rows are parts of longer ones, as of a sharded head, the longer
    rows' `noise` `[R, 1]` and `normalisers` are given: for each side the numbers `[R, 1]` whose sum its normaliser is.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        spec: Divergence,
        ruled_out: bool = True,
        noise: Tensor | None = None,
        normalisers: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        self.s, self.t, self.spec, self.ruled_out = student, teacher, spec, ruled_out
        self.inverse = 1.0 / spec.temperature
        if noise is None:
            noise = self._noise() if spec.noise else student.new_zeros(())
        self.noise = noise
        if not spec.raw:
            self.s_norm, self.t_norm = normalisers or [self._normaliser(z) for z in (student, teacher)]
            self.r = sum(x - y for x, y in zip(self.s_norm, self.t_norm, strict=True)) * self.inverse

    def compare_(self, factor: Tensor, with_gradient: bool) -> Tensor:
        """`[R]` factor * loss; with a gradient, factor * dloss/ds is left in the teacher's memory. 0 gives 0."""
        s, t, spec, skip = self.s, self.t, self.spec, factor == 0
        scale = (factor * self.inverse)[:, None]
        loss, mean = s.new_zeros(len(s)), s.new_zeros(len(s), 1)
        for c in self.strips():
            terms, a = self.terms(c)
            loss += terms
            if with_gradient and spec.raw:
                torch.mul(a, scale, out=t[:, c])
            elif with_gradient:
                mean += _sum(a)
                t[:, c] = a
        if with_gradient and not spec.raw:  # q is in the student's memory
            for c in self.strips():
                t[:, c].addcmul_(s[:, c], mean, value=-1).mul_(scale)
            # An id with more than 3/4 of q: a - m q has no digits left there. It is minus the sum of the row's others.
            top, lead = s.max(1, keepdim=True)
            before = t.gather(1, lead)
            others = t.scatter_(1, lead, 0).sum(1, keepdim=True)
            t.scatter_(1, lead, torch.where(top > 0.75, -others, before))
        if with_gradient and any_of(skip):
            t.masked_fill_(skip[:, None], 0)
        return loss.mul_(factor).masked_fill_(skip, 0)

    def strips(self) -> Iterator[slice]:
        rows, v = self.s.shape
        return row_chunks(v, max(16, strip_bytes(self.s.device) // (max(rows, 1) * self.s.element_size())))

    def _normaliser(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`[R, 1]` an origin, and T log sum exp((z - origin) / T)"""
        tops, sums = [], []
        for c in self.strips():
            tops.append(z[:, c].amax(1, keepdim=True))
            sums.append(_sum(self._exponential_(z[:, c] - cuts.origin(tops[-1]))))
        origin = cuts.origin(torch.cat(tops, 1).amax(1, keepdim=True))
        total = z.new_zeros(len(z), 1)
        for top, part in zip(tops, sums, strict=True):
            total += self._exponential_(top - origin) * part
        return origin, total.log() * self.spec.temperature

    def _exponential_(self, x: Tensor) -> Tensor:
        return multiply_(x, self.inverse).exp_()

    def _noise(self) -> Tensor:
        """`[R, 1]` 8 eps of the row's largest finite logit: a difference below it is rounding and has no sign."""
        largest = self.s.new_zeros(len(self.s), 1)
        for c in self.strips():
            for z in (self.s[:, c], self.t[:, c]):
                size = z.abs()
                if infinite(z):
                    size.nan_to_num_(torch.nan, 0.0)
                largest = torch.maximum(largest, size.amax(1, keepdim=True))
        return largest.mul_(8 * torch.finfo(self.s.dtype).eps)

    def terms(self, c: slice) -> Terms:
        """(`[R]` the sum of a strip's terms, a or dloss/dz); of distributions q and p are written over its logits."""
        s, t, spec = self.s[:, c], self.t[:, c], self.spec
        if spec.raw:
            return OF_LOGITS[spec.name](subtract_(s, t, self.ruled_out), self.noise, spec)
        w = s - t
        if infinite(s) and infinite(t):
            w.nan_to_num_(0.0, torch.inf, -torch.inf)  # inf - inf; a row with a NaN has one in r as well
        w = multiply_(w, self.inverse).sub_(self.r)
        for z, normaliser in ((s, self.s_norm), (t, self.t_norm)):
            for part in normaliser:
                z.sub_(part)
        q, p = self._exponential_(s), self._exponential_(t)
        return OF_DISTRIBUTIONS[spec.name](p, q, w, self.noise * self.inverse, spec)


# --- elementwise ------------------------------------------------------------------------------------------------


def subtract_(s: Tensor, t: Tensor, ruled_out: bool) -> Tensor:
    """s - t in the memory of s; 0 at the ids that both may have `ruled_out` by a bias of -inf."""
    absent = None
    if ruled_out and infinite(s) and infinite(t):
        absent = (s == -torch.inf) & (t == -torch.inf)
    s.sub_(t)
    return s if absent is None else s.masked_fill_(absent, 0)


def any_of(mask: Tensor) -> bool:
    """Whether something may be set. Looking would synchronise a GPU; a CPU spares the steps that only that needs."""
    return cuts.asynchronous(mask.device) or bool(mask.any())


def _sum(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)
