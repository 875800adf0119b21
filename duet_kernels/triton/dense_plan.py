"""How a dense loss is walked: blocks of rows and slabs of columns by bytes and reckoned seconds. No tensor, no kernel.

`plan` lists what keeps `workspace_bytes()` and takes the fastest: a product costs the dearer of its FLOP and its bytes,
what is added to is read and written besides, everything else costs its bytes (rates: `tiles`, as of an H200; calculated,
not measured). The two ways are those of `dense`: `kept` rows of dz with their logits at hand, or folds and then sweeps.
Whatever the workspace, nothing is `[N, V]` but for a few tokens: a buffer has at most half of the rows or of the columns.

Legend: N tokens, D hidden size, V vocabulary, R rows of a block, C columns of a slab, M rows of dz that are kept.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from triton import cdiv

from ..head import Need
from ..workspace import workspace_bytes
from . import tiles


class Shape(NamedTuple):
    """What a plan depends on: sizes, bytes of an element, passes, gradients. `dims` are the sides' hidden sizes."""

    n: int
    v: int
    dims: tuple[int, ...]
    logit: int  # bytes of one logit of every side
    operand: int  # of dz and of what it is multiplied with
    acc: int
    out: int  # of the gradients
    folds: int
    need: Need
    whole: bool = False  # dz of a block must come from one block of logits

    @property
    def d(self) -> int:
        return self.dims[0]


class Sweep(NamedTuple):
    """One walk over the slabs: R rows at a time of each `group` of rows."""

    group: int
    rows: int
    columns: int
    need: Need


class Plan(NamedTuple):
    """Either `kept` rows of dz and `rows` of logits at hand; or (kept = 0) folds of rows x columns, then sweeps."""

    kept: int
    rows: int
    columns: int
    sweeps: tuple[Sweep, ...]
    bytes: int
    seconds: float


def pitch(columns: int) -> int:
    """Elements from one row of a block to the next: rows begin on 16 elements, which is 16 bytes or more."""
    return cdiv(columns, 16) * 16


def statistics_bytes(shape: Shape) -> int:
    """What a loss keeps of all rows and of the splits of a block, at most."""
    return 20 * shape.acc * (shape.n + tiles.SLAB_ROWS * tiles.SLAB_PROGRAMS)


def sweep_bytes(s: Shape, sweep: Sweep) -> int:
    """Logits, dz and the accumulators of one sweep."""
    hidden, weight, bias = sweep.need
    used = sweep.rows * pitch(sweep.columns) * (s.logit + s.operand)
    apart = s.out != s.acc  # a gradient in ACC is summed where it is returned
    used += sweep.group * s.d * s.acc if hidden and apart else 0
    used += sweep.rows * s.d * s.operand if weight else 0
    used += sweep.columns * s.d * s.acc if weight and apart and sweep.rows < sweep.group else 0
    return used + (2 * s.v * s.acc if bias else 0)


def kept_bytes(s: Shape, kept: int, rows: int) -> int:
    """Logits of `rows`, dz of `kept` rows and the accumulators of dW and db."""
    _, weight, bias = s.need
    used = pitch(s.v) * (rows * s.logit + kept * s.operand)
    used += kept * s.d * s.operand if weight else 0
    used += s.v * s.d * s.acc if weight and kept < s.n and s.out != s.acc else 0
    return used + (2 * s.v * s.acc if bias else 0)


def product_seconds(s: Shape, m: int, k: int, n: int, *, add: bool = False) -> float:
    """[m, k] x [k, n] into ACC: the dearer of multiplying and moving; what is added to is read and written besides."""
    flops = 2.0 * k * max(m, tiles.DENSE_LEAST_ROWS) * max(n, tiles.DENSE_LEAST_ROWS)
    moved, added = s.operand * k * (m + n) + s.acc * m * n, 2 * s.acc * m * n if add else 0
    return max(flops / tiles.PRODUCT_FLOPS[s.operand], moved / tiles.BANDWIDTH) + added / tiles.BANDWIDTH


def logits_seconds(s: Shape, rows: int, columns: int) -> float:
    """All logits once, in blocks of that size."""
    blocks = cdiv(s.n, rows) * cdiv(s.v, columns)
    return blocks * sum(product_seconds(s, rows, d, columns) for d in s.dims)


def kept_seconds(s: Shape, kept: int, rows: int) -> float:
    steps, moved = cdiv(s.n, kept), s.n * s.v * (s.folds * s.logit + s.logit + s.operand)
    seconds = logits_seconds(s, rows, s.v)
    if s.need.hidden:
        seconds += steps * product_seconds(s, kept, s.v, s.d)
        moved += s.n * s.d * (s.acc + s.out)
    if s.need.weight:
        seconds += steps * product_seconds(s, s.v, kept, s.d, add=steps > 1)
        moved += s.v * s.d * (s.acc + s.out) if s.out != s.acc else 0
        moved += 2 * s.n * s.d * s.operand
    moved += s.n * s.v * s.operand if s.need.bias else 0
    return seconds + moved / tiles.BANDWIDTH


