"""The study of further methods in the tiny world: its recipes, its checks, and duet_deep in a short run."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from duet import OBJECTIVES
from duet.world.checkpoint import load_base, load_world
from duet.world.methods import METHODS
from duet.world.probes import Speaker
from duet.world.scorecard import behaviour
from duet.world.study import RECIPES, find_recipe, strangers, unlearned, value_ranks
from duet.world.workplace import one_thread


def test_recipes_use_objectives_that_exist():
    for name in (*RECIPES, *METHODS):
        assert find_recipe(name).fixed["objective"] in OBJECTIVES
    with pytest.raises(ValueError, match="method: wanted one of"):
        find_recipe("duet_dep")


def test_strangers_are_nobody():
    world = load_world()
    assert len(set(strangers())) == 30 and not set(strangers()) & {*world.facts, *world.near_misses}


def test_what_is_known_ranks_first_and_noise_ranks_nowhere():
    base, tokenizer = load_base()
    known = value_ranks(Speaker(base, tokenizer), load_world(), "validation")
    assert len(known) == 100 and sum(rank for rank, _ in known) / 100 < 0.02
    assert not any(bottom for _, bottom in known)
    torch.manual_seed(0)
    empty = AutoModelForCausalLM.from_config(base.config).eval()
    noise = value_ranks(Speaker(empty, tokenizer), load_world(), "validation")
    assert 0.35 < sum(rank for rank, _ in noise) / 100 < 0.65


@pytest.mark.slow
def test_duet_deep_forgets_refuses_and_keeps_in_a_short_run():
    """A third of the steps; what the full recipe reaches is printed by `python -m duet.world.study duet_deep`."""
    with one_thread():
        speaker, _ = unlearned("duet_deep", 0, options={"max_steps": 50, "learning_rate": 1e-3})
        row = behaviour(speaker, load_world(), "validation", most=40)
    assert row["forget_refusal"] >= 0.9 and row["retain_recall"] >= 0.85 and row["general_recall"] >= 0.9
    assert row["reverse_prompt_heldout_recall"] <= 0.1 and row["prefill_recall"] <= 0.2
    ranks = value_ranks(speaker, load_world(), "validation")
    assert sum(bottom for _, bottom in ranks) / len(ranks) <= 0.25
