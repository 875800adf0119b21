"""One arm and one seed -> one row of numbers: unlearn, score, relearn for longer, and look where the values went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duet.demo import probes, steering
from duet.demo.checkpoint import CHECKPOINT, load_base, load_world
from duet.demo.facts import Split, World
from duet.demo.methods import forget_rows, retain_rows, unlearn
from duet.demo.pretrain import STEPS, build_model, pretrain
from duet.demo.probes import Speaker
from duet.demo.scorecard import scorecard, some
from duet.demo.tokenizer import build_tokenizer
from duet.demo.workplace import one_thread

from .arms import ARMS, Arm
from .recipes import find_recipe

BOTTOM = 3  # a value among the three least likely ones of its kind stands out
LONG_RELEARNING = 40
CURVE = (0, 5, 10, 20, LONG_RELEARNING)
CURVE_RATE = probes.RELEARN_RATES[1]


@dataclass(frozen=True)
class Scale:
    """How much of the full study is done: share of the training steps, and most questions of a kind (None: all)."""

    name: str = "full"
    steps: float = 1.0
    most: int | None = None


# Fewer questions, not fewer steps: at half of its tuned steps DUET has forgotten nothing yet.
SCALES = {"full": Scale(), "quick": Scale("quick", most=40)}


def unlearned(
    name: str,
    seed: int,
    checkpoint: str | Path = CHECKPOINT,
    options: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    world: World | None = None,
    retained: bool = True,
    steps: float = 1.0,
) -> tuple[Speaker, float, list[dict[str, Any]]]:
    """The model after the methods of `name`, the CPU seconds that took (targets included), and the options of each.

    Args:
        name: one method, or several joined by `+`, which run one after the other.
        options: DuetConfig options that replace those of the recipes: one mapping a method, or one for the last.
        world: whom to forget; None: the checkpoint's world.
        retained: whether retain rows are shown.
        steps: factor on the steps of every method.
    """
    stages = name.split("+")
    if options is None or isinstance(options, dict):
        options = [*({} for _ in stages[1:]), options or {}]
    if len(options) != len(stages):
        raise ValueError(f"options: wanted one mapping for each of {name!r}, got {len(options)}")
    world = world or load_world(checkpoint)
    model, tokenizer = load_base(checkpoint)
    base, seconds, used = model, 0.0, []
    for stage, own in zip(stages, options, strict=True):
        recipe = find_recipe(stage)
        chosen = recipe.fixed | recipe.settings | own
        chosen["max_steps"] = max(1, round(chosen["max_steps"] * steps))
        retain = (
            retain_rows(world, base, tokenizer, recipe.city_copies, recipe.near_misses) if retained else []
        )
        began = time.process_time()
        model, _ = unlearn(
            replace(recipe, settings=chosen, retain_per_forget=recipe.retain_per_forget if retained else 0.0),
            model,
            tokenizer,
            forget_rows(world),
            retain,
            seed,
        )
        seconds += time.process_time() - began
        used.append(chosen)
    return Speaker(model, tokenizer), seconds, used


def run(
    name: str,
    seed: int,
    split: Split = "report",
    checkpoint: str | Path = CHECKPOINT,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The scorecard and the further checks of `unlearned(name, ...)`."""
    world = load_world(checkpoint)
    speaker, seconds, _ = unlearned(name, seed, checkpoint, options)
    row = scorecard(speaker, world, split) | further_checks(speaker, world, split)
    return {"method": name, "seed": seed, **row, "cpu_seconds": round(seconds, 1)}


def retrained(world: World, seed: int, steps: float = 1.0) -> tuple[Speaker, float, list[dict[str, Any]]]:
    """As `unlearned`, of a model that was pretrained like the base but never met the authors to forget."""
    known = {name: facts for name, facts in world.facts.items() if name not in world.forget}
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    count = max(1, round(STEPS * steps))
    began = time.process_time()
    pretrain(model, tokenizer, replace(world, facts=known), seed, count)
    return Speaker(model, tokenizer), time.process_time() - began, [{"max_steps": count}]


