"""Log-sum-exp, entropy and variance of the log-probability of each token, and log p of its label, in one pass over W.

    z[n,v] = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)        (no softcap: scale (h W^T + b))
    m = max z        R = sum of exp(z - m) over all ids but one at which z = m        S = 1 + R
    logsumexp = m + log(1 + R)              mu = sum exp(z - m) (z - m) / S
    H   = log(1 + R) - mu                   two terms >= 0: nothing cancels
    Var = sum exp(z - m) (z - m - mu)^2 / S
    log p(y) = (z[y] - m) - log(1 + R)

Legend: N tokens, D hidden size, V vocabulary, C columns of a slab, J blocks of the vocabulary, ACC fp32 (fp64 for fp64
inputs). Inputs have any strides. A NaN logit makes its token's results NaN; a label outside of [0, V) that of its label.

The sum goes without its largest term because that term is 1: an almost certain token has an R far below eps, which
1 + R would lose, and with it the entropy and, where the label is the certain one, its log-probability.

Pipeline. Logits come from the library's product, a slab of the vocabulary for a block of tokens in ACC. One kernel
reads each of them once: a program holds a few blocks of a token in registers and leaves (m, R, mu, Var) of each. A
second kernel merges all blocks of a token at once: with w_j = exp(m_j - m) S_j, mu = sum w_j (mu_j + m_j - m) / S and
Var = sum w_j (Var_j + (mu_j + m_j - m - mu)^2) / S, both sums of what is near zero (Chan, Golub and LeVeque 1979).
Every number has one writer: two runs are bitwise equal.

Bytes and FLOP (calculated, at N 8192, D 4096, V 128256, bf16), G = 2 N D V = 8.6 TFLOP:

| step    | work              | reads and writes                       | bound by                          |
|---------|-------------------|----------------------------------------|-----------------------------------|
| product | 1 G               | W once a block of tokens, 4 N V written | product: 10.9 ms at library speed |
| fold    | ~12 N V + N V exp | 4 N V read once = 4.2 GB               | memory: 1.0 ms at 4.3 TB/s        |
| merge   |                   | 16 N V / 512 = 33 MB                   | microseconds                      |

Workspace: slab and partial results of a block of tokens, in one allocation, by `plan` under `workspace_bytes()`.
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
    finish,
    log1p,
    origin,
    require_grid,
)
from .slabs import allocate, cut_logits
from .tiles import cdiv, next_power_of_2

# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _write_label(
    row, bias_ptr, label_ptr, value_ptr, part, first, C, stride_bv, softcap, scale,
    HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z of a token's label, by the first program that reads the token; a label in no slab is the first slab's NaN."""
    if part == 0:
        label = tl.load(label_ptr).to(tl.int64) - first
        here = (label >= 0) & (label < C)
        x = tl.load(row + label, mask=here, other=0.0).to(ACC)
        z = finish(x, first + label, bias_ptr, stride_bv, here, softcap, scale, HAS_SOFTCAP)
        tl.store(value_ptr, tl.where(here, z, float("nan")), mask=here | (first == 0))


