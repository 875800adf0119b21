"""Sections of notes, tables and charts -> one HTML page without external assets, and Markdown."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
NOT_RUN = "–"
ALONE = '<svg style="background: #ffffff; color: #222222" '  # a file has no page to take the text colour from


@dataclass
class Cell:
    """Of a table. interval, unjudged: below the text. mark: `leaks` or `true`. role: of a method. why: it is undefined."""

    text: str
    interval: str = ""
    mark: str = ""
    role: str = ""
    why: str = ""
    unjudged: str = ""

    @property
    def below(self) -> list[str]:
        return [text for text in (self.interval, self.unjudged) if text]


@dataclass
class Grid:
    """A table.

    Attributes:
        groups, bands: a heading for each column, and for each row; equal headings of neighbours are merged.
        roles: of each column's method.
        prose: long texts.
        folded: shown as its caption until it is opened.
    """

    head: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    bands: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    caption: str = ""
    prose: bool = False
    folded: bool = False
    kind: str = "grid"

    def starts_band(self, row: int) -> bool:
        return bool(self.bands) and (row == 0 or self.bands[row] != self.bands[row - 1])

    def role(self, column: int) -> str:
        return self.roles[column] if self.roles else ""

    @property
    def spans(self) -> list[tuple[str, int]]:
        return [(name, len(list(same))) for name, same in groupby(self.groups)]


@dataclass
class Chart:
    """An <svg> element and what it shows. number: among the charts whose names give one file."""

    name: str
    svg: str
    caption: str
    kind: str = "chart"
    number: int = 1

    @property
    def file(self) -> str:
        words = re.sub(r"\W+", "-", self.name).strip("-").lower()[:60]
        return f"{words}-{self.number}.svg" if self.number > 1 else f"{words}.svg"


@dataclass
class Section:
    """A part of the report. legend: name -> what it means."""

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    blocks: list[Grid | Chart] = field(default_factory=list)
    legend: dict[str, str] = field(default_factory=dict)


def shown(sections: Sequence[Section]) -> list[Section]:
    """The sections that have a table or a figure; what the others say is missing is one last section."""
    absent = [note for section in sections if not section.blocks for note in section.notes]
    full = [section for section in sections if section.blocks]
    return [*full, Section("absent", "Not in this report", absent)] if absent else full


def html(headline: str, sections: Sequence[Section]) -> str:
    """One page with its style and its figures in it."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    css = Markup((ASSETS / "report.css").read_text(encoding="utf-8"))
    page = environment.get_template("report.html.jinja")
    return page.render(headline=headline, sections=sections, css=css, drawn=lambda chart: Markup(chart.svg))


def drawings(sections: Sequence[Section]) -> dict[str, str]:
    """File -> figure, for the folder that is beside the Markdown."""
    drawn: dict[str, str] = {}
    for chart in (block for section in sections for block in section.blocks if isinstance(block, Chart)):
        while chart.file in drawn:  # the labels `duet` and `duet+`
            chart.number += 1
        drawn[chart.file] = chart.svg.replace("<svg ", ALONE, 1) + "\n"
    return drawn


def markdown(headline: str, sections: Sequence[Section], figures: Path) -> str:
    """The same in Markdown; the folder `figures` beside it holds the `drawings`, which are named by then."""
    lines = ["# What was forgotten", "", _plain(headline), ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += _grid(block) if isinstance(block, Grid) else _chart(block, figures)
            lines.append("")
        for note in section.notes:
            lines += [_plain(note), ""]
        lines += [f"* `{name}`: {_plain(meaning)}" for name, meaning in section.legend.items()]
        lines += [""] if section.legend else []
    return "\n".join(lines)


def _grid(grid: Grid) -> Iterator[str]:
    if grid.folded:
        yield from ("<details>", f"<summary>{_plain(grid.caption)}</summary>", "")
    elif grid.caption:
        yield from (f"**{_plain(_literal(grid.caption))}**", "")
    groups = grid.groups or [""] * len(grid.head)
    head = [f"{group}: {name}" if group else name for group, name in zip(groups, grid.head, strict=True)]
    align = "---" if grid.prose else "---:"
    yield _line(map(_literal, head))
    yield _line(["---", *[align] * (len(head) - 1)])
    for i, row in enumerate(grid.rows):
        if grid.starts_band(i):
            yield _line([f"**{_literal(grid.bands[i])}**", *[""] * (len(row) - 1)])
        yield _line([_written(cell) for cell in row])
    if grid.folded:
        yield from ("", "</details>")


def _written(cell: Cell) -> str:
    below = f" ({'; '.join(cell.below)})" if cell.below else ""
    text = _literal(cell.text)
    return f"**{cell.mark}:** {text}" if cell.mark else text + below


def _literal(text: str) -> str:
    """Text, such as an answer of a model, in which nothing is Markdown, a formula or an HTML entity."""
    return re.sub(r"([\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;))", r"\\\1", text)


def _line(cells: Iterable[Any]) -> str:
    # A line's end or a bar inside a cell would end it.
    escaped = ("<br>".join(map(_plain, str(c).splitlines())).replace("|", "\\|") for c in cells)
    return "| " + " | ".join(escaped) + " |"


def _plain(text: str) -> str:
    """Text on one line, in which nothing starts an HTML tag."""
    return " ".join(text.splitlines()).replace("<", "&lt;")


def _chart(chart: Chart, figures: Path) -> Iterator[str]:
    caption = _plain(_literal(chart.caption))
    yield f"![{caption}]({figures.name}/{chart.file})"
    yield ""
    yield f"*{caption}*"
