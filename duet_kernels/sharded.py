"""What `ops` computes, for a head whose rows lie on the ranks of a group: each runs the local operation, then all merge.

The functions have the names and arguments of those in `ops`, ids are those of the whole vocabulary, and results are the same on
every rank. With l_r the log-sum-exp over the ids of rank r, L = log sum exp l_r and w_r = exp(l_r - L) its share:

    top-k            k of each rank, gathered; the K first by (value, id); what is passed over joins the tail
    gather           each logit from the rank that has its id: a sum with zeros
    log-sum-exp      L
    entropy          H = sum_r w_r (H_r - log w_r)                   variance = sum_r w_r (Var_r + (mu_r - mu)^2)
    losses at k ids  the pair (tail, logits at the ids) of all ranks, then as in one process
    dense            each rank compares its own ids, normalised over all; sums over ids are summed over the ranks

Sent forward: O(N K) or O(N) elements from each rank. Backward: dh, N D, summed over the ranks in fp32 (fp64). Never O(N V).

Before anything else the ranks compare what they are about to compute, and a few projections of the tensors that have to be the
same on all of them (`_agree`): 32 numbers and, on a GPU, one synchronisation a call.

Legend: N tokens, D hidden size, V vocabulary, K ids of a token, R ranks, T temperature.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, ranks
from .dispatch import acc_dtype, exact_dtypes
from .head import LMHead, TokenStats
from .ops.losses import topk_divergence
from .ops.op import refuse_second_derivative
from .ops.primitives import complement_and_values as local_complement
from .options import Divergence, Tokens
from .portable.cuts import chunk_logits, row_chunks, times_weight
from .portable.dense_rows import DenseRows
from .products import operand, operand_dtype, scaled
from .workspace import workspace_bytes

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _collective(function: _Function) -> _Function:
    """Refuse what several ranks cannot do. Where torch.compile may break its graph, it does so around the call."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "head.group: ranks look at each other's values, which cannot be compiled; wanted fullgraph=False, or the loss "
                "outside of the compiled function"
            )
        if args[-1] == "reference":
            raise ValueError(
                "impl: 'reference' is the definition in one process, and the head has a group; wanted 'auto', or an LMHead "
                "with the whole weight"
            )
        compiler = "torch._dynamo" in sys.modules  # importing it takes seconds
        return (torch.compiler.disable(function) if compiler else function)(*args)

    return cast(_Function, call)


# --- this rank's part --------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Hidden states whose gradient is summed over the ranks, this rank's rows that count, and which ids they are."""

    hidden: Tensor
    head: LMHead
    first: int
    size: int
    group: Any

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead) -> _Part:
        assert head.group is not None
        rank, counts = head.group.rank(), _counts(head)
        local = dataclasses.replace(
            head,
            weight=head.weight[: counts[rank]],
            bias=None if head.bias is None else head.bias[: counts[rank]],
            **_WHOLE,
        )
        hidden = ranks.replicated(hidden, head.group)
        return cls(hidden, local, sum(counts[:rank]), counts[rank], head.group)

    def own(self, ids: Tensor) -> Tensor:
        """The ids as those of the local head; -1, an absent slot, where another rank has them."""
        return torch.where((ids >= self.first) & (ids < self.first + self.size), ids - self.first, -1)

    def nothing(self) -> Tensor:
        """`[N]` zeros that hang on all leaves, so that a rank without ids takes part in the backward pass."""
        zeros = self.hidden[:, :0].sum(1, dtype=acc_dtype(self.hidden.dtype)) + self.head.weight[:0].sum()
        return zeros if self.head.bias is None else zeros + self.head.bias[:0].sum()


_WHOLE: dict[str, Any] = {"vocab_size": None, "group": None, "shards": None}


def _counts(head: LMHead) -> list[int]:
    """How many ids that count each rank has."""
    assert head.shards is not None
    counts, left = [], head.num_ids
    for rows in head.shards:
        counts.append(min(rows, left))
        left -= counts[-1]
    return counts


# --- do all ranks compute the same? ------------------------------------------------------------------------------

