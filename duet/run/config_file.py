"""A YAML file and the overrides of the command line -> a checked RunConfig.

    model:      which model, in which precision          (ModelSection, or just its name)
    adapter:    fields of peft.LoraConfig; null: every weight is trained
    teacher:    name of another model; null: the model itself
    data:       forget, retain, eval                     (DataSource, or just a path)
    training:   fields of DuetConfig
    merge:      whether the adapter is also merged and saved

A key that is not known is refused with the nearest name. Loads no model and no data.
"""

import copy
import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import DuetConfig
from ..data.sources import COLUMNS, DataSource
from ..methods.objectives import objective_of
from ..model.adapters import check_task_type
from ..model.loading import is_sharded
from ..names import check_known, instead
from ..options import Count, Share, fitted, mapping, section
from ..output.adapters import check_earlier_adapter
from ..yaml_text import parse_yaml, read_yaml

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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "int8"] | None = None
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
    def load(cls, path: str | Path, overrides: Sequence[str] = (), own: Sequence[str] = ()) -> "RunConfig":
        """Reads a YAML file and applies `--key value` overrides.

        Args:
            path: of the file. Paths in it are relative to the working folder, as on the command line.
            overrides: `["--learning_rate", "1e-4", "--adapter.r=8"]`. A name that is no
                top-level key is an option of DuetConfig; a dot leads into one that is a mapping
                (`--chat_template_kwargs.enable_thinking false`).
            own: the command's own options, for the error about an unknown one.

        Raises:
            OSError, ValueError: naming the file or the key, what came and what was wanted.
        """
        return cls.of(apply_overrides(read_run(path), overrides, own))

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "RunConfig":
        """The checked run of a tree of plain values.

        Example:
            >>> run = RunConfig.of({"model": "org/name", "data": {"forget": "a.jsonl"}, "training": {"k": 8}})
            >>> run.model.dtype, run.adapter, run.training.k
            ('auto', None, 8)
        """
        check_known("", tree, SECTIONS)
        data = mapping("data", tree.get("data"))
        check_known("data.", data, ("forget", "retain", "eval"))
        if data.get("forget") is None:
            raise ValueError("data.forget: wanted a path, or a mapping with one, got nothing")
        model = section(ModelSection, "model", tree.get("model"), "name")
        for name in ("name", "revision", "attn_implementation", "tokenizer"):
            _not_blank(f"model.{name}", getattr(model, name))
        model = replace(model, name=_expanded(model.name), tokenizer=_expanded(model.tokenizer))
        adapter = tree.get("adapter")
        if adapter is not None:
            adapter = DEFAULT_ADAPTER | _adapter(mapping("adapter", adapter))
        elif model.quantization is not None:
            raise ValueError(
                f"adapter: wanted one, because model.quantization is {model.quantization!r} and quantised weights "
                "cannot be trained; `adapter: {r: 16}` is a start"
            )
        teacher = tree.get("teacher")
        if teacher is not None and not isinstance(teacher, str):
            raise ValueError(f"teacher: wanted the name or folder of a model, got {teacher!r}")
        _not_blank("teacher", teacher)
        evals = data.get("eval")
        if evals is not None and (not isinstance(evals, Mapping) or "path" in evals):
            evals = {"forget": evals}
        merge = fitted("merge", tree.get("merge", False), bool)
        if merge and adapter is None:
            raise ValueError("merge: wanted false, because there is no adapter to merge")
        training = training_options(mapping("training", tree.get("training")))
        check_earlier_adapter(
            training.earlier_adapter, adapter is not None, is_sharded(training), "training.earlier_adapter"
        )
        return cls(
            model=model,
            forget=_source("data.forget", data["forget"]),
            retain=None if data.get("retain") is None else _source("data.retain", data["retain"]),
            eval={name: _source(f"data.eval.{name}", value) for name, value in (evals or {}).items()},
            adapter=adapter,
            teacher=_expanded(teacher),
            merge=merge,
            training=training,
        )


SECTIONS = ("model", "adapter", "teacher", "data", "training", "merge")


def training_options(options: Mapping[str, Any]) -> DuetConfig:
    """A DuetConfig of plain values; unknown names and wrong types are refused."""
    # transformers takes it, and does not say so.
    fsdp: dict[str, Any] = {"fsdp": True} if options.get("fsdp") is True else {}
    training = section(DuetConfig, "training", {k: v for k, v in options.items() if k not in fsdp}, **fsdp)
    objective_of(training)  # refuses a name that is not there, and options that do not go with it
    return training


