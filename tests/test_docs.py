"""README.md and docs/ say what is so: python blocks run, commands, files and rows are accepted, defaults and names agree.

The python blocks of a page run one after the other, as a reader would run them, on tiny models. What a page may use without
making it stands in `names`. A block that cannot run here follows a comment `<!-- not run: why -->`, and is counted.
"""

import ast
import importlib
import inspect
import json
import pathlib
import re
import shlex

import pytest
import torch
import typer
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer

from duet.cli import app
from duet.data.rows import read_rows
from duet.evaluation.attacks.attacks import ATTACKS
from duet.evaluation.suites.row_metrics import METRICS_OF_KIND
from duet.evaluation.suites.suite import read_suite
from duet.evaluation.suites.summary import NUMBERS
from duet.methods.objectives import OBJECTIVES
from duet.run.config_file import RunConfig, apply_overrides
from duet.yaml_text import parse_yaml
from duet_kernels.options import DIVERGENCES, NORMALIZATIONS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN: dict[str, int] = {"distil.md": 2}  # page -> how many of its python blocks are marked as not run
HUB_NAME = "meta-llama/Llama-3.2-3B-Instruct"  # in the tests a folder
LINKED = [
    path
    for where in ("*.md", "docs/**/*.md", "duet_kernels/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(where))
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """(the block, why it is not run or None) of a page, in order; indented ones too."""
    found = re.finditer(
        rf"(?:<!-- not run: (?P<why>.*?) -->\n+)?^(?P<indent> *)```{language}\n(?P<code>.*?)^(?P=indent)```",
        page.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return [(inspect.cleandoc(match["code"]) + "\n", match["why"]) for match in found]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a block may use: models, a tokenizer, token ids, rows; and a folder to write into."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    tiny().save_pretrained(HUB_NAME)
    tokenizer.save_pretrained(HUB_NAME)
    ids = torch.randint(3, 128, (2, 12))
    return {
        "torch": torch,
        "model": tiny(),
        "teacher": tiny(seed=1),
        "student": tiny(seed=2).train(),
        "tokenizer": tokenizer,
        "ids": ids,
        "labels": torch.where(ids % 4 == 0, -100, ids),
        "student_ids": torch.rand(2, 12, 128).topk(8).indices,
        "teacher_logprobs": torch.randn(2, 12, 128).log_softmax(-1)[..., :8],
        "forget_rows": forget_rows(),
        "retain_rows": retain_rows(),
    }


@each_page
def test_python_blocks_run(page, names):
    for number, (code, why) in enumerate(blocks(page, "python"), 1):
        if why is None:
            code = re.sub(r"\bmax_steps=\d+", "max_steps=2", code)  # so many show that it trains
            exec(compile(code, f"{page.name}, python block {number}", "exec"), names)


@each_page
def test_blocks_that_are_not_run_are_known(page):
    marked = [why for _, why in blocks(page, "python") if why is not None]
    assert len(marked) == NOT_RUN.get(page.name, 0), marked
    assert page.read_text().count("```python") == len(blocks(page, "python")), "a block was not found"


def test_a_wrong_block_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n1 / 0\n```\n<!-- not run: no network -->\n```python\nfetch()\n```\n")
    assert [why for _, why in blocks(page, "python")] == [None, "no network"]
    with pytest.raises(ZeroDivisionError):
        exec(blocks(page, "python")[0][0])


# --- commands -------------------------------------------------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands


def check_command(line):
    """Refuses a line `duet ...` that the command line would not understand; runs nothing."""
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    options = {"--version", "--help", "--install-completion", "--show-completion"}
    if words[0] in options:
        return
    command = COMMANDS[words[0]]
    known = {name: parameter for parameter in command.params for name in parameter.opts}
    rest, positional = [], 0
    words = words[1:]
    while words:
        word = words.pop(0)
        name = word.split("=")[0]
        if name in known or name == "--help":
            takes = name in known and not known[name].is_flag and "=" not in word
            value = words.pop(0) if takes else None
            if name in ("--config", "--forget", "--retain") and value.startswith("configs/"):
                assert (ROOT / value).is_file(), value
        elif command.context_settings.get("ignore_unknown_options"):
            rest.append(word)
        elif word.startswith("--"):
            raise ValueError(f"duet {command.name}: there is no option {word}")
        else:
            positional += 1
    wanted = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    assert positional <= len(wanted) or any(parameter.nargs == -1 for parameter in wanted), line
    if rest:  # keys of the YAML file; a positional argument comes first
        while command.name == "plan" and rest and not rest[0].startswith("--"):
            rest.pop(0)
        apply_overrides({}, rest)


def commands(page):
    for code, _ in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            if line.startswith("duet "):
                yield line


@each_page
def test_commands_exist(page):
    for line in commands(page):
        check_command(line)


@pytest.mark.parametrize(
    "line", ["duet eval x --sweet probes", "duet train --config a.yaml --learning_rat 1", "duet trane"]
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((ValueError, KeyError)):
        check_command(line)


def test_there_are_commands():
    lines = [line for page in PAGES for line in commands(page)]
    assert len(lines) > 20 and {line.split()[1] for line in lines} >= set(COMMANDS)


def test_make_targets_exist():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, (page.name, target)


def test_what_make_test_leaves_out_is_run_by_ci():
    """A test is marked `slow` or it is not: the two commands together run every one of them."""
    recipes = dict(
        re.findall(r"^(test[a-z-]*): setup\n\t\$\(PYTEST\) (.*)$", (ROOT / "Makefile").read_text(), re.M)
    )
    assert recipes == {"test": '-m "not slow"', "test-long": "-m slow"}
    assert {f"make {target}" for target in recipes} <= set((ROOT / ".ci/run").read_text().splitlines())


# --- files ----------------------------------------------------------------------------------------------------------


@each_page
def test_yaml_blocks_are_runs_or_suites(page):
    for code, _ in blocks(page, "yaml"):
        tree = parse_yaml(code)
        if "tasks" in tree:
            assert read_suite(tree, "mine").tasks
        else:
            training = {"use_cpu": True, "bf16": False}
            RunConfig.of(tree | {"training": tree.get("training", {}) | training})


@each_page
def test_json_rows_are_read(page):
    for code, _ in blocks(page, "json"):
        rows = [json.loads(line) for line in code.splitlines()]
        assert len(read_rows(rows, page.name)) == len(rows)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_exist(page):
    """In the repository, as a reader follows them there; in the site `mkdocs build --strict` looks."""
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


# --- what is said about names and defaults --------------------------------------------------------------------------

ROW = re.compile(r"^\| `(?P<name>[\w.]+)` \| `(?P<default>[^`]*)` \|", re.MULTILINE)


def defaults(of):
    """option -> default of a function or a dataclass, `pkg.module.name`."""
    module, _, name = of.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def wrong_defaults(text):
    """Rows of option tables that say another default than the code does."""
    wrong = []
    parts = re.split(r"<!-- defaults: (.*?) -->\n", text)[1:]
    for of, after in zip(parts[::2], parts[1::2], strict=True):
        table = re.match(r"\s*((?:\|.*\n)+)", after)
        assert table, of
        rows = ROW.findall(table[1])
        assert len(rows) == table[1].count("\n") - 2, f"{of}: a row without a default"
        have = defaults(of)
        wrong += [(name, said) for name, said in rows if ast.literal_eval(said) != have[name]]
    return wrong


@each_page
def test_defaults_are_those_of_the_code(page):
    assert not wrong_defaults(page.read_text())


def test_a_wrong_default_is_noticed():
    table = "<!-- defaults: duet.DuetConfig -->\n\n| option | default | |\n|---|---|---|\n| `k` | `33` | |\n"
    assert wrong_defaults(table) == [("k", "33")]
    assert not wrong_defaults(table.replace("33", "32"))


@pytest.mark.parametrize(
    "page, known",
    [
        ("distil", DIVERGENCES),
        ("distil", NORMALIZATIONS),
        ("methods", OBJECTIVES),
        ("evaluate", ATTACKS),
        ("evaluate", NUMBERS),
        ("evaluate", [name for names in METRICS_OF_KIND.values() for name in names]),
    ],
)
def test_no_name_is_missing(page, known):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert not [name for name in known if not re.search(rf"`\W?{name}\W?`|^{name}\b", text, re.MULTILINE)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
