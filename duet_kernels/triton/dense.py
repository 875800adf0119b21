"""The schedule of a loss that reads every logit of a token, and of its gradient: blocks of rows, slabs of columns.

    a pass:  x_i = h_i[rows] W_i[slab]^T of each side i, in ACC          by the library's product
             the loss folds them into statistics of the rows, or writes dz = its gradient in h W^T
    then     dh[rows] += dz W[slab]       dW[slab] += dz^T h[rows]       db[slab] += sum_n dz[n]

Legend: N tokens, D hidden size, V vocabulary, R rows of a block, C columns of a slab, ACC fp32 (fp64 for fp64 inputs),
G = 2 N D V. A loss says which passes it folds before its gradient can be written; must not know which loss it is.

Two ways, both within `workspace_bytes()`; the planner takes the one it reckons faster (`dense_plan`):

* at hand (C = V): the logits of R rows stay through all passes and dz of M >= R rows is kept. Nothing is multiplied
  twice: 4 G for two sides, 3 G with a frozen head. dW is summed in ACC over the blocks, 8 V D bytes a block.
* recomputed (C < V): the folds go first, over all rows; then slab after slab is multiplied once more for the gradient:
  6 G for two sides, 5 G with a frozen head; 4 G for a loss without folds. A slab of dW is finished when it is left, dh
  is summed in ACC. Where dh of all rows leaves no room for slabs, dW and dh are made one after the other.

Reckoned by `dense_plan` (790 TFLOP/s, 4.3 TB/s; no GPU measurement yet) at N 8192, D 4096, V 128256, bf16, where G is
10.9 ms and the floor of two sides 43.6 ms (32.7 ms frozen); asserted in tests/test_kernels_linear_divergence.py:

| workspace | forward_kl                 | jsd     | forward_kl, frozen head    | cross-entropy              |
|-----------|----------------------------|---------|----------------------------|----------------------------|
| 3 GiB     | 52.7 ms, at hand           | 54.7 ms | 37.1 ms, at hand           | 39.8 ms, at hand           |
| 1 GiB     | 71.4 ms, recomputed        | 73.4 ms | 37.1 ms, at hand           | 47.3 ms, recomputed        |
| 256 MiB   | 78.4 ms, recomputed        | 80.4 ms | 48.6 ms, at hand           | 53.0 ms, recomputed        |

dz of all rows (M = N: 2.1 GB in bf16) would need no accumulator and 48.8 ms at 3 GiB; it is an [N, V] buffer, which only a
few tokens may have.

dz is written in the operands' dtype. fp16 would lose small ones: they are multiplied by a power of two, from a bound
of |dz|, and the products divided by it. Rows with a factor of 0 enter dW as zeros, whatever their hidden states are:
those are copied first. Deterministic: no atomics, no synchronisation, every sum in one order.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from ..head import LMHead, Need
from . import tiles
from .dense_plan import Plan, Shape, Sweep, pitch, plan
from .primitives import MAX_SIZE, add_product, product, require_grid, require_sizes

# A loss keeps up to eight statistics of every token one behind the other, which its kernels find in 32 bits.
MAX_TOKENS = MAX_SIZE // 8


class Side(NamedTuple):
    """Hidden states and the head that makes logits of them; bias, softcap and scale are the loss's to apply."""

    hidden: Tensor
    head: LMHead

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    @property
    def bias_stride(self) -> int:
        return 0 if self.head.bias is None else self.head.bias.stride(0)

    @property
    def acc(self) -> torch.dtype:
        return self.head.acc

    @property
    def operand(self) -> torch.dtype:
        """The dtype of dz: that of both it is multiplied with, or ACC."""
        return self.hidden.dtype if self.hidden.dtype == self.weight.dtype else self.acc


class Block(NamedTuple):
    """Rows and columns with the products `[R, C]` of each side; a row of those begins on 16 elements."""

    rows: slice
    slab: slice
    logits: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.logits[0].shape
        return rows, columns


class Loss(Protocol):
    """What is asked of a loss: `gradient` writes gain dz, for the `first` time or again; `bound` is that of |dL/dz|.

    `bounded` says that `bound` knows without the folds of the rows.
    """

    bounded: bool

    @property
    def folds(self) -> tuple[Callable[[Block], None], ...]: ...

    def gradient(self, block: Block, dz: Tensor, gain: Tensor | None, first: bool) -> None: ...

    def bound(self, rows: slice) -> Tensor | float: ...


