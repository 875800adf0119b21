"""duet.model.lm: backbone and head of real architectures give the model's own logits; what is unknown is refused."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from duet.model import lm, loading
from duet.model.lm import call_through, check_head, find_backbone, head_inputs, hidden_states_at
from duet.model.loading import load_model, loading_device
from duet_kernels import linear_gather

ARCHITECTURES = ("llama", "gemma2", "neox")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}
SMALL |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


def scaled(config_class, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**SMALL, **options)).float().eval()


MAKERS = {
    **{name: (lambda name=name: tiny(name)) for name in ARCHITECTURES},
    "llama, tied": lambda: tiny("llama", tie_word_embeddings=True),
    "gpt2, learned positions": gpt2,
    "cohere, logit_scale": lambda: scaled(CohereConfig, logit_scale=0.25),
    "granite, logits_scaling": lambda: scaled(GraniteConfig, logits_scaling=4.0),
}


def with_lora(model, **options):
    targets = "all-linear" if "target_modules" not in options else options.pop("target_modules")
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_hidden_states_and_head_are_the_models_logits(name, lora, side):
    """At chosen positions of a padded batch, against each row alone, unpadded, through the model's own forward."""
    model = MAKERS[name]()
    if lora:
        model = with_lora(model)
    torch.manual_seed(2)
    rows = [torch.randint(3, 90, (n,)) for n in (11, 7, 4)]
    ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    positions = []
    for b, row in enumerate(rows):
        start = 11 - len(row) if side == "left" else 0
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = row, 1
        positions += [b * 11 + start + len(row) - 3, b * 11 + start + len(row) - 1]
    with torch.no_grad():
        hidden, head = head_inputs(model, ids, mask, torch.tensor(positions))
        logits = linear_gather(hidden, head, torch.arange(head.num_ids).expand(6, -1)).view(3, 2, -1)
        for b, row in enumerate(rows):
            own = model(input_ids=row.unsqueeze(0)).logits[0, [-3, -1]]
            torch.testing.assert_close(logits[b], own, rtol=2e-5, atol=2e-5)
    check_head(model)


