"""The report's tables: what was measured (a method a column), every attack with its cost, lm-evaluation-harness.

An undefined number has its reason; it differs from a number that was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..attacks.attacks import DIRECT
from ..attacks.runner import worst_variant
from ..suites.suite import TO_FORGET
from .page import NOT_RUN, Cell, Grid, Section
from .runs import Inputs, Method


def table_section(inputs: Inputs) -> Section:
    section = Section("results", "Methods, metrics and attacks")
    if not inputs.methods:
        section.notes.append("No table: no run of duet eval, duet attack or duet demo was given.")
        return section
    lines = [*_attack_lines(inputs), *_metric_lines(inputs.methods), *_number_lines(inputs.methods)]
    if not lines:
        section.notes.append("No table: none of the runs holds results of duet eval or duet attack.")
        return section
    grid = Grid(
        ["", *(m.label for m in inputs.methods)],
        bands=[group for group, _, _ in lines],
        roles=["", *(m.role for m in inputs.methods)],
    )
    for _, name, tell in lines:
        grid.rows.append([Cell(name), *map(tell, inputs.methods)])
    section.blocks.append(grid)
    section.notes.append(
        "Attacks from the worst to the mildest: the share that comes back under the strongest variant of each, lower is "
        f"better. Beside a value its 95 % interval, where one can be given: Wilson's of shares, Newcombe's of membership's "
        f"AUC, else the bootstrap's. {NOT_RUN} was not run."
    )
    if any(m.attacks is None for m in inputs.students):
        names = ", ".join(m.label for m in inputs.students if m.attacks is None)
        section.notes.append(f"Not attacked: {names} (no run of duet attack was given).")
    entries = {e["name"]: e for m in inputs.methods if m.attacks for e in m.attacks["attacks"]}
    section.legend = {name: _about(entries[name]) for _, name, _ in lines if name in entries}
    reasons = {f"{c.text}: {c.why}" for row in grid.rows for c in row if c.why}
    section.notes += sorted(reasons)
    return section


def attacks_section(inputs: Inputs) -> Section:
    """For each attacked model: what the attacker did, needed and spent, the worst attack first; every variant, folded."""
    section = Section("attacks", "Every attack, the worst first")
    for method in inputs.methods:
        entries = [e for e in method.attacks["attacks"] if "cost" in e] if method.attacks else []
        direct = method.attacks["direct"] if method.attacks else None
        if direct and "cost" in direct and (entries or method in inputs.students):
            entries.append(direct)
        if not entries:
            continue
        grid = Grid(
            ["attack", "comes back", "worst variant", "the attacker needs", "cost"],
            [_attack_line(entry) for entry in entries],
            caption=method.label,
            prose=True,
        )
        variants = Grid(
            ["attack", "variant", "comes back", "rows", "left out"],
            [line for entry in entries for line in _variant_lines(entry)],
            caption=f"{method.label}: every variant",
            prose=True,
            folded=True,
        )
        section.blocks += [grid, variants]
        section.notes += [
            f"{method.label}: not tried: {skipped['name']} ({skipped['why']})."
            for skipped in method.attacks["skipped"]
        ]
    if not section.blocks:
        section.notes.append("No attacks: no run of duet attack was given.")
    return section


def _attack_line(entry: dict[str, Any]) -> list[Cell]:
    cost = entry["cost"]
    spent = [f"{cost['queries']} queries", f"{cost['steps']} steps", f"{cost['seconds']:.0f} s"]
    return [
        Cell(entry["name"]),
        _leak_cell(entry, entry["variants"].get(entry["worst_variant"], {})),
        Cell(worst_variant(entry)),
        Cell(entry["strength"]),
        Cell(", ".join(spent if cost["steps"] else [spent[0], spent[2]])),
    ]


def _variant_lines(entry: dict[str, Any]) -> Iterator[list[Cell]]:
    worst_first = sorted(
        entry["variants"].items(), key=lambda v: 1 if v[1]["leak"] is None else -v[1]["leak"]
    )
    for variant, summary in worst_first:
        left_out = ", ".join(f"{n} {s}" for s, n in summary["status"].items() if s not in ("ok", "empty"))
        yield [
            Cell(entry["name"]),
            Cell(variant),
            _leak_cell(summary, summary),
            Cell(str(summary["rows"])),
            Cell(left_out),
        ]


def _leak_cell(entry: dict[str, Any], interval: dict[str, Any]) -> Cell:
    if entry["leak"] is None:
        return Cell("undefined")
    return _number((entry["leak"], interval.get("low"), interval.get("high")))


def lm_eval_section(inputs: Inputs) -> Section:
    """Results of lm-evaluation-harness."""
    section = Section("lm-eval", "lm-evaluation-harness")
    methods = [m for m in inputs.methods if m.lm_eval]
    if not methods:
        section.notes.append(
            "Absent: no folder with lm_eval.json was given (duet eval --lm-eval writes one)."
        )
        return section
    names = [name for m in methods for task in m.lm_eval.items() for name in _harness_names(*task)]
    grid = Grid(
        ["task", "metric", *(part for _ in inputs.methods for part in ("value", "stderr"))],
        groups=["", "", *(m.label for m in inputs.methods for _ in range(2))],
    )
    for task, metric, given in dict.fromkeys(names):
        cells = [Cell(task), Cell(f"{metric} ({given})" if given not in ("", "none") else metric)]
        for method in inputs.methods:
            results = method.lm_eval.get(task, {})
            for key in (f"{metric},{given}", f"{metric}_stderr,{given}"):
                value = results.get(key)
                cells.append(Cell(f"{value:.4g}" if isinstance(value, (int, float)) else "absent"))
        grid.rows.append(cells)
    section.blocks.append(grid)
    return section


def _harness_names(task: str, results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(task, metric, filter) of the numbers that are no standard errors."""
    for key, value in results.items():
        metric, _, given = key.partition(",")
        if isinstance(value, (int, float)) and not metric.endswith("_stderr") and "," in key:
            yield task, metric, given


