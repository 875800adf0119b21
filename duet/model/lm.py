"""A transformers causal language model, by name or object -> (hidden states at chosen positions, LMHead).

The model's own forward would compute logits at every position. Here only the backbone (the model without its head)
runs, and only the scored positions reach the head: the logits tensor never exists. What the model does between backbone
and logits (softcap, scale) is read by `LMHead.of` and compared once with the model's own logits: `check_head`.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from duet_kernels import LMHead, linear_gather

from ..data.prompts import answer_ending
from .adapters import UNREADABLE, has_adapter, holds_adapter, load_adapted, merge_adapters
from .kept import keep_adapter

logger = logging.get_logger(__name__)
_HEAD_BYTES = 64 << 20
Earlier = Literal["merge", "keep"]


def load_model(
    model: Any,
    argument: str,
    init_kwargs: Any,
    device: torch.device | None = None,
    earlier: Earlier = "merge",
) -> nn.Module:
    """`model` itself, or the causal language model of that name or folder, in the dtype of its checkpoint.

    An adapter that is saved there is merged into its base, in memory, or kept beside it: the model is what that folder's model
    does, and never the base alone.

    Args:
        model: a model, a name or a folder.
        argument: of the trainer, which errors name.
        init_kwargs: passed to `from_pretrained`.
        device: where the weights are read to, one after the other, so that they are never whole on the host; None: the CPU.
        earlier: what becomes of the adapter (`DuetConfig.earlier_adapter`).
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"{argument}: wanted a model, or the name or folder of one, got {type(model).__name__}"
        )
    name = os.fspath(model)
    if not os.path.isdir(name) and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"{argument}: there is no folder {name!r}")
    placed = {} if device is None else {"device_map": {"": device}}
    kwargs = placed | (init_kwargs or {})
    try:
        if holds_adapter(name):
            loaded = load_adapted(name, **{k: v for k, v in kwargs.items() if k != "revision"})
        else:
            loaded = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except UNREADABLE as error:
        raise FileNotFoundError(
            f"{argument}: {name!r} is not a folder with a causal language model, nor the name of one that could be "
            f"loaded: {error}"
        ) from error
    if not hasattr(loaded, "peft_config"):
        return loaded
    whole: Any = _one_model(loaded, argument, name, earlier, name)
    whole.name_or_path = whole.config._name_or_path = name  # where its tokenizer is
    return whole


def without_attached_adapter(model: Any, argument: str, earlier: Earlier = "merge") -> nn.Module:
    """`model`, with adapters that transformers attached (it loads a folder with an adapter so) merged or kept; PEFT models stay."""
    if not has_adapter(model) or hasattr(model, "get_base_model"):
        return model
    return _one_model(model, argument, getattr(model, "name_or_path", ""), earlier)


def without_frozen_adapter(model: Any, argument: str, adds: bool, earlier: Earlier = "merge") -> nn.Module:
    """`model`, with adapters merged or kept where they could not be trained: from transformers, or frozen in peft.

    Args:
        model: that a user gave, to be trained.
        argument: how errors call it.
        adds: whether a new adapter will be put on top.
        earlier: what becomes of the adapters (`DuetConfig.earlier_adapter`).

    Raises:
        ValueError: an adapter of peft that is frozen, and no new one: nothing would be trained.
    """
    model = without_attached_adapter(model, argument, earlier)
    if not has_adapter(model) or any(p.requires_grad for p in model.parameters()):
        return model
    if not adds:
        raise ValueError(
            f"{argument}: wanted weights that can be trained, got a PEFT model whose adapter is frozen; load it with "
            "is_trainable=True, or pass peft_config: its adapter is then merged and a new one trained on top"
        )
    return _one_model(model, argument, getattr(model, "name_or_path", ""), earlier)


def _one_model(
    model: nn.Module, argument: str, name: str, earlier: Earlier, folder: str | None = None
) -> nn.Module:
    """The transformers model that does what `model` with its adapter does, and says which model that was."""
    whole: Any = merge_adapters(model, argument) if earlier == "merge" else keep_adapter(model, folder)
    whole.earlier_model = name
    return whole


