"""The cached teacher on disk: for every (query, prefix) the teacher's top-k logits at each scored position.

    folder/
      manifest.json                    what determines the logits (Provenance), the rows, the shards; with a checksum
      shard-<blake2b>.safetensors      P positions of E entries, side by side

    shard: fingerprints [E, 16]  offsets [E + 1]  values [P, K]  indices [P, K]  tail_logsumexp [P]
           answer_offsets [E + 1]  answers [A]

An entry is found by its **fingerprint**, a hash of the token ids that teacher and student read, never by its position:
so a store cannot be read for the wrong rows. A shard is named by the hash of its own bytes: a wrong name shows damage. `duet.store.write` fills a folder; this room knows the format and reads it.

Nothing unpickles.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duet_kernels import TopK

from ..model.hashes import json_hash as seal_of
from ..model.weights import older_weights
from ..names import check_one_of, expanded

FORMAT = "duet-topk-store/1"
MANIFEST = "manifest.json"
LOGITS, LOG_PROBABILITIES = "logits", "log-probabilities"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAY_LACK = ("config", "autocast")  # fields of Provenance that a store may not have: nothing to compare
_SHARD_NAME = re.compile(r"shard-[0-9a-f]{32}\.safetensors")
_AGAIN = "run `duet cache` again, it makes that part anew and keeps the rest"


@dataclass(frozen=True)
class Provenance:
    """Everything that determines the stored logits. Stores with equal provenance hold the same numbers for the same rows.

    Attributes:
        model: name or folder of the teacher; information for people, never compared.
        architecture, model_dtype, weights: its class, its dtype, and a hash of its weights (adapters left out).
        tokenizer, chat_template: hashes; the template's is of the text.
        chat_template_kwargs, plain_template: how conversations become text.
        prefixes: the steering prefixes, unfilled.
        seed: for the subjects in the prefixes of retain rows, one fixed subject per row.
        positions: `first`, `first_n` or `answer`.
        max_scored: most scored positions of a row; None: all of its answer.
        answers: whose answer the positions follow: `none`, `dataset` or `teacher`.
        k, temperature: of the TopK.
        vocab_size, softcap, scale: of the teacher's LM head.
        dtype: of the stored values; the tails are always fp32.
        values: `logits` or `log-probabilities`.
        config: a hash of what the teacher's configuration says of its logits; None in stores of earlier versions.
        autocast: `bfloat16`, `float16` or `none`; None in stores of earlier versions, and of teachers elsewhere.
    """

    model: str
    architecture: str
    model_dtype: str
    weights: str
    tokenizer: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    plain_template: str
    prefixes: list[str]
    seed: int
    positions: str
    max_scored: int | None
    answers: str
    k: int
    temperature: float
    vocab_size: int
    softcap: float | None
    scale: float
    dtype: str = "float32"
    values: str = LOGITS
    config: str | None = None
    autocast: str | None = None

    def __post_init__(self) -> None:
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("values", self.values, (LOGITS, LOG_PROBABILITIES))

    @property
    def seal(self) -> str:
        """A hash of everything that is compared; it is written into every shard."""
        body = dataclasses.asdict(dataclasses.replace(self, model=""))
        return seal_of({k: v for k, v in body.items() if v is not None or k not in MAY_LACK})

    def refuse_another(self, wanted: "Provenance", ignoring: Sequence[str] = ()) -> None:
        """Compares field by field with the provenance that is wanted now.

        Raises:
            ValueError: naming the first field that differs, what the store has and what is wanted.
        """
        for field in dataclasses.fields(self):
            stored, now = getattr(self, field.name), getattr(wanted, field.name)
            if field.name not in ignoring and older_weights(stored, now):
                raise ValueError(
                    f"teacher_store: {field.name}: the store was made by an older version of duet, whose hash of the "
                    "weights cannot be compared with today's. Cache the teacher anew into another folder; or, if you "
                    "know that it was this model, set teacher_store_same_model to false"
                )
            if stored is None and field.name in MAY_LACK:
                continue
            if stored != now and field.name not in ("model", *ignoring):
                raise ValueError(
                    f"teacher_store: {field.name}: the store was made with {stored!r}, this run has {now!r}. "
                    "Change it back, or cache the teacher anew into another folder"
                )


class Entry(NamedTuple):
    """The teacher's targets `[P, K]` for one query under one prefix and, if positions follow it, its answer."""

    targets: TopK
    answer: list[int]


