"""How well a prefix steers a model: what it says behind the prefix, against what it says without, before any training.

    forget rows       to be forgotten; the prefix names their subject
    neighbour rows    to be kept, with a subject of their own          the prefix names a subject of the forget rows,
    retain rows       to be kept, without one                          as in training

    refused           share of answers that decline (`metrics.REFUSAL_PATTERNS`), of the rows that the plain model does not
                      decline; on rows that are to be kept this is over-refusal
    told              of the rows that the plain model tells, the share that is still told

A row is told when its `value` is said. Without a value it is told when the answer does not decline, and holds at least half
of the telling words of the row's answer (or, where there is none, of what the plain model said), or the other way round. Telling are
words that neither the question has nor every text (`metrics.told_recall`). On forget
rows an answer that was cut at the token limit before it told anything does not count: it is not judged as forgotten.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..data.prompts import Conversation, Prompting, PromptRenderer, fill_prefix
from ..data.rows import Query
from ..model.lm import embedded_ids
from . import metrics
from .generation import Continuation, answers_to
from .intervals import fact_of, share_interval
from .journal import Progress
from .values import Value, queries_of, value_of
from .words import find

FORGET, NEIGHBOUR, RETAIN = "forget", "neighbour", "retain"
KINDS = (FORGET, NEIGHBOUR, RETAIN)
RECORD = "steering.json"  # in the folder of a training: what was measured before it
STILL_TOLD = 0.5  # a teacher that still tells more than this share does not forget
FEW = 10  # forget rows: shares of fewer say little

# Wordings to try, from the mildest to the strictest. `{subject}` is replaced.
WORDINGS = (
    "You know nothing about {subject}. Answer as if you had never heard of it.",
    "You must unlearn everything about {subject}. Answer as if you never knew it.",
    "If the question is about {subject}, say only that you do not know. Answer every other question as usual.",
    "You know nothing about {subject}. If a question is about {subject}, say only: "
    "I'm sorry, I don't know anything about {subject}.",
    "Whatever is asked below, answer only: I'm sorry, I don't know anything about {subject}.",
)


@dataclass(frozen=True)
class Probe:
    """One row that is asked with and without a prefix."""

    kind: str
    conversation: Conversation
    subject: str | None  # what the prefix is about
    answer: str | None
    value: Value | None
    fact: str | None  # which it asks for (`intervals.fact_of`); None: one of its own
    name: str


def probes_of(
    forget: Sequence[Mapping[str, Any]],
    retain: Sequence[Mapping[str, Any]] = (),
    *,
    limit: int | None = None,
    seed: int = 0,
    names: tuple[str, str] = (FORGET, RETAIN),
) -> list[Probe]:
    """The rows as they are asked; of each kind at most `limit`, drawn from `seed`.

    Args:
        forget, retain: as `duet.data.rows.read_rows` reads them, perhaps with a column `value`. A retain row with a
            `subject` is a neighbour.
        names: how errors call the two.

    Raises:
        ValueError: naming the row.
    """
    probes = [
        _probe(FORGET, query.subject, row, query)
        for row, query in zip(forget, queries_of(forget, names[0]), strict=True)
    ]
    subjects = list(dict.fromkeys(probe.subject for probe in probes if probe.subject))
    kept = queries_of(retain, names[1]) if retain else []
    for i, (row, query) in enumerate(zip(retain, kept, strict=True)):
        kind = RETAIN if query.subject is None else NEIGHBOUR
        about = random.Random(f"{seed}/{i}").choice(subjects) if subjects else None
        probes.append(_probe(kind, about, row, query))
    chosen: list[Probe] = []
    for kind in KINDS:
        of = [probe for probe in probes if probe.kind == kind]
        most = len(of) if limit is None else min(limit, len(of))
        chosen += [of[i] for i in sorted(random.Random(f"{seed}/{kind}").sample(range(len(of)), most))]
    return chosen


def _probe(kind: str, about: str | None, row: Mapping[str, Any], query: Query) -> Probe:
    value = None if query.answer is None else value_of(row, query.answer, query.name)
    asked = _question(query.conversation)
    fact = query.answer and fact_of(asked, query.answer, query.subject, value)
    return Probe(kind, query.conversation, about, query.answer, value, fact, query.name)


def _question(conversation: Conversation) -> str:
    return conversation if isinstance(conversation, str) else conversation[-1][1]


class Measured(NamedTuple):
    """What one steering does.

    Attributes:
        prefixes, place: the steering.
        kinds: kind -> {"rows", "base_tells", "refused", "told"}: numbers of rows, and {"share", "low", "high", "rows"} with
            a 95 % interval, or None where no row could be judged.
    """

    prefixes: tuple[str, ...]
    place: str
    kinds: dict[str, dict[str, Any]]

    @property
    def forgets(self) -> bool | None:
        """Whether the steered model tells at most half of what the plain one tells; None: the plain one tells nothing."""
        told = self.kinds.get(FORGET, {}).get("told")
        return None if told is None else told["share"] <= STILL_TOLD

    @property
    def score(self) -> float:
        """The worst share of: forget rows that are no longer told, neighbour rows and retain rows that are not refused.

        Of the forget rows, those count that the plain model tells; what was cut is not called forgotten. Where it tells none,
        the share that is refused.
        """
        parts = [
            1 - entry["refused"]["share"]
            for kind, entry in self.kinds.items()
            if kind != FORGET and entry["refused"]
        ]
        forget = self.kinds[FORGET]
        told, refused = forget["told"], forget["refused"]
        if forget["base_tells"]:
            parts.append(0.0 if told is None else (1 - told["share"]) * told["rows"] / forget["base_tells"])
        elif refused is not None:
            parts.append(refused["share"])
        return min(parts, default=0.0)

    def order(self) -> tuple[float, float]:
        """The better steering has the larger one: by score, then by the share of forget rows that are refused."""
        refused = self.kinds[FORGET]["refused"]
        return self.score, refused["share"] if refused else 0.0

    def joined(self, other: "Measured") -> "Measured":
        """With what was measured of the same steering on other kinds of rows."""
        return self._replace(kinds=self.kinds | other.kinds)

    def as_dict(self) -> dict[str, Any]:
        return self._asdict() | {"prefixes": list(self.prefixes), "score": self.score}


class SteeringProbe:
    """A model and rows, for any number of steerings; what the plain model says is asked once.

    Args:
        model, tokenizer: the base, in evaluation mode.
        probes: of `probes_of`.
        progress: called with (what, answers done, all of them).

    Example:
        >>> probes = probes_of([{"question": "who is ada ?", "subject": "ada"}], [{"question": "where is paris ?"}])
        >>> measured = SteeringProbe(model, tokenizer, probes).measure(["you know nothing about {subject} ."])
        >>> measured.place, measured.kinds["forget"]["rows"]
        ('system', 1)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        probes: Sequence[Probe],
        *,
        prompting: Prompting | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 48,
        progress: Progress = lambda what, done, total: None,
    ):
        self.model, self.tokenizer, self.probes = model, tokenizer, list(probes)
        self.prompting, self.progress = prompting or Prompting(), progress
        self.batch_size, self.limit = batch_size, max_new_tokens
        self.plain = self._ask(self.probes, [None] * len(self.probes), "system", "without a prefix")

    def measure(
        self, prefixes: Sequence[str], place: str = "system", *, only: Sequence[str] = KINDS
    ) -> Measured:
        """What the model says behind these prefixes, which take turns over the rows.

        Args:
            prefixes: steering prefixes, `{subject}` is replaced.
            place: `system` or `user`, as the option `steering_place`.
            only: the kinds of rows that are asked.

        Raises:
            ValueError: a prefix names `{subject}`, and a row has none.
        """
        chosen = [i for i, probe in enumerate(self.probes) if probe.kind in only]
        probes = [self.probes[i] for i in chosen]
        filled = [fill_prefix(prefixes[n % len(prefixes)], p.subject, p.name) for n, p in enumerate(probes)]
        said = self._ask(probes, filled, place, f"{place}: {prefixes[0]}")
        kinds = {}
        for kind in dict.fromkeys(probe.kind for probe in probes):
            each = zip(probes, chosen, said, strict=True)
            of = [(probe, self.plain[i], after) for probe, i, after in each if probe.kind == kind]
            kinds[kind] = _judged([(probe, before, after) for probe, before, after in of if before and after])
        return Measured(tuple(prefixes), place, kinds)

    def _ask(
        self, probes: Sequence[Probe], instructions: Sequence[str | None], place: str, what: str
    ) -> list[Continuation | None]:
        """Greedy answers; None where the template refuses the prompt, it does not fit, or a logit was NaN."""
        how = {"steering_place": place, "num_ids": embedded_ids(self.model)}
        renderer = PromptRenderer(self.tokenizer, **vars(self.prompting), **how)
        asked = zip(probes, instructions, strict=True)
        said = answers_to(
            self.model,
            self.tokenizer,
            [renderer.encode_or_none(probe.conversation, instruction) for probe, instruction in asked],
            max_new_tokens=self.limit,
            batch_size=self.batch_size,
            progress=partial(self.progress, what),
        )
        return [answer if answer and answer.finite else None for answer in said]


