"""Suite files: the shipped ones, and what a wrong field, option or table is answered with."""

import copy
import json

import pytest
from tiny_models import merging_tokenizer, word_tokenizer
from tokenizers import AddedToken, normalizers
from transformers.utils import logging

from duet.data.rows import correct_choice
from duet.evaluation.suites import suite as suites
from duet.evaluation.suites.asking import Asker, CannotAsk
from duet.evaluation.suites.runner import _tables
from duet.evaluation.suites.suite import load_suite, read_suite

GOOD = {
    "tasks": {
        "facts": {"kind": "generate", "data": "facts", "metrics": ["rouge_l_f1"]},
        "losses": {
            "kind": "score",
            "data": "facts",
            "texts": {"paraphrased": ["other", "answer"], "perturbed": "wrong", "answer": "answer"},
            "metrics": ["probability", "truth_ratio"],
        },
    },
    "numbers": {"forget_quality": {"ratios": "losses.truth_ratio"}},
}


def test_shipped_suites():
    found = {path.stem: load_suite(path.stem) for path in suites.SUITES.glob("*.yaml")}
    assert set(found) == {"tofu", "muse", "mcq", "probes"}
    assert found["tofu"].tasks[0].data == "forget10_perturbed"
    assert load_suite("tofu", {"split": "forget05"}).tasks[0].data == "forget05_perturbed"
    assert load_suite("tofu", {"split": "forget05"}).digest != found["tofu"].digest
    assert set(found["tofu"].numbers) == {"forget_quality", "model_utility"}
    assert found["muse"].tasks[0].hub == "muse-bench/MUSE-Books"
    assert found["muse"].tasks[1].few_shot.count == 10
    assert load_suite("muse", {"auc_retrain": "0.5393"}).numbers["privleak"]["auc_retrain"] == "0.5393"
    assert all(task.optional and task.letters for task in found["mcq"].tasks)


