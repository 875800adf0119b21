"""Portable low-memory torch: what a CPU user gets, and every device without a fused kernel.

No step holds `[N, V]` logits or an `[N, K, D]` gather. Log-sum-exps and statistics fold vocabulary tiles into running
sums, gathers take a few tokens' rows of W at a time (`projection` cuts the pieces). Top-k selection is in
`chunked_topk`, losses that read all logits of a token are in `dense_chunks`. Functions take checked, flattened tensors, write none of
their inputs and never synchronise with a GPU. Must not know triton.

Legend: N tokens, D hidden size, V vocabulary, K selected ids, T temperature, C columns of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import projection
from .projection import (
    Projection,
    chunk_logits,
    locate,
    row_blocks,
    row_chunks,
    rows_that_fit,
    vocab_tiles,
    with_spare_column,
)
from .running import RunningLogsumexp, RunningStats

_GATHER_BYTES = 4 * 2**20
# With more than V / this many ids a token all logits are cheaper than K rows of W; by whether W is in the dtype of the
# sums already (`benchmarks/gather_crossover.py`).
_MANY_IDS = {True: 16, False: 10}


# --- folds over the vocabulary ---------------------------------------------------------------------------------


def complement_and_values(
    hidden: Tensor, head: Projection, indices: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(tail `[N]`, values `[N, K]`, d tail / d h `[N, D]` or empty).

    tail = log sum over j not in ids of exp(z_j / T), values = z at the ids. The gradient of the tail is a softmax
    average of rows of W, so it is summed along like the exponentials themselves and costs one more product; the
    backward pass then needs none. An index below 0 is an absent slot: value -inf, nothing excluded.
    """
    n, k, device = hidden.shape[0], indices.shape[1], hidden.device
    tail = torch.empty(n, dtype=head.acc, device=device)
    values = torch.full((n, k), -torch.inf, dtype=head.acc, device=device)
    dtail = torch.zeros((n, hidden.shape[1]) if with_gradient else (0,), dtype=head.acc, device=device)
    for rows in row_blocks(n):
        h, ids = hidden[rows].to(head.acc), indices[rows]
        running = RunningLogsumexp(h.shape[0], h)
        for columns, size, weight, z in vocab_tiles(h, head):
            slope = head.slope(z) if with_gradient else 1.0
            if k:
                inside, local = locate(ids, columns, size)
                spare = with_spare_column(z)
                values[rows] = torch.where(inside, spare.gather(1, local), values[rows])
                spare.scatter_(1, local, -torch.inf)
            weights, rescale = running.add(z if temperature == 1.0 else z.div_(temperature))
            if with_gradient:
                dtail[rows].mul_(rescale[:, None]).addmm_(weights.mul_(slope), weight)
        tail[rows] = running.result()
        if with_gradient:
            total = running.sum.masked_fill(running.sum == 0, 1)  # nothing left over: no gradient
            dtail[rows].div_(total[:, None] * temperature)
    tail.masked_fill_((indices >= head.weight.shape[0]).any(1), torch.nan)
    return tail, _mark_ids(values, indices, head), dtail


