"""`duet import`: tiny files in the layouts of RWKU, OpenUnlearning, WMDP and MMLU become rows that the commands read."""

import errno
import json
import os
import shlex
import time

import pytest
from test_facts import duet
from tiny_models import tiny, word_tokenizer

from duet.data.importers import import_rows, write_rows
from duet.evaluation.attacks.rows import read_attack_rows
from duet.evaluation.suites import runner
from duet.evaluation.suites.suite import load_suite, load_table


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4))


def probe(query, answer, level, type_):
    return {"query": query, "answer": answer, "level": level, "type": type_, "subject": "Stephen King"}


def test_rwku(tmp_path):
    target = "LLaMA-Factory/data/RWKU/Target/1_Stephen_King"
    files = {
        "intro.json": [{"target": "Stephen King", "intro": "..."}],
        "forget_level1.json": [probe("Stephen King was born in ___.", "Portland", "1", "cloze")],
        "forget_level2.json": [probe("What was his first novel?", "Carrie", "2", "simple question")],
        "forget_level3.json": [probe("Sure! Q: His first novel?", "Carrie", "3", "prefix injection")],
        "neighbor_level2.json": [probe("Who wrote Dracula?", "Bram Stoker", "2", "simple question")],
        "retain_mmlu.json": [],
    }
    put(tmp_path / target, files)
    found = import_rows(tmp_path, "rwku")
    assert {name: len(rows) for name, rows in found.tables.items()} == {
        "forget": 2,
        "adversarial": 1,
        "retain": 1,
    }
    blank, brief = found.tables["forget"]
    assert blank == {
        "question": "Please complete the blank in the following question.\nQuestion: Stephen King was born in ___.",
        "subject": "Stephen King", "answer": "Portland", "value": "Portland", "level": "1", "type": "cloze",
    }  # fmt: skip
    assert (
        brief["question"].startswith("Please briefly answer") and "subject" not in found.tables["retain"][0]
    )
    assert [row.value for row in read_attack_rows(found.tables["forget"], "forget")] == ["Portland", "Carrie"]
    assert len(import_rows(tmp_path / target / "forget_level2.json", "rwku").tables["forget"]) == 1
    with pytest.raises(ValueError, match=r"wanted a file such as forget_level2.json, got .*intro.json"):
        import_rows(tmp_path / target / "intro.json", "rwku")
    put(tmp_path, {"forget_level1.json": [{"query": "?", "answer": 1947}]})
    with pytest.raises(ValueError, match=r"forget_level1.json, row 0: wanted a text 'answer', got 1947"):
        import_rows(tmp_path, "rwku")
    put(tmp_path, {"forget_level1.json": [{"question": "?"}]})
    with pytest.raises(
        ValueError, match=r"forget_level1.json, row 0: wanted a text 'query', got the keys \['question'\]"
    ):
        import_rows(tmp_path, "rwku")


def eval_log(*inputs):
    each = [
        {
            "rouge1_recall": 0.5,
            "rougeL_f1": 0.4,
            "rougeL_recall": 0.5,
            "input": text,
            "ground_truth": "Paris",
            "generation": "x",
        }
        for text in inputs
    ]
    return {"agg_value": 0.5, "value_by_index": {str(i): value for i, value in enumerate(each)}}


LLAMA = "system\n\nCutting Knowledge Date: December 2023\n\nYou are a user of words.user\n\nWhat is it?assistant\n\n"


