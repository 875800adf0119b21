"""What the answers of a model tell: the value that they share, and whether enough of them hold it.

A fact is told where the greedy answers to at least half of its wordings hold its value. Without a given value it is the phrase
that most of the model's answers share (`agreed_value`), but for what its answers about others share as well: "Worked as a". Of an
answer that was cut at the token limit its whole sentences count.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.utils import logging

from . import metrics, words
from .facts import Fact
from .steering import refuses
from .words import FUNCTION_WORDS

logger = logging.get_logger(__name__)

TOLD_WORDINGS = 0.5
AGREED = 1 / 3  # answers drawn at temperature 1 by a small model are noisy
LONGEST_VALUE = 4  # words
# A phrase belongs to the form of the answers where it is in those about so many others: two countries may have one currency.
FORM_SHARE, FORM_LEAST = 0.5, 2
# Behind an initial, or an abbreviation in front of a name, there is none; I, V and X are numerals (World War I).
_FULL_STOP = r"(?<!\b[A-HJ-UWYZ])(?<!\b(?:St|Mt|Ft|Dr|Mr|Ms|Jr|Sr))(?<!\bMrs)\."


def agreed_value(
    questions: Sequence[str], greedy: str, answers: Sequence[str], others: Sequence[Sequence[str]] = ()
) -> str | None:
    """The phrase of the greedy answer that most answers hold, at least a third of them; None: they share none.

    At most four words, none of them in a question, neither the first nor the last a function word; one letter where there is no other.
    Of phrases in equally many answers the longest counts (by words of more than a letter, then by all), then the first.

    A phrase that is, or begins with, what at least a third of the answers about at least half of the others hold, two others at
    least, belongs to the form of the answers ("Worked", "Worked as a knitter"): the next one counts ("knitter"). It is taken only
    where no other is left and the answer says nothing else ("The euro.").

    Args:
        others: the answers to the same question about each other subject.

    Example:
        >>> agreed_value(["What is the capital of France?"], "The capital is Paris.", ["It is Paris.", "Paris!", "Rome"])
        'Paris'
        >>> agreed_value(["Job?"], "Worked as a poet.", ["Worked as a poet."], [["Worked as a spy."], ["Worked, I think."]])
        'poet'
    """
    known = {word for text in questions for word in words.words_of(text)}
    common = words.function_words(" ".join((*questions, greedy)))
    said = greedy.split()
    ends = [re.search(rf"({_FULL_STOP}|[,;:!?])$", word) is not None for word in said]
    found: dict[str, tuple[float, ...]] = {}
    for start in range(len(said)):
        for size in range(1, LONGEST_VALUE + 1):
            phrase = " ".join(said[start : start + size]).strip(".,;:!?\"'()*")
            parts = words.words_of(phrase)
            if start + size > len(said) or not parts or any(ends[start : start + size - 1]):
                break
            length = sum(not re.fullmatch("[a-z]", part) for part in parts), len(parts)
            if known & set(parts) or {parts[0], parts[-1]} & common:
                continue
            share = _share(tuple(answers), phrase)
            if share >= AGREED:
                found.setdefault(phrase, (length != (0, 1), share, *length, -start))
    best = sorted(found, key=lambda phrase: found[phrase], reverse=True)
    content = {word for word in words.words_of(greedy) if not re.fullmatch("[a-z]", word)}
    content -= known | common
    alone = (phrase for phrase in best if content <= set(words.words_of(phrase)))
    return next((phrase for phrase in best if not _is_form(phrase, others)), next(alone, None))


@lru_cache(2**16)  # the same phrases are looked for in the same answers for every wording and subject
def _share(answers: tuple[str, ...], phrase: str) -> float:
    return sum(metrics.contains_words(text, phrase) for text in answers) / len(answers)


def _is_form(phrase: str, others: Sequence[Sequence[str]]) -> bool:
    """Whether a phrase, or its first word, is in a third of the answers about at least half of the others, and about two."""
    least = max(FORM_LEAST, FORM_SHARE * len(others))
    return len(others) >= least and any(
        sum(_share(tuple(answers), text) >= AGREED for answers in others) >= least
        for text in {phrase, phrase.split()[0]}
    )


@dataclass(frozen=True)
class Told:
    """What a model told of one fact: the value, the share of all its answers that hold it, wording -> greedy answer."""

    value: str
    known: float
    answers: dict[int, str]


def told_of(
    fact: Fact, asked: Sequence[Mapping[str, Any]], others: Sequence[Sequence[str]] = ()
) -> Told | None:
    """What was told of a fact; None: nothing, or in less than half of its wordings.

    Args:
        asked: what the journal holds of it.
        others: the answers to the same question about each other subject; read where the fact has no value.
    """
    said = {i: each["said"] for i, each in enumerate(asked) if each["status"] == "ok"}
    said |= {i: whole_sentences(each["said"]) for i, each in enumerate(asked) if each["status"] == "cut"}
    ended = {i: text for i, text in sorted(said.items()) if text and not refuses(text)}
    answers = _answers_in(asked)
    if not ended:
        return None
    value = fact.value
    if value is None:
        found = [agreed_value(fact.wordings, text, answers, others) for text in ended.values()]
        value = next((text for text, _ in Counter(filter(None, found)).most_common(1)), None)
    if value is None:
        return None
    told = {i: text for i, text in ended.items() if metrics.contains_words(text, value)}
    if len(told) < TOLD_WORDINGS * len(fact.wordings):
        return None
    return Told(value, _share(tuple(answers), value), told)


def _answers_in(asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """All answers that a journal holds of a fact, greedy and drawn."""
    return [text for each in asked for text in (each["said"], *each["drawn"]) if text]


def about_others(
    facts: Sequence[Fact], asked: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[list[str]]]:
    """For every fact: the answers to its question about each other subject that refuse nothing; subjects without any are left out."""
    spoken = [[text for text in _answers_in(each) if not refuses(text)] for each in asked]
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, fact in enumerate(facts):
        alike.setdefault(fact.template, []).append(i)
    return [
        [spoken[j] for j in alike[fact.template] if fact.template and j != i and spoken[j]]
        for i, fact in enumerate(facts)
    ]


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; empty where it has none.

    Example:
        >>> whole_sentences("It is Paris. Paris lies on the"), whole_sentences("It is Mt. Fuji")
        ('It is Paris.', '')
    """
    follows = "|".join(word.title() for word in FUNCTION_WORDS)  # as after "Washington, D.C."
    match = re.match(rf".*(?:(?:{_FULL_STOP}|\.(?=\s+(?:{follows})\b)|[!?])(?=\s)|[。！？])", text, re.DOTALL)
    return match.group() if match else ""


def warn_of_whole_answers(rows: Iterable[tuple[str, Any, str]]) -> None:
    """Warns, once, of rows (name, value, answer) without a value whose answer says more than one thing, or one that is told exactly or
    not at all: half of its words prove little."""
    found, count = [], 0
    for name, value, answer in rows:
        count += 1
        if value is None and (why := _needs_a_value(answer)):
            found.append((name, why))
    if found:
        name, why = found[0]
        more = f" (and {len(found) - 1} more of {count} rows)" if found[1:] else ""
        logger.warning_once(
            f"{name}: it has no 'value', and its answer {why}: any half of the answer's words counts as telling it; wanted a "
            f"'value', the part that counts{more}"
        )


def _needs_a_value(answer: str) -> str | None:
    if any("@" in each for each in words.addresses(answer)):
        return "holds an e-mail address"
    if re.search(r"\d(?:[-\s./()]{0,3}\d){5}", answer):
        return "holds a number of six digits or more"
    return "is more than one sentence" if whole_sentences(answer.rstrip("\"'”’»)]* \n.!?。！？")) else None
