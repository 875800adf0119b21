"""Local results of all ranks become those of the whole vocabulary: selections, sums, statistics, losses at k ids.

Legend: N tokens, D hidden size, V vocabulary, K ids of a token, R ranks, T temperature.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, ranks
from ..dispatch import acc_dtype
from ..head import LMHead
from ..ops.losses import divergence_and_gradient
from ..ops.primitives import complement_and_values as local_complement
from ..options import Divergence, Tokens
from .part import Part, agree, collective, id_counts

# --- primitives --------------------------------------------------------------------------------------------------


@collective
def linear_topk(
    hidden: Tensor, head: LMHead, k: int, temperature: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    agree(head, "linear_topk", (k, temperature), hidden=hidden)
    part, counts, acc = Part.of(hidden, head), id_counts(head), acc_dtype(hidden.dtype)
    width, bits = min(k, max(counts)), torch.int64 if acc == torch.float64 else torch.int32
    # Values, ids and the tail of a token in one row, as integers: one gather.
    packed = torch.zeros(len(hidden), 2 * width + 1, dtype=bits, device=hidden.device)
    packed[:, -1] = packed.new_zeros(len(hidden), dtype=acc).fill_(-torch.inf).view(bits)
    if part.size:
        values, ids, tail = ops.linear_topk(hidden, part.head, min(k, part.size), temperature, impl)
        packed[:, : values.shape[1]], packed[:, -1] = values.view(bits), tail.view(bits)
        packed[:, width : width + ids.shape[1]] = ids
    rows, firsts = ranks.all_gather(packed, part.group), list(accumulate(counts, initial=0))
    slots = [min(k, count) for count in counts]
    values = torch.cat([rows[r, :, :n].view(acc) for r, n in enumerate(slots)], 1)
    ids = torch.cat([rows[r, :, width : width + n].long() + firsts[r] for r, n in enumerate(slots)], 1)
    # Ranks stand in the order of their ids, and equal logits of one rank too: a stable sort leaves the lowest id first.
    values, order = values.sort(dim=1, descending=True, stable=True)
    left = torch.cat([values[:, k:] / temperature, rows[:, :, -1].view(acc).T], 1)
    return values[:, :k].contiguous(), ids.gather(1, order[:, :k]), left.logsumexp(1)


@collective
def linear_gather(hidden: Tensor, head: LMHead, indices: Tensor, impl: str) -> Tensor:
    agree(head, "linear_gather", (), hidden=hidden, indices=indices)
    return _gather(Part.of(hidden, head), head, indices, impl)


def _gather(part: Part, head: LMHead, indices: Tensor, impl: str) -> Tensor:
    """z at the ids; -inf where an index is below 0, NaN from V on."""
    own = part.own(indices)
    if part.size:
        values = ops.linear_gather(part.hidden, part.head, own, impl)
    else:
        values = part.nothing()[:, None].expand(indices.shape)
    return _from_owners(values, own, indices, head, part)


def _from_owners(values: Tensor, own: Tensor, ids: Tensor, head: LMHead, part: Part) -> Tensor:
    """Of every id the value of the rank that has it."""
    values = ranks.summed(torch.where(own >= 0, values, 0), part.group)
    return values.masked_fill(ids < 0, -torch.inf).masked_fill(ids >= head.num_ids, torch.nan)


@collective
def linear_logsumexp(hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, impl: str) -> Tensor:
    agree(head, "linear_logsumexp", (temperature,), hidden=hidden, exclude=exclude)
    return logsumexp(Part.of(hidden, head), head, exclude, temperature, impl)


def logsumexp(part: Part, head: LMHead, exclude: Tensor, temperature: float, impl: str) -> Tensor:
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


@collective
def token_stats(
    hidden: Tensor, head: LMHead, labels: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor, Any]:
    agree(head, "linear_token_stats", (), hidden=hidden, labels=labels)
    part = Part.of(hidden, head)
    own = None if labels is None else part.own(labels)
    rows = torch.zeros(len(hidden), 4, dtype=acc_dtype(hidden.dtype), device=hidden.device)
    rows[:, 0] = -torch.inf
    if part.size:
        own_labels = None if own is None else own.clamp(min=0)
        rows[:, 0], rows[:, 1], rows[:, 2], label = ops.token_stats(hidden, part.head, own_labels, impl)
        if own is not None:
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
        counts = torch.tensor(id_counts(head), device=hidden.device).cumsum(0)
        owner = torch.searchsorted(counts, labels, right=True).clamp(max=len(counts) - 1)
        share = shares.gather(0, owner[None])[0]
        logprob = (label.sum(0) + share).masked_fill(share == -torch.inf, -torch.inf)
        logprob = logprob.masked_fill(labels >= head.num_ids, torch.nan)
    nothing = (sums == -torch.inf).all(0)  # every id is ruled out: there is no distribution
    entropy, variance = entropy.masked_fill(nothing, torch.nan), variance.masked_fill(nothing, torch.nan)
    logprob = None if logprob is None else logprob.masked_fill(nothing, torch.nan)
    return _log_of_sum(sums), entropy, variance, logprob


def _entropy(shares: Tensor, entropies: Tensor) -> Tensor:
    w = shares.exp()
    return (w * (entropies - shares)).masked_fill(w == 0, 0).sum(0)


def complement_and_values(
    hidden: Tensor, head: LMHead, ids: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    part = Part.of(hidden, head)
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


@collective
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
    teacher = {"teacher.values": values_t, "teacher.indices": ids, "teacher.tail": tail_t}
    options = (*spec.options, tokens.reduction)
    agree(head, "topk_distill_loss", options, hidden=hidden, **teacher, factor=tokens.factor)
    ids, tail = ids.masked_fill(values_t == -torch.inf, -1), None
    if spec.needs_student_logsumexp:
        tail, values, _ = complement_and_values(hidden, head, ids, spec.temperature, False, impl)
    else:
        values = _gather(Part.of(hidden, head), head, ids, impl)
    each = torch.ones_like(tokens.factor)
    loss = divergence_and_gradient(values, values_t, tail, tail_t, each, spec, impl)[0]
    return tokens.reduce(tokens.weigh(loss))


@collective
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
    teacher = {"teacher.values": values_t, "teacher.indices": ids, "teacher.tail": tail_t}
    options = (*spec.options, with_entropy)
    agree(head, "topk_distill_stats", options, hidden=hidden, **teacher, token_ids=token_ids)
    of_teacher = values_t, ids, tail_t, token_ids
    return ops.topk_stats(hidden, head, *of_teacher, with_entropy, spec, impl, complement_and_values)


@collective
def overlap(hidden: Tensor, head: LMHead, values_t: Tensor, ids: Tensor, impl: str) -> Tensor:
    return ops.overlap(hidden, head, values_t, ids, impl, linear_topk)


@collective
def cross_entropy(hidden: Tensor, head: LMHead, labels: Tensor, tokens: Tokens, impl: str) -> Tensor:
    agree(
        head, "linear_cross_entropy", (tokens.reduction,), hidden=hidden, labels=labels, factor=tokens.factor
    )
    tail, values, _ = complement_and_values(hidden, head, labels[:, None], 1.0, False, impl)
    return tokens.reduce(tokens.weigh(F.softplus(tail - values[:, 0], threshold=40.0)))
