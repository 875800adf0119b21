"""Runs a suite on a model in batches, writes the rows, and summarises them.

    tables -> items (or marked rows) -> batches, longest first -> rows.jsonl -> summary.json

Batches depend only on the data. A run that is started again repeats the batches with missing rows and writes only these
rows, so that it ends with the same file as an uninterrupted run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data.prompts import Prompting, check_placeholders
from ...data.rows import warn_of_unread
from ...extras import version_of
from ...model.answers import check_tokenizer, padding_id
from ...model.hashes import fingerprints
from ...model.lm import check_head, context_length, embedded_ids
from ...names import check_one_of
from ..generation import continuations
from ..journal import Journal, Progress, read_run, write_json
from ..scoring import Forced, TokenScores, batches_by_length, next_token_logprobs, token_scores
from ..told import warn_of_whole_answers
from ..values import warn_of_told
from . import summary
from .asking import Asker, CannotAsk, Item
from .row_metrics import CHOICE, GENERATE, RATIO, SCORE, unknown
from .suite import TO_FORGET, TO_KEEP, Suite, Task, digest_of, load_table

SUMMARY = "summary.json"
Row = dict[str, Any]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    *,
    out: str | Path,
    data: str | Path | None = None,
    name: str = "",
    batch_size: int = 16,
    limit: int | None = None,
    retain_run: str | Path | None = None,
    prompting: Prompting | None = None,
    steering: str | None = None,
    steering_place: str = "system",
    max_new_tokens: int | None = None,
    elicit: Callable[[list[Row], str], list[Row]] | None = None,
    progress: Progress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Run `suite`, or what is missing of it, and summarise.

    Args:
        model, tokenizer: a transformers causal language model, PEFT-wrapped or not.
        suite: from `suites.load_suite`.
        out: folder for `manifest.json`, `rows.jsonl` and `summary.json`.
        data: folder with the suite's files; None: its datasets on the Hub.
        name: of the model, for the record.
        batch_size: sequences per batch; halved for a batch that does not fit in the GPU's memory.
        limit: only so many first rows of each task.
        retain_run: `out` of the same suite, on the same rows, on a model trained without the forget rows.
        prompting: how prompts are written for the model (`Prompting.of(name)`); None: the defaults.
        steering: a prefix before every question: the model as its own teacher. In tasks to forget `{subject}` stands
            for the row's; in others for those subjects in turn, as in training: the prefix is about what should go.
        steering_place: `system` or `user`, as the option of training; a task's own system message goes there too.
        max_new_tokens: of an answer, in the place of what the tasks say; None: what they say.
        elicit: (rows, name) -> the rows with answers where they have none (`duet.evaluation.elicit`), for tasks that ask the
            column `question` and compare with the column `answer`.
        progress: called after every batch.

    Returns:
        what `summary.json` holds; `summary.summarise`.

    Raises:
        ValueError, OSError: a table that is missing or has no row that can be asked; `out` with another run's results.
            All of this is checked before anything is computed. A single row that cannot be asked is marked.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted an integer >= 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: wanted an integer >= 1, got {limit}")
    if max_new_tokens is not None:
        suite = _with_answers_of(suite, max_new_tokens)
    check_one_of("steering_place", steering_place, ("system", "user"))
    if steering is not None and not steering.strip():
        raise ValueError(f"steering: wanted a text that is not empty, got {steering!r}")
    check_placeholders("steering", steering or "")
    check_tokenizer(tokenizer, "tokenizer")
    if retain_run is not None and not summary.OF_RETAIN & suite.numbers.keys():
        raise ValueError(
            f"retain_run: wanted a suite with {' or '.join(sorted(summary.OF_RETAIN))}, which is all that a retain model "
            f"is for; {suite.name} has neither"
        )
    tables = _tables(suite, data, limit)
    given = {task.name: digest_of(rows) for task, rows in tables.items()}
    retain_rows = _retain_rows(retain_run, suite, given, limit) if retain_run is not None else None
    shots = {
        task: load_table(data, task.few_shot.data, task.hub, f"{task.name}.few_shot")[: task.few_shot.count]
        for task in tables
        if task.few_shot
    }
    if elicit is not None:
        tables = {
            task: elicit(rows, task.name) if _reads_answers(task) else rows for task, rows in tables.items()
        }
    prompting = prompting or Prompting()
    manifest = {
        "schema": 2,
        "suite": suite.name,
        "options": dict(suite.options),
        "limit": limit,
        "data": {task.name: digest_of(rows) for task, rows in tables.items()},
        "suite_digest": suite.digest,
        **fingerprints(model, tokenizer),
        **prompting.changed(),
        **({"few_shot": {task.name: digest_of(rows) for task, rows in shots.items()}} if shots else {}),
        **({} if steering is None else {"steering": steering}),
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
        **({} if steering_place == "system" else {"steering_place": steering_place}),
    }
    context = context_length(model)
    gone = [rows for task, rows in tables.items() if task.name.startswith(TO_FORGET)]
    subjects = list(dict.fromkeys(row["subject"] for rows in gone for row in rows if row.get("subject")))
    prepared = {}
    lacking = "--elicit MODEL compares with that model's own answers"
    lacking = lacking if elicit is None else "what --elicit answered was empty, cut or a refusal"
    left_out = {task.name: f"there is no file {task.data}" for task in suite.tasks if task not in tables}
    for task, rows in tables.items():
        others = () if task.name.startswith(TO_FORGET) else subjects
        worked, ids = shots.get(task, ()), embedded_ids(model)
        asker = Asker(tokenizer, task, worked, context, prompting, steering, others, ids, steering_place)
        try:
            prepared[task] = _prepare(asker, rows, lacking)
        except ValueError as error:
            if not task.optional:
                raise
            left_out[task.name] = str(error)
    if not prepared:
        raise ValueError(
            f"data: no task of {suite.name} can be asked: {'; '.join(left_out[task.name] for task in tables)}"
        )
    check_head(model)
    versions = {
        name: version_of(name) or "absent" for name in ("duet-kernels", "torch", "transformers", "peft")
    }
    note = {"model": name, "left_out": left_out, "versions": versions}
    note |= {} if elicit is None else {"given": given}
    with Journal(Path(out), manifest, key=("task", "id"), note=note) as journal:
        for task, (items, marked) in prepared.items():
            first, last = {"suite": suite.name, "task": task.name}, {"model": manifest["model_fingerprint"]}
            run = _Run(model, tokenizer, task, context, batch_size)
            for rows in chain([marked], run.missing(items, journal)):
                journal.append(first | row | last for row in rows)
                done = sum(of == task.name for of, _ in journal.done)
                progress(task.name, done, len(items) + len(marked))
        result = summary.summarise(journal.rows, suite.numbers, retain_rows)
        result = {"suite": suite.name, "model": name, "left_out": left_out, **result}
        write_json(journal.folder / SUMMARY, result)
    return result


class _Run:
    """One task on one model."""

    def __init__(self, model: nn.Module, tokenizer: Any, task: Task, context: int | None, batch_size: int):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.context, self.batch_size = context, batch_size
        self.pad_id = padding_id(tokenizer, embedded_ids(model))

    def missing(self, items: Sequence[Item], journal: Journal) -> Iterator[list[Row]]:
        """The rows of each batch of which the journal does not have all."""
        make = {"generate": self._generate, "score": self._score, "multiple_choice": self._choose}
        for batch in self._batches(items):
            if any((self.task.name, item.id) not in journal.done for item in batch):
                yield list(_halving(make[self.task.kind], batch))

    def _batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Batches; a row whose context leaves too little room for a whole answer is a batch of its own."""
        rest = [item for item in items if self._room(item) >= self.task.max_new_tokens]
        yield from ([item] for item in items if self._room(item) < self.task.max_new_tokens)
        per_row = max((item.sequences for item in rest), default=1)
        lengths = {i: item.length for i, item in enumerate(rest)}
        for indices in batches_by_length(lengths, max(1, self.batch_size // per_row)):
            yield [rest[i] for i in indices]

    def _room(self, item: Item) -> float:
        if self.context is None or self.task.kind != "generate":
            return math.inf
        return self.context - len(item.prompt)

    def _generate(self, batch: Sequence[Item]) -> list[Row]:
        room = min(self._room(item) for item in batch)
        limit = int(min(self.task.max_new_tokens, room))
        prompts = [item.prompt for item in batch]
        said = continuations(self.model, self.tokenizer, prompts, max_new_tokens=limit, stop=self.task.stop)
        rows = []
        for item, answer in zip(batch, said, strict=True):
            row = self._row(item, answer.status)
            if room < self.task.max_new_tokens and answer.num_tokens >= room:
                ended = f"the context ended after {answer.num_tokens} new tokens"
                row["note"] = f"{row['note']}; {ended}" if "note" in row else ended
            row["generated"] = answer.text
            if answer.finite:
                answered = answer.text, item.reference, item.value, item.shown.get("question", "")
                numbers = {m: GENERATE[m](*answered) for m in self.task.metrics}
                if answer.status != "ok":
                    kept = self.task.name.startswith(TO_KEEP)
                    numbers |= {m: None for m, x in numbers.items() if unknown(m, x, answer.text, kept)}
                row["metrics"] = numbers
            rows.append(row)
        return rows

    def _score(self, batch: Sequence[Item]) -> list[Row]:
        rows = []
        for item, scores in self._token_scores(batch):
            finite = all(s.finite for each in scores.values() for s in each)
            row = self._row(item, "ok" if finite else "nan")
            if finite:
                losses = {
                    text: [s.loss for s in each] if text in item.lists else each[0].loss
                    for text, each in scores.items()
                }
                row["losses"] = losses
                row["num_tokens"] = {text: len(each[0].logprobs) for text, each in scores.items()}
                row["metrics"] = {
                    m: RATIO[m][1](losses) if m in RATIO else SCORE[m](scores["answer"][0])
                    for m in self.task.metrics
                }
            rows.append(row)
        return rows

    def _choose(self, batch: Sequence[Item]) -> list[Row]:
        rows = []
        for item, totals in zip(batch, self._choice_likelihoods(batch), strict=True):
            finite = all(map(math.isfinite, totals))
            row = self._row(item, "ok" if finite else "nan")
            if finite:
                lengths = [len(f.answer) for f in item.texts["choices"]]
                row |= {"loglikelihoods": totals, "num_tokens": lengths}
                row["metrics"] = {m: CHOICE[m](totals, lengths, item.correct) for m in self.task.metrics}
            rows.append(row)
        return rows

    def _choice_likelihoods(self, batch: Sequence[Item]) -> list[list[float]]:
        """Log-likelihoods of the choices; letters, one token each, share the reading of the question."""
        candidates = [[f.answer for f in item.texts["choices"]] for item in batch]
        if all(len(answer) == 1 for answers in candidates for answer in answers):
            prompts, ids = [item.prompt for item in batch], [[a[0] for a in each] for each in candidates]
            return [row.tolist() for row in next_token_logprobs(self.model, prompts, ids, self.pad_id)]
        return [[float(s.logprobs.sum()) for s in x["choices"]] for _, x in self._token_scores(batch)]

    def _token_scores(self, batch: Sequence[Item]) -> Iterator[tuple[Item, dict[str, list[TokenScores]]]]:
        forced: list[Forced] = [f for item in batch for each in item.texts.values() for f in each]
        scores = iter(token_scores(self.model, forced, self.pad_id))
        for item in batch:
            yield item, {text: [next(scores) for _ in each] for text, each in item.texts.items()}

    def _row(self, item: Item, status: str) -> Row:
        # A text that is scored alone has no prompt but its own first token.
        prompt = self.tokenizer.decode(item.prompt) if item.prompt else ""
        return {"id": item.id, "status": status, "prompt": prompt, **item.shown}


def _halving(make: Callable[[Sequence[Item]], list[Row]], batch: Sequence[Item]) -> Iterator[Row]:
    """`make(batch)`, in halves if the GPU's memory is too small for the whole batch."""
    try:
        yield from make(batch)
        return
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    yield from _halving(make, batch[: len(batch) // 2])
    yield from _halving(make, batch[len(batch) // 2 :])


def _with_answers_of(suite: Suite, max_new_tokens: int) -> Suite:
    """The suite with another `max_new_tokens` in its tasks that generate."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted an integer >= 1, got {max_new_tokens}")
    if not any(task.kind == "generate" for task in suite.tasks):
        raise ValueError(
            f"max_new_tokens: wanted a suite with tasks of the kind generate, {suite.name} has none"
        )
    return replace(suite, tasks=tuple(replace(task, max_new_tokens=max_new_tokens) for task in suite.tasks))


def _tables(suite: Suite, data: str | Path | None, limit: int | None) -> dict[Task, list[Row]]:
    tables = {}
    for task in suite.tasks:
        try:
            tables[task] = load_table(data, task.data, task.hub, f"{suite.name}: {task.name}")[:limit]
        except FileNotFoundError:
            if not task.optional:
                raise
    if not tables:
        wanted = ", ".join(task.data for task in suite.tasks)
        raise FileNotFoundError(f"data: {data} has none of the files of {suite.name}: {wanted}")
    for name in dict.fromkeys(task.data for task in tables):
        of = [task for task in tables if task.data == name]
        warn_of_unread(tables[of[0]], name, set().union(*(task.columns() for task in of)))
    return tables


def _prepare(asker: Asker, rows: Sequence[Row], lacking: str = "") -> tuple[list[Item], list[Row]]:
    """The items, and the rows that cannot be asked; `lacking`: what is said of one that only lacks an answer."""
    items, marked = [], []
    for index, row in enumerate(rows):
        try:
            items.append(asker.item(index, row))
        except CannotAsk as error:
            asked = _reads_answers(asker.task) and row.get("question") and row.get("answer") is None
            why = f"{error}; {lacking}" if asked and lacking else str(error)
            marked.append({"id": index, "status": error.status, "why": why})
    told = ((f"{asker.task.name}, row {item.id}", item.value, item.shown.get("question")) for item in items)
    warn_of_told((name, value, {"question": [text]}) for name, value, text in told if text is not None)
    if {"contains_answer", "fabrication"} & set(asker.task.metrics):
        warn_of_whole_answers((f"{asker.task.name}, row {x.id}", x.value, x.reference) for x in items)
    if not items:
        raise ValueError(
            f"{asker.task.name}: none of its {len(rows)} rows can be asked; the first: {marked[0]['why']}"
        )
    return items, marked


def _reads_answers(task: Task) -> bool:
    return task.kind != "multiple_choice" and task.question == "{question}" and task.answer == "answer"


def _retain_rows(folder: str | Path, suite: Suite, given: Row, limit: int | None) -> list[Row]:
    """The rows of a run of the same suite on the same tables; `given`: their digests, before --elicit fills in answers."""
    manifest, rows = read_run(folder, "retain_run", ("task", "id"))
    for field, value in (("suite", suite.name), ("suite_digest", suite.digest)):
        if manifest.get(field) != value:
            raise ValueError(
                f"retain_run: wanted a run of the same suite, but {field} is {manifest.get(field)!r} there and "
                f"{value!r} here"
            )
    theirs = manifest.get("note", {}).get("given", manifest["data"])
    specs = [spec for name, spec in suite.numbers.items() if name in summary.OF_RETAIN]
    for task in dict.fromkeys(str(of).partition(".")[0] for spec in specs for of in spec.values()):
        if task in given and task in theirs and given[task] != theirs[task]:
            first = manifest.get("limit")
            limits = "" if first == limit else f" (limit is {first} there and {limit} here)"
            raise ValueError(
                f"retain_run: wanted a run on the same rows, but those of {task} are others there{limits}; evaluate the model of "
                f"{folder} again on these"
            )
    return rows
