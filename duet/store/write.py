"""A folder is filled with a TopKStore: shard by shard, by one or several processes, through kills and full disks.

Every file is written beside its place, synced, and renamed; a shard's name is the hash of its bytes; the manifest that
says "complete" comes last. So a kill at any byte leaves whole shards, and at most a temporary file that nobody reads.

Must not know models, tokenizers, objectives or trainers.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from .read import DTYPES, FORMAT, MANIFEST, Entry, Provenance, Shard, read_manifest, seal_of

_INDEX_DTYPES = ((2**8, torch.uint8), (2**16, torch.uint16), (2**31, torch.int32), (2**63, torch.int64))
_VERSIONED = ("duet-kernels", "torch", "transformers", "tokenizers", "safetensors")


class StoreWriter:
    """Fills a folder, shard by shard; after a kill, a writer of the same provenance and rows continues.

    Several processes may write into one folder at once, each its own entries: one of them `begin`s and `finish`es.

    Args:
        folder: made if it is not there.
        provenance: of everything that will be added.
        rows: for each row's name the fingerprints of its entries, one per prefix. `finish` wants all of them.
        shard_entries, shard_bytes: a shard is written when either is reached: what a kill can cost.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        provenance: Provenance,
        rows: Mapping[str, Sequence[bytes]],
        shard_entries: int = 1024,
        shard_bytes: int = 1 << 26,
    ):
        self.folder, self.provenance = Path(folder), provenance
        self.rows = {name: list(prints) for name, prints in rows.items()}
        self.shard_entries, self.shard_bytes = shard_entries, shard_bytes
        self.wanted = dict.fromkeys(print_ for prints in self.rows.values() for print_ in prints)
        self.written: set[bytes] = set()
        self._pending: dict[bytes, Entry] = {}
        self._pending_bytes = 0

    def begin(self) -> None:
        """Claim the folder: an empty one gets an unfinished manifest, another one must have been made for the same.

        Raises:
            ValueError: it was made for something else; the field or row that differs is named.
            OSError: the folder cannot be written.
        """
        if self.folder.is_file():
            raise NotADirectoryError(f"teacher_store: {str(self.folder)!r} is a file, wanted a folder")
        self._kept("making the folder", lambda: self.folder.mkdir(parents=True, exist_ok=True))
        for left in self.folder.glob(".*.tmp"):  # of a process that was killed
            self._kept("clearing up", left.unlink)
        if not (self.folder / MANIFEST).exists():
            if any(self.folder.glob("[!.]*")) and not any(self.folder.glob("shard-*")):
                raise FileExistsError(f"teacher_store: {self.folder} is neither empty nor a store")
            self._write_manifest(complete=False, shards=[])
            return
        body = read_manifest(self.folder)
        body["provenance"].refuse_another(self.provenance)
        for name in {**body["rows"], **self.rows}:
            if body["rows"].get(name) != self.rows.get(name):
                raise ValueError(
                    f"teacher_store: rows: {name} is not what it was when {self.folder} was made; cache another dataset "
                    "into another folder"
                )

    def scan(self) -> list[bytes]:
        """Find what is written already; returns the fingerprints that are still wanted, in the order of the rows.

        A damaged shard counts as not written.

        Raises:
            ValueError: a shard was made for something else.
        """
        self.written = set()
        for shard in self._shards():
            if shard.whole:
                shard.check(self.provenance)
                self.written.update(shard.fingerprints())
        return [print_ for print_ in self.wanted if print_ not in self.written]

    def _shards(self) -> list[Shard]:
        return [Shard(path) for path in sorted(self.folder.glob("shard-*.safetensors"))]

    def add(self, print_: bytes, entry: Entry) -> None:
        """Queue one entry; a full shard is written at once.

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
        self._pending[print_] = Entry(entry.targets._replace(values=stored), entry.answer)
        self._pending_bytes += values.numel() * 8
        if len(self._pending) >= self.shard_entries or self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is queued as one shard."""
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
        self._kept(f"writing {name}", lambda: _write_atomically(self.folder / name, data))
        self.written.update(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Check every shard once more and write the finished manifest.

        Raises:
            RuntimeError: entries are missing.
        """
        missing = self.scan()
        if missing:
            raise RuntimeError(
                f"teacher_store: {len(missing)} of {len(self.wanted)} entries were not written"
            )
        shards = []
        for shard in self._shards():
            if shard.whole:
                shards.append({"file": shard.path.name, "bytes": shard.path.stat().st_size})
            else:
                self._kept("deleting a damaged shard", shard.path.unlink)  # its entries were made again
        body = read_manifest(self.folder)
        if not body["complete"] or [path.name for path in body["files"]] != [
            shard["file"] for shard in shards
        ]:
            self._write_manifest(complete=True, shards=shards)

    def _write_manifest(self, complete: bool, shards: list[dict[str, Any]]) -> None:
        body = {
            "format": FORMAT,
            "complete": complete,
            "provenance": dataclasses.asdict(self.provenance),
            "shards": shards,
            "versions": {name: _version(name) for name in _VERSIONED},
            "rows": {name: [print_.hex() for print_ in prints] for name, prints in self.rows.items()},
        }
        text = json.dumps(body | {"checksum": seal_of(body)}, indent=1)
        self._kept("writing the manifest", lambda: _write_atomically(self.folder / MANIFEST, text.encode()))

    def _kept(self, doing: str, function: Any) -> None:
        """Run `function`; its OSError also says what is safe and how to go on."""
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_atomically(path: Path, data: bytes) -> None:
    """`path` has all of `data`, or is what it was: written beside, synced, renamed, and the folder synced."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
