"""Logits at given ids and losses that need no others, in portable torch: no pass over the vocabulary.

Rows of W are gathered a few tokens at a time, never `[N, K, D]`.

Legend: N tokens, D hidden size, V vocabulary, K ids of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..dispatch import acc_dtype, grad_dtype, workspace_bytes
from ..head import LMHead, Need
from ..options import Divergence
from ..products import batched_product, scaled
from . import cuts
from .cuts import chunk_logits, row_chunks, rows_that_fit
from .topk_divergence import divergence_and_gradient

_SUMMED = 128  # products of halves that are added in one run
_GATHER_BYTES = 4 * 2**20  # of gathered rows on a CPU: they stay in the last-level cache
# With more than V / this many ids a token all logits are cheaper than K rows of W; by whether W is in the dtype of the
# sums already. On a CPU by `benchmarks/gather_crossover.py`; on a GPU a row is moved three times at 4 TB/s, and 600 TFLOP/s
# of halves or 50 of fp32 are multiplied.
_MANY_IDS = {True: 16, False: 10}
_MANY_IDS_ON_A_GPU = {True: 64, False: 256}


def _pieces(ids: Tensor, table: Tensor) -> list[slice]:
    """The tokens whose rows of the table are gathered together."""
    (n, k), device = ids.shape, table.device
    halves = dispatch.half_products(device, table.dtype)
    item = table.element_size() if halves else acc_dtype(table.dtype).itemsize
    # On a GPU rows that are upcast, and those rows times hidden states, lie beside what was gathered.
    room = workspace_bytes(device) // (2 if halves else 4) if cuts.asynchronous(device) else _GATHER_BYTES
    return list(row_chunks(n, room // max(k * table.shape[1] * item, 1)))


def linear_gather(hidden: Tensor, head: LMHead, indices: Tensor) -> Tensor:
    """`[N, K]` z at `indices`; -inf where an index is below 0, NaN from V on."""
    ids = indices.clamp(0, len(head.weight) - 1)
    if step := _rows_of_logits(head, *indices.shape):
        values = gather_from_logits(hidden, head, ids, step)
    else:
        values = gather_rows(hidden, head, ids)
    return mark_ids(values, indices, head)


def _rows_of_logits(head: LMHead, n: int, k: int) -> int:
    """How many tokens' logits are made at a time where that is cheaper than gathering k rows of W; else 0."""
    many_ids = _MANY_IDS_ON_A_GPU if cuts.asynchronous(head.weight.device) else _MANY_IDS
    if k * many_ids[head.weight.dtype == head.acc] < len(head.weight):
        return 0
    step = rows_that_fit(n, head, copies=1)
    return step if step >= cuts.ENOUGH_ROWS else 0


def gather_from_logits(hidden: Tensor, head: LMHead, ids: Tensor, step: int) -> Tensor:
    """z at `ids` (in range) out of all logits of `step` tokens at a time: 2 N D V FLOP, the way for many ids."""
    values = torch.empty(ids.shape, dtype=head.acc, device=hidden.device)
    for rows in row_chunks(ids.shape[0], step):
        torch.gather(chunk_logits(hidden[rows], head), 1, ids[rows], out=values[rows])
    return values


def gather_rows(hidden: Tensor, head: LMHead, ids: Tensor) -> Tensor:
    """z at `ids` (in range) from their rows of W, those of a few tokens at a time."""
    values = torch.empty(ids.shape, dtype=head.acc, device=hidden.device)
    for rows in _pieces(ids, head.weight):
        values[rows] = _dots(F.embedding(ids[rows], head.weight), hidden[rows])
    return head.finish_(values, None if head.bias is None else head.bias.to(head.acc)[ids])


def _dots(gathered: Tensor, hidden: Tensor) -> Tensor:
    """`[n, K]` of rows `[n, K, D]` and hidden states `[n, D]`; overwrites what was gathered."""
    if dispatch.half_products(gathered.device, gathered.dtype):
        # A tensor core cuts off what a sum cannot hold, always downwards: over all of D that is more than 10 eps.
        parts = [
            batched_product(gathered[:, :, d], hidden[:, d, None])
            for d in row_chunks(hidden.shape[1], _SUMMED)
        ]
        return torch.stack(parts).sum(0)[:, :, 0]
    # A sum by halves, as exact as the blocked product that chose the ids (a dot product that adds in one run is
    # 10 eps off), and faster than a batch of matrix-vector products.
    acc = acc_dtype(gathered.dtype)
    return gathered.to(acc).mul_(hidden[:, None].to(acc)).sum(-1)


def mark_ids(values: Tensor, indices: Tensor, head: LMHead) -> Tensor:
    values.masked_fill_(indices < 0, -torch.inf)
    return values.masked_fill_(indices >= head.weight.shape[0], torch.nan)


