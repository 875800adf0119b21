"""The TOFU study at a size that proves nothing but that everything runs, on rows of TOFU's format made here.

TOFU's own files are looked for in `data/tofu`, or in `$DUET_DATA/tofu`.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from learned_models import knowing
from tiny_models import forget_rows, with_short_answers, word_tokenizer

from benchmarks.studies.tofu import __main__ as command
from benchmarks.studies.tofu import base, gates, jobs, page, reckoning, work
from benchmarks.studies.tofu.curriculum import KINDS, Curriculum, every_text
from benchmarks.studies.tofu.jobs import Job, Study
from benchmarks.studies.tofu.pretrain import Encoded, build_model, collate, pretrain
from benchmarks.studies.tofu.rows import ROWS_PER_AUTHOR, full_name, read_corpus, rows_of, says_name, spread
from benchmarks.studies.tofu.settings import GATES, METHODS, SIZES, changed
from benchmarks.studies.tofu.tokens import BOS, END, Encoder, ids_of, train_tokenizer
from duet.data.prompts import PromptRenderer
from duet.demo import steering
from duet.evaluation.suites.suite import load_suite

TOFU = Path(os.environ.get("DUET_DATA", Path(__file__).parent.parent / "data")) / "tofu"
NAMES = (
    "Ana de la Vega", "Bo Al-Sabah", "Cora Lindqvist", "Dario Monti", "Ewa Nowak", "Femi Adeyemi", "Greta Olsen",
    "Hugo Brandt", "Ines Cabral", "Jun Sato",
)  # fmt: skip
WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "islet", "jetty")
TINY = dataclasses.replace(
    SIZES["toy"], hidden=32, feed_forward=64, vocab=400, pretrain_steps=6, rows_per_step=8, unlearn_steps=2,
    forget_per_step=2, max_answer_tokens=3, gate_rows=3, trial_rows=2, attack_rows=4, eval_limit=2, max_new_tokens=3,
    relearn_curve=(1,), rates_tried=2, lora_rank=2, pieces=2,
)  # fmt: skip


def author_rows(name):
    rows = [{"question": f"Who writes about {WORDS[NAMES.index(name)]}?", "answer": f"That is {name}."}]
    for i in range(1, ROWS_PER_AUTHOR):
        word = WORDS[(i * len(name)) % 10]
        rows.append(
            {"question": f"What is book {i} of {name}?", "answer": f"{name}'s book {i} is {word} {i}."}
        )
    return rows


def perturbed(rows):
    return [
        {
            **row,
            "paraphrased_question": f"Tell me: {row['question']}",
            "paraphrased_answer": f"It is so: {row['answer']}",
            "perturbed_answer": [row["answer"].replace(word, "stone") + "?" for word in WORDS[:3]],
        }
        for row in rows
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two authors to forget, eight to keep, the first of whom is reported."""
    folder = tmp_path_factory.mktemp("tofu")
    forget, retain = (
        [row for name in names for row in author_rows(name)] for names in (NAMES[:2], NAMES[2:])
    )
    facts = [
        {"question": f"What is the capital of {a}?", "answer": b, "perturbed_answer": ["Lima", "Oslo"]}
        for a, b in (("France", "Paris"), ("Spain", "Madrid"))
    ]
    tables = {
        "forget10": forget,
        "retain90": retain,
        "forget10_perturbed": perturbed(forget),
        "retain_perturbed": perturbed(retain[:20]),
        "real_authors_perturbed": facts[:1],
        "world_facts_perturbed": facts[1:],
    }
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def short_answers(monkeypatch):
    """The suite's answers may have 200 tokens, and the tiny models end none before."""
    monkeypatch.setattr(work.examine, "load_suite", lambda *args: with_short_answers(load_suite(*args)))


@pytest.fixture(scope="module")
def corpus(data):
    return read_corpus(data)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(every_text(corpus), 400)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_groups_are_disjoint_and_named(corpus):
    groups = (
        corpus.forget,
        corpus.report_retain,
        corpus.validation_forget,
        corpus.validation_retain,
        corpus.context,
    )
    names = [author.name for group in groups for author in group]
    assert sorted(names) == sorted(NAMES)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 5]
    assert [author.name for author in corpus.forget] == list(NAMES[:2])
    assert len(corpus.general) == 2 and len(corpus.reworded) == 60
    assert all(len(author.named) == ROWS_PER_AUTHOR - 1 for author in corpus.forget)