def fingerprint(*sequences: Sequence[int]) -> bytes:
    """A hash of 16 bytes of sequences of token ids and their lengths: no two splits of the same ids agree.

    Example:
        >>> fingerprint([1, 2], [3]) == fingerprint([1], [2, 3])
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return digest.digest()


def truncated(targets: TopK, k: int) -> TopK:
    """The k largest of a TopK; the dropped logits are added to the tail by `logaddexp`, exactly.

    Example:
        >>> whole = TopK(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[7, 5, 6]]), torch.tensor([0.5]))
        >>> truncated(whole, 1).logsumexp.allclose(whole.logsumexp)
        True
    """
    if k == targets.values.shape[-1]:
        return targets
    tail: Any = targets.tail_logsumexp
    dropped = torch.logsumexp(targets.values[..., k:] / targets.temperature, -1)
    return TopK(
        targets.values[..., :k],
        targets.indices[..., :k],
        torch.logaddexp(tail, dropped),
        targets.temperature,
    )


# -- files -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest: undamaged, of this format, complete, and naming no file outside its folder."""
    path = folder / MANIFEST
    advice = f"delete it and run `duet cache` again: shards in {folder} that are whole will be kept"
    try:
        body = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            error.errno, "teacher_store: wanted a folder written by `duet cache`, but there is no", str(path)
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"teacher_store: {path} is damaged, it is not JSON ({error}); {advice}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        got = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise ValueError(f"teacher_store: format: {path} has {got!r}, this version reads {FORMAT!r}")
    checksum = body.pop("checksum", None)
    if checksum != seal_of(body):
        raise ValueError(
            f"teacher_store: {path} is damaged: its checksum does not match its content; {advice}"
        )
    try:
        names = [shard["file"] for shard in body["shards"]]
        provenance = Provenance(**body["provenance"])
        rows = {name: [bytes.fromhex(each) for each in entry_ids] for name, entry_ids in body["rows"].items()}
        complete = body["complete"] is True
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"teacher_store: {path} lacks or misnames a field: {error}") from None
    for name in names:
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"teacher_store: shards: {path} names {name!r}, wanted a shard in its own folder"
            )
    files = [folder / name for name in names]
    return {"complete": complete, "files": files, "provenance": provenance, "rows": rows}


# -- reading ---------------------------------------------------------------------------------------------------------


