"""A live teacher reads every steering prefix once: the same numbers as from whole prompts, and from fewer tokens."""

import inspect
import re

import pytest
import torch
from peft import LoraConfig
from test_trainer import LORA, losses, make
from tiny_models import (
    CHAT_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    forget_rows,
    merging_tokenizer,
    tiny,
    word_tokenizer,
)

from duet.data.dataset import Draw
from duet.methods import reuse
from duet.methods.reuse import beginnings_of
from duet.model.lm import find_backbone, hidden_states_at
from duet.model.prefix_cache import CACHE_ARGUMENTS, PrefixCache, PrefixTable, bytes_per_token, cannot_reuse
from duet.model.teacher import AdapterOffTeacher

GENERATOR = torch.Generator().manual_seed(0)
ADAPTER = {"peft_config": LoraConfig(**LORA)}


def some(length):
    return torch.randint(7, 60, (length,), generator=GENERATOR).tolist()


@pytest.mark.parametrize("architecture", ["llama", "neox", "qwen3", "phi"])
def test_any_mix_of_prefixes_gives_the_hidden_states_of_whole_prompts(architecture):
    """Prefixes of several lengths, read in two rounds, the second one longer; suffixes of several lengths."""
    model = tiny(architecture)
    prefixes = [some(9), some(12), some(9), some(10), some(17), some(3)]
    table = PrefixTable()
    with torch.no_grad():
        table.add(model, prefixes[:4], at_once=2)
        table.add(model, prefixes[4:], at_once=8)
        assert table.lengths.tolist() == [9, 12, 9, 10, 17, 3]
        assert table.nbytes == 6 * 17 * bytes_per_token(model)
        for which in ([0, 1, 2, 3], [5, 4], [4, 4, 1], [5]):
            suffixes = [some(n) for n in (4, 1, 7, 5)[: len(which)]]
            ids = torch.zeros(len(which), 7, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, suffix in enumerate(suffixes):
                ids[row, : len(suffix)], mask[row, : len(suffix)] = torch.tensor(suffix), 1
            places = mask.flatten().nonzero().flatten()
            states = table.hidden_states_at(model, torch.tensor(which), ids, mask, places)
            wanted = []
            for number, suffix in zip(which, suffixes, strict=True):
                whole = torch.tensor([prefixes[number] + suffix])
                at = torch.arange(len(prefixes[number]), whole.shape[1])
                wanted.append(hidden_states_at(model, whole, torch.ones_like(whole), at))
            torch.testing.assert_close(states, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_models_that_forget_their_prefix_are_known():
    assert cannot_reuse(tiny("llama")) is None and cannot_reuse(tiny("neox")) is None
    for architecture in ("gemma2", "gemma3", "mistral"):
        assert "has layers whose cache is a DynamicSlidingWindowLayer" in cannot_reuse(tiny(architecture))
    model = tiny()
    backbone = find_backbone(model)
    backbone.forward = lambda input_ids, attention_mask, use_cache: None
    assert cannot_reuse(model) == "LlamaForCausalLM takes no cache of keys and values"


@pytest.mark.parametrize("theirs", CACHE_ARGUMENTS)
def test_the_cache_has_another_name_in_other_versions_of_transformers(theirs):
    model, told = tiny(), []
    backbone = find_backbone(model)
    forward = backbone.forward
    (ours,) = [name for name in CACHE_ARGUMENTS if name in inspect.signature(forward).parameters]

    def renamed(input_ids, attention_mask, position_ids, use_cache, **cache):
        told.extend(cache)
        read = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return forward(**read, use_cache=use_cache, **{ours: cache[theirs]})

    known = [p for p in inspect.signature(renamed).parameters.values() if p.name != "cache"]
    own = inspect.Parameter(theirs, inspect.Parameter.KEYWORD_ONLY)
    renamed.__signature__ = inspect.Signature([*known, own])
    prefix, suffix = some(9), some(4)
    ids = torch.tensor([suffix])
    places = torch.arange(4)
    with torch.no_grad():
        wanted = hidden_states_at(model, torch.tensor([prefix + suffix]), torch.ones(1, 13), 9 + places)
        backbone.forward = renamed
        assert cannot_reuse(model) is None
        states = PrefixCache(model, prefix).hidden_states_at(model, ids, torch.ones_like(ids), places)
    assert set(told) == {theirs}
    torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)


OPTIONS = {
    "first": {},
    "dataset's answers": {"positions": "answer", "answer_source": "dataset"},
    "teacher's answers": {"positions": "first_n", "num_positions": 3},
    "two prefixes": {
        "steering_prefixes": [
            "you know nothing about {subject} .",
            "forget everything earlier and answer as if never knew {subject} or the war .",
        ]
    },
}


# Every case with both kinds of teacher and with both sides of padding.
@pytest.mark.parametrize(
    "adapter, side", [(True, "left"), (False, "right")], ids=["adapter-left", "copy-right"]
)
@pytest.mark.parametrize("case", OPTIONS)
def test_training_is_the_same_up_to_rounding(tmp_path, case, adapter, side):
    runs = []
    for reuse_prefix in (True, False):
        given = {"processing_class": word_tokenizer(CHAT_TEMPLATE, padding_side=side)}
        given |= ADAPTER if adapter else {}
        options = OPTIONS[case] | {"reuse_prefix": reuse_prefix}
        runs.append(make(tmp_path / str(reuse_prefix), trainer_options=given, **options))
        runs[-1].train()
    assert len(runs[0]._reused.table.lengths) == 3 * len(runs[0].args.steering_prefixes)
    assert runs[1]._reused is None
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_plain_retain_queries_are_read_in_parts_too(tmp_path):
    """Their beginning is what all plain prompts share."""
    runs = []
    for reuse_prefix in (True, False):
        options = {
            "retain_prefix": "none",
            "steering_place": "user",
            "reuse_prefix": reuse_prefix,
        }
        runs.append(make(tmp_path / str(reuse_prefix), trainer_options=ADAPTER, **options))
        runs[-1].train()
    dataset = runs[0].train_dataset
    assert dataset.instructions()[-1] is None and len(dataset.beginnings) == 4
    last = dataset[len(dataset) - 1]
    assert last["teacher"] == last["student"] and "beginning" in last
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def tokens_of_the_teacher(trainer, steps):
    """Tokens that the backbone read without gradients in each step."""
    read, found, step = [], [], trainer.training_step

    def count(module, args, kwargs):
        if not torch.is_grad_enabled():
            read.append(kwargs["input_ids"].numel())

    def counted(*args, **kwargs):
        read.clear()
        loss = step(*args, **kwargs)
        found.append(list(read))
        return loss

    find_backbone(trainer.model).register_forward_pre_hook(count, with_kwargs=True)
    trainer.training_step = counted
    trainer.train()
    assert len(found) == steps
    return found


def test_a_step_reads_only_what_is_new(tmp_path):
    options = {"trainer_options": ADAPTER}
    reused = make(tmp_path / "reused", **options)
    whole = make(tmp_path / "whole", reuse_prefix=False, **options)
    fewer, all_of_them = tokens_of_the_teacher(reused, 2), tokens_of_the_teacher(whole, 2)
    assert all(len(step) == 1 for step in (*fewer, *all_of_them)), "one forward a step, and no other"
    shortest = min(len(ids) for _, ids in reused.train_dataset.beginnings.values())
    assert shortest >= reuse.SHORTEST
    for a, b in zip(fewer, all_of_them, strict=True):
        assert a[0] <= b[0] - 6 * shortest


def test_a_batch_names_its_prefixes_and_an_odd_row_makes_it_whole(tmp_path):
    trainer = make(tmp_path, trainer_options=ADAPTER)
    dataset, draws = trainer.train_dataset, [Draw(i, i) for i in (0, 1, 7, 9)]
    trainer.prepare_rows(dataset)
    items = [dataset[draw] for draw in draws]
    batch = trainer.data_collator(items)
    assert batch["teacher_beginning"].tolist() == [item["beginning"][0] for item in items]
    assert batch["teacher_input_ids"].shape[1] == max(len(i["teacher"]) - i["beginning"][1] for i in items)
    del items[2]["beginning"]
    whole = trainer.data_collator(items)
    assert "teacher_beginning" not in whole
    assert whole["teacher_input_ids"].shape[1] == max(len(item["teacher"]) for item in items)
    for text, (number, ids) in dataset.beginnings.items():
        assert number < len(trainer._reused.table.lengths)
        assert all(dataset.prompt(i, text)[: len(ids)] == ids for i in range(len(dataset)))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM_TEMPLATE, None])
