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
reads each of them once: a program holds a tile in registers and leaves (m, R, mu, Var) of every row's block. A second
kernel merges all blocks of a token at once: with w_j = exp(m_j - m) S_j, mu = sum w_j (mu_j + m_j - m) / S and
Var = sum w_j (Var_j + (mu_j + m_j - m - mu)^2) / S, both sums of what is near zero (Chan, Golub and LeVeque 1979).
Every number has one writer: two runs are bitwise equal.

Bytes and FLOP (calculated, at N 8192, D 4096, V 128256, bf16; no GPU measurement yet), G = 2 N D V = 8.6 TFLOP:

| step    | work              | reads and writes                       | bound by                          |
|---------|-------------------|----------------------------------------|-----------------------------------|
| product | 1 G               | W once a block of tokens, 4 N V written | product: 10.9 ms at library speed |
| fold    | ~12 N V + N V exp | 4 N V read once = 4.2 GB               | memory: 1.0 ms                    |
| merge   |                   | 16 N V / 512 = 33 MB                   | microseconds                      |

Workspace: slab and partial results of a block of tokens, by `plan` under `workspace_bytes()`.
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
    accumulator,
    current_device,
    finish,
    log1p,
    origin,
    product,
    require_device,
    require_grid,
    require_sizes,
)

# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _without_one_maximum(x, top, counted, terms):
    """Sum of the terms of each row but one of those where x is the row's maximum; 0 for a maximum of -inf."""
    largest = counted & (x == top[:, None])
    others = tl.sum(tl.where(counted & (x != top[:, None]), terms, 0.0), 1)
    ties = tl.sum(largest.to(terms.dtype), 1) - 1.0
    return others + tl.where(top == float("-inf"), 0.0, ties)


