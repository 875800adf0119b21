"""Hashes of tokenizers, and short ones of models, by their contents: one that was moved or downloaded again has the same."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .lm import base_language_model

# Names in a configuration of what changes the logits and is in no weight. A short list: names that a later version of
# transformers adds must not change the hash of a model that stayed what it was.
_CHANGES_LOGITS = re.compile(
    r"rope|rotary|eps(ilon)?$|(act|activation)(_function)?$|soft_?cap|scal|multiplier|sliding_window$"
    r"|^n(um)?_(attention_|key_value_|hidden_)?(heads?|layers?)$|per_tok$"
)


def json_hash(value: Any, default: Any = None) -> str:
    """32 hex digits of a plain value: the same in whatever order its mappings were made; `default`: as in `json.dumps`."""
    text = json.dumps(value, sort_keys=True, default=default)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tokenizer_hash(tokenizer: Any, template: bool = False) -> str:
    """A hash of how text becomes ids: vocabulary, merges, normalisation, special tokens. Padding is left out.

    Args:
        tokenizer: a transformers tokenizer.
        template: whether its chat template counts too.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    else:
        content = tokenizer.get_vocab()
    special = {
        name: str(value) for name, value in tokenizer.special_tokens_map.items() if name != "pad_token"
    }
    return json_hash([content, special, *([template_hash(tokenizer)] if template else [])])


def template_hash(tokenizer: Any) -> str | None:
    """A hash of the chat template's text; None: there is none."""
    text = getattr(tokenizer, "chat_template", None)
    return json_hash(text) if text else None


def config_hash(model: nn.Module) -> str | None:
    """A hash of what a model's configuration says of its logits: rotations, epsilons, activations, scales, windows, numbers.

    The same for a model that was saved, moved or loaded in another dtype. None: it has no configuration.
    """
    config: Any = getattr(base_language_model(model), "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    said = config.get_text_config().to_dict().items()
    kept = {name: _plain(value) for name, value in said if _CHANGES_LOGITS.search(name) and value is not None}
    return json_hash(kept, default=str)


def _plain(value: Any) -> Any:
    """Without names that have no value; 10000 and 10000.0 are one number."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any training of the weights: names, shapes, dtypes and exact sums of bit patterns.

    Integer sums: the same on every device and in any order of addition. One read of the weights.
    """
    digest = hashlib.sha256()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        bits = tensor.detach().reshape(-1).contiguous()
        if bits.is_complex():
            bits = torch.view_as_real(bits).reshape(-1)
        bits = bits.to(torch.uint8) if bits.dtype is torch.bool else bits.view(integers[bits.element_size()])
        sums = [int(part.sum(dtype=torch.int64)) for part in (bits, bits[::7])]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {sums}\n".encode())
    return digest.hexdigest()[:16]


def fingerprints(model: nn.Module, tokenizer: Any) -> dict[str, str | None]:
    """What results of one model share: its dtype, `model_fingerprint`, `model_config` and `tokenizer_fingerprint`, with the template."""
    return {
        "model_dtype": str(getattr(base_language_model(model), "dtype", None)).removeprefix("torch."),
        "model_fingerprint": fingerprint(model),
        "model_config": config_hash(model),
        "tokenizer_fingerprint": tokenizer_hash(tokenizer, template=True),
    }