def test_openunlearning(tmp_path, capsys):
    run = tmp_path / "saves" / "unlearn" / "NPO"
    log = {
        "extraction_strength": {"agg_value": 0.25, "value_by_index": {"0": {"score": 0.25}}},
        "forget_Q_A_Prob": {"agg_value": 0.1, "value_by_index": {"0": {"prob": 0.1, "avg_loss": 2.3}}},
        "forget_Q_A_ROUGE": eval_log(LLAMA, "[INST] And this? [/INST]", "Once upon a time", LLAMA),
        "forget_quality": {"agg_value": None},
        "ra_Q_A_ROUGE": eval_log("Question: Who?\nAnswer: "),
        "retain_Q_A_ROUGE": eval_log(
            "<|system|>\nBe brief.\n<|user|>\nWhere?\n<|assistant|>\n",
            "user\nOnce?\nmodel\nNo\nuser\nWhich model?\nmodel\n",
        ),
        "privleak": {"agg_value": float("nan")},
    }
    put(run, {
        "checkpoint-60/evals/TOFU_EVAL.json": {"forget_Q_A_ROUGE": eval_log("[INST] old [/INST]")},
        "evals/TOFU_EVAL.json": log, "evals/TOFU_SUMMARY.json": {"forget_Q_A_ROUGE": 0.5}, "config.json": {},
    })  # fmt: skip
    found = import_rows(run, "openunlearning")
    assert found.tables == {
        "forget": [
            {"question": "What is it?", "answer": "Paris"},
            {"question": "And this?", "answer": "Paris"},
            {"prompt": "Once upon a time", "answer": "Paris"},
        ],
        "retain": [
            {"question": "Who?", "answer": "Paris"},
            {"question": "Where?", "answer": "Paris"},
            {"question": "Which model?", "answer": "Paris"},
        ],
    }
    assert found.model == run
    assert import_rows(run / "evals" / "TOFU_EVAL.json", "openunlearning").model == run
    put(tmp_path, {"config.json": {}, "a/b/TOFU_EVAL.json": log})
    for path in (tmp_path / "a/b", tmp_path / "a/b/TOFU_EVAL.json"):
        assert import_rows(path, "openunlearning").model is None, "a model above the run is another one"
    assert found.numbers == {
        "extraction_strength": 0.25, "forget_Q_A_Prob": 0.1, "forget_Q_A_ROUGE": 0.5, "ra_Q_A_ROUGE": 0.5, "retain_Q_A_ROUGE": 0.5
    }  # fmt: skip
    said = duet("import", run, "--kind", "openunlearning", "--out", tmp_path / "out").output
    assert f"duet attack {run} --forget {tmp_path / 'out' / 'forget.jsonl'}" in said.replace("\n", "")
    assert json.loads((tmp_path / "out" / "published.json").read_text()) == found.numbers
    # checkpoints alone: the last one counts, and the model is the one that was evaluated
    late = tmp_path / "late"
    for steps in (9, 60):
        put(late / f"checkpoint-{steps}", {
            "evals/MUSE_EVAL.json": {"forget_knowmem_ROUGE": eval_log(f"step {steps}")}, "adapter_config.json": {}
        })  # fmt: skip
    last = import_rows(late, "openunlearning")
    assert last.tables["forget"][0]["prompt"] == "step 60" and last.model == late / "checkpoint-60"
    with pytest.raises(ValueError, match=r"wanted rows of openunlearning in .*, got none"):
        put(tmp_path, {"X_EVAL.json": {"mia_loss": {"agg_value": 0.5}}})
        import_rows(tmp_path / "X_EVAL.json", "openunlearning")
    with pytest.raises(ValueError, match=r"wanted a run with \*_EVAL.json in it"):
        import_rows(tmp_path / "out", "openunlearning")


def test_of_several_runs_of_openunlearning_none_is_taken(tmp_path):
    for run in ("GradAscent", "NPO"):
        put(tmp_path / "saves" / run / "evals", {"TOFU_EVAL.json": {"forget_Q_A_ROUGE": eval_log(run)}})
    with pytest.raises(ValueError, match=r"wanted the folder of one run, got 2 in .*GradAscent, .*NPO"):
        import_rows(tmp_path / "saves", "openunlearning")
    assert import_rows(tmp_path / "saves" / "NPO", "openunlearning").tables["forget"][0]["prompt"] == "NPO"
    step = tmp_path / "saves" / "NPO" / "checkpoint-5" / "evals_forget"
    put(step, {"TOFU_EVAL.json": {"forget_Q_A_ROUGE": eval_log("five")}})
    assert import_rows(tmp_path / "saves" / "NPO", "openunlearning").tables["forget"][0]["prompt"] == "NPO"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"agg_value": True}, r"forget_x, 'agg_value': wanted a number, got True"),
        ({"agg_value": [0.5]}, r"forget_x, 'agg_value': wanted a number, got \[0.5\]"),
        ({"value_by_index": {"7": {"input": "?", "ground_truth": ["a"]}}}, r"index 7, 'ground_truth': wanted a text, got \['a'\]"),
        ({"value_by_index": {"7": {"input": "?", "ground_truth": 0}}}, r"index 7, 'ground_truth': wanted a text, got 0"),
        ({"value_by_index": {"7": {"input": None, "ground_truth": "a"}}}, r"index 7, 'input': wanted a text, got None"),
    ],
)  # fmt: skip
def test_fields_of_openunlearning_of_another_type(tmp_path, entry, said):
    put(tmp_path, {"X_EVAL.json": {"forget_x": entry}})
    with pytest.raises(ValueError, match=f"path: .*X_EVAL.json, {said}" if "forget_x" in said else said):
        import_rows(tmp_path, "openunlearning")


