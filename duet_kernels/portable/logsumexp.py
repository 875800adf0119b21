"""Folds over the vocabulary in portable torch: log-sum-exps with their gradient, token statistics, losses with a tail.

No step holds `[N, V]` logits: tiles of the vocabulary are folded into running sums. Nothing synchronises with a GPU.

Legend: N tokens, D hidden size, V vocabulary, K ids of a token, T temperature, C columns of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import grad_dtype
from ..head import LMHead, Need
from ..options import Divergence
from ..products import operand, scaled
from .cuts import divide_, locate, multiply_, row_blocks, to_the_next_row, vocab_tiles, with_spare_column
from .gather import mark_ids, sum_of_rows
from .running import RunningLogsumexp, RunningStats
from .topk_divergence import divergence_and_gradient


def complement_and_values(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    temperature: float,
    with_gradient: bool,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tail `[N]`, values `[N, K]`, d tail / d h `[N, D]` or empty, entropy `[N]` of the others' softmax or empty).

    tail = log sum over j not in ids of exp(z_j / T), values = z at the ids. The gradient of the tail is a softmax
    average of rows of W, so it is summed along like the exponentials themselves and costs one more product; the
    backward pass then needs none. An index below 0 is an absent slot: value -inf, nothing excluded.
    """
    n, k, device = hidden.shape[0], indices.shape[1], hidden.device
    tail = torch.empty(n, dtype=head.acc, device=device)
    values = torch.full((n, k), -torch.inf, dtype=head.acc, device=device)
    dtail = torch.zeros((n, hidden.shape[1]) if with_gradient else (0,), dtype=head.acc, device=device)
    entropy = tail.new_empty(n if with_entropy else 0)
    for rows in row_blocks(n, head):
        h, ids = operand(hidden[rows]), indices[rows]
        running = RunningLogsumexp(h.shape[0], tail, with_entropy)
        for columns, weight, z in vocab_tiles(h, head, copies=4 if with_entropy else 3):
            slope = head.slope(z) if with_gradient else 1.0
            if k:
                inside, local = locate(ids, columns)
                spare = with_spare_column(z)
                values[rows] = torch.where(inside, spare.gather(1, local), values[rows])
                spare.scatter_(1, local, -torch.inf)
            weights, rescale = running.add(divide_(z, temperature))
            if with_gradient:
                dtail[rows].mul_(rescale[:, None])
                scaled(multiply_(weights, slope), weight.dtype).add_to(dtail[rows], weight)
        tail[rows] = running.result()
        if with_entropy:
            entropy[rows] = running.entropy()
        if with_gradient:
            total = running.sum.masked_fill(running.sum == 0, 1)  # nothing left over: no gradient
            dtail[rows].div_(total[:, None] * temperature)
    tail.masked_fill_((indices >= head.weight.shape[0]).any(1), torch.nan)
    return tail, mark_ids(values, indices, head), dtail, entropy


def complement_and_values_backward(
    grad_tail: Tensor,
    grad_values: Tensor,
    tail: Tensor,
    values: Tensor,
    dtail: Tensor,
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    temperature: float,
    need: Need,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) in `dtype`, that of the inputs unless given.

    dh from what the forward pass summed; dW and db from recomputed tiles, each written once. `grad_values` and `values` of no
    columns: the ids are excluded from the log-sum-exp, and their logits have no gradient.
    """
    dhidden, out = None, dtype or hidden.dtype
    if grad_values.shape[1]:
        dx = (grad_values * head.slope(values)).masked_fill(indices < 0, 0)
    else:
        dx = grad_tail.new_zeros(indices.shape)
    if need.hidden:
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


def linear_logsumexp(
    hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, need: Need
) -> tuple[Tensor, Tensor | None]:
    """(`[N]` log-sum-exp of z / T over the ids not in `exclude`, its gradient `[N, D]` in h if that is needed)."""
    tail, _, dtail, _ = complement_and_values(hidden, head, exclude, temperature, need.hidden)
    return tail, dtail.to(grad_dtype(hidden.dtype)) if need.hidden else None


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
    tail, values, dtail, _ = complement_and_values(hidden, head, indices, spec.temperature, need.hidden)
    loss, dvalues, grad_tail = divergence_and_gradient(values, teacher, tail, teacher_tail, factor, spec)
    gradients = complement_and_values_backward(
        grad_tail,
        dvalues,
        tail,
        values,
        dtail,
        hidden,
        head,
        indices,
        spec.temperature,
        need,
        grad_dtype(hidden.dtype),
    )
    return loss, *gradients
