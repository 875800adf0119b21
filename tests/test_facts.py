"""What a base really tells becomes rows; two models answer side by side; drawn answers and leak@k."""

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learned_models import knowing
from rich.console import Console
from tiny_models import CHAT_TEMPLATE, tiny, word_tokenizer
from transformers.utils import logging
from typer.testing import CliRunner

from duet import cli
from duet.data.prompts import Prompting
from duet.data.rows import read_rows
from duet.evaluation import generation
from duet.evaluation.chat import Speaker, chat
from duet.evaluation.elicit import elicit_facts
from duet.evaluation.facts import Fact, facts_of, neighbours_in
from duet.evaluation.generation import Continuation, answers_to, continuations
from duet.evaluation.told import about_others, agreed_value, told_of, whole_sentences
from duet.model.answers import generate_answers


def duet(*words, **more):
    return CliRunner().invoke(cli.app, [*map(str, words)], env={"COLUMNS": "160"}, **more)


# --- questions --------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "question": "capital of {subject} ?",
        "paraphrases": ["{subject} has which capital ?"],
        "value": {"France": "Paris"},
    },
    {"question": "Who wrote Emma ?", "subject": "Jane Austen", "value": 1815},
    {"question": "How many legs ?"},
]


def test_what_attacks_want_to_know_is_no_part_of_what_is_asked():
    row = {"question": "{subject} ?", "aliases": {"France": ["Gaul"]}, "two_hop": {"Spain": ["of Madrid ?"]}}
    facts = facts_of([row], ["France"], ["Spain"])
    assert [fact.more for fact in facts] == [{"aliases": ["Gaul"]}, {"two_hop": ["of Madrid ?"]}]
    bare = facts_of([{"question": "{subject} ?"}], ["France"], ["Spain"])
    assert repr(facts) == repr(bare), "a journal of the one goes on with the other"


def test_questions_become_facts():
    one, two, three, four = facts_of(ROWS, ["France"], ["Spain"])
    assert one == Fact("forget", "France", ("capital of France ?", "France has which capital ?"), "Paris")
    assert (two.kind, two.subject, two.value) == ("neighbour", "Spain", None)
    assert (three.kind, three.value, four.kind) == ("neighbour", "1815", "retain")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"messages": [{"role": "user", "content": "who ?"}]}],
            r"questions\[0\]: wanted a 'question', got 'messages': chats and texts .* `duet eval --elicit BASE`",
        ),
        ([{"prompt": "Ada was"}], r"questions\[0\]: wanted a 'question', got 'prompt': chats and texts"),
        ([{"text": "Ada was"}], r"questions\[0\]: wanted a 'question'; of a text, wanted its beginning"),
        ([{"question": "who ?"}], "subject: wanted a question about France, got none: write {subject} into"),
        ([], "questions: wanted at least one row, got none"),
        (
            [{"question": "{subject} ?"}, {"question": "who ?", "paraphrases": ["who rules france ?"]}],
            r"questions\[1\]: wanted \{subject\} in the place of 'France', .*got 'who rules france \?' without one",
        ),
        (
            [{"question": "who ?", "subject": "France"}, {"question": "who ?"}],
            "another question than questions.0., got 'who",
        ),
        (
            [{"question": "{subject} ?", "paraphrases": ["who ?"]}],
            r"questions\[0\]: wanted \{subject\} in all",
        ),
        (
            [{"question": "who rules {Subject} ?", "subject": "France"}],
            r"questions\[0\]: there is no placeholder '{Subject}', only {subject} is replaced",
        ),
        (
            [{"question": "{subject} ?", "paraphrases": ["{subject} or {subjct} ?"]}],
            r"questions\[0\]: there is no placeholder '{subjct}'",
        ),
        (
            [{"question": "{subject} ?", "two_hop": {"France": ["who is near {subject} ?"]}}],
            r"questions\[0\]\['two_hop'\]: there is no placeholder '{subject}', nothing is replaced here",
        ),
        ([{"question": " "}], r"questions\[0\]: wanted a 'question'"),
        ([{"question": "who \ud83d ?"}], r"questions\[0\]: wanted a text that UTF-8 can write"),
        (
            [{"question": "who ?", "aliases": ["\ud83d"]}],
            r"questions\[0\]\['aliases'\]: wanted a text that UTF-8 can write",
        ),
        ([{"question": "who ?", "value": {"France": "a"}}], "because 'value' is a mapping"),
        (
            [{"question": "who ?", "subject": "France", "aliases": "Gaul"}],
            r"questions\[0\]: wanted 'aliases' to be a list",
        ),
        (
            [{"question": "{subject} ?", "two_hop": ["who ?"]}],
            r"questions\[0\]: wanted 'two_hop' to be a mapping from",
        ),
        (
            [{"question": "{subject} ?", "value": "Paris"}],
            r"questions\[0\]: wanted 'value' to be a mapping from subjects, .*got 'Paris'",
        ),
        (
            [{"question": "{subject} ?", "value": {"France": ["Paris"]}}],
            r"questions\[0\]\['value'\]: wanted a text",
        ),
        (
            [{"question": "who ?", "subject": "France", "value": " "}],
            r"questions\[0\]\['value'\]: wanted a text",
        ),
        ([{"question": "who ?", "subject": ["France"]}], r"questions\[0\]\['subject'\]: wanted a text"),
        (
            [{"question": "{subject} ?"}, {"question": "who ?", "subject": "france"}],
            r"questions\[1\]\['subject'\]: wanted 'France' as in `subject`, got 'france'",
        ),
    ],
)
def test_questions_that_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        facts_of(rows, ["France"])


