"""The terminal's table, report.md, and sentences about what the methods do not withstand.

Everything is computed from the rows of results.json.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..evaluation.chat import visible
from ..evaluation.metrics import contains_words, percent
from .scorecard import ATTACKS, COLUMNS, KEEP

# A share of the forgotten facts that counts as "brought back", and a loss on the rest that counts as damage.
TOLERATED = 0.10
QUICK = "A quick run: without the baselines and `duet_deep`, and 40 questions a number or fewer. For a look, not for citing."

# Narrow enough for a terminal of 80 columns; the arrow points to where a method should go.
HEADINGS = {
    "forget_recall": "for-\nget\n↓",
    "forget_refusal": "re-\nfuse\n↑",
    "retain_recall": "re-\ntain\n↑",
    "neighbour_recall": "\nnear\n↑",
    "general_recall": "\ncity\n↑",
    "reverse_prompt_recall": "rev.\nseen\n↓",
    "reverse_prompt_heldout_recall": "rev.\nnew\n↓",
    "prefill_recall": "pre-\nfill\n↓",
    "relearn_recall": "re-\nlearn\n↓",
    "int8_forget_recall": "\nint8\n↓",
    "int4_forget_recall": "\nint4\n↓",
}
BRINGS_BACK = {
    "forget_recall": "asking plainly brings back",
    "reverse_prompt_recall": "a reverse prompt known from training brings back",
    "reverse_prompt_heldout_recall": "a reverse prompt in new words brings back",
    "prefill_recall": "forcing the first words of the answer brings back",
    "relearn_recall": "ten steps of training on five of the authors bring back, about the other five,",
    "int8_forget_recall": "rounding the weights to 8 bits brings back",
    "int4_forget_recall": "rounding the weights to 4 bits brings back",
}
DAMAGES = {
    "retain_recall": "other authors",
    "neighbour_recall": "authors who share a name with a forgotten one",
    "general_recall": "cities",
}


def terminal_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row a method, in percent; 77 characters wide."""
    table = Table(
        title="Percent of held-out questions, in wordings that no training saw",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        header_style="dim",
    )
    table.add_column("\n\nmethod", no_wrap=True)
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("\n\nsec.", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["method"], *(percent(row[column]) for column in HEADINGS), f"{row['seconds']:.0f}")
    return table


def legend(methods: dict[str, str]) -> Table:
    """What the rows and the columns of the table say."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, about in methods.items():
        grid.add_row(name, about)
    for column, heading in HEADINGS.items():
        grid.add_row(heading.replace("-\n", "").replace("\n", " ").strip(), COLUMNS[column])
    return grid


def side_by_side(examples: Sequence[dict[str, Any]]) -> Table:
    """The same question to everybody, one answer a line."""
    grid = Table.grid(padding=(0, 1))
    for example in examples:
        grid.add_row("", "")
        grid.add_row(Text(example["kind"], style="dim"), Text(visible(example["question"]), style="bold"))
        for name, answer in example["answers"].items():
            style = "green" if contains_words(answer, example["truth"]) else ""
            grid.add_row(name, Text(visible(answer), style=style))
    return grid


def weaknesses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each DUET row, in words: what brings facts back, and what else was damaged against the base."""
    base = next(row for row in rows if row["method"] == "base")
    sentences = []
    for row in rows:
        if not row["method"].startswith("duet"):
            continue
        leaks = [
            f"{BRINGS_BACK[column]} {percent(row[column])} % of the facts"
            for column in ("forget_recall", *ATTACKS)
            if row[column] > TOLERATED
        ]
        losses = [
            f"recall on {DAMAGES[column]} fell from {percent(base[column])} % to {percent(row[column])} %"
            for column in KEEP
            if base[column] - row[column] > TOLERATED
        ]
        if row["stutter"] > TOLERATED:
            losses.append(
                f"{percent(row['stutter'])} % of its answers about authors or cities that it kept stutter"
            )
        sentences += [f"{row['method']}: {sentence}." for sentence in leaks + losses]
    return sentences


def markdown(results: dict[str, Any]) -> str:
    """report.md, from the content of results.json."""
    heads = ["method", *COLUMNS, "seconds"]
    speakers = list(results["examples"][0]["answers"])

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [
        "# What the model forgot",
        "",
        f"Written by `{results['command']}`. {results['world']}",
        "",
        *([f"**{QUICK}**", ""] if results["quick"] else []),
        "Percent of held-out questions, in wordings that no training saw:",
        "",
        "![what is forgotten, what is kept, what attacks bring back](overview.png)",
        "",
        line(head.replace("_", " ") for head in heads),
        "|---|" + "---:|" * (len(heads) - 1),
        *(
            line([row["method"], *(percent(row[column]) for column in COLUMNS), f"{row['seconds']:.0f}"])
            for row in results["rows"]
        ),
        "",
        *(f"* **{method}**: {about}" for method, about in results["methods"].items()),
        "",
        "## What DUET does not withstand here",
        "",
        *(
            [f"* {sentence}" for sentence in results["not_withstood"]]
            or ["* Nothing above the tolerated 10 %."]
        ),
        "",
        "## The first word",
        "",
        "![logits of the first word before and after](first_words.png)",
        "",
        "## Asked side by side",
        "",
        line(["question", *speakers]),
        "|---" * (len(speakers) + 1) + "|",
        *(line([example["question"], *example["answers"].values()]) for example in results["examples"]),
        "",
        "## What the columns say",
        "",
        *(f"* `{column}`: {meaning}" for column, meaning in COLUMNS.items()),
        "* `seconds`: time of the training on this machine",
        "",
        "## Settings",
        "",
        "Chosen by `python -m benchmarks.studies.world.tune` on other wordings of the questions than those reported here,",
        "with the same number of trials for every method; those of `duet_deep` are its recipe's.",
        "",
        *(
            f"* {method}: " + ", ".join(f"{name} {value:.3g}" for name, value in settings.items())
            for method, settings in results["settings"].items()
        ),
        "",
        "## The unlearned model",
        "",
        f"`model/` holds `{results['saved_model']}`. To ask it, from the folder of this report:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'ask = pipeline("text-generation", "model", max_new_tokens=14)',
        f'question = {{"role": "user", "content": "{results["examples"][0]["question"]}"}}',
        'print(ask([question])[0]["generated_text"][-1]["content"])',
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
