"""A pretrained folder as the start: its weights stay as they are, and all that is learnt is LoRA adapters on top.

    full = base + A_full     retrained = base + A_retrained     unlearned = base + A_full + A_method

An adapter lies in files of at most `MOST_BYTES`, in bf16, in a folder that is whole or not there. A model is always read from
these files, so that a run which was killed goes on with the same numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from duet.data.prompts import PromptRenderer
from duet.evaluation import models
from duet.evaluation.journal import write_json
from duet.model.answers import padding_id
from duet.model.lm import embedded_ids

from .pretrain import Encoded, losses_of, trainer_of
from .rows import Row
from .settings import Size
from .tokens import Dialogue

MOST_BYTES, TOLD = 16 << 20, "told.json"
_READ = 1 << 20  # bytes of each end of a file of weights that the digest reads


def check_base(folder: Path) -> None:
    """Refuses a folder from which the study cannot start, before anything is done.

    Raises:
        ValueError, FileNotFoundError: naming `base` and what is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"base: there is no folder {str(folder)!r}; wanted one with a pretrained model"
        )
    try:
        AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base: wanted a folder with a model and its tokenizer (config.json, tokenizer.json, *.safetensors), got {str(folder)!r}: "
            f"{error}"
        ) from error
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"base: wanted weights as *.safetensors in {str(folder)!r}, got none")
    if not tokenizer.chat_template:
        raise ValueError(
            f"base: wanted a tokenizer with a chat template, got one without in {str(folder)!r}; take the instruction-tuned "
            "version of the model, or write chat_template.jinja into a copy of the folder"
        )


def base_digest(folder: Path) -> str:
    """Of the folder's small files, and of size and both ends of each large one: it need not be read whole."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_READ))
            file.seek(max(0, size - _READ))
            digest.update(file.read(_READ))
    return digest.hexdigest()


# -- adapters ---------------------------------------------------------------------------------------------------------


def with_new_adapter(model: Any, rank: int) -> Any:
    """`model` with an adapter on every linear layer of its blocks, which changes nothing yet."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def save_adapter(model: Any, folder: Path, told: dict[str, Any]) -> None:
    """The adapter as `adapter-0.safetensors`, `adapter-1.safetensors`, ..., with its configuration and what is `told` of it."""
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    parts: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in get_peft_model_state_dict(model).items():
        tensor = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if parts[-1] and filled + tensor.nbytes > MOST_BYTES - _READ:  # the rest is for the names
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    for number, part in enumerate(parts):
        save_file(part, unfinished / f"adapter-{number}.safetensors")
    model.peft_config["default"].save_pretrained(unfinished)
    write_json(unfinished / TOLD, told)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def told_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TOLD).read_text())


def read_adapter(model: Any, folder: Path) -> None:
    """The saved numbers into the adapter that `model` has."""
    state: dict[str, torch.Tensor] = {}
    for path in folder.glob("adapter-*.safetensors"):
        state |= load_file(path)
    set_peft_model_state_dict(model, state)


def load(base: Path, adapters: Sequence[Path], device: str) -> tuple[Any, Any]:
    """The base in fp32 with these adapters added to its weights, one after the other, and its tokenizer."""
    loaded, tokenizer = models.load(base, "float32", device)
    model: Any = loaded
    for folder in adapters:
        config: Any = LoraConfig.from_pretrained(str(folder))
        model = with_new_adapter(model, config.r)
        read_adapter(model, folder)
        model = model.merge_and_unload()
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Shape:
    """Of a base: `blocks`, `embeddings`: parameters (a tied head once); `adapter_bytes`: of one adapter in its files."""

    layers: int
    hidden: int
    feed_forward: int
    blocks: int
    embeddings: int
    adapter_bytes: int


