"""Time and memory against N, V and k: one figure an operation, readable without its text. Knows rows only.

Columns are what varies, rows are time and memory; both axes are logarithmic. Ours is drawn in colour, everybody else
in greys, each line named at its end. The title is a sentence computed from the rows that are drawn.
"""

from __future__ import annotations

import itertools
import pathlib
import textwrap
from collections import defaultdict
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.harness import Row
from benchmarks.report import OURS, kind_of, number

AXES = {"n": "tokens N", "v": "vocabulary V", "k": "selected ids k"}
OUR_COLOURS = ("#d1495b", "#e0813a")
PEER_COLOURS = {
    "torch eager": "#8a99ad",
    "torch compile": "#30475e",
    "torch": "#8d7b68",
    "trl": "#5f8575",
    "liger": "#8f7fae",
    "cut_cross_entropy": "#a3865c",
    "quack": "#5b8f9c",
}
MIN_POINTS = 3
LABEL_HEIGHT = 0.07  # of a panel


def sweep(rows: Sequence[Row], axis: str) -> list[Row]:
    """The rows that differ in `axis` only: those of the fixed sizes that have most points."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(getattr(row, size) for size in "ndvk" if size != axis)].append(row)
    points = {fixed: len({getattr(row, axis) for row in group}) for fixed, group in groups.items()}
    best = max(points, key=lambda fixed: points[fixed], default=None)
    return groups[best] if best is not None and points[best] >= MIN_POINTS else []


def draw_all(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """A PNG for every operation whose rows vary in a size; the paths."""
    made = []
    for _, group in itertools.groupby(sorted(rows, key=kind_of), key=kind_of):
        ran = [row for row in group if row.ms is not None]
        sweeps = {axis: sweep(ran, axis) for axis in AXES}
        sweeps = {axis: chosen for axis, chosen in sweeps.items() if chosen}
        # Where there is a backward pass, forward alone is a table's matter, not a picture's.
        if not sweeps or (ran[0].which_pass == "forward" and ran[0].head != "none"):
            continue
        parts = (ran[0].op, ran[0].divergence.replace("/", "-"), ran[0].head)
        name = "_".join(part for part in parts if part not in ("", "none"))
        path = folder / f"{name}.png"
        _figure(sweeps, path)
        made.append(path)
    return made


def _figure(sweeps: dict[str, list[Row]], path: pathlib.Path) -> None:
    rows = next(iter(sweeps.values()))
    figure, panels = plt.subplots(2, len(sweeps), figsize=(4.6 * len(sweeps) + 1.4, 6.8), squeeze=False)
    labels = sorted({f"{r.provider} {r.impl}" for chosen in sweeps.values() for r in chosen}, key=_order)
    colours = _colours(labels)
    for column, (axis, chosen) in enumerate(sweeps.items()):
        for line, (field, unit) in enumerate((("ms", "milliseconds"), ("peak_mb", "MiB beyond the inputs"))):
            panel = panels[line][column]
            _panel(panel, chosen, axis, field, colours)
            panel.set_xlabel(AXES[axis] if line else "")
            panel.set_ylabel(unit if not column else "")
        fixed = ", ".join(
            f"{size.upper() if size != 'k' else size} = {getattr(chosen[0], size)}"
            for size in "nvdk"
            if size != axis and (size != "k" or "topk" in chosen[0].op)
        )
        panels[0][column].set_title(fixed, fontsize=9, color="#555555", loc="left")
    what = "forward + backward" if rows[0].which_pass == "full" else "forward"
    kind = f"{rows[0].op} {rows[0].divergence}".strip()
    title = textwrap.fill(headline(sweeps), int(9.5 * figure.get_figwidth()))
    top = 1 - 0.03 * title.count("\n")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    head = f", {rows[0].head} head" if rows[0].head != "none" else ""
    figure.text(
        0.01,
        top - 0.07,
        f"{kind}, {what}{head}, {rows[0].dtype}; {rows[0].device}",
        fontsize=9,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0, 1, top - 0.04))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _order(label: str) -> tuple[bool, str]:
    return not label.startswith(OURS), label


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """Everybody keeps their colour from figure to figure."""
    ours = itertools.cycle(OUR_COLOURS)
    return {
        label: next(ours)
        if label.startswith(OURS)
        else PEER_COLOURS.get(label, PEER_COLOURS.get(label.split()[0], "#b0b0b0"))
        for label in labels
    }


def _panel(panel: Axes, rows: Sequence[Row], axis: str, field: str, colours: dict[str, str]) -> None:
    ends: list[tuple[float, float, str]] = []
    for label, colour in colours.items():
        points = sorted(
            (getattr(r, axis), max(getattr(r, field), 0.1))
            for r in rows
            if f"{r.provider} {r.impl}" == label and getattr(r, field) is not None
        )
        if not points:
            continue
        ours = label.startswith(OURS)
        panel.plot(
            *zip(*points, strict=True),
            color=colour,
            lw=2.6 if ours else 1.4,
            marker="o",
            ms=4,
            zorder=2 + ours,
        )
        ends.append((*points[-1], label))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = sorted({getattr(row, axis) for row in rows})
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    panel.grid(True, which="major", color="#e8e8e8", lw=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    low, high = panel.get_ylim()
    room = max(1.0, (20 * low / high) ** 0.5)  # at least a factor of 20, so that flat looks flat
    panel.set_ylim(low / room, high * room)
    panel.set_xlim(ticks[0] / 1.15, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.55)
    _name_lines(panel, ends, colours)


def _name_lines(panel: Axes, ends: list[tuple[float, float, str]], colours: dict[str, str]) -> None:
    """Names at the lines' ends, pushed apart where lines end close together."""
    to_axes = panel.transData + panel.transAxes.inverted()
    spots = sorted(((*to_axes.transform((x, y)), label) for x, y, label in ends), key=lambda spot: spot[1])
    heights: list[float] = []
    for _, y, _ in spots:
        heights.append(max(y, heights[-1] + LABEL_HEIGHT) if heights else y)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - LABEL_HEIGHT
    for (x, _, label), height in zip(spots, heights, strict=True):
        panel.annotate(
            label,
            (x + 0.02, height),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=colours[label],
            fontweight="bold" if label.startswith(OURS) else "normal",
        )


def headline(sweeps: dict[str, list[Row]]) -> str:
    """What the largest point of the first sweep says, in a sentence."""
    axis, rows = next(iter(sweeps.items()))
    largest = max((getattr(row, axis) for row in rows if row.provider == OURS), default=None)
    if largest is None:
        return f"without {OURS}, which was not measured here"
    here = [row for row in rows if getattr(row, axis) == largest]
    ours = min((row for row in here if row.provider == OURS), key=lambda row: row.ms)
    others = [row for row in here if row.provider != OURS]
    at = f"At {axis.upper() if axis != 'k' else 'k'} = {largest}"
    if not others:
        return f"{at} {OURS} takes {number(ours.ms)} ms"
    rival = min(others, key=lambda row: row.ms)
    times = rival.ms / ours.ms
    speed = f"{number(times)} times faster than" if times >= 1 else f"{number(1 / times)} times slower than"
    text = f"{at} {OURS} is {speed} {rival.provider} {rival.impl}"
    if rival.peak_mb is not None and ours.peak_mb is not None:
        text += f", with {number(ours.peak_mb)} MiB instead of {number(rival.peak_mb)}"
    return text
