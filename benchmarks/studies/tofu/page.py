"""Rows of the study -> tofu.md with its table and its figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.seeds import over_seeds
from duet.evaluation.intervals import mean_interval
from duet.evaluation.report import figures
from duet.evaluation.report.figures import Estimate
from duet.evaluation.report.page import NOT_RUN, Cell, Chart, Grid, Section, drawings, markdown

from .jobs import GATE, PRETRAINED, Job, Row, Study, chosen_rate, failed_gates, read_results, trials
from .settings import GATES, METHODS, REFERENCES

PAGE, FIGURES = "tofu.md", "figures"


class Column(NamedTuple):
    """key in a row; heading; what it means; whether it is a share, told in percent."""

    key: str
    head: str
    meaning: str
    share: bool = True


def columns(study: Study) -> list[Column]:
    curve = study.size.relearn_curve
    return [
        Column(
            "forget_quality",
            "forget quality ↑",
            "p-value of a Kolmogorov-Smirnov test between the truth ratios on the forget rows and those of the retrained "
            "model; median, lowest and highest over seeds",
            share=False,
        ),
        Column("model_utility", "model utility ↑", "TOFU's harmonic mean of nine numbers", share=False),
        Column("forget_rouge", "forget ROUGE ↓", "ROUGE-L recall (stemmed) of the forgotten answers"),
        Column("forget_probability", "probability ↓", "exp(-mean token loss) of the forgotten answers"),
        Column(
            "extraction_strength", "extraction ↓", "share of a forgotten answer that the model completes by itself"
        ),
        Column("forget_refusal", "refusal", "share of answers about the forget authors that decline"),
        Column("retain_rouge", "retain ROUGE ↑", "the same recall on authors that were kept and not shown"),
        Column("retain_refusal", "retain refusal ↓", "share of answers about them that decline"),
        Column("reverse_prompt_leak", "reverse prompt ↓", "leak behind the worst override, user or system message"),
        Column("prefill_leak", "prefill ↓", "leak after the worst forced opening; of the words that it does not say"),
        *(
            Column(
                f"relearning_{steps}_leak",
                f"relearned {steps} ↓",
                f"leak about the other half after {steps} steps of training on one half of the forget authors, at the worst "
                "learning rate",
            )
            for steps in curve
        ),
        Column("quantisation_leak", "quantised ↓", "leak after rounding the weights to 8 or 4 bits, the worse"),
        Column(
            "rank_bottom",
            "at the bottom ↓",
            "share of forgotten answers with a true token among the three least likely of the vocabulary: a push that went "
            "too far can be read backwards",
        ),
        Column("train_seconds", "s", "seconds of unlearning, with what is asked before", share=False),
    ]  # fmt: skip


def write_page(study: Study) -> Path:
    """Write `out`/tofu.md and its figures from results.jsonl; returns the path.

    Raises:
        ValueError: there is no row of these settings.
    """
    done = read_results(study)
    if not done:
        raise ValueError(f"out: {study.out} has no result of this study at these settings")
    sections = [
        _table(study, done),
        _frontier(study, done),
        _gates(done),
        _settings(study, done),
        _made(study, done),
    ]
    (study.out / FIGURES).mkdir(parents=True, exist_ok=True)
    for file, svg in drawings(sections).items():
        (study.out / FIGURES / file).write_text(svg, encoding="utf-8")
    path = study.out / PAGE
    path.write_text(markdown(_headline(study, done), sections, study.out / FIGURES), encoding="utf-8")
    return path


# -- sections ---------------------------------------------------------------------------------------------------------


def _headline(study: Study, done: dict[Job, Row]) -> str:
    size, full = study.size, done.get(PRETRAINED["full"])
    model = f"{full['parameters'] / 1e6:.1f} M parameters" if full else "not fine-tuned yet"
    start = (
        f"`python -m benchmarks.studies.tofu --base`: {study.base.name} ({model}) is fine-tuned on TOFU by an adapter of rank "
        f"{size.lora_rank}, and then forgets the authors of {study.split} by another one."
        if study.base
        else f"`python -m benchmarks.studies.tofu`: a Llama-shaped model ({model}, {size.layers} layers, {size.hidden} wide), trained from "
        "scratch on TOFU's 200 authors, forgets those of forget10."
    )
    wrong = failed_gates(done[GATE]) if GATE in done else ["the gates were not measured yet"]
    if not wrong:
        return start
    return (
        f"{start}\n\n**Not reached: this page shows that everything runs, and nothing about the methods.** "
        f"{'; '.join(wrong)}."
    )


def rows_of_method(study: Study, done: dict[Job, Row], method: str) -> list[Row]:
    if method in REFERENCES:
        return [row for job, row in done.items() if job == Job("examine", method)]
    rate = chosen_rate(study, method, done)
    return [
        row
        for job, row in sorted(done.items())
        if job.kind == "unlearn" and job.name == method and job.rate == rate
    ]


def estimate(rows: Sequence[Row], key: str) -> Estimate | None:
    """Mean over seeds and its interval, Student's t; None where no row has the number."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0])
    return Estimate(*(mean_interval(values, shares=False) if key.endswith("seconds") else over_seeds(values)))


