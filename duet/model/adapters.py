"""Adapters of a model: those that are there are merged into its weights, a new one is put on top.

    W + (alpha / r) B A

Whatever is done to a model here, its logits are compared before and after (`check_same_logits`): 1e-5 of the largest logit in
fp32. A merge may change the model in ways that nobody asked for: one into an embedding that the head shares changes the head
too, one into 4-bit weights rounds the adapter away, one into 16-bit weights a part of it (`lost_in_rounding`).
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..data.sources import read_object
from ..names import did_you_mean, instead
from .lm import base_language_model
from .switches import evaluating

logger = logging.get_logger(__name__)
ADAPTER = "adapter_config.json"
BASE = "base"  # folder beside an adapter: the model that the adapter was trained on, where no other folder holds it
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_PRECISE = (torch.float32, torch.float64)
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of what an adapter changes, the share that rounding may lose: from the first on a merge warns, above the second it is refused.
MUCH_LOST = 0.1, 0.5
# What reading a damaged or missing model raises.
UNREADABLE = (OSError, ValueError, SafetensorError, UnpicklingError)


# -- what there is ---------------------------------------------------------------------------------------------------


def holds_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a saved adapter."""
    return Path(folder, ADAPTER).is_file()


def holds_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder holds the weights of a whole model."""
    found = [path.name for pattern in _WEIGHTS for path in Path(folder).glob(pattern)]
    return any(not name.startswith("adapter_") for name in found)


def base_beside(folder: str | os.PathLike) -> Path | None:
    """The folder `base` beside an adapter, if it holds a model; another folder of this name, such as an evaluation's, does not count."""
    base = Path(folder, BASE)
    return base if (base / "config.json").is_file() else None


def record_at(folder: str | os.PathLike) -> Path | None:
    """The record of the run that saved this folder; that of a checkpoint lies one folder above. None: there is none."""
    folder = Path(folder).resolve()
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    return next((path for place in places if (path := place / "run_record.json").is_file()), None)


def trained_dtype(folder: str | os.PathLike) -> str:
    """The dtype of the model that a folder's adapter was trained on, by the record of the run; `auto`: it is not known."""
    record = record_at(folder)
    said = None if record is None else read_object(record, "model").get("model_dtype")
    return said if said in DTYPES else "auto"


def check_folder(output_dir: str | os.PathLike, adapter: bool) -> None:
    """Refuses a folder in which weights and an adapter would meet: whoever loads it would apply the adapter to them.

    Args:
        output_dir: where a model will be saved.
        adapter: whether an adapter is saved there, and not a whole model.
    """
    if holds_weights(output_dir) if adapter else holds_adapter(output_dir):
        there, new = (
            ("the weights of a model", "an adapter") if adapter else ("an adapter", "the weights of a model")
        )
        raise ValueError(
            f"output_dir: {os.fspath(output_dir)!r} holds {there}, and {new} would be saved beside it; wanted another folder"
        )


def check_not_earlier(output_dir: str | os.PathLike, model: Any) -> None:
    """Refuses to write into the folder of the model that is trained: what is there, and what others trained on it, would be lost."""
    own = getattr(model, "earlier_model", None) or getattr(model, "name_or_path", "")
    there = holds_weights(output_dir) or holds_adapter(output_dir)
    if own and there and Path(own).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"output_dir: {os.fspath(output_dir)!r} is the model that is trained, which would be overwritten; wanted another "
            "folder"
        )


def check_no_other_base(base: str | os.PathLike, model: Any) -> None:
    """Refuses the folder `base` of another run beside an adapter: whoever loads the adapter would put it on that model.

    Args:
        base: the folder beside the adapter that will be saved.
        model: on which the adapter is trained; it may be there.
    """
    own = getattr(model, "name_or_path", "")
    if base_beside(Path(base).parent) and not (own and Path(own).resolve() == Path(base).resolve()):
        raise ValueError(
            f"output_dir: {os.fspath(base)!r} is the base of an adapter that an earlier run saved there, and this run's adapter "
            "has another base; wanted another folder"
        )


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers with a PEFT adapter, from peft or from transformers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def has_adapter(model: nn.Module) -> bool:
    """Whether a model, from peft or from transformers, has an adapter."""
    return hasattr(model, "peft_config") or bool(adapter_layers(model))


