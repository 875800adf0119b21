"""Ops of hidden states and a head: selected logits, logits at ids, log-sum-exps, statistics of a distribution."""
# No `from __future__ import annotations` here: torch.library reads the annotations to write the op's schema.

import torch
from torch import Tensor

from .. import chunked, chunked_topk
from ..dispatch import acc_dtype
from ..projection import Projection
from .op import custom_op, for_autograd, gradients_like, once_only, present

# --- linear_topk: a selection, without a gradient --------------------------------------------------------------


@custom_op("linear_topk")
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    k: int,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from ..kernels import linear_topk as kernel

        return kernel.linear_topk(
            hidden, weight, bias, k, softcap=softcap, scale=scale, temperature=temperature
        )
    return chunked_topk.linear_topk(hidden, Projection(weight, bias, softcap, scale), k, temperature)


@linear_topk.register_fake
def _(hidden, weight, bias, softcap, scale, k, temperature, impl):
    values = hidden.new_empty(hidden.shape[0], k, dtype=acc_dtype(hidden.dtype))
    return values, torch.empty_like(values, dtype=torch.int64), values.new_empty(hidden.shape[0])


# --- linear_gather: logits at given ids ------------------------------------------------------------------------


@custom_op("linear_gather")
def linear_gather(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    softcap: float | None,
    scale: float,
    impl: str,
) -> Tensor:
    if impl == "triton":
        from ..kernels import linear_gather as kernel

        return kernel.linear_gather_forward(hidden, weight, bias, indices, softcap=softcap, scale=scale)
    return chunked.linear_gather(hidden, Projection(weight, bias, softcap, scale), indices)


@linear_gather.register_fake
def _(hidden, weight, bias, indices, softcap, scale, impl):
    return hidden.new_empty(indices.shape, dtype=acc_dtype(hidden.dtype))


@custom_op("linear_gather_backward")
def linear_gather_backward(
    grad: Tensor,
    values: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    softcap: float | None,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from ..kernels import linear_gather as kernel

        gradients = kernel.linear_gather_backward(
            grad, values, hidden, weight, bias, indices, softcap=softcap, scale=scale,
            need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
        )  # fmt: skip
    else:
        head = Projection(weight, bias, softcap, scale)
        gradients = chunked.linear_gather_backward(
            grad, values, hidden, head, indices, need_hidden, need_weight, need_bias
        )
    return present(gradients, hidden, weight, bias)


@linear_gather_backward.register_fake
def _(grad, values, hidden, weight, bias, indices, softcap, scale, need_hidden, need_weight, need_bias, impl):
    return gradients_like(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _linear_gather_context(ctx, inputs, output):
    hidden, weight, bias, indices, ctx.softcap, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(output, hidden, weight, bias, indices)


def _linear_gather_gradient(ctx, grad):
    values, hidden, weight, bias, indices = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = linear_gather_backward(
        grad, values, hidden, weight, bias, indices, ctx.softcap, ctx.scale, *need, ctx.impl
    )
    return for_autograd(gradients, need, len(ctx.needs_input_grad))


once_only(linear_gather_backward, "linear_gather")
linear_gather.register_autograd(_linear_gather_gradient, setup_context=_linear_gather_context)


# --- complement_and_values: the log-sum-exp without the ids, and the logits at the ids -------------------------


@custom_op("complement_and_values")
def complement_and_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tail `[N]`, values `[N, K]`, dtail/dh `[N, D]` where `chunked` makes it on the way)."""
    if impl == "triton":
        from ..kernels import linear_logsumexp as kernel

        tail, values = kernel.complement_and_values(
            hidden, weight, bias, indices, softcap=softcap, scale=scale, temperature=temperature
        )
        return tail, values, tail.new_empty(0)
    head = Projection(weight, bias, softcap, scale)
    return chunked.complement_and_values(hidden, head, indices, temperature, with_gradient)


@complement_and_values.register_fake
def _(hidden, weight, bias, indices, softcap, scale, temperature, with_gradient, impl):
    tail = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    along = with_gradient and impl == "chunked"  # the kernel recomputes instead
    return tail, tail.new_empty(indices.shape), tail.new_empty(hidden.shape if along else (0,))


@custom_op("complement_and_values_backward")
def complement_and_values_backward(
    grad_tail: Tensor,
    grad_values: Tensor,
    tail: Tensor,
    values: Tensor,
    dtail: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        from ..kernels import linear_logsumexp as kernel

        gradients = kernel.complement_and_values_backward(
            grad_tail, grad_values, tail, values, hidden, weight, bias, indices,
            softcap=softcap, scale=scale, temperature=temperature,
            need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
        )  # fmt: skip
    else:
        head = Projection(weight, bias, softcap, scale)
        gradients = chunked.complement_and_values_backward(
            grad_tail, grad_values, tail, values, dtail, hidden, head, indices, temperature,
            need_hidden, need_weight, need_bias,
        )  # fmt: skip
    return present(gradients, hidden, weight, bias)


@complement_and_values_backward.register_fake
def _(grad_tail, grad_values, tail, values, dtail, hidden, weight, bias, *rest):
    *need, _impl = rest[4:]  # after indices, softcap, scale and temperature
    return gradients_like(hidden, weight, bias, *need)


def _complement_context(ctx, inputs, output):
    hidden, weight, bias, indices, ctx.softcap, ctx.scale, ctx.temperature, _, ctx.impl = inputs
    ctx.save_for_backward(*output, hidden, weight, bias, indices)


def _complement_gradient(ctx, grad_tail, grad_values, _grad_dtail):
    need = ctx.needs_input_grad[:3]
    options = ctx.softcap, ctx.scale, ctx.temperature
    gradients = complement_and_values_backward(
        grad_tail, grad_values, *ctx.saved_tensors, *options, *need, ctx.impl
    )
    return for_autograd(gradients, need, len(ctx.needs_input_grad))


once_only(complement_and_values_backward, "linear_logsumexp")
complement_and_values.register_autograd(_complement_gradient, setup_context=_complement_context)


# --- token_stats: one pass, without a gradient -----------------------------------------------------------------


@custom_op("token_stats")
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    labels: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp, entropy, variance of the log-probability, log p of the labels), each `[N]`."""
    if impl == "triton":
        from ..kernels import token_stats as kernel

        stats = kernel.token_stats(hidden, weight, bias, labels, softcap=softcap, scale=scale)
    else:
        stats = chunked.token_stats(hidden, Projection(weight, bias, softcap, scale), labels)
    logsumexp, entropy, variance, logprob = stats
    return logsumexp, entropy, variance, logsumexp.new_empty(0) if logprob is None else logprob


@token_stats.register_fake
def _(hidden, weight, bias, softcap, scale, labels, impl):
    row = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    logprob = row.new_empty(0) if labels is None else torch.empty_like(row)
    return row, torch.empty_like(row), torch.empty_like(row), logprob