class Shard:
    """One file, mapped into memory at its first use in each process."""

    def __init__(self, path: Path):
        self.path = path
        self._tensors: dict[str, Tensor] | None = None
        self.seal: str | None = None

    def __getstate__(self):
        return {"path": self.path, "_tensors": None, "seal": self.seal}

    @property
    def whole(self) -> bool:
        """Whether the hash of its bytes is the one in its name."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return self.path.name == f"shard-{digest.hexdigest()}.safetensors"

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is None:
            try:
                with safe_open(self.path, framework="pt") as file:
                    self.seal = (file.metadata() or {}).get("provenance")
                    self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"teacher_store: {self.path} is damaged: {error}") from None
        return self._tensors

    def fingerprints(self) -> list[bytes]:
        return [row.tobytes() for row in self.tensors["fingerprints"].numpy()]

    def check(self, provenance: Provenance) -> None:
        """Checks provenance, shapes, dtypes and ids, so that damage is found here and not as a wrong loss.

        Raises:
            ValueError: naming the file.
        """
        tensors = self.tensors
        if self.seal != provenance.seal:
            raise ValueError(
                f"teacher_store: {self.path} was made for something else than the manifest beside it says; cache into "
                "another folder, or delete that file"
            )
        try:
            good = self._fits(tensors, provenance)
        except (KeyError, RuntimeError, ValueError, IndexError):
            good = False
        if not good:
            raise ValueError(f"teacher_store: {self.path}: its tensors are not what the manifest says")

    @staticmethod
    def _fits(tensors: dict[str, Tensor], provenance: Provenance) -> bool:
        entries, (positions, k) = len(tensors["fingerprints"]), tensors["values"].shape
        ids = tensors["indices"].numpy()
        ends = [(tensors["offsets"], positions), (tensors["answer_offsets"], len(tensors["answers"]))]
        return (
            tensors["indices"].shape == (positions, k) == (positions, provenance.k)
            and tensors["values"].dtype == DTYPES[provenance.dtype]
            and tensors["tail_logsumexp"].shape == (positions,)
            and tensors["fingerprints"].shape == (entries, 16)
            and (ids.size == 0 or bool(ids.min() >= 0 and ids.max() < provenance.vocab_size))
            and all(
                end.shape == (entries + 1,)
                and end[0] == 0
                and end[-1] == total
                and bool((end.diff() >= 0).all())
                for end, total in ends
            )
        )

    def read(self, i: int, temperature: float) -> Entry:
        tensors = self.tensors
        start, end = tensors["offsets"][i : i + 2].tolist()
        answer_start, answer_end = tensors["answer_offsets"][i : i + 2].tolist()
        targets = TopK(
            tensors["values"][start:end].float(),
            tensors["indices"][start:end].long(),
            # Not a view: the map may be closed before the batch is used.
            tensors["tail_logsumexp"][start:end].clone(),
            temperature,
        )
        return Entry(targets, tensors["answers"][answer_start:answer_end].tolist())


class TopKStore:
    """A finished store, opened for reading; its shards are mapped into memory, not loaded.

    Args:
        folder: written by `duet cache`. Nothing in it is changed.
        verify: hash every shard and compare (about a second per GB). False only for a store that was verified before.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: not finished, damaged (naming the file), or not a store.

    Example:
        >>> store = TopKStore(store_folder)
        >>> entry = store.read(next(iter(store)))
        >>> entry.targets.values.shape[-1] == store.provenance.k
        True
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True):
        self.folder = Path(expanded("teacher_store", folder))
        body = read_manifest(self.folder)
        if not body["complete"]:
            raise ValueError(
                f"teacher_store: {self.folder} is not finished; run `duet cache` again, it continues where it stopped"
            )
        self.provenance: Provenance = body["provenance"]
        self.rows: dict[str, list[bytes]] = body["rows"]
        self._places: dict[bytes, tuple[Shard, int]] = {}
        for path in body["files"]:
            shard = Shard(path)
            if not path.exists():
                raise FileNotFoundError(
                    errno.ENOENT, f"teacher_store: a shard is missing; {_AGAIN}", str(path)
                )
            if verify:
                if not shard.whole:
                    raise ValueError(f"teacher_store: {path} is damaged, its checksum is another; {_AGAIN}")
                shard.check(self.provenance)
            self._places |= {entry_id: (shard, i) for i, entry_id in enumerate(shard.fingerprints())}
        lost = {entry_id for entry_ids in self.rows.values() for entry_id in entry_ids} - self._places.keys()
        if lost:
            raise ValueError(f"teacher_store: {self.folder}: {len(lost)} entries are in no shard; {_AGAIN}")

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._places)

    def __contains__(self, entry_id: object) -> bool:
        return entry_id in self._places

    def read(self, entry_id: bytes, k: int | None = None) -> Entry:
        """The entry of a fingerprint: values and tails fp32, indices int64, on the CPU; only the k largest if k is given.

        Raises:
            KeyError: there is none.
        """
        shard, i = self._places[entry_id]
        targets, answer = shard.read(i, self.provenance.temperature)
        return Entry(targets if k is None else truncated(targets, k), answer)
