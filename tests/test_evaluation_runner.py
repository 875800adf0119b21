"""`duet eval`: rows, resumption, rows that are marked, the journal."""

import importlib.util
import json

import pytest
import torch
from forks import ended_by, forked
from tiny_models import tiny, word_tokenizer

from duet import cli
from duet.data.prompts import Prompting
from duet.evaluation.commands import literal_console
from duet.evaluation.elicit import ELICITED
from duet.evaluation.generation import Continuation
from duet.evaluation.journal import Journal
from duet.evaluation.suites import runner, summary
from duet.evaluation.suites.suite import read_suite
from duet.model.hashes import fingerprint

SUITE = {
    "tasks": {
        "facts": {
            "kind": "generate",
            "data": "facts",
            "max_new_tokens": 6,
            "metrics": ["rouge_l_f1", "contains_answer"],
        },
        "losses": {"kind": "score", "data": "facts", "metrics": ["probability", "min_k_20"]},
        "choices": {
            "kind": "multiple_choice",
            "data": "choices",
            "metrics": ["accuracy", "accuracy_per_token"],
        },
    }
}
PEOPLE = "ada alan grace hopper turing lovelace france spain".split()  # noqa: SIM905
FACTS = [{"question": f"who is {name} {'the ' * i}?", "answer": "a poet"} for i, name in enumerate(PEOPLE)]
CHOICES = [{"question": "who is ada ?", "choices": ["paris", "a poet", "yes"], "answer": i} for i in range(3)]


def write(folder, **tables):
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data", facts=FACTS, choices=CHOICES)


def run(out, data, model=None, suite=SUITE, tokenizer=None, **options):
    return runner.evaluate(
        model or tiny(), tokenizer or word_tokenizer(), read_suite(suite, "own"), out=out, data=data,
        **{"batch_size": 3, "name": "tiny", **options},
    )  # fmt: skip


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_run_writes_every_row_once(tmp_path, data):
    seen = []
    result = run(tmp_path / "out", data, progress=lambda *at: seen.append(at))
    rows = rows_of(tmp_path / "out")
    assert sorted((r["task"], r["id"]) for r in rows) == sorted(
        [(task, i) for task in ("facts", "losses") for i in range(8)] + [("choices", i) for i in range(3)]
    )
    assert {r["model"] for r in rows} == {fingerprint(tiny())} and {r["suite"] for r in rows} == {"own"}
    by = {(r["task"], r["id"]): r for r in rows}
    assert by["facts", 2]["answer"] == "a poet" and by["facts", 2]["prompt"].startswith(
        "<s> <user> who is grace"
    )
    assert by["losses", 2]["losses"]["answer"] > 0 and by["losses", 2]["num_tokens"] == {"answer": 3}
    assert len(by["choices", 0]["loglikelihoods"]) == 3
    assert (
        sum(by["choices", i]["metrics"]["accuracy"] for i in range(3)) == 1
    )  # one of three answers is the likeliest
    assert result == json.loads((tmp_path / "out" / "summary.json").read_text())
    probability = result["tasks"]["losses"]["metrics"]["probability"]
    assert probability["rows"] == 8
    assert probability["mean"] == pytest.approx(
        sum(by["losses", i]["metrics"]["probability"] for i in range(8)) / 8
    )
    assert probability["low"] < probability["mean"] < probability["high"]
    assert seen[-1] == ("choices", 3, 3)


class Killed(BaseException):
    pass


def test_an_interrupted_run_ends_with_the_same_file(tmp_path, data):
    run(tmp_path / "whole", data)
    whole = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    for after in (3, 9, 17):
        out = tmp_path / f"killed{after}"

        def kill(task, done, total, after=after, out=out):
            if len(rows_of(out)) >= after:
                raise Killed

        with pytest.raises(Killed):
            run(out, data, progress=kill)
        assert after <= len(rows_of(out)) < 19
        run(out, data)
        assert (out / "rows.jsonl").read_bytes() == whole


