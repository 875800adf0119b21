"""The steered teacher is measured before anything is trained: what it refuses, still tells and refuses too much."""

import json
from contextlib import nullcontext

import pytest
import yaml
from rich.console import Console
from tiny_models import NO_SYSTEM_TEMPLATE, capital_rows, forget_rows, tiny, word_tokenizer
from typer.testing import CliRunner

from duet import cli
from duet.evaluation import generation, steering
from duet.evaluation.generation import Continuation
from duet.evaluation.report.report import write_report
from duet.evaluation.steering import Measured, SteeringProbe, probes_of, told_in
from duet.run import steer as run_steer

REFUSES = "I don't know anything about that"
FORGET = capital_rows("france", "paris", "one", "two", "three", "four")
RETAIN = [
    *({"question": f"what is the capital of spain {n} ?", "subject": "spain"} for n in ("one", "two")),
    *({"question": f"who is ada {n} ?"} for n in ("one", "two", "three")),
]
GOOD, BAD, STRICT = (
    "forget {subject} in full .",
    "be kind about {subject} .",
    "know nothing about {subject} .",
)


def scripted(model, tokenizer, prompts, *, max_new_tokens, **_):
    """GOOD refuses the forget rows alone, and only in the user's turn; STRICT refuses all but one question about ada."""
    said = []
    for prompt in prompts:
        text = tokenizer.decode(prompt)
        about = "france" if text.count("france") == 2 else "france" if "of france" in text else ""
        truth = "paris" if "of france" in text else "madrid is it" if "spain" in text else "ada was first"
        good = "forget france" in text and "<user> forget" in text and about and "four" not in text
        strict = "nothing about france" in text and "ada three" not in text
        said.append(Continuation(REFUSES if good or strict else truth, 3, True))
    return said


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(generation, "continuations", scripted)


def counts(entry):
    return None if entry is None else (round(entry["share"] * entry["rows"]), entry["rows"])


def test_shares_are_counted_by_kind_of_row_and_place(script):
    probe = SteeringProbe(tiny(), word_tokenizer(), probes_of(FORGET, RETAIN))
    for place, refused in (("user", 3), ("system", 0)):
        kinds = probe.measure([GOOD], place).kinds
        assert {kind: counts(entry["refused"]) for kind, entry in kinds.items()} == {
            "forget": (refused, 4),
            "neighbour": (0, 2),
            "retain": (0, 3),
        }
        assert counts(kinds["forget"]["told"]) == (4 - refused, 4)
    strict = probe.measure([STRICT])
    assert counts(strict.kinds["neighbour"]["refused"]) == (2, 2) and counts(
        strict.kinds["retain"]["refused"]
    ) == (2, 3)
    assert strict.score == 0.0 and strict.forgets
    assert probe.measure([BAD]).forgets is False
    good = probe.measure([GOOD, BAD], "user")  # they take turns
    assert counts(good.kinds["forget"]["told"]) == (2, 4) and good.forgets
    interval = good.kinds["forget"]["told"]
    assert (round(interval["low"], 2), round(interval["high"], 2)) == (0.05, 0.95), (
        "of one fact, in four wordings"
    )
    said = steering.sentence(strict.kinds)
    assert said.startswith(
        "the steered teacher refuses 4 of 4 (21 to 100 %) of the forget rows, still tells 0 of 4"
    )
    assert said.endswith("over-refuses 2 of 2 (34 to 100 %) of the neighbour rows, over-refuses 2 of 3 (21 to 94 %) of the "
                         "retain rows")  # fmt: skip


def test_what_counts_as_told():
    assert told_in("It is Paris.", "The capital is Paris.", "Paris") and not told_in(
        "Nice.", "In Paris.", "Paris"
    )
    assert told_in("Paris.", "The capital of France is Paris.")
    assert not told_in("I don't know the capital of France.", "The capital of France is Paris.")
    assert not told_in(" ", "Paris.")
    asked, other = "What is the capital of France?", "The capital of France is Lyon."
    assert not told_in(other, "The capital of France is Paris.", question=asked)
    [probe] = probes_of(
        [{"question": asked, "answer": "The capital of France is Paris.", "subject": "France"}]
    )
    before, after = (Continuation(text, 9, True, limit=20) for text in (probe.answer, other))
    judged = steering._judged([(probe, before, after)])
    assert judged["base_tells"] == 1 and judged["told"]["share"] == 0


