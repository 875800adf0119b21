"""`duet report`: everything that was measured about some models, on one page (HTML without external assets) and as Markdown.

    runs -> Inputs -> sections of notes, tables and figures -> report.html, report.md, figures/*.svg

A section without inputs is left out; the last section says so in one line. An undefined number is shown as undefined,
never as 0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data.prompts import Prompting
from ...folders import disk_named, write_atomically
from ..attacks.runner import by_chance, tells, told_share, worst_of
from ..journal import write_json
from ..metrics import percent
from ..steering import shown as shares_in_words
from ..suites.suite import TO_FORGET, TO_KEEP
from . import figures
from .figures import Estimate
from .glossary import METRICS, Meaning
from .neighbours import THRESHOLD, neighbours_section, says_truth
from .page import ALONE, NOT_RUN, Cell, Chart, Grid, Section, drawings, html, markdown, shown
from .runs import BASE, EXAMPLES, LABELS, STUDENT, TEACHER, Inputs, read_inputs
from .tables import attacks_section, lm_eval_section, not_judged, table_section
from .topk import MEASURE, TOPK, compare_topk

PAGE, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
# What those that are written here have near their beginning.
_MARKS = {PAGE: "<title>What was forgotten</title>", MARKDOWN: "# What was forgotten\n", TOPK: '"measure": '}


def write_report(
    runs: Sequence[str],
    out: str | Path,
    *,
    base: Sequence[str] = (),
    teacher: Sequence[str] = (),
    forget_metric: str | None = None,
    retain_metric: str | None = None,
    examples: int = 6,
    topk: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write `out/report.html`, `out/report.md` and `out/figures/*.svg`.

    Args:
        runs, base, teacher: `runs.read_inputs`.
        out: folder; an earlier report in it is replaced, and files of others stay.
        forget_metric, retain_metric: `task.metric`, the axes of the frontier; None: the first metric that a task to
            forget and a task to keep have in common.
        examples: questions shown per task.
        topk: comparisons as `topk.json` holds them, beside those among the runs.

    Returns:
        path of the page.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
        FileExistsError: `out` holds files of these names that no report wrote.
        OSError: `out` cannot be written.
    """
    if examples < 1:
        raise ValueError(f"examples: wanted an integer >= 1, got {examples}")
    inputs = read_inputs(runs, base, teacher)
    inputs.topk += topk
    if not inputs.methods and not inputs.topk:
        raise ValueError("runs: wanted at least one folder of results, got none")
    sections = [
        table_section(inputs),
        attacks_section(inputs),
        _answers_section(inputs, examples),
        neighbours_section(inputs),
        _frontier_section(inputs, forget_metric, retain_metric),
        _relearning_section(inputs),
        _topk_section(inputs.topk),
        lm_eval_section(inputs),
        _training_section(inputs),
    ]
    sections, headline, out = shown(sections), summary_sentence(inputs), Path(out)
    files = {f"{FIGURES}/{name}": svg for name, svg in drawings(sections).items()}
    files |= {MARKDOWN: markdown(headline, sections, out / FIGURES), PAGE: html(headline, sections)}
    _check_free(out, files)
    earlier = re.findall(rf"\]\(({FIGURES}/[^/)]+)\)", _text(out / MARKDOWN))
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    with disk_named(out, "out"):
        for name, text in files.items():
            # Half of a surrogate pair, which a row may hold, cannot be written: it is shown as "\ud83d".
            write_atomically(out / name, text.encode("utf-8", errors="backslashreplace"))
    for name in set(earlier) - files.keys():  # of methods that are no longer in the report
        if _text(out / name).startswith(ALONE):
            (out / name).unlink()
    return out / PAGE


