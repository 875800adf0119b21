"""The options of a loss as two frozen values: what is compared (`Divergence`), and how much a token counts (`Tokens`).

A token's factor (mask x weight / denominator) is known before the loss runs. It is an input of every loss, so that the
gradient can be made together with the value.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from .dispatch import acc_dtype

DivergenceName = Literal[
    "huber", "mse", "l1", "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "tvd"
]  # fmt: skip
Normalization = Literal["renormalize", "tail", "zeroed", "truncated", "generalized"]
Reduction = Literal["mean", "sum", "none"]
Support = Literal["teacher", "student", "union"]
NORMALIZATIONS, REDUCTIONS, SUPPORTS = get_args(Normalization), get_args(Reduction), get_args(Support)

# Beyond these fp32 logits, which are exact to 7 digits, no longer say what a softmax or a gradient is.
TEMPERATURES, DELTAS, BETAS, CLIPS = (1e-3, 1e3), (1e-10, 1e10), (1e-3, 1 - 1e-3), (1e-6, 1e6)
FINITE = -sys.float_info.max, sys.float_info.max
_KINDS: dict[type, Any] = {int: numbers.Integral, float: numbers.Real}  # numpy's numbers are among them
_Number = TypeVar("_Number", int, float)
RANGE = "a finite number > 0, from {:g} to {:g} (the range of fp32 logits)"
_OF_DELTA = RANGE.format(*DELTAS)  # also where it is not read and may be any finite number
_OF_BETA = (
    f"a number in (0, 1), from {BETAS[0]:g} to 1 - {BETAS[0]:g} (for the ends: 'forward_kl' or 'reverse_kl')"
)
CLIPPED: tuple[Normalization, ...] = ("renormalize", "tail", "generalized")  # whose terms are >= 0


def unknown(argument: str, value: object, known: tuple[str, ...]) -> ValueError:
    """The error for a name that is not one of `known`, with the nearest one."""
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{argument}: wanted one of {', '.join(known)}, got {value!r}{hint}")


def shown(value: object) -> str:
    """A value in an error, cut where it is long."""
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**100 else f"about 2^{value.bit_length()}"
    )
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_ignore_index(value: object) -> None:
    index: Any = value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not -(2**63) <= index < 2**63:
        raise TypeError(f"ignore_index: wanted an integer of 64 bits such as -100, got {shown(value)}")


def check_tensor(
    name: str, value: object, device: torch.device | None = None, like: str = "the hidden states"
) -> Tensor:
    """The value, which is refused where it is no dense tensor, or not on the device that it has to be on (that of `like`)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name}: wanted a plain tensor, got a DTensor; pass {name}.full_tensor(), which has all tokens"
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name}: wanted a dense tensor, got {kind}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: wanted device {device} like {like}, got {value.device}")
    return value


def check_number(
    name: str,
    value: Any,
    limits: tuple[float, float],
    wanted: str = RANGE,
    kind: type[_Number] = float,
    signed: bool = False,
) -> _Number:
    """The value as a `kind`; what is no such number within the limits is refused. A bool is none, those of numpy are.

    `wanted` names the limits as {}; `signed`: they are those of the absolute value.
    """
    # Comparisons rather than math.isfinite: torch.compile with dynamic shapes traces through them.
    number, right = value, isinstance(value, _KINDS[kind]) and not isinstance(value, bool)
    if right and not isinstance(
        value, numbers.Rational
    ):  # an integer may be too large for a float; a half may round a limit
        number = float(value)
    if not right or not limits[0] <= (abs(number) if signed else number) <= limits[1]:
        raise ValueError(f"{name}: wanted {wanted.format(*limits)}, got {shown(value)}")
    return kind(number)


