"""The logits at K ids of a token and the log-sum-exp of all others, and losses of the two with their gradients.

    z[n,v]  = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)       (no softcap: scale (h W^T + b))
    m, s    = largest z off the ids, sum over v off the ids of e_v = exp((z[n,v] - m) / T)
    tail[n] = log sum over v off the ids of exp(z[n,v] / T) = m / T + log s       values[n,k] = z[n, ids[n,k]]
    dz[n,v] = L_tail e_v / (s T) slope off the ids,  (sum over k with ids[n,k] = v of L_k) slope at them
    slope   = scale (1 - (z / softcap)^2)       dh = dz W       dW = dz^T h       db = sum_n dz[n]

with L_tail and L_k the derivatives of f L in tail and values, of three losses:

    cross-entropy           ids = the label, T = 1:  L = log(1 + exp(tail - z_y)),  L_tail = -L_y = S / (S + e_y)
    log-sum-exp             L = tail, nothing at the ids
    top-k loss with a tail  L = a divergence of values and tail (`topk_divergence`)

Legend: N tokens, K ids of a token, D hidden size, V vocabulary, R rows of a block, C columns of a slab, T temperature,
f the row's factor, S = exp(tail), ACC fp32 (fp64 for fp64 inputs). Nats. An id < 0 is an absent slot: value -inf,
nothing excluded. An id met twice is excluded once. An id >= V makes its row NaN. A NaN stays in its row (and is in
every row of dW). A row with f = 0 gives exactly 0 and leaves no trace, whatever its hidden states and ids are.

Where digits would be lost. The ids are left out of the sum: a token that is almost certain has a loss of exp(tail - z_y)
and a gradient of S / (S + e_y), both with all their digits, where log-sum-exp minus z_y and q - 1 keep those of 1. What
stands in dz at an id is a difference of probabilities made in ACC and rounded once: a rounded q never meets the p that it
should cancel.

Over the logits of a block (`dense` says which blocks and slabs): pick the values and overwrite them with what counts
as -inf; fold (m, s); the loss of the rows; dz, which is 0 at what was overwritten; the ids' own dz put there. Bytes and
FLOP at N 8192, D 4096, V 128256, bf16, G = 2 N D V = 8.6 TFLOP; times of an H200, commit 471f8a8
(benchmarks/results/nvidia-h200/kernels.md, cross-entropy frozen):

| step          | work             | reads and writes of the kernels here   | bound by               |
|---------------|------------------|----------------------------------------|------------------------|
| logits        | 1 G              | the product's: 4 N V                   | product                |
| finish        | softcap, bias    | 8 N V, where a head has one of them    | memory                 |
| take, put     | N K ids          | 64 bytes an id                         | latency                |
| fold          | 8 FLOP a logit   | 4 N V = 4.2 GB                         | 0.94 ms at 4.5 TB/s    |
| dz            | 8 FLOP a logit   | (4 + 2) N V = 6.3 GB                   | 1.5 ms at 4.1 TB/s     |
| dh, dW        | 1 G each         | the product's: 4 N V, W, dW            | product                |
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import LMHead, Need
from ..options import Divergence
from . import dense, tiles
from .gather import slot_gradients, sum_rows
from .primitives import (
    ACCUMULATORS,
    LOG2E,
    load_tile,
    log1p,
    number,
    origin,
)
from .terms import BOUNDS
from .topk_divergence import topk_divergence

# --- the ids of a block ----------------------------------------------------------------------------------------


@triton.jit
def _take_kernel(
    z_ptr, ids_ptr, factor_ptr, values_ptr,
    R, K, C, V, first,
    z_pitch, stride_in, stride_ik, stride_f,
    by: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: values `[R, K]` of the ids in the slab (in the first one, of ids in none), and -inf in their place."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0) != 0
    scale = number(by, z_ptr.dtype.element_ty)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        slot = live[:, None] & (k < K)[None, :]
        place = ids_ptr + n[:, None] * stride_in + k.to(tl.int64)[None, :] * stride_ik
        ids = tl.load(place, mask=slot, other=0)
        column = ids - first
        here = slot & (column >= 0) & (column < C)
        z = tl.load(z_ptr + n[:, None] * z_pitch + column, mask=here, other=0.0) * scale
        value = tl.where(here, z, tl.where(ids < 0, float("-inf"), float("nan")))
        known = here | (slot & (first == 0) & ((ids < 0) | (ids >= V)))
        tl.store(values_ptr + n[:, None] * K + k[None, :], value, mask=known)
    # An id may be there twice: every value is read before any is overwritten.
    tl.debug_barrier()
    nothing = tl.full([ROWS, COLUMNS], float("-inf"), scale.dtype) * scale
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        slot = live[:, None] & (k < K)[None, :]
        place = ids_ptr + n[:, None] * stride_in + k.to(tl.int64)[None, :] * stride_ik
        column = tl.load(place, mask=slot, other=-1) - first
        here = slot & (column >= 0) & (column < C)
        tl.store(z_ptr + n[:, None] * z_pitch + column, nothing, mask=here)


@triton.jit
def _put_kernel(
    ids_ptr, values_ptr, upstream_ptr, factor_ptr, gain_ptr, dz_ptr,
    R, K, C, first,
    stride_in, stride_ik, stride_f, dz_pitch,
    softcap: tl.float64, scale: tl.float64,
    HAS_UPSTREAM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_GAIN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLUMNS slots: gain dz at the ids in the slab, from all slots with the same id; 0 without an upstream."""
    blocks = tl.cdiv(K, COLUMNS)
    n = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    live = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0) != 0
    slot = live[:, None] & (k < K)[None, :]
    row = ids_ptr + n[:, None] * stride_in
    ids = tl.load(row + k.to(tl.int64)[None, :] * stride_ik, mask=slot, other=-1)
    here = slot & (ids >= first) & (ids < first + C)
    dz = tl.full([ROWS, COLUMNS], 0.0, ACC)
    if HAS_UPSTREAM:
        for start in range(0, K, OTHERS):
            j = start + tl.arange(0, OTHERS)
            there = live[:, None] & (j < K)[None, :]
            others = tl.load(row + j.to(tl.int64)[None, :] * stride_ik, mask=there, other=-1)
            upstream = tl.load(upstream_ptr + n[:, None] * K + j[None, :], mask=there, other=0.0)
            same = ids[:, :, None] == others[:, None, :]
            dz += tl.sum(tl.where(same, upstream[:, None, :], 0.0), 2)
        dz = dz * number(scale, ACC)
        if HAS_SOFTCAP:
            cap = number(softcap, ACC)
            z = tl.load(values_ptr + n[:, None] * K + k[None, :], mask=here, other=0.0)
            dz = dz * ((cap - z) / cap) * ((cap + z) / cap)
        if HAS_GAIN:
            dz = dz * tl.load(gain_ptr)
    # Slots of one id write the same number.
    place = dz_ptr + n[:, None] * dz_pitch + (ids - first)
    tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=here)


