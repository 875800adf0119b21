"""What pyproject.toml promises: extras, metadata, and what is said where an extra is missing."""

import re
import tomllib
from pathlib import Path

import pytest

import duet
from duet import extras

ROOT = Path(__file__).parents[1]
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TABLES["project"]
IMPORTED_AS = {"pyyaml": "yaml"}


def imported(requirements):
    names = [re.match(r"[\w-]+", each)[0] for each in requirements]
    return tuple(IMPORTED_AS.get(name, name.replace("-", "_")) for name in names)


def test_the_losses_need_torch_alone():
    assert imported(PROJECT["dependencies"]) == ("torch",)


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_extras_are_told_as_they_are_declared(extra):
    assert imported(PROJECT["optional-dependencies"][extra]) == extras.EXTRAS[extra]


def test_the_lowest_versions_are_those_that_are_declared():
    """`make test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt` tests what pyproject.toml promises."""
    declared = [*TABLES["build-system"]["requires"], *PROJECT["dependencies"]]
    for extra in ("train", "eval", "triton", "quant"):
        declared += PROJECT["optional-dependencies"][extra]
    lowest = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    assert lowest == sorted(each.split(";")[0].replace(">=", "==") for each in declared)


def test_a_missing_extra_is_one_sentence(monkeypatch):
    assert extras.missing("train") is None and extras.missing("eval") is None
    monkeypatch.setitem(extras.EXTRAS, "eval", ("scipy", "not_there", "nor_this"))
    assert extras.missing("eval") == (
        "duet.evaluation needs not_there, nor_this, not installed here: pip install 'duet-kernels[eval]'"
    )


def test_versions_agree():
    assert duet.__version__ == (extras.version_of("duet-kernels") or "unknown")
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
