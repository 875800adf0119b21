"""The folder of a base model: written, and read back with the world that it knows."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .facts import World
from .workplace import quiet

CHECKPOINT = Path(__file__).parent / "base_model"
QUALITY = "quality.json"
# All that a checkpoint has; which of the tokenizer's files, is a matter of the version of transformers.
WRITTEN = (QUALITY, "config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json",
           "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # fmt: skip


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what `from_pretrained` reads."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone, and a package is read by everybody


def load_base(folder: str | Path = CHECKPOINT) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, ready to be asked, and its tokenizer."""
    load_world(folder)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_world(folder: str | Path = CHECKPOINT) -> World:
    """The world that the model of `folder` was taught."""
    report = Path(folder) / QUALITY
    if not report.is_file():
        raise FileNotFoundError(f"checkpoint: there is no {report}; `duet demo --rebuild` makes one")
    return World.make(json.loads(report.read_text(encoding="utf-8"))["seed"])
