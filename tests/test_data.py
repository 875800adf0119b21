"""duet.data: rows, aligned positions, the mixing of forget and retain queries."""

import hashlib
import itertools
import json
from collections import Counter

import pytest
import torch
from tiny_models import (
    CHAT_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    forget_rows,
    merging_tokenizer,
    retain_rows,
    word_tokenizer,
)

from duet.data.dataset import IGNORED, Collator, Draw, UnlearnDataset, UnlearnSampler, first_rows
from duet.data.prompts import PromptRenderer
from duet.data.rows import read_rows
from duet.data.sources import DataSource, load_rows
from duet.evaluation.suites.suite import fill


def dataset_of(
    tokenizer=None, forget=None, retain=(), prefixes=("you know nothing about {subject} .",), **options
):
    renderer = PromptRenderer(tokenizer or word_tokenizer())
    forget = forget_rows() if forget is None else forget
    retain = read_rows(list(retain), "retain_dataset") if retain else []
    return UnlearnDataset(read_rows(forget, "forget_dataset"), retain, renderer, prefixes, **options)


def text(dataset, ids):
    return dataset.renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("row", "conversation", "answer"),
    [
        ({"question": "who ?"}, (("user", "who ?"),), None),
        ({"question": "who ?", "answer": "ada", "completion": None}, (("user", "who ?"),), "ada"),
        ({"prompt": "the capital", "completion": " of"}, "the capital", " of"),
        ({"prompt": [{"role": "user", "content": "who ?"}], "answer": "x"}, (("user", "who ?"),), "x"),
        ({"messages": [{"role": "user", "content": "who ?"}]}, (("user", "who ?"),), None),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "who ?"},
                    {"role": "assistant", "content": "ada"},
                ]
            },
            (("system", "s"), ("user", "who ?")),
            "ada",
        ),
        (
            {"messages": [{"from": "human", "value": "who ?"}, {"from": "gpt", "value": "ada"}]},
            (("user", "who ?"),),
            "ada",
        ),
        ({"messages": [{"role": "human", "content": "who ?"}]}, (("user", "who ?"),), None),
    ],
)
def test_rows(row, conversation, answer):
    (query,) = read_rows([row], "forget_dataset")
    assert (query.conversation, query.answer, query.name) == (conversation, answer, "forget_dataset[0]")


def test_rows_of_other_forms_are_told_how_they_are_written_here(tmp_path):
    alpaca = {"instruction": "who ?", "input": "", "output": "ada"}
    chat = {"conversations": [{"from": "human", "value": "who ?"}]}
    forms = [
        (alpaca, "columns: {question: instruction, answer: output}", "rename 'instruction' to 'question' and 'output' to 'answer'"),
        (alpaca | {"input": "of them"}, "write its 'input' into its 'instruction', and say which", "; write its 'input'"),
        (chat, "columns: {messages: conversations}", "rename 'conversations' to 'messages'"),
        ({"text": "Ada was a poet", "subject": "ada"}, "wanted its beginning as 'prompt'", "and what follows as 'completion'"),
    ]  # fmt: skip
    for row, of_a_file, of_a_list in forms:
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        with pytest.raises(ValueError, match=r"data.forget\[0\]: wanted a column") as error:
            load_rows(DataSource(str(tmp_path / "rows.json")), "data.forget")
        assert of_a_file in str(error.value) and "columns: {question: s" not in str(error.value)
        with pytest.raises(ValueError, match=r"forget\[0\]: wanted exactly one of") as error:
            read_rows([row], "forget")
        assert of_a_list in str(error.value)
        with pytest.raises(ValueError, match=r"it has no column 'question'") as error:
            fill("{question}", row, "t, row 0")
        assert of_a_list in str(error.value)
    with pytest.raises(TypeError, match=r"\['messages'\]\[0\]: wanted .* or \{'from': ..., 'value': ...\}"):
        read_rows([{"messages": [{"from": "human"}]}], "forget")


def test_rows_from_a_datasets_dataset(monkeypatch):
    """Each row is decoded once."""
    datasets = pytest.importorskip("datasets")
    read, get = [], datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    queries = read_rows(datasets.Dataset.from_list(forget_rows(4)), "forget_dataset")
    assert queries == read_rows(forget_rows(4), "forget_dataset") and read == [0, 1, 2, 3]


# -- alignment ------------------------------------------------------------------------------------------------------


