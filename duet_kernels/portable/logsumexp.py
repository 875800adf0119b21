"""Folds over the vocabulary in portable torch: log-sum-exps with their gradient, token statistics, losses with a tail.

No step holds `[N, V]` logits: tiles of the vocabulary are folded into running sums. Nothing synchronises with a GPU.

Legend: N tokens, D hidden size, V vocabulary, K ids of a token, T temperature, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import grad_dtype
from ..head import LMHead, Need
from ..options import Divergence
from ..products import operand, scaled
from .cuts import (
    ENOUGH_ROWS,
    chunk_logits,
    divide_,
    locate,
    multiply_,
    row_blocks,
    row_chunks,
    rows_that_fit,
    to_the_next_row,
    vocab_tiles,
    with_spare_column,
)
from .gather import mark_ids, sum_of_rows
from .running import RunningLogsumexp, RunningStats
from .topk_divergence import divergence_and_gradient

# (rows, tail, values) -> (factor * loss, its gradient in the values, that in the tail)
Settle = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def complement_and_values(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    temperature: float,
    with_values: bool,
    with_entropy: bool,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(tail `[N]`, values `[N, K]`, d tail / d h `[N, D]` if needed, entropy `[N]` of the others' softmax).

    tail = log sum over j not in ids of exp(z_j / T), values = z at the ids. The gradient of the tail is a softmax
    average of rows of W, so it is summed along like the exponentials themselves and costs one more product; the
    backward pass then needs none. An index below 0 is an absent slot: value -inf, nothing excluded. Without values (no
    columns) nothing is added to dh in the dtype of the sums: d tail / d h has the dtype of gradients.
    """
    n, k, device = hidden.shape[0], indices.shape[1], hidden.device
    tail = torch.empty(n, dtype=head.acc, device=device)
    values = torch.full((n, k if with_values else 0), -torch.inf, dtype=head.acc, device=device)
    dtail = torch.zeros(n, hidden.shape[1], dtype=head.acc, device=device) if need.hidden else None
    entropy = torch.empty_like(tail) if with_entropy else None
    for rows in row_blocks(n, head):
        h, ids = operand(hidden[rows]), indices[rows]
        running = RunningLogsumexp(h.shape[0], tail, with_entropy)
        for columns, weight, z in vocab_tiles(h, head, copies=4 if with_entropy else 3):
            slope = 1.0 if dtail is None else head.slope(z)
            if k:
                inside, local = locate(ids, columns)
                spare = with_spare_column(z)
                if with_values:
                    values[rows] = torch.where(inside, spare.gather(1, local), values[rows])
                spare.scatter_(1, local, -torch.inf)
            weights, rescale = running.add(divide_(z, temperature))
            if dtail is not None:
                dtail[rows].mul_(rescale[:, None])
                scaled(multiply_(weights, slope), weight.dtype).add_to(dtail[rows], weight)
        tail[rows] = running.result()
        if entropy is not None:
            entropy[rows] = running.entropy()
        if dtail is not None:
            total = running.sum.masked_fill(running.sum == 0, 1)  # nothing left over: no gradient
            dtail[rows].div_(total[:, None] * temperature)
    tail.masked_fill_((indices >= head.weight.shape[0]).any(1), torch.nan)
    if with_values:
        mark_ids(values, indices, head)
    elif dtail is not None:
        dtail = dtail.to(grad_dtype(hidden.dtype))
    return tail, values, dtail, entropy


def complement_and_values_backward(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    temperature: float,
    tail: Tensor,
    values: Tensor,
    dtail: Tensor | None,
    grad_tail: Tensor,
    grad_values: Tensor,
    need: Need,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) in `dtype`, that of the inputs unless given.

    dh from what the forward pass summed; dW and db from recomputed tiles, each written once. `grad_values` and `values` of no
    columns: the ids are excluded from the log-sum-exp, and their logits have no gradient.
    """
    dhidden, out, dx = None, dtype or hidden.dtype, grad_tail.new_zeros(indices.shape)
    if grad_values.shape[1]:
        dx = (grad_values * head.slope(values)).masked_fill(indices < 0, 0)
    if need.hidden and dtail is not None:
        sparse = sum_of_rows(head.weight, indices.clamp(0, head.weight.shape[0] - 1), dx)
        dhidden = sparse.addcmul_(grad_tail[:, None], dtail).to(out)
    if not (need.weight or need.bias):
        return dhidden, None, None
    v, d = head.weight.shape
    blocks = list(row_blocks(hidden.shape[0]))
    # One block of rows finishes a slice of dW at once; several add up in fp32 before the cast, which is more memory than
    # hidden states that are cast.
    direct = len(blocks) <= 1
    summed = out if direct else head.acc
    dweight = torch.zeros(v, d, dtype=summed, device=hidden.device) if need.weight else None
    dbias = torch.zeros(v, dtype=head.acc, device=hidden.device) if need.bias else None
    for rows in blocks:
        h, ids = operand(hidden[rows]), indices[rows]
        origin = tail[rows].masked_fill(tail[rows] == -torch.inf, 0)[:, None]
        factor = grad_tail[rows, None] / temperature
        for columns, _, z in vocab_tiles(h, head, copies=4):
            slope = head.slope(z)
            _, local = locate(ids, columns)
            dz = multiply_(divide_(z, temperature).sub_(origin).exp_().mul_(factor), slope)
            spare = with_spare_column(dz)
            spare.scatter_(1, local, 0).scatter_add_(1, local, dx[rows])
            if dweight is not None:
                operand_dz = scaled(dz, h.dtype).T
                if direct:
                    dweight[columns] = operand_dz.times(h)
                else:
                    operand_dz.add_to(dweight[columns], h)
            if dbias is not None:
                dbias[columns] += dz.sum(0)
    dweight, dbias = (None if x is None else x.to(out) for x in (dweight, dbias))
    return dhidden, dweight, dbias


def token_stats(
    hidden: Tensor, head: LMHead, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-sum-exp, entropy, variance of the log-probability, log p of the labels or None), each `[N]`, in one pass.

    With m the largest logit, R = sum exp(z - m) without its own 1, and the mean of z - m under p: the log-sum-exp is
    m + log(1 + R), H = log(1 + R) - mean, log p(y) = (z_y - m) - log(1 + R). Entropy and the log-probability of a
    certain label are sums of terms of one sign and keep their digits (logsumexp - mean z would lose all).
    """
    n = hidden.shape[0]
    out = torch.empty(4, n, dtype=head.acc, device=hidden.device)
    for rows in row_blocks(n, head):
        h = operand(hidden[rows])
        stats, value = RunningStats(h.shape[0], out), out.new_full((h.shape[0], 1), torch.nan)
        for columns, _, z in vocab_tiles(h, head, copies=5):
            if labels is not None:
                inside, local = locate(labels[rows, None], columns)
                value = torch.where(inside, with_spare_column(z).gather(1, local), value)
            stats.add(to_the_next_row(z))
        # NaN where there is no distribution
        log_total = stats.rest.log1p().masked_fill_(stats.max.isinf(), torch.nan)
        out[0, rows] = stats.max.where(stats.max.isinf(), stats.max + log_total)
        out[1, rows], out[2, rows] = log_total - stats.mean, stats.variance + 0 * log_total
        out[3, rows] = value[:, 0] - stats.max - log_total
    logsumexp, entropy, variance, logprob = (x.clone() for x in out)
    return logsumexp, entropy, variance, None if labels is None else logprob


