"""A look at the steered teacher before training, and the chat template of `in_context`, which steers without training."""

from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from ..data.dataset import UnlearnDataset
from ..data.prompts import PromptRenderer, fill_prefix, steered_tokenizer

logger = logging.get_logger(__name__)
LOOKED_AT, TOKENS = 8, 16  # forget queries, and tokens of each answer


def look_at_teacher(
    dataset: UnlearnDataset, tokenizer: Any, says: Callable[[list[list[int]], int], list[list[int]]]
) -> list[str]:
    """Warns where the teacher, steered by the first prefix, answers as it does without, or with the row's answer.

    Args:
        dataset: its forget rows, at most LOOKED_AT of them, from all over, are asked; none where there is no prefix.
        tokenizer: decodes.
        says: prompts and the most new tokens -> the teacher's greedy answers, as ids.

    Returns:
        the names of the rows that the steered teacher still tells.
    """
    if not dataset.prefixes:
        return []
    count = min(LOOKED_AT, dataset.num_forget)
    rows = [place * dataset.num_forget // count for place in range(count)]
    prompts = [*map(dataset.plain, rows), *map(dataset.first_steered, rows)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in says(prompts, TOKENS)]
    plain, steered = texts[:count], texts[count:]
    told = [
        (dataset.rows[row], text)
        for row, before, text in zip(rows, plain, steered, strict=True)
        if text == before or _holds(text, dataset.rows[row].answer)
    ]
    if told:
        query, text = told[0]
        logger.warning(
            f"the steered teacher answers {len(told)} of {count} forget queries as it does without its prefix, or with what is to "
            f"be forgotten ({query.name}: {text[:60]!r}). The student cannot forget what its teacher tells: try other "
            "steering_prefixes, another teacher, or an objective without one, such as npo"
        )
    return [query.name for query, _ in told]


def tokenizer_that_steers(dataset: UnlearnDataset, renderer: PromptRenderer, args: Any) -> Any:
    """The tokenizer with a chat template that puts the first prefix, about all subjects, before every conversation."""
    people = ", ".join(dataset.subjects) or None
    instruction = fill_prefix(args.steering_prefixes[0], people, "forget_dataset")
    logger.info("in_context: nothing is trained; the chat template now steers (save_model() writes it)")
    return steered_tokenizer(renderer.tokenizer, instruction, args.steering_place, **renderer.template_kwargs)


def _holds(text: str, answer: str | None) -> bool:
    wanted = (answer or "").strip(" .!?").casefold()
    return bool(wanted) and wanted in text.casefold()
