"""real.md from the rows of the study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.studies.runner import origins

from .arms import ARMS, FEW, LABELS, SEEDS, SUBJECTS, VALIDATION
from .bar import BAR, Line, best, measured, missing, with_ratios

Row = dict[str, Any]
OURS, SMOLLM = ("stopping", "contrast"), "SmolLM2-135M-Instruct (4-bit weights, unpacked)"

COLUMNS = (
    ("told", "told"),
    ("leak@32", "leak@32"),
    ("refused", "refused"),
    ("broken", "broken refusal"),
    ("unseen", "unseen neighbours"),
    ("seen", "seen neighbours"),
    ("general", "general"),
    ("reverse_prompt", "reverse prompt"),
    ("prefill", "prefill"),
    ("relearned", "relearned"),
    ("invented", "invented"),
    ("perplexity_ratio", "perplexity x"),
)

# What the README shows of a method.
SHORT = (
    "told",
    "leak@32",
    "refused",
    "unseen",
    "general",
    "reverse_prompt",
    "prefill",
    "relearned",
    "invented",
    "perplexity_ratio",
)


def means(rows: Sequence[Row], key: str) -> list[float]:
    """Mean over the seeds of each subject; subjects without this figure are left out."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    found = []
    for subject in subjects:
        values = [
            row[key] for row in rows if row["subject"] == subject and not math.isnan(row.get(key, math.nan))
        ]
        found += [sum(values) / len(values)] if values else []
    return found


def _cell(rows: Sequence[Row], key: str) -> str:
    """Mean over subjects (lowest to highest subject), in percent, and of how many where some lack it; a perplexity as it is."""
    values, subjects = means(rows, key), {row["subject"] for row in rows}
    if not values:
        return "–"
    if key == "perplexity_ratio":
        return f"{sum(values) / len(values):.2f}"
    mean, low, high = fmean(values), _percent(min(values)), _percent(max(values))
    line = next((line for line in BAR if line.key == key), None)
    shown = _exact(line, mean, in_percent=True) if line else _percent(mean)
    notes = [f"{low}–{high}"] if low != high else []
    notes += [f"of {len(values)}"] if len(values) < len(subjects) else []
    return f"{shown} ({', '.join(notes)})" if notes else shown


def _percent(share: float) -> str:
    """Rounded as `f"{share:.2f}"` is."""
    return f"{100 * round(share, 2):.0f}"


def _met(rows: Sequence[Row], line: Line) -> bool:
    values = means(rows, line.key)
    return _holds(line, sum(values) / len(values))


def _holds(line: Line, mean: float) -> bool:
    return mean <= line.bound if line.less else mean >= line.bound


def by_row(rows: Sequence[Row], line: Line) -> float | None:
    """The mean in which every question counts alike, not every subject; None for a figure that is no share of questions."""
    counted = [
        (sum(row["rows"][kind] for kind in line.of), row[line.key])
        for row in rows
        if not math.isnan(row.get(line.key, math.nan))
    ]
    total = sum(count for count, _ in counted)
    return sum(count * value for count, value in counted) / total if total else None


def _without_one(rows: Sequence[Row], line: Line) -> dict[str, float]:
    """Subject -> the mean over the other subjects."""
    found = {}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        others = means([row for row in rows if row["subject"] != subject], line.key)
        found |= {subject: sum(others) / len(others)} if others else {}
    return found


def verdict(rows: Sequence[Row]) -> list[str]:
    """The bar, line by line, for our method."""
    lines = [
        "| figure | wanted | measured | | lowest to highest subject | every question alike |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for line in BAR:
        values = means(rows, line.key)
        if not values:
            lines.append(f"| {line.name} | | not measured | | | |")
            continue
        mean, alike = sum(values) / len(values), by_row(rows, line)
        other = "–" if alike is None else _exact(line, alike)
        lines.append(
            f"| {line.name} | {'<=' if line.less else '>='} {line.bound:.2f} | {_exact(line, mean)} | "
            f"{'met' if _met(rows, line) else 'NOT MET'} | {min(values):.2f}–{max(values):.2f} | {other} |"
        )
    return lines


def _exact(line: Line, mean: float, in_percent: bool = False) -> str:
    """With as many digits as show on which side of the bound it is."""
    digits = next(n for n in range(2, 17) if _holds(line, round(mean, n)) == _holds(line, mean))
    mean = round(mean, digits)  # in either unit the same digits, as `percent` has them
    return f"{100 * mean:.{digits - 2}f}" if in_percent else f"{mean:.{digits}f}"


def asked_of(rows: Sequence[Row]) -> list[str]:
    """How many questions stand behind the figures of each subject."""
    of = {row["subject"]: row["rows"] for row in rows}
    return [
        "| questions that the base answers right | forget | seen neighbours | unseen neighbours | general |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {subject} | {' | '.join(str(n[kind]) for kind in ('forget', 'seen', 'unseen', 'general'))} |"
            for subject, n in of.items()
        ),
    ]


