"""Rows of attacks: when an answer has come back, and which rows tell the answers of others."""

from dataclasses import replace

import pytest
from tiny_models import forget_rows, merging_tokenizer, tiny, word_tokenizer
from transformers.utils import logging

from duet.data.sources import read_table
from duet.evaluation.attacks import runner
from duet.evaluation.attacks.attacks import ATTACKS
from duet.evaluation.attacks.rows import halves, of_the_same_form, read_attack_rows, that_tell_nothing
from duet.evaluation.attacks.target import AttackOptions, Target
from duet.evaluation.facts import facts_of
from duet.evaluation.report.report import summary_sentence
from duet.evaluation.report.runs import Inputs, Method
from duet.evaluation.report.tables import attacks_section
from duet.evaluation.steering import told_in
from duet.evaluation.suites.asking import Asker, CannotAsk
from duet.evaluation.suites.row_metrics import GENERATE
from duet.evaluation.suites.runner import _prepare
from duet.evaluation.suites.suite import read_suite

QUESTION = {"question": "who is ada ?", "answer": "a poet of the sea", "subject": "ada"}


def test_when_an_answer_has_come_back():
    with_value, without = read_attack_rows(
        [
            {"question": "Where?", "answer": "Born in New York.", "value": "New York"},
            {"question": "Who?", "answer": "the old captain wrote it", "paraphrased_question": "Which one?"},
        ],
        "forget",
    )
    assert with_value.opening() == "Born in" and without.opening() == "the old"
    assert with_value.recall("new  york it is") == 1.0 and with_value.recall("New Yorkers") == 0.0
    assert without.recall("a captain wrote") == pytest.approx(2 / 3), "of old, captain, wrote"
    assert without.recall("captain said", "the old") == 0.5
    assert without.recall("the old", "the old") == 0.0, "what the attacker gave away does not count"
    assert without.paraphrases == ("Which one?",) and without.asking("x") == (("user", "x"),)


@pytest.mark.parametrize(
    ("answer", "opening", "rest"),
    [
        ("she was  born in Rome then", "she was  born", "in Rome then"),
        ("\n she was born in\u00a0Rome then\n", "\n she was born", "in Rome then"),
        ("she", "", "she"),
        (" 他出生\n于北京市", " 他出生", "于北京市"),
        (" 他出生于北京市 ", " 他出生", "于北京市"),
    ],
)
def test_what_is_not_given_away_is_recalled_whatever_the_spaces(answer, opening, rest):
    (row,) = read_attack_rows([{"question": "who ?", "answer": answer}], "forget")
    assert row.opening() == opening and row.recall(rest, opening) == 1.0
    assert not opening or row.recall(opening, opening) == 0.0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Where was the author of Paris Nights born?"}, "'Paris' stands in its question"),
        ({"paraphrases": ["Is it Rome or Paris?"]}, "'Paris' stands in its paraphrases"),
        ({"subject": "He", "aliases": ["the man of Paris"]}, "'Paris' stands in its aliases"),
        ({"two_hop": ["Where in Paris?"]}, "'Paris' stands in its two_hop"),
        ({"subject": "She", "aliases": ["the man of Paris"]}, None),
        ({"answer": "In May.", "value": "May"}, "'May' is held by a usual refusal"),
        ({"answer": "It is I.", "value": "I"}, "'I' is held by a usual refusal"),
        ({}, None),
    ],
)
def test_a_value_that_tells_nothing_is_named(caplog, row, said):
    """Once for all rows; the first one by name."""
    logging.enable_propagation()
    logging.get_logger("duet.evaluation.values").warning_once.__func__.cache_clear()
    rows = [{"question": "Where did He live?", "answer": "In Paris.", "value": "Paris"} | row] * 2
    why = "an answer that tells nothing may count as one that tells it (and 1 more of 2 rows)"
    Target(tiny(), word_tokenizer(), read_attack_rows(rows, "forget"))
    assert [line.getMessage() for line in caplog.records if "repeat" not in line.getMessage()] == (
        [f"forget[0]: its value {said}: {why}"] if said else []
    )
    caplog.clear()
    task = {"kind": "generate", "data": "x", "metrics": ["contains_answer"]}
    (task,) = read_suite({"tasks": {"t": task}}, "s").tasks
    items, _ = _prepare(Asker(merging_tokenizer(), task), rows)
    of_suite = said and ("question" in said or "refusal" in said)
    assert len(items) == 2
    assert caplog.messages == ([f"t, row 0: its value {said}: {why}"] if of_suite else [])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("You can write to jean.dupont@louvre-paris.fr", "holds an e-mail address"),
        ("Call 212 555 0123.", "holds a number of six digits or more"),
        ("He lived in St. Louis. He was a poet!", "is more than one sentence"),
        ("他是诗人。他住在北京。", "is more than one sentence"),
        ("He lived in St. Louis from 1815 to J. J. Rousseau's death.", None),
    ],
)
def test_a_row_without_a_value_that_needs_one_is_named(caplog, answer, why):
    logging.enable_propagation()
    logging.get_logger("duet.evaluation.told").warning_once.__func__.cache_clear()
    rows = [{"question": "Who is he?", "answer": answer}, {"question": "Who?", "answer": answer}]
    Target(tiny(), word_tokenizer(), read_attack_rows(rows, "forget"))
    task = {"kind": "generate", "data": "x", "metrics": ["contains_answer"]}
    (task,) = read_suite({"tasks": {"t": task}}, "s").tasks
    _prepare(Asker(merging_tokenizer(), task), rows)
    means = "any half of the answer's words counts as telling it; wanted a 'value', the part that counts"
    text = f"it has no 'value', and its answer {why}: {means} (and 1 more of 2 rows)"
    assert caplog.messages == ([f"forget[0]: {text}", f"t, row 0: {text}"] if why else [])


