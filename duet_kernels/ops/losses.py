"""The losses as custom ops, whose gradients are made along with the value: the factor of every row is an input.

A gradient in h of row n is known up to the upstream factor of that row, so it is always made in the forward pass. So are
dW and db of a sum. Where every row gets an upstream factor of its own (`reduction="none"`), dW and db are made in the
backward pass, with those factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import acc_dtype, grad_dtype
from ..head import LMHead, Need
from ..options import Divergence, Tokens
from .op import (
    DIVERGENCE,
    HEAD,
    LEAVES,
    Op,
    gradients_like,
    implementation,
    needs_gradient,
    plain,
    refuse_second_derivative,
    times,
)
from .primitives import complement_and_values, linear_gather_backward, linear_topk

# --- what losses of the whole vocabulary share ------------------------------------------------------------------

# The end of their schemas: (factor * loss summed, or of each row; dh, dW and db of the sum where they are needed).
_SUMMED = "bool reduce, bool[] need, str impl) -> (Tensor, Tensor, Tensor, Tensor)"


def _loss(op: Op, hidden: Tensor, head: LMHead, *inputs: Any, tokens: Tokens, impl: str) -> Tensor:
    """The losses of an op of `_of_vocabulary`, reduced as `tokens` says; dW and db are made along only with a sum."""
    reduce, need = tokens.reduction != "none", needs_gradient(hidden, head.weight, head.bias)
    loss = op(hidden, head, *inputs, reduce, need if reduce else Need(need.hidden), impl)[0]
    return loss if reduce else tokens.reduce(loss)


def _summed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    *inputs, reduce, need = arguments
    loss, *gradients = function(*inputs, need)
    return loss.sum() if reduce else loss, *gradients


def _of_vocabulary(op_name: str, inputs: str, name: str) -> Op:
    """An op of a loss, with its shapes and its gradient; errors name the public function `name`.

    It takes hidden states, a head, ..., the factor of each row as its last tensor, ..., reduce, need, impl. It gives the
    losses of the rows or their sum, and dh, dW and db of the sum, empty where nobody asked.
    """
    op = Op(op_name, f"({HEAD}, {inputs}, {_SUMMED}", _summed)

    def fake(hidden, weight, bias, *rest):
        *_, reduce, need, _impl = rest
        loss = hidden.new_empty(() if reduce else hidden.shape[:1], dtype=acc_dtype(hidden.dtype))
        return loss, *gradients_like((hidden, weight, bias), need, grad_dtype(hidden.dtype))

    def gradient(ctx, inputs, made, grad, *_):
        return _gradient(ctx, grad, name, op, inputs, made)

    op.register_fake(fake)
    op.register_autograd(gradient, slice(1, None), saved=op.names, by_head=True)
    return op


def _gradient(
    ctx: Any, grad: Tensor, name: str, op: Op, inputs: list[Any], made: Sequence[Tensor]
) -> list[Tensor]:
    """What the forward pass `made`, times the upstream gradient.

    dW and db of a sum are scaled in place and given away: autograd may make a leaf's `grad` of their memory. A second
    backward pass over the same graph makes them again, and does to them what the first one did.
    """
    refuse_second_derivative(name)
    need = Need(*ctx.needs_input_grad[:3])
    *_, reduce, made_along, impl = inputs

    def again(wanted: Sequence[bool], upstream: Tensor | None) -> tuple[Tensor, ...]:
        """dW and db, with another factor of each row."""
        given = inputs[:-3]
        if upstream is not None:
            given[ctx.places[-1]] = given[ctx.places[-1]] * upstream
        return op(*given, True, wanted, impl)[2:]

    dhidden, *others = made
    if need.hidden:
        dhidden = times(dhidden, grad, ctx.dtype, impl)
    if any(need[1:]) and not reduce:
        others = [g.to(ctx.dtype) for g in again(need._replace(hidden=False), grad)]
    elif any(need[1:]):
        if not plain(grad):
            others = [(g * grad).to(ctx.dtype) for g in others]
        else:
            if getattr(ctx, "given_away", False):
                others = again(made_along, None)
            ctx.given_away = any(g.numel() and g.dtype == ctx.dtype for g in others)
            # `.data`: autograd would refuse the saved tensors to the next pass, which does not read these.
            others = [implementation(impl).times_upstream(g.data, grad, ctx.dtype) for g in others]
    return [dhidden, *others]


# --- losses of the logits at K ids alone ------------------------------------------------------------------------


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
    """The divergence from a teacher's logits at `[N, K]` ids (and from its tail `[N]`, if the loss reads it)."""
    ids = ids.masked_fill(values_t == -torch.inf, -1)  # an absent slot: nothing gathered, nothing excluded
    if impl == "reference":
        skip = (tokens.factor == 0)[:, None]  # has no slots: through an infinite difference 0 would be NaN
        ids, values_t = ids.masked_fill(skip, -1), values_t.masked_fill(skip, -torch.inf)
        return tokens.reduce(tokens.weigh(reference.topk_loss(hidden, head, ids, values_t, tail_t, spec)))
    inputs = hidden, head, ids, values_t
    if spec.needs_student_logsumexp:
        return _loss(_topk_loss_with_tail, *inputs, tail_t, tokens.factor, spec, tokens=tokens, impl=impl)
    return tokens.reduce(_topk_loss(*inputs, tokens.factor, spec, needs_gradient(hidden), impl)[0])


