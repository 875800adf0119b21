"""A YAML file, and what the command line changes in it -> one checked RunConfig.

    model:      which model, in which precision          (ModelSection, or just its name)
    adapter:    fields of peft.LoraConfig; null: every weight is trained
    teacher:    name of another model; null: the model itself
    data:       forget, retain, eval                     (DataSource, or just a path)
    training:   fields of DuetConfig
    merge:      whether the adapter is also merged and saved

A key that is not known is refused with the nearest name. Loads no model and no data; must not know the trainer.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DuetConfig
from ..data.sources import COLUMNS, DataSource
from ..methods.objectives import objective_of
from ..names import check_known, check_one_of, instead
from ..yaml_text import mapping, parse_yaml, read_yaml

QUANTIZATIONS = ("nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class ModelSection:
    """`model:` of a run.

    Attributes:
        name: of the model on the Hub, or its folder.
        revision: branch, tag or commit.
        dtype: `auto` (what the checkpoint says), `float32`, `bfloat16` or `float16`.
        quantization: `nf4` (4 bit, with its scales quantised too) or `int8`; the LM head keeps its precision. Needs
            bitsandbytes and an adapter.
        attn_implementation: of transformers; `auto` picks the fastest that can run here.
        tokenizer: name or folder; None: the model's own.
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    attn_implementation: str = "auto"
    tokenizer: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run, checked. `RunConfig.load(path, overrides)` reads it."""

    model: ModelSection
    forget: DataSource
    retain: DataSource | None
    eval: dict[str, DataSource]
    adapter: dict[str, Any] | None
    teacher: str | None
    merge: bool
    training: DuetConfig

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """Reads a YAML file and applies `--key value` overrides.

        Args:
            path: of the file. Paths in it are relative to the working folder, as on the command line.
            overrides: `["--learning_rate", "1e-4", "--adapter.r=8"]`. A name that is no
                top-level key is an option of DuetConfig; a dot leads into one that is a mapping
                (`--chat_template_kwargs.enable_thinking false`).

        Raises:
            OSError, ValueError: naming the file or the key, what came and what was wanted.
        """
        return cls.of(apply_overrides(read_run(path), overrides))

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "RunConfig":
        """The checked run of a tree of plain values.

        Example:
            >>> run = RunConfig.of({"model": "org/name", "data": {"forget": "a.jsonl"}, "training": {"k": 8}})
            >>> run.model.dtype, run.adapter, run.training.k
            ('auto', None, 8)
        """
        check_known("", tree, SECTIONS)
        data = _mapping("data", tree.get("data"))
        check_known("data.", data, ("forget", "retain", "eval"))
        if data.get("forget") is None:
            raise ValueError("data.forget: wanted a path, or a mapping with one, got nothing")
        model = _section(ModelSection, "model", "name", tree.get("model"))
        check_one_of("model.dtype", model.dtype, DTYPES)
        if model.quantization is not None:
            check_one_of("model.quantization", model.quantization, QUANTIZATIONS)
        adapter = tree.get("adapter")
        if adapter is not None:
            adapter = DEFAULT_ADAPTER | _adapter(_mapping("adapter", adapter))
        elif model.quantization is not None:
            raise ValueError(
                f"adapter: wanted one, because model.quantization is {model.quantization!r} and quantised weights "
                "cannot be trained; `adapter: {r: 16}` is a start"
            )
        teacher = tree.get("teacher")
        if teacher is not None and not isinstance(teacher, str):
            raise ValueError(f"teacher: wanted the name or folder of a model, got {teacher!r}")
        evals = data.get("eval")
        if evals is not None and (not isinstance(evals, Mapping) or "path" in evals):
            evals = {"forget": evals}
        merge = tree.get("merge", False)
        _typed("merge", merge, bool)
        if merge and adapter is None:
            raise ValueError("merge: wanted false, because there is no adapter to merge")
        return cls(
            model=model,
            forget=_source("data.forget", data["forget"]),
            retain=None if data.get("retain") is None else _source("data.retain", data["retain"]),
            eval={name: _source(f"data.eval.{name}", value) for name, value in (evals or {}).items()},
            adapter=adapter,
            teacher=teacher,
            merge=merge,
            training=training_options(_mapping("training", tree.get("training"))),
        )


SECTIONS = ("model", "adapter", "teacher", "data", "training", "merge")


def training_options(options: Mapping[str, Any]) -> DuetConfig:
    """A DuetConfig of plain values: unknown names and wrong types are refused before transformers sees them."""
    hints = typing.get_type_hints(DuetConfig)
    fields = [f.name for f in dataclasses.fields(DuetConfig) if f.init]
    check_known("training.", options, fields)
    given = {name: _typed(f"training.{name}", value, hints[name]) for name, value in options.items()}
    training = DuetConfig(**given)
    objective_of(training)  # refuses a name that is not there, and options that do not go with it
    return training


# -- reading ---------------------------------------------------------------------------------------------------------


def read_run(path: str | Path) -> dict[str, Any]:
    """The mapping in a run's file: plain values only, nothing is constructed."""
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: wanted a mapping with the keys {', '.join(SECTIONS)}, got {tree!r}")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with `--key value`, `--key=value` and `--switch` applied; `tree` itself is left alone.

    Example:
        >>> apply_overrides({"training": {"k": 8}}, ["--k", "64", "--adapter.r=4", "--learning-rate", "1e-4"])
        {'training': {'k': 64, 'learning_rate': 0.0001}, 'adapter': {'r': 4}}
    """
    tree = _copied(tree)
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{word!r}: wanted an option such as --learning_rate 1e-4")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"--{key}: {text!r} is not a value: {error}") from None
        _put(tree, key, value)
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    written = key.split(".")
    path = [name.replace("-", "_") for name in written]
    if path[0] not in SECTIONS:
        names = [f.name for f in dataclasses.fields(DuetConfig) if f.init]
        if path[0] not in names or (len(path) > 1 and path[0] not in DuetConfig._VALID_DICT_FIELDS):
            raise ValueError(f"--{key}: there is no such option{instead(path[0], (*names, *SECTIONS))}")
        path, written = ["training", *path], ["training", *written]
    if path[:2] == ["data", "eval"] or (
        path[0] == "training" and len(path) > 2 and path[1] in DuetConfig._VALID_DICT_FIELDS
    ):
        path[2:] = written[2:]  # names of the user's own: of a set of rows, of a template's variable
    for depth, name in enumerate(path[:-1]):
        below = tree.get(name)
        if isinstance(below, str) and (name == "model" or "data" in path[:depth]):
            below = {"name" if name == "model" else "path": below}  # the short form, made long
        tree[name] = below if isinstance(below, dict) else {}
        tree = tree[name]
    tree[path[-1]] = value


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


# -- checks ----------------------------------------------------------------------------------------------------------


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """A section, which may be left out."""
    return {} if value is None else mapping(name, value)


def _section(kind: type, name: str, short: str, value: Any) -> Any:
    """A dataclass of a mapping, or of the one text that stands for it."""
    if isinstance(value, str):
        value = {short: value}
    value = _mapping(name, value)
    hints = typing.get_type_hints(kind)
    check_known(f"{name}.", value, hints)
    if value.get(short) is None:
        raise ValueError(f"{name}.{short}: wanted a text, got nothing")
    return kind(**{key: _typed(f"{name}.{key}", each, hints[key]) for key, each in value.items()})


def _source(name: str, value: Any) -> DataSource:
    source = _section(DataSource, name, "path", value)
    check_known(f"{name}.columns.", source.columns, COLUMNS)
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"{name}.limit: wanted an integer >= 1, got {source.limit}")
    return source


def _adapter(options: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    check_known("adapter.", options, [f.name for f in dataclasses.fields(LoraConfig) if f.init])
    return options


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it fits a hint made of plain types; an integer does for a float. Other hints check themselves."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(k) or k for k in (typing.get_args(hint) if union else (hint,))]
    plain = (bool, int, float, str, list, dict, type(None))
    if not all(kind in plain for kind in kinds):
        return value
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if list in kinds and isinstance(value, str):
        return [value]
    if name == "training.fsdp":  # transformers takes `true` too, and does not say so
        return value
    wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name}: wanted {wanted}, got {value!r}")
