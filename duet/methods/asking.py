"""What a method may ask of the frozen teacher before training: the trainer as `Objective.prepare(trainer, dataset)` meets it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from duet_kernels import LMHead
from duet_kernels.workspace import workspace_bytes

from ..data.dataset import plain_item
from ..model.lm import base_language_model, generate_answers, is_sharded
from .reuse import ReusedPrefixes, whole_prompts_because

logger = logging.get_logger(__name__)


class Asking:
    """The part of `DuetTrainer` that asks its teacher outside training steps."""

    # of transformers' Trainer and of DuetTrainer
    args: Any
    model: Any
    accelerator: Any
    teacher: Any
    processing_class: Any
    data_collator: Any
    head_inputs: Any
    is_world_process_zero: Any
    _prepare_inputs: Any
    pad_id: int

    def ask_teacher(self, function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` of the frozen teacher, without gradients."""
        student = self.accelerator.unwrap_model(self.model)
        return self.teacher.run(function, student, student)

    def teacher_says(self, prompts: list[list[int]], max_new_tokens: int | None) -> list[list[int]]:
        """The frozen teacher's greedy answers, in batches of similar length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size, answers = self.args.eval_batch_size, {}
        for start in self.progress(range(0, len(order), size), "the teacher answers"):
            batch = order[start : start + size]
            ids = [prompts[i] for i in batch]
            options = (self.processing_class, self.pad_id, max_new_tokens)
            said = self.ask_teacher(
                lambda model, ids=ids, options=options: generate_answers(model, ids, *options)
            )
            answers.update(zip(batch, said, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def states_of(
        self, model: nn.Module, prompts: list[list[int]], answers: list[list[int]]
    ) -> tuple[Tensor, LMHead]:
        """`[N, D]` hidden states where the tokens of `answers` are predicted, one answer after the other; the head."""
        items = [plain_item(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return self.head_inputs(model, self._prepare_inputs(self.data_collator(items)))

    def progress(self, sequence: Any, doing: str) -> Any:
        """A progress bar around `sequence`, where one is wanted."""
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or len(sequence) == 0
        return logging.tqdm(sequence, desc=doing, disable=hidden)

    def reused_prefixes(self, packed: bool) -> ReusedPrefixes | None:
        """What reads the steering prefixes once, if a live teacher can; else the log says why not."""
        if self.teacher is None or not self.teacher.watched:
            return None
        why = whole_prompts_because(self.args, packed, is_sharded(self.args))
        if why is not None:
            logger.info(f"the teacher reads whole prompts: {why}")
            return None

        def ask(function: Callable[[nn.Module], Any]) -> Any:
            with self.accelerator.autocast():
                return self.ask_teacher(function)

        def states(items: list[dict[str, Any]]) -> Tensor:
            inputs = self._prepare_inputs(self.data_collator(items))
            return self.ask_teacher(lambda model: self.head_inputs(model, inputs, "teacher_")[0])

        half = self.args.bf16 or self.args.fp16 or base_language_model(self.model).dtype.itemsize < 4
        most = workspace_bytes(self.args.device)
        return ReusedPrefixes(ask, states, self.args.eval_batch_size, most, half)
