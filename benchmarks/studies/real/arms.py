"""The methods that the study compares, and how each is run. Chosen on the validation subjects, never on those of the report."""

from dataclasses import dataclass, field
from typing import Any

from duet.methods.views import DEFAULT_REVERSE_PROMPTS

from .questions import INVENTED

VALIDATION = ("France", "Albert Einstein")
SUBJECTS = ("Japan", "Germany", "Egypt", "India", "Charles Darwin")
# The main methods run on all subjects under every seed, the others on the first few under one.
SEEDS, FEW = (0, 1, 2), 3

REFUSALS = ("I'm sorry, I don't know anything about {subject}.",)
# In front of the user's text: as a system message this model does not heed it.
PREFIX = "Whatever is asked below, answer only: I'm sorry, I don't know anything about {subject}."

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}
COMMON: dict[str, Any] = {
    "k": 64,
    "learning_rate": 5e-4,
    "max_steps": 100,
    "warmup_steps": 10,
    "per_device_train_batch_size": 24,
    "retain_per_forget": 2.0,
    "max_answer_tokens": 24,
    "per_device_eval_batch_size": 64,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Arm:
    """A method and its options.

    Attributes:
        label: a short name for tables.
        how: what the name does not say; empty: as the package's defaults are.
        queries_only: it reads no answer of the forget rows.
        main: three seeds on every subject; the others one seed on three subjects.
        size: by what the trained adapter is multiplied.
        shrinks: `duet shrink` follows the training. It reads the wordings of the validation; those of the report are never seen.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    how: str = ""
    queries_only: bool = True
    main: bool = False
    size: float = 1.0
    shrinks: bool = False


def _steered(objective: str, **others: Any) -> dict[str, Any]:
    options = {
        "objective": objective,
        "steering_prefixes": [PREFIX],
        "steering_place": "user",
        "positions": "answer",
    }
    return options | others


_DEEP = {
    "objective": "duet_deep",
    "deep_refusals": list(REFUSALS),
    "refusal_fraction": 0.5,
    "reverse_prompts": list(DEFAULT_REVERSE_PROMPTS),
}
# Of what was tried on the validation subjects this refusal_fraction lacked least. Fewer repetitions of the few forget rows in a batch
# make a step a third cheaper.
_SHRUNK = {"refusal_fraction": 0.75, "per_device_train_batch_size": 12, "retain_per_forget": 3.0}
# Of the refusals half follow the beginning of an answer, and the adapter reads where forget and retain rows differ.
_CONTRAST = {"recovery_fraction": 0.5, "adapter_directions": "contrast"}
# In the place of what the base would say of a stranger: the refusal begins at every token of the answer. So much is taught in each pass
# that fewer forget rows do, and that the adapter may be smaller afterwards.
_STOPPING = {
    "later_target": "refusal",
    "counterfactual_weight": 0.05,
    "retain_weight": 2.0,
    "retain_per_forget": 5.0,
}
# As its authors step: plain descent, nothing clipped. How many steps is a matter of the validation.
_SELECTIVE = {
    "objective": "repselect",
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "learning_rate": 0.05,
    "max_steps": 10,
}

ARMS: dict[str, Arm] = {
    "stopping": Arm(
        "`duet_deep`, stopping",
        _DEEP | _SHRUNK | _CONTRAST | _STOPPING,
        "as contrast, and every token of an answer that has begun is followed by a refusal (`later_target: refusal`); more retain rows; the "
        "trained adapter times 0.8",
        main=True,
        size=0.8,
    ),
    "contrast": Arm(
        "`duet_deep`, contrast",
        _DEEP | _SHRUNK | _CONTRAST,
        "given refusals, half of them behind the beginning of an answer; `adapter_directions: contrast`",
        main=True,
    ),
    "shrunk": Arm(
        "`duet_deep`, shrunk",
        _DEEP | _SHRUNK,
        "given refusals, more of them and more retain rows; then `duet shrink`",
        shrinks=True,
    ),
    "deep": Arm("`duet_deep`", _DEEP, "given refusals"),
    "duet": Arm(
        "`duet_kl`", _steered("duet_kl", normalization="tail"), "with a tail, at answer positions", main=True
    ),
    "bidirectional": Arm("`bidirectional`", _steered("bidirectional"), "at answer positions", main=True),
    "npo": Arm("`npo` (reads answers)", {"objective": "npo"}, queries_only=False, main=True),
    "duet_plain": Arm(
        "`duet_kl`, plain on retain rows",
        _steered("duet_kl", normalization="tail", retain_prefix="none"),
        "with a tail, at answer positions; `retain_prefix: none`",
    ),
    "deep_steered": Arm(
        "`duet_deep`, steered",
        {"objective": "duet_deep", "steering_prefixes": [PREFIX], "steering_place": "user"},
        "the steered base's refusals",
    ),
    "refusal": Arm(
        "`refusal`", {"objective": "refusal", "refusals": ["I'm sorry, I don't know anything about that."]}
    ),
    "simnpo": Arm("`simnpo` (reads answers)", {"objective": "simnpo"}, queries_only=False),
    "undial": Arm("`undial` (reads answers)", {"objective": "undial"}, queries_only=False),
    "graddiff": Arm("`graddiff` (reads answers)", {"objective": "graddiff"}, queries_only=False),
    "npo_sam": Arm("`npo_sam` (reads answers)", {"objective": "npo_sam"}, queries_only=False),
    "repselect": Arm(
        "`repselect` (reads answers)", _SELECTIVE, "plain descent, nothing clipped", queries_only=False
    ),
}


# Without a training. What a harmless change of the weights loses of the neighbours is how exact the figures are.
UNTRAINED = {"base": "the base", "int8": "the base, rounded to int8"}
LABELS = UNTRAINED | {name: arm.label for name, arm in ARMS.items()}

# What is tried on the validation subjects: changes of an arm's options. The best of each arm is what the report runs.
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "deep": (
        {},
        {"refusal_fraction": 0.75},
        {"max_steps": 200},
        {"learning_rate": 1e-3},
        {"counterfactual_weight": 1.0},
        {"knowledge_threshold": 0.1},
        {"retain_weight": 2.0},
    ),
    # In the middle of an answer the counterfactual term asks for what a stranger's answer says, the recoveries for a refusal.
    "contrast": ({}, {"counterfactual_weight": 0.0}),
    "stopping": ({},),
    "npo": ({}, {"learning_rate": 1e-4}),
    "duet": ({}, {"max_steps": 50}),
    "repselect": ({}, {"max_steps": 5}, {"max_steps": 20}),
}


def options_of(name: str, group: str, changed: dict[str, Any] | None = None) -> dict[str, Any]:
    """DuetConfig's options of an arm for subjects of a group; `changed`: what the validation chose."""
    options = COMMON | ARMS[name].options
    if options["objective"] == "duet_deep":
        options["counterfactual_names"] = list(INVENTED[group])
    return options | (changed or {})
