"""What was measured on GPUs, as data that is reviewed like code: choices of an implementation, and tiles.

`triton/measured.json` is written by `make tune` (`benchmarks/tune.py`) and read once, here. Nothing is measured while
a program runs. Each entry carries where it comes from. What is not understood is refused by name, never passed over: a
table that is silently ignored looks like a slow GPU.

A leaf: no torch, no triton. Must not know what a tile means (`triton/tiles.py` checks those against its tables) nor
how a choice is made (`dispatch.py`).
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple, get_type_hints

PATH = pathlib.Path(__file__).parent / "triton" / "measured.json"
FORMAT = 1
KINDS = ("triton", "chunked")


class Choice(NamedTuple):
    """Which implementation was faster, for calls of up to `tokens` tokens and `k` ids; 0: however many."""

    op: str
    arch: int  # compute capability, 90 for sm_90
    itemsize: int  # bytes of an element of the hidden states
    tokens: int
    k: int
    impl: str
    triton_ms: float
    chunked_ms: float
    shape: str  # at which both were measured
    device: str
    commit: str

    @property
    def reason(self) -> str:
        times = {"triton": self.triton_ms, "chunked": self.chunked_ms}
        other = KINDS[1 - KINDS.index(self.impl)]
        return (
            f"measured on {self.device} (commit {self.commit}): {self.impl} {times[other] / times[self.impl]:.1f} x "
            f"faster than {other} at {self.shape}"
        )

    def takes(self, tokens: int | None, k: int | None) -> bool:
        """Whether a call of that size belongs to it; a size that nobody gave belongs to the largest."""
        return _within(tokens, self.tokens) and _within(k, self.k)


def _within(size: int | None, limit: int) -> bool:
    return limit == 0 or (size is not None and size <= limit)


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
    choices: tuple[Choice, ...] = ()
    tiles: tuple[Tile, ...] = ()


def load(path: pathlib.Path = PATH) -> Measured:
    """The file's entries, in the order in which they are looked up: the smallest limits first.

    Raises:
        ValueError: naming the file, the entry, what came and what was wanted.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    wanted = {"format", "choices", "tiles"}
    if not isinstance(content, dict) or set(content) != wanted or content["format"] != FORMAT:
        raise ValueError(f"{path.name}: wanted the fields {sorted(wanted)} and format {FORMAT}")
    choices = [
        _entry(Choice, fields, f"{path.name}: choices[{i}]") for i, fields in enumerate(content["choices"])
    ]
    tiles = [_entry(Tile, fields, f"{path.name}: tiles[{i}]") for i, fields in enumerate(content["tiles"])]
    for i, choice in enumerate(choices):
        if choice.impl not in KINDS:
            raise ValueError(f"{path.name}: choices[{i}].impl: wanted one of {KINDS}, got {choice.impl!r}")
        if min(choice.triton_ms, choice.chunked_ms) <= 0:
            raise ValueError(f"{path.name}: choices[{i}]: wanted times above 0, got {choice}")
    choices.sort(key=lambda choice: (choice.tokens or float("inf"), choice.k or float("inf")))
    return Measured(tuple(choices), tuple(tiles))


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