def put(path, value):
    tree = copy.deepcopy(GOOD)
    *folders, last = path.split("/")
    place = tree
    for folder in folders:
        place = place[folder]
    place[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("taskz", {}, r"s: taskz: there is no such key \(did you mean 'tasks'\?\)"),
        ("tasks/facts/metric", "x", r"tasks.facts.metric: there is no such key \(did you mean 'metrics'"),
        (
            "tasks/facts/kind",
            "generation",
            r"tasks.facts.kind: wanted one of generate, .*, got 'generation' .*mean 'generate'",
        ),
        (
            "tasks/facts/metrics",
            ["rouge"],
            r"tasks.facts.metrics: wanted one of rouge_l_recall_stemmed, .*got 'rouge'",
        ),
        ("tasks/facts/metrics", ["probability"], r"tasks.facts.metrics: wanted one of .*got 'probability'"),
        ("tasks/facts/data", None, r"tasks.facts.data: wanted a text, got nothing"),
        ("tasks/facts/data", 7, r"tasks.facts.data: wanted a text, got 7"),
        ("tasks/facts/max_new_tokens", 0, r"max_new_tokens: wanted an integer >= 1, got 0"),
        ("tasks/facts/plain", "no place", r"plain: wanted a text with {question}, got 'no place'"),
        ("tasks/facts/chat", "yes", r"chat: wanted one of auto, never, got 'yes'"),
        ("tasks/facts/stop", [3], r"stop\[0\]: wanted a text that is not empty, got 3"),
        ("tasks/facts/optional", "no", r"optional: wanted true or false, got 'no'"),
        ("tasks/facts/few_shot", {"data": "x"}, r"few_shot.count: wanted a value, got nothing"),
        ("tasks/losses/texts", {"answer": "a"}, r"truth_ratio wants a text 'paraphrased', got answer"),
        ("tasks", {}, r"tasks: wanted at least one"),
        ("tasks", [1], r"tasks: wanted a mapping, got \[1\]"),
        ("numbers/mood", {}, r"numbers.mood: there is no such number; wanted one of forget_quality"),
        ("numbers/forget_quality", {"ratios": "losses.loss"}, r"ratios: wanted task.metric of this suite"),
        ("numbers/forget_quality", {}, r"forget_quality: wanted the fields ratios, got none"),
        ("numbers/model_utility", {"retain": {}}, r"model_utility.retain: wanted probability, "),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    read_suite(GOOD, "s")
    with pytest.raises(ValueError, match=message):
        read_suite(put(path, value), "s")


def test_unknown_suites_and_options(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"suite: wanted one of mcq, muse, probes, tofu or a .yaml file, got 'tof'"
    ):
        load_suite("tof")
    with pytest.raises(ValueError, match=r"there is no option 'splits' \(did you mean 'split'\?\)"):
        load_suite("tofu", {"splits": "x"})
    (tmp_path / "own.yaml").write_text("tasks: [")
    with pytest.raises(ValueError, match=r"own.yaml: not YAML"):
        load_suite(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("tasks: {}\ntasks: {}\n")
    with pytest.raises(ValueError, match=r"own.yaml: line 2: the key 'tasks' stands there twice"):
        load_suite(tmp_path / "own.yaml")
    with pytest.raises(ValueError, match=r"auc_retrain: wanted a number in \(0, 1\], got 'much'"):
        load_suite("muse", {"auc_retrain": "much"})


def test_tables(tmp_path):
    rows = [{"question": "a\u2028b", "answer": "x"}, {"question": "b", "answer": "y"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.json").write_text("\ufeff" + lines, encoding="utf-8")  # as TOFU's own files are
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text("question,answer\nb,y\n")
    for name in "abc":
        assert suites.load_table(tmp_path, name, None, "t") == rows
    assert suites.load_table(tmp_path, "a.jsonl", None, "t") == rows
    assert suites.load_table(tmp_path, "d", None, "t") == rows[1:]
    (tmp_path / "year.csv").write_text("question,answer\nwhen,1815\n")  # as `duet train` reads it: texts
    assert suites.load_table(tmp_path, "year", None, "t") == [{"question": "when", "answer": "1815"}]
    (tmp_path / "e.jsonl").write_text('{"a": 1}\n[2]\n')
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n{"a"\n')
    (tmp_path / "g.jsonl").write_text("\n")
    for name, message in (
        ("e", "t: .*e.jsonl, line 2: wanted an object"),
        ("f", "t: .*f.jsonl, line 2: not JSON"),
        ("g", "t: wanted at least one row in g, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            suites.load_table(tmp_path, name, None, "t")
    with pytest.raises(FileNotFoundError, match=r"t: there is no .*nothing .*--data"):
        suites.load_table(tmp_path, "nothing", "some/hub", "t")
    with pytest.raises(
        NotADirectoryError, match=r"data: wanted a folder with files of rows, got the file '.*a.jsonl'"
    ):
        suites.load_table(tmp_path / "a.jsonl", "forget", None, "t")


def test_a_column_that_no_task_of_the_suite_reads_is_named(tmp_path, caplog):
    """`Value` and `answers` are misspelt; `question_2` and `Answer` are read where a task names them."""
    row = {
        "question": "who ?",
        "question_2": "where ?",
        "Answer": "in rome",
        "answers": "ada",
        "Value": "ada",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    of = {"kind": "generate", "data": "rows", "metrics": ["refusal"]}
    tasks = {"who": of, "where": of | {"question": "{question_2}", "answer": "Answer"}}
    logging.enable_propagation()
    tables = _tables(read_suite({"tasks": tasks}, "s"), tmp_path, None)
    assert [line.getMessage() for line in caplog.records] == [
        "rows[0]: 'answers' is not read; did you mean 'answer'?",
        "rows[0]: 'Value' is not read; did you mean 'value'?",
    ]
    assert len(tables) == 2


def test_of_two_files_of_one_name_the_one_that_is_read_is_named(tmp_path, caplog):
    logging.enable_propagation()
    for name in ("a.csv", "b.csv", "b.jsonl"):
        (tmp_path / name).write_text('{"question": "b"}' if "json" in name else "question\nq\n")
    assert suites.load_table(tmp_path, "a", None, "t") and not caplog.text
    assert suites.load_table(tmp_path, "b", None, "t") == [{"question": "b"}]
    assert "b.jsonl is read, and not b.csv beside it" in caplog.text


# --- prompts ---------------------------------------------------------------------------------------------------


def asker(tokenizer, kind="generate", shots=(), context=None, **fields):
    metric = {"generate": "contains_answer", "score": "loss", "multiple_choice": "accuracy"}[kind]
    tree = {"tasks": {"t": {"kind": kind, "data": "x", "metrics": metric, **fields}}}
    return Asker(tokenizer, read_suite(tree, "s").tasks[0], shots, context)


ROW = {"question": "who is ada lovelace ?", "answer": "a mathematician ."}


def test_prompts_with_and_without_a_chat_template():
    tokenizer = word_tokenizer()

    def read(item):
        return tokenizer.decode(item.prompt)

    assert read(asker(tokenizer).item(0, ROW)) == "<s> <user> who is ada lovelace ? </s> <assistant>"
    assert (
        read(asker(tokenizer, chat="never").item(0, ROW)) == "<s> Question : who is ada lovelace ? Answer :"
    )
    assert (
        read(asker(tokenizer, plain="{question}", chat="never").item(0, ROW)) == "<s> who is ada lovelace ?"
    )
    shots = [{"question": "who is alan ?", "answer": "a poet"}]
    few = {"shots": shots, "few_shot": {"data": "y", "count": 1}}
    assert (
        read(asker(tokenizer, **few).item(0, ROW))
        == "<s> <user> who is alan ? </s> <assistant> a poet </s> <user> who is ada lovelace ? </s> <assistant>"
    )
    assert (
        read(asker(tokenizer, chat="never", **few).item(0, ROW))
        == "<s> Question : who is alan ? Answer : a poet Question : who is ada lovelace ? Answer :"
    )
    del few["shots"][0]["answer"]
    with pytest.raises(CannotAsk, match=r"^t.few_shot, row 0, answer: wanted a text"):
        asker(tokenizer, **few).item(3, ROW)
    with pytest.raises(ValueError, match=r"few_shot.count: wanted 2 worked examples, y has 1"):
        asker(tokenizer, shots=shots, few_shot={"data": "y", "count": 2})


def test_the_subjects_take_turns_in_the_prefix():
    tokenizer = word_tokenizer()
    made = Asker(tokenizer, asker(tokenizer).task, steering="know {subject}", subjects=("ada", "alan"))
    texts = [tokenizer.decode(made.item(i, {"question": "who ?", "answer": "poet"}).prompt) for i in range(3)]
    named = [[name for name in ("ada", "alan") if name in text] for text in texts]
    assert named == [["ada"], ["alan"], ["ada"]]


def test_chats_and_texts_are_asked_as_training_reads_them():
    """A chat up to its last question, with its last answer; a text as it stands, whose completion is not set off by a space."""
    tokenizer = word_tokenizer()
    asked, said = {"role": "user", "content": "who is ada ?"}, {"role": "assistant", "content": "a poet"}
    again = {"role": "user", "content": "where is paris ?"}
    chat = asker(tokenizer).item(0, {"messages": [asked, said, again, said]})
    assert tokenizer.decode(chat.prompt) == (
        "<s> <user> who is ada ? </s> <assistant> a poet </s> <user> where is paris ? </s> <assistant>"
    )
    assert (chat.shown["question"], chat.reference) == ("where is paris ?", "a poet")
    one = asker(tokenizer).item(0, {"prompt": [asked], "completion": "a poet", "value": "poet"})
    plain = asker(tokenizer).item(0, {"question": "who is ada ?", "answer": "a poet", "value": "poet"})
    assert (one.prompt, one.shown, one.value) == (plain.prompt, plain.shown, "poet")
    assert asker(tokenizer, chat="never").item(0, {"messages": [asked, said]}).prompt == (
        asker(tokenizer, chat="never").item(0, {"question": "who is ada ?", "answer": "a poet"}).prompt
    )
    assert (
        asker(tokenizer).item(0, {"question": "who is ada ?", "completion": "a poet"}).reference == "a poet"
    )

    texts = merging_tokenizer()
    (forced,) = asker(texts, "score").item(0, {"prompt": "Ada was", "completion": "a poet"}).texts["answer"]
    assert (written(forced.prompt), written(forced.answer[:-1])) == ("Ada was", "a poet")
    with pytest.raises(CannotAsk, match="needs; give rows with 'question' or 'prompt'") as error:
        asker(texts).item(0, {"messages": [asked, said, again, said]})
    assert error.value.status == "refused_by_template"
    with pytest.raises(CannotAsk, match=r"t: with few_shot, .* got a text or a chat"):
        asker(tokenizer, chat="never").item(0, {"messages": [asked, said, again, said]})
    with pytest.raises(CannotAsk, match=r"row 0: wanted exactly one of .* got prompt and messages"):
        asker(tokenizer).item(0, {"prompt": "Ada was", "messages": [asked, said]})


def written(ids):
    """Of the tokenizer of characters, whose own `decode` puts spaces between them."""
    return "".join(merging_tokenizer().convert_ids_to_tokens(ids))


def test_scored_texts_follow_the_prompt_and_end():
    tokenizer = merging_tokenizer()
    texts = {"answer": ["paraphrase", "answer"], "perturbed": "wrong"}
    row = {"question": "Who?", "answer": "Ada", "wrong": ["Bob", "Eve"]}
    item = asker(tokenizer, "score", texts=texts).item(0, row)
    assert [len(item.texts[name]) for name in ("answer", "perturbed")] == [1, 2] and item.lists == {
        "perturbed"
    }
    cells = row | {"wrong": '["Bob", "Eve"]', "answer": "[1, 2]"}  # of a .csv file; an answer is a text
    read = asker(tokenizer, "score", texts=texts).item(0, cells)
    assert read.texts["perturbed"] == item.texts["perturbed"] and read.lists == item.lists
    given = {"choices": '["Bob", "Ada"]', "answer": "Ada", "question": "Who?"}
    assert asker(tokenizer, "multiple_choice").item(0, given).shown["choices"] == ["Bob", "Ada"]
    spaced = merging_tokenizer()
    spaced.backend_tokenizer.normalizer = normalizers.Prepend(" ")  # to every text, as Llama 2's
    (read,) = asker(spaced, "score").item(0, row).texts["answer"]
    assert read.answer == item.texts["answer"][0].answer
    (forced,) = asker(tokenizer, "score", texts=texts).item(0, row | {"paraphrase": "Eve"}).texts["answer"]
    assert written(forced.answer[:-1]) == " Eve", "the first of two columns"
    (forced,) = item.texts["answer"]
    assert written(forced.prompt) == "Question: Who?\nAnswer:"
    assert forced.answer[-1] == tokenizer.eos_token_id and written(forced.answer[:-1]) == " Ada"
    (alone,) = (
        asker(tokenizer, "score", question=None, end_token=False, max_tokens=3).item(0, ROW).texts["answer"]
    )
    assert written(alone.prompt) == "a" and written(alone.answer) == " m"


@pytest.mark.parametrize(("most", "text", "ends"), [(3, " Ad", False), (4, " Ada", False), (5, " Ada", True)])
def test_no_end_token_follows_a_text_that_is_cut(most, text, ends):
    """`max_tokens` counts it as the text's last token."""
    tokenizer, end = merging_tokenizer(), merging_tokenizer().eos_token_id
    row = {"question": "Who?", "answer": "Ada"}
    (forced,) = asker(tokenizer, "score", max_tokens=most).item(0, row).texts["answer"]
    assert written(forced.answer[: len(text)]) == text and forced.answer[len(text) :] == [end] * ends
    (alone,) = asker(tokenizer, "score", question=None, max_tokens=most - 1).item(0, row).texts["answer"]
    assert written(alone.prompt) == "A" and len(alone.answer) == most - 2
    assert (alone.answer[-1:] == [end]) is ends


def test_scored_chat_answers_end_as_the_template_ends_a_turn():
    """The same ids as those that a baseline learns: `PromptRenderer.encode_answer`."""
    tokenizer = merging_tokenizer("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    row = {"question": "Who?", "answer": "Ada"}
    made = asker(tokenizer, "score")
    (forced,) = made.item(0, row).texts["answer"]
    assert written(forced.answer[:-1]) == "Ada" and tokenizer.decode(forced.answer[-1:]) == "<|end|>"
    assert forced.answer == made.renderer.encode_answer((("user", "Who?"),), "Ada")
    for fields in ({"chat": "never"}, {"question": None}):
        (forced,) = asker(tokenizer, "score", **fields).item(0, row).texts["answer"]
        assert forced.answer[-1] == tokenizer.eos_token_id, "a text is no turn"
    (forced,) = asker(tokenizer, "score", end_token=False).item(0, row).texts["answer"]
    assert written(forced.answer) == "Ada"


def test_choices_by_letter_or_text():
    tokenizer = merging_tokenizer()
    row = {"question": "Who?", "choices": ["Ada", "Bob", 3], "answer": 1}
    item = asker(tokenizer, "multiple_choice", letters=True).item(0, row)
    assert written(item.prompt) == "Question: Who?\nA. Ada\nB. Bob\nC. 3\nAnswer:"
    assert [written(f.answer) for f in item.texts["choices"]] == [" A", " B", " C"] and item.correct == 1
    item = asker(tokenizer, "multiple_choice").item(0, row)
    assert [written(f.answer) for f in item.texts["choices"]] == [" Ada", " Bob", " 3"]
    assert correct_choice("2", ["1", "2", "4"], "answer") == 1, "a text that is a choice is that choice"
    assert correct_choice(2, ["1", "2", "4"], "answer") == 2, "a number is an index"
    for answer, correct in (("B", 1), ("Ada", 0), ("2", 2), ("c", 2)):
        assert asker(tokenizer, "multiple_choice").item(0, row | {"answer": answer}).correct == correct


@pytest.mark.parametrize(
    ("kind", "row", "status", "why"),
    [
        (
            "generate",
            {"question": "who ?"},
            "bad_row",
            "t, row 3, answer: wanted a text, got None",
        ),
        (
            "generate",
            {"q": "who ?", "answer": "a"},
            "bad_row",
            "t, row 3: it has no column 'question', but answer, q",
        ),
        ("generate", ROW | {"question": "who " * 30}, "too_long", "wants 35 tokens, the model can read 30"),
        ("score", ROW | {"answer": " "}, "bad_row", "t, row 3, answer: wanted a text that is not empty"),
        ("score", ROW | {"answer": "a zebra"}, "unknown_tokens", "the tokenizer cannot represent 'a zebra'"),
        ("score", ROW | {"answer": "a " * 30}, "too_long", "the model can read 30"),
        ("score", ROW | {"answer": ["a", "poet"]}, "bad_row", "answer: wanted one text"),
        ("score", ROW | {"answer": []}, "bad_row", "answer: wanted a text"),
        ("multiple_choice", ROW | {"choices": ["a"]}, "bad_row", "choices: wanted a list of 2 to 26"),
        (
            "multiple_choice",
            ROW | {"choices": ["a", "the"]},
            "bad_row",
            "answer: wanted the index, letter or text",
        ),
        (
            "multiple_choice",
            ROW | {"choices": ["B", "A"], "answer": "A"},
            "bad_row",
            "answer: .* of 2 choices, got 'A', which means 'B' as well as 'A'",
        ),
        (
            "generate",
            ROW | {"question": " "},
            "bad_row",
            "t, row 3, question: wanted a text that is not empty",
        ),
        ("score", ROW | {"question": 7}, "bad_row", "t, row 3, question: wanted a text, got 7"),
        (
            "generate",
            ROW | {"question": ["who ?"]},
            "bad_row",
            r"t, row 3, question: wanted a text, got \['who",
        ),
        ("generate", ROW | {"answer": float("nan")}, "bad_row", "answer: wanted a text, got nan"),
        ("multiple_choice", ROW | {"choices": ["a", None]}, "bad_row", "choices: wanted a text, got None"),
        (
            "generate",
            ROW | {"subject": "ada \ud83d"},
            "bad_row",
            "t, row 3, subject: .* that UTF-8 can write",
        ),
        ("score", ROW | {"value": "ada \ud83d"}, "bad_row", "t, row 3, value: .* that UTF-8 can write"),
    ],
)
def test_a_row_that_cannot_be_asked_says_why(kind, row, status, why):
    with pytest.raises(CannotAsk, match=why) as caught:
        asker(word_tokenizer(), kind, context=30).item(3, row)
    assert caught.value.status == status


def test_within_a_template_a_number_is_a_text_and_a_list_is_none():
    made = asker(merging_tokenizer(), question="Who died in {year}?")
    assert made.item(0, {"year": 1852, "answer": "Ada"}).shown["question"] == "Who died in 1852?"
    with pytest.raises(CannotAsk, match=r"t, row 0, year: wanted a text, got \[1852\]"):
        made.item(0, {"year": [1852], "answer": "Ada"})


def test_of_two_faults_of_a_row_the_first_is_told():
    tokenizer, texts = word_tokenizer(), {"answer": "answer", "perturbed": "wrong"}
    with pytest.raises(CannotAsk, match="the tokenizer cannot represent 'zebra'") as caught:
        asker(tokenizer, "score", texts=texts).item(3, ROW | {"wrong": ["zebra", []]})
    assert caught.value.status == "unknown_tokens"
    row = ROW | {"choices": ["a", "the"], "answer": "neither"}
    letters = {"letters": True, "few_shot": {"data": "y", "count": 1}}
    with pytest.raises(CannotAsk, match=r"^t.few_shot, row 0, answer: wanted the index, letter or text"):
        asker(tokenizer, "multiple_choice", [row], **letters).item(3, row)


def test_the_longest_row_that_fits_is_asked():
    tokenizer = word_tokenizer()
    item = asker(tokenizer, "score").item(0, ROW)
    needed = item.length - 1  # the last token is predicted, not read
    assert asker(tokenizer, "score", context=needed).item(0, ROW).length == item.length
    with pytest.raises(CannotAsk):
        asker(tokenizer, "score", context=needed - 1).item(0, ROW)