def shape_of(folder: Path, rank: int) -> Shape:
    """Read from the configuration alone: no weights are loaded."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = model.get_input_embeddings().weight.numel()
    text = config.get_text_config()
    adapted = with_new_adapter(model, rank)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    blocks = adapted.num_parameters() - trained - embeddings
    width = getattr(text, "intermediate_size", 4 * text.hidden_size)
    return Shape(text.num_hidden_layers, text.hidden_size, width, blocks, embeddings, 2 * trained)


# -- fine-tuning ------------------------------------------------------------------------------------------------------


class TemplateEncoder:
    """Dialogues -> (ids, weights), as the base's chat template writes them; the answer and its end weigh 1."""

    def __init__(self, tokenizer: Any, num_ids: int | None = None):
        self.renderer = PromptRenderer(tokenizer)
        self.renderer.num_ids = num_ids

    def __call__(self, dialogue: Dialogue) -> tuple[list[int], list[float]]:
        asked, (_, answer) = dialogue[:-1], dialogue[-1]
        prompt, said = self.renderer.encode(asked), self.renderer.encode_answer(asked, answer)
        return [*prompt, *said], [0.0] * len(prompt) + [1.0] * len(said)


def stream(rows: Sequence[Row], seed: int, length: int) -> list[Dialogue]:
    """`length` dialogues: every row once, in a new order, before any of them again."""
    drawn: list[Row] = []
    epoch = 0
    while len(drawn) < length:
        drawn += random.Random(f"{seed}/epoch/{epoch}").sample(list(rows), len(rows))
        epoch += 1
    return [(("user", row["question"]), ("assistant", row["answer"])) for row in drawn[:length]]


def piece_of(out: Path, number: int) -> Path:
    return out / f"piece-{number}"


def steps_of(size: Size) -> list[range]:
    """The steps of each piece."""
    ends = [size.pretrain_steps * piece // size.pieces for piece in range(size.pieces + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def finetune(
    rows: Sequence[Row], base: Path, size: Size, out: Path, *, seed: int, device: str, deadline: float
) -> dict[str, Any] | None:
    """Fine-tune, or go on, piece by piece; None when the deadline came first. The last piece's folder has the adapter.

    A piece starts AdamW anew and ends with its adapter in `piece_of(out, N)`; the one before it is removed then: a run that is
    killed loses at most one piece. No piece is started that would not end in time if it took as long as the longest before it.

    Args:
        rows: with `question` and `answer`.
        deadline: of time.monotonic().
    """
    said = stream(rows, seed, size.pretrain_steps * size.rows_per_step)
    pieces = steps_of(size)
    done = max((n for n in range(1, len(pieces) + 1) if piece_of(out, n).is_dir()), default=0)
    told = told_of(piece_of(out, done)) if done else {"losses": [], "seconds": 0.0}
    set_seed(seed)
    model, tokenizer = load(base, (), device)
    parameters = model.num_parameters()
    model = with_new_adapter(model, size.lora_rank)
    num_ids = embedded_ids(model)
    items, pad_id = TemplateEncoder(tokenizer, num_ids), padding_id(tokenizer, num_ids)
    while done < len(pieces):
        began = time.monotonic()
        if began + told["seconds"] >= deadline:
            return None
        if done:
            read_adapter(model, piece_of(out, done))
        steps = pieces[done]
        chosen = said[steps.start * size.rows_per_step : steps.stop * size.rows_per_step]
        trained = [p for p in model.parameters() if p.requires_grad]
        trainer = trainer_of(
            model,
            Encoded(chosen, items),
            torch.optim.AdamW(trained, lr=size.adamw_rate, weight_decay=0.0),
            size,
            out,
            steps=steps,
            pad_id=pad_id,
            seed=seed,
            device=device,
        )
        trainer.train()
        done += 1
        told = {
            "losses": told["losses"] + losses_of(trainer),
            "seconds": max(told["seconds"], time.monotonic() - began),
        }
        save_adapter(model, piece_of(out, done), told)
        shutil.rmtree(piece_of(out, done - 1), ignore_errors=True)
    return {
        "parameters": parameters,
        "steps": size.pretrain_steps,
        "losses": told["losses"],
        "longest_piece": round(told["seconds"], 1),
    }
