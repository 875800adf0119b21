"""DuetConfig: every option of an unlearning run, on top of transformers' TrainingArguments."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from .methods.noising import UndoOptions
from .methods.objectives.baselines import BaselineOptions
from .methods.objectives.deep import DeepOptions
from .methods.objectives.distillation import DistillationOptions
from .methods.views import ViewOptions
from .options import NotNegative, check_options


@dataclass
class DuetConfig(
    DistillationOptions, BaselineOptions, DeepOptions, UndoOptions, ViewOptions, TrainingArguments
):
    r"""Options of [`DuetTrainer`][duet.trainer.DuetTrainer]; everything of `TrainingArguments` keeps its meaning.

    All are flat (`DuetConfig(k=8, npo_beta=0.2)`, `--npo_beta 0.2`); what each means is written beside what reads it:
    `ViewOptions` (what the models see, and where they are compared), `CommonOptions` (k, retain_weight, impl),
    `DistillationOptions`, `BaselineOptions`, `DeepOptions` and `UndoOptions` (single methods). `help(duet.DuetConfig)`
    shows all of them. The others:

    Args:
        objective: a name in `duet.OBJECTIVES`. Query-only: `duet` (Huber on the teacher's top-k raw logits, DUET equation
            3), `duet_adversarial` (the same, with reverse prompts before a share of the student's queries), `duet_kl`
            (= `duet_forward_kl`), `duet_reverse_kl`, `duet_jsd` (top-k divergences), `bidirectional` (pull + push),
            `duet_deep` (survives prefills and relearning), `undo` (perturb an unlearned model, then distil it) and
            `in_context` (the steered teacher itself: nothing is trained, the prefix goes into the chat template that is
            saved). With the answers that are to be forgotten: `ga`, `graddiff`, `npo` (and `graddiff_kl`, `npo_kl`, whose
            retain term is KL(base || student) instead of the answers' NLL), `simnpo`, `undial`, `shred`, `rmu`;
            `refusal` needs the answers of retain rows only.
        retain_per_forget: retain queries per forget query, in every batch. One epoch is one pass over the forget
            rows; the retain rows are cycled through.
        padding_free: whether the sequences of a batch follow each other in one instead of being padded. None: where
            flash-attn runs, which then does no work for padding.
        teacher_store: folder written by `duet cache`: the teacher's logits are read from it and no teacher runs. Made for
            another model, tokenizer, prefix, temperature or dataset, it is refused.
        teacher_store_same_model: whether the cached teacher must be the model that is trained (False: any model with
            the same tokenizer and vocabulary size).
        model_init_kwargs: passed to `from_pretrained` when a model is given by name.
        workspace_bytes: bytes that a loss may use beyond inputs and outputs (`duet_kernels.set_workspace_bytes`).

    Raises:
        ValueError: naming the option, what came and what was wanted.

    Example:
        >>> config = DuetConfig(output_dir="out", objective="duet_forward_kl", temperature=2.0, use_cpu=True)
        >>> config.k, config.positions, "{subject}" in config.steering_prefixes[0]
        (32, None, True)
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs", "model_init_kwargs")

    objective: str = "duet"
    retain_per_forget: NotNegative = 1.0
    padding_free: bool | None = None
    teacher_store: str | None = None
    teacher_store_same_model: bool = True
    model_init_kwargs: dict[str, Any] | str | None = None
    workspace_bytes: int | None = None

    # Rows are turned into tokens by our own dataset, which needs their columns.
    remove_unused_columns: bool = False
    logging_steps: float = 10
    # A NaN loss is shown as one; the Trainer's default puts an average in its place.
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_options(self)
        _ = self.prompting  # checked when it is made
        for name, allowed, why in _UNSUPPORTED:
            if getattr(self, name) != allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {allowed!r}: {why}")


# Options of TrainingArguments that this trainer would otherwise ignore in silence.
_UNSUPPORTED = (
    ("remove_unused_columns", False, "the rows' columns are read when queries are turned into tokens"),
    ("label_smoothing_factor", 0.0, "the losses here have no label smoothing"),
    ("torch_compile", False, "the loss runs inside the wrapped model's forward, which changes at every step"),
    (
        "train_sampling_strategy",
        "random",
        "forget and retain queries are interleaved by a sampler of our own",
    ),
)