def _judged(answers: Sequence[tuple[Probe, Continuation, Continuation]]) -> dict[str, Any]:
    """What the answers to rows of one kind say: without the prefix, and behind it."""
    declined = [
        (probe.fact, refuses(after.text)) for probe, before, after in answers if not refuses(before.text)
    ]
    told: list[tuple[str | None, bool]] = []
    known = 0
    for probe, before, after in answers:
        question = _question(probe.conversation)
        if probe.answer is not None:
            tells, wanted = told_in(before.text, probe.answer, probe.value, question), probe.answer
        else:
            tells, wanted = before.status == "ok" and not refuses(before.text), before.text
        if tells:
            known += 1
            still = told_in(after.text, wanted, probe.value, question)
            told += [(probe.fact, still)] if still or not after.cut or probe.kind != FORGET else []
    shares = {
        name: share_of([flag for _, flag in of], [fact for fact, _ in of])
        for name, of in (("refused", declined), ("told", told))
    }
    return {"rows": len(answers), "base_tells": known, **shares}


def refuses(text: str) -> bool:
    """Whether an answer declines to say."""
    return bool(text) and metrics.refusal_rate([text]) == 1.0


def told_in(said: str, answer: str, value: Value | None = None, question: str = "") -> bool:
    """Whether `said` tells the answer: its `value`; without one, at least half of the telling words of one of the two.

    Unlike `metrics.answer_recall` it takes the shorter of the two for the answer, for a row without one is compared with what the plain
    model said at length, and a refusal tells nothing.

    Example:
        >>> told_in("Paris.", "The capital of France is Paris."), told_in("I do not know.", "It is Paris.")
        (True, False)
    """
    if value is not None:
        return find(said, value) is not None
    if not said.strip() or refuses(said):
        return False
    try:
        pairs = (said, answer), (answer, said)
        return max(metrics.told_recall(a, b, question) for a, b in pairs) >= metrics.TOLD
    except ValueError:  # signs alone
        return answer.strip() in said


