"""Kept answers by how near their questions are to what is forgotten: the section "neighbours" of the report."""

from collections.abc import Mapping
from typing import Any

from ...data.importers import BLANK, BRIEF
from .. import metrics
from ..attacks.rows import AttackRow
from ..attacks.target import AttackOptions
from ..journal import num_rows
from ..suites.suite import TO_FORGET, TO_KEEP
from .page import NOT_RUN, Cell, Grid, Section
from .runs import BASE, Inputs, Method

THRESHOLD = AttackOptions.threshold
EDGES = (0.0, 0.25, 0.5, 0.75)


def says_truth(answer: Mapping[str, Any]) -> bool:
    """Whether an answer has the row's `value`, or else the words of the true answer: as `duet attack` judges."""
    row = AttackRow(0, answer["question"], str(answer["answer"]), value=answer.get("value"))
    return row.recall(answer["generated"]) >= THRESHOLD


def neighbours_section(inputs: Inputs) -> Section:
    """For each suite: the share of answers to keep that are kept, by the overlap of words with the nearest forget question."""
    section = Section("neighbours", "What is kept, by how near it is to what is forgotten")
    keys = dict.fromkeys(key for m in inputs.methods for key in m.answers)
    for suite in dict.fromkeys(key[0] for key in keys):
        forget = sorted({q for s, task, _, q in keys if s == suite and task.startswith(TO_FORGET)})
        keep = [key for key in keys if key[0] == suite and key[1].startswith(TO_KEEP)]
        if not forget or not keep:
            continue
        near = {q: metrics.word_overlap(_bare(q), list(map(_bare, forget))) for q in {key[3] for key in keep}}
        base = next((m for m in inputs.methods if m.role == BASE and m.answers), None)
        told = keep if base is None else [k for k in keep if k in base.answers and _kept(base.answers[k])]
        grid = Grid(["words in common", *(m.label for m in inputs.methods)], caption=f"{suite}: share kept")
        columns = [_curve(method, told, near) for method in inputs.methods]
        for low, high, *cells in zip(EDGES, (*EDGES[1:], 1.0), *columns, strict=True):
            if any(cell.text != NOT_RUN for cell in cells):
                grid.rows.append([Cell(f"{low:g} to {high:g}"), *cells])
        if not grid.rows:
            continue
        section.blocks.append(grid)
        whose = "the row's" if base is None else "the row's, and the base gave it too"
        section.notes.append(
            f"{suite}: an answer is kept when it is {whose}. Words in common: those of a question and of the nearest question "
            "to forget, as a share of the words of both. An answer that was cut or is empty before it says the row's is not kept."
        )
    if not section.blocks:
        section.notes.append("No neighbours: wanted answers to questions to forget and to questions to keep.")
    return section


def _bare(question: str) -> str:
    """Without the words that `duet import` puts in front of RWKU's questions: all of them share these."""
    for form in (BLANK, BRIEF):
        question = question.removeprefix(form.format(""))
    return question


def _kept(answer: Mapping[str, Any]) -> bool | None:
    """None: it cannot be judged."""
    return None if answer.get("status") == "nan" else says_truth(answer)


def _curve(method: Method, keys: list[tuple], near: Mapping[str, float]) -> list[Cell]:
    told = {key: _kept(method.answers[key]) for key in keys if key in method.answers}
    kept = {key: float(each) for key, each in told.items() if each is not None}
    facts = [method.answers[key].get("fact") for key in kept]
    bins = metrics.keep_curve([near[key[3]] for key in kept], list(kept.values()), EDGES, facts)
    return [
        Cell(NOT_RUN)
        if share is None
        else Cell(f"{share.estimate:.2f}", f"{share.low:.2f} to {share.high:.2f}, {num_rows(rows)}")
        for _, rows, share in bins
    ]
