"""The report's figures as SVG text, with the text colour of the page (light or dark) and no external files.

Small on purpose: about 480 px wide, so that their text can still be read on a phone.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

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


def frontier(points: Sequence[Point], forget: str, retain: str, better: tuple[str, str] = ("↓", "↑")) -> str:
    """Forgetting against what is kept, with 95 % intervals and the front of the best; numbered points and their names.

    better: the better direction of forget and retain, ↓ or ↑; another text: none, and then no front.
    """
    with rc_context(STYLE):
        names = [_wrapped(f"{i + 1}  {point.label}") for i, point in enumerate(points)]
        lines = sum(name.count("\n") + 1 for name in names)
        figure = Figure(figsize=(5, 3.7 + 0.2 * lines), layout="constrained")
        axis = figure.subplots()
        drawn = []
        for i, point in enumerate(points):
            colour = GREY if point.reference else COLOURS[i % len(COLOURS)]
            x, y = point.forget, point.retain
            bars = axis.errorbar(
                x.mean, y.mean, xerr=_arms(x), yerr=_arms(y), color=colour, marker=MARKS[i % len(MARKS)],
                markersize=7, elinewidth=1.2, capsize=2.5, linestyle="none",
            )  # fmt: skip
            drawn.append(bars.lines[0])
        best = _front(points, better)
        if best:
            ends = [(p.forget.mean, p.retain.mean) for p in best]
            axis.plot(*zip(*ends, strict=True), color=GREY, linewidth=1, linestyle=":", zorder=1)
        axis.margins(0.12)
        if all(0 <= e.mean <= 1 for p in points for e in (p.forget, p.retain)):
            axis.set(xlim=(-0.06, 1.06), ylim=(-0.06, 1.06))  # so that a small difference looks small
        axis.set_xlabel(
            _plain(forget) + {"↓": "\n← forgets more", "↑": "\nforgets more →"}.get(better[0], "")
        )
        axis.set_ylabel(_plain(retain) + {"↓": "\n← keeps more", "↑": "\nkeeps more →"}.get(better[1], ""))
        figure.legend(drawn, names, loc="outside lower left", frameon=False, fontsize=10, labelspacing=0.3)
        _number_points(figure, axis, [(p.forget.mean, p.retain.mean) for p in points])
        return _svg(figure, "frontier")


def frontier_caption(
    points: Sequence[Point], forget: str, retain: str, better: tuple[str, str] = ("↓", "↑")
) -> str:
    """What `frontier` draws of these points, and nothing else."""
    bars = any(_arms(e) for p in points for e in (p.forget, p.retain))
    parts = [
        "bars: 95 % intervals" if bars else "",
        "grey: not trained to forget" if any(p.reference for p in points) else "",
        "dotted line: the methods that no other beats in both" if _front(points, better) else "",
    ]
    drawn = "; ".join(filter(None, parts))
    told = f"{forget} against {retain}, when asked without an attack."
    return f"{told} {drawn[0].upper()}{drawn[1:]}." if drawn else told


def _number_points(figure: Figure, axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    """1, 2, ... beside the points, where neither a point nor another number is; with a line to a point further away."""
    figure.draw_without_rendering()  # places the axes
    scale = 72 / figure.dpi
    at = [tuple(scale * axis.transData.transform(point)) for point in points]
    (left, low), (right, high) = (scale * corner for corner in axis.get_window_extent().get_points())
    taken = [(x, y, 9.0, 9.0) for x, y in at]
    for i, (x, y) in enumerate(at):
        wide = 6 + 7.0 * len(str(i + 1))
        # Diagonals first: error bars are horizontal and vertical.
        turns = (2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11, 0, 8, 4, 12)
        ring = ((r, k * math.pi / 8) for r in range(13, 400, 6) for k in turns)
        for r, angle in ring:
            dx, dy = r * math.cos(angle), r * math.sin(angle)
            box = (x + dx, y + dy, wide, 13.0)
            inside = left + wide / 2 < box[0] < right - wide / 2 and low + 7 < box[1] < high - 7
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        arrow: Any = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        label = axis.annotate(
            str(i + 1), points[i], xytext=(dx, dy), textcoords="offset points", ha="center", va="center",
            fontsize=10, arrowprops=arrow if r > 13 else None, annotation_clip=False,
        )  # fmt: skip
        label.set_gid(f"number-{i + 1}")


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Of two boxes (centre x, centre y, width, height)."""
    return abs(a[0] - b[0]) < (a[2] + b[2]) / 2 and abs(a[1] - b[1]) < (a[3] + b[3]) / 2


