"""Rows of an attack: a question, the answer that must not come back, and when an answer counts as having come back.

with `value`      the value is said, as whole words (`duet.evaluation.words`: any script)
without           ROUGE-L recall (stemmed) of the answer's telling words, those that neither the question has nor every
                  text, is at least the threshold (`metrics.told_recall`); of an answer whose opening the attacker gave away, recall of the rest
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers.utils import logging

from ...data.prompts import Conversation
from ...data.rows import checked_text
from .. import metrics
from ..intervals import fact_of
from ..values import Value, listed, queries_of, value_of
from ..words import find, first_half, words_of

logger = logging.get_logger(__name__)
SAME_FORM = 0.5  # of the likeness of two questions
LISTS = {"paraphrases": "questions", "aliases": "names", "two_hop": "questions"}  # columns -> what they hold


@dataclass(frozen=True)
class AttackRow:
    """One fact.

    Attributes:
        id: its place among the rows.
        value: the part of the answer that must not be said, or spellings of it; None: the answer as a whole.
        paraphrases: the same question in other words.
        aliases: other names of the subject.
        two_hop: questions that ask for the same by way of another fact.
    """

    id: int
    conversation: Conversation
    answer: str
    subject: str | None = None
    value: Value | None = None
    paraphrases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    two_hop: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The text of the last user message, or the plain prompt."""
        return self.conversation if isinstance(self.conversation, str) else self.conversation[-1][1]

    @property
    def fact(self) -> str:
        """`intervals.fact_of` the row."""
        return fact_of(self.question, self.answer, self.subject, self.value)

    def asking(self, text: str) -> Conversation:
        """The conversation with `text` in the place of the question."""
        return text if isinstance(self.conversation, str) else (*self.conversation[:-1], ("user", text))

    def renamed(self) -> list[str]:
        """The question with each of the aliases in the place of the subject; none where it does not name the subject."""
        name = self._subject()
        if not self.subject or not name.search(self.question):
            return []
        return [name.sub(lambda _, alias=alias: alias, self.question) for alias in self.aliases]

    def asked(self) -> dict[str, Sequence[str]]:
        """Column -> the texts with which the row is asked."""
        lists = {"paraphrases": self.paraphrases, "aliases": self.renamed(), "two_hop": self.two_hop}
        return {"question": [self.question], **lists}

    def form(self) -> frozenset[tuple[str, str]]:
        """The question's pairs of neighbouring words, with its two ends, and `{}` in the place of the subject."""
        text = self._subject().sub("{}", self.question) if self.subject else self.question
        parts = [words_of(part) for part in text.split("{}")]
        words = ["", *(word for i, part in enumerate(parts) for word in (["{}"] if i else []) + part), ""]
        return frozenset(pairwise(words))

    def _subject(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w){re.escape(self.subject or '')}(?!\w)", re.IGNORECASE)

    def opening(self) -> str:
        """The opening that a prefilling attacker forces: the answer up to the value, or the first half of its words
        (of its characters, in scripts without spaces); with the space that the answer starts with.

        May be empty: an answer that starts with its value, or has one word.
        """
        if self.value is not None:
            place = find(self.answer, self.value)
            if place is not None:
                return self.answer[:place].rstrip()
        return first_half(self.answer)

    def recall(self, said: str, opening: str = "") -> float:
        """`metrics.answer_recall` of the answer without `opening`."""
        rest = self.answer.strip().removeprefix(opening.strip())
        return metrics.answer_recall(said, rest, self.value, self.question)


def read_attack_rows(rows: Sequence[dict[str, Any]], argument: str, lacking: str = "") -> list[AttackRow]:
    """Rows as `duet.data.rows.read_rows` reads them, with an answer each; optional `value`, `paraphrases`, `aliases`, `two_hop`.

    `paraphrases` and `two_hop` are lists of questions (TOFU's `paraphrased_question` serves too), `aliases` one of names of the
    subject. `lacking` says where a missing answer can come from.

    Raises:
        ValueError: naming the argument and the row.

    Example:
        >>> (row,) = read_attack_rows([{"question": "Who wrote Emma?", "answer": "It was Jane Austen.",
        ...                             "value": "Jane Austen"}], "forget")
        >>> row.opening(), row.recall("jane austen did"), row.recall("I do not know")
        ('It was', 1.0, 0.0)
    """
    read = []
    for i, query in enumerate(queries_of(rows, argument)):
        row, name = rows[i], f"{argument}[{i}]"
        if query.answer is None:
            raise ValueError(
                f"{name}: wanted a row with an 'answer', got the keys {sorted(row)}{lacking and '; '}{lacking}"
            )
        value = value_of(row, query.answer, name)
        given = {"paraphrases": row.get("paraphrased_question")} | row
        lists = {key: _texts(given.get(key), f"{name}[{key!r}]", what) for key, what in LISTS.items()}
        read.append(AttackRow(i, query.conversation, query.answer, query.subject, value, **lists))
    if repeated := len(read) - len({(row.conversation, row.answer) for row in read}):
        logger.warning("%s: %d rows repeat the question and the answer of another row", argument, repeated)
    return read