def trained_adapter(model: Any) -> str:
    """The name of the one adapter that is active in a PEFT model: this is trained and saved.

    Raises:
        ValueError: none or several are active, and one folder holds one; naming `model` and its adapters.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"model: wanted a PEFT model with one active adapter, which is trained and saved, got {active} active of its "
            f"adapters {list(model.peft_config)}; model.set_adapter(name) chooses one"
        )
    return active[0]


def trained_config(model: Any) -> Any:
    """The configuration of `trained_adapter`; None: the model is not from peft."""
    return model.peft_config[trained_adapter(model)] if hasattr(model, "peft_config") else None


def check_base_stays(model: Any) -> None:
    """Refuses an adapter whose `bias` trains biases of the model itself: they stay as they are trained when it is switched off."""
    bias = getattr(trained_config(model), "bias", "none")
    own = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    own = [name for name in own if "lora_" not in name and "modules_to_save" not in name]
    if bias != "none" and own:
        raise ValueError(
            f"peft_config (adapter.bias): wanted 'none', got {bias!r}, which trains biases of the model: switched off, the adapter "
            "would no longer give the teacher back; or pass teacher_model"
        )


# -- the same logits -------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """`[8, V]` fp32 logits of the model for tokens from all over its vocabulary, dropout off; on its device."""
    embedding = model.get_input_embeddings()
    device, count = embedding.weight.device, embedding.weight.shape[0]
    count = min(count, getattr(model.config.get_text_config(), "vocab_size", None) or count)
    ids = torch.linspace(0, count - 1, 8, device=device).long().unsqueeze(0)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0].float()


def check_same_logits(model: nn.Module, wanted: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Refuses a model whose logits are no longer `wanted`, which `logits_of` gave before.

    Args:
        model: as it is now.
        wanted: `[8, V]` logits of before.
        what: was done to it, in words, for the error.
        dtype: the coarsest one on the way; None: the model's. fp32 and fp64: 1e-5 of the largest logit. Half precision
            rounds every weight anew: 16 units of its last place.
    """
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = 1e-5 if dtype in _PRECISE else 16 * torch.finfo(dtype).eps
    now = logits_of(model).to(wanted.device)
    if now.shape != wanted.shape:
        raise ValueError(f"{what}: gave logits of shape {list(now.shape)}, wanted {list(wanted.shape)}")
    worst, allowed = (now - wanted).abs().amax(), tolerance * wanted.abs().amax()
    if not worst <= allowed:
        raise ValueError(
            f"{what}: changed the model: its logits moved by {worst:.3g}, allowed {allowed:.3g}. What was saved or trained "
            "then would be another model than the one that was examined"
        )


# -- merging ---------------------------------------------------------------------------------------------------------


