"""What was measured on GPUs, as data that is reviewed like code: calls that `auto` gives to `chunked`, and tiles.

`triton/measured.json` is written by `make tune` (`benchmarks/tune.py`) and read once, here. Nothing is measured while
a program runs. Each entry carries where it comes from. What is not understood is refused by name, never passed over: a
table that is silently ignored looks like a slow GPU.

A leaf: no torch, no triton. What a tile means is checked in `triton/tiles.py`; who follows an exception is `dispatch.py`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple, get_type_hints

PATH = pathlib.Path(__file__).parent / "triton" / "measured.json"
FORMAT = 2


class Slower(NamedTuple):
    """An exception: `chunked` beat the Triton kernel, in calls of a size from the least to the most; 0: however many."""

    op: str
    arch: int  # compute capability, 90 for sm_90
    itemsize: int  # bytes of an element of the hidden states
    tokens: tuple[int, ...]  # least and most
    k: tuple[int, ...]
    triton_ms: float
    chunked_ms: float
    shape: str  # at which both were measured
    device: str
    commit: str

    @property
    def reason(self) -> str:
        return (
            f"measured on {self.device} (commit {self.commit}): {self.triton_ms / self.chunked_ms:.1f} x faster than "
            f"its Triton kernel at {self.shape}"
        )

    def takes(self, tokens: int | None, k: int | None) -> bool:
        """Whether a call of that size belongs to it; a size that nobody gave is a large one."""
        return _within(tokens, *self.tokens) and _within(k, *self.k)


def _within(size: int | None, least: int, most: int) -> bool:
    return most == 0 if size is None else least <= size and (most == 0 or size <= most)


class Tile(NamedTuple):
    """The fastest value of one entry of a table in `triton/tiles.py`; `key` begins with the architecture."""

    table: str
    key: tuple[int, ...]
    value: tuple[int, ...]
    ms: float
    default_ms: float
    shape: str
    device: str
    commit: str


class Measured(NamedTuple):
    exceptions: tuple[Slower, ...] = ()
    tiles: tuple[Tile, ...] = ()


def load(path: pathlib.Path = PATH) -> Measured:
    """The file's entries.

    Raises:
        ValueError: naming the file, the entry, what came and what was wanted.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    wanted = {"format", "exceptions", "tiles"}
    if not isinstance(content, dict) or set(content) != wanted or content["format"] != FORMAT:
        raise ValueError(f"{path.name}: wanted the fields {sorted(wanted)} and format {FORMAT}")
    exceptions, tiles = (
        [_entry(kind, fields, f"{path.name}: {name}[{i}]") for i, fields in enumerate(content[name])]
        for name, kind in (("exceptions", Slower), ("tiles", Tile))
    )
    for i, entry in enumerate(exceptions):
        for field in ("tokens", "k"):
            limits = getattr(entry, field)
            if len(limits) != 2 or limits[0] < 0 or (limits[1] and limits[1] < limits[0]):
                raise ValueError(
                    f"{path.name}: exceptions[{i}].{field}: wanted the least and the most (0: however many), got {limits}"
                )
        if not 0 < entry.chunked_ms < entry.triton_ms:
            raise ValueError(
                f"{path.name}: exceptions[{i}]: wanted a chunked_ms above 0 and below triton_ms, got {entry}"
            )
    return Measured(tuple(exceptions), tuple(tiles))


def _entry(kind: Any, fields: Any, name: str) -> Any:
    """A NamedTuple of the fields, each of its annotated type."""
    if not isinstance(fields, dict) or set(fields) != set(kind._fields):
        got = sorted(fields) if isinstance(fields, dict) else fields
        raise ValueError(f"{name}: wanted the fields {sorted(kind._fields)}, got {got}")
    made = {}
    for field, wanted in get_type_hints(kind).items():
        value = fields[field]
        if wanted not in (int, float, str):
            value = tuple(value) if isinstance(value, list) else value
            right = isinstance(value, tuple) and all(type(x) is int for x in value)
        else:
            right = type(value) is wanted or (wanted is float and type(value) is int)
        if not right:
            raise ValueError(f"{name}.{field}: wanted {wanted}, got {value!r}")
        made[field] = value
    return kind(**made)


MEASURED = load()
