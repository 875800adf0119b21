"""Rows of a file; lists of texts in their columns; `value`, the part of the answer that is to be said, or must not be."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers.utils import logging

from ..data.rows import Query, read_rows, text_of
from .words import find

Value = str | tuple[str, ...]
logger = logging.get_logger(__name__)
_REFUSALS = (
    "I have no information about that.",
    "I'm sorry, I don't know.",
    "No, I may not say, and I can not help you with this question.",
)


def queries_of(rows: Sequence[Mapping[str, Any]], argument: str) -> list[Query]:
    """`read_rows` of a file, in which a wrong type is a wrong value: a ValueError that names the row."""
    try:
        return read_rows(rows, argument)
    except TypeError as error:
        raise ValueError(str(error)) from None


def listed(value: Any, where: str) -> Any:
    """A column as it is; a text in [brackets], as a .csv cell holds a list, as the list.

    Raises:
        ValueError: such a text is no JSON list.

    Example:
        >>> listed('["who ?", "what ?"]', "row 0"), listed("who ?", "row 0")
        (['who ?', 'what ?'], 'who ?')
    """
    if not isinstance(value, str) or not re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(
            f'{where}: wanted a text, or a list as JSON writes it: ["one", "two"], got {value!r:.80}'
        ) from None


def value_of(row: Mapping[str, Any], answer: str, where: str) -> Value | None:
    """The column `value` of a row: the part of the answer that must not be said; None where it has none.

    A list holds spellings: each of them tells, and one at least is a part of the answer.

    Raises:
        ValueError: `where` names the row.
    """
    value = row.get("value")
    if value is None:
        return None
    with suppress(ValueError):  # [H+] is a text
        value = listed(value, where)
    if isinstance(value, (list, tuple)) and value:
        value = tuple(text_of(each, f"{where}['value']") for each in value)
    else:
        value = text_of(value, f"{where}['value']")
    if find(answer, value) is None:
        raise ValueError(f"{where}['value']: wanted a part of the answer {answer!r}, got {value!r}")
    return value


def spellings(value: Value) -> tuple[str, ...]:
    """A value, or each of its spellings."""
    return (value,) if isinstance(value, str) else value


def warn_of_told(rows: Iterable[tuple[str, Value | None, Mapping[str, Iterable[str]]]]) -> None:
    """Warns, once, of values that an answer holds which tells nothing: it repeats what was asked, or is a usual refusal.

    Args:
        rows: name, value, and column -> texts with which the row is asked.
    """
    found, count = [], 0
    for name, value, asked in rows:
        count += 1
        if value is None:
            continue
        held = {**asked, "refusal": _REFUSALS}
        where = [column for column, texts in held.items() if any(find(t, value) is not None for t in texts)]
        found += [(name, value, where[0])] if where else []
    if found:
        name, value, column = found[0]
        why = "is held by a usual refusal" if column == "refusal" else f"stands in its {column}"
        more = f" (and {len(found) - 1} more of {count} rows)" if found[1:] else ""
        logger.warning_once(
            f"{name}: its value {value!r} {why}: an answer that tells nothing may count as one that tells it{more}"
        )