@triton.jit
def _fold_kernel(
    z_ptr, bias_ptr, label_ptr, top_ptr, rest_ptr, mean_ptr, variance_ptr, value_ptr,
    PARTS, C, PITCH, first, J,
    stride_bv, stride_l,
    softcap: tl.float64, scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr, HAS_LABEL: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """BLOCKS consecutive blocks of one token's products: maximum, rest, mean and variance; and z of its label.

    A block is read in pieces that lie on top of each other, so that the first reduction is inside a thread. Rows of the
    slab hold whole blocks: only a RAGGED slab has columns past C, in its last block.
    """
    n = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    row = z_ptr + n * PITCH
    if HAS_LABEL:
        _write_label(
            row, bias_ptr, label_ptr + n * stride_l, value_ptr + n, part, first, C, stride_bv,
            softcap, scale, HAS_SOFTCAP, ACC,
        )  # fmt: skip
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    column = (
        block[:, None, None] * BLOCK
        + tl.arange(0, BLOCK // PIECE)[None, :, None] * PIECE
        + tl.arange(0, PIECE)[None, None, :]
    )
    whole = block * BLOCK < PITCH
    x = tl.load(row + column, mask=whole[:, None, None], other=0.0, eviction_policy="evict_first").to(ACC)
    inside = column < C
    z = finish(x, first + column, bias_ptr, stride_bv, inside, softcap, scale, HAS_SOFTCAP)
    if RAGGED:
        z = tl.where(inside, z, float("-inf"))
    top = tl.max(tl.max(z, 1), 1)
    x = z - origin(top)[:, None, None]
    weights = tl.exp(x)
    # One of those at the maximum is left out, the others at it are 1.
    largest = z == top[:, None, None]
    some = top != float("-inf")
    rest = tl.sum(tl.sum(tl.where(largest, 0.0, weights), 1), 1)
    rest += tl.where(some, tl.sum(tl.sum(largest.to(ACC), 1), 1) - 1.0, 0.0)
    total = rest + some.to(ACC)
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    x = tl.where(weights == 0, 0.0, x)
    mean = tl.sum(tl.sum(weights * x, 1), 1) * inverse
    away = x - mean[:, None, None]
    variance = tl.sum(tl.sum(weights * away * away, 1), 1) * inverse
    place = n * J + first // BLOCK + block
    tl.store(top_ptr + place, top, mask=whole)
    tl.store(rest_ptr + place, rest, mask=whole)
    tl.store(mean_ptr + place, mean, mask=whole)
    tl.store(variance_ptr + place, variance, mask=whole)


@triton.jit
def _merge_kernel(
    top_ptr, rest_ptr, mean_ptr, variance_ptr,
    logsumexp_ptr, entropy_ptr, logprob_variance_ptr, logprob_ptr,
    N, J,
    HAS_LABEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: what all blocks of the vocabulary say together; z of the label lies where its log p is written."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    keep = (n < N)[:, None] & (j < J)[None, :]
    at = n[:, None] * J + j[None, :]
    tops = tl.load(top_ptr + at, mask=keep, other=float("-inf"))
    rests = tl.load(rest_ptr + at, mask=keep, other=0.0)
    top = tl.max(tops, 1)
    shift = tops - origin(top)[:, None]
    scales = tl.exp(shift)
    weights = scales * (rests + tl.where(tops == float("-inf"), 0.0, 1.0))
    # A block's own largest term joins the rest, unless it is the largest of all; of several, one is left out.
    largest = keep & (tops == top[:, None])
    rest = tl.sum(tl.where(keep & (tops != top[:, None]), scales, 0.0), 1)
    ties = tl.sum(largest.to(scales.dtype), 1) - 1.0
    rest += tl.where(top == float("-inf"), 0.0, ties)
    rest += tl.sum(tl.where(rests == 0, 0.0, scales * rests), 1)
    total = rest + 1.0
    shift = tl.where(weights == 0, 0.0, shift) + tl.load(mean_ptr + at, mask=keep, other=0.0)
    mean = tl.sum(weights * shift, 1) / total
    away = shift - mean[:, None]
    variances = tl.load(variance_ptr + at, mask=keep, other=0.0)
    variance = tl.sum(weights * (variances + away * away), 1) / total
    log_total = log1p(rest)
    # Without a finite maximum there is no distribution.
    proper = tl.abs(top) < float("inf")
    tl.store(logsumexp_ptr + n, top + log_total, mask=n < N)
    tl.store(entropy_ptr + n, tl.where(proper, log_total - mean, float("nan")), mask=n < N)
    tl.store(logprob_variance_ptr + n, tl.where(proper, variance, float("nan")), mask=n < N)
    if HAS_LABEL:
        value = tl.load(logprob_ptr + n, mask=n < N, other=0.0)
        logprob = tl.where(proper, value - top - log_total, float("nan"))
        tl.store(logprob_ptr + n, logprob, mask=n < N)


# --- launcher --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Tokens and columns of the logits that are there at a time, and columns of a block."""

    tokens: int
    columns: int
    block: int


def token_elements(columns: int, v: int, block: int) -> list[int]:
    """Elements of workspace a token has: a row of the slab, in whole blocks, and four numbers a block of V."""
    return [cdiv(columns, block) * block, *[cdiv(v, block)] * 4]


def plan(n: int, v: int, itemsize: int, budget: int, arch: int = 0) -> Plan:
    """Products of many tokens over as few slabs of the vocabulary as fit into `budget` bytes."""
    block = tiles.STATS_COLUMNS
    while cdiv(v, block) > tiles.STATS_MERGE:
        block *= 2
    elements = functools.partial(token_elements, v=v, block=block)
    return Plan(*cut_logits(n, v, block, v, elements, itemsize, budget, arch), block)


def token_stats(
    hidden: Tensor, head: LMHead, labels: Tensor | None, *, cut: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-sum-exp, entropy, variance of the log-probability, log p of the labels or None), each `[N]` in ACC.

    `cut` replaces the plan, for tests and measurements.
    """
    n, v, device = hidden.shape[0], head.weight.shape[0], hidden.device
    names = 3 if labels is None else 4
    results = [torch.empty(n, dtype=head.acc, device=device) for _ in range(names)]
    if n:
        cut = cut or plan(n, v, head.acc.itemsize, workspace_bytes(device), tiles.architecture(device))
        elements = token_elements(cut.columns, v, cut.block)
        memory = allocate([min(n, cut.tokens) * count for count in elements], head.acc, device)
        for start in range(0, n, cut.tokens):
            rows = slice(start, start + cut.tokens)
            some = None if labels is None else labels[rows]
            _some_tokens(hidden[rows], head, some, cut, memory, [result[rows] for result in results])
    logsumexp, entropy, variance, *logprob = results
    return logsumexp, entropy, variance, logprob[0] if logprob else None


def _some_tokens(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor | None,
    cut: Plan,
    memory: tuple[Tensor, ...],
    results: list[Tensor],
) -> None:
    """Write the results of one block of tokens, over a slab and partial results of which only the memory is used."""
    (n, v), weight, bias = (hidden.shape[0], head.weight.shape[0]), head.weight, head.bias
    blocks = cdiv(v, cut.block)
    slab, *partial = memory
    logprob = None if labels is None else results[3]
    tile = tiles.stats_tile(cut.block, head.acc.itemsize)
    for first in range(0, v, cut.columns):
        c = min(cut.columns, v - first)
        pitch = cdiv(c, cut.block) * cut.block
        product(hidden, weight[first : first + c].T, out=slab[: n * pitch].view(n, pitch)[:, :c])
        parts = cdiv(pitch // cut.block, tile.blocks)
        _fold_kernel[(require_grid(n * parts, "linear_token_stats"),)](
            slab, bias, labels, *partial, logprob,
            parts, c, pitch, first, blocks,
            0 if bias is None else bias.stride(0), 0 if labels is None else labels.stride(0),
            head.softcap or 0.0, head.scale,
            HAS_SOFTCAP=head.softcap is not None, HAS_LABEL=labels is not None,
            RAGGED=c != pitch, ACC=ACCUMULATORS[head.acc],
            BLOCKS=tile.blocks, BLOCK=cut.block, PIECE=tile.piece, num_warps=tile.warps,
        )  # fmt: skip
    padded = next_power_of_2(blocks)
    rows = max(1, tiles.STATS_MERGE // padded)
    _merge_kernel[(cdiv(n, rows),)](
        *partial, *results[:3], logprob,
        n, blocks,
        HAS_LABEL=labels is not None, ROWS=rows, COLUMNS=padded, num_warps=4,
    )  # fmt: skip
