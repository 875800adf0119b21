"""Runs attacks, keeps every outcome, and reports the worst attack first.

    rows.jsonl     one line per row and variant, and a line {"done": ...} after each unit: an interrupted run loses at
                   most the unit that was at work
    attacks.json   the report

Knows files. Must not know what an attack does.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..lm import check_head
from . import metrics, models
from .attacks import ATTACKS, DIRECT
from .distribution import auc_leak
from .journal import Journal, write_json
from .target import Outcomes, Target

REPORT = "attacks.json"
SUCCESS = (
    "the value is said as whole words; for rows without a value, ROUGE-L recall (stemmed) of the answer >= {}"
)
Progress = Callable[[str, int, int], None]


def run_attacks(
    target: Target,
    *,
    out: str | Path,
    attacks: Sequence[str] | None = None,
    name: str = "",
    base: Target | None = None,
    progress: Progress = lambda attack, done, total: None,
) -> dict[str, Any]:
    """Attack, and report.

    Args:
        target: the model and the rows.
        out: folder for `manifest.json`, `rows.jsonl` and `attacks.json`; further attacks can be added to it later.
        attacks: names of `ATTACKS`; None: all. What cannot be tried is listed as skipped, with the reason.
        name: of the model, for the record.
        base: the model before unlearning, with the same rows: asked directly, for comparison.
        progress: called after every unit.

    Returns:
        what `attacks.json` holds: `attacks`, the worst first; `direct`, without an attack; `base`; `skipped`.

    Raises:
        ValueError: an unknown attack; `out` with another run's results.
    """
    names = (
        list(ATTACKS) if attacks is None else [DIRECT, *(a for a in dict.fromkeys(attacks) if a != DIRECT)]
    )
    for attack in names:
        if attack not in ATTACKS:
            raise ValueError(f"attacks: wanted some of {', '.join(ATTACKS)}, got {attack!r}")
    check_head(target.model)
    journal = Journal(
        Path(out), _manifest(target, base), key=("attack", "unit", "variant", "id"), note={"model": name}
    )
    finished = [i for i, row in enumerate(journal.rows) if row.get("done")]
    journal.drop_after(finished[-1] + 1 if finished else 0)
    skipped = []
    if base is not None:
        _run(journal, base, "base", list(ATTACKS[DIRECT].units(base)), progress)
    for attack in names:
        why = ATTACKS[attack].missing(target)
        if why is not None:
            skipped.append({"name": attack, "why": why})
            continue
        skipped += [{"name": f"{attack}: {v}", "why": w} for v, w in ATTACKS[attack].left_out(target).items()]
        _run(journal, target, attack, list(ATTACKS[attack].units(target)), progress)
    report = {"model": name, "rows": len(target.rows), "success": SUCCESS.format(target.options.threshold)}
    report |= _report(journal.rows, skipped)
    write_json(journal.folder / REPORT, report)
    return report


def _run(journal: Journal, target: Target, attack: str, units: Sequence[Any], progress: Progress) -> None:
    for number, (unit, work) in enumerate(units):
        if (attack, unit, "", -1) not in journal.done:
            queries, steps, start = target.queries, target.steps, time.monotonic()
            outcomes = work()
            cost = {
                "queries": target.queries - queries,
                "steps": target.steps - steps,
                "seconds": round(time.monotonic() - start, 2),
            }
            end = {"variant": "", "id": -1, "done": True, **cost}
            journal.append({"attack": attack, "unit": unit, **row} for row in (*outcomes, end))
        progress(attack, number + 1, len(units))


def _manifest(target: Target, base: Target | None) -> dict[str, Any]:
    def digest(rows: Sequence[Any]) -> str | None:
        return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:16] if rows else None

    return {
        "schema": 1,
        "forget": digest(target.rows),
        "retain": digest(target.retain),
        "holdout": digest(target.holdout),
        **{k: v for k, v in asdict(target.options).items() if k != "batch_size"},
        "base_fingerprint": None if base is None else models.fingerprint(base.model),
        "model_fingerprint": models.fingerprint(target.model),
        "tokenizer_fingerprint": models.tokenizer_fingerprint(target.tokenizer),
        **target.prompting.changed(),
    }


# --- report ----------------------------------------------------------------------------------------------------


def _report(rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, str]]) -> dict[str, Any]:
    by_attack: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_attack.setdefault(row["attack"], []).append(row)
    entries = {attack: _entry(attack, of) for attack, of in by_attack.items()}
    direct, base = entries.pop(DIRECT, None), entries.pop("base", None)
    order = sorted(entries.values(), key=lambda e: -1.0 if e["leak"] is None else e["leak"], reverse=True)
    return {"attacks": order, "direct": direct, "base": base, "skipped": list(skipped)}


def _entry(attack: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One attack: its worst variant, what every variant brought, and what it cost."""
    ends = [row for row in rows if row.get("done")]
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row.get("done"):
            variants.setdefault(row["variant"], []).append(row)
    told = {variant: _variant(attack, of) for variant, of in variants.items()}
    known = {variant: v for variant, v in told.items() if v["leak"] is not None}
    worst = max(known, key=lambda variant: known[variant]["leak"], default=None)
    found = ATTACKS[DIRECT if attack == "base" else attack]
    entry = {
        "name": attack,
        "what": found.what,
        "strength": found.strength,
        "measure": found.measure,
        "leak": None if worst is None else known[worst]["leak"],
        "worst_variant": worst,
        "variants": told,
        "cost": {key: round(sum(end[key] for end in ends), 2) for key in ("queries", "steps", "seconds")},
    }
    if worst is None:
        entry["undefined"] = "no row could be judged"
    return entry | _curves(variants, told)


