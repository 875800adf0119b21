"""real.md from the rows of the study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .arms import ARMS, VALIDATION
from .bar import BAR, with_ratios

Row = dict[str, Any]
OURS = "deep"


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
    ("relearning", "relearned"),
    ("invented", "invented"),
    ("perplexity_ratio", "perplexity x"),
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
    """Mean over subjects (lowest to highest subject), in percent; a perplexity as it is."""
    values = means(rows, key)
    if not values:
        return "–"
    if key == "perplexity_ratio":
        return f"{sum(values) / len(values):.2f}"
    mean, low, high = (round(100 * value) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean}" if low == high else f"{mean} ({low}–{high})"


def verdict(rows: Sequence[Row]) -> list[str]:
    """The bar, line by line, for our method."""
    lines = ["| figure | wanted | measured | |", "|---|---:|---:|---|"]
    for line in BAR:
        values = means(rows, line.key)
        if not values:
            lines.append(f"| {line.name} | | not measured | |")
            continue
        mean = sum(values) / len(values)
        met = mean <= line.bound if line.less else mean >= line.bound
        sign = "<=" if line.less else ">="
        lines.append(
            f"| {line.name} | {sign} {line.bound:.2f} | {mean:.2f} | {'met' if met else 'NOT MET'} |"
        )
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """A line for the base and for every method that was run."""
    lines = [
        f"| method | runs | {' | '.join(name for _, name in COLUMNS)} |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    for arm in ("base", *ARMS):
        of = [row for row in rows if row["arm"] == arm]
        if of:
            label = "the base" if arm == "base" else ARMS[arm].label
            lines.append(f"| {label} | {len(of)} | {' | '.join(_cell(of, key) for key, _ in COLUMNS)} |")
    return lines


def examples(rows: Sequence[Row], subject: str) -> list[str]:
    """What each model says of the first forget questions of a subject, under the lowest seed."""
    of = {row["arm"]: row for row in sorted(rows, key=lambda row: -row["seed"]) if row["subject"] == subject}
    questions = list(of["base"]["said"])[:3] if "base" in of else []
    lines = []
    for question in questions:
        lines += [f"**{question}**", ""]
        for arm in ("base", *ARMS):
            said = of.get(arm, {}).get("said", {}).get(question)
            if said is not None:
                label = "the base" if arm == "base" else ARMS[arm].label
                lines.append(f"* {label}: {' '.join(said.split())[:160]}")
        lines.append("")
    return lines


def made_with(rows: Sequence[Row]) -> str:
    how = sorted(
        {
            f"commit {r['commit']}, torch {r['torch']}, transformers {r['transformers']}, {r['device']}"
            for r in rows
        }
    )
    seconds = [row["train_seconds"] for row in rows if row["arm"] != "base"]
    return (
        f"{'; '.join(how)}; a training takes {min(seconds):.0f} to {max(seconds):.0f} s"
        if seconds
        else "; ".join(how)
    )


def page(rows: Sequence[Row]) -> str:
    """The page; subjects of the validation are left out of it."""
    rows = with_ratios([row for row in rows if row["subject"] not in VALIDATION] or rows)
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    asked = next(row["rows"] for row in rows)
    ours = [row for row in rows if row["arm"] == OURS]
    return "\n".join(
        [
            "# A pretrained model forgets",
            "",
            "Written by `python -m benchmarks.studies.real --report` from `results.jsonl`; without `--report` it runs what is missing.",
            f"SmolLM2-135M-Instruct (4-bit weights, unpacked), LoRA of rank 16. Subjects: {', '.join(subjects)}; settings were chosen on "
            f"{' and '.join(VALIDATION)}. {made_with(rows)}.",
            "",
            "Only facts that the base tells count, and all questions are worded as no training saw them. Shares are of what the base "
            f"tells (for {subjects[0]}: {asked['forget']} forget rows, {asked['seen']} of neighbours that training names, {asked['unseen']} of "
            f"neighbours that it does not, {asked['general']} general ones). An answer tells when it holds the value.",
            "",
            f"## The bar: {ARMS[OURS].label}",
            "",
            f"It reads queries alone. Means over {len(means(ours, 'told'))} subjects, {len(ours)} runs.",
            "",
            *(verdict(ours) if ours else ["not run"]),
            "",
            "## All methods",
            "",
            "Percent, means over subjects (lowest to highest subject). *told*, *leak@32*, *reverse prompt*, *prefill*, *relearned* and "
            "*invented*: lower is better. *refused*, *neighbours*, *general*: higher is better. *runs*: subjects times seeds.",
            "",
            *table(rows),
            "",
            f"## What they say of {subjects[0]}",
            "",
            *examples(rows, subjects[0]),
        ]
    )
