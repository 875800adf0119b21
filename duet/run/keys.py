"""The keys of a run's YAML file for `duet train --help`: each with its default and what is said about it.

Shown are the docstring's first sentences, up to the one after which every choice, and None, has been named.

They are read from the source of the dataclasses. Importing these would import torch and transformers, which takes seconds.
"""

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Collection, Container
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_DUET = _HERE.parent
_TRANSFORMERS = "TrainingArguments"
_OF_ADAPTER = {
    "r": "rank of the LoRA",
    "lora_alpha": "its output is multiplied by lora_alpha / r",
    "target_modules": "names of the layers that get one, or all-linear",
    "task_type": "what peft takes the model for",
}


def groups() -> dict[str, dict[str, tuple[str, str]]]:
    """Title of a group -> key -> (default, what it is); of transformers' options the keys alone."""
    adapter = ast.literal_eval(_found(_HERE / "config_file.py", "DEFAULT_ADAPTER")[1])
    found = {
        "model: which one, in which precision": _rows(_HERE / "config_file.py", "ModelSection", "model."),
        "data.forget, data.retain, data.eval.NAME: where rows come from": _rows(
            _DUET / "data" / "sources.py", "DataSource", "data.forget."
        ),
        "adapter: fields of peft.LoraConfig; without one every weight is trained": {
            f"adapter.{name}": (str(value), _OF_ADAPTER[name]) for name, value in adapter.items()
        },
        "other": {
            "teacher": ("None", "another model; None: the model itself"),
            "merge": ("False", "whether the adapter is also merged and saved"),
        },
    }
    classes = _with_bases(_DUET / "config.py", "DuetConfig")
    theirs = _fields(_found(classes.pop(_TRANSFORMERS), _TRANSFORMERS)[1])
    inherited: dict[str, tuple[str, str]] = dict.fromkeys(theirs, ("", ""))
    for name, path in classes.items():
        doc = ast.get_docstring(_found(path, name)[1]) or ""
        title = "the run" if name == "DuetConfig" else _summary(doc)
        found[f"training: {title}"] = _rows(path, name, without=inherited)
    objectives = _found(_DUET / "methods" / "objectives" / "__init__.py", "OBJECTIVES")[1]
    default, about = found["training: the run"]["objective"]
    names = ", ".join(ast.literal_eval(key) for key in objectives.keys)
    found["training: the run"]["objective"] = default, f"{about}: {names}"
    return found | {f"training: of transformers.{_TRANSFORMERS}": inherited}


def arguments_in(doc: str) -> dict[str, str]:
    r"""What the part `Args:` or `Attributes:` of a docstring says about each name.

    Example:
        >>> arguments_in("Adds.\n\nArgs:\n    a, b: two\n        numbers.\n")
        {'a': 'two numbers.', 'b': 'two numbers.'}
    """
    part = re.search(r"^(?:Args|Attributes):\n(.*?)(?:^\S|\Z)", inspect.cleandoc(doc), re.S | re.M)
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*?)(?=^ {4}\w|\Z)", part[1] if part else "", re.S | re.M)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


@functools.cache
def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def _found(path: Path, name: str) -> tuple[Path, Any]:
    """The class `name`, or the value assigned to it, and the file where it stands: this one, or one that it is imported from."""
    for node in _statements(path):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return path, node.value
        if isinstance(node, ast.AnnAssign) and name == ast.unparse(node.target):
            return path, node.value
        if isinstance(node, ast.ImportFrom) and name in (each.name for each in node.names):
            if name == _TRANSFORMERS:
                spec: Any = importlib.util.find_spec("transformers")  # looks for it and does not import it
                return _found(Path(spec.origin).with_name("training_args.py"), name)
            module = path.parents[node.level - 1].joinpath(*str(node.module).split("."))
            return _found(module.with_suffix(".py"), name)
    raise LookupError(f"{path}: there is no {name}")


def _fields(node: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    """The fields of a dataclass."""
    lines = ((ast.unparse(line.target), line) for line in node.body if isinstance(line, ast.AnnAssign))
    return {name: line for name, line in lines if not name.startswith("_")}


def _with_bases(path: Path, name: str) -> dict[str, Path]:
    """A class and all that it inherits from, and the files where they stand."""
    path, node = _found(path, name)
    found = {name: path}
    for base in node.bases:
        found |= _with_bases(path, ast.unparse(base))
    return found


def _rows(
    path: Path, name: str, before: str = "", without: Container[str] = ()
) -> dict[str, tuple[str, str]]:
    node = _found(path, name)[1]
    texts = arguments_in(ast.get_docstring(node) or "")
    found = {}
    for field, line in _fields(node).items():
        if field not in without:
            default, text = _default(path, line.value), texts.get(field, "")
            wanted = [*_choices(line.annotation), *(["None"] if default == "None" and "None" in text else [])]
            found[before + field] = default, _summary(text, wanted)
    return found


def _choices(hint: ast.expr) -> list[str]:
    """The texts of a `Literal[...]` in an annotation."""
    literal = re.search(r"Literal\[(.*?)\]", ast.unparse(hint))
    return re.findall(r"'(.*?)'", literal[1]) if literal else []


def _default(path: Path, value: ast.expr | None) -> str:
    """The default of a field in words; a name stands for a constant."""
    if value is None:
        return "wanted"
    if isinstance(value, ast.Call):  # field(default_factory=...)
        return "{}" if ast.unparse(value.keywords[0].value) == "dict" else "a list"
    if isinstance(value, ast.Name):
        value = _found(path, value.id)[1]
    return str(ast.literal_eval(value)).replace("\n", "\\n")  # pyright: ignore[reportArgumentType]


def _summary(text: str, wanted: Collection[str] = ()) -> str:
    """Up to the first full stop or semicolon outside brackets before which every wanted word was said.

    Example:
        >>> _summary("`a`: one; more words. `b`: two. Three.", ["a", "b"])
        'a: one; more words. b: two'
    """
    text, depth = re.sub(r"`|\*\*", "", text).replace("\n", " "), 0
    for i, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        ends = sign in ".;" and depth == 0 and text[i + 1 : i + 2] in ("", " ")
        if ends and all(re.search(rf"\b{word}\b", text[:i]) for word in wanted):
            return text[:i]
    return text
