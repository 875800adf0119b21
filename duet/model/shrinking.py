"""The size of a trained LoRA adapter, changed after the training: W + s (alpha / r) B A with 0 <= s <= 1.

s = 0 is the base model, s = 1 the model as it was trained (weight-space interpolation: arXiv 2109.01903).
"""

import os
from typing import Any

import torch

from .adapters import absolute, adapter_layers, base_of, check_same_logits, logits_of
from .kept import why_not_plain

_AGAIN = "again"


class AdapterSize:
    """Sets the size of a model's LoRA adapter, and saves it.

    Args:
        model: of peft, with one adapter.

    Raises:
        ValueError: its adapter is no plain LoRA, whose effect on the weights grows with its size alone.
    """

    def __init__(self, model: Any):
        self.model = model
        for config in model.peft_config.values():
            if odd := why_not_plain(config):
                raise ValueError(
                    f"adapter: wanted a plain LoRA adapter, whose size can be changed; this one {odd}"
                )
        self._full = [(layer, dict(layer.scaling)) for layer in adapter_layers(model)]

    def set(self, size: float) -> None:
        """What the model computes changes at once. `size`: s."""
        for layer, full in self._full:
            layer.scaling.update({name: size * scaling for name, scaling in full.items()})

    def save(self, size: float, folder: str | os.PathLike, out: str | os.PathLike) -> None:
        """Writes the adapter at this size, reads it again and compares the logits. The model is then of no further use.

        Each B is multiplied by s, so that a program that reads the adapter need not know of it. The base stays where it is.

        Args:
            folder: where the adapter was read from.
            out: the folder to write.

        Raises:
            ValueError: what was read is another model.
        """
        self.set(size)
        wanted, base = logits_of(self.model), base_of(folder)
        for config in self.model.peft_config.values():
            config.base_model_name_or_path = absolute(base)
        self.set(1.0)
        with torch.no_grad():
            for layer, _ in self._full:
                for up in layer.lora_B.values():
                    up.weight.mul_(size)
                for up in layer.lora_embedding_B.values():
                    up.mul_(size)
        self.model.save_pretrained(os.fspath(out))
        self.model.load_adapter(os.fspath(out), _AGAIN)
        self.model.set_adapter(_AGAIN)
        check_same_logits(self.model, wanted, f"{os.fspath(out)}: saving and loading the adapter")
