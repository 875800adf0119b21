"""`duet report` on runs that eval, attack, train and the demo's writer made of tiny models; the page in a browser."""

import html
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from test_folders import FULL, full_disk
from tiny_models import tiny, word_tokenizer
from typer.testing import CliRunner

from duet import cli
from duet.data.prompts import steered_tokenizer
from duet.demo.scorecard import COLUMNS
from duet.evaluation.attacks import runner as attack_run
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.generation import Continuation
from duet.evaluation.report import glossary, report
from duet.evaluation.report.runs import read_inputs
from duet.evaluation.report.topk import compare_topk
from duet.evaluation.suites import runner
from duet.evaluation.suites.row_metrics import METRICS_OF_KIND
from duet.evaluation.suites.suite import read_suite
from duet.evaluation.suites.summary import NUMBERS

SUITE = {
    "tasks": {
        "forget_answers": {
            "kind": "generate", "data": "forget", "max_new_tokens": 5, "metrics": ["rouge_l_recall", "refusal"],
        },
        "retain_answers": {
            "kind": "generate", "data": "retain", "max_new_tokens": 5, "metrics": ["rouge_l_recall", "refusal"],
        },
        "forget_losses": {
            "kind": "score", "data": "forget", "metrics": ["truth_ratio"],
            "texts": {"paraphrased": "answer", "perturbed": "wrong"},
        },
    },
    "numbers": {"forget_quality": {"ratios": "forget_losses.truth_ratio"}},
}  # fmt: skip
# Relearning shows the first two rows, which must not tell what the others are asked.
FORGET = [
    {"question": f"who is {n} ?", "answer": f"a {is_}", "value": is_, "wrong": [is_not]}
    for n, is_, is_not in (
        ("ada", "captain", "poet"),
        ("alan", "captain", "poet"),
        ("grace", "poet", "captain"),
        ("turing", "poet", "captain"),
    )
]
RETAIN = [{"question": f"what color is {n} ?", "answer": "red"} for n in ("sea", "river", "paris")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base-eval, teacher-eval, student-eval, student-attack and a file of the rows."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, suite = word_tokenizer(), read_suite(SUITE, "own")
    base, student = tiny(), tiny(seed=1)
    steered = steered_tokenizer(tokenizer, "you know nothing .")
    for name, model, reader in (
        ("base", base, tokenizer),
        ("teacher", base, steered),
        ("student", student, tokenizer),
    ):
        runner.evaluate(model, reader, suite, out=folder / f"{name}-eval", data=folder, name=f"models/{name}")
    options = AttackOptions(max_new_tokens=4, relearn_rates=(1e-3, 1e-2), relearn_curve=(1, 3), shots=1)
    rows = read_attack_rows(FORGET, "forget")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Continuation, "cut", False)  # a random model never ends its answer
        attack_run.run_attacks(
            Target(student, tokenizer, rows, options=options), base=Target(base, tokenizer, rows, options=options),
            attacks=["prefill", "relearning", "rank_probe", "membership"], out=folder / "student-attack",
            name="models/student",
        )  # fmt: skip
    return folder


def runs_of(folder, *names):
    return [
        str(folder / name)
        for name in names or ("base-eval", "teacher-eval", "student-eval", "student-attack")
    ]


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    queries = [row["question"] for row in FORGET[:1]]
    topk = compare_topk(
        tiny(), tiny(seed=1), word_tokenizer(), queries, k=3, instruction="you know nothing ."
    )
    told = {"before": "base", "after": "student", "steering": "you know nothing .", "queries": topk}
    return report.write_report(runs_of(folder), out, topk=[told])


# --- writing ---------------------------------------------------------------------------------------------------


def test_a_report_that_was_stopped_is_written_again(folder, tmp_path):
    page = report.write_report(runs_of(folder), tmp_path)
    figures = list((tmp_path / "figures").glob("*.svg"))
    for written in (page, page.with_suffix(".md")):
        written.unlink()
    assert figures and report.write_report(runs_of(folder), tmp_path).is_file()


@pytest.mark.parametrize("name", ["report.html", "report.md", "figures/frontier.svg", "topk.json"])
def test_what_others_wrote_is_not_replaced(folder, tmp_path, name):
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_text("mine")
    (tmp_path / "figures" / "fig1.svg").write_text("mine")
    with pytest.raises(FileExistsError, match=rf"^out: .*{name} is there already and of no earlier report"):
        if name == "topk.json":
            report.write_topk("no model", "no model", ["who ?"], tmp_path)
        report.write_report(runs_of(folder), tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.rglob("*.*")}
    assert files == {Path(name).name: "mine", "fig1.svg": "mine"}