def grid(block: Block) -> tuple[tuple[int], dict[str, int]]:
    """Programs over rows and splits of a slab, as a grid and the shape arguments of its kernel."""
    (rows, columns), width = block.shape, tiles.SLAB_COLUMNS[block.logits[0].element_size()]
    row_blocks = triton.cdiv(rows, tiles.SLAB_ROWS)
    splits = triton.cdiv(tiles.SLAB_PROGRAMS, row_blocks)
    split = triton.cdiv(triton.cdiv(columns, splits), width) * width
    splits = triton.cdiv(columns, split)
    shape = {
        "SPLITS": splits, "SPLIT_COLUMNS": split,
        "ROWS": tiles.SLAB_ROWS, "COLUMNS": width, "num_warps": tiles.SLAB_WARPS,
    }  # fmt: skip
    return (require_grid(row_blocks * splits, "the dense losses"),), shape


# --- the walk --------------------------------------------------------------------------------------------------


def run(
    sides: tuple[Side, ...], factor: Tensor, loss: Loss, need: Need
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make the loss's statistics, and (dh, dW, db) of its sum; `sides[0]` is the one with gradients."""
    (n, d), v = sides[0].hidden.shape, sides[0].weight.shape[0]
    require_sizes("the dense losses", hidden=d, weight=v)
    if n > MAX_TOKENS:
        raise ValueError(f"hidden: the dense losses take at most {MAX_TOKENS} tokens at a time, got {n}")
    acc, dtype, device = sides[0].acc, sides[0].hidden.dtype, factor.device
    out = acc if dtype == torch.float16 else dtype
    make = torch.empty if n and v else torch.zeros
    dhidden = make(n, d, dtype=out, device=device) if need.hidden else None
    dweight = make(v, d, dtype=out, device=device) if need.weight else None
    dbias = torch.zeros(v, dtype=acc, device=device) if need.bias else None
    if n and v:
        shape = Shape(
            n, v, tuple(side.hidden.shape[1] for side in sides), sum(side.acc.itemsize for side in sides),
            sides[0].operand.itemsize, acc.itemsize, out.itemsize, len(loss.folds), need,
            whole=not loss.bounded,
        )  # fmt: skip
        _Walk(sides, factor, loss, plan(shape)).run(dhidden, dweight, dbias)
    return dhidden, dweight, None if dbias is None else dbias.to(out)


def _blocks(rows: slice, height: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    """The beginning of flat memory as a matrix whose rows begin on 16 elements."""
    return memory[: rows * pitch(columns)].view(rows, pitch(columns))[:, :columns]


class _Walk:
    """One call: its sides and its memory, all of it made when it is first needed and reused."""

    def __init__(self, sides: tuple[Side, ...], factor: Tensor, loss: Loss, plan: Plan) -> None:
        self.sides, self.factor, self.loss, self.plan = sides, factor, loss, plan
        self.n, self.v = factor.shape[0], sides[0].weight.shape[0]
        self.memory: list[Tensor] = []
        self.dz = factor.new_empty(0)
        self.counted: tuple[slice | None, Tensor | None] = None, None

    def run(self, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
        """Fold everything, and write the gradients that are there."""
        plan = self.plan
        if plan.kept:
            self._reserve(plan.rows, plan.columns, plan.kept)
            self._at_hand(dhidden, dweight, dbias)
            return
        if self.loss.folds:
            self._reserve(plan.rows, plan.columns)
            self._fold()
        for sweep in plan.sweeps:
            self._reserve(sweep.rows, sweep.columns, sweep.rows)
            for group in _blocks(slice(0, self.n), sweep.group):
                self._sweep(
                    group, sweep,
                    dhidden[group] if sweep.need.hidden else None,
                    dweight if sweep.need.weight else None,
                    dbias if sweep.need.bias else None,
                )  # fmt: skip

    def _reserve(self, rows: int, columns: int, dz_rows: int = 0) -> None:
        self.memory, self.dz = [], self.dz.new_empty(0)  # what was there before is given back first
        size = pitch(columns)
        self.memory = [
            torch.empty(rows * size, dtype=side.acc, device=self.factor.device) for side in self.sides
        ]
        self.dz = torch.empty(dz_rows * size, dtype=self.sides[0].operand, device=self.factor.device)

    def _logits(self, rows: slice, slab: slice) -> Block:
        logits = [_matrix(m, rows.stop - rows.start, slab.stop - slab.start) for m in self.memory]
        for side, x in zip(self.sides, logits, strict=True):
            product(side.hidden[rows], side.weight[slab].T, out=x)
        return Block(rows, slab, logits)

    def _fold(self) -> None:
        """Every fold over all logits; whole rows are multiplied once for all of them."""
        for rows in _blocks(slice(0, self.n), self.plan.rows):
            slabs = list(_blocks(slice(0, self.v), self.plan.columns))
            block = self._logits(rows, slabs[0]) if len(slabs) == 1 else None
            for fold in self.loss.folds:
                for slab in slabs:
                    fold(block or self._logits(rows, slab))

    def _at_hand(self, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
        """Blocks of whole rows; dz of several makes dh and a part of dW."""
        total = None
        for step in _blocks(slice(0, self.n), self.plan.kept):
            dz = _matrix(self.dz, step.stop - step.start, self.v)
            gain = None
            for rows in _blocks(step, self.plan.rows):
                block = self._logits(rows, slice(0, self.v))
                for fold in self.loss.folds:
                    fold(block)
                gain = self._gain(step)
                local = slice(rows.start - step.start, rows.stop - step.start)
                self.loss.gradient(block, dz[local], gain, first=True)
            first, last = step.start == 0, step.stop == self.n
            if dweight is not None:
                if total is None:
                    total = self._accumulator(dweight, single=last)
                self._add(total, dz.T, self._counted(step), gain, fresh=first)
            if dbias is not None:
                self._add_rows(dbias, dz, gain)
            if dhidden is not None:
                self._add(dhidden[step], dz, self.sides[0].weight, gain, fresh=True)
        if dweight is not None and total is not dweight:
            dweight.copy_(total)

    def _sweep(
        self, group: slice, sweep: Sweep, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
    ) -> None:
        """Slab after slab of the gradients of a group of rows, once all is folded."""
        parts = list(_blocks(group, sweep.rows))
        dh = None if dhidden is None else self._accumulator(dhidden, single=sweep.columns >= self.v)
        single = len(parts) == 1
        slabs = None if dweight is None else self._accumulator(dweight[: sweep.columns], single=single)
        in_place = slabs is None or slabs.dtype == dweight.dtype
        for slab in _blocks(slice(0, self.v), sweep.columns):
            dw = None if dweight is None else dweight[slab] if in_place else slabs[: slab.stop - slab.start]
            for rows in parts:
                block = self._logits(rows, slab)
                dz = _matrix(self.dz, *block.shape)
                gain = self._gain(rows)
                self.loss.gradient(block, dz, gain, first=sweep is self.plan.sweeps[0])
                if dw is not None:
                    self._add(dw, dz.T, self._counted(rows), gain, fresh=rows is parts[0])
                if dbias is not None:
                    self._add_rows(dbias[slab], dz, gain)
                if dh is not None:
                    local = slice(rows.start - group.start, rows.stop - group.start)
                    self._add(dh[local], dz, self.sides[0].weight[slab], gain, fresh=slab.start == 0)
            if not in_place:
                dweight[slab].copy_(dw)
        if dh is not None and dh is not dhidden:
            dhidden.copy_(dh)

    def _accumulator(self, out: Tensor, *, single: bool) -> Tensor:
        """Where products for `out` are added up: itself, if there is one product only or it is in ACC."""
        acc = self.sides[0].acc
        return out if single or out.dtype == acc else torch.empty(out.shape, dtype=acc, device=out.device)

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
        size = (self.factor[rows] * self.sides[0].head.scale * self.loss.bound(rows)).abs()
        peak = torch.where(size.isfinite(), size, 0).amax()
        return torch.where(peak > 0, torch.exp2(torch.floor(14 - torch.log2(peak)).clamp(-100, 100)), 1.0)

    def _add(self, out: Tensor, a: Tensor, b: Tensor, gain: Tensor | None, *, fresh: bool) -> None:
        """out += a b / gain, or = if fresh; summed in ACC, by way of the logits' memory where `out` cannot take it."""
        if gain is None and out.dtype == self.sides[0].acc:
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