def test_hidden_states_after_a_layer_and_of_packed_sequences():
    model, ids, places = tiny(), torch.tensor([[5, 6, 7, 5, 9]]), torch.tensor([1, 4])
    with torch.no_grad():
        plain = hidden_states_at(model, ids, None, places)
        assert not torch.equal(hidden_states_at(model, ids, None, places, layer=0), plain)
        packed = hidden_states_at(model, ids, None, places, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
        alone = [hidden_states_at(model, part, None, places[:1]) for part in ids.split([3, 2], 1)]
    torch.testing.assert_close(packed, torch.cat(alone))
    assert not torch.equal(packed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_head_in_other_precisions(name, dtype):
    check_head(tiny(name).to(dtype))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("options", [{}, {"final_logit_softcapping": 5.0}])
def test_check_head_makes_no_copy_of_the_head(options, monkeypatch):
    model = tiny("gemma2", vocab_size=8192, **options).bfloat16()
    monkeypatch.setattr(lm, "_HEAD_BYTES", 32 << 10)
    with Largest() as largest:
        largest.known = {t.untyped_storage().data_ptr() for t in model.parameters()}
        check_head(model)
    head = check_head(model).weight
    assert head.numel() * 4 == 1 << 20, "what a copy in fp32 would take"
    assert largest.bytes <= 8 * 8192 * 4, "the logits of eight tokens"


def test_check_head_compares_every_part(monkeypatch):
    """One wrong logit in the first, a middle and the last part; a bias and a padded vocabulary move with the parts."""
    monkeypatch.setattr(lm, "_HEAD_BYTES", 4 * 32 * 10)
    model = tiny("phi", vocab_size=128)
    with torch.no_grad():
        model.lm_head.bias.uniform_(-3, 3)
    model.config.vocab_size = 125
    assert check_head(model).num_ids == 125
    forward = type(model).forward
    for wrong in (0, 64, 124):

        def shifted(*args, wrong=wrong, **kwargs):
            output = forward(model, *args, **kwargs)
            output.logits[..., wrong] += 1
            return output

        monkeypatch.setattr(model, "forward", shifted)
        with pytest.raises(ValueError, match="logits of PhiForCausalLM are not what its LM head makes"):
            check_head(model)


def test_a_model_is_loaded_in_the_dtype_of_its_checkpoint_to_where_it_will_be(tmp_path, monkeypatch):
    tiny().bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "model", None).dtype == torch.bfloat16
    meta = torch.device("meta")
    placed = load_model(str(tmp_path), "model", None, torch.device("cpu"))
    assert placed.dtype == torch.bfloat16 and placed.device.type == "cpu"
    asked = []
    monkeypatch.setattr(
        loading.AutoModelForCausalLM, "from_pretrained", lambda name, **how: asked.append(how)
    )
    load_model("org/name", "model", {"dtype": "float32"}, meta)
    load_model("org/name", "model", {"device_map": "auto"}, meta)
    load_model("org/name", "model", None)
    own = {"trust_remote_code": False}
    assert asked == [
        own | {"device_map": {"": meta}, "dtype": "float32"},
        own | {"device_map": "auto"},
        own,
    ]


def test_only_a_model_that_stays_whole_is_loaded_to_the_gpu(monkeypatch):
    gpu = torch.device("cuda", 1)
    whole = SimpleNamespace(device=gpu, fsdp=[], deepspeed=None)
    assert loading_device(whole) == gpu
    assert loading_device(SimpleNamespace(device=torch.device("cpu"), fsdp=[], deepspeed=None)) is None
    assert loading_device(SimpleNamespace(device=gpu, fsdp=["full_shard"], deepspeed=None)) is None
    assert loading_device(SimpleNamespace(device=gpu, fsdp=[], deepspeed="zero3.json")) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert loading_device(whole) is None


class ScaledLlama(LlamaForCausalLM):
    """Does to its logits what no configuration says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.001
        return output


class ShiftedLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 3] = -1e9  # one forbidden token
        return output


@pytest.mark.parametrize("kind", [ScaledLlama, ShiftedLlama])
def test_an_unknown_head_is_refused(kind):
    with pytest.raises(ValueError, match=f"logits of {kind.__name__} are not what its LM head makes"):
        check_head(kind(tiny("llama").config).eval())


def test_a_softcap_that_the_head_did_not_know_would_be_found(monkeypatch):
    model = tiny("gemma2")
    model.config.final_logit_softcapping, kept = None, 5.0
    head = check_head(model)
    assert head.softcap is None
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = kept * torch.tanh(output.logits / kept)
        return output

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(ValueError, match="scales, caps or shifts"):
        check_head(model)


def test_models_of_another_kind_are_refused():
    config = T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    for look in (find_backbone, check_head):
        with pytest.raises(TypeError, match="got the encoder-decoder T5ForConditionalGeneration"):
            look(T5ForConditionalGeneration(config))
    with pytest.raises(TypeError, match="no backbone was found in Linear"):
        find_backbone(nn.Linear(4, 4))


def test_an_adapter_on_the_head_is_refused_and_a_full_copy_of_it_is_followed():
    with pytest.raises(TypeError, match=r"output layer of .* is a"):
        check_head(with_lora(tiny(), target_modules=["q_proj", "lm_head"]))
    model = with_lora(tiny(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert check_head(model).weight is trained
    with model.disable_adapter():
        assert check_head(model).weight is not trained


def test_prompt_learning_is_refused():
    from peft import PrefixTuningConfig, PromptTuningConfig

    for kind in (PromptTuningConfig, PrefixTuningConfig):
        with pytest.raises(ValueError, match=r"model: wanted .*: prompt-learning adapters are not supported"):
            check_head(get_peft_model(tiny(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)))


def test_gradients_reach_the_weights_through_the_gathered_positions():
    model = tiny().train()
    ids = torch.arange(3, 15).view(2, 6)
    hidden_states_at(model, ids, torch.ones_like(ids), torch.tensor([5, 6 + 2])).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[ids[0]].abs().sum(-1).min() > 0
    assert gradient[ids[1, 3:]].abs().max() == 0, "tokens after the position cannot matter"


def test_call_through_runs_hooks_and_puts_the_forward_back():
    model, fired = tiny(), []
    model.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.register_forward_hook(lambda *_: fired.append("post"))
    wrapper = nn.Sequential(model)
    assert call_through(wrapper, model, lambda: "inside") == "inside"
    assert fired == ["pre", "post"] and "forward" not in model.__dict__
    model.forward = patched = lambda *_: "patched"
    with pytest.raises(ZeroDivisionError):
        call_through(model, model, lambda: 1 / 0)
    assert model.forward is patched