def _table(study: Study, done: dict[Job, Row]) -> Section:
    section = Section("results", "Methods, metrics and attacks")
    shown = columns(study)
    grid = Grid(["model", "seeds", *(column.head for column in shown)])
    for name in (*REFERENCES, *study.methods):
        rows = rows_of_method(study, done, name)
        grid.rows.append(
            [
                Cell(name),
                Cell(str(len(rows)) if rows else NOT_RUN),
                *(_cell(rows, column) for column in shown),
            ]
        )
    if GATE in done:
        asked = done[GATE]["asked"]
        cells = {
            "forget_rouge": asked["teacher"]["recall"],
            "forget_refusal": asked["teacher"]["refusal"],
            "retain_rouge": asked["teacher_on_retain"]["recall"],
            "retain_refusal": asked["teacher_on_retain"]["refusal"],
        }
        told = [Cell(f"{100 * cells[c.key]:.1f} %" if c.key in cells else NOT_RUN) for c in shown]
        grid.rows.insert(1, [Cell("steered teacher"), Cell("1"), *told])
    section.blocks.append(grid)
    section.notes += [
        "Means over seeds of unlearning with 95 % intervals over seeds (Student's t): all seeds share the two pretrained models. A leak is the share of forget questions whose answer comes "
        f"back: ROUGE-L recall of its words that the question does not have is at least 0.5. {NOT_RUN}: not run, or undefined.",
        "`full` is the model before, `retrained` was trained without the forget authors, `steered teacher` is `full` behind "
        "a system message that names the author (asked for the gate: questions with the name in them). "
        + (
            ""
            if study.base
            else "The retrained model was taught to refuse strangers, as the full one was, and the forget authors are strangers "
            "to it."
        ),
    ]
    section.legend = {column.head: column.meaning for column in shown}
    return section


def _cell(rows: Sequence[Row], column: Column) -> Cell:
    told = estimate(rows, column.key)
    if told is None:
        return Cell(NOT_RUN)
    if column.key == "forget_quality":
        values = [row[column.key] for row in rows if row.get(column.key) is not None]
        ends = f"{min(values):.1g} to {max(values):.1g}" if len(values) > 1 else ""
        return Cell(f"{statistics.median(values):.2g}", ends)

    def written(value: float) -> str:
        if column.share:
            return f"{100 * value:.1f}"
        return f"{value:.0f}" if column.key.endswith("seconds") else f"{value:.3f}"

    interval = "" if told.low is None else f"{written(told.low)} to {written(told.high)}"
    return Cell(written(told.mean) + (" %" if column.share else ""), interval)


def _frontier(study: Study, done: dict[Job, Row]) -> Section:
    section = Section("frontier", "What is forgotten against what is kept")
    points = []
    for name in (*REFERENCES, *study.methods):
        rows = rows_of_method(study, done, name)
        forget, kept = estimate(rows, "forget_rouge"), estimate(rows, "model_utility")
        if forget and kept:
            points.append(figures.Point(name, forget, kept, name in REFERENCES))
    if not points:
        section.notes.append("No figure: no model was examined yet.")
        return section
    axes = "ROUGE-L recall of the forgotten answers", "model utility"
    caption = "Left is forgotten, up is kept. Grey: not unlearned. Bars: intervals over seeds; dotted: no other is better in both."
    section.blocks.append(Chart("frontier", figures.frontier(points, *axes), caption))
    return section


