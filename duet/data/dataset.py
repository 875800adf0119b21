"""Forget and retain queries -> student and teacher token sequences whose positions are aligned by the answer.

    Query -> (student's prompt | teacher's steered prompt) + the same answer ids -> padded batch

Positions are counted from where the answer starts, not from the start of the sequence: the teacher's prompt is longer
by the steering prefix.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from .prompts import CannotRender, PromptRenderer, fill_prefix
from .rows import Query

IGNORED = -100


class Draw(NamedTuple):
    """One use of a row: its index, and the seed of everything that is drawn for it (prefix, subject, view)."""

    row: int
    seed: int


class Segment(NamedTuple):
    """A prepared answer of one row, and the targets at each of its tokens.

    `targets`: tensors whose first dimension is the answer's length; `share`: the probability that this one of the row's
    segments is drawn; `opening`: tokens that are forced on the answer and stand before it, none of which is scored.
    """

    answer: list[int]
    targets: dict[str, Tensor]
    share: float = 1.0
    opening: Sequence[int] = ()


class Asked(NamedTuple):
    """The prompts for one row under one prefix, as a frozen teacher needs them; `answer` is the dataset's, or empty."""

    key: tuple[int, int]
    name: str
    instruction: str | None
    plain: list[int]
    steered: list[int]
    answer: list[int]

    @property
    def where(self) -> str:
        """The row and the prefix, for messages."""
        return f"{self.name} under steering_prefixes[{self.key[1]}]"


