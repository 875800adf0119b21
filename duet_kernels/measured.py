"""What was measured on GPUs, as data that is reviewed like code: calls that `auto` gives to `chunked`, and tiles.

`triton/measured.json` is written by `make tune` (`benchmarks/tune.py`) and read once, here. Nothing is measured while
a program runs. Each entry carries where it comes from. Another format, and fields that are not known, are refused; the
values in the file that is shipped are checked by `tests/test_gpu_gate.py`.

A leaf: no torch, no triton. What a tile means is checked in `triton/tiles.py`; who follows an exception is `dispatch.py`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

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
        """Whether a call of that size belongs to it. A size of None counts as large."""
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
        ValueError: the file has another format.
        TypeError: an entry has other fields.
    """
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path.name}: wanted format {FORMAT}, got {content.get('format')!r}")

    def entries(kind: Any, name: str) -> tuple[Any, ...]:
        return tuple(
            kind(**{field: tuple(x) if isinstance(x, list) else x for field, x in fields.items()})
            for fields in content[name]
        )

    return Measured(entries(Slower, "exceptions"), entries(Tile, "tiles"))


MEASURED = load()
