"""Folders of results -> methods: what `duet eval`, `duet attack`, `duet train` and `duet demo` wrote, joined by model.

    eval     manifest.json, rows.jsonl, summary.json       attack   manifest.json, rows.jsonl, attacks.json
    train    trainer_state.json, perhaps steering.json     demo     results.json (several methods, no intervals)
    top-k    topk.json                                      lm-eval  lm_eval.json (lm-evaluation-harness)

Runs of one model (fingerprints of weights and tokenizer) are one method. The model that an attack was given as its base
is the base; a model that was asked behind a steering prefix, or whose chat template says one, is the steered teacher.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.sources import read_object
from ..attacks.runner import REPORT as ATTACKS
from ..attacks.runner import worst_first
from ..journal import LM_EVAL, MANIFEST, read_run
from ..steering import RECORD as STEERING
from ..suites.runner import SUMMARY
from .topk import TOPK

TRAINED, DEMO = "trainer_state.json", "results.json"
# The columns of the demo's results.json that say what an attack brings back: the lower the better.
DEMO_ATTACKS = (
    "reverse_prompt_recall",
    "reverse_prompt_heldout_recall",
    "prefill_recall",
    "relearn_recall",
    "int8_forget_recall",
    "int4_forget_recall",
)
OF_ATTACKS = "the attacks"
DEMO_PARTS = "forget", "retain", "other"
EXAMPLES = "examples of the demo"  # in the place of a suite: of the questions that its numbers are about, it keeps these
BASE, TEACHER, STUDENT = "base", "teacher", "student"
LABELS = {BASE: "base", TEACHER: "steered teacher"}


@dataclass
class Method:
    """One model, and all that is known about it.

    Attributes:
        label: in tables and figures.
        role: `base`, `teacher` (steered in context) or `student`.
        tasks: as in summary.json: task -> {"metrics": {metric: {"mean", "low", "high", "rows"}}, ...}. A name that two suites
            of the runs give is `task (suite)`; so are numbers.
        numbers: as in summary.json: name -> {"value"} or {"value": None, "undefined": why}.
        answers: (suite, task, id, question) -> {"question", "answer" (the truth), "generated", "status", "value"}.
        lm_eval: as in lm_eval.json: task -> {"metric,filter": value, "metric_stderr,filter": standard error}.
        attacks: as in attacks.json; None: it was not attacked.
        asked: task, or `the attacks` -> digest of the rows that were asked.
        training: {"steps", "losses"}: optimiser steps and the last logged values; "steering": what steering.json holds, if it
            is there; None: not given.
        folders: where this was read.
        weights, base_weights: fingerprints of the model, and of the base that an attack on it was given.
        name, dtype: of the model, as the commands were given it, and in which it was read; None: not known.
    """

    label: str
    role: str = STUDENT
    tasks: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    answers: dict[tuple, dict[str, Any]] = field(default_factory=dict)
    lm_eval: dict[str, dict[str, Any]] = field(default_factory=dict)
    attacks: Any = None
    asked: dict[str, str] = field(default_factory=dict)
    training: Any = None
    folders: list[Path] = field(default_factory=list)
    weights: str | None = None
    base_weights: str | None = None
    name: str | None = None
    dtype: str | None = None

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The attacks, the worst first, those that make nothing be told last; none where it was not attacked."""
        return worst_first(self.attacks["attacks"]) if self.attacks else []


@dataclass
class Inputs:
    """All runs: methods (base, teacher, then students in the given order), and top-k comparisons."""

    methods: list[Method]
    topk: list[dict[str, Any]]

    @property
    def students(self) -> list[Method]:
        """The students; if there are none, the base or the teacher."""
        return [m for m in self.methods if m.role == STUDENT] or self.methods


