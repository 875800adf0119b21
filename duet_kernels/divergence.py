"""What is compared and how: the options of a divergence as one frozen value. A leaf: no tensors, no maths."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from typing import Any

RAW = ("huber", "mse", "l1")
DISTRIBUTION = ("forward_kl", "reverse_kl", "jsd", "tvd")
NORMALIZATIONS = ("renormalize", "tail", "zeroed", "truncated")


def unknown(argument: str, value: object, known: tuple[str, ...]) -> ValueError:
    """The error for a name that is not one of `known`, with the nearest one."""
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{argument}: wanted one of {', '.join(known)}, got {value!r}{hint}")


def is_finite_number(value: object) -> bool:
    # Comparisons rather than math.isfinite: torch.compile with dynamic shapes traces through them.
    number: Any = value
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -math.inf < number < math.inf


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
        if not is_finite_number(temperature) or temperature <= 0:
            raise ValueError(f"temperature: wanted a finite number > 0, got {temperature!r}")
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
        if not is_finite_number(beta) or (name == "jsd" and not 0 < beta < 1):
            raise ValueError(
                f"beta: wanted a number in (0, 1), got {beta!r}; for the ends use divergence='forward_kl' or 'reverse_kl'"
            )
        if not is_finite_number(delta) or (name == "huber" and delta <= 0):
            raise ValueError(f"delta: wanted a finite number > 0, got {delta!r}")
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
