"""Dense divergences of sharded heads: each rank compares its own ids, with normalisers of the whole vocabulary.

`huber` and `mse` have none: the local kernels run, and their sums are added. The others are made here in portable torch, on every
device, a few tokens at a time: first the log-sum-exps of both models, then the loss and m = sum of a (`portable.terms`), both summed over
the ranks, and in the backward pass, with the logits made again, dL/dz = (a - m q) / T. With G = 2 N D V / R FLOP of a rank: 4 G for the
loss, 4 G for the gradients (3 G with a frozen head); 2 G more for `tvd`, whose signs need the row's largest logit.

Legend: N tokens, D hidden size, V vocabulary, R ranks, T temperature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, ranks
from ..dispatch import exact_dtypes, workspace_bytes
from ..head import LMHead, Need
from ..ops.op import refuse_second_derivative, save_for_backward
from ..options import Divergence, Tokens
from ..portable.cuts import chunk_logits, multiply_, row_chunks, times_weight
from ..portable.dense_rows import DenseRows
from ..products import operand, operand_dtype, scaled
from .merge import logsumexp
from .part import Part, agree, collective, id_counts


@collective
def dense_loss(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    spec: Divergence,
    tokens: Tokens,
    impl: str,
) -> Tensor:
    """`huber` and `mse` run the local kernels. The others need normalisers of all ranks, and run portable torch: 8 products."""
    _check_teacher(head, teacher_head)
    states = {"student_hidden": hidden, "teacher_hidden": teacher_hidden}
    agree(head, "linear_distill_loss", (*spec.options, tokens.reduction), **states, factor=tokens.factor)
    part = Part.of(hidden, head)
    # A teacher without a group is whole on every rank.
    first = part.first if teacher_head.group is None else 0
    own = teacher_head.cut_to(slice(first, first + part.size))
    if spec.raw and not spec.noise:
        rows = part.nothing()
        if part.size:
            each = Tokens(torch.ones_like(tokens.factor), "none", (len(hidden),))
            rows = ops.dense_loss(part.hidden, part.head, teacher_hidden, own, spec, each, impl)
        return tokens.reduce(tokens.weigh(ranks.summed(rows, part.group)))
    with torch.no_grad(), exact_dtypes(hidden.device):
        pair = _Pair(part.head.detach(), teacher_hidden, own, spec, part.group)
        if not spec.raw:
            nobody = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
            teacher = part._replace(hidden=teacher_hidden, head=own)
            sums = [logsumexp(side, head, nobody, spec.temperature, impl) for side in (part, teacher)]
            pair.normalisers = [x.to(sums[0])[:, None] * spec.temperature for x in sums]
        if spec.noise:
            pair.noise = pair.largest(hidden)
    return tokens.reduce(tokens.weigh(_Compared.apply(hidden, part.head.weight, part.head.bias, pair)))


def _check_teacher(head: LMHead, teacher_head: LMHead) -> None:
    if head.group is None:
        raise ValueError(
            "student_head: wanted the group of teacher_head, whose rows lie on several ranks, got the whole weight; shard the "
            "student's head in the same way, or pass the teacher's whole weight"
        )
    if teacher_head.group is None:
        return
    if not ranks.same_ranks(teacher_head.group, head.group):
        raise ValueError("teacher_head: wanted the ranks of student_head's group, got others")
    if id_counts(teacher_head) != id_counts(head):
        raise ValueError(
            f"teacher_head: wanted the ids of student_head on each rank, {id_counts(head)} of them, got {id_counts(teacher_head)}; "
            "shard both vocabularies at the same ids, or pass the teacher's whole weight"
        )


@dataclasses.dataclass
class _Pair:
    """The teacher, and what of each row is known of all ranks: normalisers and the noise, `[N, 1]` as `DenseRows` takes them."""

    head: LMHead
    teacher_hidden: Tensor
    teacher_head: LMHead
    spec: Divergence
    group: Any
    normalisers: Sequence[Tensor] = ()
    noise: Tensor | None = None

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, DenseRows, Tensor | float]]:
        """(tokens, their logits of both models at this rank's ids, dz / d(h W^T) of the student)."""
        if not len(self.head.weight):
            return
        copies = (2 if self.head.softcap is None else 4) + (operand_dtype(hidden) != self.head.acc)
        ruled_out = self.head.bias is not None and self.teacher_head.bias is not None
        bytes_of_row = copies * len(self.head.weight) * self.head.acc.itemsize
        for rows in row_chunks(len(hidden), workspace_bytes(hidden.device) // 2 // bytes_of_row):
            s = chunk_logits(hidden[rows], self.head)
            t = chunk_logits(self.teacher_hidden[rows], self.teacher_head).to(s.dtype)
            noise, known = (
                None if self.noise is None else self.noise[rows],
                [[x[rows]] for x in self.normalisers],
            )
            yield rows, DenseRows(s, t, self.spec, ruled_out, noise, known), self.head.slope(s)

    def largest(self, hidden: Tensor) -> Tensor:
        noise = torch.zeros(len(hidden), 1, dtype=self.head.acc, device=hidden.device)
        for rows, logits, _ in self.chunks(hidden):
            noise[rows] = logits.noise
        return ranks.all_reduce(noise, self.group, torch.distributed.ReduceOp.MAX)


def _gradient(logits: DenseRows, factor: Tensor, total: Tensor) -> Tensor:
    """factor dL/dz, given the sum of a over all ids of all ranks, in the teacher's memory."""
    for c in logits.strips():
        a = logits.terms(c)[1]
        logits.t[:, c] = a if logits.spec.raw else a.addcmul_(logits.s[:, c], total[:, None], value=-1)
    return logits.t.mul_(factor[:, None] * logits.inverse).masked_fill_((factor == 0)[:, None], 0)


class _Compared(torch.autograd.Function):
    """`[N]` the divergence; logits are made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, pair: _Pair) -> Tensor:
        sums = torch.zeros(2, len(hidden), dtype=pair.head.acc, device=hidden.device)  # loss, a
        with exact_dtypes(hidden.device):
            for rows, logits, _ in pair.chunks(hidden):
                for c in logits.strips():
                    terms, a = logits.terms(c)
                    sums[0, rows] += terms
                    sums[1, rows] += a.sum(1)
        loss, ctx.total = ranks.all_reduce(sums, pair.group)
        ctx.pair = pair
        teacher = pair.teacher_hidden, pair.teacher_head.weight, pair.teacher_head.bias
        # The teacher's, too: autograd sees whether somebody wrote into them.
        save_for_backward(ctx, hidden, weight, bias, *teacher)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative("linear_distill_loss with k=None")
        hidden, weight, bias, *_ = ctx.saved_tensors
        pair = dataclasses.replace(
            ctx.pair, head=dataclasses.replace(ctx.pair.head, weight=weight, bias=bias)
        )
        need, acc = Need(*ctx.needs_input_grad[:3]), pair.head.acc
        dhidden = torch.zeros(hidden.shape, dtype=acc, device=hidden.device)
        dweight = torch.zeros(weight.shape, dtype=acc, device=hidden.device) if need.weight else None
        dbias = dhidden.new_zeros(len(weight)) if need.bias else None
        with exact_dtypes(hidden.device):
            for rows, logits, slope in pair.chunks(hidden):
                dz = multiply_(_gradient(logits, grad[rows], ctx.total[rows]), slope)
                factors = scaled(dz, operand_dtype(hidden))
                if need.hidden:
                    dhidden[rows] = times_weight(factors, weight)
                if dweight is not None:
                    factors.T.add_to(dweight, operand(hidden[rows]))
                if dbias is not None:
                    dbias += dz.sum(0)
        if need.hidden:
            dhidden = ranks.all_reduce(dhidden, pair.group)
        gradients = (None if x is None else x.to(hidden.dtype) for x in (dhidden, dweight, dbias))
        return *gradients, None
