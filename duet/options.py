"""Dataclasses of options, and what their fields may hold: `check_options` checks one, `section` reads one from a mapping.

A field says by its type what it holds: a plain type, a `Literal`, one of the kinds below, or another such dataclass.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from .names import check_known, check_one_of


class Wanted(NamedTuple):
    """A number between two limits, in words and as a test.

    Attributes:
        edges: `[` and `]`: the limit is allowed; `(` and `)`: it is not.
        low, high: the limits.
        whole: whether it must be an integer.
        optional: whether None is allowed too.
    """

    edges: str = "()"
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    optional: bool = False

    @property
    def words(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        low, high = self.edges
        limits = f"in {low}{self.low}, {self.high}{high}"
        if self.high == math.inf:
            limits = f"{'>=' if low == '[' else '>'} {self.low}"
        return f"{'an integer' if self.whole else 'a number'} {limits}{' or None' if self.optional else ''}"

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number; True and False are not numbers."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or (self.whole and not issubclass(type(value), numbers.Integral)):
            return False
        low, high = self.edges
        try:  # a NaN fails too: every comparison with it is false
            above = self.low <= value if low == "[" else self.low < value
            below = value <= self.high if high == "]" else value < self.high
        except TypeError:
            return False
        return bool(above and below)


class ListOf(NamedTuple):
    """Texts that are not empty, at least so many; a single one may be given alone. `blank`: of white space, too."""

    least: int
    blank: bool = False


Number = Annotated[float, Wanted()]
Positive = Annotated[float, Wanted("()", 0)]
NotNegative = Annotated[float, Wanted("[)", 0)]
MaybePositive = Annotated[float | None, Wanted("()", 0, optional=True)]
MaybeClip = Annotated[float | None, Wanted("[]", 0, optional=True)]  # infinite: no limit, as None
Share = Annotated[float, Wanted("[]", 0, 1)]
InnerShare = Annotated[float, Wanted("()", 0, 1)]
UpperShare = Annotated[float, Wanted("(]", 0, 1)]
Percent = Annotated[float, Wanted("(]", 0, 100)]
Count = Annotated[int, Wanted("[)", 1, whole=True)]
MaybeCount = Annotated[int | None, Wanted("[)", 1, whole=True, optional=True)]
MaybeIndex = Annotated[int | None, Wanted("[)", 0, whole=True, optional=True)]
Texts = Annotated[list[str], ListOf(0)]
BlankTexts = Annotated[list[str], ListOf(0, blank=True)]
SomeTexts = Annotated[list[str], ListOf(1)]

_IN_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def check_options(options: Any) -> None:
    """Refuses the first field of the dataclass `options` that is not of its kind; a lone text becomes a list of one.

    Fields of plain types are not looked at.

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
        hint = hints[field.name]
        if hasattr(hint, "__metadata__") or choices_of(hint):
            value = fitted(field.name, getattr(options, field.name), hint)
            object.__setattr__(options, field.name, value)


def section(kind: Any, where: str, value: Any, short: str = "", **fixed: Any) -> Any:
    """A dataclass of a mapping: its keys, and the types of its values, checked.

    Args:
        kind: of the dataclass.
        where: what the mapping is called in error messages.
        value: the mapping; None: an empty one.
        short: the field that a lone text stands for.
        fixed: fields that are not in the mapping, as they are.

    Raises:
        ValueError: naming the key, what came and what was wanted.
    """
    value = mapping(where, {short: value} if short and isinstance(value, str) else value)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init and f.name not in fixed}
    check_known(f"{where}.", value, fields)
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and value.get(name) is None:
            words = _IN_WORDS.get(hints[name], "a value")
            raise ValueError(f"{where}.{name}: wanted {words}, got nothing")
    return kind(**fixed, **{name: fitted(f"{where}.{name}", v, hints[name]) for name, v in value.items()})


def mapping(where: str, value: Any) -> dict[str, Any]:
    """`value` as a dict of its own; None is an empty one.

    Raises:
        ValueError: it is no mapping; naming `where`.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{where}: wanted a mapping, got {value!r}")
    return dict(value or {})


def fitted(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type hint wants it: an integer does for a float, a lone text for a list. Unknown hints take all.

    Raises:
        ValueError: it does not fit; naming `name`.
    """
    for kind in getattr(hint, "__metadata__", ()):
        if isinstance(kind, ListOf):
            return _texts(name, value, kind)
        if not kind.holds(value):
            raise ValueError(f"{name}: wanted {kind.words}, got {value!r}")
        return value
    kinds = [typing.get_origin(kind) or kind for kind in parts_of(hint)]
    if value is None and type(None) in kinds:
        return value
    choices = choices_of(hint)
    if choices:
        check_one_of(name, value, choices)
    for kind in kinds:
        if dataclasses.is_dataclass(kind):
            return section(kind, name, value)
    if type(value) in kinds or not all(kind in _IN_WORDS for kind in kinds):
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if list in kinds and isinstance(value, str):
        return [value]
    raise ValueError(f"{name}: wanted {' or '.join(_IN_WORDS[kind] for kind in kinds)}, got {value!r}")


def parts_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def choices_of(hint: Any) -> list[str]:
    """The texts of a Literal, or of a Literal in a union with None; none of another hint."""
    parts = [part for part in parts_of(hint) if part is not type(None)]
    closed = all(typing.get_origin(part) is typing.Literal for part in parts)
    return [text for part in parts for text in typing.get_args(part)] if closed else []


def _texts(name: str, value: Any, kind: ListOf) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or len(value) < kind.least:
        raise ValueError(f"{name}: wanted a list of at least {kind.least} text(s), got {value!r}")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not (text if kind.blank else text.strip()):
            raise ValueError(f"{name}[{i}]: wanted a text that is not empty, got {text!r}")
    return list(value)
