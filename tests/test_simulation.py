"""duet.run.simulation: a few layers and one batch say what all layers and every batch would have said."""

import copy

import pytest
import torch
from sweeps import case
from tiny_models import tiny
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig

from duet.run import simulation
from duet.run.simulation import Bytes, Step, simulate, trained_parameters

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, **GROUPED),
    "gemma3": Gemma3TextConfig(**COMMON, **GROUPED, sliding_window=8),
    "neox": GPTNeoXConfig(**COMMON),
}


def made(name, dtype=torch.bfloat16, layers=6):
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = layers
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def two_kinds():
    """Every second layer has a wider MLP."""
    model = made("llama")
    wide = copy.deepcopy(CONFIGS["llama"])
    wide.intermediate_size = 320
    with torch.device("meta"):
        wide = AutoModelForCausalLM.from_config(wide, dtype=torch.bfloat16)
    for number in (1, 3, 5):
        model.model.layers[number].mlp = wide.model.layers[number].mlp
    return model


def whole(model, monkeypatch, rows=simulation.ROWS, **options):
    """A run of all layers, with so many rows."""
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "ROWS", rows)
        patch.setattr(simulation, "_MOST_KINDS", 0)
        step = simulate(model, **options)
        assert step.more == []
        return step


@pytest.mark.parametrize(
    ("name", "adapter", "checkpointing"),
    [
        case("llama", LORA, True, slow=True),
        ("llama", None, False),
        case("gemma3", None, True, slow=True),
        ("neox", LORA, False),
        case("two kinds", LORA, True, slow=True),
    ],
)
def test_a_few_layers_say_what_all_say(name, adapter, checkpointing, monkeypatch):
    model = two_kinds() if name == "two kinds" else made(name)
    options = {
        "length": 24,
        "autocast": False,
        "adapter": adapter,
        "checkpointing": checkpointing,
        "trains": True,
    }
    parts, every = simulate(model, **options), whole(model, monkeypatch, **options)
    assert len(parts.more) == (2 if name == "two kinds" else 1)
    assert len(simulation._layers(model, model)) == 6
    for batch in (1, 3, 64, 10_000):
        assert parts.kept(batch) == pytest.approx(every.kept(batch), rel=1e-3)
        # Where kinds alternate, which layer the peak is in depends on their order.
        rel = 0.03 if name == "two kinds" else 0.01
        assert parts.most(batch) == pytest.approx(every.most(batch), rel=rel)


@pytest.mark.parametrize("adapter", [LORA, None], ids=["adapter", "all weights"])
def test_one_run_says_what_every_batch_says(adapter, monkeypatch):
    """With the very number of rows nothing depends on what is divisible by it."""
    options = {"length": 24, "autocast": False, "adapter": adapter, "checkpointing": False, "trains": True}
    model = made("llama", layers=1)
    every = whole(model, monkeypatch, **options)
    for batch in (1, 50):
        real = whole(model, monkeypatch, batch, **options)
        assert (every.kept(batch), every.most(batch)) == (real.kept(batch), real.most(batch))


@pytest.mark.parametrize("name", ["gemma3", "two kinds"])
def test_a_teacher_keeps_nothing_from_layer_to_layer(name, monkeypatch):
    model = two_kinds() if name == "two kinds" else made(name, torch.float32)
    options = {"length": 24, "autocast": False, "adapter": None, "checkpointing": False, "trains": False}
    parts, every = simulate(model, **options), whole(model, monkeypatch, **options)
    for batch in (1, 8, 1000):
        assert parts.most(batch) == pytest.approx(every.most(batch), rel=0.01)


@pytest.mark.slow
def test_autocast_is_counted(monkeypatch):
    options = {"length": 24, "adapter": LORA, "checkpointing": False, "trains": True}
    model = made("llama", torch.float32)
    half = simulate(model, autocast=True, **options)
    every = whole(model, monkeypatch, autocast=True, **options)
    assert half.most(5) == pytest.approx(every.most(5), rel=0.01)
    assert half.kept(64) < simulate(model, autocast=False, **options).kept(64)


def test_a_model_that_cannot_run_with_fewer_layers_runs_with_all(monkeypatch):
    model, run, seen = made("llama"), simulation._run, []

    def stubborn(part, layers, *args):
        seen.append(len(layers))
        if len(layers) != 6:
            raise IndexError("layer_types[5]")
        return run(part, layers, *args)

    monkeypatch.setattr(simulation, "_run", stubborn)
    step = simulate(model, 24, False, LORA, False, True)
    assert seen == [2, 6] and step.more == [] and step.most(4) > step.kept(4) > 0


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"target_modules": ["q_proj", "fc1"]}, 1),
        ({"target_modules": r".*layers\.(0|3)\.mlp\.up_proj"}, 0),
        ({"target_modules": ["layers.2.mlp.up_proj"]}, 0),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 0),
        ({"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}}, 0),
    ],
)
def test_an_adapter_that_knows_layers_by_number_is_tried_whole(options, kinds):
    assert len(simulation._kinds(made("llama"), options)) == kinds


@pytest.mark.parametrize(
    "adapter", [LORA, {**LORA, "target_modules": ["q_proj"], "layers_to_transform": [0, 4]}, None]
)
@pytest.mark.parametrize("name", ["llama", "two kinds"])
def test_what_is_trained_is_counted_without_all_layers(name, adapter):
    model = two_kinds() if name == "two kinds" else made("llama")
    wrapped = simulation._copy(model, None, adapter)
    wanted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    counted = trained_parameters(model, adapter)
    assert sum(times * p.numel() for times, p in counted) == wanted > 0
    if adapter == LORA:
        assert len(counted) < 6 * 7 * 2


def test_a_peak_is_the_largest_line_at_each_batch():
    peak = Bytes()
    for line in ((100, 1), (10, 5), (5, 5), (0, 7), (90, 0)):
        peak.include(*line)
    assert sorted(peak.lines) == [(0, 7), (10, 5), (100, 1)]
    assert [peak.at(batch) for batch in (1, 20, 40, 100)] == [101, 140, 280, 700]
    assert Step.most.__doc__ and Bytes().at(3) == 0


def test_models_without_a_list_of_layers_run_as_they_are():
    model = tiny().to("meta")
    model.config.num_hidden_layers = 3  # no list has so many
    assert simulation._kinds(model, None) == []