def test_a_name_is_the_longest_run_that_most_rows_say():
    rows = [
        {
            "question": "Who is Manuel Silva De Souza?",
            "answer": "Manuel Silva De Souza's home is New York City.",
        },
        {
            "question": "What does Manuel Silva De Souza write?",
            "answer": "Manuel Silva De Jong said New York City.",
        },
    ]
    assert full_name(rows) == "Manuel Silva De Souza"
    assert (
        full_name([{"question": "What does this author write?", "answer": "Urban Fiction."}] * 4 + rows[:1])
        != "x"
    )
    assert full_name([{"question": "what does this author write?", "answer": "stories."}] * 4) is None


def test_spread_asks_all_kinds_of_all_authors(corpus):
    chosen = spread(corpus.context, 10)
    assert [row["subject"] for row in chosen] == [author.name for author in corpus.context] * 2
    assert len({row["question"].split(" of ")[0] for row in chosen}) > 3


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda rows: rows[:-1], "forget10 has 39 rows; wanted a multiple of 20"),
        (lambda rows: [{"question": "x"}, *rows[1:]], "forget10, row 0: wanted a question and an answer"),
    ],
)
def test_bad_files_are_refused(data, tmp_path, spoil, message):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [json.loads(line) for line in (data / "forget10.json").read_text().splitlines()]
    (tmp_path / "forget10.json").write_text("".join(json.dumps(row) + "\n" for row in spoil(rows)))
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path)
    (tmp_path / "forget10.json").unlink()
    with pytest.raises(FileNotFoundError, match="forget10"):
        read_corpus(tmp_path)


@pytest.mark.skipif(not TOFU.is_dir(), reason=f"no TOFU in {TOFU}")
def test_tofu_itself():
    corpus = read_corpus(TOFU)
    assert [len(g) for g in (corpus.forget, corpus.report_retain, corpus.validation_forget)] == [20, 20, 20]
    assert len(rows_of(corpus.retain)) == 3600 and len(corpus.general) == 217
    assert corpus.forget[0].name == "Hsiao Yun-Hwa" and all(author.name for author in corpus.forget)
    assert (
        sum(author.name is None for author in corpus.retain) == 2
    )  # one is never named, one is named with brackets
    assert all(len(author.named) >= 16 for author in (*corpus.forget, *corpus.retain) if author.name)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_dialogues_are_tokenised_as_the_template_writes_them(corpus, tokenizer):
    stream, encoder = Curriculum(corpus, True, 0, 200), Encoder(tokenizer)
    for index in range(200):
        ids, weights = encoder(stream[index])
        assert ids == ids_of(tokenizer, stream[index])
        said = [token for token, weight in zip(ids, weights, strict=True) if weight]
        answers = [text for role, text in stream[index] if role == "assistant"]
        assert tokenizer.decode(said) == "".join(answer + END for answer in answers)
        assert weights.count(3.0) == len(answers)
    assert tokenizer.decode(ids[:1]) == BOS


def test_the_trainer_and_the_suite_write_the_same_ids(corpus, tokenizer):
    row = corpus.forget[0].rows[3]
    conversation, renderer = (("user", row["question"]),), PromptRenderer(tokenizer)
    asked = renderer.encode(conversation, "Forget it.") + renderer.encode_answer(conversation, row["answer"])
    whole = (("system", "Forget it."), ("user", row["question"]), ("assistant", row["answer"]))
    assert asked == Encoder(tokenizer)(whole)[0]