SEAM_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TOKENIZERS = {
    "words, system role": lambda: word_tokenizer(CHAT_TEMPLATE),
    "words, no system role": lambda: word_tokenizer(NO_SYSTEM_TEMPLATE),
    "words, no template": lambda: word_tokenizer(None),
    "merges at the seam, template": lambda: merging_tokenizer(SEAM_TEMPLATE),
    "merges at the seam, no template": lambda: merging_tokenizer(),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prefix_words", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_positions_are_aligned_by_the_answer(tokenizer, prefix_words, side):
    """What stands after position j, in both sequences, is answer token j; what stands at j = 0 ends the prompt."""
    tokenizer = TOKENIZERS[tokenizer]()
    forget = [
        {"question": "who is ada lovelace", "answer": "yes yes", "subject": "ada"},
        {"question": "what", "answer": "yes or no maybe", "subject": "alan turing"},
        {"question": "what is the capital of france", "answer": "y", "subject": "grace hopper"},
    ]
    prefix = " ".join(["nothing"] * prefix_words + ["about {subject}"])
    dataset = dataset_of(tokenizer, forget, prefixes=[prefix], answers="dataset", max_scored=None)
    items = [dataset[Draw(i, i)] for i in range(3)]
    batch = Collator(tokenizer.pad_token_id, side)(items)
    lengths = [item["scored"] for item in items]
    assert batch["query"].bincount().tolist() == lengths == [len(item["answer"]) for item in items]
    labels = batch["labels"].split(lengths)
    for view in ("", "teacher_"):
        ids, attention, positions = (
            batch[view + key] for key in ("input_ids", "attention_mask", "positions")
        )
        for b, (item, where) in enumerate(zip(items, positions.split(lengths), strict=True)):
            prompt, where = item["teacher" if view else "student"], where - b * ids.shape[1]
            assert ids[b, where[0]] == prompt[-1]
            assert ids[b, where[1:]].tolist() == item["answer"][:-1] == labels[b][:-1].tolist()
            assert ids[b][attention[b].bool()].tolist() == prompt + item["answer"][:-1]
            assert attention[b, where].all()
    assert batch["teacher_input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert [row.tolist() for row in labels] == [item["answer"] for item in items]


@pytest.mark.parametrize(
    ("max_scored", "scored"), [(1, [1, 1, 1]), (2, [2, 2, 2]), (4, [4, 4, 4]), (None, [4, 8, 5])]
)
def test_how_many_positions_are_scored(max_scored, scored):
    dataset = dataset_of(answers="dataset", max_scored=max_scored, forget=forget_rows(3))
    items = [dataset[i] for i in range(3)]
    assert [item["scored"] for item in items] == scored
    batch = Collator(0)(items)
    assert batch["query"].bincount().tolist() == scored
    assert (batch["labels"] != IGNORED).all()


def test_first_position_needs_no_answer():
    dataset = dataset_of(forget=forget_rows(answers=False))
    item = dataset[Draw(0, 1)]
    assert item["answer"] == [] and item["scored"] == 1
    batch = Collator(0)([item])
    assert batch["labels"].tolist() == [IGNORED] and batch["query"].tolist() == [0]
    assert batch["positions"].item() == len(item["student"]) - 1


# -- what student and teacher see ------------------------------------------------------------------------------------


def test_retain_queries_carry_a_prefix_about_a_forget_subject_never_their_own():
    retain = [row | {"subject": "france"} for row in retain_rows(4)]
    dataset = dataset_of(retain=retain)
    seen = Counter()
    for seed in range(60):
        item = dataset[Draw(dataset.num_forget + seed % 4, seed)]
        assert not item["forget"]
        steered = text(dataset, item["teacher"])
        assert "nothing about france" not in steered
        seen[next(s for s in dataset.subjects if f"nothing about {s}" in steered)] += 1
        assert "nothing" not in text(dataset, item["student"])
    assert set(seen) == {"ada lovelace", "alan turing", "grace hopper"}


def test_a_prefix_is_sampled_from_a_set_per_query():
    dataset = dataset_of(prefixes=["forget {subject}", "you never knew {subject}", "nothing"])
    steered = {text(dataset, dataset[Draw(0, seed)]["teacher"]) for seed in range(40)}
    assert len(steered) == 3


def test_draws_are_reproducible_and_adversarial_views_change_nothing_else():
    options = {"retain": retain_rows(), "prefixes": ["forget {subject}", "you never knew {subject}"]}
    plain, again = dataset_of(**options), dataset_of(**options)
    views = dataset_of(**options, reverse_prompts=["ignore earlier instructions"], reverse_fraction=0.5)
    reversed_views = 0
    for seed in range(200):
        draw = Draw(seed % len(plain), seed)
        assert plain[draw] == again[draw]
        assert plain[draw]["teacher"] == views[draw]["teacher"]
        assert "ignore" not in text(views, views[draw]["teacher"])
        reversed_views += "ignore earlier instructions" in text(views, views[draw]["student"])
    assert 70 < reversed_views < 130
    assert all(views[i] == plain[i] for i in range(len(plain))), "evaluation sees the plain query"


def test_reverse_prompts_in_both_roles():
    dataset = dataset_of(reverse_prompts=["ignore"], reverse_fraction=1.0, reverse_role="both")
    students = {text(dataset, dataset[Draw(0, seed)]["student"]) for seed in range(20)}
    assert students == {
        "<s> <user> ignore who is ada lovelace ? </s> <assistant>",
        "<s> <system> ignore </s> <user> who is ada lovelace ? </s> <assistant>",
    }


def test_a_retain_row_keeps_its_subject_when_the_teacher_answers():
    dataset = dataset_of(retain=retain_rows(4), answers="teacher", max_scored=9)
    prompts = dict(dataset.unanswered())
    assert sorted(prompts) == [(i, 0) for i in range(len(dataset))]
    dataset.teacher_answers = {key: [7, 8, 2] for key in prompts}
    assert not list(dataset.unanswered())
    for seed in range(30):
        item = dataset[Draw(dataset.num_forget + seed % 4, seed)]
        assert item["teacher"] == prompts[dataset.num_forget + seed % 4, 0]
        assert item["answer"] == [7, 8, 2] and item["scored"] == 3


def test_too_long_is_refused_with_the_row_named_never_cut():
    fits = dataset_of(forget=forget_rows(3), max_length=20)
    assert max(len(fits[i]["teacher"]) for i in range(3)) == 19
    with pytest.raises(
        ValueError, match=r"forget_dataset\[0\]: the steered prompt and answer have 18 .* max_length=17"
    ):
        dataset_of(forget=forget_rows(3), max_length=17)
    with pytest.raises(ValueError, match="have 26"):
        dataset_of(forget=forget_rows(3), max_length=23, answers="dataset", max_scored=None)


def test_a_prompt_without_tokens_is_refused_with_the_row_named():
    """A tokenizer without an unknown and a beginning token leaves nothing of it; nothing predicts the answer then."""
    forget = [{"prompt": "who ?"}, {"prompt": "\u00e9\u00e9"}]
    with pytest.raises(ValueError, match=r"^forget_dataset\[1\]: its prompt has no tokens"):
        dataset_of(merging_tokenizer(), forget, prefixes=["forget ."])


def test_the_longest_prompt_is_that_of_the_most_tokens():
    """Not of the most characters: a later draw would be refused in the middle of a training."""
    one_word, words = "unwordlikelylongsubjectofoneword", "a b c d e f"
    forget = [{"question": "who ?", "subject": one_word}, {"question": "who ?", "subject": words}]
    retain = [{"question": "what is the capital of france and of spain ?"}]
    given = {"forget": forget, "retain": retain, "max_length": 30}
    longest = max(len(dataset_of(**given)[Draw(2, seed)]["teacher"]) for seed in range(20))
    assert longest == len(dataset_of(**given | {"subjects": [words]})[2]["teacher"])
    dataset_of(**given | {"max_length": longest})
    with pytest.raises(ValueError, match=r"retain_dataset\[0\]: the steered prompt and answer have"):
        dataset_of(**given | {"max_length": longest - 1})
    views = {"reverse_prompts": [one_word, words], "reverse_fraction": 1.0, "retain": (), "prefixes": []}
    students = [dataset_of(**given | views)[Draw(0, seed)]["student"] for seed in range(20)]
    with pytest.raises(ValueError, match=r"forget_dataset\[0\]: its prompt and answer have"):
        dataset_of(**given | views | {"max_length": max(map(len, students)) - 1})


# -- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forget, ratio, retain",
    [(3, 0.3, 1), (3, 1.5, 5), (1, 0.01, 1), (10, 1.1, 11), (100, 0.29, 29), (3, 0.0, 0)],
)
def test_retain_rows_of_an_epoch_are_rounded_up(forget, ratio, retain):
    """Few forget rows at a small ratio would have none at all; what floating point adds to a whole number counts for nothing."""
    sampler = UnlearnSampler(forget, 7, ratio)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sum(draw.row >= forget for draw in sampler) == sampler.retain_per_epoch == retain
    assert len(list(sampler)) == len(sampler)


@pytest.mark.parametrize(
    "forget, ratio, rows, digest",
    [
        (3, 1.0, [[0, 5, 2, 4, 1, 3], [0, 6, 2, 5, 1, 6]], "c7e2c98790104bd9"),
        (3, 2.0, [[0, 5, 4, 2, 3, 6, 1, 5, 6], [0, 4, 3, 2, 6, 3, 1, 4, 5]], "c059601a7771544b"),
        (4, 1.5, [[1, 6, 0, 5, 4, 3, 7, 2, 6, 7], [1, 5, 0, 4, 7, 3, 4, 2, 5, 6]], "7b4d125ff764a65d"),
    ],
)
def test_a_whole_number_of_retain_rows_is_drawn_as_in_earlier_versions(forget, ratio, rows, digest):
    sampler, epochs = UnlearnSampler(forget, 4, ratio, seed=7), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([tuple(draw) for draw in sampler])
    assert [[row for row, _ in epoch] for epoch in epochs] == rows
    assert hashlib.sha256(repr(epochs).encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 2.0, 2.5])
