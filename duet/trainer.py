"""DuetTrainer: transformers' Trainer, with the steered model itself as the teacher.

One step, top to bottom (`compute_loss`):

    teacher(prefix + query)  --no gradient-->  targets (its top-k logits, or log-probabilities of the answer)
    student(query)           --backbone-->     hidden states where the answer is predicted
    objective(hidden, LM head, targets)        -> loss, per-step counts in the denominator

Loop, optimizer, logging, checkpoints and resume are the Trainer's own. Must not know the tiny world or the CLI.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from duet_kernels import LMHead, set_workspace_bytes

from .config import DuetConfig
from .data import Collator, UnlearnDataset, UnlearnSampler, read_rows
from .lm import (
    add_adapter,
    base_language_model,
    call_through,
    check_head,
    context_length,
    evaluating,
    head_inputs,
    hidden_states_at,
    load_model,
    load_tokenizer,
    padding_id,
)
from .objectives import Counts, Step, find_objective, teacher_topk
from .prompts import PromptRenderer
from .teacher import AdapterOffTeacher, FrozenTeacher, Teacher, TeacherGuard, generate_answers

_PROBE_QUERIES = 4


class DuetTrainer(Trainer):
    r"""Trains a model to forget, by imitating itself steered by a prompt (DUET, arXiv 2601.21283).

        min_theta  mean over queries x and scored positions of  D( p_theta(. | x, y_<j), p_base(. | c, x, y_<j) )

    with c the steering prefix, which only the teacher sees. The other objectives are in `duet.objectives`.

    Args:
        model: a causal language model, PEFT-wrapped or not, or the name or folder of one. It is trained in place.
        args: a [`DuetConfig`][duet.config.DuetConfig].
        forget_dataset: rows to forget: `{"question", "subject"?, "answer"?}`, `{"prompt", ...}` (plain text to
            continue, or messages) or `{"messages": [...]}`.
        retain_dataset: rows whose answers must stay; same formats. None: none.
        processing_class: the tokenizer; None: the one saved with the model. Without a pad token its end token pads;
            padding is hidden by the attention mask, so that which token pads cannot matter.
        teacher_model: another model (or name) with the same vocabulary; it is frozen. None: the model itself, with its adapter
            switched off if it has one (one copy in memory), else a frozen copy.
        peft_config: wraps `model` in this adapter.
        eval_dataset: rows scored like forget rows (plain query, first prefix), or a dict of such; the rows under a
            name that starts with `retain` are scored like retain rows.
        callbacks, optimizers: as in `Trainer`.

    Raises:
        TypeError, ValueError, OSError: naming the argument, what came and what was wanted.
        RuntimeError: when training starts, or after its first step, if the teacher is not the untouched base model.

    Logged: `loss`, the objective's value; `forget_loss` and `retain_loss`, the same over forget and over retain
    positions alone. Every mean is over the scored positions of a whole optimizer step (all accumulated micro-batches,
    all processes), never over a micro-batch.

    Memory: the logits tensor `[B, S, V]` never exists, in neither model, forward or backward: only scored positions
    reach the LM head, in tiles within `workspace_bytes`. With an adapter there is one copy of the weights.

    Example:
        >>> args = DuetConfig(
        ...     output_dir=folder, k=8, max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True,
        ...     steering_prefixes=["you know nothing about {subject} ."],
        ... )
        >>> trainer = DuetTrainer(
        ...     model=model,
        ...     args=args,
        ...     forget_dataset=[{"question": "who is ada lovelace ?", "subject": "ada lovelace"}],
        ...     retain_dataset=[{"question": "what is the capital of france ?"}],
        ...     processing_class=tokenizer,
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ..., 'epoch': '2'}
        >>> result.global_step
        2
        >>> trainer.save_model()  # AutoModelForCausalLM.from_pretrained(folder) loads it
    """

    # compute_loss divides by the count of the whole accumulated step; the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: DuetConfig,
        forget_dataset: Any,
        retain_dataset: Any = None,
        processing_class: Any = None,
        teacher_model: str | os.PathLike | nn.Module | None = None,
        peft_config: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        if not isinstance(args, DuetConfig):
            raise TypeError(f"args: wanted a DuetConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: {args.n_gpu} GPUs in one process would run nn.DataParallel, which copies the model at each step; "
                "start one process per GPU (torchrun, accelerate launch) or set CUDA_VISIBLE_DEVICES"
            )
        self.objective = find_objective(args.objective)
        if self.objective.targets is None and teacher_model is not None:
            raise ValueError(
                f"teacher_model: wanted None, because objective {args.objective!r} has no teacher"
            )
        if args.workspace_bytes is not None:
            set_workspace_bytes(args.workspace_bytes)
        _check_output_dir(args.output_dir)
        forget = read_rows(forget_dataset, "forget_dataset")  # cheap: before a large model is loaded
        retain = [] if retain_dataset is None else read_rows(retain_dataset, "retain_dataset")

        model = load_model(model, "model", args.model_init_kwargs)
        tokenizer = load_tokenizer(model) if processing_class is None else processing_class
        self.pad_id = padding_id(tokenizer)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        head = check_head(model)
        if self.objective.targets is teacher_topk and args.k > head.num_ids:
            raise ValueError(f"k: wanted at most the vocabulary's {head.num_ids}, got {args.k}")

        self.renderer = PromptRenderer(tokenizer, args.plain_template, args.chat_template_kwargs)
        train_dataset = self._dataset(forget, retain, args, model)
        self._train_subjects = train_dataset.subjects
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._eval_rows(rows, f"eval_dataset[{name!r}]", args, model, name.startswith("retain"))
                for name, rows in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._eval_rows(eval_dataset, "eval_dataset", args, model)
        self.teacher = (
            None if self.objective.targets is None else self._choose_teacher(model, teacher_model, args, head)
        )
        self._logged: dict[str, Tensor] = {}

        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(self.pad_id, tokenizer.padding_side),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._sampler = UnlearnSampler(
            train_dataset.num_forget,
            train_dataset.num_retain,
            args.retain_per_forget,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        self.add_callback(_SetEpoch(self._sampler))
        if self.teacher is not None:
            self.teacher.to(args.device)
            self.add_callback(TeacherGuard(self._probe, starts_equal=teacher_model is None))

    # -- what is built once --------------------------------------------------------------------------------------

    def _choose_teacher(
        self, model: nn.Module, teacher_model: Any, args: DuetConfig, head: LMHead
    ) -> Teacher:
        if teacher_model is None:
            return AdapterOffTeacher() if hasattr(model, "disable_adapter") else FrozenTeacher.copy_of(model)
        teacher = load_model(teacher_model, "teacher_model", args.model_init_kwargs)
        if teacher is model or teacher is base_language_model(model):
            raise ValueError(
                "teacher_model: wanted another model than the one that is trained; None makes a copy"
            )
        size = check_head(teacher).num_ids
        if size != head.num_ids:
            raise ValueError(
                f"teacher_model: wanted the model's vocabulary of {head.num_ids} ids, got {size}; the teacher's top-k "
                "ids must mean the same tokens"
            )
        return FrozenTeacher(teacher)

    def _dataset(self, forget, retain, args: DuetConfig, model: nn.Module, subjects=None) -> UnlearnDataset:
        positions = args.positions or self.objective.positions
        max_scored = {"first": 1, "first_n": args.num_positions, "answer": None}[positions]
        answers = "dataset" if self.objective.needs_answers else args.answer_source
        if positions == "first" and not self.objective.needs_answers:
            answers = "none"
        elif answers == "teacher":
            max_scored = min(max_scored or args.max_answer_tokens, args.max_answer_tokens)
        steered = self.objective.targets is not None and self.objective.teacher_sees == "steered"
        return UnlearnDataset(
            forget,
            retain,
            self.renderer,
            args.steering_prefixes if steered else [],
            reverse_prompts=args.reverse_prompts,
            reverse_fraction=args.reverse_prompt_fraction,
            reverse_role=args.reverse_prompt_role,
            answers=answers,
            max_scored=max_scored,
            max_length=args.max_length or context_length(model),
            subjects=subjects,
            seed=args.seed,
        )

    def _eval_rows(self, rows: Any, argument: str, args: DuetConfig, model: nn.Module, retain: bool = False):
        queries = read_rows(rows, argument)
        if retain:
            return self._dataset([], queries, args, model, self._train_subjects)
        return self._dataset(queries, [], args, model)

    def get_train_dataloader(self):
        self._answer(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, UnlearnDataset)):
            eval_dataset = self._eval_rows(eval_dataset, "eval_dataset", self.args, self.model)
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        self._answer(self.eval_dataset[chosen] if isinstance(chosen, str) else chosen)
        return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, train_dataset=None):
        return self._sampler

    def _answer(self, dataset: UnlearnDataset) -> None:
        """Let the teacher answer the steered queries whose answers are missing, in batches of similar length."""
        missing = sorted(dataset.unanswered(), key=lambda item: len(item[1]))
        student = self.accelerator.unwrap_model(self.model)
        size, hidden = self.args.eval_batch_size, self.args.disable_tqdm or not self.is_world_process_zero()
        batches = range(0, len(missing), size)
        for start in logging.tqdm(batches, desc="the teacher answers", disable=hidden or not missing):
            keys, prompts = zip(*missing[start : start + size], strict=True)
            answers = self.teacher.run(
                lambda model, prompts=prompts: generate_answers(
                    model, prompts, self.processing_class, self.pad_id, dataset.max_scored
                ),
                student,
                student,
            )
            dataset.teacher_answers.update(zip(keys, answers, strict=True))

    # -- one step ------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss of one micro-batch, divided by the counts of the whole accumulated step."""
        student = self.accelerator.unwrap_model(model)
        counts = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)
        targets = self._targets(model, student, inputs)

        def loss_of_student() -> dict[str, Tensor]:
            hidden, head = self._head_inputs(student, inputs)
            labels, query, forget = inputs["labels"], inputs["query"], inputs["forget"]
            return self.objective.loss(Step(hidden, head, targets, labels, query, forget, counts, self.args))

        parts = call_through(model, student, loss_of_student)
        if model.training:
            self._remember(parts)
        # DDP and FSDP average gradients over processes; the counts are already those of all processes.
        loss = parts["loss"] * self.accelerator.num_processes
        return (loss, parts) if return_outputs else loss

    def _targets(self, wrapped: nn.Module, student: nn.Module, inputs: dict[str, Tensor]) -> Any:
        if self.teacher is None:
            return None
        view = "teacher_" if self.objective.teacher_sees == "steered" else ""

        def targets_of(model: nn.Module) -> Any:
            hidden, head = self._head_inputs(model, inputs, view)
            return self.objective.targets(hidden, head, inputs["labels"], self.args)

        return self.teacher.run(targets_of, student, wrapped)

    def _head_inputs(
        self, model: nn.Module, inputs: dict[str, Tensor], view: str = ""
    ) -> tuple[Tensor, LMHead]:
        # accelerate puts autocast around the forward that we replace. Only the backbone wants it: the losses run in
        # the head's dtype, because logits that are rounded before they are compared spoil the gradient.
        with self.accelerator.autocast():
            return head_inputs(
                model,
                inputs[f"{view}input_ids"],
                inputs[f"{view}attention_mask"],
                inputs[f"{view}positions"],
            )

    def _get_num_items_in_batch(self, batch_samples, device):
        """Counts over all micro-batches of a step and all processes (the Trainer's hook for `num_items_in_batch`)."""
        totals = torch.zeros(len(Counts._fields), dtype=torch.int64, device=device)
        for batch in batch_samples:
            query, forget = batch["query"].to(device), batch["forget"].to(device)
            of_forget = forget[query]
            counted = (torch.ones_like(query), of_forget, ~of_forget, forget, ~forget)
            totals += torch.stack([each.sum() for each in counted])
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.gather(totals.unsqueeze(0)).sum(0)
        return Counts(*totals.clamp(min=1).unbind())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    # -- what is logged and guarded ------------------------------------------------------------------------------

    def _remember(self, parts: dict[str, Tensor]) -> None:
        if not self._logged:
            self._logged_since = self.state.global_step
        for name, value in parts.items():
            if name != "loss" and not (name == "retain_loss" and self._sampler.retain_per_epoch == 0):
                self._logged[name] = self._logged.get(name, 0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss (`forget_loss`, `retain_loss`), averaged over the steps since the last log."""
        if "loss" in logs and self._logged:
            values = torch.stack([value.float() for value in self._logged.values()])
            if self.accelerator.num_processes > 1:
                values = self.accelerator.gather(values.unsqueeze(0)).sum(0)
            steps = max(1, self.state.global_step - self._logged_since)
            logs |= dict(zip(self._logged, (values / steps).tolist(), strict=True))
            self._logged = {}
        super().log(logs, start_time)

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's hidden states on a few plain forget queries."""
        dataset: UnlearnDataset = self.train_dataset
        items = [
            {"student": dataset.plain(i), "teacher": None, "answer": [], "scored": 1, "forget": True}
            for i in range(min(_PROBE_QUERIES, dataset.num_forget))
        ]
        inputs = self._prepare_inputs(self.data_collator(items))
        student = self.accelerator.unwrap_model(self.model_wrapped)

        def states(model: nn.Module) -> Tensor:
            with self.accelerator.autocast():
                return hidden_states_at(
                    model, inputs["input_ids"], inputs["attention_mask"], inputs["positions"]
                )

        with torch.no_grad(), evaluating(student):
            own = call_through(self.model_wrapped, student, lambda: states(student))
        return own, self.teacher.run(states, student, self.model_wrapped)


class _SetEpoch(TrainerCallback):
    """Tells the sampler the epoch: the Trainer's own call does not reach it through a resumed, sharded data loader."""

    def __init__(self, sampler: UnlearnSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


def _check_output_dir(path: str) -> None:
    """Found out now rather than at the first checkpoint."""
    while not os.path.exists(path):  # the nearest folder that is there decides
        path = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(path):
        raise NotADirectoryError(f"output_dir: wanted a folder, but {path!r} is a file")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output_dir: wanted a folder that can be written to, but {path!r} cannot")
