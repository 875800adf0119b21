"""YAML text -> plain values: `1e-4` is a number, `no` is a text, and a repeated key is an error.

Only texts, numbers, booleans, nulls, lists and mappings are made; no object is ever constructed.
"""

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML's safe subset with the numbers and booleans of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$"
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


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or a key is repeated.

    Example:
        >>> parse_yaml("{rate: 1e-4, chat: no}")
        {'rate': 0.0001, 'chat': 'no'}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
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
