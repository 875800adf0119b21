"""Three requests in the tiny world: a short real run, and the committed page is that of the committed rows."""

import json

import pytest

from benchmarks.studies import sequential
from benchmarks.studies.runner import rows_of_seeds, run_seeds
from duet.demo.checkpoint import load_world


@pytest.mark.slow
def test_a_short_run_goes_on_from_folder_to_folder(tmp_path, monkeypatch):
    models = []
    forget = sequential.forget
    monkeypatch.setattr(
        sequential, "forget", lambda model, *rest: (models.append(str(model)), forget(model, *rest))
    )
    few = sequential.retain_rows(load_world(), load_world().forget[:1])[:20]
    assert set(few[0]) == {"question"}
    monkeypatch.setattr(sequential, "retain_rows", lambda world, people: few)
    ended = run_seeds([1], tmp_path, lambda seed: sequential.run_seed(seed, 1, 2, ["again"]))
    assert ended == ([], [])
    (row,) = rows_of_seeds(tmp_path).values()
    assert row["people"] == list(load_world().forget[3:6]) and row["before"]["told"] == [1.0, 1.0, 1.0]
    assert set(row["after"]["again"]) == {"1", "2", "3"}
    names = [model.rpartition("/")[2] for model in models]
    assert names == [sequential.CHECKPOINT.name, "first", "again_2"]
    assert "| the first request | 1 |" in sequential.page([row])
    assert run_seeds([1], tmp_path, lambda seed: pytest.fail("it is done already")) == ([], [])


def test_the_page_is_that_of_the_rows():
    rows = list(rows_of_seeds(sequential.OUT).values())
    assert (sequential.OUT / sequential.PAGE).read_text() == sequential.page(rows)
    assert {row["steps"] for row in rows} == {sequential.STEPS}


def test_the_verdict_follows_from_the_rows():
    def told(*values):
        return {"told": list(values), "forced": [1.0] * 3, "kept": 0.9, "cities": 1.0}

    row = {"before": told(1, 1, 1) | {"kept": 1.0}, "after": {"merge": {"3": told(0, 0.06, 0.05)}}}
    assert sequential.verdicts([json.loads(json.dumps(row))]) == [
        "* the new rows alone (the default): B told of; +10 points lost on authors to keep (too many)."
    ]
    with pytest.raises(ValueError, match="rows: wanted at least one row"):
        sequential.page([])