@dataclass(eq=False, repr=False)
class UnlearnDataset(Dataset):
    """Forget rows followed by retain rows; an item is one query as student and teacher see it.

    An item is `{"student": ids, "teacher": ids | None, "answer": ids, "scored": int, "forget": bool}`: the two prompts,
    the answer's ids, and how many of the answer's positions are scored; and, where the teacher has read what its prompt begins
    with, `"beginning": (number, how many ids)`. Indexed by a `Draw` (training) or by an int
    (evaluation: the first prefix, the plain query).

    Retain queries get a prefix too, about a subject drawn from the **forget** rows: so the student learns where the
    prefix must change nothing. A retain row's own subject is not used: the prefix would forbid the right answer. With
    `plain_retain` they get none: the teacher reads them as the student does.

    Args:
        forget, retain: queries; `retain` may be empty.
        renderer: turns conversations into ids.
        prefixes: steering prefixes, or none: then no teacher sequence is made.
        refusals: answers of forget rows are drawn from these texts, when there are any.
        reverse_prompts, reverse_fraction, reverse_role: the student's adversarial views.
        prefills, prefill_fraction: openings of an answer that end a share of the student's forget prompts.
        answers: `none` (only the first position is scored, no answer needed), `dataset` (every row must have one),
            `teacher` (to be filled in: see `unanswered`) or `prepared` (to be filled in: `keep`).
        max_scored: score at most so many positions of an answer; None: all (not with the teacher's answers).
        whole_text: every token of prompt and answer is scored, from the second on; needs no prefixes.
        max_length: a longer sequence is refused.
        subjects: what prefixes on retain rows are about; none: the subjects of the forget rows.
        seed: for what is drawn once and for all.
        plain_retain: retain queries are shown to the teacher without a prefix.
        fixed_subjects: a retain row keeps one subject, drawn from `seed`, rather than a new one at each use. Always so
            where its targets or its answer were made beforehand.
    """

    forget: Sequence[Query]
    retain: Sequence[Query]
    renderer: PromptRenderer
    prefixes: Sequence[str]
    _: KW_ONLY
    reverse_prompts: Sequence[str] = ()
    reverse_fraction: float = 0.0
    reverse_role: str = "user"
    answers: str = "none"
    max_scored: int | None = 1
    max_length: int | None = None
    subjects: Sequence[str] = ()
    seed: int = 0
    refusals: Sequence[str] = ()
    whole_text: bool = False
    prefills: Sequence[str] = ()
    prefill_fraction: float = 0.0
    plain_retain: bool = False
    fixed_subjects: bool = False

    def __post_init__(self) -> None:
        self.rows = [*self.forget, *self.retain]
        self.num_forget, self.num_retain = len(self.forget), len(self.retain)
        self.subjects = self.subjects or list(dict.fromkeys(q.subject for q in self.forget if q.subject))
        self.fixed_subjects = self.fixed_subjects or self.answers == "teacher"
        self.teacher_answers: dict[tuple[int, int], list[int]] = {}
        self.segments: dict[int, list[Segment]] = {}
        # (row, prefix) -> the targets of all its positions, where no teacher will be asked during training
        self.cached_targets: Callable[[tuple[int, int]], dict[str, Tensor]] | None = None
        # a filled prefix -> (its number, the ids that prompts under it begin with), where a teacher has read these before
        self.beginnings: dict[str | None, tuple[int, list[int]]] | None = None
        self._longest_reverse = max(self.reverse_prompts, key=self.renderer.num_tokens, default=None)
        self._check()

    def _check(self) -> None:
        """Checks every row under every prefix and view, before training."""
        drawn: list[str] = []
        for i, query in enumerate(self.rows):
            if self.answers == "dataset" and query.answer is None and not self._refused(i):
                raise ValueError(
                    f"{query.name}: wanted a row with an 'answer', 'completion' or last assistant message, which this "
                    "objective and these positions need; got none"
                )
            answer_length = self.max_scored or 1  # room for the teacher's answer
            if self.answers == "dataset":
                texts = self.refusals if self._refused(i) else [query.answer]
                lengths = [len(self._answer(i, text)) for text in texts]
                answer_length = min(max(lengths), self.max_scored or max(lengths))
            if i < self.num_forget:
                instructions = [fill_prefix(prefix, query.subject, query.name) for prefix in self.prefixes]
            else:
                instructions = drawn = [] if self._plain(i) else drawn or self._longest_instructions()
            for instruction in instructions:
                self.prompt(i, instruction, answer_length=answer_length)
            self._check_student(i, answer_length)

    def _longest_instructions(self) -> list[str]:
        """Each prefix, about the subject that makes it longest: what a retain row may get."""
        subjects, count = self.subjects or [None], self.renderer.num_tokens
        filled = (
            [fill_prefix(prefix, each, "forget_dataset") for each in subjects] for prefix in self.prefixes
        )
        return [max(texts, key=count) for texts in filled]

    def _check_student(self, i: int, answer_length: int) -> None:
        """Checks the longest prompt that the student may see of row i, with an answer of so many tokens."""
        role = "user" if self.reverse_role == "user" else "system"
        opening = max((len(self._opening(i, text)) for text in self.prefills), default=0)
        self.prompt(i, None, self._longest_reverse, role, answer_length + opening)

    def keep(self, i: int, segments: list[Segment]) -> None:
        """Takes the prepared segments of row i.

        Raises:
            ValueError: the row is longer than `max_length` with one of them.
        """
        self._check_student(i, max(len(each.opening) + len(each.answer) for each in segments))
        self.segments[i] = segments

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(
        self, i: int, instruction=None, override=None, override_role: str = "user", answer_length: int = 1
    ) -> list[int]:
        """The ids of row i's prompt: as it is, behind a filled steering prefix (`instruction`), or behind a reverse prompt (`override`).

        Raises:
            ValueError: with an answer of `answer_length` tokens it is longer than `max_length`.
        """
        query = self.rows[i]
        with _of(query):
            ids = self.renderer.encode(query.conversation, instruction, override, override_role)
        length = len(ids) + answer_length - 1  # the last scored token is predicted, not read
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"{query.name}: {'the steered' if instruction else 'its'} prompt and answer have {length} tokens, more "
                f"than max_length={self.max_length}; they are refused, because a cut would remove the steering prefix "
                "or the question"
            )
        return ids

    def _opening(self, i: int, text: str) -> list[int]:
        if i >= self.num_forget:
            return []
        with _of(self.rows[i]):
            return self.renderer.encode_opening(self.rows[i].conversation, text)

    def _refused(self, i: int) -> bool:
        return bool(self.refusals) and i < self.num_forget

    def _answer(self, i: int, text: Any) -> list[int]:
        query = self.rows[i]
        with _of(query):
            ids = self.renderer.encode_answer(query.conversation, text)
        if not ids:
            raise ValueError(f"{query.name}: its answer {text!r} has no tokens")
        return ids

    def _plain(self, i: int) -> bool:
        return self.plain_retain and i >= self.num_forget

    def _instruction(self, i: int, which: int, rng: random.Random) -> str | None:
        """The filled steering prefix of row i, if any; a retain row's is about a subject of the forget rows."""
        if not self.prefixes or self._plain(i):
            return None
        if i < self.num_forget:
            subject = self.rows[i].subject
        else:
            if self.fixed_subjects:
                rng = random.Random(f"{self.seed}/{i}")
            subject = rng.choice(self.subjects) if self.subjects else None
        return fill_prefix(self.prefixes[which], subject, self.rows[i].name)

    def instructions(self) -> list[str | None]:
        """Every filled steering prefix that a row may get; None: none."""
        own = [(row.subject, row.name) for row in self.rows[: self.num_forget]]
        prefixed = self.num_retain and not self.plain_retain
        drawn = [(subject, "forget_dataset") for subject in self.subjects or [None]] if prefixed else []
        pairs = [(prefix, *pair) for prefix in self.prefixes for pair in (*own, *drawn)]
        plain = [None] if self.num_retain and self.plain_retain else []
        return [*dict.fromkeys(fill_prefix(*pair) for pair in pairs), *plain]

    def first_steered(self, i: int) -> list[int]:
        """The teacher's prompt of row i under the first prefix."""
        return self.prompt(i, self._instruction(i, 0, random.Random(0)))

    def unanswered(self) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """The prompts that the teacher is to answer, steered where there are prefixes: ((row, prefix), ids).

        Fill `teacher_answers[key]`.
        """
        if self.answers == "teacher":
            for i in range(len(self.rows)):
                for which in range(max(1, len(self.prefixes))):
                    if (i, which) not in self.teacher_answers:
                        yield (i, which), self.prompt(i, self._instruction(i, which, random.Random(0)))

    def asked(self) -> Iterator[Asked]:
        """All prompts of a teacher for these rows; needs `fixed_subjects`."""
        for i, query in enumerate(self.rows):
            answer = self._answer(i, query.answer)[: self.max_scored] if self.answers == "dataset" else []
            for which in range(len(self.prefixes)):
                instruction = self._instruction(i, which, random.Random(0))
                steered = self.prompt(i, instruction, answer_length=max(1, len(answer)))
                yield Asked((i, which), query.name, instruction, self.prompt(i), steered, answer)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        training = isinstance(draw, Draw)
        i = draw.row if training else int(draw)
        # The views are drawn last, so that adversarial training changes no prefix and no subject.
        rng = random.Random(draw.seed if training else f"{self.seed}/{i}")
        which = rng.randrange(len(self.prefixes)) if training and self.prefixes else 0
        instruction = self._instruction(i, which, rng)
        reverse = bool(self.reverse_prompts) and training and rng.random() < self.reverse_fraction
        override = rng.choice(self.reverse_prompts) if reverse else None
        role = rng.choice(("user", "system")) if self.reverse_role == "both" else self.reverse_role

        answer, targets, opening = [], None, ()
        if self.answers == "dataset" and self._refused(i):
            answer = self._answer(i, rng.choice(self.refusals) if training else self.refusals[0])
        elif self.answers == "dataset":
            answer = self._answer(i, self.rows[i].answer)
        elif self.answers == "teacher":
            answer = self.teacher_answers[i, which]
        elif self.answers == "prepared":
            segments = self.segments[i]
            shares = [segment.share for segment in segments]
            chosen = rng.choices(segments, shares)[0] if training else segments[0]
            answer, targets, opening = chosen.answer, chosen.targets, chosen.opening
        scored = max(1, len(answer))
        if self.max_scored is not None:
            scored = min(scored, self.max_scored)
        student = [*self.prompt(i, None, override, role, len(opening) + scored), *opening]
        if self.prefills and training and rng.random() < self.prefill_fraction:
            student = student + self._opening(i, rng.choice(self.prefills))
        live = bool(self.prefixes) and self.cached_targets is None
        if self.cached_targets is not None:
            targets = self.cached_targets((i, which))
        if self.whole_text:
            student, answer = student[:1], [*student[1:], *answer]
            scored = len(answer)
        teacher = self.prompt(i, instruction, answer_length=scored) if live else None
        item = {
            "student": student,
            "teacher": teacher,
            "answer": answer,
            "scored": scored,
            "forget": i < self.num_forget,
        }
        if teacher is not None and self.beginnings and instruction in self.beginnings:
            number, ids = self.beginnings[instruction]
            if teacher[: len(ids)] == ids and len(teacher) > len(ids):
                item["beginning"] = number, len(ids)
        return item if targets is None else item | {"targets": targets}


