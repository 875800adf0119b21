"""The shipped suites, whose numbers TOFU has published, the command `duet eval`, and lm_eval."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from test_evaluation_runner import CHOICES, FACTS, SUITE, rows_of, run, shown, write
from tiny_models import merging_tokenizer, tiny, with_short_answers, word_tokenizer
from typer.testing import CliRunner

from duet import cli
from duet.demo.checkpoint import CHECKPOINT, load_base, load_world
from duet.evaluation import commands
from duet.evaluation.commands import literal_console
from duet.evaluation.suites import runner, summary
from duet.evaluation.suites.suite import load_suite, read_suite

GOLDEN = Path(os.environ.get("DUET_DATA", Path(__file__).parent.parent / "data")) / "golden"


TOFU_ROW = {
    "question": "Who?",
    "answer": "Ada.",
    "paraphrased_answer": "It is Ada.",
    "perturbed_answer": ["Bob.", "Eve."],
}


def tofu_folder(folder):
    perturbed = [TOFU_ROW | {"question": f"Who is {i}?"} for i in range(3)]
    plain = [{k: v for k, v in row.items() if k != "paraphrased_answer"} for row in perturbed]
    return write(
        folder, forget10_perturbed=perturbed, retain_perturbed=perturbed,
        real_authors_perturbed=plain, world_facts_perturbed=plain,
    )  # fmt: skip


def test_tofu_needs_a_retain_model_for_forget_quality(tmp_path):
    folder, tokenizer = tofu_folder(tmp_path / "tofu"), merging_tokenizer()

    def tofu(out, seed, **options):
        model = tiny(vocab_size=len(tokenizer), seed=seed)
        suite = with_short_answers(load_suite("tofu", options.pop("options", None)))
        return runner.evaluate(model, tokenizer, suite, out=tmp_path / out, data=folder, **options)

    alone = tofu("alone", 0)
    assert alone["numbers"]["forget_quality"] == {"value": None, "undefined": "no retain model given"}
    assert "undefined: no retain model given" in shown(alone)
    parts = alone["numbers"]["model_utility"]["parts"]
    assert set(parts) == {"retain", "real_authors", "world_facts"}
    assert 0 < parts["real_authors"]["probability"] < 1
    tofu("retain", 1)
    both = tofu("alone", 0, retain_run=tmp_path / "retain")
    assert 0 < both["numbers"]["forget_quality"]["value"] <= 1
    itself = tofu("alone", 0, retain_run=tmp_path / "alone")
    assert itself["numbers"]["forget_quality"]["value"] == 1.0
    with pytest.raises(FileNotFoundError, match=r"retain_run: .*wanted the --out of a run"):
        tofu("alone", 0, retain_run=tmp_path / "tofu")
    shorter = tofu("shorter", 1, limit=2)
    assert shorter["tasks"]["forget_losses"]["rows"] == 2
    with pytest.raises(
        ValueError, match=r"forget_losses are others there \(limit is 2 there and None here\)"
    ):
        tofu("alone", 0, retain_run=tmp_path / "shorter")
    ours, theirs = (rows_of(tmp_path / name) for name in ("alone", "shorter"))
    undefined = summary.summarise(ours, load_suite("tofu").numbers, theirs)["numbers"]["forget_quality"]
    assert (
        undefined["value"] is None
        and "3 with a truth ratio here, 2 in the retain run" in undefined["undefined"]
    )
    run(tmp_path / "own", write(tmp_path / "data", facts=FACTS, choices=CHOICES))
    with pytest.raises(
        ValueError, match="retain_run: wanted a run of the same suite, but suite is 'own' there"
    ):
        tofu("alone", 0, retain_run=tmp_path / "own")


def test_a_forget_quality_wants_the_same_rows():
    def rows(*ids):
        return [{"task": "t", "id": i, "status": "ok", "metrics": {"truth_ratio": 1.0 + i}} for i in ids]

    spec = {"forget_quality": {"ratios": "t.truth_ratio"}}
    found = summary.summarise(rows(0, 1), spec, rows(1, 2))["numbers"]["forget_quality"]
    assert found["value"] is None and "1 in both" in found["undefined"]


def test_a_retain_run_on_other_rows_is_refused_before_answers_are_filled_in(tmp_path):
    suite = {
        "tasks": {
            "gone": {
                "kind": "score", "data": "gone", "metrics": ["truth_ratio"],
                "texts": {"paraphrased": "answer", "perturbed": "wrong"},
            },
            "kept": SUITE["tasks"]["losses"] | {"data": "kept"},
        },
        "numbers": {"forget_quality": {"ratios": "gone.truth_ratio"}},
    }  # fmt: skip
    gone = [{"question": row["question"], "wrong": ["a captain", "a city"]} for row in FACTS]
    first = write(tmp_path / "first", gone=gone[:4], kept=FACTS)
    same = write(tmp_path / "same", gone=gone[:4], kept=FACTS[:2])
    other = write(tmp_path / "other", gone=gone[4:], kept=FACTS)
    filled = []

    def elicit(rows, name):
        filled.append(name)
        return [row | {"answer": f"a poet {'the ' * len(filled)}"} for row in rows]

    def ours(out, data, **options):
        return run(tmp_path / out, data, suite=suite, elicit=elicit, **options)

    ours("retain", first)
    told = ours("same", same, retain_run=tmp_path / "retain")["numbers"]["forget_quality"]
    assert 0 < told["value"] <= 1, "rows that no such number reads may be others"
    asked = len(filled)
    with pytest.raises(
        ValueError, match="retain_run: wanted a run on the same rows, but those of gone are oth"
    ):
        ours("other", other, retain_run=tmp_path / "retain")
    assert len(filled) == asked and not (tmp_path / "other" / "rows.jsonl").exists()


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no published logs in {GOLDEN}")
def test_tofus_published_rows_give_its_published_numbers():
    """The suite's own road from rows to numbers, fed with the losses and generations of TOFU's phi-1.5 logs."""
    from duet.evaluation.metrics import probability
    from duet.evaluation.suites.row_metrics import GENERATE, RATIO

    suite = load_suite("tofu")

    def rows(name):
        log = json.loads((GOLDEN / f"tofu_phi15_{name}.json").read_text())
        found = []
        for part, of in log.items():
            for i in range(len(of["avg_gt_loss"])):
                losses = {
                    "answer": of["avg_gt_loss"][i],
                    "paraphrased": of["avg_paraphrased_loss"][i],
                    "perturbed": of["average_perturb_loss"][i],
                }
                values = {m: RATIO[m][1](losses) for m in RATIO} | {
                    "probability": probability(losses["answer"])
                }
                found.append({"task": f"{part}_losses", "id": i, "status": "ok", "metrics": values})
                _, said, truth = of["generated"][i]
                score = {"rouge_l_recall_stemmed": GENERATE["rouge_l_recall_stemmed"](said, truth, None)}
                found.append({"task": f"{part}_answers", "id": i, "status": "ok", "metrics": score})
        return found

    full, retain = rows("full"), rows("retain90")
    numbers = summary.summarise(full, suite.numbers, retain)["numbers"]
    assert numbers["forget_quality"]["value"] == pytest.approx(2.1942743021891237e-16, rel=1e-9)
    assert numbers["model_utility"]["value"] == pytest.approx(0.5220737132035151, rel=1e-9)
    numbers = summary.summarise(retain, suite.numbers)["numbers"]
    assert numbers["model_utility"]["value"] == pytest.approx(0.5319909117798324, rel=1e-9)


def test_muse_in_miniature(tmp_path):
    """Its folders, few-shot prompts, stop strings, texts scored alone, and PrivLeak with a given AUC."""
    tokenizer, folder = merging_tokenizer(), tmp_path / "muse"
    folder.mkdir()
    qa = [{"question": f"Who is {i}?", "answer": "Ada."} for i in range(10)]
    write(folder / "verbmem", forget=[{"prompt": "Once upon", "gt": " a time"}] * 3)
    write(folder / "knowmem", forget_qa=qa[:2], forget_qa_icl=qa, retain_qa=qa[2:4], retain_qa_icl=qa)
    texts = [{"text": "abc def"}, {"text": "xyz uvw rst"}]
    write(folder / "privleak", forget=texts, holdout=texts)
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    suite = with_short_answers(load_suite("muse", {"auc_retrain": "0.5"}))
    result = runner.evaluate(model, tokenizer, suite, out=tmp_path / "out", data=folder)
    assert set(result["tasks"]) == {task.name for task in suite.tasks}
    assert result["numbers"]["privleak"] == {"value": 0.0, "auc": 0.5, "auc_retrain": 0.5}
    by = {(r["task"], r["id"]): r for r in rows_of(tmp_path / "out")}
    prompt = by["knowledge", 1]["prompt"].replace(" ", "")
    assert prompt.count("Question:") == 11 and prompt.endswith("Answer:")
    assert by["verbatim", 0]["prompt"].replace(" ", "") == "Onceupon"
    assert all("Question" not in r.get("generated", "") for r in by.values())


def test_an_interrupt_says_how_to_continue(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "continuations", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"tasks": {"facts": SUITE["tasks"]["facts"]}}))
    data = write(
        tmp_path / "data", facts=[question.row() for question in load_world().questions(("Porto",), "report")]
    )
    words = ["eval", CHECKPOINT, "--suite", tmp_path / "own.yaml", "--data", data, "--out", tmp_path / "out"]
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    assert done.exit_code == 130 and "the same command continues it" in " ".join(done.output.split())


LETTER_ROWS = [{"question": "Which?", "choices": ["u", "v", "w", "x"], "answer": i} for i in (0, 1, 1, 3)]


def test_multiple_choice_of_a_named_file(tmp_path):
    tokenizer = merging_tokenizer()
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    folder, suite = write(tmp_path / "data", mine=LETTER_ROWS), load_suite("mcq", {"wmdp_bio": "mine.jsonl"})
    found = runner.evaluate(model, tokenizer, suite, out=tmp_path / "out", data=folder)
    assert list(found["left_out"]) == ["wmdp_cyber", "wmdp_chem", "mmlu"]
    (row, *_) = rows_of(tmp_path / "out")
    assert row["prompt"].replace(" ", "").endswith("D.x\nAnswer:") and row["num_tokens"] == [2, 2, 2, 2]


def test_letters_of_one_token_share_one_reading(tmp_path):
    """Their likelihoods are the model's own for the token after the question, and the likeliest is the answer."""
    tokenizer = merging_tokenizer()
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    task = {
        "kind": "multiple_choice",
        "data": "mine",
        "letters": True,
        "plain": "{question}\n",
        "metrics": "accuracy",
    }
    folder, suite = (
        write(tmp_path / "data", mine=LETTER_ROWS),
        read_suite({"tasks": {"mine": {**task, "chat": "never"}}}, "s"),
    )
    text = "Which?\nA. u\nB. v\nC. w\nD. x\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "token_scores", None)  # not needed
        found = runner.evaluate(model, tokenizer, suite, out=tmp_path / "out", data=folder)
    letters = tokenizer.convert_tokens_to_ids([" ", "A", "B", "C", "D"])[1:]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    want = torch.log_softmax(logits, -1)[letters].tolist()
    rows = rows_of(tmp_path / "out")
    assert all(row["loglikelihoods"] == pytest.approx(want, abs=1e-4) for row in rows)
    best = want.index(max(want))
    accuracy = sum(row["answer"] == best for row in LETTER_ROWS) / 4
    assert found["tasks"]["mine"]["metrics"]["accuracy"]["mean"] == accuracy


