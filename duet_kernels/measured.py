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
# Types of JSON for those of a field; all others are lists of integers.
_JSON: dict[Any, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,)}


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
        return all(
            most == 0 if size is None else least <= size and (most == 0 or size <= most)
            for size, (least, most) in ((tokens, self.tokens), (k, self.k))
        )


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

    def require(right: bool, place: str, wanted: str, got: Any) -> None:
        if not right:
            raise ValueError(f"{path.name}{place}: wanted {wanted}, got {got!r}")

    def entries(name: str, kind: Any) -> tuple[Any, ...]:
        types, found = get_type_hints(kind), []
        for i, fields in enumerate(content[name]):
            place = f": {name}[{i}]"
            right = isinstance(fields, dict) and fields.keys() == types.keys()
            require(right, place, f"the fields {sorted(types)}", fields)
            for field, wanted in types.items():
                value = fields[field]
                of_integers = isinstance(value, list) and all(type(x) is int for x in value)
                right = type(value) in _JSON[wanted] if wanted in _JSON else of_integers
                require(right, f"{place}.{field}", str(wanted), value)
            entry = kind(**{n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()})
            if name == "exceptions":
                for field in ("tokens", "k"):
                    limits = getattr(entry, field)
                    right = len(limits) == 2 and limits[0] >= 0 and (limits[1] == 0 or limits[0] <= limits[1])
                    require(right, f"{place}.{field}", "the least and the most (0: however many)", limits)
                right = 0 < entry.chunked_ms < entry.triton_ms
                require(right, place, "a chunked_ms above 0 and below triton_ms", entry)
            found.append(entry)
        return tuple(found)

    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    names = ["exceptions", "format", "tiles"]
    right = isinstance(content, dict) and sorted(content) == names and content["format"] == FORMAT
    got = content if not isinstance(content, dict) else f"{sorted(content)}, format {content.get('format')}"
    require(right, "", f"the fields {names} and format {FORMAT}", got)
    return Measured(entries("exceptions", Slower), entries("tiles", Tile))


MEASURED = load()