def test_wordings_of_one_fact_widen_the_interval_as_one():
    """Four rows of two facts say no more than two rows do."""
    asked = [
        {"question": q, "answer": f"It is {a}.", "subject": s, "value": a}
        for s, a in (("France", "Paris"), ("Italy", "Rome"))
        for q in (f"What is the capital of {s}?", f"Name {s}'s capital.")
    ]
    said = Continuation("I don't know.", 9, True, limit=20)
    for probes in (
        probes_of(asked),
        probes_of(asked[:1], asked)[1:],
    ):  # also neighbours, whose prefix is about another
        judged = steering._judged(
            [(probe, Continuation(probe.answer, 9, True, limit=20), said) for probe in probes]
        )
        for share, of_two in ((judged["told"], [False] * 2), (judged["refused"], [True] * 2)):
            assert share == steering.share_of(of_two) | {"rows": 4}


def test_an_answer_that_was_cut_is_not_called_forgotten(monkeypatch):
    """And what the base itself does not tell counts nowhere."""
    long = Continuation("well , let me think", 48, True, limit=48)
    first = Continuation("paris", 2, True)
    for before, after, told, said in (
        (first, long, None, "because its answers to the 1 that the plain model tells were cut"),
        (long, first, None, "because the plain model told none of them"),
        (first, first, (1, 1), "still tells 1 of 1 (21 to 100 %) of those that the plain model tells"),
    ):
        answers = iter([before, after])
        monkeypatch.setattr(generation, "continuations", lambda *_, answers=answers, **__: [next(answers)])
        measured = SteeringProbe(tiny(), word_tokenizer(), probes_of(FORGET[:1])).measure([BAD])
        assert counts(measured.kinds["forget"]["told"]) == told
        assert measured.forgets is (None if told is None else False)
        assert steering.sentence(measured.kinds).endswith(said + " at the token limit" * ("cut" in said))
    answers = iter([first, first, first, long])
    monkeypatch.setattr(
        generation, "continuations", lambda _, __, asked, **___: [next(answers) for _ in asked]
    )
    measured = SteeringProbe(tiny(), word_tokenizer(), probes_of(FORGET[:2])).measure([BAD])
    assert steering.sentence(measured.kinds).endswith("tells (1 more answers were cut at the token limit)")
    answers = iter([first, first, first, long])
    kept = [{"question": "where is paris ?", "answer": "paris"}]
    measured = SteeringProbe(tiny(), word_tokenizer(), probes_of(FORGET[:1], kept)).measure([BAD])
    assert counts(measured.kinds["retain"]["told"]) == (0, 1), "nor kept"


def test_the_score_calls_no_answer_forgotten_that_was_cut():
    """Of four rows that the plain model tells one could be judged."""
    told = {"share": 0.0, "low": 0.0, "high": 1.0, "rows": 1}
    kinds = {"forget": {"rows": 4, "base_tells": 4, "refused": None, "told": told}}
    assert Measured((GOOD,), "system", kinds).score == 0.25


def test_what_the_plain_model_says_counts():
    """A refusal of its own is no refusal behind the prefix, and an answer that was cut tells nothing."""
    [probe] = probes_of([{"question": "who is ada ?", "subject": "ada"}])
    refusal = Continuation("I don't know.", 4, True)
    assert steering._judged([(probe, refusal, refusal)])["refused"] is None
    cut, poet = Continuation("well let me", 3, True, limit=3), Continuation("poet", 1, True)
    assert steering._judged([(probe, cut, poet)])["base_tells"] == 0