def complement_and_values_backward(
    grad_tail: Tensor,
    grad_values: Tensor,
    tail: Tensor,
    values: Tensor,
    dtail: Tensor,
    hidden: Tensor,
    head: Projection,
    indices: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) in `dtype`, that of the inputs unless given.

    dh from what the forward pass summed; dW and db from recomputed tiles, each written once.
    """
    dhidden = dweight = dbias = None
    dx = _slope_at(grad_values, values, head).masked_fill(indices < 0, 0)
    if need_hidden:
        sparse = _sum_of_rows(head.weight, indices.clamp(0, head.weight.shape[0] - 1), dx)
        dhidden = sparse.addcmul_(grad_tail[:, None], dtail).to(dtype or hidden.dtype)
    if need_weight or need_bias:
        out = dtype or head.weight.dtype
        dweight, dbias = _complement_weight_gradient(
            grad_tail, dx, tail, hidden, head, indices, temperature, need_weight, need_bias, out
        )
    return dhidden, dweight, dbias


def _complement_weight_gradient(
    grad_tail: Tensor,
    dx: Tensor,
    tail: Tensor,
    hidden: Tensor,
    head: Projection,
    indices: Tensor,
    temperature: float,
    need_weight: bool,
    need_bias: bool,
    out: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    v, d = head.weight.shape
    blocks = list(row_blocks(hidden.shape[0]))
    # One block of rows finishes a slice of dW at once; several add up in fp32 before the cast.
    direct = len(blocks) <= 1
    dtype = out if direct else head.acc
    dweight = torch.zeros(v, d, dtype=dtype, device=hidden.device) if need_weight else None
    dbias = torch.zeros(v, dtype=head.acc, device=hidden.device) if need_bias else None
    for rows in blocks:
        h, ids = hidden[rows].to(head.acc), indices[rows]
        origin = tail[rows].masked_fill(tail[rows] == -torch.inf, 0)[:, None]
        factor = grad_tail[rows, None] / temperature
        for columns, size, _, z in vocab_tiles(h, head, copies=4):
            slope = head.slope(z)
            _, local = locate(ids, columns, size)
            dz = z.div_(temperature).sub_(origin).exp_().mul_(factor).mul_(slope)
            spare = with_spare_column(dz)
            spare.scatter_(1, local, 0).scatter_add_(1, local, dx[rows])
            if dweight is not None:
                if direct:
                    dweight[columns] = dz.T @ h
                else:
                    dweight[columns].addmm_(dz.T, h)
            if dbias is not None:
                dbias[columns] += dz.sum(0)
    return None if dweight is None else dweight.to(out), None if dbias is None else dbias.to(out)


def token_stats(
    hidden: Tensor, head: Projection, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-sum-exp, entropy, variance of the log-probability, log p of the labels or None), each `[N]`, in one pass.

    With m the largest logit, R = sum exp(z - m) without its own 1, and the mean of z - m under p: the log-sum-exp is
    m + log(1 + R), H = log(1 + R) - mean, log p(y) = (z_y - m) - log(1 + R). Entropy and the log-probability of a
    certain label are sums of terms of one sign and keep their digits (logsumexp - mean z would lose all).
    """
    n = hidden.shape[0]
    out = torch.empty(4, n, dtype=head.acc, device=hidden.device)
    for rows in row_blocks(n):
        h = hidden[rows].to(head.acc)
        stats, value = RunningStats(h.shape[0], h), h.new_full((h.shape[0], 1), torch.nan)
        for columns, size, _, z in vocab_tiles(h, head, copies=5):
            if labels is not None:
                inside, local = locate(labels[rows, None], columns, size)
                value = torch.where(inside, with_spare_column(z).gather(1, local), value)
            stats.add(z)
        log_total = stats.rest.log1p().masked_fill_(
            stats.max.isinf(), torch.nan
        )  # where there is no distribution
        out[0, rows] = stats.max.where(stats.max.isinf(), stats.max + log_total)
        out[1, rows], out[2, rows] = log_total - stats.mean, stats.variance + 0 * log_total
        out[3, rows] = value[:, 0] - stats.max - log_total
    logsumexp, entropy, variance, logprob = (x.clone() for x in out)
    return logsumexp, entropy, variance, None if labels is None else logprob


# --- the sparse student: logits at given ids -------------------------------------------------------------------


