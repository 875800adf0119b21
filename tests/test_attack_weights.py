"""Changes of the weights by attacks, against rounding and merging by hand; afterwards every model is bitwise as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from duet.demo.checkpoint import load_base, load_world
from duet.evaluation.attacks import weights
from duet.evaluation.attacks.attacks import ATTACKS
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.scoring import Forced
from duet.model.switches import Switches


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_rounding_by_hand():
    w = torch.tensor([[7.0, -3.4, 0.2], [0.0, 0.0, 0.0]])
    assert weights.quantize(w, 4).tolist() == [[7.0, -3.0, 0.0], [0.0, 0.0, 0.0]]
    assert weights.quantize(w, 2).tolist() == [[7.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    experts = torch.stack([w, 2 * w])  # [experts, out, in]: a scale per row of each
    assert torch.equal(weights.quantize(experts, 4)[1], 2 * weights.quantize(w, 4))
    with pytest.raises(ValueError, match="bits: got 1, wanted 2 to 8"):
        weights.quantize(w, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_leaves_every_attack_as_it_came(dtype):
    model, tokenizer = tiny().to(dtype), word_tokenizer()
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model.eval()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    options = AttackOptions(max_new_tokens=3, relearn_rates=(1e-2,), relearn_curve=(1, 2), batch_size=8)
    rows = read_attack_rows(forget_rows(4), "rows")
    kept = read_attack_rows(retain_rows(4), "retain")
    target = Target(model, tokenizer, rows, retain=kept, options=options)
    changed = 0
    for name in ("relearning", "benign_finetuning", "quantisation", "adapter"):
        for _, work in ATTACKS[name].units(target):
            work()
            assert same(bits(model), before), name
            assert [p.requires_grad for p in model.parameters()] == flags and not model.training
            changed += 1
    assert changed >= 6
    with weights.restored(model):
        weights.round_weights(model, 4)
        assert not same(bits(model), before)
    with pytest.raises(KeyError), weights.restored(model):
        weights.round_weights(model, 4)
        raise KeyError
    assert same(bits(model), before)


def test_an_attack_that_trains_leaves_each_module_in_its_mode():
    model = tiny().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with weights.restored(model):
        steps = weights.fine_tune(model, [Forced([5, 9], [11])], rate=1e-2, curve=(1,), rows=1, pad_id=0)
        assert [done for done, _ in steps] == [1]
    assert [module.training for module in model.modules()] == before


def test_adapter_removed_and_merged():
    model = tiny()
    plain = bits(model)
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    ids = torch.tensor([[1, 9, 12]])
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with Switches(model).base_model():
            off = model(input_ids=ids).logits
        with weights.merged(model):
            merged = model(input_ids=ids).logits
    base = tiny()
    base.load_state_dict(plain)
    assert torch.equal(off, base(input_ids=ids).logits)
    assert torch.allclose(on, merged, atol=1e-4) and not torch.allclose(on, off, atol=1e-2)


def test_fine_tuning_learns_and_reports_its_curve():
    model, tokenizer = tiny(), word_tokenizer()
    target = Target(model, tokenizer, read_attack_rows(forget_rows(6), "rows"))
    sequences = [target.forced(row) for row in target.rows]
    losses = dict(weights.fine_tune(model, sequences, rate=1e-2, curve=(1, 30), rows=6, pad_id=0))
    assert list(losses) == [1, 30] and losses[30] < 0.5 * losses[1]
    assert target.ask("after")[0]["leaked"] == 1
    assert list(weights.fine_tune(model, sequences, rate=1e30, curve=(1, 5), rows=6, pad_id=0))[1:] == []


def test_an_attacker_trains_every_weight_and_lets_none_decay():
    model = tiny().requires_grad_(False)
    before = bits(model)
    list(weights.fine_tune(model, [Forced([5, 9], [11])], rate=1e-2, curve=(1,), rows=1, pad_id=0))
    after, layer, tokens = bits(model), "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    assert not torch.equal(after[layer], before[layer])
    assert torch.equal(after[tokens][50], before[tokens][50]), "of a token that was not met"


def test_which_rows_are_trained_on_follows_from_the_seed(monkeypatch):
    drawn, hidden = [], weights.forced_hidden
    monkeypatch.setattr(
        weights,
        "forced_hidden",
        lambda model, batch, pad: drawn.append(batch[0].answer[0]) or hidden(model, batch, pad),
    )
    sequences = [Forced([5], [i]) for i in range(10, 40)]
    for seed in (0, 0, 1):
        list(weights.fine_tune(tiny(), sequences, rate=1e-9, curve=(6,), rows=1, pad_id=0, seed=seed))
    assert drawn[:6] == drawn[6:12] != drawn[12:]


def gpt2():
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def test_gpt2s_layers_have_a_scale_for_each_output():
    model = gpt2()
    before = bits(model)
    weights.round_weights(model, 4)
    name = "transformer.h.0.mlp.c_fc.weight"  # [in, out]
    assert torch.equal(model.state_dict()[name].T, weights.quantize(before[name].T, 4))
    name = "transformer.wte.weight"
    assert torch.equal(model.state_dict()[name], weights.quantize(before[name], 4))


def test_nf4_rounds_gpt2s_layers():
    functional = pytest.importorskip("bitsandbytes.functional")
    model, name = gpt2(), "transformer.h.0.mlp.c_fc.weight"
    before = bits(model)
    weights.nf4_weights(model)
    packed, state = functional.quantize_4bit(before[name].T.contiguous(), blocksize=64, quant_type="nf4")
    assert torch.equal(model.state_dict()[name].T, functional.dequantize_4bit(packed, state))
    assert torch.equal(model.state_dict()["transformer.wte.weight"], before["transformer.wte.weight"])


def test_nf4_rounds_the_linear_layers():
    pytest.importorskip("bitsandbytes")
    world = load_world()
    questions = world.questions(world.forget[:6], "report")[::2]
    forget = read_attack_rows([q.row() | {"value": q.value} for q in questions], "rows")
    model, tokenizer = load_base()
    before = bits(model)
    weights.nf4_weights(model)
    after = bits(model)
    layer = "model.layers.0.mlp.up_proj.weight"
    error = (after[layer] - before[layer]).abs().amax() / before[layer].abs().amax()
    assert 0 < error < 0.2 and torch.equal(
        after["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    )
    assert sum(o["leaked"] for o in Target(model, tokenizer, forget[:8]).ask("nf4")) >= 6


@pytest.mark.parametrize(
    ("how", "dora"), [("nf4", False), ("int8", False), ("nf4", True)]
)  # as test_quantised
def test_a_packed_base_is_unpacked_before_it_is_rounded(how, dora):
    """A LoRA on packed weights: int4 rounds W + BA, of fp32; what was packed lies there untouched afterwards."""
    bnb = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64, bias=False)
    kind = (
        {"quant_type": "nf4", "compute_dtype": torch.float32} if how == "nf4" else {"has_fp16_weights": False}
    )
    packed = (bnb.Linear4bit if how == "nf4" else bnb.Linear8bitLt)(64, 64, bias=False, **kind)
    packed.load_state_dict(plain.state_dict())
    model = torch.nn.Sequential(packed.to("cpu"), torch.nn.Linear(64, 2))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=dora)
    model = get_peft_model(model, config)
    x = torch.randn(3, 64)
    layer = model.base_model.model[0]
    if dora:
        layer.lora_magnitude_vector["default"].weight.data.mul_(torch.linspace(0.5, 2, 64))
    before = model(x)
    with weights.unpacked(model), weights.restored(model):
        torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)  # int8 rounds the inputs too
        weight = model.base_model.model[0].weight
        if dora:
            torch.testing.assert_close(
                weight.norm(dim=1), layer.lora_magnitude_vector["default"].weight, rtol=1e-5, atol=1e-6
            )
        else:
            near = weight - layer.get_delta_weight("default") - plain.weight
            assert near.abs().amax() < (0.03 if how == "nf4" else 0.001)
        assert weight.dtype == torch.float32
        wanted = weights.quantize(weight.detach().clone(), 4)
        weights.round_weights(model, 4)
        assert torch.equal(weight, wanted)
    assert model.base_model.model[0] is layer
    assert torch.equal(model(x), before)
