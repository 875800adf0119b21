"""One custom op a primitive: the seam between autograd, torch.compile and the implementations. No maths.

Every op takes plain tensors and numbers, its last argument names the implementation (`chunked` or `triton`), its
fake kernel gives shapes for torch.compile, and its backward pass is an op again. Nothing saved is ever written;
absent results are empty tensors, because an op cannot return None. Triton is imported when a kernel is first run.
"""
# No `from __future__ import annotations` here: torch.library reads the annotations to write the op's schema.

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import chunked, dense_chunks, rowwise
from .dispatch import acc_dtype, exact_dtypes
from .divergence import Divergence
from .projection import Projection


def _custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A pure op whose body computes in the dtypes it chose: autocast would turn its fp32 products into bf16."""

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)  # keeps the annotations that the schema is read from
        def exact(first: Tensor, *args: Any) -> Any:
            with exact_dtypes(first.device):
                return body(first, *args)

        return torch.library.custom_op(f"duet_kernels::{name}", exact, mutates_args=())

    return register


def _empty(like: Tensor, wanted: bool = False) -> Tensor:
    """An uninitialised tensor like another one, or the empty tensor that stands for None."""
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else like.new_empty(0)


def _present(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _bias_like(weight: Tensor, bias: Tensor | None) -> Tensor:
    """What db is like; without a bias nobody asks for it."""
    return weight.new_empty(0) if bias is None else bias


def _wanted(gradient: Tensor, needed: bool) -> Tensor | None:
    return gradient if needed else None


# --- linear_topk: a selection, without a gradient --------------------------------------------------------------


@_custom_op("linear_topk")
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
        from .kernels import linear_topk as kernel

        return kernel.linear_topk(
            hidden, weight, bias, k, softcap=softcap, scale=scale, temperature=temperature
        )
    return chunked.linear_topk(hidden, Projection(weight, bias, softcap, scale), k, temperature)


@linear_topk.register_fake
def _(hidden, weight, bias, softcap, scale, k, temperature, impl):
    values = hidden.new_empty(hidden.shape[0], k, dtype=acc_dtype(hidden.dtype))
    return values, torch.empty_like(values, dtype=torch.int64), values.new_empty(hidden.shape[0])


# --- linear_gather: logits at given ids ------------------------------------------------------------------------


@_custom_op("linear_gather")
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
        from .kernels import linear_gather as kernel

        return kernel.linear_gather_forward(hidden, weight, bias, indices, softcap=softcap, scale=scale)
    return chunked.linear_gather(hidden, Projection(weight, bias, softcap, scale), indices)


@linear_gather.register_fake
def _(hidden, weight, bias, indices, softcap, scale, impl):
    return hidden.new_empty(indices.shape, dtype=acc_dtype(hidden.dtype))


@_custom_op("linear_gather_backward")
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
        from .kernels import linear_gather as kernel

        gradients = kernel.linear_gather_backward(
            grad,
            values,
            hidden,
            weight,
            bias,
            indices,
            softcap=softcap,
            scale=scale,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    else:
        head = Projection(weight, bias, softcap, scale)
        gradients = chunked.linear_gather_backward(
            grad, values, hidden, head, indices, need_hidden, need_weight, need_bias
        )
    dhidden, dweight, dbias = gradients
    return _present(dhidden, hidden), _present(dweight, weight), _present(dbias, _bias_like(weight, bias))


@linear_gather_backward.register_fake
def _(grad, values, hidden, weight, bias, indices, softcap, scale, need_hidden, need_weight, need_bias, impl):
    return (
        _empty(hidden, need_hidden),
        _empty(weight, need_weight),
        _empty(_bias_like(weight, bias), need_bias),
    )


def _linear_gather_context(ctx, inputs, output):
    hidden, weight, bias, indices, ctx.softcap, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(output, hidden, weight, bias, indices)


def _linear_gather_gradient(ctx, grad):
    values, hidden, weight, bias, indices = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = linear_gather_backward(
        grad, values, hidden, weight, bias, indices, ctx.softcap, ctx.scale, *need, ctx.impl
    )
    return *map(_wanted, gradients, need), None, None, None, None


linear_gather.register_autograd(_linear_gather_gradient, setup_context=_linear_gather_context)


# --- complement_and_values: the log-sum-exp without the ids, and the logits at the ids -------------------------


@_custom_op("complement_and_values")
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
    if impl == "triton":
        from .kernels import linear_logsumexp as kernel

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


@_custom_op("complement_and_values_backward")
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
        from .kernels import linear_logsumexp as kernel

        gradients = kernel.complement_and_values_backward(
            grad_tail,
            grad_values,
            tail,
            values,
            hidden,
            weight,
            bias,
            indices,
            softcap=softcap,
            scale=scale,
            temperature=temperature,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    else:
        gradients = chunked.complement_and_values_backward(
            grad_tail,
            grad_values,
            tail,
            values,
            dtail,
            hidden,
            Projection(weight, bias, softcap, scale),
            indices,
            temperature,
            need_hidden,
            need_weight,
            need_bias,
        )
    dhidden, dweight, dbias = gradients
    return _present(dhidden, hidden), _present(dweight, weight), _present(dbias, _bias_like(weight, bias))


@complement_and_values_backward.register_fake
def _(
    grad_tail,
    grad_values,
    tail,
    values,
    dtail,
    hidden,
    weight,
    bias,
    indices,
    softcap,
    scale,
    temperature,
    need_hidden,
    need_weight,
    need_bias,
    impl,
):
    return (
        _empty(hidden, need_hidden),
        _empty(weight, need_weight),
        _empty(_bias_like(weight, bias), need_bias),
    )


def _complement_context(ctx, inputs, output):
    hidden, weight, bias, indices, ctx.softcap, ctx.scale, ctx.temperature, _, ctx.impl = inputs
    ctx.save_for_backward(*output, hidden, weight, bias, indices)


def _complement_gradient(ctx, grad_tail, grad_values, _grad_dtail):
    tail, values, dtail, hidden, weight, bias, indices = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = complement_and_values_backward(
        grad_tail,
        grad_values,
        tail,
        values,
        dtail,
        hidden,
        weight,
        bias,
        indices,
        ctx.softcap,
        ctx.scale,
        ctx.temperature,
        *need,
        ctx.impl,
    )
    return *map(_wanted, gradients, need), None, None, None, None, None, None


complement_and_values.register_autograd(_complement_gradient, setup_context=_complement_context)


# --- topk_divergence: the loss of each row, its gradient made on the way ---------------------------------------


@_custom_op("topk_divergence")
def topk_divergence(
    student: Tensor,
    teacher: Tensor,
    student_tail: Tensor | None,
    teacher_tail: Tensor | None,
    factor: Tensor,
    divergence: str,
    normalization: str,
    temperature: float,
    beta: float,
    delta: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(`[N]` factor * loss, `[N, K]` its gradient in the student's logits, `[N]` in the student's tail)."""
    if impl == "triton":
        from .kernels import topk_divergence as kernel

        return kernel.topk_divergence(
            student,
            teacher,
            student_tail,
            teacher_tail,
            factor,
            divergence=divergence,
            normalization=normalization,
            temperature=temperature,
            beta=beta,
            delta=delta,
        )
    spec = Divergence(divergence, normalization, temperature, beta, delta)
    return rowwise.divergence_and_gradient(student, teacher, student_tail, teacher_tail, factor, spec)