def _gather_chunk(k: int, d: int, acc: torch.dtype) -> int:
    return max(1, _GATHER_BYTES // max(k * d * acc.itemsize, 1))


def linear_gather(hidden: Tensor, head: Projection, indices: Tensor) -> Tensor:
    """`[N, K]` z at `indices`; -inf where an index is below 0, NaN from V on."""
    (n, k), v = indices.shape, head.weight.shape[0]
    ids = indices.clamp(0, v - 1)
    step = rows_that_fit(n, v, head.acc, copies=1)
    many = k * _MANY_IDS[head.weight.dtype == head.acc] >= v and step >= projection.ENOUGH_ROWS
    values = gather_from_logits(hidden, head, ids, step) if many else gather_rows(hidden, head, ids)
    return _mark_ids(values, indices, head)


def gather_from_logits(hidden: Tensor, head: Projection, ids: Tensor, step: int) -> Tensor:
    """z at `ids` (in range) out of all logits of `step` tokens at a time: 2 N D V FLOP, the way for many ids."""
    values = torch.empty(ids.shape, dtype=head.acc, device=hidden.device)
    for rows in row_chunks(ids.shape[0], step):
        torch.gather(chunk_logits(hidden[rows], head), 1, ids[rows], out=values[rows])
    return values


def gather_rows(hidden: Tensor, head: Projection, ids: Tensor) -> Tensor:
    """z at `ids` (in range) from their rows of W, those of a few tokens at a time."""
    n, k = ids.shape
    values = torch.empty(n, k, dtype=head.acc, device=hidden.device)
    step = _gather_chunk(k, hidden.shape[1], head.acc)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        gathered = F.embedding(ids[rows], head.weight).to(head.acc)
        # A sum by halves, as exact as the blocked product that chose the ids (a dot product that adds in one run is
        # 10 eps off), and faster than a batch of matrix-vector products.
        values[rows] = gathered.mul_(hidden[rows, None].to(head.acc)).sum(-1)
    return head.finish(values, None if head.bias is None else head.bias.to(head.acc)[ids])


def _mark_ids(values: Tensor, indices: Tensor, head: Projection) -> Tensor:
    return values.masked_fill_(indices < 0, -torch.inf).masked_fill_(
        indices >= head.weight.shape[0], torch.nan
    )


def _slope_at(grad: Tensor, values: Tensor, head: Projection) -> Tensor:
    return grad.to(head.acc) * head.slope(values)


def _sum_of_rows(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`[N, D]` sum_k weights[n, k] table[ids[n, k]], in the dtype of `weights`."""
    if ids.numel() == 0:
        return weights.new_zeros(ids.shape[0], table.shape[1])
    if table.dtype == weights.dtype:
        return F.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")
    n, k = ids.shape
    out = weights.new_empty(n, table.shape[1])
    step = _gather_chunk(k, table.shape[1], weights.dtype)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        gathered = F.embedding(ids[rows], table).to(weights.dtype)
        torch.bmm(weights[rows, None, :], gathered, out=out[rows, None, :])
    return out


def linear_gather_backward(
    grad: Tensor,
    values: Tensor,
    hidden: Tensor,
    head: Projection,
    indices: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) of `linear_gather`: sparse however many ids there are (`benchmarks/gather_crossover.py`).

    dW row v is a sum over the (token, slot) pairs that chose id v. Sorted by id (stable), those pairs are
    consecutive: one bag of hidden rows per vocabulary row, which also writes the zeros of the rows nobody chose.
    No atomics, so two runs are bitwise equal.
    """
    dhidden = dweight = dbias = None
    absent = indices < 0
    dx = _slope_at(grad, values, head).masked_fill(absent, 0)
    ids = indices.clamp(0, head.weight.shape[0] - 1)
    if need_hidden:
        dhidden = _sum_of_rows(head.weight, ids, dx).to(hidden.dtype)
    if need_weight or need_bias:
        v = head.weight.shape[0]
        order = torch.sort(ids.flatten(), stable=True)
        pair_dx = dx.flatten()[order.indices]
        starts = torch.searchsorted(order.values, torch.arange(v, device=ids.device))
        if need_weight:
            tokens = order.indices // max(ids.shape[1], 1)
            h = hidden.to(head.acc)
            dweight = F.embedding_bag(tokens, h, starts, per_sample_weights=pair_dx, mode="sum")
            dweight = dweight.to(head.weight.dtype)
        if need_bias:
            dbias = F.embedding_bag(
                torch.zeros_like(order.indices),
                pair_dx.new_ones(1, 1),
                starts,
                per_sample_weights=pair_dx,
                mode="sum",
            )
            dbias = dbias[:, 0].to((hidden if head.bias is None else head.bias).dtype)
    return dhidden, dweight, dbias
