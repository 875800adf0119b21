"""Selected logits, logits at ids, log-sum-exps and token statistics, as custom ops of hidden states and a head."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dispatch import acc_dtype, grad_dtype
from ..head import LMHead, Need, TokenStats
from .op import (
    HEAD,
    custom_op,
    flat,
    for_autograd,
    gradients_like,
    implementation,
    needs_gradient,
    present,
    refuse_second_derivative,
    save_for_backward,
    times,
)

# --- top-k: a selection, without a gradient ---------------------------------------------------------------------


def linear_topk(
    hidden: Tensor, head: LMHead, k: int, temperature: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "reference":
        return reference.linear_topk(hidden, head, k, temperature)
    return _linear_topk(*flat(hidden, head), k, temperature, impl)


@custom_op("linear_topk", f"({HEAD}, SymInt k, float temperature, str impl) -> (Tensor, Tensor, Tensor)")
def _linear_topk(hidden, head, k, temperature, impl):
    return implementation(impl).linear_topk(hidden, head, k, temperature)


@_linear_topk.register_fake
def _(hidden, weight, bias, softcap, scale, k, temperature, impl):
    values = hidden.new_empty(hidden.shape[0], k, dtype=acc_dtype(hidden.dtype))
    return values, torch.empty_like(values, dtype=torch.int64), values.new_empty(hidden.shape[0])


# --- gather: logits at given ids --------------------------------------------------------------------------------


def linear_gather(hidden: Tensor, head: LMHead, indices: Tensor, impl: str) -> Tensor:
    """`[N, K]`; an id below 0 is an absent slot with the value -inf, except in the definition."""
    if impl == "reference":
        return reference.linear_gather(hidden, head, indices.clamp(min=0))
    return _linear_gather(*flat(hidden, head), indices, impl)


@custom_op("linear_gather", f"({HEAD}, Tensor indices, str impl) -> Tensor")
def _linear_gather(hidden, head, indices, impl):
    return implementation(impl).linear_gather(hidden, head, indices)


@_linear_gather.register_fake
def _(hidden, weight, bias, softcap, scale, indices, impl):
    return hidden.new_empty(indices.shape, dtype=acc_dtype(hidden.dtype))


@custom_op(
    "linear_gather_backward",
    f"({HEAD}, Tensor grad, Tensor values, Tensor indices, bool[] need, str impl) -> (Tensor, Tensor, Tensor)",
)
def linear_gather_backward(hidden, head, grad, values, indices, need, impl):
    run = implementation(impl).linear_gather_backward
    return present(run(grad, values, hidden, head, indices, Need(*need)), hidden)


@linear_gather_backward.register_fake
def _(hidden, weight, bias, softcap, scale, grad, values, indices, need, impl):
    return gradients_like((hidden, weight, bias), need)


def _linear_gather_context(ctx, inputs, output):
    hidden, weight, bias, *ctx.head, indices, ctx.impl = inputs
    save_for_backward(ctx, output, hidden, weight, bias, indices)


def _linear_gather_gradient(ctx, grad):
    refuse_second_derivative("linear_gather")
    values, *leaves, indices = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = linear_gather_backward(*leaves, *ctx.head, grad, values, indices, need, ctx.impl)
    return for_autograd(gradients, need, len(ctx.needs_input_grad))


_linear_gather.register_autograd(_linear_gather_gradient, setup_context=_linear_gather_context)


# --- log-sum-exp, without given ids -----------------------------------------------------------------------------


def linear_logsumexp(hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, impl: str) -> Tensor:
    """`[N]` log-sum-exp of z / T over the ids not in `exclude` `[N, K]`; an id below 0 excludes nothing."""
    if impl == "reference":
        return reference.complement_and_values(hidden, head, exclude, temperature)[0]
    need = needs_gradient(hidden)
    return _linear_logsumexp(*flat(hidden, head), exclude, temperature, need, impl)[0]


@custom_op(
    "linear_logsumexp",
    f"({HEAD}, Tensor exclude, float temperature, bool[] need, str impl) -> (Tensor, Tensor)",
)
def _linear_logsumexp(hidden, head, exclude, temperature, need, impl):
    """(log-sum-exp `[N]`, its gradient in h `[N, D]` if that is needed: a row's factor is all that comes later)."""
    run = implementation(impl).linear_logsumexp
    tail, dhidden = run(hidden, head, exclude, temperature, Need(*need))
    return tail, hidden.new_empty(0) if dhidden is None else dhidden


@_linear_logsumexp.register_fake
def _(hidden, weight, bias, softcap, scale, exclude, temperature, need, impl):
    tail = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    return tail, gradients_like((hidden, weight, bias), need, grad_dtype(hidden.dtype))[0]


def _linear_logsumexp_context(ctx, inputs, output):
    hidden, weight, bias, *ctx.head, exclude, ctx.temperature, _, ctx.impl = inputs
    save_for_backward(ctx, *output, hidden, weight, bias, exclude)


def _linear_logsumexp_gradient(ctx, grad, _):
    refuse_second_derivative("linear_logsumexp")
    tail, dhidden, hidden, weight, bias, exclude = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients: list[Tensor | None] = [None, None, None]
    if any(need[1:]):
        tails = grad[:, None], tail[:, None]  # without logits at the ids, which have no gradient
        inputs = hidden, weight, bias, *ctx.head, *tails, dhidden, exclude, ctx.temperature
        gradients = list(_complement_and_values_backward(*inputs, (False, *need[1:]), ctx.impl))
    if need[0]:
        gradients[0] = times(dhidden, grad, hidden.dtype, ctx.impl)
    return for_autograd(gradients, need, len(ctx.needs_input_grad))


_linear_logsumexp.register_autograd(_linear_logsumexp_gradient, setup_context=_linear_logsumexp_context)


# --- logits at given ids and the log-sum-exp of all others ------------------------------------------------------


def complement_and_values(
    hidden: Tensor, head: LMHead, ids: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(`[N]` log-sum-exp of z / T over the ids not in `ids`, `[N, K]` z at the ids, `[N]` entropy of those others' softmax).

    One pass, and one backward of the first two; the entropy is empty unless asked for, and a constant. An id below 0 is an
    absent slot: its value is -inf and it excludes nothing.
    """
    options = temperature, needs_gradient(hidden), with_entropy, impl
    both, _, entropy = _complement_and_values(*flat(hidden, head), ids, *options)
    return both[:, -1], both[:, :-1], entropy.detach()


@custom_op(
    "complement_and_values",
    f"({HEAD}, Tensor ids, float temperature, bool[] need, bool with_entropy, str impl) -> (Tensor, Tensor, Tensor)",
)
def _complement_and_values(hidden, head, ids, temperature, need, with_entropy, impl):
    """(values and tail as `[N, K + 1]`, the tail's gradient in h if that is needed, the entropy if that is wanted).

    One tensor holds both: whatever is differentiated, their gradients come together.
    """
    run = implementation(impl).complement_and_values
    tail, values, dtail, entropy = run(hidden, head, ids, temperature, need[0], with_entropy)
    return torch.cat([values, tail[:, None]], 1), dtail, entropy


@_complement_and_values.register_fake
def _(hidden, weight, bias, softcap, scale, ids, temperature, need, with_entropy, impl):
    both = hidden.new_empty(ids.shape[0], ids.shape[1] + 1, dtype=acc_dtype(hidden.dtype))
    entropy = both.new_empty(ids.shape[0] if with_entropy else 0)
    return both, both.new_empty(hidden.shape if need[0] else (0,)), entropy


@custom_op(
    "complement_and_values_backward",
    f"({HEAD}, Tensor grad, Tensor both, Tensor dtail, Tensor ids, float temperature, bool[] need, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)
def _complement_and_values_backward(hidden, head, grad, both, dtail, ids, temperature, need, impl):
    run = implementation(impl).complement_and_values_backward
    parts = grad[:, -1], grad[:, :-1], both[:, -1], both[:, :-1]
    return present(run(*parts, dtail, hidden, head, ids, temperature, Need(*need)), hidden)


@_complement_and_values_backward.register_fake
def _(hidden, weight, bias, softcap, scale, grad, both, dtail, ids, temperature, need, impl):
    return gradients_like((hidden, weight, bias), need)


def _complement_and_values_context(ctx, inputs, output):
    hidden, weight, bias, *ctx.head, ids, ctx.temperature, _, _, ctx.impl = inputs
    save_for_backward(ctx, *output[:2], hidden, weight, bias, ids)


def _complement_and_values_gradient(ctx, grad, *_):
    refuse_second_derivative("topk_distill_stats")
    need = ctx.needs_input_grad[:3]
    both, dtail, *leaves, ids = ctx.saved_tensors
    inputs = *leaves, *ctx.head, grad, both, dtail, ids, ctx.temperature
    gradients = _complement_and_values_backward(*inputs, need, ctx.impl)
    return for_autograd(gradients, need, len(ctx.needs_input_grad))


_complement_and_values.register_autograd(
    _complement_and_values_gradient, setup_context=_complement_and_values_context
)


# --- token statistics: one pass, without a gradient -------------------------------------------------------------


def token_stats(hidden: Tensor, head: LMHead, labels: Tensor | None, impl: str) -> TokenStats:
    if impl == "reference":
        return reference.token_stats(hidden, head, labels)
    logsumexp, entropy, variance, logprob = _token_stats(*flat(hidden, head), labels, impl)
    return TokenStats(logsumexp, entropy, variance, None if labels is None else logprob)


@custom_op("token_stats", f"({HEAD}, Tensor? labels, str impl) -> (Tensor, Tensor, Tensor, Tensor)")
def _token_stats(hidden, head, labels, impl):
    """(log-sum-exp, entropy, variance of the log-probability, log p of the labels), each `[N]`."""
    *stats, logprob = implementation(impl).token_stats(hidden, head, labels)
    return *stats, stats[0].new_empty(0) if logprob is None else logprob


@_token_stats.register_fake
def _(hidden, weight, bias, softcap, scale, labels, impl):
    row = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    logprob = row.new_empty(0) if labels is None else torch.empty_like(row)
    return row, torch.empty_like(row), torch.empty_like(row), logprob