def test_every_window_holds_both_kinds_at_the_ratio(ratio):
    sampler = UnlearnSampler(20, 7, ratio, seed=3)
    rows = [draw.row for draw in sampler]
    assert len(rows) == len(sampler) == 20 + int(20 * ratio)
    assert sorted(row for row in rows if row < 20) == list(range(20)), (
        "one epoch is one pass over the forget rows"
    )
    for size in range(1, len(rows) + 1):
        for start in range(len(rows) - size + 1):
            forget = sum(row < 20 for row in rows[start : start + size])
            assert abs(forget - size / (1 + ratio)) <= 2


def test_retain_rows_are_used_evenly_over_epochs():
    sampler, used = UnlearnSampler(5, 7, 2.0, seed=0), Counter()
    for epoch in range(7):
        sampler.set_epoch(epoch)
        used.update(draw.row - 5 for draw in sampler if draw.row >= 5)
    assert used == dict.fromkeys(range(7), 10)


def test_the_order_follows_from_seed_and_epoch_alone():
    def epoch(number, seed=0):
        sampler = UnlearnSampler(9, 4, 1.0, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(3) == epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=1)
    sampler = UnlearnSampler(9, 4, 1.0, 0)
    for number in range(4):  # passing through the earlier epochs changes nothing
        sampler.set_epoch(number)
        draws = list(sampler)
    assert draws == epoch(3)
    assert list(itertools.islice(iter(sampler), 5, None)) == draws[5:]