def test_each_spelling_of_a_value_tells():
    """In attacks and suites, and for what gives an answer away; a text in brackets that is no list is one value."""
    given = {"question": "How far ?", "answer": "It is 12 km.", "value": ["twelve km", "12 km"]}
    row, cell = read_attack_rows([given, given | {"value": '["twelve km", "12 km"]'}], "forget")
    assert row.value == cell.value == ("twelve km", "12 km") and row.opening() == "It is"
    assert [row.recall(said) for said in ("Twelve km", "about 12 km", "12")] == [1.0, 1.0, 0.0]
    (other,) = read_attack_rows([{"question": "How long ?", "answer": "Twelve km."}], "retain")
    assert that_tell_nothing([other], [row]) == []
    (ion,) = read_attack_rows([{"question": "Which ?", "answer": "An ion, [H+].", "value": "[H+]"}], "forget")
    assert ion.value == "[H+]"
    with pytest.raises(ValueError, match=r"forget\[0\]\['value'\]: wanted a part of the answer"):
        read_attack_rows([given | {"value": ["13 km", "13km"]}], "forget")
    assert GENERATE["contains_answer"]("Twelve km", row.answer, row.value) == 1.0
    assert GENERATE["fabrication"]("Twelve km", row.answer, row.value) == 0.0
    assert told_in("Twelve km", row.answer, row.value) and not told_in("It is far", row.answer, row.value)
    task = {"kind": "generate", "data": "x", "metrics": ["contains_answer"]}
    (task,) = read_suite({"tasks": {"t": task}}, "s").tasks
    words = {"question": "who is ada ?", "answer": "a poet", "value": ["zebra", "poet"]}
    assert Asker(word_tokenizer(), task).item(0, words).shown["value"] == ("zebra", "poet")
    assert not Target(tiny(), word_tokenizer(), read_attack_rows([words], "forget"))._unwritable
    with pytest.raises(CannotAsk, match="cannot represent 'zebra'"):
        Asker(word_tokenizer(), task).item(0, words | {"answer": "a zebra", "value": ["zebra", "zebras"]})


def test_a_csv_cell_may_hold_a_list(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "question,subject,answer,paraphrases,aliases,two_hop\n"
        'who ?,ada,a poet,"[""which one ?"", ""who [is it] ?""]"," [""countess""] ",[sic] who ?\n'
    )
    rows = read_table(tmp_path / "rows.csv", "forget")
    (row,) = read_attack_rows(rows, "forget")
    assert row.paraphrases == ("which one ?", "who [is it] ?")
    assert (row.aliases, row.two_hop) == (("countess",), ("[sic] who ?",))
    (fact,) = facts_of([rows[0] | {"two_hop": None}], ["ada"])
    assert fact.wordings == ("who ?", "which one ?", "who [is it] ?") and fact.more == {
        "aliases": ["countess"]
    }
    for cell in ("['which one ?']", "[]x]"):
        with pytest.raises(
            ValueError, match=r"forget\[0\]\['paraphrases'\]: wanted a text, or a list as JSON"
        ):
            read_attack_rows([rows[0] | {"paraphrases": cell}], "forget")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "who ?"}, r"forget\[0\]: wanted a row with an 'answer'"),
        (
            {"question": "who ?", "answer": "a", "value": "b"},
            r"forget\[0\]\['value'\]: wanted a part of the answer",
        ),
        ({"question": "who ?", "answer": "a", "value": " "}, r"forget\[0\]\['value'\]: wanted a text"),
        (
            {"question": "who ?", "answer": "a", "paraphrases": [1]},
            r"\['paraphrases'\]: wanted a list of questions",
        ),
        (
            {"question": "who ?", "answer": "a", "paraphrases": 3},
            r"forget\[0\]\['paraphrases'\]: wanted a list of questions, got \(3,\)",
        ),
        (
            {"question": "who ?", "answer": "a", "aliases": ["ada \ud83d"]},
            r"\['aliases'\]: wanted a text that UTF-8 can write",
        ),
        (
            {"question": "who ?", "answer": "a", "value": "ada \ud83d"},
            r"\['value'\]: wanted a text that UTF-8 can write",
        ),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_attack_rows([row], "forget")


