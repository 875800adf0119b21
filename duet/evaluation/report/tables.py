"""The report's tables: what was measured (a method a column), every attack with its cost, lm-evaluation-harness.

An undefined number has its reason; it differs from a number that was not measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..attacks.attacks import DIRECT
from ..attacks.runner import apart, by_chance, tells, told_share, worst_of, worst_variant
from .glossary import DOWN, METRICS, NUMBERS, Meaning, direction
from .page import NOT_RUN, Cell, Grid, Section
from .runs import Inputs, Method, in_several_dtypes


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
        [[Cell(name), *cells] for _, name, cells in lines],
        bands=[group for group, _, _ in lines],
        roles=["", *(m.role for m in inputs.methods)],
    )
    section.blocks.append(grid)
    section.notes.append(
        "Attacks from the worst to the mildest: the share that comes back under the strongest variant of each, lower is "
        "better; membership and rank_probe, which make the model tell nothing, come last. Below a value its 95 % interval, "
        "where one can be given, of so many facts where rows are wordings of one: Wilson's of shares, Newcombe's of membership's "
        "AUC, with the p-value of its best score; else Student's t; and the share of rows that could not be judged (cut, "
        f"empty, refused by the template, ...), where there are any: they count neither as leaked nor as forgotten. {NOT_RUN} was not run. ↓: lower is "
        "better; ↑: higher; ≈: near the base's, the retrained model's or 0."
    )
    section.notes += _different_rows(inputs.methods)
    for of in in_several_dtypes(inputs.methods):
        section.notes.append(
            f"One model in several dtypes, whose results are not joined: {'; '.join(f'{m.label}: {m.dtype}' for m in of)}. The same "
            "--dtype for all commands gives one column."
        )
    if any(m.attacks is None for m in inputs.students):
        names = ", ".join(m.label for m in inputs.students if m.attacks is None)
        section.notes.append(f"Not attacked: {names} (no run of duet attack was given).")
    attacked = [m.attacks for m in inputs.methods if m.attacks]
    told = [e for attacks in attacked for e in (*attacks["attacks"], attacks["direct"]) if e]
    entries = {e["name"]: e for e in told}
    section.legend = {name: _about(entries[name]) for _, name, _ in lines if name in entries}
    section.legend |= _glossary(inputs.methods)
    section.notes += sorted({f"{c.text}: {c.why}" for row in grid.rows for c in row if c.why})
    return section


def _different_rows(methods: Sequence[Method]) -> Iterator[str]:
    """Which methods were asked other rows of a task than the rest: their numbers stand side by side all the same."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    for task in dict.fromkeys(task for m in methods for task in m.asked):
        groups: dict[str, list[str]] = {}
        for m in methods:
            if task in m.asked:
                groups.setdefault(m.asked[task], []).append(m.label)
        if len(groups) > 1:
            tasks.setdefault(tuple(map(", ".join, groups.values())), []).append(task)
    for labels, names in tasks.items():
        yield (
            f"Not the same rows (other data, --limit, or answers that --elicit filled in), so that numbers of {', '.join(names)} "
            f"cannot be compared: {'; '.join(labels)}."
        )


def attacks_section(inputs: Inputs) -> Section:
    """For each attacked model: what the attacker did, needed and spent, the worst attack first; every variant, folded."""
    section = Section("attacks", "Every attack, the worst first")
    for method in inputs.methods:
        entries = [e for e in method.entries if "cost" in e]
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
            ["attack", "variant", "comes back", "rows judged", "not judged"],
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
    if not section.blocks and any(m.attacks for m in inputs.methods):
        section.notes.append("No variants and costs of the attacks: only duet attack records them.")
    elif not section.blocks:
        section.notes.append("No attacks: no run of duet attack was given.")
    return section


def _attack_line(entry: dict[str, Any]) -> list[Cell]:
    cost = entry["cost"]
    spent = [f"{cost['queries']} queries", f"{cost['steps']} steps", f"{cost['seconds']:.0f} s"]
    return [
        Cell(entry["name"]),
        _leak_cell(entry, worst_of(entry)),
        Cell(f"{worst_variant(entry)}{apart(entry)}"),
        Cell(entry["strength"]),
        Cell(", ".join(spent if cost["steps"] else [spent[0], spent[2]])),
    ]