# --- the table of divergences ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What the package knows of a divergence besides its arithmetic.

    Attributes:
        equation: the loss of a token in one line, with d = z_student - z_teacher, or p (teacher) and q (student).
        normalizations: how p and q may be normalised, the default first; none: it compares raw logits.
        reads: which of `beta` and `delta` it reads. Every divergence of distributions reads `temperature`.
        noise: True if its gradient is a sign. Rounding must not decide a sign: differences of 8 eps of the row's
            largest logit count as 0.
    """

    equation: str
    normalizations: tuple[Normalization, ...]
    reads: tuple[Literal["beta", "delta"], ...]
    noise: bool


_BUCKET: tuple[Normalization, ...] = ("renormalize", "tail")

DIVERGENCES: dict[str, Traits] = {
    "huber": Traits(
        equation="sum 0.5 d^2 where |d| <= delta, delta (|d| - 0.5 delta) above",
        normalizations=(), reads=("delta",), noise=False,
    ),
    "mse": Traits(equation="sum d^2", normalizations=(), reads=(), noise=False),
    "l1": Traits(equation="sum |d|", normalizations=(), reads=(), noise=True),
    "forward_kl": Traits(
        equation="KL(p||q) = sum p log(p/q)", normalizations=NORMALIZATIONS, reads=(), noise=False,
    ),
    "reverse_kl": Traits(
        equation="KL(q||p) = sum q log(q/p)", normalizations=(*_BUCKET, "truncated", "generalized"), reads=(), noise=False,
    ),
    "symmetric_kl": Traits(
        equation="beta KL(p||q) + (1-beta) KL(q||p)", normalizations=_BUCKET, reads=("beta",), noise=False,
    ),
    "jsd": Traits(
        equation="beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q",
        normalizations=_BUCKET, reads=("beta",), noise=False,
    ),
    "tvd": Traits(equation="0.5 sum |p - q|", normalizations=_BUCKET, reads=(), noise=True),
}  # fmt: skip


def require_every(where: str, names: Collection[str], wanted: Collection[str]) -> None:
    """Refuse a table of divergences that forgets one, or knows one that does not exist. Called on import."""
    forgotten, surplus = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    if forgotten or surplus:
        raise TypeError(
            f"{where}: wanted an entry for each of {', '.join(wanted)}; "
            f"forgotten: {', '.join(forgotten) or 'none'}; unknown: {', '.join(surplus) or 'none'}"
        )


require_every("options.DIVERGENCES", DIVERGENCES, get_args(DivergenceName))
RAW: tuple[DivergenceName, ...] = tuple(
    n for n in get_args(DivergenceName) if not DIVERGENCES[n].normalizations
)
DISTRIBUTION: tuple[DivergenceName, ...] = tuple(n for n in get_args(DivergenceName) if n not in RAW)


_Function = TypeVar("_Function", bound=Callable)


def lists_divergences(function: _Function) -> _Function:
    """Write every divergence with its equation where the function's docstring says so."""

    def listed(place: re.Match[str]) -> str:
        return "\n".join(f"{place[1]}* `{name}` = {traits.equation}" for name, traits in DIVERGENCES.items())

    if function.__doc__:  # python -OO has none
        function.__doc__ = re.sub(r"^( *)\{divergences\}$", listed, function.__doc__, flags=re.MULTILINE)
    return function


# --- checked options ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A checked choice of divergence, with what follows from it.

    Attributes:
        normalization: "none" for raw logits.
        clip: infinite where nothing is clipped.
        options: the names and the numbers, as the custom ops take them.
        raw: whether it compares logits and not distributions.
        noise: whether differences within rounding count as 0.
        nonnegative: whether every term of the sum must be >= 0: KL(a||b) with b - a added to each.
        needs_student_logsumexp: whether it reads more of the student than its logits at the k ids.
        needs_teacher_logsumexp: likewise of the teacher.
    """

    name: str
    normalization: str
    temperature: float
    beta: float
    delta: float
    clip: float = math.inf
    options: tuple[str, str, tuple[float, ...]] = dataclasses.field(init=False)
    raw: bool = dataclasses.field(init=False)
    noise: bool = dataclasses.field(init=False)
    nonnegative: bool = dataclasses.field(init=False)
    needs_student_logsumexp: bool = dataclasses.field(init=False)
    needs_teacher_logsumexp: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        normalization, traits = self.normalization, DIVERGENCES[self.name]
        follows = {
            "options": (self.name, normalization, (self.temperature, self.beta, self.delta, self.clip)),
            "raw": not traits.normalizations,
            "noise": traits.noise,
            "nonnegative": self.clip < math.inf or normalization == "generalized",
            "needs_student_logsumexp": normalization not in ("none", "renormalize"),
            "needs_teacher_logsumexp": normalization in ("tail", "truncated", "generalized"),
        }
        for name, value in follows.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        name: str,
        normalization: str | None,
        temperature: float,
        beta: float,
        delta: float,
        clip: float | None = None,
        support: str = "teacher",
        dense: bool = False,
    ) -> Divergence:
        """Check them all; `dense`: of a loss of the whole vocabulary."""
        if not isinstance(name, str) or name not in DIVERGENCES:
            raise unknown("divergence", name, tuple(DIVERGENCES))
        if support not in SUPPORTS:
            raise unknown("support", support, SUPPORTS)
        for option, value, why in (
            ("normalization", normalization, "has nothing but the whole vocabulary"),
            ("clip", clip, "has none; pass k, with normalization='tail' say"),
            ("support", support, "compares all ids"),
        ):
            if dense and value not in (None, "renormalize", "teacher"):
                raise ValueError(f"{option}: the dense loss (k=None) {why}, got {value!r}")
        traits = DIVERGENCES[name]
        temperature = check_number("temperature", temperature, TEMPERATURES)
        if not traits.normalizations:
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
            normalization = traits.normalizations[0]
        elif normalization not in NORMALIZATIONS:
            raise unknown("normalization", normalization, NORMALIZATIONS)
        elif normalization not in traits.normalizations:
            able = [
                f"'{other}'" for other in DIVERGENCES if normalization in DIVERGENCES[other].normalizations
            ]
            raise ValueError(
                f"normalization: {normalization!r} exists for {', '.join(able)} only, got {name!r}"
            )
        beta = check_number("beta", beta, BETAS if "beta" in traits.reads else FINITE, _OF_BETA)
        delta = check_number("delta", delta, DELTAS if "delta" in traits.reads else FINITE, _OF_DELTA)
        if clip is None:
            return cls(name, normalization or "none", temperature, beta, delta)
        clip = check_number("clip", clip, CLIPS)
        if normalization not in CLIPPED:
            got = (
                f"normalization={normalization!r}" if traits.normalizations else f"the raw logits of {name!r}"
            )
            raise ValueError(
                f"clip: limits terms that are >= 0, those of distributions with normalization {', '.join(CLIPPED)}; got {got}"
            )
        return cls(name, normalization, temperature, beta, delta, clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The rows of a loss: `factor` `[N']`, and where they stood (`rows`, `lead`) before masked ones left."""

    factor: Tensor
    reduction: str
    lead: tuple[int, ...]
    rows: Tensor | None = None  # None: nothing was left out
    masked: bool = False

    def take(
        self, x: Tensor, num_ids: int | None = None, fill: float = 0, passed_over: bool = False
    ) -> Tensor:
        """The rows of `x` that count. Where masked rows stay they are set to `fill`, so that a NaN in them cannot spread.

        Of ids (`num_ids` given) only those >= `num_ids` become 0, because their logit would be NaN. Hidden states stay as they are
        where the kernels pass over a row of factor 0, whatever is in it (`passed_over`): nothing is copied.
        """
        if self.rows is not None:
            return x.index_select(0, self.rows)
        if not self.masked or passed_over:
            return x
        skip = (self.factor == 0).view(-1, *(1,) * (x.dim() - 1))
        return x.masked_fill(skip if num_ids is None else skip & (x >= num_ids), fill)

    def weigh(self, rows: Tensor) -> Tensor:
        """factor * loss, exactly 0 where the factor is 0."""
        return torch.where(self.factor == 0, torch.zeros_like(rows), rows * self.factor)

    def reduce(self, rows: Tensor) -> Tensor:
        """The weighed rows summed, or put back into the leading shape."""
        if self.reduction != "none":
            return rows.sum()
        if self.rows is not None:
            rows = rows.new_zeros(math.prod(self.lead)).index_copy(0, self.rows, rows)
        return rows.view(self.lead)


