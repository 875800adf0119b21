"""DuetTrainer: transformers' Trainer, with the steered model itself as the teacher.

One step, top to bottom (`compute_loss`):

    teacher(prefix + query)  --no gradient-->  targets (its top-k logits, or log-probabilities of the answer)
    student(query)           --backbone-->     hidden states where the answer is predicted
    objective(hidden, LM head, targets)        -> loss, per-step counts in the denominator

Loop, optimizer, logging, checkpoints and resume are the Trainer's own.
"""

import os
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from duet_kernels import LMHead, set_workspace_bytes

from .config import DuetConfig
from .data.dataset import Collator, EpochOf, UnlearnSampler
from .data.prompts import fill_prefix, steered_tokenizer
from .data.rows import check_repeats, read_rows
from .methods.asking import look_at_teacher
from .methods.directions import FixedDirections
from .methods.evaluating import WholeSetLoss, check_fills_a_batch
from .methods.objectives import Counts, Step, fit_model, objective_of
from .methods.reuse import reused_prefixes
from .methods.selectivity import FixedSteps, check_selective
from .methods.sharpness import SharpSteps, check_sharp
from .methods.views import Views, asked_before_training, check_best, datasets_in
from .model import lm, loading
from .model.adapters import check_folder, check_not_earlier, has_adapter
from .model.answers import tokenizer_of
from .model.teacher import live_teacher
from .model.weights import weights_hash
from .output.adapters import AdapterTrainer, add_new_adapter, check_earlier_adapter
from .output.card import STEERING, fingerprint, write_card
from .output.checkpoints import check_output_dir, resumed_checkpoint
from .output.parts import LogsLastStep, LossParts, checked_parts
from .output.record import begin_run, refused_by_all, run_record
from .store.provenance import cached_teacher, open_store
from .store.read import TopKStore

logger = logging.get_logger(__name__)