# --- what the public functions ask for -----------------------------------------------------------------------------


def topk_loss_with_tail(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    teacher: Tensor,
    teacher_tail: Tensor | None,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` factor * loss, dh, dW, db of its sum) of a loss that reads the student's log-sum-exp beside the ids."""

    def settle(rows: slice, tail: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        known = None if teacher_tail is None else teacher_tail[rows]
        return divergence_and_gradient(values, teacher[rows], tail, known, factor[rows], spec)

    return loss_and_gradients(hidden, head, indices, spec.temperature, settle, need)


def loss_and_gradients(
    hidden: Tensor, head: LMHead, ids: Tensor, temperature: float, settle: Settle, need: Need
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` the losses that `settle` makes of tail and values, dh, dW, db of their sum; fp16's gradients in fp32).

    A trainable head in the dtype of the sums takes row chunks: logits, dh and dW, 3 products, where enough rows fit
    into the workspace. Everything else takes tiles, which need no dW in fp32 beside a half one, read W once a pass,
    and are as fast with a frozen head: 2 products; with a trainable one 4.
    """
    step = rows_that_fit(len(hidden), head, copies=3 if head.softcap is not None else 1)
    if need.weight and head.weight.dtype == head.acc and step >= ENOUGH_ROWS:
        return _by_rows(hidden, head, ids, temperature, settle, step, need)
    inputs = hidden, head, ids, temperature
    tail, values, dtail, _ = complement_and_values(*inputs, True, False, need)
    loss, dvalues, grad_tail = settle(slice(None), tail, values)
    if not any(need):
        return loss, None, None, None
    made = tail, values, dtail, grad_tail, dvalues
    return loss, *complement_and_values_backward(*inputs, *made, need, grad_dtype(hidden.dtype))


def _by_rows(
    hidden: Tensor, head: LMHead, ids: Tensor, temperature: float, settle: Settle, step: int, need: Need
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    n, v = len(hidden), len(head.weight)
    loss = torch.empty(n, dtype=head.acc, device=hidden.device)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need.hidden else None
    dweight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format)
    dbias = loss.new_zeros(v) if need.bias else None
    logits = loss.new_empty(step, v + 1)  # of all chunks, one after the other, and a spare column
    for rows in row_chunks(n, step):
        h, at = hidden[rows], ids[rows]
        z = chunk_logits(h, head, logits[: len(h), :v])
        slope, spare, (_, local) = head.slope(z), with_spare_column(z), locate(at, slice(0, v))
        values = mark_ids(spare.gather(1, local), at, head)
        spare.scatter_(1, local, -torch.inf)
        sums = RunningLogsumexp(len(h), z)
        dz, _ = sums.add(divide_(z, temperature))
        tail = sums.result().masked_fill_((at >= v).any(1), torch.nan)
        loss[rows], dvalues, dtail = settle(rows, tail, values)
        share = dtail / (sums.sum.masked_fill(sums.sum == 0, 1) * temperature)
        multiply_(dz.mul_(share[:, None]), slope)
        del slope  # before the next chunk makes its own
        dx = (dvalues * head.slope(values)).masked_fill(at < 0, 0)
        spare.scatter_(1, local, 0).scatter_add_(1, local, dx)
        if dhidden is not None:
            torch.mm(dz, head.weight, out=dhidden[rows])
        dweight.addmm_(dz.T, h)
        if dbias is not None:
            dbias += dz.sum(0)
    return loss, dhidden, dweight, dbias