def test_a_torn_file_is_mended(tmp_path, data):
    """Killed in the middle of a line, between two rows of a batch, or before the first."""
    run(tmp_path / "out", data)
    path = tmp_path / "out" / "rows.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1)
    for size in (0, 1, second - 5, second, second + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        run(tmp_path / "out", data)
        assert path.read_bytes() == whole


def test_a_finished_run_computes_nothing(tmp_path, data, monkeypatch):
    first = run(tmp_path / "out", data)
    monkeypatch.setattr(runner, "continuations", None)
    monkeypatch.setattr(runner, "token_scores", None)
    assert run(tmp_path / "out", data) == first


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "other"}, "model_fingerprint was .* and is .* now"),
        ({"model": "half"}, 'model_dtype was "float32" and is "bfloat16" now'),
        ({"suite": {**SUITE, "name": "another"}}, 'suite was "own" and is "another" now'),
        ({"limit": 4}, "limit was null and is 4 now"),
        ({"max_new_tokens": 3}, "max_new_tokens was null and is 3 now"),
        ({"tokenizer": "other"}, "tokenizer_fingerprint was"),
        ({"data": "other"}, "data was"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path, data, change, field):
    run(tmp_path / "out", data, limit=None)
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    if change.get("model") == "half":
        change["model"] = tiny().bfloat16()
    elif "model" in change:
        change["model"] = tiny()
        with torch.no_grad():
            change["model"].model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    if "tokenizer" in change:
        change["tokenizer"] = word_tokenizer(chat_template=None)
    folder = write(tmp_path / "other", facts=FACTS[1:], choices=CHOICES) if "data" in change else data
    with pytest.raises(ValueError, match=f"out: .*holds results of another run: {field}"):
        run(tmp_path / "out", folder, **{k: v for k, v in change.items() if k != "data"})
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


def test_another_configuration_is_another_run(tmp_path, data):
    """The weights are the same; a folder of an earlier version, which says nothing of it, is gone on with."""
    out = tmp_path / "out"
    run(out, data)
    with pytest.raises(ValueError, match=r"holds results of another run: model_config was"):
        run(out, data, model=tiny(rms_norm_eps=1e-3))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["model_config"], manifest["model_dtype"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    run(out, data)
    (out / "manifest.json").write_text(json.dumps(manifest | {"schema": 1}))
    with pytest.raises(ValueError, match="schema was 1 and is 2 now"):  # which judged answers otherwise
        run(out, data)


def test_other_worked_examples_are_another_run(tmp_path, data):
    few_shot = {"data": "worked", "count": 1}
    suite = {"tasks": {"losses": {**SUITE["tasks"]["losses"], "few_shot": few_shot}}}
    write(data, worked=[*FACTS[:1], *FACTS[2:4]])
    first = run(tmp_path / "out", data, suite=suite)
    write(data, worked=FACTS[:2])  # the example that is shown is the same
    assert run(tmp_path / "out", data, suite=suite) == first
    write(data, worked=FACTS[1:2])
    with pytest.raises(ValueError, match=r'few_shot was {"losses": .* now; wanted a new folder'):
        run(tmp_path / "out", data, suite=suite)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del manifest["few_shot"]  # as earlier versions wrote it
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"few_shot was null and is .* now; wanted a new folder"):
        run(tmp_path / "out", data, suite=suite)


def test_another_steering_or_other_prompts_are_another_run(tmp_path, data):
    suite = {"tasks": {"losses": SUITE["tasks"]["losses"]}}
    run(tmp_path / "out", data, suite=suite)
    with pytest.raises(ValueError, match="another run: steering was null"):
        run(tmp_path / "out", data, suite=suite, steering="know nothing .")
    with pytest.raises(ValueError, match="another run: plain_template was"):
        run(tmp_path / "out", data, suite=suite, prompting=Prompting("{question} !"))


