"""How many rows and columns of logits a dense loss holds at a time.

* At hand: R rows of whole logits, as many as fit, then dz of M = R, 2 R, 4 R ... rows. R below 128 or, with a trainable
  head, M below 512 cost more than a product saves: few rows multiply slowly, and every M rows dW is read and written in
  ACC.
* Recomputed otherwise: folds of as many rows as leave slabs of 2048 columns, and then the same for the gradient. Where
  the sum of dh in ACC leaves less than 1024 rows, dW and dh are made one after the other. A loss without folds has
  nothing to recompute and goes this way first.

Whatever the workspace, no buffer is `[N, V]` but for a few tokens, and one row of 16 columns is there. At N 8192, D 4096,
V 128256, bf16, with (M, R) where logits are at hand (asserted in tests/test_dense_plan.py); by default a GPU of 80 GB has 2.25 GiB, of
40 GB 1.25 GiB:

| workspace | two sides, frozen | two sides, trainable | one side, frozen | one side, trainable |
|-----------|-------------------|----------------------|------------------|---------------------|
| 3 GiB     | 4096, 2048        | 4096, 1024           | 4096, 4096       | 4096, 2048          |
| 2.25 GiB  | 4096, 1024        | 2048, 512            | 4096, 2048       | 2048, 1024          |
| 1.25 GiB  | 1024, 1024        | recomputed           | 2048, 1024       | recomputed          |
| 256 MiB   | 512, 128          | recomputed           | 512, 256         | recomputed          |

Legend: N tokens, D hidden size, V vocabulary, C columns of a slab, M rows of dz, R rows of logits.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from ..head import Need
from ..products import pitch
from . import tiles
from .tiles import cdiv


class Shape(NamedTuple):
    """What a plan depends on; `logits` are the bytes of a logit of each side."""

    n: int
    v: int
    d: int
    logits: tuple[int, ...]
    operand: int  # bytes of dz and of what it is multiplied with
    acc: int
    out: int  # of the gradients
    folds: int
    need: Need
    token: int = 0  # of what the loss keeps of every token
    partial: int = 0  # of what a fold leaves of a row's split
    whole: bool = False  # dz of M rows must come from M rows of logits


class Sweep(NamedTuple):
    """One walk over C = V or over slabs. dh of a `group` of rows is summed while it lasts; a fold has M = 0."""

    group: int
    kept: int  # M
    rows: int  # R
    columns: int  # C
    need: Need


class Plan(NamedTuple):
    """A walk of the folds beforehand (None: in the sweep, while the logits are there), and those of the gradient."""

    folds: Sweep | None
    sweeps: tuple[Sweep, ...]


def buffers(s: Shape, w: Sweep) -> list[int]:
    """Bytes of dz and of every side's logits."""
    return [w.kept * pitch(w.columns) * s.operand, *(w.rows * pitch(w.columns) * size for size in s.logits)]


def lent(s: Shape, w: Sweep) -> int:
    """Bytes of dW that are free while its sum of several blocks, in ACC, lies elsewhere."""
    summed = w.need.weight and w.kept < w.group and w.columns == s.v and s.out != s.acc
    return s.v * s.d * s.out if summed else 0


def placed(sizes: Iterable[int], lent: int) -> list[int | None]:
    """Where buffers lie in what is lent, in bytes, or None for those that need memory of their own."""
    places, used = [], 0
    for size in sizes:
        fits = 0 < size <= lent - used
        places.append(used if fits else None)
        used += cdiv(size, 256) * 256 if fits else 0
    return places


def sweep_bytes(s: Shape, w: Sweep) -> int:
    (hidden, weight, bias), apart, sizes = w.need, s.out != s.acc, buffers(s, w)
    used = sum(x for x, place in zip(sizes, placed(sizes, lent(s, w)), strict=True) if place is None)
    used += w.rows * cdiv(w.columns, tiles.DENSE_FOLD_COLUMNS[s.acc]) * s.partial
    used += w.columns * s.d * s.acc if weight and apart and w.kept < w.group else 0
    used += w.kept * s.d * s.operand if weight else 0  # hidden states, 0 where a row does not count
    used += w.group * s.d * s.acc if hidden and apart and w.columns < s.v else 0
    return used + (2 * s.v * s.acc if bias else 0)


