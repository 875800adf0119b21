"""A model's tokenizer, and the answers that a model generates."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, ProcessorMixin

from ..data.dataset import Collator, plain_item
from ..data.prompts import answer_ending
from .lm import base_language_model, embedded_ids


def tokenizer_of(model: nn.Module, given: Any = None) -> tuple[Any, int]:
    """(`given`, or else the tokenizer that was saved with the model; the id that pads)"""
    if given is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not name:
            raise ValueError(
                "processing_class: wanted a tokenizer (the model does not say where it was loaded from), got None"
            )
        given = tokenizer_at("processing_class", name)
    check_tokenizer(given)
    return given, padding_id(given, embedded_ids(model))


def tokenizer_at(argument: str, *places: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of the first of these folders or names that has one.

    Raises:
        FileNotFoundError: none has; naming the argument.
    """
    failure: Exception | None = None
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            failure = error
    raise FileNotFoundError(
        f"{argument}: no tokenizer could be loaded from {' or '.join(repr(os.fspath(place)) for place in places)}: {failure}"
    ) from failure


def check_tokenizer(tokenizer: Any, argument: str = "processing_class") -> None:
    """Refuses what is no tokenizer, such as a processor of texts and images.

    Raises:
        TypeError: naming the argument, what came and the way out.
    """
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, ProcessorMixin) or not hasattr(tokenizer, "eos_token_id"):
        way = f"; its .tokenizer is one: pass {argument}.tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise TypeError(f"{argument}: wanted a tokenizer, got a {kind}{way}")


def padding_id(tokenizer: Any, num_ids: int | None = None) -> int:
    """The pad token, else the end token: the attention mask hides padding, so any token of the model will do.

    Args:
        num_ids: how many ids the model embeds; None: not checked.

    Raises:
        ValueError: there is neither, or the model does not have it.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is None:
            continue
        if num_ids is not None and token >= num_ids:
            raise ValueError(
                f"processing_class: its token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the model "
                f"embeds the ids 0 to {num_ids - 1}; call model.resize_token_embeddings(len(tokenizer)), or set "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        return token
    raise ValueError("processing_class: wanted a tokenizer with a pad or end token, got one with neither")


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's (a chat model has several), the tokenizer's and the chat template's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*ends, *end, *answer_ending(tokenizer)[-1:]]))


@torch.no_grad()
def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    pad_id: int,
    max_new_tokens: int | None,
    seed: int | None = None,
    **how: Any,
) -> list[list[int]]:
    """Answers of `model` to one batch of prompts, padded on the left whatever the tokenizer prefers.

    Args:
        prompts: token ids, at least one each.
        seed: None: greedy answers. Else each token is drawn from the model's own distribution (temperature 1, the whole
            vocabulary); the seed leaves the generators of others as they were.
        how: further arguments of `generate`.

    Returns:
        the new ids of each prompt, up to and with the end token where there is one.
    """
    device = next(model.parameters()).device
    batch = Collator(pad_id, "left")([plain_item(list(prompt)) for prompt in prompts])
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    ends = end_tokens(model, tokenizer)
    drawn = {} if seed is None else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        do_sample=seed is not None,
        **drawn,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=ends or None,
        use_cache=True,
    )
    aside = (
        nullcontext() if seed is None else torch.random.fork_rng([device] if device.type == "cuda" else [])
    )
    with _generation_config_of_our_own(model), aside:
        if seed is not None:
            torch.manual_seed(seed)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **how)
    return [_through_end(answer, ends) for answer in out[:, ids.shape[1] :].tolist()]


@contextmanager
def _generation_config_of_our_own(model: Any) -> Iterator[None]:
    """Within the context `generate` finds no options but those that it is given.

    transformers fills what a given configuration leaves open from the checkpoint's: penalties, suppressed or forced tokens,
    stop texts, time limits, assistants and whatever comes next would make greedy answers something else.
    """
    holders = [part for part in (model, base_language_model(model)) if hasattr(part, "generation_config")]
    before = [part.generation_config for part in holders]
    for part in holders:
        part.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for part, own in zip(holders, before, strict=True):
            part.generation_config = own


def _through_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids
