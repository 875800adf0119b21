"""Methods beyond the demo's four, as DuetConfig options with their settings and their mix of rows.

The settings are written down here; unlike the demo's they were not searched for on a grid. Must not know how a model is
trained or judged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from . import probes, steering, words
from .methods import CITY_COPIES, FORGET_PER_STEP, METHODS, RETAIN_PER_FORGET, Method, load_settings

STRANGERS = 30


@dataclass(frozen=True)
class Recipe(Method):
    """A method together with its settings and its mix of rows."""

    forget_per_step: int = FORGET_PER_STEP
    retain_per_forget: float = RETAIN_PER_FORGET
    city_copies: int = CITY_COPIES
    near_misses: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def strangers() -> list[str]:
    """Names of people whom pretraining never gave a fact."""
    rng = random.Random(0)
    first = rng.sample(words.STRANGER_FIRST_NAMES, STRANGERS)
    return [f"{a} {b}" for a, b in zip(first, rng.sample(words.STRANGER_LAST_NAMES, STRANGERS), strict=True)]


OVERRIDES = {"reverse_prompts": list(steering.SEEN_OVERRIDES)}
REFUSALS = {"refusals": [steering.REFUSAL]}

RECIPES: dict[str, Recipe] = {
    "duet_deep": Recipe(
        "refusal at the first token, masked NPO and a counterfactual pull on the base's own prefilled answers",
        {
            "objective": "duet_deep",
            "reverse_prompt_fraction": 2 / 3,
            "reverse_prompt_role": "both",
            "counterfactual_names": strangers(),
            "max_answer_tokens": probes.MAX_NEW_TOKENS,
            **OVERRIDES,
        },
        refuses=True,
        resists_overrides=True,
        forget_per_step=32,
        retain_per_forget=1.5,
        city_copies=6,
        near_misses=400,
        settings={"learning_rate": 5e-4, "max_steps": 150, "warmup_steps": 10},
    ),
    "duet_kl": Recipe(
        "KL on the steered teacher's top-k and the rest as one bucket, first answer token",
        {"objective": "duet_kl", "normalization": "tail"},
        refuses=True,
        settings={"learning_rate": 3e-4, "max_steps": 200},
    ),
    "bidirectional": Recipe(
        "Huber pull and hinge push on raw logits",
        {"objective": "bidirectional", **OVERRIDES},
        refuses=True,
        resists_overrides=True,
        settings={"learning_rate": 3e-4, "max_steps": 200, "reverse_prompt_fraction": 0.7},
    ),
    "simnpo": Recipe(
        "length-normalised preference optimisation without a reference, descent on the retain answers",
        {"objective": "simnpo"},
        settings={"learning_rate": 2e-4, "max_steps": 200},
    ),
    "refusal": Recipe(
        "cross-entropy on a refusal, descent on the retain answers",
        {"objective": "refusal", **REFUSALS},
        refuses=True,
        settings={"learning_rate": 3e-4, "max_steps": 200},
    ),
    "undial": Recipe(
        "self-distillation with the answer's logit lowered, descent on the retain answers",
        {"objective": "undial"},
        settings={"learning_rate": 3e-4, "max_steps": 200},
    ),
    "shred": Recipe(
        "self-distillation with the least probable tokens deleted",
        {"objective": "shred"},
        settings={"learning_rate": 3e-4, "max_steps": 200, "shred_percent": 30.0},
    ),
    "rmu": Recipe(
        "activations of forget texts steered to a random direction, those of retain texts kept",
        {"objective": "rmu"},
        settings={
            "learning_rate": 3e-3,
            "max_steps": 200,
            "rmu_layer": 1,
            "rmu_scale": 30.0,
            "rmu_alpha": 30.0,
        },
    ),
    "undo": Recipe(
        "noise on the weights, then distillation from the unlearned model",
        {"objective": "undo", "max_answer_tokens": probes.MAX_NEW_TOKENS},
        settings={"learning_rate": 1e-3, "max_steps": 400, "undo_alpha": 0.2},
    ),
}


def find_recipe(name: str) -> Recipe:
    """A recipe of this room, or one of the demo's methods with its tuned settings."""
    if name in RECIPES:
        return RECIPES[name]
    if name in METHODS:
        method = METHODS[name]
        return Recipe(
            method.about,
            method.fixed,
            method.refuses,
            method.resists_overrides,
            settings=load_settings()[name],
        )
    raise ValueError(f"method: wanted one of {', '.join([*RECIPES, *METHODS])}, got {name!r}")