@dataclass
class _Run:
    """One folder with one kind of result."""

    kind: str
    folder: Path
    role: str | None
    content: dict[str, Any]
    label: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    all_rows: bool = True  # of a demo; False: only the row of the role that it was given as
    # Of tasks and numbers that another suite names alike.
    full: Mapping[str, str] = field(default_factory=dict)

    @property
    def suite(self) -> str:
        return self.content["suite"] if self.kind == "eval" else self.kind

    @property
    def named(self) -> Sequence[str]:
        if self.kind == "eval":
            return [*self.content["tasks"], *self.content["numbers"]]
        return DEMO_PARTS if self.kind == "demo" else ()

    def told(self, by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {self.full.get(name, name): value for name, value in by_name.items()}

    @property
    def model(self) -> tuple[Any, ...]:
        return tuple(
            self.manifest.get(f)
            for f in ("model_fingerprint", "tokenizer_fingerprint", "steering", "steering_place")
        )

    @property
    def name(self) -> str:
        return str(self.content.get("model") or "")


def read_inputs(runs: Sequence[str], base: Sequence[str] = (), teacher: Sequence[str] = ()) -> Inputs:
    """Read every folder once; `label=folder` names the method.

    Args:
        runs: folders of results, or folders with such folders in them (a training output with its evaluations).
        base, teacher: the same for the models of these roles. Other runs of these models get the role too; a demo, which
            has no fingerprints, takes the one base or teacher that is given here for its own.

    Raises:
        FileNotFoundError, ValueError: naming the argument and the folder.
    """
    folders: list[_Run] = []
    for argument, role, texts in (("base", BASE, base), ("teacher", TEACHER, teacher), ("run", None, runs)):
        for text in texts:
            for run in _read(text, argument, role):
                _add_once(folders, run)
    _tell_suites_apart(folders)
    methods = _join([run for run in folders if run.kind in ("eval", "lm_eval", "attack", "train")])
    given = [role for role, texts in ((BASE, base), (TEACHER, teacher)) if texts]
    for run in folders:
        if run.kind == "demo":
            _add_demo(methods, run, given)
    asked = next((m for m in methods if m.attacks and m.attacks.get("base")), None)
    if asked is not None:
        known = (asked.base_weights, None) if base else (asked.base_weights,)  # a demo has no fingerprints
        base_of = next((m for m in methods if m.role == BASE and m.weights in known), None)
        if base_of is None:
            base_of = Method("base", BASE, folders=asked.folders)
            methods.append(base_of)
        if base_of.attacks is None:  # the questions of the attack, asked without one
            direct = asked.attacks["base"]
            base_of.attacks = asked.attacks | {"attacks": [], "direct": direct, "base": None, "skipped": []}
            base_of.asked[OF_ATTACKS] = asked.asked.get(OF_ATTACKS, "")
    methods.sort(key=lambda m: (BASE, TEACHER, STUDENT).index(m.role))
    _tell_apart(methods)
    return Inputs(methods, [run.content for run in folders if run.kind == "topk"])


def _add_once(folders: list[_Run], run: _Run) -> None:
    """A folder that was given twice, such as among the runs and with --base, is one run."""
    for known in folders:
        if (known.kind, known.folder.resolve()) == (run.kind, run.folder.resolve()):
            known.label = known.label or run.label
            known.all_rows |= run.role is None
            return
    folders.append(run)


def _tell_suites_apart(runs: Sequence[_Run]) -> None:
    suites: dict[str, set[str]] = {}
    for run in runs:
        for name in run.named:
            suites.setdefault(name, set()).add(run.suite)
    for run in runs:
        run.full = {name: f"{name} ({run.suite})" for name in run.named if len(suites[name]) > 1}


# --- one folder ------------------------------------------------------------------------------------------------


def _read(text: str, argument: str, role: str | None) -> list[_Run]:
    label, folder = None, Path(text)
    if "=" in text and not folder.exists():
        label, _, rest = text.partition("=")
        folder = Path(rest)
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument}: there is no folder {str(folder)!r}")
    runs = _kinds(folder, argument, role)
    marks = (MANIFEST, LM_EVAL)
    inside = [c for c in sorted(folder.iterdir()) if any((c / mark).is_file() for mark in marks)]
    if label is None and runs and inside:  # a training output with its evaluations is one method
        label = folder.resolve().name
    for child in inside:
        runs += _kinds(child, argument, role)
    for run in runs:
        run.label = label
    if not runs:
        wanted = ", ".join(name for name, _ in _FILES.values())
        raise FileNotFoundError(
            f"{argument}: {folder} is no finished run: wanted one of {wanted} in it "
            "(the --out of duet eval, duet attack or duet demo, or the output_dir of duet train)"
        )
    return runs


def _kinds(folder: Path, argument: str, role: str | None) -> list[_Run]:
    runs = []
    for kind, (name, needed) in _FILES.items():
        if (folder / name).is_file():
            run = _Run(kind, folder, role, read_object(folder / name, argument), all_rows=role is None)
            if kind in ("eval", "attack"):
                of_row = ("task", "id") if kind == "eval" else ()
                run.manifest, run.rows = read_run(folder, argument, of_row)
            for key in needed:
                wanted = "wanted what this version of duet writes"
                if key not in run.content:
                    raise ValueError(f"{argument}: {folder / name} has no {key!r}; {wanted}")
                if key in _OF_OBJECTS and not _objects(run.content[key], *_OF_OBJECTS[key]):
                    got = json.dumps(run.content[key])
                    raise ValueError(f"{argument}: {folder / name} has {key!r}: {got:.80}; {wanted}")
            if kind == "train" and (folder / STEERING).is_file():
                run.content["steering"] = read_object(folder / STEERING, argument)
            if kind == "lm_eval":
                run.manifest = run.content["manifest"]
            runs.append(run)
    return runs