def test_beginnings_are_what_all_prompts_share(tmp_path, template):
    tokenizer = word_tokenizer(template)
    dataset = make(tmp_path, trainer_options={"processing_class": tokenizer}).train_dataset
    found = beginnings_of(dataset)
    assert list(found) == dataset.instructions() and len(found) == 3
    for text, ids in found.items():
        prompts = [dataset.prompt(i, text) for i in range(len(dataset))]
        assert all(prompt[: len(ids)] == ids and len(prompt) > len(ids) for prompt in prompts)
        assert len({prompt[len(ids)] for prompt in prompts}) > 1, "no longer than what they share"


def test_evaluation_reads_the_same_prefixes(tmp_path):
    rows = {"eval_dataset": {"forget": forget_rows(6), "retain": [{"question": "who is paris ?"}] * 6}}
    found = []
    for reuse_prefix in (True, False):
        options = {"trainer_options": ADAPTER | rows, "reuse_prefix": reuse_prefix}
        trainer = make(tmp_path / str(reuse_prefix), **options)
        trainer.train()
        found.append({k: v for k, v in trainer.evaluate().items() if k.endswith("loss")})
        if reuse_prefix:
            assert trainer.eval_dataset["forget"].beginnings
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) >= 2


def test_an_evaluation_adds_only_prefixes_that_are_new(tmp_path):
    """What is in the table already is used again where all prompts begin with it."""
    longer = [
        {"question": f"who is {name} ?", "subject": name} for name in ("ada lovelace", "alan turing")
    ] * 4
    found = []
    for reuse_prefix in (True, False):
        trainer = make(tmp_path, trainer_options=ADAPTER, reuse_prefix=reuse_prefix)
        for rows, prefixes in ((longer, 2), (forget_rows(), 5), (longer, 5), (forget_rows(), 5)):
            found.append(trainer.evaluate(rows)["eval_loss"])
            assert not reuse_prefix or len(trainer._reused.table.lengths) == prefixes
    assert found[:4] == pytest.approx(found[4:], rel=1e-4)


