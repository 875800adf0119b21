"""Portable low-memory torch: what a CPU user gets, and every device without a fused kernel.

No step holds `[N, V]` logits (of more than 2 MiB) or an `[N, K, D]` gather. Top-k, log-sum-exps and statistics fold
vocabulary tiles into running sums, gathers take a few tokens' rows of W at a time (`projection` cuts the pieces);
losses that read all logits of a token are in `dense_chunks`. Functions take checked, flattened tensors, write none of
their inputs and never synchronise with a GPU. Must not know triton.

Legend: N tokens, D hidden size, V vocabulary, K selected ids, T temperature, C columns of a tile.
"""

from __future__ import annotations

import math

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
    whole_lines,
    with_spare_column,
)
from .workspace import workspace_bytes

_GATHER_BYTES = 4 * 2**20
# With more than V / this many ids a token all logits are cheaper than K rows of W; by whether W is in the dtype of the
# sums already (`benchmarks/gather_crossover.py`).
_MANY_IDS = {True: 16, False: 10}
_BLOCK = 16  # columns of a block, or of a group, in top-k selection
_KEY_COPIES = 14  # of the logits, in bytes: what sorting them with int64 keys and ids may take
_MANY_CANDIDATES = 16  # with more than V / this many ids a threshold hardly thins out a tile
_LOG2_E = math.log2(math.e)  # exp2 is several times faster than exp where torch leaves exp to MKL
_NO_ID = 2**32 - 1  # of an empty slot in top-k selection: after all ids


# --- folds over the vocabulary ---------------------------------------------------------------------------------