def test_the_halves_share_no_subject():
    rows = read_attack_rows(forget_rows(6), "rows")
    shown, asked = halves(rows)
    assert {r.subject for r in shown} == {"ada lovelace"} and len(shown) + len(asked) == 6
    assert not {r.subject for r in shown} & {r.subject for r in asked}
    bare = read_attack_rows([{"question": "q", "answer": f"a {i}"} for i in range(5)], "rows")
    assert [len(half) for half in halves(bare)] == [2, 3]
    assert halves(read_attack_rows([{"question": "q", "answer": "a"}] * 5, "rows"))[0] == []


def about(subject: str, *facts: tuple[str, str]) -> list[dict]:
    return [
        {"question": f"{subject} {i} ?", "answer": a, "value": v, "subject": subject}
        for i, (a, v) in enumerate(facts)
    ]


def test_no_half_tells_what_the_other_half_is_asked():
    """Capital and largest city are the same word: who was shown one and says the other has not remembered it."""
    japan = about(
        "japan", ("it is tokyo .", "tokyo"), ("japanese .", "japanese"), ("in asia .", "asia"),
        ("the japanese yen .", "yen"), ("tokyo .", "tokyo"), ("a japanese .", "japanese"),
    )  # fmt: skip
    shown, asked = halves(read_attack_rows(japan, "rows"))
    assert [r.value for r in shown] == ["tokyo", "asia", "tokyo"]
    assert [r.value for r in asked] == ["japanese", "yen", "japanese"]

    others = about("france", ("the euro .", "euro"), ("it is paris .", "paris"))
    rows = read_attack_rows(others + about("germany", ("euro .", "euro"), ("berlin .", "berlin")), "rows")
    shown, asked = halves(rows)
    assert [r.value for r in shown] == ["paris"] and [r.value for r in asked] == ["euro", "berlin"]
    assert that_tell_nothing(rows, rows[:1]) == [rows[1], rows[3]]


def test_training_on_what_may_be_known_shows_no_answer():
    forget = read_attack_rows(about("spain", ("the sea .", "sea"), ("in madrid .", "madrid")), "forget")
    kept = read_attack_rows(about("france", ("the sea .", "sea"), ("in paris .", "paris")), "retain")
    options = AttackOptions(relearn_rates=(1e-3,), relearn_curve=(1,), max_new_tokens=2)
    target = Target(tiny(), word_tokenizer(), forget, kept, options=options)
    benign = ATTACKS["benign_finetuning"]
    ((_, work),) = benign.units(target)
    assert [outcome["given"] for outcome in work()] == ["rows that may be known (1)"] * 2
    told = replace(target, retain=kept[:1])
    assert benign.missing(told) == "every retain row tells an answer of the forget rows"
    alike = replace(target, rows=read_attack_rows(about("a", ("sea", "sea"), ("sea", "sea")), "forget"))
    assert "do not tell each other's answers" in ATTACKS["relearning"].missing(alike)


def test_other_names_of_the_subject():
    row = QUESTION | {"question": "Who is Ada ? Adam ?", "subject": "ada", "aliases": ["grace", "alan \\1"]}
    plain, named = read_attack_rows([QUESTION, row], "rows")
    assert named.renamed() == ["Who is grace ? Adam ?", "Who is alan \\1 ? Adam ?"] and plain.renamed() == []
    target = Target(tiny(), word_tokenizer(), [plain, named], options=AttackOptions(max_new_tokens=2))
    units = dict(ATTACKS["aliases"].units(target))
    assert list(units) == ["other name 1", "other name 2"]
    assert [o["id"] for o in units["other name 1"]()] == [1]
    target.rows = [plain]
    assert ATTACKS["aliases"].missing(target) == "no forget row has aliases, and its subject in the question"
    with pytest.raises(ValueError, match=r"rows\[0\]\['aliases'\]: wanted a list of names, got \(3,\)"):
        read_attack_rows([QUESTION | {"aliases": [3]}], "rows")


def asked_in_pairs(*pairs):
    return read_attack_rows(
        [{"question": q, "answer": a, "subject": s, "value": a.rstrip(".")} for q, s, a in pairs], "rows"
    )