def _objects(value: Any, kind: type, fields: Sequence[str]) -> bool:
    """Whether it is a list or an object (its kind) of objects that have the fields."""
    if not isinstance(value, kind):
        return False
    each = list(value.values() if isinstance(value, dict) else value)
    return all(isinstance(e, dict) and e.keys() >= set(fields) for e in each) and all(
        _objects(e["metrics"], dict, ("mean", "low", "high")) for e in each if "metrics" in fields
    )


# Fields of these files that hold several objects -> in what, and what each of them has.
_OF_OBJECTS = {
    "tasks": (dict, ("metrics",)), "numbers": (dict, ("value",)), "results": (dict, ()), "log_history": (list, ()),
    "attacks": (list, ("name", "leak", "worst_variant", "variants")), "skipped": (list, ("name", "why")), "queries": (list, ()),
    "rows": (list, ("method",)), "examples": (list, ("question", "truth", "kind", "answers")),
}  # fmt: skip
# Kind of results -> its file, and what this must hold.
_FILES = {
    "eval": (SUMMARY, ("suite", "tasks", "numbers")),
    "attack": (ATTACKS, ("attacks", "direct", "skipped")),
    "lm_eval": (LM_EVAL, ("manifest", "results")),
    "train": (TRAINED, ("log_history", "global_step")),
    "demo": (DEMO, ("rows", "examples", "columns")),
    "topk": (TOPK, ("before", "after", "queries", "measure")),
}


# --- runs of one model -----------------------------------------------------------------------------------------


def _join(runs: Sequence[_Run]) -> list[Method]:
    bases = {run.manifest.get("base_fingerprint") for run in runs}
    bases |= {run.model[0] for run in runs if run.role == BASE}
    bases.discard(None)
    own = {run.model for run in runs if run.model[0] in bases and run.kind == "attack"}
    groups: list[tuple[Method, list[_Run]]] = []
    for run in runs:
        if run.role is None:
            run.role = _role(run, bases, own, runs)
        group = next((group for group in groups if _same(run, group[1])), None)
        if group is None:
            group = Method(_label(run), run.role), []
            groups.append(group)
        method, members = group
        members.append(run)
        _add(method, run)
    return [method for method, _ in groups]


def _role(run: _Run, bases: set, own: set, runs: Sequence[_Run]) -> str:
    """As another run of the model was given; the teacher is steered, or has the base's weights and a tokenizer that no student has."""
    given = [other.role for other in runs if other.role in (BASE, TEACHER) and other.model == run.model]
    compared = run.manifest.get("base_fingerprint")
    if given and run.model[0] is not None and compared in (None, run.model[0]):
        return given[0]
    if run.manifest.get("steering") is not None:
        return TEACHER
    if run.model[0] is None or run.model[0] not in bases or compared not in (None, run.model[0]):
        return STUDENT
    students = {other.model[1] for other in runs if other.model[0] not in (None, *bases)}
    return BASE if run.model in own or run.model[1] in students or not students else TEACHER


def _same(run: _Run, members: Sequence[_Run]) -> bool:
    """Whether a run is of the model of `members`: two runs that measure the same thing are of two."""
    first = members[0]
    if run.role != first.role or (run.kind, run.suite) in [(each.kind, each.suite) for each in members]:
        return False
    if run.label != first.label and None not in (run.label, first.label):
        return False
    tested = [member for member in members if member.kind != "train"]
    if run.kind != "train" and tested:
        return run.model == tested[0].model
    if run.label is not None and run.label == first.label:
        return True
    trained = {member.folder.resolve() for member in (run, *members) if member.kind == "train"}
    return all(Path(each.name).resolve() in trained for each in (run, *tested) if each.kind != "train")


def _label(run: _Run) -> str:
    if run.label is not None:
        return run.label
    if run.role in (BASE, TEACHER):
        return LABELS[run.role]
    own = "" if run.kind == "train" else Path(run.name).name
    return own or run.folder.resolve().name


