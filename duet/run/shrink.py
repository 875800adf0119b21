"""`duet shrink`: a trained adapter is made smaller, if the model then keeps more and still forgets.

    W + s (alpha / r) B A

A training changes more than it was made for: some answers about neighbours change, too. The adapter is tried at several sizes s <= 1.
At each of them the forget rows are asked plainly (greedily, and for drawn answers), behind reverse prompts and with forced
openings, and the rows that are to be kept are asked plainly. Only rows that the base tells count. Choose by other wordings than
those of the training, and report on others again.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..data.prompts import PROMPTING, Prompting
from ..data.sources import read_table
from ..evaluation.attacks.attacks import DIRECT, by_variant
from ..evaluation.attacks.rows import AttackRow, read_attack_rows
from ..evaluation.attacks.target import AttackOptions, Outcome, Outcomes, Target
from ..evaluation.journal import Progress
from ..evaluation.metrics import percent
from ..evaluation.models import load
from ..evaluation.steering import STILL_TOLD, counted, refuses, share_of, short, shown
from ..folders import write_named, written
from ..model.adapters import holds_adapter
from ..model.shrinking import AdapterSize
from ..output.record import RECORD, read_record

SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
MOST = 0.1  # of the forget rows: so many may come back
SAMPLING, OTHERS = "sampling", ("reverse_prompt", "prefill")
Share = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """The model with its adapter at one size. A share is {"share", "low", "high", "rows"}, with a 95 % interval.

    Attributes:
        size: s.
        told: attack -> the share of the forget rows that its worst variant brings back.
        refused: share of the forget rows that are declined when they are asked plainly.
        kept: share of the rows to be kept that are told.
        unjudged: share of the forget rows that no answer tells and whose answers could not be judged (cut at the limit, empty): of
            the attack with most of them. They count as not told.
    """

    size: float
    told: dict[str, Share]
    refused: Share
    kept: Share
    unjudged: float = 0.0

    @property
    def worst(self) -> Share:
        """Of the attack that brings back the largest share of its rows."""
        return max(self.told.values(), key=lambda share: share["share"])


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` found.

    Attributes:
        tried: from the full size down to the first that tells more than is allowed.
        most: the share of the forget rows that an attack may bring back; more, if it does at full size.
    """

    tried: list[Tried]
    most: float

    def allows(self, size: Tried) -> bool:
        """Whether no attack brings back more than `most`, or more than the same attack does at full size."""
        full = self.tried[0].told
        return all(told["share"] <= max(self.most, full[name]["share"]) for name, told in size.told.items())

    @property
    def best(self) -> Tried:
        """Of the sizes that tell no more than is allowed, the one that keeps most; of equal ones the largest."""
        fine = [each for each in self.tried if self.allows(each)]
        return max(fine, key=lambda each: (each.kept["share"], each.size))


def check_sizes(sizes: Sequence[float], most: float) -> list[float]:
    """The sizes, the largest first; 1 is always among them.

    Raises:
        ValueError: one of them is not above 0 and at most 1, or `most` is no share below 1.
    """
    for size in sizes:
        if not 0 < size <= 1:
            raise ValueError(f"sizes: wanted numbers above 0 and at most 1, got {size}")
    if not 0 <= most < 1:
        raise ValueError(f"most: wanted a share of at least 0 and below 1, got {most}")
    return sorted({1.0, *sizes}, reverse=True)