def loss_tokens(
    hidden_nd: Tensor,
    lead: tuple[int, ...],
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    choice: str,
) -> Tokens:
    """Check mask, weights, reduction and num_items, and fold them into one factor per row.

    Rows that count nothing are left out where finding them needs no synchronisation (an eager CPU). The definition, as the
    choice of implementation, keeps all rows.
    """
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: is the denominator of reduction='mean', got reduction={reduction!r}")
    n, device, acc = math.prod(lead), hidden_nd.device, acc_dtype(hidden_nd.dtype)
    for name, given in (("mask", mask), ("weights", weights)):
        if given is None:
            continue
        value = check_tensor(name, given, device)
        if tuple(value.shape) != lead:
            raise ValueError(f"{name}: wanted shape {list(lead)} like the tokens, got {list(value.shape)}")
    factor = torch.ones(n, dtype=acc, device=device)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: wanted bool, True where the token that a position predicts counts, got {mask.dtype}"
            )
        factor = mask.reshape(n).to(acc)
    count = factor.sum()
    if weights is not None:
        if not weights.is_floating_point() or weights.requires_grad:
            got = "a tensor that requires grad" if weights.requires_grad else weights.dtype
            raise TypeError(f"weights: wanted floating-point constants, got {got}")
        factor = torch.where(factor == 0, 0.0, weights.reshape(n).to(acc))
    if reduction == "mean":
        factor = factor / (count.clamp(min=1) if num_items is None else _denominator(num_items, factor))
    rows, masked = None, mask is not None or weights is not None
    if masked and choice != "reference" and device.type == "cpu" and not torch.compiler.is_compiling():
        rows = (factor != 0).nonzero()[:, 0]
        factor = factor[rows]
        rows, masked = (None, False) if len(rows) == n else (rows, True)
    return Tokens(factor, reduction, lead, rows, masked)


def _denominator(num_items: float | Tensor, factor: Tensor) -> Tensor:
    """`num_items`, which is looked at where that is no synchronisation; 0, of a batch in which nothing counts, divides by 1."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.is_complex() or num_items.dtype == torch.bool:
            got = f"{num_items.dtype} of shape {list(num_items.shape)}"
            raise ValueError(f"num_items: wanted a number, or a 0-d tensor of one, got {got}")
        seen = num_items.device.type == "cpu" and not torch.compiler.is_compiling()
        if seen and not 0 <= num_items < math.inf:
            raise ValueError(f"num_items: wanted a finite number >= 0, got {num_items}")
        given = num_items.detach().reshape(()).to(device=factor.device, dtype=factor.dtype)
        return given.masked_fill(given == 0, 1)
    wanted = "a finite number >= 0 of 64 bits, or a 0-d tensor"
    number = check_number("num_items", num_items, (0, 2**63 - 1), wanted)
    # Not a copy from the host: that would be a synchronisation.
    return torch.full((), number or 1.0, dtype=factor.dtype, device=factor.device)
