"""The base's own answers: as rows to forget and to keep, and as the answers of rows that have none.

    questions   --every wording, greedy and drawn-->   out/rows.jsonl, a journal that an interrupted run continues
                --what is told (`told.py`)-->          out/{forget,neighbour,retain}.jsonl, for training
                                                        out/validation/... and out/report/..., in other wordings

What a model does not tell cannot be forgotten, and is left out. What is measured with such answers is how far a model has moved from
its base, not how much of the truth it knows.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from ..data.prompts import Prompting, PromptRenderer
from ..data.sources import read_object
from ..folders import write_atomically
from ..model.hashes import fingerprints
from ..model.lm import embedded_ids
from .facts import Fact
from .generation import Continuation, answers_to
from .journal import MANIFEST, Journal, Progress, digest, write_json
from .steering import FORGET, KINDS, NEIGHBOUR, RETAIN
from .told import about_others, told_of
from .values import queries_of

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "report")
ELICITED = "answer_of_the_base"  # column: whether the answer was made here
ELICITED_NOTE = "the answer is the base model's own: compared with the base, not with the truth"


def elicit_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    out: str | Path,
    *,
    samples: int = 4,
    prompting: Prompting | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    seed: int = 0,
    name: str = "",
    progress: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Asks for every fact, and writes the rows of those that are told into `out`. An interrupted run is continued.

    Args:
        model, tokenizer: the base, in evaluation mode. Without a chat template a question is written as a line of text, and
            the answer ends with its line.
        facts: of `facts_of`.
        samples: answers to each wording that are drawn at temperature 1, beside the greedy one.
        seed: of the drawn answers.
        name: of the model, for the record.
        progress: called with (what, facts done, all of them).

    Returns:
        kind -> {"facts", "told", "train", "validation", "report"}: numbers of facts and of rows.

    Raises:
        ValueError: `batch_size` is below 1; nothing about the subjects is told; or `out` holds another run.
        FileExistsError: `out` holds rows that no such run wrote, or that were changed since.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted an integer >= 1, got {batch_size}")
    _check_not_given(Path(out))
    prompting = prompting or Prompting()
    renderer = PromptRenderer(tokenizer, **vars(prompting), num_ids=embedded_ids(model))
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    how |= {} if renderer.has_template else {"stop": ("\n",)}
    say = partial(answers_to, model, tokenizer, **how)
    manifest: dict[str, Any] = {"facts": digest(repr(list(facts))), "samples": samples}
    manifest |= {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    manifest |= {**fingerprints(model, tokenizer), **prompting.changed()}
    with Journal(out, manifest, key=("fact",), note={"model": name}) as journal:
        for chunk in _chunks(facts, batch_size):
            progress("facts asked", chunk.start, len(facts))
            if not all((i,) in journal.done for i in chunk):
                asked = [facts[i].wordings for i in chunk]
                said = _answers(renderer, say, asked, samples, f"{seed}/{chunk.start}")
                journal.append({"fact": i, "asked": each} for i, each in zip(chunk, said, strict=True))
        progress("facts asked", len(facts), len(facts))
        by_fact = {row["fact"]: row["asked"] for row in journal.rows}
        return _write(Path(out), facts, [by_fact[i] for i in range(len(facts))])


def _check_not_given(out: Path) -> None:
    """Refuses a folder with rows that no run of `elicit_facts` wrote: they would be written over, or deleted."""
    if (out / MANIFEST).is_file():
        return
    for split, kind in itertools.product(SPLITS, KINDS):
        if (path := _file_of(out, split, kind)).exists():
            raise FileExistsError(
                f"out: {path} is there already and no result of duet elicit; wanted a new folder"
            )


def _file_of(out: Path, split: str, kind: str) -> Path:
    return out / f"{kind}.jsonl" if split == "train" else out / split / f"{kind}.jsonl"


def _chunks(facts: Sequence[Fact], batch_size: int) -> Iterator[range]:
    """Facts that are asked together, about a batch of wordings: the same ones when an interrupted run continues."""
    start, wordings = 0, 0
    for i, fact in enumerate(facts):
        wordings += len(fact.wordings)
        if wordings >= batch_size or i == len(facts) - 1:
            yield range(start, i + 1)
            start, wordings = i + 1, 0


def _answers(
    renderer: PromptRenderer,
    say: Callable[..., list[Continuation | None]],
    asked: Sequence[Sequence[str]],
    samples: int,
    seed: str,
) -> list[list[dict[str, Any]]]:
    """For every fact and wording: {"question", "status", "said", "drawn"}. say: (prompts, perhaps a seed) -> answers."""
    flat = [(i, text) for i, texts in enumerate(asked) for text in texts]
    prompts = [renderer.encode_or_none((("user", text),)) for _, text in flat]
    seeds = (int(hashlib.sha256(f"{seed}/{n}".encode()).hexdigest()[:8], 16) for n in range(samples))
    said = zip(say(prompts), *(say(prompts, seed=each) for each in seeds), strict=True)
    rows: list[list[dict[str, Any]]] = [[] for _ in asked]
    for (i, text), prompt, (answer, *drawn) in zip(flat, prompts, said, strict=True):
        none = "refused_by_template" if prompt is None else "too_long"
        row = {"question": text, "status": answer.status if answer else none}
        row |= {"said": answer.text if answer else None}
        rows[i].append(row | {"drawn": [other.text for other in drawn if other and other.finite]})
    return rows


def split_of(wording: int, count: int) -> str:
    """Which split a wording belongs to: the last one to the report, of three and more the one before it to validation.

    Example:
        >>> [split_of(i, 4) for i in range(4)], [split_of(i, 2) for i in range(2)], split_of(0, 1)
        (['train', 'train', 'validation', 'report'], ['train', 'report'], 'train')
    """
    if count > 1 and wording == count - 1:
        return "report"
    return "validation" if count > 2 and wording == count - 2 else "train"


def _write(
    out: Path, facts: Sequence[Fact], asked: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """The rows of what is told, into their files; retain rows are all that must be kept, neighbours among them."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {(s, k): [] for s in SPLITS for k in KINDS}
    counts = {kind: {"facts": 0, "told": 0, **dict.fromkeys(SPLITS, 0)} for kind in KINDS}
    taken = []
    for fact, each, others in zip(facts, asked, about_others(facts, asked), strict=True):
        counts[fact.kind]["facts"] += 1
        told = told_of(fact, each, others)
        if told is None:
            continue
        if fact.value is None:
            taken.append(f"{fact.wordings[0]!r} -> {told.value!r}")
        counts[fact.kind]["told"] += 1
        for i, answer in told.answers.items():
            split = split_of(i, len(fact.wordings))
            about = {} if fact.subject is None else {"subject": fact.subject}
            row = {"question": fact.wordings[i], **about, "answer": answer, "value": told.value}
            row |= {ELICITED: True, "known": round(told.known, 3)}
            if fact.kind == FORGET:
                row |= dict(fact.more)
            counts[fact.kind][split] += 1
            rows[split, fact.kind].append(row)
            if fact.kind == NEIGHBOUR:
                rows[split, RETAIN].append(row)
    if not counts[FORGET]["told"]:
        raise ValueError(f"subject: {_nothing(facts, asked)}")
    if taken:
        logger.warning(
            f"value: not given, so that what the answers share counts, of {len(taken)} of the facts that are told: "
            f"{', '.join(taken[:3])}{', ...' if len(taken) > 3 else ''}. Look at them in the rows, and give a 'value' where it is wrong"
        )
    lines = {
        key: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of) for key, of in rows.items()
    }
    _replace(out, {_file_of(out, *key): text.encode() for key, text in lines.items()})
    return {kind: count for kind, count in counts.items() if count["facts"]}


