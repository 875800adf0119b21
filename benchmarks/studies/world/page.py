"""Rows of the study -> study.md: tables with intervals, and a verdict for each column, computed from them.

    cell        mean over seeds [ends of the 95 % interval of that mean, Student's t], in percent
    a apart b   the 95 % interval of their difference, paired by seed, does not contain 0

What no number decides (what holds, what does not, what is only true here) is written by hand in `discussion.md` beside
the results and taken over as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.seeds import over_seeds
from duet.demo.scorecard import COLUMNS, KEEP
from duet.evaluation.intervals import Interval, compare_paired

from .arms import ARMS, BAR, MOST_QUERIES, QUESTIONS, REFERENCE, Question
from .figures import draw_figures

Row = dict[str, Any]
HIGHER = (*KEEP, "forget_refusal", "untouched_recall")
NOT_JUDGED = ("teacher_refusal", "value_in_bottom")
MEANINGS = COLUMNS | {
    "relearn_40_recall": "the same after 40 steps, at the middle one of the three learning rates",
    "value_in_bottom": "share of true values among the three least likely of their kind behind a forced opening: "
    "forgetting that can be read off",
    "untouched_recall": "recall on forget authors that this arm was neither to forget nor to keep",
    "teacher_refusal": "share of forget questions that the steered base, the teacher, refuses",
}
PAGE, DISCUSSION = "study.md", "discussion.md"


def values_by_seed(rows: Sequence[Row], arm: str, column: str) -> dict[int, float]:
    found = {row["seed"]: row[column] for row in rows if row["arm"] == arm and column in row}
    return dict(sorted(found.items()))


def interval(rows: Sequence[Row], arm: str, column: str) -> Interval | None:
    """Mean over seeds with its 95 % interval; None: no row has the column."""
    values = list(values_by_seed(rows, arm, column).values())
    return over_seeds(values) if values else None


def shown(found: Interval | None) -> str:
    """`12 [9, 15]` in percent; one seed has no interval."""
    if found is None:
        return "–"
    if math.isnan(found.low):
        return f"{100 * found.estimate:.0f}"
    return f"{100 * found.estimate:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def verdict(question: Question, column: str, rows: Sequence[Row]) -> str:
    """Which arm is best in a column, and which of the others its seeds tell apart from it.

    Arms are compared with the best over the seeds they share; fewer than two of them decide nothing. The reference does
    not compete.
    """
    arms = [arm for arm in question.arms if arm != REFERENCE]
    means = {arm: found for arm in arms if (found := interval(rows, arm, column))}
    if len(means) < 2:
        return f"`{column}`: fewer than two arms have run."
    sign = 1 if column in HIGHER else -1
    best = max(means, key=lambda arm: sign * means[arm].estimate)
    apart, alike, unknown = [], [], []
    top = values_by_seed(rows, best, column)
    for arm in means:
        if arm == best:
            continue
        own = values_by_seed(rows, arm, column)
        shared = [seed for seed in own if seed in top]
        if len(shared) < 2:
            unknown.append(question.label(arm))
            continue
        difference = compare_paired([top[s] for s in shared], [own[s] for s in shared]).difference
        if difference.low <= 0 <= difference.high:
            alike.append(question.label(arm))
        else:
            ends = f"{100 * difference.low:+.0f}, {100 * difference.high:+.0f}"
            apart.append(f"{question.label(arm)} ({100 * difference.estimate:+.0f} [{ends}])")
    direction = "higher" if sign > 0 else "lower"
    sentence = f"`{column}` ({direction} is better): best is {question.label(best)}, {shown(means[best])}."
    if apart:
        sentence += f" Worse, with an interval that excludes zero: {', '.join(apart)}."
    if alike:
        sentence += f" Not told apart from it: {', '.join(alike)}."
    if not apart and not alike:
        sentence += " Too few seeds to tell it from the others."
    elif unknown:
        sentence += f" Fewer than two seeds in common: {', '.join(unknown)}."
    return sentence


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(heads) - 1)
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]


def answer(question: Question, rows: Sequence[Row]) -> list[str]:
    """The section of one question: what is asked, the table, and a verdict for each judged column."""
    lines = []
    for arm in question.arms:
        own = [row for row in rows if row["arm"] == arm]
        if own:
            seconds = sum(row["train_cpu_seconds"] for row in own) / len(own)
            cells = [shown(interval(rows, arm, column)) for column in question.columns]
            lines.append(
                [question.label(arm), str(len(own)), *cells, f"{own[0]['queries']:,}", f"{seconds:.0f}"]
            )
    missing = [question.label(arm) for arm in question.arms if arm not in {row["arm"] for row in rows}]
    text = [f"## {question.title}", "", f"{question.asks} {question.note}".strip(), ""]
    if lines:
        heads = ["arm", "seeds", *(column.replace("_", " ") for column in question.columns)]
        text += [*table([*heads, "queries", "training, CPU s"], lines), ""]
    if missing:
        text += [f"Not run: {', '.join(missing)}.", ""]
    judged = [column for column in question.columns if column not in NOT_JUDGED]
    if len(lines) > 1:
        text += [*(f"* {verdict(question, column, rows)}" for column in judged), ""]
    return text


def bar(rows: Sequence[Row], arm: str = "duet_deep") -> list[str]:
    """What duet_deep is held to: met or missed by the mean over seeds."""
    lines = []
    for what, columns, sense, wanted in BAR:
        per_seed = [values_by_seed(rows, arm, column) for column in columns]
        if not per_seed[0]:
            continue
        worst = max if sense == "<=" else min
        found = over_seeds([worst(values[seed] for values in per_seed) for seed in per_seed[0]])
        met = found.estimate <= wanted if sense == "<=" else found.estimate >= wanted
        lines.append([what, f"{sense} {100 * wanted:.0f}", shown(found), "met" if met else "**missed**"])
    if not lines:
        return [f"`{arm}` has not run.", ""]
    seeds = len(values_by_seed(rows, arm, BAR[0][1][0]))
    heads = [f"mean over {seeds} seed{'s' * (seeds != 1)}, held-out paraphrases", "wanted", "found", ""]
    return [*table(heads, lines), ""]


def page(rows: Sequence[Row], seeds: Sequence[int], discussion: str, figures: Sequence[str]) -> str:
    """study.md from the rows; `seeds` are those that every arm should have."""
    made = sorted(
        {f"commit {r['commit']}, torch {r['torch']}, transformers {r['transformers']}" for r in rows}
    )
    scales = sorted({row["scale"] for row in rows})
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    pictures = {
        "relearning": ("forget_retain_relearn.png", "relearn_curves.png"),
        "k": ("k_sweep.png",),
    }
    text = [
        "# What DUET leaves open, in the tiny world",
        "",
        "Written by `python -m benchmarks.studies.world --report` from `results.jsonl`; `make study` runs what is missing.",
        f"{len(rows)} jobs (arm x seed, scale: {', '.join(scales)}), {minutes:.0f} CPU minutes; {'; '.join(made)}.",
        "",
        "Every cell is the mean over seeds in percent with its 95 % interval over seeds (Student's t, cut at 0 and 100), on wordings of "
        "the questions that neither training nor tuning read. All seeds share one base model and one world, so the interval covers the "
        "randomness of unlearning and nothing else. Arms are compared seed by seed with the best one. The best one is chosen by the same "
        "seeds, and many columns are compared: of arms that do not differ about one comparison in twenty or more excludes zero.",
        "",
        f"Equal compute means: no arm (but those marked) shows more than {MOST_QUERIES:,} queries in training, forget and retain "
        "together.",
        "",
    ]
    have = {arm: len(values_by_seed(rows, arm, "forget_recall")) for arm in ARMS}
    partly = [f"{arm} {count}" for arm, count in have.items() if 0 < count < len(seeds)]
    absent = [arm for arm, count in have.items() if not count]
    if partly or absent:
        text.append("**Not complete.**")
    if partly:
        text.append(f"Arms with fewer than {len(seeds)} seeds: {', '.join(partly)}.")
    if absent:
        text.append(f"Not run at all: {', '.join(absent)}.")
    text.append("")
    text += ["## The bar for duet_deep", "", *bar(rows)]
    if discussion:
        text += [discussion.strip(), ""]
    for key, question in QUESTIONS.items():
        text += answer(question, rows)
        text += [f"![{question.title}]({name})\n" for name in pictures.get(key, ()) if name in figures]
    used = {column for question in QUESTIONS.values() for column in question.columns}
    meanings = [f"* `{column}`: {meaning}" for column, meaning in MEANINGS.items() if column in used]
    return "\n".join([*text, "## What the columns say", "", *meanings, ""])


def write_report(rows: Sequence[Row], out: Path, seeds: Sequence[int]) -> Path:
    """Draw the figures and write `out`/study.md; returns its path.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError(f"rows: wanted at least one row of the study in {out}, got none")
    figures = draw_figures(rows, out)
    written = out / DISCUSSION
    discussion = written.read_text() if written.is_file() else ""
    (out / PAGE).write_text(page(rows, seeds, discussion, figures))
    return out / PAGE