# --- the sum of a row --------------------------------------------------------------------------------------------


@triton.jit
def _sum_kernel(
    z_ptr, factor_ptr, partial_ptr,
    R, C, SPLITS,
    z_pitch, stride_f, stride_p,
    by: tl.float64, inverse_temperature: tl.float64,
    MOMENT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLUMNS of a slab in registers: largest logit and sum of e (and of e (z - m) / T) `[2 or 3, R, SPLITS]`."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = split * COLUMNS + tl.arange(0, COLUMNS)
    live = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0) != 0
    z = load_tile(z_ptr, n, c, z_pitch, live, (split + 1) * COLUMNS <= C, C, number(by, ACC), ACC)
    m = tl.max(z, 1)
    e = tl.exp2((z - origin(m)[:, None]) * (number(inverse_temperature, ACC) * LOG2E))
    place = partial_ptr + n * SPLITS + split
    tl.store(place, tl.where(live, m, float("-inf")), mask=n < R)
    tl.store(place + stride_p, tl.where(live, tl.sum(e, 1), 0.0), mask=n < R)
    if MOMENT:
        x = (z - origin(m)[:, None]) * number(inverse_temperature, ACC)
        moment = tl.sum(tl.where(e == 0, 0.0, e * x), 1)
        tl.store(place + 2 * stride_p, tl.where(live, moment, 0.0), mask=n < R)


