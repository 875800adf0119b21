"""Portable low-memory torch for losses that read all logits of a token: cross-entropy and the dense divergences.

A row's factor is known, so its gradient is made while its logits are at hand. They are at hand in one of two cuts,
each of which holds only a share of them (`cuts`):

    vocabulary tiles    a slice of the vocabulary for all rows: W is read once, whatever is multiplied with it
    row chunks          the whole vocabulary for a few rows: normalisers are known before the gradient is made,
                        but every product reads W again for every chunk

Products, each 2 N D V FLOP, with a frozen and with a trainable head:

    cross-entropy           tiles 2 and 4, row chunks 3 with a trainable one
    huber, mse              tiles 3 and 4: there is no normaliser to wait for
    forward, reverse KL     row chunks 3 and 4; tiles 4 with a frozen one, because two sums of rows of W run along
                            until the normalisers are known (`dense_rows.RunningKL`)
    the others              row chunks 3 and 4: nothing could run along (l1 waits for the largest logit)

So a CPU cuts a KL with a frozen head into tiles where its fourth product costs no more than reading W for every chunk
(`_tiles_are_cheaper`); a GPU, which reads W fast, does not. `dense_rows` compares the logits.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import grad_dtype
from ..head import LMHead, Need
from ..options import Divergence
from ..products import operand, operand_dtype, scaled
from . import cuts
from .cuts import (
    chunk_logits,
    logits_buffer,
    multiply_,
    row_blocks,
    row_chunks,
    rows_that_fit,
    tile_width,
    times_weight,
    vocab_tiles,
)
from .dense_rows import DenseRows, RunningKL, any_of, strip_bytes, subtract_
from .logsumexp import loss_and_gradients
from .terms import OF_LOGITS

# To read W from memory takes about as long as to multiply this many rows with it: 10 FLOP for a byte of fp32.
_READING_ROWS = 20
_CACHED_BYTES = 8 * 2**20  # a W that stays in the last-level cache costs nothing to read again
# Of a tile of logits: what is made of it and four times as much of W stay in the last-level cache.
_TILE_BYTES = 2**20
_TILE_COPIES = 12  # of a tile: logits of both models and what is made of them


def times_upstream(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient, rounded to `dtype`: in place where that is the gradient's own, not at all by 1 on a CPU."""
    if gradient.dtype != dtype:
        return (gradient * factor).to(dtype)
    return gradient if not cuts.asynchronous(factor.device) and factor == 1 else gradient.mul_(factor)


