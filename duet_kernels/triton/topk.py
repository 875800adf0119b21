"""The k largest logits of every token, their ids and the log-sum-exp of all others, without stored `[N, V]` logits.

    z[n,v] = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)        (no softcap: scale (h W^T + b))
    S[n]   = the first k ids in the order (z descending, id ascending); a NaN stands above every number
    tail[n] = log sum over v not in S[n] of exp(z[n,v] / T)

Legend: N tokens, D hidden size, V vocabulary, T temperature, C columns of a slab of the vocabulary, B columns of a
block, J = C / B blocks of a slab, ACC fp32 (fp64 for fp64 inputs). Inputs have any strides.

Pipeline, for every slab of a block of tokens; numbers are compared as integers of the same order (`ordered`):

    product    z slab [N, C] in ACC        the library's product; up to 64 tokens a kernel that reads W once and folds
    fold       block: largest z, sum of exp                           reads the slab once
    select     a program a token:
      bound      the k-th largest of all block maxima and of the candidates of the slabs before
      blocks     those whose maximum is above the bound, and the first of those at it: k at most, with the candidates
                 that reach it; the other blocks' sums go into the tail
      keep       elements of the chosen blocks that reach the bound become candidates, in the order of their ids,
                 behind those of the slabs before that still reach it; the others go into the tail
      rank       after the last slab: how many candidates stand before each; those of a rank below k are the result

Why it is exact. The bound is the k-th largest of k elements or more, so it never exceeds the k-th largest of all. What
is counted for it - a candidate, or the largest element of a block - stands before every element of a block that was not
chosen, so nothing selected is lost. Candidates are in the order of their ids, so a tie is decided by position. An
element enters the tail where it is passed over, so the tail is a sum of what is left, never a difference.

There are hardly more than k candidates where the large logits are spread over the vocabulary, and room for 2 k. Where
they do not fit (ties, or all of them side by side), the program reads its chosen blocks again, finds the exact k-th
largest of them and of the earlier candidates, and keeps what is above it and the first k at it. It does so, too, where
what it passed over is so far below the bound that exponentials relative to it are 0: then each sum has its own maximum.

The k-th largest of a list is found two bits at a time, in at most 16 rounds of counts (32 for fp64): no sort, no
atomics, no key that packs an id. The rounds end at any number that exactly k reach, which serves as well. Fold and
select compute z twice from the same product and must agree to the last bit.
(x + b) scale has two operations that no compiler may fuse, so it does; the softcap's polynomial has more, so with one
the fold writes z back.

Bytes and FLOP (calculated, at N 8192, K 64, D 4096, V 128256, bf16, two slabs):

| step    | reads                          | writes         | bound by                                              |
|---------|--------------------------------|----------------|-------------------------------------------------------|
| product | W once per block of tokens     | 4 N V = 4.2 GB | 2 N D V = 8.6 TFLOP: 10.9 ms at 790 TFLOP/s           |
| fold    | 4 N V = 4.2 GB                 | 8 N V / B      | memory: 1.0 ms at 4.3 TB/s                            |
| select  | 8 N V / B, 4 N k B = 0.27 GB   | 20 N k         | latency of 16 rounds a slab; N k^2 comparisons in all |

At N <= 64 everything but W (1.05 GB, 0.24 ms) is small: 4 N V = 33 MB written at N = 64. Workspace: the slab, its
block maxima and sums, and the candidates, in one allocation, by `plan` under `workspace_bytes()`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import workspace_bytes
from ..head import LMHead
from ..products import product
from . import tiles
from .primitives import (
    ACCUMULATORS,
    INTERPRETED,
    add_exponentials,
    finish,
    number,
    ordered,
    origin,
    require_grid,
    unordered,
)
from .slabs import allocate, cut_logits
from .tiles import cdiv, next_power_of_2

# --- product and fold ------------------------------------------------------------------------------------------


@triton.jit
def _skinny_kernel(
    hidden_ptr, weight_ptr, bias_ptr, z_ptr, top_ptr, sum_ptr,
    N, D, first, C, J,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_bv,
    softcap: tl.float64, scale: tl.float64, inverse_temperature: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr, NATIVE: tl.constexpr,
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
    z = finish(dots, (first + column)[:, None], bias_ptr, stride_bv, known, softcap, scale, HAS_SOFTCAP)
    inside = known & (n < N)[None, :]
    tl.store(z_ptr + n.to(tl.int64)[None, :] * J * BLOCK + column[:, None], z, mask=inside)

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
    HAS_SOFTCAP: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """BLOCKS of the PAIRS (token, block) of a slab of products: the largest z and the sum of exponentials.

    Rows hold whole blocks, so the slab is one list of blocks; RAGGED: the last block of a row has columns past C. A
    block is read in pieces that lie on top of each other, so that the first reduction is inside a thread.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    e = start + tl.arange(0, BLOCKS)
    place = tl.arange(0, BLOCK // PIECE)[None, :, None] * PIECE + tl.arange(0, PIECE)[None, None, :]
    here = z_ptr + e[:, None, None] * BLOCK + place
    keep = (e < PAIRS)[:, None, None]
    column = ((start % J).to(tl.int32) + tl.arange(0, BLOCKS)) % J
    column = column[:, None, None] * BLOCK + place
    inside = keep & (column < C)
    x = tl.load(here, mask=keep, other=0.0, eviction_policy="evict_first").to(ACC)
    z = finish(x, first + column, bias_ptr, stride_bv, inside, softcap, scale, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        tl.store(here, z, mask=keep)
    order = ordered(z)
    if RAGGED:
        order = tl.where(inside, order, _least(order.dtype))
    top = tl.max(tl.max(order, 1), 1)
    terms = tl.exp((z - origin(unordered(top))[:, None, None]) * number(inverse_temperature, ACC))
    if RAGGED:
        terms = tl.where(inside, terms, 0.0)
    tl.store(top_ptr + e, top, mask=e < PAIRS)
    tl.store(sum_ptr + e, tl.sum(tl.sum(terms, 1), 1), mask=e < PAIRS)


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
def _step(prefix, reach, low, middle, high, at_low, at_middle, at_high, K):
    """The largest of the four that at least K orders reach, and how many do; unchanged once exactly K do."""
    more = reach != K
    to_low, to_middle, to_high = more & (at_low >= K), more & (at_middle >= K), more & (at_high >= K)
    prefix, reach = tl.where(to_low, low, prefix), tl.where(to_low, at_low, reach)
    prefix, reach = tl.where(to_middle, middle, prefix), tl.where(to_middle, at_middle, reach)
    return tl.where(to_high, high, prefix), tl.where(to_high, at_high, reach)


@triton.jit
def _add_sums(m, s, tops, sums):
    """(m, s) with the sums of exponentials (tops, sums) `[R, C]` taken in."""
    top = tl.maximum(m, tl.max(tops, 1))
    zero = origin(top)
    weights = tl.where(tops == float("-inf"), 0.0, tl.exp(origin(tops) - zero[:, None]))
    return top, s * tl.exp(m - zero) + tl.sum(sums * weights, 1)


@triton.jit
def _selected(order, there, bound, places, EXACT: tl.constexpr):
    """Which orders reach the bound; if EXACT, of those at it the first `places`, and how many places are left."""
    if EXACT:
        equal = there & (order == bound[:, None])
        selected = equal & (tl.cumsum(equal.to(tl.int32), 1) <= places[:, None])
        selected = selected | (there & (order > bound[:, None]))
        places -= tl.sum(equal.to(tl.int32), 1)
    else:
        selected = there & (order >= bound[:, None])
    return selected, places


@triton.jit
def _candidates(lists, count, start, COLUMNS: tl.constexpr):
    """(z, place in the list, whether there is one) of COLUMNS candidates of each token."""
    value_ptr, _, n, ROOM = lists
    c = start + tl.arange(0, COLUMNS)
    there = c[None, :] < count[:, None]
    # Neighbours in a warp, not in a thread: in the layout in which what is kept is stored, so that nothing moves.
    here = tl.max_contiguous(n[:, None] * ROOM + c[None, :], [1, 1])
    return tl.load(value_ptr + here, mask=there, other=0.0), here, there


@triton.jit
def _elements(slab, n, blocks, start, FINISHED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(z, id, whether it is there) of COLUMNS elements of each token's chosen blocks."""
    z_ptr, bias_ptr, list_ptr, first, C, J, SLOTS, stride_bv, scale = slab
    c = start + tl.arange(0, COLUMNS)
    listed = (c // BLOCK)[None, :] < blocks[:, None]
    block = tl.load(list_ptr + n[:, None] * SLOTS + (c // BLOCK)[None, :], mask=listed, other=0)
    column = block * BLOCK + (c % BLOCK)[None, :]
    there = listed & (column < C)
    here = tl.max_contiguous(z_ptr + n[:, None] * J * BLOCK + column, [1, 1])
    z = tl.load(here, mask=there, other=0.0)
    if not FINISHED:
        z = finish(z, first + column, bias_ptr, stride_bv, there, 0.0, scale, False)
    return z, first + column, there


@triton.jit
def _keep_candidates(lists, count, bound, places, m, s, inverse, EXACT: tl.constexpr, COLUMNS: tl.constexpr):
    """Move the candidates that are still selected to the front of their list, the others into the tail."""
    value_ptr, id_ptr, n, ROOM = lists
    kept = count * 0
    for start in range(0, tl.max(count, 0), COLUMNS):
        z, here, there = _candidates(lists, count, start, COLUMNS)
        ids = tl.load(id_ptr + here, mask=there, other=0)
        tl.debug_barrier()  # all are read before one is overwritten
        selected, places = _selected(ordered(z), there, bound, places, EXACT)
        here = n[:, None] * ROOM + kept[:, None] + tl.cumsum(selected.to(tl.int32), 1) - 1
        tl.store(value_ptr + here, z, mask=selected)
        tl.store(id_ptr + here, ids, mask=selected)
        kept += tl.sum(selected.to(tl.int32), 1)
        m, s = add_exponentials(m, s, z * inverse, there & (selected == 0))
    return kept, places, m, s


@triton.jit
def _keep_elements(
    slab, lists, blocks, kept, bound, places, m, s, inverse,
    EXACT: tl.constexpr, FINISHED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append the selected elements of the chosen blocks, the others into the tail; whether that is all right.

    Those past ROOM are only counted. Unless EXACT, exponentials are relative to the bound, which is above all that go
    into the tail: not all right where they would all be next to 0.
    """
    value_ptr, id_ptr, n, ROOM = lists
    number_of_bound = unordered(bound)
    # A tail in every lane, so that the loop has no reduction for it.
    tops = tl.full([n.shape[0], COLUMNS], float("-inf"), m.dtype)
    sums = tl.full([n.shape[0], COLUMNS], 0.0, m.dtype)
    for start in range(0, tl.max(blocks, 0) * BLOCK, COLUMNS):
        z, ids, there = _elements(slab, n, blocks, start, FINISHED, COLUMNS, BLOCK)
        if EXACT:
            selected, places = _selected(ordered(z), there, bound, places, EXACT)
        else:
            # A bound that is no number is below everything, or above all but NaN: then too many are selected.
            selected = there & ((z < number_of_bound[:, None]) == 0)
        place = kept[:, None] + tl.cumsum(selected.to(tl.int32), 1) - 1
        fits = selected & (place < ROOM)
        tl.store(value_ptr + n[:, None] * ROOM + place, z, mask=fits)
        tl.store(id_ptr + n[:, None] * ROOM + place, ids, mask=fits)
        kept += tl.sum(selected.to(tl.int32), 1)
        rest = there & (selected == 0)
        if EXACT:
            x = tl.where(rest, z * inverse, float("-inf"))
            top = tl.maximum(tops, x)
            sums = sums * tl.exp(tops - origin(top)) + tl.exp(x - origin(top))
            tops = top
        else:
            sums += tl.where(rest, tl.exp((z - number_of_bound[:, None]) * inverse), 0.0)
            tops = tl.maximum(tops, tl.where(rest, z, float("-inf")))
    if EXACT:
        m, s = _add_sums(m, s, tops, sums)
        right = kept <= ROOM
    else:
        largest = tl.max(tops, 1)
        some = largest > float("-inf")
        right = (kept <= ROOM) & ((some == 0) | ((largest - number_of_bound) * inverse > -60.0))
        x = tl.where(some, number_of_bound * inverse, float("-inf"))
        m, s = _add_sums(m, s, x[:, None], tl.sum(sums, 1)[:, None])
    return kept, m, s, right


@triton.jit
def _reach_in_lists(
    slab, lists, blocks, count, low, middle, high,
    FINISHED: tl.constexpr, HELD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many candidates and elements of chosen blocks reach each of the token's three bounds."""
    n = lists[2]
    LEAST = _least(low.dtype)
    at_low, at_middle, at_high = count * 0, count * 0, count * 0
    for start in range(0, tl.max(count, 0), HELD):
        z, _here, there = _candidates(lists, count, start, HELD)
        order = tl.where(there, ordered(z), LEAST)
        at_low += tl.sum((order >= low[:, None]).to(tl.int32), 1)
        at_middle += tl.sum((order >= middle[:, None]).to(tl.int32), 1)
        at_high += tl.sum((order >= high[:, None]).to(tl.int32), 1)
    for start in range(0, tl.max(blocks, 0) * BLOCK, COLUMNS):
        x, _ids, inside = _elements(slab, n, blocks, start, FINISHED, COLUMNS, BLOCK)
        tall = tl.where(inside, ordered(x), LEAST)
        at_low += tl.sum((tall >= low[:, None]).to(tl.int32), 1)
        at_middle += tl.sum((tall >= middle[:, None]).to(tl.int32), 1)
        at_high += tl.sum((tall >= high[:, None]).to(tl.int32), 1)
    return at_low, at_middle, at_high


@triton.jit
def _write_best(
    lists, count, out_value_ptr, out_index_ptr, K, m, s, inverse, RANKED: tl.constexpr, COMPARED: tl.constexpr
):
    """The candidates before which fewer than K stand to the place of their rank, the others into the tail."""
    _value_ptr, id_ptr, n, _ROOM = lists
    for start in range(0, tl.max(count, 0), RANKED):
        z, here, there = _candidates(lists, count, start, RANKED)
        i = (start + tl.arange(0, RANKED))[None, :, None]
        order = ordered(z)[:, :, None]
        rank = tl.full([n.shape[0], RANKED], 0, tl.int32)
        for other in range(0, tl.max(count, 0), COMPARED):
            x, _here, exists = _candidates(lists, count, other, COMPARED)
            rival = tl.where(exists, ordered(x), _least(order.dtype))[:, None, :]
            earlier = (other + tl.arange(0, COMPARED))[None, None, :] < i
            rank += tl.sum(((rival > order) | ((rival == order) & earlier)).to(tl.int32), 2)
        best = there & (rank < K)
        ids = tl.load(id_ptr + here, mask=best, other=0)
        tl.store(out_value_ptr + n[:, None] * K + rank, z, mask=best)
        tl.store(out_index_ptr + n[:, None] * K + rank, ids.to(tl.int64), mask=best)
        m, s = add_exponentials(m, s, z * inverse, there & (rank >= K))
    return m, s


@triton.jit
def _select_kernel(
    z_ptr, bias_ptr, top_ptr, sum_ptr, list_ptr, value_ptr, id_ptr, count_ptr, rest_max_ptr, rest_sum_ptr,
    out_value_ptr, out_index_ptr, out_tail_ptr,
    N, V, first, C, J, K, SLOTS, ROOM,
    stride_bv,
    scale: tl.float64, inverse_temperature: tl.float64,
    FINISHED: tl.constexpr, INT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, KNOWN: tl.constexpr, HELD: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, one slab: from its blocks to candidates for the next slab, or after the last one to the results.

    What one thread stores and another loads goes through the tokens' scratch, with a barrier in between.
    """
    LEAST = _least(INT)
    inverse = number(inverse_temperature, ACC)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slab = z_ptr, bias_ptr, list_ptr, first, C, J, SLOTS, stride_bv, number(scale, ACC)
    lists = value_ptr, id_ptr, n, ROOM
    later = (n < N) & (first > 0)
    count = tl.load(count_ptr + n, mask=later, other=0).to(tl.int32)
    m = tl.load(rest_max_ptr + n, mask=later, other=float("-inf"))
    s = tl.load(rest_sum_ptr + n, mask=later, other=0.0)

    # The k-th largest of the block maxima and of KNOWN candidates, or less than any where there are fewer than k.
    j = tl.arange(0, BLOCKS)
    inside = (n < N)[:, None] & (j < J)[None, :]
    here = tl.max_contiguous(n[:, None] * J + j[None, :], [1, 1])  # as in `_candidates`
    top = tl.load(top_ptr + here, mask=inside, other=LEAST)
    z, _here, there = _candidates(lists, count, 0, KNOWN)
    known = tl.where(there, ordered(z), LEAST)
    bound, reach = tl.full([ROWS], LEAST, INT), count * 0 - 1
    i = 0
    while (i < top.dtype.primitive_bitwidth // 2) & (tl.max((reach != K).to(tl.int32), 0) > 0):
        low, middle, high = _next_digit(bound, i)
        at_low = tl.sum((top >= low[:, None]).to(tl.int32), 1)
        at_middle = tl.sum((top >= middle[:, None]).to(tl.int32), 1)
        at_high = tl.sum((top >= high[:, None]).to(tl.int32), 1)
        if KNOWN > 1:
            at_low += tl.sum((known >= low[:, None]).to(tl.int32), 1)
            at_middle += tl.sum((known >= middle[:, None]).to(tl.int32), 1)
            at_high += tl.sum((known >= high[:, None]).to(tl.int32), 1)
        bound, reach = _step(bound, reach, low, middle, high, at_low, at_middle, at_high, K)
        i += 1

    above = top > bound[:, None]
    equal = (top == bound[:, None]) & inside
    places = K - tl.sum(above.to(tl.int32), 1) - tl.sum((known >= bound[:, None]).to(tl.int32), 1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= places[:, None]))
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(list_ptr + n[:, None] * SLOTS + slot, j[None, :] + slot * 0, mask=chosen)
    blocks = tl.sum(chosen.to(tl.int32), 1)
    passed = inside & (chosen == 0)
    total = tl.load(sum_ptr + here, mask=passed, other=0.0)
    m, s = _add_sums(m, s, tl.where(passed, unordered(top) * inverse, float("-inf")), total)
    tl.debug_barrier()

    old, places, m, s = _keep_candidates(lists, count, bound, places, m, s, inverse, False, HELD)
    kept, rest_max, rest_sum, right = _keep_elements(
        slab, lists, blocks, old, bound, places, m, s, inverse, False, FINISHED, COLUMNS, BLOCK
    )
    if tl.min(right.to(tl.int32), 0) == 0:
        # Again, with the exact k-th largest and careful sums; the other tokens of this program have theirs.
        tl.debug_barrier()
        exact, reach = tl.full([ROWS], LEAST, INT), tl.where(right, K, -1)
        i = 0
        while (i < top.dtype.primitive_bitwidth // 2) & (tl.max((reach != K).to(tl.int32), 0) > 0):
            low, middle, high = _next_digit(exact, i)
            at_low, at_middle, at_high = _reach_in_lists(
                slab, lists, blocks, old, low, middle, high, FINISHED, HELD, COLUMNS, BLOCK
            )
            exact, reach = _step(exact, reach, low, middle, high, at_low, at_middle, at_high, K)
            i += 1
        # Exactly k reach it, or it is the k-th itself and fewer are above: with k of those at it there is room for all.
        places = tl.full([ROWS], 0, tl.int32) + K
        count = tl.where(right, 0, old)
        blocks = tl.where(right, 0, blocks)
        again, places, m, s = _keep_candidates(lists, count, exact, places, m, s, inverse, True, HELD)
        again, m, s, _right = _keep_elements(
            slab, lists, blocks, again, exact, places, m, s, inverse, True, FINISHED, COLUMNS, BLOCK
        )
        kept = tl.where(right, kept, again)
        rest_max, rest_sum = tl.where(right, rest_max, m), tl.where(right, rest_sum, s)

    if first + C < V:
        tl.store(count_ptr + n, kept, mask=n < N)
        tl.store(rest_max_ptr + n, rest_max, mask=n < N)
        tl.store(rest_sum_ptr + n, rest_sum, mask=n < N)
    else:
        tl.debug_barrier()
        rest_max, rest_sum = _write_best(
            lists, kept, out_value_ptr, out_index_ptr, K, rest_max, rest_sum, inverse, RANKED, COMPARED
        )
        tl.store(out_tail_ptr + n, origin(rest_max) + tl.log(rest_sum), mask=n < N)


# --- launchers -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a call is cut: tokens at a time, columns of a slab, columns of a block, and which kernel multiplies."""

    tokens: int
    columns: int
    block: int
    skinny: bool


def token_elements(columns: int, k: int, block: int) -> list[int]:
    """Elements a token has of the slab (whole blocks), of maxima and sums of its blocks, of chosen blocks, of values and ids
    of candidates, of their count, and of the maximum and the sum of the rest."""
    blocks, room = cdiv(columns, block), tiles.topk_room(k)
    return [blocks * block, blocks, blocks, min(k, blocks), room, room, 1, 1, 1]


def plan(n: int, v: int, k: int, itemsize: int, budget: int, arch: int = 0) -> Plan:
    """Products of many tokens over as few slabs of the vocabulary as fit into `budget` bytes."""
    block = tiles.topk_block(k, v)
    limit, elements = tiles.CHOOSE_ELEMENTS * block, functools.partial(token_elements, k=k, block=block)
    tokens, columns = cut_logits(n, v, block, limit, elements, itemsize, budget, arch)
    return Plan(tokens, columns, block, n <= tiles.measured_number("TOPK_SKINNY_TOKENS", arch))


def linear_topk(
    hidden: Tensor, head: LMHead, k: int, temperature: float, *, cut: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values `[N, K]` in ACC, descending; indices `[N, K]` int64; tail `[N]` in ACC), 1 <= k <= V.

    `cut` replaces the plan, for tests and measurements.
    """
    n, v, device = hidden.shape[0], head.weight.shape[0], hidden.device
    values = torch.empty(n, k, dtype=head.acc, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    tail = torch.empty(n, dtype=head.acc, device=device)
    if n:
        arch = tiles.architecture(device)
        cut = cut or plan(n, v, k, head.acc.itemsize, workspace_bytes(device), arch)
        elements = token_elements(cut.columns, k, cut.block)
        scratch = allocate([min(n, cut.tokens) * count for count in elements], head.acc, device)
        for start in range(0, n, cut.tokens):
            rows = slice(start, start + cut.tokens)
            results = values[rows], indices[rows], tail[rows]
            _topk_of_tokens(hidden[rows], head, 1.0 / temperature, cut, arch, scratch, *results)
    return values, indices, tail


def _topk_of_tokens(
    hidden: Tensor,
    head: LMHead,
    inverse_temperature: float,
    cut: Plan,
    arch: int,
    scratch: tuple[Tensor, ...],
    values: Tensor,
    indices: Tensor,
    tail: Tensor,
) -> None:
    """One block of tokens through all slabs, into views of the outputs."""
    (n, k), (v, d), block = values.shape, head.weight.shape, cut.block
    acc, bias, stride_bv = ACCUMULATORS[head.acc], head.bias, 0 if head.bias is None else head.bias.stride(0)
    integer, in_torch = (tl.int64, torch.int64) if acc == tl.float64 else (tl.int32, torch.int32)
    slab, top, total, chosen, value, ids, count, rest_max, rest_sum = scratch
    top, chosen, ids, count = (x.view(in_torch) for x in (top, chosen, ids, count))
    blocks = cdiv(cut.columns, block)
    fold = tiles.fold_tile(arch, block, head.acc.itemsize)
    skinny = tiles.skinny_tile(arch, head.weight.element_size(), n)
    select = tiles.select_tile(k, blocks, block)
    for first in range(0, v, cut.columns):
        c = min(cut.columns, v - first)
        j = cdiv(c, block)
        if cut.skinny:
            _skinny_kernel[(cdiv(c, skinny.vocabulary),)](
                hidden, head.weight, bias, slab, top, total,
                n, d, first, c, j,
                *hidden.stride(), *head.weight.stride(), stride_bv,
                head.softcap or 0.0, head.scale, inverse_temperature,
                HAS_SOFTCAP=head.softcap is not None, ACC=acc,
                NATIVE=not INTERPRETED and acc == tl.float32 and hidden.dtype == head.weight.dtype,
                TOKENS=max(16, next_power_of_2(n)), VOCABULARY=skinny.vocabulary, DEPTH=skinny.depth, BLOCK=block,
                num_warps=skinny.warps, num_stages=skinny.stages,
            )  # fmt: skip
        else:
            z = slab[: n * j * block].view(n, j * block)[:, :c]
            product(hidden, head.weight[first : first + c].T, out=z)
            _fold_kernel[(require_grid(cdiv(n * j, fold.blocks), "linear_topk"),)](
                slab, bias, top, total,
                n * j, first, c, j,
                stride_bv,
                head.softcap or 0.0, head.scale, inverse_temperature,
                HAS_SOFTCAP=head.softcap is not None, RAGGED=c % block != 0, ACC=acc,
                BLOCKS=fold.blocks, BLOCK=block, PIECE=fold.piece, num_warps=fold.warps,
            )  # fmt: skip
        _select_kernel[(cdiv(n, select.tokens),)](
            slab, bias, top, total, chosen, value, ids, count, rest_max, rest_sum,
            values, indices, tail,
            n, v, first, c, j, k, min(k, blocks), tiles.topk_room(k),
            stride_bv,
            head.scale, inverse_temperature,
            FINISHED=cut.skinny or head.softcap is not None, INT=integer, ACC=acc,
            ROWS=select.tokens, BLOCKS=next_power_of_2(blocks),
            KNOWN=1 if cut.columns >= v else select.held, HELD=select.held,
            COLUMNS=select.columns, BLOCK=block, RANKED=select.ranked, COMPARED=select.compared,
            num_warps=select.warps, num_stages=1,
        )  # fmt: skip
