"""Logits at given ids and losses that need no others, in portable torch: no pass over the vocabulary.

A few tokens' rows of W are gathered at a time, never `[N, K, D]`.

Legend: N tokens, D hidden size, V vocabulary, K ids of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import grad_dtype
from ..head import LMHead, Need
from ..options import Divergence
from . import cuts
from .cuts import chunk_logits, row_chunks, rows_that_fit
from .topk_divergence import divergence_and_gradient

_GATHER_BYTES = 4 * 2**20
# With more than V / this many ids a token all logits are cheaper than K rows of W; by whether W is in the dtype of the
# sums already (`benchmarks/gather_crossover.py`).
_MANY_IDS = {True: 16, False: 10}


def _gather_chunk(k: int, d: int, acc: torch.dtype) -> int:
    return max(1, _GATHER_BYTES // max(k * d * acc.itemsize, 1))


def linear_gather(hidden: Tensor, head: LMHead, indices: Tensor) -> Tensor:
    """`[N, K]` z at `indices`; -inf where an index is below 0, NaN from V on."""
    (n, k), v = indices.shape, head.weight.shape[0]
    ids = indices.clamp(0, v - 1)
    step = rows_that_fit(n, v, head.acc, copies=1)
    many = k * _MANY_IDS[head.weight.dtype == head.acc] >= v and step >= cuts.ENOUGH_ROWS
    values = gather_from_logits(hidden, head, ids, step) if many else gather_rows(hidden, head, ids)
    return mark_ids(values, indices, head)


def gather_from_logits(hidden: Tensor, head: LMHead, ids: Tensor, step: int) -> Tensor:
    """z at `ids` (in range) out of all logits of `step` tokens at a time: 2 N D V FLOP, the way for many ids."""
    values = torch.empty(ids.shape, dtype=head.acc, device=hidden.device)
    for rows in row_chunks(ids.shape[0], step):
        torch.gather(chunk_logits(hidden[rows], head), 1, ids[rows], out=values[rows])
    return values


def gather_rows(hidden: Tensor, head: LMHead, ids: Tensor) -> Tensor:
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
    return head.finish_(values, None if head.bias is None else head.bias.to(head.acc)[ids])


def mark_ids(values: Tensor, indices: Tensor, head: LMHead) -> Tensor:
    return values.masked_fill_(indices < 0, -torch.inf).masked_fill_(
        indices >= head.weight.shape[0], torch.nan
    )


def slope_at(grad: Tensor, values: Tensor, head: LMHead) -> Tensor:
    return grad.to(head.acc) * head.slope(values)


def sum_of_rows(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
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
    head: LMHead,
    indices: Tensor,
    need: Need,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) of `linear_gather`: sparse however many ids there are (`benchmarks/gather_crossover.py`).

    dW row v is a sum over the (token, slot) pairs that chose id v. Sorted by id (stable), those pairs are
    consecutive: one bag of hidden rows per vocabulary row, which also writes the zeros of the rows nobody chose.
    No atomics, so two runs are bitwise equal.
    """
    dhidden = dweight = dbias = None
    absent = indices < 0
    dx = slope_at(grad, values, head).masked_fill(absent, 0)
    ids = indices.clamp(0, head.weight.shape[0] - 1)
    if need.hidden:
        dhidden = sum_of_rows(head.weight, ids, dx).to(hidden.dtype)
    if need.weight or need.bias:
        v = head.weight.shape[0]
        order = torch.sort(ids.flatten(), stable=True)
        pair_dx = dx.flatten()[order.indices]
        starts = torch.searchsorted(order.values, torch.arange(v, device=ids.device))
        if need.weight:
            tokens = order.indices // max(ids.shape[1], 1)
            h = hidden.to(head.acc)
            dweight = F.embedding_bag(tokens, h, starts, per_sample_weights=pair_dx, mode="sum")
            dweight = dweight.to(head.weight.dtype)
        if need.bias:
            dbias = F.embedding_bag(
                torch.zeros_like(order.indices),
                pair_dx.new_ones(1, 1),
                starts,
                per_sample_weights=pair_dx,
                mode="sum",
            )
            dbias = dbias[:, 0].to((hidden if head.bias is None else head.bias).dtype)
    return dhidden, dweight, dbias


def topk_loss(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    teacher: Tensor,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(`[N]` factor * loss, `[N, K]` the student's logits, the gradient in them, dh) of a loss without a log-sum-exp."""
    values = linear_gather(hidden, head, indices)
    loss, dvalues, _ = divergence_and_gradient(values, teacher, None, None, factor, spec)
    dhidden = None
    if need.hidden:
        dx = slope_at(dvalues, values, head).masked_fill(indices < 0, 0)
        ids = indices.clamp(0, head.weight.shape[0] - 1)
        dhidden = sum_of_rows(head.weight, ids, dx).to(grad_dtype(hidden.dtype))
    return loss, values, dvalues, dhidden