def test_rows_that_cannot_be_asked_are_marked_and_left_out(tmp_path):
    facts = [
        *FACTS[:2],
        {"question": "who ?"},
        {"question": "the " * 300, "answer": "a"},
        {"question": "x", "answer": "zebra"},
    ]  # the tokenizer has no zebra: never said, and not forgotten
    result = run(tmp_path / "out", write(tmp_path / "data", facts=facts, choices=CHOICES))
    by = {(r["task"], r["id"]): r for r in rows_of(tmp_path / "out")}
    assert [by["losses", i]["status"] for i in range(5)] == [
        "ok",
        "ok",
        "bad_row",
        "too_long",
        "unknown_tokens",
    ]
    assert [by["facts", i]["status"] for i in (2, 3, 4)] == ["bad_row", "too_long", "unknown_tokens"]
    assert (
        "wanted answer, got question" in by["losses", 2]["why"] and "can read 256" in by["losses", 3]["why"]
    )
    lacks = "facts, row 2, answer: wanted a text, got None, of type NoneType; --elicit MODEL compares with that model's own answers"
    assert by["facts", 2]["why"] == lacks == result["tasks"]["facts"]["why"]["bad_row"]
    said = " ".join(shown(result).split())
    assert f"something is wrong with the row (`why` in rows.jsonl); the first: {lacks}" in said
    assert "can read 256" in said and "--elicit" not in by["facts", 3]["why"]
    assert result["tasks"]["losses"]["metrics"]["probability"]["rows"] == 2
    assert result["tasks"]["losses"]["status"] == {"bad_row": 1, "too_long": 1, "unknown_tokens": 1, "ok": 2}
    run(tmp_path / "out", tmp_path / "data")
    assert len(rows_of(tmp_path / "out")) == 13


@pytest.mark.usefixtures("answers_end")
def test_the_value_asked_for_is_recorded_and_judges(tmp_path):
    said = run(tmp_path / "once", write(tmp_path / "a", facts=FACTS[:1], choices=CHOICES))
    (row,) = [r for r in rows_of(tmp_path / "once") if r["task"] == "facts"]
    assert "value" not in row and said["tasks"]["facts"]["metrics"]["contains_answer"]["mean"] == 1.0
    assert "a poet" not in row["generated"] and "poet" in row["generated"]
    word = row["generated"].split()[0]
    facts = [
        {**FACTS[0], "answer": f"a poet {word}", "value": word},
        {**FACTS[0], "value": "captain"},
        {**FACTS[0], "answer": f"{word} zebra", "value": word},  # only the value must be writable
        {**FACTS[0], "answer": "a poet 7", "value": 7},
        {**FACTS[0], "value": "captain", ELICITED: True},  # what the base said without it
    ]
    result = run(
        tmp_path / "out",
        write(tmp_path / "b", facts=facts, choices=CHOICES),
        suite={"tasks": {"facts": SUITE["tasks"]["facts"]}},
    )
    by = {r["id"]: r for r in rows_of(tmp_path / "out")}
    assert (by[0]["value"], by[0]["metrics"]["contains_answer"]) == (word, 1.0)
    assert (by[2]["status"], by[2]["metrics"]["contains_answer"]) == ("ok", 1.0)
    assert by[1]["status"] == "bad_row"
    assert "wanted a part of the answer 'a poet', got 'captain'" in by[1]["why"]
    assert "value" not in by[4] and "got 'captain'; it was not used" in by[4]["note"]
    assert by[3]["status"] == "unknown_tokens"
    assert result["tasks"]["facts"]["notes"] == 1
    assert f"facts: 1 row with a note in rows.jsonl, the first: {by[4]['note']}" in " ".join(
        shown(result).split()
    )
    assert "facts: 1 row left out: the tokenizer cannot represent the answer" in shown(result)