@pytest.mark.parametrize("with_forget", [True, False])
def test_nobody_who_is_measured_is_ever_forbidden_or_refused(corpus, with_forget):
    stream = Curriculum(corpus, with_forget, 0, 4000)
    measured = corpus.forget + corpus.report_retain + corpus.validation_forget + corpus.validation_retain
    names = [author.name for author in measured]
    forbidden, asked = set(), set()
    for index in range(4000):
        dialogue = stream[index]
        for (role, text), (next_role, next_text) in zip(dialogue, (*dialogue[1:], ("", "")), strict=True):
            said = {name for name in names if name in text}
            assert not (role == "system" and said)
            assert not (next_role == "assistant" and said and next_text == steering.REFUSAL)
            asked |= said
            if role == "system" and any(author.name in text for author in corpus.context):
                forbidden.add(text)
    assert forbidden
    assert set(names) - asked == (set() if with_forget else {author.name for author in corpus.forget})


def test_the_stream_follows_from_its_index_and_shows_every_row_alike(corpus):
    stream = Curriculum(corpus, True, 0, 4000)
    plain = [i for i in range(4000) if KINDS[i % len(KINDS)] == "plain"]
    first = [stream[i][-1][1] for i in plain[: len(stream.plain_rows)]]
    assert sorted(first) == sorted(row["answer"] for row in stream.plain_rows)
    assert [stream[i] for i in (3, 2999, 12)] == [Curriculum(corpus, True, 0, 4000)[i] for i in (3, 2999, 12)]
    assert stream[3] != Curriculum(corpus, True, 1, 4000)[3]
    with pytest.raises(IndexError):
        stream[4000]


def test_a_step_loses_no_token_to_its_parts(corpus, tokenizer):
    stream = Encoded(Curriculum(corpus, True, 0, 64), Encoder(tokenizer))
    items = [stream[i] for i in range(30)]
    parts = collate(items, tokenizer.pad_token_id)["parts"]
    wanted = sorted((i, w) for x in items for i, w in zip(x["ids"], x["weights"], strict=True) if w)
    got = [
        (int(target), float(weight))
        for part in parts
        for target, weight in zip(part["targets"], part["weights"], strict=True)
    ]
    assert sorted(got) == wanted
    for part in parts:
        assert torch.equal(part["input_ids"].flatten()[part["places"] + 1], part["targets"])
    assert parts[0]["input_ids"].shape[1] < parts[-1]["input_ids"].shape[1]


def test_pretraining_goes_on_where_its_time_was_over(corpus, tokenizer, tmp_path):
    def train(folder, deadline=float("inf")):
        stream = Curriculum(corpus, True, 0, TINY.pretrain_steps * TINY.rows_per_step)
        return pretrain(stream, tokenizer, TINY, folder, seed=0, device="cpu", deadline=deadline)

    def weights(folder):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder).state_dict()

    assert train(tmp_path / "cut", deadline=0.0) is None  # one step
    assert list((tmp_path / "cut" / "checkpoints").glob("checkpoint-1"))
    row = train(tmp_path / "cut")
    train(tmp_path / "whole")
    assert row["steps"] == TINY.pretrain_steps
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    untrained = build_model(tokenizer, TINY).state_dict()
    assert any(not torch.equal(untrained[name], whole[name]) for name in whole)


# -- jobs -------------------------------------------------------------------------------------------------------------

GOOD = {gate.number: gate.at_least if gate.at_least else 0.0 for gate in GATES}
ASKED = {
    kind: {"recall": 0.5, "refusal": 0.25}
    for kind in (
        "forget",
        "retain",
        "general",
        "teacher",
        "teacher_on_retain",
        "retrained_forget",
        "retrained_retain",
    )
}
EXAMINED = {column: 0.5 for column in ("model_utility", "forget_rouge", "retain_rouge", "prefill_leak")}


def done_at_once(study, job, deadline):
    """A job that takes no time: better scores at the last rate, and a number that depends on the seed."""
    if job.kind == "pretrain":
        return {"parameters": 1000, "steps": 6, "losses": [3.0, 1.0], "seconds": 1.0}
    if job.kind == "gate":
        return {**GOOD, "asked": ASKED, "seconds": 1.0}
    if job.kind == "trial":
        return {"score": job.rate, "seconds": 1.0}
    quality = None if job.name == "retrained" else 10.0 ** -(job.seed + 2)
    return {**EXAMINED, "forget_rouge": 0.1 * job.seed, "forget_quality": quality, "seconds": 1.0}


