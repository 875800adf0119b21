"""`duet schema` takes what a run takes and refuses what it refuses; `duet train --help` lists every key."""

import dataclasses
import doctest
import importlib
import json
import math
import pathlib
import re
import subprocess
import sys
import typing
from collections import Counter

import pytest
import typer
from transformers import TrainingArguments
from typer.testing import CliRunner

from duet import options
from duet.cli import app
from duet.config import DuetConfig
from duet.data import importers
from duet.data.sources import DataSource
from duet.evaluation import models
from duet.evaluation.attacks.attacks import ATTACKS
from duet.evaluation.fact_sources import SOURCES
from duet.evaluation.suites.suite import SUITES
from duet.methods.objectives import OBJECTIVES
from duet.run.config_file import DEFAULT_ADAPTER, ModelSection, RunConfig
from duet.run.keys import groups
from duet.run.schema import described, of_dataclass, of_hint, schema
from duet.run.steer import PLACES
from duet.store import read
from duet.yaml_text import parse_yaml, read_yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = schema()

IS_OF = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
}
HOLDS = {
    "minimum": lambda v, limit: v >= limit,
    "maximum": lambda v, limit: v <= limit,
    "exclusiveMinimum": lambda v, limit: v > limit,
    "exclusiveMaximum": lambda v, limit: v < limit,
}