def loading_device(args: TrainingArguments) -> torch.device | None:
    """Where a model that `args` will train is best loaded: the GPU, if there is one and the whole model will be on it.

    FSDP and DeepSpeed take it apart first, from the CPU.
    """
    return None if args.device.type == "cpu" or is_sharded(args) else args.device


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed will take the parameters apart: asked for in the options or by `accelerate launch`."""
    launched = (os.environ.get(f"ACCELERATE_USE_{each}", "") == "true" for each in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(launched)


def choose_attention(wanted: str, device: torch.device, half: bool) -> tuple[str | None, str]:
    """(transformers' `attn_implementation`, why): flash-attn where it can run, else None: transformers' default.

    The default is torch's `scaled_dot_product_attention`, or plain products for models that cannot use it (Gemma 2).

    Args:
        wanted: a name that transformers knows, or `auto`.
        device: where the model will run.
        half: whether it runs in bf16 or fp16, which flash-attn needs.
    """
    if wanted != "auto":
        return wanted, "asked for"
    if device.type != "cuda":
        return None, f"flash-attn needs a GPU, this is {device.type}"
    if not half:
        return None, "flash-attn needs bf16 or fp16"
    for name, installed in (
        ("flash_attention_3", is_flash_attn_3_available),
        ("flash_attention_2", is_flash_attn_2_available),
    ):
        if installed():
            return name, "installed"
    return None, "flash-attn is not installed"


def can_pack(model: nn.Module) -> tuple[bool, str]:
    """(whether several sequences can be packed into one without attending to each other, why).

    flash-attn reads their starts from `position_ids`, and does no work for padding. Other implementations separate them by
    a `[T, T]` mask: correct, but slower than padding.
    """
    model = base_language_model(model)
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    if "position_ids" not in inspect.signature(find_backbone(model).forward).parameters:
        return False, f"{type(model).__name__} takes no position_ids"
    return name.startswith("flash"), f"attn_implementation is {name}"


def load_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that was saved with the model."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError(
            "processing_class: wanted a tokenizer (the model does not say where it was loaded from), got None"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"processing_class: no tokenizer could be loaded from {name!r}: {error}"
        ) from error


def keep_differentiable(model: nn.Module) -> None:
    """Stops 4-bit layers of bitsandbytes from repacking their weights on a CPU.

    On a CPU with AVX512-BF16 they repack in the first forward without gradients (a teacher's, an evaluation's). autograd
    does not know the repacked product: no gradient would pass through the layer, and adapters below it would silently
    learn nothing.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def warn_of_half_precision(model: nn.Module) -> None:
    """Warns when weights are trained in half precision: without an fp32 copy most updates round to 0.

    bf16 has 8 significant bits: an update below 1/512 of a weight leaves it as it is. PEFT keeps adapters in fp32.
    """
    kinds = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if kinds and not hasattr(model, "peft_config"):
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        logger.warning_once(
            f"weights are trained in {names}, in which most updates are too small to change them; load the model in "
            "float32 and let autocast compute in bf16 (model.dtype: float32 with bf16: true), or train an adapter"
        )


def rounding_of_a_fresh_adapter(model: nn.Module) -> float:
    """How far a new adapter may move the hidden states, as a share of their root mean square: 0, except for DoRA in bf16.

    DoRA multiplies each row of a weight by m / |W + BA|, which is 1 before training, but not after it was rounded to
    half precision; a few percent over many layers. LoRA adds an exact 0.
    """
    configs = getattr(model, "peft_config", {}).values()
    half = base_language_model(model).dtype in (torch.bfloat16, torch.float16)
    return 0.1 if half and any(getattr(config, "use_dora", False) for config in configs) else 0.0


def embedded_ids(model: Any) -> int:
    """How many ids the model can read: the rows of its embedding."""
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model: {type(model).__name__} has no output and no input embeddings; wanted a causal language model of transformers"
        )
    return model.get_input_embeddings().weight.shape[0]


def check_tokenizer(tokenizer: Any, argument: str = "processing_class") -> None:
    """Refuses what is no tokenizer, such as a processor of texts and images.

    Raises:
        TypeError: naming the argument, what came and the way out.
    """
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, ProcessorMixin) or not hasattr(tokenizer, "eos_token_id"):
        way = f"; its .tokenizer is one: pass {argument}.tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise TypeError(f"{argument}: wanted a tokenizer, got a {kind}{way}")


