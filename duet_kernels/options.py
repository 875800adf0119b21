"""The options of a loss as two frozen values: what is compared (`Divergence`), and how much a token counts (`Tokens`).

A token's factor (mask x weight / denominator) is known before the loss runs. It is an input of every loss, so that the
gradient can be made together with the value.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .dispatch import acc_dtype

RawDivergence = Literal["huber", "mse", "l1"]
DistributionDivergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
DivergenceName = Literal[RawDivergence, DistributionDivergence]
Normalization = Literal["renormalize", "tail", "zeroed", "truncated"]
Reduction = Literal["mean", "sum", "none"]
Support = Literal["teacher", "student", "union"]
RAW, DISTRIBUTION = get_args(RawDivergence), get_args(DistributionDivergence)
NORMALIZATIONS, REDUCTIONS, SUPPORTS = get_args(Normalization), get_args(Reduction), get_args(Support)

# Beyond these fp32 logits, which are exact to 7 digits, no longer say what a softmax or a gradient is.
TEMPERATURES, DELTAS, BETAS = (1e-3, 1e3), (1e-10, 1e10), (1e-3, 1 - 1e-3)


def unknown(argument: str, value: object, known: tuple[str, ...]) -> ValueError:
    """The error for a name that is not one of `known`, with the nearest one."""
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{argument}: wanted one of {', '.join(known)}, got {value!r}{hint}")


def is_finite_number(value: object) -> bool:
    # Comparisons rather than math.isfinite: torch.compile with dynamic shapes traces through them.
    number: Any = value
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -math.inf < number < math.inf


def check_number(name: str, value: object, limits: tuple[float, float]) -> None:
    """Refuse what is no finite number > 0 within the limits."""
    number: Any = value
    if not is_finite_number(value) or not limits[0] <= number <= limits[1]:
        raise ValueError(
            f"{name}: wanted a finite number > 0, from {limits[0]:g} to {limits[1]:g} (the range of fp32 logits), "
            f"got {value!r}"
        )


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A checked choice of divergence. `normalization` is "none" for the raw-logit divergences."""

    name: str
    normalization: str
    temperature: float
    beta: float
    delta: float

    @classmethod
    def of(
        cls, name: str, normalization: str | None, temperature: float, beta: float, delta: float
    ) -> Divergence:
        if name not in RAW + DISTRIBUTION:
            raise unknown("divergence", name, RAW + DISTRIBUTION)
        check_number("temperature", temperature, TEMPERATURES)
        if name in RAW:
            if normalization is not None:
                raise ValueError(
                    f"normalization: {name!r} compares raw logits and takes none, got {normalization!r}"
                )
            if temperature != 1.0:
                raise ValueError(
                    f"temperature: {name!r} compares raw logits, wanted 1.0, got {temperature} "
                    "(scale delta or the logits instead)"
                )
        elif normalization is None:
            normalization = "renormalize"
        elif normalization not in NORMALIZATIONS:
            raise unknown("normalization", normalization, NORMALIZATIONS)
        if normalization in ("zeroed", "truncated") and name != "forward_kl":
            raise ValueError(f"normalization: {normalization!r} exists for 'forward_kl' only, got {name!r}")
        if not is_finite_number(beta) or (name == "jsd" and not BETAS[0] <= beta <= BETAS[1]):
            raise ValueError(
                f"beta: wanted a number in (0, 1), from {BETAS[0]:g} to 1 - {BETAS[0]:g}, got {beta!r}; for the ends use "
                "divergence='forward_kl' or 'reverse_kl'"
            )
        if not is_finite_number(delta) or name == "huber":
            check_number("delta", delta, DELTAS)
        return cls(name, normalization or "none", float(temperature), float(beta), float(delta))

    @property
    def raw(self) -> bool:
        return self.name in RAW

    @property
    def needs_student_logsumexp(self) -> bool:
        return self.normalization in ("tail", "zeroed", "truncated")

    @property
    def needs_teacher_logsumexp(self) -> bool:
        return self.normalization in ("tail", "truncated")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The rows of a loss: `factor` `[N']`, and where they stood (`rows`, `num_rows`, `lead`) before masked ones left."""

    factor: Tensor
    reduction: str
    lead: tuple[int, ...]
    num_rows: int
    rows: Tensor | None = None
    masked: bool = False

    def for_impl(self, choice: str) -> Tokens:
        """Without the rows that count nothing, where finding them needs no synchronisation (an eager CPU).

        The definition keeps all rows.
        """
        if (
            choice == "reference"
            or not self.masked
            or self.factor.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return self
        rows = (self.factor != 0).nonzero()[:, 0]
        return dataclasses.replace(self, factor=self.factor[rows], rows=rows)

    def take(self, x: Tensor) -> Tensor:
        """The rows of `x` that count. Where masked rows stay they are set to 0, so that a NaN in them cannot spread."""
        if self.rows is not None:
            return x.index_select(0, self.rows)
        if self.masked and x.is_floating_point():
            skip = (self.factor == 0).view(-1, *(1,) * (x.dim() - 1))
            return x.masked_fill(skip, 0)
        return x

    def weigh(self, rows: Tensor) -> Tensor:
        """factor * loss, exactly 0 where the factor is 0."""
        return torch.where(self.factor == 0, torch.zeros_like(rows), rows * self.factor)

    def reduce(self, rows: Tensor) -> Tensor:
        """The weighed rows summed, or put back into the leading shape."""
        if self.reduction != "none":
            return rows.sum()
        if self.rows is not None:
            rows = rows.new_zeros(self.num_rows).index_copy(0, self.rows, rows)
        return rows.view(self.lead)


def loss_tokens(
    hidden_nd: Tensor,
    lead: tuple[int, ...],
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tokens:
    """Check mask, weights, reduction and num_items, and fold them into one factor per row."""
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: is the denominator of reduction='mean', got reduction={reduction!r}")
    n, device, acc = math.prod(lead), hidden_nd.device, acc_dtype(hidden_nd.dtype)
    factor = torch.ones(n, dtype=acc, device=device)
    if mask is not None:
        _check_rows("mask", mask, lead, device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: wanted bool with True = counted (labels != -100), got {mask.dtype}")
        factor = mask.reshape(n).to(acc)
    count = factor.sum()
    if weights is not None:
        _check_rows("weights", weights, lead, device)
        if not weights.is_floating_point() or weights.requires_grad:
            got = "a tensor that requires grad" if weights.requires_grad else weights.dtype
            raise TypeError(f"weights: wanted floating-point constants, got {got}")
        factor = torch.where(factor == 0, 0.0, weights.reshape(n).to(acc))
    if reduction == "mean":
        factor = factor / (count if num_items is None else _denominator(num_items, factor)).clamp(min=1)
    return Tokens(factor, reduction, lead, n, masked=mask is not None or weights is not None)


def _check_rows(name: str, value: object, lead: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if tuple(value.shape) != lead:
        raise ValueError(f"{name}: wanted shape {list(lead)} like the tokens, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: wanted device {device} like the hidden states, got {value.device}")


def _denominator(num_items: int | Tensor, factor: Tensor) -> Tensor:
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.is_complex():
            raise ValueError(f"num_items: wanted an int or a 0-d tensor, got shape {list(num_items.shape)}")
        return num_items.detach().reshape(()).to(device=factor.device, dtype=factor.dtype)
    if isinstance(num_items, bool) or not isinstance(num_items, int) or num_items < 0:
        raise ValueError(f"num_items: wanted an int >= 0 or a 0-d tensor, got {num_items!r}")
    # Not a copy from the host: that would be a synchronisation.
    return torch.full((), float(num_items), dtype=factor.dtype, device=factor.device)
