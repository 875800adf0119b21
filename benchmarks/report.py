"""Markdown tables of a result file, and the comparison of two. Knows rows, nothing of how they were made."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.cases import FLOOR, OPS
from benchmarks.harness import Row, clocks_in_words

OURS = "duet_kernels"
ORDER = {name: i for i, name in enumerate((OURS, "torch", "trl", "liger", "cut_cross_entropy", "quack"))}


def case_of(row: Row) -> tuple:
    """What was asked of every provider."""
    return (*kind_of(row), row.n, row.d, row.v, row.k)


def kind_of(row: Row) -> tuple:
    """What was asked, whatever its size."""
    return OPS.index(row.op), row.divergence, row.ids, row.head, row.dtype, row.which_pass


def sizes(row: Row) -> str:
    k = f", k = {row.k}" if has_k(row) else ""
    return f"N = {row.n}, D = {row.d}, V = {row.v}{k}, {row.dtype}"


def has_k(row: Row) -> bool:
    """Whether k says something about the work."""
    return row.op in ("linear_topk", "topk_distill_loss") or row.divergence == "exclude"


def called(row: Row) -> str:
    """The provider as tables name it. A generalised JSD is KL(teacher || student) at beta = 0."""
    name = f"{row.provider} {row.impl}"
    return f"{name} at beta 0, forward KL" if "JSD" in row.impl and row.divergence == "forward_kl" else name


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
    """Device and versions, once for all rows; the commit is the first row's, others stand in `measured_at`."""
    first, measured = rows[0], [row for row in rows if row.ms is not None]
    peers = sorted({(r.provider, r.provider_version) for r in measured if r.provider not in (OURS, "torch")})
    versions = [f"{name} {version}" for name, version in peers]
    clocks = sorted({row.clocks for row in measured if row.clocks}, key=lambda told: int(told.split()[0]))
    driver = [f"driver {first.driver}", clocks_in_words(*clocks)] if clocks else []
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


def place(rows: Sequence[Row]) -> str:
    """The device, and the commit of ours."""
    ours = sorted({row.commit for row in rows if row.provider == OURS and row.ms is not None})
    return f"{rows[0].device}, commit {', '.join(ours)}"


def measured_at(rows: Iterable[Row]) -> list[str]:
    """Who was measured at which commit, where there is more than one; of who was at several, what."""
    places: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        if row.ms is not None:
            name = f"torch {row.impl}" if row.provider == "torch" else row.provider
            places.setdefault(name, {}).setdefault(row.commit, set()).add(row.op)
    commits = dict.fromkeys(commit for where in places.values() for commit in where)
    if len(commits) < 2:
        return []
    said = []
    for commit in commits:
        names = [
            name
            if len(where) == 1
            else f"{name} ({', '.join(f'`{op}`' for op in OPS if op in where[commit])})"
            for name, where in sorted(places.items())
            if commit in where
        ]
        said.append(f"{commit}: {', '.join(names)}")
    return ["", f"Measured at {'; '.join(said)}."]


def tables(rows: Sequence[Row]) -> str:
    """One table for every case, best time first; then who is absent."""
    lines = [
        where(rows),
        "",
        "Median of the calls (p20 – p80). Memory: the highest point of one call beyond its inputs, outputs included. "
        "Error: the larger of value and gradients, relative to fp64, on a small case of the same kind.",
        "",
        FLOOR,
    ]
    measured = [row for row in rows if not row.status.startswith("absent")]
    for _, group in itertools.groupby(sorted(measured, key=case_of), key=case_of):
        lines += ["", *case_table(list(group))]
    lines += measured_at(rows)
    lines += absences(rows)
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """The largest case of every operation in one table: ours, plain torch, and the fastest of the others."""
    lines = [
        "| | ours | torch eager | torch.compile | best of the others measured |",
        "|---|---:|---:|---:|---:|",
    ]
    for here, mine in largest_cases(rows):
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
        cells.append("–" if rival is None else f"{_cell(rival, ours)} ({called(rival)})")
        lines.append(f"| {title(mine[0])}; {sizes(mine[0])} | " + " | ".join(cells) + " |")
    return lines


