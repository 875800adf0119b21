"""Files of other benchmarks and frameworks -> rows that `duet eval` and `duet attack` read. `duet import` writes them.

    rwku           jinzhuoran/RWKU: a target's folder, or a folder of such, with forget_level{1,2,3}.json and
                   neighbor_level{1,2}.json: rows {"query", "answer", "subject", "level", "type"}
    openunlearning locuslab/open-unlearning: a run's folder, with *_EVAL.json in it, in `evals` or in `checkpoint-N/evals`:
                   metric -> {"agg_value", "value_by_index": {"0": {"input", "ground_truth", "generation", ...}}}
    choices        WMDP and MMLU: question, choices (a list), answer (an index, a letter or a text); MMLU's own .csv files have
                   no header, and the cells question, A, B, C, D, letter

The layouts are those of the projects' own code in 2026. Nothing is downloaded, and no model is loaded.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..folders import disk_named, write_atomically
from ..names import check_one_of
from .rows import LETTERS, checked_text, correct_choice, text_of
from .sources import FORMATS, csv_cells, read_object, read_table

Row = dict[str, Any]
Tables = dict[str, list[Row]]
MOST = 10  # choices
OPEN = "forget_open"  # the table of questions without their choices
_NAMES_CHOICES = re.compile(r"\b(following|these|above|below)\b", re.IGNORECASE)
BLANK = "Please complete the blank in the following question.\nQuestion: {}"
BRIEF = "Please briefly answer the following question.\nQuestion: {}"


class Imported(NamedTuple):
    """What was found.

    Attributes:
        tables: name of a file, without its suffix -> rows. `forget` and `retain` are what the commands take.
        model: folder of the model that belongs to it, if there is one.
        numbers: what the source itself reports, by name.
    """

    tables: Tables
    model: Path | None
    numbers: dict[str, float]


def import_rows(path: str | Path, kind: str, role: str = "forget", subject: str | None = None) -> Imported:
    """The rows of a file or folder.

    Args:
        path: see above.
        kind: of `KINDS`.
        role: `forget` or `retain`: what the questions of `choices` are.
        subject: of the rows to forget that name none of their own.

    Raises:
        FileNotFoundError, ValueError: it is not there, has another layout or no rows; the message names the file.
    """
    check_one_of("kind", kind, KINDS)
    check_one_of("role", role, ("forget", "retain"))
    if not Path(path).exists():
        raise FileNotFoundError(f"path: there is no file or folder {str(path)!r}")
    found = KINDS[kind](Path(path), role)
    if not any(found.tables.values()):
        raise ValueError(f"path: wanted rows of {kind} in {str(path)!r}, got none")
    tables = {name: rows for name, rows in found.tables.items() if rows}
    if subject is not None:
        about, gone = checked_text(subject, "subject"), ("forget", OPEN, "adversarial", "choices")
        if "forget" not in tables:
            raise ValueError("subject: wanted rows to forget, whose subject it is, got none")
        tables |= {
            name: [{"subject": about} | row for row in tables[name]] for name in gone if name in tables
        }
    return found._replace(tables=tables)


def write_rows(found: Imported, out: str | Path) -> list[Path]:
    """One `.jsonl` file for each table, and `published.json` with the numbers, if there are any; returns their paths.

    Raises:
        ValueError: one of the files is there with other content, or a row holds what UTF-8 cannot write; nothing is written then.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    files = {
        out / f"{name}.jsonl": b"".join(_line(row, f"path: {name}, row {i}") for i, row in enumerate(rows))
        for name, rows in found.tables.items()
    }
    if found.numbers:
        files[out / "published.json"] = (json.dumps(found.numbers, indent=1) + "\n").encode()
    for path, data in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != data):
            raise ValueError(
                f"out: {path} is there with other content; wanted another folder, nothing was written"
            )
    out.mkdir(parents=True, exist_ok=True)
    with disk_named(out, "out"):
        for path, data in files.items():
            write_atomically(path, data)
    return list(files)


