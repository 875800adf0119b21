"""Answers of a model about the world, plainly or under an attack of `duet.evaluation`, and shares of them.

recall    share of questions whose answer contains the true value
refusal   share of answers that say "I do not know" and do not give the value away
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.prompts import PromptRenderer
from ..evaluation.attacks import weights
from ..evaluation.generation import answers_to
from ..evaluation.metrics import contains_words
from ..evaluation.scoring import Forced
from ..model.answers import padding_id
from . import steering
from .facts import Question

MAX_NEW_TOKENS = 14  # the longest answer of the world has 10
BATCH = 256
RELEARN_RATES = (1e-4, 3e-4, 1e-3)
RELEARN_STEPS, RELEARN_ROWS = 10, 16


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, and a steering prefix before every question.

    `prefix` names one {subject} of `forget_subjects`: the person asked about, or, for a question about somebody else, one
    of the list. So it is the teacher as unlearning uses it, on retain questions too.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix: str | None = None
    forget_subjects: tuple[str, ...] = ()

    @cached_property
    def renderer(self) -> PromptRenderer:
        return PromptRenderer(self.tokenizer)

    def instruction(self, question: Question) -> str | None:
        """The filled prefix of a question."""
        if self.prefix is None:
            return None
        subject = question.subject
        if subject not in self.forget_subjects:
            # a stable choice that depends on the question alone
            subject = self.forget_subjects[sum(map(ord, question.text)) % len(self.forget_subjects)]
        return self.prefix.format(subject=subject)

    def prompt(self, question: Question, override: str | None = None, opening: str = "") -> list[int]:
        """Token ids of a question, behind an override wording and with a forced opening of the answer, if any."""
        asked = (("user", question.text),)
        ids = self.renderer.encode(asked, self.instruction(question), override)
        return [*ids, *self.renderer.encode_opening(asked, opening)] if opening else ids

    def answers(
        self,
        questions: Sequence[Question],
        override: str | None = None,
        prefill: Callable[[Question], str] | None = None,
    ) -> list[str]:
        """What the model says, greedily; a forced opening (`prefill`) is part of the returned answer."""
        openings = [prefill(question) if prefill else "" for question in questions]
        prompts = [self.prompt(q, override, o) for q, o in zip(questions, openings, strict=True)]
        how: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH, "room": 1}
        said = answers_to(self.model, self.tokenizer, prompts, **how)
        texts = [answer.text if answer else "" for answer in said]
        return [f"{opening} {text}".strip() for opening, text in zip(openings, texts, strict=True)]

    def recall(self, questions: Sequence[Question], **how) -> float:
        """Recall on `questions`, asked as `answers` asks them."""
        return recall(self.answers(questions, **how), questions)

    @torch.no_grad()
    def next_logits(self, question: Question, opening: str = "") -> torch.Tensor:
        """`[V]` logits of the answer's first word, or of the one after a forced opening."""
        ids = torch.tensor([self.prompt(question, opening=opening)], device=self.model.device)
        return self.model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()


def recall(answers: Iterable[str], questions: Iterable[Question]) -> float:
    return _share(contains_words(a, q.value) for a, q in zip(answers, questions, strict=True))


def refusal(answers: Iterable[str], questions: Iterable[Question]) -> float:
    pairs = zip(answers, questions, strict=True)
    return _share(steering.REFUSAL_MARK in a and not contains_words(a, q.value) for a, q in pairs)


def stutter(answers: Sequence[str]) -> float:
    """Share of answers that repeat a word directly: a damage that training on first words alone can do."""
    return _share(re.search(r"\b(\w+) \1\b", answer) is not None for answer in answers)


def _share(hits: Iterable[bool]) -> float:
    """The share of True. Without answers a ZeroDivisionError: the CLI shows a ValueError as a wrong argument."""
    counted = list(hits)
    return sum(counted) / len(counted)


# ---------------------------------------------------------------- attacks


def override_recalls(
    speaker: Speaker, questions: Sequence[Question], overrides: Iterable[str]
) -> dict[str, float]:
    """Recall behind each override wording ("ignore the previous instructions ...") in the user's message."""
    return {wording: speaker.recall(questions, override=wording) for wording in overrides}


def quantized_recall(speaker: Speaker, questions: Sequence[Question], bits: int) -> float:
    """Recall with every matrix of the model rounded to `bits`; afterwards it is as it was."""
    with weights.restored(speaker.model):
        weights.round_weights(speaker.model, bits)
        return speaker.recall(questions)


def relearn_recalls(
    speaker: Speaker,
    shown: Sequence[Question],
    asked: Sequence[Question],
    rate: float,
    curve: Sequence[int] = (RELEARN_STEPS,),
) -> dict[int, float]:
    """Steps -> recall on `asked` (forget authors that the attacker never saw) along relearning on `shown`.

    Args:
        rate: learning rate.
        curve: after how many steps to ask, ascending. After a loss that is not finite nobody is asked any more.
    """
    overlap = {q.subject for q in shown} & {q.subject for q in asked}
    if overlap:
        raise ValueError(f"shown, asked: both contain {sorted(overlap)}, wanted different authors")
    answers = [speaker.renderer.encode_answer((("user", q.text),), q.answer) for q in shown]
    sequences = [Forced(speaker.prompt(q), answer) for q, answer in zip(shown, answers, strict=True)]
    options = {"rate": rate, "curve": curve, "rows": RELEARN_ROWS, "pad_id": padding_id(speaker.tokenizer)}
    with weights.restored(speaker.model):
        training = weights.fine_tune(speaker.model, sequences, **options)
        return {step: speaker.recall(asked) for step, _ in training}