_MOST, _DIRECTIONS = 6, 4  # tensors that are compared, projections of each


def _agree(head: LMHead, call: str, options: tuple[Any, ...], **tensors: Tensor | None) -> None:
    """Refuse ranks that were called with different arguments; the first tensor is that of the hidden states.

    Projections of hidden states may differ by 1 %: those of other tokens differ by about their own size.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    described = [(name, tuple(x.shape), str(x.dtype), x.requires_grad) for name, x in given.items()]
    of_head = (head.num_ids, head.hidden_size, head.bias is None, head.softcap, head.scale)
    signature = repr((call, options, described, of_head, torch.is_grad_enabled()))
    (hidden_name, hidden), *_ = given.items()
    row = torch.zeros(2 + _MOST * (_DIRECTIONS + 1), dtype=torch.float64, device=hidden.device)
    row[0], row[1] = len(hidden), zlib.crc32(signature.encode())
    for i, x in enumerate(given.values()):
        at = 2 + i * (_DIRECTIONS + 1)
        row[at : at + _DIRECTIONS + 1] = _projections(x)
    rows = ranks.all_gather(row, head.group).cpu()  # type: ignore[arg-type]
    if bool((rows[:, 0] != rows[0, 0]).any()):
        raise ValueError(_other_tokens(hidden_name, f"{rows[:, 0].long().tolist()} tokens"))
    if bool((rows[:, 1] != rows[0, 1]).any()):
        raise ValueError(
            "head.group: wanted the same call with the same options on every rank, got different ones; this rank "
            f"{head.group.rank()} calls {signature}"  # type: ignore[union-attr]
        )
    for i, (name, x) in enumerate(given.items()):
        values = rows[:, 2 + i * (_DIRECTIONS + 1) :][:, : _DIRECTIONS + 1]
        allowed = (1e-2 if x.is_floating_point() and "hidden" in name else 1e-6) * values[:, -1].amax()
        if bool(((values[:, :-1] - values[0, :-1]).abs() > allowed).any()):
            raise ValueError(_other_tokens(name, "other values on other ranks"))


def _other_tokens(name: str, what: str) -> str:
    return (
        f"{name}: wanted the same tokens on every rank of head.group, got {what}. Each rank has some ids of the vocabulary and "
        "needs all tokens: where each has tokens of its own (FSDP, data parallel), gather them first, "
        f"{name.removesuffix('.values')} = head.gather_tokens(...), and so everything else that belongs to tokens"
    )


def _projections(x: Tensor) -> Tensor:
    """`[5]` four sums of the elements with different weights, and the size that they have."""
    x = x.detach().reshape(len(x), math.prod(x.shape[1:]))
    if not x.is_floating_point():
        x = x.double()
    columns = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    each = torch.arange(1, _DIRECTIONS + 1, dtype=torch.float64, device=x.device)
    weights = torch.cos(columns[:, None] * each.sqrt() + each).to(x.dtype)
    with exact_dtypes(x.device):
        sums = torch.nan_to_num(x, 0.0, 0.0, 0.0) @ weights
    rows = torch.arange(len(x), dtype=torch.float64, device=x.device)
    sums = sums.double() * torch.cos(rows * 1.7 + 0.3)[:, None]
    return torch.cat([sums.sum(0), sums.square().sum().sqrt()[None]])


# --- primitives --------------------------------------------------------------------------------------------------


@_collective
def linear_topk(
    hidden: Tensor, head: LMHead, k: int, temperature: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    _agree(head, "linear_topk", (k, temperature), hidden=hidden)
    part, counts, acc = _Part.of(hidden, head), _counts(head), acc_dtype(hidden.dtype)
    width, bits = min(k, max(counts)), torch.int64 if acc == torch.float64 else torch.int32
    # Values, ids and the tail of a token in one row, as integers: one gather.
    packed = torch.zeros(len(hidden), 2 * width + 1, dtype=bits, device=hidden.device)
    packed[:, -1] = packed.new_zeros(len(hidden), dtype=acc).fill_(-torch.inf).view(bits)
    if part.size:
        values, ids, tail = ops.linear_topk(hidden, part.head, min(k, part.size), temperature, impl)
        packed[:, : values.shape[1]], packed[:, -1] = values.view(bits), tail.view(bits)
        packed[:, width : width + ids.shape[1]] = ids
    rows, firsts = ranks.all_gather(packed, part.group), _firsts(counts)
    slots = [min(k, count) for count in counts]
    values = torch.cat([rows[r, :, :n].view(acc) for r, n in enumerate(slots)], 1)
    ids = torch.cat([rows[r, :, width : width + n].long() + firsts[r] for r, n in enumerate(slots)], 1)
    # Ranks stand in the order of their ids, and equal logits of one rank too: a stable sort leaves the lowest id first.
    values, order = values.sort(dim=1, descending=True, stable=True)
    left = torch.cat([values[:, k:] / temperature, rows[:, :, -1].view(acc).T], 1)
    return values[:, :k].contiguous(), ids.gather(1, order[:, :k]), left.logsumexp(1)


def _firsts(counts: list[int]) -> list[int]:
    return [sum(counts[:rank]) for rank in range(len(counts))]


@_collective
def linear_gather(hidden: Tensor, head: LMHead, indices: Tensor, impl: str) -> Tensor:
    _agree(head, "linear_gather", (), hidden=hidden, indices=indices)
    return _gather(_Part.of(hidden, head), head, indices, impl)


def _gather(part: _Part, head: LMHead, indices: Tensor, impl: str) -> Tensor:
    """z at the ids; -inf where an index is below 0, NaN from V on."""
    own = part.own(indices)
    if part.size:
        values = ops.linear_gather(part.hidden, part.head, own, impl)
    else:
        values = part.nothing()[:, None].expand(indices.shape)
    return _from_owners(values, own, indices, head, part)


def _from_owners(values: Tensor, own: Tensor, ids: Tensor, head: LMHead, part: _Part) -> Tensor:
    """Of every id the value of the rank that has it."""
    values = ranks.summed(torch.where(own >= 0, values, 0), part.group)
    return values.masked_fill(ids < 0, -torch.inf).masked_fill(ids >= head.num_ids, torch.nan)


@_collective
def linear_logsumexp(hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, impl: str) -> Tensor:
    _agree(head, "linear_logsumexp", (temperature,), hidden=hidden, exclude=exclude)
    return _logsumexp(_Part.of(hidden, head), head, exclude, temperature, impl)


def _logsumexp(part: _Part, head: LMHead, exclude: Tensor, temperature: float, impl: str) -> Tensor:
    if part.size:
        own = ops.linear_logsumexp(part.hidden, part.head, part.own(exclude), temperature, impl)
    else:
        own = part.nothing() - torch.inf
    total = _log_of_sum(ranks.gathered(own, part.group))
    return total.masked_fill((exclude >= head.num_ids).any(1), torch.nan) if exclude.shape[1] else total


def _log_of_sum(x: Tensor) -> Tensor:
    """The log-sum-exp over the ranks; -inf, without a gradient, where there is nothing."""
    nothing = (x == -torch.inf).all(0)
    return x.masked_fill(nothing, 0).logsumexp(0).masked_fill(nothing, -torch.inf)


def _shares(logsumexps: Tensor) -> Tensor:
    """`[R, N]` log w_r; that of the largest has the digits of what the others leave it."""
    top, at = logsumexps.max(0, keepdim=True)
    apart = (logsumexps - top.masked_fill(top == -torch.inf, 0)).scatter(0, at, -torch.inf)
    rest = apart.exp().sum(0, keepdim=True).log1p()
    return apart.scatter(0, at, 0) - rest


@_collective
def token_stats(hidden: Tensor, head: LMHead, labels: Tensor | None, impl: str) -> TokenStats:
    _agree(head, "linear_token_stats", (), hidden=hidden, labels=labels)
    part, known = _Part.of(hidden, head), labels is not None
    own = part.own(labels) if labels is not None else torch.full((len(hidden),), -1, device=hidden.device)
    rows = torch.zeros(len(hidden), 4, dtype=acc_dtype(hidden.dtype), device=hidden.device)
    rows[:, 0] = -torch.inf
    if part.size:
        stats = ops.token_stats(hidden, part.head, own.clamp(min=0) if known else None, impl)
        rows[:, 0], rows[:, 1], rows[:, 2], label = stats
        if label is not None:
            rows[:, 3] = label.where(own >= 0, 0)
    sums, entropies, variances, label = ranks.all_gather(rows, part.group).unbind(2)
    shares = _shares(sums)
    entropy, w = _entropy(shares, entropies), shares.exp()
    # Var log p = Var z; means of z relative to that of the rank with the largest share.
    means = (sums - entropies).masked_fill(w == 0, 0)
    means = means - means.gather(0, shares.argmax(0, keepdim=True))
    apart = means - (w * means).sum(0)
    variance = (w * (variances + apart.square())).masked_fill(w == 0, 0).sum(0)
    logprob = None
    if labels is not None:
        counts = torch.tensor(_counts(head), device=hidden.device).cumsum(0)
        owner = torch.searchsorted(counts, labels, right=True).clamp(max=len(counts) - 1)
        logprob = label.sum(0) + shares.gather(0, owner[None])[0]
        logprob = logprob.masked_fill(labels >= head.num_ids, torch.nan)
    return TokenStats(_log_of_sum(sums), entropy, variance, logprob)


def _entropy(shares: Tensor, entropies: Tensor) -> Tensor:
    w = shares.exp()
    return (w * (entropies - shares)).masked_fill(w == 0, 0).sum(0)


def complement_and_values(
    hidden: Tensor, head: LMHead, ids: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    part = _Part.of(hidden, head)
    own = part.own(ids)
    if part.size:
        tail, values, entropy = local_complement(part.hidden, part.head, own, temperature, with_entropy, impl)
    else:
        tail = part.nothing() - torch.inf
        values, entropy = part.nothing()[:, None].expand(ids.shape), torch.zeros_like(tail.detach())
    tails = ranks.gathered(tail, part.group)
    total = _log_of_sum(tails).masked_fill((ids >= head.num_ids).any(1), torch.nan)
    if with_entropy:
        entropy = _entropy(_shares(tails.detach()), ranks.all_gather(entropy, part.group))
    return total, _from_owners(values, own, ids, head, part), entropy


# --- losses at k ids ---------------------------------------------------------------------------------------------


@_collective
def topk_loss(
    hidden: Tensor,
    head: LMHead,
    values_t: Tensor,
    ids: Tensor,
    tail_t: Tensor | None,
    spec: Divergence,
    tokens: Tokens,
    impl: str,
) -> Tensor:
    options, teacher = dataclasses.astuple(spec), {"values": values_t, "indices": ids, "tail": tail_t}
    teacher = {f"teacher.{name}": x for name, x in teacher.items()}
    _agree(
        head,
        "topk_distill_loss",
        (*options, tokens.reduction),
        hidden=hidden,
        **teacher,
        factor=tokens.factor,
    )
    acc = acc_dtype(hidden.dtype)
    values_t, ids = values_t.to(acc), ids.masked_fill(values_t == -torch.inf, -1)
    tails: tuple[Tensor | None, Tensor | None] = None, None
    if spec.needs_student_logsumexp:
        tail, values, _ = complement_and_values(hidden, head, ids, spec.temperature, False, impl)
        tails = tail, tail_t.to(acc) if tail_t is not None and spec.needs_teacher_logsumexp else None
    else:
        values = _gather(_Part.of(hidden, head), head, ids, impl)
    return tokens.reduce(tokens.weigh(topk_divergence(values, values_t, *tails, *options, impl)[0]))


@_collective
def topk_stats(
    hidden: Tensor,
    head: LMHead,
    values_t: Tensor,
    ids: Tensor,
    tail_t: Tensor | None,
    token_ids: Tensor | None,
    with_entropy: bool,
    spec: Divergence,
    impl: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    tensors = {
        "teacher.values": values_t,
        "teacher.indices": ids,
        "teacher.tail": tail_t,
        "token_ids": token_ids,
    }
    options = (*dataclasses.astuple(spec), with_entropy)
    _agree(head, "topk_distill_stats", options, hidden=hidden, **tensors)
    of_teacher = values_t, ids, tail_t, token_ids
    return ops.topk_stats(hidden, head, *of_teacher, with_entropy, spec, impl, complement_and_values)


@_collective
def overlap(hidden: Tensor, head: LMHead, values_t: Tensor, ids: Tensor, impl: str) -> Tensor:
    return ops.overlap(hidden, head, values_t, ids, impl, linear_topk)


teacher_mass = ops.teacher_mass


@_collective
def cross_entropy(hidden: Tensor, head: LMHead, labels: Tensor, tokens: Tokens, impl: str) -> Tensor:
    _agree(
        head, "linear_cross_entropy", (tokens.reduction,), hidden=hidden, labels=labels, factor=tokens.factor
    )
    tail, values, _ = complement_and_values(hidden, head, labels[:, None], 1.0, False, impl)
    return tokens.reduce(tokens.weigh(F.softplus(tail - values[:, 0], threshold=40.0)))


# --- dense divergences -------------------------------------------------------------------------------------------


@_collective
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
    _agree(
        head,
        "linear_distill_loss",
        (*dataclasses.astuple(spec), tokens.reduction),
        **states,
        factor=tokens.factor,
    )
    part = _Part.of(hidden, head)
    own = _own_rows(teacher_head, part)
    if spec.raw and not spec.noise:
        rows = part.nothing()
        if part.size:
            each = Tokens(torch.ones_like(tokens.factor), "none", (len(hidden),), len(hidden))
            rows = ops.dense_loss(part.hidden, part.head, teacher_hidden, own, spec, each, impl)
        return tokens.reduce(tokens.weigh(ranks.summed(rows, part.group)))
    with torch.no_grad():
        pair = _Pair(part.head.detach(), teacher_hidden, own, spec, part.group)
        if spec.noise:
            pair.noise = pair.largest(hidden)
        if not spec.raw:
            nobody = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
            teacher = part._replace(hidden=teacher_hidden, head=own)
            pair.student_sum = _logsumexp(part, head, nobody, spec.temperature, impl)
            pair.teacher_sum = _logsumexp(teacher, head, nobody, spec.temperature, impl).to(pair.student_sum)
    return tokens.reduce(tokens.weigh(_Compared.apply(hidden, part.head.weight, part.head.bias, pair)))


def _check_teacher(head: LMHead, teacher_head: LMHead) -> None:
    if head.group is None:
        raise ValueError(
            "student_head: wanted the group of teacher_head, whose rows lie on several ranks, got the whole weight; shard the "
            "student's head in the same way, or pass the teacher's whole weight"
        )
    if teacher_head.group is None:
        return
    if teacher_head.group is not head.group:
        raise ValueError("teacher_head: wanted the group of student_head, got another one")
    if _counts(teacher_head) != _counts(head):
        raise ValueError(
            f"teacher_head: wanted the ids of student_head on each rank, {_counts(head)} of them, got {_counts(teacher_head)}; "
            "shard both vocabularies at the same ids, or pass the teacher's whole weight"
        )


def _own_rows(teacher_head: LMHead, part: _Part) -> LMHead:
    """The rows of the teacher's head that belong to this rank's ids; a teacher without a group is whole on every rank."""
    first = part.first if teacher_head.group is None else 0
    rows = slice(first, first + part.size)
    bias = None if teacher_head.bias is None else teacher_head.bias[rows]
    return dataclasses.replace(teacher_head, weight=teacher_head.weight[rows], bias=bias, **_WHOLE)


@dataclasses.dataclass
class _Pair:
    """The teacher, and what of each row is known of all ranks: log-sum-exps and the noise, `[N, 1]` as `DenseRows` has them."""

    head: LMHead
    teacher_hidden: Tensor
    teacher_head: LMHead
    spec: Divergence
    group: Any
    student_sum: Tensor | None = None
    teacher_sum: Tensor | None = None
    noise: Tensor | None = None

    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, _Rows, Tensor | float]]:
        """(tokens, their logits of both models at this rank's ids, dz / d(h W^T) of the student)."""
        if not len(self.head.weight):
            return
        copies = (2 if self.head.softcap is None else 4) + (operand_dtype(hidden) != self.head.acc)
        bytes_of_row = copies * len(self.head.weight) * self.head.acc.itemsize
        for rows in row_chunks(len(hidden), workspace_bytes(hidden.device) // 2 // bytes_of_row):
            s = chunk_logits(hidden[rows], self.head)
            t = chunk_logits(self.teacher_hidden[rows], self.teacher_head).to(s.dtype)
            yield rows, _Rows(s, t, self, rows), self.head.slope(s)

    def largest(self, hidden: Tensor) -> Tensor:
        noise = torch.zeros(len(hidden), 1, dtype=self.head.acc, device=hidden.device)
        for rows, logits, _ in self.chunks(hidden):
            noise[rows] = logits._noise()
        return ranks.all_reduce(noise, self.group, torch.distributed.ReduceOp.MAX)


class _Rows(DenseRows):
    """Logits at some of the ids, whose normalisers are known."""

    def __init__(self, student: Tensor, teacher: Tensor, pair: _Pair, rows: slice) -> None:
        self.s, self.t, self.spec, self.inverse = student, teacher, pair.spec, 1.0 / pair.spec.temperature
        self.ruled_out = pair.head.bias is not None and pair.teacher_head.bias is not None
        self.noise = student.new_zeros(()) if pair.noise is None else pair.noise[rows]
        if pair.student_sum is not None and pair.teacher_sum is not None:
            sums = pair.student_sum[rows, None], pair.teacher_sum[rows, None]
            self.s_norm, self.t_norm = (x * pair.spec.temperature for x in sums)
            self.r = (self.s_norm - self.t_norm) * self.inverse

    def terms(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns, the sum of their terms, a or dL/dz) of a strip; of distributions q is left in the student's memory."""
        for c in self._strips():
            yield c, *(self._raw(c) if self.spec.raw else self._parts(c))

    def gradient(self, factor: Tensor, total: Tensor) -> Tensor:
        """factor dL/dz, given the sum of a over all ids of all ranks, in the teacher's memory."""
        for c, _, a in self.terms():
            self.t[:, c] = a if self.spec.raw else a.addcmul_(self.s[:, c], total[:, None], value=-1)
        return self.t.mul_(factor[:, None] * self.inverse).masked_fill_((factor == 0)[:, None], 0)


class _Compared(torch.autograd.Function):
    """`[N]` the divergence; logits are made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, pair: _Pair) -> Tensor:
        sums = torch.zeros(2, len(hidden), dtype=pair.head.acc, device=hidden.device)  # loss, a
        with exact_dtypes(hidden.device):
            for rows, logits, _ in pair.chunks(hidden):
                for _, terms, a in logits.terms():
                    sums[0, rows] += terms
                    sums[1, rows] += a.sum(1)
        loss, ctx.total = ranks.all_reduce(sums, pair.group)
        ctx.pair = pair
        ctx.save_for_backward(hidden)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative("linear_distill_loss with k=None")
        (hidden,), pair, need = ctx.saved_tensors, ctx.pair, ctx.needs_input_grad
        head = pair.head
        dhidden = torch.zeros(hidden.shape, dtype=head.acc, device=hidden.device)
        dweight = torch.zeros(head.weight.shape if need[1] else (0,), dtype=head.acc, device=hidden.device)
        dbias = dhidden.new_zeros(len(head.weight))
        with exact_dtypes(hidden.device):
            for rows, logits, slope in pair.chunks(hidden):
                dz = logits.gradient(grad[rows], ctx.total[rows]) * slope
                dbias += dz.sum(0)
                dz = scaled(dz, operand_dtype(hidden))
                dhidden[rows] = times_weight(dz, head.weight)
                if need[1]:
                    dz.T.add_to(dweight, operand(hidden[rows]))
        dhidden = ranks.all_reduce(dhidden, pair.group) if need[0] else dhidden
        grads = (x.to(hidden.dtype) if needed else None for x, needed in zip((dhidden, dweight, dbias), need))
        return *grads, None
