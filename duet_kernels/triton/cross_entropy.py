"""Cross-entropy of labels from hidden states, and its gradient with the loss.

    z[n,v]  = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)       (no softcap: scale (h W^T + b))
    tail[n] = log sum over v != y[n] of exp(z[n,v])
    L[n]    = logsumexp_v z[n,v] - z[n,y] = log(1 + exp(tail[n] - z[n,y]))
    dL/dz   = q[v] = e_v / (S + e_y) off the label,  -S / (S + e_y) at it,  e_v = exp(z_v - m),  S = sum over v != y of e_v
    dz = f dL/dz scale (1 - (z / softcap)^2)        dh = dz W        dW = dz^T h        db = sum_n dz[n]

Legend: N tokens, D hidden size, V vocabulary, y the label, f the row's factor, ACC fp32 (fp64 for fp64 inputs). Results
are f L and the gradients of its sum. Nats. A row with f = 0 gives exactly 0 and leaves no trace, whatever its hidden
states and its label are. A label that is no id of the vocabulary makes its row NaN, and so does a NaN in the row.

The label is left out of the sum: a token that is almost certain has a loss of exp(tail - z_y) and a gradient of
-S / (S + e_y), both with all their digits, where log-sum-exp minus z_y and q - 1 keep those of 1.

Two passes over the logits of a block (`dense` says which blocks and slabs). Bytes and FLOP (calculated, N 8192, D 4096,
V 128256, bf16; no GPU measurement yet), G = 2 N D V = 8.6 TFLOP = 10.9 ms:

| step        | work               | reads and writes of the kernels here   | bound by |
|-------------|--------------------|----------------------------------------|----------|
| logits      | 1 G                | the product's: 4 N V                   | product  |
| sums        | 12 FLOP a logit    | 4 N V = 4.2 GB                         | 1.0 ms   |
| dz          | 8 FLOP a logit     | (4 + 2) N V = 6.3 GB                   | 1.5 ms   |
| dh, dW      | 1 G each           | the product's: 4 N V, W, dW            | product  |
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..head import LMHead, Need
from . import dense, tiles
from .primitives import accumulator, current_device, finish, load_rows, number, origin, require_device

# --- sums of a row -----------------------------------------------------------------------------------------------


@triton.jit
def _tail_kernel(
    z_ptr, bias_ptr, labels_ptr, factor_ptr, partial_ptr,
    R, C, first, SPLITS, SPLIT_COLUMNS,
    z_pitch, stride_bv, stride_y, stride_f, stride_p,
    softcap: tl.float64, scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, one split of a slab `[3, R, SPLITS]`: largest logit but the label's, the others' sum, the label's."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0) != 0
    label = tl.load(labels_ptr + n * stride_y, mask=n < R, other=-1).to(tl.int64) - first
    m = tl.full([ROWS], float("-inf"), ACC)
    s = tl.full([ROWS], 0.0, ACC)
    target = tl.full([ROWS], 0.0, ACC)
    begin = split * SPLIT_COLUMNS
    for start in range(begin, tl.minimum(begin + SPLIT_COLUMNS, C), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = (c < C)[None, :]
        z = load_rows(z_ptr, n, c, z_pitch, 1, live[:, None] & (c < z_pitch)[None, :], ACC)
        z = finish(
            z, (first + c)[None, :], bias_ptr, stride_bv, inside, softcap, scale, HAS_BIAS, HAS_SOFTCAP
        )
        z = tl.where(live[:, None] & inside, z, float("-inf"))
        at_label = c[None, :] == label[:, None]
        target += tl.sum(tl.where(at_label & inside, z, 0.0), 1)
        z = tl.where(at_label, float("-inf"), z)
        top = tl.maximum(m, tl.max(z, 1))
        zero = origin(top)
        s = s * tl.exp(m - zero) + tl.sum(tl.exp(z - zero[:, None]), 1)
        m = top
    place = partial_ptr + n * SPLITS + split
    tl.store(place, m, mask=n < R)
    tl.store(place + stride_p, s, mask=n < R)
    tl.store(place + 2 * stride_p, target, mask=n < R)


@triton.jit
def _merge_tail_kernel(
    partial_ptr, sums_ptr,
    R, SPLITS,
    stride_p, stride_s,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the splits of a slab taken into the sums of the slabs before it."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, COLUMNS)
    known = n < R
    keep = known[:, None] & (split < SPLITS)[None, :]
    place = partial_ptr + n[:, None] * SPLITS + split[None, :]
    running = sums_ptr + n
    m = tl.load(running, mask=known, other=float("-inf"))
    s = tl.load(running + stride_s, mask=known, other=0.0)
    target = tl.load(running + 2 * stride_s, mask=known, other=0.0)
    maxima = tl.load(place, mask=keep, other=float("-inf"))
    sums = tl.load(place + stride_p, mask=keep, other=0.0)
    targets = tl.load(place + 2 * stride_p, mask=keep, other=0.0)
    top = tl.maximum(m, tl.max(maxima, 1))
    zero = origin(top)
    s = s * tl.exp(m - zero) + tl.sum(tl.where(keep, sums * tl.exp(maxima - zero[:, None]), 0.0), 1)
    tl.store(running, top, mask=known)
    tl.store(running + stride_s, s, mask=known)
    tl.store(running + 2 * stride_s, target + tl.sum(targets, 1), mask=known)


# --- gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_gradient_kernel(
    z_ptr, bias_ptr, labels_ptr, factor_ptr, sums_ptr, gain_ptr, dz_ptr,
    R, C, first, SPLITS, SPLIT_COLUMNS,
    z_pitch, stride_bv, stride_y, stride_f, stride_s, dz_pitch,
    softcap: tl.float64, scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_GAIN: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, one split of a slab: gain dz `[R, C]`."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0).to(ACC)
    live = factor != 0
    label = tl.load(labels_ptr + n * stride_y, mask=n < R, other=-1).to(tl.int64) - first
    m = tl.load(sums_ptr + n, mask=live, other=0.0)
    s = tl.load(sums_ptr + stride_s + n, mask=live, other=1.0)
    target = tl.load(sums_ptr + 2 * stride_s + n, mask=live, other=0.0)
    # Relative to the larger of both no exponential overflows.
    zero = origin(tl.maximum(m, target))
    # A label that is alone stands above nothing: exp may overflow there, and 0 inf is NaN.
    rest = tl.where(s == 0, 0.0, s * tl.exp(origin(m) - zero))
    total = rest + tl.exp(target - zero)
    upstream = factor * number(scale, ACC)
    if HAS_GAIN:
        upstream = upstream * tl.load(gain_ptr)
    cap = number(softcap, ACC)
    begin = split * SPLIT_COLUMNS
    for start in range(begin, tl.minimum(begin + SPLIT_COLUMNS, C), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = (c < C)[None, :]
        z = load_rows(z_ptr, n, c, z_pitch, 1, live[:, None] & (c < z_pitch)[None, :], ACC)
        z = finish(
            z, (first + c)[None, :], bias_ptr, stride_bv, inside, softcap, scale, HAS_BIAS, HAS_SOFTCAP
        )
        at_label = c[None, :] == label[:, None]
        dz = tl.where(at_label, -rest[:, None], tl.exp(z - zero[:, None])) * (upstream / total)[:, None]
        if HAS_SOFTCAP:
            dz = dz * ((cap - z) / cap) * ((cap + z) / cap)
        dz = tl.where(live[:, None] & inside, dz, 0.0)
        place = dz_ptr + n[:, None] * dz_pitch + c[None, :]
        tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=(n < R)[:, None] & (c < dz_pitch)[None, :])


# --- launchers -------------------------------------------------------------------------------------------------


class _CrossEntropy:
    """What `dense` asks of a loss: its passes over the logits of a block."""

    bounded = True  # no |dL/dz| is above 1

    def __init__(self, side: dense.Side, labels: Tensor, factor: Tensor) -> None:
        self.acc, self.acc_tl = accumulator(side.hidden)
        self.side, self.labels, self.factor = side, labels, factor
        self.sums = factor.new_zeros(3, factor.shape[0], dtype=self.acc)
        self.sums[0] = -torch.inf
        # What nobody finds in the vocabulary stays NaN.
        self.sums[2].masked_fill_((labels < 0) | (labels >= side.weight.shape[0]), torch.nan)

    @property
    def folds(self) -> tuple[Callable[[dense.Block], None], ...]:
        """The pass before the gradient's."""
        return (self._fold,)

    def _fold(self, block: dense.Block) -> None:
        grid, shape = dense.grid(block)
        rows, splits = block.shape[0], shape["SPLITS"]
        partial = self.sums.new_empty(3, rows, splits)
        _tail_kernel[grid](
            **self._inputs(block), **shape, partial_ptr=partial, stride_p=partial.stride(0)
        )  # fmt: skip
        columns = triton.next_power_of_2(splits)
        height = max(1, tiles.DENSE_MERGE // columns)
        sums = self.sums[:, block.rows]
        _merge_tail_kernel[(triton.cdiv(rows, height),)](
            partial, sums,
            rows, splits,
            partial.stride(0), sums.stride(0),
            ACC=self.acc_tl, ROWS=height, COLUMNS=columns, num_warps=4,
        )  # fmt: skip

    def gradient(self, block: dense.Block, dz: Tensor, gain: Tensor | None, first: bool) -> None:
        """Write gain dz of the block."""
        grid, shape = dense.grid(block)
        sums = self.sums[:, block.rows]
        _softmax_gradient_kernel[grid](
            **self._inputs(block), **shape,
            sums_ptr=sums, gain_ptr=gain, dz_ptr=dz, stride_s=sums.stride(0), dz_pitch=dz.stride(0),
            HAS_GAIN=gain is not None,
        )  # fmt: skip

    def _inputs(self, block: dense.Block) -> dict[str, object]:
        (z,), (rows, columns), side = block.logits, block.shape, self.side
        labels, factor = self.labels[block.rows], self.factor[block.rows]
        return {
            "z_ptr": z, "bias_ptr": side.head.bias, "labels_ptr": labels, "factor_ptr": factor,
            "R": rows, "C": columns, "first": block.slab.start,
            "z_pitch": z.stride(0), "stride_bv": side.bias_stride,
            "stride_y": labels.stride(0), "stride_f": factor.stride(0),
            "softcap": side.head.softcap or 0.0, "scale": side.head.scale,
            "HAS_BIAS": side.head.bias is not None, "HAS_SOFTCAP": side.head.softcap is not None, "ACC": self.acc_tl,
        }  # fmt: skip

    def values(self) -> Tensor:
        """`[N]` the losses, without their factors."""
        m, s, target = self.sums
        return F.softplus((m - target) + s.log(), threshold=40.0)

    def bound(self, rows: slice) -> float:
        """What no |dL/dz| exceeds."""
        return 1.0


def linear_cross_entropy(
    hidden: Tensor, head: LMHead, labels: Tensor, factor: Tensor, need: Need
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` f L in ACC, dh, dW, db of its sum; None for what is not needed, which costs nothing).

    Gradients have the dtype of the hidden states; those of fp16 are fp32, because a loss scale comes after them.
    """
    require_device(hidden=hidden, weight=head.weight, bias=head.bias, labels=labels, factor=factor)
    side = dense.Side(hidden, head)
    with current_device(hidden):
        loss = _CrossEntropy(side, labels, factor)
        gradients = dense.run((side,), factor, loss, need)
        values = torch.where(factor == 0, 0.0, factor * loss.values()).to(loss.acc)
    return values, *gradients
