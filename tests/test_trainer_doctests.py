"""The examples in the docstrings of `duet` run."""

import doctest
import importlib
import pathlib

import pytest
import torch
from tiny_models import tiny, word_tokenizer

import duet

ROOT = pathlib.Path(duet.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
    and path.name != "read.py"  # test_topk_store.py makes it a store
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name, tmp_path, capsys):
    module = importlib.import_module(f"duet.{name}")
    extra = {"torch": torch, "model": tiny(), "tokenizer": word_tokenizer(), "folder": str(tmp_path)}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    tests = [test for test in finder.find(module, extraglobs=extra) if test.examples]
    assert tests
    for test in tests:
        assert runner.run(test).failed == 0, capsys.readouterr().out
