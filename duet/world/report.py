"""What a person reads: the table of the terminal, report.md, and in words what was not withstood.

Works from the rows of results.json alone: every sentence here is computed from numbers. Must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .scorecard import ATTACKS, COLUMNS, KEEP

# A share of the forgotten facts that counts as "brought back", and a loss on the rest that counts as damage.
TOLERATED = 0.10

HEADINGS = {
    "forget_recall": "forget\nrecall ↓",
    "forget_refusal": "forget\nrefusal ↑",
    "retain_recall": "retain\nrecall ↑",
    "neighbour_recall": "neighb.\nrecall ↑",
    "general_recall": "cities\nrecall ↑",
    "reverse_prompt_recall": "reverse\nseen ↓",
    "reverse_prompt_heldout_recall": "reverse\nheld out ↓",
    "prefill_recall": "prefill\n↓",
    "relearn_recall": "relearn\n↓",
    "int8_forget_recall": "int8\n↓",
    "int4_forget_recall": "int4\n↓",
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
    table = Table(title="Share of held-out questions, asked in wordings that no training saw")
    table.add_column("method", no_wrap=True)
    for column in COLUMNS:
        table.add_column(HEADINGS[column], justify="right")
    table.add_column("training\nseconds", justify="right")
    for row in rows:
        table.add_row(row["method"], *(f"{row[column]:.2f}" for column in COLUMNS), f"{row['seconds']:.0f}")
    return table


def weaknesses(rows: Sequence[dict[str, Any]], tolerated: float = TOLERATED) -> list[str]:
    """For each DUET row, in words: what brings facts back, and what else was damaged against the base."""
    base = next(row for row in rows if row["method"] == "base")
    found = []
    for row in rows:
        if not row["method"].startswith("duet"):
            continue
        leaks = [
            f"{BRINGS_BACK[column]} {100 * row[column]:.0f} % of the facts"
            for column in ("forget_recall", *ATTACKS)
            if row[column] > tolerated
        ]
        losses = [
            f"recall on {DAMAGES[column]} fell from {100 * base[column]:.0f} % to {100 * row[column]:.0f} %"
            for column in KEEP
            if base[column] - row[column] > tolerated
        ]
        found += [f"{row['method']}: {sentence}." for sentence in leaks + losses]
    return found


def markdown(results: dict[str, Any]) -> str:
    """report.md, from the content of results.json."""
    rows = results["rows"]
    heads = ["method", *COLUMNS, "seconds"]
    lines = [
        "# What the model forgot",
        "",
        f"Written by `{results['command']}` with seed {results['seed']}. {results['world']}",
        "",
        "![what is forgotten, what is kept, what attacks bring back](overview.png)",
        "",
        "| " + " | ".join(head.replace("_", " ") for head in heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
        *(
            f"| {row['method']} | "
            + " | ".join(f"{row[column]:.2f}" for column in COLUMNS)
            + f" | {row['seconds']:.1f} |"
            for row in rows
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
    ]
    speakers = list(results["examples"][0]["answers"])
    lines += [
        "| question | " + " | ".join(speakers) + " |",
        "|---" * (len(speakers) + 1) + "|",
        *(
            f"| {example['question']} | " + " | ".join(example["answers"].values()) + " |"
            for example in results["examples"]
        ),
        "",
        "## What the columns say",
        "",
        *(f"* `{column}`: {meaning}" for column, meaning in COLUMNS.items()),
        "* `seconds`: time of the training on this machine",
        "",
        "## Settings",
        "",
        "Chosen by `python -m duet.world.tune` on other wordings of the questions than those reported here,",
        "with the same number of trials for every method.",
        "",
        *(f"* {method}: `{settings}`" for method, settings in results["settings"].items()),
        "",
        "## The unlearned model",
        "",
        f"`model/` holds `{results['saved_model']}`:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("model")',
        'tokenizer = AutoTokenizer.from_pretrained("model")',
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)