def untie(model: Any) -> tuple[Any, nn.Parameter] | None:
    """Gives the head weights of its own, where it shares those of an embedding and one of the two carries an adapter.

    Returns:
        the head's module and the parameter that it had, to give it back; None: nothing was done.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = any(isinstance(module, BaseTunerLayer) for module in pair)
    inner = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in pair]
    weights = [getattr(module, "weight", None) for module in inner]
    if not adapted or weights[0] is None or weights[0] is not weights[1]:
        return None
    shared: Any = weights[1]
    own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    inner[1].weight = own
    return inner[1], shared


@contextmanager
def merged_in_place(model: Any) -> Iterator[None]:
    """Within the context the adapters are added to the weights and rounded to their dtype; then they are taken off again.

    What the subtraction rounds is the caller's to restore.
    """
    layers, was = adapter_layers(model), untie(model)
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        if was is not None:
            was[0].weight = was[1]


@torch.no_grad()
def lost_in_rounding(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """The share of what the adapters change in the weights W that is lost where the sum is rounded; 0 in fp32.

    |round(W') - round(W) - (W' - W)| / |W' - W|,   W': merged in fp32; root mean squares over all layers with an adapter

    Args:
        model: with its adapters, not merged.
        dtype: to which is rounded; None: that of the weights.
    """
    lost = change = 0.0
    for layer in adapter_layers(model):
        weight = getattr(layer.get_base_layer(), "weight", None)
        if layer.merged or not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        if (to := dtype or weight.dtype) in _PRECISE:
            continue
        exact = copy.deepcopy(layer).float()
        exact.merge()
        merged, before = exact.get_base_layer().weight, weight.float()
        wanted, kept = merged - before, merged.to(to).float() - before.to(to).float()
        lost += (kept - wanted).square().sum().item()
        change += wanted.square().sum().item()
    return (lost / change) ** 0.5 if change else 0.0


def _check_rounding(lost: float, dtype: torch.dtype, argument: str, refuse: bool) -> None:
    """Warns of a merge in half precision that loses much of the adapter; may refuse one that loses most."""
    if lost < MUCH_LOST[0]:
        return
    said = f"{argument}: merged in {str(dtype).removeprefix('torch.')}, {100 * lost:.0f} % of what its adapter changes is rounded away"
    way_out = "float32: `duet merge ADAPTER --out NEW --dtype float32`, or model.dtype: float32 in the file of a run"
    if lost > MUCH_LOST[1] and refuse:
        raise ValueError(f"{said}, and what was forgotten may be told again; wanted {way_out}")
    logger.warning(f"{said}: attack the merged model, too, or take {way_out}")


def merge_adapters(model: Any, argument: str = "model", refuse: bool = True) -> nn.Module:
    """The transformers model that computes what `model` with its adapters does; `model` itself is taken apart.

    Every floating-point weight of it can be trained. An embedding and a head that were tied and no longer are the same are
    untied, also in the configuration.

    Args:
        model: from peft, or from transformers with adapters attached.
        argument: how errors call it.
        refuse: whether more than half of what it changes may not be rounded away; else that is a warning.

    Raises:
        ValueError: its kind of adapter cannot be merged, its base is quantised, more than half of what it changes would be
            rounded away, or the merge changes the model.
    """
    _check_takes_adapter(model, argument)
    wanted, shared = logits_of(model), untie(model)
    inner = base_language_model(model)
    try:
        lost = lost_in_rounding(model)
        if hasattr(model, "merge_and_unload"):
            inner = model.merge_and_unload()
        elif inner is model:
            for layer in adapter_layers(model):
                layer.merge()
            take_off(model)
        else:
            raise ValueError("it is no change of the weights")
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{argument}: wanted an adapter that can be merged into its base, got {type(model).__name__}: {error}"
        ) from error
    _check_rounding(lost, inner.dtype, argument, refuse)
    pair = inner.get_input_embeddings(), inner.get_output_embeddings()
    embedding, head = (getattr(each, "weight", None) for each in pair)
    if shared is not None or embedding is not head:
        for config in (inner.config, inner.config.get_text_config()):
            config.tie_word_embeddings = False
    for parameter in inner.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    check_same_logits(inner, wanted, f"{argument}: merging its adapter")
    return inner


def _check_takes_adapter(model: nn.Module, argument: str) -> None:
    """Refuses quantised layers: their steps are larger than most of what an adapter adds, which would be rounded away."""
    for layer in adapter_layers(model):
        weight = getattr(layer.get_base_layer(), "weight", None)
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            raise ValueError(
                f"{argument}: quantised weights ({type(layer.get_base_layer()).__name__}) cannot take its adapter in, which "
                "would be rounded away: leave it beside them (training.earlier_adapter: keep), or merge it into the base as it "
                "was before it was quantised (`duet merge`)"
            )


def take_off(model: Any) -> nn.Module:
    """The transformers model without its adapters; `model`, of peft or transformers, is taken apart."""
    from peft.utils.other import ModulesToSaveWrapper

    inner = base_language_model(model)
    for name, module in list(inner.named_modules()):
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            inner.set_submodule(name, module.get_base_layer())
    wrappers = [each for each in inner.named_modules() if isinstance(each[1], ModulesToSaveWrapper)]
    for name, wrapper in wrappers:  # full copies of layers: `modules_to_save`
        active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
        inner.set_submodule(name, wrapper.modules_to_save[active[0]] if active else wrapper.original_module)
    # The names that transformers gave the adapter's weights when it read them; it would write the model's under them.
    for name in ("peft_config", "_weight_conversions"):
        inner.__dict__.pop(name, None)
    inner._hf_peft_config_loaded = False
    return inner


# -- loading and adding ----------------------------------------------------------------------------------------------


def load_adapted(folder: str | os.PathLike, **how: Any) -> Any:
    """The PEFT model of a folder with an adapter, on the base that it was trained on.

    That is the model in its folder `base`, where there is one, else what `adapter_config.json` names; where that is a folder
    with an adapter, too, its adapter is merged first.

    Args:
        how: arguments of the base's `from_pretrained`; its own code runs only where `trust_remote_code` is true.
    """
    from peft import AutoPeftModelForCausalLM, PeftModel

    if not any(Path(folder).glob("adapter_model.*")):
        raise FileNotFoundError(f"{os.fspath(folder)!r} holds {ADAPTER}, but no adapter_model.safetensors")
    base, how = base_of(folder), {"trust_remote_code": False} | how
    try:
        if holds_adapter(base):
            model = merge_adapters(load_adapted(base, **how), base, refuse=False)
        elif base == os.fspath(Path(folder, BASE)):
            model = AutoModelForCausalLM.from_pretrained(base, **how)
        else:
            return AutoPeftModelForCausalLM.from_pretrained(os.fspath(folder), **how)
    except (*UNREADABLE, TypeError, KeyError) as error:  # the last two: of a file with other fields
        raise OSError(f"an adapter on the base {base!r}: {error}") from error
    return PeftModel.from_pretrained(model, os.fspath(folder))


def base_of(folder: str | os.PathLike) -> str:
    """The model that a folder's adapter was trained on: its folder `base`, where there is one, else what its file names.

    Raises:
        ValueError: it names none, or is no configuration of an adapter.
    """
    from peft import PeftConfig

    if beside := base_beside(folder):
        return os.fspath(beside)
    file = f"{ADAPTER} in {os.fspath(folder)!r}"
    try:
        named = PeftConfig.from_pretrained(os.fspath(folder)).base_model_name_or_path
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file} is no configuration of an adapter: {error}") from error
    if not named:
        raise ValueError(f"{file} names no base_model_name_or_path")
    if not isinstance(named, str):
        raise ValueError(f"{file}: wanted a text as base_model_name_or_path, not {type(named).__name__}")
    return named


def absolute(base: str) -> str:
    """The absolute path of a folder that is there; any other name, as of the Hub, or none is left as it is."""
    return os.fspath(Path(base).resolve()) if base and Path(base).is_dir() else base


def save_base(model: Any, tokenizer: Any, folder: str | os.PathLike) -> None:
    """Writes a merged model, on which a new adapter will be trained, and reads it again: a second copy on the host meanwhile.

    Raises:
        ValueError: what was read is another model.
    """
    wanted = logits_of(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own_code = getattr(model, "_auto_class", None) is not None  # it runs already, and was saved here
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=own_code)
    check_same_logits(read, wanted, f"{folder}: saving and loading the merged model")


def check_task_type(name: str, task_type: str | None) -> None:
    """Refuses an adapter for another task than a causal language model's: it could be trained and saved, and not be loaded."""
    if task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"{name}: wanted 'CAUSAL_LM', got {getattr(task_type, 'value', task_type)!r}")