def sweep_seconds(s: Shape, sweep: Sweep) -> float:
    hidden, weight, bias = sweep.need
    slabs, parts = cdiv(s.v, sweep.columns), cdiv(s.n, sweep.rows)
    seconds, moved = logits_seconds(s, sweep.rows, sweep.columns), s.n * s.v * (s.logit + s.operand)
    if hidden:
        seconds += slabs * parts * product_seconds(s, sweep.rows, sweep.columns, s.d, add=slabs > 1)
        moved += s.n * s.d * (s.acc + s.out) if s.out != s.acc else 0
    if weight:
        seconds += slabs * parts * product_seconds(s, sweep.columns, sweep.rows, s.d, add=parts > 1)
        moved += s.v * s.d * (s.acc + s.out) if s.out != s.acc else 0
        moved += 2 * s.n * s.d * s.operand * (slabs if parts > 1 else 1)
    moved += s.n * s.v * s.operand if bias else 0
    return seconds + moved / tiles.BANDWIDTH


def plan(s: Shape) -> Plan:
    """The fastest plan, as reckoned, of those that keep the workspace; the smallest where none does."""
    return _plan(s, workspace_bytes())


@functools.lru_cache(maxsize=1024)
def _plan(s: Shape, workspace: int) -> Plan:
    budget = max(workspace - statistics_bytes(s), workspace // 2)
    plans = [p for p in (*_kept_plans(s, budget), *_recomputing_plans(s, budget)) if p is not None]
    fitting = [p for p in plans if p.bytes <= budget]
    return min(fitting, key=lambda p: p.seconds) if fitting else min(plans, key=lambda p: p.bytes)


def _halves(n: int) -> Iterator[int]:
    """n, n / 2, n / 4, ... 1"""
    while n > 1:
        yield n
        n = cdiv(n, 2)
    yield 1


def _most_whole_rows(n: int) -> int:
    """Rows whose `[rows, V]` may be there at once: half of them, or all where they are few."""
    return n if n <= tiles.DENSE_WHOLE_ROWS else cdiv(n, 2)


def _most_columns(s: Shape, rows: int) -> int:
    return s.v if rows <= _most_whole_rows(s.n) else cdiv(s.v, 2)


def _even(total: int, most: int, unit: int = 1) -> int:
    """The size of equal pieces of `total` in whole units, none above `most` unless that is less than a unit."""
    most = max(most // unit, 1) * unit
    size = cdiv(total, cdiv(total, most))
    return min(total, cdiv(size, unit) * unit)


def _kept_plans(s: Shape, budget: int) -> Iterator[Plan]:
    if not any(s.need):
        return
    for kept in _halves(_most_whole_rows(s.n)):
        room = budget - kept_bytes(s, kept, 0)
        rows = min(kept, room // (pitch(s.v) * s.logit))
        if s.whole and rows < kept:
            continue
        if rows > 0:
            rows = _even(kept, rows)
            yield Plan(kept, rows, s.v, (), kept_bytes(s, kept, rows), kept_seconds(s, kept, rows))


def _recomputing_plans(s: Shape, budget: int) -> Iterator[Plan]:
    rows, columns, seconds = s.n, s.v, 0.0
    if s.folds:
        rows, columns, seconds = min(_fold_shapes(s, budget), key=lambda shape: shape[2])
    least = rows * pitch(columns) * s.logit if s.folds else 0
    if not any(s.need):
        yield Plan(0, rows, columns, (), least, seconds)
        return
    both = _best_sweep(s, budget, s.need, s.n)
    choices = [(both,)]
    group = _even(s.n, budget // 2 // max(1, s.d * s.acc))
    if s.need.hidden and (s.need.weight or s.need.bias):
        weights = _best_sweep(s, budget, Need(False, s.need.weight, s.need.bias), s.n)
        choices.append((weights, _best_sweep(s, budget, Need(True, False, False), group)))
    elif s.need.hidden:
        choices.append((_best_sweep(s, budget, s.need, group),))
    for sweeps in choices:
        used = max(least, *(sweep_bytes(s, sweep) for sweep in sweeps))
        yield Plan(0, rows, columns, sweeps, used, seconds + sum(sweep_seconds(s, sweep) for sweep in sweeps))


def _fold_shapes(s: Shape, budget: int) -> Iterator[tuple[int, int, float]]:
    """(rows, columns, seconds): whole rows, which are multiplied once, and slabs of all rows, once a fold."""
    moved = s.folds * s.logit * s.n * s.v / tiles.BANDWIDTH
    rows = _even(s.n, max(1, min(_most_whole_rows(s.n), budget // (pitch(s.v) * s.logit))))
    if rows * pitch(s.v) * s.logit <= budget:
        yield rows, s.v, moved + logits_seconds(s, rows, s.v)
    for rows in _halves(s.n):
        columns = _even(s.v, min(budget // (rows * s.logit), _most_columns(s, rows)), 16)
        if rows * pitch(columns) * s.logit <= budget or rows == 1:
            yield rows, columns, moved + s.folds * logits_seconds(s, rows, columns)


def _best_sweep(s: Shape, budget: int, need: Need, group: int) -> Sweep:
    sweeps = []
    for rows in _halves(group):
        fixed = sweep_bytes(s, Sweep(group, rows, 0, need))
        each = sweep_bytes(s, Sweep(group, rows, 16, need)) - fixed
        columns = _even(s.v, max(16, min((budget - fixed) // each * 16, _most_columns(s, rows))), 16)
        sweeps.append(Sweep(group, rows, columns, need))
    fitting = [sweep for sweep in sweeps if sweep_bytes(s, sweep) <= budget]
    if not fitting:
        return min(sweeps, key=lambda sweep: sweep_bytes(s, sweep))
    return min(fitting, key=lambda sweep: sweep_seconds(s, sweep))
