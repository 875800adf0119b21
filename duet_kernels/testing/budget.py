"""How far a result may be from the truth: no further than torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class IllConditioned(AssertionError):
    """The case says nothing: torch's own fp32 result is more than 2 % away from the truth."""


class Error(NamedTuple):
    """A relative RMS error, and the largest one that would pass."""

    measured: float
    budget: float


def worst(errors: Iterable[Error]) -> Error:
    """The one that used most of its budget."""
    return max(errors, key=lambda error: error.measured / (error.budget or 1.0), default=Error(0.0, 0.0))


def assert_within_budget(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor,
    *,
    selected: Tensor | None = None,
    name: str = "result",
) -> Error:
    """Assert that `actual` errs at most twice as much as `baseline` does, plus 4 eps of its dtype.

    `rms(actual - truth) <= 2 rms(baseline - truth) + 4 eps rms(truth)`, for the selected part and for the rest apart
    (a gradient that is right only at the chosen ids must not pass on their account), and a like bound, four times
    wider, for every single row (one stale row among thousands must not drown). Where the truth is not finite the
    result has to be the same infinity or NaN; everywhere else it has to be finite.

    Args:
        actual: the result to judge.
        truth: the definition in fp64, from inputs already rounded to the tested dtype.
        baseline: torch with fp32 logits from the same inputs, in the dtype of `actual`.
        selected: bool, of a leading shape of `actual` (`[V]` for dW): the part that is judged apart.
        name: of what is judged, for the message.

    Returns:
        The relative error and its budget, of the part that used most of it.

    Raises:
        IllConditioned: the baseline itself errs more than 2 %: choose another case.
        AssertionError: over budget, naming the part and both errors.

    Example:
        >>> x = torch.randn(4, 8)
        >>> assert_within_budget(x, x.double(), x).measured
        0.0
        >>> assert_within_budget(torch.zeros_like(x), x.double(), x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: result: relative error 1.0e+00, ...
    """
    assert actual.shape == truth.shape == baseline.shape, (
        f"{name}: shape {list(actual.shape)}, wanted {list(truth.shape)} (baseline {list(baseline.shape)})"
    )
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, wanted {baseline.dtype}"
    eps = torch.finfo(actual.dtype).eps
    finite = truth.isfinite()
    _assert_same_nonfinite(actual, truth, finite, name)
    truth = truth.double().where(finite, 0)
    actual_error = (actual.double().where(finite, 0) - truth).abs()
    baseline_error = (baseline.double().where(finite, 0) - truth).abs()
    parts = {"": torch.ones(truth.shape[:1] if truth.dim() else (), dtype=torch.bool, device=truth.device)}
    if selected is not None:
        parts = {" (selected)": selected, " (the rest)": ~selected}
    errors = []
    for part, where in parts.items():
        size = rms(truth[where])
        ours, theirs = rms(actual_error[where]), rms(baseline_error[where])
        if theirs > 0.02 * size:
            raise IllConditioned(f"{name}{part}: the fp32 baseline errs by {theirs / size:.1e} itself")
        budget = 2 * theirs + 4 * eps * size
        relative = [x / (size or 1.0) for x in (ours, theirs, budget)]
        assert ours <= budget, "{}{}: relative error {:.1e}, torch's own {:.1e}, budget {:.1e}".format(
            name, part, *relative
        )
        errors.append(Error(relative[0], relative[2]))
        if truth.dim() > 1 and truth[where].numel():
            _assert_rows(actual_error[where], baseline_error[where], truth[where], eps, name + part)
    return worst(errors)


def _assert_same_nonfinite(actual: Tensor, truth: Tensor, finite: Tensor, name: str) -> None:
    wrong = actual.isfinite() != finite
    assert not wrong.any(), (
        f"{name}: {int((wrong & finite).sum())} entries are not finite but should be, and "
        f"{int((wrong & ~finite).sum())} are finite but should not be"
    )
    same = (actual.double() == truth.double()) | (actual.isnan() & truth.isnan())
    assert bool(same[~finite].all()), f"{name}: other infinities or NaNs than the definition's"


def _assert_rows(ours: Tensor, theirs: Tensor, truth: Tensor, eps: float, name: str) -> None:
    rows = [x.flatten(1).square().mean(1).sqrt() for x in (ours, theirs, truth)]
    excess = rows[0] - (8 * rows[1].max() + 16 * eps * rows[2])
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{name}: row {worst} of the part errs by {float(rows[0][worst]):.1e} where its own size is "
        f"{float(rows[2][worst]):.1e} and torch's worst row errs by {float(rows[1].max()):.1e}"
    )


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