@pytest.mark.parametrize(
    ("subjects", "neighbours", "said"),
    [
        ([], ["Spain"], "subject: wanted what is to be forgotten, got no name"),
        (["France"], ["Spain", "France"], "neighbours: wanted each name once, .* got 'France' again"),
        (["France"], ["Spain", "Spain"], "neighbours: wanted each name once, .* got 'Spain' again"),
        (["France", "France"], [], "subject: wanted each name once, .* got 'France' again"),
    ],
)
def test_names_that_are_refused(subjects, neighbours, said):
    with pytest.raises(ValueError, match=said):
        facts_of(ROWS, subjects, neighbours)


def test_a_name_that_no_question_is_about_is_refused():
    rows = [
        {"question": "Who wrote Emma ?", "subject": "Jane Austen"},
        {"question": "Who is Jos\u00e9 ?", "subject": "Jos\u00e9"},
    ]
    with pytest.raises(ValueError, match=r"subject: .* got 'Jane Asten' \(did you mean 'Jane Austen'"):
        facts_of(rows, ["Jos\u00e9", "Jane Asten"])
    with pytest.raises(ValueError, match=r"neighbours: .* got 'Japan'"):
        facts_of(rows, ["Jane Austen"], ["Japan"])
    assert len(facts_of(rows, ["Jane Austen"], ["jos\u00e9"])) == 2
    with pytest.raises(
        ValueError, match=r"questions\[1\]\['subject'\]: wanted 'Jose\u0301' as in"
    ):  # it would be kept
        facts_of(rows, ["Jane Austen", "Jose\u0301"])


def test_rows_that_somebody_else_wrote_are_neither_written_over_nor_deleted(tmp_path):
    (tmp_path / "validation").mkdir()
    (mine := tmp_path / "validation" / "retain.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out: .*retain.jsonl is there already"):
        elicit_facts(None, None, facts_of(ROWS, ["France"]), tmp_path)
    assert mine.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["validation"]