@triton.jit
def _fold_kernel(
    product_ptr, bias_ptr, label_ptr, top_ptr, rest_ptr, mean_ptr, variance_ptr, value_ptr,
    N, C, first, J,
    stride_bv, stride_l,
    softcap: tl.float64, scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LABEL: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, one block of a slab: its maximum, rest, mean and variance, and z of a label that lies in it."""
    blocks = tl.cdiv(C, COLUMNS)
    n = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    keep = (n < N)[:, None] & (c < C)[None, :]
    x = tl.load(product_ptr + n[:, None] * C + c[None, :], mask=keep, other=0.0).to(ACC)
    v = (first + c)[None, :]
    z = finish(x, v, bias_ptr, stride_bv, (c < C)[None, :], softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(keep, z, float("-inf"))
    if HAS_LABEL:
        label = tl.load(label_ptr + n * stride_l, mask=n < N, other=-1).to(tl.int64)
        here = v == label[:, None]
        value = tl.sum(tl.where(here & keep, z, 0.0), 1)
        inside = (label >= first + block * COLUMNS) & (label < first + tl.minimum((block + 1) * COLUMNS, C))
        tl.store(value_ptr + n, value, mask=(n < N) & inside)
    top = tl.max(z, 1)
    x = z - origin(top)[:, None]
    weights = tl.exp(x)
    rest = _without_one_maximum(z, top, keep, weights)
    total = rest + tl.where(top == float("-inf"), 0.0, 1.0)
    some = tl.where(total == 0, 1.0, total)
    x = tl.where(weights == 0, 0.0, x)
    mean = tl.sum(weights * x, 1) / some
    away = x - mean[:, None]
    variance = tl.sum(weights * away * away, 1) / some
    j = first // COLUMNS + block
    tl.store(top_ptr + n * J + j, top, mask=n < N)
    tl.store(rest_ptr + n * J + j, rest, mask=n < N)
    tl.store(mean_ptr + n * J + j, mean, mask=n < N)
    tl.store(variance_ptr + n * J + j, variance, mask=n < N)


@triton.jit
def _merge_kernel(
    top_ptr, rest_ptr, mean_ptr, variance_ptr, value_ptr,
    logsumexp_ptr, entropy_ptr, logprob_variance_ptr, logprob_ptr,
    N, J,
    HAS_LABEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: what all blocks of the vocabulary say together."""
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
    # A block's own largest term joins the rest, unless it is the largest of all.
    rest = _without_one_maximum(tops, top, keep, scales)
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
        value = tl.load(value_ptr + n, mask=n < N, other=0.0)
        logprob = tl.where(proper, value - top - log_total, float("nan"))
        tl.store(logprob_ptr + n, logprob, mask=n < N)


# --- launcher --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Tokens and columns of the logits that are there at a time, and columns of a block."""

    tokens: int
    columns: int
    block: int


def plan(n: int, v: int, itemsize: int) -> Plan:
    """Slabs of whole blocks for as many tokens as make W's slabs wide; a token's blocks are held beside them."""
    budget, block = workspace_bytes(), tiles.STATS_COLUMNS
    while triton.cdiv(v, block) > tiles.STATS_MERGE:
        block *= 2
    held = 4 * triton.cdiv(v, block) * itemsize
    tokens, wide = max(1, min(n, tiles.STATS_TOKENS)), min(v, tiles.STATS_SLAB_COLUMNS)
    while tokens > 1 and tokens * (held + wide * itemsize) > budget:
        tokens = triton.cdiv(tokens, 2)
    columns = (budget // tokens - held) // itemsize
    columns = min(max(columns // block * block, block), triton.cdiv(v, block) * block)
    # Slabs of one size.
    columns = triton.cdiv(triton.cdiv(v, triton.cdiv(v, columns)), block) * block
    return Plan(tokens, columns, block)


def token_stats(
    hidden: Tensor, head: LMHead, labels: Tensor | None, *, cut: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-sum-exp, entropy, variance of the log-probability, log p of the labels or None), each `[N]` in ACC.

    `cut` replaces the plan, for tests and measurements.
    """
    require_device(hidden=hidden, weight=head.weight, bias=head.bias, labels=labels)
    n, v, device = hidden.shape[0], head.weight.shape[0], hidden.device
    require_sizes("linear_token_stats", hidden=hidden.shape[1], weight=v)
    results = torch.empty(4 if labels is not None else 3, n, dtype=head.acc, device=device)
    if n:
        tokens, columns, block = cut or plan(n, v, head.acc.itemsize)
        count = min(tokens, n)
        logits = torch.empty(count * min(columns, v), dtype=head.acc, device=device)
        partial = torch.empty(4, count * triton.cdiv(v, block), dtype=head.acc, device=device)
        with current_device(hidden):
            for start in range(0, n, tokens):
                rows = slice(start, min(start + tokens, n))
                some = None if labels is None else labels[rows]
                _some_tokens(hidden[rows], head, some, columns, block, logits, partial, results[:, rows])
    logsumexp, entropy, variance, *logprob = results.unbind(0)
    return logsumexp.clone(), entropy.clone(), variance.clone(), logprob[0].clone() if logprob else None


def _some_tokens(hidden, head, labels, columns, block, logits, partial, results) -> None:
    """Write the results of one block of tokens, over logits and partial results of which only the memory is used."""
    (n, v), weight, bias = (hidden.shape[0], head.weight.shape[0]), head.weight, head.bias
    blocks, value = triton.cdiv(v, block), None
    if labels is not None:
        value = torch.full((n,), torch.nan, dtype=logits.dtype, device=logits.device)
    for first in range(0, v, columns):
        c = min(columns, v - first)
        z = logits[: n * c].view(n, c)
        product(hidden, weight[first : first + c].T, out=z)
        grid = triton.cdiv(n, tiles.STATS_ROWS) * triton.cdiv(c, block)
        _fold_kernel[(require_grid(grid, "linear_token_stats"),)](
            z, bias, labels, *partial, value,
            n, c, first, blocks,
            0 if bias is None else bias.stride(0), 0 if labels is None else labels.stride(0),
            head.softcap or 0.0, head.scale,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=head.softcap is not None, HAS_LABEL=labels is not None,
            ACC=accumulator(logits)[1],
            ROWS=tiles.STATS_ROWS, COLUMNS=block, num_warps=tiles.STATS_WARPS,
        )  # fmt: skip
    padded = triton.next_power_of_2(blocks)
    rows = max(1, tiles.STATS_MERGE // padded)
    _merge_kernel[(triton.cdiv(n, rows),)](
        *partial, value,
        *results[:3], None if labels is None else results[3],
        n, blocks,
        HAS_LABEL=labels is not None, ROWS=rows, COLUMNS=padded, num_warps=4,
    )  # fmt: skip