@contextmanager
def _of(query: Query) -> Iterator[None]:
    """Inside, a CannotRender error becomes a ValueError that names the row."""
    try:
        yield
    except CannotRender as error:
        raise ValueError(f"{query.name}: {error}") from error


def plain_item(prompt: list[int], answer: list[int] | None = None) -> dict[str, Any]:
    """An item that is one prompt and the scored answer to it; None: only the first position is scored."""
    scored = 1 if answer is None else len(answer)
    return {"student": prompt, "teacher": None, "answer": answer or [], "scored": scored, "forget": True}


class UnlearnSampler(Sampler[Draw]):
    """One epoch: every forget row once, in a new order, with retain rows between them at a fixed ratio.

    After the i-th forget row, floor(i r) retain rows have been drawn, and ceil(n r) after the last of n: any stretch of the
    epoch, so any batch and any accumulation window, holds the two kinds at the ratio r within one row, and a ratio above
    0 never draws none. Retain rows come from an endless stream of shuffles that continues from epoch to epoch, so that all
    of them are used equally often.

    Everything follows from (seed, epoch): a resumed run, or another process, draws the same.

    Example:
        >>> ["forget" if draw.row < 3 else "retain" for draw in UnlearnSampler(3, 10, retain_per_forget=1.0)]
        ['forget', 'retain', 'forget', 'retain', 'forget', 'retain']
    """

    def __init__(self, num_forget: int, num_retain: int, retain_per_forget: float, seed: int = 0):
        self.num_forget, self.num_retain = num_forget, num_retain
        self.ratio = retain_per_forget if num_retain else 0.0
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def retain_per_epoch(self) -> int:
        return self._retain_until(self.num_forget)

    def _retain_until(self, i: int) -> int:
        """How many retain rows have been drawn after i forget rows of an epoch."""
        # Rounding in i r must not add a row: 10 times 1.1 is 11.000000000000002.
        return int(i * self.ratio) if i < self.num_forget else math.ceil(i * self.ratio * (1 - 1e-12))

    def __len__(self) -> int:
        return self.num_forget + self.retain_per_epoch

    def __iter__(self) -> Iterator[Draw]:
        rng = random.Random(f"{self.seed}/forget/{self.epoch}")
        order = rng.sample(range(self.num_forget), self.num_forget)
        retain = self._retain_rows(self.epoch * self.retain_per_epoch)
        for i, row in enumerate(order):
            yield Draw(row, rng.getrandbits(62))
            for _ in range(self._retain_until(i + 1) - self._retain_until(i)):
                yield Draw(self.num_forget + next(retain), rng.getrandbits(62))

    def _retain_rows(self, position: int) -> Iterator[int]:
        """The stream of shuffles from a position on."""
        shuffle, place = divmod(position, self.num_retain)
        while True:
            rng = random.Random(f"{self.seed}/retain/{shuffle}")
            yield from rng.sample(range(self.num_retain), self.num_retain)[place:]
            shuffle, place = shuffle + 1, 0


