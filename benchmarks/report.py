"""Markdown tables of a result file, and the comparison of two. Knows rows, nothing of how they were made."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from benchmarks.cases import OPS
from benchmarks.harness import Row

OURS = "duet_kernels"
ORDER = {name: i for i, name in enumerate((OURS, "torch", "trl", "liger", "cut_cross_entropy", "quack"))}


def case_of(row: Row) -> tuple:
    """What was asked of every provider."""
    return (*kind_of(row), row.n, row.d, row.v, row.k)


def kind_of(row: Row) -> tuple:
    """What was asked, whatever its size."""
    return OPS.index(row.op), row.divergence, row.ids, row.head, row.dtype, row.which_pass


def sizes(row: Row) -> str:
    k = f", k = {row.k}" if row.op in ("linear_topk", "topk_distill_loss") else ""
    return f"N = {row.n}, D = {row.d}, V = {row.v}{k}, {row.dtype}"


def title(row: Row) -> str:
    """The operation in words, without its size."""
    head = "" if row.head == "none" else f", {row.head} head"
    head += "" if row.ids == "likeliest" else f", {row.ids.capitalize()} ids"
    what = {"forward": "forward", "full": "forward + backward"}.get(row.which_pass, row.which_pass)
    return f"`{row.op}`{' ' + row.divergence if row.divergence else ''}{head}, {what}"


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent."""
    if x is None:
        return "–"
    return f"{x:.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def line(row: Row) -> str:
    """One row for a terminal."""
    took = (
        f"{number(row.ms)} ms ({number(row.ms_p20)} - {number(row.ms_p80)}), {number(row.peak_mb)} MiB"
        if row.ms is not None
        else row.status
    )
    return f"{title(row).replace('`', '')}, {sizes(row)} | {row.provider} {row.impl}: {took}"


def where(rows: Sequence[Row]) -> str:
    """Device and versions, once for all rows; with a commit where rows of a provider were measured at another one."""
    first = rows[0]
    # Torch's own version stands there already.
    peers = sorted(
        {
            (r.provider, r.impl if r.provider == "torch" else r.provider_version, r.commit)
            for r in rows
            if r.ms is not None and (r.provider != "torch" or r.commit != first.commit)
        }
    )
    versions = [
        f"{name} {version}" + ("" if commit == first.commit else f" (measured at {commit})")
        for name, version, commit in peers
    ]
    driver = [f"driver {first.driver}", f"clocks {first.clocks}"] if first.driver else []
    return ", ".join(
        [
            first.device,
            *driver,
            f"torch {first.torch}",
            f"triton {first.triton}",
            *versions,
            f"commit {first.commit}",
        ]
    )


def tables(rows: Sequence[Row]) -> str:
    """One table for every case, best time first; then who is absent."""
    lines = [
        where(rows),
        "",
        "Median of the calls (p20 – p80). Memory: the highest point of one call beyond its inputs, outputs included. "
        "Share of the floor: the time of the least work an exact result needs, by a product and a copy measured in "
        "the same run, over the time taken. Error: the larger of value and gradients, relative to fp64, on a small "
        "case of the same kind.",
    ]
    measured = [row for row in rows if not row.status.startswith("absent")]
    for _, group in itertools.groupby(sorted(measured, key=case_of), key=case_of):
        lines += ["", *case_table(list(group))]
    lines += absences(rows)
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """The largest case of every operation in one table: ours, plain torch, and the fastest of the others."""
    lines = [
        "| | ours | torch eager | torch.compile | best of the others |",
        "|---|---:|---:|---:|---:|",
    ]
    last = [row for row in rows if row.which_pass == "full" or row.head == "none"]
    for _, group in itertools.groupby(sorted(last, key=kind_of), key=kind_of):
        group = list(group)
        tried = [r for r in group if r.provider == OURS and not r.status.startswith("absent")]
        if not tried:
            continue
        largest = case_of(max(tried, key=lambda r: (r.n * r.d * r.v, r.k, case_of(r))))
        here = [row for row in group if case_of(row) == largest]
        mine = [row for row in tried if case_of(row) == largest]
        ours = _best(mine)
        columns = [
            _best(r for r in here if (r.provider, r.impl) == ("torch", i)) for i in ("eager", "compile")
        ]
        known = {(OURS, r.impl) for r in here if r.provider == OURS} | {
            ("torch", "eager"),
            ("torch", "compile"),
        }
        rival = _best(row for row in here if (row.provider, row.impl) not in known)
        cells = ["; ".join(f"{_failure(row)} ({row.impl})" for row in mine)]
        if ours is not None:
            cells = [f"**{_cell(ours, ours)}** ({ours.impl})"]
        cells += [_cell(row, ours) for row in columns]
        cells.append("–" if rival is None else f"{_cell(rival, ours)} ({rival.provider} {rival.impl})")
        lines.append(f"| {title(mine[0])}; {sizes(mine[0])} | " + " | ".join(cells) + " |")
    return lines