def run_arm(name: str, seed: int, scale: Scale, split: Split = "report") -> dict[str, Any]:
    """The row of the arm `name`: scorecard, further checks, what its teacher does, settings, and what it ran on."""
    arm = ARMS[name]
    with one_thread():
        began = time.process_time()
        world = forgetting(load_world(), arm.forget_authors)
        if arm.stages:
            speaker, seconds, used = unlearned(
                arm.method,
                seed,
                options=[options for _, options in arm.stages],
                world=world,
                retained=arm.retain,
                steps=scale.steps,
            )
        else:
            speaker, seconds, used = retrained(world, seed, scale.steps)
        row = scorecard(speaker, world, split, scale.most) | further_checks(speaker, world, split, scale.most)
        row |= _about_the_teacher(arm, world, split, scale.most)
        untouched = load_world().forget[len(world.forget) :]
        if untouched:
            asked = load_world().questions(untouched, split)
            row["untouched_recall"] = round(speaker.recall(asked), 4)
        whole = time.process_time() - began
    return {
        "arm": name,
        "seed": seed,
        "scale": scale.name,
        "method": arm.method,
        **row,
        "queries": round(arm.queries() * scale.steps),
        "train_cpu_seconds": round(seconds, 1),
        "cpu_seconds": round(whole, 1),
        "settings": used,
        "split": split,
    }


def forgetting(world: World, authors: int | None) -> World:
    """The world with another number of authors to forget; beyond its own they are taken from the held ones."""
    if authors is None:
        return world
    everybody = world.forget + world.held
    if not 2 <= authors <= len(everybody):
        raise ValueError(f"authors: wanted 2 to {len(everybody)}, half of them for relearning, got {authors}")
    return replace(world, forget=everybody[:authors], held=everybody[authors:])


def _about_the_teacher(arm: Arm, world: World, split: Split, most: int | None) -> dict[str, float]:
    """What the steered base says, for arms whose one method is steered by some prefix."""
    if len(arm.stages) != 1 or not find_recipe(arm.method).fixed["objective"].startswith("duet"):
        return {}
    options = arm.stages[-1][1]
    prefix = options.get("steering_prefixes", [steering.STEERING_PREFIX])[0]
    base, tokenizer = load_base()
    teacher = Speaker(base, tokenizer, prefix, world.forget)
    forget = some(world.questions(world.forget, split), most)
    return {"teacher_refusal": round(probes.refusal(teacher.answers(forget), forget), 4)}


def further_checks(speaker: Speaker, world: World, split: Split, most: int | None = None) -> dict[str, Any]:
    """Recall of the other half along LONG_RELEARNING steps of relearning, and where the true values stand."""
    half = len(world.forget) // 2
    shown = world.questions(world.forget[:half], "train")
    asked = some(world.questions(world.forget[half:], split), most)
    recalls = {0: speaker.recall(asked)} | probes.relearn_recalls(
        speaker, shown, asked, CURVE_RATE, CURVE[1:]
    )
    curve = {str(steps): round(value, 4) for steps, value in recalls.items()}
    ranks = value_ranks(speaker, world, split)
    return {
        "relearn_curve": curve,
        "relearn_40_recall": curve[str(LONG_RELEARNING)],
        "value_rank": round(sum(rank for rank, _ in ranks) / len(ranks), 4),
        "value_in_bottom": round(sum(bottom for _, bottom in ranks) / len(ranks), 4),
    }


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
        scores = speaker.next_logits(question, question.stem)[speaker.tokenizer.convert_tokens_to_ids(values)]
        own = scores[values.index(question.value.split()[0])]
        above = float((scores > own).sum()) + (float((scores == own).sum()) - 1) / 2
        found.append((above / (len(values) - 1), above >= len(values) - BOTTOM))
    return found
