"""The walks of `duet_kernels.triton.dense` that tests force, and tiles with which the interpreter runs few programs."""

from duet_kernels.head import Need
from duet_kernels.triton import dense, tiles
from duet_kernels.triton.dense_plan import Plan, Shape, Sweep
from duet_kernels.triton.primitives import INTERPRETED

NONE = Need(False)


def at_hand(kept: int, rows: int):
    """dz of `kept` rows from logits of `rows` at a time; a loss whose bound waits for its values takes as many of both."""

    def plan(s: Shape) -> Plan:
        if not any(s.need):
            return Plan(Sweep(s.n, 0, min(rows, s.n), s.v, NONE), ())
        return Plan(None, (Sweep(s.n, min(kept, s.n), min(kept if s.whole else rows, s.n), s.v, s.need),))

    return plan


def recomputed(fold: tuple[int, int], *sweeps: tuple[int, int, tuple[bool, ...]], groups: bool = False):
    """Folds of (rows, columns), then sweeps of (rows, columns, gradients); `groups`: dh of one block after the other."""

    def plan(s: Shape) -> Plan:
        folds = Sweep(s.n, 0, min(fold[0], s.n), min(fold[1], s.v), NONE) if s.folds else None
        walks = []
        for rows, columns, need in sweeps:
            need = Need(*(a and b for a, b in zip(need, s.need, strict=True)))
            rows = min(rows, s.n)
            if any(need):
                group = rows if groups and not any(need[1:]) else s.n
                walks.append(Sweep(group, rows, rows, min(columns, s.v), need))
        return Plan(folds, tuple(walks))

    return plan


ALL, WEIGHTS, HIDDEN = (True, True, True), (False, True, True), (True, False, False)
WALKS = {
    "at hand, dW at once": at_hand(10**6, 12),
    "at hand, dW in steps": at_hand(12, 7),
    "recomputed": recomputed((10**6, 64), (10**6, 48, ALL)),
    "recomputed in blocks": recomputed((12, 10**6), (12, 64, ALL)),
    "dW, then dh": recomputed((12, 64), (12, 64, WEIGHTS), (12, 32, HIDDEN), groups=True),
}


def force(monkeypatch, way: str) -> None:
    monkeypatch.setattr(dense, "plan", lambda shape, workspace: WALKS[way](shape))


def few_programs(monkeypatch, width: int = 128) -> None:
    """Tiles of many rows: the interpreter runs programs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(tiles, "SLAB_ROWS", 32)
        monkeypatch.setattr(tiles, "SOFTMAX_PROGRAMS", 2)
        columns(monkeypatch, width)


def columns(monkeypatch, width: int) -> None:
    """Tiles of so many columns, whatever runs them."""
    for name in ("SLAB_COLUMNS", "DENSE_FOLD_COLUMNS", "TERMS_COLUMNS"):
        monkeypatch.setattr(tiles, name, {4: width, 8: width})
    monkeypatch.setattr(tiles, "TERMS_STEPS", 2)
