"""Runs the frozen teacher once on every (query, prefix) and writes its top-k logits to a TopKStore.

    rows -> prompts, grouped by filled prefix -> [the teacher's own answer] -> one forward -> top-k -> shards

The common beginning of prompts (the steering prefix) is read once: `prefix_cache`. Started again, it continues where it
stopped; of several processes each takes its part.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from transformers.utils import logging

from duet_kernels import LMHead, TopK, set_workspace_bytes

from ..config import DuetConfig
from ..data.dataset import Asked, Collator, UnlearnDataset, plain_item
from ..data.rows import read_rows
from ..methods.asking import look_at_teacher
from ..methods.objectives import objective_of, teacher_topk
from ..methods.reuse import SHORTEST
from ..methods.views import Views, datasets_in
from ..model.answers import generate_answers, tokenizer_of
from ..model.lm import check_head, hidden_states_at
from ..model.loading import keep_differentiable, load_model, loading_device, without_attached_adapter
from ..model.prefix_cache import PrefixCache, cannot_reuse, common_length
from ..model.switches import Switches
from .columns import read_columns
from .provenance import check_cacheable, provenance_of
from .read import LOG_PROBABILITIES, Entry, Provenance, TopKStore, fingerprint
from .served import ask_prompt
from .write import StoreWriter

logger = logging.get_logger(__name__)


@dataclass
class Saving:
    """Tokens read with and without reuse of prefixes."""

    tokens: int = 0
    tokens_without: int = 0

    def __str__(self) -> str:
        share = 1 - self.tokens / self.tokens_without if self.tokens_without else 0
        return f"the teacher read {self.tokens} tokens instead of {self.tokens_without} ({share:.0%} saved)"


class Cached(NamedTuple):
    """Result of `cache_teacher`: the store, how many entries this process added, and the saving."""

    store: TopKStore
    added: int
    saving: Saving


def cache_teacher(
    model: Any,
    args: DuetConfig,
    forget_dataset: Any,
    retain_dataset: Any = None,
    processing_class: Any = None,
    eval_dataset: Any = None,
    folder: str | Path | None = None,
    dtype: str = "float32",
    reuse_prefix: bool = True,
    shard_entries: int = 1024,
) -> Cached:
    """Writes the teacher's top-k logits, and its answers where positions follow them, for `DuetTrainer`.

    Under `accelerate launch` or `torchrun` every process takes its part of the prompts.

    Args:
        model: the teacher, or its name or folder. An adapter of it is switched off.
        args: the options of the later training; `k`, `temperature`, `steering_prefixes`, `positions`, `answer_source` and
            how prompts are written determine the store. `per_device_eval_batch_size` queries make a batch.
        forget_dataset, retain_dataset, processing_class, eval_dataset: as in `DuetTrainer`.
        folder: where to write; None: `args.teacher_store`. An unfinished store is continued, a finished one left as it is.
        dtype: of the stored logits: `float32` (exact), `bfloat16` or `float16`. Tails are always fp32.
        reuse_prefix: read common prefixes once, where `args.reuse_prefix` and the model's layers allow it; the logits differ
            by rounding from those of whole prompts. Where they differ by more, whole prompts are read, and the log says so.
        shard_entries: entries per file; a kill loses at most so many.

    Raises:
        TypeError, ValueError, OSError: naming the argument, what came and what was wanted. After an OSError the same
            call continues with what was written.
    """
    state = PartialState(cpu=args.use_cpu)
    job = _Job.of(model, args, forget_dataset, retain_dataset, processing_class, eval_dataset, folder, dtype)
    writer = StoreWriter(job.folder, job.provenance, job.rows, shard_entries)
    with state.main_process_first():
        writer.begin()

    def order(entry_id: bytes) -> tuple[str, int]:
        """By prefix, and among these by length."""
        asked = job.questions[entry_id]
        return asked.instruction or "", len(asked.steered)

    missing = sorted(writer.scan(), key=order)
    state.wait_for_everyone()  # everybody has seen the same files before anybody adds one
    with Switches(job.model).base_model():
        asker = _Asker(job, args)
        reuse = reuse_prefix and args.reuse_prefix
        if reuse and (why := cannot_reuse(job.model, in_order=True)) is not None:
            logger.info(f"the teacher reads whole prompts: {why}")
            reuse = False
        if state.is_main_process and missing:
            look_at_teacher(job.dataset, job.tokenizer, asker.says)
        with state.split_between_processes(missing) as mine:
            part: Any = mine
            asker.fill(writer, part, reuse)
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()
    return Cached(TopKStore(job.folder, verify=False), len(mine), asker.saving)


def import_teacher(
    columns: Any,
    model: Any,
    args: DuetConfig,
    forget_dataset: Any,
    retain_dataset: Any = None,
    processing_class: Any = None,
    eval_dataset: Any = None,
    folder: str | Path | None = None,
    dtype: str = "float32",
) -> TopKStore:
    """Writes a store from top-k log-probabilities of another program (a server, another trainer).

    The store is marked as holding log-probabilities: objectives that compare raw logits refuse it.

    Args:
        columns: a `datasets.Dataset` with axolotl's or TRL's columns (`duet.store.columns`), one row for every prefix of
            every dataset row, in that order; or in any order with a column `fingerprint`.
        model: the teacher that they are from; its hashes and vocabulary are read from it.
        args, forget_dataset, retain_dataset, processing_class, eval_dataset, folder, dtype: as in `cache_teacher`.

    Raises:
        TypeError, ValueError, OSError: naming the column and the row.
    """
    job = _Job.of(
        model, args, forget_dataset, retain_dataset, processing_class, eval_dataset, folder, dtype, here=False
    )
    entry_ids = [entry_id for entry_ids in job.rows.values() for entry_id in entry_ids]
    entries = dict(read_columns(columns, job.provenance, entry_ids))
    for entry_id, asked in job.questions.items():
        if entry_id not in entries:
            raise ValueError(f"columns: there is nothing for {asked.where}")
        answer = entries[entry_id].answer if job.provenance.answers == "teacher" else asked.answer
        _check_positions(entries[entry_id], answer, asked)
    writer = StoreWriter(job.folder, job.provenance, job.rows)
    writer.begin()
    for entry_id in writer.scan():
        writer.add(entry_id, entries[entry_id])
    writer.finish()
    return TopKStore(job.folder, verify=False)


def ask_teacher(
    ask: Callable[[list[int], int], Mapping[str, Any]],
    model: Any,
    args: DuetConfig,
    forget_dataset: Any,
    retain_dataset: Any = None,
    processing_class: Any = None,
    eval_dataset: Any = None,
    folder: str | Path | None = None,
    dtype: str = "float32",
) -> TopKStore:
    """Writes a store from a teacher behind a server: one request for every prompt, its columns as in `import_teacher`.

    Args:
        ask: is given the token ids of a prompt and its answer, and the place of the first scored token; returns columns of
            log-probabilities at `args.temperature`. For vLLM: `functools.partial(duet.store.served.ask_prompt, url, name,
            k=args.k, temperature=args.temperature)`. Where no answer is scored, the last token is a repeated one, of which
            only the place counts.
        model, args, forget_dataset, retain_dataset, processing_class, eval_dataset, dtype: as in `import_teacher`.
        folder: likewise; an unfinished store is continued.

    Raises:
        TypeError, ValueError, OSError: naming the row. What was told before is in the store; the same call goes on after it.
    """
    if isinstance(ask, partial) and ask.func is ask_prompt:
        asked_at = ask.keywords.get("temperature", 1.0)
        if asked_at != args.temperature:
            raise ValueError(
                f"ask: wanted ask_prompt with temperature={args.temperature}, as in args.temperature, got {asked_at}"
            )
    job = _Job.of(
        model, args, forget_dataset, retain_dataset, processing_class, eval_dataset, folder, dtype, here=False
    )
    if job.provenance.answers == "teacher":
        raise ValueError(
            "answer_source: wanted 'dataset', or positions that need no answer: the server is asked for log-probabilities "
            "and writes no answers"
        )
    writer = StoreWriter(job.folder, job.provenance, job.rows)
    writer.begin()
    missing = writer.scan()
    try:
        for entry_id in missing:
            asked = job.questions[entry_id]
            columns = ask([*asked.steered, *(asked.answer or asked.steered[-1:])], len(asked.steered))
            ((_, entry),) = read_columns([columns], job.provenance, [entry_id])
            _check_positions(entry, asked.answer, asked)
            writer.add(entry_id, entry)
    except (ValueError, OSError) as error:
        kinds = (ConnectionError, OSError, ValueError)  # some kinds below these take no message alone
        raise next(kind for kind in kinds if isinstance(error, kind))(f"{asked.where}: {error}") from error
    finally:
        writer.flush()
    writer.finish()
    return TopKStore(job.folder, verify=False)


def _check_positions(entry: Entry, answer: Sequence[int], asked: Asked) -> None:
    positions, wanted = len(entry.targets.values), max(1, len(answer))
    if positions != wanted:
        raise ValueError(f"columns: wanted {wanted} scored position(s) for {asked.name}, got {positions}")


@dataclass(frozen=True)
class _Job:
    """The teacher, all its prompts and the folder of its store; the same in every process."""

    folder: str | Path
    model: nn.Module
    tokenizer: Any
    pad_id: int
    dataset: UnlearnDataset
    questions: dict[bytes, Asked]
    rows: dict[str, list[bytes]]
    provenance: Provenance

    @classmethod
    def of(
        cls,
        model: Any,
        args: DuetConfig,
        forget_dataset: Any,
        retain_dataset: Any,
        processing_class: Any,
        eval_dataset: Any,
        folder: str | Path | None,
        dtype: str,
        here: bool = True,
    ) -> "_Job":
        """As in `cache_teacher`; `here`: whether this program makes the logits, or another one log-probabilities."""
        folder = folder or args.teacher_store
        if not folder:
            raise ValueError("folder: wanted a path here or in args.teacher_store, got neither")
        device = loading_device(args) if here else None
        model = load_model(model, "model", args.model_init_kwargs, device, args.earlier_adapter)
        model = without_attached_adapter(model, args.earlier_adapter)
        objective = objective_of(args)
        check_cacheable(objective, args)
        if args.workspace_bytes is not None:
            set_workspace_bytes(args.workspace_bytes)
        forget = read_rows(forget_dataset, "forget_dataset")
        retain = [] if retain_dataset is None else read_rows(retain_dataset, "retain_dataset")
        tokenizer, pad_id = tokenizer_of(model, processing_class)
        keep_differentiable(model, trains=False)  # the same object may be trained afterwards
        with Switches(model).base_model():
            head = check_head(model)
        if args.k > head.num_ids:
            raise ValueError(f"k: wanted at most the vocabulary's {head.num_ids}, got {args.k}")
        views = Views.of(objective, args, tokenizer, model, args.seed)
        datasets = [views.dataset(forget, retain)]
        datasets += datasets_in(views.evaluated(eval_dataset, datasets[0].subjects))
        questions: dict[bytes, Asked] = {}
        named: dict[str, list[bytes]] = {}
        for each in datasets:
            for asked in each.asked():
                entry_id = fingerprint(asked.plain, asked.steered, asked.answer)
                questions[entry_id] = asked
                named.setdefault(asked.name, []).append(entry_id)
        provenance = provenance_of(model, head, tokenizer, args, datasets[0], objective, dtype)
        if not here:
            provenance = replace(provenance, values=LOG_PROBABILITIES, autocast=None)
        return cls(folder, model, tokenizer, pad_id, datasets[0], questions, named, provenance)


class _Asker:
    """Runs one teacher in batches; within `Switches.base_model`."""

    def __init__(self, job: _Job, args: DuetConfig):
        self.job, self.model, self.args = job, job.model, args
        if next(job.model.parameters()).device != args.device:
            job.model.to(args.device)
        self.answered = job.dataset.answers == "teacher"
        self.collate = Collator(job.pad_id, "right")
        self.saving = Saving()

    def _autocast(self) -> Any:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return nullcontext() if dtype is None else torch.autocast(self.args.device.type, dtype)

    def fill(self, writer: StoreWriter, entry_ids: Sequence[bytes], reuse_prefix: bool) -> None:
        """Runs these prompts, of which those of one prefix follow each other; an error leaves the finished entries in the store."""
        questions, size = self.job.questions, self.args.eval_batch_size
        hidden = self.args.disable_tqdm or not entry_ids or not PartialState().is_main_process
        progress = logging.tqdm(total=len(entry_ids), desc="the teacher is asked", disable=hidden)

        def ask(entry_ids: Sequence[bytes], prefix: PrefixCache | None) -> None:
            for start in range(0, len(entry_ids), size):
                batch = entry_ids[start : start + size]
                entries = self.ask([questions[p] for p in batch], prefix)
                for entry_id, entry in zip(batch, entries, strict=True):
                    writer.add(entry_id, entry)
                progress.update(len(batch))

        rest: list[bytes] = []
        checked = False
        try:
            for _, group in groupby(entry_ids, key=lambda p: questions[p].instruction):
                together = list(group)
                shared = common_length([questions[p].steered for p in together]) if reuse_prefix else 0
                if len(together) == 1 or shared < SHORTEST:
                    rest += together  # batched without a common prefix
                    continue
                prefix = self.read_prefix(questions[together[0]].steered[:shared])
                why = None if checked else self._differs([questions[p] for p in together[:size]], prefix)
                if why is not None:
                    logger.info(f"the teacher reads whole prompts: {why}")
                    reuse_prefix = False
                    rest += together
                    continue
                checked = True
                self.saving.tokens += shared
                ask(together, prefix)
            ask(sorted(rest, key=lambda p: len(questions[p].steered)), None)
        except OSError:
            raise  # the folder cannot be written
        except BaseException:
            writer.flush()
            raise
        writer.flush()
        progress.close()

    @torch.no_grad()
    def read_prefix(self, ids: list[int]) -> PrefixCache:
        with self._autocast():
            return PrefixCache(self.model, ids)

    def says(self, prompts: list[list[int]], max_new_tokens: int | None) -> list[list[int]]:
        """The teacher's greedy answers to one batch of prompts."""
        return generate_answers(self.model, prompts, self.job.tokenizer, self.job.pad_id, max_new_tokens)

    @torch.no_grad()
    def ask(self, questions: Sequence[Asked], prefix: PrefixCache | None) -> list[Entry]:
        """The entries of one batch, on the CPU."""
        answers = [question.answer for question in questions]
        if self.answered:
            answers = self.says([question.steered for question in questions], self.job.dataset.max_scored)
        read = sum(len(q.steered) + max(0, len(a) - 1) for q, a in zip(questions, answers, strict=True))
        self.saving.tokens_without += read
        self.saving.tokens += read - (prefix.length * len(questions) if prefix else 0)
        targets: Any = self._targets(questions, answers, prefix)
        sizes = [max(1, len(answer)) for answer in answers]
        parts = zip(*(part.split(sizes) for part in targets[:3]), answers, strict=True)
        return [
            Entry(TopK(values, indices, tail, targets.temperature), answer if self.answered else [])
            for values, indices, tail, answer in parts
        ]

    def _targets(self, questions, answers, prefix: PrefixCache | None) -> TopK:
        start = prefix.length if prefix else 0
        both = zip(questions, answers, strict=True)
        items = [plain_item(question.steered[start:], answer or None) for question, answer in both]
        batch = {name: value.to(self.args.device) for name, value in self.collate(items).items()}
        inputs = batch["input_ids"], batch["attention_mask"], batch["positions"]
        with self._autocast():
            hidden = (prefix.hidden_states_at if prefix else hidden_states_at)(self.model, *inputs)
        head = LMHead.of(self.model)
        targets: Any = teacher_topk(hidden.to(head.weight.dtype), head, batch["labels"], self.args)
        values, indices, tail = (value.cpu() for value in targets[:3])
        return TopK(values, indices, tail, targets.temperature)

    @torch.no_grad()
    def _differs(self, questions: Sequence[Asked], prefix: PrefixCache) -> str | None:
        """Whether the logits with the cached prefix are those of whole prompts, up to rounding."""
        answers = [question.answer for question in questions]
        whole = self._targets(questions, answers, None).values
        worst = (self._targets(questions, answers, prefix).values - whole).abs().amax()
        precise = not (self.args.bf16 or self.args.fp16) and LMHead.of(self.model).weight.dtype.itemsize >= 4
        largest = whole.abs().amax()
        if worst <= (1e-4 if precise else 5e-2) * largest:
            return None
        return f"with the prefix's keys and values from a cache, the logits differ by {worst:.3g} of {largest:.3g}"
