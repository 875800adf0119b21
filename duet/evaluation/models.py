"""Loads the model to evaluate; an adapter in its folder is attached, not merged."""

import os
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..model.adapters import DTYPES, UNREADABLE, holds_adapter, load_adapted, trained_dtype
from ..model.answers import tokenizer_at
from ..model.lm import base_language_model, check_head
from ..model.loading import load_model
from ..names import check_one_of

logger = logging.get_logger(__name__)


def load(name: str | os.PathLike, dtype: str = "auto", device: str | None = None) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a folder or a name, in evaluation mode.

    Args:
        name: a model, or a folder with a PEFT adapter, which is then attached to its base model and not merged.
        dtype: `auto` (as saved; of an adapter: that in which it was trained, by the record of its run), `float32`, `bfloat16` or
            `float16`.
        device: None: the GPU if there is one.

    Raises:
        ValueError, FileNotFoundError: naming what was not found.
    """
    check_one_of("dtype", dtype, DTYPES)
    check_device(device)
    name = os.path.expanduser(os.fspath(name))
    wanted = trained_dtype(name) if dtype == "auto" and holds_adapter(name) else dtype
    kind = wanted if wanted == "auto" else getattr(torch, wanted)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if holds_adapter(name):
        try:
            model = load_adapted(name, dtype=kind)
        except UNREADABLE as error:
            raise FileNotFoundError(
                f"model: the adapter {name!r} or its base could not be loaded: {error}"
            ) from error
        base = model.peft_config["default"].base_model_name_or_path
    else:
        model, base = load_model(name, "model", {"dtype": kind}, None if place.type == "cpu" else place), None
    if getattr(model, "hf_quantizer", None) is None:  # a quantised model has been put in its place already
        model = model.to(place)
    model.eval()
    try:
        check_head(model)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if dtype == "auto" and place.type == "cpu" and base_language_model(model).dtype != torch.float32:
        logger.warning(
            f"model: computes in {str(base_language_model(model).dtype).removeprefix('torch.')}, as it was saved; on most CPUs "
            "--dtype float32 is much faster"
        )
    return model, tokenizer_at("model", *filter(None, (name, base)))


def check_device(device: str | None) -> None:
    """Refuses a device that does not exist, before a model is loaded.

    Raises:
        ValueError: naming `device`.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says either
        why = str(error).splitlines()[0]
        raise ValueError(f"device: wanted one that torch can use here, got {device!r} ({why})") from None
