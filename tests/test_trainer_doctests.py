"""The examples in the docstrings of `duet` run."""

import doctest
import importlib

import pytest
from tiny_models import tiny, word_tokenizer


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "data.dataset",
        "model.lm",
        "model.switches",
        "output.card",
        "names",
        "methods.objectives",
        "run.plan",
        "run.plan_report",
        "data.prompts",
        "data.rows",
        "run.config_file",
        "output.record",
        "trainer",
        "evaluation.chat",
        "evaluation.elicit",
        "evaluation.facts",
        "evaluation.told",
        "evaluation.steering",
        "evaluation.metrics",
        "yaml_text",
    ],
)
def test_examples(name, tmp_path, capsys):
    module = importlib.import_module(f"duet.{name}")
    extra = {"model": tiny(), "tokenizer": word_tokenizer(), "folder": str(tmp_path)}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    tests = [test for test in finder.find(module, extraglobs=extra) if test.examples]
    assert tests
    for test in tests:
        assert runner.run(test).failed == 0, capsys.readouterr().out