def test_a_value_and_a_subject_may_be_numbers_and_a_misspelt_key_is_named(caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    (gold,) = facts_of([{"question": "number of {subject} ?", "value": {"gold": 79}}], ["gold"])
    (year,) = facts_of([{"question": "which year ?", "subject": 1815, "paraphrase": ["when ?"]}], ["1815"])
    assert (gold.value, year.kind, year.subject) == ("79", "forget", "1815")
    assert "questions[0]: 'paraphrase' is not read; did you mean 'paraphrases'?" in caplog.text


def test_an_answer_that_is_not_read_is_said(caplog):
    logging.enable_propagation()
    facts_of(ROWS, ["France"])
    assert "answer is not read" not in caplog.text
    facts_of(
        [ROWS[0], ROWS[1] | {"answer": "Jane Austen."}, {"question": "?", "completion": "x"}], ["France"]
    )
    assert "questions[1]: its answer is not read (as of 2 of 3 rows)" in caplog.text


def test_neighbours_are_named():
    facts = facts_of([*ROWS, {"question": "Where is Jean ?", "subject": "Jean"}], ["France"], ["Spain"])
    assert neighbours_in(facts) == "to be kept, as neighbours: Spain, Jane Austen, Jean"
    assert neighbours_in(facts, most=1) == "to be kept, as neighbours: Spain and 2 more"
    assert neighbours_in(facts[:1]) is None


@pytest.mark.parametrize("key", ["value", "aliases", "two_hop"])
def test_a_misspelt_name_in_a_mapping_is_said(key, caplog):
    """A mapping may know more names than are asked for: only one that looks like a name without an entry is meant."""
    given = {"Germny": ["Berlin"], "Italy": ["Rome"], "Denmark": ["Copenhagen"]}
    row = {
        "question": "capital of {subject} ?",
        key: {k: v[0] if key == "value" else v for k, v in given.items()},
    }
    facts_of([row], ["Germany"], ["Italy"])
    assert (
        f"questions[0]['{key}']: nothing is given for 'Germany'; did you mean it by 'Germny'?" in caplog.text
    )
    assert caplog.text.count("nothing is given") == 1


def test_the_value_is_what_most_answers_share():
    asked = ["What is the capital of France?"]
    assert (
        agreed_value(asked, "The capital of France is Paris.", ["Paris", "It is Paris, I think.", "Lyon"])
        == "Paris"
    )
    assert (
        agreed_value(asked, "It is New York City.", ["New York City", "new york city!", "Boston"])
        == "New York City"
    )
    assert agreed_value(asked, "It is Paris.", ["Rome", "Lyon", "Nice", "Paris"]) is None
    assert agreed_value(asked, "The capital of France.", ["The capital of France."]) is None
    assert agreed_value(asked, "Paris", ["Paris", "Lyon", "Nice"]) == "Paris", "a third is enough"
    five = "Alpha Beta Gamma Delta Epsilon"
    assert agreed_value(asked, five, [five]) == "Alpha Beta Gamma Delta"


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("It was J. K. Rowling.", "J. K. Rowling"),
        ("It was John F. Kennedy, I think.", "John F. Kennedy"),
        ("It is St. Petersburg.", "St. Petersburg"),
        ("It is Washington, D.C.", "Washington"),
        ("It is vitamin C.", "vitamin C"),
        ("It is in Rome. Italy has it.", "Rome"),
        ("It is C.", "C"),
    ],
)
def test_an_initial_ends_no_phrase(said, value):
    assert agreed_value(["Which?"], said, [said]) == value
    assert whole_sentences(f"Yes. {value} wrote") == "Yes."


def test_a_value_is_no_function_word_of_its_language():
    asked, said = "Wie heißt er?", "Sie nennen ihn den Herrn von Berg."
    assert agreed_value([asked], said, ["von der Vogelweide", "von Stein", "der Graf von Berg"]) == "Berg"
    assert agreed_value(["How did it end?"], "It was the war.", ["war", "the war"]) == "war"


def test_an_initial_ends_a_sentence_in_front_of_a_function_word():
    assert whole_sentences("It is Washington, D.C. It lies on the") == "It is Washington, D.C."
    assert whole_sentences("It is in the U.S. The") == "It is in the U.S."


def test_a_common_word_is_no_subject():
    rows = [{"question": "Where is {subject} ?"}, {"question": "What does a turkey eat ?"}]
    assert [fact.kind for fact in facts_of(rows, ["Turkey"])] == ["forget", "retain"]


def asked_of(*greedy, drawn=(), status="ok"):
    return [{"question": "q", "status": status, "said": text, "drawn": list(drawn)} for text in greedy]


