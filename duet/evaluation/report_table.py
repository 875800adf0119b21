"""The report's table: a method a row; attacks, the worst first, then metrics, each with its interval.

Undefined is said with its reason, and is something else than not run. Must not know pages or figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .attacks import DIRECT
from .report_page import NOT_RUN, Cell, Grid, Section
from .report_runs import Inputs, Method

# How the tasks of the shipped suites, and of suites that follow them, begin: what should go, and what should stay.
TO_FORGET = ("forget", "verbatim", "knowledge", "wmdp")
TO_KEEP = ("retain", "utility", "real_authors", "world_facts", "mmlu")


def table_section(inputs: Inputs) -> Section:
    section = Section("results", "Methods, metrics and attacks")
    if not inputs.methods:
        section.notes.append("No table: no run of duet eval, duet attack or duet demo was given.")
        return section
    columns = [*_attack_columns(inputs), *_metric_columns(inputs.methods), *_number_columns(inputs.methods)]
    if not columns:
        section.notes.append("No table: none of the runs holds results of duet eval or duet attack.")
        return section
    grid = Grid(
        ["method", *(name for _, name, _ in columns)], groups=["", *(group for group, _, _ in columns)]
    )
    for method in inputs.methods:
        grid.rows.append([Cell(method.label, role=method.role), *(tell(method) for _, _, tell in columns)])
    section.blocks.append(grid)
    section.notes.append(
        "Attacks from the worst to the mildest: the share that comes back under the strongest variant of each, lower is "
        f"better. Below a value its 95 % interval, where one can be given. {NOT_RUN} was not run."
    )
    if any(m.attacks is None for m in inputs.students):
        names = ", ".join(m.label for m in inputs.students if m.attacks is None)
        section.notes.append(f"Not attacked: {names} (no run of duet attack was given).")
    entries = {e["name"]: e for m in inputs.methods if m.attacks for e in m.attacks["attacks"]}
    section.legend = {name: _about(entries[name]) for _, name, _ in columns if name in entries}
    reasons = {f"{c.text}: {c.why}" for row in grid.rows for c in row if c.why}
    section.notes += sorted(reasons)
    return section


def _about(entry: dict[str, Any]) -> str:
    strength = f" (wants {entry['strength']})" if entry.get("strength") else ""
    measure = "" if entry["measure"] == entry["what"] else f"; {entry['measure']}"
    return f"{entry['what']}{strength}{measure}"


Column = tuple[str, str, Callable[[Method], Cell]]


def _attack_columns(inputs: Inputs) -> Iterator[Column]:
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


def _metric_columns(methods: Sequence[Method]) -> Iterator[Column]:
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


# Metrics of a task to forget that say how much is left: lower is better.
LEAKS = (
    "contains_answer", "rouge_l_recall", "rouge_l_recall_stemmed", "rouge_l_f1", "rouge_l_f1_stemmed", "probability",
    "exact_memorization", "extraction_strength", "recall",
)  # fmt: skip


def _metric_cell(method: Method, task: str, metric: str) -> Cell:
    if task not in method.tasks:
        return Cell(NOT_RUN)
    told = method.tasks[task]["metrics"].get(metric)
    if told is None or told["mean"] is None:
        status = ", ".join(f"{n} rows {s}" for s, n in method.tasks[task].get("status", {}).items())
        return Cell(
            "undefined", why=f"{method.label}, {task} {metric}: no row has a value ({status or 'no rows'})"
        )
    return _number((told["mean"], told["low"], told["high"]))


def _number_columns(methods: Sequence[Method]) -> Iterator[Column]:
    for name in dict.fromkeys(name for m in methods for name in m.numbers):
        yield "of the suite", name, lambda method, name=name: _number_cell(method, name)


def _number_cell(method: Method, name: str) -> Cell:
    told = method.numbers.get(name)
    if told is None:
        return Cell(NOT_RUN)
    if told["value"] is None:
        return Cell("undefined", why=f"{method.label}, {name}: {told['undefined']}")
    return Cell(f"{told['value']:.3g}")


def _number(told: tuple[float, float | None, float | None]) -> Cell:
    mean, low, high = told
    return Cell(f"{mean:.2f}", "" if low is None or high is None else f"{low:.2f} to {high:.2f}")
