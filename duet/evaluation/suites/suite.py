"""A suite file (YAML) -> checked tasks; a task's data file -> rows.

    name, description, hub, options                      of the suite
    tasks:     kind, data, metrics, how a prompt is made  (Task)
    numbers:   what the suite says in one number          (`summary.NUMBERS`)

A field that is not known is refused with the nearest name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from ...data.rows import checked_text, how_to_rename, text_of
from ...data.sources import FORMATS, read_table
from ...names import check_known, check_one_of, expanded, instead
from ...options import BlankTexts, Count, MaybeCount, Texts, fitted, mapping, section
from ...yaml_text import read_yaml
from ..journal import digest
from .row_metrics import METRICS_OF_KIND, RATIO
from .summary import check_number

logger = logging.get_logger(__name__)
SUITES = Path(__file__).parent
# How names of tasks begin, in the shipped suites and others like them: tasks to forget, and tasks to keep.
TO_FORGET = ("forget", "verbatim", "knowledge", "wmdp")
TO_KEEP = ("retain", "utility", "real_authors", "world_facts", "mmlu")
_COLUMN = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class FewShot:
    """Worked examples before the question.

    Attributes:
        data: where they are, as a task's `data`.
        count: how many, the first ones.
        separator: between them, where there is no chat template.
    """

    data: str
    count: Count
    separator: str = "\n\n"


@dataclass(frozen=True, eq=False)
class Task:
    """One set of rows, asked in one way.

    Attributes:
        name: unique in the suite.
        kind: `generate` (greedy answers against `answer`), `score` (losses of the given `texts`) or `multiple_choice`
            (which of the `choices` is likeliest).
        data: the file's name in the data folder, with or without its suffix, or `config` or `config/split` on the Hub.
        metrics: per row; `row_metrics` lists them by kind.
        hub: the dataset on the Hub; None: the suite's.
        question: what is asked, with `{column}`; null: nothing, the texts are scored alone.
            A row without the column `question` may have `messages` or `prompt` (`duet.data.rows`): it is then their last message or text.
        plain: how the question is written where there is no chat template; `{question}` stands for it. None: as the
            model was trained.
        chat: `auto` (the tokenizer's chat template, if it has one) or `never`.
        system: a system message, for chat templates.
        answer: the reference's column; for `multiple_choice` the index, letter or text of the correct choice.
        texts: for `score`: name -> columns; of several columns the first that a row has. A column may hold a list.
        end_token: whether the end token counts as the last token of a text.
        choices: for `multiple_choice`: the column with the list of choices.
        letters: the choices are shown as A, B, C, ... in the question, and the letters are compared.
        max_new_tokens, stop: for `generate`.
        max_tokens: for `score`: only so many first tokens of a text count, the end token among them. Where `question` is null the
            first one (of many tokenizers the start token) is read and not scored, because nothing predicts it.
        few_shot: worked examples.
        optional: rows that are not there leave the task out, with a word about it.
    """

    name: str
    kind: Literal["generate", "score", "multiple_choice"]
    data: str
    metrics: Texts
    hub: str | None = None
    question: str | None = "{question}"
    plain: str | None = None
    chat: Literal["auto", "never"] = "auto"
    system: str | None = None
    answer: str = "answer"
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"answer": ("answer",)})
    end_token: bool = True
    choices: str = "choices"
    letters: bool = False
    max_new_tokens: Count = 64
    stop: BlankTexts = field(default_factory=list)
    max_tokens: MaybeCount = None
    few_shot: FewShot | None = None
    optional: bool = False

    def columns(self) -> set[str]:
        """The columns that are read."""
        of_kind = {
            "generate": [self.answer, "value"],
            "score": chain.from_iterable(self.texts.values()),
            "multiple_choice": [self.answer, self.choices],
        }
        return {"subject", *_COLUMN.findall(self.question or ""), *of_kind[self.kind]}


@dataclass(frozen=True)
class Suite:
    """A checked suite; `digest` changes with anything in it."""

    name: str
    description: str
    tasks: tuple[Task, ...]
    numbers: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    digest: str


def load_suite(suite: str | Path, options: Mapping[str, Any] | None = None) -> Suite:
    """The suite of that name (tofu, muse, mcq, probes), or of a YAML file.

    Args:
        options: replace the suite's own `options`, which stand as `{option}` anywhere in the file's texts.

    Raises:
        FileNotFoundError, ValueError: naming the file, the field, what came and what was wanted.
    """
    path = Path(suite)
    if path.suffix not in (".yaml", ".yml"):
        path = SUITES / f"{suite}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in SUITES.glob("*.yaml"))
        raise FileNotFoundError(
            f"suite: wanted one of {', '.join(known)} or a .yaml file, got {str(suite)!r}"
        )
    return read_suite(read_yaml(path), path.stem, options)


def read_suite(tree: Any, name: str, options: Mapping[str, Any] | None = None) -> Suite:
    """The checked suite of a tree of plain values; errors start with `name`."""
    tree = mapping(name, tree)
    check_known(f"{name}: ", tree, ("name", "description", "hub", "options", "tasks", "numbers"))
    chosen = dict(mapping(f"{name}: options", tree.get("options") or {}))
    for option, value in (options or {}).items():
        if option not in chosen:
            raise ValueError(f"{name}: there is no option {option!r}{instead(option, chosen)}")
        chosen[option] = value
    tree |= {k: _filled(tree[k], chosen) for k in ("tasks", "numbers", "hub") if k in tree}
    entries = mapping(f"{name}: tasks", tree.get("tasks"))
    if not entries:
        raise ValueError(f"{name}: tasks: wanted at least one")
    tasks = tuple(
        _task(f"{name}: tasks.{task}", task, entry, tree.get("hub")) for task, entry in entries.items()
    )
    numbers = mapping(f"{name}: numbers", tree.get("numbers") or {})
    about = str(tree.get("name", name)), str(tree.get("description", ""))
    suite = Suite(*about, tasks, numbers, chosen, digest_of(tree))
    for number, spec in numbers.items():
        check_number(f"{name}: numbers.{number}", number, spec, {t.name: t.metrics for t in tasks})
    return suite


def digest_of(value: Any) -> str:
    """16 hex digits that change with anything in a tree of plain values."""
    return digest(json.dumps(value, sort_keys=True, default=str))


def _task(where: str, name: str, entry: Any, hub: str | None) -> Task:
    entry = mapping(where, entry)
    texts = mapping(f"{where}.texts", entry.pop("texts", {}))
    given: dict[str, Any] = {
        "texts": {k: tuple(fitted(f"{where}.texts.{k}", v, Texts)) for k, v in texts.items()}
    }
    task = section(Task, where, entry, name=str(name), **(given if texts else {}))
    if "{question}" not in (task.plain or "{question}"):
        raise ValueError(f"{where}.plain: wanted a text with {{question}}, got {task.plain!r}")
    for metric in task.metrics:
        check_one_of(f"{where}.metrics", metric, METRICS_OF_KIND[task.kind])
    if task.kind == "score":
        for metric in task.metrics:
            for text in RATIO[metric][0] if metric in RATIO else ("answer",):
                if text not in task.texts:
                    raise ValueError(
                        f"{where}.texts: the metric {metric} wants a text {text!r}, got {', '.join(task.texts)}"
                    )
    return replace(task, hub=task.hub or hub)


# --- rows ------------------------------------------------------------------------------------------------------


def load_table(data: str | Path | None, name: str, hub: str | None, where: str) -> list[dict[str, Any]]:
    """The rows of `name`: a file in the folder `data`, or a dataset on the Hub when no folder is given.

    Args:
        name: of a file in it (with or without suffix), or its full path; on the Hub `config` or `config/split`.
        where: who asks, for errors.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: nothing there; not readable; no rows.
    """
    folder = Path(expanded("data", data)) if data is not None else Path()
    if folder.is_file():
        raise NotADirectoryError(f"data: wanted a folder with files of rows, got the file {str(data)!r}")
    found = [path for suffix in ("", *FORMATS) if (path := folder / f"{name}{suffix}").is_file()]
    if found:
        if found[1:]:
            others = ", ".join(path.name for path in found[1:])
            logger.warning_once(f"data: {found[0]} is read, and not {others} beside it")
        rows = read_table(found[0], where)
    else:
        if data is not None or hub is None:
            raise FileNotFoundError(
                f"{where}: there is no {folder / name} ({', '.join(FORMATS)}); wanted such a file in --data"
            )
        from datasets import load_dataset

        config, _, split = name.partition("/")
        try:
            of_hub: Any = load_dataset(hub, config or None, split=split or "train")
            rows = list(of_hub)
        except (OSError, ValueError) as error:
            raise OSError(f"{where}: the dataset {hub!r} ({name}) could not be loaded: {error}") from error
    if not rows:
        raise ValueError(f"{where}: wanted at least one row in {name}, got none")
    return rows


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with every `{column}` replaced by the row's text. Other braces stay.

    A number is a text within a template, such as a year; alone it asks nothing.

    Example:
        >>> fill("Q: {question} {}", {"question": "Who?"}, "task t, row 0")
        'Q: Who? {}'
    """

    def value(match: re.Match) -> str:
        if row.get(match[1]) is None:
            hint = how_to_rename(row) if match[1] == "question" else ""
            raise ValueError(f"{where}: it has no column {match[1]!r}, but {', '.join(sorted(row))}{hint}")
        column = f"{where}, {match[1]}"
        return checked_text(row[match[1]], column) if template == match[0] else text_of(row[match[1]], column)

    return _COLUMN.sub(value, template)


# --- checks ----------------------------------------------------------------------------------------------------


def _filled(value: Any, options: Mapping[str, Any]) -> Any:
    """Options put in: a text that is only `{option}` becomes its value; other `{columns}` stay."""
    if isinstance(value, Mapping):
        return {k: _filled(v, options) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, options) for v in value]
    if isinstance(value, str):
        whole = _COLUMN.fullmatch(value)
        if whole and whole[1] in options:
            return options[whole[1]]
        return _COLUMN.sub(lambda m: str(options[m[1]]) if m[1] in options else m[0], value)
    return value