def largest_cases(rows: Iterable[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Of each kind the largest case at which ours was tried: everyone's rows, and those of ours."""
    last = [row for row in rows if row.which_pass == "full" or row.head == "none"]
    for _, group in itertools.groupby(sorted(last, key=kind_of), key=kind_of):
        group = list(group)
        tried = [r for r in group if r.provider == OURS and not r.status.startswith("absent")]
        if tried:
            largest = case_of(max(tried, key=lambda r: (r.n * r.d * r.v, r.k, case_of(r))))
            yield [r for r in group if case_of(r) == largest], [r for r in tried if case_of(r) == largest]


def workspaces(rows: Iterable[Row]) -> list[str]:
    """Time and memory of ours by the size of the workspace, at the largest cases; nothing where only one was measured."""
    cases = [[row for row in mine if row.ms is not None] for _, mine in largest_cases(rows)]
    cases = [mine for mine in cases if len({row.workspace_mb for row in mine}) > 1]
    default = {row.workspace_mb for mine in cases for row in mine if row.impl in ("triton", "chunked")}
    columns = sorted({row.workspace_mb for mine in cases for row in mine if row.workspace_mb})
    if not cases:
        return []
    heads = [f"{size} MiB{', the default when measured' if size in default else ''}" for size in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    for mine in cases:
        best = [_best(row for row in mine if row.workspace_mb == size) for size in columns]
        lines.append(
            f"| {title(mine[0])}; {sizes(mine[0])} | {' | '.join(_cell(row, None) for row in best)} |"
        )
    return lines


def better_elsewhere(rows: Iterable[Row]) -> list[str]:
    """At the largest cases every other that no row of ours equals in both time and memory."""
    lines = [
        "| | the other | time against our fastest | memory against our smallest |",
        "|---|---|---:|---:|",
    ]
    for here, mine in largest_cases(rows):
        ours = [row for row in mine if row.ms is not None and row.peak_mb is not None]
        others = [
            row for row in here if row.provider != OURS and row.ms is not None and row.peak_mb is not None
        ]
        for row in sorted(others, key=lambda r: r.ms):
            if not ours or any(o.ms <= row.ms and o.peak_mb <= row.peak_mb for o in ours):
                continue
            fastest, smallest = min(ours, key=lambda o: o.ms), min(ours, key=lambda o: o.peak_mb)
            within = "" if faster(fastest, row) in "AB" else " (within the spread)"
            if row.commit != fastest.commit:  # clocks and drivers may have differed
                within = " (another session)"
            lines.append(
                f"| {title(row)}; {sizes(row)} | {called(row)}: {_cell(row, None)} | "
                f"{number(row.ms / fastest.ms)} × {number(fastest.ms)} ms{within} | "
                f"{number(row.peak_mb / smallest.peak_mb)} × {number(smallest.peak_mb)} MiB |"
            )
    return lines if len(lines) > 2 else []


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
        name = f"**{called(row)}**" if row.provider == OURS else called(row)
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
    """Who has no row of an operation, and why; who has rows of some of its cases: which ones are lacking."""
    rows = list(rows)
    absent = [row for row in rows if row.status.startswith("absent")]
    measured = [row for row in rows if not row.status.startswith("absent")]
    there = {(row.provider, row.impl, row.op, *case_of(row)) for row in measured}
    partly = {key[:3] for key in there}
    found: dict[str, None] = {}
    for row in absent:
        key = row.provider, row.impl, row.op
        if (*key, *case_of(row)) in there:
            continue
        what = f"{title(row)}; {sizes(row)}" if key in partly else f"`{row.op}`"
        found[f"* {row.provider} {row.impl} ({what}): {row.status.removeprefix('absent: ')}"] = None
    return ["", "Not measured here:", "", *found] if found else []


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
