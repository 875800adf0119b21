"""Checks names that users wrote: an unknown one is refused, and the nearest known one suggested."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_SHOWN = 12


def did_you_mean(given: Any, names: Iterable[str]) -> str:
    """The end of an error message; empty where no name is near.

    Example:
        >>> did_you_mean("foward_kl", ["huber", "forward_kl"])
        " (did you mean 'forward_kl'?)"
    """
    close = get_close_matches(str(given), [str(name) for name in names], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def instead(given: Any, names: Iterable[str]) -> str:
    """`did_you_mean`, or a list of the first known names.

    Example:
        >>> instead("x", ["huber", "forward_kl"])
        '; wanted one of forward_kl, huber'
    """
    names = sorted(map(str, names))
    listed = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return did_you_mean(given, names) or f"; wanted {f'one of {listed}' if names else 'none'}"


def check_known(where: str, given: Iterable[Any], names: Iterable[str]) -> None:
    """Refuses the first of the keys `given` that is none of `names`.

    Args:
        where: what the error says before the key, such as `data.forget.`.

    Raises:
        ValueError: naming the key.
    """
    names = list(names)
    for key in given:
        if key not in names:
            raise ValueError(f"{where}{key}: there is no such key{instead(key, names)}")


def check_folder_is_there(argument: str, name: str) -> None:
    """Refuses the path of a folder that is not there, which is no name of a model on the Hub either.

    Raises:
        FileNotFoundError: naming the argument.
    """
    if not os.path.isdir(name) and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"{argument}: there is no folder {name!r}")


def expanded(argument: str, path: str | os.PathLike) -> str:
    """The path with `~` written out.

    Raises:
        ValueError: it is the home of a user who is not there; naming the argument.

    Example:
        >>> expanded("data", "rows")
        'rows'
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError(f"{argument}: there is no user whose home is meant by {os.fspath(path)!r}")
    return whole


def check_one_of(where: str, value: Any, choices: Iterable[str]) -> None:
    """Refuses a value that is none of `choices`.

    Raises:
        ValueError: naming where, what came, what was wanted, and the nearest choice.

    Example:
        >>> check_one_of("dtype", "auto", ("auto", "float32"))
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"{where}: wanted one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}"
        )