def times_rows(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient `[N, D]`, rounded to `dtype`; a factor, or one of each row `[N]`."""
    out = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.mul(gradient, factor[:, None] if factor.dim() else factor, out=out)


Side = tuple[Tensor, LMHead]  # hidden states and the head they go through
Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # loss of each row, dh, dW, db


def linear_cross_entropy(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    factor: Tensor,
    need: Need,
) -> Result:
    """(`[N]` factor * cross-entropy, dh, dW, db of its sum; fp16's gradients in fp32 as in `linear_divergence`).

    With tau the log-sum-exp without the label: L = log(1 + exp(tau - z_label)), dL/dz_label = -(1 - q_label) and
    1 - q_label = sigmoid(tau - z_label): an almost certain token keeps the digits of both.
    """

    def settle(rows: slice, tail: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, gap = factor[rows], tail - values[:, 0]
        loss = F.softplus(gap, threshold=40.0).mul_(f).masked_fill_(f == 0, 0)
        miss = gap.sigmoid().mul_(f).masked_fill_(f == 0, 0)
        return loss, -miss[:, None], miss

    return loss_and_gradients(hidden, head, labels[:, None], 1.0, settle, need)


def linear_divergence(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> Result:
    """(`[N]` factor * loss over the whole vocabulary, dh, dW, db of its sum).

    Gradients of fp16 inputs stay in fp32: the upstream factor, a loss scale perhaps, comes after they are made.
    """
    student, teacher = (hidden, head), (teacher_hidden, teacher_head)
    if spec.raw and not spec.noise:
        return _raw_by_tiles(student, teacher, factor, spec, need)
    n = len(hidden)
    # Logits of both, and with a softcap the student's slope and what makes it; their gradient as halves.
    copies = (2 if head.softcap is None else 4) + (operand_dtype(hidden) != head.acc)
    step = max(1, rows_that_fit(n, head, copies))
    frozen_kl = spec.name in RunningKL.NAMES and not (need.weight or need.bias)
    by_tiles = frozen_kl and not cuts.asynchronous(hidden.device)
    if by_tiles and (not need.hidden or _tiles_are_cheaper(n, step, head.weight)):
        return _kl_by_tiles(student, teacher, factor, spec, need)
    return _divergence_by_rows(student, teacher, factor, spec, step, need)


def _tiles_are_cheaper(n: int, step: int, weight: Tensor) -> bool:
    """Whether a product of n rows takes no longer than the readings of W it saves: 3 of every chunk, but 2 in all."""
    saved = 3 * -(-n // step) - 2 if weight.nbytes > _CACHED_BYTES else 0
    return n <= _READING_ROWS * saved


def _tiles(student: Side, teacher: Side) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield `(columns, their rows of the student's W as an operand, its logits, the teacher's in the same dtype)`."""
    (hidden, head), (n, d) = student, student[0].shape
    width = min(tile_width(n, side, _TILE_COPIES) for _, side in (student, teacher))
    if head.weight.dtype != operand_dtype(head.weight):
        width = -(-width // 2)  # W of both models is cast
    if not cuts.asynchronous(hidden.device):
        width = min(width, max(_TILE_BYTES // (max(n, d // 4) * head.acc.itemsize), 512))
    tiles = (vocab_tiles(*side, width=width) for side in (student, teacher))
    for (columns, weight, s), (_, _, t) in zip(*tiles, strict=True):
        yield columns, weight, s, t.to(s.dtype)


def _blocks(student: Side, teacher: Side, with_weight: bool = False) -> Iterator[tuple[slice, Side, Side]]:
    """Rows that are tiled together, as operands; as many as can be where dW is made."""
    (hidden, head), (teacher_hidden, teacher_head) = student, teacher
    for rows in row_blocks(len(hidden), None if with_weight else head, 2 * cuts.HIDDEN_SHARE):
        yield rows, (operand(hidden[rows]), head), (operand(teacher_hidden[rows]), teacher_head)


def _kl_by_tiles(student: Side, teacher: Side, factor: Tensor, spec: Divergence, need: Need) -> Result:
    (hidden, head), out = student, grad_dtype(student[0].dtype)
    loss = factor.new_empty(len(hidden))
    dhidden = torch.empty(hidden.shape, dtype=out, device=hidden.device) if need.hidden else None
    for rows, block, teacher_block in _blocks(student, teacher):
        running = RunningKL(block[0], spec, need.hidden)
        for _, weight, s, t in _tiles(block, teacher_block):
            running.add(s, t, weight if need.hidden else None, head.slope(s) if need.hidden else 1.0)
        skip = factor[rows] == 0
        loss[rows] = (running.loss * factor[rows]).masked_fill_(skip, 0)
        if dhidden is not None:
            dhidden[rows] = running.gradient().mul_(factor[rows, None]).masked_fill_(skip[:, None], 0)
    return loss, dhidden, None, None


def _raw_by_tiles(
    student: Side,
    teacher: Side,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> Result:
    (hidden, head), out = student, grad_dtype(student[0].dtype)
    ruled_out, quiet = _both_may_rule_out(student, teacher), factor.new_zeros(())
    # One block of rows finishes a slice of dW at once; several add up before the cast.
    summed = out if len(hidden) <= cuts.MAX_ROWS else head.acc
    loss = factor.new_zeros(len(hidden))
    dhidden = torch.empty(hidden.shape, dtype=out, device=hidden.device) if need.hidden else None
    dweight = torch.zeros(head.weight.shape, dtype=summed, device=hidden.device) if need.weight else None
    dbias = factor.new_zeros(len(head.weight)) if need.bias else None
    for rows, block, teacher_block in _blocks(student, teacher, need.weight):
        f, skip = factor[rows, None], (factor[rows] == 0)[:, None]
        dh = torch.zeros(block[0].shape if need.hidden else (0,), dtype=head.acc, device=hidden.device)
        for columns, weight, s, t in _tiles(block, teacher_block):
            slope = head.slope(s)
            terms, dz = OF_LOGITS[spec.name](subtract_(s, t, ruled_out), quiet, spec)
            loss[rows] += terms
            if not any(need):
                continue
            dz.mul_(f * slope)
            if any_of(skip):
                dz.masked_fill_(skip, 0)
            factors = scaled(dz, weight.dtype)
            if dhidden is not None:
                factors.add_to(dh, weight)
            if dweight is not None and dweight.dtype == dz.dtype:
                factors.T.add_to(dweight[columns], block[0])
            elif dweight is not None:
                dweight[columns] += factors.T.times(block[0])
            if dbias is not None:
                dbias[columns] += dz.sum(0)
        loss[rows] = (loss[rows] * factor[rows]).masked_fill_(skip[:, 0], 0)
        if dhidden is not None:
            dhidden[rows] = dh
    return loss, dhidden, _cast(dweight, out), _cast(dbias, out)


def _divergence_by_rows(
    student: Side,
    teacher: Side,
    factor: Tensor,
    spec: Divergence,
    step: int,
    need: Need,
) -> Result:
    (hidden, head), (teacher_hidden, teacher_head) = student, teacher
    v, out = len(head.weight), grad_dtype(hidden.dtype)
    loss = factor.new_empty(len(hidden))
    dhidden = torch.empty(hidden.shape, dtype=out, device=hidden.device) if need.hidden else None
    dweight = torch.zeros(head.weight.shape, dtype=head.acc, device=hidden.device) if need.weight else None
    dbias = factor.new_zeros(v) if need.bias else None
    student_logits, teacher_logits = (logits_buffer(step, side) for side in (head, teacher_head))
    compared = step  # rows; a GPU compares so few that no strip of columns has to be cut out of them
    if cuts.asynchronous(hidden.device):
        compared = strip_bytes(hidden.device) // (v * head.acc.itemsize)
    for rows in row_chunks(len(hidden), step):
        size = rows.stop - rows.start
        s = chunk_logits(hidden[rows], head, student_logits[:size])
        t = chunk_logits(teacher_hidden[rows], teacher_head, teacher_logits[:size]).to(head.acc)
        slope = head.slope(s)
        for part in row_chunks(size, compared):
            pair = DenseRows(s[part], t[part], spec, _both_may_rule_out(student, teacher))
            loss[rows][part] = pair.compare_(factor[rows][part], any(need))
        if not any(need):
            continue
        dz = scaled(multiply_(t, slope), operand_dtype(hidden))
        if dhidden is not None:
            dhidden[rows] = times_weight(dz, head.weight)
        if dweight is not None:
            dz.T.add_to(dweight, operand(hidden[rows]))
        if dbias is not None:
            dbias += t.sum(0)
    return loss, dhidden, _cast(dweight, out), _cast(dbias, out)


def _both_may_rule_out(student: Side, teacher: Side) -> bool:
    """Whether an id may be -inf in both: only biases do that."""
    return student[1].bias is not None and teacher[1].bias is not None


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)
