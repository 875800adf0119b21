"""Rows without answers, and the shipped data, go through everything: what needs answers is left out by name."""

import json
from pathlib import Path

import pytest
from tiny_models import forget_rows, quick, retain_rows, tiny, word_tokenizer

from duet import OBJECTIVES, DuetConfig, DuetTrainer
from duet.data.prompts import PromptRenderer
from duet.data.sources import DataSource, load_rows
from duet.evaluation.commands import run_attack, run_eval
from duet.evaluation.elicit import elicit_answers
from duet.evaluation.generation import Continuation
from duet.model.answers import generate_answers

DATA = Path(__file__).parent.parent / "configs" / "data"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_shipped_rows_run_with_every_objective(tmp_path, objective):
    forget, retain = (
        load_rows(DataSource(str(DATA / f"{name}.jsonl")), name) for name in ("forget", "retain")
    )
    optim = "sgd" if objective == "repselect" else "adamw_torch"
    short = {"max_steps": 1, "per_device_train_batch_size": 2, "max_answer_tokens": 4}
    args = DuetConfig(**quick(tmp_path, objective=objective, optim=optim, **short))
    trainer = DuetTrainer(tiny(max_position_embeddings=512), args, forget, retain, word_tokenizer())
    result = trainer.train()
    assert (
        result.global_step == (0 if objective == "in_context" else 1)
        and result.training_loss == result.training_loss
    )


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("base", 0), ("student", 1)):
        tiny(seed=seed).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("forget", forget_rows(2)), ("retain", retain_rows(2, answers=False))):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def ends(monkeypatch):
    """Random models never end an answer: theirs count as ended."""
    monkeypatch.setattr(Continuation, "cut", False)


def test_eval_leaves_out_what_needs_answers(folder, capsys):
    run_eval(str(folder / "student"), suite="probes", data=folder / "data", out=folder / "eval", device="cpu")
    summary = read(folder / "eval" / "summary.json")
    assert set(summary["tasks"]) == {"forget_answers", "forget_losses"}
    assert set(summary["left_out"]) == {"retain_answers", "retain_losses"}
    assert "none of its 2 rows can be asked" in summary["left_out"]["retain_losses"]
    assert "left out: retain_answers (retain_answers: none of its 2 rows" in capsys.readouterr().out


def test_a_task_that_must_run_says_why_it_cannot(folder):
    (folder / "data" / "forget.jsonl").write_text(json.dumps({"question": "who is ada ?"}) + "\n")
    with pytest.raises(ValueError, match=r"forget_answers: none of its 1 rows can be asked"):
        run_eval(
            str(folder / "student"), suite="probes", data=folder / "data", out=folder / "eval", device="cpu"
        )


@pytest.mark.usefixtures("ends")
def test_eval_elicits_the_answers_of_the_base(folder, capsys):
    run_eval(
        str(folder / "base"),
        suite="probes",
        data=folder / "data",
        out=folder / "eval",
        device="cpu",
        elicit=str(folder / "base"),
    )
    summary = read(folder / "eval" / "summary.json")
    assert summary["tasks"]["retain_answers"]["metrics"]["rouge_l_recall"]["mean"] == 1.0, (
        "the base says what it says"
    )
    rows = [json.loads(line) for line in (folder / "eval" / "rows.jsonl").read_text().splitlines()]
    notes = {row["task"]: row.get("note", "") for row in rows if row["task"].endswith("answers")}
    assert "the base model's own" in notes["retain_answers"] and "own" not in notes["forget_answers"]
    assert "retain_answers: 2 of 2 answers are the base's own" in capsys.readouterr().out


def test_attacks_that_were_asked_for_and_cannot_run_are_refused(folder):
    forget, words = (
        str(folder / "data/forget.jsonl"),
        {"attacks": "membership,benign_finetuning", "device": "cpu"},
    )
    with pytest.raises(
        ValueError, match=r"attacks: none .*membership \(.*holdout.*; benign_finetuning \(no retain"
    ):
        run_attack(str(folder / "student"), forget, folder / "attack", **words)
    assert not (folder / "attack").exists()


