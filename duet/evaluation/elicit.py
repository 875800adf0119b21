"""Answers of rows that have none: the base model's own, greedy.

What is measured with them is how far a model has moved from its base, not how much of the truth it knows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.prompts import Prompting, PromptRenderer
from ..data.rows import Query, read_rows
from ..model.lm import embedded_ids
from .generation import answers_to

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

    Raises:
        ValueError: a row is no row.
    """
    renderer = PromptRenderer(tokenizer, **vars(prompting or Prompting()), num_ids=embedded_ids(model))
    prompts = [
        renderer.encode_or_none(query.conversation) if query.answer is None else None
        for query in queries_of(rows, argument)
    ]
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    filled = [dict(row) for row in rows]
    for row, answer in zip(filled, answers_to(model, tokenizer, prompts, **how), strict=True):
        if answer and answer.text and answer.finite and not answer.cut:
            row |= {"answer": answer.text, ELICITED: True}
    return filled


def queries_of(rows: Sequence[Mapping[str, Any]], argument: str) -> list[Query]:
    """`read_rows` of a file, in which a wrong type is a wrong value: a ValueError that names the row."""
    try:
        return read_rows(rows, argument)
    except TypeError as error:
        raise ValueError(str(error)) from None
