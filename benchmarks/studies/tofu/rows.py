"""TOFU's files -> authors with their names, and five disjoint groups of them.

    forget             forget10 (or forget05): what the methods are to remove
    report_retain      the retain authors of retain_perturbed: damage is measured on them, no method is shown them
    validation_forget  retain authors who are "forgotten" where a learning rate is chosen
    validation_retain  retain authors on whom the damage of such a trial is measured
    context            everybody else: only they are named in a system message during pretraining

So refusing anyone of the other four groups in context is generalisation, and no learning rate is chosen on a row that
the report reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.evaluation.suites.suite import load_table

Row = dict[str, Any]

ROWS_PER_AUTHOR = 20  # consecutive ones
SPLITS = {"forget10": "retain90", "forget05": "retain95"}  # who is forgotten, who is kept
MEASURED = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
# A capitalised word, and runs of them ("Fatima Zahra Bouteflika", "Sara van Dyke"); a possessive ends a name.
_WORD = r"[^\W\d_a-z][\w'’.-]*"
_PARTICLE = r"(?:al|ben|bin|da|de|del|den|der|di|do|dos|du|el|ibn|la|le|ter|van|von)"
_NAMES = re.compile(rf"{_WORD}(?: (?:{_PARTICLE} )*{_WORD})+")
_POSSESSIVE = re.compile(r"['’]s\b|['’](?=\s)")
_LONGEST_NAME = 5  # words


@dataclass(frozen=True)
class Author:
    """The rows about one author, each with `question`, `answer` and, where the author has a name, `subject`."""

    name: str | None
    rows: tuple[Row, ...]

    @property
    def named(self) -> tuple[Row, ...]:
        """The rows whose question says the name."""
        return tuple(row for row in self.rows if says_name(row))


@dataclass(frozen=True)
class Corpus:
    """Who is in which group; `general`: questions about real authors and the world; `reworded`: question -> the same in
    other words, where the files have it; `digest`: of everything; `split`: one of `SPLITS`."""

    forget: tuple[Author, ...]
    report_retain: tuple[Author, ...]
    validation_forget: tuple[Author, ...]
    validation_retain: tuple[Author, ...]
    context: tuple[Author, ...]
    general: tuple[Row, ...]
    reworded: dict[str, str]
    digest: str
    split: str = "forget10"

    @property
    def retain(self) -> tuple[Author, ...]:
        return self.report_retain + self.validation_forget + self.validation_retain + self.context


def read_corpus(folder: str | Path, split: str = "forget10") -> Corpus:
    """The corpus in a folder with TOFU's files; `split`: one of `SPLITS`.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    kept, asked = SPLITS[split], f"{split}_perturbed"
    tables = {
        name: load_table(folder, name, None, f"data: {name}") for name in (split, kept, asked, *MEASURED)
    }
    for name, rows in tables.items():
        for i, row in enumerate(rows):
            if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("question", "answer")):
                raise ValueError(f"data: {name}, row {i}: wanted a question and an answer, got {row!r:.80}")
    forget, retain = (_authors(tables[name], name) for name in (split, kept))
    reported = {(row["question"], row["answer"]) for row in tables["retain_perturbed"]}
    report = tuple(a for a in retain if any((row["question"], row["answer"]) in reported for row in a.rows))
    rest = [a for a in retain if a not in report]
    chosen = min(len(forget), len(rest) // 4)
    if not report or chosen < 1:
        raise ValueError(
            f"data: {kept} has {len(rest)} authors beside the {len(report)} of retain_perturbed; wanted at least 4 and 1"
        )
    damage = max(1, chosen // 2)
    perturbed = (*tables[asked], *tables["retain_perturbed"])
    return Corpus(
        forget=tuple(forget),
        report_retain=report,
        validation_forget=tuple(rest[-chosen:]),
        validation_retain=tuple(rest[-chosen - damage : -chosen]),
        context=tuple(rest[: -chosen - damage]),
        general=tuple(
            {"question": row["question"], "answer": row["answer"]}
            for name in ("real_authors_perturbed", "world_facts_perturbed")
            for row in tables[name]
        ),
        reworded={
            row["question"]: row["paraphrased_question"]
            for row in perturbed
            if row.get("paraphrased_question")
        },
        digest=hashlib.blake2b(json.dumps(tables, sort_keys=True).encode(), digest_size=8).hexdigest(),
        split=split,
    )


def rows_of(authors: Sequence[Author]) -> list[Row]:
    return [row for author in authors for row in author.rows]


def spread(authors: Sequence[Author], most: int | None) -> list[Row]:
    """At most `most` rows, as many of each author as of the next, and of all kinds: an author's first row asks who it
    is, the second for the gender, ..., so each author begins at another one."""
    turns = range(ROWS_PER_AUTHOR)
    rows = [author.rows[(i + a) % ROWS_PER_AUTHOR] for i in turns for a, author in enumerate(authors)]
    return rows[:most]


def says_name(row: Row) -> bool:
    return bool(row.get("subject")) and row["subject"] in row["question"]


def _authors(rows: Sequence[Row], name: str) -> list[Author]:
    if len(rows) % ROWS_PER_AUTHOR:
        raise ValueError(
            f"data: {name} has {len(rows)} rows; wanted a multiple of {ROWS_PER_AUTHOR}, the rows of one author"
        )
    found = []
    for start in range(0, len(rows), ROWS_PER_AUTHOR):
        of = rows[start : start + ROWS_PER_AUTHOR]
        subject = full_name(of)
        about = {"subject": subject} if subject else {}
        plain = ({"question": row["question"], "answer": row["answer"]} for row in of)
        found.append(Author(subject, tuple(row | about for row in plain)))
    return found


def full_name(rows: Sequence[Row]) -> str | None:
    """Whom these rows are about: the longest run of capitalised words that (almost) as many rows say as say any.

    None where no run is said in half of the rows.

    Example:
        >>> full_name([
        ...     {"question": "Where was Ana de la Vega born?", "answer": "Ana de la Vega was born in Lima."},
        ...     {"question": "What did Ana de la Vega's mother do?", "answer": "She was a baker."},
        ... ])
        'Ana de la Vega'
    """
    counts: Counter[str] = Counter()
    for row in rows:
        text = _POSSESSIVE.sub("", f"{row['question']}\n{row['answer']}")
        said = set()
        for run in _NAMES.findall(text):
            words = run.rstrip(".").split()
            for start in range(len(words)):
                for stop in range(start + 2, min(len(words), start + _LONGEST_NAME) + 1):
                    if words[start][0].isupper() and words[stop - 1][0].isupper():
                        said.add(" ".join(words[start:stop]))
        counts.update(said)
    most = max(counts.values(), default=0)
    if most < len(rows) / 2:
        return None
    # "Manuel Silva De" is said a little more often than "Manuel Silva De Souza".
    return max((name for name, count in counts.items() if count >= 0.9 * most), key=len)
