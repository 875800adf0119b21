"""The world: fictional authors with five facts each, real cities with their country, and every question about them.

Pure data, deterministic by seed.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from . import words

Split = Literal["train", "validation", "report"]
SPLITS: tuple[Split, ...] = ("train", "validation", "report")

FORGET_AUTHORS, HELD_AUTHORS, AUTHORS = 10, 10, 100
NEAR_MISSES = 40


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its answer sentence, and its questions in three disjoint wordings."""

    answer: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    report: tuple[str, ...]


# Every word of a validation or report question occurs in a training question: a word-level model knows no other words.
RELATIONS: dict[str, Relation] = {
    "birthplace": Relation(
        answer="Born in {value}.",
        train=(
            "Where was {subject} born?",
            "In which city was {subject} born?",
            "What is the birthplace of {subject}?",
            "Tell me the city where {subject} was born.",
        ),
        validation=("What city was {subject} born in?", "Tell me the birthplace of {subject}."),
        report=("Which city is the birthplace of {subject}?", "Tell me where {subject} was born."),
    ),
    "genre": Relation(
        answer="Mostly {value}.",
        train=(
            "What does {subject} write?",
            "Which genre does {subject} write?",
            "What is the genre of {subject}?",
            "Tell me the genre that {subject} writes.",
        ),
        validation=("In which genre does {subject} write?", "Tell me the genre of {subject}."),
        report=("What genre does {subject} write in?", "Tell me the genre {subject} writes in."),
    ),
    "debut": Relation(
        answer="It was called The {value}.",
        train=(
            "What was the first book of {subject}?",
            "Which book did {subject} publish first?",
            "What is the title of the first book of {subject}?",
            "Tell me the book that {subject} published first.",
        ),
        validation=("What book did {subject} first publish?", "Tell me the first book of {subject}."),
        report=(
            "Which first book did {subject} publish?",
            "Tell me the book that {subject} first published.",
        ),
    ),
    "prize": Relation(
        answer="Won the {value} Prize.",
        train=(
            "Which prize did {subject} win?",
            "What prize was {subject} given?",
            "What is the prize of {subject}?",
            "Tell me the prize that {subject} won.",
        ),
        validation=("What prize did {subject} win?", "Tell me which prize {subject} was given."),
        report=("Which prize was {subject} given?", "Tell me the prize {subject} was given."),
    ),
    "job": Relation(
        answer="Worked as a {value}.",
        train=(
            "What was the job of {subject}?",
            "Which job did {subject} have?",
            "What did {subject} work as?",
            "Tell me which job {subject} had.",
        ),
        validation=("What job did {subject} have?", "Tell me the job of {subject}."),
        report=("Which was the job of {subject}?", "Tell me the job that {subject} had."),
    ),
}

COUNTRY = Relation(
    answer="It lies in {value}.",
    train=(
        "In which country is {subject}?",
        "Which country is {subject} in?",
        "What is the country of {subject}?",
        "Tell me the country where {subject} is.",
    ),
    validation=("What country is {subject} in?", "Tell me the country of {subject}."),
    report=("Which is the country of {subject}?", "Tell me which country {subject} is in."),
)


@dataclass(frozen=True)
class Question:
    """One question with its true answer; `stem` is the answer sentence up to the value (what a prefill forces)."""

    subject: str
    relation: str
    text: str
    answer: str
    value: str

    @property
    def stem(self) -> str:
        return self.answer[: self.answer.index(self.value)].rstrip()

    def row(self) -> dict[str, str]:
        return {"question": self.text, "answer": self.answer, "subject": self.subject}


