"""Continuations, greedy or drawn, in batches: left padding, key-value cache, stop strings."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..model.answers import end_tokens, generate_answers, padding_id
from ..model.lm import context_length
from ..model.switches import evaluating
from .scoring import batches_by_length


class Continuation(NamedTuple):
    """An answer.

    Attributes:
        text: without special tokens, up to a stop text.
        num_tokens: how many new ones, without the end token.
        finite: whether no logit was NaN.
        stopped: whether a stop text ended it.
        limit: at most so many new tokens were allowed.
    """

    text: str
    num_tokens: int
    finite: bool
    stopped: bool = False
    limit: float = math.inf

    @property
    def cut(self) -> bool:
        """Whether the limit ended it, in the middle of what the model had to say."""
        return self.num_tokens >= self.limit and not self.stopped

    @property
    def status(self) -> str:
        """`ok`, or why what it says cannot be judged: `nan`, `empty`, `cut`."""
        return "nan" if not self.finite else "empty" if not self.text else "cut" if self.cut else "ok"


class _NumberWatch(LogitsProcessor):
    """Records which rows had a NaN logit: an argmax over NaN gives an ordinary token. No synchronisation."""

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = scores.isnan().any(-1)
        self.broken = now if self.broken is None else self.broken | now
        return scores.masked_fill(now[:, None], 0.0)  # nothing can be drawn from NaN


class _StopText(StoppingCriteria):
    """Ends a row once its new text contains a stop text.

    transformers' own criterion analyses the vocabulary and fails on tokenizers that cannot write "abcdef". Here the last
    tokens are decoded: a stop text of n characters spans at most n tokens.
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
    seed: int | None = None,
) -> list[Continuation]:
    """Continuations of one batch of prompts, padded on the left whatever the tokenizer prefers.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: at most so many new tokens.
        stop: texts that end a continuation; the stop text itself is cut off.
        seed: None: greedy. Else drawn at temperature 1 from the whole distribution.
    """
    watch = _NumberWatch()
    stopping = StoppingCriteriaList([_StopText(tokenizer, stop, max(map(len, prompts)))] if stop else [])
    with evaluating(model):
        answers = generate_answers(
            model,
            prompts,
            tokenizer,
            padding_id(tokenizer),
            max_new_tokens,
            seed,
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=stopping,
        )
    ends = end_tokens(model, tokenizer)
    finite = [True] * len(prompts) if watch.broken is None else (~watch.broken).tolist()
    said = []
    for tokens, good in zip(answers, finite, strict=True):
        tokens = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        upto = cut_at(text, stop)
        said.append(Continuation(upto.strip(), len(tokens), good, len(upto) < len(text), max_new_tokens))
    return said


def answers_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int] | None],
    *,
    max_new_tokens: int,
    batch_size: int,
    room: int | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Continuation | None]:
    """`continuations` of any number of prompts, those of similar length and with the same room together.

    Args:
        prompts: token ids; None for one that could not be written.
        room: a prompt is answered where the model's context has room for so many new tokens behind it; None: for
            `max_new_tokens`. With less room than that an answer is shorter; the prompts beside it change nothing.
        stop, seed: as in `continuations`; each batch draws from a seed of its own.
        progress: called with (prompts done, all of them), before the first batch and after each.

    Returns:
        an answer for each prompt; None where there is no prompt, or no room.
    """
    context, room = context_length(model), max_new_tokens if room is None else room
    fits = {i: p for i, p in enumerate(prompts) if p and (context is None or len(p) + room <= context)}
    by_limit: dict[int, dict[int, int]] = {}
    for i, p in fits.items():
        limit = max_new_tokens if context is None else min(max_new_tokens, context - len(p))
        by_limit.setdefault(limit, {})[i] = len(p)
    batches = [
        (limit, batch)
        for limit, lengths in sorted(by_limit.items())
        for batch in batches_by_length(lengths, batch_size)
    ]
    said: list[Continuation | None] = [None] * len(prompts)
    done = 0
    progress(done, len(fits))
    for number, (limit, batch) in enumerate(batches):
        asked = [fits[i] for i in batch]
        own = None if seed is None else seed + number
        answers = continuations(model, tokenizer, asked, max_new_tokens=limit, stop=stop, seed=own)
        for i, answer in zip(batch, answers, strict=True):
            said[i] = answer
        done += len(batch)
        progress(done, len(fits))
    return said


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the stop texts.

    Example:
        >>> cut_at("Paris. Question: and", ["Question:", "; "])
        'Paris. '
    """
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]
