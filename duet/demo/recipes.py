"""duet_deep and the demo's other methods, each with its settings and its mix of rows.

Those of duet_deep are written down here; unlike the others' they were not searched for on a grid. Must not know how a
model is trained or judged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from ..names import check_one_of
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
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or one of the demo's methods with its tuned settings."""
    check_one_of("method", name, [*RECIPES, *METHODS])
    if name in RECIPES:
        return RECIPES[name]
    own = METHODS[name]
    return Recipe(own.about, own.fixed, own.refuses, own.resists_overrides, settings=load_settings()[name])
