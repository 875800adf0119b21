"""Kinds of options: a dataclass field of such a kind is checked by `check_options`, as is one of a `Literal`."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from .names import check_one_of


class Wanted(NamedTuple):
    """What a value must be, in words and as a test. None passes where the words say so."""

    words: str
    holds: Callable[[Any], bool]


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and v >= least


Number = Annotated[float, Wanted("a finite number", math.isfinite)]
Positive = Annotated[float, Wanted("a number > 0", lambda v: 0 < v < math.inf)]
NotNegative = Annotated[float, Wanted("a number >= 0", lambda v: 0 <= v < math.inf)]
Share = Annotated[float, Wanted("a number in [0, 1]", lambda v: 0 <= v <= 1)]
InnerShare = Annotated[float, Wanted("a number in (0, 1)", lambda v: 0 < v < 1)]
Percent = Annotated[float, Wanted("a number in (0, 100]", lambda v: 0 < v <= 100)]
Count = Annotated[int, Wanted("an integer >= 1", _whole(1))]
MaybeCount = Annotated[int | None, Wanted("an integer >= 1 or None", lambda v: v is None or _whole(1)(v))]
MaybeIndex = Annotated[int | None, Wanted("an integer >= 0 or None", lambda v: v is None or _whole(0)(v))]
Texts = Annotated[list[str], "texts"]  # may be empty; a single text may be given alone
SomeTexts = Annotated[list[str], "texts", 1]


def check_options(options: Any) -> None:
    """Refuses the first field of the dataclass `options` that is not of its kind; a lone text becomes a list of one.

    Raises:
        ValueError: naming the option, what came and what was wanted.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     k: Count = 0
        >>> check_options(Options())
        Traceback (most recent call last):
        ...
        ValueError: k: wanted an integer >= 1, got 0
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        hint, value = hints[field.name], getattr(options, field.name)
        kind, *more = getattr(hint, "__metadata__", (None,))
        if isinstance(kind, Wanted) and not _holds(kind, value):
            raise ValueError(f"{field.name}: wanted {kind.words}, got {value!r}")
        if kind == "texts":
            setattr(options, field.name, _texts(field.name, value, *more))
        choices = _choices(hint)
        if choices and (value is not None or type(None) not in typing.get_args(hint)):
            check_one_of(field.name, value, choices)


def _holds(kind: Wanted, value: Any) -> bool:
    try:  # a NaN fails too: every comparison with it is false
        return not isinstance(value, bool) and bool(kind.holds(value))
    except TypeError:
        return False


def _choices(hint: Any) -> list[str]:
    """The texts of a Literal, or of a Literal in a union with None."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [part for part in (typing.get_args(hint) if union else (hint,)) if part is not type(None)]
    closed = all(typing.get_origin(part) is typing.Literal for part in parts)
    return [text for part in parts for text in typing.get_args(part)] if closed else []


def _texts(name: str, value: Any, least: int = 0) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or len(value) < least:
        raise ValueError(f"{name}: wanted a list of at least {least} text(s), got {value!r}")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}[{i}]: wanted a text that is not empty, got {text!r}")
    return list(value)
