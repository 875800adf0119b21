"""Rows of a run -> means with intervals, the suite's numbers, and a table. An undefined number has its reason.

{"tasks": {task: {"rows": n, "status": {...}, "why": {status: of the first row}, "notes": n, "note": the first,
                  "metrics": {metric: {mean, low, high, rows}}}},
 "numbers": {name: {"value": x} or {"value": null, "undefined": "no retain model given"}}}
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .. import metrics
from ..intervals import count_facts, mean_interval
from ..journal import MEANING, num_rows
from .row_metrics import JUDGED, SIGNED, UNBOUNDED

Rows = Sequence[Mapping[str, Any]]
NO_RETAIN = "no retain model given"
# ROUGE of an empty or cut answer counts, as the papers count it; `row_metrics.unknown` says what is undefined for it.
COUNTED = ("ok", "empty", "cut")


def summarise(
    rows: Rows, numbers: Mapping[str, Mapping[str, Any]], retain_rows: Rows | None = None
) -> dict[str, Any]:
    """All means and numbers of a run.

    Args:
        retain_rows: the same suite's rows of a model trained without the forget rows, or None.
    """
    return {
        "tasks": {
            task: _task_summary([row for row in rows if row["task"] == task])
            for task in dict.fromkeys(row["task"] for row in rows)
        },
        "numbers": {name: NUMBERS[name](spec, rows, retain_rows) for name, spec in numbers.items()},
    }


def _task_summary(rows: Rows) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row.get("metrics", {}))
    notes = [row["note"] for row in rows if "note" in row]
    why = {row["status"]: row["why"] for row in reversed(rows) if "why" in row}
    return {
        "rows": len(rows),
        "status": dict(Counter(row["status"] for row in rows)),
        "unjudged": sum(map(_unjudged, rows)) / len(rows),
        **({"repeated": repeated} if (repeated := _repeated(rows)) else {}),
        "notes": len(notes),
        **({"note": notes[0]} if notes else {}),
        **({"why": why} if why else {}),
        "metrics": {name: _mean(rows, name) for name in names},
    }


def _repeated(rows: Rows) -> int:
    """Rows with the question and the answer of another one."""
    asked = [(row["prompt"], row["answer"]) for row in rows if "generated" in row and "prompt" in row]
    return len(asked) - len(set(asked))


def _unjudged(row: Mapping[str, Any]) -> bool:
    numbers = row.get("metrics")
    return numbers is None or any(number is None and name in JUDGED for name, number in numbers.items())


def _mean(rows: Rows, metric: str) -> dict[str, Any]:
    values = _values(rows, metric)
    if not values:
        return {"mean": None, "low": None, "high": None, "rows": 0}
    of_row = {row["id"]: row.get("fact") for row in rows}
    facts = [of_row[i] for i in values]
    bounds = {"shares": metric not in UNBOUNDED, "least": -math.inf if metric in SIGNED else 0.0}
    interval = mean_interval(list(values.values()), facts, **bounds)
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    different = count_facts(facts)
    fewer = {"facts": different} if different < len(values) else {}
    return {"mean": interval[0], "low": low, "high": high, "rows": len(values), **fewer}


def _values(rows: Rows, metric: str) -> dict[Any, float]:
    """Row id -> value, of the rows for which the metric is defined."""
    return {
        row["id"]: row["metrics"][metric]
        for row in rows
        if row["status"] in COUNTED and row["metrics"].get(metric) is not None
    }


def _of(rows: Rows, reference: str) -> dict[Any, float]:
    task, _, metric = reference.partition(".")
    return _values([row for row in rows if row["task"] == task], metric)


# --- numbers ---------------------------------------------------------------------------------------------------


def _undefined(why: str) -> dict[str, Any]:
    return {"value": None, "undefined": why}


def _forget_quality(spec: Mapping, rows: Rows, retain_rows: Rows | None) -> dict[str, Any]:
    if retain_rows is None:
        return _undefined(NO_RETAIN)
    ours, theirs = _of(rows, spec["ratios"]), _of(retain_rows, spec["ratios"])
    if not ours or not theirs:
        return _undefined(f"no truth ratio in {'this run' if not ours else 'the retain run'}")
    if ours.keys() != theirs.keys():
        return _undefined(
            f"other rows: {len(ours)} with a truth ratio here, {len(theirs)} in the retain run, "
            f"{len(ours.keys() & theirs.keys())} in both"
        )
    return {"value": metrics.forget_quality(list(ours.values()), list(theirs.values()))}


def _model_utility(spec: Mapping, rows: Rows, retain_rows: Rows | None) -> dict[str, Any]:
    sets: dict[str, dict[str, float]] = {}
    for name, parts in spec.items():
        for part, reference in parts.items():
            values = _of(rows, reference)
            if not values:
                return _undefined(f"{reference} has no row")
            sets.setdefault(name, {})[part] = sum(values.values()) / len(values)
    return {"value": metrics.model_utility(sets), "parts": sets}


def _privleak(spec: Mapping, rows: Rows, retain_rows: Rows | None) -> dict[str, Any]:
    def scores(of: Rows) -> list[list[float]]:
        return [list(_of(of, spec[side]).values()) for side in ("forget", "holdout")]

    forget, holdout = scores(rows)
    if not forget or not holdout:
        return _undefined(f"{spec['forget'] if not forget else spec['holdout']} has no row")
    auc = metrics.auc(forget, holdout)
    auc_retrain = spec.get("auc_retrain")
    if retain_rows is not None:
        theirs = scores(retain_rows)
        if not all(theirs):
            return _undefined("the retain run has no such scores") | {"auc": auc}
        auc_retrain = metrics.auc(*theirs)
    if auc_retrain is None:
        return _undefined(NO_RETAIN) | {"auc": auc}
    value = metrics.privleak(forget, holdout, float(auc_retrain))
    return {"value": value, "auc": auc, "auc_retrain": float(auc_retrain)}


OF_RETAIN = frozenset({"forget_quality", "privleak"})  # numbers that need a retain model

# name -> function of (its entry in the suite, the run's rows, the retain run's rows or None) -> {"value": ...}
NUMBERS: dict[str, Callable[[Mapping, Rows, Rows | None], dict[str, Any]]] = {
    "forget_quality": _forget_quality,
    "model_utility": _model_utility,
    "privleak": _privleak,
}


def check_number(where: str, name: str, spec: Any, tasks: Mapping[str, Sequence[str]]) -> None:
    """Refuse a number of a suite file that could not be computed; `tasks`: name -> its metrics.

    Raises:
        ValueError: naming the field, what came and what was wanted.
    """
    if name not in NUMBERS:
        raise ValueError(f"{where}: there is no such number; wanted one of {', '.join(NUMBERS)}")
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where}: wanted a mapping, got {spec!r}")
    fields = {
        "forget_quality": {"ratios"},
        "privleak": {"forget", "holdout", "auc_retrain"},
        "model_utility": set(spec),
    }[name]
    if set(spec) != fields or not spec:
        raise ValueError(
            f"{where}: wanted the fields {', '.join(sorted(fields))}, got {', '.join(spec) or 'none'}"
        )
    references = {k: v for k, v in spec.items() if k != "auc_retrain"}
    if name == "model_utility":
        for each, parts in spec.items():
            if not isinstance(parts, Mapping) or set(parts) != set(metrics.UTILITY_PARTS):
                raise ValueError(f"{where}.{each}: wanted {', '.join(metrics.UTILITY_PARTS)}, got {parts!r}")
        references = {f"{s}.{part}": v for s, parts in spec.items() for part, v in parts.items()}
    elif spec.get("auc_retrain") is not None:
        try:
            good = 0 < float(spec["auc_retrain"]) <= 1
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"{where}.auc_retrain: wanted a number in (0, 1], got {spec['auc_retrain']!r}")
    for field, reference in references.items():
        task, _, metric = str(reference).partition(".")
        if metric not in tasks.get(task, ()):
            raise ValueError(f"{where}.{field}: wanted task.metric of this suite, got {reference!r}")


# --- table -----------------------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any], title: str) -> Group:
    """Means with their 95 % intervals, the suite's numbers, and how many rows were left out, and why."""
    shown = Table(title=Text(title), box=box.SIMPLE, padding=(0, 1))
    for column in ("task", "metric", "mean", "95 % interval", "rows"):
        shown.add_column(column, no_wrap=column not in ("task", "metric"), overflow="fold")
    for task, entry in summary["tasks"].items():
        if not entry["metrics"]:
            shown.add_row(Text(task), "", "undefined", "", "0")
        for metric, x in entry["metrics"].items():
            interval = "" if x["low"] is None else f"{x['low']:.3f} to {x['high']:.3f}"
            mean = "undefined" if x["mean"] is None else f"{x['mean']:.3f}"
            facts = f" ({x['facts']} facts)" if "facts" in x else ""
            shown.add_row(Text(task), metric, mean, interval, f"{x['rows']}{facts}")
    notes = [
        f"{name}: undefined: {x['undefined']}" if x["value"] is None else f"{name}: {x['value']:.6g}"
        for name, x in summary["numbers"].items()
    ]
    for task, entry in summary["tasks"].items():
        if entry.get("unjudged"):
            notes.append(
                f"{task}: {metrics.percent(entry['unjudged'])}% of its {num_rows(entry['rows'])} could not be judged:"
            )
        why = {status: f"; the first: {text}" for status, text in entry.get("why", {}).items()}
        notes += [
            f"{task}: {num_rows(n)} {MEANING[s]}{why.get(s, '')}"
            for s, n in entry["status"].items()
            if s in MEANING
        ]
        if entry.get("repeated"):
            notes.append(
                f"{task}: {num_rows(entry['repeated'])} with the question and the answer of another one"
            )
        if entry.get("notes"):
            notes.append(
                f"{task}: {num_rows(entry['notes'])} with a note in rows.jsonl, the first: {entry['note']}"
            )
    return Group(shown, *map(Text, notes))
