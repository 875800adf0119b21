"""A file, or a dataset on the Hub -> rows with the columns that `duet.data.rows.read_rows` reads.

Text files are read here and not by `datasets`: a row may differ in kind from the next, and an error names its line.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..names import did_you_mean, expanded
from ..options import MaybeCount
from .rows import ANSWERS, PROMPTS, how_to_rename, warn_of_unread

COLUMNS = (*PROMPTS, *ANSWERS, "subject", "value")


@dataclass(frozen=True)
class DataSource:
    """Where rows come from, and what their columns are called there.

    Attributes:
        path: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder that `datasets` wrote, or a dataset on the Hub.
        name: the dataset's configuration, on the Hub.
        split: which split, on the Hub.
        columns: our name -> the name there, for `question`, `prompt`, `messages`, `answer`, `completion`, `subject`, `value`.
            Empty: columns with these names are read, others are not.
        subject: of the rows without a subject of their own.
        limit: use only this many first rows.
    """

    path: str
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    subject: str | None = None
    limit: MaybeCount = None


def load_rows(source: DataSource, argument: str) -> list[dict[str, Any]]:
    """The rows of a source, with our column names.

    Args:
        source: where they are.
        argument: the name of the source in error messages, such as `data.forget`.

    Raises:
        OSError: it does not exist, or cannot be read.
        ValueError: it is not UTF-8, not JSON, empty, or lacks a column; the message names the line or the column.
    """
    rows = _read(source, argument)
    if not source.columns:
        warn_of_unread(rows, argument)
    if source.limit is not None:
        rows = rows[: source.limit]
    if not rows:
        raise ValueError(f"{argument}: wanted at least one row, got none in {source.path!r}")
    return [_renamed(row, source, f"{argument}[{i}]") for i, row in enumerate(rows)]


def read_table(path: Path, argument: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file, with their own column names; may be none. With a `limit` only so many first ones.

    `.json` is a list of objects, or an object a line (as TOFU's files are). Cells of a `.csv` file are texts; an empty
    one is None.

    Raises:
        ValueError: a limit below 1, another suffix, not UTF-8, not JSON, not CSV, or a row with more or fewer cells than there are columns;
            the message names the line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: wanted an integer >= 1, got {limit}")
    read = FORMATS.get(path.suffix)
    if read is None:
        raise ValueError(f"{argument}: wanted a file that ends in {', '.join(FORMATS)}, got {str(path)!r}")
    return list(read(path, argument))[:limit]


def read_object(path: Path, argument: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: not UTF-8, not JSON, or no object; naming the argument and the file.
    """
    return _object("".join(line for _, line in _lines(path, argument)), f"{argument}: {path}")


def _renamed(row: dict[str, Any], source: DataSource, where: str) -> dict[str, Any]:
    if source.columns:
        missing = [theirs for theirs in source.columns.values() if theirs not in row]
        if missing:
            hint = did_you_mean(missing[0], row)
            raise ValueError(f"{where}: it has no column {missing[0]!r}, but {', '.join(sorted(row))}{hint}")
        row = {ours: row[theirs] for ours, theirs in source.columns.items()}
    else:
        if row and not any(name in row for name in PROMPTS):
            ours = next(
                ((name, near) for name in PROMPTS if (near := get_close_matches(name, row, 1, 0.7))), None
            )
            lists = [("messages", [name]) for name, value in row.items() if isinstance(value, list)]
            others = [("question", [name]) for name in sorted(map(str, row)) if name not in COLUMNS]
            hint = "" if ours else how_to_rename(row, columns=True)
            ours = ours or next(iter((*lists, *others)), None)
            if ours and not hint:
                hint = f"; say which it is, such as columns: {{{ours[0]}: {ours[1][0]}}}"
            raise ValueError(
                f"{where}: wanted a column {', '.join(map(repr, PROMPTS[:-1]))} or {PROMPTS[-1]!r}, got "
                f"{', '.join(sorted(map(str, row)))}{hint}"
            )
        row = {name: row[name] for name in COLUMNS if name in row}
    if row.get("subject") is None and source.subject is not None:
        row["subject"] = source.subject
    return row


