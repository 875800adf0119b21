"""`duet steer`, and what `duet train` measures before its first step: does the steered teacher forget, and what else?

    rows of a run -> plain and steered answers -> shares with intervals (duet.evaluation.steering)

A student learns what its teacher does: where the teacher tells, or refuses too much, no training helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ..data.prompts import accepts_system, check_placeholders
from ..data.sources import DataSource, load_rows
from ..evaluation.journal import Progress, write_json
from ..evaluation.steering import (
    FEW,
    FORGET,
    KINDS,
    NEIGHBOUR,
    RECORD,
    RETAIN,
    STILL_TOLD,
    WORDINGS,
    Measured,
    SteeringProbe,
    judged_rows,
    probes_of,
    sentence,
    short,
)
from ..methods.objectives import objective_of
from ..model.loading import is_sharded
from ..model.switches import evaluating
from ..names import check_one_of
from ..store.teacher import CachedTeacher
from ..trainer import DuetTrainer
from ..yaml_text import write_yaml
from .commands import load_asked, load_tokenizer, training_rows
from .config_file import RunConfig

SAMPLED = 12  # rows of each kind that are asked before a training
PLACES = ("system", "user")
OVER_REFUSED = 0.1  # of rows that must stay: more than this share is worth a word

Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Chosen:
    """What `steer` found.

    Attributes:
        tried: every steering on the validation rows, the best first.
        report: the best one on the rows of the report, which chose nothing.
    """

    tried: list[Measured]
    report: Measured

    @property
    def best(self) -> Measured:
        return self.tried[0]


def steer(
    run: RunConfig,
    wordings: Sequence[str] = (),
    places: Sequence[str] = PLACES,
    *,
    folder: Path | None = None,
    limit: int = 16,
    max_new_tokens: int = 48,
    progress: Progress = lambda what, done, total: None,
) -> Chosen:
    """Tries every wording at every place on validation rows, and measures the best on other rows.

    Args:
        run: whose model, rows and prompts are used. Nothing is trained.
        wordings: steering prefixes to try; none: those of the run and `evaluation.steering.WORDINGS`.
        places: `system`, `user`.
        folder: of `duet elicit`: its training and validation rows choose, those of the report measure. None: the rows of the
            run, every second one of each.
        limit: rows of each kind, in each half.
        max_new_tokens: of an answer.
        progress: called with (what, answers done, all of them).

    Raises:
        ValueError, OSError: naming what is wrong with rows, model or tokenizer.
    """
    if folder is None:
        validation, report = _halves(run)
    else:
        train, chosen_by, report = (_rows_of(folder / each) for each in ("", "validation", "report"))
        validation = train[0] + chosen_by[0], train[1] + chosen_by[1]
    for place in places:
        check_one_of("places", place, PLACES)
    for text in wordings:
        check_placeholders("wordings", text)
    args = run.training
    model, tokenizer = load_asked(run), load_tokenizer(run.model)

    def probing(rows: Rows) -> SteeringProbe:
        probes = probes_of(*rows, limit=limit, seed=args.seed)
        how = {
            "prompting": args.prompting,
            "batch_size": args.eval_batch_size,
            "max_new_tokens": max_new_tokens,
        }
        return SteeringProbe(model, tokenizer, probes, progress=progress, **how)

    first = probing(validation)
    texts = list(dict.fromkeys(wordings or (*args.steering_prefixes, *WORDINGS)))
    placed = possible_places(tokenizer, places, args)
    tried = _try_all(first, [(text, place) for place in placed for text in texts])
    best = tried[0]
    return Chosen(tried, probing(report).measure(best.prefixes, best.place))


def _try_all(probe: SteeringProbe, steerings: Sequence[tuple[str, str]]) -> list[Measured]:
    """Every steering on the forget rows; on the others too where it can still be the best. The best one comes first.

    A score is the worst of several shares, so that the forget rows alone say how good it can be.
    """
    forget = [probe.measure([text], place, only=(FORGET,)) for text, place in steerings]
    forget.sort(key=Measured.order, reverse=True)
    asked: list[Measured] = []
    for measured in forget:
        entry = measured.kinds[FORGET]
        bound = measured.score if entry["base_tells"] or entry["refused"] else 1.0  # they may say nothing
        if bound < max((m.score for m in asked), default=0.0):
            break
        rest = probe.measure(measured.prefixes, measured.place, only=(NEIGHBOUR, RETAIN))
        asked.append(measured.joined(rest))
    return [*sorted(asked, key=Measured.order, reverse=True), *forget[len(asked) :]]


def possible_places(tokenizer: Any, places: Sequence[str], args: Any) -> list[str]:
    """Those of the places that differ for this tokenizer.

    Raises:
        ValueError: only the system message is wanted, and the chat template shows none.
    """
    if not getattr(tokenizer, "chat_template", None):
        return list(places)[:1]  # the prefix stands before the text, whatever the place is called
    if accepts_system(tokenizer, **args.prompting.chat_template_kwargs):
        return list(places)
    if "user" not in places:
        raise ValueError("places: the tokenizer's chat template has no system role; wanted user")
    return ["user"]


def _halves(run: RunConfig) -> list[Rows]:
    """The rows of a run in two halves: of each subject every second row, so that both hold the same subjects."""
    forget, retain = map(_halved, training_rows(run))
    if not all(forget):
        raise ValueError(
            "data.forget: wanted at least two rows, one to choose a wording and one to measure it; got one"
        )
    return list(zip(forget, retain, strict=True))


def _halved(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Subjects with a single row are dealt out in turn."""
    by_subject: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_subject.setdefault(row.get("subject"), []).append(row)
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    for of in by_subject.values():
        ahead, behind = (first, second) if len(first) <= len(second) else (second, first)
        ahead += of[::2]
        behind += of[1::2]
    return first, second