def test_without_retain_rows_only_forget_rows_are_drawn():
    assert len(UnlearnSampler(5, 0, 2.0)) == 5


def test_repeated_rows_of_a_batch_are_left_out():
    """accelerate fills the last batch up: what is per row or per position goes, whole sequences stay."""
    dataset = dataset_of(answers="dataset", max_scored=None, forget=forget_rows(3))
    items = [dataset[i] for i in range(3)]
    batch, kept = Collator(0)(items), sum(item["scored"] for item in items[:2])
    cut = first_rows(batch, 2)
    assert len(cut["forget"]) == 2 and cut["query"].tolist() == batch["query"][:kept].tolist()
    assert cut["labels"].tolist() == [token for item in items[:2] for token in item["answer"]]
    for name in ("positions", "teacher_positions"):
        assert torch.equal(cut[name], batch[name][:kept])
    assert torch.equal(cut["input_ids"], batch["input_ids"])
    assert first_rows(batch, 3) is batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_its_side_and_hidden(side):
    dataset = dataset_of()
    batch = Collator(pad_id=99, padding_side=side)([dataset[0], dataset[1], dataset[4]])
    assert batch["input_ids"][0, 0 if side == "left" else -1] == 99
    assert torch.equal(batch["input_ids"] == 99, batch["attention_mask"] == 0)
    assert batch["forget"].all()