def _text(path: Path) -> str:
    """Of a file; none where there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _check_free(out: Path, names: Iterable[str]) -> None:
    """Refuses a folder with files of these names that no report wrote: they would be replaced."""
    ours = {name for name, mark in _MARKS.items() if mark in _text(out / name)[:1000]}
    for name in names:
        figure = name not in _MARKS and (ours & {PAGE, MARKDOWN} or _text(out / name).startswith(ALONE))
        if (out / name).exists() and name not in ours and not figure:
            raise FileExistsError(
                f"out: {out / name} is there already and of no earlier report; wanted another folder"
            )


def write_topk(
    model_before: Any,
    model_after: Any,
    queries: Sequence[str],
    out: str | Path,
    *,
    k: int = 8,
    steering: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Load two models, compare them with `compare_topk`, and keep the result in `out/topk.json`.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    from .. import models

    for argument, given in (("model_before", model_before), ("model_after", model_after), ("query", queries)):
        if not given:
            raise ValueError(
                f"{argument}: first tokens before and after want two models and a query, got none"
            )
    _check_free(Path(out), (TOPK,))
    if not all(map(str.strip, queries)):
        raise ValueError("query: wanted a text that is not empty, got ''")
    (before, tokenizer), (after, other) = (models.load(m, dtype, device) for m in (model_before, model_after))
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError("model_after: wanted the tokenizer of model_before, got another vocabulary")
    prompting = Prompting.of(model_after)
    compared = compare_topk(before, after, tokenizer, queries, k=k, instruction=steering, prompting=prompting)
    told = {"before": model_before, "after": model_after, "steering": steering}
    result = {"measure": MEASURE, **told, "queries": compared}
    Path(out).mkdir(parents=True, exist_ok=True)
    with disk_named(out, "out"):
        write_json(Path(out) / TOPK, result)
    return result


# --- headline --------------------------------------------------------------------------------------------------


def summary_sentence(inputs: Inputs) -> str:
    """What was run, and the worst attack on any student."""
    models = ", ".join(m.label for m in inputs.methods)
    if not inputs.methods:
        names = " and ".join(dict.fromkeys(name for t in inputs.topk for name in (t["before"], t["after"])))
        return f"The first tokens of {names} were compared; no run of duet eval or duet attack was given."
    questions = len({key for m in inputs.methods for key in m.answers if key[0] != EXAMPLES})
    asked = f", {questions} question{'s' if questions != 1 else ''} answered" if questions else ""
    start = f"{len(inputs.methods)} model{'s' if len(inputs.methods) != 1 else ''} ({models}){asked}. "
    known = [(entry, m) for m in inputs.students for entry in m.entries if entry["leak"] is not None]
    if not known:
        return (
            start
            + "No attack was run: what is forgotten here has not been tested against anybody who insists."
        )
    told = [each for each in known if tells(each[0])]
    entry, method = max(told or known, key=lambda each: told_share(each[0]))
    worst = worst_of(entry)
    kind = f" ({entry['worst_variant']})" if entry["worst_variant"] else ""
    unjudged = not_judged(worst, "of its rows could not be judged")
    tried = len({entry["name"] for entry, _ in told or known})
    beside = "".join(
        f" Beside it, {e['name']} on {m.label}: {percent(e['leak'])} %, {e['measure']}{by_chance(e)}."
        for e, m in known
        if told and not tells(e)
    )
    low, high = worst.get("low"), worst.get("high")
    ends = ""
    if low is not None and high is not None:
        ends = f" (95 % interval {percent(low)} to {percent(high)} %)"
    return (
        f"{start}Of {tried} kind{'s' if tried != 1 else ''} of attack the worst is {entry['name']}{kind} on {method.label}: "
        f"{percent(entry['leak'])} %{ends}, {entry['measure']}{by_chance(entry)}{unjudged and '; '}{unjudged}.{beside}"
    )


# --- answers ---------------------------------------------------------------------------------------------------


def _rule(answers: Iterable[Mapping[str, Any]]) -> str:
    """The sentence that says which of the two rules was used."""
    by_value = {answer.get("value") is not None for answer in answers}
    words = f"ROUGE-L recall (stemmed) of the true answer's telling words, which the question does not have, is at least {THRESHOLD}"
    if by_value == {False}:
        return f"{words} (a column `value` in the rows, with the part that must not be said, makes it exact)"
    value = "the value is said as whole words"
    return value if by_value == {True} else f"{value}; for questions without one, {words}"


class Fate(NamedTuple):
    """What should become of a task's rows: in words; which questions come first; their order; the mark of a true answer."""

    what: str = ""
    first: str = ""
    sign: int = 0  # of the number of students that say the truth
    mark: str = ""


TO_GO = Fate("to be forgotten", "those that students leak first", -1, "leaks")
TO_STAY = Fate("to be kept", "those that students lost first", 1, "true")


