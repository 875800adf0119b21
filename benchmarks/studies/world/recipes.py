"""Methods beyond the demo's, as DuetConfig options with their settings and their mix of rows.

The settings are written down here; unlike the demo's they were not searched for on a grid.
"""

from __future__ import annotations

from duet.demo import methods, probes, steering
from duet.demo.methods import METHODS, OVERRIDES, Recipe
from duet.names import check_one_of

REFUSALS = {"refusals": [steering.REFUSAL]}

RECIPES: dict[str, Recipe] = methods.RECIPES | {
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
    """A recipe of this room or of the demo."""
    check_one_of("method", name, [*RECIPES, *METHODS])
    return RECIPES[name] if name in RECIPES else methods.find_recipe(name)
