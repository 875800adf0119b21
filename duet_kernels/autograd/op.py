"""How an op is registered, and what stands for an absent gradient."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import exact_dtypes

Gradients = tuple[Tensor, Tensor, Tensor]  # dh, dW, db; an empty tensor where nobody asked


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A pure op whose body computes in the dtypes it chose: autocast would turn its fp32 products into bf16."""

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)  # keeps the annotations that the schema is read from
        def exact(first: Tensor, *args: Any) -> Any:
            with exact_dtypes(first.device):
                return body(first, *args)

        return torch.library.custom_op(f"duet_kernels::{name}", exact, mutates_args=())

    return register


def once_only(backward: Any, name: str) -> None:
    """`backward` has no derivative of its own: say whose second one was asked for, and what has it."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(no_second_derivative(name))

    backward.register_autograd(refuse)


def no_second_derivative(name: str) -> str:
    return f"{name} has no second derivative (create_graph=True); use impl='reference'"


def present(gradients: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    """(dh, dW, db) with an empty tensor for each None."""
    dhidden, dweight, dbias = (
        leaf.new_empty(0) if gradient is None else gradient
        for gradient, leaf in zip(gradients, _leaves(hidden, weight, bias), strict=True)
    )
    return dhidden, dweight, dbias


def gradients_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *need: bool, dtype: torch.dtype | None = None
) -> Gradients:
    """What `present` returns, without values, for a fake kernel."""
    dhidden, dweight, dbias = (
        torch.empty_like(leaf, dtype=dtype, memory_format=torch.contiguous_format)
        if needed
        else leaf.new_empty(0)
        for leaf, needed in zip(_leaves(hidden, weight, bias), need, strict=True)
    )
    return dhidden, dweight, dbias


def _leaves(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    return hidden, weight, weight.new_empty(0) if bias is None else bias


def for_autograd(gradients: Any, need: tuple[bool, ...], inputs: int) -> tuple[Tensor | None, ...]:
    """One entry for each input of an op, the first of which are hidden states, weight and bias."""
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, need, strict=True)]
    return *wanted, *[None] * (inputs - len(wanted))
