"""Portable low-memory torch for losses that read all logits of a token: cross-entropy and the dense divergences.

The per-row factor is known, so the gradient is made while the logits of a few rows are at hand: 3 products for a
cross-entropy (2 with a frozen head), 4 for a divergence of two models (3). Same rules as `chunked`; `projection` cuts the
rows, `dense_rows` compares them. Must not know triton.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import projection
from .chunked import RunningLogsumexp, complement_and_values, complement_and_values_backward
from .dense_rows import DenseRows
from .divergence import Divergence
from .projection import Projection, chunk_logits, row_chunks, rows_that_fit, times_weight


def linear_cross_entropy(
    hidden: Tensor,
    head: Projection,
    labels: Tensor,
    factor: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` factor * cross-entropy, dh, dW, db of its sum; fp16's gradients in fp32 as in `linear_divergence`).

    With tau the log-sum-exp without the label: L = log(1 + exp(tau - z_label)), dL/dz_label = -(1 - q_label) and
    1 - q_label = sigmoid(tau - z_label): an almost certain token keeps the digits of both.

    A trainable head in the dtype of the sums takes row chunks: logits, dh and dW, 3 products, where enough rows fit
    into the workspace. Everything else takes tiles, which need no dW in fp32 beside a half one, read W once a pass,
    and are as fast with a frozen head: 2 products; with a trainable one 4.
    """
    n, v = hidden.shape[0], head.weight.shape[0]
    step = rows_that_fit(n, v, head.acc, copies=3 if head.softcap is not None else 1)
    if need_weight and head.weight.dtype == head.acc and step >= projection.ENOUGH_ROWS:
        return _cross_entropy_by_rows(hidden, head, labels, factor, step, need_hidden, need_bias)
    ids = labels[:, None]
    tail, values, dtail = complement_and_values(hidden, head, ids, 1.0, need_hidden)
    loss, miss = _cross_entropy(tail, values[:, 0], factor)
    if not (need_hidden or need_weight or need_bias):
        return loss, None, None, None
    out = head.acc if hidden.dtype == torch.float16 else hidden.dtype
    upstream = miss, -miss[:, None]
    return loss, *complement_and_values_backward(
        *upstream, tail, values, dtail, hidden, head, ids, 1.0, need_hidden, need_weight, need_bias, out
    )


def _cross_entropy(tail: Tensor, value: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(factor * loss, factor * (1 - q_label)), exactly 0 where the factor is 0."""
    gap, skip = tail - value, factor == 0
    loss = F.softplus(gap, threshold=40.0).mul_(factor).masked_fill_(skip, 0)
    return loss, gap.sigmoid().mul_(factor).masked_fill_(skip, 0)


def _cross_entropy_and_gradient(
    z: Tensor, labels: Tensor, factor: Tensor, head: Projection
) -> tuple[Tensor, Tensor]:
    """(factor * loss `[rows]`, its gradient in h W^T in the memory of the logits z)."""
    slope = head.slope(z)
    known = labels.clamp(max=z.shape[1] - 1)
    value = z.gather(1, known).masked_fill_(labels >= z.shape[1], torch.nan)[:, 0]
    sums = RunningLogsumexp(z.shape[0], z)
    dz, _ = sums.add(z.scatter_(1, known, -torch.inf))
    loss, miss = _cross_entropy(sums.result(), value, factor)
    # q off the label is its share of what the label leaves: (1 - q_label) exp(z - max) / sum.
    share = miss / sums.sum.masked_fill(sums.sum == 0, 1)
    dz.mul_(share[:, None]).scatter_(1, known, -miss[:, None])
    if head.softcap is not None or head.scale != 1.0:
        dz *= slope
    return loss, dz


def _cross_entropy_by_rows(
    hidden: Tensor,
    head: Projection,
    labels: Tensor,
    factor: Tensor,
    step: int,
    need_hidden: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    n, v = hidden.shape[0], head.weight.shape[0]
    loss = torch.empty(n, dtype=head.acc, device=hidden.device)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    dweight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format)
    dbias = loss.new_zeros(v) if need_bias else None
    logits = loss.new_empty(step, v)  # of all chunks, one after the other
    for rows in row_chunks(n, step):
        h = hidden[rows]
        z = chunk_logits(h, head, logits[: len(h)])
        loss[rows], dz = _cross_entropy_and_gradient(z, labels[rows, None], factor[rows], head)
        if dhidden is not None:
            torch.mm(dz, head.weight, out=dhidden[rows])
        dweight.addmm_(dz.T, h)
        if dbias is not None:
            dbias += dz.sum(0)
    return loss, dhidden, dweight, dbias


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
    # Logits of both, and with a softcap the student's slope and what makes it.
    step = max(1, rows_that_fit(n, v, head.acc, copies=2 if head.softcap is None else 4))
    student_logits, teacher_logits = (
        loss.new_empty(step, v, dtype=side.acc) for side in (head, teacher_head)
    )
    for rows in row_chunks(n, step):
        size = rows.stop - rows.start
        s = chunk_logits(hidden[rows], head, student_logits[:size])
        t = chunk_logits(teacher_hidden[rows], teacher_head, teacher_logits[:size]).to(head.acc)
        slope = head.slope(s)
        compared = DenseRows(s, t, spec)
        loss[rows] = (compared.loss * factor[rows]).masked_fill_(factor[rows] == 0, 0)
        if not (need_hidden or need_weight or need_bias):
            continue
        dz = compared.gradient_(factor[rows])
        if head.softcap is not None or head.scale != 1.0:
            dz *= slope
        if dhidden is not None:
            dhidden[rows] = times_weight(dz, head.weight)
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