# -- reading ---------------------------------------------------------------------------------------------------------


def read_run(path: str | Path) -> dict[str, Any]:
    """The mapping in a run's file, of plain values."""
    if Path(path).is_dir() or not Path(path).exists():
        raise FileNotFoundError(f"config: there is no file {str(path)!r}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: wanted a mapping with the keys {', '.join(SECTIONS)}, got {tree!r}")
    return tree


def apply_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], own: Sequence[str] = ()
) -> dict[str, Any]:
    """`tree` with `--key value`, `--key=value` and `--switch` applied; `tree` itself is left alone.

    An error about an unknown option knows the command's `own` ones, too.

    `--model NAME` is another model, read as the file says: dtype, quantization and tokenizer stay, the revision does not.

    Example:
        >>> apply_overrides({"training": {"k": 8}}, ["--k", "64", "--adapter.r=4", "--learning-rate", "1e-4"])
        {'training': {'k': 64, 'learning_rate': 0.0001}, 'adapter': {'r': 4}}
    """
    tree = copy.deepcopy(dict(tree))
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
            quotes = f"; a text is written between quotes: '\"{text}\"'" if text[:1] in "{[" else ""
            raise ValueError(f"--{key}: {text!r} is not a value: {error}{quotes}") from None
        if not text or (isinstance(value, str) and text.lstrip()[:1] not in "'\"|>!&"):
            value = text  # as it was typed: in YAML ` #` would begin a comment, and nothing would be null
        _put(tree, key, value, own)
    return tree


def quoted(text: str) -> str:
    """A value of `apply_overrides` that is this text, also where it looks like a number."""
    return json.dumps(text, ensure_ascii=False)


def _put(tree: Any, key: str, value: Any, own: Sequence[str]) -> None:
    written = key.split(".")
    path = [name.replace("-", "_") for name in written]
    if path[0] not in SECTIONS:
        names = [f.name for f in dataclasses.fields(DuetConfig) if f.init]
        if path[0] not in names or (len(path) > 1 and path[0] not in DuetConfig._VALID_DICT_FIELDS):
            raise ValueError(f"--{key}: there is no such option{instead(path[0], (*own, *names, *SECTIONS))}")
        path, written = ["training", *path], ["training", *written]
    if path[:2] == ["data", "eval"] or (
        path[0] == "training" and len(path) > 2 and path[1] in DuetConfig._VALID_DICT_FIELDS
    ):
        path[2:] = written[2:]  # names of the user's own: of a set of rows, of a template's variable
    if path == ["model"] and isinstance(value, str) and isinstance(tree.get("model"), dict):
        path, tree["model"] = ["model", "name"], {k: v for k, v in tree["model"].items() if k != "revision"}
    for depth, name in enumerate(path[:-1]):
        below = tree.get(name)
        if isinstance(below, str) and (name == "model" or "data" in path[:depth]):
            below = {"name" if name == "model" else "path": below}  # the short form, made long
        tree[name] = below if isinstance(below, dict) else {}
        tree = tree[name]
    tree[path[-1]] = value


# -- checks ----------------------------------------------------------------------------------------------------------


def _source(name: str, value: Any) -> DataSource:
    source = section(DataSource, name, value, "path")
    _not_blank(f"{name}.path", source.path)
    check_known(f"{name}.columns.", source.columns, COLUMNS)
    return source


def _not_blank(name: str, value: str | None) -> None:
    if value is not None and not value.strip():
        raise ValueError(f"{name}: wanted a text that is not empty, got {value!r}")


def _expanded(path: Any) -> Any:
    return path and os.path.expanduser(path)


def _adapter(options: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    check_known("adapter.", options, [f.name for f in dataclasses.fields(LoraConfig) if f.init])
    hints = typing.get_type_hints(LoraConfig) | {"r": Count, "lora_dropout": Share}
    options = {name: fitted(f"adapter.{name}", value, hints[name]) for name, value in options.items()}
    check_task_type("adapter.task_type", options.get("task_type"))
    kind = options.get("peft_type")
    if getattr(kind, "value", kind) not in (None, "LORA"):
        raise ValueError(
            f"adapter.peft_type: wanted 'LORA', because `adapter` holds fields of peft.LoraConfig, got {kind!r}; an adapter of another "
            "kind is given to DuetTrainer as peft_config"
        )
    return options
