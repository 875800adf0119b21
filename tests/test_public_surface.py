"""What the package promises: its names, its docstrings, and who may import whom."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import duet_kernels

ROOT = Path(duet_kernels.__file__).parents[1]

NAMES = [
    "LMHead",
    "LinearCrossEntropyLoss",
    "LinearDistillLoss",
    "TopK",
    "TopKDistillLoss",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_gather",
    "linear_logsumexp",
    "linear_token_stats",
    "linear_topk",
    "resolve_impl",
    "set_workspace_bytes",
    "topk_distill_loss",
    "topk_distill_stats",
]


def test_names_are_pinned():
    assert sorted(duet_kernels.__all__) == NAMES
    assert len(NAMES) <= 15
    assert all(hasattr(duet_kernels, name) for name in NAMES)


@pytest.mark.parametrize("name", ["TopKDistillLoss", "LinearDistillLoss", "LinearCrossEntropyLoss"])
def test_a_module_has_its_options_and_one_that_an_earlier_version_saved_whole_has_them_too(name):
    kind = getattr(duet_kernels, name)
    module = kind(reduction="sum")
    defaults = {option: given.default for option, given in inspect.signature(kind).parameters.items()}
    assert module.options == defaults | {"reduction": "sum"} and list(module.options) == list(defaults)
    assert "reduction='sum'" in repr(module)
    loaded = kind.__new__(kind)
    loaded.__setstate__(vars(torch.nn.Module()) | {"options": module.options})  # what torch.save wrote
    assert vars(loaded).keys() == vars(module).keys() and repr(loaded) == repr(module)


# --- docstrings (house rule 10) --------------------------------------------------------------------------------

SECTIONS = {"Args:", "Returns:", "Raises:", "Memory", "FLOP", "Source:", "Example:"}
SHORT = {
    "LMHead": {"Args:", "Raises:", "Example:"},
    "TopK": {"Attributes:"},
    "resolve_impl": {"Args:", "Returns:", "Raises:", "Example:"},
    "set_workspace_bytes": {"Args:", "Returns:", "Raises:", "Example:"},
    "TopKDistillLoss": {"`topk_distill_loss`"},
    "LinearDistillLoss": {"`linear_distill_loss`"},
    "LinearCrossEntropyLoss": {"`linear_cross_entropy`"},
}
LOSSES = ("topk_distill_loss", "linear_distill_loss", "linear_cross_entropy")


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_have_their_sections(name):
    text = inspect.getdoc(getattr(duet_kernels, name))
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith((".", "errors.")) and len(first) < 250, "one sentence first"
    missing = {section for section in SHORT.get(name, SECTIONS) if section not in text}
    assert not missing, f"{name}: no {missing}"
    if name not in SHORT:
        assert re.search(r"`[^`]*=|sum|log", text), f"{name}: no equation"
    if name in LOSSES:
        assert re.search(r"All (masked|ignored): 0 with zero gradients", text), f"{name}: the all-masked case"
    assert "TODO" not in text


@pytest.mark.parametrize("name", LOSSES)
def test_losses_say_their_denominator_and_unit(name):
    text = inspect.getdoc(getattr(duet_kernels, name))
    borrowed = inspect.getdoc(duet_kernels.topk_distill_loss) if "see `topk_distill_loss`" in text else ""
    assert re.search(r"number of (unmasked tokens|labels)", text + borrowed)
    room = inspect.getdoc(inspect.getmodule(getattr(duet_kernels, name)))
    assert "nats" in text or "nats per token" in room


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_documented(name):
    thing = getattr(duet_kernels, name)
    if inspect.isclass(thing):
        return
    text = inspect.getdoc(thing)
    shared = inspect.getdoc(duet_kernels.topk_distill_loss) if "topk_distill_loss`" in text else ""
    arguments = text.split("Args:")[1].split("Returns:")[0] + shared
    missing = [a for a in inspect.signature(thing).parameters if not re.search(rf"\b{a}\b", arguments)]
    assert not missing, f"{name}: {missing}"


@functools.cache
def _parsed(path):
    return ast.parse(path.read_text())


def test_rooms_say_what_they_are_for():
    """In their first lines."""
    trees = {path: _parsed(path) for path in ROOT.glob("duet*/**/*.py")}
    assert trees and not [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]


# --- who may import whom ---------------------------------------------------------------------------------------


class Imports(ast.NodeVisitor):
    """Absolute names of what a file imports; those inside functions apart (they are lazy)."""

    def __init__(self, package, tree):
        self.package, self.depth = package, 0
        self.at_once, self.lazy = set(), set()
        self.visit(tree)

    def _add(self, name):
        (self.lazy if self.depth else self.at_once).add(name)

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        """`if TYPE_CHECKING:` imports nothing when the program runs."""
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node):
        base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            self._add(f"{module}.{alias.name}")

    @property
    def all(self):
        return self.at_once | self.lazy


@functools.cache
def _imports(path, root=ROOT):
    parts = path.relative_to(root).with_suffix("").parts
    package = ".".join(parts[:-1])
    return Imports(package, _parsed(path))


def _within(names, room):
    return {name for name in names if name == room or name.startswith(room + ".")}


KERNEL_FILES = sorted(ROOT.glob("duet_kernels/**/*.py"))
IN_KERNELS = [path for path in KERNEL_FILES if "triton" in path.relative_to(ROOT).parts[1:-1]]
OUTSIDE = [path for path in KERNEL_FILES if path not in IN_KERNELS]


def test_the_import_visitor_sees():
    """It tells lazy from immediate, follows relative names, and skips type checking."""
    source = (
        "import x.y\nfrom . import c\nfrom ..d import e\nfrom .f.g import h as i\n"
        "if TYPE_CHECKING:\n    import hidden\n"
        "def late():\n    from .triton import k\n    import triton\n"
    )
    seen = Imports("a.b", ast.parse(source))
    assert seen.at_once == {"x.y", "a.b.c", "a.d.e", "a.b.f.g.h"}
    assert seen.lazy == {"a.b.triton.k", "triton"}


def test_only_kernels_import_triton():
    assert not [path for path in OUTSIDE if _within(_imports(path).all, "triton")]


# room of duet_kernels (a file, or a package): the rooms it may import
ALLOWED = {
    "measured": set(),
    "dispatch": {"measured"},
    "options": {"dispatch"},
    "ranks": {"dispatch"},
    "head": {"dispatch", "options", "ranks"},
    "checks": {"dispatch", "head", "options"},
    "reference": {"dispatch", "head", "options"},
    "products": {"dispatch"},
    "portable": {"dispatch", "head", "options", "products"},
    "triton": {"dispatch", "head", "measured", "options", "products"},
    "ops": {"dispatch", "head", "options", "portable", "reference", "triton"},
    "sharded": {"dispatch", "head", "ops", "options", "portable", "products", "ranks"},
    "functional": {"checks", "dispatch", "head", "ops", "options", "sharded"},
    "modules": {"dispatch", "functional", "head", "options"},
    "testing": {"functional", "head", "options"},
    "__init__": {"dispatch", "functional", "head", "modules"},
}


def _rooms(names):
    return {name.split(".")[1] for name in _within(names, "duet_kernels") if "." in name}


def test_rooms_import_only_what_they_may():
    """A new room, or a new arrow between rooms, is a decision: write it down here."""
    for path in KERNEL_FILES:
        room = path.relative_to(ROOT / "duet_kernels").parts[0].removesuffix(".py")
        assert room in ALLOWED, f"{path}: a room that nobody has placed"
        used = _rooms(_imports(path).all) - ({room} if path.stem != room else set())
        assert used <= ALLOWED[room], (path, used - ALLOWED[room])


def test_no_room_imports_in_a_circle():
    def below(room, above=()):
        assert room not in above, (*above, room)
        for next_room in ALLOWED.get(room, ()):
            below(next_room, (*above, room))

    for room in ALLOWED:
        below(room)


def test_the_kernels_are_imported_when_they_are_wanted():
    for path in OUTSIDE:
        assert not _within(_imports(path).at_once, "duet_kernels.triton"), path


def test_the_trainer_uses_public_names_only():
    """And nobody imports the command line."""
    public = {"duet_kernels", *(f"duet_kernels.{name}" for name in NAMES)}
    # A type, and what memory is planned with.
    public |= {
        f"duet_kernels.{name}" for name in ("dispatch.Impl", "dispatch.workspace_bytes", "dispatch.share_of")
    }
    for path in ROOT.glob("duet/**/*.py"):
        names = _imports(path).all
        assert not _within(names, "duet_kernels") - public, path
        if path.name not in ("cli.py", "__main__.py"):
            assert not _within(names, "duet.cli"), path
        assert not _within(names, "benchmarks") and not _within(names, "tests"), path


# Studies train models: they are users of the trainer.
BENCHMARKS = sorted(set(ROOT.glob("benchmarks/**/*.py")) - set(ROOT.glob("benchmarks/studies/**/*.py")))
# A whole training step is what it measures. It needs the harness, which the trainer may not import: so it stands here.
OF_THE_TRAINER = {"training_step.py", "step_phases.py", "step_sections.py"}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.name)
def test_benchmarks_never_import_the_trainer(path):
    """But for the one that measures it; and nobody else imports that one."""
    imports = _imports(path).all
    assert bool(_within(imports, "duet")) == (path.name in OF_THE_TRAINER)
    assert not _within(imports, "benchmarks.training_step")


def test_nobody_unpickles():
    """House rule 13."""
    pattern = re.compile(r"\bpickle\b|torch\.load\(|trust_remote_code=True")
    error = "from pickle import UnpicklingError\n"  # what others raise
    for path in ROOT.glob("duet*/**/*.py"):
        assert not pattern.search(path.read_text().replace(error, "")), path


def test_texts_are_utf8_on_every_machine():
    for path in ROOT.glob("duet/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "encoding" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"


def _python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


USE = """
import torch, duet_kernels
h = torch.randn(3, 4, requires_grad=True)
w = torch.randn(9, 4)
top = duet_kernels.linear_topk(h, w, 2)
duet_kernels.topk_distill_loss(h, w, top, divergence="mse").backward()
duet_kernels.linear_distill_loss(h, w, h.detach(), w).backward()
"""


def test_import_and_use_without_triton():
    """As on macOS, or with a CPU-only torch."""
    asked = """
try:
    duet_kernels.linear_gather(h, w, top.indices, impl="triton")
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("impl='triton' ran without triton")
"""
    done = _python("import sys; sys.modules['triton'] = None\n" + USE + asked, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_importing_is_light_and_use_needs_no_triton_that_raises(tmp_path):
    """No global state is changed; a triton that is installed but made for another platform is not imported on a CPU."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('this triton cannot be imported')")
    code = """
import sys, torch
def state():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().sum()
before = state()
import duet_kernels, duet_kernels.testing
assert state() == before
heavy = [m for m in sys.modules if m.split(".")[0] in ("triton", "transformers", "duet")]
assert not heavy, heavy
"""
    done = _python(code + USE, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
