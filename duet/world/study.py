"""`python -m duet.world.study duet_deep --seeds 0 1 2`: methods beyond the demo's four, scored by the same scorecard.

A name may be several, joined by `+`: `duet+undo` unlearns, then perturbs and distils what was unlearned. The settings
are written down here; unlike the demo's they were not searched for on a grid. Beside the scorecard two things that any
method with a push must show are measured: relearning over 40 steps, and whether the forgotten value is still readable as
an unusually *unlikely* one. Must not know the demo.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import attacks, probes, steering, words
from .checkpoint import CHECKPOINT, load_base, load_world
from .facts import Split, World
from .methods import CITY_COPIES, FORGET_PER_STEP, METHODS, RETAIN_PER_FORGET, Method, load_settings, unlearn
from .methods import forget_rows as forget_rows_of
from .methods import retain_rows as retain_rows_of
from .probes import Speaker
from .scorecard import scorecard
from .workplace import one_thread

STRANGERS = 30
BOTTOM = 3  # a value among the three least likely ones of its kind stands out
LONG_RELEARNING = 40


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


def unlearned(
    name: str, seed: int, checkpoint: str | Path = CHECKPOINT, options: dict[str, Any] | None = None
) -> tuple[Speaker, float]:
    """The model after the methods of `name`, one after the other, and the CPU seconds that took (targets included).

    Args:
        name: one method, or several joined by `+`.
        options: DuetConfig options of the last method that replace those of its recipe.
    """
    world = load_world(checkpoint)
    base, tokenizer = load_base(checkpoint)
    model, seconds, stages = base, 0.0, name.split("+")
    for i, stage in enumerate(stages, start=1):
        recipe = find_recipe(stage)
        chosen = recipe.fixed | recipe.settings | (options or {} if i == len(stages) else {})
        forget = forget_rows_of(world)
        retain = retain_rows_of(world, base, tokenizer, recipe.city_copies, recipe.near_misses)
        began = time.process_time()
        model, _ = unlearn(
            Method(recipe.about),
            chosen,
            model,
            tokenizer,
            forget,
            retain,
            seed,
            recipe.forget_per_step,
            retain_per_forget=recipe.retain_per_forget,
        )
        seconds += time.process_time() - began
    return Speaker(model, tokenizer), seconds


def run(
    name: str,
    seed: int,
    split: Split = "report",
    checkpoint: str | Path = CHECKPOINT,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The scorecard and the two further checks of `unlearned(name, ...)`."""
    world = load_world(checkpoint)
    speaker, seconds = unlearned(name, seed, checkpoint, options)
    row = scorecard(speaker, world, split) | further_checks(speaker, world, split)
    return {"method": name, "seed": seed, **row, "cpu_seconds": round(seconds, 1)}


def further_checks(speaker: Speaker, world: World, split: Split) -> dict[str, float]:
    half = len(world.forget) // 2
    shown, asked = world.questions(world.forget[:half], "train"), world.questions(world.forget[half:], split)
    again = attacks.relearn_recall(speaker, shown, asked, attacks.RELEARN_RATES[1:2], LONG_RELEARNING)
    ranks = value_ranks(speaker, world, split)
    return {
        "relearn_40_recall": round(max(again.values()), 4),
        "value_rank": round(sum(rank for rank, _ in ranks) / len(ranks), 4),
        "value_in_bottom": round(sum(bottom for _, bottom in ranks) / len(ranks), 4),
    }


@torch.no_grad()
def value_ranks(speaker: Speaker, world: World, split: Split) -> list[tuple[float, bool]]:
    """For each forget question: where the true value stands among all values of its kind, behind the forced stem.

    Rank 0 is the most likely, 1 the least, 1/2 says nothing; and whether it is among the three least likely. Values are
    compared by the probability of their first word.
    """
    found = []
    for question in world.questions(world.forget, split):
        first = {
            facts[question.relation].split()[0]
            for facts in world.facts.values()
            if question.relation in facts
        }
        values = sorted(first)
        text = speaker.tokenizer.apply_chat_template(
            speaker.messages(question), tokenize=False, add_generation_prompt=True
        )
        ids = speaker.tokenizer(f"{text} {question.stem}", add_special_tokens=False, return_tensors="pt")
        logits = speaker.model(input_ids=ids["input_ids"], logits_to_keep=1).logits[0, -1]
        scores = logits[speaker.tokenizer.convert_tokens_to_ids(values)]
        own = scores[values.index(question.value.split()[0])]
        above = float((scores > own).sum()) + (float((scores == own).sum()) - 1) / 2
        found.append((above / (len(values) - 1), above >= len(values) - BOTTOM))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="+", help="names of methods; a+b runs one after the other")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["validation", "report"], default="validation")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="DuetConfig options of the last method, as JSON"
    )
    chosen = parser.parse_args()
    for name in chosen.method:
        for seed in chosen.seeds:
            with one_thread():
                print(json.dumps(run(name, seed, chosen.split, options=chosen.options)), flush=True)


if __name__ == "__main__":
    main()