def test_an_earlier_report_is_replaced_and_files_of_others_stay(folder, tmp_path):
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "fig1.svg").write_text("mine")
    assert report.write_report(runs_of(folder), tmp_path)
    names = {"frontier.svg", "relearning-student-relearning.svg"}
    assert {path.name for path in figures.iterdir()} == {"fig1.svg", *names}
    shutil.copy(figures / "frontier.svg", figures / "kept.svg")
    text = (tmp_path / "report.md").read_text()
    (tmp_path / "report.md").write_text(f"{text}\n![mine](figures/fig1.svg)\n")
    report.write_report(runs_of(folder, "student-eval", "base-eval"), tmp_path)
    assert {path.name for path in figures.iterdir()} == {"fig1.svg", "frontier.svg", "kept.svg"}
    assert (figures / "fig1.svg").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_report(folder, tmp_path, monkeypatch):
    page = report.write_report(runs_of(folder), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(os, "fsync", full_disk)  # after the bytes were written
    with pytest.raises(OSError, match=rf"^out: '{tmp_path}' could not be written: .*{FULL}"):
        report.write_report(runs_of(folder, "student-eval"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before and page in before


def test_half_of_a_pair_is_shown(folder, tmp_path):
    shutil.copytree(folder / "student-eval", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/rows.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"generated": "half \ud83d <"}) + "\n" for row in rows)
    (tmp_path / "run/rows.jsonl").write_text(text)
    page = report.write_report([str(tmp_path / "run")], tmp_path / "out")
    assert (
        r"half \ud83d &lt;" in page.read_text() and r"half \ud83d &lt;" in page.with_suffix(".md").read_text()
    )


def test_every_method_has_figures_of_its_own(folder, tmp_path):
    """Labels that differ in signs or in capitals give no one file."""
    labels = ("duet", "duet+", "Duet", "duet 2", "d" * 240, "d" * 241)
    runs = [f"{label}={tmp_path / str(i)}" for i, label in enumerate(labels)]
    for i in range(len(labels)):
        shutil.copytree(folder / "student-attack", tmp_path / str(i))
    text = report.write_report(runs, tmp_path / "out").with_suffix(".md").read_text()
    files = re.findall(r"\]\(figures/(relearning[^)]+)\)", text)
    assert len({file.lower() for file in files}) == len(labels) == len(files)
    for label, file in zip(labels, files, strict=True):
        assert f"![{label}: relearning" in text.split(f"](figures/{file})")[0].rpartition("\n")[2]
        assert label[:20] in (tmp_path / "out/figures" / file).read_text()


# --- reading ---------------------------------------------------------------------------------------------------


def test_runs_of_one_model_are_one_method_and_manifests_tell_the_roles(folder):
    methods = read_inputs(runs_of(folder)).methods
    assert [(m.label, m.role) for m in methods] == [
        ("base", "base"), ("steered teacher", "teacher"), ("student", "student"),
    ]  # fmt: skip
    student = methods[2]
    assert {f.name for f in student.folders} == {"student-eval", "student-attack"}
    assert student.attacks["attacks"] and student.tasks["forget_answers"]["metrics"]
    assert len(student.answers) == len(FORGET) + len(RETAIN)
    assert student.answers.keys() == methods[0].answers.keys() == methods[1].answers.keys()


def test_roles_and_labels_can_be_given(folder):
    inputs = read_inputs(
        [f"mine={folder / 'student-eval'}"],
        base=[str(folder / "base-eval")],
        teacher=[str(folder / "teacher-eval")],
    )
    assert [m.label for m in inputs.methods] == ["base", "steered teacher", "mine"]
    assert [m.label for m in inputs.students] == ["mine"]


def test_a_model_asked_behind_a_prefix_is_the_teacher(folder, tmp_path):
    suite, tokenizer = read_suite(SUITE, "own"), word_tokenizer()
    steering = "you know nothing about {subject} ."
    for name in ("forget", "retain"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    with pytest.raises(
        ValueError, match=r"forget_answers: none .* names {subject}, but the row has no 'subject'"
    ):
        runner.evaluate(tiny(), tokenizer, suite, out=tmp_path / "x", data=tmp_path, steering=steering)
    (tmp_path / "forget.jsonl").write_text(
        "".join(json.dumps(row | {"subject": "ada"}) + "\n" for row in FORGET)
    )
    (tmp_path / "retain.jsonl").write_text(
        "".join(json.dumps(row | {"subject": "sea"}) + "\n" for row in RETAIN)
    )
    runner.evaluate(tiny(), tokenizer, suite, out=tmp_path / "steered", data=tmp_path, steering=steering)
    rows = [json.loads(line) for line in (tmp_path / "steered/rows.jsonl").read_text().splitlines()]
    told = {row["task"]: row["prompt"] for row in rows}
    assert "<system> you know nothing about ada . <" in told["forget_answers"].replace("</s>", "<")
    assert all("about ada" in prompt for prompt in told.values()), "the prefix is about what should go"
    methods = read_inputs(
        [str(tmp_path / "steered"), *runs_of(folder, "base-eval", "student-eval", "student-attack")]
    )
    assert [m.role for m in methods.methods] == ["base", "teacher", "student"]
    with pytest.raises(ValueError, match="holds results of another run: steering was"):
        runner.evaluate(tiny(), tokenizer, suite, out=tmp_path / "steered", data=tmp_path)


def test_different_models_never_share_a_row(folder):
    methods = read_inputs([f"x={folder / name}-eval" for name in ("base", "student")]).methods
    assert [m.label for m in methods] == ["x (base-eval)", "x (student-eval)"]


def test_the_base_of_an_attack_is_a_row_of_its_own(folder):
    base, student = read_inputs(runs_of(folder, "student-attack")).methods
    assert (base.role, student.role) == ("base", "student")
    assert base.attacks["direct"] == student.attacks["base"] and not base.attacks["attacks"]


def test_a_training_output_with_runs_in_it(folder, tmp_path):
    out = tmp_path / "npo"
    shutil.copytree(folder / "student-eval", out / "eval")
    history = [
        {"loss": 2.0, "step": 1},
        {"loss": 0.5, "forget_loss": 0.25, "step": 2},
        {"train_runtime": 1.0},
    ]
    (out / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 2}))
    (method,) = read_inputs([str(out)]).methods
    assert method.label == "npo" and method.tasks
    assert method.training == {"steps": 2, "losses": {"loss": 0.5, "forget_loss": 0.25}}
    text = report.write_report([str(out)], tmp_path / "report").with_suffix(".md").read_text()
    assert "| npo | 2 | 0.5 | 0.25 |" in text


