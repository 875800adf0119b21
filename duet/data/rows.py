"""Rows -> queries: a conversation that ends with a user's turn, its answer if there is one, its subject.

{"question"} | {"prompt"} | {"messages"}   and perhaps {"answer"} | {"completion"}, {"subject"}
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from transformers.utils import logging

from .prompts import Conversation

logger = logging.get_logger(__name__)

PROMPTS = ("question", "prompt", "messages")
ANSWERS = ("answer", "completion")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names -> ours
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of choices


class Query(NamedTuple):
    """One checked row."""

    conversation: Conversation
    answer: str | None
    subject: str | None
    name: str  # where it came from, for error messages: "forget_dataset[3]"


def read_rows(rows: Any, argument: str) -> list[Query]:
    """Read and check a dataset of rows.

    A row has one of `question` (a user's question), `prompt` (plain text to continue, or a list of messages) and
    `messages` (a chat, of `role` and `content`, or `from` and `value`; a last assistant message is the answer); optionally
    `answer` or `completion`, and `subject`.

    Args:
        rows: a `datasets.Dataset`, a list of dicts, or anything else with a length and integer indices.
        argument: the name of the argument, for error messages.

    Raises:
        TypeError, ValueError: naming the argument and the row.

    Example:
        >>> (query,) = read_rows([{"question": "Who wrote Emma?", "subject": "Jane Austen"}], "forget_dataset")
        >>> query.conversation, query.answer, query.name
        ((('user', 'Who wrote Emma?'),), None, 'forget_dataset[0]')
    """
    if hasattr(rows, "iloc") or (hasattr(rows, "columns") and hasattr(rows, "to_dicts")):
        way = "to_dict('records')" if hasattr(rows, "iloc") else "to_dicts()"
        raise TypeError(f"{argument}: wanted a list of rows, got a {type(rows).__name__}; its .{way} is one")
    if isinstance(rows, dict) and any(hasattr(each, "column_names") for each in rows.values()):
        splits = ", ".join(map(repr, rows))
        raise TypeError(
            f"{argument}: wanted one list of rows, got a {type(rows).__name__} of {splits}; give one of them"
        )
    if (
        isinstance(rows, (str, bytes, dict))
        or not hasattr(rows, "__len__")
        or not hasattr(rows, "__getitem__")
    ):
        raise TypeError(
            f"{argument}: wanted a list of rows or a dataset with a length, got {type(rows).__name__} "
            "(a streaming dataset can be turned into a list first)"
        )
    if len(rows) == 0:
        raise ValueError(f"{argument}: wanted at least one row, got none")
    read = [rows[i] for i in range(len(rows))]
    warn_of_unread(read, argument)
    return [read_row(row, f"{argument}[{i}]") for i, row in enumerate(read)]


OURS = (*PROMPTS, *ANSWERS, "subject", "value", "paraphrases", "aliases", "two_hop")


def warn_of_unread(rows: Sequence[Any], argument: str, ours: Iterable[str] = OURS) -> None:
    """Warns of keys that look like misspelt ones of `ours`, in rows that lack these: they are not read."""
    ours = tuple(ours)
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        for key in row if isinstance(row, Mapping) else ():
            seen.setdefault(str(key), i)
    for key, i in seen.items():
        near = [] if key in ours else get_close_matches(key.casefold(), ours, n=1, cutoff=0.8)
        if near and rows[i].get(near[0]) is None:
            logger.warning(f"{argument}[{i}]: {key!r} is not read; did you mean {near[0]!r}?")


def check_repeats(forget: Sequence[Query], retain: Sequence[Query]) -> None:
    """Refuses a question that is both to be forgotten and to be retained, up to case and spaces; warns about repeated rows.

    Raises:
        ValueError: naming the two rows.
    """
    first = {_asked(query): query.name for query in forget}
    for query in retain:
        if (same := first.get(_asked(query))) is not None:
            raise ValueError(
                f"{query.name}: wanted a row that is not to be forgotten, got the question of {same}"
            )
    for rows in (forget, retain):
        names: dict[tuple, str] = {}
        again = [(names[q[:3]], q.name) for q in rows if names.setdefault(q[:3], q.name) != q.name]
        if again:
            logger.warning(
                f"{again[0][1]}: the same row as {again[0][0]}; {len(again)} of {len(rows)} rows are repetitions, and a "
                "repeated row counts once per repetition"
            )


def _asked(query: Query) -> Any:
    """What is asked, without case and spaces."""
    turns = query.conversation
    if isinstance(turns, str):
        return " ".join(turns.split()).casefold()
    return tuple((role, " ".join(text.split()).casefold()) for role, text in turns)


def read_row(row: Any, name: str) -> Query:
    """One row of `read_rows`; errors call it `name`."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{name}: wanted a dict, got {type(row).__name__}")
    given = [key for key in PROMPTS if row.get(key) is not None]
    if len(given) != 1:
        held = sorted(str(key) for key, value in row.items() if value is not None)
        got = " and ".join(given) if given else f"the keys {held}" if held or not row else "no value at all"
        renamed = "" if given else how_to_rename(row)
        raise ValueError(
            f"{name}: wanted exactly one of 'question', 'prompt' and 'messages', got {got}{renamed}"
        )
    value = row[given[0]]
    answers = [key for key in ANSWERS if row.get(key) is not None]
    if len(answers) > 1:
        raise ValueError(f"{name}: wanted at most one of 'answer' and 'completion', got both")
    answer = checked_text(row[answers[0]], f"{name}[{answers[0]!r}]") if answers else None
    subject = row.get("subject")
    if subject is not None:
        subject = checked_text(subject, f"{name}['subject']")

    if given[0] == "question":
        return Query((("user", checked_text(value, f"{name}['question']")),), answer, subject, name)
    if given[0] == "prompt" and isinstance(value, str):
        return Query(checked_text(value, f"{name}['prompt']"), answer, subject, name)
    conversation = _read_messages(value, f"{name}[{given[0]!r}]")
    if conversation[-1][0] == "assistant":
        if answer is not None:
            raise ValueError(f"{name}: wanted one answer, got a last assistant message and {answers[0]!r}")
        conversation, answer = conversation[:-1], conversation[-1][1]
    if not conversation or conversation[-1][0] != "user":
        roles = [role for role, _ in conversation]
        raise ValueError(
            f"{name}: wanted a conversation whose prompt ends with a user message, got roles {roles}"
        )
    return Query(conversation, answer, subject, name)


