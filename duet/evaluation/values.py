"""Rows of a file; lists of texts in their columns; `value`, the part of the answer that is to be said, or must not be."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.rows import Query, read_rows, text_of
from . import metrics


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
    except ValueError:
        raise ValueError(
            f'{where}: wanted a text, or a list as JSON writes it: ["one", "two"], got {value!r:.80}'
        ) from None


def value_of(row: Mapping[str, Any], answer: str, where: str) -> str | None:
    """The column `value` of a row: the part of the answer that must not be said; None where it has none.

    Raises:
        ValueError: `where` names the row.
    """
    value = row.get("value")
    if value is None:
        return None
    value = text_of(value, f"{where}['value']")
    if not metrics.contains_words(answer, value):
        raise ValueError(f"{where}['value']: wanted a part of the answer {answer!r}, got {value!r}")
    return value
