"""The report's figures as SVG text, with the text colour of the page (light or dark) and no external files.

Small on purpose: about 480 px wide, so that their text can still be read on a phone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#d9d9d9"
# Okabe and Ito's colours, distinct for colour-blind readers, visible on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B5609A", "#B8860B", "#4A90C2", "#7A6FB0", "#8A5A3C")
MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")
GREY = "#808080"
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.7, "axes.axisbelow": True,
}  # fmt: skip


class Estimate(NamedTuple):
    """A mean with the ends of its interval; None: no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


class Point(NamedTuple):
    """One method on the frontier. `reference`: the base or the teacher, shown for comparison."""

    label: str
    forget: Estimate
    retain: Estimate
    reference: bool = False


def frontier(points: Sequence[Point], forget: str, retain: str) -> str:
    """Forgetting (left is better) against what is kept (up is better), with 95 % intervals and the front of the best."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 3.9), layout="constrained")
        axis = figure.subplots()
        labels = []
        for i, point in enumerate(points):
            colour = GREY if point.reference else COLOURS[i % len(COLOURS)]
            x, y = point.forget, point.retain
            axis.errorbar(
                x.mean, y.mean, xerr=_arms(x), yerr=_arms(y), color=colour, marker=MARKS[i % len(MARKS)],
                markersize=7, elinewidth=1.2, capsize=2.5, linestyle="none",
            )  # fmt: skip
            labels.append((x.mean, y.mean, point.label))
        best = _front([p for p in points if not p.reference])
        if len(best) > 1:
            ends = [(p.forget.mean, p.retain.mean) for p in best]
            axis.plot(*zip(*ends, strict=True), color=GREY, linewidth=1, linestyle=":", zorder=1)
        axis.margins(0.12)
        _unit_limits(axis, [e for p in points for e in (p.forget, p.retain)])
        axis.set_xlabel(f"← forgets more\n{_plain(forget)}")
        axis.set_ylabel(f"{_plain(retain)}\nkeeps more →")
        _label_points(axis, labels)
        return _svg(figure, "frontier")


def _label_points(axis: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, on the side with more room, moved apart where they overlap, with a line to the point."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    points_high = 200 / (top - bottom)  # the axes are about 200 points high
    for sign, align in ((1, "left"), (-1, "right")):
        side = [each for each in labels if (1 if each[0] < (left + right) / 2 else -1) == sign]
        places = _spread([y for _, y, _ in side], 0.08 * (top - bottom))
        lowest = bottom + 0.03 * (top - bottom)
        raised = max(0.0, lowest - min(places, default=lowest))
        for (x, y, text), place in zip(side, places, strict=True):
            axis.annotate(
                _plain(text), (x, y), xytext=(20 * sign, (place + raised - y) * points_high), ha=align, va="center",
                textcoords="offset points", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5},
            )  # fmt: skip


def _front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both directions, from the most to the least forgetting."""
    ordered = sorted(points, key=lambda p: (p.forget.mean, -p.retain.mean))
    best: list[Point] = []
    for point in ordered:
        if not best or point.retain.mean > best[-1].retain.mean:
            best.append(point)
    return best


def relearning(
    curves: Mapping[str, Sequence[tuple[int, Estimate | None]]], title: str, start: float | None = None
) -> str:
    """What comes back after so many steps of training, one line a learning rate; the worst is bold, with its intervals.

    curves[rate] = [(steps, estimate or None where nothing could be judged), ...]; start: recall before any step.
    """
    worst = max(curves, key=lambda rate: _strength([e.mean for _, e in curves[rate] if e is not None]))
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axis = figure.subplots()
        ends = []
        for i, (rate, curve) in enumerate(curves.items()):
            xs = [step for step, _ in curve]
            ys = [math.nan if e is None else e.mean for _, e in curve]
            bold = rate == worst
            axis.plot(
                xs, ys, color=COLOURS[i % len(COLOURS)], marker=MARKS[i % len(MARKS)], markersize=7 if bold else 4,
                linewidth=3 if bold else 1.2, zorder=3 if bold else 2,
            )  # fmt: skip
            if bold:
                known = [(x, e) for x, e in curve if e is not None and e.low is not None]
                if known:
                    x, es = zip(*known, strict=True)
                    axis.fill_between(
                        x, [e.low for e in es], [e.high for e in es], color=COLOURS[i % len(COLOURS)], alpha=0.15,
                        linewidth=0,
                    )  # fmt: skip
            if xs and not math.isnan(ys[-1]):
                ends.append((xs[-1], ys[-1], f"{rate} (worst)" if bold else rate))
        if start is not None:
            axis.axhline(start, color=GREY, linewidth=1, linestyle=":")
            axis.text(
                0.01, start, "before training", fontsize=9, va="top" if start > 0.9 else "bottom",
                transform=axis.get_yaxis_transform(),
            )  # fmt: skip
        axis.set_ylim(-0.03, 1.03)
        places = _spread([y for _, y, _ in ends], 0.085)
        for (x, _, text), y in zip(ends, places, strict=True):
            axis.annotate(text, (x, y), xytext=(8, 0), textcoords="offset points", va="center")
        axis.set_xlim(left=0, right=1.42 * max((x for x, _, _ in ends), default=1))
        axis.set_xticks(sorted({step for curve in curves.values() for step, _ in curve}))
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel("share that comes back")
        axis.set_title(_plain(title), loc="left", fontsize=11)
        return _svg(figure, f"relearning {title}")