def check_whole(model: nn.Module) -> None:
    """Refuses a model of which a part is not where it computes: offloaded by a `device_map`, or never loaded.

    Raises:
        ValueError: naming the part and the way out.
    """
    away = [
        name
        for name, place in (getattr(model, "hf_device_map", None) or {}).items()
        if place in ("cpu", "disk")
    ]
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    away = away if places - {"cpu"} else []  # a model that is wholly on the CPU is where it computes
    away = away or [name for name, each in model.named_parameters() if each.device.type == "meta"]
    if away:
        raise ValueError(
            f"model: {away[0] or 'all of it'} is offloaded (device_map) and not where the model computes, so that it cannot be "
            "trained or compared; load the model onto one device, smaller if it does not fit (model.quantization: nf4)"
        )


def padding_id(tokenizer: Any, num_ids: int | None = None) -> int:
    """The pad token, else the end token: the attention mask hides padding, so any token of the model will do.

    Args:
        num_ids: how many ids the model embeds; None: not checked.

    Raises:
        ValueError: there is neither, or the model does not have it.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is None:
            continue
        if num_ids is not None and token >= num_ids:
            raise ValueError(
                f"processing_class: its token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the model "
                f"embeds the ids 0 to {num_ids - 1}; call model.resize_token_embeddings(len(tokenizer)), or set "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        return token
    raise ValueError("processing_class: wanted a tokenizer with a pad or end token, got one with neither")


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's (a chat model has several), the tokenizer's and the chat template's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*ends, *end, *answer_ending(tokenizer)[-1:]]))


@torch.no_grad()
def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    pad_id: int,
    max_new_tokens: int | None,
    seed: int | None = None,
    **how: Any,
) -> list[list[int]]:
    """Answers of `model` to one batch of prompts, padded on the left whatever the tokenizer prefers.

    Args:
        prompts: token ids, at least one each.
        seed: None: greedy answers. Else each token is drawn from the model's own distribution (temperature 1, the whole
            vocabulary); the seed leaves the generators of others as they were.
        how: further arguments of `generate`.

    Returns:
        the new ids of each prompt, up to and with the end token where there is one.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[b, longest - len(prompt) :] = 1
    ends = end_tokens(model, tokenizer)
    drawn = (
        {"do_sample": False}
        if seed is None
        else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    config = GenerationConfig(
        **drawn, max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=ends or None, use_cache=True
    )
    aside = (
        nullcontext() if seed is None else torch.random.fork_rng([device] if device.type == "cuda" else [])
    )
    with _generation_config_of_our_own(model), aside:
        if seed is not None:
            torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, **how
        )
    return [_through_end(answer, ends) for answer in out[:, longest:].tolist()]


@contextmanager
def _generation_config_of_our_own(model: Any) -> Iterator[None]:
    """Within the context `generate` finds no options but those that it is given.

    transformers fills what a given configuration leaves open from the checkpoint's: penalties, suppressed or forced tokens,
    stop texts, time limits, assistants and whatever comes next would make greedy answers something else.
    """
    holders = [part for part in (model, base_language_model(model)) if hasattr(part, "generation_config")]
    before = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, own in zip(holders, before, strict=True):
            part.generation_config = own


