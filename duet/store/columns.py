"""A TopKStore as columns of log-probabilities in a `datasets.Dataset`, and back: how other trainers keep a teacher.

    axolotl   target_token_ids, target_logprobs [P, k], target_mask [P, k] (0: not a scored position)
    trl       teacher_topk_ids (-1: absent), teacher_topk_logprobs (-inf: absent) [P, k]

    log p = z / T - log-sum-exp of all z / T           (out)
    z' = T log p,   tail = log(1 - sum p)              (in: the logits up to a constant that is lost for good)

Imported stores are therefore marked as log-probabilities.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from duet_kernels import TopK

from ..names import check_one_of
from .read import Entry, Provenance, TopKStore, truncated

if TYPE_CHECKING:
    from datasets import Dataset

_TOO_MUCH = 1e-3  # sum p above 1 by more than rounding: these are no log-probabilities


class Style(NamedTuple):
    """The names of the columns."""

    ids: str
    logprobs: str
    mask: str  # empty: no column of that kind


STYLES = {
    "axolotl": Style("target_token_ids", "target_logprobs", "target_mask"),
    "trl": Style("teacher_topk_ids", "teacher_topk_logprobs", ""),
}


def write_columns(
    store: TopKStore, style: str = "axolotl", prompts: Mapping[bytes, Sequence[int]] | None = None
) -> "Dataset":
    """A `datasets.Dataset`, one row an entry: `fingerprint`, `answer_ids`, and the columns of the style.

    Args:
        store: to be read.
        style: `axolotl` or `trl`.
        prompts: token ids that stand before the scored positions, by fingerprint. With them a row also has `input_ids`
            (prompt and the scored answer) and its columns cover all of it: place i tells how token i is predicted.

    Raises:
        ValueError: an unknown style; or prompts, and an entry whose scored positions are not those of an answer in the store.
    """
    from datasets import Dataset

    check_one_of("style", style, STYLES)
    names = STYLES[style]

    def rows() -> Iterator[dict[str, Any]]:
        for entry_id in store:
            targets, answer = store.read(entry_id)
            logprobs = targets.values / targets.temperature - targets.logsumexp.unsqueeze(-1)
            ids, mask = targets.indices, torch.ones_like(targets.indices)
            row: dict[str, Any] = {"fingerprint": entry_id.hex(), "answer_ids": answer}
            if prompts is not None:
                row["input_ids"] = [*prompts[entry_id], *answer]
                if len(answer) != len(ids):
                    raise ValueError(
                        f"prompts: entry {entry_id.hex()} has {len(ids)} scored position(s) and {len(answer)} answer ids, so "
                        "its columns do not fit prompt and answer; wanted a store of the teacher's answers, or no prompts"
                    )
                before, k = len(prompts[entry_id]), ids.shape[-1]
                ids = torch.cat([ids.new_full((before, k), 0 if names.mask else -1), ids])
                mask = torch.cat([mask.new_zeros(before, k), mask])
                logprobs = torch.cat([logprobs.new_full((before, k), float("-inf")), logprobs])
            row |= {names.ids: ids.tolist(), names.logprobs: logprobs.tolist()}
            yield row | ({names.mask: mask.tolist()} if names.mask else {})

    return Dataset.from_list(list(rows()))


def read_columns(
    columns: Any, provenance: Provenance, entry_ids: Sequence[bytes]
) -> Iterator[tuple[bytes, Entry]]:
    """The entries of a dataset with the columns of a style; places that are masked or absent are left out.

    Args:
        columns: a `datasets.Dataset`, or a list of dicts.
        provenance: `k`, `temperature` and `vocab_size` of the entries.
        entry_ids: the fingerprints of the rows, in order; not used where there is a column `fingerprint`.

    Raises:
        TypeError, ValueError: naming column and row.
    """
    if isinstance(columns, Mapping):
        raise TypeError("columns: wanted a datasets.Dataset or a list of rows, got one mapping")
    if len(columns) == 0:
        raise ValueError("columns: wanted at least one row, got none")
    styles = [names for names in STYLES.values() if names.ids in columns[0] and names.logprobs in columns[0]]
    if not styles:
        wanted = " or ".join(f"{names.ids!r} and {names.logprobs!r}" for names in STYLES.values())
        raise ValueError(f"columns: wanted {wanted}, got {sorted(columns[0])}")
    if "fingerprint" not in columns[0] and len(columns) != len(entry_ids):
        raise ValueError(
            f"columns: wanted {len(entry_ids)} rows, one per prefix of every dataset row, got {len(columns)}"
        )
    for i in range(len(columns)):
        row, where = columns[i], f"columns[{i}]"
        for name in (styles[0].ids, styles[0].logprobs, "fingerprint"):
            if name in columns[0] and name not in row:
                raise ValueError(f"{where}: wanted {name!r}, as in columns[0], got {sorted(row)}")
        entry_id = _entry_id(row["fingerprint"], where) if "fingerprint" in row else entry_ids[i]
        targets = _topk(row, styles[0], provenance, where)
        yield entry_id, Entry(targets, _answer(row.get("answer_ids"), provenance, where))


def _entry_id(text: Any, where: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: wanted hexadecimal digits in 'fingerprint', got {text!r}") from None


def _answer(ids: Any, provenance: Provenance, where: str) -> list[int]:
    try:
        answer = [index(token) for token in ids or ()]
    except TypeError:
        raise ValueError(f"{where}: wanted token ids in 'answer_ids', got {ids!r:.60}") from None
    if not all(0 <= token < provenance.vocab_size for token in answer):
        raise ValueError(
            f"{where}: wanted ids below {provenance.vocab_size} in 'answer_ids', got {ids!r:.60}"
        )
    most = provenance.max_scored if provenance.answers == "teacher" else None
    if most is not None and len(answer) > most:
        raise ValueError(
            f"{where}: wanted at most {most} ids in 'answer_ids', as many as are scored, got {len(answer)}"
        )
    return answer


def _topk(row: Mapping[str, Any], names: Style, provenance: Provenance, where: str) -> TopK:
    """The k largest at every scored position, descending, each id once; fewer than k are filled up with absent slots."""
    try:
        ids, logprobs = torch.tensor(row[names.ids]), torch.tensor(row[names.logprobs], dtype=torch.float64)
        mask = torch.tensor(row[names.mask]).bool() if names.mask in row else torch.ones_like(logprobs).bool()
    except (TypeError, ValueError, RuntimeError) as error:  # of ids beyond 64 bits
        raise ValueError(
            f"{where}: wanted [positions, k] in {names.ids!r} and {names.logprobs!r}: {error}"
        ) from None
    if ids.dim() != 2 or not ids.shape == logprobs.shape == mask.shape or ids.is_floating_point():
        raise ValueError(
            f"{where}: wanted integers {names.ids!r} and numbers {names.logprobs!r} of one shape [positions, k], got "
            f"{list(ids.shape)} and {list(logprobs.shape)}"
        )
    present = mask & (ids >= 0) & (logprobs > float("-inf"))
    if logprobs.isnan().any() or (ids[present] >= provenance.vocab_size).any():
        raise ValueError(f"{where}: wanted ids below {provenance.vocab_size} and no NaN")
    scored = present.any(-1)
    ids, logprobs = ids.long()[scored], logprobs.masked_fill(~present, float("-inf"))[scored]
    # Equal ones stay in the order in which they came: where values were rounded, it alone tells which was the larger.
    logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    repeated = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril(-1).any(-1)  # a larger one is before it
    logprobs, order = logprobs.masked_fill(repeated, float("-inf")).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order).masked_fill(logprobs == float("-inf"), 0)
    total = logprobs.logsumexp(-1)
    if (total > _TOO_MUCH).any():
        raise ValueError(
            f"{where}: wanted log-probabilities in {names.logprobs!r}, got probabilities that sum to "
            f"{float(total.max().exp()):.4g}"
        )
    k, temperature = provenance.k, provenance.temperature
    tail = torch.log(-torch.expm1(total.clamp(max=0)))
    kept: Any = truncated(TopK(temperature * logprobs, ids, tail, temperature), min(k, ids.shape[-1]))
    absent = k - kept.values.shape[-1]
    values = pad(kept.values, (0, absent), value=float("-inf"))
    return TopK(values.float(), pad(kept.indices, (0, absent)), kept.tail_logsumexp.float(), temperature)
