"""What the frozen teacher is asked before training: by a method, in `Objective.prepare(trainer, dataset)`, and for a warning."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from duet_kernels import LMHead

from ..data.dataset import UnlearnDataset, plain_item
from ..model import lm, loading
from ..model.answers import generate_answers
from ..model.switches import evaluating
from ..model.teacher import RowTargets, TeacherGuard

logger = logging.get_logger(__name__)

_PROBE_QUERIES = 4
LOOKED_AT, TOKENS = 8, 16  # forget queries that `look_at_teacher` asks, and tokens of each answer


class Asking(Trainer):
    """The part of `DuetTrainer` that asks its teacher outside training steps; the other parts inherit from it."""

    # of DuetTrainer
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    train_dataset: Any
    eval_dataset: Any
    objective: Any
    teacher: Any
    head_inputs: Any
    parts_of: Any
    pad_id: int
    _sampler: Any
    _views: Any
    _train_subjects: Any
    _prepared: WeakSet[UnlearnDataset]
    _reused: Any
    _targets_by: Any

    def ask_teacher(self, function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` of the frozen teacher, without gradients."""
        student = self.accelerator.unwrap_model(self.model)
        return self.teacher.run(function, student, student)

    def teacher_says(self, prompts: list[list[int]], max_new_tokens: int | None) -> list[list[int]]:
        """The frozen teacher's greedy answers, in batches of similar length."""
        answers, options = {}, (self.processing_class, self.pad_id, max_new_tokens)
        for batch in self.batches(map(len, prompts), "the teacher answers"):
            ids = [prompts[i] for i in batch]
            said = self.ask_teacher(lambda model, ids=ids: generate_answers(model, ids, *options))
            answers.update(zip(batch, said, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def states_of(
        self, model: nn.Module, prompts: list[list[int]], answers: list[list[int]]
    ) -> tuple[Tensor, LMHead]:
        """`[N, D]` hidden states where the tokens of `answers` are predicted, one answer after the other; the head."""
        items = [plain_item(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return self.head_inputs(model, self._prepare_inputs(self.data_collator(items)))

    def batches(self, lengths: Iterable[int], doing: str) -> Iterator[list[int]]:
        """The numbers of the prompts of these lengths, `eval_batch_size` of similar length at a time, with a progress bar."""
        lengths, size = list(lengths), self.args.eval_batch_size
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in self.progress(range(0, len(order), size), doing):
            yield order[start : start + size]

    def progress(self, sequence: Any, doing: str) -> Any:
        """A progress bar around `sequence`, where one is wanted."""
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or len(sequence) == 0
        return logging.tqdm(sequence, desc=doing, disable=hidden)

    # -- what is asked before a dataset is used, and before the first step ------------------------------------------

    def prepare_rows(self, dataset: UnlearnDataset) -> None:
        """What is asked of the frozen teacher before a dataset is used: answers, and what the objective prepares."""
        if self.objective.targets is not None and dataset.cached_targets is None:
            self.teacher.serve(dataset, self._targets_of_rows)
        self._answer(dataset)
        if self._reused is not None:
            self._reused.serve(dataset, self._uses(dataset))
        if self.objective.prepare is not None and dataset not in self._prepared:
            self._prepared.add(dataset)
            self.objective.prepare(self, dataset)

    def _uses(self, dataset: UnlearnDataset) -> int:
        """How many items of a dataset this process will read, at most."""
        if dataset is not self.train_dataset:
            return len(dataset)
        steps = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size
        return steps if steps > 0 else int(len(self._sampler) * self.args.num_train_epochs)

    def _answer(self, dataset: UnlearnDataset) -> None:
        """Let the teacher answer the queries whose answers are missing."""
        missing = dict(dataset.unanswered())
        answers = self.teacher_says(list(missing.values()), dataset.max_scored)
        dataset.teacher_answers.update(zip(missing, answers, strict=True))

    def _targets_of_rows(self, dataset: UnlearnDataset) -> Iterator[RowTargets]:
        """What the objective wants of the teacher for every row."""
        self._answer(dataset)
        lengths = (len(dataset[i]["student"]) for i in range(len(dataset)))
        for rows in self.batches(lengths, "the model is asked before it is trained"):
            items = [dataset[i] for i in rows]
            inputs = self._prepare_inputs(self.data_collator(items))
            targets = self.ask_teacher(lambda model, inputs=inputs: self._targets_by(model, inputs))
            yield rows, [item["scored"] for item in items], targets

    def place_teacher(self, other: bool) -> None:
        """The teacher to its device, and guarded; `other`: it is another model than the student's own base."""
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2 and not self.teacher.under_fsdp1:
            raise ValueError(
                "fsdp_version: wanted 2, got 1: FSDP1 leaves an adapter on where the teacher is to answer without "
                "it, so that the student would be its own teacher. Set it to 2, or pass teacher_model"
            )
        self.teacher.to(self.args.device)
        if self.teacher.watched:
            same = not other and self.objective.starts_at_teacher
            rounding = loading.rounding_of_a_fresh_adapter(self.model)
            self.add_callback(TeacherGuard(self._probe, same, rounding))

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's hidden states on a few plain forget queries."""
        dataset = self.train_dataset
        items = [plain_item(dataset.prompt(i)) for i in range(min(_PROBE_QUERIES, dataset.num_forget))]
        inputs = self._prepare_inputs(self.data_collator(items))
        student = self.accelerator.unwrap_model(self.model_wrapped)

        def states(model: nn.Module) -> Tensor:
            return self.head_inputs(model, inputs, to_the_end=True)[0]

        with torch.no_grad(), evaluating(student):
            own = lm.call_through(self.model_wrapped, student, lambda: states(student))
        return own, self.teacher.run(states, student, self.model_wrapped)


def look_at_teacher(
    dataset: UnlearnDataset, tokenizer: Any, says: Callable[[list[list[int]], int], list[list[int]]]
) -> list[str]:
    """Warns where the teacher, steered by the first prefix, answers as it does without, or with the row's answer.

    Args:
        dataset: its forget rows, at most LOOKED_AT of them, from all over, are asked; none where there is no prefix.
        tokenizer: decodes.
        says: prompts and the most new tokens -> the teacher's greedy answers, as ids.

    Returns:
        the names of the rows that the steered teacher still tells.
    """
    if not dataset.prefixes:
        return []
    count = min(LOOKED_AT, dataset.num_forget)
    rows = [place * dataset.num_forget // count for place in range(count)]
    prompts = [*map(dataset.prompt, rows), *map(dataset.first_steered, rows)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in says(prompts, TOKENS)]
    plain, steered = texts[:count], texts[count:]
    told = []
    for row, before, text in zip(rows, plain, steered, strict=True):
        query = dataset.rows[row]
        wanted = (query.answer or "").strip(" .!?").casefold()
        if text == before or (wanted and wanted in text.casefold()):
            told.append((query, text))
    if told:
        query, text = told[0]
        logger.warning(
            f"the steered teacher answers {len(told)} of {count} forget queries as it does without its prefix, or with what is to "
            f"be forgotten ({query.name}: {text[:60]!r}). The student cannot forget what its teacher tells: try other "
            "steering_prefixes, another teacher, or an objective without one, such as npo"
        )
    return [query.name for query, _ in told]
