"""Runs attacks, writes every outcome, and reports the worst attack first.

rows.jsonl     one line per row and variant, and a line {"done": ...} after each unit: an interrupted run loses at
               most one unit
attacks.json   the report
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...data.sources import read_object
from ...model.hashes import fingerprint, fingerprints
from ...model.lm import check_head
from ...names import check_one_of
from .. import metrics
from ..intervals import count_facts, share_interval
from ..journal import MEANING, Journal, Progress, digest, num_rows, write_json
from .attacks import ATTACKS, DIRECT
from .distribution import auc_leak, p_value
from .target import Outcomes, Target, grouped

REPORT = "attacks.json"
SUCCESS = (
    "the value is said as whole words; for rows without a value, ROUGE-L recall (stemmed) of the answer's telling words, those that "
    "neither the question has nor every text, >= {}"
)


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
        out: folder for `manifest.json`, `rows.jsonl` and `attacks.json`; further attacks can be added to it later.
        attacks: names of `ATTACKS`; None: all. What cannot be tried is listed as skipped, with the reason.
        name: of the model, for the record.
        base: the model before unlearning, with the same rows: asked directly, for comparison.
        progress: called before the first and after every unit of an attack.

    Returns:
        what `attacks.json` holds: `attacks`, in the order of `worst_first`; `direct`, without an attack; `base`; `skipped`.

    Raises:
        ValueError: an unknown attack; `out` with another run's results.
    """
    names = list(dict.fromkeys((DIRECT, *(ATTACKS if attacks is None else attacks))))
    for attack in names:
        check_one_of("attacks", attack, ATTACKS)
    check_head(target.model)
    key = ("attack", "unit", "variant", "id")
    with Journal(Path(out), _manifest(target, base), key=key, note={"model": name}) as journal:
        earlier = read_object(path, "out") if (path := journal.folder / REPORT).is_file() else {"skipped": []}
        skipped = [each for each in earlier["skipped"] if each["name"].split(":")[0] not in names]
        finished = [i for i, row in enumerate(journal.rows) if row.get("done")]
        journal.drop_after(finished[-1] + 1 if finished else 0)
        if base is not None:
            _run(journal, base, "base", list(ATTACKS[DIRECT].units(base)), progress)
        for attack in names:
            why = ATTACKS[attack].missing(target)
            if why is not None:
                skipped.append({"name": attack, "why": why})
                continue
            left_out = ATTACKS[attack].left_out(target)
            skipped += [{"name": f"{attack}: {v}", "why": w} for v, w in left_out.items()]
            _run(journal, target, attack, list(ATTACKS[attack].units(target)), progress)
        facts = {row.id: row.fact for row in target.rows}
        outcomes = grouped("attack", journal.rows)
        entries = {attack: _entry(attack, rows, facts) for attack, rows in outcomes.items()}
        direct, of_base = entries.pop(DIRECT, None), entries.pop("base", None)
        report = {
            "model": name,
            "rows": len(target.rows),
            "success": SUCCESS.format(target.options.threshold),
            "attacks": worst_first(entries.values()),
            "direct": direct,
            "base": of_base,
            "skipped": skipped,
        }
        report["headline"] = headline(report)
        write_json(path, report)
    return report


def _run(journal: Journal, target: Target, attack: str, units: Sequence[Any], progress: Progress) -> None:
    progress(attack, 0, len(units))
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
    rows = {"forget": target.rows, "retain": target.retain, "holdout": target.holdout}
    return {
        "schema": 3,
        **{name: digest(repr(list(of))) if of else None for name, of in rows.items()},
        **{k: v for k, v in asdict(target.options).items() if k != "batch_size"},
        "base_fingerprint": None if base is None else fingerprint(base.model),
        **fingerprints(target.model, target.tokenizer),
        **target.prompting.changed(),
    }


# --- report ----------------------------------------------------------------------------------------------------


def told_share(entry: Mapping[str, Any]) -> float:
    """An attack's leak as a share of the rows that any of its variants asked; -1: not known.

    A second paraphrase that one row has, and that tells it, leaks 1 of its rows, and is not the worst of all; nor is a variant of which
    most answers were cut.
    """
    if entry["leak"] is None:
        return -1.0
    most = max((sum(v["status"].values()) for v in entry["variants"].values()), default=0)
    return _told(worst_of(entry)) / most if most else entry["leak"]


def _told(summary: Mapping[str, Any]) -> float:
    """How many rows a variant brings back."""
    return summary["leak"] * summary["rows"]


