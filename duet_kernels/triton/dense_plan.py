"""How many rows and columns of logits a dense loss holds at a time: by bytes, and by seconds as measured on an H200.

`plan` lists sizes that keep the workspace and takes the fastest: a product costs its FLOP at the rate of its number of
rows, everything else its bytes (`tiles`). Whatever the workspace, no buffer is `[N, V]` but for a few tokens, and at
least one row of logits is there. Must not know tensors, kernels, or which loss it is.

Legend: N tokens, D hidden size, V vocabulary, C columns of a slab, M rows of dz, R rows of logits.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from triton import cdiv

from ..head import Need
from . import tiles


class Shape(NamedTuple):
    """What a plan depends on. `dims` and `logits` are each side's hidden size and bytes of a logit."""

    n: int
    v: int
    dims: tuple[int, ...]
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
    """One walk of the gradient, over C = V or over slabs; dh of a `group` of rows is summed while it lasts."""

    group: int
    kept: int  # M
    rows: int  # R
    columns: int  # C
    need: Need


class Plan(NamedTuple):
    """Folds of `[rows, columns]` of logits beforehand (None: in the sweep, while the logits are there), then sweeps."""

    folds: tuple[int, int] | None
    sweeps: tuple[Sweep, ...]
    bytes: int = 0
    seconds: float = 0.0


def pitch(columns: int) -> int:
    """Elements from one row of a block to the next: rows begin on 16 elements, which is 16 bytes or more."""
    return cdiv(columns, 16) * 16


def lent(s: Shape, w: Sweep) -> int:
    """Bytes of dW that are free while its sum of several blocks, in ACC, lies elsewhere."""
    summed = w.need.weight and w.kept < w.group and w.columns == s.v and s.out != s.acc
    return s.v * s.dims[0] * s.out if summed else 0


def placed(sizes: Iterable[int], lent: int) -> list[int | None]:
    """Where buffers lie in what is lent, in bytes, or None for those that need memory of their own."""
    places, used = [], 0
    for size in sizes:
        fits = 0 < size <= lent - used
        places.append(used if fits else None)
        used += cdiv(size, 256) * 256 if fits else 0
    return places


def buffers(s: Shape, kept: int, rows: int, columns: int) -> list[int]:
    """Bytes of dz and of every side's logits."""
    return [kept * pitch(columns) * s.operand, *(rows * pitch(columns) * size for size in s.logits)]


def sweep_bytes(s: Shape, w: Sweep) -> int:
    (hidden, weight, bias), d, apart = w.need, s.dims[0], s.out != s.acc
    sizes = buffers(s, w.kept, w.rows, w.columns)
    used = sum(x for x, place in zip(sizes, placed(sizes, lent(s, w)), strict=True) if place is None)
    used += w.rows * cdiv(w.columns, tiles.FOLD_COLUMNS[s.acc]) * s.partial
    used += w.columns * d * s.acc if weight and apart and w.kept < w.group else 0
    used += w.kept * d * s.operand if weight else 0  # hidden states, 0 where a row does not count
    used += w.group * d * s.acc if hidden and apart and w.columns < s.v else 0
    return used + (2 * s.v * s.acc if bias else 0)


def fold_bytes(s: Shape, rows: int, columns: int) -> int:
    return sum(buffers(s, 0, rows, columns)) + rows * cdiv(columns, tiles.FOLD_COLUMNS[s.acc]) * s.partial


def product_seconds(s: Shape, m: int, k: int, n: int) -> float:
    least, rates = min(m, k, n), tiles.PRODUCT_RATES
    rate = max((r for rows, r in rates if rows <= least), default=rates[0][1] * least / rates[0][0])
    return 2.0 * m * k * n / (rate * tiles.PRODUCT_SHARE[s.operand])


def logits_seconds(s: Shape, rows: int, columns: int) -> float:
    """All logits once, in blocks of that size."""
    return cdiv(s.n, rows) * cdiv(s.v, columns) * sum(product_seconds(s, rows, d, columns) for d in s.dims)


def sweep_seconds(s: Shape, w: Sweep) -> float:
    """Logits, dz and its products. A sum that is added to costs its bytes, half of them behind the product."""
    (hidden, weight, bias), d = w.need, s.dims[0]
    steps, slabs = cdiv(s.n, w.kept), cdiv(s.v, w.columns)
    seconds = logits_seconds(s, w.rows, w.columns)
    moved = s.n * s.v * (sum(s.logits) + s.operand * (2 if bias else 1)) + (
        8 * s.n * d * s.acc if hidden else 0
    )
    if hidden:
        seconds += steps * slabs * product_seconds(s, w.kept, w.columns, d)
        moved += 2 * (slabs - 1) * s.n * d * s.acc
    if weight:
        added = 2 * s.v * d * s.acc / tiles.BANDWIDTH
        once = product_seconds(s, s.v, w.kept, d)
        seconds += once + (steps - 1) * max(added, once + added / 2)
        moved += s.v * d * (s.acc + s.out) if s.out != s.acc else 0
    return seconds + moved / tiles.BANDWIDTH