def _rows_of(folder: Path) -> Rows:
    if not (folder / "forget.jsonl").is_file():
        raise FileNotFoundError(
            f"data: there is no file {str(folder / 'forget.jsonl')!r}; wanted the --out of duet elicit, with at least three "
            "wordings of a question: one to train on, one to choose by, one to report"
        )
    retain = folder / "retain.jsonl"
    kept = load_rows(DataSource(str(retain)), "retain") if retain.is_file() else []
    return load_rows(DataSource(str(folder / "forget.jsonl")), "forget"), kept


def table(chosen: Chosen) -> Table:
    """Every steering on the validation rows, the best first; then the best on the rows of the report.

    `not asked`: on the forget rows alone it was worse already than another one is on all. `+ 2 cut`: of two more rows the answer was cut
    at the token limit before it told anything; for the order these count as told, so that all steerings are compared on the same rows.
    """
    made = Table(
        title="steerings, the best first: rows (95 % interval of the share, in %)",
        box=box.SIMPLE,
        padding=(0, 1),
        pad_edge=False,
    )
    kinds = [kind for kind in KINDS if kind in chosen.report.kinds or kind in chosen.best.kinds]
    for column in ("", "forget\ntold", *(f"{kind}\nrefused" for kind in kinds)):
        made.add_column(column, no_wrap=True)

    def add(name: str, measured: Measured) -> None:
        entries = [measured.kinds.get(kind) for kind in kinds]
        refused = ["not asked" if entry is None else short(entry["refused"]) for entry in entries]
        forget = measured.kinds[FORGET]
        cut = forget["base_tells"] - (forget["told"]["rows"] if forget["told"] else 0)
        made.add_row(name, short(forget["told"]) + f" + {cut} cut" * bool(cut), *refused)

    names = wording_names(chosen)
    for measured in chosen.tried:
        add(f"{names[measured.prefixes[0]]}, {measured.place}", measured)
    made.add_section()
    add("best, report", chosen.report)
    return made


def wording_names(chosen: Chosen) -> dict[str, str]:
    """Each wording -> the letter that stands for it in the table."""
    texts = dict.fromkeys(measured.prefixes[0] for measured in chosen.tried)
    return {text: chr(ord("A") + i) if i < 26 else str(i + 1) for i, text in enumerate(texts)}


def verdict(chosen: Chosen) -> str:
    """What the chosen steering does on rows that did not choose it, and what follows."""
    best = chosen.report
    place = {"system": "as a system message", "user": "in front of the user's text"}[best.place]
    said = f"chosen: {place}, {best.prefixes[0]!r}. On other rows {sentence(best.kinds)}."
    if (judged := min(judged_rows(m.kinds[FORGET]) for m in (best, chosen.best))) < FEW:
        said += (
            f" Only {judged} forget row{'s' if judged != 1 else ''} could be judged, fewer than {FEW}: another choice of rows may give "
            "another result (more questions, --limit, --max-new-tokens)."
        )
    if best.forgets is False:
        said += " It does not forget: write other wordings (--wordings FILE), or take a method without a steered teacher."
    refused = [
        entry["refused"]["share"] for kind, entry in best.kinds.items() if kind != FORGET and entry["refused"]
    ]
    if best.forgets is not False and max(refused, default=0.0) > OVER_REFUSED:
        said += " It refuses rows that must stay: retain_prefix: none asks the teacher about them without the prefix."
    return said


