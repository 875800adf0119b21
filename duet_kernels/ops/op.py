"""How an op is registered, and what stands for an absent gradient."""

import functools
import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import exact_dtypes
from ..head import LMHead, Need
from ..options import Divergence

Gradients = tuple[Tensor, Tensor, Tensor]  # dh, dW, db; an empty tensor where nobody asked

LEAVES = "hidden", "weight", "bias"
# Hidden states and an LMHead; `Divergence.options`.
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, float? softcap, float scale"
DIVERGENCE = "str divergence, str normalization, float[] numbers"
# What a schema takes apart, by the name of its first part: (the number of parts, what they make).
_WHOLE: dict[str, tuple[int, Callable[..., Any]]] = {
    "weight": (4, LMHead),
    "teacher_weight": (4, LMHead),
    "divergence": (3, lambda name, normalization, numbers: Divergence(name, normalization, *numbers)),
    "need": (1, lambda need: Need(*need)),
}


@functools.cache
def implementation(impl: str) -> Any:
    """The package that runs an op: `portable`, or `triton`, which is imported when it is first wanted."""
    return importlib.import_module(f"..{'triton' if impl == 'triton' else 'portable'}", __package__)


def _grouped(names: list[str]) -> list[tuple[Callable[..., Any], slice]]:
    """How the arguments of a schema become those of the function: what makes each, and of which."""
    whole, at = [], 0
    while at < len(names):
        size, make = _WHOLE.get(names[at], (1, lambda x: x))
        whole.append((make, slice(at, at + size)))
        at += size
    return whole