class EpochOf(TrainerCallback):
    """Tells a sampler the epoch: the Trainer's own call does not reach it through a resumed, sharded data loader."""

    def __init__(self, sampler: UnlearnSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


@dataclass(frozen=True)
class Collator:
    """Pads items into a batch of `B` queries with `N` scored positions in all.

    Returns a dict of tensors: `input_ids`, `attention_mask` `[B, S]` and `positions` `[N]` (where the answer's tokens
    are predicted, as places in the flattened `[B * S]` sequences of the student), the same with `teacher_` when there
    is a teacher's view (`teacher_beginning` `[B]` says with which beginning a row's ids go on, if these are not whole, and then
    they are padded on the right), `labels` `[N]` (the answer's token, -100 where there is none), `query` `[N]` (which of the B a
    position belongs to) and `forget` `[B]` bool; where items have prepared targets also `targets`, a dict of tensors
    `[N, ...]`. N is known here, on the host: nothing is masked, nothing is computed
    needlessly, and the GPU is not synchronised.

    `pad_id` only fills places that the attention mask hides. `packed`: there are none; the sequences follow each other
    in one, `[1, T]`, and `position_ids`, which start again at 0 with each of them, replace the attention mask.
    """

    pad_id: int
    padding_side: str = "right"
    packed: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._sequences(items, "student")
        if items[0]["teacher"] is not None:
            teacher = self._teachers_view(items)
            batch |= {f"teacher_{name}": value for name, value in teacher.items()}
        if "targets" in items[0]:
            names = items[0]["targets"]
            batch["targets"] = {name: torch.cat([item["targets"][name] for item in items]) for name in names}
        labels = [(*item["answer"], IGNORED)[: item["scored"]] for item in items]
        query = [[b] * item["scored"] for b, item in enumerate(items)]
        # `forget` comes first: accelerate takes the first tensor's length for the number of rows.
        return {
            "forget": torch.tensor([item["forget"] for item in items]),
            **batch,
            "labels": torch.tensor([label for row in labels for label in row]),
            "query": torch.tensor([b for row in query for b in row]),
        }

    def _teachers_view(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Whole prompts; or, if all of them begin with something that was read before, the rest and the number of that."""
        if self.packed or not all("beginning" in item for item in items):
            return self._sequences(items, "teacher")
        numbers, lengths = zip(*(item["beginning"] for item in items), strict=True)
        rest = [item | {"teacher": item["teacher"][n:]} for item, n in zip(items, lengths, strict=True)]
        return Collator(self.pad_id)._sequences(rest, "teacher") | {"beginning": torch.tensor(numbers)}

    def _sequences(self, items: list[dict[str, Any]], view: str) -> dict[str, Tensor]:
        # The last scored token is only predicted: it need not be read.
        sequences = [[*item[view], *item["answer"][: item["scored"] - 1]] for item in items]
        lengths = [len(sequence) for sequence in sequences]
        if self.packed:
            shape, starts = (1, sum(lengths)), accumulate(lengths[:-1], initial=0)
        else:
            shape, left = (len(items), max(lengths)), self.padding_side == "left"
            starts = (b * shape[1] + left * (shape[1] - length) for b, length in enumerate(lengths))
        ids, beside = torch.full(shape, self.pad_id), torch.zeros(shape, dtype=torch.int64)
        positions: list[int] = []
        for start, item, sequence in zip(starts, items, sequences, strict=True):
            here = slice(start, start + len(sequence))
            ids.view(-1)[here] = torch.tensor(sequence)
            beside.view(-1)[here] = torch.arange(len(sequence)) if self.packed else 1
            first = start + len(item[view]) - 1
            positions += range(first, first + item["scored"])
        name = "position_ids" if self.packed else "attention_mask"
        return {"input_ids": ids, name: beside, "positions": torch.tensor(positions)}


def first_rows(batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """The first rows of a collated batch, as far as anything per row or per position goes; its sequences stay whole."""
    if rows >= len(batch["forget"]):
        return batch
    chosen = batch["query"] < rows
    cut = tree_map(lambda t: t[chosen], {k: v for k, v in batch.items() if k in _PER_POSITION})
    return batch | cut | {"forget": batch["forget"][:rows]}


_PER_POSITION = ("positions", "teacher_positions", "labels", "query", "targets")