def shrink(
    adapter: AdapterSize,
    tokenizer: Any,
    forget: Sequence[AttackRow],
    retain: Sequence[AttackRow],
    *,
    sizes: Sequence[float] = SIZES,
    most: float = MOST,
    options: AttackOptions | None = None,
    prompting: Prompting | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Shrunk:
    """Tries the sizes, from the largest on, until one tells too much.

    Args:
        adapter: of the trained model, which is left at its full size.
        forget, retain: rows to be forgotten and to be kept, with answers; those that the base does not tell are left out.
        sizes: s; 1 is tried in any case.
        most: the share of the forget rows that an attack may bring back. One that brings back more at full size may do so at others.
        options: of the attacks; which reverse prompts training used.
        prompting: how prompts are written.
        progress: called with (what, how much of it is done, all of it): the sizes, and the attacks at each of them.

    Raises:
        ValueError: `sizes` or `most`; or the base tells none of the forget rows or of the rows to be kept.
    """
    wanted, found = check_sizes(sizes, most), Shrunk([], most)
    asked = {"options": options or AttackOptions(), "prompting": prompting or Prompting()}
    forgotten, kept = (Target(adapter.model, tokenizer, rows, **asked) for rows in (forget, retain))
    try:
        progress("what the base tells", 0, 1)
        adapter.set(0.0)
        for target, argument in ((forgotten, "forget"), (kept, "retain")):
            rows = zip(target.rows, target.ask("as asked"), strict=True)
            told = [row for row, outcome in rows if outcome["leaked"]]
            if not told:
                raise ValueError(
                    f"{argument}: wanted rows that the base tells, but it tells none of the {len(target.rows)}"
                )
            target.rows = told
        progress("what the base tells", 1, 1)
        for done, size in enumerate(wanted):
            progress("sizes", done, len(wanted))
            adapter.set(size)
            found.tried.append(_try(forgotten, kept, size, partial(progress, f"size {size:g}")))
            if not found.allows(found.tried[-1]):
                break
        progress("sizes", len(wanted), len(wanted))
    finally:
        adapter.set(1.0)
    return found


def _try(forgotten: Target, kept: Target, size: float, progress: Callable[[int, int], None]) -> Tried:
    asks: dict[str, Callable[[], list[Outcomes]]] = {
        DIRECT: lambda: [forgotten.ask("as asked")],
        SAMPLING: lambda: [_drawn(forgotten)],
    }
    asks |= {name: lambda name=name: list(by_variant(forgotten, name).values()) for name in OTHERS}
    variants: dict[str, list[Outcomes]] = {}
    for done, (name, ask) in enumerate(asks.items()):
        progress(done, len(asks) + 1)
        variants[name] = ask()
    progress(len(asks), len(asks) + 1)
    saved = _share(kept, kept.ask("as asked"))
    progress(len(asks) + 1, len(asks) + 1)
    [asked] = variants[DIRECT]
    told = {
        name: max((_share(forgotten, outcomes) for outcomes in of), key=lambda share: share["share"])
        for name, of in variants.items()
        if of
    }
    declined = _share(forgotten, asked, lambda outcome: refuses(outcome["said"] or ""))
    unjudged = max(
        sum(o["leaked"] is None for o in outcomes) / len(outcomes)
        for of in variants.values()
        for outcomes in of
    )
    return Tried(size, told, declined, saved, unjudged)


def _drawn(target: Target) -> Outcomes:
    """An outcome for each row: whether any of its drawn answers tells it; not judged where none does and one could not be."""
    drawn = target.ask("drawn", samples=target.options.samples)
    told = {outcome["id"] for outcome in drawn if outcome["leaked"]}
    unclear = {outcome["id"] for outcome in drawn if outcome["leaked"] is None} - told
    return [{"id": row.id, "leaked": None if row.id in unclear else row.id in told} for row in target.rows]


def _share(
    target: Target, outcomes: Outcomes, counts: Callable[[Outcome], Any] = itemgetter("leaked")
) -> Share:
    """Of all rows those that are told; what could not be judged was not told."""
    facts = {row.id: row.fact for row in target.rows}
    share: Any = share_of([bool(counts(each)) for each in outcomes], [facts[each["id"]] for each in outcomes])
    return share


def table(found: Shrunk) -> Table:
    """A line for every size that was tried."""
    title = "rows that come back, are refused, are kept (95 % interval, in %)"
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    attacks = list(found.tried[0].told)
    for column in ("size", *(name.replace("_", "\n") for name in attacks), "refused", "kept", ""):
        made.add_column(column, no_wrap=True)
    for each in found.tried:
        note = "chosen" if each is found.best else "" if found.allows(each) else "too much"
        counts = [counted(share) for share in (*(each.told[name] for name in attacks), each.refused)]
        made.add_row(f"{each.size:g}", *counts, short(each.kept), note)
    return made


def verdict(found: Shrunk) -> str:
    """What was chosen, in a sentence."""
    full, best = found.tried[0], found.best
    kept = f"{shown(best.kept)} of the rows to be kept are told"
    if best is full:
        said = (
            f"size 1: no smaller one keeps more while each attack brings back at most {percent(found.most)}% of its rows, or no more than at "
            f"full size; {kept}"
        )
    else:
        said = f"size {best.size:g}: {kept}, at full size {shown(full.kept)}; the worst attack brings back {shown(best.worst)} of its rows"
    if full.worst["share"] > STILL_TOLD:
        said += f". At full size an attack brings back {shown(full.worst)} of its rows: the training forgot little"
    if best.unjudged:
        said += (
            f". Up to {percent(best.unjudged)}% of an attack's rows could not be judged (answers cut at --max-new-tokens, or empty), and count "
            "as not told"
        )
    return said


def run_shrink(
    folder: Path,
    data: Path,
    out: Path,
    *,
    sizes: Sequence[float] = SIZES,
    most: float = MOST,
    limit: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
    **asking: Any,
) -> Shrunk:
    """Shrinks the adapter of a folder and writes it to another one.

    Args:
        folder: of the trained adapter.
        data: folder with `forget.jsonl` and `retain.jsonl`, whose rows have answers and perhaps a `value`.
        out: a new folder, to which no other process can write meanwhile.
        sizes, most, progress: as in `shrink`.
        limit: only so many first rows of each file.
        dtype, device: of the model.
        asking: of `AttackOptions`.

    Raises:
        ValueError, OSError: naming what is wrong with a folder, the rows or an option.
    """
    check_sizes(sizes, most)
    if not holds_adapter(folder):
        raise FileNotFoundError(
            f"adapter: wanted a folder with a trained adapter, but {str(folder)!r} holds none"
        )
    if out.is_file():
        raise NotADirectoryError(f"out: wanted a folder, but {str(out)!r} is a file")
    with written(out, "out"):
        if any(out.iterdir()):
            raise ValueError(f"out: {str(out)!r} is not empty; wanted a new folder")
        forget, retain = (_rows(data / f"{name}.jsonl", name, limit) for name in ("forget", "retain"))
        record = read_record(folder) or {}
        options = AttackOptions(seen_reverse_prompts=tuple(record.get("override_wordings") or ()), **asking)
        model, tokenizer = load(folder, dtype, device)
        adapter = AdapterSize(model)
        how: dict[str, Any] = {"options": options, "prompting": Prompting.of(folder), "progress": progress}
        found = shrink(adapter, tokenizer, forget, retain, sizes=sizes, most=most, **how)
        with write_named(out, "out"):
            adapter.save(found.best.size, folder, out)
            tokenizer.save_pretrained(out)
            for name in (PROMPTING, RECORD):
                if (folder / name).is_file():
                    shutil.copy(folder / name, out / name)
            card = folder / "README.md"
            text = card.read_text(encoding="utf-8") if card.is_file() else f"# {out.name}\n"
            said = f"\n## The size of the adapter\n\nEach of its matrices B was multiplied by {found.best.size:g} after the training (`duet shrink`).\n"
            (out / "README.md").write_text(text + said, encoding="utf-8")
        return found


def _rows(path: Path, argument: str, limit: int | None) -> list[AttackRow]:
    if not path.is_file():
        raise FileNotFoundError(
            f"data: there is no file {str(path)!r}; wanted a folder with forget.jsonl and retain.jsonl, such as `validation` in the "
            "--out of duet elicit"
        )
    return read_attack_rows(
        read_table(path, argument, limit), argument, "duet elicit writes rows with the base's"
    )
