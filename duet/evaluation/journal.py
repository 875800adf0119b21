"""A folder of results that can be continued: `manifest.json` says what is run, `rows.jsonl` grows line by line.

A line is a row; an incomplete last line is dropped when the folder is opened again. A folder of another run (other
model, other suite) is refused, and the first field that differs is named.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.sources import read_object
from ..folders import lock, unlock, write_atomically

Progress = Callable[[str, int, int], None]  # called with (what, how much of it is done, all of it)
ROWS, MANIFEST = "rows.jsonl", "manifest.json"
LM_EVAL = "lm_eval.json"
MAY_LACK = ("model_config", "model_dtype")  # which manifests of earlier versions do not have
# What a row's status other than `ok` means.
MEANING = {
    "empty": "answered with nothing",
    "cut": "cut at the token limit before the answer had ended",
    "refused_by_template": "left out: the chat template or the tokenizer refuses the conversation",
    "no_answer": "left out: the row has no answer to compare with",
    "nan": "left out: NaN logits",
    "too_long": "left out: longer than the model's context",
    "bad_row": "left out: something is wrong with the row (`why` in rows.jsonl)",
    "no_tokens": "left out: a text without tokens",
    "unknown_tokens": "left out: the tokenizer cannot represent the answer",
}


class Journal:
    """Opens or continues the results in `folder`, which no other process can do until it is closed: `with Journal(...) as journal`.

    Args:
        folder: made when it is not there.
        manifest: what must agree for the rows to belong together: plain values, compared field by field.
        key: the fields that identify a row; a row is written once.
        note: values for the manifest that are not compared (versions).

    Raises:
        ValueError: the folder holds another run's results; a line before the last is not JSON, or repeats the key of an
            earlier one; or another process has the folder open.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: dict[str, Any],
        key: Sequence[str],
        note: dict[str, Any] | None = None,
    ):
        self.folder, self.key = Path(folder), tuple(key)
        self._lock = lock(self.folder, "out")
        try:
            self._agree(manifest, note or {})
            self.rows: list[dict[str, Any]] = self._read_and_mend()
        except BaseException:
            self.close()
            raise
        self.done: set[tuple[Any, ...]] = {self._key(row) for row in self.rows}

    def close(self) -> None:
        """Lets other processes have the folder."""
        unlock(self._lock)
        self._lock = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def _agree(self, manifest: dict[str, Any], note: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        manifest = json.loads(json.dumps(manifest))
        if path.is_file():
            try:
                before = read_object(path, "out")
            except ValueError as error:
                raise ValueError(f"{error}; wanted a new folder") from None
            before.pop("note", None)
            check_same_run(self.folder, before, manifest)
            return
        if (self.folder / ROWS).exists():
            raise ValueError(f"out: {self.folder} holds {ROWS} but no {MANIFEST}; wanted a new folder")
        write_json(path, manifest | {"note": note})

    def _read_and_mend(self) -> list[dict[str, Any]]:
        path = self.folder / ROWS
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the run was killed while writing this line
            with path.open("r+b") as file:
                file.truncate(whole)
        rows, first = [], {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            rows.append(_row(line, f"out: {path}, line {number}", self.key))
            key = self._key(rows[-1])
            if first.setdefault(key, number) != number:
                raise ValueError(
                    f"out: {path}, line {number}: says again what line {first[key]} says, {_short(key)}, as where two processes "
                    "wrote to one folder; wanted a new folder"
                )
        return rows

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes the new ones among `rows` to the disk."""
        fresh = [row for row in rows if self._key(row) not in self.done]
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in fresh)
        with (self.folder / ROWS).open("ab") as file:
            file.write(lines.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.rows += fresh
        self.done |= {self._key(row) for row in fresh}

    def drop_after(self, count: int) -> None:
        """Keeps only the first `count` rows."""
        if count == len(self.rows):
            return
        lines = (self.folder / ROWS).read_bytes().splitlines(keepends=True)
        with (self.folder / ROWS).open("r+b") as file:
            file.truncate(sum(map(len, lines[:count])))
        self.rows = self.rows[:count]
        self.done = {self._key(row) for row in self.rows}


def check_same_run(where: Path, before: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Refuses results that are there already, and are of another run than `manifest` says.

    Raises:
        ValueError: naming the first field that differs.
    """
    for name in dict.fromkeys((*manifest, *before)):
        old, new = before.get(name), manifest.get(name)
        if old != new and (name in before or name not in MAY_LACK):
            raise ValueError(
                f"out: {where} holds results of another run: {name} was {_short(old)} and is {_short(new)} now; wanted a "
                "new folder, or the same run again"
            )


def _row(line: bytes, where: str, key: Sequence[str]) -> dict[str, Any]:
    """The row in a line, which has the fields of the key."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not row.keys() >= set(key):
        raise ValueError(f"{where}: wanted a row with {', '.join(key)}, got {_short(row)}")
    return row


def read_run(
    folder: str | Path, argument: str, key: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Manifest and rows of a finished run; rows have the fields of the key.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() or not (folder / ROWS).is_file():
        raise FileNotFoundError(
            f"{argument}: {folder} has no {MANIFEST} and {ROWS}; wanted the --out of a run"
        )
    try:
        lines = (folder / ROWS).read_bytes().splitlines()
        rows = [_row(line, f"{ROWS}, line {number}", key) for number, line in enumerate(lines, 1)]
        return read_object(folder / MANIFEST, argument), rows
    except ValueError as error:
        why = str(error).removeprefix(f"{argument}: ")
        raise ValueError(f"{argument}: {folder} is damaged or unfinished: {why}") from None


def num_rows(count: int) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} row{'s' if count != 1 else ''}"


def digest(text: str) -> str:
    """16 hex digits of a text's SHA-256: what a manifest says of rows."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Writes the file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
