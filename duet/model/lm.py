"""A transformers causal language model -> (hidden states at chosen positions, LMHead).

The model's own forward would compute logits at every position. Here only the backbone (the model without its head)
runs, and only the scored positions reach the head: the logits tensor never exists. What the model does between backbone
and logits (softcap, scale) is read by `LMHead.of` and compared once with the model's own logits: `check_head`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from duet_kernels import LMHead, linear_gather

from .switches import evaluating

_HEAD_BYTES = 64 << 20


def embedded_ids(model: Any) -> int:
    """How many ids the model can read: the rows of its embedding."""
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model: {type(model).__name__} has no output and no input embeddings; wanted a causal language model of transformers"
        )
    return model.get_input_embeddings().weight.shape[0]


def check_whole(model: nn.Module) -> None:
    """Refuses a model of which a part is not where it computes: offloaded by a `device_map`, or never loaded."""
    placed = getattr(model, "hf_device_map", None) or {}
    away = [name for name, place in placed.items() if place in ("cpu", "disk")]
    if set(placed.values()) <= {"cpu"}:  # a model that is wholly on the CPU is where it computes
        away = []
    away = away or [name for name, each in model.named_parameters() if each.device.type == "meta"]
    if away:
        raise ValueError(
            f"model: {away[0] or 'all of it'} is offloaded (device_map) and not where the model computes, so that it cannot be "
            "trained or compared; load the model onto one device, smaller if it does not fit (model.quantization: nf4)"
        )


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model says it can read; None when it does not say."""
    config = base_language_model(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def base_language_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if adapted else model


def check_decoder(model: nn.Module) -> None:
    """Refuses an encoder-decoder model."""
    inner = base_language_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"model: wanted a decoder-only language model, got the encoder-decoder {type(inner).__name__}"
        )


def find_backbone(model: nn.Module) -> nn.Module:
    """The part of a causal language model that gives the hidden states its head reads.

    Found by duck typing: what `base_model_prefix` points to (`LlamaForCausalLM.model`, `GPTNeoXForCausalLM.gpt_neox`),
    else `get_decoder()`.

    Raises:
        TypeError: an encoder-decoder model, or nothing found.
    """
    check_decoder(model)
    inner = base_language_model(model)
    name = type(inner).__name__
    backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    if not isinstance(backbone, nn.Module) and hasattr(inner, "get_decoder"):
        backbone = inner.get_decoder()
    if not isinstance(backbone, nn.Module) or backbone is inner:
        raise TypeError(
            f"model: no backbone was found in {name}; wanted a transformers causal language model"
        )
    return backbone


