"""The keys of a run's YAML file, from the dataclasses that read it, as a JSON schema for editors.

Types, choices and bounds are those of the fields, descriptions those of the docstrings.
"""

import dataclasses
import enum
import math
import typing
from typing import Any

from transformers import TrainingArguments

from ..config import DuetConfig
from ..data.sources import COLUMNS, DataSource
from ..methods.objectives import OBJECTIVES
from ..options import ListOf, Wanted, choices_of, parts_of
from .config_file import DEFAULT_ADAPTER, ModelSection
from .keys import arguments_in

_JSON_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
_TEXT = {"type": "string"}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the YAML file of `duet train`, `duet cache` and `duet plan`.

    It refuses unknown keys, wrong types, unknown choices and numbers out of range. It may take what a run refuses: what
    goes with what (`normalization` with `duet`, say) is checked by `RunConfig`.

    Example:
        >>> keys = schema()["properties"]["training"]["properties"]
        >>> keys["k"]["type"], keys["k"]["minimum"], keys["reverse_prompt_role"]["enum"]
        ('integer', 1, ['user', 'system', 'both'])
    """
    training = of_dataclass(DuetConfig)
    training["properties"]["objective"] = {"enum": list(OBJECTIVES)} | _said(DuetConfig, "objective")
    training["properties"]["fsdp"] = {}  # `true` and texts: transformers takes both
    source = _short_or(DataSource, "a file, a folder that `datasets` wrote, or a dataset on the Hub")
    source["anyOf"][1]["properties"]["columns"] = {
        "type": "object",
        "properties": dict.fromkeys(COLUMNS, _TEXT),
        "additionalProperties": False,
    } | _said(DataSource, "columns")
    reference = {"$ref": "#/$defs/source"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a run of duet",
        "type": "object",
        "properties": {
            "model": _short_or(ModelSection, "name or folder of a model"),
            "adapter": _adapter(),
            "teacher": {"type": ["string", "null"], "description": "another model; null: the model itself"},
            "data": {
                "type": "object",
                "properties": {
                    "forget": reference,
                    "retain": {"anyOf": [reference, {"type": "null"}]},
                    "eval": {
                        "anyOf": [
                            reference,
                            {"type": "object", "additionalProperties": reference},
                            {"type": "null"},
                        ]
                    },
                },
                "additionalProperties": False,
            },
            "training": training,
            "merge": {"type": "boolean", "description": "whether the adapter is also merged and saved"},
        },
        "additionalProperties": False,
        "$defs": {"source": source},
    }


def described(kind: type) -> dict[str, str]:
    """field -> what the docstrings of a dataclass and of those that it inherits from say about it."""
    texts = {f.name: str(f.metadata["help"]) for f in dataclasses.fields(kind) if "help" in f.metadata}
    for each in reversed(kind.__mro__[:-1]):
        if each is not TrainingArguments:
            texts |= arguments_in(vars(each).get("__doc__") or "")
    return texts


# -- a dataclass as a schema -----------------------------------------------------------------------------------------


def of_dataclass(kind: Any) -> dict[str, Any]:
    """An object with the fields of a dataclass, and no others."""
    hints, texts = typing.get_type_hints(kind, include_extras=True), described(kind)
    fields = [f for f in dataclasses.fields(kind) if f.init]
    properties = {}
    for f in fields:
        properties[f.name] = of_hint(hints[f.name]) | _default(f)
        if f.name in texts:
            properties[f.name]["description"] = texts[f.name]
    needed = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    required = {"required": needed} if needed else {}
    return {"type": "object", "properties": properties, **required, "additionalProperties": False}


def of_hint(hint: Any) -> dict[str, Any]:
    """What `duet.options.fitted` takes for this type hint; `{}` (anything) where it looks at nothing.

    Example:
        >>> from duet.options import Share
        >>> of_hint(Share)
        {'type': 'number', 'minimum': 0, 'maximum': 1}
    """
    kinds: tuple[Any, ...] = getattr(hint, "__metadata__", ())
    for kind in kinds:
        if isinstance(kind, ListOf):
            text = _TEXT if kind.blank else _TEXT | {"minLength": 1}
            return {"anyOf": [text, {"type": "array", "items": text, "minItems": kind.least}]}
    plain = typing.get_args(hint)[0] if kinds else hint
    members = parts_of(plain)
    if choices := choices_of(plain):
        return {"enum": [*choices, None] if type(None) in members else choices}
    parts = [typing.get_origin(each) or each for each in members]
    enums: list[Any] = [part for part in parts if isinstance(part, enum.EnumType)]
    named = [member.value for each in enums for member in each]
    if named:
        return {"type": "string", "examples": named}
    if not all(part in _JSON_TYPES for part in parts):
        return {}
    names = sorted(_JSON_TYPES[part] for part in parts)  # the order in a Union is not kept by typing
    if "array" in names and "string" not in names:
        names.append("string")  # a lone text is a list of one
    limits = [_bounds(kind) for kind in kinds if isinstance(kind, Wanted)]
    return {"type": names[0] if len(names) == 1 else names} | (limits[0] if limits else {})


def _bounds(kind: Wanted) -> dict[str, float]:
    low, high = kind.edges
    both = {
        "minimum" if low == "[" else "exclusiveMinimum": kind.low,
        "maximum" if high == "]" else "exclusiveMaximum": kind.high,
    }
    return {word: limit for word, limit in both.items() if math.isfinite(limit)}


def _default(field: dataclasses.Field) -> dict[str, Any]:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    value = value.value if isinstance(value, enum.Enum) else value
    plain = isinstance(value, (bool, int, float, str, list, dict, type(None)))
    return {"default": value} if plain else {}


def _said(kind: type, name: str) -> dict[str, str]:
    return {"description": described(kind)[name]}


def _short_or(kind: Any, about: str) -> dict[str, Any]:
    """A lone text, or the whole mapping."""
    return {"anyOf": [_TEXT | {"description": about}, of_dataclass(kind)]}


def _adapter() -> dict[str, Any]:
    from peft import LoraConfig

    lora = of_dataclass(LoraConfig)
    for name, value in lora["properties"].items():
        value.pop("default", None)
        if name in DEFAULT_ADAPTER:
            value["default"] = DEFAULT_ADAPTER[name]
    return lora | {
        "type": ["object", "null"],
        "description": "fields of peft.LoraConfig; null: all weights are trained",
    }
