"""Greedy continuations in batches: left padding, key-value cache, stop strings. Knows token ids, not suites or files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..lm import evaluating, padding_id
from .scoring import device_of


class Continuation(NamedTuple):
    """What was said: text without special tokens, cut before a stop string; new tokens; were all logits numbers?"""

    text: str
    num_tokens: int
    finite: bool


class _NumberWatch(LogitsProcessor):
    """Remembers which rows ever had a NaN logit: an argmax over NaN is a token like any other. No synchronisation."""

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = scores.isnan().any(-1)
        self.broken = now if self.broken is None else self.broken | now
        return scores


class _StopText(StoppingCriteria):
    """Ends a row once its new text contains a stop text.

    transformers' own criterion takes the vocabulary apart and fails on tokenizers that cannot write "abcdef". Here the
    last tokens are decoded: a stop text of n characters ends within the last n tokens, and begins before.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int):
        self.tokenizer, self.stop, self.prompt_length = tokenizer, tuple(stop), prompt_length
        self.tail = max(map(len, stop)) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tail.tolist(), skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[Continuation]:
    """Greedy continuations of one batch of prompts, padded on the left whatever the tokenizer prefers.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: at most so many new tokens.
        stop: texts that end a continuation; the stop text itself is cut off.
    """
    device, pad_id = device_of(model), padding_id(tokenizer)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[b, longest - len(prompt) :] = 1
    ends = end_tokens(model, tokenizer)
    # Every option that a checkpoint's generation_config may carry and that would make this not plainly greedy.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        min_new_tokens=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=ends or None,
        use_cache=True,
    )
    watch = _NumberWatch()
    stopping = StoppingCriteriaList([_StopText(tokenizer, stop, longest)] if stop else [])
    with evaluating(model):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=greedy,
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=stopping,
        )
    finite = [True] * len(prompts) if watch.broken is None else (~watch.broken).tolist()
    said = []
    for tokens, good in zip(out[:, longest:].tolist(), finite, strict=True):
        tokens = _up_to_end(tokens, ends)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        said.append(Continuation(cut_at(text, stop).strip(), len(tokens), good))
    return said


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the stop texts.

    Example:
        >>> cut_at("Paris. Question: and", ["Question:", "; "])
        'Paris. '
    """
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's (a chat model has several) and the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[:i]
    return tokens
