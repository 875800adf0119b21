"""Attacks on the weights: relearning from a few shown facts, and rounding the weights to int8 or int4.

Both work on a copy and leave the model as it was. The relearning attacker is an outsider, so its loop is plain torch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..evaluation.attacks.weights import quantize
from . import probes
from .curriculum import encode
from .facts import Question

RELEARN_RATES = (1e-4, 3e-4, 1e-3)
RELEARN_STEPS, RELEARN_ROWS = 10, 16


def quantized_copy(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy whose linear layers and embeddings carry rounded weights (a tied head is rounded once)."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:
                parameter.copy_(quantize(parameter, bits))
    return rounded


def quantized_recall(speaker: probes.Speaker, questions: Sequence[Question], bits: int) -> float:
    attacked = speaker.with_model(quantized_copy(speaker.model, bits))
    return probes.recall(attacked.answers(questions), questions)


def relearned_copy(
    speaker: probes.Speaker, shown: Sequence[Question], rate: float, steps: int = RELEARN_STEPS, seed: int = 0
) -> PreTrainedModel:
    """The model after AdamW cross-entropy on the true answers of the `shown` questions, 16 questions a step."""
    model, rng = copy.deepcopy(speaker.model), random.Random(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        dialogues = [
            [*speaker.messages(question), {"role": "assistant", "content": question.answer}]
            for question in rng.sample(shown, min(RELEARN_ROWS, len(shown)))
        ]
        batch = encode(dialogues, speaker.tokenizer)
        # right padding and a causal mask: no counted position sees a pad
        logits_bsv = model(input_ids=batch.input_ids).logits
        loss = F.cross_entropy(logits_bsv[batch.rows, batch.columns], batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def relearn_recall(
    speaker: probes.Speaker,
    shown: Sequence[Question],
    asked: Sequence[Question],
    rates: Sequence[float] = RELEARN_RATES,
    steps: int = RELEARN_STEPS,
) -> dict[float, float]:
    """Recall on `asked` (forget authors that the attacker never saw) after relearning on `shown`, by learning rate."""
    overlap = {q.subject for q in shown} & {q.subject for q in asked}
    if overlap:
        raise ValueError(f"shown, asked: both contain {sorted(overlap)}, wanted different authors")
    return {
        rate: probes.recall(
            speaker.with_model(relearned_copy(speaker, shown, rate, steps)).answers(asked), asked
        )
        for rate in rates
    }