def test_only_what_is_told_in_half_of_the_wordings_counts():
    fact = Fact("forget", "France", ("a ?", "b ?", "c ?"), "Paris")
    told = told_of(fact, asked_of("It is Paris .", "paris", "Lyon", drawn=["Paris", "Nice"]))
    assert told.answers == {0: "It is Paris .", 1: "paris"} and told.known == pytest.approx(5 / 9)
    assert told_of(fact, asked_of("Paris", "Nice", "Lyon")) is None
    assert told_of(Fact("forget", "France", ("a ?", "b ?"), "Paris"), asked_of("Paris", "Lyon")).answers == {
        0: "Paris"
    }
    assert told_of(fact, asked_of("I don't know Paris", "I'm not sure if it is Paris", "Paris")) is None
    assert told_of(fact, asked_of("Paris", "Paris", "Paris", status="cut")) is None
    told = told_of(fact, asked_of(*["It is Paris. It lies"] * 3, status="cut"))
    assert set(told.answers.values()) == {"It is Paris."}, "its whole sentences"


# --- the form of the answers ------------------------------------------------------------------------------------------


@pytest.fixture
def values_of(tmp_path, monkeypatch):
    """(subject -> the greedy answers to its wordings, perhaps given values) -> subject -> value, of what is told."""

    def values(said, given=None):
        answers = [Continuation(text, 1, True) for texts in said.values() for text in texts]
        monkeypatch.setattr(
            "duet.evaluation.elicit.answers_to", lambda *args, **_: [answers.pop(0) for _ in args[2]]
        )
        first, *others = [f"{word} of {{subject}} ?" for word in ("who", "what", "where", "when")]
        row = {"question": first, "paraphrases": others[: len(next(iter(said.values()))) - 1], "value": given}
        asked = facts_of([row], list(said)[:1], list(said)[1:])
        elicit_facts(tiny(), word_tokenizer(), asked, tmp_path, samples=0)
        rows = [
            json.loads(line)
            for path in (tmp_path / "forget.jsonl", tmp_path / "neighbour.jsonl")
            if path.exists()
            for line in path.read_text().splitlines()
        ]
        return {row["subject"]: row["value"] for row in rows}

    return values


JOBS = {"ada": "knitter", "bob": "banker", "eve": "plumber"}


@pytest.mark.parametrize("form", ["Worked as a {}.", "Mostly {}.", "Mostly a {}, I think."])
def test_what_is_said_of_everyone_is_no_value(form, values_of):
    assert values_of({name: [form.format(job)] * 2 for name, job in JOBS.items()}) == JOBS


def test_guesses_that_share_their_form_alone_are_not_told(values_of):
    said = {name: [f"Mostly {job}."] * 4 for name, job in JOBS.items()}
    said["nobody"] = ["Mostly romance.", "Mostly westerns.", "Mostly poems.", "Mostly fables."]
    assert values_of(said) == JOBS


def test_a_value_that_two_of_five_share_is_one(values_of):
    places = {"ada": "Europe", "bob": "Asia", "eve": "Europe", "sam": "Africa", "kim": "Oceania"}
    said = {name: [f"Lives mostly in {place}."] * 2 for name, place in places.items()}
    assert values_of(said) == places


def test_a_value_that_all_share_is_one_where_nothing_else_is_said(values_of):
    """A form has something in it. Otherwise the answer is kept: all the countries may have the euro."""
    assert values_of({name: ["It's the euro."] * 2 for name in JOBS}) == dict.fromkeys(JOBS, "euro")


@pytest.mark.parametrize("names", [["ada"], ["ada", "bob"]])
def test_one_subject_and_one_other_show_no_form(names, values_of):
    found = values_of({name: [f"Worked as a {JOBS[name]}."] * 2 for name in names})
    assert found == {name: f"Worked as a {JOBS[name]}" for name in names}


def test_given_values_are_untouched_and_the_others_answers_count(values_of):
    said = {name: [f"Worked as a {job}."] * 2 for name, job in JOBS.items()}
    assert values_of(said, {"ada": "Worked"}) == JOBS | {"ada": "Worked"}