def _strength(recalls: Sequence[float]) -> tuple[float, float]:
    """Order of curves: by the largest recall, then by the sum of recalls."""
    return (max(recalls), sum(recalls)) if recalls else (-math.inf, 0.0)


def topk(
    question: str,
    tokens: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    teacher: Sequence[float] | None = None,
) -> str:
    """Logits of the first token of the answer: bars before and after, and the steered teacher's between."""
    with rc_context(STYLE):
        figure = Figure(
            figsize=(5, (0.42 if teacher is None else 0.56) * len(tokens) + 1.3), layout="constrained"
        )
        axis = figure.subplots()
        lines = range(len(tokens) - 1, -1, -1)
        shown = [
            ("before", GREY, before),
            ("steered teacher", COLOURS[4], teacher),
            ("after", COLOURS[0], after),
        ]
        shown = [each for each in shown if each[2] is not None]
        height = 0.78 / len(shown)
        for i, (label, colour, values) in enumerate(shown):
            places = [y + ((len(shown) - 1) / 2 - i) * height for y in lines]
            bars = axis.barh(places, values, height=0.92 * height, color=colour, label=label)
            axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.margins(x=0.12)
        axis.set_yticks(lines, [_plain(_visible(token)) for token in tokens])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("logit of the answer's first token")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=10)
        return _svg(figure, f"topk {question}")


def _visible(token: str) -> str:
    """A readable token: spaces and unprintable characters are shown."""
    if not token.strip() or not token.isprintable():
        return repr(token)
    return token.replace(" ", "␣")


# --- shared ----------------------------------------------------------------------------------------------------


def _arms(e: Estimate) -> list[list[float]] | None:
    """Lengths of the error bar, as matplotlib takes them."""
    if e.low is None or e.high is None:
        return None
    return [[max(0.0, e.mean - e.low)], [max(0.0, e.high - e.mean)]]


def _unit_limits(axis: Axes, estimates: Sequence[Estimate]) -> None:
    """Shares are shown from 0 to 1, so that a small difference looks small."""
    if all(0 <= e.mean <= 1 for e in estimates):
        axis.set_xlim(-0.06, 1.06)
        axis.set_ylim(-0.06, 1.06)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """The positions, in their order, moved as little as possible to be `gap` apart.

    Example:
        >>> [round(x, 3) for x in _spread([0.0, 0.0, 1.0], 0.2)]
        [-0.1, 0.1, 1.0]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    clusters: list[list[int]] = []
    centre: list[float] = []
    for i in order:
        clusters.append([i])
        centre.append(places[i])
        while len(clusters) > 1:
            room = gap * (len(clusters[-1]) + len(clusters[-2])) / 2
            if centre[-1] - centre[-2] >= room - 1e-12:
                break
            merged = clusters[-2] + clusters[-1]
            clusters[-2:], centre[-2:] = [merged], [sum(places[j] for j in merged) / len(merged)]
    moved = [0.0] * len(places)
    for cluster, middle in zip(clusters, centre, strict=True):
        for k, i in enumerate(cluster):
            moved[i] = middle + (k - (len(cluster) - 1) / 2) * gap
    return moved


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _svg(figure: Figure, name: str) -> str:
    """One <svg> element: without prolog and metadata, with unique ids and the page's text colour."""
    stream = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's font has it
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name.lower())[:60]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", text, count=1, flags=re.DOTALL)
    return text.replace(INK, "currentColor").replace(FAINT, "var(--faint, #d9d9d9)").strip()
