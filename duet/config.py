"""DuetConfig: every option of an unlearning run, on top of transformers' TrainingArguments."""

from dataclasses import dataclass, fields
from numbers import Integral
from operator import attrgetter
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import (
    is_torch_bf16_gpu_available,
    is_torch_tf32_available,
    is_torch_xla_available,
)

from .data.prompts import SUBJECT, check_placeholders
from .methods.directions import DirectionOptions
from .methods.noising import UndoOptions
from .methods.objectives.baselines import BaselineOptions
from .methods.objectives.deep import DeepOptions
from .methods.objectives.distillation import DistillationOptions
from .methods.selectivity import SelectivityOptions
from .methods.views import ViewOptions
from .names import check_one_of
from .options import Count, MaybeClip, NotNegative, Positive, check_options, fitted

# What the installed transformers calls it: 5.17 knows the older name alone, version 6 will know the newer alone.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@dataclass
class DuetConfig(
    DistillationOptions,
    BaselineOptions,
    DeepOptions,
    UndoOptions,
    SelectivityOptions,
    DirectionOptions,
    ViewOptions,
    TrainingArguments,
):
    r"""Options of [`DuetTrainer`][duet.trainer.DuetTrainer]; everything of `TrainingArguments` keeps its meaning.

    All are flat (`DuetConfig(k=8, npo_beta=0.2)`, `--npo_beta 0.2`); what each means is written beside what reads it:
    `ViewOptions` (what the models see, and where they are compared), `CommonOptions` (k, retain_weight, impl),
    `DistillationOptions`, `BaselineOptions`, `DeepOptions`, `UndoOptions` and `SelectivityOptions` (single methods), `DirectionOptions`
    (the adapter). `help(duet.DuetConfig)` shows all of them. The others:

    Args:
        objective: a name in `duet.OBJECTIVES`. Query-only: `duet` (Huber on the teacher's top-k raw logits, DUET equation
            3), `duet_adversarial` (the same, with reverse prompts before a share of the student's queries), `duet_kl`
            (= `duet_forward_kl`), `duet_reverse_kl`, `duet_symmetric_kl`, `duet_jsd` (top-k
            divergences), `bidirectional` (pull + push),
            `duet_deep` (survives prefills and relearning), `undo` (perturb an unlearned model, then distil it) and
            `in_context` (the steered teacher itself: nothing is trained, the prefix goes into the chat template that is
            saved). With the answers that are to be forgotten: `ga`, `graddiff`, `npo` (and `graddiff_kl`, `npo_kl`, whose
            retain term is KL(base || student) instead of the answers' NLL), `npo_sam` (NPO with sharpness-aware steps),
            `simnpo`, `undial`, `shred`, `rmu`, `repselect`; `refusal` needs the answers of retain rows only.
        retain_per_forget: retain queries per forget query, in every batch. One epoch is one pass over the forget
            rows; the retain rows are cycled through. Their number in an epoch is rounded up: at least 1, if this is above 0.
        padding_free: whether the sequences of a batch follow each other in one instead of being padded. None: where
            flash-attn runs, which then does no work for padding.
        reuse_prefix: whether a live teacher reads what all prompts under one steering prefix begin with once, and keeps its
            keys and values, in at most `workspace_bytes`; the same up to rounding. Models with sliding windows or
            recurrent layers cannot, and the log says so. `duet cache` does likewise, with sliding windows too.
        bf16: whether the backbone computes in bf16 under autocast. None: on a GPU that is made for it (sm_80 and newer),
            unless `fp16` is set (refused on a CPU); not on a CPU. The losses run in the dtype of the LM head.
        tf32: whether products of fp32 numbers, as those of an fp32 head, are made of TF32 ones (11 bits) on tensor cores. None:
            where the backbone computes in bf16 and the GPU can; plain fp32 products are many times slower.
        activation_checkpointing: whether activations are recomputed in the backward instead of being kept. The older name,
            `gradient_checkpointing`, means the same, with every version of transformers.
        activation_checkpointing_kwargs: what `torch.utils.checkpoint` is given then, or None.
        teacher_store: folder written by `duet cache`: the teacher's logits are read from it and no teacher runs. Made for
            another model, tokenizer, prefix, temperature or dataset, it is refused.
        teacher_store_same_model: whether the cached teacher must be the model that is trained (False: any model with
            the same tokenizer and vocabulary size).
        earlier_adapter: what becomes of an adapter that the model has already, when a new one is trained: `merge` adds it to
            the base, and the sum is saved whole in `output_dir/base`; `keep` leaves it beside the base, and both are saved as
            one adapter on the base, which is not copied: linear layers and plain LoRA only, quantised bases too. Whoever takes
            that adapter off undoes both runs.
        model_init_kwargs: passed to `from_pretrained` when a model is given by name.
        workspace_bytes: bytes that a loss may use beyond inputs and outputs; set for the whole process, later trainers too
            (`duet_kernels.set_workspace_bytes`). None: what is set, or else the default of each device.

    Raises:
        ValueError: naming the option, what came and what was wanted.

    Example:
        >>> config = DuetConfig(output_dir="out", objective="duet_forward_kl", temperature=2.0, use_cpu=True)
        >>> config.k, config.positions, "{subject}" in config.steering_prefixes[0]
        (32, None, True)
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs", "model_init_kwargs")

    bf16: bool | None = None
    tf32: bool | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None

    objective: str = "duet"
    retain_per_forget: NotNegative = 1.0
    padding_free: bool | None = None
    reuse_prefix: bool = True
    teacher_store: str | None = None
    teacher_store_same_model: bool = True
    earlier_adapter: Literal["merge", "keep"] = "merge"
    model_init_kwargs: dict[str, Any] | str | None = None
    workspace_bytes: int | None = None

    # Of TrainingArguments, whose own checks come late or not at all.
    learning_rate: NotNegative = 5e-5
    weight_decay: NotNegative = 0.0
    max_grad_norm: MaybeClip = 1.0
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1

    # Rows are turned into tokens by our own dataset, which needs their columns.
    remove_unused_columns: bool = False
    logging_steps: float = 10
    # A NaN loss is shown as one; the Trainer's default puts an average in its place.
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.get_device_capability() >= (8, 0)
        elif self.bf16 and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            raise ValueError(
                "bf16: wanted None or False, because no device here is made for it (None: True where one is), got True; on a CPU "
                "use_cpu allows it"
            )
        if self.tf32 is None and self.bf16 and not self.use_cpu and is_torch_tf32_available():
            self.tf32 = True
        _name_checkpointing(self)
        for field in fields(self):
            value, maybe = getattr(self, field.name), field.type == int | None
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if (field.type is int or maybe) and not (whole or (maybe and value is None)):
                raise ValueError(
                    f"{field.name}: wanted an integer{' or None' if maybe else ''}, got {value!r}"
                )
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "fp16: wanted False, got True, because accelerate computes in fp32 on a CPU then"
            )
        check_options(self)
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # what the Trainer takes for no limit
        if self.max_steps <= 0:  # else nobody reads it
            fitted("num_train_epochs", self.num_train_epochs, Positive)
        _ = self.prompting  # checked when it is made
        for name, known in _PLACEHOLDERS.items():
            for i, text in enumerate(getattr(self, name)):
                check_placeholders(f"{name}[{i}]", text, known)
        _check_trackers(self.report_to)
        for name, *allowed, why in _UNSUPPORTED:
            value = attrgetter(name)(self)
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, allowed))}: {why}")


# Options of texts, and what is replaced in them.
_PLACEHOLDERS = {
    "steering_prefixes": SUBJECT,
    "reverse_prompts": "",
    "prefills": "",
    "refusals": "",
    "deep_refusals": SUBJECT,
}

# Options of TrainingArguments that this trainer cannot follow: name, what it may be, why.
_UNSUPPORTED = (
    ("remove_unused_columns", False, "the rows' columns are read when queries are turned into tokens"),
    ("label_smoothing_factor", 0.0, "the losses here have no label smoothing"),
    ("include_for_metrics", [], "an evaluation keeps its losses alone"),
    ("batch_eval_metrics", False, "an evaluation keeps its losses alone"),
    ("torch_compile", False, "the loss runs inside the wrapped model's forward, which changes at every step"),
    (
        "train_sampling_strategy",
        "random",
        "forget and retain queries are interleaved by a sampler of our own",
    ),
    ("accelerator_config.split_batches", False, "losses count the rows of whole batches of each process"),
    ("accelerator_config.even_batches", True, "a process without a batch would leave the others waiting"),
    (
        "accelerator_config.dispatch_batches",
        None,
        False,
        "accelerate cannot cut a batch with fewer rows than positions",
    ),
)


def _check_trackers(wanted: Any) -> None:
    """Refuses a tracker whose package is not installed; transformers says so after the model was loaded."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    here = get_available_reporting_integrations()
    for name in [wanted] if isinstance(wanted, str) else wanted or ():
        if name in ("none", "all") or name in here:
            continue
        check_one_of("report_to", name, ("none", "all", *INTEGRATION_TO_CALLBACK))
        raise ValueError(
            f"report_to: {name!r} needs its package, which is not installed here (pip install {name}); wanted 'none' or one "
            f"that is: {', '.join(here) or 'there is none'}"
        )


def _name_checkpointing(config: DuetConfig) -> None:
    """What was asked for under either name goes to the one that the installed transformers reads; the newer name counts first."""
    for end in ("", "_kwargs"):
        names = f"activation_checkpointing{end}", f"gradient_checkpointing{end}"
        given = [value for name in names if (value := getattr(config, name)) is not None]
        for name in names:
            setattr(config, name, None)
        setattr(config, f"{CHECKPOINTING}{end}", given[0] if given else None if end else False)
