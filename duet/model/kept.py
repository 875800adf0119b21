"""An adapter of an earlier run that stays beside the weights while a new one is trained on top; both are saved as one.

    W x + B1 A1 x + B2 A2 x  =  W x + [B1 B2] [A1; A2] x          the scaling alpha / r is part of each B

The earlier one lies in buffers of the layers that it changes (`kept_down`: A `[r, in]`, `kept_up`: B `[out, r]`) and is added by a
hook: whoever switches the new adapter off has the model of the earlier run. What is saved is one LoRA adapter whose rank is the sum
of the ranks, on the base of the earlier one, which is not copied; every program that reads adapters reads it.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters import base_beside, check_same_logits, holds_adapter, logits_of, take_off
from .lm import base_language_model
from .switches import Switches

ON_TOP = "on_top"  # folder beside the sum: the new adapter alone, from which a run is resumed
WEIGHTS = "adapter_model.safetensors"
Parts = dict[str, tuple[Tensor, Tensor]]  # name of a linear layer -> A, B

# Fields of a LoraConfig under which an adapter is still B A x, and where it is.
_PLAIN = (  # noqa: SIM905  as a list literal, one word a line
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "use_rslora fan_in_fan_out init_lora_weights task_type base_model_name_or_path revision inference_mode peft_version auto_mapping"
).split()
_STARTS = (True, False, "gaussian")  # others change the base


def keep_adapter(model: Any, folder: str | os.PathLike | None = None) -> Any:
    """The transformers model that computes what `model` with its adapter does: the adapter is in buffers, beside the weights.

    Args:
        model: from peft, or from transformers with an adapter attached; it is taken apart.
        folder: of the adapter, if it is known.

    Raises:
        ValueError: its adapter is none that can be added to another one; naming the option `earlier_adapter`.
    """
    configs = list(model.peft_config.values())
    for config in configs:
        _check_plain(config, "the adapter that is there")
    base, revision = _base_of(configs[0], folder)
    wanted, parts = logits_of(model), _parts_of(model)
    inner: Any = take_off(model)
    for parameter in inner.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for name, (down, up) in parts.items():
        _attach(inner.get_submodule(name), down, up)
    check_same_logits(inner, wanted, "earlier_adapter: keeping the adapter beside the weights")
    inner.kept_on = base, revision
    return inner


def keeps(model: Any) -> bool:
    """Whether an earlier adapter lies beside the weights of a model, from peft or from transformers."""
    return getattr(base_language_model(model), "kept_on", None) is not None


def check_on_top(model: Any) -> None:
    """Refuses a new adapter that cannot be saved with the earlier one as a single one."""
    for config in model.peft_config.values():
        _check_plain(config, "the new adapter")
    _parts_of(model)


def save_sum(model: Any, folder: str | os.PathLike) -> None:
    """Writes the earlier and the new adapter as one, reads it again and compares the logits.

    Args:
        model: of peft, with its new adapter, on a base that keeps an earlier one.
        folder: receives `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: what was read is another model.
    """
    inner, config = base_language_model(model), next(iter(model.peft_config.values()))
    base, revision = inner.kept_on
    parts = _parts_of(inner)
    for name, layer in _kept_layers(inner).items():  # in front of the new ones
        kept, new = (layer.kept_down, layer.kept_up), parts.get(name)
        parts[name] = kept if new is None else (torch.cat([kept[0], new[0]]), torch.cat([kept[1], new[1]], 1))
    ranks = {name: len(down) for name, (down, _) in parts.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    saved = type(config)(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(parts),
        task_type=config.task_type,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    keys = {name: [f"base_model.model.{name}.lora_{each}.weight" for each in "AB"] for name in parts}
    state = {}
    for name, pair in parts.items():
        state |= {key: part.cpu().contiguous() for key, part in zip(keys[name], pair, strict=True)}
    saved.save_pretrained(os.fspath(folder))
    save_file(state, Path(folder, WEIGHTS), metadata={"format": "pt"})

    wanted, read = logits_of(model), load_file(Path(folder, WEIGHTS))
    again = {name: (read[down], read[up]) for name, (down, up) in keys.items()}
    with Switches(model).base_model(), _instead(inner, again):
        check_same_logits(model, wanted, f"{folder}: saving both adapters as one")


# -- what an adapter is ----------------------------------------------------------------------------------------------


def why_not_plain(config: Any) -> str | None:
    """What an adapter is or has beyond B A x on linear layers, in words; None: it is a plain LoRA adapter."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        return f"is a {type(config).__name__}"
    if config.init_lora_weights not in _STARTS:
        return f"has init_lora_weights={config.init_lora_weights!r}, which changes the base"
    usual = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _PLAIN and value != getattr(usual, field.name, None):
            return f"has {field.name}={value!r}"
    return None


def _check_plain(config: Any, what: str) -> None:
    if odd := why_not_plain(config):
        raise ValueError(
            f"earlier_adapter: wanted 'merge', got 'keep': {what} {odd}, and only plain LoRA adapters of linear layers can "
            "be saved as one"
        )


def _parts_of(model: Any) -> Parts:
    """A and B of the active adapters of each layer, one after the other; refuses an adapter of another than a linear layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts: Parts = {}
    for name, layer in base_language_model(model).named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        each: Any = layer
        if not isinstance(each.get_base_layer(), nn.Linear):
            raise ValueError(
                f"earlier_adapter: wanted 'merge', got 'keep': the adapter changes {name}, a "
                f"{type(each.get_base_layer()).__name__}, and only adapters of linear layers can be saved as one"
            )
        active = [adapter for adapter in each.active_adapters if adapter in each.lora_A]
        if active:
            down = torch.cat([each.lora_A[adapter].weight.detach() for adapter in active])
            up = torch.cat(
                [each.lora_B[adapter].weight.detach() * each.scaling[adapter] for adapter in active], 1
            )
            parts[name] = down, up
    return parts


def _base_of(config: Any, folder: str | os.PathLike | None) -> tuple[str, str | None]:
    """Where the base is that the adapter of `config` was trained on, and its revision."""
    if folder is not None and (beside := base_beside(folder)):
        return str(beside.resolve()), None
    base = config.base_model_name_or_path
    if not base or holds_adapter(base):
        why = f"is {base!r}, which holds an adapter, too" if base else "is not named in its configuration"
        raise ValueError(
            f"earlier_adapter: wanted 'merge', got 'keep': the base of the adapter that is there {why}"
        )
    return base, config.revision


# -- beside the weights ----------------------------------------------------------------------------------------------


def _attach(layer: Any, down: Tensor, up: Tensor) -> None:
    layer.register_buffer("kept_down", down)
    layer.register_buffer("kept_up", up)
    layer.kept_hook = layer.register_forward_hook(_add_kept)


def _detach(layer: Any) -> None:
    layer.kept_hook.remove()
    del layer.kept_down, layer.kept_up, layer.kept_hook


def _add_kept(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added = F.linear(F.linear(args[0].to(layer.kept_down.dtype), layer.kept_down), layer.kept_up)
    return (output + added).to(output.dtype)


def _kept_layers(inner: nn.Module) -> dict[str, Any]:
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in inner.named_modules()
        if hasattr(layer, "kept_hook")
    }


@contextmanager
def _instead(inner: nn.Module, parts: Parts) -> Iterator[None]:
    """Within the context the layers add these parts, and not those that are kept."""
    kept = {layer: (layer.kept_down, layer.kept_up) for layer in _kept_layers(inner).values()}
    for layer in kept:
        _detach(layer)
    now = []
    try:
        for name, (down, up) in parts.items():
            layer: Any = inner.get_submodule(name)
            layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            _attach(layer, down.to(layer.weight.device), up.to(layer.weight.device))
            now.append(layer)
        yield
    finally:
        for layer in now:
            _detach(layer)
        for layer, (down, up) in kept.items():
            _attach(layer, down, up)
