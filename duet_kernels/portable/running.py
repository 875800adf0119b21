"""Softmax sums that run over tiles of logits: the log-sum-exp, and the statistics of a distribution.

Each takes in tiles one after the other, relative to the largest logit so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cuts

_LOG2_E = math.log2(math.e)  # exp2 is several times faster than exp where torch leaves exp to MKL


class RunningLogsumexp:
    """A log-sum-exp over tiles: the maximum m and the sum of e = exp(x - m), both `[N]`; the sum of e (x - m) if wanted."""

    def __init__(self, n: int, like: Tensor, with_moment: bool = False) -> None:
        self.max = like.new_full((n,), -torch.inf)
        self.sum = like.new_zeros(n)
        self.moment = like.new_zeros(n) if with_moment else None

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile, overwriting it with exp(x - max); return (it, the factor on everything summed before)."""
        top = torch.maximum(self.max, x.amax(1))
        origin = cuts.origin(top)
        rescale = (self.max - origin).exp()
        x.sub_(origin[:, None])
        # Where e is 0 x may be -inf, and 0 inf would be NaN.
        moment, shifted = self.moment, None if self.moment is None else x.clamp(min=-1e4)
        x.mul_(_LOG2_E).exp2_()
        if moment is not None and shifted is not None:
            fall = (self.max - origin).masked_fill(self.sum == 0, 0)
            self.moment = rescale * (moment + fall * self.sum) + shifted.mul_(x).sum(1)
        self.sum = self.sum * rescale + x.sum(1)
        self.max = top
        return x, rescale

    def result(self) -> Tensor:
        return self.max + self.sum.log()

    def entropy(self) -> Tensor:
        """`[N]` that of the softmax over everything taken in; 0 over nothing."""
        assert self.moment is not None
        total = self.sum.masked_fill(self.sum == 0, 1)
        return total.log() - self.moment / total


class RunningStats:
    """Maximum m, the sum R of exp(x - m) without one largest term, mean and variance of x - m under it, all `[N]`.

    The largest term is 1: an almost certain token has an R far below eps, which the whole sum 1 + R would lose.
    """

    def __init__(self, n: int, like: Tensor) -> None:
        self.max = like.new_full((n,), -torch.inf)
        self.rest, self.mean, self.variance = like.new_zeros(3, n)

    def add(self, x: Tensor) -> None:
        """Take in a tile, overwriting it; merged as in Chan, Golub and LeVeque 1979."""
        top, at = x.max(1, keepdim=True)
        x.sub_(cuts.origin(top))
        weights = x.exp()
        x.clamp_(min=-1e4)  # where the weight is 0: 0 inf would be NaN
        largest = weights.gather(1, at)  # 1, or 0 where everything is -inf
        rest = weights.scatter_(1, at, 0).sum(1)
        total = (rest + largest[:, 0]).clamp(min=torch.finfo(x.dtype).tiny)
        mean = (weights * x).sum(1) / total
        weights.scatter_(1, at, largest)
        variance = weights.mul_(x.sub_(mean[:, None]).square_()).sum(1) / total
        self._merge(top[:, 0], rest, mean, variance)

    def _merge(self, top: Tensor, rest: Tensor, mean: Tensor, variance: Tensor) -> None:
        before, self.max = self.max, torch.maximum(self.max, top)
        origin = cuts.origin(self.max)
        fall, drop = (before - origin).exp(), (top - origin).exp()
        # The largest term of the side that stays below joins the rest.
        lesser = torch.where(top > before, fall, drop)
        old, new = fall * self.rest + fall, drop * rest + drop
        self.rest = fall * self.rest + drop * rest + lesser
        total = self.rest + (self.max != -torch.inf)
        old, new = (w / total.masked_fill(total == 0, 1) for w in (old, new))
        shift = (top - origin).masked_fill(new == 0, 0) + mean
        self.mean = (before - origin).masked_fill(old == 0, 0) + self.mean
        self.variance = old * self.variance + new * variance + old * new * (shift - self.mean).square()
        self.mean = old * self.mean + new * shift
