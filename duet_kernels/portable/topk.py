"""Exact top-k of logits with their tail log-sum-exp, in portable torch: `linear_topk` of `chunked`.

    candidates    of a tile, what can be among the k largest: above a threshold; on a GPU, in the k best blocks of a row
    merged        with the k best so far by (value descending, id ascending), as soon as there are k new ones
    the tail      sums what stays in a tile and what a merge evicts, as it is passed over

The k-th largest of the maxima of disjoint groups is a lower bound of the k-th largest logit, and so is the k-th best so
far; what is below is no candidate. Values are compared as floats; integer keys decide where equals or NaNs leave doubt.

Legend: N tokens, V vocabulary, C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..dispatch import workspace_bytes
from ..head import LMHead
from ..products import operand
from . import cuts
from .cuts import (
    chunk_logits,
    divide_,
    row_blocks,
    row_chunks,
    rows_that_fit,
    vocab_tiles,
    whole_lines,
)
from .running import RunningLogsumexp

_KEY_COPIES = 14  # of the logits, in bytes: what sorting them with int64 keys and ids may take
_MANY_CANDIDATES = 16  # with more than V / this many ids a threshold hardly thins out a tile
_NO_ID = 2**32 - 1  # of an empty slot in top-k selection: after all ids


Selected = tuple[tuple[Tensor, Tensor], Tensor]  # (values, ids) of the k largest, the tail


def linear_topk(hidden: Tensor, head: LMHead, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(values `[N, K]`, indices `[N, K]`, tail log-sum-exp `[N]`), exact, equal logits by lowest id.

    By tiles of the vocabulary. A CPU takes whole rows where all logits are small, and a few at a time where most tiles
    would hold little else than candidates. A GPU takes whole rows, as many as fit.
    """
    n, device = hidden.shape[0], hidden.device
    values = torch.empty(n, k, dtype=head.acc, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    tail = torch.empty(n, dtype=head.acc, device=device)
    pieces, select = _pieces(n, head, k)
    for rows in pieces:
        (values[rows], indices[rows]), tail[rows] = select(operand(hidden[rows]), head, k, temperature)
    return values, indices, tail


def _pieces(n: int, head: LMHead, k: int) -> tuple[Iterator[slice], Callable[..., Selected]]:
    """(rows that are taken together, what selects their k largest)"""
    v, device = len(head.weight), head.weight.device
    if cuts.asynchronous(device):
        block = _block(v, k)
        sorted_share = min(1.0, 1 / block + k * block / v)  # of a row: the blocks' maxima, the candidates
        copies = 1 + math.ceil((_KEY_COPIES - 1) * sorted_share)
        return row_chunks(n, max(1, rows_that_fit(n, head, copies))), _topk_by_blocks
    step = rows_that_fit(n, head, copies=_KEY_COPIES)
    many = _MANY_CANDIDATES * k >= v and head.weight.dtype == head.acc and step >= cuts.ENOUGH_ROWS
    # So few logits are not worth cutting: then overhead would be most of it.
    room = min(cuts.TILE_BYTES // 4, workspace_bytes(device) // _KEY_COPIES)
    if n < 256 and n * v * head.acc.itemsize <= room:
        return iter([slice(n)]), _topk_of_rows
    if many:
        return row_chunks(n, step), _topk_of_rows
    return row_blocks(n, head), _topk_by_tiles


def _topk_of_rows(h: Tensor, head: LMHead, k: int, temperature: float) -> Selected:
    """The k largest of rows whose logits fit."""
    z = chunk_logits(h, head)
    running = RunningLogsumexp(z.shape[0], z)
    best = _take_best(z, torch.arange(z.shape[1]).expand_as(z), k, last=True)
    running.add(divide_(z, temperature))
    return best, running.result()


def _topk_by_blocks(h: Tensor, head: LMHead, k: int, temperature: float) -> Selected:
    """The same without a look at a value: the candidates are the k best blocks of columns.

    An element outside of them has k elements before it: each of those blocks holds one that is larger, or equal with a
    lower id. Only maxima of blocks and candidates are sorted by (value, id), which takes int64 keys.
    """
    z = chunk_logits(h, head)
    (n, v), block = z.shape, _block(z.shape[1], k)
    blocks, ids = v // block, torch.arange(v, device=z.device).expand(n, v)
    if blocks > 2 * k:
        maxima = z[:, : blocks * block].unflatten(1, (blocks, block)).amax(-1)
        _, chosen = _take_best(maxima, ids[:, :blocks], k, last=False)
        inside = chosen[:, :, None] * block + torch.arange(block, device=z.device)
        ids = torch.cat([inside.flatten(1), ids[:, blocks * block :]], 1)
    candidates = z.gather(1, ids)
    z.scatter_(1, ids, -torch.inf)
    running = RunningLogsumexp(n, z)
    running.add(divide_(z, temperature))
    best = _take_best(candidates, ids, k, last=True)
    running.add(divide_(candidates, temperature))
    return best, running.result()


def _block(v: int, k: int) -> int:
    """Columns of a block: about as many maxima as candidates are sorted."""
    return min(max(2 ** round(math.log2(v / k) / 2), 8), 128)


def _topk_by_tiles(h: Tensor, head: LMHead, k: int, temperature: float) -> Selected:
    """The same, by tiles of the vocabulary.

    A tile gives up the candidates, all of its elements that can be among the k largest; as soon as there are k new
    ones they are merged with the k best so far. What stays in the tile, and what a merge evicts, enters the tail as it
    is passed over: the complement is summed directly, never by subtraction.
    """
    running = RunningLogsumexp(h.shape[0], h)
    found, fresh, worst = [], 0, None
    parts = 5 if head.weight.dtype == head.acc else 8  # a tile of W that has to be cast is large itself
    for columns, _, z in vocab_tiles(h, head, _KEY_COPIES, parts):
        found.append(_above_threshold(z, columns.start, k, worst))
        running.add(divide_(z, temperature))
        fresh += found[-1][0].shape[1]
        last = columns.stop == head.weight.shape[0]
        if fresh >= k or last:
            values, ids = (torch.cat(side, 1) for side in zip(*found, strict=True))
            best = _take_best(values, ids, min(k, values.shape[1]), last)
            running.add(divide_(values, temperature))
            found, fresh, worst = [best], 0, best[0].amin(1, keepdim=True)
            worst.masked_fill_(worst.isnan(), -torch.inf)  # next to a NaN anything may belong
    return found[0], running.result()


def _above_threshold(z: Tensor, first_id: int, k: int, worst: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values, ids) `[N, most of a row]` of what can be among the k largest, in no order; -inf is left in its place.

    `worst` `[N, 1]` is the k-th largest so far: only something larger replaces it, because its id is lower. In the
    first tile the k-th largest of the maxima of groups stands in for it: k elements at least are as large. Group g
    holds the columns g, g + groups, g + 2 groups, ...: such maxima are taken at the speed of memory.
    """
    n, size = z.shape
    lanes = next((w for w in (16, 8, 4, 2) if size >= 2 * k * w), 1)
    grouped = whole_lines(z).unflatten(1, (lanes, -1))
    groups = grouped.shape[2]
    maxima = grouped.amax(1) if lanes > 1 else grouped[:, 0]
    passes_over = torch.le
    if worst is None and groups > k:
        worst, passes_over = torch.topk(maxima, k, sorted=False).values.amin(1, keepdim=True), torch.lt
        # Fewer than k groups may hold anything, or one of the best a NaN.
        worst = worst if bool((worst > -torch.inf).all()) else None
    # A NaN is not passed over. Lists of most of a tile are longer than the tile.
    if worst is None or int((hit := ~passes_over(maxima, worst)).sum()) > 0.6 * maxima.numel():
        ids = torch.arange(first_id, first_id + size).expand(n, size)
        values = z.clone()
        z.fill_(-torch.inf)
        return values, ids
    row, column = hit.nonzero().unbind(1)
    if lanes > 1:
        which, lane = (~passes_over(grouped[row, :, column], worst[row])).nonzero().unbind(1)
        row, column = row[which], column[which].add_(lane, alpha=groups)
    count = torch.bincount(row, minlength=n)
    # The survivors of a row stand next to each other: its slots, left to right.
    width = int(count.amax())
    slot = torch.arange(row.numel()).add_((torch.arange(n) * width - count.cumsum(0) + count)[row])
    values = z.new_full((n, width), -torch.inf)
    ids = torch.full((n, width), _NO_ID)
    values.view(-1)[slot] = z[row, column]
    ids.view(-1)[slot] = column + first_id
    z[row, column] = -torch.inf
    return values, ids


def _take_best(values: Tensor, ids: Tensor, k: int, last: bool) -> tuple[Tensor, Tensor]:
    """(values, ids) of the k that come first by (value descending, id ascending); -inf is left in their place.

    The `last` are in that order, others in any.
    """
    if not cuts.asynchronous(values.device):
        top = torch.topk(values, k, sorted=last)
        values.scatter_(1, top.indices, -torch.inf)
        if bool((values.amax(1) < top.values.amin(1)).all()):
            best = top.values, ids.gather(1, top.indices)
            return _equals_by_id(*best) if last else best
        values.scatter_(1, top.indices, top.values)  # the smallest of them has an equal, or there are NaNs
    at = _order(values, ids, k, last)
    best = values.gather(1, at), ids.gather(1, at)
    values.scatter_(1, at, -torch.inf)
    return best


def _equals_by_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Descending values; equal ones are put in the order of their ids, in place."""
    rows = (values[:, 1:] == values[:, :-1]).any(1).nonzero()[:, 0]
    if len(rows):
        ids[rows] = ids[rows].gather(1, _order(values[rows], ids[rows], values.shape[1], True))
    return values, ids


def _order(values: Tensor, ids: Tensor, k: int, in_order: bool) -> Tensor:
    """Positions of the k that come first by (value descending, id ascending)."""
    if values.dtype == torch.float64:
        by_id = ids.argsort(1)
        by_value = torch.sort(values.gather(1, by_id), dim=1, descending=True, stable=True).indices
        return by_id.gather(1, by_value[:, :k])
    # fp32 bits as an integer of the same order, above the complement of the id: unique keys, one top-k.
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    # A NaN stands before everything, whatever its sign bit (x86 makes inf - inf a negative one).
    upper = torch.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return torch.topk((upper.long() << 32) | (_NO_ID - ids), k, dim=1, sorted=in_order).indices