@topk_divergence.register_fake
def _(
    student,
    teacher,
    student_tail,
    teacher_tail,
    factor,
    divergence,
    normalization,
    temperature,
    beta,
    delta,
    impl,
):
    rows = student.shape[0]
    tail = rows if normalization in ("tail", "zeroed", "truncated") else 0
    return student.new_empty(rows), student.new_empty(student.shape), student.new_empty(tail)


def _topk_divergence_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _topk_divergence_gradient(ctx, grad, _grad_dstudent, _grad_dtail):
    dstudent, dtail = ctx.saved_tensors
    return (
        grad[:, None] * dstudent,
        None,
        grad * dtail if ctx.needs_input_grad[2] else None,
        *[None] * 8,
    )


topk_divergence.register_autograd(_topk_divergence_gradient, setup_context=_topk_divergence_context)


# --- linear_divergence: the dense loss from both hidden states -------------------------------------------------


@_custom_op("linear_divergence")
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    teacher_scale: float,
    factor: Tensor,
    divergence: str,
    temperature: float,
    beta: float,
    delta: float,
    reduce: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(factor * loss summed, or of each row; dh, dW and db of the sum where they are needed).

    A sum's gradient is known up to one number when the loss is computed, so it is made there (4 products). Rows
    each get their own upstream gradient: the backward pass computes them again with it as their factor (6 products).
    """
    if impl == "triton":
        from .kernels import linear_divergence as kernel

        loss, dhidden, dweight, dbias = kernel.linear_divergence(
            hidden,
            weight,
            bias,
            softcap,
            scale,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            teacher_softcap,
            teacher_scale,
            factor,
            divergence=divergence,
            temperature=temperature,
            beta=beta,
            delta=delta,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    else:
        raw = divergence in ("huber", "mse", "l1")
        spec = Divergence(divergence, "none" if raw else "renormalize", temperature, beta, delta)
        loss, dhidden, dweight, dbias = dense_chunks.linear_divergence(
            hidden,
            Projection(weight, bias, softcap, scale),
            teacher_hidden,
            Projection(teacher_weight, teacher_bias, teacher_softcap, teacher_scale),
            factor,
            spec,
            need_hidden,
            need_weight,
            need_bias,
        )
    gradients = _present(dhidden, hidden), _present(dweight, weight), _present(dbias, weight)
    return loss.sum() if reduce else loss, *gradients


@linear_divergence.register_fake
def _(
    hidden,
    weight,
    bias,
    softcap,
    scale,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    teacher_softcap,
    teacher_scale,
    factor,
    divergence,
    temperature,
    beta,
    delta,
    reduce,
    need_hidden,
    need_weight,
    need_bias,
    impl,
):
    acc = acc_dtype(hidden.dtype)
    out = acc if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty(() if reduce else hidden.shape[:1], dtype=acc),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=out if need_hidden else None),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=out if need_weight else None),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=out if need_bias else None),
    )


def _linear_divergence_context(ctx, inputs, output):
    hidden, weight, bias, softcap, scale, t_hidden, t_weight, t_bias, t_softcap, t_scale, factor = inputs[:11]
    *ctx.options, ctx.reduce, _, _, _, ctx.impl = inputs[11:]
    ctx.dtype = hidden.dtype
    ctx.projections = softcap, scale, t_softcap, t_scale
    if ctx.reduce:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(hidden, weight, bias, t_hidden, t_weight, t_bias, factor)


def _linear_divergence_gradient(ctx, grad, *_):
    if torch.is_grad_enabled():
        # The gradient was made in the forward pass; differentiating it again would leave out what it depends on.
        raise RuntimeError(
            "linear_distill_loss with k=None has no second derivative (create_graph=True); use impl='reference'"
        )
    need = ctx.needs_input_grad[:3]
    if ctx.reduce:
        gradients = [g * grad for g in ctx.saved_tensors]
    else:
        hidden, weight, bias, t_hidden, t_weight, t_bias, factor = ctx.saved_tensors
        softcap, scale, t_softcap, t_scale = ctx.projections
        student = hidden, weight, bias, softcap, scale
        teacher = t_hidden, t_weight, t_bias, t_softcap, t_scale
        factor = factor * grad
        _, *gradients = linear_divergence(*student, *teacher, factor, *ctx.options, True, *need, ctx.impl)
    return *(g.to(ctx.dtype) if needed else None for g, needed in zip(gradients, need, strict=True)), *[
        None
    ] * 17


linear_divergence.register_autograd(_linear_divergence_gradient, setup_context=_linear_divergence_context)


# --- linear_cross_entropy: the loss of the labels, its gradient made on the way ---------------------------------


@_custom_op("linear_cross_entropy")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    labels: Tensor,
    factor: Tensor,
    reduce: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(factor * loss summed, or of each row; dh, dW and db of the sum where they are needed), as `linear_divergence`."""
    if impl == "triton":
        from .kernels import linear_cross_entropy as kernel

        loss, dhidden, dweight, dbias = kernel.linear_cross_entropy(
            hidden,
            weight,
            bias,
            softcap,
            scale,
            labels,
            factor,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
    else:
        head = Projection(weight, bias, softcap, scale)
        loss, dhidden, dweight, dbias = dense_chunks.linear_cross_entropy(
            hidden, head, labels, factor, need_hidden, need_weight, need_bias
        )
    gradients = _present(dhidden, hidden), _present(dweight, weight), _present(dbias, weight)
    return loss.sum() if reduce else loss, *gradients


@linear_cross_entropy.register_fake
def _(
    hidden, weight, bias, softcap, scale, labels, factor, reduce, need_hidden, need_weight, need_bias, impl
):
    acc = acc_dtype(hidden.dtype)
    out = acc if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty(() if reduce else hidden.shape[:1], dtype=acc),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=out if need_hidden else None),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=out if need_weight else None),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=out if need_bias else None),
    )