def hidden_states_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    layer: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The backbone's last hidden states (after the final norm) at chosen positions.

    Args:
        model: a causal language model, PEFT-wrapped or not.
        input_ids, attention_mask: `[B, S]`, padded on either side.
        positions: `[N]` int64 places in the flattened `[B * S]` sequences.
        layer: return the states after this decoder layer, counted from 0, before the final norm; the layers above it do
            not run.
        position_ids: `[1, T]` instead of the mask, for packed sequences: each starts again at 0, which is how transformers
            separates them.

    Returns:
        `[N, D]`, in the backbone's dtype.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> hidden_states_at(model, ids, mask, positions=torch.tensor([3, 5])).shape
        torch.Size([2, 32])
    """
    backbone = find_backbone(model)
    extra: dict[str, Any] = {}
    if position_ids is not None:
        extra["position_ids"] = position_ids
    elif attention_mask is not None and "position_ids" in inspect.signature(backbone.forward).parameters:
        # Counted from the first real token: padding on the left must not shift learned or rotary positions.
        extra["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    extra |= {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if layer is None:
        states = backbone(**extra).last_hidden_state
    else:
        with _first_layers(backbone, layer + 1) as seen:
            backbone(**extra)
        (states,) = seen
    return states.flatten(0, 1).index_select(0, positions)


def layers_path(backbone: Any) -> str:
    """Where in the backbone the list of its decoder layers is, as `get_submodule` takes it."""
    count = backbone.config.get_text_config().num_hidden_layers
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path
    raise TypeError(f"model: no list of {count} decoder layers was found in {type(backbone).__name__}")


@contextmanager
def _first_layers(backbone: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """Within the context the backbone has only the first `count` layers; the output of the last of them is appended.

    Not from `output_hidden_states`, whose last entry is what comes after the norm.
    """
    path, seen = layers_path(backbone), []
    layers: Any = backbone.get_submodule(path)

    def see(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[count - 1].register_forward_hook(see)
    backbone.set_submodule(path, layers[:count])
    try:
        yield seen
    finally:
        backbone.set_submodule(path, layers)
        handle.remove()


def check_layer(model: nn.Module, layer: int | None) -> int:
    """`layer` if the model has it (None: a quarter of the way up)."""
    count = base_language_model(model).config.get_text_config().num_hidden_layers
    layers_path(find_backbone(model))  # raises now if there is none
    if layer is None:
        return count // 4
    if layer >= count:
        raise ValueError(f"rmu_layer: wanted one of the model's layers, 0 to {count - 1}, got {layer}")
    return layer


def select_parameters(model: nn.Module, wanted: Callable[[str], bool], objective: str) -> None:
    """Only parameters whose name is `wanted` keep requiring a gradient."""
    chosen = {name for name, p in model.named_parameters() if p.requires_grad and wanted(name)}
    if not chosen and hasattr(model, "peft_config"):
        raise ValueError(
            f"peft_config (adapter): wanted none, because objective {objective!r} trains weights of the model itself"
        )
    if not chosen:
        raise ValueError(
            f"model: {type(model).__name__} has no parameter that objective {objective!r} trains; its names are not known here"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def head_inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor
) -> tuple[Tensor, LMHead]:
    """`hidden_states_at`, in the head's dtype, and the head: what every loss of `duet_kernels` takes.

    Under autocast the backbone gives half precision while the head's weight stays fp32: the losses then run in fp32.
    """
    hidden = hidden_states_at(model, input_ids, attention_mask, positions)
    head = LMHead.of(model)
    return hidden.to(head.weight.dtype), head


def call_through(wrapped: nn.Module, inner: nn.Module, function: Callable[[], Any]) -> Any:
    """Calls `wrapped` (a DDP, FSDP, DeepSpeed wrapper of `inner`, or `inner` itself) with `function` as its forward.

    The wrappers synchronise gradients and gather parameters in their own forward; a loss that called the backbone directly
    would skip that. So the wrapper is called as usual, and for this one call `inner.forward` is `function`. The hooks of
    `inner` run too, and saving and loading see an unchanged module.
    """
    own = inner.__dict__.get("forward")  # accelerate may have put an autocasting forward there
    inner.forward = lambda *_, **__: function()
    try:
        return wrapped(None)  # DDP wants an argument that it can move to the device
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


@torch.no_grad()
def check_head(model: nn.Module) -> LMHead:
    """Refuses a model whose logits differ from what `LMHead.of(model)` computes from its backbone's hidden states.

    Runs 8 tokens through the model's own forward, and through backbone and head, and compares every logit.
    Memory: the model's `[8, V]` logits, and 64 MiB of the head in fp32 at a time.

    Returns:
        the head.

    Raises:
        TypeError: an unknown kind of head or backbone (`LMHead.of`, `find_backbone`), or a head whose rows lie on several ranks.
        ValueError: NaN logits, or different logits: the model changes them in a way that is not supported.
    """
    check_whole(model)
    check_decoder(model)
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"model: wanted an adapter of its weights, got {kind}: prompt-learning adapters are not supported"
            )
    head = LMHead.of(model)
    if head.group is not None:
        raise TypeError(
            f"model: the rows of its LM head lie on {head.group.size()} ranks (tensor parallel, or fully_shard was called on it). "
            "Pass the whole model: `accelerate launch` with FSDP2 shards it; the losses of duet_kernels take such a head"
        )
    device, vocabulary = head.weight.device, head.num_ids
    ids = torch.linspace(0, vocabulary - 1, 8, device=device).long().unsqueeze(0)
    mask, places = torch.ones_like(ids), torch.arange(ids.numel(), device=device)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        hidden, head = head_inputs(model, ids, mask, places)
    name = type(base_language_model(model)).__name__
    if logits.shape[:2] != ids.shape or logits.shape[-1] < vocabulary:
        raise ValueError(
            f"model: {name} gave logits of shape {list(logits.shape)} for {ids.numel()} tokens and a vocabulary of "
            f"{vocabulary}; heads of several tokens are not supported"
        )
    logits = logits[0, :, :vocabulary]
    if logits.isnan().any():
        raise ValueError(f"model: {name} gives NaN logits: its weights are damaged, or its training diverged")
    # The model rounds its logits to its dtype, which limits how closely they can agree.
    precise = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = (1e-5 if precise else 4 * torch.finfo(head.weight.dtype).eps) * logits.abs().amax()
    apart, step = [], max(1, _HEAD_BYTES // (4 * head.hidden_size))
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        bias = None if head.bias is None else head.bias[start:stop]
        part = replace(head, weight=head.weight[start:stop], bias=bias, vocab_size=None)
        every = torch.arange(stop - start, device=device).expand(len(hidden), -1)
        ours = linear_gather(hidden, part, every, impl="reference").float()
        apart.append((ours - logits[:, start:stop]).abs().amax())
    worst = torch.stack(apart).amax()
    if not worst <= tolerance:
        raise ValueError(
            f"model: the logits of {name} are not what its LM head makes of its hidden states (they differ by "
            f"{worst:.3g}, allowed {tolerance:.3g}). It scales, caps or shifts them in a way that LMHead.of does not "
            "know; training it here would be silently wrong, so it is refused"
        )
    return head
