"""The losses as torch.nn.Modules: options in __init__, one call in forward. Thin; the functions are the API."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor, nn

from .dispatch import Impl
from .functional import linear_cross_entropy, linear_distill_loss, topk_distill_loss
from .head import LMHead, TopK
from .options import (
    REDUCTIONS,
    Divergence,
    DivergenceName,
    Normalization,
    Reduction,
    Support,
    check_ignore_index,
    check_number,
    unknown,
)


class _Loss(nn.Module):
    """Keeps the options of a loss function and shows them in repr. Names that do not exist are refused at once."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: the local variables of an `__init__` whose other arguments are the options."""
        super().__init__()
        options = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        for name, known in (("reduction", REDUCTIONS), ("impl", get_args(Impl))):
            if options.get(name, known[0]) not in known:
                raise unknown(name, options[name], known)
        check_ignore_index(options.get("ignore_index", 0))
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class TopKDistillLoss(_Loss):
    """`topk_distill_loss` with its options fixed; see there for equations, shapes and errors.

    Example:
        >>> import torch
        >>> loss = TopKDistillLoss(divergence="mse")
        >>> teacher = TopK(torch.tensor([[2.0]]), torch.tensor([[0]]), torch.tensor([0.0]))
        >>> loss(torch.zeros(1, 2), torch.eye(2), teacher).item()
        4.0
    """

    def __init__(
        self,
        *,
        divergence: DivergenceName = "huber",
        normalization: Normalization | None = None,
        temperature: float = 1.0,
        beta: float = 0.5,
        delta: float = 1.0,
        clip: float | None = None,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        Divergence.of(divergence, normalization, temperature, beta, delta, clip)
        super().__init__(locals())

    def forward(
        self,
        hidden: Tensor,
        head: LMHead | Tensor,
        teacher: TopK,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return topk_distill_loss(
            hidden, head, teacher, mask=mask, weights=weights, num_items=num_items, **self.options
        )


class LinearDistillLoss(_Loss):
    """`linear_distill_loss` with its options fixed; see there for equations, shapes and errors."""

    def __init__(
        self,
        *,
        k: int | None = None,
        support: Support = "teacher",
        divergence: DivergenceName = "forward_kl",
        normalization: Normalization | None = None,
        temperature: float = 1.0,
        beta: float = 0.5,
        delta: float = 1.0,
        clip: float | None = None,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        Divergence.of(divergence, normalization, temperature, beta, delta, clip, support, k is None)
        if k is not None:
            check_number("k", k, (1, 2**63 - 1), "None or an integer >= 1 of 64 bits", int)
        super().__init__(locals())

    def forward(
        self,
        student_hidden: Tensor,
        student_head: LMHead | Tensor,
        teacher_hidden: Tensor,
        teacher_head: LMHead | Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        sides = student_hidden, student_head, teacher_hidden, teacher_head
        return linear_distill_loss(*sides, mask=mask, weights=weights, num_items=num_items, **self.options)


class LinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` with its options fixed; see there for equations, shapes and errors."""

    def __init__(
        self, *, ignore_index: int = -100, reduction: Reduction = "mean", impl: Impl = "auto"
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        hidden: Tensor,
        head: LMHead | Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return linear_cross_entropy(
            hidden, head, labels, weights=weights, num_items=num_items, **self.options
        )