def damaged(folder, summary, rows="", manifest="{}"):
    folder.mkdir()
    for name, text in (("summary.json", summary), ("rows.jsonl", rows), ("manifest.json", manifest)):
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, r"run: there is no folder '.*bad'"),
        (lambda f: f.mkdir(), r"run: .*bad is no finished run: wanted one of summary.json, attacks.json"),
        (lambda f: (f.mkdir(), (f / "topk.json").write_text("{")), r"run: .*topk.json: not JSON: .* at column 2"),
        (lambda f: (f.mkdir(), (f / "topk.json").write_text("[]")), r"topk.json: wanted an object, got .\[\]"),
        (lambda f: (f.mkdir(), (f / "topk.json").write_text("{}")), r"topk.json has no 'before'"),
        (lambda f: (f.mkdir(), (f / "summary.json").write_text("{}")), r"run: .*bad has no manifest.json"),
        (lambda f: damaged(f, '{"suite": "s", "tasks": {"a": 1}, "numbers": {}}'), r"summary.json has 'tasks': {\"a\": 1}; wanted what"),
        (lambda f: damaged(f, '{"suite": "s", "tasks": {"a": {"metrics": {"b": {}}}}, "numbers": {}}'), r"summary.json has 'tasks': "),
        (lambda f: damaged(f, '{"suite": "s", "tasks": [], "numbers": {"u": 0.5}}'), r"summary.json has 'tasks': \[\]; wanted"),
        (lambda f: damaged(f, '{"suite": "s", "tasks": {}, "numbers": {"u": 0.5}}'), r"summary.json has 'numbers': "),
        (lambda f: damaged(f, "{}", rows="[1]\n"), r"bad is damaged or unfinished: rows.jsonl, line 1: wanted a row with task, id, got \[1\]"),
        (lambda f: damaged(f, "{}", rows="{}\n"), r"bad is damaged or unfinished: rows.jsonl, line 1: wanted a row with task, id, got {}"),
        (lambda f: damaged(f, "{}", manifest="[]"), r"^run: .*bad is damaged or unfinished: .*manifest.json: wanted an object, got '\[\]'"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_run_is_named(tmp_path, make, message):
    make(tmp_path / "bad")
    with pytest.raises((ValueError, OSError), match=message):
        report.write_report([str(tmp_path / "bad")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is said ----------------------------------------------------------------------------------------------


def test_the_headline_names_the_worst_attack(folder, page):
    attacks = json.loads((folder / "student-attack/attacks.json").read_text())["attacks"]
    worst = max((e for e in attacks if e["name"] != "rank_probe"), key=lambda e: e["leak"] or 0)
    told = re.search(r'class="headline">(.*?)</p>', page.read_text()).group(1)
    assert f"the worst is {worst['name']}" in told and "on student" in told
    assert f"{100 * worst['leak']:.0f} %" in told


def lines_of(text, title):
    """The cells of the lines of a section's tables."""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_holds_the_numbers_of_the_runs(folder, page):
    text = page.with_suffix(".md").read_text()
    head, *lines = lines_of(text, "Methods, metrics and attacks")
    assert head == ["", "base", "steered teacher", "student"]
    bands, table, leaks = [], {}, []
    for name, *cells in lines:
        if name.startswith("**"):
            bands.append(name.strip("*"))
        else:
            table[bands[-1], name] = dict(zip(head[1:], cells, strict=True))
            leaks += [cells[-1]] if bands == ["attacks ↓"] else []
    assert bands == ["attacks ↓", "forget_answers", "retain_answers", "forget_losses", "of the suite"]
    told = json.loads((folder / "student-eval/summary.json").read_text())["tasks"]["forget_answers"][
        "metrics"
    ]
    x = told["rouge_l_recall"]
    wanted = f"{x['mean']:.2f} ({x['low']:.2f} to {x['high']:.2f})"
    assert table["forget_answers", "rouge_l_recall ↓"]["student"] == wanted
    assert table["of the suite", "forget_quality ↑"]["student"] == "undefined"
    assert "no retain model given" in text
    relearning = table["attacks ↓", "relearning"]
    assert relearning["steered teacher"] == "–", "not run is neither undefined nor 0"
    leaks = [float(cell.split()[0]) for cell in leaks[:-1]]
    assert len(leaks) == 3 and leaks == sorted(leaks, reverse=True), "the worst attack comes first"


@pytest.mark.usefixtures("answers_end")
def test_methods_that_were_asked_other_rows_are_named(folder, page, tmp_path):
    assert "Not the same rows" not in page.with_suffix(".md").read_text()
    tokenizer, suite, model = word_tokenizer(), read_suite(SUITE, "own"), tiny(seed=2)
    runner.evaluate(model, tokenizer, suite, out=tmp_path / "eval", data=folder, name="models/few", limit=3)
    few = Target(model, tokenizer, read_attack_rows(FORGET[:2], "forget"))
    attack_run.run_attacks(few, attacks=["rank_probe"], out=tmp_path / "attack", name="models/few")
    given = [*runs_of(folder), str(tmp_path / "eval"), str(tmp_path / "attack")]
    text = report.write_report(given, tmp_path / "report").with_suffix(".md").read_text()
    few_forget, attacked = re.findall(r"numbers of (.*) cannot be compared: (.*)\.", text)
    assert few_forget == ("forget_answers, forget_losses", "base, steered teacher, student; few")
    assert attacked == ("the attacks", "base, student; few"), "three retain rows are all there are"


def test_one_model_in_two_dtypes_is_said_to_be_that(folder, tmp_path):
    half = Target(tiny(seed=1).bfloat16(), word_tokenizer(), read_attack_rows(FORGET, "forget"))
    attack_run.run_attacks(half, attacks=["rank_probe"], out=tmp_path / "attack", name="models/student")
    given = [*runs_of(folder, "student-eval"), str(tmp_path / "attack")]
    assert [m.label for m in read_inputs(given).methods] == ["student (float32)", "student (bfloat16)"]
    named = [f"mine={given[0]}", f"own={given[1]}"]
    assert [m.label for m in read_inputs(named).methods] == ["mine", "own"]
    text = report.write_report(named, tmp_path / "report").with_suffix(".md").read_text()
    assert (
        "One model in several dtypes, whose results are not joined: mine: float32; own: bfloat16. The same --dtype"
        in text
    )
    text = report.write_report(runs_of(folder), tmp_path / "one").with_suffix(".md").read_text()
    assert "several dtypes" not in text


def test_suites_that_name_their_tasks_alike_keep_their_numbers(folder, tmp_path):
    tree = {"tasks": {"forget_answers": SUITE["tasks"]["forget_answers"] | {"metrics": ["refusal"]}}}
    runner.evaluate(
        tiny(seed=1), word_tokenizer(), read_suite(tree, "v1.2"), out=tmp_path, data=folder, name="models/student", limit=2,
    )  # fmt: skip
    given = runs_of(folder, "student-eval")
    for runs in ([*given, str(tmp_path)], [str(tmp_path), *given]):
        (student,) = read_inputs(runs).methods
        assert student.tasks["forget_answers (own)"]["metrics"].keys() == {"rouge_l_recall", "refusal"}
        assert student.tasks["forget_answers (v1.2)"]["metrics"].keys() == {"refusal"}
        assert student.tasks["retain_answers"] and "forget_answers" not in student.tasks
        text = report.write_report(runs, tmp_path / "report").with_suffix(".md").read_text()
        assert "| **forget_answers (own)** |" in text and "| **forget_answers (v1.2)** |" in text
        assert "against retain_answers" in text, "the frontier knows what is to be forgotten"
    assert set(student.asked) == {
        "forget_answers (own)",
        "forget_answers (v1.2)",
        "forget_losses",
        "retain_answers",
    }


def test_the_base_that_the_attack_asked_is_the_base_of_the_runs(folder, page):
    attacks = json.loads((folder / "student-attack/attacks.json").read_text())
    head, *lines = lines_of(page.with_suffix(".md").read_text(), "Methods, metrics and attacks")
    (direct,) = [line for line in lines if line[0] == "direct"]
    assert direct[1].startswith(f"{attacks['base']['leak']:.2f}") and head[1] == "base"
    base, *_ = read_inputs(runs_of(folder, "base-eval", "student-eval", "student-attack")).methods
    assert base.tasks and base.attacks["direct"] == attacks["base"]
    other = read_inputs(runs_of(folder, "student-attack"), base=[str(folder / "student-eval")]).methods
    assert [m.attacks is None for m in other if m.role == "base"] == [True, False], "another model's answers"


def test_every_attack_states_strength_and_cost(folder, page):
    attacks = json.loads((folder / "student-attack/attacks.json").read_text())["attacks"]
    text = page.with_suffix(".md").read_text()
    _, *told = lines_of(text, "Every attack, the worst first")
    assert [line[0] for line in told[:4]] == [*(e["name"] for e in attacks), "direct"]
    for entry, line in zip(attacks, told, strict=False):
        assert line[2] == attack_run.worst_variant(entry) and line[3] == entry["strength"]
        assert line[4].startswith(f"{entry['cost']['queries']} queries")
    relearned = [line for line in told[4:] if line[0] == "relearning"]
    assert len(relearned) == 4, "two rates after two numbers of steps"
    assert "not tried: membership (no holdout rows given)" in text
    assert "<details>" in text and "<details>" in page.read_text()


def test_lm_eval_is_shown_or_absent(folder, tmp_path):
    run = tmp_path / "runs" / "student-lm"
    run.mkdir(parents=True)
    manifest = json.loads((folder / "student-eval/manifest.json").read_text())
    results = {"mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.0125, "acc_norm,strict": 0.5}}
    written = {"model": "models/student", "manifest": manifest, "results": results, "versions": {}}
    (run / "lm_eval.json").write_text(json.dumps(written))
    runs = [*runs_of(folder, "base-eval", "student-eval", "student-attack"), str(run)]
    text = report.write_report(runs, tmp_path / "out").with_suffix(".md").read_text()
    head, *lines = lines_of(text, "lm-evaluation-harness")
    assert head == ["task", "metric", "base: value", "base: stderr", "student: value", "student: stderr"]
    assert lines == [
        ["mmlu", "acc", "absent", "absent", "0.25", "0.0125"],
        ["mmlu", "acc_norm (strict)", "absent", "absent", "0.5", "absent"],
    ]
    (alone,) = read_inputs([str(tmp_path / "runs")]).methods
    assert alone.lm_eval == results, "a folder of folders, and one that holds nothing else"
    without = report.write_report(runs_of(folder, "student-eval"), tmp_path / "none")
    assert "Absent: no folder with lm_eval.json was given" in without.with_suffix(".md").read_text()
    (run / "lm_eval.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run: .*lm_eval.json has no 'manifest'"):
        read_inputs([str(run)])


def test_a_metric_without_a_value_is_undefined(folder, tmp_path):
    shutil.copytree(folder / "student-eval", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    summary["tasks"]["forget_answers"]["metrics"]["refusal"] = {
        "mean": None,
        "low": None,
        "high": None,
        "rows": 0,
    }
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    text = report.write_report([str(tmp_path / "run")], tmp_path / "out").with_suffix(".md").read_text()
    status = ", ".join(f"{n} rows {s}" for s, n in summary["tasks"]["forget_answers"]["status"].items())
    assert f"undefined: student, forget_answers refusal: no row has a value ({status})" in text


def test_answers_that_say_the_truth_are_marked(folder, tmp_path):
    """Two answers are put into the student's run: a leak by its value, and the reference in words that are not it."""
    shutil.copytree(folder / "student-eval", tmp_path / "student-eval")
    rows = [json.loads(line) for line in (tmp_path / "student-eval/rows.jsonl").read_text().splitlines()]
    said = {
        ("forget_answers", 2): "some POET <script>",
        ("forget_answers", 3): "a <b> writer",
        ("retain_answers", 1): "red",
    }
    for row in rows:
        if (row["task"], row["id"]) in said:
            row["generated"] = said[row["task"], row["id"]]
    (tmp_path / "student-eval/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [str(tmp_path / "student-eval"), *runs_of(folder, "base-eval")]
    page = report.write_report(runs, tmp_path / "out")
    text, shown = page.with_suffix(".md").read_text(), page.read_text()
    assert "**leaks:** some POET &lt;script>" in text and "leaks:** a &lt;b> writer" not in text
    assert "**true:** red" in text
    assert 'class="leaks"' in shown and "<script>" not in shown
    assert "says the truth when the value is said as whole words; for questions without one" in text
    bare = [{k: v for k, v in row.items() if k != "value"} for row in rows]
    (tmp_path / "student-eval/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    by_words = report.write_report([runs[0]], tmp_path / "words").with_suffix(".md").read_text()
    assert "leaks:** some POET" in by_words and "leaks:** a &lt;b> writer" not in by_words, (
        "'a' tells nothing"
    )
    assert "says the truth when ROUGE-L recall (stemmed)" in by_words
    questions = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| who is")]
    assert questions[0] == FORGET[2]["question"], "what leaks is shown first"


def test_what_is_missing_is_one_line(folder, tmp_path):
    text = (
        report.write_report(runs_of(folder, "student-attack"), tmp_path / "a").with_suffix(".md").read_text()
    )
    for missing in ("No answers:", "No frontier:", "No first tokens:", "No training log:"):
        assert text.count(missing) == 1
    assert "No curves:" not in text
    text = report.write_report(runs_of(folder, "student-eval"), tmp_path / "b").with_suffix(".md").read_text()
    assert "No attack was run" in text and "No curves:" in text and "Not attacked: student" in text


def test_the_demo_is_read_without_intervals(tmp_path):
    rows = [
        {"method": m, **dict.fromkeys(COLUMNS, v), "seconds": 1.0}
        for m, v in (("base", 1.0), ("teacher", 0.5), ("npo", 0.25))
    ]
    rows[2]["relearn_recall"] = 0.75
    example = {
        "question": "who ?",
        "truth": "Rome",
        "kind": "to forget",
        "answers": {"base": "in Rome .", "npo": "no"},
    }
    (tmp_path / "results.json").write_text(
        json.dumps({"rows": rows, "examples": [example], "columns": COLUMNS})
    )
    text = report.write_report([str(tmp_path)], tmp_path / "out").with_suffix(".md").read_text()
    assert (
        "the worst is relearn on npo: 75 %" in text and " to " not in text.split("| npo |")[1].split("\n")[0]
    )
    assert "| who ? | Rome | **leaks:** in Rome . | no |" in text
    assert "answered" not in text.split("## ")[0], "it keeps examples, not what was answered"
    assert "examples of the demo: forget, to be forgotten, 1 of 1 examples" in text


def test_metrics_of_the_frontier_can_be_chosen(folder, tmp_path):
    names = {"forget_metric": "forget_answers.refusal", "retain_metric": "retain_answers.rouge_l_recall"}
    text = report.write_report(runs_of(folder), tmp_path / "out", **names).with_suffix(".md").read_text()
    assert "forget_answers.refusal against retain_answers.rouge_l_recall" in text
    with pytest.raises(
        ValueError, match=r"forget_metric: wanted one of forget_answers.rouge_l_recall, .* got 'x.y'"
    ):
        report.write_report(runs_of(folder), tmp_path / "out", forget_metric="x.y")


# --- what is drawn, and of which rows ----------------------------------------------------------------------------


def test_a_base_is_counted_once(folder, tmp_path):
    """Given among the runs and with --base; under another path; with another suite; and beside a demo's base."""
    base, student = (str(folder / f"{name}-eval") for name in ("base", "student"))
    (tmp_path / "link").symlink_to(base)
    for runs in ([base, student], [str(tmp_path / "link"), student, student]):
        methods = read_inputs(runs, base=[base]).methods
        assert [(m.label, m.role) for m in methods] == [("base", "base"), ("student", "student")]
    other = tmp_path / "other"
    shutil.copytree(base, other)
    summary = json.loads((other / "summary.json").read_text()) | {"suite": "another"}
    summary["tasks"] = {f"{task}_2": entry for task, entry in summary["tasks"].items()}
    (other / "summary.json").write_text(json.dumps(summary))
    methods = read_inputs([student, str(other)], base=[base]).methods
    assert [m.label for m in methods] == ["base", "student"] and len(methods[0].tasks) == 6
    methods = read_inputs([student, str(folder / "teacher-eval")], base=[base]).methods
    assert [m.role for m in methods] == ["base", "teacher", "student"]
    demo = write_demo(tmp_path / "demo")
    for given in (demo, base):
        methods = read_inputs([demo, student], base=[given]).methods
        assert sorted(m.label for m in methods) == ["base", "npo", "steered teacher", "student"]
    assert {"forget", "forget_answers"} <= methods[0].tasks.keys(), "the demo's base is the given one"
    assert [m.label for m in read_inputs([student], base=[demo]).methods] == ["base", "student"]
    assert len(read_inputs([str(folder / "student-attack")], base=[demo]).methods) == 2


def write_demo(folder):
    folder.mkdir()
    rows = [
        {"method": m, **dict.fromkeys(COLUMNS, v), "seconds": 1.0}
        for m, v in (("base", 1.0), ("teacher", 0.5), ("npo", 0.25))
    ]
    (folder / "results.json").write_text(json.dumps({"rows": rows, "examples": [], "columns": COLUMNS}))
    return str(folder)


def test_rows_that_could_not_be_judged_stand_beside_the_leak(folder, tmp_path):
    shutil.copytree(folder / "student-attack", tmp_path / "attack")
    told = json.loads((tmp_path / "attack/attacks.json").read_text())
    worst, second = told["attacks"][:2]
    for entry, status in (
        (worst, {"ok": 1, "cut": 1, "empty": 1, "refused_by_template": 1}),
        (second, {"ok": 4}),
    ):
        for variant in entry["variants"].values():
            variant |= {"status": status, "unjudged": 1 - status["ok"] / 4}
    for variant in told["direct"]["variants"].values():
        variant |= {"leak": None, "low": None, "high": None, "status": {"cut": 4}, "unjudged": 1.0}
    told["direct"] |= {"leak": None, "worst_variant": None}
    (tmp_path / "attack/attacks.json").write_text(json.dumps(told))
    page = report.write_report([str(tmp_path / "attack")], tmp_path / "out")
    text = page.with_suffix(".md").read_text()
    for title, column in (("Methods, metrics and attacks", -1), ("Every attack, the worst first", 1)):
        cells = {line[0]: line[column] for line in reversed(lines_of(text, title)) if line[column]}
        assert cells[worst["name"]].startswith(f"{worst['leak']:.2f}")
        assert cells[worst["name"]].endswith("75 % not judged)")
        assert "not judged" not in cells[second["name"]]
        assert cells["direct"] == "undefined (100 % not judged)"
    assert "75 % of its rows could not be judged." in text.split("## ")[0], "the headline says it too"
    assert "1 cut, 1 empty, 1 refused_by_template" in text
    assert "<small>75 % not judged</small>" in page.read_text()


def test_every_metric_has_a_meaning_and_a_direction(folder, page):
    known = {m for names in METRICS_OF_KIND.values() for m in names}
    assert known <= glossary.METRICS.keys() and set(NUMBERS) == glossary.NUMBERS.keys()
    shown = ET.fromstring(re.search(r"<dl>.*?</dl>", page.read_text(), re.DOTALL).group())
    told = {div.findtext("dt"): div.findtext("dd") for div in shown}
    assert {"rouge_l_recall", "refusal", "truth_ratio", "forget_quality", "prefill", "direct"} <= told.keys()
    assert told["refusal"].endswith("(↑ on rows to forget, ↓ on rows to keep)")
    names = [
        line[0] for line in lines_of(page.with_suffix(".md").read_text(), "Methods, metrics and attacks")
    ]
    assert "refusal ↑" in names and "refusal ↓" in names and "rouge_l_recall ↑" in names
    documented = (Path(__file__).parents[1] / "docs/evaluate.md").read_text()
    for line in documented.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        for name in re.findall(r"`(\w+)`", cells[1]) if len(cells) == 6 else ():
            if name in known:
                told, arrow = glossary.METRICS[name], cells[3][:1]
                on_keep = "on retain rows" in cells[3]
                assert arrow not in "↑↓" or arrow == (told.keep if on_keep else told.forget), name


def test_the_demo_is_explained_and_empty_sections_are_hidden(tmp_path):
    page = report.write_report([write_demo(tmp_path / "demo")], tmp_path / "out")
    text = page.read_text()
    assert "No attacks" not in text, "the table has the demo's attacks"
    for name in ("stutter", "neighbour_recall", "refusal"):
        assert re.search(rf"<dt>{name}</dt><dd>[^<]*[↑↓]", text)
    recall = f"forget: {COLUMNS['forget_recall']} (↓); retain: {COLUMNS['retain_recall']} (↑)"
    assert f"<dt>recall</dt><dd>{recall}</dd>" in text, "one name, two meanings"
    sections = re.findall(r'<section id="([\w-]+)">(.*?)</section>', text, re.DOTALL)
    assert re.findall(r'<a href="#([\w-]+)"', text) == [name for name, _ in sections]
    assert [name for name, _ in sections] == ["results", "frontier", "absent"]
    assert all("<table" in body or "<svg" in body for name, body in sections if name != "absent")


# --- the page --------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    links = re.findall(r"""(?:src|href|srcset|xlink:href)\s*=\s*["']([^"']*)""", text) + re.findall(
        r"url\(([^)]*)\)", text
    )
    assert links and all(link.startswith("#") for link in links)
    assert "<link" not in text and "<script" not in text and "@import" not in text
    assert text.count("<svg") == 3  # frontier, relearning, top-k


def test_markdown_points_to_files_that_are_there(page):
    files = re.findall(r"\]\((figures/[^)]+)\)", page.with_suffix(".md").read_text())
    assert len(files) == 3 and all(
        ET.parse(page.parent / file).getroot().tag.endswith("svg") for file in files
    )


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    return next(filter(None, map(shutil.which, names)), None)


LOOK = """
let box = document.querySelector('iframe'), d = box.contentDocument, e = d.documentElement;
let open = [...d.querySelectorAll('.scroll')].filter(s => s.clientWidth);
let seen = s => { let m = s.parentElement.querySelector('.more'), c = d.defaultView.getComputedStyle(m);
  return m.offsetHeight > 5 && c.visibility == 'visible' && c.display != 'none' };
let shade = s => +d.defaultView.getComputedStyle(s.parentElement, '::after').opacity;
let cells = s => [...s.querySelectorAll('tbody tr:not(.band) th, tr.band span')].map(
  c => c.getBoundingClientRect().left - s.getBoundingClientRect().left);
let told = {page: e.scrollWidth, frame: e.clientWidth, svg: d.querySelector('svg').getBoundingClientRect().width,
  text: d.body.innerText.length, ink: d.defaultView.getComputedStyle(d.body).color,
  tables: open.map(s => ({over: s.scrollWidth > s.clientWidth, hint: seen(s), shade: shade(s)}))};
open.forEach(s => { s.scrollLeft = 1e6 });
told.after = open.map(s => ({moved: s.scrollLeft > 0, first: cells(s)}));
document.body.dataset.found = JSON.stringify(told);
"""


def looked_at(page, folder, width, scheme="light"):
    """The layout of the page in a frame of that width, which a script outside the page reads, before and after scrolling."""
    outer = folder / "outer.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe style="border:0;width:{width}px;height:900px" '
        f'onload="setTimeout(look, 300)" srcdoc="{html.escape(page.read_text())}"></iframe>'
        f"<script>function look() {{ {LOOK} }}</script></body>"
    )
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}", "--window-size=1400,1000",
        "--virtual-time-budget=3000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'data-found="([^"]*)"', shown.stdout)
    assert found, shown.stderr[-500:]
    return json.loads(html.unescape(found.group(1)))


needs_browser = pytest.mark.skipif(
    browser() is None, reason="no chromium or chrome is installed: the page is not looked at"
)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(page, tmp_path, width):
    told = looked_at(page, tmp_path, width)
    assert told["frame"] <= width and told["page"] <= told["frame"], told
    assert told["text"] > 500 and told["svg"] > 250


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_wide_tables_scroll_with_a_hint_and_a_fixed_first_column(tmp_path, width, scheme):
    """Of the demo's seven methods: a shadow and a text, if and only if there is more to the right."""
    demo = Path(__file__).parents[1] / "benchmarks/results/demo"
    told = looked_at(report.write_report([str(demo)], tmp_path / "out"), tmp_path, width, scheme)
    assert told["ink"] == ("rgb(29, 33, 38)" if scheme == "light" else "rgb(231, 234, 238)")
    assert [table["over"] for table in told["tables"]] == [width == 390, False, False, width == 390]
    for before, after in zip(told["tables"], told["after"], strict=True):
        assert before["hint"] == before["over"] and before["shade"] == float(before["over"])
        assert after["moved"] == before["over"]
        assert all(0 <= left <= 16 for left in after["first"]), (
            "the first column and the bands' headings stay"
        )


# --- command line ----------------------------------------------------------------------------------------------


def test_the_command(folder, tmp_path):
    for name, seed in (("before", 0), ("after", 1)):
        tiny(seed=seed).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    arguments = [
        "report", *runs_of(folder), "--out", str(tmp_path / "out"),
        "--model-before", str(tmp_path / "before"), "--model-after", str(tmp_path / "after"),
        "--query", "who is ada ?", "--top-k", "3",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/report.html").is_file() and "No first tokens:" not in (
        tmp_path / "out/report.md"
    ).read_text()
    kept = json.loads((tmp_path / "out/topk.json").read_text())
    assert kept["queries"][0]["teacher"] is None and 3 <= len(kept["queries"][0]["ids"]) <= 6
    again = report.write_report([str(tmp_path / "out")], tmp_path / "again").with_suffix(".md").read_text()
    assert "figures/topk-0-0.svg" in again and "No table:" in again
    failed = CliRunner().invoke(cli.app, ["report", "--model-before", "x", "--out", str(tmp_path / "none")])
    assert isinstance(failed.exception, ValueError) and "model_after: first tokens" in str(failed.exception)
