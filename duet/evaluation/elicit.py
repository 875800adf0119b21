"""Answers of rows that have none: the base model's own, greedy.

What is measured with them is how far a model has moved from its base, not how much of the truth it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data.prompts import CannotRender, Prompting, PromptRenderer
from ..data.rows import read_rows
from ..model.lm import context_length, embedded_ids
from .generation import continuations
from .scoring import batches_by_length

ELICITED = "answer_of_the_base"  # column: whether the answer was made here
ELICITED_NOTE = "the answer is the base model's own: compared with the base, not with the truth"


def elicit_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    argument: str,
    *,
    prompting: Prompting | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """The rows, with the model's greedy answer and the column `answer_of_the_base` where they had no answer.

    A row whose answer is empty or cut at the limit, or whose prompt does not fit or is refused by the chat template, stays as it is.

    Args:
        model, tokenizer: the base, in evaluation mode.
        rows: as `duet.data.rows.read_rows` reads them.
        argument: how errors call them.
        prompting: how prompts are written.
        batch_size, max_new_tokens: of the answers.

    Raises:
        ValueError: a row is no row.
    """
    try:
        queries = read_rows(list(rows), argument)
    except TypeError as error:  # of a file, a wrong type is a wrong value
        raise ValueError(str(error)) from None
    renderer, context = PromptRenderer(tokenizer, **vars(prompting or Prompting())), context_length(model)
    renderer.num_ids = embedded_ids(model)
    prompts: dict[int, list[int]] = {}
    for i, query in enumerate(queries):
        if query.answer is None:
            try:
                prompts[i] = list(renderer.encode(query.conversation))
            except CannotRender:
                continue
    able = [
        i
        for i, prompt in prompts.items()
        if prompt and (context is None or len(prompt) + max_new_tokens <= context)
    ]
    filled = [dict(row) for row in rows]
    for batch in batches_by_length([len(prompts[i]) for i in able], batch_size):
        chosen = [able[i] for i in batch]
        said = continuations(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens=max_new_tokens)
        for i, answer in zip(chosen, said, strict=True):
            if answer.text and answer.finite and not answer.cut(max_new_tokens):
                filled[i] |= {"answer": answer.text, ELICITED: True}
    return filled