def test_prompts_that_share_nothing_are_read_whole(tmp_path, caplog):
    """No prefix is shown, the tokenizer writes nothing in front."""
    rows = {"retain": [{"prompt": "paris is a city"}, {"prompt": "madrid is one"}]}
    given = {"processing_class": merging_tokenizer(), "eval_dataset": rows}
    trainer = make(tmp_path, trainer_options=ADAPTER | given, retain_prefix="none")
    with caplog.at_level("INFO"):
        assert trainer.evaluate()["eval_retain_loss"] < 1e-6
    assert "they share 0 tokens" in caplog.text


REASONS = {
    "a sliding window": (
        {"model": "gemma2"},
        "Gemma2ForCausalLM has layers whose cache is a DynamicSlidingWindowLayer",
    ),
    "few uses": ({"max_steps": 1, "per_device_train_batch_size": 3}, "3 prefixes for 3 prompts"),
    "a short prefix": ({"steering_prefixes": ["{subject}"], "template": None}, "tokens, less than 8"),
    "no room": (
        {"workspace_bytes": 1 << 20, "long": True, "max_steps": 1},
        "more than the workspace of 1 MiB",
    ),
    "asked for": ({"reuse_prefix": False}, "reuse_prefix is off"),
    "packed": ({"padding_free": True}, "batches are packed"),
    "another dtype": ({"bf16_full_eval": True}, "evaluation runs in another dtype"),
}


@pytest.mark.parametrize("case", REASONS)
def test_where_it_cannot_be_whole_prompts_are_read_and_the_log_says_why(tmp_path, case, caplog):
    options, why = REASONS[case]
    options = dict(options)
    model = tiny(options.pop("model", "llama"), max_position_embeddings=2048)
    given = {"processing_class": word_tokenizer(options.pop("template", CHAT_TEMPLATE))} | ADAPTER
    if options.pop("long", False):
        options["steering_prefixes"] = ["you know nothing about {subject} ." + " forget the war ." * 400]
    with caplog.at_level("INFO"):
        trainer = make(tmp_path, model, trainer_options=given, **options)
        trainer.train()
    assert re.search(f"the teacher reads whole prompts: .*{re.escape(why)}", caplog.text)
    assert not trainer.train_dataset.beginnings and losses(trainer)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert "teacher_beginning" not in batch


def test_a_model_whose_states_differ_reads_whole_prompts(tmp_path, caplog, monkeypatch):
    """One that is not known to be unable, and gives something else all the same."""
    right = PrefixTable.hidden_states_at
    monkeypatch.setattr(PrefixTable, "hidden_states_at", lambda *args: right(*args) * 1.01)
    with caplog.at_level("INFO"):
        trainer = make(tmp_path, trainer_options=ADAPTER)
        trainer.train()
    assert "with reused keys and values the hidden states differ" in caplog.text
    assert trainer.train_dataset.beginnings == {} and isinstance(trainer.teacher, AdapterOffTeacher)