def _variant_lines(entry: dict[str, Any]) -> Iterator[list[Cell]]:
    worst_first = sorted(
        entry["variants"].items(), key=lambda v: 1 if v[1]["leak"] is None else -v[1]["leak"]
    )
    for variant, summary in worst_first:
        left_out = ", ".join(f"{n} {s}" for s, n in summary["status"].items() if s != "ok")
        bounds = f", {summary['bounds']} of them a lower bound" if "bounds" in summary else ""
        yield [
            Cell(entry["name"]),
            Cell(variant),
            _leak_cell(summary, summary),
            Cell(f"{summary['rows']}{bounds}"),
            Cell(left_out),
        ]


def _leak_cell(entry: dict[str, Any], interval: dict[str, Any]) -> Cell:
    """entry: an attack or a variant. interval: the variant whose interval and share of rows not judged it has."""
    if entry["leak"] is None:
        return Cell("undefined", unjudged=not_judged({"unjudged": 1.0}))
    cell = _estimate_cell(entry["leak"], interval, not_judged(interval))
    cell.interval = f"{cell.interval}{by_chance(entry)}".removeprefix("; ")
    return cell


def not_judged(counted: Mapping[str, Any], words: str = "not judged") -> str:
    """The share of a variant's rows that could not be judged; "" where there are none, or none were counted."""
    status = counted.get("status", {})
    share = counted.get("unjudged", 1 - status.get("ok", 0) / max(1, sum(status.values())) if status else 0.0)
    return f"{100 * share:.2g} % {words}" if 0 < share < 0.995 else f"100 % {words}" if share else ""


def lm_eval_section(inputs: Inputs) -> Section:
    """Results of lm-evaluation-harness."""
    section = Section("lm-eval", "lm-evaluation-harness")
    methods = [m for m in inputs.methods if m.lm_eval]
    if not methods:
        section.notes.append(
            "Absent: no folder with lm_eval.json was given (duet eval --lm-eval writes one)."
        )
        return section
    names = dict.fromkeys(
        (task, *key.split(",", 1))
        for m in methods
        for task, results in m.lm_eval.items()
        for key, value in results.items()
        if isinstance(value, (int, float)) and "," in key and "_stderr," not in key
    )
    grid = Grid(
        ["task", "metric", *(part for _ in inputs.methods for part in ("value", "stderr"))],
        groups=["", "", *(m.label for m in inputs.methods for _ in range(2))],
    )
    for task, metric, given in names:
        cells = [Cell(task), Cell(f"{metric} ({given})" if given not in ("", "none") else metric)]
        for method in inputs.methods:
            results = method.lm_eval.get(task, {})
            for key in (f"{metric},{given}", f"{metric}_stderr,{given}"):
                value = results.get(key)
                cells.append(Cell(f"{value:.4g}" if isinstance(value, (int, float)) else "absent"))
        grid.rows.append(cells)
    section.blocks.append(grid)
    return section


def _about(entry: dict[str, Any]) -> str:
    strength = f" (wants {entry['strength']})" if entry.get("strength") else ""
    measure = "" if entry["measure"] == entry["what"] else f"; {entry['measure']}"
    return f"{entry['what']}{strength}{measure}"


Line = tuple[str, str, list[Cell]]  # its band, its name, a cell for each method


def _attack_lines(inputs: Inputs) -> Iterator[Line]:
    worst: dict[str, float] = {}
    for method in inputs.methods:
        for entry in method.entries:
            told = told_share(entry) if method in inputs.students else -1.0
            worst[entry["name"]] = max(told, worst.get(entry["name"], -1.0))
    for name in [
        *sorted(worst, key=lambda n: (not tells({"name": n}), -worst[n])),
        *([DIRECT] if any(m.attacks for m in inputs.methods) else []),
    ]:
        yield f"attacks {DOWN}", name, [_attack_cell(method, name) for method in inputs.methods]