@pytest.mark.usefixtures("ends")
def test_attack_takes_retain_rows_without_answers(folder, capsys):
    files = {"forget": str(folder / "data/forget.jsonl"), "retain": str(folder / "data/retain.jsonl")}
    common = {
        "attacks": "few_shot,benign_finetuning",
        "device": "cpu",
        "relearn_rates": "1e-3",
        "relearn_steps": "1",
    }
    run_attack(str(folder / "student"), **files, out=folder / "plain", **common)
    skipped = {entry["name"] for entry in read(folder / "plain/attacks.json")["skipped"]}
    assert skipped == {"few_shot: examples that may be known", "benign_finetuning"}
    assert "left out: retain[0] and 1 more of retain: no answer" in capsys.readouterr().out
    run_attack(
        str(folder / "student"),
        **files,
        out=folder / "elicited",
        base=str(folder / "base"),
        elicit=True,
        **common,
    )
    report = read(folder / "elicited/attacks.json")
    assert not report["skipped"] and {entry["name"] for entry in report["attacks"]} == {
        "few_shot",
        "benign_finetuning",
    }
    with pytest.raises(ValueError, match="elicit: wanted --base"):
        run_attack(str(folder / "student"), **files, out=folder / "x", elicit=True, **common)


@pytest.mark.usefixtures("ends")
def test_attack_leaves_out_what_the_base_does_not_tell(folder, capsys):
    """An answer of the base without the row's value: the row is named, the others are attacked."""
    path, asked = folder / "valued.jsonl", {"question": "who is ada ?"}
    how = {"attacks": "direct", "device": "cpu", "base": str(folder / "base"), "elicit": True}
    path.write_text("".join(json.dumps(row) + "\n" for row in (asked | {"value": "zebra"}, asked)))
    run_attack(str(folder / "base"), forget=str(path), out=folder / "valued", **how)
    assert "left out: forget[0]['value']: wanted a part of the answer" in capsys.readouterr().out
    assert read(folder / "valued/attacks.json")["direct"]["variants"]["as asked"]["rows"] == 1
    path.write_text(json.dumps(asked | {"value": "zebra"}) + "\n")
    with pytest.raises(
        ValueError, match=r"forget: wanted rows with an answer.*got 'zebra'; the answer is the base's"
    ):
        run_attack(str(folder / "base"), forget=str(path), out=folder / "none", **how)


@pytest.mark.usefixtures("ends")
def test_attack_on_questions_alone_is_compared_with_the_base(folder):
    (folder / "questions.jsonl").write_text(json.dumps({"question": "who is ada ?"}) + "\n")
    forget = str(folder / "questions.jsonl")
    with pytest.raises(ValueError, match=r"forget\[0\]: wanted a row with an 'answer'.*--elicit"):
        run_attack(str(folder / "base"), forget=forget, out=folder / "a", attacks="direct", device="cpu")
    run_attack(
        str(folder / "base"),
        forget=forget,
        out=folder / "b",
        attacks="direct",
        device="cpu",
        base=str(folder / "base"),
        elicit=True,
    )
    assert read(folder / "b/attacks.json")["direct"]["leak"] == 1.0, "the base leaks what the base says"


def test_elicited_answers_are_the_models_greedy_ones():
    model, tokenizer = tiny(), word_tokenizer()
    rows = [{"question": "who is ada ?"}, {"question": "who ?", "answer": "ada"}, {"question": "who " * 300}]
    assert elicit_answers(model, tokenizer, rows, "rows", max_new_tokens=4) == rows, (
        "cut, given, too long: nothing is made"
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(Continuation, "cut", False)
    try:
        first, *others = elicit_answers(model, tokenizer, rows, "rows", max_new_tokens=4)
    finally:
        patch.undo()
    prompt = PromptRenderer(tokenizer).encode((("user", "who is ada ?"),))
    (ids,) = generate_answers(model, [prompt], tokenizer, 0, 4)
    assert first["answer"] == tokenizer.decode(ids, skip_special_tokens=True) and others == rows[1:]
    with pytest.raises(ValueError, match=r"rows\[0\]: wanted exactly one of"):
        elicit_answers(model, tokenizer, [{"text": "x"}], "rows")