def _line(row: Row, where: str) -> bytes:
    text = json.dumps(row, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:
        got = f"got {text[max(0, error.start - 40) : error.end]!r} ({error.reason})"
        raise ValueError(f"{where}: wanted texts that UTF-8 can write, {got}") from None


# --- RWKU ----------------------------------------------------------------------------------------------------------


def _rwku(path: Path, role: str) -> Imported:
    """`forget` (levels 1 and 2), `adversarial` (level 3: their attacks, in the question) and `retain` (neighbours)."""
    files = [path] if path.is_file() else sorted(path.rglob("*_level[123].json"))
    tables: Tables = {"forget": [], "adversarial": [], "retain": []}
    for file in files:
        match = re.fullmatch(r"(forget|neighbor)_level([123])", file.stem)
        if match is None:
            raise ValueError(f"path: wanted a file such as forget_level2.json, got {str(file)!r}")
        kind, level = match[1], match[2]
        table = "retain" if kind == "neighbor" else "adversarial" if level == "3" else "forget"
        wording = BLANK if level == "1" else BRIEF
        for i, row in enumerate(read_table(file, "path")):
            query, answer = (_text(row, name, f"{file}, row {i}") for name in ("query", "answer"))
            about = {"subject": row["subject"]} if kind == "forget" and row.get("subject") else {}
            told = {"question": wording.format(query), **about, "answer": answer, "value": answer}
            tables[table].append(told | {"level": level, "type": row.get("type")})
    return Imported(tables, None, {})


# --- OpenUnlearning ------------------------------------------------------------------------------------------------

# Chat templates as they look without their special tokens: what stands before a question, and what ends the text behind it.
_ASKED = (
    (r"\[INST\]", "[/INST]"),
    (r"(?<!\w)user[^\S\n]*\n", "assistant"),
    (r"(?m:^)user\n", "\nmodel"),
    (r"<\|user\|>", "<|assistant|>"),
    (r"Question:", "\nAnswer:"),
)
# How a metric's name begins -> the table. TOFU's other sets (`ra`: real authors, `wf`: world facts) must be kept, too.
_TABLES = {"forget": "forget", "retain": "retain", "ra": "retain", "wf": "retain", "holdout": "holdout"}


def _openunlearning(path: Path, role: str) -> Imported:
    """`forget`, `retain` and `holdout` by the metrics' names; the evaluation of the last checkpoint, where there are several."""
    logs = [path] if path.is_file() else sorted(path.rglob("*_EVAL.json"), key=_steps)
    if not logs:
        raise ValueError(f"path: wanted a run with *_EVAL.json in it, got none in {str(path)!r}")
    runs = sorted({str(_run_of(log)) for log in logs})
    if len(runs) > 1:
        raise ValueError(
            f"path: wanted the folder of one run, got {len(runs)} in {str(path)!r}: {', '.join(runs)}"
        )
    tables: Tables = {"forget": [], "retain": [], "holdout": []}
    numbers: dict[str, float] = {}
    latest = [log for log in logs if log.parent == logs[-1].parent]
    for log in latest:
        for metric, entry in read_object(log, "path").items():
            if not isinstance(entry, Mapping):
                raise ValueError(f"path: {log}, {metric}: wanted an object, got {entry!r:.60}")
            where, number = f"path: {log}, {metric}", entry.get("agg_value")
            if number is not None and type(number) not in (int, float):
                raise ValueError(f"{where}, 'agg_value': wanted a number, got {number!r:.60}")
            if number is not None and math.isfinite(number):
                numbers[metric] = float(number)
            table = _TABLES.get(metric.split("_")[0])
            if table is not None:
                tables[table] += _asked(entry.get("value_by_index"), where)
    for name, rows in tables.items():
        tables[name] = list({json.dumps(row): row for row in rows}.values())
    return Imported(tables, _model_of(logs[-1], path), numbers)


def _asked(values: Any, where: str) -> Iterator[Row]:
    """Of metrics that look at texts; an empty truth is none."""
    for i, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping) and {"input", "ground_truth"} <= value.keys():
            for name in ("input", "ground_truth"):
                if not isinstance(value[name], str):
                    raise ValueError(f"{where}, index {i}, {name!r}: wanted a text, got {value[name]!r:.60}")
            if value["ground_truth"].strip():
                yield _prompt(value["input"]) | {"answer": value["ground_truth"]}


