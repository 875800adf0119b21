"""Portable low-memory torch: what a CPU user gets, and every device without a fused kernel.

No step holds `[N, V]` logits or an `[N, K, D]` gather. Two shapes of work:

* **Vocabulary tiles** (`_vocab_tiles`) for top-k, log-sum-exps and statistics: z for all rows against a slice of W,
  folded into running sums. W is read once a pass; a slice of dW is finished when its tile is.
* **Row chunks** (`_row_chunks`) for the dense divergences, whose rows need the whole vocabulary twice: student and
  teacher logits of a few rows, loss and gradient while they are at hand (4 products in all, 3 with a frozen head).

Everything is computed in fp32 (fp64 for fp64 inputs): half precisions are upcast a tile at a time. Functions take
checked, flattened tensors, write none of their inputs and never synchronise with a GPU. Must not know triton.

Legend: N tokens, D hidden size, V vocabulary, K selected ids, T temperature, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import acc_dtype
from .divergence import Divergence
from .rowwise import divergence_and_gradient
from .workspace import workspace_bytes

_MAX_ROWS = 8192  # rows of a vocabulary tile: keeps a tile wide enough to be an efficient product
_TILE_BYTES = 8 * 2**20  # a tile that stays in the last-level cache is folded several times faster
_GATHER_BYTES = 4 * 2**20
_BLOCK = 16  # columns of a block in top-k selection


class Projection(NamedTuple):
    """An LM head's tensors and its elementwise end: z = softcap(scale * (h W^T + b))."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def acc(self) -> torch.dtype:
        return acc_dtype(self.weight.dtype)

    def finish(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Turn h W^T into logits, in place."""
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor) -> Tensor | float:
        """dz / d(h W^T), from z itself."""
        if self.softcap is None:
            return self.scale
        # (c - z)(c + z) / c^2: near saturation c - z is exact, where 1 - (z / c)^2 has lost its digits.
        return (self.softcap - z).mul_(self.softcap + z).mul_(self.scale / self.softcap**2)


# --- vocabulary tiles ------------------------------------------------------------------------------------------


def _row_blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, _MAX_ROWS):
        yield slice(start, min(start + _MAX_ROWS, n))


def _tile_width(n: int, head: Projection, copies: int) -> int:
    """Columns of a vocabulary tile: at most an eighth of the vocabulary, `copies` tiles inside the workspace."""
    v, d = head.weight.shape
    item = head.acc.itemsize
    upcast = d * item if head.weight.dtype != head.acc else 0
    rows = max(min(n, _MAX_ROWS), 1)
    by_workspace = workspace_bytes() // (copies * rows * item + upcast)
    by_cache = max(_TILE_BYTES // (rows * item), 512)
    return max(1, min(by_workspace, by_cache, -(-v // 8)))


def _vocab_tiles(
    hidden: Tensor, head: Projection, copies: int = 3
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Yield `(columns, width, W tile in the accumulation dtype, z tile [rows, C])`; z is the caller's to overwrite.

    The z tile is a view of one reused buffer with a spare column on the right, which `_with_spare_column` gives access to.
    """
    v = head.weight.shape[0]
    width = _tile_width(hidden.shape[0], head, copies)
    buffer = torch.empty(hidden.shape[0], width + 1, dtype=head.acc, device=hidden.device)
    for start in range(0, v, width):
        columns = slice(start, min(start + width, v))
        weight = head.weight[columns].to(head.acc)
        size = columns.stop - columns.start
        z = buffer[:, :size]
        torch.mm(hidden, weight.T, out=z)
        head.finish(z, None if head.bias is None else head.bias[columns])
        yield columns, size, weight, z


def linear_topk(
    hidden: Tensor, head: Projection, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(values `[N, K]`, indices `[N, K]`, tail log-sum-exp `[N]`), exact, equal logits by lowest id.

    Per tile: the maxima of blocks of 16 columns, the k best blocks, the k best of their elements merged with the
    k best so far. An element outside the k best blocks has k elements before it (each of those blocks holds one
    that is larger, or equal with a lower id), so nothing is lost. What is passed over enters the tail as it is
    passed over: the complement is summed directly, never by subtraction.
    """
    n, device = hidden.shape[0], hidden.device
    values = torch.empty(n, k, dtype=head.acc, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    tail = torch.empty(n, dtype=head.acc, device=device)
    for rows in _row_blocks(n):
        h = hidden[rows].to(head.acc)
        best = h.new_empty(h.shape[0], 0), torch.empty(h.shape[0], 0, dtype=torch.int64, device=device)
        rest = h.new_full((h.shape[0],), -torch.inf)
        # Sorting keys and ids take some ten times the bytes of what is sorted: a few blocks, or the whole tile.
        copies = 8 if _tile_width(h.shape[0], head, 8) // _BLOCK > 2 * k else 12
        for columns, size, _, z in _vocab_tiles(h, head, copies):
            # Candidates stand in the order of their ids: the best so far came from lower ids than this tile.
            worst = best[0][:, -1:] if best[0].shape[1] == k else None
            cand_values, cand_ids, passed = _tile_candidates(z, columns.start, size, k, worst, temperature)
            cand_values = torch.cat([best[0], cand_values], 1)
            cand_ids = torch.cat([best[1], cand_ids], 1)
            take = _stable_topk(cand_values, min(k, cand_values.shape[1]))
            best = cand_values.gather(1, take), cand_ids.gather(1, take)
            cand_values.scatter_(1, take, -torch.inf)
            rest = torch.logaddexp(
                rest, torch.logaddexp(passed, torch.logsumexp(cand_values / temperature, 1))
            )
        values[rows], indices[rows], tail[rows] = *best, rest
    return values, indices, tail


def _tile_candidates(
    z: Tensor, first_id: int, size: int, k: int, worst: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Elements of a tile that can be among the k largest, in the order of their ids, and the others' log-sum-exp.

    `worst` `[N, 1]` is the k-th largest so far: only something larger replaces it, because its id is lower.
    """
    blocks = size // _BLOCK
    whole = blocks * _BLOCK
    maxima = z[:, :whole].unflatten(1, (blocks, _BLOCK)).amax(-1)
    if worst is not None and blocks and z.device.type == "cpu":  # to look would synchronise a GPU
        k = min(k, int((~(maxima <= worst)).sum(1).amax()) if z.shape[0] else 0)  # a NaN is larger
    if blocks <= 2 * k:
        ids = torch.arange(first_id, first_id + size, device=z.device).expand(z.shape[0], size)
        return z, ids, z.new_full((z.shape[0],), -torch.inf)
    chosen = _stable_topk(maxima, k).sort(1).values
    local = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=z.device)).flatten(1)
    if whole < size:
        rest = torch.arange(whole, size, device=z.device).expand(z.shape[0], size - whole)
        local = torch.cat([local, rest], 1)
    candidates = z.gather(1, local)
    z.scatter_(1, local, -torch.inf)
    passed = torch.logsumexp(z if temperature == 1.0 else z.div_(temperature), 1)
    return candidates, local + first_id, passed


