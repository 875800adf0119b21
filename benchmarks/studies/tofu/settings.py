"""How large the study is, what it asks before it goes on, and what it compares: all of it data, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from duet.demo import steering


@dataclass(frozen=True)
class Size:
    """One scale of the whole study.

    Attributes:
        layers, hidden, heads, feed_forward, vocab: the model's shape; tied embeddings.
        pretrain_steps, rows_per_step: dialogues read are their product.
        muon_rate, adamw_rate: matrices of the blocks, and everything else, as in `duet.demo.pretrain`.
        unlearn_steps, forget_per_step, retain_per_forget: the same for every method (stages of one share the steps).
        max_answer_tokens: of answers that a teacher gives to be trained on.
        gate_rows, trial_rows, attack_rows: questions of a kind; eval_limit: of each task of the suite (None: all).
        max_new_tokens: of an attacked answer.
        relearn_rates, relearn_curve: the attacker's learning rates and after how many steps he looks.
        reverse_prompts: wordings of each kind (trained on, held out).
        batch_size: sequences at once where nothing is trained.
        rates_tried: of a method's learning rates, the middle ones first.
        impl: of the losses of unlearning, as in DuetConfig.
        lora_rank, pieces: with a pretrained base: of every adapter, and in how many pieces it is fine-tuned; the shape is the
            base's own, pretrain_steps and adamw_rate are the fine-tuning's.
    """

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocab: int
    pretrain_steps: int
    rows_per_step: int
    muon_rate: float = 5e-3
    adamw_rate: float = 3e-3
    unlearn_steps: int = 250
    forget_per_step: int = 32
    retain_per_forget: float = 2.0
    max_answer_tokens: int = 80
    gate_rows: int = 200
    trial_rows: int = 120
    attack_rows: int = 160
    eval_limit: int | None = None
    max_new_tokens: int = 80
    relearn_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    relearn_curve: tuple[int, ...] = (10, 40)
    reverse_prompts: int = 2
    batch_size: int = 256
    rates_tried: int = 3
    impl: str = "auto"
    lora_rank: int = 8
    pieces: int = 5


# Heads of 64 numbers and a feed-forward of 2.7 x hidden, as in Llama. 2500 steps of 256 dialogues, 35 % of them plain,
# show each of the 5,018 plain rows 45 times: the tiny world needs about 50 for facts of one sentence. Of 4,000 answers the
# longest has 113 tokens, and 99 % have at most 65.
PRETRAINED = "pretrained"  # of a base that is given
SIZES: dict[str, Size] = {
    "toy": Size(
        2, 64, 2, 160, 1024, pretrain_steps=40, rows_per_step=16, unlearn_steps=4, forget_per_step=4,
        max_answer_tokens=8, gate_rows=12, trial_rows=8, attack_rows=8, eval_limit=8, max_new_tokens=8,
        relearn_rates=(1e-3,), relearn_curve=(2, 4), reverse_prompts=1, batch_size=32,
        rates_tried=1, pieces=2,
    ),
    "30m": Size(8, 512, 8, 1408, 8192, pretrain_steps=2500, rows_per_step=256),
    "60m": Size(12, 640, 10, 1728, 8192, pretrain_steps=2500, rows_per_step=256),
    # Ten epochs of 4,000 rows, two a piece: an adapter learns with fewer weights than TOFU's five of the whole model.
    PRETRAINED: Size(0, 0, 0, 0, 0, pretrain_steps=1250, rows_per_step=32, adamw_rate=3e-4, batch_size=128),
    "150m": Size(14, 896, 14, 2432, 8192, pretrain_steps=2500, rows_per_step=256),
}  # fmt: skip


def changed(size: Size, settings: list[str]) -> Size:
    """`size` with `name=value` put in; lists are separated by commas.

    Raises:
        ValueError: naming the setting.

    Example:
        >>> changed(SIZES["60m"], ["pretrain_steps=10", "relearn_rates=1e-4,1e-3"]).relearn_rates
        (0.0001, 0.001)
    """
    kinds = get_type_hints(Size)
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in {f.name for f in fields(Size)}:
            raise ValueError(f"set: wanted one of {', '.join(kinds)} as name=value, got {setting!r}")
        try:
            if kinds[name] in (int, float, str):
                given[name] = kinds[name](text)
            elif kinds[name] == int | None:
                given[name] = None if text == "all" else int(text)
            else:
                number = float if "float" in str(kinds[name]) else int
                given[name] = tuple(number(part) for part in text.split(","))
        except ValueError:
            raise ValueError(
                f"set: wanted a value such as {getattr(size, name)} for {name}, got {text!r}"
            ) from None
    return replace(size, **given)


@dataclass(frozen=True)
class Gate:
    """One condition for going on: `number` of the gate's row is `at_least` or `at_most` so much, because `why`."""

    number: str
    why: str
    at_least: float = 0.0
    at_most: float = 1.0

    def holds(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most

    @property
    def wanted(self) -> str:
        return f"at least {self.at_least}" if self.at_least else f"at most {self.at_most}"


GATES = (
    Gate("forget_recall", "what is not known cannot be forgotten", at_least=0.8),
    Gate("retain_recall", "what is not known cannot be kept", at_least=0.8),
    Gate("general_recall", "real authors and the world are a third of model utility", at_least=0.8),
    Gate(
        "teacher_refusal", "DUET imitates the steered model: it must refuse the forget authors", at_least=0.8
    ),
    Gate("teacher_false_refusal", "and nobody else", at_most=0.2),
    Gate("teacher_retain_recall", "it must go on answering about everybody else", at_least=0.7),
    Gate("retrained_forget_recall", "the yardstick must not know the forget authors", at_most=0.5),
    Gate("retrained_retain_recall", "and must know the others as the full model does", at_least=0.8),
)


@dataclass(frozen=True)
class Method:
    """One way to unlearn.

    Attributes:
        about: for the page.
        stages: DuetConfig options, one mapping a stage; the steps are shared out evenly.
        rates: learning rates of the first stage from which the validation authors choose.
        why: of the settings.
        refuses: whether it is meant to end in a refusal.
        queries_only: it reads no answer about the forget authors.
        by_adapter: it can train an adapter on a pretrained base.
        names_only: it needs the author's name in every forget question; other rows are left out.
    """

    about: str
    stages: tuple[dict[str, Any], ...]
    rates: tuple[float, ...]
    why: str
    refuses: bool = False
    queries_only: bool = False
    names_only: bool = False
    by_adapter: bool = True

    def tried(self, how_many: int) -> tuple[float, ...]:
        """The learning rates of that many trials, the middle one among them."""
        middle = len(self.rates) // 2
        order = sorted(range(len(self.rates)), key=lambda i: (abs(i - middle), i))
        return tuple(self.rates[i] for i in sorted(order[:how_many]))


PREFIX = {"steering_prefixes": [steering.STEERING_PREFIX]}
REVERSE = {"reverse_prompts": list(steering.SEEN_OVERRIDES)}
_DUET = {"objective": "duet", "positions": "first", "k": 64, **PREFIX}
_GENTLE, _STRONG = (2e-5, 6e-5, 2e-4), (5e-5, 1.5e-4, 5e-4)

METHODS: dict[str, Method] = {
    "duet": Method(
        "the paper's: Huber on the steered teacher's top-k logits at the first answer token",
        (_DUET,),
        _STRONG,
        "k = 64: in the tiny world k from 32 on did not matter; the first position is the paper's",
        refuses=True,
        queries_only=True,
    ),
    "duet_adversarial": Method(
        "the same, half of the student's queries behind a reverse prompt",
        ({**_DUET, **REVERSE, "objective": "duet_adversarial", "reverse_prompt_role": "both"},),
        _STRONG,
        "as duet; the reverse prompts of the attack's held-out half are not among those trained on",
        refuses=True,
        queries_only=True,
    ),
    "duet_deep": Method(
        "refusal, masked NPO and a counterfactual pull on the base's own prefilled answers",
        (
            {
                "objective": "duet_deep",
                "k": 32,
                "reverse_prompt_fraction": 2 / 3,
                "reverse_prompt_role": "both",
                **REVERSE,
                **PREFIX,
            },
        ),
        _STRONG,
        "as in the tiny world (`duet.demo.recipes`)",
        refuses=True,
        queries_only=True,
        names_only=True,
    ),
    "npo": Method(
        "negative preference optimisation, descent on the retain answers",
        ({"objective": "npo", "npo_beta": 0.1},),
        _STRONG,
        "beta 0.1 is its paper's",
    ),
    "graddiff": Method(
        "gradient ascent on the forget answers, descent on the retain answers",
        ({"objective": "graddiff"},),
        _GENTLE,
        "ascent is unbounded: smaller rates",
    ),
    "simnpo": Method(
        "length-normalised preference optimisation without a reference, descent on the retain answers",
        ({"objective": "simnpo", "simnpo_beta": 2.5},),
        _STRONG,
        "beta 2.5, gamma 0: its paper's range",
    ),
    "refusal": Method(
        "cross-entropy on a refusal, descent on the retain answers",
        ({"objective": "refusal", "refusals": [steering.REFUSAL]},),
        _STRONG,
        "the refusal is the one that the model knows, as for the methods with a teacher",
        refuses=True,
    ),
    "duet+undo": Method(
        "DUET, then noise on the weights and distillation from the suppressed model",
        (_DUET, {"objective": "undo", "undo_alpha": 0.2, "learning_rate": 3e-4, "undo_tolerance": 0.0}),
        _STRONG,
        "alpha 0.2: in the tiny world 0.6 did not recover in so few steps; half of the steps for each stage",
        refuses=True,
        queries_only=True,
        by_adapter=False,
    ),
}  # fmt: skip
REFERENCES = ("full", "retrained")