def settings(tried: Sequence[Row]) -> list[str]:
    """A line for every setting that was tried on the validation subjects."""
    lines = [
        f"| method | changed | subjects | {' | '.join(name for _, name in COLUMNS)} | lacks |",
        "|---|---|---:|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for arm in ARMS:
        of = [row for row in tried if row["arm"] == arm]
        common = measured(of)
        for changed in {str(row["changed"]): row["changed"] for row in of}.values():
            same = [row for row in of if row["changed"] == changed]
            cells = " | ".join(_cell(same, key) for key, _ in COLUMNS)
            lines.append(
                f"| {ARMS[arm].label} | {_changed(changed) or '–'} | {len(same)} | {cells} | {_lack(same, common):.2f} |"
            )
    return lines


def left_out(dropped: Sequence[Row], tried: Sequence[Row]) -> list[str]:
    """What was tried and not kept (`code` says what), below the same job as it stands."""
    if not dropped:
        return []
    jobs = [(row["arm"], row["subject"]) for row in dropped]
    same = [row for row in tried if not row["changed"] and (row["arm"], row["subject"]) in jobs]
    rows = sorted([*same, *dropped], key=lambda row: list(ARMS).index(row["arm"]))
    return [
        "",
        "By other code or settings, which were not kept (`dropped.jsonl`):",
        "",
        f"| method | otherwise | subject | {' | '.join(name for _, name in COLUMNS)} |",
        "|---|---|---|" + "---:|" * len(COLUMNS),
        *(
            f"| {ARMS[row['arm']].label} | {row.get('code', 'as it stands')} | {row['subject']} | "
            f"{' | '.join(_cell([row], key) for key, _ in COLUMNS)} |"
            for row in rows
        ),
    ]


def sizes(rows: Sequence[Row]) -> list[str]:
    """A sentence on the sizes that `duet shrink` chose."""
    chosen = [f"{row['subject']} {row['size']:g}" for row in rows if "size" in row]
    return [f"`duet shrink` multiplied the adapters by: {', '.join(chosen)}."] if chosen else []


def not_run(rows: Sequence[Row]) -> list[str]:
    """A sentence on methods with fewer runs than are planned."""
    runs = Counter(row["arm"] for row in rows)
    planned = {name: len(SUBJECTS) * len(SEEDS) if arm.main else FEW for name, arm in ARMS.items()}
    fewer = [f"{ARMS[name].label} {runs[name]} of {of}" for name, of in planned.items() if runs[name] < of]
    return [f"Fewer runs than planned: {'; '.join(fewer)}."] if fewer else []


def not_validated(rows: Sequence[Row], tried: Sequence[Row]) -> list[str]:
    """A sentence on methods of the report whose settings have no row of the validation."""
    validated = {row["arm"] for row in tried}
    arms = [ARMS[name].label for name in ARMS if name in {row["arm"] for row in rows} - validated]
    return ["", f"Without a row here, run as they stand in `arms.py`: {'; '.join(arms)}."] if arms else []


def not_shown(rows: Sequence[Row]) -> list[str]:
    """A sentence on figures of earlier commits that are not shown."""
    if not any("relearning" in row for row in rows):
        return []
    return [
        "–: not measured. Rows of earlier commits were asked after relearning for answers that the relearned half had told "
        '("the capital is Tokyo", "the largest city is Tokyo"); those figures (`relearning` in the files) are not shown.'
    ]


def conclusion(rows: Sequence[Row]) -> list[str]:
    """What our method reaches of the bar, and what holds of the tiny world."""
    lines = [line for line in BAR if means(rows, line.key)]
    wrong = [line.name for line in lines if not _met(rows, line)]
    said = [f"Of the bar's {len(BAR)} lines {len(lines) - len(wrong)} are met."]
    if wrong:
        said.append(f"Not met: {'; '.join(wrong)}.")
    for line in lines:
        fails = {
            subject: mean for subject, mean in _without_one(rows, line).items() if not _holds(line, mean)
        }
        if fails and _met(rows, line):
            each = ", ".join(f"{_exact(line, mean)} without {subject}" for subject, mean in fails.items())
            said.append(f"Met only with all subjects: {line.name}: {each}.")
    (bound,) = (line.bound for line in BAR if line.key == "relearned")
    back = {row["subject"] for row in rows if row.get("relearned", 0.0) > bound}
    if back:
        said.append(
            "In [the tiny world](../study/study.md) `duet_deep` withstands relearning. Here ten steps on all weights brought more than "
            f"{bound:.0%} of the other half back on: {', '.join(sorted(back))}."
        )
    return said


def of_rounding(rows: Sequence[Row]) -> list[str]:
    """A paragraph on what int8 does to the base of what is to be kept: finer differences say nothing of a method."""
    rows = [row for row in rows if row["arm"] == "int8"]
    if not rows:
        return []
    kept = {line: fmean(means(rows, line.key)) for line in BAR if line.of and "forget" not in line.of}
    said = "; ".join(
        f"{line.name}: {_exact(line, mean)} ({'met' if _holds(line, mean) else 'NOT MET'})"
        for line, mean in kept.items()
    )
    return [
        f"How exact these figures are: the base itself with its weights rounded to int8, a change that is meant to do no harm, on "
        f"{len(means(rows, 'told'))} subjects: {said}.",
        "",
    ]


def of_relearning(rows: Sequence[Row]) -> list[str]:
    """A paragraph on what the base itself tells after relearning, which also damages it: the figure that the methods' are compared with."""
    rows = [row for row in rows if row["arm"] == "base" and not math.isnan(row.get("relearned", math.nan))]
    if not rows:
        return []
    each = ", ".join(f"{row['subject']} {row['relearned']:.2f}" for row in rows)
    nothing = [row["subject"] for row in rows if row["relearned"] == 0]
    no_use = (
        f" So on {', '.join(nothing)} a 0 after this attack does not show that a method forgot."
        if nothing
        else ""
    )
    return [
        "Relearning also damages a model. The base, which has forgotten nothing, still tells this share of the other half after the same ten "
        f"steps: {each}.{no_use}",
        "",
    ]


def chosen_otherwise(rows: Sequence[Row], tried: Sequence[Row]) -> list[str]:
    """A sentence on methods of the report that ran with another setting than the one that lacks least."""
    said = []
    for arm in ARMS:
        of, ran = ([row for row in some if row["arm"] == arm] for some in (tried, rows))
        if of and ran and best(of) not in [row["changed"] for row in ran]:
            took, less = (
                _changed(changed) or "it stands in `arms.py`" for changed in (ran[0]["changed"], best(of))
            )
            said.append(f"{ARMS[arm].label} ran as {took}, not as {less}")
    return ["", f"{'; '.join(said)}, which lacks less."] if said else []


def _changed(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in changed.items())


def against_the_bar(arm: str, rows: Sequence[Row]) -> list[str]:
    """A section on one of our methods, by its rows; nothing without any."""
    if not rows:
        return []
    how = ARMS[arm].how
    return [
        f"## The bar: {ARMS[arm].label}",
        "",
        f"{how[:1].upper()}{how[1:]}. It reads queries alone. Shares of 1, means over subjects; subjects: {len(means(rows, 'told'))}, runs: "
        f"{len(rows)}.",
        "",
        *verdict(rows),
        "",
        *conclusion(rows),
        "",
        *came_back(rows),
    ]


def not_chosen(tried: Sequence[Row]) -> list[str]:
    """A paragraph on what our methods lack on the validation subjects, where all of them were tried."""
    of = {arm: [row for row in tried if row["arm"] == arm and not row["changed"]] for arm in OURS}
    if not all(of.values()):
        return []
    lines = measured([row for rows in of.values() for row in rows])
    each = ", ".join(f"{ARMS[arm].label} lacks {_lack(rows, lines):.2f}" for arm, rows in of.items())
    return [
        f"The validation was not used to choose between these methods. On {' and '.join(VALIDATION)}, {each} of the bar (table below). To take "
        "the one that meets more lines above is to choose by the report.",
        "",
    ]


def _lack(rows: Sequence[Row], lines: Sequence[Line]) -> float:
    """How much rows lack of these lines of the bar, the mean."""
    return sum(missing(row, lines) for row in rows) / len(rows)


def table(rows: Sequence[Row]) -> list[str]:
    """A line for the base and for every method that was run."""
    lines = [
        f"| method | runs | {' | '.join(name for _, name in COLUMNS)} |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    for arm in LABELS:
        of = [row for row in rows if row["arm"] == arm]
        if of:
            lines.append(
                f"| {LABELS[arm]} | {_runs(of)} | {' | '.join(_cell(of, key) for key, _ in COLUMNS)} |"
            )
    return lines


def _runs(rows: Sequence[Row]) -> int:
    """Subjects times seeds; of the base there is a row for each Python."""
    return len({(row["subject"], row["seed"]) for row in rows})


def names(rows: Sequence[Row]) -> list[str]:
    """What the short names stand for."""
    run = {row["arm"] for row in rows}
    return [f"* {arm.label}: {arm.how}." for name, arm in ARMS.items() if arm.how and name in run]


def summary(rows: Sequence[Row]) -> list[str]:
    """The main methods in few figures, with what the bar wants of each: for the README. What meets the bar is bold."""
    rows, names = with_ratios(rows), dict(COLUMNS)
    bar = [line for key in SHORT for line in BAR if line.key == key]
    heads = [f"{names[line.key]} {'≤' if line.less else '≥'} {_bound(line)}" for line in bar]
    lines = [
        f"| | subjects, runs | {' | '.join(heads)} |",
        "|---|---:|" + "---:|" * len(bar),
    ]
    for arm in LABELS:
        of = [row for row in rows if row["arm"] == arm]
        if of and (arm == "base" or (arm in ARMS and ARMS[arm].main)):
            cells = [_cell(of, line.key) for line in bar]
            cells = [
                f"**{cell}**" if cell != "–" and arm != "base" and _met(of, line) else cell
                for cell, line in zip(cells, bar, strict=True)
            ]
            lines.append(f"| {LABELS[arm]} | {len(means(of, 'told'))}, {_runs(of)} | {' | '.join(cells)} |")
    return lines


def _bound(line: Line) -> str:
    """In the unit in which `_cell` writes it."""
    return f"{line.bound:.2f}" if line.key == "perplexity_ratio" else f"{100 * line.bound:.0f}"


def examples(rows: Sequence[Row], subject: str) -> list[str]:
    """What each model says of the first forget questions of a subject, under the lowest seed."""
    of = {row["arm"]: row for row in sorted(rows, key=lambda row: -row["seed"]) if row["subject"] == subject}
    questions = list(of["base"]["said"])[:3] if "base" in of else []
    lines = []
    for question in questions:
        lines += [f"**{question}**", ""]
        for arm in LABELS:
            said = of.get(arm, {}).get("said", {}).get(question)
            if said is not None:
                lines.append(f"* {LABELS[arm]}: {' '.join(said.split())[:160]}")
        lines.append("")
    return lines


def of_the_steered(rows: Sequence[Row]) -> list[str]:
    """A sentence on the methods that imitate the base behind the prompt, if some were run."""
    run = {row["arm"] for row in rows}
    arms = [name for name in ("duet", "bidirectional", "duet_plain") if name in run]
    if not arms:
        return []
    plain = (
        f" {ARMS['duet_plain'].label} imitates the base without the prompt on retain rows, so that neighbours need not be refused."
        if "duet_plain" in run
        else ""
    )
    return [
        f"Some methods imitate the base behind a prompt: {'; '.join(ARMS[name].label for name in arms)}. Such a student forgets what the "
        "base forgets behind the prompt, and refuses what the base refuses there, neighbours too."
        f"{plain} `duet steer` measures both before a training.",
        "",
    ]


def came_back(rows: Sequence[Row]) -> list[str]:
    """What our method still says behind forced openings, and after relearning: each question once, under the lowest seed."""
    names = {"prefill": "behind a forced opening", "relearned": "after ten steps on the other half"}
    asked = [row for row in sorted(rows, key=lambda row: row["seed"]) if "back" in row]
    found = [
        (row["subject"], name, question, said)
        for row in asked
        for attack, name in names.items()
        for question, said in row["back"].get(attack, {}).items()
    ]
    lines = []
    for subject, name, question in dict.fromkeys(each[:3] for each in found):
        said = [text for *key, text in found if key == [subject, name, question]]
        runs = sum(row["subject"] == subject for row in asked)
        lines.append(
            f"* {subject}, {name}, in {len(said)} of {runs} runs: *{question}* {' '.join(said[0].split())[:100]}"
        )
    kept = f"Of the runs whose answers were kept ({len(asked)} of {len(rows)}), the first run's words."
    return ["### What comes back", "", kept, "", *sorted(lines), ""] if lines else []


def made_with(rows: Sequence[Row]) -> list[str]:
    """Where the rows come from, and how long a training took there."""
    lines = []
    for device, python in sorted({(row["device"], row["python"]) for row in rows}):
        of = [row for row in rows if (row["device"], row["python"]) == (device, python)]
        trained = [row["train_seconds"] for row in of if row["arm"] in ARMS]
        times = f"; a training took {min(trained):.0f} to {max(trained):.0f} s" if trained else ""
        lines.append(f"* {device}: Python {python}, {origins(of)}{times}.")
    return ["## Made with", "", *lines, "", "Each row of `results.jsonl` names its own.", ""]


def page(rows: Sequence[Row], tried: Sequence[Row] = (), dropped: Sequence[Row] = ()) -> str:
    """The page of the rows of the report, of those of the validation, and of what was tried there and not kept."""
    rows, validation = with_ratios(rows), with_ratios([*tried, *dropped], rows) if tried else []
    tried, dropped = validation[: len(tried)], validation[len(tried) :]
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    shown = max(subjects, key=lambda subject: len({row["arm"] for row in rows if row["subject"] == subject}))
    return "\n".join(
        [
            "# A pretrained model forgets",
            "",
            "Written by `python -m benchmarks.studies.real --report` from `results.jsonl`; without `--report` it runs what is missing.",
            f"{rows[0].get('model', SMOLLM)}, LoRA of rank 16. Subjects: {', '.join(subjects)}; settings were chosen on "
            f"{' and '.join(VALIDATION)}. [Devices, versions and commits](#made-with).",
            "",
            "Only facts that the base tells count, and all questions are worded as no training saw them. Shares are of what the base "
            "tells. Seen neighbours: subjects that training names; unseen: others of the same group. An answer tells when it holds the value.",
            "",
            *asked_of(rows),
            "",
            *(
                line
                for arm in OURS
                for line in against_the_bar(arm, [row for row in rows if row["arm"] == arm])
            ),
            *of_rounding(rows),
            *of_relearning(rows),
            *not_chosen(tried),
            "One small model, short questions in English: nothing is shown here about larger models, other languages or long texts.",
            "",
            "## All methods",
            "",
            "Percent, means over the subjects (lowest to highest subject). *of 4*: only 4 subjects have this figure. *told*, *leak@32*, *reverse prompt*, *prefill*, *relearned* and "
            "*invented*: lower is better. *refused*, *neighbours*, *general*: higher is better. *runs*: subjects times seeds.",
            "",
            *table(rows),
            "",
            *names(rows),
            "",
            *of_the_steered(rows),
            *sizes(rows),
            *not_run(rows),
            *not_shown([*rows, *tried]),
            "",
            f"## Settings, on {' and '.join(VALIDATION)}",
            "",
            "Other wordings than those above. *lacks*: how far a row is from the bar, summed over the lines that "
            "every setting has; a run of the study takes the least one.",
            "",
            *(settings(tried) if tried else ["not run"]),
            *chosen_otherwise(rows, tried),
            *not_validated(rows, tried),
            *left_out(dropped, tried),
            "",
            f"## What they say of {shown}",
            "",
            *examples(rows, shown),
            *made_with(rows),
        ]
    )
