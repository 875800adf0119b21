"""The sections of the training-step benchmark on a tiny model: every phase has its time, rows come as they are known, time is kept."""

import importlib.util
import json
import time

import pytest
import torch

from benchmarks import step_sections, training_step
from benchmarks.step_report import Shape, goal_met, phases_text
from benchmarks.step_sections import SECTIONS, Bench, OutOfTime, Section, within

TINY = Shape(2, 32, 64, 4, 2, v=300, batch=2, prompt=5, prefix=6, answer=4, k=8)
LIVE = (
    "batch",
    "adapter off",
    "teacher forward",
    "top-k",
    "adapter on",
    "targets",
    "student forward",
    "loss",
)
LIVE += ("loss backward", "backward", "clip", "optimizer", "end")
CACHED = ("batch", "targets", *LIVE[6:])
HAS_NF4 = importlib.util.find_spec("bitsandbytes") is not None


def bench(out=None, seconds=1000.0, **options):
    where = {"commit": "0" * 7, "device": "cpu", "torch": torch.__version__}
    common = {"device": torch.device("cpu"), "dtype": torch.float32, "steps": 2, "where": where, "out": out}
    return Bench("tiny", TINY, deadline=time.monotonic() + seconds, **common | options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as out:
        rows = bench(out).run(SECTIONS["8b"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    return {(row["op"].removeprefix("training_step_"), row["section"]): row for row in rows}


@pytest.mark.slow
def test_every_section_runs_and_is_planned(measured):
    for section in SECTIONS["8b"]:
        row = measured["phases", section.name]
        if section.nf4 and not HAS_NF4:
            assert "bitsandbytes" in row["status"]
            continue
        assert row["status"] == "ok", row
        assert row["batch"] == 2 * section.batches and row["rounds"] == 2
        assert set(row["ms"]) == set(CACHED if section.cached else LIVE)
        assert sum(row["ms"].values()) == pytest.approx(row["step_ms"], rel=0.2)
        student = 5 + 4 if section.positions == "first" else 5 + 4 - 1
        assert row["student_tokens"] == row["batch"] * student
        assert row["teacher_tokens"] == (0 if section.cached else row["batch"] * (student + 6))
        assert row["n"] == row["batch"] * (1 if section.positions == "first" else 4)
        gib, planned = row["gib"], measured["plan", section.name]["gib"]
        assert gib["optimizer"] == pytest.approx(2 * gib["adapter"], rel=0.1)
        for name in ("adapter", "optimizer", *(() if section.nf4 else ("weights",))):
            assert planned[name] == pytest.approx(gib[name], rel=0.05), name
        assert goal_met(row) is None, "a CPU counts no allocations"


@pytest.mark.slow
def test_the_text_has_every_phase_and_section(measured):
    text = phases_text("tiny", TINY, list(measured.values()))
    for word in (*LIVE, *(section.name for section in SECTIONS["8b"]), "<= 22 GiB: not judged here"):
        assert word in text
    row = {**measured["phases", SECTIONS["8b"][0].name], "gib": {"peak": 23.5, "weights": 15.0}}
    assert goal_met(row) is False and "<= 22 GiB: NO" in phases_text("8b", TINY, [row])
    row["gib"]["peak"] = 17.8
    assert goal_met(row) and "| 17.80 (–) | <= 22 GiB: yes |" in phases_text("8b", TINY, [row])


def test_the_same_work_of_two_sections_is_set_side_by_side():
    about = {"section": "live", "status": "ok", "positions": "answer", "checkpointing": False, "nf4": False}
    about |= {
        "op": "training_step_phases",
        "batch": 2,
        "cached": False,
        "goal_gib": None,
        "gib": {},
        "hash_s": 0.1,
    }
    about |= {"student_tokens": 8, "teacher_tokens": 8, "n": 8, "loss_share": 0.1}
    live = about | {"step_ms": 212.0, "ms": {"teacher forward": 40.0, "student forward": 100.0, "clip": 60.0}}
    stored = {
        "section": "cached",
        "cached": True,
        "step_ms": 134.0,
        "ms": {"student forward": 90.0, "clip": 30.0},
    }
    said = "They took 160 and 120 ms for it: 40 of the 78 ms between their steps are not the teacher's."
    assert said in phases_text("tiny", TINY, [live, live | stored])
    assert said not in phases_text("tiny", TINY, [live, live | stored | {"batch": 4}])


def test_time_is_kept_and_what_was_measured_stays(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    quick, slow = Section("quick", "first", False), Section("slow", "first", False)
    measure = Bench.measured

    def measured(self, section, model):
        if section.name == "slow":
            self.deadline = time.monotonic() + 0.2
            with within(self.left):  # the clock of `run` was set before
                time.sleep(60)
        return measure(self, section, model)

    monkeypatch.setattr(Bench, "measured", measured)
    with open(path, "w") as out:
        start = time.monotonic()
        bench(out).run((quick, slow, quick))
    assert time.monotonic() - start < 50
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["status"].split(":")[0] for row in rows[:3]] == ["ok", "ended", "not begun"]


def test_a_section_that_cannot_fit_is_not_begun(monkeypatch):
    late = bench(seconds=5)
    late.cuda = True
    monkeypatch.setattr(Bench, "measured", lambda *_: pytest.fail("begun"))
    monkeypatch.setattr(Bench, "_clean", lambda self: None)
    (row,) = late.run((Section("long", "first", False, seconds=10),))
    assert row["status"] == "not begun: 5 s were left, it takes 10"
    assert "not begun" in phases_text("tiny", TINY, [row])


def test_an_error_ends_one_section(monkeypatch):
    monkeypatch.setattr(step_sections, "cache_teacher", lambda *_, **__: 1 / 0)
    cached, live = Section("cached", "first", False, cached=True), Section("live", "first", False)
    found = {row["section"]: row["status"] for row in bench().run((cached, live))}
    assert found == {"cached": "error: ZeroDivisionError: division by zero", "live": "ok"}


def test_checkpointing_of_an_earlier_section_is_over(monkeypatch):
    found, recomputed = Bench.found, []

    def spy(self, trainer, *rest):
        recomputed.append(trainer.model.get_base_model().is_gradient_checkpointing)
        return found(self, trainer, *rest)

    monkeypatch.setattr(Bench, "found", spy)
    bench().run((Section("with", "first", True), Section("without", "first", False)))
    assert recomputed == [True, False]


def test_within_rings_once_and_puts_the_clock_back():
    with pytest.raises(OutOfTime), within(0.05):
        time.sleep(5)
    with within(0.05):
        pass
    time.sleep(0.1)


@pytest.mark.parametrize("name", ["8b", "1b"])
def test_the_command_writes_its_rows(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training_step.SHAPES, name, TINY)
    monkeypatch.setitem(training_step.SECTIONS, name, (Section("one", "answer", True, goal_gib=22),))
    words = ["--shape", name, "--out", str(tmp_path), "--rounds", "1", "--steps", "1", "--seconds", "600"]
    training_step.main(words)
    rows = [json.loads(line) for line in (tmp_path / f"training_step_{name}.jsonl").read_text().splitlines()]
    assert [row["op"] for row in rows] == ["training_step_phases", "training_step_plan"]
    assert rows[0]["shape"] == name and rows[0]["device"] and rows[0]["status"] == "ok"
    assert "| one |" in (tmp_path / f"training_step_{name}.md").read_text()
    said = capsys.readouterr().out
    assert f"### {name}" in said and ("TRL SDFT" in said) == (name == "1b")
    assert (tmp_path / "training_step.jsonl").exists() == (name == "1b")
