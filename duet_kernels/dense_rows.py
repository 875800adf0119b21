"""A divergence between whole rows of logits and its gradient, a strip of columns at a time: torch's side of dense losses.

    M = max z    e = exp((z - M) / T)    S = sum e    u = (s - t) / T - (M_s - M_t) / T    r = log(S_s / S_t)
    q = e_s / S_s    p = e_t / S_t    w = log q - log p = u - r

Rows are worked on where they lie. First they become u and g = the larger of e_s and e_t, from which everything follows
without a digit lost: the smaller one is g exp(-|u|), and e_s - e_t = g (1 - exp(-|u|)) with the sign of u. So logits are
compared before they are normalised, r comes from B = sum (e_s - e_t) where S_s and S_t are near, and a student close to
its teacher keeps its digits (MATH.md). In the end the student's row is overwritten with the gradient. A strip stays in
the cache while it is worked on; no temporary is as long as a row. `reference.divergence` is the definition.

Legend: R rows, V vocabulary, T temperature, s / t student's and teacher's logits. Must not know where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .divergence import Divergence
from .rowwise import log_to_mixture
from .workspace import workspace_bytes

_STRIP_BYTES = 2**19  # of one temporary: half a dozen of them lie in a core's share of the cache


class DenseRows:
    """Student's and teacher's logits `[R, V]`, both overwritten; `loss` `[R]` is there at once, `gradient_` on demand.

    The student's memory holds g, the teacher's u (raw divergences: the difference of the logits, and nothing).
    """

    def __init__(self, student: Tensor, teacher: Tensor, spec: Divergence) -> None:
        self.s, self.t, self.spec = student, teacher, spec
        self.inverse = 1.0 / spec.temperature
        self.noise = self._noise() if spec.name in ("l1", "tvd") else student.new_zeros(())
        if spec.raw:
            self.s.sub_(self.t)
            self.loss = self._sum(lambda c: self._raw(self.s[:, c])[0])
        else:
            self._normalise()
            self._measure()

    def gradient_(self, factor: Tensor) -> Tensor:
        """The student's memory, overwritten with factor * dloss/ds; rows with a factor of 0 with 0."""
        skip, scaled = (factor == 0)[:, None], (factor * self.inverse)[:, None]
        for c in self._strips():
            dx = self._raw(self.s[:, c])[1] if self.spec.raw else self._dx(c)
            torch.mul(dx, scaled, out=self.s[:, c]).masked_fill_(skip, 0)
        return self.s

    def _strips(self) -> Iterator[slice]:
        rows, v = self.s.shape
        strip = min(_STRIP_BYTES, workspace_bytes() // 64)
        width = max(16, strip // (max(rows, 1) * self.s.element_size()))
        for start in range(0, v, width):
            yield slice(start, min(start + width, v))

    def _sum(self, terms: Callable[[slice], Tensor]) -> Tensor:
        """What `terms` makes of every strip, added up."""
        return sum((terms(c) for c in self._strips()), self.s.new_zeros(()))

    def _noise(self) -> Tensor:
        """`[R, 1]` 8 eps of the row's largest finite logit: a difference below it is rounding and has no sign."""
        largest = self.s.new_zeros(self.s.shape[0], 1)
        for c in self._strips():
            for z in (self.s[:, c], self.t[:, c]):
                size = z.abs()
                largest = torch.maximum(largest, size.masked_fill_(size.isinf(), 0).amax(1, keepdim=True))
        return largest.mul_(8 * torch.finfo(self.s.dtype).eps)

    def _raw(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """(`[R]` loss, gradient) of a strip of differences."""
        if self.spec.name == "mse":
            return d.square().sum(1), 2 * d
        if self.spec.name == "huber":
            clamped = d.clamp(-self.spec.delta, self.spec.delta)
            # With c the clamped difference: c (d - c / 2) is both branches of the Huber loss.
            return (d - 0.5 * clamped).mul_(clamped).sum(1), clamped
        d = d.masked_fill(d.abs() <= self.noise, 0)
        return d.abs().sum(1), d.sign_()

    def _normalise(self) -> None:
        """g, u, the sums and r. An infinite maximum is no origin: inf - inf would be NaN."""
        ends = [z.aminmax(dim=1, keepdim=True) for z in (self.s, self.t)]
        # Looking would synchronise a GPU; a CPU spares the steps that only a logit of -inf needs.
        self.holes = self.s.device.type != "cpu" or any(bool((low == -torch.inf).any()) for low, _ in ends)
        self.origins = s_origin, t_origin = [top.masked_fill(top.isinf(), 0) for _, top in ends]
        self.gap = (s_origin - t_origin) * self.inverse
        self.s_sum, self.t_sum, change, self.moment = self._sum(self._compare)[:, :, None].unbind(1)
        relative = change / self.t_sum
        self.ratio = torch.where(relative.abs() <= 0.5, relative.log1p(), (self.s_sum / self.t_sum).log())

    def _compare(self, c: slice) -> Tensor:
        """A strip of logits becomes g and u; `[R, 4]`: its S_s, S_t, B, and sum e_t u (reverse KL: sum e_s u)."""
        s, t = self.s[:, c], self.t[:, c]
        e_s, e_t = (self._scaled(z - o).exp_() for z, o in zip((s, t), self.origins, strict=True))
        nowhere = (s == -torch.inf) & (t == -torch.inf) if self.holes else None
        u = self._scaled(torch.sub(s, t, out=t))
        if nowhere is not None:
            u.masked_fill_(nowhere, 0)
        u.sub_(self.gap)
        g = torch.maximum(e_s, e_t, out=s)
        change = u.abs().neg_().expm1_().mul_(g).copysign_(u)
        moment = self._expected(e_s if self.spec.name == "reverse_kl" else e_t, u)
        return torch.stack([x.sum(1) for x in (e_s, e_t, change, moment)], 1)

    def _scaled(self, x: Tensor) -> Tensor:
        """x / T, in place."""
        return x if self.inverse == 1.0 else x.mul_(self.inverse)

    def _expected(self, p: Tensor, x: Tensor) -> Tensor:
        """p x, and 0 where p is 0 although x may be infinite."""
        return (p * x).masked_fill_(p == 0, 0) if self.holes else p * x

    def _measure(self) -> None:
        """The loss `[R]`, and what the gradient subtracts in every row."""
        if self.spec.name == "forward_kl":
            self.loss = (self.ratio - self.moment / self.t_sum)[:, 0]
        elif self.spec.name == "reverse_kl":
            self.centre = self.moment / self.s_sum - self.ratio
            self.loss = self.centre[:, 0]
        else:
            one, self.centre = self._sum(self._second)[:, :, None].unbind(1)
            if self.spec.name == "jsd":
                one = 2 * (self.spec.beta * one + (1 - self.spec.beta) * self.centre)
            self.loss = 0.5 * one[:, 0]

    def _second(self, c: slice) -> Tensor:
        """`[R, 2]` of a strip: KL(p||m) and KL(q||m), or sum |q - p| and sum q sign(q - p)."""
        if self.spec.name == "jsd":
            p_to_m, q_to_m = log_to_mixture(self._w(c), self.spec.beta)
            return torch.stack(
                [self._expected(self._p(c), p_to_m).sum(1), self._expected(self._q(c), q_to_m).sum(1)], 1
            )
        difference = self._q_minus_p(c).masked_fill_(self._quiet(c), 0)
        return torch.stack([difference.abs().sum(1), difference.sign_().mul_(self._q(c)).sum(1)], 1)

    def _dx(self, c: slice) -> Tensor:
        """T dloss/ds of a strip."""
        if self.spec.name == "forward_kl":
            return self._q_minus_p(c)
        if self.spec.name == "reverse_kl":
            return self._expected(self._q(c), self._w(c).sub_(self.centre))
        if self.spec.name == "jsd":
            q_to_m = log_to_mixture(self._w(c), self.spec.beta)[1]
            return self._expected(self._q(c), q_to_m.sub_(self.centre)).mul_(1 - self.spec.beta)
        sign = self._q_minus_p(c).sign_().masked_fill_(self._quiet(c), 0)
        return sign.sub_(self.centre).mul_(self._q(c)).mul_(0.5)

    def _w(self, c: slice) -> Tensor:
        return self.t[:, c] - self.ratio

    def _q(self, c: slice) -> Tensor:
        return self.t[:, c].clamp(max=0).exp_().mul_(self.s[:, c]).div_(self.s_sum)

    def _p(self, c: slice) -> Tensor:
        return self.t[:, c].neg().clamp_(max=0).exp_().mul_(self.s[:, c]).div_(self.t_sum)

    def _q_minus_p(self, c: slice) -> Tensor:
        """q (1 - exp(-w)) where e_s is the larger, p (exp(w) - 1) elsewhere. |r| <= log V: no exponential overflows."""
        w, above = self._w(c), self.t[:, c] > 0
        away = torch.where(above, -w, w).expm1_().mul_(self.s[:, c])
        return away.mul_(torch.where(above, -1 / self.s_sum, 1 / self.t_sum))

    def _quiet(self, c: slice) -> Tensor:
        return self._w(c).abs_() <= self.noise * self.inverse