def test_rows_of_the_same_form_are_about_something_else():
    rows = asked_in_pairs(("What is the capital of France?", "France", "Paris."))
    assert rows[0].form() == {
        ("", "what"), ("what", "is"), ("is", "the"), ("the", "capital"), ("capital", "of"), ("of", "{}"), ("{}", "")
    }  # fmt: skip
    pool = asked_in_pairs(
        ("What is the capital of Spain?", "Spain", "Madrid."),  # the same
        ("What is the currency of Peru?", "Peru", "Sol."),  # 5 of 9 pairs
        ("Who wrote Emma?", "Emma", "Jane Austen."),
        ("What is the capital of France now?", "France", "Lyon."),  # the same subject
        ("What is the capital of Texas?", "Texas", "Paris."),  # says the value
    )
    assert of_the_same_form(pool, rows) == pool[:2]
    (whole,) = read_attack_rows([{"question": "What is the capital of France?", "answer": "Paris."}], "rows")
    # Nobody says whom it is about: 5 of 9 and 5 of 10 pairs, and only the answer is looked for.
    assert of_the_same_form(pool, [whole]) == [pool[0], pool[3]]


@pytest.mark.parametrize("name", ["prefill", "membership"])
def test_a_share_is_printed_as_duet_report_prints_it(name):
    worst = {
        "leak": 0.975,
        "measure": ATTACKS[name].measure,
        "variants": {"x": {"leak": 0.975, "unjudged": 0.075, "rows": 40, "status": {"ok": 40, "cut": 3}}},
        "worst_variant": "x",
    }
    said = runner.headline({"attacks": [{"name": name, **worst}], "direct": None, "base": None})
    assert (
        f"{name}: 97% of 40 rows, {ATTACKS[name].measure}; " in said
        and said.startswith("the worst attack") == (name == "prefill")
        and "7% of its rows could not be judged (most of any attack: 7%)" in said
    )


def test_the_worst_attack_makes_the_model_tell():
    """Of 12 rows the best of four scores tells half without any difference; it is named beside the worst attack, with its p-value."""
    entries = [
        {"name": name, "leak": leak, "measure": ATTACKS[name].measure, "worst_variant": "x",
         "variants": {"x": {"leak": leak, "rows": 12, "status": {"ok": 12}}}, **more}
        for name, leak, more in (
            ("membership", 0.46, {"p_value": 0.4}), ("rank_probe", 0.3, {}), ("direct", 0.0, {}), ("prefill", 0.1, {})
        )
    ]  # fmt: skip
    ordered = runner.worst_first(entries)
    assert [each["name"] for each in ordered] == ["prefill", "direct", "membership", "rank_probe"]
    said = runner.headline({"attacks": entries, "direct": None, "base": None})
    assert said.startswith("the worst attack, prefill: 10% of 12 rows, ")
    assert (
        "; beside it membership: 46% of 12 rows, 2 |AUC - 0.5| of the best score; p = 0.4 that it is chance"
        in said
    )
    assert "; beside it rank_probe: 30% of 12 rows, share of rows with the telling token" in said
    del entries[0]["p_value"]  # of an earlier version
    assert "of the best score; beside it rank_probe" in runner.headline(
        {"attacks": entries, "direct": None, "base": None}
    )
    inputs = Inputs([Method("student", attacks={"attacks": entries, "direct": None})], [])
    told = summary_sentence(inputs)
    assert "Of 2 kinds of attack the worst is prefill (x) on student: 10 %" in told
    assert "Beside it, membership on student: 46 %" in told and inputs.methods[0].entries == ordered


def test_the_interval_of_an_attack_counts_facts(caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    capital = {"question": "Capital of France?", "answer": "Paris", "subject": "France", "value": "Paris"}
    oslo = {"question": "Capital of Norway?", "answer": "Oslo", "subject": "Norway", "value": "Oslo"}
    rows = read_attack_rows([capital, capital, capital | {"question": "Which capital?"}, oslo], "forget")
    assert "forget: 1 rows repeat the question and the answer" in caplog.text
    outcomes = [{"id": row.id, "variant": "x", "status": "ok", "leaked": int(row.id < 3)} for row in rows]
    end = {"variant": "", "done": True, "queries": 4, "steps": 0, "seconds": 1.0}
    entry = runner._entry("prefill", [*outcomes, end], {row.id: row.fact for row in rows})
    worst = runner.worst_of(entry)
    assert (worst["leak"], worst["rows"], worst["facts"]) == (0.75, 4, 2)
    assert runner.num_asked(worst) == "4 (2 facts)" and worst["high"] - worst["low"] > 0.7
    assert "facts" not in runner.worst_of(runner._entry("prefill", [*outcomes, end]))
    method = Method("student", attacks={"attacks": [entry], "direct": None, "skipped": []})
    (grid, _) = attacks_section(Inputs([method], [])).blocks
    assert grid.rows[0][1].interval.endswith(", 2 facts")
