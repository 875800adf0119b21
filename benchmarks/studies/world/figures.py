"""The study's three pictures, from rows of numbers.

forget_retain_relearn   what is still told, what is kept, what relearning brings back
k_sweep                 what the number of imitated logits changes
relearn_curves          recall of authors the attacker never showed, along the attack
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.studies.seeds import over_seeds
from duet.demo.plots import FAINT, INK

from .arms import QUESTIONS, VOCABULARY

Row = dict[str, Any]
COLOURS = {
    "duet": "#4c9ed9",
    "duet_adversarial": "#10558f",
    "duet_deep": "#d1495b",
    "duet+undo": "#2a9d8f",
    "duet+undo_long": "#7fc8bf",
    "npo+undo": "#c9a227",
    "npo": "#8d6cab",
    "graddiff": "#c77cba",
    "simnpo": "#b08968",
    "refusal": "#8c8c8c",
    "undo": "#555555",
    "retrained": "#111111",
}
MARKERS = dict(zip(COLOURS, "osDvp^PX<>*h", strict=True))
NUMBER_OF_LOGITS = {"k1": 1, "k8": 8, "k32": 32, "duet": 128, "kV": VOCABULARY}
SWEPT = {
    "forget_refusal": ("refuses what to forget (higher is better)", "#2a9d8f"),
    "retain_recall": ("knows other authors (higher is better)", "#4c9ed9"),
    "prefill_recall": ("forced opening brings back (lower is better)", "#d1495b"),
    "relearn_recall": ("10 steps of relearning bring back (lower is better)", "#8d6cab"),
}


def draw_figures(rows: Sequence[Row], out: Path) -> list[str]:
    """Draw what the rows allow into `out`; returns the names of the files."""
    drawn = []
    for name, draw in (
        ("forget_retain_relearn.png", forget_retain_relearn),
        ("k_sweep.png", k_sweep),
        ("relearn_curves.png", relearn_curves),
    ):
        if draw(rows, out / name):
            drawn.append(name)
    return drawn


def forget_retain_relearn(rows: Sequence[Row], path: Path) -> bool:
    """Two panels that share the retain axis: asked directly, and after ten steps of relearning."""
    arms = _arms(rows)
    if not arms:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    panels = (
        ("forget_recall", "Asked directly", "facts to forget that are told"),
        (
            "relearn_recall",
            "After 10 steps of relearning",
            "facts about the other half of the authors that are told",
        ),
    )
    for axis, (column, title, meaning) in zip(axes, panels, strict=True):
        for arm in arms:
            x, x_error = _with_error(rows, arm, column)
            y, y_error = _with_error(rows, arm, "retain_recall")
            axis.errorbar(
                x, y, xerr=x_error, yerr=y_error, fmt=MARKERS[arm], markersize=9, color=COLOURS[arm], markeredgecolor="white",
                elinewidth=1.2, label=QUESTIONS["relearning"].label(arm), zorder=3,
            )  # fmt: skip
        axis.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
        axis.set_xlabel(f"{meaning}, % (left is better)", fontsize=9, color=INK)
        axis.set_xlim(-3, 103)
        _plain(axis)
    axes[0].set_ylabel("facts about other authors that are told, %\n(up is better)", fontsize=9, color=INK)
    _legend_below(figure, axes[0], 5)
    _save(figure, path)
    return True


def k_sweep(rows: Sequence[Row], path: Path) -> bool:
    have = {row["arm"] for row in rows}
    arms = [arm for arm in NUMBER_OF_LOGITS if arm in have]
    if len(arms) < 2:
        return False
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    ks = [NUMBER_OF_LOGITS[arm] for arm in arms]
    for column, (label, colour) in SWEPT.items():
        found = [over_seeds([row[column] for row in rows if row["arm"] == arm]) for arm in arms]
        _band(axis, ks, found, label, colour)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [f"{k}" if k < VOCABULARY else f"V = {k}" for k in ks])
    axis.minorticks_off()
    axis.set_xlabel("k, the teacher's largest logits that are imitated", fontsize=9, color=INK)
    axis.set_ylabel("share of questions, %", fontsize=9, color=INK)
    axis.set_title(
        "DUET by the number of imitated logits", loc="left", fontsize=12, fontweight="bold", color=INK
    )
    axis.set_ylim(-3, 103)
    _plain(axis)
    _legend_below(figure, axis, 2)
    _save(figure, path)
    return True


def relearn_curves(rows: Sequence[Row], path: Path) -> bool:
    arms = _arms(rows)
    if not arms:
        return False
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for arm in arms:
        curves = [row["relearn_curve"] for row in rows if row["arm"] == arm]
        steps = sorted(map(int, curves[0]))
        found = [over_seeds([curve[str(step)] for curve in curves]) for step in steps]
        _band(axis, steps, found, QUESTIONS["relearning"].label(arm), COLOURS[arm], MARKERS[arm])
    axis.set_xlabel("steps of training on one half of the forgotten authors", fontsize=9, color=INK)
    axis.set_ylabel("facts about the other half that are told, %\n(lower is better)", fontsize=9, color=INK)
    axis.set_title("What relearning brings back", loc="left", fontsize=12, fontweight="bold", color=INK)
    axis.set_ylim(-3, 103)
    _plain(axis)
    _legend_below(figure, axis, 3)
    _save(figure, path)
    return True


def _arms(rows: Sequence[Row]) -> list[str]:
    have = {row["arm"] for row in rows}
    return [arm for arm in QUESTIONS["relearning"].arms if arm in have]


def _with_error(rows: Sequence[Row], arm: str, column: str) -> tuple[float, list[list[float]] | None]:
    """Mean in percent, and how far the interval reaches below and above it; None for one seed."""
    found = over_seeds([row[column] for row in rows if row["arm"] == arm])
    if math.isnan(found.low):
        return 100 * found.estimate, None
    return 100 * found.estimate, [
        [100 * max(0.0, found.estimate - found.low)],
        [100 * max(0.0, found.high - found.estimate)],
    ]


def _band(axis, x, found, label: str, colour: str, marker: str = "o") -> None:
    mean, low, high = 100 * np.array(found).T
    axis.plot(x, mean, color=colour, marker=marker, markersize=6, linewidth=1.8, label=label, zorder=3)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=9)


def _legend_below(figure, axis, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