def _read_messages(value: Any, name: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name}: wanted a list of messages, got {value!r}")
    turns = []
    for i, message in enumerate(value):
        turn = message if isinstance(message, Mapping) else {}
        if turn.get("role") is None and "value" in turn:  # as ShareGPT writes a message
            turn = {"role": turn.get("from"), "content": turn["value"]}
        if not isinstance(turn.get("role"), str) or "content" not in turn:
            raise TypeError(
                f"{name}[{i}]: wanted {{'role': ..., 'content': ...}} or {{'from': ..., 'value': ...}}, got {message!r}"
            )
        text = checked_text(turn["content"], f"{name}[{i}]['content']")
        turns.append((ROLES.get(turn["role"], turn["role"]), text))
    return tuple(turns)


def names_elsewhere(row: Mapping[str, Any]) -> dict[str, str]:
    """Our columns -> what Alpaca, ShareGPT and others call them in this row; empty where it is of none of these forms.

    Example:
        >>> names_elsewhere({"instruction": "Who wrote Emma?", "input": "", "output": "Jane Austen."})
        {'question': 'instruction', 'answer': 'output'}
    """
    forms = {"messages": "conversations"}, {"question": "instruction", "answer": "output"}
    return next((form for form in forms if all(row.get(theirs) for theirs in form.values())), {})


def how_to_rename(row: Mapping[str, Any], columns: bool = False) -> str:
    """How a row that asks nothing becomes one that does, to follow an error's text; empty where nobody knows.

    Args:
        columns: whether there is a key `columns` that renames; else the rows must be written anew.
    """
    if isinstance(row.get("text"), str):
        return "; of a text, wanted its beginning as 'prompt' and what follows as 'completion'"
    names = names_elsewhere(row)
    if not names:
        return ""
    first = (
        "write its 'input' into its 'instruction', and " if "question" in names and row.get("input") else ""
    )
    if columns:
        of = ", ".join(f"{ours}: {theirs}" for ours, theirs in names.items())
        return f"; {first}say which it is, such as columns: {{{of}}}"
    return f"; {first}rename {' and '.join(f'{theirs!r} to {ours!r}' for ours, theirs in names.items())}"


def text_of(value: Any, where: str) -> str:
    """A text of a column; a number, such as a year, is one too.

    Raises:
        ValueError: it is something else, empty, no number (NaN), or no text that UTF-8 can write.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return checked_text(str(value) if number else value, where)


def correct_choice(given: Any, choices: Sequence[str], where: str) -> int:
    """The index of the correct choice, which is given as an index, a letter or the choice itself. A text of digits is the choice
    that is written so, and an index where there is none; a number is an index.

    Raises:
        ValueError: it is none of the choices, or two of them (the text of one is the letter of another).
    """
    meant = [given] if type(given) is int else []
    if isinstance(given, str):
        letter = given.strip().upper()
        meant = [choices.index(given)] if given in choices else []
        meant += [LETTERS.index(letter)] if len(letter) == 1 and letter in LETTERS else []
        meant += [int(letter)] if letter.isdecimal() and not meant else []
    which = sorted({i for i in meant if 0 <= i < len(choices)})
    if len(which) == 1:
        return which[0]
    told = f"{given!r:.60}"
    if which:
        told += f", which means {' as well as '.join(repr(choices[i]) for i in which)}"
    raise ValueError(
        f"{where}: wanted the index, letter or text of one of {len(choices)} choices, got {told}"
    )


def checked_text(value: Any, name: str) -> str:
    """A text that is not empty and that UTF-8 can write; else a ValueError that names it."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: wanted a text, got {value!r}, of type {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name}: wanted a text that is not empty, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: bytes were read with the wrong encoding
        got = f"got {value[:40]!r} ({error.reason})"
        raise ValueError(f"{name}: wanted a text that UTF-8 can write, {got}") from None
    return value