def test_another_import_overwrites_nothing(tmp_path):
    row = {"question": "who is the captain ?", "choices": ["ada", "alan"], "answer": 1}
    put(tmp_path, {"wmdp.json": [row], "mmlu.json": [row | {"question": "what is red ?"}]})
    out = tmp_path / "rows"
    first = write_rows(import_rows(tmp_path / "wmdp.json", "choices"), out)
    assert [path.name for path in first] == ["forget.jsonl", "choices.jsonl", "forget_open.jsonl"]
    before = {path: path.read_bytes() for path in first}
    assert write_rows(import_rows(tmp_path / "wmdp.json", "choices"), out) == first, "the same once more"
    other = import_rows(tmp_path / "mmlu.json", "choices", "retain")
    with pytest.raises(ValueError, match=r"out: .*choices.jsonl is there with other content; wanted another"):
        write_rows(other, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    put(tmp_path, {"folder/published.json/x": ""})
    with pytest.raises(ValueError, match=r"published.json is there with other content"):
        write_rows(other._replace(numbers={"a": 1.0}), tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["published.json"]


def test_an_import_that_fails_writes_no_file(tmp_path, monkeypatch):
    """So that it can be done again into the same folder."""
    put(
        tmp_path,
        {
            "forget_level1.json": [
                probe("?", "Portland", "1", "cloze"),
                probe("half a pair: \ud83d", "x", "1", ""),
            ]
        },
    )
    out = tmp_path / "rows"
    with pytest.raises(
        ValueError, match=r"path: forget, row 1: .* UTF-8 can write, got .*half a pair: .ud83d"
    ):
        write_rows(import_rows(tmp_path, "rwku"), out)
    assert not out.exists()
    put(tmp_path, {"forget_level1.json": [probe("?", "Portland", "1", "cloze")]})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"^out: '.*rows' could not be written: .* No space left"):
            write_rows(import_rows(tmp_path, "rwku"), out)
    assert not list(out.iterdir())
    assert len(write_rows(import_rows(tmp_path, "rwku"), out)) == 1


@pytest.mark.parametrize(
    "text",
    ["user" + 20_000 * "\n" + "x", "[INST]" * 15_000 + "[/INST]" * 15_000 + "x", "user\n" * 5000 + "assistan", " " * 20_000 + "x"],
    ids=["lines", "templates", "roles", "blanks"],
)  # fmt: skip
def test_no_text_of_openunlearning_takes_long(tmp_path, text):
    put(tmp_path, {"X_EVAL.json": {"forget_x": eval_log(text)}})
    began = time.process_time()
    assert import_rows(tmp_path, "openunlearning").tables["forget"][0]["prompt"] == text
    assert time.process_time() - began < 5


def test_what_comes_next_can_be_copied(tmp_path):
    """A folder's name is one word of the command, whatever it holds."""
    run, out = tmp_path / "run; touch x #", tmp_path / "the rows"
    put(run, {"evals/X_EVAL.json": {"forget_x": eval_log("a"), "retain_x": eval_log("b")}, "config.json": {}})
    said = duet("import", run, "--kind", "openunlearning", "--out", out).output.splitlines()
    (line,) = (each for each in said if each.startswith("duet attack"))
    wanted = [
        str(run),
        "--forget",
        f"{out / 'forget.jsonl'}",
        "--retain",
        f"{out / 'retain.jsonl'}",
        "--out",
        "attack",
    ]
    assert shlex.split(line)[2:9] == wanted
    row = {"question": "who is the captain ?", "choices": ["ada", "alan"], "answer": 1}
    put(tmp_path, {"wmdp.json": [row]})
    said = duet("import", tmp_path / "wmdp.json", "--kind", "choices", "--out", tmp_path / "a b").output
    assert f"--data '{tmp_path / 'a b'}' --set" in said


def test_choices(tmp_path):
    wmdp = [{"answer": 1, "choices": ["ada", "alan", "grace", "turing"], "question": "who is the captain ?"}]
    mmlu = {"question": "what is red ?", "subject": "colors", "choices": ["sea", "river"], "answer": "A"}
    put(tmp_path, {
        "wmdp-bio.jsonl": "".join(json.dumps(row) + "\n" for row in wmdp),
        "mmlu.json": [mmlu, mmlu | {"answer": "river", "question": "what is blue ?"}],
        "own/anatomy_test.csv": '"who is ""ada"", then ?",a poet,a captain,an animal,a river,B\n',
    })  # fmt: skip
    found = import_rows(tmp_path / "wmdp-bio.jsonl", "choices")
    assert found.tables["forget"] == [{
        "question": "who is the captain ?\nA. ada\nB. alan\nC. grace\nD. turing", "answer": "alan", "value": "alan"
    }]  # fmt: skip
    assert found.tables["forget_open"] == [
        {"question": "who is the captain ?", "answer": "alan", "value": "alan"}
    ]
    (asked,) = read_attack_rows(found.tables["forget"], "forget")
    assert asked.opening() == "", "its letter would be the solution"
    assert found.tables["choices"] == [
        {"question": "who is the captain ?", "choices": wmdp[0]["choices"], "answer": 1}
    ]
    put(tmp_path, {"quote.csv": '"Which" is it,a,b,c,d,B\n'})
    assert import_rows(tmp_path / "quote.csv", "choices").tables["choices"][0]["question"] == "Which is it"
    kept = import_rows(tmp_path / "mmlu.json", "choices", "retain").tables
    assert [(row["answer"], row["subject"]) for row in kept["retain"]] == [
        ("sea", "colors"),
        ("river", "colors"),
    ]
    done = duet("import", tmp_path / "mmlu.json", "--kind", "choices", "--out", tmp_path / "rows")
    assert "--set wmdp_bio=choices --out choices asks for the letter" in done.output.replace("\n", " ")
    assert f"--forget {tmp_path / 'rows' / 'forget_open'}.jsonl" in done.output.replace("\n", "")
    alike = ("which of the following is red ?", "is it Alan ?", "the captain is")
    put(tmp_path, {"closed.json": [wmdp[0] | {"question": text} for text in alike]})
    told = duet("import", tmp_path / "closed.json", "--kind", "choices", "--out", tmp_path / "closed")
    assert f"--forget {tmp_path / 'closed' / 'forget'}.jsonl" in told.output.replace("\n", "")
    about = import_rows(tmp_path / "wmdp-bio.jsonl", "choices", subject="captains").tables
    assert {row["subject"] for rows in about.values() for row in rows} == {"captains"} and len(about) == 3
    assert (
        import_rows(tmp_path / "mmlu.json", "choices", subject="red").tables["forget"][0]["subject"]
        == "colors"
    )
    with pytest.raises(ValueError, match="subject: wanted rows to forget"):
        import_rows(tmp_path / "mmlu.json", "choices", "retain", "red")
    own = import_rows(tmp_path / "own", "choices", "retain")
    write_rows(own, tmp_path / "data")
    (row,) = load_table(tmp_path / "data", "choices", None, "mmlu")
    assert row == {
        "question": 'who is "ada", then ?', "choices": ["a poet", "a captain", "an animal", "a river"], "answer": 1
    }  # fmt: skip
    suite = load_suite("mcq", {"mmlu": "choices"})
    # read and understood; this tokenizer alone has no letters
    said = r"data: no task of mcq can be asked: mmlu: none .*row 0: the tokenizer cannot represent ' A'$"
    with pytest.raises(ValueError, match=said):
        runner.evaluate(tiny(), word_tokenizer(), suite, out=tmp_path / "out", data=tmp_path / "data")
    for name, content, said in (
        (
            "a.json",
            [wmdp[0] | {"answer": 4}],
            r"row 0, 'answer': .* letter or text of one of 4 choices, got 4",
        ),
        ("b.json", [{"question": "q", "choices": ["a"]}], r"'choices': wanted a list of 2 to 10"),
        ("c.csv", "question,answer\n1,2\n", r"c.csv, line 1: wanted MMLU's cells"),
        (
            "d.csv",
            "q,a,b,c,d,A\nq,a,b,c,d,E\n",
            r"d.csv, line 2: wanted MMLU's cells .* got 6: 'q, a, b, c, d, E'",
        ),
        ("e.csv", "q,a,,c,d,A\n", r"row 0, 'choices': wanted a text that is not empty, got ''"),
        ("f.csv", "", r"f.csv: wanted MMLU's rows, got none"),
        (
            "g.json",
            [mmlu | {"choices": ["a", None]}],
            r"row 0, 'choices': wanted a text, got None",
        ),
        (
            "h.json",
            [mmlu | {"choices": ["B", "A"]}],
            r"row 0, 'answer': .*got 'A', which means 'B' as well as 'A'",
        ),
    ):
        put(tmp_path, {name: content})
        with pytest.raises(ValueError, match=said):
            import_rows(tmp_path / name, "choices")
    (tmp_path / "i.csv").write_bytes("q,caf\u00e9,b,c,d,A\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"i.csv, line 1: wanted UTF-8 text"):
        import_rows(tmp_path / "i.csv", "choices")
    put(tmp_path, {"j.csv": f'q,"{"long " * 40_000}",b,c,d,A\nWhich blood group?,B,A,AB,O,A\n'})
    book, blood = import_rows(tmp_path / "j.csv", "choices").tables["forget"]
    assert len(book["value"]) == 200_000 and blood["answer"] == blood["value"] == "B"
    with pytest.raises(ValueError, match="kind: wanted one of rwku, openunlearning, choices"):
        import_rows(tmp_path, "tofu")
    with pytest.raises(FileNotFoundError, match="path: there is no file or folder"):
        import_rows(tmp_path / "none", "rwku")
