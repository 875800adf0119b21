"""Selected logits, logits at ids, log-sum-exps and token statistics, as custom ops of hidden states and a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import acc_dtype, grad_dtype
from ..head import LMHead
from .op import HEAD, LEAVES, Op, gradients_like, needs_gradient, refuse_second_derivative, times

# --- top-k: a selection, without a gradient ---------------------------------------------------------------------


def linear_topk(
    hidden: Tensor, head: LMHead, k: int, temperature: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(`[N, K]` the largest logits, their ids, `[N]` log-sum-exp of z / T)."""
    if impl == "reference":
        return reference.linear_topk(hidden, head, k, temperature)
    return _linear_topk(hidden, head, k, temperature, impl)


_linear_topk = Op(
    "linear_topk", f"({HEAD}, SymInt k, float temperature, str impl) -> (Tensor, Tensor, Tensor)"
)


@_linear_topk.register_fake
def _(hidden, weight, bias, softcap, scale, k, temperature, impl):
    values = hidden.new_empty(hidden.shape[0], k, dtype=acc_dtype(hidden.dtype))
    return values, torch.empty_like(values, dtype=torch.int64), values.new_empty(hidden.shape[0])


# --- gather: logits at given ids --------------------------------------------------------------------------------


def linear_gather(hidden: Tensor, head: LMHead, indices: Tensor, impl: str) -> Tensor:
    """`[N, K]` logits at ids. An id below 0 is an absent slot with the value -inf; `reference` reads it as id 0."""
    if impl == "reference":
        return reference.linear_gather(hidden, head, indices)
    return _linear_gather(hidden, head, indices, impl)


_linear_gather = Op("linear_gather", f"({HEAD}, Tensor indices, str impl) -> Tensor")


@_linear_gather.register_fake
def _(hidden, weight, bias, softcap, scale, indices, impl):
    return hidden.new_empty(indices.shape, dtype=acc_dtype(hidden.dtype))


linear_gather_backward = Op(
    "linear_gather_backward",
    f"({HEAD}, Tensor grad, Tensor values, Tensor indices, bool[] need, str impl) -> (Tensor, Tensor, Tensor)",
)


@linear_gather_backward.register_fake
def _(hidden, weight, bias, softcap, scale, grad, values, indices, need, impl):
    return gradients_like((hidden, weight, bias), need)


def _linear_gather_gradient(ctx, inputs, outputs, grad):
    refuse_second_derivative("linear_gather")
    *head, indices, impl = inputs
    return linear_gather_backward(*head, grad, *outputs, indices, ctx.needs_input_grad[:3], impl)


_linear_gather.register_autograd(_linear_gather_gradient, slice(1), saved=(*LEAVES, "indices"))


# --- the log-sum-exp without given ids, and the logits at them --------------------------------------------------


def linear_logsumexp(hidden: Tensor, head: LMHead, exclude: Tensor, temperature: float, impl: str) -> Tensor:
    """`[N]` log-sum-exp of z / T over the ids not in `exclude` `[N, K]`; an id below 0 excludes nothing."""
    if impl == "reference":
        return reference.complement_and_values(hidden, head, exclude, temperature)[0]
    need = needs_gradient(hidden)
    return _complement_and_values(hidden, head, exclude, temperature, False, False, need, impl)[0]


def complement_and_values(
    hidden: Tensor, head: LMHead, ids: Tensor, temperature: float, with_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(`[N]` log-sum-exp of z / T over the ids not in `ids`, `[N, K]` z at the ids, `[N]` entropy of those others' softmax).

    One pass, and one backward of the first two; the entropy is empty unless asked for, and a constant. An id below 0 is an
    absent slot: its value is -inf and it excludes nothing.
    """
    options = temperature, True, with_entropy, needs_gradient(hidden)
    tail, values, _, entropy = _complement_and_values(hidden, head, ids, *options, impl)
    return tail, values, entropy.detach()


_complement_and_values = Op(
    "complement_and_values",
    f"({HEAD}, Tensor ids, float temperature, bool with_values, bool with_entropy, bool[] need, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@_complement_and_values.register_fake
def _(hidden, weight, bias, softcap, scale, ids, temperature, with_values, with_entropy, need, impl):
    (n, k), acc = ids.shape, acc_dtype(hidden.dtype)
    tail = hidden.new_empty(n, dtype=acc)
    values = tail.new_empty(n, k if with_values else 0)
    dtail, entropy = hidden.new_empty(0), hidden.new_empty(0)  # absent: as `Op` gives what is None
    if need[0]:
        dtail = hidden.new_empty(hidden.shape, dtype=acc if with_values else grad_dtype(hidden.dtype))
    return tail, values, dtail, torch.empty_like(tail) if with_entropy else entropy


def _rounded(function: Callable[..., Iterable[Tensor | None]], hidden: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The gradients in the dtype of the inputs, as the fake says: Triton's of fp16 come in fp32."""
    return tuple(None if x is None else x.to(hidden.dtype) for x in function(hidden, *rest))


complement_and_values_backward = Op(
    "complement_and_values_backward",
    f"({HEAD}, Tensor ids, float temperature, Tensor tail, Tensor values, Tensor dtail, Tensor grad_tail, Tensor grad_values, "
    "bool[] need, str impl) -> (Tensor, Tensor, Tensor)",
    _rounded,
)


@complement_and_values_backward.register_fake
def _(hidden, weight, bias, softcap, scale, *rest):
    *_, need, _impl = rest
    return gradients_like((hidden, weight, bias), need)


def _complement_and_values_gradient(ctx, inputs, outputs, grad_tail, grad_values, *_):
    *head, ids, temperature, with_values, _, _, impl = inputs
    refuse_second_derivative("topk_distill_stats" if with_values else "linear_logsumexp")
    (tail, values, dtail), need = outputs, ctx.needs_input_grad[:3]
    if grad_tail is None:
        grad_tail = torch.zeros_like(tail)
    if grad_values is None:  # the ids have no gradient, and dh has one term
        values = grad_values = values[:, :0]
        need = False, *need[1:]
    given = ids, temperature, tail, values, dtail, grad_tail, grad_values
    gradients: list[Tensor | None] = [None, None, None]
    if any(need):
        gradients = list(complement_and_values_backward(*head, *given, need, impl))
    if ctx.needs_input_grad[0] and not need[0]:  # after dW, which needs memory of its own
        gradients[0] = times(dtail, grad_tail, ctx.dtype, impl)
    return gradients


_complement_and_values.register_autograd(_complement_and_values_gradient, slice(3), saved=(*LEAVES, "ids"))


# --- token statistics: one pass, without a gradient -------------------------------------------------------------


def token_stats(
    hidden: Tensor, head: LMHead, labels: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Log-sum-exp, entropy, variance of the log-probability, each `[N]`; log p of the labels, without them empty or None."""
    if impl == "reference":
        return reference.token_stats(hidden, head, labels)
    return _token_stats(hidden, head, labels, impl)


_token_stats = Op("token_stats", f"({HEAD}, Tensor? labels, str impl) -> (Tensor, Tensor, Tensor, Tensor)")


@_token_stats.register_fake
def _(hidden, weight, bias, softcap, scale, labels, impl):
    row = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    logprob = hidden.new_empty(0) if labels is None else torch.empty_like(row)
    return row, torch.empty_like(row), torch.empty_like(row), logprob