def sum_of_rows(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`[N, D]` sum_k weights[n, k] table[ids[n, k]], in the dtype of `weights`."""
    if ids.numel() == 0:
        return weights.new_zeros(ids.shape[0], table.shape[1])
    if table.dtype == weights.dtype:
        return F.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")
    out = weights.new_empty(ids.shape[0], table.shape[1])
    for rows in _pieces(ids, table):
        _weighted_sums(weights[rows], F.embedding(ids[rows], table), out[rows])
    return out


def _weighted_sums(weights: Tensor, gathered: Tensor, out: Tensor) -> None:
    """out `[n, D]` = sum_k weights[n, k] gathered[n, k]"""
    if not dispatch.half_products(gathered.device, gathered.dtype):
        torch.bmm(weights[:, None, :], gathered.to(weights.dtype), out=out[:, None, :])
        return
    factors, gain = scaled(weights, gathered.dtype)
    out.copy_(batched_product(factors[:, None, :], gathered)[:, 0])
    if gain is not None:
        out /= gain


def linear_gather_backward(
    hidden: Tensor,
    head: LMHead,
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    need: Need,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) of `linear_gather`: sparse however many ids there are (`benchmarks/gather_crossover.py`).

    dW row v is a sum over the (token, slot) pairs that chose id v. Sorted by id (stable), those pairs are
    consecutive: one bag of hidden rows per vocabulary row, which also writes the zeros of the rows nobody chose.
    No atomics, so two runs are bitwise equal.
    """
    dhidden = dweight = dbias = None
    dx = (grad * head.slope(values)).masked_fill(indices < 0, 0)
    ids = indices.clamp(0, head.weight.shape[0] - 1)
    if need.hidden:
        dhidden = sum_of_rows(head.weight, ids, dx).to(hidden.dtype)
    if need.weight or need.bias:
        v = head.weight.shape[0]
        order = torch.sort(ids.flatten(), stable=True)
        pair_dx = dx.flatten()[order.indices]
        starts = torch.searchsorted(order.values, torch.arange(v, device=ids.device))
        tokens = order.indices // max(ids.shape[1], 1)
        if need.weight:
            dweight = _sums_of_pairs(hidden, tokens, starts, pair_dx)
        if need.bias:
            ones = pair_dx.new_ones(len(hidden), 1)
            dbias = _sums_of_pairs(ones, tokens, starts, pair_dx)[:, 0].to(hidden.dtype)
    return dhidden, dweight, dbias


def _sums_of_pairs(hidden: Tensor, tokens: Tensor, starts: Tensor, pair_dx: Tensor) -> Tensor:
    """`[V, D]` in the dtype of `hidden`, summed in that of `pair_dx`; on a GPU where they differ a slab of features at a time."""
    v, d, acc = len(starts), hidden.shape[1], pair_dx.dtype
    slab = d
    if hidden.dtype != acc and cuts.asynchronous(hidden.device):
        slab = max(1, workspace_bytes(hidden.device) // (2 * acc.itemsize * max(v + len(hidden), 1)))
    if slab >= d:
        bags = F.embedding_bag(tokens, hidden.to(acc), starts, per_sample_weights=pair_dx, mode="sum")
        return bags.to(hidden.dtype)
    dweight = hidden.new_empty(v, d)
    for features in row_chunks(d, slab):
        part = hidden[:, features].to(acc, memory_format=torch.contiguous_format)
        bags = F.embedding_bag(tokens, part, starts, per_sample_weights=pair_dx, mode="sum")
        dweight[:, features] = bags
    return dweight


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
    halves = dispatch.half_products(hidden.device, hidden.dtype)
    if need.hidden and halves and not _rows_of_logits(head, *indices.shape):
        return _topk_loss_by_pieces(hidden, head, indices, teacher, factor, spec)
    values = linear_gather(hidden, head, indices)
    loss, dvalues, _ = divergence_and_gradient(values, teacher, None, None, factor, spec)
    dhidden = None
    if need.hidden:
        dx = (dvalues * head.slope(values)).masked_fill(indices < 0, 0)
        ids = indices.clamp(0, head.weight.shape[0] - 1)
        dhidden = sum_of_rows(head.weight, ids, dx).to(grad_dtype(hidden.dtype))
    return loss, values, dvalues, dhidden


def _topk_loss_by_pieces(
    hidden: Tensor, head: LMHead, indices: Tensor, teacher: Tensor, factor: Tensor, spec: Divergence
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with dh, where what was gathered serves the logits and dh: rows of W are read once."""
    ids = indices.clamp(0, len(head.weight) - 1)
    bias = None if head.bias is None else head.bias.to(head.acc)[ids]
    loss, values, dvalues = factor.new_empty(len(ids)), torch.empty_like(teacher), torch.empty_like(teacher)
    dhidden = hidden.new_empty(hidden.shape, dtype=grad_dtype(hidden.dtype))
    for rows in _pieces(ids, head.weight):
        gathered = F.embedding(ids[rows], head.weight)
        z = head.finish_(_dots(gathered, hidden[rows]), None if bias is None else bias[rows])
        z = mark_ids(z, indices[rows], head)
        loss[rows], dz, _ = divergence_and_gradient(z, teacher[rows], None, None, factor[rows], spec)
        dx = (dz * head.slope(z)).masked_fill(indices[rows] < 0, 0)
        dh = dx.new_empty(len(dx), hidden.shape[1])
        _weighted_sums(dx, gathered, dh)
        values[rows], dvalues[rows], dhidden[rows] = z, dz, dh
    return loss, values, dvalues, dhidden