def _about(entry: dict[str, Any]) -> str:
    strength = f" (wants {entry['strength']})" if entry.get("strength") else ""
    measure = "" if entry["measure"] == entry["what"] else f"; {entry['measure']}"
    return f"{entry['what']}{strength}{measure}"


Line = tuple[str, str, Callable[[Method], Cell]]


def _attack_lines(inputs: Inputs) -> Iterator[Line]:
    worst: dict[str, float] = {}
    for method in inputs.methods:
        for entry in method.attacks["attacks"] if method.attacks else ():
            leak = entry["leak"] if entry["leak"] is not None and method in inputs.students else -1.0
            worst[entry["name"]] = max(leak, worst.get(entry["name"], -1.0))
    for name in [
        *sorted(worst, key=lambda n: -worst[n]),
        *([DIRECT] if any(m.attacks for m in inputs.methods) else []),
    ]:
        yield "attacks ↓", name, lambda method, name=name: _attack_cell(method, name)


def _attack_cell(method: Method, name: str) -> Cell:
    if method.attacks is None:
        return Cell(NOT_RUN)
    direct = method.attacks["direct"]
    entries = {e["name"]: e for e in method.attacks["attacks"]} | ({DIRECT: direct} if direct else {})
    if name in entries:
        entry = entries[name]
        if entry["leak"] is None:
            return Cell(
                "undefined", why=f"{method.label}, {name}: {entry.get('undefined', 'no row could be judged')}"
            )
        worst = entry["variants"].get(entry["worst_variant"], {})
        return _number((entry["leak"], worst.get("low"), worst.get("high")))
    why = next((s["why"] for s in method.attacks["skipped"] if s["name"] == name), "")
    return Cell("skipped", why=f"{method.label}, {name}: {why}") if why else Cell(NOT_RUN)


def _metric_lines(methods: Sequence[Method]) -> Iterator[Line]:
    wanted = {
        (task, metric): None
        for m in methods
        for task, entry in m.tasks.items()
        for metric in entry["metrics"]
    }
    empty = {(task, ""): None for m in methods for task, entry in m.tasks.items() if not entry["metrics"]}
    for task, metric in wanted | empty:
        arrow = " ↓" if task.startswith(TO_FORGET) and metric in LEAKS else ""
        yield task, metric + arrow, lambda method, at=(task, metric): _metric_cell(method, *at)


# Metrics of a task to forget for which lower is better.
LEAKS = (
    "contains_answer", "rouge_l_recall", "rouge_l_recall_stemmed", "rouge_l_f1", "rouge_l_f1_stemmed", "probability",
    "exact_memorization", "extraction_strength", "recall",
)  # fmt: skip


def _metric_cell(method: Method, task: str, metric: str) -> Cell:
    if task not in method.tasks:
        return Cell(NOT_RUN)
    entry = method.tasks[task]["metrics"].get(metric)
    if entry is None or entry["mean"] is None:
        status = ", ".join(f"{n} rows {s}" for s, n in method.tasks[task].get("status", {}).items())
        return Cell(
            "undefined", why=f"{method.label}, {task} {metric}: no row has a value ({status or 'no rows'})"
        )
    return _number((entry["mean"], entry["low"], entry["high"]))


def _number_lines(methods: Sequence[Method]) -> Iterator[Line]:
    for name in dict.fromkeys(name for m in methods for name in m.numbers):
        yield "of the suite", name, lambda method, name=name: _number_cell(method, name)


def _number_cell(method: Method, name: str) -> Cell:
    number = method.numbers.get(name)
    if number is None:
        return Cell(NOT_RUN)
    if number["value"] is None:
        return Cell("undefined", why=f"{method.label}, {name}: {number['undefined']}")
    return Cell(f"{number['value']:.3g}")


def _number(estimate: tuple[float, float | None, float | None]) -> Cell:
    mean, low, high = estimate
    return Cell(f"{mean:.2f}", "" if low is None or high is None else f"{low:.2f} to {high:.2f}")