def _replace(out: Path, files: Mapping[Path, bytes]) -> None:
    """Writes the files, and deletes those without content; one that somebody has changed since it was written is an error."""
    manifest = read_object(out / MANIFEST, "out")
    before = manifest.setdefault("note", {}).get("written", {})
    written = {str(path.relative_to(out)): hashlib.sha256(data).hexdigest() for path, data in files.items()}
    for (name, ours), path in zip(written.items(), files, strict=True):
        there = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ours
        if there not in (ours, before.get(name)):
            raise FileExistsError(
                f"out: {path} was changed since it was written, and stays as it is; wanted it moved away, to write it again, or "
                "a new folder"
            )
    for path, data in files.items():
        path.parent.mkdir(exist_ok=True)
        if data:
            write_atomically(path, data)
        else:
            path.unlink(missing_ok=True)
    manifest["note"]["written"] = written
    write_json(out / MANIFEST, manifest)


def _nothing(facts: Sequence[Fact], asked: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """That nothing is told of what is to be forgotten, with an example."""
    of = [(fact, each) for fact, each in zip(facts, asked, strict=True) if fact.kind == FORGET]
    names = ", ".join(dict.fromkeys(fact.subject or "" for fact, _ in of))
    status = Counter(each["status"] for _, texts in of for each in texts)
    first = of[0][1][0]
    give = "give them a 'value', " if any(fact.value is None for fact, _ in of) else ""
    return (
        f"the model tells none of the {len(of)} facts about {names}, so that there is nothing to forget "
        f"({', '.join(f'{n} answers {what}' for what, n in status.items())}). To {first['question']!r} it says "
        f"{(first['said'] or '')[:120]!r}. Ask other questions, {give}allow longer answers (--max-new-tokens), or take another subject"
    )


def elicit_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    argument: str,
    *,
    prompting: Prompting | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """The rows, with the model's greedy answer and the column `answer_of_the_base` where they had no answer.

    A row whose answer is empty or cut at the limit, or whose prompt does not fit or is refused by the chat template, stays as it is.

    Args:
        model, tokenizer: the base, in evaluation mode.
        rows: as `duet.data.rows.read_rows` reads them.
        argument: how errors call them.

    Raises:
        ValueError: a row is not a mapping or has no question.
    """
    renderer = PromptRenderer(tokenizer, **vars(prompting or Prompting()), num_ids=embedded_ids(model))
    prompts = [
        renderer.encode_or_none(query.conversation) if query.answer is None else None
        for query in queries_of(rows, argument)
    ]
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    filled = [dict(row) for row in rows]
    for row, answer in zip(filled, answers_to(model, tokenizer, prompts, **how), strict=True):
        if answer and answer.text and answer.finite and not answer.cut:
            row |= {"answer": answer.text, ELICITED: True}
    return filled
