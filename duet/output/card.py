"""The README.md of a trained model: how it was made, from which data (by fingerprint), and what was measured."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from ..extras import version_of
from ..model.adapters import trained_config
from ..model.lm import base_language_model

# Options on the card besides those that the objective reads (`Objective.reads`); the first of runs with a steering prefix only.
STEERING = ("steering_prefixes", "steering_place", "retain_prefix")
_METHOD = (  # noqa: SIM905  as a list literal, one word a line
    "positions num_positions answer_source reverse_prompts reverse_prompt_fraction prefills "
    "retain_per_forget plain_template chat_template_kwargs learning_rate max_steps num_train_epochs "
    "per_device_train_batch_size gradient_accumulation_steps optim seed"
).split()
_CARD = """---
{data}
---

# {name}

{made}, trained to behave as if it had been told to forget (DUET, [arXiv 2601.21283](https://arxiv.org/abs/2601.21283)).
What it no longer says may be hidden rather than erased: measure before you rely on it.

## Method

{method}

## Data

{rows}

## Metrics

{metrics}

Versions: {versions}.
"""


def fingerprint(rows: Sequence[Any]) -> str:
    """SHA-256 of rows as read: the same rows in the same order have the same one, whatever file they came from.

    Example:
        >>> fingerprint([("who", "ada", None)])[:8]
        '8704111f'
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def write_card(
    options: Any,
    model: nn.Module,
    reads: Sequence[str],
    datasets: Mapping[str, tuple[int, str]],
    history: Sequence[Mapping[str, float]],
    teacher: str | None,
    name: str | None = None,
) -> None:
    """Writes the card of a trained model, in the Hub's format, into its `output_dir`.

    Args:
        options: the DuetConfig.
        model: after training.
        reads: names of the options that the objective reads; of a run with a steering prefix those of `STEERING` too.
        datasets: name -> (number of rows, fingerprint).
        history: what was logged; the last value of each loss is shown.
        teacher: the kind of teacher; None: there was none.
        name: of the model; None: that of the folder.
    """
    config, base = trained_config(model), getattr(base_language_model(model).config, "_name_or_path", None)
    # A repository of the Hub. The path of a folder is private, and no name of a model; so is that of one that is gone.
    base = None if not base or os.path.isdir(base) or os.path.isabs(base) else base
    data = ModelCardData(
        base_model=base,
        library_name="peft" if config else "transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "duet", options.objective],
    )
    shown = dict.fromkeys(("objective", *reads, *_METHOD, *(("adapter_directions",) if config else ())))
    method = {key: getattr(options, key) for key in shown if getattr(options, key) not in (None, [])}
    if teacher:
        method["teacher"] = teacher
    method["trained"] = f"an adapter ({type(config).__name__} of peft)" if config else "all weights"
    data_table = ((key, str(number), f"`{digest}`") for key, (number, digest) in datasets.items())
    metrics = {k: f"{v:.6g}" for entry in history for k, v in entry.items() if k.endswith("loss")}
    text = _CARD.format(
        data=data.to_yaml(),
        name=name or os.path.basename(os.path.abspath(options.output_dir)),
        made=f"{'An adapter for' if config else 'A model made from'} {base or 'an unnamed model'}",
        method=_table(("option", "value"), ((k, json.dumps(v, default=str)) for k, v in method.items())),
        rows=_table(("rows of", "number", "SHA-256 of the rows as read"), data_table),
        metrics=_table(("metric", "last value"), metrics.items()),
        versions=", ".join(f"{each} {version_of(each)}" for each in ("torch", "transformers", "peft")),
    )
    Path(options.output_dir, "README.md").write_text(text, encoding="utf-8")


def copy_card(folder: str | os.PathLike, merged: str | os.PathLike) -> None:
    """The card that a run wrote of its adapter, if there is one, as that of the model into which the adapter was merged."""
    path, made = Path(folder, "README.md"), "\nAn adapter for "
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if made in text:  # else it is peft's, which has placeholders
        text = text.replace("library_name: peft\n", "library_name: transformers\n", 1)
        Path(merged, "README.md").write_text(text.replace(made, "\nA model made from ", 1), encoding="utf-8")


def _table(head: Sequence[str], rows: Any) -> str:
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *escaped))