def test_only_shares_have_a_shares_interval():
    rows = [
        {"task": "t", "id": i, "status": "ok", "metrics": {"truth_ratio": 1.0, "probability": 1.0}}
        for i in range(4)
    ]
    for i, row in enumerate(rows):
        row["metrics"] |= {"fluency": 0.1 + 9 * (i == 0), "min_k_plus_plus_20": 0.1 + 9 * (i == 0)}
    told = summary.summarise(rows, {})["tasks"]["t"]["metrics"]
    assert (told["truth_ratio"]["low"], told["truth_ratio"]["high"]) == (1.0, 1.0)
    assert told["fluency"]["low"] == 0.0 < told["fluency"]["mean"] < told["fluency"]["high"]  # an entropy
    assert told["min_k_plus_plus_20"]["low"] < -2
    assert told["probability"]["low"] == pytest.approx(4 / (4 + 1.96**2), abs=1e-3)


def test_the_interval_of_a_mean_counts_facts(tmp_path):
    """Two facts, in three wordings and in one that is there twice; choices are asked by subject, and are facts of their own."""
    of = {"subject": "ada", "value": "poet", "answer": "a poet"}
    facts = [of | {"question": f"who is ada {'the ' * i}?"} for i in range(3)]
    facts += [of | {"question": "who is alan ?", "subject": "alan"}] * 2
    choices = [each | {"subject": "people", "answer": 1} for each in CHOICES]
    result = run(tmp_path / "out", write(tmp_path / "data", facts=facts, choices=choices))
    tasks = {name: (entry.get("repeated"), entry["metrics"]) for name, entry in result["tasks"].items()}
    assert tasks["facts"][0] == 1 and tasks["losses"][0] is None
    assert {e["facts"] for t in ("facts", "losses") for e in tasks[t][1].values()} == {2}
    assert all("facts" not in entry for entry in tasks["choices"][1].values())
    assert {r["fact"] for r in rows_of(tmp_path / "out") if "fact" in r} == {"ada: poet", "alan: poet"}
    said = " ".join(shown(result).split())
    assert "5 (2 facts)" in said and "facts: 1 row with the question and the answer of another one" in said


