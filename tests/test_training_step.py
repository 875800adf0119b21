"""The benchmark of a whole training step: it measures what it says, on a tiny model; its arithmetic; its gate."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from benchmarks import training_step
from benchmarks.harness import Measured
from benchmarks.step_report import Run, Shape, table_of
from duet.store.teacher import CachedTeacher

TINY = Shape(2, 32, 64, 4, 2, v=300, batch=2, prompt=5, prefix=6, answer=4, k=8)
CPU = torch.device("cpu")
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module")
def measured():
    return training_step.run(TINY, CPU, torch.float32, rounds=2)


def test_every_variant_is_measured(measured):
    assert measured.green and len(measured.losses) == 4
    names = [
        "live teacher",
        "cached teacher",
        "student alone",
        "student alone, no loss",
        "loss",
        "forward",
        "top-k",
    ]
    assert all(len(measured.took[name].ms) == 2 for name in names)
    assert measured.student_tokens == 2 * (5 + 4 - 1)  # the last token is predicted, not read
    assert measured.teacher_tokens == 2 * (6 + 5 + 4 - 1)
    sdft = measured.took["TRL SDFT"]
    assert sdft.status == "ok" if HAS_TRL else sdft.status == "absent: trl is not installed"


def test_an_absent_peer_is_a_row(measured, monkeypatch):
    took = measured.took | {"TRL SDFT": Measured(status="absent: trl is not installed")}
    text, _ = table_of("tiny", dataclasses.replace(measured, took=took), on_gpu=False)
    assert "| TRL SDFT | absent: trl is not installed |" in text


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")
def test_sdft_reads_the_same_rows(tmp_path):
    job = training_step.Job(TINY, CPU, torch.float32, tmp_path)
    duet, make = training_step.duet_trainer(job, cached=False)
    batch = make()
    answers = batch["labels"].view(TINY.batch, TINY.answer)
    sdft, rows = training_step.sdft_trainer(job, answers.tolist())
    sdft.model.train()
    theirs = sdft._prepare_inputs(rows())
    assert torch.equal(theirs["completion_ids"], answers)
    student = torch.cat([theirs["prompt_ids"], theirs["completion_ids"]], 1)
    for ours, read in (
        (batch["input_ids"], student),
        (batch["teacher_input_ids"], theirs["teacher_input_ids"]),
    ):
        assert torch.equal(ours, read[:, :-1])  # SDFT also reads the last token
    assert not sdft.args.gradient_checkpointing and not duet.args.gradient_checkpointing
    trained = [{n for n, p in t.model.named_parameters() if p.requires_grad} for t in (duet, sdft)]
    assert len(trained[0]) == len(trained[1]) > 0


def made_up(shape, **ms):
    """A run of given milliseconds; `_` stands for a space."""
    took = {
        name.replace("_", " "): Measured(ms=[float(value)] * 3, peak_mb=1.0) for name, value in ms.items()
    }
    took["student alone, no loss"] = Measured(ms=[97.0] * 3)
    took |= {"top-k": took["topk"]} if "topk" in took else {}
    return Run(shape, torch.float32, took, 100, 150, {"definition": 1.0})


PARTS = {"student_alone": 100, "loss": 4, "forward": 40, "topk": 20, "live_teacher": 180, "TRL_SDFT": 300}
PARTS |= {"loss_of_TRL_SDFT": 150}


def test_the_ideal_and_the_shares():
    facts = made_up(TINY, cached_teacher=100, **PARTS).facts()
    assert facts["ideal"] == pytest.approx(1.6) and facts["ideal with head"] == pytest.approx(1.8)
    text, _ = table_of("tiny", made_up(TINY, cached_teacher=100, **PARTS), on_gpu=False)
    assert "112% reached" in text and "more than 100% of it is possible" in text
    assert facts["reached"] == pytest.approx(1.8) and facts["fraction with head"] == pytest.approx(1)
    assert facts["loss share"] == pytest.approx(0.04)
    assert facts["loss share by difference"] == pytest.approx(0.03)
    run = made_up(TINY, cached_teacher=100, **PARTS)
    assert run.loss_share("live teacher") == pytest.approx(24 / 180)
    assert run.loss_share("TRL SDFT") == pytest.approx(0.5)


@pytest.mark.parametrize("cached, loss, met", [(100, 4, True), (130, 4, False), (100, 6, False)])
def test_missed_goals_are_said(cached, loss, met):
    shape = training_step.SHAPES["1b"]
    assert shape.n >= 4096 and shape.k == 64
    text, all_met = table_of(
        "1b", made_up(shape, cached_teacher=cached, **PARTS | {"loss": loss}), on_gpu=True
    )
    assert all_met == met and ("| NO |" in text) == (not met)
    text, _ = table_of("1b", made_up(shape, cached_teacher=cached, **PARTS | {"loss": loss}), on_gpu=False)
    assert "not judged here" in text


def test_files_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training_step.SHAPES, "small", TINY)
    monkeypatch.setitem(training_step.SHAPES, "wide", dataclasses.replace(TINY, tied=True, compared=False))
    training_step.main(["--out", str(tmp_path), "--rounds", "2"])
    rows = [json.loads(line) for line in (tmp_path / "training_step.jsonl").read_text().splitlines()]
    assert {(row["shape"], row["variant"]) for row in rows} >= {
        ("small", "live teacher"),
        ("small", "cached teacher"),
        ("small", "TRL SDFT"),
        ("wide", "student alone"),
    }
    rates = {row["variant"]: row["tokens_s"] for row in rows if row["shape"] == "small" and "tokens_s" in row}
    cached = next(row for row in rows if row["variant"] == "cached teacher")
    assert rates["cached teacher"] == pytest.approx(1e3 * 16 / cached["ms"], rel=1e-2)
    text = (tmp_path / "training_step.md").read_text()
    assert "### small" in text and "### wide" in text and "1 + r F / S" in text
    assert "### small" in capsys.readouterr().out


def test_a_red_gate_prints_no_speed(tmp_path, monkeypatch, capsys):
    """A cached teacher whose numbers are not the live one's."""
    monkeypatch.setitem(training_step.SHAPES, "small", TINY)
    truth = CachedTeacher.targets
    monkeypatch.setattr(
        CachedTeacher,
        "targets",
        lambda self, stored, *rest: truth(self, stored | {"values": stored["values"] * 1.01}, *rest),
    )
    assert training_step.main(["--out", str(tmp_path), "--shape", "small"]) == 1
    said = capsys.readouterr()
    assert "correctness gate: RED" in said.err and "###" not in said.out
    assert not list(tmp_path.iterdir())