def _failure(row: Row) -> str:
    return ("gate red, " if row.gate == "red" else "") + row.status


def _best(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row.ms is not None), key=lambda row: row.ms, default=None)


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "–"
    ratio = "" if ours is None or row is ours else f" ({number(row.ms / ours.ms)} ×)"
    return f"{number(row.ms)} ms{ratio}, {number(row.peak_mb)} MiB"


def case_table(group: Sequence[Row]) -> list[str]:
    """One case: title, header, a line per provider."""
    best = min((r.ms for r in group if r.ms is not None and r.provider == OURS), default=None)
    lines = [
        f"**{title(group[0])}** – {sizes(group[0])}",
        "",
        "| | ms (p20 – p80) | against ours | MiB | share of the floor | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(group, key=lambda r: (r.ms is None, r.ms or 0, ORDER.get(r.provider, 99))):
        name = f"{row.provider} {row.impl}"
        name = f"**{name}**" if row.provider == OURS else name
        error = "–" if row.error is None else f"{row.error:.0e}"
        if row.ms is None:
            lines.append(f"| {name} | {_failure(row)} | | | | {error} |")
            continue
        ratio = "" if best is None else f"{number(row.ms / best)} ×"
        floor = "–" if not row.floor_ms else f"{row.floor_ms / row.ms:.0%}"
        spread = f"{number(row.ms)} ({number(row.ms_p20)} – {number(row.ms_p80)})"
        lines.append(f"| {name} | {spread} | {ratio} | {number(row.peak_mb)} | {floor} | {error} |")
    return lines


def absences(rows: Iterable[Row]) -> list[str]:
    absent = {
        (row.provider, row.impl, row.op): row.status.removeprefix("absent: ")
        for row in rows
        if row.status.startswith("absent")
    }
    if not absent:
        return []
    found = [f"* {name} {impl} (`{op}`): {reason}" for (name, impl, op), reason in absent.items()]
    return ["", "Not measured here:", "", *found]


# --- comparison -------------------------------------------------------------------------------------------------


def comparison(before: Sequence[Row], after: Sequence[Row]) -> str:
    """Row by row, B over A in time and memory; a difference inside both spreads is called none."""

    def key(row: Row) -> tuple:
        return (*case_of(row), row.provider, row.impl)

    old = {key(row): row for row in before}
    lines = [
        f"A: {where(before)}",
        f"B: {where(after)}",
        "",
        "| case | provider | A, ms | B, ms | B / A | faster | memory B / A |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    matched = 0
    for b in after:
        a = old.get(key(b))
        if a is None:
            continue
        matched += 1
        cells = [f"{title(b)}, {sizes(b)}", f"{b.provider} {b.impl}"]
        if a.ms is None or b.ms is None:
            cells += [
                *(number(r.ms) if r.ms is not None else r.status for r in (a, b)),
                "–",
                _which_ran(a, b),
                "–",
            ]
        else:
            memory = f"{b.peak_mb / a.peak_mb:.2f}" if a.peak_mb and b.peak_mb is not None else "–"
            cells += [number(a.ms), number(b.ms), f"{b.ms / a.ms:.2f}", faster(a, b), memory]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{matched} rows in both, {len(before) - matched} only in A, {len(after) - matched} only in B.",
    ]
    return "\n".join(lines)


def faster(a: Row, b: Row) -> str:
    """ "A" or "B" when their 20 % to 80 % ranges do not meet."""
    if b.ms_p80 < a.ms_p20:
        return "B"
    return "A" if a.ms_p80 < b.ms_p20 else "none (within the spread)"


def _which_ran(a: Row, b: Row) -> str:
    if a.ms is None and b.ms is None:
        return "neither ran"
    return "only A ran" if b.ms is None else "only B ran"
