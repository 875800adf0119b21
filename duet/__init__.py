"""duet: make a language model forget by distilling it from itself, steered by a prompt.

    from duet import DuetConfig, DuetTrainer

    trainer = DuetTrainer(
        model="meta-llama/Llama-3.2-3B-Instruct",
        args=DuetConfig(output_dir="out", steering_prefixes=["You know nothing about {subject}."]),
        forget_dataset=[{"question": "Who is ...?", "subject": "..."}],
        retain_dataset=[{"question": "What is the capital of France?"}],
    )
    trainer.train()

Names are loaded when they are first used, so that `duet --help` does not wait for transformers. `import duet` needs the
extra `train`: pip install 'duet-kernels[train]'. The losses alone, `duet_kernels`, need only torch.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import _moved, extras

if TYPE_CHECKING:
    from .config import DuetConfig
    from .methods.objectives import OBJECTIVES, Objective
    from .trainer import DuetTrainer

    __version__: str

if sentence := extras.missing("train"):
    if Path(sys.argv[0]).name in ("duet", "duet.exe", "-m"):  # the command, or python -m duet
        sys.exit(f"error: {sentence}")
    raise extras.MissingExtra(sentence)
_moved.install()
extras.silence_what_no_user_can_change()  # before any of the libraries is loaded

_HOME = {
    "DuetConfig": "config",
    "DuetTrainer": "trainer",
    "OBJECTIVES": "methods.objectives",
    "Objective": "methods.objectives",
}
__all__ = ["OBJECTIVES", "DuetConfig", "DuetTrainer", "Objective"]


if not TYPE_CHECKING:  # a type checker would take any name for an attribute

    def __getattr__(name: str):
        if name == "__version__":
            return extras.version_of("duet-kernels") or "unknown"
        if name not in _HOME:
            raise AttributeError(f"module 'duet' has no attribute {name!r}")
        return getattr(import_module(f"duet.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__, "__version__"])
