"""The log-sum-exp of all logits but those at given ids, together with the logits at the ids; one backward for both.

    z[n,v]  = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)       (no softcap: scale (h W^T + b))
    tail[n] = log sum over v not in ids[n] of exp(z[n,v] / T)          values[n,k] = z[n, ids[n,k]]
    r[n,v]  = exp(z[n,v] / T - tail[n]) off the ids, 0 at them
    dx[n,v] = (dtail[n] r[n,v] / T + sum over k with ids[n,k] = v of dvalues[n,k]) scale (1 - (z / softcap)^2)
    dh = dx W        dW = dx^T h        db = sum_n dx[n]

Legend: N tokens, K ids of a token, D hidden size, V vocabulary, T temperature, C columns of a slab, ACC fp32 (fp64
for fp64 inputs). Inputs have any strides. An id < 0 is an absent slot: value -inf, nothing excluded. An id met twice
is excluded once. An id >= V makes its value and its token's tail NaN. A token whose dtail and dvalues are 0 leaves no
trace in any gradient, whatever its hidden state is.

Forward. One kernel multiplies and sums: a program holds a block of tokens and walks a split of the vocabulary, logits
stay in registers, of each split a (maximum, sum) is left, and a merge adds them up. The ids come sorted, so every
token has one next id; as long as one of a tile's tokens has its next id in the tile, that logit becomes -inf and the
token steps on. The values are gathered (`linear_gather`), K D multiplications a token.

Backward. Logits come again from the library's product, a slab of the vocabulary for a block of tokens in ACC; one
kernel makes the dense weights dtail r / T slope of them, in the operands' dtype, and a second one puts 0 at the ids.
What stands at the ids is sparse and goes through the gather's kernels in ACC. So dW and dh are sums in ACC of a dense
part that has nothing at the ids and of exact corrections, rounded once: a rounded q never meets the p it should cancel.
fp16 weights are multiplied by a power of two first and the products divided by it: r / N would underflow.

Bytes and FLOP (calculated, at N 8192, D 4096, V 128256, K 64, bf16; no GPU measurement yet), G = 2 N D V = 8.6 TFLOP:

| step           | work                  | reads and writes                         | bound by                    |
|----------------|-----------------------|------------------------------------------|-----------------------------|
| forward        | 1 G                   | W once per 2048 tokens, from memory      | product: 10.9 ms at library speed |
| dense weights  | 1 G (logits again)    | (4 + 4 + 2) N V = 10.5 GB                | product + 2.5 ms            |
| dh             | 1 G                   | 12 N D a slab                            | product                     |
| dW             | 1 G; none if frozen   | 12 C D a block of tokens, 4 N D a slab   | product                     |

Workspace of the backward pass: the slab of logits and weights, dh and a slab of dW in ACC and a product each, under
`workspace_bytes()`; where dh in ACC would leave only small products, dh and dW are made one after the other: 4 G.
The sorted pairs of the sparse dW and their chunks' sums (`linear_gather`) are counted as at most half of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import grad_dtype
from ..head import LMHead, Need
from ..options import Divergence
from ..workspace import workspace_bytes
from . import gather, tiles
from .primitives import (
    INTERPRETED,
    accumulator,
    current_device,
    finish,
    number,
    origin,
    product,
    require_device,
    require_grid,
    require_sizes,
)
from .topk_divergence import topk_divergence

# --- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def _logsumexp_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, max_ptr, sum_ptr,
    N, V, D, K, SPLITS, SPLIT_COLUMNS,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_bv,
    softcap: tl.float64, scale: tl.float64, inverse_temperature: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_IDS: tl.constexpr,
    ACC: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, VOCABULARY: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, one split of the vocabulary: the largest z / T off the ids and the sum of exponentials."""
    # GROUP blocks of tokens run side by side on one split after the other: both operands stay in L2.
    group = tl.program_id(0) // (GROUP * SPLITS)
    token_block = group * GROUP + tl.program_id(0) % GROUP
    split = (tl.program_id(0) // GROUP) % SPLITS
    n = token_block * TOKENS + tl.arange(0, TOKENS)
    begin = split * SPLIT_COLUMNS
    end = tl.minimum(begin + SPLIT_COLUMNS, V)
    n = n.to(tl.int64)
    known = n < N
    place = tl.full([TOKENS], 0, tl.int32)
    following = tl.full([TOKENS], 0x7FFFFFFF, tl.int32)
    if HAS_IDS:
        # Sorted ids: those of earlier splits, and the absent ones, stand first.
        for start in range(0, K, 16):
            k = start + tl.arange(0, 16)
            mask = known[:, None] & (k < K)[None, :]
            ids = tl.load(ids_ptr + n[:, None] * K + k[None, :], mask=mask, other=0x7FFFFFFF)
            place += tl.sum((ids < begin).to(tl.int32), 1)
        following = tl.load(ids_ptr + n * K + place, mask=known & (place < K), other=0x7FFFFFFF)
    m = tl.full([TOKENS], float("-inf"), ACC)
    s = tl.full([TOKENS], 0.0, ACC)
    h_row = hidden_ptr + n[:, None] * stride_hn
    for first in range(begin, end, VOCABULARY):
        v = first + tl.arange(0, VOCABULARY)
        w_row = weight_ptr + v.to(tl.int64)[None, :] * stride_wv
        dots = tl.full([TOKENS, VOCABULARY], 0.0, ACC)
        for start in range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH)
            # Masks cost registers, which this tile has none to spare of.
            whole = tl.full([DEPTH], 1, tl.int1) if EVEN else d < D
            d = d.to(tl.int64)
            h = tl.load(h_row + d[None, :] * stride_hd, mask=known[:, None] & whole[None, :], other=0.0)
            w = tl.load(w_row + d[:, None] * stride_wd, mask=(v < end)[None, :] & whole[:, None], other=0.0)
            if NATIVE:
                dots = tl.dot(h, w, dots, input_precision="ieee")
            else:
                dots += tl.dot(h.to(ACC), w.to(ACC), input_precision="ieee", out_dtype=ACC)
        counted = (v < end)[None, :]
        z = finish(dots, v[None, :], bias_ptr, stride_bv, counted, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        x = tl.where(counted, z, float("-inf")) * number(inverse_temperature, ACC)
        if HAS_IDS:
            stop = tl.minimum(first + VOCABULARY, end)
            while tl.min(following, 0) < stop:
                x = tl.where(v[None, :] == following[:, None], float("-inf"), x)
                place += (following < stop).to(tl.int32)
                following = tl.load(ids_ptr + n * K + place, mask=known & (place < K), other=0x7FFFFFFF)
        top = tl.maximum(m, tl.max(x, 1))
        zero = origin(top)
        s = s * tl.exp(m - zero) + tl.sum(tl.exp(x - zero[:, None]), 1)
        m = top
    tl.store(max_ptr + n * SPLITS + split, m, mask=known)
    tl.store(sum_ptr + n * SPLITS + split, s, mask=known)


@triton.jit
def _merge_kernel(
    max_ptr, sum_ptr, tail_ptr,
    N, SPLITS,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: the log of the sum over all splits."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, COLUMNS)
    keep = (n < N)[:, None] & (split < SPLITS)[None, :]
    m = tl.load(max_ptr + n[:, None] * SPLITS + split[None, :], mask=keep, other=float("-inf"))
    s = tl.load(sum_ptr + n[:, None] * SPLITS + split[None, :], mask=keep, other=0.0)
    zero = origin(tl.max(m, 1))
    total = tl.sum(tl.where(keep, s * tl.exp(m - zero[:, None]), 0.0), 1)
    tl.store(tail_ptr + n, zero + tl.log(total), mask=n < N)


# --- backward --------------------------------------------------------------------------------------------------


@triton.jit
def _dense_kernel(
    product_ptr, bias_ptr, tail_ptr, grad_ptr, gain_ptr, dense_ptr,
    N, C, first,
    stride_bv, stride_t, stride_g,
    softcap: tl.float64, scale: tl.float64, inverse_temperature: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, COLUMNS of a slab of products: gain dtail r / T slope, as if no id were excluded."""
    blocks = tl.cdiv(C, COLUMNS)
    n = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    grad = tl.load(grad_ptr + n * stride_g, mask=n < N, other=0.0).to(ACC)
    tail = origin(tl.load(tail_ptr + n * stride_t, mask=n < N, other=0.0).to(ACC))
    keep = (n < N)[:, None] & (c < C)[None, :]
    x = tl.load(product_ptr + n[:, None] * C + c[None, :], mask=keep, other=0.0).to(ACC)
    z = finish(
        x, (first + c)[None, :], bias_ptr, stride_bv, (c < C)[None, :], softcap, scale, HAS_BIAS, HAS_SOFTCAP
    )
    inverse = number(inverse_temperature, ACC)
    dense = (
        tl.exp(z * inverse - tail[:, None])
        * (grad * inverse * number(scale, ACC) * tl.load(gain_ptr))[:, None]
    )
    if HAS_SOFTCAP:
        cap = number(softcap, ACC)
        dense = dense * ((cap - z) / cap) * ((cap + z) / cap)
    dense = tl.where((grad != 0.0)[:, None], dense, 0.0)
    tl.store(dense_ptr + n[:, None] * C + c[None, :], dense.to(dense_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _zero_kernel(
    indices_ptr, dense_ptr,
    E, K, C, first,
    stride_in, stride_ik,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK (token, slot) pairs: 0 into the dense weights at the ids that lie in the slab."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = e // K
    column = (
        tl.load(indices_ptr + n * stride_in + (e % K) * stride_ik, mask=e < E, other=-1).to(tl.int64) - first
    )
    zero = tl.full([BLOCK], 0.0, dense_ptr.dtype.element_ty)
    tl.store(dense_ptr + n * C + column, zero, mask=(e < E) & (column >= 0) & (column < C))


# --- launchers -------------------------------------------------------------------------------------------------


def complement_and_values(
    hidden_nd: Tensor,
    head: LMHead,
    indices_nk: Tensor,
    temperature: float,
    *,
    tile: tiles.LogsumexpTile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(tail `[N]`, values `[N, K]`), in ACC. `tile` and `splits` replace the table's, for tests and measurements."""
    weight_vd, bias_v, softcap, scale = head.weight, head.bias, head.softcap, head.scale
    require_device(hidden=hidden_nd, weight=weight_vd, bias=bias_v, indices=indices_nk)
    (n, d), v, k, device = hidden_nd.shape, weight_vd.shape[0], indices_nk.shape[1], hidden_nd.device
    require_sizes("linear_logsumexp", hidden=max(n, d), weight=v, exclude=k)
    values = gather.linear_gather(hidden_nd, head, indices_nk)
    torch_acc, acc = accumulator(hidden_nd, weight_vd)
    tail = torch.empty(n, dtype=torch_acc, device=device)
    if n == 0:
        return tail, values
    arch, itemsize = tiles.architecture(device), weight_vd.element_size()
    tile = tile or tiles.logsumexp_tile(arch, itemsize, n, softcap is not None)
    token_blocks = triton.cdiv(n, tile.tokens)
    splits = splits or triton.cdiv(tiles.measured_number("LOGSUMEXP_PROGRAMS", arch), token_blocks)
    columns, splits = split_columns(v, tile.vocabulary, splits)
    group = min(tiles.measured_number("LOGSUMEXP_GROUP", arch), token_blocks)
    grid = triton.cdiv(token_blocks, group) * group * splits
    # The last value of an id is V: one step past the vocabulary, in 32 bits.
    ids = indices_nk.clamp(-1, v).to(torch.int32).sort(1).values.contiguous() if k else None
    partial = torch.empty(2, n, splits, dtype=torch_acc, device=device)
    with current_device(hidden_nd):
        _logsumexp_kernel[(require_grid(grid, "linear_logsumexp"),)](
            hidden_nd, weight_vd, bias_v, ids, partial[0], partial[1],
            n, v, d, k, splits, columns,
            *hidden_nd.stride(), *weight_vd.stride(), 0 if bias_v is None else bias_v.stride(0),
            softcap or 0.0, scale, 1.0 / temperature,
            HAS_BIAS=bias_v is not None, HAS_SOFTCAP=softcap is not None, HAS_IDS=k > 0,
            ACC=acc, NATIVE=not INTERPRETED and acc == tl.float32 and hidden_nd.dtype == weight_vd.dtype, GROUP=group,
            EVEN=d % tile.depth == 0, TOKENS=tile.tokens, VOCABULARY=tile.vocabulary, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        padded = triton.next_power_of_2(splits)
        rows = max(1, tiles.LOGSUMEXP_MERGE // padded)
        _merge_kernel[(triton.cdiv(n, rows),)](
            partial[0], partial[1], tail,
            n, splits,
            ACC=acc, ROWS=rows, COLUMNS=padded, num_warps=4,
        )  # fmt: skip
    if k:
        tail.masked_fill_((indices_nk >= v).any(1), torch.nan)
    return tail, values


def split_columns(v: int, vocabulary: int, splits: int) -> tuple[int, int]:
    """(columns of a split in whole tiles, splits): at most so many, none of them empty."""
    wanted = min(splits, tiles.LOGSUMEXP_MERGE)
    columns = triton.cdiv(triton.cdiv(v, wanted), vocabulary) * vocabulary
    return columns, triton.cdiv(v, columns)


def complement_and_values_backward(
    grad_tail: Tensor,
    grad_values: Tensor,
    tail: Tensor,
    values: Tensor,
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    temperature: float,
    need: Need,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) in the dtypes of hidden, weight and bias; None for what is not needed, which costs nothing."""
    weight, bias, softcap, scale = head.weight, head.bias, head.softcap, head.scale
    need_hidden, need_weight, need_bias = need
    require_device(
        grad_tail=grad_tail, grad_values=grad_values, tail=tail, values=values,
        hidden=hidden, weight=weight, bias=bias, indices=indices,
    )  # fmt: skip
    need_bias = need_bias and bias is not None
    (n, d), (v, k) = hidden.shape, (weight.shape[0], indices.shape[1])
    gather.require_pairs(n, k, d)
    acc, _ = accumulator(hidden, weight)
    if n == 0 or d == 0:
        # Without a hidden dimension only the bias has a gradient, and it needs no product: it is the general way's.
        need_hidden, dhidden = False, torch.zeros_like(hidden) if need_hidden else None
        need_weight, dweight = False, torch.zeros_like(weight) if need_weight else None
        if n == 0:
            return dhidden, dweight, torch.zeros_like(bias) if need_bias else None
    else:
        dhidden = torch.empty(n, d, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
        dweight = torch.empty(v, d, dtype=weight.dtype, device=weight.device) if need_weight else None
    dbias = torch.empty(v, dtype=bias.dtype, device=bias.device) if need_bias else None
    with current_device(hidden):
        whole = _Backward(
            grad_tail, grad_values, tail, values, hidden, weight, bias, indices, softcap, scale, temperature
        )
        one_pass = whole.slab(hidden=True, weight=need_weight)[1] and (need_weight or need_bias)
        both = need_hidden and one_pass
        if need_weight or need_bias:
            whole.run(dhidden if both else None, dweight, dbias)
        if need_hidden and not both:
            tokens = tokens_at_a_time(n, d, acc.itemsize)
            for start in range(0, n, tokens):
                rows = slice(start, start + tokens)
                whole.rows(rows).run(dhidden[rows], None, None)
    return dhidden, dweight, dbias


class Slab(NamedTuple):
    """Tokens and columns of the logits that are there at a time."""

    tokens: int
    columns: int


def tokens_at_a_time(n: int, d: int, itemsize: int) -> int:
    """Tokens whose dh and one product of its shape take at most a quarter of the workspace."""
    return max(1, min(n, tiles.DENSE_TOKENS, workspace_bytes() // (8 * max(d, 1) * itemsize)))


def sparse_bytes(pairs: int, d: int, itemsize: int) -> int:
    """What the sorted pairs and the sums of their chunks take, whatever the slab."""
    return 48 * pairs + pairs // gather.dweight_chunk(pairs, d, itemsize) * d * itemsize


def slab_of(
    n: int, v: int, d: int, k: int, itemsize: int, operand: int, *, hidden: bool, weight: bool
) -> tuple[Slab, bool]:
    """(slab, whether its products are large): logits, weights, dh, dW's slab and a product of each in the workspace.

    `itemsize` is that of ACC, `operand` that of the weights. The pairs of the sparse gradient leave at least half.
    """
    workspace = workspace_bytes()
    budget = max(workspace - (sparse_bytes(n * k, d, itemsize) if weight else 0), workspace // 2)
    budget -= n * d * itemsize if hidden else 0
    tokens, wide = min(n, tiles.DENSE_TOKENS), min(v, tiles.DENSE_MIN_COLUMNS)
    while True:
        # Hidden states that enter dW are copied, so that a masked token's may be anything.
        left = budget - tokens * d * ((itemsize if hidden else 0) + (operand if weight else 0))
        columns = left // (tokens * (itemsize + operand) + (2 * d * itemsize if weight else 0))
        if columns >= wide or tokens <= 64:
            break
        tokens = triton.cdiv(tokens, 2)
    large = columns >= wide and tokens >= min(n, tiles.DENSE_TOKENS // 2)
    # Slabs of one size, whose rows begin on 64 bytes where that is possible.
    columns = max(min(columns // 16 * 16, v), min(v, 128))
    columns = min(v, triton.cdiv(triton.cdiv(v, triton.cdiv(v, columns)), 16) * 16)
    return Slab(tokens, columns), large


class _Backward:
    """The upstream gradients of some tokens, and what makes dh, dW and db of them."""

    def __init__(
        self, grad_tail, grad_values, tail, values, hidden, weight, bias, indices, softcap, scale, temperature
    ) -> None:
        self.rowwise = grad_tail, grad_values, tail, values, hidden, indices
        self.head = weight, bias, softcap, scale, temperature

    def rows(self, rows: slice) -> "_Backward":
        grad_tail, grad_values, tail, values, hidden, indices = (x[rows] for x in self.rowwise)
        weight, bias, *numbers = self.head
        return _Backward(grad_tail, grad_values, tail, values, hidden, weight, bias, indices, *numbers)

    @property
    def operand(self) -> torch.dtype:
        """The dtype of the dense weights: that of both they are multiplied with, or ACC."""
        hidden, weight = self.rowwise[4], self.head[0]
        return hidden.dtype if hidden.dtype == weight.dtype else accumulator(hidden, weight)[0]

    def slab(self, *, hidden: bool, weight: bool) -> tuple[Slab, bool]:
        (n, d), (v, _), k = self.rowwise[4].shape, self.head[0].shape, self.rowwise[5].shape[1]
        acc, _ = accumulator(self.rowwise[4], self.head[0])
        return slab_of(n, v, d, k, acc.itemsize, self.operand.itemsize, hidden=hidden, weight=weight)

    def run(self, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
        """Write those that are there."""
        grad_tail, grad_values, _, values, hidden, indices = self.rowwise
        weight, _, softcap, scale, _ = self.head
        (n, d), (v, k) = hidden.shape, (weight.shape[0], indices.shape[1])
        acc, _ = accumulator(hidden, weight)
        operand = self.operand
        (tokens, columns), _ = self.slab(hidden=dhidden is not None, weight=dweight is not None)
        gain = self._gain(operand, acc)
        shrink = gain.reciprocal()
        dh = db = pairs = None
        if k:
            dx, row = gather.slot_gradients(grad_values, values, hidden, weight, indices, softcap, scale)
            if dhidden is not None:
                dh = gather.sum_rows(dx, row, dx.new_empty(1, 1).expand(n, d), weight)
            if dweight is not None or dbias is not None:
                pairs = _Pairs(dx, row, v, hidden)
        if dhidden is not None and dh is None:
            dh = torch.zeros(n, d, dtype=acc, device=hidden.device)
        if dbias is not None:
            db = torch.zeros(v, dtype=acc, device=hidden.device) if pairs is None else pairs.bias()
        logits = torch.empty(tokens * columns, dtype=acc, device=hidden.device)
        dense = torch.empty(tokens * columns, dtype=operand, device=hidden.device)
        for first in range(0, v, columns):
            slab = slice(first, min(first + columns, v))
            c = slab.stop - slab.start
            dw = None
            if dweight is not None:
                dw = dweight.new_zeros(c, d, dtype=acc) if pairs is None else pairs.weight(slab)
            for start in range(0, n, tokens):
                rows = slice(start, min(start + tokens, n))
                count = (rows.stop - rows.start) * c
                weights = dense[:count].view(-1, c)
                self.rows(rows).dense(slab, logits[:count].view(-1, c), weights, gain)
                if dh is not None:
                    dh[rows].addcmul_(product(weights, weight[slab]), shrink)
                if dw is not None:
                    counted = hidden[rows].masked_fill((grad_tail[rows] == 0)[:, None], 0)
                    dw.addcmul_(product(weights.T, counted), shrink)
                if db is not None:
                    db[slab].addcmul_(weights.sum(0, dtype=acc), shrink)
            if dw is not None:
                dweight[slab] = dw
        if dh is not None:
            dhidden.copy_(dh)
        if db is not None:
            dbias.copy_(db)

    def _gain(self, operand: torch.dtype, acc: torch.dtype) -> Tensor:
        """The power of two that puts the largest possible weight near 2^14 where fp16 is to hold it; else 1."""
        grad_tail, (*_, scale, temperature) = self.rowwise[0].to(acc), self.head
        one = torch.ones((), dtype=acc, device=grad_tail.device)
        if operand != torch.float16:
            return one
        size = grad_tail.abs() * abs(scale / temperature)
        peak = torch.where(size.isfinite(), size, 0).amax()
        return torch.where(peak > 0, torch.exp2(torch.floor(14 - torch.log2(peak)).clamp(-100, 100)), one)

    def dense(self, slab: slice, logits: Tensor, weights: Tensor, gain: Tensor) -> None:
        """Write the dense weights of one slab, over logits of which only the memory is used."""
        grad_tail, _, tail, _, hidden, indices = self.rowwise
        weight, bias, softcap, scale, temperature = self.head
        (n, c), k = weights.shape, indices.shape[1]
        product(hidden, weight[slab].T, out=logits)
        grid = triton.cdiv(n, tiles.DENSE_ROWS) * triton.cdiv(c, tiles.DENSE_COLUMNS)
        _dense_kernel[(require_grid(grid, "linear_logsumexp"),)](
            logits, bias, tail, grad_tail, gain, weights,
            n, c, slab.start,
            0 if bias is None else bias.stride(0), tail.stride(0), grad_tail.stride(0),
            softcap or 0.0, scale, 1.0 / temperature,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, ACC=accumulator(logits)[1],
            ROWS=tiles.DENSE_ROWS, COLUMNS=tiles.DENSE_COLUMNS, num_warps=4,
        )  # fmt: skip
        if k:
            _zero_kernel[(triton.cdiv(n * k, tiles.SLOTS_BLOCK),)](
                indices, weights,
                n * k, k, c, slab.start,
                *indices.stride(),
                BLOCK=tiles.SLOTS_BLOCK, num_warps=4,
            )  # fmt: skip


class _Pairs(gather.SortedPairs):
    """The sparse gradient in ACC, a slab of the vocabulary at a time: the sums of whole chunks are made once."""

    def __init__(self, dx: Tensor, row: Tensor, v: int, hidden: Tensor) -> None:
        super().__init__(dx, row, v)
        self.hidden = hidden
        self.chunk = gather.dweight_chunk(self.row.numel(), hidden.shape[1], dx.element_size())
        self.partial: Tensor | None = None

    def bias(self) -> Tensor:
        ones = self.dx.new_ones(1, 1).expand(self.hidden.shape[0], 1)
        return self.sum(ones, self.dx.dtype)[:, 0]

    def weight(self, slab: slice) -> Tensor:
        """`[C, D]` rows of the slab."""
        if self.partial is None:
            self.partial = self.chunk_sums(self.hidden, self.chunk)
        out = self.dx.new_empty(slab.stop - slab.start, self.hidden.shape[1])
        self.write(out, slab.start, self.hidden, self.partial, self.chunk)
        return out


# --- what the public functions ask for -----------------------------------------------------------------------------


def linear_logsumexp(
    hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, need: Need
) -> tuple[Tensor, Tensor | None]:
    """(`[N]` log-sum-exp of z / T over the ids not in `exclude`, its gradient `[N, D]` in h if that is needed)."""
    tail, values = complement_and_values(hidden, head, exclude, temperature)
    if not need.hidden:
        return tail, None
    grad = torch.ones_like(tail), torch.zeros_like(values)
    found = complement_and_values_backward(
        *grad, tail, values, hidden, head, exclude, temperature, Need(True)
    )
    return tail, found[0].to(grad_dtype(hidden.dtype))


def linear_logsumexp_backward(
    grad: Tensor, tail: Tensor, hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, need: Need
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, db); dh is the forward pass's."""
    zero = torch.zeros(exclude.shape, dtype=tail.dtype, device=tail.device)
    found = complement_and_values_backward(
        grad, zero, tail, zero, hidden, head, exclude, temperature, need._replace(hidden=False)
    )
    return found[1], found[2]


def topk_loss_with_tail(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor | None,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` factor * loss, dh, dW, db of its sum) of a loss that reads the student's log-sum-exp beside the ids."""
    tail, values = complement_and_values(hidden, head, indices, spec.temperature)
    loss, dvalues, dtail = topk_divergence(values, teacher, tail, teacher_tail, factor, spec)
    found = complement_and_values_backward(
        dtail, dvalues, tail, values, hidden, head, indices, spec.temperature, need
    )
    return loss, *(None if x is None else x.to(grad_dtype(hidden.dtype)) for x in found)