class DuetTrainer(SharpSteps, FixedSteps, FixedDirections, WholeSetLoss, AdapterTrainer):
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
        peft_config: wraps `model` in this adapter. An adapter that `model` has already (a folder of an earlier run) is merged
            into its weights first, so that the new run starts from what that model does and its teacher is that model; the
            sum is written to `output_dir/base`, on which the new adapter is loaded. With `earlier_adapter="keep"` it stays
            beside the weights, and both are saved as one adapter.
        eval_dataset: rows scored like forget rows (plain query, first prefix), or a dict of such; the rows under a
            name that starts with `retain` are scored like retain rows.
        callbacks: as in `Trainer`.
        optimizers: as in `Trainer`.
        teacher_store: what the teacher said, written by `duet cache` (or `duet.store.build.cache_teacher`): no teacher
            runs. Overrides `args.teacher_store`. Rows of `eval_dataset` must have been cached too.

    Raises:
        TypeError, ValueError, OSError: naming the argument, what came and what was wanted.
        RuntimeError: when training starts, or after its first step, if the teacher is not the untouched base model.

    Logged: `loss`, the objective's value; `forget_loss` and `retain_loss`, the same over forget and over retain
    positions alone. Every mean is over the scored positions of a whole optimizer step (all accumulated micro-batches,
    all processes), never over a micro-batch; that of `eval_*_loss` is over all rows to evaluate on.

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
        {'loss': ..., 'epoch': '2'}
        {'train_runtime': ..., 'epoch': '2'}
        >>> result.global_step
        2
        >>> trainer.save_model()  # AutoModelForCausalLM.from_pretrained(folder) loads it
    """

    # compute_loss divides by the count of the whole accumulated step; the Trainer must not divide again.
    loss_is_scaled_for_ga = True
    # Whether somebody has looked at the steered teacher already: then `train` does not ask it again.
    teacher_measured = False
    _resumed = False

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
        # What is cheap to refuse is refused before a large model is loaded.
        self._check(args, teacher_model, eval_dataset, peft_config)
        self._store = open_store(teacher_store or args.teacher_store, self.objective, args, teacher_model)
        if args.workspace_bytes is not None:
            set_workspace_bytes(args.workspace_bytes)
        check_output_dir(str(args.output_dir))
        forget = read_rows(forget_dataset, "forget_dataset")
        retain = [] if retain_dataset is None else read_rows(retain_dataset, "retain_dataset")
        check_repeats(forget, retain)
        if not retain and self.objective.keeps:
            logger.warning(
                f"retain_dataset (data.retain): got no rows, so that nothing says what objective {args.objective!r} is to keep; "
                "give it rows of what must stay, above all about neighbours of what is forgotten"
            )
        rows = {"forget": forget, "retain": retain}
        self._fingerprints = {k: (len(v), fingerprint([row[:3] for row in v])) for k, v in rows.items() if v}

        earlier, loaded = args.earlier_adapter, (args.model_init_kwargs, loading.loading_device(args))
        model = loading.load_model(model, "model", *loaded, earlier)
        lm.check_whole(model)
        lm.check_decoder(model)
        model = loading.without_frozen_adapter(model, peft_config is not None, earlier)
        loading.keep_differentiable(model, trains=self.objective.loss is not None)
        tokenizer, self.pad_id = tokenizer_of(model, processing_class)
        check_not_earlier(str(args.output_dir), model)
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's first weights, too, follow from the seed
            model = add_new_adapter(model, tokenizer, peft_config, str(args.output_dir), args.should_save)
        head = lm.check_head(model)
        args = fit_model(self.objective, model, head, args)
        if optimizers[0] is not None and self.objective.loss is not None:
            loading.check_optimizer(optimizers[0], model)

        seed = None if self._store is None else self._store.provenance.seed
        self._views = Views.of(self.objective, args, tokenizer, model, seed)
        self.renderer = self._views.renderer
        train_dataset = self._views.dataset(forget, retain)
        self._train_subjects = train_dataset.subjects
        eval_dataset = self._views.evaluated(eval_dataset, self._train_subjects)
        self._other_teacher = teacher_model is not None
        self.teacher = None
        # Hashes of the student and of its teacher, made once: for a store, else when training begins.
        self._weights: str | None = None
        self._taught_by: str | None = None
        if self._store is not None:
            datasets = [train_dataset, *datasets_in(eval_dataset)]
            self._taught_by = self._store.provenance.seal
            self.teacher, self._weights = cached_teacher(
                self._store, model, head, tokenizer, self.objective, args, datasets
            )
        elif self.objective.has_teacher:
            # Sharded parameters are taken apart, and are whole only in a forward of the wrapper. For *_full_eval the
            # Trainer leaves the model where it was until training starts.
            whole, placed = not loading.is_sharded(args), not (args.bf16_full_eval or args.fp16_full_eval)
            early = whole and placed and asked_before_training(self.objective, args)
            share = whole and self.objective.start is None
            self.teacher = live_teacher(model, teacher_model, head, *loaded, early=early, share=share)
        if self.objective.start is not None:  # the teacher's copy has been made
            self.objective.start(model, args)
        if self.objective.loss is not None and not args.deepspeed:  # DeepSpeed keeps fp32 copies itself
            loading.warn_of_half_precision(model)

        drawn = train_dataset.num_forget, train_dataset.num_retain, args.retain_per_forget
        self._sampler = UnlearnSampler(*drawn, seed=args.seed if args.data_seed is None else args.data_seed)
        check_fills_a_batch(len(self._sampler), args)
        self._parts, self._prepared = LossParts(), WeakSet()
        packed, why = loading.can_pack(model, args.padding_free)
        logger.info(f"batches are {'packed' if packed else 'padded'}: {why}")
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(self.pad_id, tokenizer.padding_side, packed),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or ()), self._parts, LogsLastStep()],
            optimizers=optimizers,
        )
        self.check_directions()
        self.add_callback(EpochOf(self._sampler))
        self._reused = reused_prefixes(self, packed)
        if self.teacher is not None:
            self.place_teacher(self._other_teacher)

    # -- what is built once --------------------------------------------------------------------------------------

    def _check(self, args: DuetConfig, teacher_model: Any, eval_dataset: Any, peft_config: Any) -> None:
        if not isinstance(args, DuetConfig):
            raise TypeError(f"args: wanted a DuetConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: {args.n_gpu} GPUs in one process would run nn.DataParallel, which copies the model at each step; "
                "start one process per GPU (torchrun, accelerate launch) or set CUDA_VISIBLE_DEVICES"
            )
        check_earlier_adapter(args.earlier_adapter, peft_config is not None, loading.is_sharded(args))
        self.objective = objective_of(args)
        check_sharp(self.objective, args)
        check_selective(self.objective, args)
        check_best(args, eval_dataset)
        named = f"because objective {args.objective!r}"
        if not self.objective.has_teacher and teacher_model is not None:
            raise ValueError(f"teacher_model: wanted None, {named} has no teacher")
        if self.objective.loss is None and eval_dataset is not None:
            raise ValueError(f"eval_dataset: wanted None, {named} has no loss")

    # -- training ------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """`Trainer.train`; for `in_context`, whose weights stay, the prefix is put into the chat template instead.

        What decides the run is written to `output_dir` (`duet.output.record`), and compared when it is resumed.

        Raises:
            ValueError: resumed with other options, rows, weights, ... than it began with; what changed is named.
        """
        if self.objective.loss is None:
            self._steer_by_template()
            return TrainOutput(0, 0.0, {})
        check_folder(str(self.args.output_dir), has_adapter(self.accelerator.unwrap_model(self.model)))
        with refused_by_all():
            resume_from_checkpoint = resumed_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
            self._keep_record(resume_from_checkpoint)
        known = self.teacher_measured or resume_from_checkpoint or loading.is_sharded(self.args)
        if self.objective.is_steered and self.teacher.watched and not known:
            look_at_teacher(self.train_dataset, self.renderer.tokenizer, self.teacher_says)
        if self.teacher is not None and self.teacher.asks_first:
            for dataset in (self.train_dataset, *datasets_in(self.eval_dataset)):
                self.prepare_rows(dataset)
            self.teacher.gone = True  # a checkpoint may be loaded next, and then steps are made
        self._resumed = bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _steer_by_template(self) -> None:
        """Puts the steering prefix into the chat template: `in_context` trains nothing."""
        subjects = ", ".join(self._train_subjects) or None  # one prefix for every conversation
        said = fill_prefix(self.args.steering_prefixes[0], subjects, "forget_dataset")
        tokenizer, options = self.renderer.tokenizer, self.renderer.template_kwargs
        self.processing_class = steered_tokenizer(tokenizer, said, self.args.steering_place, **options)
        logger.info("in_context: nothing is trained; the chat template now steers (save_model() writes it)")

    def _keep_record(self, resumed: str | None) -> None:
        if not self.is_world_process_zero():
            return
        student = self.accelerator.unwrap_model(self.model)
        if self._weights is None:  # before the first step, also where train() is called again
            self._weights = weights_hash(student)
        if self._other_teacher and self._taught_by is None:
            self._taught_by = weights_hash(self.teacher.model)
        tokenizer, rows = self.renderer.tokenizer, self._fingerprints
        record = run_record(student, self._weights, tokenizer, self.args, rows, self._taught_by)
        record["override_wordings"] = list(self.train_dataset.reverse_prompts)
        begin_run(self.args.output_dir, record, resumed and Path(resumed).parent)

    # -- what is asked before a dataset is used ---------------------------------------------------------------------

    def get_train_dataloader(self):
        self.prepare_rows(self.train_dataset)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset=None):
        return self._sampler

    # -- one step ------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss of one micro-batch, divided by the counts of the whole accumulated step."""
        parts = self.as_stepped(self.parts_of(model, inputs, num_items_in_batch))
        if model.training:
            left_out = ("loss", "retain_loss") if self._sampler.retain_per_epoch == 0 else ("loss",)
            logged = {name: value for name, value in parts.items() if name not in left_out}
            self._parts.add(logged, self.state.global_step)
        # DDP and FSDP average gradients over processes; the counts are already those of all processes.
        loss = parts["loss"] * self.accelerator.num_processes
        return (loss, parts) if return_outputs else loss

    def parts_of(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> dict[str, Tensor]:
        """What the objective's loss returns for one micro-batch."""
        student = self.accelerator.unwrap_model(model)
        counts: Any = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)
        targets = inputs.get("targets")
        if self.objective.targets is not None:
            targets = self.teacher.targets(targets, lambda m: self._targets_by(m, inputs), student, model)

        def loss_of_student() -> dict[str, Tensor]:
            hidden, head = self.head_inputs(student, inputs)
            labels, query, forget = inputs["labels"], inputs["query"], inputs["forget"]
            parts = self.objective.loss(Step(hidden, head, targets, labels, query, forget, counts, self.args))
            needed = ("loss", "forget_loss", "retain_loss") if self.objective.sharp else ("loss",)
            return checked_parts(parts, self.args.objective, needed)

        return lm.call_through(model, student, loss_of_student)

    def _targets_by(self, teacher: nn.Module, inputs: dict[str, Tensor]) -> Any:
        view = "teacher_" if self.objective.teacher_sees == "steered" else ""
        hidden, head = self.head_inputs(teacher, inputs, view)
        return self.objective.targets(hidden, head, inputs["labels"], self.args)

    def head_inputs(
        self, model: nn.Module, inputs: dict[str, Any], view: str = "", to_the_end: bool = False
    ) -> tuple[Tensor, LMHead]:
        layer = self.args.rmu_layer if self.objective.layer and not to_the_end else None
        ids, mask = inputs[f"{view}input_ids"], inputs.get(f"{view}attention_mask")
        places, packed = inputs[f"{view}positions"], inputs.get(f"{view}position_ids")
        # accelerate puts autocast around the forward that we replace. Only the backbone wants it: the losses run in
        # the head's dtype, because logits that are rounded before they are compared spoil the gradient.
        with self.accelerator.autocast():
            if (beginning := inputs.get(f"{view}beginning")) is not None:
                hidden = self._reused.table.hidden_states_at(model, beginning, ids, mask, places)
            else:
                hidden = lm.hidden_states_at(model, ids, mask, places, layer, packed)
        head = LMHead.of(model)
        return hidden.to(head.weight.dtype), head

    def _get_num_items_in_batch(self, batch_samples, device):
        """Counts over all micro-batches of a step and all processes (the Trainer's hook for `num_items_in_batch`)."""
        if not batch_samples:
            return None
        totals = torch.stack([self.objective.count(batch).to(device) for batch in batch_samples]).sum(0)
        return Counts.of(self.accelerator.gather(totals.unsqueeze(0)).sum(0))

    # -- what is logged, watched and saved -----------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss (`forget_loss`, `retain_loss`), averaged over the steps since the last log."""
        if "loss" in logs:
            gather = self.accelerator.gather
            logs |= self._parts.means(self.state.global_step, lambda values: gather(values.unsqueeze(0)))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, and `prompting.json`: how prompts are written for this model.

        Raises:
            ValueError: weights would be saved beside an adapter, or an adapter beside weights.
        """
        adapter = has_adapter(self.accelerator.unwrap_model(self.model))
        check_folder(output_dir or str(self.args.output_dir), adapter)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.args.prompting.save(output_dir or self.args.output_dir)

    def create_model_card(self, model_name: str | None = None, **_: Any) -> None:
        """Writes README.md: method, fingerprints of the data, metrics as last logged."""
        if self.is_world_process_zero():
            teacher = None if self.teacher is None else type(self.teacher).__name__
            model, history = self.accelerator.unwrap_model(self.model), self.state.log_history
            if self._resumed:  # the Trainer divides what was added up since the resume by all steps
                history = [entry for entry in history if "train_loss" not in entry]
            steering = STEERING if self.objective.shows_prefix else ()
            reads, rows = (*self.objective.reads, *steering), self._fingerprints
            write_card(self.args, model, reads, rows, history, teacher, model_name)