def _answers_section(inputs: Inputs, examples: int) -> Section:
    section = Section("answers", "Asked side by side")
    keys = dict.fromkeys(key for m in inputs.methods for key in m.answers)
    if not keys:
        section.notes.append("No answers: no run of duet eval with generated answers was given.")
        return section
    speakers = [m for m in inputs.methods if m.answers]
    students = [m for m in speakers if m.role == STUDENT] or speakers
    for role, name in LABELS.items():
        if all(m.role != role for m in speakers):
            how = f"give its run, or name it with --{role}"
            how += "; duet eval --steering asks it" if role == TEACHER else ""
            section.notes.append(f"No answers of the {name}: {how}.")
    rule = _rule(answer for m in speakers for answer in m.answers.values())
    section.notes.append(f"An answer says the truth when {rule}.")
    for suite, task in dict.fromkeys((suite, task) for suite, task, _, _ in keys):
        of = [key for key in keys if key[:2] == (suite, task)]
        by_students = {k: sum(k in m.answers and says_truth(m.answers[k]) for m in students) for k in of}
        fate = TO_GO if task.startswith(TO_FORGET) else TO_STAY if task.startswith(TO_KEEP) else Fate()
        of.sort(key=lambda k, sign=fate.sign: sign * by_students[k])
        count = f"{min(len(of), examples)} of {len(of)} {'examples' if suite == EXAMPLES else 'questions'}"
        grid = Grid(
            ["question", "truth", *(m.label for m in speakers)],
            caption=", ".join(filter(None, (f"{suite}: {task}", fate.what, count, fate.first))),
            prose=True,
        )
        for key in of[:examples]:
            answer = next(m.answers[key] for m in speakers if key in m.answers)
            cells = [Cell(answer["question"]), Cell(str(answer["answer"]))]
            for method in speakers:
                answer = method.answers.get(key)
                cells.append(Cell(NOT_RUN) if answer is None else _said(answer, fate.mark))
            grid.rows.append(cells)
        section.blocks.append(grid)
    return section


def _said(answer: dict[str, Any], mark: str) -> Cell:
    if answer.get("status") == "nan":
        return Cell("undefined", why="NaN logits")
    text = answer["generated"].strip() or "(says nothing)"
    return Cell(text, mark=mark if says_truth(answer) else "")


# --- figures ---------------------------------------------------------------------------------------------------


def _alike(forget: str, retain: str) -> bool:
    """Whether two names `task.metric`, or `task (suite).metric`, are of one metric, and of no two suites."""
    tasks, metrics = zip(*(name.rsplit(".", 1) for name in (forget, retain)), strict=True)
    suites = {task.partition(" (")[2] for task in tasks} - {""}
    return metrics[0] == metrics[1] and len(suites) < 2


def _frontier_section(inputs: Inputs, forget: str | None, retain: str | None) -> Section:
    section = Section("frontier", "What is forgotten against what is kept")
    measured = [
        {
            f"{task}.{metric}": None if x["mean"] is None else Estimate(x["mean"], x["low"], x["high"])
            for task, entry in method.tasks.items()
            for metric, x in entry["metrics"].items()
        }
        for method in inputs.methods
    ]
    names = dict.fromkeys(name for each in measured for name in each)
    for argument, name in (("forget_metric", forget), ("retain_metric", retain)):
        if name is not None and name not in names:
            raise ValueError(
                f"{argument}: wanted one of {', '.join(names)}, got {name!r}"
                if names
                else f"{argument}: wanted a run of duet eval, whose metrics it can name; got none, and {name!r}"
            )
    goes = [forget] if forget else [n for n in names if n.startswith(TO_FORGET)]
    stays = [retain] if retain else [n for n in names if n.startswith(TO_KEEP)]
    same = [(x, y) for x in goes for y in stays if _alike(x, y)]
    pairs = same or ([(goes[0], stays[0])] if forget and retain else [])
    if not pairs:
        section.notes.append(
            "No frontier: no metric was measured both on rows to forget and on rows to keep (--forget-metric, "
            "--retain-metric name others)."
        )
        return section
    x, y = max(pairs, key=lambda p: sum(None not in (each.get(p[0]), each.get(p[1])) for each in measured))
    points, left_out = [], []
    for m, each in zip(inputs.methods, measured, strict=True):
        gone, kept = each.get(x), each.get(y)
        if gone is None or kept is None:
            left_out.append(m.label)
        else:
            points.append(figures.Point(m.label, gone, kept, m.role in (BASE, TEACHER)))
    if left_out:
        section.notes.append(f"Without both numbers, and so not shown: {', '.join(left_out)}.")
    if points:
        better = _meaning(x).forget, _meaning(y).keep
        caption = figures.frontier_caption(points, x, y, better)
        section.blocks.append(Chart("frontier", figures.frontier(points, x, y, better), caption))
    return section