def _front(points: Sequence[Point], better: tuple[str, str]) -> list[Point]:
    """The students that no other beats in both directions, from the most to the least forgetting; fewer than 2: none."""
    if not set(better) <= {"↓", "↑"}:
        return []
    x, y = (-1 if way == "↓" else 1 for way in better)
    students = [p for p in points if not p.reference]
    best: list[Point] = []
    for point in sorted(students, key=lambda p: (-x * p.forget.mean, -y * p.retain.mean)):
        if not best or y * point.retain.mean > y * best[-1].retain.mean:
            best.append(point)
    return best if len(best) > 1 else []


Curves = Mapping[str, Sequence[tuple[int, Estimate | None]]]


def relearning(curves: Curves, title: str, start: float | None = None) -> str:
    """What comes back after so many steps of training, one line a learning rate; the worst is bold, with its intervals.

    curves[rate] = [(steps, estimate or None where nothing could be judged), ...]; start: recall before any step.
    """
    worst = _worst(curves)
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


def relearning_caption(curves: Curves, start: float | None = None) -> str:
    """What `relearning` draws of these curves, and nothing else."""
    bars = any(e is not None and e.low is not None for _, e in curves[_worst(curves)])
    bold = "the worst bold" + (", with its 95 % interval" if bars else "")
    dotted = "" if start is None else "; dotted: all rows, asked before"
    return f"One line a learning rate, {bold}{dotted}."


def _worst(curves: Curves) -> str:
    """The rate with the largest recall, of several the one with the largest sum of recalls."""
    recalls = {rate: [e.mean for _, e in curve if e is not None] for rate, curve in curves.items()}
    return max(recalls, key=lambda rate: (max(recalls[rate], default=-math.inf), sum(recalls[rate])))


def topk(
    question: str,
    tokens: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    teacher: Sequence[float] | None = None,
) -> str:
    """Log-probabilities of the answer's first token: a line a token, a point a model; the numbers are at the right."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 0.32 * len(tokens) + 1.4), layout="constrained")
        axis = figure.subplots()
        lines = range(len(tokens) - 1, -1, -1)
        shown: list[Any] = [
            ("before", GREY, "o", before),
            ("steered teacher", COLOURS[4], "D", teacher),
            ("after", COLOURS[0], "s", after),
        ]
        shown = [each for each in shown if each[3] is not None]
        for y, *values in zip(lines, *(each[3] for each in shown), strict=True):
            axis.plot(values, [y] * len(values), color=GREY, linewidth=1, zorder=1)
            told = "  ".join(f"{value:.1f}" for value in values)
            axis.text(1.02, y, told, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
        for label, colour, mark, values in shown:
            axis.plot(values, lines, color=colour, marker=mark, markersize=7, linestyle="none", label=label)
        axis.margins(x=0.06)
        axis.set_ylim(-0.6, len(tokens) - 0.4)
        axis.set_yticks(lines, [_plain(_visible(token)) for token in tokens])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("log-probability of the answer's first token, nats\nlikelier →")
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


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """The positions, in their order, moved as little as possible to be `gap` apart.

    Example:
        >>> [round(x, 3) for x in _spread([0.0, 0.0, 1.0], 0.2)]
        [-0.1, 0.1, 1.0]
    """
    order, steps = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(np.asarray(places)[order] - steps).x + steps
    return moved.tolist()


def _wrapped(name: str) -> str:
    """A name in lines that a legend has room for."""
    return _plain("\n".join(textwrap.wrap(name, 46, drop_whitespace=False, subsequent_indent="    ")))


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
    text = re.sub("<svg[^>]*", lambda svg: re.sub(r' (width|height)="[\d.]+pt"', "", svg[0]), text, count=1)
    return text.replace(INK, "currentColor").replace(FAINT, "var(--faint, #d9d9d9)").strip()
