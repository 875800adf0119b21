"""DuetTrainer: transformers' Trainer, with the steered model itself as the teacher.

One step, top to bottom (`compute_loss`):

    teacher(prefix + query)  --no gradient-->  targets (its top-k logits, or log-probabilities of the answer)
    student(query)           --backbone-->     hidden states where the answer is predicted
    objective(hidden, LM head, targets)        -> loss, per-step counts in the denominator

Loop, optimizer, logging, checkpoints and resume are the Trainer's own. Must not know the tiny world or the CLI.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from duet_kernels import LMHead, set_workspace_bytes
from duet_kernels.workspace import workspace_bytes

from .config import DuetConfig
from .data.dataset import Collator, UnlearnDataset, UnlearnSampler
from .data.prompts import Prompting, PromptRenderer, fill_prefix, steered_tokenizer
from .data.rows import check_repeats, read_rows
from .methods.objectives import Counts, Step, answer_topk, check_options, find_objective, teacher_topk
from .methods.reuse import ReusedPrefixes, whole_prompts_because
from .methods.views import asked_before_training, build_dataset, scored_positions
from .model.lm import (
    add_adapter,
    base_language_model,
    call_through,
    can_pack,
    check_head,
    check_layer,
    context_length,
    evaluating,
    generate_answers,
    head_inputs,
    hidden_states_at,
    is_sharded,
    keep_differentiable,
    load_model,
    load_tokenizer,
    loading_device,
    padding_id,
    rounding_of_a_fresh_adapter,
    select_parameters,
    warn_of_half_precision,
)
from .model.teacher import (
    AdapterOffTeacher,
    CachedTeacher,
    EarlyTeacher,
    FrozenTeacher,
    Teacher,
    TeacherGuard,
)
from .output.card import fingerprint, model_card
from .output.checkpoints import ResumableTrainer, check_output_dir
from .output.record import begin_run, run_record
from .store.provenance import check_store, open_store, provenance_of
from .store.read import TopKStore
from .store.weights import weights_hash

logger = logging.get_logger(__name__)
_PROBE_QUERIES = 4
_PER_POSITION = ("positions", "teacher_positions", "labels", "query", "targets")


class DuetTrainer(ResumableTrainer):
    r"""Trains a model to forget, by imitating itself steered by a prompt (DUET, arXiv 2601.21283).

        min_theta  mean over queries x and scored positions of  D( p_theta(. | x, y_<j), p_base(. | c, x, y_<j) )

    with c the steering prefix, which only the teacher sees. The other objectives are in `duet.methods.objectives`.

    Args:
        model: a causal language model, PEFT-wrapped or not, or the name or folder of one. It is trained in place.
        args: a [`DuetConfig`][duet.config.DuetConfig].
        forget_dataset: rows to forget: `{"question", "subject"?, "answer"?}`, `{"prompt", ...}` (plain text to
            continue, or messages) or `{"messages": [...]}`.
        retain_dataset: rows whose answers must stay; same formats. None: none.
        processing_class: the tokenizer; None: the one saved with the model. Without a pad token its end token pads;
            padding is hidden by the attention mask, so that which token pads cannot matter.
        teacher_model: another model (or name) with the same vocabulary; it is frozen. None: the model itself, with its adapter
            switched off if it has one (one copy in memory), else a frozen copy; no copy where everything can be asked
            before the first step (`npo`, `npo_kl`, `graddiff_kl`, `undial`, `shred` without views that are drawn,
            `duet_deep`): rows to evaluate on must then be given here.
        peft_config: wraps `model` in this adapter.
        eval_dataset: rows scored like forget rows (plain query, first prefix), or a dict of such; the rows under a
            name that starts with `retain` are scored like retain rows.
        callbacks, optimizers: as in `Trainer`.
        teacher_store: what the teacher said, written by `duet cache` (or `duet.store.build.cache_teacher`): no teacher
            runs. Overrides `args.teacher_store`. Rows of `eval_dataset` must have been cached too.

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
        teacher_store: str | os.PathLike | TopKStore | None = None,
    ):
        if not isinstance(args, DuetConfig):
            raise TypeError(f"args: wanted a DuetConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: {args.n_gpu} GPUs in one process would run nn.DataParallel, which copies the model at each step; "
                "start one process per GPU (torchrun, accelerate launch) or set CUDA_VISIBLE_DEVICES"
            )
        self.objective = find_objective(args.objective)
        check_options(self.objective, args)
        if not self.objective.has_teacher and teacher_model is not None:
            raise ValueError(
                f"teacher_model: wanted None, because objective {args.objective!r} has no teacher"
            )
        self._store = open_store(teacher_store or args.teacher_store, self.objective, args, teacher_model)
        if self.objective.loss is None and eval_dataset is not None:
            raise ValueError(f"eval_dataset: wanted None, because objective {args.objective!r} has no loss")
        if args.workspace_bytes is not None:
            set_workspace_bytes(args.workspace_bytes)
        check_output_dir(args.output_dir)
        forget = read_rows(forget_dataset, "forget_dataset")  # cheap: before a large model is loaded
        retain = [] if retain_dataset is None else read_rows(retain_dataset, "retain_dataset")
        check_repeats(forget, retain)

        model = load_model(model, "model", args.model_init_kwargs, loading_device(args))
        keep_differentiable(model)
        tokenizer = load_tokenizer(model) if processing_class is None else processing_class
        self.pad_id = padding_id(tokenizer)
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's first weights, too, follow from the seed
            model = add_adapter(model, peft_config)
        head = check_head(model)
        if self.objective.targets in (teacher_topk, answer_topk) and args.k > head.num_ids:
            raise ValueError(f"k: wanted at most the vocabulary's {head.num_ids}, got {args.k}")

        self._fingerprints = {
            name: (len(rows), fingerprint([row[:3] for row in rows]))
            for name, rows in (("forget", forget), ("retain", retain))
            if rows
        }
        if self.objective.layer:
            args.rmu_layer = check_layer(model, args.rmu_layer)
        if self.objective.trains is not None:
            select_parameters(model, lambda name: self.objective.trains(name, args), args.objective)
        self._prompting = Prompting(args.plain_template, args.chat_template_kwargs or {})
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
        # Hashes of the student and of who teaches it, made once: for a store, else when training begins.
        self._weights: str | None = None
        self._taught_by = None if self._store is None else self._store.provenance.seal
        if self._store is not None:
            evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            datasets = [train_dataset, *(rows for rows in evals if rows is not None)]
            self.teacher = self._cached_teacher(model, head, args, datasets)
        else:
            has_teacher = self.objective.has_teacher
            self.teacher = self._choose_teacher(model, teacher_model, args, head) if has_teacher else None
        self._other_teacher = teacher_model is not None
        self._logged: dict[str, Tensor] = {}
        self._prepared: list[UnlearnDataset] = []
        if self.objective.start is not None:  # the teacher's copy has been made
            self.objective.start(model, args)
        if self.objective.loss is not None and not args.deepspeed:  # DeepSpeed keeps fp32 copies itself
            warn_of_half_precision(model)

        packed, why = can_pack(model) if args.padding_free is None else (args.padding_free, "asked for")
        logger.info(f"batches are {'packed' if packed else 'padded'}: {why}")
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(self.pad_id, tokenizer.padding_side, packed),
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
        self._reused = self._reusing(packed)
        if self.teacher is not None:
            fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            if fsdp1 and isinstance(self.teacher, AdapterOffTeacher):
                raise ValueError(
                    "fsdp_version: wanted 2, got 1: FSDP1 leaves an adapter on where the teacher is to answer without "
                    "it, so that the student would be its own teacher. Set it to 2, or pass teacher_model"
                )
            self.teacher.to(args.device)
            # A store cannot change while the student is trained, nor what was asked before.
            if not isinstance(self.teacher, (CachedTeacher, EarlyTeacher)):
                same = teacher_model is None and self.objective.starts_at_teacher
                self.add_callback(TeacherGuard(self._probe, same, rounding_of_a_fresh_adapter(self.model)))

    # -- what is built once --------------------------------------------------------------------------------------

    def _choose_teacher(
        self, model: nn.Module, teacher_model: Any, args: DuetConfig, head: LMHead
    ) -> Teacher:
        if teacher_model is None and hasattr(model, "disable_adapter"):
            return AdapterOffTeacher()
        if teacher_model is None:
            # Sharded parameters are taken apart, and are whole only in a forward of the wrapper. For *_full_eval the
            # Trainer leaves the model where it was until training starts.
            alone, placed = not is_sharded(args), not (args.bf16_full_eval or args.fp16_full_eval)
            if alone and placed and asked_before_training(self.objective, args):
                return EarlyTeacher()
            return FrozenTeacher.copy_of(model, share=alone and self.objective.start is None)
        teacher = load_model(teacher_model, "teacher_model", args.model_init_kwargs, loading_device(args))
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
        length = args.max_length or context_length(model)
        seed = None if self._store is None else self._store.provenance.seed
        return build_dataset(forget, retain, self.objective, args, self.renderer, length, subjects, seed)

    def _eval_rows(self, rows: Any, argument: str, args: DuetConfig, model: nn.Module, retain: bool = False):
        queries = read_rows(rows, argument)
        if retain:
            return self._dataset([], queries, args, model, self._train_subjects)
        return self._dataset(queries, [], args, model)

    def _cached_teacher(
        self, model, head: LMHead, args: DuetConfig, datasets: list[UnlearnDataset]
    ) -> CachedTeacher:
        positions = scored_positions(self.objective, args)
        wanted = provenance_of(model, head, self.renderer.tokenizer, args, datasets[0], positions)
        check_store(self._store, wanted, args)
        self._weights = wanted.weights
        teacher = CachedTeacher(self._store, args.k)
        for dataset in datasets:
            teacher.serve(dataset)
        return teacher

    def _reusing(self, packed: bool) -> ReusedPrefixes | None:
        """What reads steering prefixes once, if a live teacher can."""
        live = isinstance(self.teacher, (AdapterOffTeacher, FrozenTeacher))
        why = whole_prompts_because(self.args, packed, is_sharded(self.args)) if live else None
        if why is not None:
            logger.info(f"the teacher reads whole prompts: {why}")
        if not live or why is not None:
            return None

        def ask(function: Callable[[nn.Module], Any]) -> Any:
            def under_autocast(model: nn.Module) -> Any:
                with self.accelerator.autocast():
                    return function(model)

            return self.ask_teacher(under_autocast)

        def states(items: list[dict[str, Any]]) -> Tensor:
            inputs = self._prepare_inputs(self.data_collator(items))
            return self.ask_teacher(lambda model: self._head_inputs(model, inputs, "teacher_")[0])

        half = self.args.bf16 or self.args.fp16 or base_language_model(self.model).dtype.itemsize < 4
        most = workspace_bytes(self.args.device)
        return ReusedPrefixes(ask, states, self.args.eval_batch_size, most, half)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """`Trainer.train`; for `in_context`, whose weights stay, the prefix is put into the chat template instead.

        What decides the run is written to `output_dir` (`duet.output.record`), and compared when it is resumed.

        Raises:
            ValueError: resumed with other options, rows, weights, ... than it began with; what changed is named.
        """
        if self.objective.loss is None:
            return self._steer()
        self._keep_record(resume_from_checkpoint)
        if isinstance(self.teacher, EarlyTeacher) and not self.teacher.gone:
            evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for dataset in filter(None, (self.train_dataset, *evals.values())):
                self._prepare_rows(dataset)
            self.teacher.gone = True  # a checkpoint may be loaded next, and then steps are made
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _steer(self) -> TrainOutput:
        people = ", ".join(self.train_dataset.subjects) or None
        instruction = fill_prefix(self.args.steering_prefixes[0], people, "forget_dataset")
        self.processing_class = steered_tokenizer(
            self.processing_class, instruction, **self.renderer.template_kwargs
        )
        logger.info("in_context: nothing is trained; the chat template now steers (save_model() writes it)")
        return TrainOutput(0, 0.0, {})

    def _keep_record(self, resume_from: str | bool | None) -> None:
        if not self.is_world_process_zero():
            return
        student = self.accelerator.unwrap_model(self.model)
        if self._weights is None:  # before the first step, also where train() is called again
            self._weights = weights_hash(student)
        if self._other_teacher and self._taught_by is None:
            self._taught_by = weights_hash(self.teacher.model)
        tokenizer, rows = self.renderer.tokenizer, self._fingerprints
        record = run_record(student, self._weights, tokenizer, self.args, rows, self._taught_by)
        begun_in = self.args.output_dir if resume_from is True else resume_from and Path(resume_from).parent
        begin_run(self.args.output_dir, record, begun_in)

    # -- what is asked before a dataset is used ---------------------------------------------------------------------

    def get_train_dataloader(self):
        self._prepare_rows(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, UnlearnDataset)):
            eval_dataset = self._eval_rows(eval_dataset, "eval_dataset", self.args, self.model)
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        self._prepare_rows(self.eval_dataset[chosen] if isinstance(chosen, str) else chosen)
        return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, train_dataset=None):
        return self._sampler

    def _prepare_rows(self, dataset: UnlearnDataset) -> None:
        """What is asked of the frozen teacher before a dataset is used: answers, and what the objective prepares."""
        if isinstance(self.teacher, CachedTeacher) and dataset.cached_targets is None:
            self.teacher.serve(dataset)
        self._answer(dataset)
        if self._reused is not None:
            self._reused.serve(dataset, self._uses(dataset))
        asked_first = isinstance(self.teacher, EarlyTeacher) and self.objective.targets is not None
        if asked_first and dataset.cached_targets is None:
            self.teacher.serve(dataset, self._targets_of_rows(dataset))
        if self.objective.prepare is not None and not any(dataset is done for done in self._prepared):
            self._prepared.append(dataset)
            self.objective.prepare(self, dataset)

    def _uses(self, dataset: UnlearnDataset) -> int:
        """How many items of a dataset this process will read."""
        if dataset is not self.train_dataset:
            return len(dataset)
        steps = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size
        return steps if steps > 0 else int(len(self._sampler) * self.args.num_train_epochs)

    def _answer(self, dataset: UnlearnDataset) -> None:
        """Let the teacher answer the queries whose answers are missing."""
        missing = dict(dataset.unanswered())
        answers = self.teacher_says(list(missing.values()), dataset.max_scored)
        dataset.teacher_answers.update(zip(missing, answers, strict=True))

    def _targets_of_rows(self, dataset: UnlearnDataset) -> Iterator[tuple[list[int], list[int], Any]]:
        """What the objective wants of the teacher for every row: (rows, how many positions each has, targets)."""
        order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["student"]))
        size = self.args.eval_batch_size
        for start in self.progress(range(0, len(order), size), "the model is asked before it is trained"):
            rows = order[start : start + size]
            items = [dataset[i] for i in rows]
            inputs = self._prepare_inputs(self.data_collator(items))
            targets = self.ask_teacher(lambda model, inputs=inputs: self._targets_by(model, inputs))
            yield rows, [item["scored"] for item in items], targets

    def teacher_says(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The frozen teacher's greedy answers, in batches of similar length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size, answers = self.args.eval_batch_size, {}
        for start in self.progress(range(0, len(order), size), "the teacher answers"):
            batch = order[start : start + size]
            said = self.ask_teacher(
                lambda model, batch=batch: generate_answers(
                    model, [prompts[i] for i in batch], self.processing_class, self.pad_id, max_new_tokens
                )
            )
            answers.update(zip(batch, said, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def progress(self, sequence: Any, doing: str) -> Any:
        """A progress bar around `sequence`, where one is wanted."""
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or len(sequence) == 0
        return logging.tqdm(sequence, desc=doing, disable=hidden)

    def ask_teacher(self, function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` of the frozen teacher, without gradients; outside a training step."""
        student = self.accelerator.unwrap_model(self.model)
        return self.teacher.run(function, student, student)

    def states_of(
        self, model: nn.Module, prompts: list[list[int]], answers: list[list[int]]
    ) -> tuple[Tensor, LMHead]:
        """`[N, D]` hidden states where the tokens of `answers` are predicted, one answer after the other; the head."""
        items = [
            {"student": prompt, "teacher": None, "answer": answer, "scored": len(answer), "forget": True}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return self._head_inputs(model, self._prepare_inputs(self.data_collator(items)))

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
        kept = inputs.get("targets")
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher.topk(kept)
        if kept is not None:
            return kept if self.objective.targets is None else self.teacher.targets(kept)
        if self.teacher is None:
            return None
        return self.teacher.run(lambda model: self._targets_by(model, inputs), student, wrapped)

    def _targets_by(self, teacher: nn.Module, inputs: dict[str, Tensor]) -> Any:
        view = "teacher_" if self.objective.teacher_sees == "steered" else ""
        hidden, head = self._head_inputs(teacher, inputs, view)
        return self.objective.targets(hidden, head, inputs["labels"], self.args)

    def _head_inputs(
        self, model: nn.Module, inputs: dict[str, Tensor], view: str = ""
    ) -> tuple[Tensor, LMHead]:
        # accelerate puts autocast around the forward that we replace. Only the backbone wants it: the losses run in
        # the head's dtype, because logits that are rounded before they are compared spoil the gradient.
        with self.accelerator.autocast():
            if f"{view}beginning" in inputs:
                names = ("beginning", "input_ids", "attention_mask", "positions")
                hidden = self._reused.table.hidden_states_at(model, *(inputs[view + name] for name in names))
                head = LMHead.of(model)
                return hidden.to(head.weight.dtype), head
            return head_inputs(
                model,
                inputs[f"{view}input_ids"],
                inputs.get(f"{view}attention_mask"),
                inputs[f"{view}positions"],
                layer=self.args.rmu_layer if self.objective.layer else None,
                position_ids=inputs.get(f"{view}position_ids"),
            )

    def _get_num_items_in_batch(self, batch_samples, device):
        """Counts over all micro-batches of a step and all processes (the Trainer's hook for `num_items_in_batch`)."""
        totals = torch.zeros(len(Counts._fields), dtype=torch.int64, device=device)
        for batch in batch_samples:
            totals += Counts.of(batch["query"].to(device), batch["forget"].to(device), batch.get("targets"))
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.gather(totals.unsqueeze(0)).sum(0)
        return Counts(*totals.clamp(min=1).unbind())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        # Every process holds its share: the Trainer, which cuts off what it takes for repeats, needs the whole.
        return self.accelerator.gather(loss.detach().reshape(1)).mean(), None, None

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without the rows that accelerate adds to the last batches, so that all processes have as many: not scored."""
        state, rows = self.accelerator.gradient_state, len(inputs["forget"])
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        own = max(0, state.remainder - self.accelerator.process_index * self.args.eval_batch_size)
        if own >= rows:
            return inputs
        scored, kept = len(inputs["query"]), inputs["query"] < own
        per_position = {k: v for k, v in inputs.items() if k in _PER_POSITION}
        cut = tree_map(lambda t: t[kept] if len(t) == scored else t[:own], per_position)
        return inputs | cut | {"forget": inputs["forget"][:own]}

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

    # -- what is saved -------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, and `prompting.json`: how prompts are written for this model."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._prompting.save(output_dir or self.args.output_dir)

    def create_model_card(self, model_name: str | None = None, **_: Any) -> None:
        """Writes README.md: method, fingerprints of the data, metrics as last logged."""
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
        metrics = {k: v for entry in self.state.log_history for k, v in entry.items() if _is_metric(k)}
        text = model_card(
            name=model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
            base_model=getattr(base_language_model(model).config, "_name_or_path", None) or None,
            adapter=adapter and type(adapter).__name__,
            options=self.args,
            reads=self.objective.reads,
            datasets=self._fingerprints,
            metrics=metrics,
            teacher=None if self.teacher is None else type(self.teacher).__name__,
        )
        with open(os.path.join(self.args.output_dir, "README.md"), "w", encoding="utf-8") as file:
            file.write(text)

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
                    model,
                    inputs["input_ids"],
                    inputs.get("attention_mask"),
                    inputs["positions"],
                    position_ids=inputs.get("position_ids"),
                )

        with torch.no_grad(), evaluating(student):
            own = call_through(self.model_wrapped, student, lambda: states(student))
        return own, self.teacher.run(states, student, self.model_wrapped)


def _is_metric(name: str) -> bool:
    return name.endswith("loss")


class _SetEpoch(TrainerCallback):
    """Tells the sampler the epoch: the Trainer's own call does not reach it through a resumed, sharded data loader."""

    def __init__(self, sampler: UnlearnSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))