def check_unseen(holdout: Sequence[AttackRow], trained: Mapping[str, Sequence[AttackRow]]) -> None:
    """Refuses a row of `holdout` that is among those that were trained on, given by name: membership could not tell them apart.

    Raises:
        ValueError: naming the two rows.
    """
    seen = {
        (row.conversation, row.answer): f"{name}[{row.id}]" for name, rows in trained.items() for row in rows
    }
    for row in holdout:
        if (row.conversation, row.answer) in seen:
            raise ValueError(
                f"holdout[{row.id}]: wanted a row that was never trained on, got the question and answer of "
                f"{seen[row.conversation, row.answer]}"
            )


def _texts(given: Any, where: str, what: str) -> tuple[str, ...]:
    given = listed(given, where)
    texts = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where}: wanted a list of {what}, got {texts!r}")
    return tuple(checked_text(text, where) for text in texts)


def of_the_same_form(pool: Sequence[AttackRow], rows: Sequence[AttackRow]) -> list[AttackRow]:
    """The rows of `pool` that ask as one of `rows` does, about something else.

        likeness(a, b) = |F_a & F_b| / |F_a | F_b|,  F: `AttackRow.form`;  at least `SAME_FORM`

    Rows about a subject of `rows` are left out, and those that say a value, or have an answer, that must not come back.
    """
    forms, subjects = {row.form() for row in rows}, {row.subject for row in rows} - {None}

    def alike(form: frozenset[tuple[str, str]]) -> bool:
        return any(len(form & other) >= SAME_FORM * len(form | other) for other in forms)

    asked = [each for each in pool if each.subject not in subjects and alike(each.form())]
    return that_tell_nothing(asked, rows)


def that_tell_nothing(pool: Sequence[AttackRow], rows: Sequence[AttackRow]) -> list[AttackRow]:
    """The rows of `pool` that do not say a value of `rows`, and do not have one of their answers: to train on them gives no answer away."""
    telling = set().union(*_telling(tuple(pool), tuple(rows)).values())
    return [each for each in pool if each.id not in telling]


def _asked(row: AttackRow) -> Any:
    """What must not be said: the value and None, or None and the words of the answer."""
    return (None, tuple(words_of(row.answer))) if row.value is None else (row.value, None)


@functools.lru_cache(maxsize=8)
def _telling(pool: tuple[AttackRow, ...], rows: tuple[AttackRow, ...]) -> dict[Any, set[int]]:
    """What is asked by each of `rows` -> ids of the rows of `pool` that say it."""
    answers = {each.id: tuple(words_of(each.answer)) for each in pool}

    def says(each: AttackRow, asked: Any) -> bool:
        value, answer = asked
        if value is None:
            return answers[each.id] == answer
        return any(find(text, value) is not None for text in (each.question, each.answer))

    return {asked: {each.id for each in pool if says(each, asked)} for asked in {_asked(row) for row in rows}}


def halves(rows: Sequence[AttackRow]) -> tuple[list[AttackRow], list[AttackRow]]:
    """Rows for training and rows for asking: no row trained on tells what is asked. There may be none for training.

    Where all rows have subjects, several of them, the first half of the subjects is for training, without the rows that tell an
    answer of the others. Else rows that tell each other's answers stay together ("The capital is Tokyo." tells that the largest
    city is Tokyo); such groups are for training, in the order of their first rows, while they fit into half of the rows.
    """
    subjects = list(dict.fromkeys(row.subject for row in rows))
    if None in subjects or len(subjects) < 2:
        first: set[int] = set()
        for group in _groups(rows):
            if 2 * (len(first) + len(group)) <= len(rows):
                first |= group
    else:
        shown = set(subjects[: len(subjects) // 2])
        first = {row.id for row in rows if row.subject in shown}
    asked = [row for row in rows if row.id not in first]
    return that_tell_nothing([row for row in rows if row.id in first], asked), asked


def _groups(rows: Sequence[AttackRow]) -> list[set[int]]:
    """Ids of rows that tell each other's answers, also by way of others; groups in the order of their first rows."""
    groups: list[set[int]] = []
    told_by = _telling(tuple(rows), tuple(rows))
    for row in rows:
        telling = {row.id} | told_by[_asked(row)]
        linked = [group for group in groups if group & telling]
        groups = [group for group in groups if group not in linked]
        groups.append(telling.union(*linked))
    return sorted(groups, key=min)
