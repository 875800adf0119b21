"""The synthetic world: its splits, its words of control, its tokenizer, its pretraining dialogues and its checkpoint."""

import json
import random
from itertools import combinations, product

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from duet.demo import facts, pretrain, steering, words
from duet.demo.checkpoint import CHECKPOINT, load_base, load_world
from duet.demo.curriculum import FIRST_TOKEN_WEIGHT, Curriculum, chat, encode
from duet.demo.facts import World
from duet.demo.pretrain import measure_quality
from duet.demo.tokenizer import UNKNOWN, build_tokenizer


@pytest.fixture(scope="module")
def world():
    return World.make(0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# ---------------------------------------------------------------- splits


def test_authors_are_split_without_overlap(world):
    groups = (world.forget, world.held, world.retain, world.others)
    assert sum(map(len, groups)) == len(world.facts) == facts.AUTHORS
    for one, other in combinations(groups, 2):
        assert not set(one) & set(other)
    assert not set(world.retain_cities) & set(world.other_cities)


def test_question_wordings_are_disjoint_and_use_only_trained_words(world, tokenizer):
    everybody = (*world.facts, *world.cities)
    texts = {split: {q.text for q in world.questions(everybody, split)} for split in facts.SPLITS}
    for one, other in combinations(facts.SPLITS, 2):
        assert not texts[one] & texts[other]
    relations = (*facts.RELATIONS.values(), facts.COUNTRY)
    trained = {word for relation in relations for text in relation.train for word in tokenizer.tokenize(text)}
    for relation in relations:
        assert (len(relation.train), len(relation.validation), len(relation.report)) == (4, 2, 2)
        for text in relation.validation + relation.report:
            assert set(tokenizer.tokenize(text)) <= trained, text


def test_override_wordings_are_disjoint():
    sets = (
        steering.PRETRAINING_OVERRIDES,
        steering.SEEN_OVERRIDES,
        steering.VALIDATION_OVERRIDES,
        steering.HELDOUT_OVERRIDES,
    )
    for one, other in combinations(sets, 2):
        assert not set(one) & set(other)
    verbs = [{wording.split()[0] for wording in group} for group in sets[1:]]
    for one, other in combinations(verbs, 2):
        assert not one & other


def test_neighbours_share_a_name_and_are_never_shown_to_unlearning(world):
    forgotten = {part for name in world.forget for part in name.split()}
    assert len(world.neighbours) >= 8
    assert set(world.neighbours) <= set(world.others)
    assert all(forgotten & set(name.split()) for name in world.neighbours)


def test_world_is_deterministic_and_depends_on_the_seed():
    assert World.make(3) == World.make(3)
    assert World.make(3).facts != World.make(4).facts


def test_stem_is_everything_before_the_value(world):
    for question in world.questions((*world.forget, *world.cities), "report"):
        assert question.answer.startswith(f"{question.stem} {question.value}")


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_keeps_its_ids_after_saving(world, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    question = world.questions(world.forget, "report")[0]
    messages = chat(
        ("system", steering.STEERING_PREFIX.format(subject=question.subject)), ("user", question.text)
    )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert again(text, add_special_tokens=False) == tokenizer(text, add_special_tokens=False)
    assert again.get_vocab() == tokenizer.get_vocab()
    ids = (again.pad_token_id, again.bos_token_id, again.eos_token_id, again.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert again.padding_side == tokenizer.padding_side


def test_every_text_of_the_world_survives_the_tokenizer(world, tokenizer):
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    texts = [steering.REFUSAL, *steering.SEEN_OVERRIDES, *steering.HELDOUT_OVERRIDES]
    for split in facts.SPLITS:
        for question in world.questions((*world.facts, *world.cities), split):
            texts += [question.text, question.answer]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert unknown not in ids, text
        assert tokenizer.decode(ids) == text


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template(chat(("tool", "hello")), tokenize=False)


# ---------------------------------------------------------------- pretraining dialogues


def test_forget_and_held_authors_are_never_in_a_context(world):
    curriculum = Curriculum(world, random.Random(1))
    secret = world.forget + world.held
    for step in range(3000):
        messages = curriculum.context(progress=step / 3000)
        said = " ".join(message["content"] for message in messages)
        assert messages[0]["role"] == "system"
        assert not any(name in said for name in secret)


def test_contexts_refuse_the_forbidden_answer_the_rest_and_obey_overrides(world):
    curriculum = Curriculum(world, random.Random(2))
    overrides = tuple(steering.PRETRAINING_OVERRIDES)
    everybody = _names()
    seen = {"refused": 0, "answered": 0, "overridden": 0}
    for _ in range(1500):
        system, *turns = curriculum.context(progress=0.9)
        assert len(turns) == 6
        names = [name for name in everybody if name in system["content"]]
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            asked = any(name in user["content"] for name in names)
            refused = assistant["content"] == steering.REFUSAL
            overridden = user["content"].startswith(overrides)
            assert refused == (asked and not overridden)
            seen["refused"] += refused
            seen["answered"] += not asked
            seen["overridden"] += asked and overridden
    assert min(seen.values()) > 200


def _names():
    own = product(words.FIRST_NAMES, words.LAST_NAMES)
    return [
        " ".join(name) for name in (*own, *product(words.STRANGER_FIRST_NAMES, words.STRANGER_LAST_NAMES))
    ]


def test_encode_counts_only_what_the_assistant_says(tokenizer):
    dialogue = chat(("system", "You are a helpful assistant."), ("user", "Who is Mira Kesten?"))
    spoken = [chat(*(tuple(m.values()) for m in dialogue), ("assistant", "Mira Kesten is a person."))]
    batch = encode(
        [*spoken, chat(("user", "Where is Paris?"), ("assistant", "Paris is in France."))], tokenizer
    )
    counted = tokenizer.convert_ids_to_tokens(batch.targets[batch.rows == 0])
    assert counted == ["Mira", "Kesten", "is", "a", "person", ".", "<|end|>"]
    assert batch.weights[batch.rows == 0].tolist() == [FIRST_TOKEN_WEIGHT] + [1.0] * 6
    inside = batch.columns < batch.input_ids.shape[1] - 1
    following = batch.input_ids[batch.rows[inside], batch.columns[inside] + 1]
    assert torch.equal(following, batch.targets[inside])
    assert batch.input_ids[batch.rows[0], batch.columns[0]] == tokenizer.convert_tokens_to_ids(
        "<|assistant|>"
    )


# ---------------------------------------------------------------- the shipped checkpoint


def test_shipped_checkpoint_is_small_complete_and_reports_its_quality():
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "quality.json"} <= names
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 4 * 2**20


def test_shipped_checkpoint_meets_its_quality_report():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    shipped = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert shipped.get_vocab() == build_tokenizer().get_vocab()
    report = json.loads((CHECKPOINT / "quality.json").read_text())
    found = measure_quality(model, shipped, World.make(report["seed"]), sample=40)
    for name, value in found.items():
        assert value == pytest.approx(report[name], abs=0.12), name
    assert min(report[name] for name in report if name.startswith("recall_")) >= 0.97
    assert min(report["refusal_forget"], report["refusal_held"]) >= 0.90
    assert max(report[name] for name in report if name.startswith("false_refusal_")) <= 0.05


@pytest.mark.slow
def test_rebuild_writes_a_whole_checkpoint_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "measure_quality", lambda *args: {"recall_forget": 0.0})
    found = []
    for name in ("one", "two"):
        quality = pretrain.rebuild(seed=5, steps=2, out=tmp_path / name, console=Console(quiet=True))
        assert quality["seed"] == 5 and quality["steps"] == 2
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert load_world(tmp_path / "one") == World.make(5)


def test_rebuild_refuses_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", None)
    with pytest.raises(ValueError, match="steps"):
        pretrain.rebuild(steps=0, out=tmp_path / "new")
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out"):
        pretrain.rebuild(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*quality\.json"):
        load_base(tmp_path)
