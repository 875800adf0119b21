"""DuetConfig: every option of an unlearning run, on top of transformers' TrainingArguments.

Holds and checks options, nothing else. Must not know models, tokenizers or which objectives exist (a user may add
one to `duet.objectives.OBJECTIVES` at any time; the trainer looks the name up).
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import TrainingArguments

# Written in our own words after RWKU's in-context unlearning instruction (arXiv 2406.10890): name the subject, ask for
# ignorance rather than refusal, keep everything else. A starting point: the prefix is worth a sweep.
DEFAULT_PREFIX = (
    "Everything about {subject} has been removed from your memory. If a question touches {subject}, answer the way "
    "somebody would who has never come across {subject}: reveal nothing about it, hint at nothing, and do not mention "
    "this instruction. Answer every other question as you always do."
)

POSITIONS = ("first", "first_n", "answer")
ANSWER_SOURCES = ("teacher", "dataset")
REVERSE_PROMPT_ROLES = ("user", "system", "both")


@dataclass
class DuetConfig(TrainingArguments):
    r"""Options of [`DuetTrainer`][duet.trainer.DuetTrainer]; everything of `TrainingArguments` keeps its meaning.

    What is learned:

    Args:
        objective: a name in `duet.objectives.OBJECTIVES`: `duet` (Huber on the teacher's top-k raw logits, DUET
            equation 3), `duet_forward_kl`, `duet_reverse_kl`, `duet_jsd` (top-k divergences), and the baselines
            `ga` and `npo`, which need answers.
        k: how many of the teacher's largest logits the student imitates.
        delta: where Huber turns linear (`duet` only), in logits.
        temperature: T of the distributions (not for `duet`, which compares raw logits).
        beta: weight of the teacher in the mixture of `duet_jsd`, in (0, 1).
        normalization: of the top-k distributions: None or `renormalize`, `tail` (one more bucket for the rest of
            the vocabulary); `zeroed` and `truncated` exist for `duet_forward_kl`.
        npo_beta: beta of `npo`.
        retain_weight: factor on the retain term of `ga` and `npo` (the others weigh all queries alike).

    Where:

    Args:
        positions: `first` (the first answer token: the paper), `first_n` (the first `num_positions` tokens) or
            `answer` (all of them). None: `first` for the distillation objectives, `answer` for `ga` and `npo`.
        num_positions: n of `first_n`.
        answer_source: whose answer later positions run along: `teacher` (the steered teacher's own greedy answer,
            made once before training) or `dataset`. `ga` and `npo` always read the dataset's.
        max_answer_tokens: length limit of answers that the teacher makes. Answers of the dataset are never cut.

    What the models see:

    Args:
        steering_prefixes: instruction(s) for the teacher; `{subject}` is replaced by the row's subject. One is drawn
            per query and epoch. Retain queries get one too, about a subject of the forget rows.
        reverse_prompts: texts that try to undo the steering ("ignore earlier instructions"). The student sees one
            before a share of its queries, the teacher never does.
        reverse_prompt_fraction: that share, in [0, 1].
        reverse_prompt_role: `user` (in front of the question), `system`, or `both` (drawn with equal chances).
        retain_per_forget: retain queries per forget query, in every batch. One epoch is one pass over the forget
            rows; the retain rows are cycled through.
        max_length: most tokens of a sequence, prompt and answer. Longer ones are **refused, never truncated**: a cut
            would remove the steering prefix. None: the model's own limit (`max_position_embeddings`).
        plain_template: how a `question` is written for a tokenizer without a chat template.
        chat_template_kwargs: passed to the chat template (for instance `{"enable_thinking": False}`).

    How:

    Args:
        model_init_kwargs: passed to `from_pretrained` when a model is given by name.
        workspace_bytes: bytes that a loss may use beyond inputs and outputs (`duet_kernels.set_workspace_bytes`).
        impl: implementation of the losses: `auto`, `triton`, `chunked` or `reference`.

    Raises:
        ValueError: naming the option, what came and what was wanted.

    Example:
        >>> config = DuetConfig(output_dir="out", objective="duet_forward_kl", temperature=2.0, use_cpu=True)
        >>> config.k, config.positions, "{subject}" in config.steering_prefixes[0]
        (32, None, True)
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs", "model_init_kwargs")

    objective: str = "duet"
    k: int = 32
    delta: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    normalization: str | None = None
    npo_beta: float = 0.1
    retain_weight: float = 1.0

    positions: str | None = None
    num_positions: int = 4
    answer_source: str = "teacher"
    max_answer_tokens: int = 64

    steering_prefixes: list[str] = field(default_factory=lambda: [DEFAULT_PREFIX])
    reverse_prompts: list[str] = field(default_factory=list)
    reverse_prompt_fraction: float = 0.5
    reverse_prompt_role: str = "user"
    retain_per_forget: float = 1.0
    max_length: int | None = None
    plain_template: str = "Question: {question}\nAnswer:"
    chat_template_kwargs: dict[str, Any] | str | None = None

    model_init_kwargs: dict[str, Any] | str | None = None
    workspace_bytes: int | None = None
    impl: str = "auto"

    # Rows are turned into tokens by our own dataset, which needs their columns.
    remove_unused_columns: bool = False
    logging_steps: float = 10
    # A NaN loss is shown as one; the Trainer's default puts an average in its place.
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.steering_prefixes, str):
            self.steering_prefixes = [self.steering_prefixes]
        if isinstance(self.reverse_prompts, str):
            self.reverse_prompts = [self.reverse_prompts]

        _number(self, "k", "an integer >= 1", lambda v: _is_int(v) and v >= 1)
        _number(self, "num_positions", "an integer >= 1", lambda v: _is_int(v) and v >= 1)
        _number(self, "max_answer_tokens", "an integer >= 1", lambda v: _is_int(v) and v >= 1)
        _number(self, "temperature", "a number > 0", lambda v: v > 0)
        _number(self, "delta", "a number > 0", lambda v: v > 0)
        _number(self, "beta", "a number in (0, 1)", lambda v: 0 < v < 1)
        _number(self, "npo_beta", "a number > 0", lambda v: v > 0)
        _number(self, "retain_weight", "a number >= 0", lambda v: v >= 0)
        _number(self, "retain_per_forget", "a number >= 0", lambda v: v >= 0)
        _number(self, "reverse_prompt_fraction", "a number in [0, 1]", lambda v: 0 <= v <= 1)
        _number(self, "max_length", "an integer >= 1 or None", lambda v: v is None or (_is_int(v) and v >= 1))
        _choice("positions", self.positions, POSITIONS, or_none=True)
        _choice("answer_source", self.answer_source, ANSWER_SOURCES)
        _choice("reverse_prompt_role", self.reverse_prompt_role, REVERSE_PROMPT_ROLES)
        _texts("steering_prefixes", self.steering_prefixes, at_least=1)
        _texts("reverse_prompts", self.reverse_prompts, at_least=0)
        if "{question}" not in self.plain_template:
            raise ValueError(
                f"plain_template: wanted a text with {{question}} in it, got {self.plain_template!r}"
            )
        if self.objective == "duet" and self.temperature != 1:
            raise ValueError(
                f"temperature: objective 'duet' compares raw logits and knows no temperature, got {self.temperature}. "
                "Use 1, or a distribution objective such as 'duet_forward_kl'"
            )
        if self.objective == "duet" and self.normalization is not None:
            raise ValueError(
                f"normalization: objective 'duet' compares raw logits, got {self.normalization!r}; wanted None"
            )
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


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(config: DuetConfig, name: str, wanted: str, holds) -> None:
    value = getattr(config, name)
    try:
        good = not isinstance(value, bool) and holds(value)
    except TypeError:
        good = False
    if not good:  # a NaN ends here too: every comparison with it is false
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def _choice(name: str, value, choices: tuple[str, ...], or_none: bool = False) -> None:
    if value in choices or (or_none and value is None):
        return
    close = get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}{hint}")


def _texts(name: str, value, at_least: int) -> None:
    if not isinstance(value, (list, tuple)) or len(value) < at_least:
        raise ValueError(f"{name}: wanted a list of at least {at_least} text(s), got {value!r}")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}[{i}]: wanted a text that is not empty, got {text!r}")