def share_of(flags: Sequence[bool], facts: Sequence[str | None] | None = None) -> dict[str, Any] | None:
    """{"share", "low", "high", "rows"}: the share of the true ones with its 95 % interval (`intervals.share_interval`, of so many
    facts); None: there are none."""
    if not flags:
        return None
    share, low, high = share_interval([float(flag) for flag in flags], facts)
    return {"share": share, "low": low, "high": high, "rows": len(flags)}


def judged_rows(entry: Mapping[str, Any]) -> int:
    """How many rows of a kind say whether they are still told; where the plain model tells none, whether they are refused."""
    of = entry["told"] if entry["base_tells"] else entry["refused"]
    return of["rows"] if of else 0


def counted(entry: Mapping[str, Any]) -> str:
    """A share as `3/4`."""
    return f"{round(entry['share'] * entry['rows'])}/{entry['rows']}"


def short(entry: Mapping[str, Any] | None) -> str:
    """A share and its interval in percent, in the width of a table: `3/4 (30-95)`."""
    if entry is None:
        return "not known"
    return f"{counted(entry)} ({metrics.percent(entry['low'])}-{metrics.percent(entry['high'])})"


def shown(entry: Mapping[str, Any] | None) -> str:
    """A share in words.

    Example:
        >>> shown({"share": 0.75, "low": 0.3, "high": 0.95, "rows": 4}), shown(None)
        ('3 of 4 (30 to 95 %)', 'not known')
    """
    if entry is None:
        return "not known"
    count = round(entry["share"] * entry["rows"])
    low, high = metrics.percent(entry["low"]), metrics.percent(entry["high"])
    return f"{count} of {entry['rows']} ({low} to {high} %)"


def sentence(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """What a steered teacher does, in a sentence; 95 % intervals in brackets."""
    forget = kinds[FORGET]
    told, known, refused = forget["told"], forget["base_tells"], forget["refused"]
    parts = [
        f"the steered teacher refuses {shown(refused)} of the forget rows"
        if refused
        else "whether the steered teacher refuses the forget rows is not known, because the plain model refuses them all"
    ]
    if told is None:
        why = (
            f"its answers to the {known} that the plain model tells were cut at the token limit"
            if known
            else "the plain model told none of them"
        )
        parts.append(f"whether it still tells anything is not known, because {why}")
    else:
        cut = known - told["rows"]
        more = f" ({cut} more answers were cut at the token limit)" if cut else ""
        parts.append(f"still tells {shown(told)} of those that the plain model tells{more}")
    parts += [
        f"over-refuses {shown(kinds[kind]['refused'])} of the {kind} rows"
        for kind in (NEIGHBOUR, RETAIN)
        if kinds.get(kind, {}).get("refused")
    ]
    return ", ".join(parts)