def _linear_cross_entropy_context(ctx, inputs, output):
    hidden, weight, bias, ctx.softcap, ctx.scale, labels, factor, ctx.reduce, *_, ctx.impl = inputs
    ctx.dtype = hidden.dtype
    if ctx.reduce:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, factor)


def _linear_cross_entropy_gradient(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy has no second derivative (create_graph=True); use impl='reference'"
        )
    need = ctx.needs_input_grad[:3]
    if ctx.reduce:
        gradients = [g * grad for g in ctx.saved_tensors]
    else:
        hidden, weight, bias, labels, factor = ctx.saved_tensors
        linear = hidden, weight, bias, ctx.softcap, ctx.scale
        _, *gradients = linear_cross_entropy(*linear, labels, factor * grad, True, *need, ctx.impl)
    return *(g.to(ctx.dtype) if needed else None for g, needed in zip(gradients, need, strict=True)), *[
        None
    ] * 9


linear_cross_entropy.register_autograd(
    _linear_cross_entropy_gradient, setup_context=_linear_cross_entropy_context
)


# --- token_stats: one pass, without a gradient -----------------------------------------------------------------


@_custom_op("token_stats")
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    labels: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        from .kernels import token_stats as kernel

        stats = kernel.token_stats(hidden, weight, bias, labels, softcap=softcap, scale=scale)
    else:
        stats = chunked.token_stats(hidden, Projection(weight, bias, softcap, scale), labels)
    logsumexp, entropy, variance, logprob = stats
    return logsumexp, entropy, variance, _present(logprob, logsumexp)


@token_stats.register_fake
def _(hidden, weight, bias, softcap, scale, labels, impl):
    row = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    return row, torch.empty_like(row), torch.empty_like(row), _empty(row, labels is not None)
