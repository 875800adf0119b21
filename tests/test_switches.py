"""duet.model.switches against peft's own disable_adapter() and torch's eval(): the same numbers, and the state put back."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, TrainableTokensConfig, get_peft_model
from tiny_models import tiny
from torch import nn

from duet.evaluation.scoring import Forced, token_scores
from duet.model.lm import hidden_states_at
from duet.model.switches import Switches, evaluating
from duet.model.teacher import AdapterOffTeacher

IDS = torch.tensor([[5, 9, 11, 30], [7, 8, 12, 3]])
COMMON = {"task_type": "CAUSAL_LM"}
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3, "init_lora_weights": False, **COMMON}
ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "modules to save": LoraConfig(
        **LORA | {"target_modules": ["q_proj"]}, modules_to_save=["lm_head", "up_proj"]
    ),
    "trained tokens": LoraConfig(**LORA, trainable_token_indices=[5, 9]),
    "tokens alone": TrainableTokensConfig(token_indices=[5, 9], init_weights=False, **COMMON),
    "layer norms": LNTuningConfig(target_modules=["input_layernorm"], **COMMON),
}


def adapted(kind="lora"):
    """A model in training, whose adapter has moved every weight that it has."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(attention_dropout=0.2), ADAPTERS[kind]).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model):
    flags = {
        name: (module.training, getattr(module, "_disable_adapters", None))
        for name, module in model.named_modules()
    }
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return flags, trained, model._adapters_disabled


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_base_model_is_the_one_that_peft_gives(kind):
    model = adapted(kind)
    model.eval()
    with model.disable_adapter():
        wanted = logits(model)
    assert not torch.equal(wanted, logits(model))
    model.train()
    before, switches = state(model), Switches(model)
    for _ in range(2):
        with switches.base_model():
            assert torch.equal(logits(model), wanted)
        assert state(model) == before


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_an_adapter_that_transformers_attached_is_off_and_keeps_its_flags(modules_to_save):
    torch.manual_seed(0)
    model, wanted = tiny(), logits(tiny())
    model.add_adapter(LoraConfig(**LORA, modules_to_save=modules_to_save))
    model.eval().requires_grad_(False)
    on = logits(model)
    with Switches(model).base_model():
        assert torch.equal(logits(model), wanted) and not torch.equal(on, wanted)
    assert torch.equal(logits(model), on) and not any(p.requires_grad for p in model.parameters())


def test_an_adapter_that_is_merged_is_refused():
    """Its weights cannot be told from the base's any more: what ran would be the student itself."""
    model = adapted()
    switches = Switches(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base model's weights"), switches.base_model():
        pass
    model.unmerge_adapter()
    with switches.base_model():
        pass


def test_what_was_frozen_off_or_in_evaluation_stays_so():
    """peft's own context would let every weight of the adapter train afterwards, and train() every module."""
    model = adapted()
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.q_proj.lora_A.requires_grad_(False)
    layer.mlp.up_proj.enable_adapters(False)
    layer.mlp.eval()
    before, switches = state(model), Switches(model)
    with pytest.raises(KeyError), switches.base_model():
        with switches.base_model():
            inside = logits(model)
        assert torch.equal(logits(model), inside)
        raise KeyError
    assert state(model) == before
    with model.disable_adapter():
        off = state(model)
        with switches.base_model():
            assert torch.equal(logits(model), inside)
        assert state(model) == off


def test_a_look_at_a_model_leaves_each_module_in_its_mode():
    model = tiny().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    token_scores(model, [Forced([5, 9], [11])], 0)
    assert [module.training for module in model.modules()] == before


def test_an_adapter_that_comes_or_goes_is_noticed():
    model = adapted("layer norms")
    switches, wanted = Switches(model), logits(tiny())
    model.base_model.model.add_module("other", nn.Dropout(0.5))
    model.add_adapter("second", LNTuningConfig(target_modules=["post_attention_layernorm"], **COMMON))
    model.base_model.set_adapter(["default", "second"])
    model.train()
    with switches.base_model():
        assert torch.equal(logits(model), wanted) and not model.base_model.model.other.training
    assert model.base_model.model.other.training

    model = adapted()
    switches, inner = Switches(model), model.base_model.model
    with switches.base_model():
        wanted = logits(model)
    model.merge_adapter()
    with (
        pytest.raises(ValueError, match=r"model: its adapter is merged .* call model.unmerge_adapter"),
        switches.base_model(),
    ):
        pass
    model.unmerge_adapter()
    again = get_peft_model(model.unload(), LoraConfig(**LORA)).train()
    assert again.base_model.model is inner and not torch.equal(logits(again.eval()), wanted)
    model.base_model = again.base_model  # the same model object, with other layers in it
    with switches.base_model():
        torch.testing.assert_close(logits(model), wanted)


def test_modules_that_act_on_a_change_are_told():
    """DoRA forgets the norms that it kept in evaluation when it trains again."""
    model = adapted("dora")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"]
    switches = Switches(model)
    with switches.base_model():
        layer._dora_cache["weight-norm"] = "of now"
    assert not layer._dora_cache and layer.training


def test_adapters_without_flags_are_left_to_peft():
    from peft import AdaptionPromptConfig

    torch.manual_seed(0)
    model = get_peft_model(
        tiny(), AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:
                parameter.add_(1.0)
    on, switches = logits(model), Switches(model)
    with switches.base_model():
        assert torch.equal(logits(model), logits(tiny())) and not torch.equal(logits(model), on)
    assert torch.equal(logits(model), on)


def test_no_step_walks_through_the_modules(monkeypatch):
    def states(student):
        return hidden_states_at(student, IDS, torch.ones_like(IDS), torch.arange(8))

    model, teacher = adapted(), AdapterOffTeacher()
    wanted = teacher.run(states, model, model)
    walked = 0
    named_modules, train = nn.Module.named_modules, nn.Module.train

    def counted(self, *args, **kwargs):
        nonlocal walked
        for each in named_modules(self, *args, **kwargs):
            walked += 1
            yield each

    def counted_train(self, mode=True):
        nonlocal walked
        walked += 1
        return train(self, mode)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    monkeypatch.setattr(nn.Module, "train", counted_train)
    seen = []
    again = teacher.run(lambda student: seen.append(walked) or student, model, model)
    assert again is model and seen == [0] and walked == 0
    with model.disable_adapter():  # what it would have been
        assert walked > len(list(named_modules(model)))
    monkeypatch.undo()
    assert torch.equal(teacher.run(states, model, model), wanted)