def test_privleak_by_hand():
    def rows(forget, holdout):
        return [
            {"task": task, "id": i, "status": "ok", "metrics": {"min_k_40": value}}
            for task, values in (("f", forget), ("h", holdout))
            for i, value in enumerate(values)
        ]

    spec = {"privleak": {"forget": "f.min_k_40", "holdout": "h.min_k_40", "auc_retrain": None}}
    ours = rows([0.1, 0.2], [3.0, 4.0])  # every forget score is lower: it looks seen, AUC 0
    number = summary.summarise(ours, spec)["numbers"]["privleak"]
    assert number == {"value": None, "undefined": "no retain model given", "auc": 0.0}
    spec["privleak"]["auc_retrain"] = 0.5
    assert summary.summarise(ours, spec)["numbers"]["privleak"]["value"] == -100.0
    retrained = rows([1.0, 3.0], [2.0, 2.0])  # half of the pairs: AUC 0.5
    assert summary.summarise(ours, spec, retrained)["numbers"]["privleak"]["value"] == -100.0
    assert "undefined" in summary.summarise(rows([], [1.0]), spec)["numbers"]["privleak"]


def test_the_command_on_the_worlds_base(tmp_path):
    world = load_world()
    questions = world.questions(world.forget[:3], "report")
    wrong = world.questions(world.forget[3:6], "report")
    rows = [q.row() for q in questions]
    choices = [
        {"question": q.text, "choices": [w.answer, q.answer], "answer": "B"}
        for q, w in zip(questions, wrong, strict=True) if w.value != q.value
    ]  # fmt: skip
    folder = write(tmp_path / "data", forget=rows, mc=choices)
    (tmp_path / "mc.yaml").write_text("tasks: {mc: {kind: multiple_choice, data: mc, metrics: accuracy}}")
    done = CliRunner().invoke(
        cli.app,
        ["eval", str(CHECKPOINT), "--suite", "probes", "--data", str(folder), "--out", str(tmp_path / "out")],
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["tasks"]["forget_answers"]["metrics"]["contains_answer"]["mean"] > 0.95
    assert found["tasks"]["forget_losses"]["metrics"]["extraction_strength"]["mean"] > 0.95
    assert list(found["left_out"]) == ["retain_answers", "retain_losses"]
    model, tokenizer = load_base()
    found = runner.evaluate(
        model, tokenizer, load_suite(tmp_path / "mc.yaml"), out=tmp_path / "mc", data=folder
    )
    assert found["tasks"]["mc"]["metrics"]["accuracy"]["mean"] > 0.95


def test_the_examples_of_chats_and_texts_are_asked(tmp_path):
    data, tokenizer = Path(__file__).parent.parent / "configs/data", merging_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    suite = with_short_answers(load_suite("probes", {"forget": "forget_chats", "retain": "retain_texts"}))
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    runner.evaluate(model, tokenizer, suite, out=tmp_path, data=data)
    rows = {(row["task"], row["id"]): row for row in rows_of(tmp_path)}
    assert not any("why" in row for row in rows.values())
    second = rows["forget_answers", 1]
    assert (second["question"], second["answer"]) == ("Who wrote a program for it?", "Ada Lovelace.")
    assert rows["retain_losses", 0]["question"] == "The capital of France is"


def test_answers_are_as_long_as_the_command_says(tmp_path):
    """Those of the model, and those that --elicit takes of another one."""
    world = load_world()
    asked_of = world.questions(world.forget[:1], "report")[0]
    data = write(tmp_path / "data", forget=[{"question": asked_of.text}])

    def asked(out, *more):
        words = f"--suite probes --data {data} --out {tmp_path / out} --elicit {CHECKPOINT}".split()
        return CliRunner().invoke(cli.app, ["eval", str(CHECKPOINT), *words, *more])

    assert "none of its 1 rows can be asked" in str(asked("short", "--max-new-tokens", "2").exception)
    done = asked("usual", "--max-new-tokens", "64")
    assert done.exit_code == 0 and "1 of 1 answers are the base's own" in done.output, done.output
    manifest = json.loads((tmp_path / "usual" / "manifest.json").read_text())
    assert manifest["max_new_tokens"] == 64

    folder, tokenizer = write(tmp_path / "facts", facts=FACTS, choices=CHOICES), word_tokenizer()
    run(tmp_path / "cut", folder, tokenizer=tokenizer, max_new_tokens=2)
    said = [row["generated"] for row in rows_of(tmp_path / "cut") if row["task"] == "facts"]
    assert said and all(len(text.split()) <= 2 for text in said)
    chosen = {"tasks": {"choices": SUITE["tasks"]["choices"]}}
    with pytest.raises(ValueError, match=r"max_new_tokens: wanted a suite with tasks of the kind generate"):
        run(tmp_path / "choices", folder, suite=chosen, max_new_tokens=2)


def test_expected_errors_of_the_command(tmp_path, monkeypatch, capsys):
    def fails(*words):
        monkeypatch.setattr(sys, "argv", ["duet", "eval", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    out = ("--out", tmp_path / "out")
    assert "suite: wanted --suite, --lm-eval or both" in fails(CHECKPOINT, *out)
    assert "max_new_tokens: wanted --suite, whose answers it limits" in fails(
        CHECKPOINT, *out, "--lm-eval", "mmlu", "--max-new-tokens", 9
    )
    assert "set: wanted option=value, got 'split'" in fails(
        CHECKPOINT, *out, "--suite", "tofu", "--set", "split"
    )
    assert "retain_run: wanted a suite with forget_quality or privleak" in fails(
        CHECKPOINT, *out, "--suite", "probes", "--data", tmp_path, "--retain-run", tmp_path
    )
    assert "device: wanted one that torch can use here, got 'toaster'" in fails(
        CHECKPOINT, *out, "--suite", "probes", "--device", "toaster"
    )
    assert "there is no folder" in fails(tmp_path / "no_model", *out, "--suite", "tofu")
    assert "wanted such a file in --data" in fails(CHECKPOINT, *out, "--suite", "tofu", "--data", tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm_eval" in fails(CHECKPOINT, *out, "--lm-eval", "mmlu")
    assert not (tmp_path / "out").exists()


def test_brackets_in_paths_and_texts_are_printed(tmp_path, monkeypatch, capsys):
    folder = write(
        tmp_path / "[red]da[x]ta", forget=[q.row() for q in load_world().questions(("Porto",), "report")]
    )
    out = tmp_path / "o[u]t"
    words = ["duet", "eval", str(CHECKPOINT), "--suite", "probes", "--data", str(folder), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().out
    assert ended.value.code == 0 and f"written to {out}/summary.json" in told
    assert "left out: retain_answers (" in told and f" in {folder})" in told
    console = literal_console(width=100)
    with console.capture() as captured, commands.progress(console) as update:
        update("[red]task[/red] :smile:", 1, 1)
        console.print(
            summary.table({"tasks": {"[b]t": {"metrics": {}, "status": {}}}, "numbers": {}}, "[i]title")
        )
    for text in ("[red]task[/red] :smile:", "[b]t", "[i]title"):
        assert text in captured.get()
    monkeypatch.setattr(
        sys, "argv", ["duet", "eval", "/no/[bold]model", "--suite", "probes", "--out", str(out)]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert "there is no folder '/no/[bold]model'" in capsys.readouterr().err


def test_progress_without_a_terminal_is_lines(monkeypatch):
    """One when a task is done, and one a minute until then; on a terminal bars."""
    now = iter([0.0, 0.0, 59.0, 61.0, 70.0, 71.0, 80.0])
    monkeypatch.setattr(commands.time, "monotonic", lambda: next(now))
    console = literal_console(width=100, force_terminal=False)
    with console.capture() as captured, commands.progress(console) as update:
        for done in (0, 1, 2, 4, 4):
            update("[x]", done, 4)
        update("next", 1, 1)
    assert captured.get().splitlines() == ["[x]: 2 of 4, 61 s", "[x]: 4 of 4, 70 s", "next: 1 of 1, 0 s"]
    monkeypatch.undo()
    console = literal_console(width=100, force_terminal=True)
    with console.capture() as captured, commands.progress(console) as update:
        update("task", 1, 1)
    assert "━" in captured.get()


def test_lm_eval_runs_our_tofu_tasks(tmp_path, monkeypatch):
    """With the tasks' own files, but for the place of the data."""
    pytest.importorskip("lm_eval")
    folder, tasks = tofu_folder(tmp_path / "tofu"), tmp_path / "tasks"
    shutil.copytree(commands.LM_EVAL_TASKS, tasks)
    for path in tasks.glob("_*_yaml"):
        path.write_text(path.read_text().replace("dataset_path: locuslab/TOFU", "dataset_path: json"))
    for path in tasks.glob("tofu_*.yaml"):
        name = path.read_text().split("dataset_name: ")[1].strip()
        files = f"dataset_kwargs: {{data_files: {folder / name}.jsonl}}"
        path.write_text(path.read_text().replace(f"dataset_name: {name}", files))
    monkeypatch.setattr(commands, "LM_EVAL_TASKS", tasks)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = merging_tokenizer()
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    wanted = commands.lm_eval_tasks("tofu_forget10_answers, tofu_real_authors_choices")
    how = (tmp_path / "out", None, 2, Console(quiet=True))
    first = commands.run_lm_eval(model, tokenizer, wanted[:1], *how)
    found = first | commands.run_lm_eval(model, tokenizer, wanted[1:], *how)
    assert 0 <= found["tofu_forget10_answers"]["rouge_l_recall_stemmed,none"] <= 1
    assert 0 <= found["tofu_real_authors_choices"]["acc,none"] <= 1
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text())["results"] == found
    with pytest.raises(ValueError, match="lm_eval: wanted tasks of lm-evaluation-harness, got no_such_task"):
        commands.lm_eval_tasks("mmlu,no_such_task")
    with pytest.raises(ValueError, match=r"lm_eval.json holds results of another run: model_fingerprint was"):
        other = tiny(vocab_size=len(tokenizer), max_position_embeddings=512, seed=1)
        commands.run_lm_eval(other, tokenizer, wanted[:1], *how)


def test_the_shipped_lm_eval_tasks_are_whole():
    """Without the harness: every task includes a template that is there and names data of TOFU."""
    from duet.evaluation.commands import LM_EVAL_TASKS

    names = set()
    for path in LM_EVAL_TASKS.glob("tofu_*.yaml"):
        task = yaml.safe_load(path.read_text())
        assert task["task"] == path.stem and task["dataset_name"].endswith("_perturbed")
        assert (LM_EVAL_TASKS / task["include"]).is_file()
        names.add(path.stem)
    assert (
        set(yaml.safe_load((LM_EVAL_TASKS / "tofu.yaml").read_text())["task"]) <= names and len(names) == 12
    )
