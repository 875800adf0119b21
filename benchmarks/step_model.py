"""A random-weight Llama of a shape, made where it will run; its adapter, a tokenizer of one word a token, and rows of words."""

from __future__ import annotations

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.step_report import Shape

SPECIAL = ("<pad>", "</s>", "<unk>")
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.v,
        hidden_size=shape.d,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(512, shape.prefix + shape.prompt + shape.answer),
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def new_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same random weights at every call."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype).eval()


def adapter() -> LoraConfig:
    torch.manual_seed(1)
    return LoraConfig(**LORA)


def words_of(shape: Shape) -> PreTrainedTokenizerFast:
    """One word an id, so that a text has as many tokens as words."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *(f"w{i}" for i in range(shape.v - len(SPECIAL)))])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


class Words:
    """Random texts of so many words each, the same for the same seed."""

    def __init__(self, shape: Shape, seed: int):
        self.most = shape.v - len(SPECIAL)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, length: int) -> str:
        ids = torch.randint(0, self.most, (length,), generator=self.generator)
        return " ".join(f"w{i}" for i in ids.tolist())


def data_of(shape: Shape) -> tuple[list[dict[str, str]], str]:
    """(rows of a prompt and an answer, the prefix that only the teacher sees); an answer's last token is the end."""
    text = Words(shape, seed=2)
    rows = [{"prompt": text(shape.prompt), "answer": text(shape.answer - 1)} for _ in range(shape.batch)]
    return rows, text(shape.prefix)
