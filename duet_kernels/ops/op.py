"""How an op is registered, and what stands for an absent gradient."""

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import exact_dtypes
from ..head import LMHead, Need

Gradients = tuple[Tensor, Tensor, Tensor]  # dh, dW, db; an empty tensor where nobody asked


def implementation(impl: str) -> Any:
    """The package that runs an op: `portable`, or `triton`, which is imported when it is first wanted."""
    return importlib.import_module(f"..{'triton' if impl == 'triton' else 'portable'}", __package__)


def flat(hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor, Tensor | None, float | None, float]:
    """What every op begins with: hidden states, weight, bias, softcap and scale.

    A custom op drops forward-mode tangents without a word, and zeros would pass for a derivative. torch.func.grad cannot go
    through the autograd function that torch makes of it.
    """
    head = head.narrowed()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and not torch.compiler.is_compiling():
        for name, leaf in (("hidden", hidden), ("head.weight", head.weight), ("head.bias", head.bias)):
            if leaf is not None and (got := _differentiated_by(leaf)):
                raise RuntimeError(f"{name}: {got}, wanted a plain tensor; use impl='reference'")
    return hidden, head.weight, head.bias, head.softcap, head.scale


def _differentiated_by(leaf: Tensor) -> str | None:
    """Which way of torch.func differentiates by this tensor, if one does that the ops do not know."""
    if forward_ad.unpack_dual(leaf).tangent is not None:
        return "carries a forward-mode tangent (torch.func.jvp)"
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (not in torch's stubs)
    while functorch.is_functorch_wrapped_tensor(leaf):
        if functorch.is_gradtrackingtensor(leaf) and leaf.requires_grad:
            return "is differentiated by torch.func.grad or vjp"
        leaf = functorch.get_unwrapped(leaf)
    return None


HEAD = "Tensor hidden, Tensor weight, Tensor? bias, float? softcap, float scale"  # what `flat` gives


class Op:
    """A pure operation on tensors and numbers, with its derivative; its body takes an LMHead for what follows `hidden` in HEAD.

    torch.compile, fake tensors and torch.func.vmap get a custom op. Everything else calls the body itself, as an
    autograd function where there is a derivative: the machinery of a custom op takes longer than a small kernel.
    """

    def __init__(self, name: str, schema: str, body: Callable[..., Any]) -> None:
        has_head = schema.startswith(f"({HEAD}")

        def exact(first: Tensor, *args: Any) -> Any:
            with exact_dtypes(first.device):  # autocast would turn fp32 products into bf16
                return body(first, LMHead(*args[:4]), *args[4:]) if has_head else body(first, *args)

        name = f"duet_kernels::{name}"
        self.custom = torch.library.custom_op(name, exact, mutates_args=(), schema=schema)
        self.eager: Callable[..., Any] = exact

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        return self.custom.register_fake(fake)

    def register_autograd(
        self, gradient: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> Any:
            # Nobody differentiates the first output, and no other has a derivative.
            return gradient(ctx, grad, *others) if grad is not None else (None,) * len(ctx.needs_input_grad)

        body = self.eager

        def forward(ctx: Any, *args: Any) -> Any:
            output = body(*args)
            setup_context(ctx, args, output)
            return output

        self.custom.register_autograd(backward, setup_context=setup_context)
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.eager = type("Eager", (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]

    def __call__(self, first: Tensor, *args: Any) -> Any:
        return (self.eager if plain(first) else self.custom)(first, *args)


def plain(x: Tensor) -> bool:
    """Whether nobody traces (no compiler, no tensor subclass, no function transform). Only then something may be written in place."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._are_functorch_transforms_active()


def custom_op(name: str, schema: str) -> Callable[[Callable[..., Any]], Op]:
    return functools.partial(Op, name, schema)


def refuse_second_derivative(name: str) -> None:
    """Raise in a backward pass that is itself to be differentiated: what it multiplies was made in the forward pass."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative (create_graph=True); use impl='reference'")


def times(gradient: Tensor, factor: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """factor * gradient `[N, D]`, rounded to `dtype`: one factor, or one of each row; no temporary in the dtype of the factor."""
    if not plain(factor):
        return (gradient * (factor[:, None] if factor.dim() else factor)).to(dtype)
    return implementation(impl).times_rows(gradient, factor, dtype)


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for the backward pass. Autograd refuses those that were made in inference mode: they are copied."""
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates: dW is one
    ctx.save_for_backward(*(x.clone() if x is not None and x.is_inference() else x for x in tensors))


def present(gradients: Iterable[Tensor | None], hidden: Tensor) -> Gradients:
    """(dh, dW, db) with an empty tensor for each None."""
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in gradients)
    return dhidden, dweight, dbias


def gradients_like(
    leaves: Sequence[Any], need: Sequence[bool], dtype: torch.dtype | None = None
) -> Gradients:
    """What `present` returns, without values, for a fake kernel; `leaves` are hidden states, weight and bias."""
    options: Any = {"dtype": dtype, "memory_format": torch.contiguous_format}
    like = (
        torch.empty_like(x, **options) if needed else None for x, needed in zip(leaves, need, strict=True)
    )
    return present(like, leaves[0])


def for_autograd(gradients: Any, need: tuple[bool, ...], inputs: int) -> tuple[Tensor | None, ...]:
    """One entry for each input of an op, the first of which are hidden states, weight and bias."""
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, need, strict=True)]
    return *wanted, *[None] * (inputs - len(wanted))


def needs_gradient(*leaves: Tensor | None) -> Need:
    """Which of hidden states, weight and bias a gradient is made for along with the value."""
    on = torch.is_grad_enabled()
    return Need(*[on and leaf is not None and leaf.requires_grad for leaf in leaves])