def linear_topk(
    hidden: Tensor, head: Projection, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(values `[N, K]`, indices `[N, K]`, tail log-sum-exp `[N]`), exact, equal logits by lowest id.

    By tiles of the vocabulary. A CPU takes whole rows where all logits are small, and a few at a time where most tiles
    would hold little else than candidates.
    """
    (n, v), device = (hidden.shape[0], head.weight.shape[0]), hidden.device
    values = torch.empty(n, k, dtype=head.acc, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    tail = torch.empty(n, dtype=head.acc, device=device)
    pieces, select = row_blocks(n), _topk_by_tiles
    if device.type == "cpu":
        step = rows_that_fit(n, v, head.acc, copies=_KEY_COPIES)
        many = _MANY_CANDIDATES * k >= v and head.weight.dtype == head.acc and step >= projection.ENOUGH_ROWS
        # So few logits are not worth cutting: then overhead would be most of it.
        room = min(projection.TILE_BYTES // 4, workspace_bytes() // _KEY_COPIES)
        if n < 256 and n * v * head.acc.itemsize <= room:
            pieces, select = [slice(n)], _topk_of_rows
        elif many:
            pieces, select = row_chunks(n, step), _topk_of_rows
    for rows in pieces:
        (values[rows], indices[rows]), tail[rows] = select(hidden[rows].to(head.acc), head, k, temperature)
    return values, indices, tail


def _topk_of_rows(
    h: Tensor, head: Projection, k: int, temperature: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((values, ids), tail) of rows whose logits fit."""
    z = chunk_logits(h, head)
    running = RunningLogsumexp(z.shape[0], z)
    best = _take_best(z, torch.arange(z.shape[1]).expand_as(z), k, last=True)
    running.add(z if temperature == 1.0 else z.div_(temperature))
    return best, running.result()


def _topk_by_tiles(
    h: Tensor, head: Projection, k: int, temperature: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The same, by tiles of the vocabulary.

    A tile gives up the candidates, all of its elements that can be among the k largest; as soon as there are k new
    ones they are merged with the k best so far. What stays in the tile, and what a merge evicts, enters the tail as it
    is passed over: the complement is summed directly, never by subtraction.
    """
    # A threshold leaves as many candidates as there happen to be; to count them would synchronise a GPU.
    take = _above_threshold if h.device.type == "cpu" else _best_blocks
    running = RunningLogsumexp(h.shape[0], h)
    found, fresh, worst = [], 0, None
    parts = 5 if head.weight.dtype == head.acc else 8  # a tile of W that has to be cast is large itself
    for columns, _, _, z in vocab_tiles(h, head, _KEY_COPIES, parts):
        found.append(take(z, columns.start, k, worst))
        running.add(z if temperature == 1.0 else z.div_(temperature))
        fresh += found[-1][0].shape[1]
        last = columns.stop == head.weight.shape[0]
        if fresh >= k or last:
            values, ids = (torch.cat(side, 1) for side in zip(*found, strict=True))
            best = _take_best(values, ids, min(k, values.shape[1]), last)
            running.add(values.div_(temperature))
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
    grouped = whole_lines(z, -torch.inf).unflatten(1, (lanes, -1))
    groups = grouped.shape[2]
    maxima = grouped.amax(1) if lanes > 1 else grouped[:, 0]
    passes_over = torch.le
    if worst is None and groups > k:
        worst, passes_over = torch.topk(maxima, k, sorted=False).values.amin(1, keepdim=True), torch.lt
        if not bool(
            (worst > -torch.inf).all()
        ):  # fewer than k groups hold anything, or one of the best a NaN
            worst = None
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


def _best_blocks(z: Tensor, first_id: int, k: int, _: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with as many candidates in every row: the k best of the blocks of 16 columns.

    An element outside of them has k elements before it: each of those blocks holds one that is larger, or equal with a
    lower id.
    """
    n, size = z.shape
    blocks = size // _BLOCK
    local = torch.arange(size, device=z.device).expand(n, size)
    if blocks > 2 * k:
        maxima = z[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).amax(-1)
        _, chosen = _take_best(maxima, local[:, :blocks], k, last=False)
        inside = chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=z.device)
        local = torch.cat([inside.flatten(1), local[:, blocks * _BLOCK :]], 1)
    values = z.gather(1, local)
    z.scatter_(1, local, -torch.inf)
    return values, local + first_id


def _take_best(values: Tensor, ids: Tensor, k: int, last: bool) -> tuple[Tensor, Tensor]:
    """(values, ids) of the k that come first by (value descending, id ascending); -inf is left in their place.

    The `last` are in that order, others in any.
    """
    if values.device.type == "cpu":
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


class RunningLogsumexp:
    """A log-sum-exp over tiles: the maximum and the sum relative to it, both `[N]`."""

    def __init__(self, n: int, like: Tensor) -> None:
        self.max = like.new_full((n,), -torch.inf)
        self.sum = like.new_zeros(n)

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile, overwriting it with exp(x - max); return (it, the factor on everything summed before)."""
        top = torch.maximum(self.max, x.amax(1))
        origin = _origin(top)
        rescale = (self.max - origin).exp()
        x.sub_(origin[:, None]).mul_(_LOG2_E).exp2_()
        self.sum = self.sum * rescale + x.sum(1)
        self.max = top
        return x, rescale

    def result(self) -> Tensor:
        return self.max + self.sum.log()


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


class _RunningStats:
    """Maximum m, the sum R of exp(x - m) without one largest term, mean and variance of x - m under it, all `[N]`.

    The largest term is 1: an almost certain token has an R far below eps, which the whole sum 1 + R would lose.
    """

    def __init__(self, n: int, like: Tensor) -> None:
        self.max = like.new_full((n,), -torch.inf)
        self.rest, self.mean, self.variance = like.new_zeros(3, n)

    def add(self, x: Tensor) -> None:
        """Take in a tile, overwriting it; merged as in Chan, Golub and LeVeque 1979."""
        top, at = x.max(1, keepdim=True)
        x.sub_(_origin(top))
        weights = x.exp()
        x.masked_fill_(x == -torch.inf, 0)
        largest = weights.gather(1, at)  # 1, or 0 where everything is -inf
        rest = weights.scatter_(1, at, 0).sum(1)
        total = (rest + largest[:, 0]).clamp(min=torch.finfo(x.dtype).tiny)
        mean = (weights * x).sum(1) / total
        weights.scatter_(1, at, largest)
        variance = weights.mul_(x.sub_(mean[:, None]).square_()).sum(1) / total
        self._merge(top[:, 0], rest, mean, variance)

    def _merge(self, top: Tensor, rest: Tensor, mean: Tensor, variance: Tensor) -> None:
        before, self.max = self.max, torch.maximum(self.max, top)
        origin = _origin(self.max)
        fall, drop = (before - origin).exp(), (top - origin).exp()
        # The largest term of the side that stays below joins the rest.
        lesser = torch.where(top > before, fall, drop)
        old, new = fall * self.rest + fall, drop * rest + drop
        self.rest = fall * self.rest + drop * rest + lesser
        total = self.rest + (self.max != -torch.inf)
        old, new = (w / total.masked_fill(total == 0, 1) for w in (old, new))
        shift = (top - origin).masked_fill(new == 0, 0) + mean
        self.mean = (before - origin).masked_fill(old == 0, 0) + self.mean
        self.variance = old * self.variance + new * variance + old * new * (shift - self.mean).square()
        self.mean = old * self.mean + new * shift


def _origin(top: Tensor) -> Tensor:
    """What exponentials are relative to: the maximum, or 0 where it is infinite and inf - inf would be NaN."""
    return top.masked_fill(top.isinf(), 0)


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
        stats, value = _RunningStats(h.shape[0], h), h.new_full((h.shape[0], 1), torch.nan)
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