def _through_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model says it can read; None when it does not say."""
    config = base_language_model(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def base_language_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def find_backbone(model: nn.Module) -> nn.Module:
    """The part of a causal language model that gives the hidden states its head reads.

    Found by duck typing: what `base_model_prefix` points to (`LlamaForCausalLM.model`, `GPTNeoXForCausalLM.gpt_neox`),
    else `get_decoder()`.

    Raises:
        TypeError: an encoder-decoder model, or nothing found.
    """
    inner = base_language_model(model)
    name = type(inner).__name__
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"model: wanted a decoder-only language model, got the encoder-decoder {name}")
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
    above, _, name = layers_path(backbone).rpartition(".")
    owner = backbone.get_submodule(above)
    layers, seen = getattr(owner, name), []

    def see(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[count - 1].register_forward_hook(see)
    setattr(owner, name, layers[:count])
    try:
        yield seen
    finally:
        setattr(owner, name, layers)
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
    if not chosen:
        raise ValueError(
            f"model: {type(model).__name__} has no parameter that objective {objective!r} trains; its names are not "
            "known here (an adapter has other names: train the model itself)"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def head_inputs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    layer: int | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, LMHead]:
    """`hidden_states_at`, in the head's dtype, and the head: what every loss of `duet_kernels` takes.

    Under autocast the backbone gives half precision while the head's weight stays fp32: the losses then run in fp32.
    With `layer` the states are those of `hidden_states_at(layer=...)`, which the head does not read.
    """
    hidden = hidden_states_at(model, input_ids, attention_mask, positions, layer, position_ids)
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


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Activations are recomputed in the backward, or kept; under the name that this version of transformers has for it."""
    new, old = (
        f"{name}_{'enable' if on else 'disable'}"
        for name in ("activation_checkpointing", "gradient_checkpointing")
    )
    getattr(model, new if hasattr(model, new) else old)()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context, dropout is off; afterwards `module` trains again if it did."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@torch.no_grad()
def check_head(model: nn.Module, num_tokens: int = 8) -> LMHead:
    """Refuses a model whose logits differ from what `LMHead.of(model)` computes from its backbone's hidden states.

    Runs `num_tokens` tokens through the model's own forward, and through backbone and head, and compares every logit.
    Memory: the model's `[num_tokens, V]` logits, and 64 MiB of the head in fp32 at a time.

    Returns:
        the head.

    Raises:
        TypeError: an unknown kind of head or backbone (`LMHead.of`, `find_backbone`), or a head whose rows lie on several ranks.
        ValueError: NaN logits, or different logits: the model changes them in a way that is not supported.
    """
    check_whole(model)
    head = LMHead.of(model)
    if head.group is not None:
        raise TypeError(
            f"model: the rows of its LM head lie on {head.group.size()} ranks (tensor parallel, or fully_shard was called on it). "
            "Pass the whole model: `accelerate launch` with FSDP2 shards it; the losses of duet_kernels take such a head"
        )
    device, vocabulary = head.weight.device, head.num_ids
    ids = torch.linspace(0, vocabulary - 1, num_tokens, device=device).long().unsqueeze(0)
    mask, places = torch.ones_like(ids), torch.arange(num_tokens, device=device)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        hidden, head = head_inputs(model, ids, mask, places)
    name = type(base_language_model(model)).__name__
    if logits.shape[:2] != ids.shape or logits.shape[-1] < vocabulary:
        raise ValueError(
            f"model: {name} gave logits of shape {list(logits.shape)} for {num_tokens} tokens and a vocabulary of "
            f"{vocabulary}; prompt-learning adapters and heads of several tokens are not supported"
        )
    logits = logits[0, :, :vocabulary]
    if logits.isnan().any():
        raise ValueError(f"model: {name} gives NaN logits: its weights are damaged, or its training diverged")
    # The model rounds its logits to its dtype, which limits how closely they can agree.
    precise = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = (1e-5 if precise else 4 * torch.finfo(head.weight.dtype).eps) * logits.abs().amax()
    worst = torch.stack(
        [(ours - theirs).abs().amax() for ours, theirs in _in_parts(hidden, head, logits)]
    ).amax()
    if not worst <= tolerance:
        raise ValueError(
            f"model: the logits of {name} are not what its LM head makes of its hidden states (they differ by "
            f"{worst:.3g}, allowed {tolerance:.3g}). It scales, caps or shifts them in a way that LMHead.of does not "
            "know; training it here would be silently wrong, so it is refused"
        )
    return head


def _in_parts(hidden: Tensor, head: LMHead, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(what the head makes of the hidden states, `logits`), for as many ids at a time as take _HEAD_BYTES of the head in fp32."""
    step = max(1, _HEAD_BYTES // (4 * head.hidden_size))
    for start in range(0, head.num_ids, step):
        stop = min(start + step, head.num_ids)
        bias = None if head.bias is None else head.bias[start:stop]
        part = replace(head, weight=head.weight[start:stop], bias=bias, vocab_size=None)
        ids = torch.arange(stop - start, device=hidden.device).expand(len(hidden), -1)
        yield linear_gather(hidden, part, ids, impl="reference").float(), logits[:, start:stop]
