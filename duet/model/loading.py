"""A model by name, folder or object -> one that can be trained: its adapters, its attention, and where it is read to."""

import inspect
import os
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import logging
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..names import check_folder_is_there
from .adapters import UNREADABLE, has_adapter, holds_adapter, load_adapted, merge_adapters, trained_adapter
from .kept import keep_adapter
from .lm import base_language_model, find_backbone

logger = logging.get_logger(__name__)
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
    name = os.path.expanduser(os.fspath(model))
    check_folder_is_there(argument, name)
    placed = {} if device is None else {"device_map": {"": device}}
    # Of None transformers would ask on the terminal whether the code of a model may run.
    kwargs = {"trust_remote_code": False} | placed | (init_kwargs or {})
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
    whole: Any = _one_model(loaded, argument, earlier, name)
    whole.name_or_path = whole.config._name_or_path = name  # where its tokenizer is
    return whole


def without_attached_adapter(model: Any, earlier: Earlier = "merge") -> nn.Module:
    """`model`, with adapters that transformers attached (it loads a folder with an adapter so) merged or kept; PEFT models stay."""
    if not has_adapter(model) or hasattr(model, "get_base_model"):
        return model
    return _one_model(model, "model", earlier)


def without_frozen_adapter(model: Any, adds: bool, earlier: Earlier = "merge") -> nn.Module:
    """`model`, with adapters merged or kept where they could not be trained: from transformers, or frozen in peft.

    Args:
        model: that a user gave, to be trained.
        adds: whether a new adapter will be put on top.
        earlier: what becomes of the adapters (`DuetConfig.earlier_adapter`).

    Raises:
        ValueError: an adapter of peft that is frozen, and no new one: nothing would be trained; several that are active; or one
            that transformers attached and that is to be trained.
    """
    attached = has_adapter(model) and not hasattr(model, "get_base_model")
    if attached and not adds and any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model: wanted one without an adapter of add_adapter that is to be trained, which would be merged and all weights "
            "trained; give its LoraConfig to DuetTrainer as peft_config"
        )
    model = without_attached_adapter(model, earlier)
    if not has_adapter(model):
        return model
    if any(p.requires_grad for p in model.parameters()):
        trained_adapter(model)
        return model
    if not adds:
        raise ValueError(
            "model: wanted weights that can be trained, got a PEFT model whose adapter is frozen; load it with "
            "is_trainable=True, or pass peft_config: its adapter is then merged and a new one trained on top"
        )
    return _one_model(model, "model", earlier)


def _one_model(model: nn.Module, argument: str, earlier: Earlier, folder: str | None = None) -> nn.Module:
    """The transformers model that does what `model` with its adapter does, and says which model that was; `folder`: where it was read."""
    name = folder or getattr(model, "name_or_path", "")
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


def can_pack(model: nn.Module, asked_for: bool | None = None) -> tuple[bool, str]:
    """(whether several sequences can be packed into one without attending to each other, why). `asked_for`: then this.

    flash-attn reads their starts from `position_ids`, and does no work for padding. Other implementations separate them by
    a `[T, T]` mask: correct, but slower than padding.
    """
    if asked_for is not None:
        return asked_for, "asked for"
    model = base_language_model(model)
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    if "position_ids" not in inspect.signature(find_backbone(model).forward).parameters:
        return False, f"{type(model).__name__} takes no position_ids"
    return name.startswith("flash"), f"attn_implementation is {name}"


def keep_differentiable(model: nn.Module, trains: bool = True) -> None:
    """Stops 4-bit layers of bitsandbytes from repacking their weights on a CPU.

    On a CPU with AVX512-BF16 they repack in the first forward without gradients (a teacher's, an evaluation's). autograd
    does not know the repacked product: no gradient would pass through the layer, and adapters below it would silently
    learn nothing.

    Raises:
        ValueError: they were repacked already, and the model is to be trained. Unpacked again they are not quite what they were.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            packed = getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)
            layer.support_avx512bf16_for_cpu = packed
            if packed and trains:
                raise ValueError(
                    "model: it has answered on this CPU, for which bitsandbytes repacked its 4-bit weights; no gradient passes "
                    "through them. Load it again, and train before anything is asked"
                )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuses an optimizer that steps none of the weights that are trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad and id(p) in held for p in model.parameters()):
        raise ValueError(
            "optimizers: wanted an optimizer of weights that are trained, got one that holds none of them; those of a new "
            "adapter (peft_config) are made later: give the model with its adapter (peft.get_peft_model), and an optimizer of it"
        )


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
