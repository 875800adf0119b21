"""Who may import whom in `duet`: one table, no circle. A new room, or a new arrow, is a decision: write it down here."""

import ast
import re
from pathlib import Path

import pytest

import duet

ROOT = Path(duet.__file__).parent
HERE = "duet.__init__"

# room: the rooms that it may import
ALLOWED = {
    "names": "",
    "extras": "",
    "yaml_text": "",
    "folders": "",
    "options": "names",
    "_moved": "",
    "data": "names options _moved",
    "model": "names data",
    "methods": "names options data model",
    "config": "names options data methods",
    "store": "names extras folders config data model methods",
    "output": "extras folders model",
    "trainer": "config data model methods store output",
    "run": "names options yaml_text folders _moved config data model methods store output trainer evaluation evaluation.attacks",
    "evaluation": "names extras folders data model",
    "evaluation.suites": "names extras options yaml_text _moved data model evaluation",
    "evaluation.attacks": "names options _moved data model evaluation",
    "evaluation.report": "folders _moved data model evaluation evaluation.suites evaluation.attacks",
    "evaluation.commands": "names folders data model evaluation evaluation.suites evaluation.attacks evaluation.report",
    "demo": "names extras config data model trainer evaluation evaluation.attacks evaluation.report evaluation.commands",
    "cli": "extras data run demo evaluation evaluation.commands",
    "__init__": "_moved extras",
    "__main__": "cli",
}
ALLOWED = {room: set(others.split()) for room, others in ALLOWED.items()}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    """`duet.data.rows`, and for a package `duet.data`; the package duet itself is called `duet.__init__` here."""
    parts = ("duet", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    """The longest name of ALLOWED that the module's begins with."""
    parts = module.split(".")[1:]
    return next(room for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in ALLOWED)


def imports(path, source=None):
    """Every module of duet that a file imports: at once, in a function, or for type checking."""
    module, tree = module_of(path), ast.parse(path.read_text() if source is None else source)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = ["duet"] if module == HERE else package
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{base}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else base for name in names}
    found = {HERE if name == "duet" else name for name in found if name.split(".")[0] == "duet"}
    return found - {module}


def test_the_reader_of_imports_sees():
    """It follows relative names, and looks into functions and under TYPE_CHECKING."""
    source = """
import duet.names
from . import rows
from ..model.lm import check_head
from duet import store
def late():
    from .prompts import Prompting
if TYPE_CHECKING:
    from .. import config
"""
    seen = imports(ROOT / "data" / "dataset.py", source)
    assert seen == {
        f"duet.{name}" for name in ["names", "data.rows", "model.lm", "store", "data.prompts", "config"]
    }
    assert imports(ROOT / "data" / "__init__.py", "from .rows import Query\nfrom .. import names") == {
        "duet.data.rows",
        "duet.names",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)).replace("/", "-"))
def test_rooms_import_only_what_they_may(path):
    room = room_of(module_of(path))
    used = {room_of(name) for name in imports(path)} - {room}
    if room == "__init__":  # for type checkers it says where the public names are
        used -= {"config", "trainer", "methods"}
    assert used <= ALLOWED[room], used - ALLOWED[room]


def test_every_room_of_the_table_exists_and_uses_what_it_may():
    assert {room_of(module) for module in MODULES} == set(ALLOWED)
    used = {room: set() for room in ALLOWED}
    for module, path in MODULES.items():
        used[room_of(module)] |= {room_of(name) for name in imports(path)}
    unused = {room: allowed - used[room] for room, allowed in ALLOWED.items() if allowed - used[room]}
    assert not unused


def circle(arrows):
    """The names of a circle, or None."""
    done = set()

    def walk(name, above):
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return None
        for below in sorted(arrows.get(name, ())):
            if found := walk(below, [*above, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(arrows) if (found := walk(name, []))), None)


def test_no_circle_of_rooms_or_modules():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle(ALLOWED) is None
    arrows = {module: imports(path) for module, path in MODULES.items()}
    arrows[HERE] -= {"duet.config", "duet.trainer", "duet.methods.objectives"}
    assert circle(arrows) is None


@pytest.mark.parametrize("package", [module for module, path in MODULES.items() if path.stem == "__init__"])
def test_a_package_lists_its_modules(package):
    said = ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""
    inside = {name for parent, _, name in (module.rpartition(".") for module in MODULES) if parent == package}
    assert inside <= set(re.findall(r"\w+", said))