def check_new(path: Path) -> None:
    """Refuses to replace a run's file, or to write where there is no folder.

    Raises:
        FileExistsError, FileNotFoundError: there is such a file, or no folder for it.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"write: there is no folder {str(path.parent)!r} for {path.name}")
    if path.exists():
        raise FileExistsError(
            f"write: {path} is there already, and its comments would be lost; wanted a new file"
        )


def write_choice(path: Path, tree: dict[str, Any], chosen: Chosen, anyway: bool = False) -> None:
    """Writes a run's YAML file with the chosen wording and place.

    Args:
        path: of a new file.
        tree: the run's mapping, which stays as it is.
        anyway: whether a steering that does not forget is written too, or one that refuses few rows of which the plain model tells none.

    Raises:
        FileExistsError: there is such a file.
        ValueError: the steering does not forget, or nothing says that it does.
    """
    check_new(path)
    refused = chosen.report.kinds[FORGET]["refused"]
    declines = refused is not None and refused["share"] > STILL_TOLD
    if not (chosen.report.forgets or (chosen.report.forgets is None and declines) or anyway):
        raise ValueError(
            f"write: {sentence(chosen.report.kinds)}, so that nothing was written; --anyway writes it"
        )
    options = {"steering_prefixes": list(chosen.best.prefixes), "steering_place": chosen.best.place}
    tree = tree | {"training": (tree.get("training") or {}) | options}
    said = f"# Chosen by duet steer of {len(chosen.tried)} steerings; on other rows {sentence(chosen.report.kinds)}.\n"
    path.write_text(said + write_yaml(tree), encoding="utf-8")


# --- before a training ---------------------------------------------------------------------------------------------


def preflight(run: RunConfig, trainer: DuetTrainer, anyway: bool = False) -> str | None:
    """Measures the teacher of a run before its first step, on a few rows, and writes `steering.json` into its folder.

    Costs two answers a row, of at most 48 tokens, to at most 12 rows of each kind.

    Args:
        run: whose rows are asked.
        trainer: of the run, before `train()`.
        anyway: whether a teacher that does not forget is accepted; the file says so.

    Returns:
        what was measured, in a sentence; None: this method imitates no steered teacher.

    Raises:
        ValueError: the teacher does not forget.
    """
    args, why = run.training, None
    path = Path(str(args.output_dir), RECORD)
    if not objective_of(args).is_steered:
        path.unlink(missing_ok=True)  # of an earlier run in this folder
        return None
    if is_sharded(args):
        why = "its parameters are sharded"
    elif isinstance(trainer.teacher, CachedTeacher) and not args.teacher_store_same_model:
        why = "it was cached, perhaps from another model"
    measured = None if why else _ask_teacher(run, trainer)
    trainer.teacher_measured = measured is not None
    forgets = measured is None or measured.forgets is not False
    said = f"the steered teacher was not measured: {why}" if measured is None else sentence(measured.kinds)
    if not forgets and not anyway:
        raise ValueError(
            f"steering_prefixes: {said}: a student forgets no more than its teacher. `duet steer` tries other wordings and "
            "places; --anyway trains with this one"
        )
    record = {
        "said": said,
        "forgets": measured.forgets if measured else None,
        "anyway": anyway and not forgets,
        "retain_prefix": args.retain_prefix,
        "measured": measured.as_dict() if measured else None,
    }
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    return said


def _ask_teacher(run: RunConfig, trainer: DuetTrainer) -> Measured:
    args = run.training
    names = "data.forget", "data.retain"
    probes = probes_of(*training_rows(run), limit=SAMPLED, seed=args.seed, names=names)
    kinds = (FORGET,) if args.retain_prefix == "none" else KINDS

    def ask(model: Any) -> Measured:
        tokenizer, size = trainer.renderer.tokenizer, args.eval_batch_size
        probe = SteeringProbe(model, tokenizer, probes, prompting=args.prompting, batch_size=size)
        return probe.measure(args.steering_prefixes, args.steering_place, only=kinds)

    if not isinstance(trainer.teacher, CachedTeacher):
        return trainer.ask_teacher(ask)
    student = trainer.accelerator.unwrap_model(trainer.model)  # before its first step it is the teacher
    with torch.no_grad(), evaluating(student):
        return ask(student)