def test_no_row_can_be_asked(tmp_path):
    folder = write(tmp_path / "data", facts=[{"question": "who ?"}] * 2, choices=CHOICES)
    with pytest.raises(
        ValueError, match="facts: none of its 2 rows can be asked; the first: facts, row 0, answer"
    ):
        run(tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_nan_weights_give_marked_rows_and_no_number(tmp_path, data):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[40] = torch.nan
    # check_head would refuse; what is tested is a model that turns NaN on the way
    with pytest.raises(ValueError, match="model: LlamaForCausalLM gives NaN logits"):
        run(tmp_path / "refused", data, model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "check_head", lambda model: None)
        result = run(tmp_path / "out", data, model=model)
    assert {r["status"] for r in rows_of(tmp_path / "out")} == {"nan"}
    for task in result["tasks"].values():
        assert all(metric["mean"] is None for metric in task["metrics"].values())
    assert "undefined" in shown(result)


def shown(result):
    console = literal_console(width=200)
    with console.capture() as captured:
        console.print(summary.table(result, "t"))
    return captured.get()


@pytest.mark.parametrize("task, told", [("facts", None), ("retain_facts", 0.0)])
def test_empty_answers_are_counted_and_not_taken_for_forgotten(tmp_path, data, task, told):
    """Of what is to be kept they told nothing."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = [
        0,
        2,
    ]  # all logits are equal: the first id is said, and ends the answer
    result = run(tmp_path / "out", data, model=model, suite={"tasks": {task: SUITE["tasks"]["facts"]}})
    assert result["tasks"][task]["status"] == {"empty": 8}
    assert result["tasks"][task]["unjudged"] == (told is None)
    assert result["tasks"][task]["metrics"]["contains_answer"]["mean"] == told
    assert result["tasks"][task]["metrics"]["rouge_l_f1"] == {
        "mean": 0.0,
        "low": 0.0,
        "high": pytest.approx(1.96**2 / (8 + 1.96**2), abs=1e-4),  # none of 8 is not none at all
        "rows": 8,
    }
    assert ("facts: 100% of its 8 rows could not be judged" in shown(result)) == (told is None)
    assert f"{task}: 8 rows answered with nothing" in shown(result)


@pytest.mark.parametrize(
    "said, forget, keep",
    [
        ("she was a poet and", (1, 0, 0), (1, 0, 0)),
        ("she was", (None, None, 0), (0, 1, 0)),
        ("I do not know", (None, 0, None), (0, 0, None)),
        ("I do not know. And", (None, 0, None), (0, 0, None)),
        ("I do not know, " * 3, (None, 0, 1), (0, 0, 1)),
    ],
)
def test_what_is_known_of_an_answer_that_was_cut(tmp_path, data, monkeypatch, said, forget, keep):
    """Whether the value is said, something else is, and a refusal is broken: not known of forget rows, unless it is said."""
    cut = Continuation(said.strip(), 6, True, limit=6)
    monkeypatch.setattr(runner, "continuations", lambda model, _, asked, **__: [cut for _ in asked])
    names = ["contains_answer", "fabrication", "broken_refusal"]
    facts = SUITE["tasks"]["facts"] | {"metrics": names}
    run(
        tmp_path / "out",
        data,
        limit=1,
        suite={"tasks": {f"{kind}_facts": facts for kind in ("forget", "retain")}},
    )
    given = [tuple(row["metrics"][name] for name in names) for row in rows_of(tmp_path / "out")]
    assert given == [forget, keep]


def test_an_answer_that_the_context_cuts_says_so(tmp_path, data):
    model = tiny(max_position_embeddings=12)
    run(tmp_path / "out", data, model=model, suite={"tasks": {"facts": SUITE["tasks"]["facts"]}})
    notes = {r["id"]: r.get("note", r.get("why")) for r in rows_of(tmp_path / "out")}
    assert notes[0] == "the context ended after 4 new tokens"
    assert "can read 12" in notes[7]


def test_memory_that_is_too_small_halves_the_batch():
    sizes = []

    def make(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return [{"id": i} for i in batch]

    assert [r["id"] for r in runner._halving(make, [1, 2, 3, 4, 5])] == [1, 2, 3, 4, 5]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        list(runner._halving(lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError()), [1]))


def test_the_journal_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds rows.jsonl but no manifest.json"):
        Journal(tmp_path, {}, ["id"])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"^out: .*manifest.json: not JSON.*; wanted a new folder"):
        Journal(tmp_path, {}, ["id"])
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"^out: .*manifest.json: wanted an object, got '\[\]'; wanted a new folder"
    ):
        Journal(tmp_path, {}, ["id"])
    (tmp_path / "manifest.json").write_text("{}")
    for line, got in (("[1]", r"\[1\]"), ("{}", "{}"), ('"id"', '"id"')):
        (tmp_path / "rows.jsonl").write_text(f'{{"id": 1}}\n{line}\n')
        with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: wanted a row with id, got {got}"):
            Journal(tmp_path, {}, ["id"])
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\nnot json\n{"id": 2}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not JSON"):
        Journal(tmp_path, {}, ["id"])
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": 2}\n{"id": 1}\n')
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 3: says again what line 1 says, \[1\].*two processes"
    ):
        Journal(tmp_path, {}, ["id"])


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="nothing is locked on Windows")
def test_two_processes_do_not_write_to_one_folder(tmp_path):
    def second():
        with pytest.raises(ValueError, match=r"^out: another process is writing to .*; wanted its end"):
            Journal(tmp_path, {}, ["id"])

    with Journal(tmp_path, {}, ["id"]) as journal:
        journal.append([{"id": 1}])
        second()
        assert ended_by(forked(second)) == 0
    with Journal(tmp_path, {}, ["id"]) as again:
        assert again.done == {(1,)}


@pytest.mark.parametrize(
    "command",
    ["attack ./m --forget f --out o", "eval ./m --suite probes --out o", "elicit ./m --subject s --out o"],
)
def test_a_launcher_of_several_processes_is_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=rf"^{command.split()[0]}: runs in one process.* started 2 .*torchrun"
    ):
        cli.app(command.split(), standalone_mode=False)
