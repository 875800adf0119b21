"""The walk of a loss that reads every logit of a token, and of its gradient: blocks of rows, slabs of columns.

    logits    z_i = h_i[rows] W_i[slab]^T of each side i, in ACC        by the library's product
              finished in place where a head has a bias or a softcap: z = softcap tanh(scale (z + b) / softcap)
    the loss  folds them into statistics of the rows, or writes dz, its gradient in h W^T
    then      dh[rows] += dz W[slab]       dW[slab] += dz^T h[rows]       db[slab] += sum_n dz[n]

Legend: N tokens, D hidden size, V vocabulary, R rows of logits, M >= R rows of dz, C columns of a slab, ACC fp32 (fp64
for fp64 inputs), G = 2 N D V. A loss says which folds go before its gradient.

Two ways within the workspace; `dense_plan` takes the one it reckons faster:

* at hand (C = V): the logits of R rows stay through all folds and the gradient. Nothing is multiplied twice: 4 G for
  two sides, 3 G with a frozen head. dW is summed in ACC over blocks of M rows. Until that sum is cast into dW at the
  end, the memory of a half dW holds logits and dz.
* recomputed (C < V): the folds go first, over all rows; then slab after slab is multiplied once more for the gradient:
  6 G for two sides, 5 G with a frozen head. A slab of dW is finished when it is left, dh is summed in ACC.

dz is written in the operands' dtype. fp16 would lose small ones: they are multiplied by a power of two, from a bound
of |dz|, and the products divided by it. Rows with a factor of 0 enter dW as zeros, whatever their hidden states are:
those are copied first. Deterministic: no atomics, no synchronisation, every sum in one order.

The gradients are made before the upstream gradient is known. `times_upstream` multiplies one by it: a number on the device,
which a half gradient of any size is multiplied by in place at the speed of memory, or left alone where it is 1. `times_rows`
does it out of place, for the gradients in hidden states that a second backward pass may want again.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import grad_dtype, workspace_bytes
from ..head import LMHead, Need
from ..products import add_product, fp16_gain, pitch, product
from . import tiles
from .dense_plan import Plan, Shape, Sweep, buffers, folds_alone, lent, placed, plan
from .primitives import (
    ACCUMULATORS,
    MAX_SIZE,
    finish,
    require_grid,
)

# A loss keeps up to eight statistics of every token one behind the other, which its kernels find in 32 bits.
MAX_TOKENS = MAX_SIZE // 8


class Side(NamedTuple):
    """Hidden states and the head that makes logits of them."""

    hidden: Tensor
    head: LMHead

    @property
    def operand(self) -> torch.dtype:
        """The dtype of dz: that of both it is multiplied with, or ACC."""
        return self.hidden.dtype if self.hidden.dtype == self.head.weight.dtype else self.head.acc

    @property
    def finished(self) -> bool:
        """Whether logits are finished in place; otherwise a loss multiplies them by `by` where it reads them."""
        return self.head.bias is not None or self.head.softcap is not None

    @property
    def by(self) -> float:
        return 1.0 if self.finished else self.head.scale


class Block(NamedTuple):
    """Rows and columns with the logits `[R, C]` of each side; a row of those begins on 16 elements."""

    rows: slice
    slab: slice
    logits: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.logits[0].shape
        return rows, columns


class Loss:
    """What is asked of a loss: `gradient` writes gain dz, for the `first` time or again; `bound` is that of |dL/dz|."""

    sides: tuple[Side, ...]  # the first is the one with gradients
    factor: Tensor  # of each row
    bounded = True  # `bound` knows without the folds of the rows
    token_bytes = 0  # of what it keeps of every token
    partials = 0  # numbers that a fold leaves of a row's split

    @property
    def folds(self) -> tuple[Callable[[Block], None], ...]:
        return ()

    def settle(self, rows: slice) -> None:
        """All logits of the rows are folded: make what the gradient needs."""

    def gradient(self, block: Block, dz: Tensor, gain: Tensor | None, first: bool) -> None:
        raise NotImplementedError

    def bound(self, rows: slice) -> Tensor | float:
        raise NotImplementedError


def grid(block: Block, programs: int) -> tuple[tuple[int], dict[str, int]]:
    """At least so many programs over rows and splits of a slab that write dz, as a grid and the shape arguments of its kernel."""
    (rows, columns), width = block.shape, tiles.SLAB_COLUMNS[block.logits[0].element_size()]
    row_blocks = tiles.cdiv(rows, tiles.SLAB_ROWS)
    splits = tiles.cdiv(programs, row_blocks)
    split = tiles.cdiv(tiles.cdiv(columns, splits), width) * width
    splits = tiles.cdiv(columns, split)
    shape = {
        "SPLITS": splits, "SPLIT_COLUMNS": split,
        "ROWS": tiles.SLAB_ROWS, "COLUMNS": width, "num_warps": tiles.SLAB_WARPS,
    }  # fmt: skip
    return (require_grid(row_blocks * splits, "the dense losses"),), shape


def fold_grid(block: Block) -> tuple[tuple[int], dict[str, int]]:
    """Programs of one tile of the columns of a row each, in one warp: no loop, nothing is rescaled."""
    (rows, columns), width = block.shape, tiles.DENSE_FOLD_COLUMNS[block.logits[0].element_size()]
    row_blocks, splits = tiles.cdiv(rows, tiles.SLAB_ROWS), tiles.cdiv(columns, width)
    shape = {"SPLITS": splits, "ROWS": tiles.SLAB_ROWS, "COLUMNS": width, "num_warps": tiles.DENSE_FOLD_WARPS}
    return (require_grid(row_blocks * splits, "the dense losses"),), shape


def merge_grid(rows: int, splits: int) -> tuple[tuple[int], dict[str, int]]:
    """Programs that each add up all splits of a few rows."""
    columns = tiles.next_power_of_2(splits)
    height = max(1, tiles.DENSE_MERGE // columns)
    return (tiles.cdiv(rows, height),), {"ROWS": height, "COLUMNS": columns, "num_warps": 4}


# --- elementwise kernels -----------------------------------------------------------------------------------------


@triton.jit
def _finish_kernel(
    z_ptr, bias_ptr,
    R, C, first, SPLITS,
    z_pitch, stride_bv,
    softcap: tl.float64, scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLUMNS columns: logits in the place of products."""
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % SPLITS) * COLUMNS + tl.arange(0, COLUMNS)
    place = z_ptr + n[:, None] * z_pitch + c[None, :]
    there = (n < R)[:, None] & (c < z_pitch)[None, :]
    inside = (c < C)[None, :]
    z = finish(
        tl.load(place, mask=there, other=0.0), (first + c)[None, :], bias_ptr, stride_bv, inside, softcap, scale,
        HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(place, z, mask=there)


def finish_in_place(side: Side, z: Tensor, first: int) -> None:
    (rows, columns), width = z.shape, tiles.SLAB_COLUMNS[z.element_size()]
    splits, bias = tiles.cdiv(columns, width), side.head.bias
    programs = require_grid(tiles.cdiv(rows, tiles.SLAB_ROWS) * splits, "the dense losses")
    _finish_kernel[(programs,)](
        z, bias,
        rows, columns, first, splits,
        z.stride(0), 0 if bias is None else bias.stride(0),
        side.head.softcap or 0.0, side.head.scale,
        HAS_SOFTCAP=side.head.softcap is not None,
        ROWS=tiles.SLAB_ROWS, COLUMNS=width, num_warps=tiles.SLAB_WARPS,
    )  # fmt: skip


@triton.jit
def _scale_kernel(
    x_ptr, out_ptr, factor_ptr,
    E,
    SKIP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements, and so many again after those of all programs: out = factor x; where SKIP, nothing for a factor of 1."""
    factor = tl.load(factor_ptr).to(ACC)
    if (factor != 1.0) | (not SKIP):
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < E:
            e = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + e, mask=e < E, other=0.0).to(ACC)
            tl.store(out_ptr + e, (x * factor).to(out_ptr.dtype.element_ty), mask=e < E)
            start += tl.num_programs(0).to(tl.int64) * BLOCK


def times_upstream(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient (contiguous), rounded to `dtype`: in place where that is the gradient's own."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    programs = min(tiles.SCALE_PROGRAMS, tiles.cdiv(gradient.numel(), tiles.SCALE_BLOCK))
    if programs:
        _scale_kernel[(programs,)](
            gradient, out, factor,
            gradient.numel(),
            SKIP=out is gradient, ACC=ACCUMULATORS[factor.dtype], BLOCK=tiles.SCALE_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _scale_rows_kernel(
    x_ptr, out_ptr, factor_ptr,
    D, stride_f,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: out = factor x, BLOCK elements at a time."""
    n = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + n * stride_f).to(ACC)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(ACC)
        tl.store(out_ptr + n * D + d, (x * factor).to(out_ptr.dtype.element_ty), mask=d < D)


def times_rows(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient `[N, D]` (contiguous), rounded to `dtype`; a factor, or one of each row `[N]`."""
    n, d = gradient.shape
    out = torch.empty_like(gradient, dtype=dtype)
    if out.numel():
        _scale_rows_kernel[(require_grid(n, "a gradient"),)](
            gradient, out, factor,
            d, factor.stride(0) if factor.dim() else 0,
            ACC=ACCUMULATORS[factor.dtype], BLOCK=min(tiles.SCALE_BLOCK, tiles.next_power_of_2(d)), num_warps=4,
        )  # fmt: skip
    return out


# --- the walk --------------------------------------------------------------------------------------------------


def run(
    loss: Loss, need: Need, as_beside: Need | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make the loss's statistics, and (dh, dW, db) of its sum.

    `as_beside`: without gradients, the statistics are made as beside these: bit by bit the same.
    """
    hidden, head = loss.sides[0]
    (n, d), v = hidden.shape, head.weight.shape[0]
    if n > MAX_TOKENS:
        raise ValueError(f"hidden: the dense losses take at most {MAX_TOKENS} tokens at a time, got {n}")
    acc, device, out = head.acc, hidden.device, grad_dtype(hidden.dtype)
    make = torch.empty if n and v else torch.zeros
    dhidden = make(n, d, dtype=out, device=device) if need.hidden else None
    dweight = make(v, d, dtype=out, device=device) if need.weight else None
    dbias = torch.zeros(v, dtype=acc, device=device) if need.bias else None
    if n and v:
        shape = Shape(
            n, v, d, tuple(side.head.acc.itemsize for side in loss.sides),
            loss.sides[0].operand.itemsize, acc.itemsize, out.itemsize, len(loss.folds), as_beside or need,
            loss.token_bytes, loss.partials * acc.itemsize, whole=not loss.bounded,
        )  # fmt: skip
        planned = plan(shape, workspace_bytes(device))
        if as_beside and not any(need):
            planned = folds_alone(planned)
        _Walk(loss, shape, planned).run(dhidden, dweight, dbias)
    return dhidden, dweight, None if dbias is None else dbias.to(out)


def _blocks(rows: slice, height: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    """The beginning of flat memory as a matrix whose rows begin on 16 elements."""
    return memory[: rows * pitch(columns)].view(rows, pitch(columns))[:, :columns]


class _Walk:
    """One call: its sides and its memory, which is made anew for the folds and for each sweep."""

    def __init__(self, loss: Loss, shape: Shape, plan: Plan) -> None:
        self.sides, self.factor, self.loss, self.shape, self.plan = loss.sides, loss.factor, loss, shape, plan
        self.n, self.v, self.acc = shape.n, shape.v, loss.sides[0].head.acc
        self.memory: list[Tensor] = []
        self.dz = loss.factor.new_empty(0)
        self.counted: tuple[slice | None, Tensor | None] = None, None

    def run(self, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
        """Fold everything, and write the gradients that are there."""
        if self.plan.folds:
            self._reserve(self.plan.folds, None)
            self._fold(self.plan.folds)
        for sweep in self.plan.sweeps:
            self._reserve(sweep, dweight if lent(self.shape, sweep) else None)
            for group in _blocks(slice(0, self.n), sweep.group):
                self._sweep(
                    group, sweep,
                    dhidden[group] if sweep.need.hidden else None,
                    dweight if sweep.need.weight else None,
                    dbias if sweep.need.bias else None,
                )  # fmt: skip

    def _reserve(self, sweep: Sweep, free: Tensor | None) -> None:
        """Memory of dz and of the logits; the beginning of it in `free`, as far as that goes."""
        self.memory, self.dz = [], self.dz.new_empty(0)  # what was there before is given back first
        device, sizes = self.factor.device, buffers(self.shape, sweep)
        dtypes = [self.sides[0].operand, *(side.head.acc for side in self.sides)]
        bytes_ = None if free is None else free.view(-1).view(torch.uint8)
        places = placed(sizes, 0 if bytes_ is None else bytes_.numel())
        self.dz, *self.memory = (
            torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
            if place is None
            else bytes_[place : place + size].view(dtype)
            for size, place, dtype in zip(sizes, places, dtypes, strict=True)
        )

    def _logits(self, rows: slice, slab: slice) -> Block:
        logits = [_matrix(m, rows.stop - rows.start, slab.stop - slab.start) for m in self.memory]
        for side, z in zip(self.sides, logits, strict=True):
            product(side.hidden[rows], side.head.weight[slab].T, out=z)
            if side.finished:
                finish_in_place(side, z, slab.start)
        return Block(rows, slab, logits)

    def _fold(self, sweep: Sweep) -> None:
        """Every fold over all logits; whole rows are multiplied once for all of them."""
        groups = _blocks(slice(0, self.n), sweep.group)
        for rows in (rows for group in groups for rows in _blocks(group, sweep.rows)):
            slabs = list(_blocks(slice(0, self.v), sweep.columns))
            block = self._logits(rows, slabs[0]) if len(slabs) == 1 else None
            for fold in self.loss.folds:
                for slab in slabs:
                    fold(block or self._logits(rows, slab))
            self.loss.settle(rows)

    def _sweep(
        self, group: slice, sweep: Sweep, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
    ) -> None:
        """Slab after slab, and in each M rows of dz at a time: what they add to dh, dW and db."""
        steps = list(_blocks(group, sweep.kept))
        dh = None if dhidden is None else self._sum(dhidden, single=sweep.columns >= self.v)
        total = None if dweight is None else self._sum(dweight[: sweep.columns], single=len(steps) == 1)
        apart = dweight is not None and total.dtype != dweight.dtype
        for slab in _blocks(slice(0, self.v), sweep.columns):
            dw = None if dweight is None else total[: slab.stop - slab.start] if apart else dweight[slab]
            for step in steps:
                dz, gain = self._gradient(step, slab, sweep)
                if dw is not None:
                    self._add(dw, dz.T, self._counted(step), gain, fresh=step is steps[0])
                if dbias is not None:
                    self._add_rows(dbias[slab], dz, gain)
                if dh is not None:
                    local = slice(step.start - group.start, step.stop - group.start)
                    self._add(dh[local], dz, self.sides[0].head.weight[slab], gain, fresh=slab.start == 0)
            if apart:
                dweight[slab].copy_(dw)
        if dh is not None and dh is not dhidden:
            dhidden.copy_(dh)

    def _gradient(self, step: slice, slab: slice, sweep: Sweep) -> tuple[Tensor, Tensor | None]:
        """(gain dz of M rows of a slab, the gain), from R rows of logits at a time, which are folded here if not before."""
        dz = _matrix(self.dz, step.stop - step.start, slab.stop - slab.start)
        gain = None
        for rows in _blocks(step, sweep.rows):
            block = self._logits(rows, slab)
            if self.plan.folds is None:
                for fold in self.loss.folds:
                    fold(block)
                self.loss.settle(rows)
            gain = self._gain(step) if gain is None else gain
            local = slice(rows.start - step.start, rows.stop - step.start)
            self.loss.gradient(block, dz[local], gain, first=sweep is self.plan.sweeps[0])
        return dz, gain

    def _sum(self, out: Tensor, *, single: bool) -> Tensor:
        """Where products for `out` are added up: itself, if there is one product only or it is in ACC."""
        return out if single or out.dtype == self.acc else torch.empty_like(out, dtype=self.acc)

    def _counted(self, rows: slice) -> Tensor:
        """Hidden states that enter dW: a row that does not count may hold anything, and 0 NaN is NaN."""
        if self.counted[0] != rows:
            self.counted = rows, None
            skip = (self.factor[rows] == 0)[:, None]
            self.counted = rows, self.sides[0].hidden[rows].masked_fill(skip, 0)
        return self.counted[1]

    def _gain(self, rows: slice) -> Tensor | None:
        """The power of two that puts the largest possible |dz| of the rows near 2^14 where fp16 is to hold it."""
        if self.dz.dtype != torch.float16:
            return None
        return fp16_gain((self.factor[rows] * self.sides[0].head.scale * self.loss.bound(rows)).abs())

    def _add(self, out: Tensor, a: Tensor, b: Tensor, gain: Tensor | None, *, fresh: bool) -> None:
        """out += a b / gain, or = if fresh; summed in ACC, by way of the logits' memory where `out` cannot take it."""
        if gain is None and out.dtype == self.acc:
            product(a, b, out=out) if fresh else add_product(out, a, b)
            return
        d = out.shape[1]
        scratch = self.memory[0] if self.memory[0].numel() >= d else self.memory[0].new_empty(d)
        height = scratch.numel() // max(d, 1)
        for piece in _blocks(slice(0, out.shape[0]), height // 64 * 64 or max(height, 1)):
            part = scratch[: (piece.stop - piece.start) * d].view(-1, d) if d else None
            part = product(a[piece], b, out=part)
            if gain is not None:
                part /= gain
            out[piece].copy_(part) if fresh else out[piece].add_(part)

    def _add_rows(self, out: Tensor, dz: Tensor, gain: Tensor | None) -> None:
        """out += the sum of the rows of dz / gain."""
        total = dz.sum(0, dtype=out.dtype)
        out += total if gain is None else total / gain