def _read(source: DataSource, argument: str) -> list[dict[str, Any]]:
    path = Path(expanded(argument, source.path))
    if path.is_file():
        return read_table(path, argument)
    if not path.is_dir() and (path.suffix in FORMATS or source.path[0] in "./~"):
        raise FileNotFoundError(f"{argument}: there is no file {source.path!r}")
    _check_one_file(path, source, argument)
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        if (path / "state.json").is_file():
            rows: Any = load_from_disk(str(path))
        else:
            found = str(path) if path.is_dir() else source.path
            rows = load_dataset(found, source.name, split=source.split)
        return list(rows)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise OSError(f"{argument}: the dataset {source.path!r} could not be loaded: {error}") from error


def _check_one_file(path: Path, source: DataSource, argument: str) -> None:
    """Refuses a folder of several sets of rows of which `datasets` would make one, because nothing says which is which."""
    files = sorted(f for f in path.glob("*") if f.suffix in FORMATS and f.name != "dataset_infos.json")
    sets = {re.sub(r"[-_]?\d+(-of-\d+)?$", "", file.stem) for file in files}
    if len(sets) < 2 or source.name or any((path / name).is_file() for name in ("state.json", "README.md")):
        return
    from datasets.data_files import get_data_patterns

    if ["**"] in get_data_patterns(str(path)).values():  # no name of a split in those of the files
        wanted = next((file for file in files if file.stem == argument.split(".")[-1]), files[0])
        raise ValueError(
            f"{argument}: wanted one file of rows, such as {wanted}, got a folder with {len(files)} of them: "
            f"{', '.join(file.name for file in files[:4])}"
        )


def _lines(path: Path, argument: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{argument}: {path}, line {number}"
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: wanted UTF-8 text: {error.reason} at byte {error.start}"
                ) from None


def _json_lines(path: Path, argument: str) -> Iterator[dict[str, Any]]:
    for where, line in _lines(path, argument):
        if path.suffix == ".jsonl" and line.lstrip().startswith("["):
            raise ValueError(
                f"{where}: wanted an object, got {line.strip()[:60]!r}; a file with a list of objects ends in .json"
            )
        if line.strip():
            yield _object(line, where)


def _json(path: Path, argument: str) -> list[dict[str, Any]]:
    text = "".join(line for _, line in _lines(path, argument))
    if not text.lstrip().startswith("["):
        return list(_json_lines(path, argument))
    rows = _parsed(text, f"{argument}: {path}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{argument}: {path}, row {i}: wanted an object, got {row!r:.60}")
    return rows


def _object(text: str, where: str) -> dict[str, Any]:
    row = _parsed(text, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: wanted an object, got {text.strip()[:60]!r}")
    return row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = (
            f"line {error.lineno}, column {error.colno}" if "\n" in text.rstrip() else f"column {error.colno}"
        )
        raise ValueError(f"{where}: not JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists
        raise ValueError(f"{where}: not JSON that can be read: {error}") from None


def csv_cells(path: Path, argument: str, strict: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Where a row of a .csv file starts (argument, file and line), and its cells; a header is a row, empty lines are none.

    Unless `strict`, a closing quote may be followed by more text, as in `"Which" is it`.

    Raises:
        ValueError: not UTF-8 or not CSV; the message names the line.
    """
    text = "".join(line for _, line in _lines(path, argument))
    csv.field_size_limit(2**30)  # a cell may hold a book
    reader = csv.reader(io.StringIO(text, newline=""), strict=strict)
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if cells:
                yield f"{argument}: {path}, line {start}", cells
    except csv.Error as error:
        raise ValueError(f"{argument}: {path}, line {line}: not CSV: {error}") from None


def _csv(path: Path, argument: str) -> list[dict[str, Any]]:
    rows, names = [], []
    for where, cells in csv_cells(path, argument):
        if not names:
            names = [cell.strip() for cell in cells]
            if "" in names or len(set(names)) < len(names):
                raise ValueError(
                    f"{where}: wanted a different name for every column, got {', '.join(map(repr, names))}"
                )
            if len(names) == 1 and any(sign in names[0] for sign in ";\t"):
                raise ValueError(
                    f"{where}: wanted cells between commas, got the one column {names[0]!r}; save the file with commas"
                )
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"{where}: wanted {len(names)} cells ({', '.join(names)}), got {len(cells)}; a text "
                'with a comma or a line break in it is written between quotes: "one, two"'
            )
        # An empty cell is an absent value; every other one stays a text, also where it looks like a number.
        rows.append({name: cell or None for name, cell in zip(names, cells, strict=True)})
    return rows


def _parquet(path: Path, argument: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {path}: not Parquet: {error}") from None


FORMATS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