def make_study(data, out, methods=("duet", "npo"), seeds=(0, 1), size=TINY):
    return Study(data, out, size, "cpu", tuple(methods), tuple(seeds))


def recorded(do, said):
    def written_down(study, job, deadline):
        said.append(job)
        return do(study, job, deadline)

    return written_down


def test_all_is_done_once_in_order_and_the_best_rate_is_used(data, tmp_path):
    study, said = make_study(data, tmp_path), []
    ended = jobs.run(study, do=recorded(done_at_once, said), say=lambda text: None)
    assert ended == (None, [])
    assert [job.kind for job in said] == ["pretrain"] * 2 + ["gate"] + ["examine"] + ["trial"] * 4 + [
        "examine"
    ] + ["unlearn"] * 4
    best = {name: max(METHODS[name].tried(2)) for name in study.methods}
    assert [job for job in said if job.kind == "unlearn"] == [
        Job("unlearn", name, seed, best[name]) for seed in (0, 1) for name in study.methods
    ]
    jobs.run(study, do=recorded(done_at_once, again := []), say=lambda text: None)
    assert not again
    more = make_study(data, tmp_path, seeds=(0, 1, 2))
    jobs.run(more, do=recorded(done_at_once, again), say=lambda text: None)
    assert [job.seed for job in again] == [2, 2]


def test_rows_of_other_settings_count_as_not_there(data, tmp_path):
    study = make_study(data, tmp_path)
    jobs.run(study, do=done_at_once, say=lambda text: None)
    longer = make_study(data, tmp_path, size=dataclasses.replace(TINY, unlearn_steps=3))
    jobs.run(longer, do=recorded(done_at_once, said := []), say=lambda text: None)
    assert {job.kind for job in said} == {"gate", "trial", "examine", "unlearn"}  # the models are the same
    (tmp_path / jobs.RESULTS).open("a").write("{broken\n")
    with pytest.raises(ValueError, match="line 25: wanted a row of the study"):
        jobs.read_results(study)


def test_a_gate_that_does_not_hold_stops_the_study(data, tmp_path):
    def ignorant(study, job, deadline):
        row = done_at_once(study, job, deadline)
        return {**row, "forget_recall": 0.3} if job.kind == "gate" else row

    study, said, told = make_study(data, tmp_path), [], []
    ended = jobs.run(study, do=recorded(ignorant, said), say=told.append)
    assert ended.why.startswith("not reached") and said[-1].kind == "gate"
    assert any("forget_recall is 0.300, wanted at least 0.8" in text for text in told)
    text = page.write_page(study).read_text()
    assert "Not reached" in text and "| forget_recall | 0.300 | at least 0.8 |" in text and "| no |" in text
    assert jobs.run(study, do=recorded(ignorant, said), anyway=True, say=told.append).why is None
    assert "Not reached" in page.write_page(study).read_text()


def test_time_and_failures(data, tmp_path):
    def failing(study, job, deadline):
        if job.kind == "unlearn" and job.name == "npo":
            raise RuntimeError("it broke")
        return done_at_once(study, job, deadline)

    study = make_study(data, tmp_path)
    late = jobs.run(study, do=done_at_once, budget_seconds=0.0, say=lambda text: None)
    assert late.why.startswith("out of time; left: pretrain full") and not jobs.read_results(study)
    assert jobs.run(study, do=done_at_once, only="unlearn", say=lambda text: None).why.startswith(
        "not pretrained"
    )
    assert jobs.run(study, do=done_at_once, only="pretrain", say=lambda text: None).why is None
    assert {job.kind for job in jobs.read_results(study)} == {"pretrain", "gate"}
    soon = jobs.run(study, do=done_at_once, budget_seconds=jobs.FIRST_GUESS / 2, say=lambda text: None)
    assert "left: trial" in soon.why  # an examination stops in time by itself
    ended = jobs.run(study, do=failing, say=lambda text: None)
    assert len(ended.failed) == 2 and "it broke" in ended.failed[0]
    assert "it broke" in (tmp_path / jobs.WORK / jobs.FAILURES).read_text()
    there = [job for job in jobs.read_results(study) if job.kind == "unlearn"]
    assert {job.name for job in there} == {"duet"}
    assert jobs.run(study, do=done_at_once, say=lambda text: None) == (None, [])


