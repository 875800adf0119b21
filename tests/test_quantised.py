"""4-bit and 8-bit bases under an adapter, on a CPU: the teacher is the quantised base, and gradients reach every layer."""

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig
from test_trainer import losses, make
from tiny_models import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from duet.model.adapters import check_same_logits, load_adapted, logits_of, merge_adapters
from duet.model.loading import keep_differentiable

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
IDS = torch.tensor([[5, 9, 11, 30, 41, 7]])
HOW = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny(hidden_size=128, intermediate_size=256, spread=0.1).save_pretrained(path)
    return str(path)


def quantised_how(how, dtype=torch.float32):
    options = HOW[how] | ({"bnb_4bit_compute_dtype": dtype} if how == "nf4" else {})
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}}


def quantised(folder, how, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantised_how(how, dtype))


@pytest.mark.parametrize(
    "how, dora", [("nf4", False), ("nf4", True), ("int8", False)]
)  # peft: no int8 DoRA on a CPU
def test_an_adapter_on_quantised_weights(tmp_path, folder, how, dora):
    base = quantised(folder, how)
    assert (
        type(base.model.layers[0].mlp.up_proj).__name__ != "Linear"
        and type(base.lm_head).__name__ == "Linear"
    )
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    trainer = make(
        tmp_path,
        base,
        trainer_options={"peft_config": peft_config},
        max_steps=5,
        learning_rate=1e-2,
        activation_checkpointing=True,
    )
    student, teacher = trainer._probe()
    assert torch.equal(student, teacher)
    trainer.train()
    student, kept = trainer._probe()
    assert torch.equal(kept, teacher) and not torch.equal(student, teacher)
    assert sum(losses(trainer)[-2:]) < 0.9 * sum(losses(trainer)[:2])


def adapter_gradients(tmp_path, model):
    """Of one step of a loss without a teacher; a forward without gradients, as a teacher's, comes first."""
    torch.manual_seed(3)
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(tmp_path, model, trainer_options={"peft_config": peft_config}, objective="ga")
    with torch.no_grad():
        trainer.model.eval()(input_ids=IDS)
    items = [trainer.train_dataset[i] for i in range(6)]
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(items)).backward()
    return {n: p.grad for n, p in trainer.model.named_parameters() if "lora_B" in n}


@pytest.fixture(scope="module", params=HOW)
def how_and_plain(request, folder):
    """A kind of quantisation, and a model of ordinary layers with the weights that the quantised ones stand for."""
    base = quantised(folder, request.param)
    keep_differentiable(base)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in base.named_modules():
        if name != "lm_head" and type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            x = torch.eye(layer.in_features, requires_grad=True)
            plain.get_submodule(name).weight.data.copy_(layer.train()(x).detach().T)
    return request.param, plain


def worst(ours, wanted):
    assert ours.keys() == wanted.keys() and any(".layers.0." in name for name in ours)
    return max((ours[n] - wanted[n]).norm() / wanted[n].norm() for n in ours)


def test_gradients_pass_through_quantised_layers(tmp_path, folder, how_and_plain):
    how, plain = how_and_plain
    wanted = adapter_gradients(tmp_path, copy.deepcopy(plain))
    assert worst(adapter_gradients(tmp_path, quantised(folder, how)), wanted) < 1e-4


def test_they_would_not_if_weights_were_repacked(tmp_path, folder, how_and_plain, monkeypatch):
    """The test above can fail: this is what bitsandbytes does on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import has_avx512bf16

    how, plain = how_and_plain
    if how != "nf4" or not has_avx512bf16():
        pytest.skip("only 4-bit layers, and only on a CPU with AVX512-BF16")
    answered = quantised(folder, how)
    with torch.no_grad():
        answered(input_ids=IDS)
    keep_differentiable(answered, trains=False)
    with pytest.raises(ValueError, match="model: it has answered on this CPU"):
        keep_differentiable(answered)
    wanted = adapter_gradients(tmp_path, copy.deepcopy(plain))
    monkeypatch.setattr("duet.model.loading.keep_differentiable", lambda model, trains: None)
    assert worst(adapter_gradients(tmp_path, quantised(folder, how)), wanted) > 0.1


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_optimizers_by_name(tmp_path, folder, optim):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(tmp_path, tiny(), trainer_options={"peft_config": peft_config}, optim=optim, max_steps=4)
    trainer.train()
    assert "bitsandbytes" in type(trainer.optimizer.optimizer).__module__
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("how", HOW)
def test_the_plan_knows_the_bytes_of_quantised_weights(folder, how):
    from duet.run.plan import Planner, Settings

    model = quantised(folder, how, torch.bfloat16)
    real = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            real += sum(s.numel() * s.element_size() for s in scales)
        if getattr(getattr(layer, "weight", None), "SCB", None) is not None:
            real += layer.weight.SCB.numel() * 4
    planned = Planner(model.config).budget(Settings(teacher="none", quantization=how)).weights
    assert planned == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("how", HOW)
def test_a_second_adapter_on_quantised_weights(tmp_path, folder, how):
    """4-bit weights cannot take in an adapter: it is kept beside them."""
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

    def trained(model, name, **options):
        options |= {"learning_rate": 1e-2, "output_dir": str(tmp_path / name)}
        trainer = make(tmp_path, model, trainer_options={"peft_config": LoraConfig(**lora)}, **options)
        before = logits_of(trainer.model)
        trainer.train()
        trainer.save_model()
        return before, logits_of(trainer.model)

    _, wanted = trained(quantised(folder, how), "first")
    first = load_adapted(tmp_path / "first", dtype=torch.float32, **quantised_how(how))
    keep_differentiable(first)  # else it computes in bf16 on a CPU with AVX512-BF16
    check_same_logits(first, wanted, "reading the first")
    before, after = trained(first.requires_grad_(False), "second", earlier_adapter="keep")
    assert (before - wanted).abs().max() <= 1e-5 * wanted.abs().max() < (after - wanted).abs().max()
    second = load_adapted(tmp_path / "second", dtype=torch.float32, **quantised_how(how))
    keep_differentiable(second)
    check_same_logits(second, after, "reading the second")
    first = load_adapted(tmp_path / "first", dtype=torch.float32, **quantised_how(how))
    with pytest.raises(
        ValueError, match=r"model: quantised weights .* cannot take its adapter in.*earlier_adapter: keep"
    ):
        merge_adapters(first)  # also where the logits would hardly move: what the adapter says is small, too