def faults(value, rule, where=""):
    """What a JSON schema validator would complain about, for the words of JSON schema that `duet schema` uses."""
    if "$ref" in rule:
        rule = SCHEMA["$defs"][rule["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in rule:
        each = [faults(value, one, where) for one in rule["anyOf"]]
        return (
            [] if [] in each else max(each, key=lambda one: len(one[0].split(":")[0]))
        )  # the one that fits longest
    if "enum" in rule and value not in rule["enum"]:
        return [f"{where}: {value!r} is none of {rule['enum']}"]
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(IS_OF[kind](value) for kind in kinds):
        return [f"{where}: {value!r} is no {kinds}"]
    found = []
    if isinstance(value, dict):
        known, others = rule.get("properties", {}), rule.get("additionalProperties", True)
        for name, each in value.items():
            if name in known or isinstance(others, dict):
                found += faults(each, known.get(name, others), f"{where}.{name}")
            elif not others:
                found.append(f"{where}.{name}: unknown")
        found += [f"{where}.{name}: wanted" for name in rule.get("required", ()) if name not in value]
    elif isinstance(value, list):
        found += [fault for each in value for fault in faults(each, rule.get("items", {}), where)]
        found += [f"{where}: too short"] if len(value) < rule.get("minItems", 0) else []
    elif isinstance(value, str):
        found += [f"{where}: empty"] if len(value) < rule.get("minLength", 0) else []
    elif value is not None:
        found += [
            f"{where}: {value!r}, {word}"
            for word in HOLDS
            if word in rule and not HOLDS[word](value, rule[word])
        ]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_fits(path):
    assert faults(read_yaml(path), SCHEMA) == []


GOOD = "model: a\ndata: {forget: a.jsonl}\ntraining: {k: 8, learning_rate: 1e-4, lr_scheduler_type: cosine}\n"


@pytest.mark.parametrize(
    "text, where",
    [
        ("modle: a", ".modle"),
        ("model: {nam: a}", ".nam"),
        ("model: {name: a, dtype: float8}", "dtype"),
        ("model: {name: a, quantization: int4}", "quantization"),
        ("data: {forget: {path: a, limit: 0}}", "limit"),
        ("data: {forget: {path: a, columns: {questoin: b}}}", "questoin"),
        ("data: {forget: {path: a, columns: null}}", "columns"),
        ("data: {eval: {forget: 3}}", "forget"),
        ("training: {kk: 8}", ".kk"),
        ("training: {k: 0}", ".k"),
        ("training: {k: 8.5}", ".k"),
        ("training: {k: true}", ".k"),
        ("training: {beta: 1}", ".beta"),
        ("training: {shred_percent: 101}", "shred_percent"),
        ("training: {delta: 0}", ".delta"),
        ("training: {objective: dueet}", "objective"),
        ("training: {steering_prefixes: []}", "steering_prefixes"),
        ("training: {positions: all}", "positions"),
        ("training: {max_steps: many}", "max_steps"),
        ("adapter: {rr: 8}", ".rr"),
        ("merge: yess", "merge"),
        ("teacher: 3", "teacher"),
    ],
)
def test_a_wrong_file_is_refused(text, where):
    assert faults(parse_yaml(GOOD), SCHEMA) == [] and RunConfig.of(parse_yaml(GOOD)).training.k == 8
    found = faults(parse_yaml(GOOD) | parse_yaml(text), SCHEMA)
    assert found and where in found[0]
    with pytest.raises(ValueError):
        RunConfig.of(parse_yaml(GOOD) | parse_yaml(text))


def test_the_examples_of_its_docstrings():
    for name in ("schema", "keys"):
        ran = doctest.testmod(importlib.import_module(f"duet.run.{name}"))
        assert ran.attempted and not ran.failed


def test_every_key_is_there():
    keys = SCHEMA["properties"]["training"]["properties"]
    assert keys.keys() >= {f.name for f in dataclasses.fields(DuetConfig) if f.init}
    assert keys["objective"]["enum"] == list(OBJECTIVES)
    assert keys["positions"] == {
        "enum": ["first", "first_n", "answer", "text", None],
        "default": None,
        "description": described(DuetConfig)["positions"],
    }
    assert "cosine" in keys["lr_scheduler_type"]["examples"]


NUMBERS = (-math.inf, -1, -1e-9, 0, 1e-9, 0.5, 1, 1 + 1e-9, 2, 99.9, 100, 101, math.inf)
KINDS = {
    name: kind
    for name, kind in vars(options).items()
    if any(isinstance(one, options.Wanted) for one in getattr(kind, "__metadata__", ()))
}


IN_WORDS = {
    "Number": "a finite number",
    "Positive": "a number > 0",
    "NotNegative": "a number >= 0",
    "MaybePositive": "a number > 0 or None",
    "MaybeClip": "a number >= 0 or None",
    "Share": "a number in [0, 1]",
    "InnerShare": "a number in (0, 1)",
    "UpperShare": "a number in (0, 1]",
    "Percent": "a number in (0, 100]",
    "Count": "an integer >= 1",
    "MaybeCount": "an integer >= 1 or None",
    "MaybeIndex": "an integer >= 0 or None",
}


@pytest.mark.parametrize("name", KINDS)
def test_bounds_are_those_of_the_kind(name):
    """The words that an error says, the bounds of the schema and the check itself agree."""
    kind = KINDS[name]
    rule, whole = of_hint(kind), int in typing.get_args(typing.get_args(kind)[0]) + typing.get_args(kind)
    with pytest.raises(ValueError, match="got True"):  # which Python takes for 1
        options.fitted("x", True, kind)
    assert kind.__metadata__[0].words == IN_WORDS[name]
    assert ("Maybe" in name) == kind.__metadata__[0].holds(None)
    for number in NUMBERS:
        number = int(number) if whole and math.isfinite(number) and number == int(number) else number
        if math.isfinite(number) and (isinstance(number, int) or not whole):
            try:
                options.fitted("x", number, kind)
                taken = True
            except ValueError:
                taken = False
            assert (faults(number, rule) == []) == taken, number


def test_help_lists_every_key_once():
    """What it reads from the source is what the dataclasses say."""
    listed = [(key, shown) for keys in groups().values() for key, shown in keys.items()]
    shown = dict(listed)
    kinds = {"": DuetConfig, "model.": ModelSection, "data.forget.": DataSource}
    rules = {before: of_dataclass(kind)["properties"] for before, kind in kinds.items()}
    written = {f"{before}{key}": rule for before in rules for key, rule in rules[before].items()}
    others = {"teacher", "merge", *(f"adapter.{name}" for name in DEFAULT_ADAPTER)}
    assert len(listed) == len(shown) and shown.keys() == written.keys() | others
    for key in written.keys() - {f.name for f in dataclasses.fields(TrainingArguments)}:
        default, about = shown[key]
        value = written[key].get("default", "wanted")
        assert default == ("a list" if isinstance(value, list) else str(value).replace("\n", "\\n")), key
        assert about and len(about) < 400, key
        whole = re.sub(r"`|\*\*", "", written[key]["description"])
        assert whole.startswith(about.partition(": duet,")[0]), key
        closed = OBJECTIVES if key == "objective" else filter(None, written[key].get("enum", ()))
        assert [word for word in closed if not re.search(rf"\b{word}\b", about)] == [], key
        assert "None" in about or default != "None" or "None" not in whole, key


def test_a_choice_is_not_lost_behind_the_first_sentence():
    about = {key: about for keys in groups().values() for key, (_, about) in keys.items()}
    assert "contrast" in about["adapter_directions"] and "keep" in about["earlier_adapter"]
    assert about["rmu_layer"].endswith("None: a quarter of the way up")


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_no_two_options_have_one_text(command):
    texts = {name: parameter.help for parameter in COMMANDS[command].params for name in parameter.opts[:1]}
    if command == "train":
        theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
        listed = {key: about for keys in groups().values() for key, (_, about) in keys.items()}
        texts |= {key: about for key, about in listed.items() if key not in theirs}
    assert all(texts.values())
    assert [text for text, count in Counter(texts.values()).items() if count > 1] == []


@pytest.mark.parametrize(
    "command, option, names",
    [
        ("attack", "attacks", ATTACKS),
        ("eval", "suite", [path.stem for path in SUITES.glob("*.yaml")]),
        ("eval", "steering_place", PLACES),
        ("eval", "dtype", models.DTYPES),
        ("cache", "dtype", read.DTYPES),
        ("elicit", "source", SOURCES),
        ("import", "kind", importers.KINDS),
        ("import", "role", ["forget", "retain"]),
        ("steer", "places", PLACES),
    ],
)
def test_closed_choices_are_named(command, option, names):
    text = next(parameter.help for parameter in COMMANDS[command].params if parameter.name == option)
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def test_no_help_imports_torch():
    """It takes a second then, not many."""
    code = """
import sys, typer
from typer.testing import CliRunner
from duet.cli import app
for name in ("", *typer.main.get_command(app).commands):
    shown = CliRunner().invoke(app, [name, "--help"] if name else ["--help"])
    heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
    assert shown.exit_code == 0 and "Options" in shown.output and not heavy, (name, heavy, shown.output)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_commands():
    run = CliRunner().invoke
    shown = run(app, ["train", "--help"], catch_exceptions=False, env={"COLUMNS": "200"}).output
    assert "--config" in shown and "training: Options of duet_deep" in shown and "--model.dtype" in shown
    assert json.loads(run(app, ["schema"], catch_exceptions=False).output) == json.loads(json.dumps(SCHEMA))
    assert "--install-completion" in run(app, ["--help"]).output


def test_completion_in_a_shell(monkeypatch):
    """What bash asks when somebody types `duet tr<TAB>`."""
    environment = {"_DUET_COMPLETE": "complete_bash", "COMP_WORDS": "duet tr", "COMP_CWORD": "1"}
    asked = CliRunner().invoke(app, [], prog_name="duet", env=environment)
    assert asked.output.split() == ["train"]