def _attack_cell(method: Method, name: str) -> Cell:
    if method.attacks is None:
        return Cell(NOT_RUN)
    direct = method.attacks["direct"]
    entries = {e["name"]: e for e in method.entries} | ({DIRECT: direct} if direct else {})
    if name in entries:
        entry = entries[name]
        cell = _leak_cell(entry, worst_of(entry))
        if entry["leak"] is None:
            cell.why = f"{method.label}, {name}: {entry.get('undefined', 'no row could be judged')}"
        return cell
    why = next((s["why"] for s in method.attacks["skipped"] if s["name"] == name), "")
    return Cell("skipped", why=f"{method.label}, {name}: {why}") if why else Cell(NOT_RUN)


def _metric_lines(methods: Sequence[Method]) -> Iterator[Line]:
    entries = [each for m in methods for each in m.tasks.items()]
    measured = [(task, metric) for task, entry in entries for metric in entry["metrics"]]
    empty = [(task, "") for task, entry in entries if not entry["metrics"]]
    for task, metric in dict.fromkeys(measured + empty):
        name = f"{metric} {direction(task, metric)}".strip()
        yield task, name, [_metric_cell(method, task, metric) for method in methods]


def _glossary(methods: Sequence[Method]) -> dict[str, str]:
    """Metric or number of the suite -> what it is, and which direction is better; by task where it is not one thing."""
    meanings: dict[str, dict[str, str]] = {}  # metric -> task -> what it is
    for task, entry in (each for m in methods for each in m.tasks.items()):
        for metric, numbers in entry["metrics"].items():
            if what := numbers.get("what") or METRICS.get(metric, Meaning("")).what:
                meanings.setdefault(metric, {})[task] = what
    told = {}
    for metric, of_tasks in meanings.items():
        meaning, whats = METRICS.get(metric, Meaning("")), set(of_tasks.values())
        if len(whats) > 1:
            parts = ((task, what, direction(task, metric)) for task, what in of_tasks.items())
            told[metric] = "; ".join(
                f"{task}: {what} ({arrow})" if arrow else f"{task}: {what}" for task, what, arrow in parts
            )
            continue
        what, sides = whats.pop(), [(meaning.forget, "forget"), (meaning.keep, "keep")]
        if meaning.forget == meaning.keep:
            sides = [(meaning.forget, "")]
        arrows = ", ".join(f"{arrow} on rows to {side}" if side else arrow for arrow, side in sides if arrow)
        told[metric] = f"{what} ({arrows})" if arrows else what
    for name in dict.fromkeys(name for m in methods for name in m.numbers):
        if (meaning := _meaning(name)).what:
            told[name] = f"{meaning.what} ({meaning.keep})"
    return told


def _metric_cell(method: Method, task: str, metric: str) -> Cell:
    if task not in method.tasks:
        return Cell(NOT_RUN)
    entry = method.tasks[task]["metrics"].get(metric)
    if entry is None or entry["mean"] is None:
        status = ", ".join(f"{n} rows {s}" for s, n in method.tasks[task].get("status", {}).items())
        return Cell(
            "undefined", why=f"{method.label}, {task} {metric}: no row has a value ({status or 'no rows'})"
        )
    rows = method.tasks[task].get("rows")
    left_out = 1 - entry["rows"] / rows if rows and "rows" in entry else 0.0
    return _estimate_cell(entry["mean"], entry, not_judged({"unjudged": left_out}))


def _number_lines(methods: Sequence[Method]) -> Iterator[Line]:
    for name in dict.fromkeys(name for m in methods for name in m.numbers):
        cells = [_number_cell(method, name) for method in methods]
        yield "of the suite", f"{name} {_meaning(name).keep}".strip(), cells


def _meaning(number: str) -> Meaning:
    return NUMBERS.get(number.split(" (")[0], Meaning(""))


def _number_cell(method: Method, name: str) -> Cell:
    number = method.numbers.get(name)
    if number is None:
        return Cell(NOT_RUN)
    if number["value"] is None:
        return Cell("undefined", why=f"{method.label}, {name}: {number['undefined']}")
    return Cell(f"{number['value']:.3g}")


def _estimate_cell(mean: float, of: Mapping[str, Any], unjudged: str) -> Cell:
    low, high = of.get("low"), of.get("high")
    facts = f", {of['facts']} facts" if "facts" in of else ""
    interval = "" if low is None or high is None else f"{low:.2f} to {high:.2f}{facts}"
    return Cell(f"{mean:.2f}", interval, unjudged=unjudged)