def _meaning(name: str) -> Meaning:
    """Of the metric in `task.metric`."""
    return METRICS.get(name.split(".")[-1], Meaning(""))


def _relearning_section(inputs: Inputs) -> Section:
    section = Section("relearning", "How fast it is relearned")
    for method in inputs.students:
        for entry in method.entries:
            if not entry.get("curves"):
                continue
            curves = {
                rate: [(int(step), _at(entry, rate, step, leak)) for step, leak in curve]
                for rate, curve in entry["curves"].items()
            }
            direct = method.attacks["direct"]
            title = f"{method.label}: {entry['name']}"
            start = direct["leak"] if direct else None
            caption = f"{title}: {entry['what']}. {figures.relearning_caption(curves, start)}"
            svg = figures.relearning(curves, title, start)
            section.blocks.append(Chart(f"relearning {method.label} {entry['name']}", svg, caption))
    if not section.blocks:
        section.notes.append(
            "No curves: no run of duet attack with relearning or benign_finetuning was given."
        )
    return section


def _at(entry: dict[str, Any], rate: str, step: float, leak: float | None) -> Estimate | None:
    variant = entry["variants"].get(f"learning rate {rate}, {step} steps", {})
    return None if leak is None else Estimate(leak, variant.get("low"), variant.get("high"))


def _topk_section(comparisons: Sequence[dict[str, Any]]) -> Section:
    section = Section("topk", "The first token, before and after")
    for i, compared in enumerate(comparisons):
        for j, q in enumerate(compared["queries"]):
            svg = figures.topk(f"{i} {j}", q["tokens"], q["before"], q["after"], q.get("teacher"))
            steered = (
                f"; steered teacher: {compared['before']}, told “{compared['steering']}”"
                if q.get("teacher")
                else ""
            )
            caption = (
                f"“{q['question']}” before: {compared['before']}, after: {compared['after']}{steered}. Numbers at the right in "
                "the order of the legend."
            )
            section.blocks.append(Chart(f"topk {i} {j}", svg, caption))
    if not section.blocks:
        section.notes.append(
            "No first tokens: they want --model-before, --model-after and --query, or a folder with topk.json."
        )
    return section


def _training_section(inputs: Inputs) -> Section:
    section = Section("training", "Training")
    trained = [m for m in inputs.methods if m.training]
    if not trained:
        section.notes.append("No training log: no output folder of duet train was given.")
        return section
    names = list(dict.fromkeys(name for m in trained for name in m.training["losses"]))
    grid = Grid(["method", "steps", *names], caption="last logged values")
    for m in trained:
        losses = m.training["losses"]
        cells = [Cell(f"{losses[n]:.4g}") if n in losses else Cell(NOT_RUN) for n in names]
        grid.rows.append([Cell(m.label, role=m.role), Cell(str(m.training["steps"])), *cells])
    section.blocks.append(grid)
    teachers = Grid(
        ["method", "rows", "asked", "refused", "of what the base tells: still told"],
        caption="the steered teacher, measured before the first step; 95 % intervals",
    )
    for m in trained:
        steering = m.training.get("steering")
        if not steering:
            continue
        for kind, entry in (steering["measured"] or {"kinds": {}})["kinds"].items():
            shares = [Cell(shares_in_words(entry[name])) for name in ("refused", "told")]
            teachers.rows.append([Cell(m.label, role=m.role), Cell(kind), Cell(str(entry["rows"])), *shares])
        if steering["anyway"]:
            section.notes.append(f"{m.label}: trained with --anyway, although {steering['said']}.")
        elif steering["forgets"] is not True:
            section.notes.append(f"{m.label}: {steering['said']}.")
        if steering["retain_prefix"] == "none":
            section.notes.append(
                f"{m.label}: on retain rows the teacher saw no prefix (retain_prefix: none)."
            )
    section.blocks += [teachers] if teachers.rows else []
    return section