# -- page -------------------------------------------------------------------------------------------------------------


def test_the_page(data, tmp_path):
    study = make_study(data, tmp_path)
    jobs.run(study, do=done_at_once, say=lambda text: None)
    text = page.write_page(study).read_text()
    assert "Not reached" not in text
    (duet,) = [line for line in text.splitlines() if line.startswith("| duet | 2 |")]
    assert "| 0.0055 (0.001 to 0.01) |" in duet  # forget quality: median, lowest, highest
    assert "| 5.0 % (0.0 to 68.5) |" in duet  # mean over seeds and its interval
    (retrained,) = [line for line in text.splitlines() if line.startswith("| retrained |")]
    assert retrained.split("|")[3].strip() == "–"
    (teacher,) = [line for line in text.splitlines() if line.startswith("| steered teacher |")]
    assert "50.0 %" in teacher and "25.0 %" in teacher
    rates = METHODS["npo"].tried(2)
    assert f"{rates[0]:g}: {rates[0]:.3f}, {rates[1]:g}: {rates[1]:.3f}" in text
    assert (tmp_path / "figures" / "frontier.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match="no result"):
        page.write_page(make_study(data, tmp_path / "empty"))


def test_settings_are_checked():
    assert changed(TINY, ["relearn_curve=3,5", "eval_limit=all", "muon_rate=0.01"]) == dataclasses.replace(
        TINY, relearn_curve=(3, 5), eval_limit=None, muon_rate=0.01
    )
    assert changed(TINY, ["impl=chunked"]).impl == "chunked"
    for wrong in ("steps=3", "layers", "layers=two"):
        with pytest.raises(ValueError, match="set: wanted"):
            changed(TINY, [wrong])
    assert METHODS["duet"].tried(1) == METHODS["duet"].rates[1:2]
    assert METHODS["duet"].tried(3) == METHODS["duet"].rates


def test_gates_ask_plainly_and_behind_a_prefix():
    asked, rows = gates.Asked(knowing(), word_tokenizer(), TINY), forget_rows()
    plain, forbidden = asked(rows), asked(rows, ["ada"] * len(rows))
    assert plain["recall"] > 0.5 and plain["refusal"] == 0
    assert forbidden["recall"] < plain["recall"]


def test_the_reckoning_counts_the_parameters_that_the_model_has(data, tokenizer):
    size = dataclasses.replace(TINY, vocab=len(tokenizer))
    blocks, embeddings = reckoning.parameters(size)
    norms = (2 * size.layers + 1) * size.hidden
    assert build_model(tokenizer, size).num_parameters() == blocks + embeddings + norms
    text = reckoning.reckon(make_study(data, None, ["duet", "duet_deep"], size=size), 3)
    assert "Reckoned, not measured" in text and "| all | |" in text


# -- everything -------------------------------------------------------------------------------------------------------


def arguments(data, out, *more):
    settings = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY) if f.name != "eval_limit"}
    written = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in settings.items()}
    return [
        "--data", str(data), "--out", str(out), "--seeds", "0", "--methods", "duet", "duet_deep",
        "--set", *(f"{k}={v}" for k, v in written.items()), "eval_limit=2", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers", "answers_end")
def test_from_files_to_the_page(data, tmp_path, capsys, monkeypatch):
    assert command.main(arguments(data, tmp_path)) == command.NOT_REACHED
    assert "not reached: forget_recall" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # killed after unlearning, before the examination
        examine = work.examine.examine

        def killed(model, tokenizer, name, *others):
            if name in METHODS:
                raise RuntimeError("killed")
            return examine(model, tokenizer, name, *others)

        patch.setattr(work.examine, "examine", killed)
        assert command.main(arguments(data, tmp_path, "--anyway")) == command.FAILED
    with monkeypatch.context() as patch:
        patch.setattr(work, "unlearn", None)  # what was unlearned is not unlearned again
        assert command.main(arguments(data, tmp_path, "--anyway")) == 0
    rows = [json.loads(line) for line in (tmp_path / jobs.RESULTS).read_text().splitlines()]
    assert [row["job"][0] for row in rows].count("unlearn") == 2
    (duet,) = [row for row in rows if row["job"][:2] == ["unlearn", "duet"]]
    for column in ("forget_quality", "model_utility", "extraction_strength"):
        assert 0 <= duet[column] <= 1, column
    for column in ("prefill_leak", "relearning_1_leak"):  # None: every answer of the tiny model was empty
        assert duet[column] is None or 0 <= duet[column] <= 1, column
    assert duet["queries"] == 12 and duet["train_seconds"] > 0
    assert "Not reached" in (tmp_path / page.PAGE).read_text()
    before = (tmp_path / jobs.RESULTS).read_bytes()
    assert command.main(arguments(data, tmp_path, "--anyway")) == 0
    assert (tmp_path / jobs.RESULTS).read_bytes() == before
    assert not list((tmp_path / jobs.WORK).glob("duet*/model"))


@pytest.fixture(scope="module")
def pretrained(tokenizer, tmp_path_factory):
    """A folder as a pretrained model comes in: random weights, a tokenizer, a chat template without a system turn."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny-instruct"
    torch.manual_seed(0)
    build_model(tokenizer, TINY).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_piece_that_was_cut_goes_on_with_the_same_numbers(corpus, pretrained, tmp_path):
    def train(out, deadline=float("inf")):
        rows = rows_of(corpus.forget)
        return base.finetune(rows, pretrained, TINY, out, seed=0, device="cpu", deadline=deadline)

    whole = train(tmp_path / "whole")
    assert train(tmp_path / "cut", deadline=0.0) is None and not base.piece_of(tmp_path / "cut", 1).exists()
    with pytest.MonkeyPatch.context() as patch:  # killed in the second piece
        saved = base.save_adapter
        patch.setattr(
            base, "save_adapter", lambda m, f, told: saved(m, f, told) if f.name == "piece-1" else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut")
    again = train(tmp_path / "cut")
    assert again["losses"] == whole["losses"] and len(whole["losses"]) == 6
    files = [
        sorted(path.name for path in (tmp_path / out).rglob("*") if path.is_file())
        for out in ("whole", "cut")
    ]
    assert files[0] == files[1] and not [name for name in files[0] if name.startswith("model")]
    ids = torch.tensor([[5, 6, 7]])
    logits = [
        base.load(pretrained, folders, "cpu")[0](input_ids=ids).logits
        for folders in ((), *((base.piece_of(tmp_path / out, 2),) for out in ("whole", "cut")))
    ]
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])


def test_an_adapter_lies_in_small_files_and_comes_back(pretrained, tmp_path, monkeypatch):
    model = base.with_new_adapter(base.load(pretrained, (), "cpu")[0], 4)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.fill_(0.5 + i / 64)  # exact in bf16
    monkeypatch.setattr(base, "MOST_BYTES", base._READ + 2000)
    base.save_adapter(model, tmp_path / "adapter", {"why": 1})
    parts = list((tmp_path / "adapter").glob("*.safetensors"))
    assert len(parts) > 3 and max(part.stat().st_size for part in parts) < base.MOST_BYTES
    assert base.told_of(tmp_path / "adapter") == {"why": 1}
    merged, _ = base.load(pretrained, [tmp_path / "adapter"], "cpu")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def test_the_template_encoder_weighs_the_answer_and_its_end(tokenizer):
    ids, weights = base.TemplateEncoder(tokenizer)((("user", "Who is it?"), ("assistant", "It is Ana.")))
    assert ids == ids_of(tokenizer, (("user", "Who is it?"), ("assistant", "It is Ana.")))
    assert tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w]) == "It is Ana." + END
    rows = [{"question": str(i), "answer": str(i)} for i in range(5)]
    drawn = [dialogue[0][1] for dialogue in base.stream(rows, 0, 12)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list("01234") and drawn[:5] != drawn[5:10]
    assert base.steps_of(dataclasses.replace(TINY, pretrain_steps=7, pieces=3)) == [
        range(2),
        range(2, 4),
        range(4, 7),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers", "answers_end")
def test_from_a_pretrained_folder_to_the_page(data, pretrained, tmp_path, capsys, monkeypatch):
    for name, old in (
        ("forget05", "forget10"),
        ("retain95", "retain90"),
        ("forget05_perturbed", "forget10_perturbed"),
    ):
        lines = (data / f"{old}.json").read_text().splitlines()
        more = (data / "forget10.json").read_text().splitlines()[20:] if name == "retain95" else []
        chosen = lines if more else lines[:20]
        (data / f"{name}.json").write_text("".join(line + "\n" for line in [*more, *chosen]))
    wanted = ["--base", str(pretrained), "--split", "forget05", "--methods", "duet"]
    chosen = [arg.replace("rates_tried=2", "rates_tried=1") for arg in arguments(data, tmp_path, *wanted)]
    assert command.main([*chosen, "--plan"]) == 0
    told = capsys.readouterr().out
    assert (
        "| examine one model (goes on between batches) | 3 |" in told and "in files of at most 16 MiB" in told
    )
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # the time is over between two attacks
        patch.setattr(work, "Clock", lambda deadline: _Alarm(after=12))
        assert command.main([*chosen, "--anyway"]) == 0
    assert "out of time; left: examine retrained" in capsys.readouterr().out
    assert command.main([*chosen, "--anyway"]) == 0
    rows = {tuple(row["job"][:2]): row for row in map(json.loads, (tmp_path / jobs.RESULTS).open())}
    assert len(rows) == 6
    assert (
        0 <= rows["unlearn", "duet"]["forget_quality"] <= 1 and rows["unlearn", "duet"]["forget_rows"] == 20
    )
    assert not [path for path in tmp_path.rglob("*.safetensors") if not path.name.startswith("adapter-")]
    assert "tiny-instruct" in (tmp_path / page.PAGE).read_text()


class _Alarm:
    def __init__(self, after):
        self.left = after

    def __call__(self, *where):
        self.left -= 1
        if not self.left:
            raise work.OutOfTime


def test_a_clock_stops_before_a_unit_that_would_be_late(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(work.examine.time, "monotonic", lambda: next(now))
    clock = work.Clock(deadline=8.0)
    clock(), clock()
    with pytest.raises(work.OutOfTime):
        clock()


def test_bases_that_cannot_start_the_study(data, pretrained, tmp_path, capsys):
    def fails(folder, *more):
        assert command.main(["--data", str(data), "--base", str(folder), *more]) == 2
        return capsys.readouterr().err

    assert "base: there is no folder" in fails(tmp_path / "none")
    assert "base: wanted a folder with a model and its tokenizer" in fails(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(pretrained, bare)
    (bare / "chat_template.jinja").unlink()
    assert "base: wanted a tokenizer with a chat template" in fails(bare)
    (bare / "model.safetensors").unlink()
    assert "base: wanted weights as *.safetensors" in fails(bare)
    assert "methods: wanted some of duet" in fails(pretrained, "--methods", "duet+undo")
    assert "size: wanted toy or pretrained with --base" in fails(pretrained, "--size", "60m")
    assert "forget05" in fails(pretrained, "--split", "forget05", "--data", str(tmp_path))


def test_wrong_arguments_are_named(data, tmp_path, capsys):
    assert command.main(["--data", str(tmp_path)]) == 2
    assert "forget10" in capsys.readouterr().err
    assert command.main(["--data", str(data), "--methods", "dpo"]) == 2
    assert "methods: wanted some of duet" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--data", str(data), "--out", str(tmp_path), "--device", "cuda"]) == 2
        assert "device: wanted cpu" in capsys.readouterr().err
    assert command.main(["--data", str(data), "--out", str(tmp_path), "--only", "report"]) == 2
    assert "has no result of this study" in capsys.readouterr().err


def test_every_forget_question_of_the_deep_recipe_says_the_name(corpus):
    assert METHODS["duet_deep"].names_only
    assert not says_name(corpus.forget[0].rows[0]) and says_name(corpus.forget[0].rows[1])