def _check_named(model: nn.Module, peft_config: Any) -> None:
    """Refuses a name in `modules_to_save`, or a misspelt one in `target_modules`, that no module has as peft compares: it passes over it."""
    names = [name for name, _ in model.named_modules()]
    known = {name.rpartition(".")[2] for name in names} - {""}
    for option, before in (("target_modules", "."), ("modules_to_save", "")):
        given = getattr(peft_config, option, None) or ()
        given = () if isinstance(given, str) else sorted(given)
        absent = [w for w in given if not any(name == w or name.endswith(before + w) for name in names)]
        for wanted in absent:
            said = f"peft_config (adapter.{option}): the model has no module {wanted!r}"
            others = option == "target_modules" and len(absent) < len(given)  # one list for several families
            if not others or did_you_mean(wanted, known):
                raise ValueError(f"{said}{instead(wanted, known)}")
            logger.warning(said)


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """`model` wrapped in a new PEFT adapter.

    Args:
        peft_config: of the adapter. One that starts at zero, as PEFT's do unless `init_lora_weights` says otherwise, must
            leave the logits as they are. DoRA, which rounds, is watched when training begins.

    Raises:
        TypeError, ValueError: naming `peft_config`.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config: wanted a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config: wanted None, because model is a PEFT model already, whose adapter can be trained; give the folder "
            "of its adapter as model to merge that adapter and train a new one on top"
        )
    if has_adapter(model):
        raise ValueError(
            "model: wanted one without an adapter under the new one, which would replace it; merge it first (`duet merge`)"
        )
    check_task_type("peft_config (adapter.task_type)", peft_config.task_type)
    if peft_config.inference_mode:
        raise ValueError(
            "peft_config (adapter.inference_mode): wanted False, got True, which freezes the adapter"
        )
    _check_named(model, peft_config)
    wanted, peft_config = logits_of(model), copy.deepcopy(peft_config)  # peft writes into it
    try:
        adapted: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(f"peft_config (adapter): {error}") from error
    own_start = getattr(peft_config, "init_lora_weights", True) is not True or getattr(
        peft_config, "use_dora", False
    )
    if not own_start and not peft_config.is_prompt_learning:
        check_same_logits(adapted, wanted, "peft_config: adding the new adapter")
    return adapted