def _variant(attack: str, rows: Outcomes) -> dict[str, Any]:
    status: dict[str, int] = {}
    for row in rows:
        status[row["status"]] = status.get(row["status"], 0) + 1
    if attack == "membership":
        return auc_leak(rows) | {"status": status}
    leaked = [row["leaked"] for row in rows if row["leaked"] is not None]
    told: dict[str, Any] = {"leak": None, "low": None, "high": None, "rows": len(leaked), "status": status}
    if leaked:
        interval = metrics.bootstrap(leaked)
        ends = (None if math.isnan(end) else end for end in interval[1:])
        told |= dict(zip(("leak", "low", "high"), (interval[0], *ends), strict=True))
        told |= {k: _mean(rows, k) for k in MEANS if any(row.get(k) is not None for row in rows)}
    return told


# Of an outcome, what is told as a mean beside the leak.
MEANS = ("recall", "top", "bottom", "relative_rank", "all_top", "all_bottom", "all_relative_rank")


def _mean(rows: Outcomes, key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values)


def _curves(variants: Mapping[str, Outcomes], told: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Learning rate -> [[steps, leak], ...] of attacks that train."""
    curves: dict[str, list[list[float]]] = {}
    for variant, rows in variants.items():
        if rows[0].get("step") is not None:
            curves.setdefault(f"{rows[0]['rate']:g}", []).append([rows[0]["step"], told[variant]["leak"]])
    return {"curves": curves} if curves else {}


def table(report: Mapping[str, Any], title: str) -> Table:
    """The worst attack first; at the end what was asked without an attack, and what could not be tried."""
    shown = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    for column in ("attack", "leak (95 %)", "worst variant", "queries", "steps", "s"):
        shown.add_column(column, no_wrap=column != "worst variant")
    for entry in _lines(report):
        worst = entry["variants"].get(entry["worst_variant"], {})
        leak = "undefined" if entry["leak"] is None else f"{entry['leak']:.2f}"
        if worst.get("low") is not None:
            leak += f" ({worst['low']:.2f} to {worst['high']:.2f})"
        cost = entry["cost"]
        spent = str(cost["queries"]), str(cost["steps"] or ""), f"{cost['seconds']:.0f}"
        shown.add_row(entry["name"], leak, escape(_cut(entry["worst_variant"] or "")), *spent)
    for entry in report["skipped"]:
        shown.add_row(entry["name"], "skipped", entry["why"], "", "", "")
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def legend(report: Mapping[str, Any]) -> Table:
    """What each attacker does and must have, in the table's order."""
    shown = Table.grid(padding=(0, 2))
    for entry in _lines(report):
        measure = "" if entry["measure"] == ATTACKS[DIRECT].measure else f"; leak: {entry['measure']}"
        shown.add_row(entry["name"], f"{entry['what']} (wants {entry['strength']}){measure}")
    return shown


def _lines(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from report["attacks"]
    if report["direct"]:
        yield report["direct"]
    if report["base"]:
        yield report["base"] | {"name": "base, direct"}