# (factor * loss `[N]`, the student's logits `[N, K]`, the gradient in them, dh `[N, D]` or empty)
_topk_loss = Op(
    "topk_loss",
    f"({HEAD}, Tensor ids, Tensor teacher, Tensor factor, {DIVERGENCE}, bool[] need, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@_topk_loss.register_fake
def _(hidden, weight, bias, softcap, scale, ids, teacher, factor, *rest):
    *_, need, _impl = rest
    loss = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    values = loss.new_empty(ids.shape)
    dhidden = gradients_like((hidden, weight, bias), need, grad_dtype(hidden.dtype))[0]
    return loss, values, torch.empty_like(values), dhidden


def _topk_loss_gradient(ctx, inputs, outputs, grad, *_):
    refuse_second_derivative("topk_distill_loss")
    *head, ids = inputs[:6]
    values, dvalues, dhidden = outputs
    need = ctx.needs_input_grad[:3]
    gradients: list[Tensor | None] = [None, None, None]
    if any(need[1:]):  # sparse: made where the upstream factor is known
        dz, need_of_head = grad[:, None] * dvalues, (False, *need[1:])
        gradients = list(linear_gather_backward(*head, dz, values, ids, need_of_head, inputs[-1]))
    if need[0]:
        gradients[0] = times(dhidden, grad, ctx.dtype, inputs[-1])
    return gradients


_topk_loss.register_autograd(_topk_loss_gradient, slice(1, None), saved=(*LEAVES, "ids"), by_head=True)


# --- losses of the logits at K ids and the log-sum-exp of all others, and what else is known of the token -----------

_topk_loss_with_tail = _of_vocabulary(
    "topk_loss_with_tail",
    f"Tensor ids, Tensor teacher, Tensor? teacher_tail, Tensor factor, {DIVERGENCE}",
    "topk_distill_loss",
)


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
    complement: Callable[..., tuple[Tensor, Tensor, Tensor]] = complement_and_values,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(loss, log q(token), the student's mass on the ids, its entropy), each `[N]`, of one pass over the vocabulary.

    The token is a slot of its own, the first one. Sums of probabilities count every id once. `complement` makes the pass.
    """
    ids = ids.masked_fill(values_t == -torch.inf, -1)
    if impl == "reference":
        found = reference.topk_stats(hidden, head, ids, values_t, tail_t, token_ids, spec)
        return found if with_entropy else (*found[:3], None)
    slots = ids if token_ids is None else torch.cat([token_ids[:, None], ids], 1)
    tail, values, inner = complement(hidden, head, slots, spec.temperature, with_entropy, impl)
    once = values.masked_fill(met_before(slots) | (slots < 0), -torch.inf) / spec.temperature
    x = torch.cat([once, tail[:, None]], 1)
    logprob, of_teacher = None, once.detach()
    if token_ids is not None:
        among = (ids == token_ids[:, None]).any(1)
        token, values = once[:, 0], values[:, 1:]
        of_teacher = torch.cat(
            [once[:, :1].masked_fill(~among[:, None], -torch.inf), once[:, 1:]], 1
        ).detach()
        ruled_out = token == -torch.inf  # by a bias; another slot may be, too, and -inf + inf would be NaN
        logprob = -_log_of_one_and(x[:, 1:] - token.masked_fill(ruled_out, 0)[:, None])
        logprob = logprob.masked_fill(ruled_out, -torch.inf)
        # Of the loss's tail the token is a part, unless it is one of the ids; of two -inf the sum has no derivative.
        apart = among | ruled_out
        tail = torch.where(apart, tail, torch.logaddexp(tail, token.masked_fill(apart, 0)))
    mass = (of_teacher.logsumexp(1) - x.detach().logsumexp(1)).exp()
    entropy = _entropy(x.detach(), inner) if with_entropy else None
    tails = (tail, tail_t) if spec.needs_student_logsumexp else (None, None)
    loss = divergence_and_gradient(values, values_t, *tails, torch.ones_like(mass), spec, impl)[0]
    return loss, logprob, mass, entropy


def teacher_mass(values: Tensor, ids: Tensor, tail: Tensor, temperature: float) -> Tensor:
    """`[N]` what a teacher's softmax gives to its ids, each of which counts once."""
    again = met_before(ids.masked_fill(values == -torch.inf, -1))
    return torch.sigmoid((values.masked_fill(again, -torch.inf) / temperature).logsumexp(1) - tail)


def overlap(
    hidden: Tensor,
    head: LMHead,
    values_t: Tensor,
    ids: Tensor,
    impl: str,
    select: Callable[..., tuple[Tensor, Tensor, Tensor]] = linear_topk,
) -> Tensor:
    """`[N]` share of a teacher's n ids that are among the student's own n largest: a pass that selects (`select`)."""
    present = values_t != -torch.inf
    present &= ~met_before(ids.masked_fill(~present, -1))
    values, own, _ = select(hidden, head, min(ids.shape[1], head.num_ids), 1.0, impl)
    more = torch.arange(own.shape[1], device=own.device) >= present.sum(1, keepdim=True)
    own = own.masked_fill(more, -1).sort(1).values
    at = torch.searchsorted(own, ids).clamp(max=own.shape[1] - 1)
    shared = (own.gather(1, at) == ids) & present
    share = shared.sum(1, dtype=values_t.dtype) / present.sum(1).clamp(min=1)
    return share.masked_fill(values.isnan().any(1), torch.nan)


def met_before(ids: Tensor) -> Tensor:
    """Where an id `[N, K]` stands further to the left, too."""
    ordered, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)


def _log_of_one_and(x: Tensor) -> Tensor:
    """log(1 + sum exp x) of rows, with the digits of a small sum."""
    nothing = (x == -torch.inf).all(1, keepdim=True)  # its log-sum-exp is -inf, without a gradient
    total = x.masked_fill(nothing, 0).logsumexp(1).masked_fill(nothing[:, 0], -torch.inf)
    return F.softplus(total, threshold=40.0)


def _entropy(x: Tensor, inner: Tensor) -> Tensor:
    """`[N]` of events with the logits x, the last of which is a choice of entropy `inner`; all terms are >= 0."""
    top, at = x.max(1, keepdim=True)
    rest = (x - top).exp().scatter(1, at, 0).sum(1, keepdim=True)
    log_p = x - top - rest.log1p()
    p = log_p.exp()
    return p[:, -1] * inner - (p * log_p.clamp(min=-1e4)).sum(1)  # where p is 0: 0 inf would be NaN


# (factor * loss `[N]`, its gradient in the student's logits `[N, K]`, that in the student's tail `[N]` or empty)
divergence_and_gradient = Op(
    "divergence_and_gradient",
    f"(Tensor values, Tensor teacher, Tensor? tail, Tensor? teacher_tail, Tensor factor, {DIVERGENCE}, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)


@divergence_and_gradient.register_fake
def _(values, teacher, tail, teacher_tail, factor, *options):
    loss = values.new_empty(values.shape[0])
    return loss, values.new_empty(values.shape), loss.new_empty(0) if tail is None else torch.empty_like(loss)


def _divergence_gradient(ctx, inputs, outputs, grad, *_):
    refuse_second_derivative("topk_distill_stats")
    dvalues, dtail = outputs
    return grad[:, None] * dvalues, None, grad * dtail if ctx.needs_input_grad[2] else None


divergence_and_gradient.register_autograd(_divergence_gradient, slice(1, None), saved=())


# --- the dense divergences, from both hidden states -------------------------------------------------------------


def dense_loss(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    spec: Divergence,
    tokens: Tokens,
    impl: str,
) -> Tensor:
    """The divergence over the whole vocabulary."""
    if impl == "reference":
        sides = hidden, head, teacher_hidden, teacher_head
        return tokens.reduce(tokens.weigh(reference.dense_loss(*sides, spec, tokens.factor == 0)))
    inputs = hidden, head, teacher_hidden, teacher_head, tokens.factor, spec
    return _loss(_linear_divergence, *inputs, tokens=tokens, impl=impl)


_linear_divergence = _of_vocabulary(
    "linear_divergence",
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float? teacher_softcap, float teacher_scale, "
    f"Tensor factor, {DIVERGENCE}",
    "linear_distill_loss with k=None",
)


# --- cross-entropy of labels ------------------------------------------------------------------------------------


def cross_entropy(hidden: Tensor, head: LMHead, labels: Tensor, tokens: Tokens, impl: str) -> Tensor:
    if impl == "reference":
        tail, values = reference.complement_and_values(hidden, head, labels[:, None], 1.0)
        # log(1 + exp(tail - z_label)): a token that is almost certain keeps the digits of its small loss.
        return tokens.reduce(tokens.weigh(F.softplus(tail - values[:, 0], threshold=40.0)))
    return _loss(_linear_cross_entropy, hidden, head, labels, tokens.factor, tokens=tokens, impl=impl)


_linear_cross_entropy = _of_vocabulary(
    "linear_cross_entropy", "Tensor labels, Tensor factor", "linear_cross_entropy"
)