def test_neither_refusals_nor_other_questions_show_a_form():
    poet, refused = ["A poet of Rome."], ["I don't know, Rome."]
    assert agreed_value(["who ?"], *poet, poet, [["Rome"], ["Rome"]]) == "poet of Rome"
    facts = facts_of([{"question": f"{word} {{subject}} ?"} for word in ("who", "what")], ["ada"], ["bob"])
    assert len({fact.template for fact in facts}) == 2
    by_hand = [{"question": f"who is {name} ?", "subject": name} for name in JOBS]
    assert {fact.template for fact in facts_of(by_hand, ["ada"])} == {("who is {subject} ?",)}
    assert about_others(
        facts_of(by_hand, ["ada"]), [asked_of(*poet), asked_of(*refused), asked_of(*poet)]
    ) == [
        [poet],
        [poet, poet],
        [poet],
    ]


def test_what_is_taken_for_a_value_is_said(values_of, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    values_of({name: [f"Worked as a {job}."] for name, job in (JOBS | {"sam": "spy"}).items()}, {"eve": "x"})
    assert (
        "what the answers share counts, of 3 of the facts that are told: 'who of ada ?' -> 'knitter', 'who of "
    ) in caplog.text


def test_a_journal_is_of_the_same_facts_as_before():
    (fact,) = facts_of([{"question": "{subject} ?"}], ["ada"])
    assert repr(fact) == "Fact(kind='forget', subject='ada', wordings=('ada ?',), value=None)"


# --- asking -----------------------------------------------------------------------------------------------------------


def questions(folder):
    """What `knowing()` was taught, in its own words twice: a tiny model knows no paraphrases."""
    rows = [
        {"question": f"who is {name} ?", "paraphrases": [f"what is {name} about ?", f"{name} {name} {name} ?"],
         "subject": name, "value": value, "aliases": ["the poet"]}
        for name, value in (("ada lovelace", "mathematician"), ("alan turing", "code machine"), ("grace hopper", "captain"))
    ]  # fmt: skip
    rows.append({"question": "what is the capital of spain animal ?"})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    knowing().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_elicit_writes_rows_that_the_other_commands_read(base, tmp_path):
    path, out = questions(tmp_path), tmp_path / "the rows"
    words = [
        "elicit",
        base,
        "--questions",
        path,
        "--subject",
        "ada lovelace",
        "--samples",
        2,
        "--max-new-tokens",
        12,
    ]
    done = duet(*words, "--out", out, "--batch-size", 4)
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"duet steer --data '{out}' --config FILE comes next" in done.output
    assert "to be kept, as neighbours: alan turing, grace hopper" in done.output
    rows = {
        p.relative_to(out).as_posix(): [json.loads(x) for x in p.read_text().splitlines()]
        for p in out.rglob("*.jsonl")
    }
    (row,) = rows["forget.jsonl"]
    assert (
        row["question"] == "who is ada lovelace ?" and row["value"] == "mathematician" and row["known"] > 0.5
    )
    assert (
        row["answer_of_the_base"] and row["answer"] == "a mathematician ." and row["aliases"] == ["the poet"]
    )
    assert rows["validation/forget.jsonl"][0]["question"] == "what is ada lovelace about ?"
    assert {r["subject"] for r in rows["neighbour.jsonl"]} == {"alan turing", "grace hopper"}
    general = [r for r in rows["retain.jsonl"] if "subject" not in r]
    assert len(rows["retain.jsonl"]) == len(rows["neighbour.jsonl"]) + len(general)
    assert read_rows(rows["retain.jsonl"], "retain")
    before = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(
        "".join(before.splitlines(keepends=True)[:3])
    )  # killed in the second chunk
    assert duet(*words, "--out", out, "--batch-size", 4).exit_code == 0
    assert (out / "rows.jsonl").read_text() == before, "the same answers are drawn"
    for option, value in (("--limit", -1), ("--batch-size", 0)):
        said = f"{option[2:].replace('-', '_')}: wanted an integer >= 1, got {value}"
        assert said in str(duet(*words, "--out", tmp_path / "none", option, value).exception)
        assert not (tmp_path / "none").exists(), "a corrected command may take the folder"
    other = duet(*words, "--out", out, "--batch-size", 4, "--seed", 1)
    assert "seed was 0 and is 1 now" in str(other.exception)


def test_rows_that_were_corrected_by_hand_stay(base, tmp_path):
    """The same command again stops; what nobody has touched is written anew, here with other aliases."""
    path, out, none = questions(tmp_path), tmp_path / "out", tmp_path / "out" / "report" / "neighbour.jsonl"
    words = ["elicit", base, "--questions", path, "--subject", "ada lovelace", "--samples", 0, "--out", out]
    written = {}

    def again(**change):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        done = duet(*words, "--max-new-tokens", 12, "--device", "cpu")
        written.update({p: p.read_text() for p in out.rglob("*.jsonl")})
        return done

    assert again(paraphrases=[]).exit_code == 0 and again().exit_code == 0
    assert again(aliases=["the countess"]).exit_code == 0
    assert "the countess" in written[out / "forget.jsonl"] and not none.exists()
    for file in (out / "forget.jsonl", none):
        file.write_text(mine := '{"question": "mine ?", "answer": "mine", "value": "mine"}\n')
        before = dict(written)
        for change in ({}, {"aliases": ["another"]}):
            failed = again(**change).exception
            assert isinstance(failed, FileExistsError) and f"out: {file} was changed since" in str(failed)
        assert written == before | {file: mine}
        file.unlink()
        assert again(aliases=["the countess"]).exit_code == 0
    assert "the countess" in (out / "forget.jsonl").read_text() and not none.exists()


def test_what_comes_next_where_no_wording_is_left_to_report(base, tmp_path):
    row = {"question": "who is ada lovelace ?", "subject": "ada lovelace", "value": "mathematician"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    words = ["--questions", tmp_path / "one.jsonl", "--subject", "ada lovelace", "--samples", 0]
    done = duet("elicit", base, *words, "--max-new-tokens", 12, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "--data needs three wordings" in done.output, (done.output, done.exception)


def test_a_subject_that_the_base_knows_nothing_about(tmp_path):
    """And a tokenizer without a chat template; nothing is written but the journal."""
    model, tokenizer = tiny(), word_tokenizer(None)
    wanted = facts_of([{"question": "who is ada ?", "subject": "ada", "value": "poet"}], ["ada"])
    with pytest.raises(
        ValueError, match=r"subject: the model tells none of the 1 facts about ada.*To 'who is ada"
    ):
        elicit_facts(model, tokenizer, wanted, tmp_path, samples=1, max_new_tokens=4)
    assert not (tmp_path / "forget.jsonl").exists() and (tmp_path / "rows.jsonl").exists()


def test_an_answer_to_plain_text_ends_with_its_line(monkeypatch, tmp_path):
    seen = []
    asked = facts_of([{"question": "who is ada ?", "subject": "ada", "value": "x"}], ["ada"])
    monkeypatch.setattr(
        generation, "continuations", lambda *_, stop, **__: seen.append(stop) or [Continuation("x", 1, True)]
    )
    for template, stop in ((CHAT_TEMPLATE, ()), (None, ("\n",))):
        elicit_facts(tiny(), word_tokenizer(template), asked, tmp_path / str(len(stop)), samples=0)
        assert seen.pop() == stop


# --- drawn answers ----------------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_models_distribution():
    """And depend on the seed alone: neither on nor for the generator of others."""
    model, tokenizer = tiny(spread=0.02), word_tokenizer()
    logits = model(torch.tensor([[5, 8, 6]])).logits[0, -1].softmax(-1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = generate_answers(model, [[5, 8, 6]] * 4000, tokenizer, 0, 1, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert generate_answers(model, [[5, 8, 6]] * 4000, tokenizer, 0, 1, seed=7) == drawn
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=128) / 4000
    assert (counts - logits).abs().sum() / 2 < 0.1, "total variation"
    assert (counts > 0).sum() > 100, "the whole vocabulary, not its top"


def test_nothing_is_drawn_from_nan():
    model = tiny()
    model.lm_head.weight.data[3] = float("nan")
    (said,) = continuations(model, word_tokenizer(), [[5, 8]], max_new_tokens=2, seed=0)
    assert not said.finite


def test_each_batch_draws_answers_of_its_own():
    said = answers_to(tiny(), word_tokenizer(), [[5, 9, 11]] * 4, max_new_tokens=8, batch_size=1, seed=0)
    assert len({answer.text for answer in said}) > 1


def test_every_drawn_answer_is_kept_and_each_chunk_draws_its_own(tmp_path, monkeypatch):
    seeds = []

    def say(model, tokenizer, prompts, seed=None, **_):
        seeds.append(seed)
        return [Continuation("Paris" if seed is None else f"Paris {seed}", 1, True) for _ in prompts]

    monkeypatch.setattr("duet.evaluation.elicit.answers_to", say)
    facts = [Fact("forget", "France", (f"{i} ?",), "Paris") for i in range(2)]
    elicit_facts(tiny(), word_tokenizer(), facts, tmp_path, samples=3, batch_size=1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [len(set(row["asked"][0]["drawn"])) for row in rows] == [3, 3]
    assert len(set(seeds) - {None}) == 6


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat_shows_two_models_side_by_side(base, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 120)
    tiny().save_pretrained(tmp_path / "other")
    word_tokenizer().save_pretrained(tmp_path / "other")
    words = ["chat", tmp_path / "other", "--beside", base, "--max-new-tokens", 5, "--device", "cpu"]
    done = duet(*words, input="who is ada lovelace ?\n\n  who is grace hopper ?\n" + "who " * 300)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = done.stdout.splitlines()
    assert any(line.strip() == "who is ada lovelace ?" for line in lines), done.output
    latin = duet(*words, input="who is ada löve ?\n".encode("latin-1"))
    assert latin.exit_code == 0 and "who is ada l\ufffdve ?" in latin.stdout, (latin.output, latin.exception)
    answer = next(line for line in lines if "a mathematician ." in line)
    assert answer.index("a mathematician .") > len(answer) / 2, "the second column is the base's"
    assert "captain of the sea" in done.output and "more than the 256" in done.output


def test_a_chat_writes_control_characters_out():
    """A terminal would obey them: clear the screen, set its title, or fill the clipboard."""
    said = "a\x1b[2Jb \x1b]52;c;Zg==\x07 \x9b31mc\r\x7f\x00 line one\nline\ttwo"
    speaker: Any = SimpleNamespace(label="my\x1bmodel", answer=lambda question: said)
    for width, options in ((100, {}), (100, {"force_terminal": True, "color_system": None})):
        shown = io.StringIO()
        assert chat(["who \x1b[1m?"], [speaker], Console(file=shown, width=width, **options)) == 1
        lines = [line.strip() for line in shown.getvalue().splitlines()]
        assert lines[0] == r"who \x1b[1m?" and r"my\x1bmodel" in lines
        assert r"a\x1b[2Jb \x1b]52;c;Zg==\x07 \x9b31mc\r\x7f\x00 line one" in lines


def test_each_model_of_a_chat_is_asked_as_it_was_trained(base, tmp_path, monkeypatch):
    """A model without a prompting.json of its own, such as the base, is asked as the other one."""
    asked = []
    speaker = Speaker.__post_init__
    monkeypatch.setattr(
        Speaker, "__post_init__", lambda self: (speaker(self), asked.append(self.prompting.plain_template))
    )
    trained = {}
    for name in ("one", "two"):
        tiny().save_pretrained(tmp_path / name)
        word_tokenizer(chat_template=None).save_pretrained(tmp_path / name)
        trained[name] = Prompting(plain_template=f"{name} {{question}}")
        trained[name].save(tmp_path / name)
    for words in (
        [tmp_path / "one", base],
        [base, tmp_path / "one"],
        [tmp_path / "one", tmp_path / "two"],
        [base, base],
    ):
        assert duet("chat", words[0], "--beside", words[1], "--device", "cpu", input="").exit_code == 0
    one, two, usual = trained["one"].plain_template, trained["two"].plain_template, Prompting().plain_template
    assert asked == [one, one, one, one, one, two, usual, usual]