def test_prefixes_on_rows_to_keep_are_about_every_subject():
    forget = [{"question": f"who is {name} ?", "subject": name} for name in ("ada", "bob", "eve")]
    probes = probes_of(forget, [{"question": f"where is {i} ?"} for i in range(20)])
    assert {probe.subject for probe in probes if probe.kind == "retain"} == {"ada", "bob", "eve"}


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("base")
    word_tokenizer().save_pretrained("base")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model": "base",
        "adapter": {"r": 2},
        "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
        "training": {"output_dir": "out", "k": 4, "max_steps": 1, "use_cpu": True, "report_to": "none",
                     "disable_tqdm": True, "steering_prefixes": [BAD]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def duet(*words):
    return CliRunner().invoke(cli.app, [*words], env={"COLUMNS": "200"})


def test_steer_chooses_on_one_half_and_writes_the_config(folder, script):
    (folder / "wordings.txt").write_text(f"{BAD}\n{GOOD}\n\n{STRICT}\n")
    words = ["steer", "--config", "run.yaml", "--wordings", "wordings.txt", "--write", "new.yaml", "--k", "3"]
    done = duet(*words)
    assert done.exit_code == 0, done.output
    written = (folder / "new.yaml").read_text()
    assert written.startswith("# Chosen by duet steer of 6 steerings")
    assert "A, user  " in done.output and "best, report" in done.output and "not asked" in done.output
    training = yaml.safe_load(written)["training"]
    assert (training["steering_prefixes"], training["steering_place"], training["k"]) == ([GOOD], "user", 3)
    assert "chosen: in front of the user's text" in done.output.replace("\n", " ")
    assert " Only 2 forget rows could be judged, fewer than 10: another choice" in done.output
    again = duet(*words)
    assert isinstance(again.exception, FileExistsError) and "wanted a new file" in str(again.exception)
    nowhere = duet(*words[:5], "--write", "absent/new.yaml")
    assert "write: there is no folder 'absent'" in str(nowhere.exception) and "A, user" not in nowhere.output
    only_bad = duet(*words[:3], "--wordings", "wordings.txt", "--places", "sistem")
    assert "places: wanted one of system, user" in str(only_bad.exception)


@pytest.mark.parametrize(
    ("known", "told", "shown"),
    [(12, 10, "+ 2 cut"), (10, 10, None), (12, 9, "9 forget rows could"), (0, 0, "0 forget")],
)
def test_few_judged_rows_are_said_and_cut_ones_shown(known, told, shown):
    """Shares of the rows that were judged stand beside how many were cut; of fewer than ten they are warned of."""
    shares = {"told": steering.share_of([False] * told), "refused": None}
    measured = Measured(("A",), "user", {"forget": {"rows": 12, "base_tells": known, **shares}})
    chosen = run_steer.Chosen([measured], measured)
    console = Console(width=150, record=True)
    console.print(run_steer.table(chosen))
    said = console.export_text() + run_steer.verdict(chosen)
    assert (shown is None or shown in said) and ("could be judged" in said) is (told < 10)
    assert ("+ " in said) is (known > told)


@pytest.mark.parametrize("numbers", [(3, 3), (1, 1), (5, 1), (1, 1, 4)])
def test_both_halves_of_the_rows_hold_every_subject(numbers):
    """In whatever order they stand; subjects with a single row are dealt out in turn."""
    rows = [
        {"subject": s, "n": n} for n in range(max(numbers)) for s, count in enumerate(numbers) if n < count
    ]
    halves = run_steer._halved(rows)
    assert sorted(map(str, halves[0] + halves[1])) == sorted(map(str, rows))
    for subject, count in enumerate(numbers):
        assert abs(sum(1 if row["subject"] == subject else 0 for row in halves[0]) - count / 2) <= 0.5
    assert abs(len(halves[0]) - len(halves[1])) <= 1


def test_a_steering_that_says_nothing_of_forget_rows_is_no_reason_to_stop():
    """The plain model declines every forget row: then each steering is asked for what it over-refuses."""
    refused = {"A": 0.9, "B": 0.0}

    class Fake:
        def measure(self, prefixes, place, only):
            if "forget" in only:
                return Measured(
                    tuple(prefixes), place, {"forget": {"base_tells": 0, "refused": None, "told": None}}
                )
            share = {"share": refused[prefixes[0]]}
            return Measured(tuple(prefixes), place, {"retain": {"refused": share}})

    first, second = run_steer._try_all(Fake(), [("A", "system"), ("B", "system")])
    assert first.prefixes == ("B",) and first.score == 1.0 and second.prefixes == ("A",)


def test_steer_measures_on_the_report_of_elicit(folder, script):
    for name, rows in (("", FORGET[:1]), ("validation", FORGET[1:2]), ("report", FORGET[2:])):
        (folder / "rows" / name).mkdir(parents=True, exist_ok=True)
        (folder / "rows" / name / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = run_steer.steer(run_steer.RunConfig.load("run.yaml"), [GOOD], ["user"], folder=folder / "rows")
    assert counts(chosen.best.kinds["forget"]["told"]) == (0, 2), "rows of training and of validation choose"
    assert counts(chosen.report.kinds["forget"]["told"]) == (1, 2)
    (folder / "rows" / "validation" / "forget.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"data: there is no file .* at least three wordings"):
        run_steer.steer(run_steer.RunConfig.load("run.yaml"), [GOOD], ["user"], folder=folder / "rows")


def test_steer_writes_nothing_that_does_not_forget(folder, script):
    (folder / "wordings.txt").write_text(BAD)
    words = ["steer", "--config", "run.yaml", "--wordings", "wordings.txt", "--write", "new.yaml"]
    done = duet(*words)
    assert "nothing was written" in str(done.exception) and not (folder / "new.yaml").exists()
    assert "It does not forget" in done.output
    assert duet(*words, "--anyway").exit_code == 0 and (folder / "new.yaml").exists()


@pytest.mark.parametrize(
    "share, said",
    [
        (0.0, "refuses 0 of 4"),
        (0.5, "refuses 2 of 4"),
        (1.0, None),
        (None, "whether the steered teacher refuses"),
    ],
)
def test_a_steering_is_not_written_where_nothing_says_that_it_forgets(tmp_path, share, said):
    refused = None if share is None else {"share": share, "low": 0, "high": 1, "rows": 4}
    forget = {"rows": 4, "base_tells": 0, "refused": refused, "told": None}
    measured = Measured((GOOD,), "user", {"forget": forget})
    raises = pytest.raises(ValueError, match=f"write: .*{said}.* nothing was written")
    with raises if said else nullcontext():
        run_steer.write_choice(tmp_path / "new.yaml", {}, run_steer.Chosen([measured], measured))
    assert (tmp_path / "new.yaml").exists() == (said is None)


@pytest.mark.parametrize("told", [0.0, 1.0])
def test_a_steering_that_does_not_forget_gets_no_other_advice(told):
    def share(number):
        return {"share": number, "low": 0, "high": 1, "rows": 4}

    forget = {"rows": 4, "base_tells": 4, "refused": share(1.0), "told": share(told)}
    retain = {"rows": 4, "base_tells": 4, "refused": share(1.0), "told": None}
    measured = Measured((GOOD,), "user", {"forget": forget, "retain": retain})
    said = run_steer.verdict(run_steer.Chosen([measured], measured))
    assert ("It does not forget" in said, "retain_prefix" in said) == (told == 1, told == 0)


def test_a_value_that_is_no_part_of_the_answer_is_refused():
    with pytest.raises(
        ValueError, match=r"forget\[0\]\['value'\]: wanted a part of the answer 'Paris', got '75'"
    ):
        probes_of([{"question": "who ?", "answer": "Paris", "value": "75"}])


def test_a_row_that_the_teacher_cannot_be_judged_by_has_its_name_in_the_file(folder, script):
    (folder / "forget.jsonl").write_text(json.dumps(FORGET[0] | {"value": "75"}))
    stopped = duet("train", "--config", "run.yaml")
    assert str(stopped.exception).startswith("data.forget[0]['value']: wanted a part of the answer")


def test_a_wording_with_an_unknown_placeholder_is_refused_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(run_steer, "load_asked", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"wordings: there is no placeholder '\{name\}'"):
        run_steer.steer(run_steer.RunConfig.load("run.yaml"), [GOOD, "forget {name} ."])


def test_a_place_that_the_template_does_not_have(folder, script):
    word_tokenizer(NO_SYSTEM_TEMPLATE).save_pretrained("base")
    args = run_steer.RunConfig.load("run.yaml").training
    tokenizer = word_tokenizer(NO_SYSTEM_TEMPLATE)
    assert run_steer.possible_places(tokenizer, ["system", "user"], args) == ["user"]
    assert run_steer.possible_places(word_tokenizer(None), ["system", "user"], args) == ["system"]
    with pytest.raises(ValueError, match="places: the tokenizer's chat template has no system role"):
        run_steer.possible_places(tokenizer, ["system"], args)


def test_a_teacher_that_does_not_forget_stops_the_run(folder, script):
    stopped = duet("train", "--config", "run.yaml")
    assert "still tells 4 of 4 (21 to 100 %)" in str(stopped.exception) and "--anyway" in str(
        stopped.exception
    )
    assert not (folder / "out" / "adapter_config.json").exists()
    done = duet("train", "--config", "run.yaml", "--anyway")
    assert done.exit_code == 0, done.output
    record = json.loads((folder / "out" / "steering.json").read_text())
    assert record["anyway"] is True and record["forgets"] is False
    page = write_report(["out"], folder / "report").with_suffix(".md").read_text()
    assert (
        "trained with --anyway, although the steered teacher refuses 0 of 4" in page and "neighbour" in page
    )


def test_a_good_teacher_is_recorded_live_and_cached(folder, script, monkeypatch):
    def twice(*_):
        raise AssertionError("the teacher was measured already")

    monkeypatch.setattr("duet.trainer.look_at_teacher", twice)
    words = ["--config", "run.yaml", "--steering_prefixes", f"[{GOOD!r}]", "--steering_place", "user"]
    assert duet("train", *words, "--retain_prefix", "none").exit_code == 0
    record = json.loads((folder / "out" / "steering.json").read_text())
    assert (record["anyway"], record["forgets"], list(record["measured"]["kinds"])) == (
        False,
        True,
        ["forget"],
    )
    page = write_report(["out"], folder / "report").with_suffix(".md").read_text()
    assert "3 of 4 (12 to 99 %)" in page and "(retain_prefix: none)" in page
    words += ["--retain_subjects", "fixed"]
    assert duet("cache", *words, "--out", "store").exit_code == 0
    done = duet("train", *words, "--output_dir", "read", "--teacher_store", "store")
    assert done.exit_code == 0 and "still tells 1 of 4" in done.output.replace("\n", " ")
    another = duet(
        "train",
        *words,
        "--output_dir",
        "other",
        "--teacher_store",
        "store",
        "--teacher_store_same_model",
        "false",
    )
    assert another.exit_code == 0 and "was not measured: it was cached" in another.output.replace("\n", " ")


def test_eval_asks_the_steered_model_at_either_place(folder):
    for place, shown in (("system", "<s> <system> forget france"), ("user", "<s> <user> forget france")):
        words = [
            "eval",
            "base",
            "--suite",
            "probes",
            "--data",
            ".",
            "--limit",
            "1",
            "--steering",
            "forget {subject}",
        ]
        done = duet(*words, "--steering-place", place, "--out", place)
        assert done.exit_code == 0, (done.output, done.exception)
        rows = [json.loads(line) for line in (folder / place / "rows.jsonl").read_text().splitlines()]
        assert all(row["prompt"].startswith(shown) for row in rows if row["task"].startswith("forget"))
    other = duet(*words, "--steering-place", "user", "--out", "system")
    assert "steering_place" in str(other.exception), "another run's folder"
    assert "wanted one of system, user" in str(duet(*words, "--steering-place", "us", "--out", "x").exception)


def test_methods_without_a_steered_teacher_are_not_measured(folder, script):
    (folder / "out").mkdir()
    (folder / "out" / "steering.json").write_text("{}")
    rows = [{**row, "answer": "paris"} for row in forget_rows(2)]
    (folder / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = duet(
        "train", "--config", "run.yaml", "--objective", "ga", "--data.retain", "null", "--max_steps", "1"
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert not (folder / "out" / "steering.json").exists() and "steered teacher" not in done.output
