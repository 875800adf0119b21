"""YAML text <-> plain values: `1e-4` is a number, `no` is a text, and a repeated key is an error.

Only texts, numbers, booleans, nulls, lists and mappings are made; no object is ever constructed. What `*aliases` repeat is bounded.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

_PLAIN = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "int", "float", "seq", "map"))


_MOST = 1_000_000  # values and characters of a text with anchors, its aliases written out


class _Loader(yaml.SafeLoader):
    """YAML's safe subset with the numbers and booleans of YAML 1.2: a date, `1:30` and `1_000` are texts."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.sizes: dict[yaml.Node, float] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """`SafeLoader.compose_node`; refuses aliases that hold themselves, or that stand for more than anybody can walk through."""
        alias, line = self.check_event(yaml.AliasEvent), self.peek_event().start_mark.line + 1
        node: Any = super().compose_node(parent, index)
        if alias:
            return node
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [each for pair in parts for each in pair]
        scalar = isinstance(node, yaml.ScalarNode)
        size = 1 + (len(parts) if scalar else sum(self.sizes.get(part, math.inf) for part in parts))
        self.sizes[node] = size
        if self.anchors and size > _MOST:
            raise ValueError(f"line {line}: its *aliases stand for more than {_MOST} values and characters")
        return node


_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in (*_PLAIN, None)
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value
    }


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    try:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    except ValueError:
        raise ValueError(f"line {node.start_mark.line + 1}: wanted an integer, got {text!r:.60}") from None


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Writes between quotes each text that a reader of YAML 1.1 or 1.2 would take for something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*_Loader.yaml_implicit_resolvers.get(first, ()), *resolvers]
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def write_yaml(value: Any) -> str:
    """The YAML text of plain values; keys keep their order.

    Example:
        >>> write_yaml({"rate": 0.5, "chat": "no", "name": "1e5"}).splitlines()
        ['rate: 0.5', "chat: 'no'", "name: '1e5'"]
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, a key is repeated, or its aliases repeat too much.

    Example:
        >>> parse_yaml("{rate: 1e-4, chat: no}")
        {'rate': 0.0001, 'chat': 'no'}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (
        yaml.YAMLError,
        TypeError,
        KeyError,
        RecursionError,
    ) as error:  # a list as a key; !!bool of another text
        raise ValueError(f"not YAML: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, not YAML, or a key is repeated; naming the file.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted UTF-8 text: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