def _stable_topk(x: Tensor, k: int) -> Tensor:
    """Positions of the k largest in each row, descending, equal values by lowest position."""
    if x.dtype == torch.float64:
        return torch.sort(x, dim=1, descending=True, stable=True).indices[:, :k]
    # fp32 bits as an integer of the same order, above the complement of the position: unique keys, one top-k.
    bits = (x + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    # A NaN stands before everything, whatever its sign bit (x86 makes inf - inf a negative one).
    ordered = torch.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    position = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return x.shape[1] - 1 - (torch.topk((ordered.long() << 32) | position, k, dim=1).values & 0xFFFFFFFF)


class _RunningLogsumexp:
    """A log-sum-exp over tiles: the maximum and the sum relative to it, both `[N]`."""

    def __init__(self, n: int, like: Tensor) -> None:
        self.max = like.new_full((n,), -torch.inf)
        self.sum = like.new_zeros(n)

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile, overwriting it with exp(x - max); return (it, the factor on everything summed before)."""
        top = torch.maximum(self.max, x.amax(1))
        origin = top.masked_fill(top == -torch.inf, 0)  # a row of -inf so far: exp(-inf - 0) = 0, not nan
        rescale = (self.max - origin).exp()
        x.sub_(origin[:, None]).exp_()
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
    for rows in _row_blocks(n):
        h, ids = hidden[rows].to(head.acc), indices[rows]
        running = _RunningLogsumexp(h.shape[0], h)
        for columns, size, weight, z in _vocab_tiles(h, head):
            slope = head.slope(z) if with_gradient else 1.0
            if k:
                inside, local = _locate(ids, columns, size)
                spare = _with_spare_column(z)
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


def _locate(ids: Tensor, columns: slice, size: int) -> tuple[Tensor, Tensor]:
    """(which ids lie in the tile, their columns; the spare column for all others)."""
    inside = (ids >= columns.start) & (ids < columns.stop)
    return inside, torch.where(inside, ids - columns.start, size)


def _with_spare_column(z: Tensor) -> Tensor:
    """The tile and the column on its right that `_vocab_tiles` keeps spare."""
    return z.as_strided((z.shape[0], z.shape[1] + 1), z.stride(), z.storage_offset())


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db). dh from what the forward pass summed; dW and db from recomputed tiles, each written once."""
    dhidden = dweight = dbias = None
    dx = _slope_at(grad_values, values, head).masked_fill(indices < 0, 0)
    if need_hidden:
        sparse = _sum_of_rows(head.weight, indices.clamp(0, head.weight.shape[0] - 1), dx)
        dhidden = sparse.addcmul_(grad_tail[:, None], dtail).to(hidden.dtype)
    if need_weight or need_bias:
        dweight, dbias = _complement_weight_gradient(
            grad_tail, dx, tail, hidden, head, indices, temperature, need_weight, need_bias
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
) -> tuple[Tensor | None, Tensor | None]:
    v, d = head.weight.shape
    blocks = list(_row_blocks(hidden.shape[0]))
    # One block of rows finishes a slice of dW at once; several add up in fp32 before the cast.
    direct = len(blocks) <= 1
    dtype = head.weight.dtype if direct else head.acc
    dweight = torch.zeros(v, d, dtype=dtype, device=hidden.device) if need_weight else None
    dbias = torch.zeros(v, dtype=head.acc, device=hidden.device) if need_bias else None
    for rows in blocks:
        h, ids = hidden[rows].to(head.acc), indices[rows]
        origin = tail[rows].masked_fill(tail[rows] == -torch.inf, 0)[:, None]
        factor = grad_tail[rows, None] / temperature
        for columns, size, _, z in _vocab_tiles(h, head, copies=4):
            slope = head.slope(z)
            _, local = _locate(ids, columns, size)
            dz = z.div_(temperature).sub_(origin).exp_().mul_(factor).mul_(slope)
            spare = _with_spare_column(dz)
            spare.scatter_(1, local, 0).scatter_add_(1, local, dx[rows])
            if dweight is not None:
                if direct:
                    dweight[columns] = dz.T @ h
                else:
                    dweight[columns].addmm_(dz.T, h)
            if dbias is not None:
                dbias[columns] += dz.sum(0)
    return (
        None if dweight is None else dweight.to(head.weight.dtype),
        None if dbias is None else dbias.to(head.weight.dtype),
    )


def token_stats(hidden: Tensor, head: Projection) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp, entropy, variance of the log-probability), each `[N]`, in one pass over the vocabulary.

    With m the largest logit, S = sum exp(z - m) and the mean of z - m under p: H = log S - mean, a sum of two terms
    that are not negative (logsumexp - mean z would subtract two large numbers, all digits of a confident token).
    Tiles merge by their S; variances as in Chan, Golub and LeVeque 1979.
    """
    n = hidden.shape[0]
    out = torch.empty(3, n, dtype=head.acc, device=hidden.device)
    for rows in _row_blocks(n):
        h = hidden[rows].to(head.acc)
        top, total = h.new_full((h.shape[0],), -torch.inf), h.new_zeros(h.shape[0])
        mean, variance = h.new_zeros(h.shape[0]), h.new_zeros(h.shape[0])
        for _, _, _, z in _vocab_tiles(h, head, copies=5):
            before, top = top, torch.maximum(top, z.amax(1))
            origin = top.masked_fill(top == -torch.inf, 0)
            x = z.sub_(origin[:, None])
            weights = x.exp()
            x.masked_fill_(x == -torch.inf, 0)
            tile = weights.sum(1)
            some = tile.masked_fill(tile == 0, 1)
            tile_mean = (weights * x).sum(1) / some
            tile_variance = (weights * x.sub_(tile_mean[:, None]).square_()).sum(1) / some
            fall = before - origin
            rest = total * fall.exp()
            mean = mean + fall.masked_fill(fall == -torch.inf, 0)
            total = rest + tile
            some = total.masked_fill(total == 0, 1)
            old, new = rest / some, tile / some
            variance = old * variance + new * tile_variance + old * new * (tile_mean - mean).square()
            mean = old * mean + new * tile_mean
        out[0, rows], out[1, rows], out[2, rows] = top + total.log(), total.log() - mean, variance
    return out[0].clone(), out[1].clone(), out[2].clone()


# --- the sparse student: logits at given ids -------------------------------------------------------------------


def _gather_chunk(k: int, d: int, acc: torch.dtype) -> int:
    return max(1, _GATHER_BYTES // max(k * d * acc.itemsize, 1))


def linear_gather(hidden: Tensor, head: Projection, indices: Tensor) -> Tensor:
    """`[N, K]` z at `indices`, a few tokens' rows of W at a time; -inf where an index is below 0, NaN from V on."""
    n, k = indices.shape
    values = torch.empty(n, k, dtype=head.acc, device=hidden.device)
    ids = indices.clamp(0, head.weight.shape[0] - 1)
    step = _gather_chunk(k, hidden.shape[1], head.acc)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        gathered = F.embedding(ids[rows], head.weight).to(head.acc)
        # A sum by halves, as exact as the blocked product that chose the ids (a dot product that adds in one run is
        # 10 eps off), and faster than a batch of matrix-vector products.
        values[rows] = gathered.mul_(hidden[rows, None].to(head.acc)).sum(-1)
    bias = None if head.bias is None else head.bias.to(head.acc)[ids]
    return _mark_ids(head.finish(values, bias), indices, head)


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
    """(dh, dW, db) of `linear_gather`.

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
            dbias = dbias[:, 0].to(head.weight.dtype)
    return dhidden, dweight, dbias


# --- the dense family: row chunks over the whole vocabulary ----------------------------------------------------


def _row_chunks(n: int, v: int, acc: torch.dtype) -> Iterator[slice]:
    """Rows at a time: about twelve `[rows, V]` temporaries inside the workspace, and at most an eighth of all rows."""
    by_workspace = workspace_bytes() // (12 * v * acc.itemsize)
    step = max(1, min(by_workspace, -(-n // 8)))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _chunk_logits(hidden: Tensor, head: Projection) -> Tensor:
    if head.weight.dtype == head.acc:
        return head.finish(hidden.to(head.acc) @ head.weight.T, head.bias)
    z = torch.empty(hidden.shape[0], head.weight.shape[0], dtype=head.acc, device=hidden.device)
    for columns, _, _, tile in _vocab_tiles(hidden.to(head.acc), head):
        z[:, columns] = tile
    return z


def linear_divergence(
    hidden: Tensor,
    head: Projection,
    teacher_hidden: Tensor,
    teacher_head: Projection,
    factor: Tensor,
    spec: Divergence,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` factor * loss over the whole vocabulary, dh, dW, db of its sum).

    Gradients of fp16 inputs stay in fp32: the upstream factor, a loss scale perhaps, comes after they are made.
    """
    n, d = hidden.shape
    v = head.weight.shape[0]
    out = head.acc if hidden.dtype == torch.float16 else hidden.dtype
    loss = torch.empty(n, dtype=head.acc, device=hidden.device)
    dhidden = torch.empty(n, d, dtype=out, device=hidden.device) if need_hidden else None
    dweight = torch.zeros(v, d, dtype=head.acc, device=hidden.device) if need_weight else None
    dbias = torch.zeros(v, dtype=head.acc, device=hidden.device) if need_bias else None
    for rows in _row_chunks(n, v, head.acc):
        s = _chunk_logits(hidden[rows], head)
        t = _chunk_logits(teacher_hidden[rows], teacher_head).to(head.acc)
        slope = head.slope(s)
        loss[rows], dz, _ = divergence_and_gradient(s, t, None, None, factor[rows], spec, absent_slots=False)
        if not (need_hidden or need_weight or need_bias):
            continue
        dz *= slope
        if dhidden is not None:
            dhidden[rows] = _times_weight(dz, head.weight)
        if dweight is not None:
            dweight.addmm_(dz.T, hidden[rows].to(head.acc))
        if dbias is not None:
            dbias += dz.sum(0)
    return (
        loss,
        dhidden,
        None if dweight is None else dweight.to(out),
        None if dbias is None else dbias.to(out),
    )


def _times_weight(dz: Tensor, weight: Tensor) -> Tensor:
    """dz W, a slice of W at a time where W has to be upcast."""
    if weight.dtype == dz.dtype:
        return dz @ weight
    out = dz.new_zeros(dz.shape[0], weight.shape[1])
    step = max(1, workspace_bytes() // (4 * weight.shape[1] * dz.element_size()))
    for start in range(0, weight.shape[0], step):
        columns = slice(start, start + step)
        out.addmm_(dz[:, columns], weight[columns].to(dz.dtype))
    return out