def tells(entry: Mapping[str, Any]) -> bool:
    """Whether its leak is a share of facts that are told, and so can be the worst of all."""
    return entry["name"] not in ATTACKS or ATTACKS[entry["name"]].tells


def worst_first(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The attacks that make the model tell, the worst first; then those that look at its probabilities."""
    return sorted(entries, key=lambda entry: (tells(entry), told_share(entry)), reverse=True)


def by_chance(entry: Mapping[str, Any]) -> str:
    """The p-value in words; "" where there is none."""
    p = entry.get("p_value")
    return "" if p is None else f"; p = {p:.2g} that it is chance"


def _entry(attack: str, rows: Outcomes, facts: Mapping[Any, str] = {}) -> dict[str, Any]:
    """One attack: its worst variant, all variants, and the cost; of one that trains also its curves."""
    ends = [row for row in rows if row.get("done")]
    variants = grouped("variant", [row for row in rows if not row.get("done")])
    summaries = {variant: _variant(attack, of, facts) for variant, of in variants.items()}
    about = ATTACKS[DIRECT if attack == "base" else attack]
    known = {k: v for k, v in summaries.items() if v["leak"] is not None and k not in about.apart}
    worst: Any = max(known, key=lambda variant: (_told(known[variant]), known[variant]["leak"]), default=None)
    counts = summaries.get(worst, {}).get("given", {})
    # With numbers of rows where it differs.
    given = ", ".join(text if len(counts) == 1 else f"{text} ({n} rows)" for text, n in counts.items())
    entry = {
        "name": attack,
        "what": about.what,
        "strength": ": ".join(filter(None, (about.strength, given))),
        "measure": about.measure,
        "leak": None if worst is None else known[worst]["leak"],
        "worst_variant": worst,
        "variants": summaries,
        "cost": {key: round(sum(end[key] for end in ends), 2) for key in ("queries", "steps", "seconds")},
    }
    if worst is None:
        entry["undefined"] = "no row could be judged"
    if attack == "membership":
        entry["p_value"] = p_value([row for of in variants.values() for row in of])
    if curves := _curves(variants, summaries):
        entry["curves"] = curves
    return entry


def _curves(
    variants: Mapping[str, Outcomes], summaries: Mapping[str, dict[str, Any]]
) -> dict[str, list[list[float]]]:
    """Learning rate -> [[steps, leak], ...] of the variants that train."""
    curves: dict[str, list[list[float]]] = {}
    for variant, (first, *_) in variants.items():
        if first.get("step") is not None:
            curves.setdefault(f"{first['rate']:g}", []).append([first["step"], summaries[variant]["leak"]])
    return curves


def _variant(attack: str, rows: Outcomes, facts: Mapping[Any, str]) -> dict[str, Any]:
    status = Counter(row["status"] for row in rows)
    counted = {"status": dict(status), "unjudged": 1 - status["ok"] / len(rows)}
    if attack == "membership":
        return auc_leak(rows) | counted
    given = Counter(row["given"] for row in rows if "given" in row)
    judged = [row for row in rows if row["leaked"] is not None]
    leaked, asked = [row["leaked"] for row in judged], [facts.get(row.get("id")) for row in judged]
    summary: dict[str, Any] = {"leak": None, "low": None, "high": None, "rows": len(leaked), **counted}
    summary |= {"given": dict(given)} if given else {}
    bounds = sum(bool(row.get("bound")) for row in rows)
    summary |= {"bounds": bounds} if bounds else {}
    if leaked:
        interval, different = share_interval(leaked, asked), count_facts(asked)
        summary |= {"facts": different} if different < len(leaked) else {}
        summary |= dict(zip(("leak", "low", "high"), interval, strict=True))
        values = {k: [row[k] for row in rows if row.get(k) is not None] for k in MEANS}
        summary |= {k: sum(of) / len(of) for k, of in values.items() if of}
    return summary


# Fields of an outcome whose means are reported beside the leak.
MEANS = ("recall", "top", "bottom", "relative_rank", "all_top", "all_bottom", "all_relative_rank")


def table(report: Mapping[str, Any], title: str) -> Table:
    """A table, the worst attack first, the plain questions last."""
    shown = Table(title=Text(title), box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("attack", "leak (95 %)", "rows", "not\njudged", "queries", "steps", "seconds"):
        shown.add_column(column, no_wrap=True, justify="left" if column == "attack" else "right")
    for entry in _lines(report):
        worst = worst_of(entry)
        leak = "undefined" if entry["leak"] is None else f"{entry['leak']:.2f}"
        if worst.get("low") is not None:
            leak += f" ({worst['low']:.2f} to {worst['high']:.2f})"
        cost = entry["cost"]
        spent = str(cost["queries"]), str(cost["steps"]), f"{cost['seconds']:.0f}"
        shown.add_row(entry["name"], leak, num_asked(worst), f"{metrics.percent(unjudged(entry))}%", *spent)
    return shown


def legend(report: Mapping[str, Any]) -> Group:
    """What each attacker does and needs, and the worst variant, in the table's order; then what was not run."""
    shown = Table.grid(padding=(0, 2))
    for entry in _lines(report):
        measure = "" if entry["measure"] == ATTACKS[DIRECT].measure else f"; leak: {entry['measure']}"
        variants = entry["variants"]
        worst = f"; worst: {worst_variant(entry)}" if len(variants) > 1 else ""
        status = (worst_of(entry) or next(iter(variants.values()), {})).get("status", {})
        left_out = "".join(f"; {num_rows(n)} {MEANING[s]}" for s, n in status.items() if s != "ok")
        line = f"{entry['what']} (wants {entry['strength']}){measure}{by_chance(entry)}{worst}{apart(entry)}{left_out}"
        if bounds := [f"{num_rows(v['bounds'])} of {k}" for k, v in variants.items() if v.get("bounds")]:
            line += f"; {', '.join(bounds)}: at least so much, since some of the answers could not be judged"
        shown.add_row(entry["name"], Text(line))
    skipped = [Text(f"not tried: {entry['name']} ({entry['why']})") for entry in report["skipped"]]
    return Group(shown, *skipped)


def num_asked(summary: Mapping[str, Any]) -> str:
    """How many rows a mean is of, and of how many facts its interval is, where rows are wordings of one."""
    facts = f" ({summary['facts']} facts)" if "facts" in summary else ""
    return f"{summary.get('rows', 0)}{facts}"


def worst_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of the worst variant; empty where none could be judged."""
    return entry["variants"].get(entry["worst_variant"], {})


def unjudged(entry: Mapping[str, Any]) -> float:
    """The share of rows of the worst variant that could not be judged: cut, empty, refused, too long ...

    Of an attack whose variants all have none that could: 1.
    """
    worst = worst_of(entry)
    return worst.get("unjudged", 0.0) if worst else 1.0


def headline(report: Mapping[str, Any]) -> str:
    """The worst attack that makes the model tell, and how many answers could not be judged; beside it the others, in a sentence."""
    lines = [entry for entry in _lines(report) if entry["name"] != "base, direct"]
    known = [entry for entry in lines if entry["leak"] is not None]
    if not known:
        return "nothing could be judged: no answer was long enough to end, or none could be asked"
    worst = worst_first(known)[0]
    asked = max(unjudged(entry) for entry in lines)
    beside = "".join(
        f"; beside it {_figure(entry)}" for entry in known if not tells(entry) and entry is not worst
    )
    return (
        f"{'the worst attack, ' if tells(worst) else ''}{_figure(worst)}; {metrics.percent(unjudged(worst))}% of its rows could not be "
        f"judged (most of any attack: {metrics.percent(asked)}%), and count neither as leaked nor as forgotten{beside}"
    )


def _figure(entry: Mapping[str, Any]) -> str:
    of = f" of {num_rows(worst_of(entry)['rows'])}" if "rows" in worst_of(entry) else ""
    return f"{entry['name']}: {metrics.percent(entry['leak'])}%{of}, {entry['measure']}{by_chance(entry)}"


def worst_variant(entry: Mapping[str, Any]) -> str:
    """Its name, where one brought anything back."""
    tried = entry["variants"].keys() - _apart(entry)
    if entry["leak"] == 0 and len(tried) > 1:
        return f"none of {len(tried)} brought anything back"
    return entry["worst_variant"] or "none could be judged"


def apart(entry: Mapping[str, Any]) -> str:
    """What the variants that are another model than the one to publish tell; "" where there are none."""
    of = {variant: entry["variants"].get(variant, {}).get("leak") for variant in _apart(entry)}
    shares = (
        f"; {k}: {metrics.percent(leak)}%, which is the base itself"
        for k, leak in of.items()
        if leak is not None
    )
    return "".join(shares)


def _apart(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return ATTACKS[entry["name"]].apart if entry["name"] in ATTACKS else ()


def _lines(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from report["attacks"]
    if report["direct"]:
        yield report["direct"]
    if report["base"]:
        yield report["base"] | {"name": "base, direct"}