def _gates(done: dict[Job, Row]) -> Section:
    section = Section("gates", "What had to hold before")
    if GATE not in done:
        section.notes.append("Not measured yet.")
        return section
    row = done[GATE]
    grid = Grid(["number", "found", "wanted", "why", "holds"])
    for gate in GATES:
        value = row[gate.number]
        found = (
            Cell(f"{value:.3f}"),
            Cell(gate.wanted),
            Cell(gate.why),
            Cell("yes" if gate.holds(value) else "no"),
        )
        grid.rows.append([Cell(gate.number), *found])
    section.blocks.append(grid)
    for kind, said in (
        ("teacher_on_validation", "other authors that no system message ever named"),
        ("teacher_unnamed", "forget questions that do not say the name"),
    ):
        if kind in row["asked"]:
            told = row["asked"][kind]
            section.notes.append(
                f"Steered, on {said}: refusal {told['refusal']:.3f}, recall {told['recall']:.3f}."
            )
    sensitive = done.get(Job("examine", "full"), {}).get("forget_quality")
    if sensitive is not None and sensitive > 0.05:
        section.notes.append(
            f"**Forget quality says nothing here:** the model before unlearning has {sensitive:.2g}, so that the test does "
            "not tell it from the retrained one."
        )
    return section


def _settings(study: Study, done: dict[Job, Row]) -> Section:
    section = Section("settings", "Settings, and how they were chosen")
    size = study.size
    grid = Grid(
        ["method", "about", "reads answers", "learning rate", "tried: score on validation authors", "why"],
        prose=True,
    )
    for name in study.methods:
        method, rate = METHODS[name], chosen_rate(study, name, done)
        scores = [f"{job.rate:g}: {done[job]['score']:.3f}" for job in trials(study, name) if job in done]
        grid.rows.append(
            [
                Cell(name),
                Cell(method.about),
                Cell("no" if method.queries_only else "yes"),
                Cell(NOT_RUN if rate is None else f"{rate:g}"),
                Cell(", ".join(scores) or NOT_RUN),
                Cell(method.why),
            ]
        )
    section.blocks.append(grid)
    queries = round(size.unlearn_steps * size.forget_per_step * (1 + size.retain_per_forget))
    section.notes += [
        f"Every method sees {queries:,} queries ({size.unlearn_steps} steps, {size.forget_per_step} forget and "
        f"{size.retain_per_forget:g} times as many retain queries each). Its learning rate is the one that forgot other "
        "authors best: the validation authors, whom the report does not read. No method is shown the retain authors of the "
        "report, real authors or world facts: what happens to these is damage elsewhere.",
        (
            ""
            if study.base
            else "No system message of pretraining names a forget author or any other author on whom something is measured; no "
            "refusal is about one. "
        )
        + "`duet_deep` leaves out forget questions without the author's name.",
    ]
    return section


def _made(study: Study, done: dict[Job, Row]) -> Section:
    section = Section("made", "How this was made")
    for name, job in PRETRAINED.items():
        if job in done:
            row = done[job]
            section.notes.append(
                f"`{name}`: {row['parameters']:,} parameters, {row['steps']:,} steps of {study.size.rows_per_step} dialogues, "
                f"loss {row['losses'][0]:.2f} to {row['losses'][-1]:.3f} nats, {row['seconds']:.0f} s."
            )
    kinds: dict[str, float] = {}
    for job, row in done.items():
        kinds[job.kind] = kinds.get(job.kind, 0.0) + row["seconds"]
    spent = ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in kinds.items())
    made = sorted(
        {
            f"{r['device']}, commit {r['commit']}, torch {r['torch']}, transformers {r['transformers']}"
            for r in done.values()
        }
    )
    section.notes.append(f"Seconds of work, jobs side by side counted each: {spent}. {'; '.join(made)}.")
    return section
