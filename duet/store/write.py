"""Writes a TopKStore shard by shard, from one or several processes; a killed process or a full disk loses little.

Every file is written under a temporary name, synced, and renamed; a shard's name is the hash of its bytes; the manifest
that says "complete" is written last. So a kill at any byte leaves whole shards and at most one temporary file.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..extras import version_of
from ..folders import write_atomically
from ..names import expanded
from .read import DTYPES, FORMAT, MANIFEST, MAY_LACK, Entry, Provenance, Shard, read_manifest, seal_of

_SHARD_BYTES = 1 << 26
_INDEX_DTYPES = ((2**8, torch.uint8), (2**16, torch.uint16), (2**31, torch.int32), (2**63, torch.int64))
_TEMPORARY = re.compile(r"\.(manifest\.json|shard-[0-9a-f]{32}\.safetensors)\.[0-9a-f]{32}\.tmp")
_VERSIONED = ("duet-kernels", "torch", "transformers", "tokenizers", "safetensors")


class StoreWriter:
    """Fills a folder shard by shard; a writer with the same provenance and rows continues where another one stopped.

    Several processes may write into one folder at once, each its own entries: one of them `begin`s and `finish`es.

    Args:
        folder: created if it does not exist.
        provenance: of everything that will be added.
        rows: for each row's name the fingerprints of its entries, one per prefix. `finish` wants all of them.
        shard_entries: a shard is written when it has so many, or 64 MiB; a kill loses at most one shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        provenance: Provenance,
        rows: Mapping[str, Sequence[bytes]],
        shard_entries: int = 1024,
    ):
        self.folder, self.provenance = Path(expanded("folder", folder)), provenance
        self.rows = {name: list(entry_ids) for name, entry_ids in rows.items()}
        self.shard_entries = shard_entries
        self.wanted = dict.fromkeys(entry_id for entry_ids in self.rows.values() for entry_id in entry_ids)
        self.written: set[bytes] = set()
        self._pending: dict[bytes, Entry] = {}
        self._pending_bytes = 0

    def begin(self) -> None:
        """Claims the folder: an empty one gets an unfinished manifest, a store must have the same provenance and rows.

        Raises:
            ValueError: it was made for something else; the field or row that differs is named.
            OSError: the folder cannot be written.
        """
        if self.folder.is_file():
            raise NotADirectoryError(f"teacher_store: {str(self.folder)!r} is a file, wanted a folder")
        self._safely("making the folder", lambda: self.folder.mkdir(parents=True, exist_ok=True))
        begun = (self.folder / MANIFEST).exists()
        if begun:
            self._agree(read_manifest(self.folder))
        elif any(self.folder.glob("[!.]*")) and not any(self.folder.glob("shard-*")):
            raise FileExistsError(f"teacher_store: {self.folder} is neither empty nor a store")
        for left in self.folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(left.name):  # of a process that was killed
                self._safely("clearing up", left.unlink)
        if not begun:
            self._write_manifest([], complete=False)

    def _agree(self, body: dict[str, Any]) -> None:
        body["provenance"].refuse_another(self.provenance)
        # A store of an earlier version stays one: its shards are sealed without these fields.
        lacked = {name: getattr(body["provenance"], name) for name in MAY_LACK}
        self.provenance = dataclasses.replace(self.provenance, **lacked)
        for name in {**body["rows"], **self.rows}:
            if body["rows"].get(name) != self.rows.get(name):
                raise ValueError(
                    f"teacher_store: rows: {name} is not what it was when {self.folder} was made; cache another dataset "
                    "into another folder"
                )

    def scan(self) -> list[bytes]:
        """Finds what is written already; returns the fingerprints that are missing, in the order of the rows.

        A damaged shard counts as not written.

        Raises:
            ValueError: a shard was made for something else.
        """
        return self._look_through()[0]

    def _look_through(self) -> tuple[list[bytes], list[Path], list[Path]]:
        """(fingerprints that are missing, undamaged shards, damaged ones); `written` is what the undamaged hold."""
        self.written, whole, damaged = set(), [], []
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            shard = Shard(path)
            if not shard.whole:
                damaged.append(path)
                continue
            shard.check(self.provenance)
            self.written.update(shard.fingerprints())
            whole.append(path)
        missing = [entry_id for entry_id in self.wanted if entry_id not in self.written]
        return missing, whole, damaged

    def add(self, entry_id: bytes, entry: Entry) -> None:
        """Queues one entry; a full shard is written at once.

        Raises:
            ValueError: a value that the storage dtype cannot hold, or a NaN.
            OSError: the shard could not be written. What was written before is kept.
        """
        values = entry.targets.values
        stored = values.to(DTYPES[self.provenance.dtype])
        if (stored.isnan() | (stored.isinf() & ~values.isinf())).any():
            raise ValueError(
                f"dtype: a teacher's logit of {float(values.abs().amax()):.6g} does not fit {self.provenance.dtype}"
                if not values.isnan().any()
                else "teacher: it gave NaN logits; they are not written"
            )
        self._pending[entry_id] = Entry(entry.targets._replace(values=stored), entry.answer)
        self._pending_bytes += values.numel() * 8
        if len(self._pending) >= self.shard_entries or self._pending_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the queued entries as one shard."""
        if not self._pending:
            return
        entries = list(self._pending.values())
        index_dtype = next(dtype for size, dtype in _INDEX_DTYPES if self.provenance.vocab_size <= size)

        def joined(field: str, dtype: torch.dtype) -> Tensor:
            return torch.cat(
                [getattr(entry.targets, field).to("cpu", dtype) for entry in entries]
            ).contiguous()

        data = save(
            {
                "fingerprints": torch.from_numpy(
                    np.frombuffer(b"".join(self._pending), dtype=np.uint8).copy().reshape(-1, 16)
                ),
                "offsets": _ends([len(entry.targets.values) for entry in entries]),
                "values": joined("values", DTYPES[self.provenance.dtype]),
                "indices": joined("indices", index_dtype),
                "tail_logsumexp": joined("tail_logsumexp", torch.float32),
                "answer_offsets": _ends([len(entry.answer) for entry in entries]),
                "answers": torch.tensor([t for entry in entries for t in entry.answer], dtype=torch.int32),
            },
            metadata={"provenance": self.provenance.seal},
        )
        name = f"shard-{hashlib.blake2b(data, digest_size=16).hexdigest()}.safetensors"
        self._safely(f"writing {name}", lambda: write_atomically(self.folder / name, data))
        self.written.update(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Writes what is queued, checks every shard once more and writes the finished manifest.

        Raises:
            RuntimeError: entries are missing.
        """
        self.flush()
        missing, whole, damaged = self._look_through()
        if missing:
            raise RuntimeError(
                f"teacher_store: {len(missing)} of {len(self.wanted)} entries were not written"
            )
        for path in damaged:
            self._safely("deleting a damaged shard", path.unlink)  # its entries were made again
        body = read_manifest(self.folder)
        if not body["complete"] or body["files"] != whole:
            self._write_manifest(whole, complete=True)

    def _write_manifest(self, shards: list[Path], complete: bool) -> None:
        body = {
            "format": FORMAT,
            "complete": complete,
            "provenance": dataclasses.asdict(self.provenance),
            "shards": [{"file": path.name, "bytes": path.stat().st_size} for path in shards],
            "versions": {name: version_of(name) for name in _VERSIONED},
            "rows": {
                name: [entry_id.hex() for entry_id in entry_ids] for name, entry_ids in self.rows.items()
            },
        }
        text = json.dumps(body | {"checksum": seal_of(body)}, indent=1)
        self._safely("writing the manifest", lambda: write_atomically(self.folder / MANIFEST, text.encode()))

    def _safely(self, doing: str, function: Any) -> None:
        """Runs `function`; an OSError also says what is saved and how to continue."""
        try:
            function()
        except OSError as error:
            raise OSError(
                error.errno,
                f"teacher_store: {error.strerror} while {doing}; the {len(self.written)} of {len(self.wanted)} entries "
                "written so far are kept, and the same command continues after them",
                str(self.folder),
            ) from error


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
