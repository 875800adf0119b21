"""What a model really tells: questions in several wordings -> its own answers -> rows to forget and to keep.

    questions   --every wording, greedy and drawn-->   out/rows.jsonl, a journal that an interrupted run continues
                --what is told-->                       out/{forget,neighbour,retain}.jsonl, for training
                                                        out/validation/... and out/report/..., in other wordings

A fact is told where the greedy answers to at least half of its wordings hold its value. Without a given value it is the phrase
that most of the model's answers share (`agreed_value`), but for what its answers about others share as well: "Worked as a". What
a model does not tell cannot be forgotten, and is left out. Of an answer that was cut at the token limit its whole sentences count.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from ..data.prompts import SUBJECT, Prompting, PromptRenderer, check_placeholders
from ..data.rows import checked_text, text_of, warn_of_unread
from ..model.hashes import fingerprints
from ..model.lm import embedded_ids
from ..names import did_you_mean
from . import metrics, words
from .elicit import ELICITED
from .generation import Continuation, answers_to
from .journal import MANIFEST, Journal, Progress, digest
from .steering import FORGET, KINDS, NEIGHBOUR, RETAIN, refuses
from .values import listed

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "report")
TOLD_WORDINGS = 0.5
AGREED = 1 / 3  # answers drawn at temperature 1 by a small model are noisy
LONGEST_VALUE = 4  # words
# A phrase belongs to the form of the answers where it is in those about so many others: two countries may have one currency.
FORM_SHARE, FORM_LEAST = 0.5, 2
# Words that say nothing by themselves: no value begins or ends with one.
_FUNCTION_WORDS = """
    a an the of in on at to for from by with and or but as is are was were be been it its this that these those he
    she they we you i his her their my your not no yes which who what where when there here has have had do does did
    can will would one also most known called located spoken used official
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
# Behind an initial, or an abbreviation in front of a name, there is none; I, V and X are numerals (World War I).
_FULL_STOP = r"(?<!\b[A-HJ-UWYZ])(?<!\b(?:St|Mt|Ft|Dr|Mr|Ms|Jr|Sr))(?<!\bMrs)\."


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


def _facts(
    row: Mapping[str, Any], where: str, subjects: Sequence[str], neighbours: Sequence[str]
) -> list[Fact]:
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


# --- asking --------------------------------------------------------------------------------------------------------


