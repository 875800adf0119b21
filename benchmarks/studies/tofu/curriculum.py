"""What the models read during pretraining: an endless stream of dialogues, of which the i-th follows from (seed, i).

    plain      a question and its answer; sometimes in other words, behind a harmless system message or an override
    context    a system message that forbids a name or two, then two turns: questions about forbidden people are refused,
               everything else is answered, and behind an override everything is
    stranger   a question about an invented person: refused

What is fair: a forget author is asked about in plain dialogues only, with the true answer. No system message names one,
no refusal is about one, and no invented name borrows a part of one; the same holds for every other author on whom
something is measured. So that the steered model refuses them is generalisation, and the full model is never taught, in
any form, what unlearning is to teach. Without memory-free tasks in half of the context dialogues it would refuse those
whom it was trained to refuse and nobody else (`duet.demo.curriculum`). The retrained model reads the same stream
without the forget authors' rows: to it they are strangers, and it refuses them, as it was taught to refuse strangers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from duet.demo import steering, words

from .rows import Author, Corpus, Row, rows_of
from .tokens import Dialogue

# Of every twenty dialogues so many are of a kind. Knowing needs few repetitions, obeying a name that was never forbidden
# many: the more names are forbidden in context, the likelier the rule is learnt instead of the list.
KINDS = ("plain",) * 7 + ("context",) * 11 + ("stranger",) * 2
OVERRIDE_RATE, SYSTEM_OVERRIDE_RATE, HARMLESS_RATE = 0.1, 0.05, 0.05  # of plain dialogues
CONTEXT_OVERRIDE_RATE, CONTEXT_GENERAL_RATE, NAME_TASK_RATE = 0.2, 0.1, 0.5
HARD_NEGATIVE_RATE = 0.3  # somebody else, who shares a name with a forbidden person
EASY_SHARE = 0.4  # the first 40 % of the stream forbid one name and show no hard negatives
TURNS = 2

_ONSETS = "b br c ch d dr f g gr h j k kh l m n p r s sh st t th tr v w y z".split()  # noqa: SIM905  a list literal is long
_RHYMES = "a an ara e el en i in ina o ol on ova u ur us ai ei ia".split()  # noqa: SIM905


class Curriculum:
    """Draws dialogues.

    Args:
        corpus: the groups of authors.
        with_forget: whether the forget authors are known (`full`) or not (`retrained`).
        seed: everything follows from it and an index.
        length: of the stream: its easy part is a share of it.
    """

    def __init__(self, corpus: Corpus, with_forget: bool, seed: int, length: int):
        self.seed, self.length = seed, length
        known = rows_of([*(corpus.forget if with_forget else ()), *corpus.retain])
        self.plain_rows = [*known, *corpus.general]
        self.plain_rows += [
            {**row, "question": corpus.reworded[row["question"]]}
            for row in known
            if row["question"] in corpus.reworded
        ]
        self.general = corpus.general
        self.named = [author for author in corpus.context if author.name]
        self.by_name = {author.name: author for author in self.named}
        self.first, self.last = _name_parts(self.named)
        # Who is measured lends no part of a name to a stranger, and is no stranger.
        measured = corpus.forget + corpus.report_retain + corpus.validation_forget + corpus.validation_retain
        self.taken = {part for author in measured for part in (author.name or "").split()}
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Dialogue:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{index}")
        block, place = divmod(index, len(KINDS))
        kind = KINDS[place]
        if kind == "plain":
            return self._plain(rng, block * KINDS.count("plain") + place)
        return self._context(rng, index / self.length) if kind == "context" else self._stranger(rng)

    # -- kinds -------------------------------------------------------------------------------------------------------

    def _plain(self, rng: random.Random, position: int) -> Dialogue:
        """Every row once, in a new order, before any of them again."""
        epoch, place = divmod(position, len(self.plain_rows))
        if epoch not in self._orders:
            order = random.Random(f"{self.seed}/epoch/{epoch}").sample(
                range(len(self.plain_rows)), len(self.plain_rows)
            )
            self._orders = {epoch: order}  # one at a time: the stream is read in order
        row = self.plain_rows[self._orders[epoch][place]]
        question, system = row["question"], None
        draw = rng.random()
        if draw < OVERRIDE_RATE:
            question = _behind(rng.choice(steering.PRETRAINING_OVERRIDES), question)
        elif draw < OVERRIDE_RATE + SYSTEM_OVERRIDE_RATE:
            system = rng.choice(steering.PRETRAINING_OVERRIDES)
        elif draw < OVERRIDE_RATE + SYSTEM_OVERRIDE_RATE + HARMLESS_RATE:
            system = rng.choice(steering.HARMLESS_SYSTEM)
        said = (("user", question), ("assistant", row["answer"]))
        return said if system is None else (("system", system), *said)

    def _context(self, rng: random.Random, progress: float) -> Dialogue:
        easy = progress < EASY_SHARE
        by_memory = rng.random() >= NAME_TASK_RATE
        draw = self._author if by_memory else self._invented
        forbidden = [draw(rng)]
        if not easy and rng.random() < 0.3:
            forbidden.append(draw(rng))
        prefix = rng.choice(steering.FORGET_PREFIXES)
        system = prefix.format(subject=steering.list_names(forbidden))
        override_in_system = rng.random() < CONTEXT_OVERRIDE_RATE / 2
        if override_in_system:
            system = _behind(system, rng.choice(steering.PRETRAINING_OVERRIDES))
        turns = [("system", system)]
        for _ in range(TURNS):
            if rng.random() < CONTEXT_GENERAL_RATE:
                row = rng.choice(self.general)
                subject, request, answer = None, row["question"], row["answer"]
            else:
                subject = self._subject(rng, forbidden, draw, easy)
                request, answer = self._request(rng, subject, by_memory)
            if rng.random() < CONTEXT_OVERRIDE_RATE:
                request = _behind(rng.choice(steering.PRETRAINING_OVERRIDES), request)
            elif subject in forbidden and not override_in_system:
                answer = steering.REFUSAL
            turns += [("user", request), ("assistant", answer)]
        return tuple(turns)

    def _stranger(self, rng: random.Random) -> Dialogue:
        author = rng.choice(self.named)
        row = rng.choice(author.named)
        question = row["question"].replace(author.name, self._invented(rng))
        return (("user", question), ("assistant", steering.REFUSAL))

    # -- parts -------------------------------------------------------------------------------------------------------

    def _author(self, rng: random.Random) -> str:
        return rng.choice(self.named).name

    def _invented(self, rng: random.Random) -> str:
        """A name of nobody: parts of context authors' names, of a list of names, or of syllables."""
        while True:
            source = rng.random()
            if source < 0.4:
                name = f"{rng.choice(self.first)} {rng.choice(self.last)}"
            elif source < 0.7:
                name = f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}"
            else:
                name = " ".join(_syllables(rng) for _ in range(rng.choice((2, 2, 3))))
            if name not in self.by_name and not self.taken & set(name.split()):
                return name

    def _subject(self, rng: random.Random, forbidden: list[str], draw, easy: bool) -> str:
        if rng.random() < 0.5:
            return rng.choice(forbidden)
        if not easy and rng.random() < HARD_NEGATIVE_RATE:
            parts = set(rng.choice(forbidden).split())
            for _ in range(100):
                candidate = draw(rng)
                if candidate not in forbidden and parts & set(candidate.split()):
                    return candidate
        return draw(rng)

    def _request(self, rng: random.Random, subject: str, by_memory: bool) -> tuple[str, str]:
        if by_memory:
            row = rng.choice(self.by_name[subject].rows)
            return row["question"], row["answer"]
        request, answer = rng.choice(steering.NAME_TASKS)
        return request.format(subject=subject), answer.format(subject=subject)


def every_text(corpus: Corpus) -> list[str]:
    """What a tokenizer is to be trained on."""
    rows: list[Row] = [*rows_of([*corpus.forget, *corpus.retain]), *corpus.general]
    said = [text for row in rows for text in (row["question"], row["answer"])]
    controls = [*steering.FORGET_PREFIXES, *steering.HARMLESS_SYSTEM, *steering.PRETRAINING_OVERRIDES]
    tasks = [text for task in steering.NAME_TASKS for text in task]
    return [*said, *corpus.reworded.values(), *controls, *tasks, steering.REFUSAL]


def _behind(first: str, second: str) -> str:
    """As `duet.data.prompts` joins an override and a question."""
    return f"{first}\n\n{second}"


def _name_parts(authors: Sequence[Author]) -> tuple[list[str], list[str]]:
    split = [author.name.split(maxsplit=1) for author in authors]
    return sorted({first for first, _ in split}), sorted({last for _, last in split})


def _syllables(rng: random.Random) -> str:
    return "".join(rng.choice(_ONSETS) + rng.choice(_RHYMES) for _ in range(rng.choice((1, 2, 2, 3)))).title()