class Op:
    """A pure operation: the function of its name in `portable` or `triton`, which its last argument, `impl`, chooses.

    `Op("linear_topk", "(Tensor hidden, <the four of a head>, SymInt k, float temperature, str impl) -> ...")` called with
    `(hidden, head, 5, 1.0, "chunked")` runs `portable.linear_topk(hidden, head, 5, 1.0)`. The first argument is a tensor.
    The names `weight`, `teacher_weight`, `divergence` and `need` of a schema stand for what they begin (`_WHOLE`): a head,
    a divergence, which gradients are asked for. A result that is None becomes an empty tensor. `body` is called with the
    function and its arguments, in place of the function.

    torch.compile, fake tensors and torch.func.vmap get a custom op, of tensors and numbers alone. Everything else calls the
    function itself, as an autograd function where there is a derivative: the machinery of a custom op takes longer than a
    small kernel.
    """

    def __init__(self, name: str, schema: str, body: Callable[..., Any] | None = None) -> None:
        names = [argument.split()[-1] for argument in schema[1 : schema.index(")")].split(", ")]
        whole = _grouped(names)

        def forward(ctx: Any, *args: Any) -> Any:
            if len(args) != len(names):
                raise TypeError(f"{name}: wanted {len(names)} arguments, {', '.join(names)}, got {len(args)}")
            *given, impl = [make(*args[parts]) for make, parts in whole]
            room = implementation(impl)
            launching = (
                room.launching(dict(zip(names, args, strict=True))) if impl == "triton" else nullcontext()
            )
            with exact_dtypes(args[0].device), launching:  # autocast would turn fp32 products into bf16
                function = getattr(room, name)
                output = function(*given) if body is None else body(function, *given)
            if not isinstance(output, Tensor):
                output = tuple(args[0].new_empty(0) if x is None else x for x in output)
            if ctx is not None:
                self.setup_context(ctx, args, output)
            return output

        self.name, self.names, self.forward = name, names, forward
        run = functools.partial(forward, None)
        self.custom = torch.library.custom_op(f"duet_kernels::{name}", run, mutates_args=(), schema=schema)
        self.eager: Callable[..., Any] = run
        self.register_fake = self.custom.register_fake

    def register_autograd(
        self,
        gradient: Callable[..., Iterable[Tensor | None]],
        made: slice,
        saved: Collection[str],
        by_head: bool = False,
    ) -> None:
        """`gradient(ctx, inputs, outputs, *grads)` gives the gradients of the first inputs.

        It has the outputs `made` and of the tensors among the inputs those that are `saved`; `by_head`: only where the head
        is trainable, because everything else was made along.
        """

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            keep = any(ctx.needs_input_grad[1:3]) if by_head else True
            tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
            ctx.places = [i for i in tensors if keep and self.names[i] in saved]
            ctx.inputs = [None if i in tensors else x for i, x in enumerate(inputs)]
            ctx.dtype = inputs[0].dtype
            outputs = (output,) if isinstance(output, Tensor) else output
            save_for_backward(ctx, *outputs[made], *(inputs[i] for i in ctx.places))

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            padding = (None,) * len(ctx.needs_input_grad)
            if all(grad is None for grad in grads):
                return padding
            tensors = ctx.saved_tensors  # read once: torch.utils.checkpoint refuses a second time
            inputs, first = list(ctx.inputs), len(tensors) - len(ctx.places)
            for i, x in zip(ctx.places, tensors[first:], strict=True):
                inputs[i] = x
            found = gradient(ctx, inputs, tensors[:first], *grads)
            wanted = [g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)]
            return *wanted, *padding[len(wanted) :]

        self.setup_context = setup_context
        self.custom.register_autograd(backward, setup_context=setup_context)
        members = {"forward": staticmethod(self.forward), "backward": staticmethod(backward)}
        self.eager = type("Eager", (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> Any:
        """With heads and divergences, or with what they are taken apart into.

        A custom op drops forward-mode tangents without a word, and zeros would pass for a derivative. torch.func.grad cannot
        go through the autograd function that torch makes of it.
        """
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        parts: list[Any] = []
        for x in args:
            if isinstance(x, LMHead):
                head = x.narrowed()
                if transformed and not torch.compiler.is_compiling():
                    _refuse_transforms(parts[-1], head)
                parts += head.weight, head.bias, head.softcap, head.scale
            elif isinstance(x, Divergence):
                parts += x.options
            else:
                parts.append(x)
        return (self.eager if plain(*parts) else self.custom)(*parts)


def _refuse_transforms(hidden: Tensor, head: LMHead) -> None:
    """Refuse the ways of torch.func to differentiate that the ops do not know."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (not in torch's stubs)
    for name, leaf in (("hidden", hidden), ("head.weight", head.weight), ("head.bias", head.bias)):
        got = ""
        if leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None:
            got = "carries a forward-mode tangent (torch.func.jvp)"
        while not got and leaf is not None and functorch.is_functorch_wrapped_tensor(leaf):
            if functorch.is_gradtrackingtensor(leaf) and leaf.requires_grad:
                got = "is differentiated by torch.func.grad or vjp"
            leaf = functorch.get_unwrapped(leaf)
        if got:
            raise RuntimeError(f"{name}: {got}, wanted a plain tensor; use impl='reference'")


_PLAIN = {Tensor, torch.nn.Parameter}


def plain(*inputs: Any) -> bool:
    """Whether all tensors are ordinary eager ones: no compiler, subclass or function transform. Only such ones are written in place."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not any(issubclass(kind, Tensor) for kind in {*map(type, inputs)} - _PLAIN)


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


def gradients_like(
    leaves: Sequence[Any], need: Sequence[bool], dtype: torch.dtype | None = None
) -> Gradients:
    """(dh, dW, db) without values, for a fake kernel; `leaves` are hidden states, weight and bias."""
    options: Any = {"dtype": dtype, "memory_format": torch.contiguous_format}
    dhidden, dweight, dbias = (
        torch.empty_like(x, **options) if needed else leaves[0].new_empty(0)
        for x, needed in zip(leaves, need, strict=True)
    )
    return dhidden, dweight, dbias


def needs_gradient(*leaves: Tensor | None) -> Need:
    """Which of hidden states, weight and bias a gradient is made for along with the value."""
    on = torch.is_grad_enabled()
    return Need(*[on and leaf is not None and leaf.requires_grad for leaf in leaves])
