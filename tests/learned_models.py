"""A tiny model that knows the answers of the tiny rows: what there is to forget. Made once per process."""

import copy
import functools
import tempfile

import pytest
import torch
from tiny_models import forget_rows, quick, retain_rows, tiny, word_tokenizer

from duet import OBJECTIVES, DuetConfig, DuetTrainer, Objective
from duet.demo.workplace import one_thread
from duet.methods.objectives import answer_nll


def knowing():
    """A fresh copy of it."""
    return copy.deepcopy(_learned())


@functools.cache
@torch.enable_grad()  # also where a test under no_grad is the first that wants it
def _learned():
    def nll(step):
        losses = answer_nll(step.hidden, step.head, step.labels, step.args)
        return {"loss": losses.sum() / step.counts.positions}

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, one_thread():
        patch.setitem(OBJECTIVES, "learn", Objective(nll, needs_answers=True))
        args = DuetConfig(
            **quick(folder, objective="learn", max_steps=60),
            learning_rate=5e-3,
            per_device_train_batch_size=12,
        )
        trainer = DuetTrainer(tiny(spread=0.1), args, forget_rows(), retain_rows(), word_tokenizer())
        trainer.train()
    return trainer.model.eval()
