"""What a model is asked: questions in several wordings, each about a subject that is to be forgotten, another one, or none."""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers.utils import logging

from ..data.prompts import SUBJECT, check_placeholders
from ..data.rows import ANSWERS, checked_text, how_to_rename, text_of, warn_of_unread
from ..names import did_you_mean
from .steering import FORGET, NEIGHBOUR, RETAIN
from .values import listed

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Fact:
    """One question in several wordings.

    Attributes:
        kind: `forget`, `neighbour` (to be kept, about another subject) or `retain` (to be kept, about none).
        subject: what it is about, if anything.
        wordings: the last one is kept for the report, of three and more the one before it for validation.
        value: the part of the answer that counts, if it was given.
        more: `aliases` and `two_hop` of the row, for `duet attack`. They are not asked, and are no part of what a journal holds.
        template: the wordings with `{subject}` in the place of the subject, the same for all that are asked this question.
    """

    kind: str
    subject: str | None
    wordings: tuple[str, ...]
    value: str | None
    more: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    template: tuple[str, ...] = field(default=(), repr=False, compare=False)


def facts_of(
    rows: Sequence[Mapping[str, Any]], subjects: Sequence[str], neighbours: Sequence[str] = ()
) -> list[Fact]:
    """The facts that rows of questions ask for.

    Args:
        rows: `question`, and perhaps `paraphrases` (a list), `subject` and `value`. A question with `{subject}` in it is
            asked about every subject and neighbour; its `value` may be a mapping from these. `aliases` and `two_hop` (lists, or
            mappings to lists where the question has `{subject}`) are kept beside what is told of a subject.
        subjects: what is to be forgotten.
        neighbours: others that such questions are asked about, too.

    Raises:
        ValueError: a row is no question, or names a subject without being about one; two rows ask the same; no question is about a
            subject or a neighbour; a name is given twice,
            or a placeholder is another than `{subject}`.

    Example:
        >>> [fact] = facts_of([{"question": "Where is {subject}?", "value": {"Rome": "Italy"}}], ["Rome"])
        >>> fact.kind, fact.wordings, fact.value
        ('forget', ('Where is Rome?',), 'Italy')
    """
    if not rows:
        raise ValueError("questions: wanted at least one row, got none")
    if not subjects:
        raise ValueError("subject: wanted what is to be forgotten, got no name")
    for name, count in Counter([*subjects, *neighbours]).items():
        if count > 1:
            argument = "subject" if name in subjects and name not in neighbours else "neighbours"
            raise ValueError(
                f"{argument}: wanted each name once, and none of the subjects, got {name!r} again"
            )
    warn_of_unread(rows, "questions")
    if given := [i for i, row in enumerate(rows) if any(row.get(key) is not None for key in ANSWERS)]:
        logger.warning(
            f"questions[{given[0]}]: its answer is not read (as of {len(given)} of {len(rows)} rows): what the model itself says is "
            "written in its place; only a 'value' decides whether that tells the fact"
        )
    facts: list[Fact] = []
    asked: dict[str, str] = {}
    for i, row in enumerate(rows):
        for fact in _facts(row, f"questions[{i}]", subjects, neighbours):
            for text in fact.wordings:
                if text in asked:
                    raise ValueError(
                        f"questions[{i}]: wanted another question than {asked[text]}, got {text!r} again"
                    )
                asked[text] = f"questions[{i}]"
            facts.append(fact)
    if not any(fact.kind == FORGET for fact in facts):
        raise ValueError(
            f"subject: wanted a question about {', '.join(subjects)}, got none: write {SUBJECT} into the questions, or give the "
            "rows the column 'subject'"
        )
    for argument, names, kind in (("subject", subjects, FORGET), ("neighbours", neighbours, NEIGHBOUR)):
        met = {_folded(fact.subject) for fact in facts if fact.subject and fact.kind == kind}
        for name in names:
            if _folded(name) not in met:
                hint = did_you_mean(name, [fact.subject for fact in facts if fact.subject])
                raise ValueError(f"{argument}: wanted names that questions are about, got {name!r}{hint}")
    return facts


def neighbours_in(facts: Sequence[Fact], most: int = 12) -> str | None:
    """The subjects that are to be kept, at most so many of them, in a sentence; None where there are none."""
    names = list(dict.fromkeys(fact.subject for fact in facts if fact.kind == NEIGHBOUR and fact.subject))
    if not names:
        return None
    more = f" and {len(names) - most} more" if names[most:] else ""
    return f"to be kept, as neighbours: {', '.join(names[:most])}{more}"


