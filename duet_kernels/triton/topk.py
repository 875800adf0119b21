"""The k largest logits of every token, their ids and the log-sum-exp of all others, without stored `[N, V]` logits.

    z[n,v] = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)        (no softcap: scale (h W^T + b))
    S[n]   = the first k ids in the order (z descending, id ascending); a NaN stands above every number
    tail[n] = log sum over v not in S[n] of exp(z[n,v] / T)

Legend: N tokens, D hidden size, V vocabulary, T temperature, C columns of a slab of the vocabulary, B columns of a
block, J = C / B blocks of a slab, ACC fp32 (fp64 for fp64 inputs). Inputs have any strides.

Pipeline, for every slab of a block of tokens; numbers are compared as integers of the same order (`ordered`):

    product    z slab [N, C] in ACC        the library's product; up to 64 tokens a kernel that reads W once and folds
    fold       block: largest z, sum of exp                           reads the slab once
    choose     the k first blocks by (maximum descending, position ascending), in the order of their ids;
               the other blocks' sums go into the tail
    survivors  elements of the chosen blocks not below the k-th block maximum are kept, in the order of their ids,
               behind the k best of the slabs before; the others go into the tail
    narrow     the k best of those; the others go into the tail
    order      once at the end: the k best by rank, and log of the tail's sum

Why it is exact. Each of the k chosen blocks holds an element that stands before every element of a block that was not
chosen, so nothing selected is lost; by the same count the k-th block maximum is a lower bound of the k-th largest
element. Where k best are known already, a block must hold something larger than the k-th of them: equal elements of
later slabs have higher ids. Every list is in the order of ids among equals, so a tie is decided by counting. An
element enters the tail where it is passed over, so the tail is a sum of what is left, never a difference.

The k-th largest of a list is found two bits at a time: 16 rounds of counts (32 for fp64), no sort, no atomics, no
key that packs an id. Fold and survivors compute z twice from the same product and must agree to the last bit.
(x + b) scale has two operations that no compiler may fuse, so it does; the softcap's polynomial has more, so with one
the fold writes z back.

Bytes and FLOP (calculated, at N 8192, K 64, D 4096, V 128256, bf16; no GPU measurement yet):

| step      | reads                          | writes             | bound by                                        |
|-----------|--------------------------------|--------------------|-------------------------------------------------|
| product   | W once per 384 tokens          | 4 N V = 4.2 GB     | 2 N D V = 8.6 TFLOP: 10.9 ms at 790 TFLOP/s     |
| fold      | 4 N V = 4.2 GB                 | 8 N V / B          | memory: 1.0 ms at 4.3 TB/s                      |
| choose    | 8 N V / B                      | 4 N k              | latency of 16 rounds                            |
| survivors | 4 N k B = 0.27 GB              | 8 N k and a little | latency                                         |
| narrow    | 8 bytes a survivor, 16 times   | 8 N k              | latency; the list stays in L1                   |
| order     | 4 N k, k / 64 times            | 12 N k             | N k^2 comparisons: meant for k to a few 1000    |

At N <= 64 everything but W (1.05 GB, 0.24 ms) is small: 4 N V = 33 MB written at N = 64. Workspace: the slab, its
blocks and candidates, by `plan` under `workspace_bytes()`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import LMHead
from ..workspace import workspace_bytes
from . import tiles
from .primitives import (
    INTERPRETED,
    accumulator,
    add_exponentials,
    current_device,
    finish,
    number,
    ordered,
    origin,
    product,
    require_device,
    require_grid,
    require_sizes,
    unordered,
)

# --- product and fold ------------------------------------------------------------------------------------------


@triton.jit
def _skinny_kernel(
    hidden_ptr, weight_ptr, bias_ptr, z_ptr, top_ptr, sum_ptr,
    N, D, first, C, J,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_bv,
    softcap: tl.float64, scale: tl.float64, inverse_temperature: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr, NATIVE: tl.constexpr,
    TOKENS: tl.constexpr, VOCABULARY: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tokens against VOCABULARY rows of W: z, and of each block the largest z and the sum of exponentials."""
    BLOCKS: tl.constexpr = VOCABULARY // BLOCK
    column = tl.program_id(0) * VOCABULARY + tl.arange(0, VOCABULARY)
    n = tl.arange(0, TOKENS)
    w_row = weight_ptr + (first + column).to(tl.int64)[:, None] * stride_wv
    h_row = hidden_ptr + n.to(tl.int64)[None, :] * stride_hn
    dots = tl.full([VOCABULARY, TOKENS], 0.0, ACC)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        w = tl.load(
            w_row + d.to(tl.int64)[None, :] * stride_wd,
            mask=(column < C)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        h = tl.load(
            h_row + d.to(tl.int64)[:, None] * stride_hd, mask=(n < N)[None, :] & (d < D)[:, None], other=0.0
        )
        if NATIVE:
            dots = tl.dot(w, h, dots, input_precision="ieee")
        else:
            dots += tl.dot(w.to(ACC), h.to(ACC), input_precision="ieee", out_dtype=ACC)
    known = (column < C)[:, None]
    z = finish(
        dots, (first + column)[:, None], bias_ptr, stride_bv, known, softcap, scale, HAS_BIAS, HAS_SOFTCAP
    )
    inside = known & (n < N)[None, :]
    tl.store(z_ptr + n.to(tl.int64)[None, :] * C + column[:, None], z, mask=inside)

    z = tl.reshape(z, [BLOCKS, BLOCK, TOKENS])
    inside = tl.reshape(inside, [BLOCKS, BLOCK, TOKENS])
    order = ordered(z)
    top = tl.max(tl.where(inside, order, _least(order.dtype)), 1)
    zero = origin(unordered(top))
    terms = tl.exp((z - tl.expand_dims(zero, 1)) * number(inverse_temperature, ACC))
    total = tl.sum(tl.where(inside, terms, 0.0), 1)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = n.to(tl.int64)[None, :] * J + block[:, None]
    keep = (block < J)[:, None] & (n < N)[None, :]
    tl.store(top_ptr + here, top, mask=keep)
    tl.store(sum_ptr + here, total, mask=keep)


@triton.jit
def _fold_kernel(
    z_ptr, bias_ptr, top_ptr, sum_ptr,
    PAIRS, first, C, J,
    stride_bv,
    softcap: tl.float64, scale: tl.float64, inverse_temperature: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS (token, block) pairs of a slab of products: the largest z and the sum of exponentials."""
    e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (e % J)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (e < PAIRS)[:, None] & (column < C)
    here = z_ptr + (e // J)[:, None] * C + column
    x = tl.load(here, mask=inside, other=0.0).to(ACC)
    z = finish(x, first + column, bias_ptr, stride_bv, inside, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        tl.store(here, z, mask=inside)
    order = ordered(z)
    top = tl.max(tl.where(inside, order, _least(order.dtype)), 1)
    zero = origin(unordered(top))
    terms = tl.exp((z - zero[:, None]) * number(inverse_temperature, ACC))
    tl.store(top_ptr + e, top, mask=e < PAIRS)
    tl.store(sum_ptr + e, tl.sum(tl.where(inside, terms, 0.0), 1), mask=e < PAIRS)


# --- selection -------------------------------------------------------------------------------------------------


@triton.jit
def _least(INT: tl.constexpr):
    """The integer below every number's order: what is not there."""
    LEAST: tl.constexpr = -0x80000000 if tl.int32 == INT else -0x8000000000000000
    return tl.full((), LEAST, INT)


@triton.jit
def _next_digit(prefix, i):
    """The three larger numbers that share the first 2 i bits with prefix and differ in the next two."""
    shift = prefix.dtype.primitive_bitwidth - 2 - 2 * i
    one = tl.full((), 1, prefix.dtype)
    # The first bit is the sign, which is set in the smaller half; the others are still 0.
    return prefix ^ (one << shift), prefix ^ ((one + one) << shift), prefix ^ ((one + one + one) << shift)


@triton.jit
def _step(prefix, low, middle, high, at_low, at_middle, at_high, K):
    """The largest of the four that at least K orders reach."""
    prefix = tl.where(at_low >= K, low, prefix)
    prefix = tl.where(at_middle >= K, middle, prefix)
    return tl.where(at_high >= K, high, prefix)


@triton.jit
def _choose_kernel(
    top_ptr, sum_ptr, floor_ptr, list_ptr, count_ptr, threshold_ptr, rest_max_ptr, rest_sum_ptr,
    N, J, K, SLOTS,
    inverse_temperature: tl.float64,
    INT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: the list of chosen blocks, what an element of them must reach, the other blocks into the tail."""
    LEAST = _least(INT)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCKS)
    inside = (n < N)[:, None] & (j < J)[None, :]
    here = n[:, None] * J + j[None, :]
    top = tl.load(top_ptr + here, mask=inside, other=LEAST)
    # The k-th largest maximum, or less than any where there are fewer than k blocks.
    threshold = tl.full([ROWS], LEAST, INT)
    for i in range(top.dtype.primitive_bitwidth // 2):
        low, middle, high = _next_digit(threshold, i)
        threshold = _step(
            threshold, low, middle, high,
            tl.sum((top >= low[:, None]).to(tl.int32), 1),
            tl.sum((top >= middle[:, None]).to(tl.int32), 1),
            tl.sum((top >= high[:, None]).to(tl.int32), 1),
            K,
        )  # fmt: skip
    above = top > threshold[:, None]
    equal = (top == threshold[:, None]) & inside
    places = K - tl.sum(above.to(tl.int32), 1)
    floor = tl.load(floor_ptr + n, mask=n < N, other=LEAST)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= places[:, None]))
    chosen = chosen & (top > floor[:, None])
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(list_ptr + n[:, None] * SLOTS + slot, j[None, :] + slot * 0, mask=chosen)
    tl.store(count_ptr + n, tl.sum(chosen.to(tl.int32), 1), mask=n < N)
    # Nothing exceeds the order of a NaN: a floor there chose no block, and must not wrap around.
    higher = tl.maximum(threshold, tl.where(floor + 1 > floor, floor + 1, floor))
    tl.store(threshold_ptr + n, higher, mask=n < N)

    passed = inside & (chosen == 0)
    total = tl.load(sum_ptr + here, mask=passed, other=0.0)
    m = tl.load(rest_max_ptr + n, mask=n < N, other=0.0)
    s = tl.load(rest_sum_ptr + n, mask=n < N, other=0.0)
    x = tl.where(passed, unordered(top), float("-inf")) * number(inverse_temperature, ACC)
    largest = tl.maximum(m, tl.max(x, 1))
    zero = origin(largest)
    s = s * tl.exp(m - zero) + tl.sum(total * tl.where(passed, tl.exp(origin(x) - zero[:, None]), 0.0), 1)
    tl.store(rest_max_ptr + n, largest, mask=n < N)
    tl.store(rest_sum_ptr + n, s, mask=n < N)


@triton.jit
def _survivors_kernel(
    z_ptr, bias_ptr, list_ptr, count_ptr, threshold_ptr, value_ptr, id_ptr, kept_ptr, rest_max_ptr, rest_sum_ptr,
    N, first, C, SLOTS, WIDTH,
    stride_bv,
    softcap: tl.float64, scale: tl.float64, inverse_temperature: tl.float64,
    HAS_BIAS: tl.constexpr, FINISHED: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, their chosen blocks: elements that reach the threshold are listed, the others go into the tail."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    count = tl.load(count_ptr + n, mask=n < N, other=0)
    threshold = tl.load(threshold_ptr + n, mask=n < N, other=0)
    m = tl.load(rest_max_ptr + n, mask=n < N, other=0.0)
    s = tl.load(rest_sum_ptr + n, mask=n < N, other=0.0)
    kept = tl.full([ROWS], 0, tl.int32)
    for start in range(0, tl.max(count, 0) * BLOCK, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        listed = (c // BLOCK)[None, :] < count[:, None]
        block = tl.load(list_ptr + n[:, None] * SLOTS + (c // BLOCK)[None, :], mask=listed, other=0)
        column = block * BLOCK + (c % BLOCK)[None, :]
        inside = listed & (column < C)
        z = tl.load(z_ptr + n[:, None] * C + column, mask=inside, other=0.0).to(ACC)
        if not FINISHED:
            z = finish(z, first + column, bias_ptr, stride_bv, inside, softcap, scale, HAS_BIAS, False)
        reached = inside & (ordered(z) >= threshold[:, None])
        here = n[:, None] * WIDTH + kept[:, None] + tl.cumsum(reached.to(tl.int32), 1) - 1
        tl.store(value_ptr + here, z, mask=reached)
        tl.store(id_ptr + here, first + column, mask=reached)
        kept += tl.sum(reached.to(tl.int32), 1)
        m, s = add_exponentials(m, s, z * number(inverse_temperature, ACC), inside & (reached == 0))
    tl.store(kept_ptr + n, kept, mask=n < N)
    tl.store(rest_max_ptr + n, m, mask=n < N)
    tl.store(rest_sum_ptr + n, s, mask=n < N)


@triton.jit
def _listed(best_ptr, new_ptr, n, c, BEST, kept, K, WIDTH):
    """Entries c of a token's list: the BEST it had, then those kept of this slab; (entry, whether there is one)."""
    old = (c < BEST)[None, :] & (kept >= 0)[:, None]
    new = (c >= BEST)[None, :] & ((c - BEST)[None, :] < kept[:, None])
    x = tl.load(best_ptr + n[:, None] * K + c[None, :], mask=old, other=0)
    y = tl.load(new_ptr + n[:, None] * WIDTH + (c - BEST)[None, :], mask=new, other=0)
    return tl.where(old, x, y), old | new


@triton.jit
def _narrow_kernel(
    best_value_ptr, best_id_ptr, new_value_ptr, new_id_ptr, kept_ptr,
    value_ptr, id_ptr, floor_ptr, rest_max_ptr, rest_sum_ptr,
    N, BEST, K, WIDTH,
    inverse_temperature: tl.float64,
    INT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: the k best of their lists in the lists' order, the order of the k-th, the others into the tail."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = tl.load(kept_ptr + n, mask=n < N, other=-1)
    stop = BEST + tl.maximum(tl.max(kept, 0), 0)
    floor = tl.full([ROWS], _least(INT), INT)
    for i in range(floor.dtype.primitive_bitwidth // 2):
        low, middle, high = _next_digit(floor, i)
        at_low = tl.full([ROWS], 0, tl.int32)
        at_middle = tl.full([ROWS], 0, tl.int32)
        at_high = tl.full([ROWS], 0, tl.int32)
        for start in range(0, stop, COLUMNS):
            c = start + tl.arange(0, COLUMNS)
            z, there = _listed(best_value_ptr, new_value_ptr, n, c, BEST, kept, K, WIDTH)
            order = tl.where(there, ordered(z), _least(INT))
            at_low += tl.sum((order >= low[:, None]).to(tl.int32), 1)
            at_middle += tl.sum((order >= middle[:, None]).to(tl.int32), 1)
            at_high += tl.sum((order >= high[:, None]).to(tl.int32), 1)
        floor = _step(floor, low, middle, high, at_low, at_middle, at_high, K)
    places = tl.full([ROWS], 0, tl.int32) + K
    for start in range(0, stop, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        z, there = _listed(best_value_ptr, new_value_ptr, n, c, BEST, kept, K, WIDTH)
        places -= tl.sum((there & (ordered(z) > floor[:, None])).to(tl.int32), 1)
    # `places` are left for those equal to the k-th: the first of them in the order of their ids.
    m = tl.load(rest_max_ptr + n, mask=n < N, other=0.0)
    s = tl.load(rest_sum_ptr + n, mask=n < N, other=0.0)
    taken = tl.full([ROWS], 0, tl.int32)
    for start in range(0, stop, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        z, there = _listed(best_value_ptr, new_value_ptr, n, c, BEST, kept, K, WIDTH)
        ids, _ = _listed(best_id_ptr, new_id_ptr, n, c, BEST, kept, K, WIDTH)
        order = ordered(z)
        equal = there & (order == floor[:, None])
        selected = equal & (tl.cumsum(equal.to(tl.int32), 1) <= places[:, None])
        selected = selected | (there & (order > floor[:, None]))
        places -= tl.sum(equal.to(tl.int32), 1)
        here = n[:, None] * K + taken[:, None] + tl.cumsum(selected.to(tl.int32), 1) - 1
        tl.store(value_ptr + here, z, mask=selected)
        tl.store(id_ptr + here, ids, mask=selected)
        taken += tl.sum(selected.to(tl.int32), 1)
        m, s = add_exponentials(m, s, z * number(inverse_temperature, ACC), there & (selected == 0))
    tl.store(floor_ptr + n, floor, mask=n < N)
    tl.store(rest_max_ptr + n, m, mask=n < N)
    tl.store(rest_sum_ptr + n, s, mask=n < N)


@triton.jit
def _order_kernel(
    best_value_ptr, best_id_ptr, rest_max_ptr, rest_sum_ptr, value_ptr, index_ptr, tail_ptr,
    N, K,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, ROWS of their k best to the places of their ranks; and their tails."""
    blocks = tl.cdiv(K, ROWS)
    n = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = (n < N)[:, None] & (i < K)[None, :]
    here = n[:, None] * K + i[None, :]
    z = tl.load(best_value_ptr + here, mask=inside, other=0.0)
    order = ordered(z)[:, :, None]
    rank = tl.full([TOKENS, ROWS], 0, tl.int32)
    for start in range(0, K, ROWS):
        c = start + tl.arange(0, ROWS)
        there = (n < N)[:, None] & (c < K)[None, :]
        other = ordered(tl.load(best_value_ptr + n[:, None] * K + c[None, :], mask=there, other=0.0))[
            :, None, :
        ]
        lower = (c[None, :] < i[:, None])[None, :, :]
        before = ((other > order) | ((other == order) & lower)) & there[:, None, :]
        rank += tl.sum(before.to(tl.int32), 2)
    place = n[:, None] * K + rank
    tl.store(value_ptr + place, z, mask=inside)
    tl.store(index_ptr + place, tl.load(best_id_ptr + here, mask=inside, other=0).to(tl.int64), mask=inside)
    if tl.program_id(0) % blocks == 0:
        m = tl.load(rest_max_ptr + n, mask=n < N, other=0.0)
        s = tl.load(rest_sum_ptr + n, mask=n < N, other=1.0)
        tl.store(tail_ptr + n, origin(m) + tl.log(s), mask=n < N)


# --- launchers -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a call is cut: tokens at a time, columns of a slab, columns of a block, and which kernel multiplies."""

    tokens: int
    columns: int
    block: int
    skinny: bool


def token_bytes(columns: int, k: int, block: int, itemsize: int) -> int:
    """Bytes of workspace a token needs: the slab, its blocks, the chosen ones' list and elements, twice the k best."""
    blocks = triton.cdiv(columns, block)
    survivors = min(k * block, columns)
    lists = 4 * min(k, blocks) + survivors * (itemsize + 4) + 2 * k * (itemsize + 4)
    return columns * itemsize + 2 * blocks * itemsize + lists + 64


def plan(n: int, v: int, k: int, itemsize: int, arch: int = 0) -> Plan:
    """The whole vocabulary at once for as many tokens as the workspace holds; slabs where that would be too few."""
    budget, block = workspace_bytes(), tiles.topk_block(k, v)
    skinny = n <= tiles.measured_number("TOPK_SKINNY_TOKENS", arch)
    limit = tiles.CHOOSE_ELEMENTS * block
    tokens = min(n, budget // token_bytes(v, k, block, itemsize))
    if v <= limit and tokens >= min(n, tiles.TOPK_MIN_TOKENS):
        # Whole tiles of the library's product.
        return Plan(tokens if tokens == n else tokens - tokens % 128, v, block, skinny)
    tokens = n if skinny else min(n, tiles.measured_number("TOPK_TOKENS", arch))
    while tokens > 1 and token_bytes(min(v, 32 * block), k, block, itemsize) * tokens > budget:
        tokens //= 2
    columns = min(limit, triton.cdiv(v, block) * block)
    while columns > block and token_bytes(columns, k, block, itemsize) * tokens > budget:
        columns = max(block, (columns * 15 // 16) // block * block)
    # Slabs of one size, in whole blocks.
    columns = triton.cdiv(triton.cdiv(v, triton.cdiv(v, columns)), block) * block
    return Plan(tokens, min(columns, v), block, skinny)


def linear_topk(
    hidden: Tensor, head: LMHead, k: int, temperature: float, *, cut: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values `[N, K]` in ACC, descending; indices `[N, K]` int64; tail `[N]` in ACC), 1 <= k <= V.

    `cut` replaces the plan, for tests and measurements.
    """
    require_device(hidden=hidden, weight=head.weight, bias=head.bias)
    n, v, device = hidden.shape[0], head.weight.shape[0], hidden.device
    require_sizes("linear_topk", hidden=hidden.shape[1], weight=v)
    values = torch.empty(n, k, dtype=head.acc, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    tail = torch.empty(n, dtype=head.acc, device=device)
    if n:
        cut = cut or plan(n, v, k, head.acc.itemsize, tiles.architecture(device))
        with current_device(hidden):
            for start in range(0, n, cut.tokens):
                rows = slice(start, start + cut.tokens)
                _topk_of_tokens(
                    hidden[rows], head, k, 1.0 / temperature, cut, values[rows], indices[rows], tail[rows]
                )
    return values, indices, tail


def _topk_of_tokens(
    hidden: Tensor,
    head: LMHead,
    k: int,
    inverse_temperature: float,
    cut: Plan,
    values: Tensor,
    indices: Tensor,
    tail: Tensor,
) -> None:
    """One block of tokens through all slabs, into views of the outputs."""
    n, v, device = hidden.shape[0], head.weight.shape[0], hidden.device
    torch_acc, acc = accumulator(hidden, head.weight)
    torch_int, integer = (torch.int64, tl.int64) if acc == tl.float64 else (torch.int32, tl.int32)
    blocks = triton.cdiv(cut.columns, cut.block)
    slots, width = min(k, blocks), min(min(k, blocks) * cut.block, cut.columns)

    slab = torch.empty(n * cut.columns, dtype=torch_acc, device=device)
    top = torch.empty(n * blocks, dtype=torch_int, device=device)
    total = torch.empty(n * blocks, dtype=torch_acc, device=device)
    chosen, count, kept = (torch.empty(n, s, dtype=torch.int32, device=device) for s in (slots, 1, 1))
    threshold = torch.empty(n, dtype=torch_int, device=device)
    floor = torch.full((n,), torch.iinfo(torch_int).min, dtype=torch_int, device=device)
    rest = torch.full((n,), -torch.inf, dtype=torch_acc, device=device), values.new_zeros(n)
    new = (
        torch.empty(n, width, dtype=torch_acc, device=device),
        torch.empty(n, width, dtype=torch.int32, device=device),
    )
    best, better = (
        (torch.empty_like(values), torch.empty_like(indices, dtype=torch.int32)) for _ in range(2)
    )

    bias, stride_bv = head.bias, 0 if head.bias is None else head.bias.stride(0)
    numbers = head.softcap or 0.0, head.scale, inverse_temperature
    has = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": head.softcap is not None}
    columns = min(tiles.SURVIVORS_COLUMNS, triton.next_power_of_2(slots * cut.block))
    rows = tiles.SURVIVORS_COLUMNS // columns
    lists = {"ROWS": rows, "COLUMNS": columns, "num_warps": tiles.SURVIVORS_WARPS}
    for first in range(0, v, cut.columns):
        c = min(cut.columns, v - first)
        j = triton.cdiv(c, cut.block)
        z = slab[: n * c].view(n, c)
        if cut.skinny:
            _skinny(hidden, head, first, inverse_temperature, z, top, total, cut.block)
        else:
            product(hidden, head.weight[first : first + c].T, out=z)
            fold_rows = tiles.measured_number("FOLD_ROWS", tiles.architecture(device))
            _fold_kernel[(require_grid(triton.cdiv(n * j, fold_rows), "linear_topk"),)](
                z, bias, top, total,
                n * j, first, c, j,
                stride_bv,
                *numbers,
                **has, ACC=acc, ROWS=fold_rows, BLOCK=cut.block, num_warps=4,
            )  # fmt: skip
        padded = triton.next_power_of_2(j)
        choose_rows = max(1, tiles.CHOOSE_ROW_ELEMENTS // padded)
        _choose_kernel[(triton.cdiv(n, choose_rows),)](
            top, total, floor, chosen, count, threshold, *rest,
            n, j, k, slots,
            inverse_temperature,
            INT=integer, ACC=acc, ROWS=choose_rows, BLOCKS=padded, num_warps=tiles.choose_warps(padded),
        )  # fmt: skip
        _survivors_kernel[(triton.cdiv(n, rows),)](
            z, bias, chosen, count, threshold, *new, kept, *rest,
            n, first, c, slots, width,
            stride_bv,
            *numbers,
            HAS_BIAS=bias is not None, FINISHED=cut.skinny or head.softcap is not None, ACC=acc, BLOCK=cut.block,
            **lists,
        )  # fmt: skip
        _narrow_kernel[(triton.cdiv(n, rows),)](
            *best, *new, kept, *better, floor, *rest,
            n, min(k, first), k, width,
            inverse_temperature,
            INT=integer, ACC=acc, **lists,
        )  # fmt: skip
        best, better = better, best
    rows = min(tiles.ORDER_ROWS, triton.next_power_of_2(k))
    tokens = max(1, tiles.ORDER_ELEMENTS // rows**2)
    _order_kernel[(require_grid(triton.cdiv(n, tokens) * triton.cdiv(k, rows), "linear_topk"),)](
        *best, *rest, values, indices, tail,
        n, k,
        TOKENS=tokens, ROWS=rows, num_warps=4,
    )  # fmt: skip


def _skinny(
    hidden: Tensor,
    head: LMHead,
    first: int,
    inverse_temperature: float,
    z: Tensor,
    top: Tensor,
    total: Tensor,
    block: int,
) -> None:
    """z of all tokens for one slab, and its fold, reading W once."""
    (n, d), c, bias = hidden.shape, z.shape[1], head.bias
    _, acc = accumulator(hidden, head.weight)
    tile = tiles.skinny_tile(tiles.architecture(hidden.device), head.weight.element_size(), n)
    _skinny_kernel[(triton.cdiv(c, tile.vocabulary),)](
        hidden, head.weight, bias, z, top, total,
        n, d, first, c, triton.cdiv(c, block),
        *hidden.stride(), *head.weight.stride(), 0 if bias is None else bias.stride(0),
        head.softcap or 0.0, head.scale, inverse_temperature,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=head.softcap is not None, ACC=acc,
        NATIVE=not INTERPRETED and acc == tl.float32 and hidden.dtype == head.weight.dtype,
        TOKENS=max(16, triton.next_power_of_2(n)), VOCABULARY=tile.vocabulary, DEPTH=tile.depth, BLOCK=block,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