@functools.lru_cache(maxsize=1024)
def plan(s: Shape, workspace: int) -> Plan:
    """The sizes of a walk that keep the workspace, or the smallest ones."""
    budget = max(workspace - s.n * s.token, workspace // 2)
    hidden, *weights = s.need
    slabs = functools.partial(_slabs, s, budget)
    both = slabs(s.need) if any(s.need) else None
    if both and not s.folds and both.rows >= min(s.n, tiles.DENSE_ENOUGH_ROWS):
        return Plan(None, (both,))  # nothing waits for whole rows, and a slab of dW is finished at once
    if both and (sweep := _at_hand(s, s.need, budget)):
        return Plan(None, (sweep,))
    folds = s.folds > 1 and _at_hand(s, Need(False), budget)  # whole rows are multiplied once for all folds
    folds = (folds or slabs(Need(False))) if s.folds else None
    if not both or both.rows >= min(s.n, tiles.DENSE_ENOUGH_ROWS) or not (hidden and any(weights)):
        return Plan(folds, (both,) if both else ())
    # The sum of dh leaves dW no room: one after the other.
    return Plan(folds, (slabs(Need(False, *weights)), _at_hand(s, Need(True), budget) or slabs(Need(True))))


def folds_alone(planned: Plan) -> Plan:
    """The folds of a plan without its gradients, over the same blocks of rows and columns: the same bits come out."""
    if planned.folds:
        return Plan(planned.folds, ())
    (sweep,) = planned.sweeps
    group = min(sweep.group, sweep.kept)  # the folds are made for M rows after M rows
    return Plan(Sweep(group, 0, sweep.rows, sweep.columns, Need(False)), ())


def _halves(n: int) -> list[int]:
    """n, n / 2, n / 4, ... 1"""
    return [n] if n <= 1 else [n, *_halves(cdiv(n, 2))]


def _most_whole_rows(n: int) -> int:
    """Rows whose `[rows, V]` may be there at once: half of them, or all where they are few."""
    return n if n <= tiles.DENSE_WHOLE_ROWS else cdiv(n, 2)


def _at_hand(s: Shape, need: Need, budget: int) -> Sweep | None:
    """Whole rows, if they are enough."""
    gradient, heights = any(need), _halves(_most_whole_rows(s.n))
    fits = [r for r in heights if sweep_bytes(s, Sweep(s.n, r * gradient, r, s.v, need)) <= budget]
    if not fits or fits[0] < min(s.n, tiles.DENSE_LEAST_ROWS):
        return None
    rows = kept = fits[0]
    for more in () if s.whole or not gradient else reversed(heights[: heights.index(rows)]):
        kept = more if sweep_bytes(s, Sweep(s.n, more, rows, s.v, need)) <= budget else kept
    enough = kept >= min(s.n, tiles.DENSE_LEAST_SUMMED) or not need.weight
    return Sweep(s.n, kept * gradient, rows, s.v, need) if enough else None


def _slabs(s: Shape, budget: int, need: Need) -> Sweep:
    """Slabs of 2048 columns or more for as many rows as can have them; else what holds most logits."""
    found = []
    for rows in _halves(s.n):
        # Without dW, whose sum wants all rows, rows are walked one block after the other.
        w = Sweep(s.n if any(need[1:]) else rows, rows * any(need), rows, 0, need)
        none, some = (sweep_bytes(s, w._replace(columns=c)) for c in (0, 16))
        most = min(
            (budget - none) // (some - none) * 16, s.v if rows <= _most_whole_rows(s.n) else cdiv(s.v, 2)
        )
        found.append((rows * max(most, 0), w._replace(columns=max(most, 16))))
        if most >= min(tiles.DENSE_LEAST_COLUMNS, cdiv(s.v, 2)):
            break
    else:
        found.sort(key=lambda choice: choice[0])
    w = found[-1][1]
    size = cdiv(s.v, cdiv(s.v, max(w.columns // 16 * 16, 16)))  # even ones
    return w._replace(columns=min(s.v, cdiv(size, 16) * 16))