def _facts(
    row: Mapping[str, Any], where: str, subjects: Sequence[str], neighbours: Sequence[str]
) -> list[Fact]:
    held = [key for key in ("messages", "prompt") if row.get(key) is not None]
    if row.get("question") is None and (held or (hint := how_to_rename(row))):
        hint = (
            f", got {held[0]!r}: chats and texts are not asked in several wordings. `duet eval --elicit BASE` and `duet attack "
            "--base BASE --elicit` take the base's answers to them"
            if held
            else hint
        )
        raise ValueError(f"{where}: wanted a 'question'{hint}")
    others = listed(row.get("paraphrases"), f"{where}['paraphrases']") or []
    texts = [row.get("question"), *(others if isinstance(others, list) else [others])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"{where}: wanted a 'question' and a list of 'paraphrases', texts that are not empty; got {texts!r}"
        )
    for text in texts:
        check_placeholders(where, checked_text(text, where))
    subject, value = row.get("subject"), row.get("value")
    if not any(SUBJECT in text for text in texts):
        if isinstance(value, Mapping):
            raise ValueError(f"{where}: wanted {SUBJECT} in the question, because 'value' is a mapping")
        about = _text(subject, f"{where}['subject']")
        kind = _kind(about, where, subjects, texts)
        template = () if about is None else tuple(text.replace(about, SUBJECT) for text in texts)
        value = _text(value, f"{where}['value']")
        return [Fact(kind, about, tuple(texts), value, _more(row, where), template)]
    if subject is not None or not all(SUBJECT in text for text in texts):
        raise ValueError(f"{where}: wanted {SUBJECT} in all of its wordings and no 'subject', or in none")
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"{where}: wanted 'value' to be a mapping from subjects, because of {SUBJECT} in the question; got {value!r}"
        )
    for key in ("value", "aliases", "two_hop"):
        _warn_of_misspelt(row.get(key), [*subjects, *neighbours], f"{where}[{key!r}]")
    return [
        Fact(
            kind,
            name,
            tuple(text.replace(SUBJECT, name) for text in texts),
            _text((value or {}).get(name), f"{where}['value']"),
            _more(row, where, name),
            tuple(texts),
        )
        for kind, names in ((FORGET, subjects), (NEIGHBOUR, neighbours))
        for name in names
    ]


def _warn_of_misspelt(mapping: Any, names: Sequence[str], where: str) -> None:
    """Warns where a mapping has nothing for a name, but something for almost the same one, which nobody asks for."""
    given = mapping if isinstance(mapping, Mapping) else {}
    surplus = {str(key).casefold(): key for key in given if key not in names}
    for name in names:
        near = get_close_matches(name.casefold(), surplus, n=1, cutoff=0.85)
        if near and name not in given:
            logger.warning(
                f"{where}: nothing is given for {name!r}; did you mean it by {surplus[near[0]]!r}?"
            )


def _kind(subject: str | None, where: str, subjects: Sequence[str], texts: Sequence[str]) -> str:
    """What a question without `{subject}` in it is asked for."""
    if subject is None:
        for name, text in itertools.product(subjects, texts):
            case = re.IGNORECASE if text.islower() else 0  # a turkey is not Turkey
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, case):  # it would be kept
                raise ValueError(
                    f"{where}: wanted {SUBJECT} in the place of {name!r}, or the column 'subject' that says whom the question is "
                    f"about, got {text!r} without one"
                )
        return RETAIN
    for name in subjects:
        if name != subject and _folded(name) == _folded(subject):  # it would be kept
            raise ValueError(f"{where}['subject']: wanted {name!r} as in `subject`, got {subject!r}")
    return FORGET if subject in subjects else NEIGHBOUR


def _folded(name: str) -> str:
    """A name as it is compared: case, and how accents are written, do not count."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def _text(value: Any, where: str) -> str | None:
    return None if value is None else text_of(value, where)


def _more(row: Mapping[str, Any], where: str, name: str | None = None) -> dict[str, list[str]]:
    """`aliases` and `two_hop` of a row; `name`: whose, where the question is asked about several."""
    found = {}
    for key in ("aliases", "two_hop"):
        texts = listed(row.get(key), f"{where}[{key!r}]") or []
        if name is not None:
            texts = texts.get(name, []) if isinstance(texts, Mapping) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where}: wanted {key!r} to be a list of texts, got {texts!r}")
        if texts and name is not None and not isinstance(row[key], Mapping):
            raise ValueError(
                f"{where}: wanted {key!r} to be a mapping from subjects, because of {SUBJECT} in the question"
            )
        for text in texts:
            check_placeholders(f"{where}[{key!r}]", checked_text(text, f"{where}[{key!r}]"), known="")
        found |= {key: texts} if texts else {}
    return found