def _add(method: Method, run: _Run) -> None:
    method.folders.append(run.folder)
    method.weights = run.manifest.get("model_fingerprint", method.weights)
    method.base_weights = run.manifest.get("base_fingerprint", method.base_weights)
    if "model_dtype" in run.manifest:
        method.name, method.dtype = os.path.realpath(run.name), run.manifest["model_dtype"]
    if run.kind == "eval":
        method.tasks |= run.told(run.content["tasks"])
        method.numbers |= run.told(run.content["numbers"])
        method.asked |= run.told(run.manifest.get("data", {}))
        for row in run.rows:
            if row.get("generated") is not None and row.get("question"):
                key = (run.suite, row["task"], row["id"], row["question"])
                fields = ("question", "answer", "generated", "status", "value", "fact")
                method.answers[key] = {k: row.get(k) for k in fields}
    elif run.kind == "attack":
        method.attacks = run.content
        method.asked[OF_ATTACKS] = run.manifest.get("forget", "")
    elif run.kind == "lm_eval":
        method.lm_eval |= run.content["results"]
    else:
        history = [entry for entry in run.content["log_history"] if "loss" in entry]
        last = {k: v for k, v in (history[-1] if history else {}).items() if isinstance(v, float)}
        method.training = {"steps": run.content["global_step"], "losses": last}
        if "steering" in run.content:
            method.training["steering"] = run.content["steering"]


def _tell_apart(methods: Sequence[Method]) -> None:
    """Equal labels get in addition their dtype, where this is what differs, else the name of their folder."""
    labels = [m.label for m in methods]
    alike = {label: [m for m in methods if m.label == label] for label in labels if labels.count(label) > 1}
    for label, of in alike.items():
        by_dtype = None not in (dtypes := [m.dtype for m in of]) and len(set(dtypes)) == len(of)
        for method in of:
            if by_dtype or method.folders:
                method.label = f"{label} ({method.dtype if by_dtype else method.folders[0].resolve().name})"


def in_several_dtypes(methods: Sequence[Method]) -> Iterator[list[Method]]:
    """The methods of each model that was read in several dtypes."""
    known: dict[tuple[str, str], list[Method]] = {}
    for method in methods:
        if method.name and method.dtype:
            known.setdefault((method.role, method.name), []).append(method)
    return (of for of in known.values() if len({m.dtype for m in of}) > 1)


# --- the demo --------------------------------------------------------------------------------------------------


def _add_demo(methods: list[Method], run: _Run, given: Sequence[str]) -> None:
    """Its rows, where a base or a teacher that was given is its own."""
    for method in _demo_methods(run):
        if not run.all_rows and method.role != run.role:
            continue
        same = [m for m in methods if m.role == method.role and method.role in given]
        if len(same) != 1:
            methods.append(method)
            continue
        same[0].tasks = method.tasks | same[0].tasks
        same[0].answers = method.answers | same[0].answers
        same[0].attacks = same[0].attacks or method.attacks
        same[0].folders += method.folders


def _demo_methods(run: _Run) -> list[Method]:
    """The rows of results.json in the form of a summary and an attack report, without intervals."""
    columns: Any = run.content["columns"]
    methods = []
    for row in run.content["rows"]:
        name = row["method"]
        tasks = {part: {"metrics": {}, "status": {}} for part in DEMO_PARTS}
        for column in (c for c in columns if c not in DEMO_ATTACKS):
            part, _, metric = column.partition("_")
            part, metric = (part, metric) if part in ("forget", "retain") else ("other", column)
            mean = {"mean": row[column], "low": None, "high": None, "what": columns[column]}
            tasks[part]["metrics"][metric] = mean
        entries = [_demo_attack(c, row[c], columns[c]) for c in DEMO_ATTACKS]
        entries.sort(key=lambda entry: entry["leak"], reverse=True)
        direct = _demo_attack("direct", row["forget_recall"], columns["forget_recall"])
        method = Method(
            str(LABELS.get(name, name)),
            name if name in LABELS else STUDENT,
            tasks=run.told(tasks),
            attacks={"attacks": entries, "direct": direct, "base": None, "skipped": []},
            folders=[run.folder],
        )
        for i, example in enumerate(run.content["examples"]):
            task = {"to keep": "retain"}.get(example["kind"], "forget")
            if name in example["answers"]:
                method.answers[EXAMPLES, task, i, example["question"]] = {
                    "question": example["question"],
                    "answer": example["truth"],
                    "generated": example["answers"][name],
                    "value": example["truth"],
                }
        methods.append(method)
    return methods


def _demo_attack(name: str, leak: float, what: str) -> dict[str, Any]:
    return {
        "name": name.removesuffix("_recall"), "what": what, "measure": what, "leak": leak, "worst_variant": None,
        "variants": {},
    }  # fmt: skip
