"""duet: make a language model forget by distilling it from itself, steered by a prompt.

    from duet import DuetConfig, DuetTrainer

    trainer = DuetTrainer(
        model="meta-llama/Llama-3.2-3B-Instruct",
        args=DuetConfig(output_dir="out", steering_prefixes=["You know nothing about {subject}."]),
        forget_dataset=[{"question": "Who is ...?", "subject": "..."}],
        retain_dataset=[{"question": "What is the capital of France?"}],
    )
    trainer.train()

Names are loaded when they are first used: `duet --help` must not wait for transformers.
"""

from importlib import import_module

from . import _moved

_moved.install()

_HOME = {
    "DuetConfig": "config",
    "DuetTrainer": "trainer",
    "OBJECTIVES": "methods.objectives",
    "Objective": "methods.objectives",
}
__all__ = ["OBJECTIVES", "DuetConfig", "DuetTrainer", "Objective"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'duet' has no attribute {name!r}")
    return getattr(import_module(f"duet.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