@functools.lru_cache(maxsize=1024)
def plan(s: Shape, workspace: int) -> Plan:
    """The fastest plan of those that keep the workspace; the smallest where none does."""
    budget = max(workspace - s.n * s.token, workspace // 2)
    moved = s.folds * s.n * s.v * sum(s.logits) / tiles.BANDWIDTH

    def best(choices: Iterable[tuple[int, float, object]]):
        return min(choices, key=lambda choice: (max(choice[0] - budget, 0), choice[1]))

    def sweeps(need: Need, choices: Iterable[Sweep]):
        return best((sweep_bytes(s, w), sweep_seconds(s, w), (w,)) for w in choices)

    folds = 0, 0.0, None
    if s.folds:
        shapes = ((r, c, 1 if c == s.v else s.folds) for r, c in _fold_shapes(s, budget))
        folds = best(
            (fold_bytes(s, r, c), moved + again * logits_seconds(s, r, c), (r, c)) for r, c, again in shapes
        )
    if not any(s.need):
        return Plan(folds[2], (), folds[0], folds[1])
    plans = []
    used, seconds, found = sweeps(s.need, _whole_rows(s, s.need))
    plans.append((used, seconds + moved, Plan(None, found, used, seconds + moved)))
    apart = [Need(False, *s.need[1:]), Need(s.need.hidden)] if s.need.hidden and any(s.need[1:]) else []
    for parts in filter(None, ([s.need], apart)):
        chosen = [sweeps(need, _all_sweeps(s, need, budget, alone=len(parts) == 1)) for need in parts]
        used, seconds = max(folds[0], *(c[0] for c in chosen)), folds[1] + sum(c[1] for c in chosen)
        plans.append((used, seconds, Plan(folds[2], sum((c[2] for c in chosen), ()), used, seconds)))
    return best(plans)[2]


def _pieces(n: int) -> Iterator[int]:
    """Sizes of even pieces of n rows, in whole tiles of a product where they are large."""
    count, size = 1, n
    while size > 16 and count < n:
        yield size
        count += max(1, count // 3)
        size = cdiv(n, count)
        size = min(n, cdiv(size, 64) * 64 if size > 256 else cdiv(size, 16) * 16 if size > 16 else size)
    yield from {size, cdiv(size, 2), cdiv(size, 4), 1}


def _most_whole_rows(n: int) -> int:
    """Rows whose `[rows, V]` may be there at once: half of them, or all where they are few."""
    return n if n <= tiles.DENSE_WHOLE_ROWS else cdiv(n, 2)


def _whole_rows(s: Shape, need: Need) -> Iterator[Sweep]:
    """All columns at hand: dz of M rows, from logits of M or fewer rows at a time."""
    for kept in _pieces(s.n):
        if kept <= _most_whole_rows(s.n):
            for part in (1,) if s.whole else (1, 2, 4, 8):
                yield Sweep(s.n, kept, cdiv(kept, part), s.v, need)


def _all_sweeps(s: Shape, need: Need, budget: int, *, alone: bool) -> Iterator[Sweep]:
    """Slabs of the vocabulary as wide as fits, for all rows or a part of them; whole rows after folds of their own."""
    if not alone:
        yield from _whole_rows(s, need)
    for kept in _pieces(s.n):
        group = s.n if any(need[1:]) else kept
        none, some = (sweep_bytes(s, Sweep(group, kept, kept, c, need)) for c in (0, 16))
        columns = min(
            (budget - none) // (some - none) * 16, s.v if kept <= _most_whole_rows(s.n) else cdiv(s.v, 2)
        )
        yield Sweep(group, kept, kept, _even(s.v, max(columns, 16)), need)


def _fold_shapes(s: Shape, budget: int) -> Iterator[tuple[int, int]]:
    """(rows, columns) of folds: whole rows, which are multiplied once for all folds, or slabs of many rows."""
    for rows in _pieces(s.n):
        most = s.v if rows <= _most_whole_rows(s.n) else cdiv(s.v, 2)
        yield rows, _even(s.v, max(min(budget * 16 // fold_bytes(s, rows, 16), most), 16))
        if rows <= _most_whole_rows(s.n):
            yield rows, s.v


def _even(total: int, most: int) -> int:
    """The size of equal slabs of `total` columns in units of 16, none above `most`."""
    most = most // 16 * 16 if most < total else total
    return min(total, cdiv(cdiv(total, cdiv(total, most)), 16) * 16)
