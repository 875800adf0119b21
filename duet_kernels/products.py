"""Matrix products that are summed and returned in fp32 (fp64 for fp64 operands), as a device's library makes them best.

    operand        what is multiplied: a half as it is where the library sums halves in fp32, else in the dtype of the sums
    product        a b
    add_product    out += a b
    scaled         gradients, made in the dtype of the sums, as they are multiplied with a half: rounded to its dtype
    fp16_gain      the power of two that keeps them in the range of fp16

What a device can do is asked of `dispatch.half_products` alone. Both implementations use this room; it imports no triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .dispatch import HALVES, acc_dtype, workspace_bytes


def pitch(columns: int) -> int:
    """Elements from one row to the next, so that each starts at a multiple of 16 elements: products are slow otherwise."""
    return -(-columns // 16) * 16


def operand(x: Tensor) -> Tensor:
    """x as a product takes it: itself, or a half that the library cannot multiply into fp32 upcast."""
    return x.to(operand_dtype(x))


def operand_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if dispatch.half_products(x.device, x.dtype) else acc_dtype(x.dtype)


def _as_halves(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.dtype not in HALVES:
        return False
    return a.is_meta or dispatch.half_products(a.device, a.dtype)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b"""
    acc = acc_dtype(torch.promote_types(a.dtype, b.dtype))
    if _as_halves(a, b):
        return torch.mm(a, b, out_dtype=acc) if out is None else torch.mm(a, b, out_dtype=acc, out=out)
    return torch.mm(a.to(acc), b.to(acc), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b; `out` is in the dtype of the sums."""
    acc = acc_dtype(torch.promote_types(a.dtype, b.dtype))
    if _as_halves(a, b) and not a.is_meta:  # meta tensors have no such form in torch 2.11
        torch.addmm(out, a, b, out_dtype=acc, out=out)
    else:
        out.addmm_(a.to(acc), b.to(acc))


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a[i] b[i] of halves that `half_products` takes."""
    return torch.bmm(a, b, out_dtype=torch.float32)


# --- gradients next to halves ----------------------------------------------------------------------------------------


def fp16_gain(sizes: Tensor) -> Tensor:
    """The power of two that puts the largest finite of `sizes` near 2^14: what is 2^38 times smaller is not lost."""
    peak = torch.where(sizes.isfinite(), sizes, 0).amax()
    return torch.where(peak > 0, torch.exp2(torch.floor(14 - torch.log2(peak)).clamp(-100, 100)), 1.0)


class Scaled(NamedTuple):
    """A matrix x as an operand: `values` = gain x, with a gain of 1 where none stands."""

    values: Tensor
    gain: Tensor | None = None

    @property
    def T(self) -> Scaled:
        return Scaled(self.values.T, self.gain)

    def columns(self, at: slice) -> Scaled:
        return Scaled(self.values[:, at], self.gain)

    def times(self, b: Tensor) -> Tensor:
        """x b"""
        made = product(self.values, b)
        return made if self.gain is None else made.div_(self.gain)

    def add_to(self, out: Tensor, b: Tensor) -> None:
        """out += x b; `out` is in the dtype of the sums."""
        if self.gain is None:
            add_product(out, self.values, b)
            return
        step = max(1, workspace_bytes(out.device) // (16 * out.element_size() * max(out.shape[1], 1)))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] += Scaled(self.values[rows], self.gain).times(b)


def scaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    """x as an operand next to one of `dtype`, which is that of x or a half."""
    if x.dtype == dtype:
        return Scaled(x)
    values = x.new_empty(len(x), pitch(x.shape[1]), dtype=dtype)[:, : x.shape[1]]
    if dtype != torch.float16 or x.numel() == 0:
        return Scaled(values.copy_(x))
    gain = fp16_gain(torch.linalg.vector_norm(x, torch.inf, dim=1))
    return Scaled(torch.mul(x, gain, out=values), gain)
