"""Ops that are losses, whose gradient is made along with the value: the factor of every row is one of their inputs."""
# No `from __future__ import annotations` here: torch.library reads the annotations to write the op's schema.

from collections.abc import Callable

import torch
from torch import Tensor

from .. import dense_chunks, rowwise
from ..dispatch import acc_dtype
from ..divergence import RAW, Divergence
from ..projection import Projection
from .op import Gradients, custom_op, for_autograd, gradients_like, no_second_derivative, present

# --- topk_divergence: of logits at K ids -----------------------------------------------------------------------


@custom_op("topk_divergence")
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
        from ..kernels import topk_divergence as kernel

        return kernel.topk_divergence(
            student, teacher, student_tail, teacher_tail, factor,
            divergence=divergence, normalization=normalization, temperature=temperature, beta=beta, delta=delta,
        )  # fmt: skip
    spec = Divergence(divergence, normalization, temperature, beta, delta)
    return rowwise.divergence_and_gradient(student, teacher, student_tail, teacher_tail, factor, spec)


@topk_divergence.register_fake
def _(student, teacher, student_tail, teacher_tail, factor, divergence, normalization, *rest):
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


# --- what the losses of hidden states share ---------------------------------------------------------------------
# A sum's gradient is known up to one number when the loss is computed, so it is made there. Rows each get their own
# upstream gradient: the backward pass computes them again with it as their factor.


def _fused(
    found: tuple[Tensor | None, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, reduce: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of an op: the rows' losses or their sum, and the gradients of the sum."""
    loss, *gradients = found
    assert loss is not None
    return loss.sum() if reduce else loss, *present(gradients, hidden, weight, bias)


def _fused_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reduce: bool, *need: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_fused` returns, without values."""
    acc = acc_dtype(hidden.dtype)
    loss = hidden.new_empty(() if reduce else hidden.shape[:1], dtype=acc)
    # A loss scale comes after the gradients: fp16 could not hold them yet.
    out = acc if hidden.dtype == torch.float16 else hidden.dtype
    return loss, *gradients_like(hidden, weight, bias, *need, dtype=out)


def _fused_gradient(
    ctx, grad: Tensor, name: str, again: Callable[[tuple[bool, ...]], Gradients]
) -> tuple[Tensor | None, ...]:
    """The gradients made along with the sum, times its upstream gradient; those of rows are made again."""
    if torch.is_grad_enabled():
        # Differentiating what was made in the forward pass would leave out what it depends on.
        raise RuntimeError(no_second_derivative(name))
    need = ctx.needs_input_grad[:3]
    gradients = [g * grad for g in ctx.saved_tensors] if ctx.reduce else again(need)
    return for_autograd([g.to(ctx.dtype) for g in gradients], need, len(ctx.needs_input_grad))


# --- linear_divergence: the dense loss from both hidden states -------------------------------------------------


@custom_op("linear_divergence")
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
    """(factor * loss summed, or of each row; dh, dW and db of the sum where they are needed): 4 products, 6 for rows."""
    need = need_hidden, need_weight, need_bias
    if impl == "triton":
        from ..kernels import linear_divergence as kernel

        found = kernel.linear_divergence(
            hidden, weight, bias, softcap, scale,
            teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale,
            factor, divergence=divergence, temperature=temperature, beta=beta, delta=delta,
            need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
        )  # fmt: skip
    else:
        normalization = "none" if divergence in RAW else "renormalize"
        spec = Divergence(divergence, normalization, temperature, beta, delta)
        head = Projection(weight, bias, softcap, scale)
        teacher = Projection(teacher_weight, teacher_bias, teacher_softcap, teacher_scale)
        found = dense_chunks.linear_divergence(hidden, head, teacher_hidden, teacher, factor, spec, *need)
    return _fused(found, hidden, weight, bias, reduce)


@linear_divergence.register_fake
def _(hidden, weight, bias, *rest):
    *_, reduce, need_hidden, need_weight, need_bias, _impl = rest
    return _fused_like(hidden, weight, bias, reduce, need_hidden, need_weight, need_bias)


def _linear_divergence_context(ctx, inputs, output):
    hidden, weight, bias, softcap, scale, t_hidden, t_weight, t_bias, t_softcap, t_scale, factor = inputs[:11]
    *ctx.options, ctx.reduce, _, _, _, ctx.impl = inputs[11:]
    ctx.dtype = hidden.dtype
    ctx.projections = (softcap, scale), (t_softcap, t_scale)
    if ctx.reduce:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(hidden, weight, bias, t_hidden, t_weight, t_bias, factor)


def _linear_divergence_gradient(ctx, grad, *_):
    def again(need):
        *leaves, t_hidden, t_weight, t_bias, factor = ctx.saved_tensors
        shape, t_shape = ctx.projections
        student, teacher = (*leaves, *shape), (t_hidden, t_weight, t_bias, *t_shape)
        return linear_divergence(*student, *teacher, factor * grad, *ctx.options, True, *need, ctx.impl)[1:]

    return _fused_gradient(ctx, grad, "linear_distill_loss with k=None", again)


linear_divergence.register_autograd(_linear_divergence_gradient, setup_context=_linear_divergence_context)


# --- linear_cross_entropy: of the labels ------------------------------------------------------------------------


@custom_op("linear_cross_entropy")
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
    """(factor * loss summed, or of each row; dh, dW and db of the sum where they are needed): 3 products, 4 for rows."""
    if impl == "triton":
        from ..kernels import linear_cross_entropy as kernel

        found = kernel.linear_cross_entropy(
            hidden, weight, bias, softcap, scale, labels, factor,
            need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
        )  # fmt: skip
    else:
        head = Projection(weight, bias, softcap, scale)
        found = dense_chunks.linear_cross_entropy(
            hidden, head, labels, factor, need_hidden, need_weight, need_bias
        )
    return _fused(found, hidden, weight, bias, reduce)


@linear_cross_entropy.register_fake
def _(hidden, weight, bias, softcap, scale, labels, factor, reduce, *rest):
    *need, _impl = rest
    return _fused_like(hidden, weight, bias, reduce, *need)


def _linear_cross_entropy_context(ctx, inputs, output):
    hidden, weight, bias, ctx.softcap, ctx.scale, labels, factor, ctx.reduce, *_, ctx.impl = inputs
    ctx.dtype = hidden.dtype
    if ctx.reduce:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, factor)


def _linear_cross_entropy_gradient(ctx, grad, *_):
    def again(need):
        *leaves, labels, factor = ctx.saved_tensors
        linear = *leaves, ctx.softcap, ctx.scale
        return linear_cross_entropy(*linear, labels, factor * grad, True, *need, ctx.impl)[1:]

    return _fused_gradient(ctx, grad, "linear_cross_entropy", again)


linear_cross_entropy.register_autograd(
    _linear_cross_entropy_gradient, setup_context=_linear_cross_entropy_context
)