def elicit_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    out: str | Path,
    *,
    samples: int = 4,
    prompting: Prompting | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    seed: int = 0,
    name: str = "",
    progress: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Asks for every fact, and writes the rows of those that are told into `out`. An interrupted run is continued.

    Args:
        model, tokenizer: the base, in evaluation mode. Without a chat template a question is written as a line of text, and
            the answer ends with its line.
        facts: of `facts_of`.
        samples: answers to each wording that are drawn at temperature 1, beside the greedy one.
        seed: of the drawn answers.
        name: of the model, for the record.
        progress: called with (what, facts done, all of them).

    Returns:
        kind -> {"facts", "told", "train", "validation", "report"}: numbers of facts and of rows.

    Raises:
        ValueError: `batch_size` is below 1; nothing about the subjects is told; or `out` holds another run.
        FileExistsError: `out` holds rows that no such run wrote.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted an integer >= 1, got {batch_size}")
    _check_not_given(Path(out))
    prompting = prompting or Prompting()
    renderer = PromptRenderer(tokenizer, **vars(prompting), num_ids=embedded_ids(model))
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    how |= {} if renderer.has_template else {"stop": ("\n",)}
    say = partial(answers_to, model, tokenizer, **how)
    manifest: dict[str, Any] = {"facts": digest(repr(list(facts))), "samples": samples}
    manifest |= {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    manifest |= {**fingerprints(model, tokenizer), **prompting.changed()}
    with Journal(out, manifest, key=("fact",), note={"model": name}) as journal:
        for chunk in _chunks(facts, batch_size):
            progress("facts asked", chunk.start, len(facts))
            if not all((i,) in journal.done for i in chunk):
                asked = [facts[i].wordings for i in chunk]
                said = _answers(renderer, say, asked, samples, f"{seed}/{chunk.start}")
                journal.append({"fact": i, "asked": each} for i, each in zip(chunk, said, strict=True))
        progress("facts asked", len(facts), len(facts))
        by_fact = {row["fact"]: row["asked"] for row in journal.rows}
        return _write(Path(out), facts, [by_fact[i] for i in range(len(facts))])


def _check_not_given(out: Path) -> None:
    """Refuses a folder with rows that no run of `elicit_facts` wrote: they would be written over, or deleted."""
    if (out / MANIFEST).is_file():
        return
    for split, kind in itertools.product(SPLITS, KINDS):
        if (path := _file_of(out, split, kind)).exists():
            raise FileExistsError(
                f"out: {path} is there already and no result of duet elicit; wanted a new folder"
            )


def _file_of(out: Path, split: str, kind: str) -> Path:
    return out / f"{kind}.jsonl" if split == "train" else out / split / f"{kind}.jsonl"


def _chunks(facts: Sequence[Fact], batch_size: int) -> Iterator[range]:
    """Facts that are asked together, about a batch of wordings: the same ones when an interrupted run continues."""
    start, wordings = 0, 0
    for i, fact in enumerate(facts):
        wordings += len(fact.wordings)
        if wordings >= batch_size or i == len(facts) - 1:
            yield range(start, i + 1)
            start, wordings = i + 1, 0


def _answers(
    renderer: PromptRenderer,
    say: Callable[..., list[Continuation | None]],
    asked: Sequence[Sequence[str]],
    samples: int,
    seed: str,
) -> list[list[dict[str, Any]]]:
    """For every fact and wording: {"question", "status", "said", "drawn"}. say: (prompts, perhaps a seed) -> answers."""
    flat = [(i, text) for i, texts in enumerate(asked) for text in texts]
    prompts = [renderer.encode_or_none((("user", text),)) for _, text in flat]
    seeds = (int(hashlib.sha256(f"{seed}/{n}".encode()).hexdigest()[:8], 16) for n in range(samples))
    said = zip(say(prompts), *(say(prompts, seed=each) for each in seeds), strict=True)
    rows: list[list[dict[str, Any]]] = [[] for _ in asked]
    for (i, text), prompt, (answer, *drawn) in zip(flat, prompts, said, strict=True):
        none = "refused_by_template" if prompt is None else "too_long"
        row = {"question": text, "status": answer.status if answer else none}
        row |= {"said": answer.text if answer else None}
        rows[i].append(row | {"drawn": [other.text for other in drawn if other and other.finite]})
    return rows


# --- what is told --------------------------------------------------------------------------------------------------


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
            if known & set(parts) or {parts[0], parts[-1]} & FUNCTION_WORDS:
                continue
            share = _share(tuple(answers), phrase)
            if share >= AGREED:
                found.setdefault(phrase, (length != (0, 1), share, *length, -start))
    best = sorted(found, key=lambda phrase: found[phrase], reverse=True)
    content = {word for word in words.words_of(greedy) if not re.fullmatch("[a-z]", word)}
    content -= known | FUNCTION_WORDS
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


def split_of(wording: int, count: int) -> str:
    """Which split a wording belongs to: the last one to the report, of three and more the one before it to validation.

    Example:
        >>> [split_of(i, 4) for i in range(4)], [split_of(i, 2) for i in range(2)], split_of(0, 1)
        (['train', 'train', 'validation', 'report'], ['train', 'report'], 'train')
    """
    if count > 1 and wording == count - 1:
        return "report"
    return "validation" if count > 2 and wording == count - 2 else "train"


def _write(
    out: Path, facts: Sequence[Fact], asked: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """The rows of what is told, into their files; retain rows are all that must be kept, neighbours among them."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {(s, k): [] for s in SPLITS for k in KINDS}
    counts = {kind: {"facts": 0, "told": 0, **dict.fromkeys(SPLITS, 0)} for kind in KINDS}
    taken = []
    for fact, each, others in zip(facts, asked, about_others(facts, asked), strict=True):
        counts[fact.kind]["facts"] += 1
        told = told_of(fact, each, others)
        if told is None:
            continue
        if fact.value is None:
            taken.append(f"{fact.wordings[0]!r} -> {told.value!r}")
        counts[fact.kind]["told"] += 1
        for i, answer in told.answers.items():
            split = split_of(i, len(fact.wordings))
            about = {} if fact.subject is None else {"subject": fact.subject}
            row = {"question": fact.wordings[i], **about, "answer": answer, "value": told.value}
            row |= {ELICITED: True, "known": round(told.known, 3)}
            if fact.kind == FORGET:
                row |= dict(fact.more)
            counts[fact.kind][split] += 1
            rows[split, fact.kind].append(row)
            if fact.kind == NEIGHBOUR:
                rows[split, RETAIN].append(row)
    if not counts[FORGET]["told"]:
        raise ValueError(f"subject: {_nothing(facts, asked)}")
    if taken:
        logger.warning(
            f"value: not given, so that what the answers share counts, of {len(taken)} of the facts that are told: "
            f"{', '.join(taken[:3])}{', ...' if len(taken) > 3 else ''}. Look at them in the rows, and give a 'value' where it is wrong"
        )
    for (split, kind), of in rows.items():
        path = _file_of(out, split, kind)
        path.parent.mkdir(exist_ok=True)
        if of:
            path.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of), encoding="utf-8"
            )
        else:
            path.unlink(missing_ok=True)
    return {kind: count for kind, count in counts.items() if count["facts"]}


def _nothing(facts: Sequence[Fact], asked: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """That nothing is told of what is to be forgotten, with an example."""
    of = [(fact, each) for fact, each in zip(facts, asked, strict=True) if fact.kind == FORGET]
    names = ", ".join(dict.fromkeys(fact.subject or "" for fact, _ in of))
    status = Counter(each["status"] for _, texts in of for each in texts)
    first = of[0][1][0]
    give = "give them a 'value', " if any(fact.value is None for fact, _ in of) else ""
    return (
        f"the model tells none of the {len(of)} facts about {names}, so that there is nothing to forget "
        f"({', '.join(f'{n} answers {what}' for what, n in status.items())}). To {first['question']!r} it says "
        f"{(first['said'] or '')[:120]!r}. Ask other questions, {give}allow longer answers (--max-new-tokens), or take another subject"
    )