@triton.jit
def _merge_sums_kernel(
    partial_ptr, sums_ptr,
    R, SPLITS,
    stride_p, stride_s,
    inverse_temperature: tl.float64,
    FRESH: tl.constexpr, MOMENT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: (m, s, tail, sum of e (z - m) / T), a slab's splits taken into the sums of the slabs before, unless FRESH."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, COLUMNS)
    keep = (n < R)[:, None] & (split < SPLITS)[None, :]
    inverse = number(inverse_temperature, ACC)
    place = partial_ptr + n[:, None] * SPLITS + split[None, :]
    maxima = tl.load(place, mask=keep, other=float("-inf"))
    sums = tl.load(place + stride_p, mask=keep, other=0.0)
    m = tl.max(maxima, 1)
    if not FRESH:
        before = tl.load(sums_ptr + n, mask=n < R, other=float("-inf"))
        m = tl.maximum(m, before)
    zero = origin(m)
    s = tl.sum(tl.where(keep, sums * tl.exp((maxima - zero[:, None]) * inverse), 0.0), 1)
    if MOMENT:
        fall = tl.where(sums == 0, 0.0, (maxima - zero[:, None]) * inverse)
        moments = tl.load(place + 2 * stride_p, mask=keep, other=0.0) + fall * sums
        moment = tl.sum(tl.where(sums == 0, 0.0, moments * tl.exp(fall)), 1)
        if not FRESH:
            s_before = tl.load(sums_ptr + stride_s + n, mask=n < R, other=0.0)
            fall_before = tl.where(s_before == 0, 0.0, (before - zero) * inverse)
            moment_before = tl.load(sums_ptr + 3 * stride_s + n, mask=n < R, other=0.0)
            moment += (moment_before + fall_before * s_before) * tl.exp(fall_before)
        tl.store(sums_ptr + 3 * stride_s + n, moment, mask=n < R)
    if not FRESH:
        s += tl.load(sums_ptr + stride_s + n, mask=n < R, other=0.0) * tl.exp((before - zero) * inverse)
    tl.store(sums_ptr + n, m, mask=n < R)
    tl.store(sums_ptr + stride_s + n, s, mask=n < R)
    tl.store(sums_ptr + 2 * stride_s + n, zero * inverse + tl.log(s), mask=n < R)


# --- losses and dz -----------------------------------------------------------------------------------------------


@triton.jit
def _label_kernel(
    sums_ptr, values_ptr, factor_ptr, loss_ptr, dtail_ptr, dlabel_ptr,
    R,
    stride_s, stride_f,
    ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: f log(1 + exp(tail - z_y)), its derivative in the tail and that in z_y."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0).to(ACC)
    live = factor != 0
    m = tl.load(sums_ptr + n, mask=live, other=0.0)
    s = tl.load(sums_ptr + stride_s + n, mask=live, other=1.0)
    z = tl.load(values_ptr + n, mask=live, other=0.0)
    # Relative to the larger of both no exponential overflows.
    zero = origin(tl.maximum(m, z))
    # A label that is alone stands above nothing: exp may overflow there, and 0 inf is NaN.
    rest = tl.where(s == 0, 0.0, s * tl.exp(origin(m) - zero))
    label = tl.exp(z - zero)
    gap = (zero - z) + tl.log(rest + label)
    loss = tl.where(rest <= 0.25 * label, log1p(rest / label), gap)
    miss = tl.where(live, factor * (rest / (rest + label)), 0.0)
    tl.store(loss_ptr + n, tl.where(live, factor * loss, 0.0), mask=n < R)
    tl.store(dtail_ptr + n, miss, mask=n < R)
    tl.store(dlabel_ptr + n, -miss, mask=n < R)


@triton.jit
def _softmax_kernel(
    z_ptr, sums_ptr, dtail_ptr, gain_ptr, dz_ptr,
    R, C, SPLITS, SPLIT_COLUMNS,
    z_pitch, stride_s, stride_t, dz_pitch,
    softcap: tl.float64, scale: tl.float64, by: tl.float64, inverse_temperature: tl.float64,
    HAS_SOFTCAP: tl.constexpr, HAS_GAIN: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, one split of a slab: gain dz `[R, C]` as it is off the ids."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dtail = tl.load(dtail_ptr + n * stride_t, mask=n < R, other=0.0).to(ACC)
    live = dtail != 0
    zero = origin(tl.load(sums_ptr + n, mask=live, other=0.0))
    s = tl.load(sums_ptr + stride_s + n, mask=live, other=1.0)
    inverse = number(inverse_temperature, ACC)
    # Nothing off the ids: nothing to share, and 1 / 0 times 0 would be NaN.
    upstream = tl.where(s == 0, 0.0, dtail / s) * (inverse * number(scale, ACC))
    if HAS_GAIN:
        upstream = upstream * tl.load(gain_ptr)
    times = number(by, ACC)
    cap = number(softcap, ACC)
    begin = split * SPLIT_COLUMNS
    for start in range(begin, tl.minimum(begin + SPLIT_COLUMNS, C), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        place = z_ptr + n[:, None] * z_pitch + c[None, :]
        z = tl.load(place, mask=live[:, None] & (c < z_pitch)[None, :], other=0.0) * times
        dz = tl.exp2((z - zero[:, None]) * (inverse * LOG2E)) * upstream[:, None]
        if HAS_SOFTCAP:
            dz = dz * ((cap - z) / cap) * ((cap + z) / cap)
        dz = tl.where(live[:, None] & (c < C)[None, :], dz, 0.0)
        place = dz_ptr + n[:, None] * dz_pitch + c[None, :]
        tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=(n < R)[:, None] & (c < dz_pitch)[None, :])


# --- launchers -------------------------------------------------------------------------------------------------


class _Complement(dense.Loss):
    """Ids, the sums of all others and what a loss makes of them: `settle`, of which log-sum-exp needs nothing."""

    partials = 2

    def __init__(
        self,
        hidden: Tensor,
        head: LMHead,
        ids: Tensor,
        factor: Tensor,
        temperature: float = 1.0,
        moment: bool = False,
    ) -> None:
        self.partials = 3 if moment else self.partials
        (n, k), self.v = ids.shape, head.weight.shape[0]
        self.acc, self.acc_tl = head.acc, ACCUMULATORS[head.acc]
        self.side = dense.Side(hidden, head)
        self.sides = (self.side,)
        self.ids, self.factor, self.temperature = ids, factor, temperature
        self.token_bytes = (8 + 2 * k) * self.acc.itemsize
        self.moment = moment
        # m, s, the tail, the sum of e (z - m) / T
        self.sums = factor.new_empty(3 + moment, n, dtype=self.acc)
        self.values = self.sums.new_empty(n, k)
        self.dtail, self.loss = factor, self.sums[2]
        self.upstream: Tensor | None = None  # of the values

    @property
    def folds(self):
        return (self._fold,)

    def _fold(self, block: dense.Block) -> None:
        (z,), (rows, columns), k = block.logits, block.shape, self.ids.shape[1]
        ids, factor, values = self.ids[block.rows], self.factor[block.rows], self.values[block.rows]
        first, by = block.slab.start, self.side.by
        if k:
            width = min(tiles.next_power_of_2(k), tiles.SLOTS)
            height = tiles.SLOTS // width
            _take_kernel[(tiles.cdiv(rows, height),)](
                z, ids, factor, values,
                rows, k, columns, self.v, first,
                z.stride(0), *ids.stride(), factor.stride(0),
                by,
                ROWS=height, COLUMNS=width, num_warps=4,
            )  # fmt: skip
        grid, shape = dense.fold_grid(block)
        partial = self.sums.new_empty(self.partials, rows, shape["SPLITS"])
        _sum_kernel[grid](
            z_ptr=z, factor_ptr=factor, partial_ptr=partial,
            R=rows, C=columns, z_pitch=z.stride(0), stride_f=factor.stride(0), stride_p=partial.stride(0),
            by=by, inverse_temperature=1.0 / self.temperature, MOMENT=self.moment, ACC=self.acc_tl, **shape,
        )  # fmt: skip
        sums = self.sums[:, block.rows]
        grid, merge = dense.merge_grid(rows, shape["SPLITS"])
        _merge_sums_kernel[grid](
            partial, sums,
            rows, shape["SPLITS"],
            partial.stride(0), sums.stride(0),
            1.0 / self.temperature,
            FRESH=first == 0, MOMENT=self.moment, ACC=self.acc_tl, **merge,
        )  # fmt: skip

    def gradient(self, block: dense.Block, dz: Tensor, gain: Tensor | None, first: bool) -> None:
        """Write gain dz of the block."""
        (z,), (rows, columns), head, k = block.logits, block.shape, self.side.head, self.ids.shape[1]
        sums, dtail, ids = self.sums[:, block.rows], self.dtail[block.rows], self.ids[block.rows]
        grid, shape = dense.grid(block, tiles.SOFTMAX_PROGRAMS)
        _softmax_kernel[grid](
            z_ptr=z, sums_ptr=sums, dtail_ptr=dtail, gain_ptr=gain, dz_ptr=dz,
            R=rows, C=columns,
            z_pitch=z.stride(0), stride_s=sums.stride(0), stride_t=dtail.stride(0), dz_pitch=dz.stride(0),
            softcap=head.softcap or 0.0, scale=head.scale, by=self.side.by, inverse_temperature=1.0 / self.temperature,
            HAS_SOFTCAP=head.softcap is not None, HAS_GAIN=gain is not None, ACC=self.acc_tl, **shape,
        )  # fmt: skip
        if k:
            factor, values = self.factor[block.rows], self.values[block.rows]
            upstream = None if self.upstream is None else self.upstream[block.rows]
            width = min(tiles.next_power_of_2(k), tiles.SLOTS_TILE)
            height = tiles.SLOTS_TILE // width
            _put_kernel[(tiles.cdiv(rows, height) * tiles.cdiv(k, width),)](
                ids, values, upstream, factor, gain, dz,
                rows, k, columns, block.slab.start,
                *ids.stride(), factor.stride(0), dz.stride(0),
                head.softcap or 0.0, head.scale,
                HAS_UPSTREAM=upstream is not None, HAS_SOFTCAP=head.softcap is not None, HAS_GAIN=gain is not None,
                ACC=self.acc_tl, ROWS=height, COLUMNS=width, OTHERS=min(width, 16), num_warps=4,
            )  # fmt: skip

    def bound(self, rows: slice) -> Tensor | float:
        """What no |dL/dz| exceeds."""
        return 1.0 / self.temperature


class _Saved(_Complement):
    """The gradient of a log-sum-exp that is known, and of the values where they have one: no fold."""

    partials, folds = 0, ()

    def __init__(self, grad_tail: Tensor, grad_values: Tensor, tail: Tensor, values: Tensor, *inputs) -> None:
        super().__init__(*inputs)
        self.sums[0], self.sums[1] = tail * self.temperature, 1.0
        self.dtail = grad_tail.to(self.acc).contiguous()
        if grad_values.shape[1]:
            self.values, self.upstream = values.contiguous(), grad_values.to(self.acc).contiguous()

    def bound(self, rows: slice) -> Tensor | float:
        of_tail = self.dtail[rows].abs() / self.temperature
        return of_tail if self.upstream is None else of_tail + self.upstream[rows].abs().sum(1)


class _WithValues(_Complement):
    """A loss with derivatives of its own in the tail and in the values."""

    def __init__(self, *inputs) -> None:
        super().__init__(*inputs)
        self.dtail, self.loss = torch.empty_like(self.sums[:2])
        self.upstream = torch.empty_like(self.values)


class _CrossEntropy(_WithValues):
    def settle(self, rows: slice) -> None:
        sums, values, factor = self.sums[:, rows], self.values[rows], self.factor[rows]
        n = values.shape[0]
        _label_kernel[(tiles.cdiv(n, tiles.SLOTS),)](
            sums, values, factor, self.loss[rows], self.dtail[rows], self.upstream[rows],
            n,
            sums.stride(0), factor.stride(0),
            ACC=self.acc_tl, ROWS=tiles.SLOTS, num_warps=4,
        )  # fmt: skip


class _TopkDivergence(_WithValues):
    def __init__(self, teacher: Tensor, teacher_tail: Tensor | None, spec: Divergence, *inputs) -> None:
        super().__init__(*inputs, spec.temperature)
        self.teacher, self.teacher_tail, self.spec = teacher, teacher_tail, spec
        # fp16 weights are multiplied by a number that only the values of a block's rows tell.
        self.bounded = not (BOUNDS[spec.name].of_loss(spec) and self.side.operand == torch.float16)

    def settle(self, rows: slice) -> None:
        self.loss[rows], self.upstream[rows], self.dtail[rows] = topk_divergence(
            self.values[rows], self.teacher[rows], self.sums[2, rows],
            None if self.teacher_tail is None else self.teacher_tail[rows], self.factor[rows], self.spec,
        )  # fmt: skip

    def bound(self, rows: slice) -> Tensor | float:
        return BOUNDS[self.spec.name].at(self.spec, self.loss[rows] / self.factor[rows])


def linear_cross_entropy(
    hidden: Tensor, head: LMHead, labels: Tensor, factor: Tensor, need: Need
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` f L in ACC, dh, dW, db of its sum; None for what is not needed, which costs nothing).

    Gradients have the dtype of the hidden states; those of fp16 are fp32, because a loss scale comes after them.
    """
    loss = _CrossEntropy(hidden, head, labels[:, None], factor)
    gradients = dense.run(loss, need)
    return loss.loss, *gradients


def complement_and_values(
    hidden: Tensor,
    head: LMHead,
    ids: Tensor,
    temperature: float,
    with_values: bool,
    with_entropy: bool,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(tail `[N]`, values `[N, K]`, d tail / d h `[N, D]` if needed, entropy `[N]` of the others' softmax), in ACC.

    Without values, which then have no columns, d tail / d h has the dtype of gradients.
    """
    ones = torch.ones(len(hidden), dtype=head.acc, device=hidden.device)
    loss = _Complement(hidden, head, ids, ones, temperature, with_entropy)
    # dW is made of the tail later, and must not depend on whether dh is wanted too.
    dtail, entropy = dense.run(loss, Need(need.hidden), as_beside=Need(True))[0], None
    tail = loss.loss.clone()
    if ids.shape[1]:
        tail.masked_fill_((ids >= len(head.weight)).any(1), torch.nan)
    if with_entropy:
        s = loss.sums[1].masked_fill(loss.sums[1] == 0, 1)
        entropy = s.log() - loss.sums[3] / s
    if not with_values:
        return tail, tail.new_empty(len(hidden), 0), dtail, entropy
    return tail, loss.values, None if dtail is None else dtail.to(head.acc), entropy


def complement_and_values_backward(
    hidden: Tensor,
    head: LMHead,
    ids: Tensor,
    temperature: float,
    tail: Tensor,
    values: Tensor,
    dtail: Tensor,
    grad_tail: Tensor,
    grad_values: Tensor,
    need: Need,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db). dh from what the forward pass multiplied; dW and db of logits that are computed again.

    `grad_values` and `values` of no columns: the ids are excluded from the log-sum-exp, and their logits have no gradient.
    """
    dhidden = dweight = dbias = None
    if need.hidden:
        dhidden = dtail * grad_tail[:, None]
        if grad_values.numel() and dhidden.numel():
            dx, row = slot_gradients(grad_values, values, hidden, head, ids)
            dhidden += sum_rows(dx, row, hidden, head.weight, dtail.dtype)
        dhidden = dhidden.to(hidden.dtype)
    if need.weight or need.bias:
        counts = ((grad_tail != 0) | (grad_values != 0).any(1)).to(grad_tail.dtype)
        saved = _Saved(grad_tail, grad_values, tail, values, hidden, head, ids, counts, temperature)
        _, dweight, dbias = dense.run(saved, need._replace(hidden=False))
    return dhidden, dweight, dbias


def topk_loss_with_tail(
    hidden: Tensor,
    head: LMHead,
    ids: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor | None,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` factor * loss, dh, dW, db of its sum) of a loss that reads the student's log-sum-exp beside the ids."""
    loss = _TopkDivergence(teacher, teacher_tail, spec, hidden, head, ids, factor)
    gradients = dense.run(loss, need)
    return loss.loss, *gradients