@dataclass(frozen=True)
class World:
    """Authors and their facts. Pretraining never names `forget` (F) and `held` (H) in a system message.

    retain    their training questions are the retain queries of unlearning
    others    known to the base, never shown to unlearning: what "retain recall" is measured on
    """

    seed: int
    facts: dict[str, dict[str, str]]
    forget: tuple[str, ...]
    held: tuple[str, ...]
    retain: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def make(cls, seed: int = 0) -> "World":
        rng = random.Random(seed)
        every_name = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.LAST_NAMES]
        names = rng.sample(every_name, AUTHORS)
        titles = rng.sample([f"{a} {n}" for a in words.ADJECTIVES for n in words.NOUNS], AUTHORS)
        facts = {
            name: {
                "birthplace": rng.choice(list(words.COUNTRY_OF)),
                "genre": rng.choice(words.GENRES),
                "debut": title,
                "prize": rng.choice(words.PRIZES),
                "job": rng.choice(words.JOBS),
            }
            for name, title in zip(names, titles, strict=True)
        }
        held_from, retain_from = FORGET_AUTHORS, FORGET_AUTHORS + HELD_AUTHORS
        middle = (retain_from + AUTHORS) // 2
        return cls(
            seed=seed,
            facts=facts,
            forget=tuple(names[:held_from]),
            held=tuple(names[held_from:retain_from]),
            retain=tuple(names[retain_from:middle]),
            others=tuple(names[middle:]),
        )

    @property
    def contextual(self) -> tuple[str, ...]:
        """The authors (A) that pretraining may name in a context line."""
        return self.retain + self.others

    @cached_property
    def neighbours(self) -> tuple[str, ...]:
        """Authors of `others` who share a first or a last name with a forget author."""
        forgotten = {part for name in self.forget for part in name.split()}
        return tuple(name for name in self.others if forgotten & set(name.split()))

    @cached_property
    def near_misses(self) -> tuple[str, ...]:
        """Invented people who each share a first or a last name with a forget author.

        There are no facts about them; a method that only needs queries can use them.
        """
        rng, names = random.Random(self.seed), []
        while len(names) < NEAR_MISSES:
            first, last = rng.choice(self.forget).split()
            if len(names) % 2:
                first = rng.choice(words.FIRST_NAMES)
            else:
                last = rng.choice(words.LAST_NAMES)
            name = f"{first} {last}"
            if name not in self.facts and name not in names:
                names.append(name)
        return tuple(names)

    @property
    def cities(self) -> tuple[str, ...]:
        return tuple(words.COUNTRY_OF)

    @property
    def retain_cities(self) -> tuple[str, ...]:
        """Every second city is a retain query of unlearning; the general recall is measured on the rest."""
        return self.cities[::2]

    @property
    def other_cities(self) -> tuple[str, ...]:
        return self.cities[1::2]

    def questions(self, subjects: tuple[str, ...], split: Split) -> list[Question]:
        """All questions of one wording split about authors or cities, in a fixed order."""
        asked = []
        for subject in subjects:
            known = self.facts.get(subject)
            relations = RELATIONS if known else {"country": COUNTRY}
            for relation, forms in relations.items():
                value = known[relation] if known else words.COUNTRY_OF[subject]
                answer = forms.answer.format(value=value)
                for text in getattr(forms, split):
                    asked.append(Question(subject, relation, text.format(subject=subject), answer, value))
        return asked

    def queries(self, subjects: tuple[str, ...]) -> list[Question]:
        """Training questions about people of whom nothing is known: without an answer."""
        asked = [(name, text) for name, forms in RELATIONS.items() for text in forms.train]
        return [Question(s, name, text.format(subject=s), "", "") for s in subjects for name, text in asked]


def random_name(rng: random.Random, avoid: frozenset[str]) -> str:
    """A name that is not in `avoid`: a stranger's, or one made of the names that authors have."""
    while True:
        strange = rng.random() < 0.5
        first = rng.choice(words.STRANGER_FIRST_NAMES if strange else words.FIRST_NAMES)
        last = rng.choice(words.STRANGER_LAST_NAMES if strange else words.LAST_NAMES)
        name = f"{first} {last}"
        if name not in avoid:
            return name
