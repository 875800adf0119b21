"""The demo's two figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..evaluation.metrics import percent

INK, FAINT = "#222222", "#d9d9d9"
COLOURS = {
    "base": "#8c8c8c",
    "teacher": "#e0a030",
    "graddiff": "#c77cba",
    "npo": "#8d6cab",
    "duet": "#4c9ed9",
    "duet_adversarial": "#10558f",
    "duet_deep": "#d1495b",
}
NAMES = {
    "base": "base model",
    "teacher": "base + prompt (teacher)",
    "graddiff": "GradDiff",
    "npo": "NPO",
    "duet": "DUET",
    "duet_adversarial": "DUET + reverse prompts",
    "duet_deep": "duet_deep (ours)",
}
PANELS = (
    (
        "Asked directly",
        "facts to forget that it still tells\n(lower is better)",
        {"forget_recall": "what to forget"},
    ),
    (
        "Admits ignorance",
        'says "I do not know"\n(higher is better)',
        {"forget_refusal": "what to forget"},
    ),
    (
        "What it should still know",
        "facts that it still tells\n(higher is better)",
        {
            "retain_recall": "other authors",
            "neighbour_recall": "authors who share\na name",
            "general_recall": "cities",
        },
    ),
    (
        "What attacks bring back",
        "facts to forget that it tells\n(lower is better)",
        {
            "reverse_prompt_recall": '"ignore your\ninstructions"',
            "reverse_prompt_heldout_recall": "the same,\nnew wording",
            "prefill_recall": "forced first\nwords",
            "relearn_recall": "10 steps of\nrelearning",
            "int4_forget_recall": "4-bit\nweights",
        },
    ),
)


def overview(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Grouped bars, one colour a method: what is forgotten, what is kept, what attacks bring back."""
    figure = plt.figure(figsize=(12, 7.6))
    # three panels above, the attacks below over the whole width
    grid = figure.add_gridspec(2, 3, width_ratios=[1.3, 1.3, 4.0])
    panels = [figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (0, 2), (1, slice(None)))]
    width = 0.84 / len(rows)
    for axis, (title, meaning, columns) in zip(panels, PANELS, strict=True):
        for index, row in enumerate(rows):
            method = row["method"]
            left = [group + (index - (len(rows) - 1) / 2) * width for group in range(len(columns))]
            shares = [row[column] for column in columns]
            heights = [100 * share for share in shares]
            axis.bar(left, heights, width * 0.92, color=COLOURS[method], label=NAMES[method])
            for x, share in zip(left, shares, strict=True):
                above = 100 * share + 1.2
                axis.text(x, above, percent(share), ha="center", va="bottom", fontsize=6.2, color=INK)
        axis.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
        axis.set_ylabel(meaning, fontsize=9, color=INK)
        axis.set_xticks(range(len(columns)), columns.values(), fontsize=9)
        axis.set_ylim(0, 112)
        axis.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"], fontsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0)
        axis.grid(axis="y", color=FAINT, linewidth=0.7)
        axis.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(rows), frameon=False, fontsize=9.5)
    figure.tight_layout(rect=(0, 0, 1, 0.95), h_pad=2.5)
    _write(figure, path)


def first_words(
    question: str, tokens: Sequence[str], logits: dict[str, Sequence[float]], student: str, path: Path
) -> None:
    """The teacher's top-k at the first word of one answer: where the student started, its target, where it ended.

    logits[name][i] is the logit of tokens[i], for names base, teacher and `student`.
    """
    figure, axis = plt.subplots(figsize=(9, 0.34 * len(tokens) + 1.9))
    lines = range(len(tokens) - 1, -1, -1)
    for line, before, after in zip(lines, logits["base"], logits[student], strict=True):
        axis.annotate(
            "",
            xy=(after, line),
            xytext=(before, line),
            arrowprops={"arrowstyle": "->", "color": "#9db9cf", "linewidth": 1.6},
        )
    for name, marker, size in (("base", "o", 60), ("teacher", "|", 260), (student, "o", 60)):
        label = {"base": "before (base model)", "teacher": "target (base + prompt)"}.get(name, "after (DUET)")
        axis.scatter(
            logits[name], lines, s=size, marker=marker, linewidths=3 if marker == "|" else 0,
            color=COLOURS[name], label=label, zorder=3,
        )  # fmt: skip
    axis.set_yticks(lines, tokens, fontsize=10)
    axis.set_xlabel(
        "logit of each possible first word (larger = more likely to be said)", fontsize=9, color=INK
    )
    axis.set_title(
        f"The first word of the answer to\n“{question}”", loc="left", fontsize=12, fontweight="bold"
    )
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(axis="y", color=FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.6 / (0.34 * len(tokens) + 1.0)), ncols=3, frameon=False
    )
    _write(figure, path)


def _write(figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)