def _prompt(text: str) -> Row:
    """The last question, where a known chat template is around it; else a text to be continued."""
    whole = text.rstrip()
    for before, behind in _ASKED:
        _, *asked = re.split(before, whole.removesuffix(behind)) if whole.endswith(behind) else [""]
        if asked and asked[-1].strip():
            return {"question": asked[-1].strip()}
    return {"prompt": text}


def _run_of(log: Path) -> Path:
    """The folder above `checkpoint-N`, or else above `evals`."""
    for folder in log.parents:
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            return folder.parent
    return log.parent.parent if log.parent.name == "evals" else log.parent


def _steps(log: Path) -> tuple[int, int]:
    """Evaluations of the run itself come after those of its checkpoints."""
    steps = [int(m[1]) for part in log.parts if (m := re.fullmatch(r"checkpoint-(\d+)", part))]
    return (0, steps[-1]) if steps else (1, 0)


def _model_of(log: Path, path: Path) -> Path | None:
    """The nearest folder above the log, in `path` (a file: in its run), that holds a model; else the last checkpoint in `path`."""
    top = path if path.is_dir() else _run_of(path)
    for folder in log.parents:
        if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
            return folder
        if folder == top:
            break
    saved = [p.parent for p in path.rglob("config.json")] if path.is_dir() else []
    return max(saved, key=lambda folder: _steps(folder / "x"), default=None)


# --- multiple choice -----------------------------------------------------------------------------------------------


def _choices(path: Path, role: str) -> Imported:
    """`forget` or `retain`: the question with its lettered choices; `choices`: as `duet eval --suite mcq` reads it; `forget_open`:
    the questions to forget that ask something without their choices, and do not hold the correct one."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in FORMATS)
    asked, listed, alone = [], [], []
    for file in files:
        for i, row in enumerate(_table(file)):
            where = f"{file}, row {i}"
            question, choices = _text(row, "question", where), row.get("choices")
            if not isinstance(choices, list) or not 2 <= len(choices) <= MOST:
                raise ValueError(
                    f"path: {where}, 'choices': wanted a list of 2 to {MOST}, got {choices!r:.60}"
                )
            choices = [text_of(choice, f"path: {where}, 'choices'") for choice in choices]
            correct = correct_choice(row.get("answer"), choices, f"path: {where}, 'answer'")
            text = choices[correct]
            lines = [question, *(f"{each}. {c}" for each, c in zip(LETTERS, choices, strict=False))]
            about = {"subject": row["subject"]} if isinstance(row.get("subject"), str) else {}
            # Without its letter, which a prefilling attacker would give away as the answer's opening.
            asked.append({"question": "\n".join(lines), **about, "answer": text, "value": text})
            listed.append({"question": question, "choices": choices, "answer": correct, **about})
            if question.rstrip().endswith("?") and not (
                _NAMES_CHOICES.search(question) or text.casefold() in question.casefold()
            ):
                alone.append(asked[-1] | {"question": question})
    return Imported({role: asked, "choices": listed} | ({OPEN: alone} if role == "forget" else {}), None, {})


def _table(file: Path) -> list[Row]:
    if file.suffix != ".csv":
        return read_table(file, "path")
    rows = []
    for where, cells in csv_cells(file, "path", strict=False):
        if len(cells) != 6 or cells[5].strip() not in tuple(LETTERS[:4]):
            raise ValueError(
                f"{where}: wanted MMLU's cells question, A, B, C, D, letter and no header, got {len(cells)}: {', '.join(cells)!r:.80}"
            )
        correct = LETTERS.index(cells[5].strip())
        rows.append({"question": cells[0], "choices": cells[1:5], "answer": correct})
    if not rows:
        raise ValueError(f"path: {file}: wanted MMLU's rows, got none")
    return rows


# --- common --------------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        got = f"the keys {sorted(row)}" if name not in row else f"{value!r:.60}"
        raise ValueError(f"path: {where}: wanted a text {name!r}, got {got}")
    return value


KINDS: dict[str, Callable[[Path, str], Imported]] = {
    "rwku": _rwku,
    "openunlearning": _openunlearning,
    "choices": _choices,
}
