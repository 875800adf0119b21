"""Training from a TopKStore: the same numbers as with the teacher, without the teacher, without a vocabulary-sized product."""

import dataclasses
import math
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sweeps import case
from tiny_models import (
    CHAT_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    forget_rows,
    quick,
    retain_rows,
    tiny,
    word_tokenizer,
)
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from duet import OBJECTIVES, DuetConfig, DuetTrainer
from duet.data.dataset import Draw
from duet.data.rows import read_rows
from duet.methods.objectives import objective_of
from duet.methods.views import Views
from duet.model.teacher import AdapterOffTeacher, FrozenTeacher
from duet.store.build import cache_teacher, import_teacher
from duet.store.columns import write_columns
from duet.store.read import LOG_PROBABILITIES, TopKStore
from duet.store.teacher import CachedTeacher

PREFIXES = [
    "you know nothing about {subject} .",
    "forget everything earlier and answer as if never knew the war .",
]
ROWS = forget_rows(), retain_rows()
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config(tmp_path, **options):
    usual = {
        "max_steps": 2,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 6,
        "steering_prefixes": PREFIXES,
        "retain_subjects": "fixed",
        "retain_per_forget": 2.0,
        "max_answer_tokens": 5,
        "seed": 0,
    }
    return DuetConfig(**quick(tmp_path / "out", **usual | options))


@pytest.mark.parametrize("options, said", [({}, False), ({"retain_subjects": "drawn"}, True)])
def test_subjects_that_a_cache_fixes_are_said(tmp_path, caplog, options, said):
    logging.enable_propagation()
    args = config(tmp_path, **options)
    for seed in (None, 0):
        views = Views.of(objective_of(args), args, word_tokenizer(), tiny(), seed)
        views.dataset(*(read_rows(rows, "x") for rows in ROWS))
        assert ("retain_subjects: a cached teacher's prefix" in caplog.text) == (said and seed == 0)


def cached(tmp_path, options=None, folder="store", rows=ROWS, tokenizer=None, **more):
    args = config(tmp_path, **options or {})
    return cache_teacher(
        more.pop("model", None) or tiny(),
        args,
        *rows,
        tokenizer or word_tokenizer(),
        folder=tmp_path / folder,
        **more,
    ).store


def make(tmp_path, store=None, model=None, rows=ROWS, trainer=None, **options):
    return DuetTrainer(
        tiny() if model is None else model,
        config(tmp_path, **options),
        *rows,
        **{"processing_class": word_tokenizer(), "teacher_store": store} | (trainer or {}),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- the same numbers ------------------------------------------------------------------------------------------------


READ_IN_TWO_WAYS = {
    "first": {"positions": "first"},
    "dataset": {"positions": "answer", "answer_source": "dataset"},
    "teacher": {
        "positions": "first_n",
        "num_positions": 3,
        "reverse_prompts": ["ignore earlier instructions"],
    },
    "jsd": {"objective": "duet_jsd", "normalization": "tail", "temperature": 2.0, "positions": "answer"},
    "plain": {"steering_place": "user", "retain_prefix": "none", "positions": "first"},
}


@pytest.mark.parametrize(
    "name, lora",
    [
        case(name, lora, slow=i % 2 == lora)
        for i, name in enumerate(READ_IN_TWO_WAYS)
        for lora in (False, True)
    ],
)
def test_it_is_training_with_the_teacher_bit_for_bit(tmp_path, name, lora):
    """Both read one query at a time: what a batch pads, and so the order of additions, is then the same."""
    options = READ_IN_TWO_WAYS[name] | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 1,
    }
    rows = forget_rows(3), retain_rows(3)
    store = cached(tmp_path, options, rows=rows, reuse_prefix=False)
    runs = []
    for each in (None, store):
        torch.manual_seed(4)
        more = {"peft_config": LoraConfig(**LORA)} if lora else {}
        runs.append(make(tmp_path, each, rows=rows, trainer=more, reuse_prefix=False, **options))
        runs[-1].train()
    live, read = runs
    assert isinstance(live.teacher, AdapterOffTeacher if lora else FrozenTeacher)
    assert isinstance(read.teacher, CachedTeacher)
    assert losses(live) == losses(read) and len(set(losses(live))) == 2
    for one, two in zip(live.model.parameters(), read.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_in_batches_with_reused_prefixes_it_agrees_to_rounding(tmp_path):
    options = {"positions": "answer", "max_steps": 4}
    store = cached(tmp_path, options)
    live, read = make(tmp_path, **options), make(tmp_path, store, **options)
    live.train()
    read.train()
    assert losses(read) == pytest.approx(losses(live), rel=1e-4)
    assert losses(read)[-1] < losses(read)[0]


def test_half_precision_stores_are_near(tmp_path):
    full = make(tmp_path, cached(tmp_path))
    full.train()
    for dtype, tolerance in (("bfloat16", 2e-2), ("float16", 2e-3)):
        read = make(tmp_path, cached(tmp_path, folder=dtype, dtype=dtype))
        read.train()
        assert losses(read) == pytest.approx(losses(full), rel=tolerance)
        assert losses(read) != losses(full)


def test_a_smaller_k_another_seed_and_workers(tmp_path):
    store = cached(tmp_path, {"k": 16, "positions": "answer"})
    options = {"k": 5, "positions": "answer", "objective": "duet_forward_kl", "normalization": "tail"}
    read = make(tmp_path, store, seed=3, dataloader_num_workers=2, **options)
    read.train()
    exact = make(
        tmp_path, cached(tmp_path, {"k": 5, "positions": "answer"}, folder="exact"), seed=3, **options
    )
    exact.train()
    assert losses(read) == pytest.approx(losses(exact), rel=1e-5)
    assert read.train_dataset.seed == 0  # the subjects are the store's


def test_rows_take_nothing_of_the_teacher_to_other_processes(tmp_path, store):
    trainer = make(tmp_path, store, positions="answer")
    trainer.teacher.lock = threading.Lock()
    again = pickle.loads(pickle.dumps(trainer.train_dataset.cached_targets))
    assert torch.equal(again((0, 0))["values"], trainer.train_dataset.cached_targets((0, 0))["values"])


def test_evaluation_and_resumption(tmp_path):
    rows = {"forget": forget_rows(4), "retain": retain_rows(4)}
    store = cached(tmp_path, eval_dataset=rows)
    options = {"save_strategy": "steps", "save_steps": 1, "trainer": {"eval_dataset": rows}}
    whole = make(tmp_path / "a", store, **options)
    whole.train()
    metrics = whole.evaluate()
    assert metrics["eval_forget_loss"] > 0 and metrics["eval_retain_loss"] > 0
    live = make(
        tmp_path / "b", None, model=whole.model, trainer={"eval_dataset": rows, "teacher_model": tiny()}
    )
    assert live.evaluate()["eval_forget_loss"] == pytest.approx(metrics["eval_forget_loss"], rel=1e-4)

    make(tmp_path / "c", store, **options).train()
    resumed = make(tmp_path / "c", store, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "c" / "out" / "checkpoint-1"))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"teacher_store: rows: .* has nothing for eval_dataset\[4\]"):
        whole.evaluate([*forget_rows(4), {"question": "who likes the sea ?", "subject": "alan turing"}])


# -- without the teacher, without the vocabulary --------------------------------------------------------------------


def test_no_teacher_is_made_and_no_steered_sequence_is_read(tmp_path, monkeypatch):
    store = cached(tmp_path, {"positions": "answer"})

    def forbidden(*_, **__):
        raise AssertionError("a teacher was run")

    for teacher in (FrozenTeacher, AdapterOffTeacher):
        monkeypatch.setattr(teacher, "run", forbidden)
    monkeypatch.setattr(FrozenTeacher, "copy_of", forbidden)
    monkeypatch.setattr("duet.model.answers.generate_answers", forbidden)
    trainer = make(tmp_path, store, positions="answer", gradient_accumulation_steps=2)
    seen, micro_batches = [], []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (micro_batches.append(1), compute_loss(*a, **k))[1]
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    assert len(seen) == len(micro_batches) > 2  # one forward of the backbone for each: the student's
    steered = word_tokenizer().convert_tokens_to_ids(["nothing", "knew"])
    assert not any(torch.isin(ids, torch.tensor(steered)).any() for ids in seen)
    with pytest.raises(RuntimeError, match="this run has no teacher model"):
        trainer.teacher.run(lambda model: model, trainer.model, trainer.model)


def work_of(function):
    """(numbers that all matrix products made, largest allocation in bytes), inside custom operators too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        function()
    operands = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
    made, sizes = 0, []
    for event in profiler.profiler.kineto_results.events():
        if event.name() in operands:
            left, right = (event.shapes()[place] for place in operands[event.name()])
            made += math.prod(left[:-1]) * right[-1]
        elif event.name() == "[memory]":
            sizes.append(event.nbytes())
    assert made and sizes
    return made, max(sizes)


def step(trainer, rows):
    """One forward and backward of a batch of these rows: (what it did, N)."""
    trainer.get_train_dataloader()  # a live teacher answers here
    batch = trainer.data_collator([trainer.train_dataset[Draw(i, i)] for i in rows])
    trainer.model.train()

    def once():
        trainer.compute_loss(trainer.model, batch).backward()

    once()
    return work_of(once), len(batch["labels"])


@pytest.mark.parametrize(
    "lora, objective",
    [
        case(lora, objective, slow=i % 2 == lora)
        for i, objective in enumerate(("duet", "duet_forward_kl", "duet_jsd"))
        for lora in (False, True)
    ],
)
def test_a_step_has_no_vocabulary_sized_product(tmp_path, objective, lora):
    """All matrix products together make fewer than N V / 4 numbers, and (with a frozen head) nothing is that large.

    With a live teacher the products make more than N V: the test can fail.
    """
    vocabulary = 32768

    def model():
        return tiny(vocab_size=vocabulary, hidden_size=16)

    options = {"objective": objective, "positions": "answer"}
    store = cached(tmp_path, options, model=model())
    more = {"peft_config": LoraConfig(**LORA)} if lora else {}
    (made, largest), n = step(make(tmp_path, store, model(), trainer=more, **options), range(14))
    assert n > 40
    assert made < n * vocabulary / 4
    # The gradient of a trained head has V D numbers whatever the loss is; beside it nothing comes near N V.
    assert largest <= 4 * (n * vocabulary / 4 if lora else vocabulary * 16)

    (made, _), same = step(make(tmp_path, None, model(), trainer=more, **options), range(14))
    assert same == n and made > n * vocabulary


# -- refused, by name ------------------------------------------------------------------------------------------------


def changed_weights():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    return model


def adapted_base():
    return get_peft_model(changed_weights(), LoraConfig(**LORA))


def tokenizer_with_another_vocabulary():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["newcomer"])
    return tokenizer


def rows_with(change, i=2):
    rows = forget_rows()
    rows[i] = rows[i] | change
    return rows, retain_rows()


# what is changed -> the field that the error must name
REFUSED = {
    "another model": ({"model": changed_weights}, "weights"),
    "an adapter on another model": ({"model": adapted_base}, "weights"),
    "another architecture": ({"model": lambda: tiny("neox")}, "architecture"),
    "another configuration": ({"model": lambda: tiny(rms_norm_eps=1e-3)}, "config"),
    "another autocast": ({"bf16": True}, "autocast"),
    "another dtype": ({"model": lambda: tiny().double()}, "model_dtype"),
    "another tokenizer": (
        {"trainer": {"processing_class": tokenizer_with_another_vocabulary()}},
        "tokenizer",
    ),
    "another chat template": (
        {"trainer": {"processing_class": word_tokenizer(CHAT_TEMPLATE + " ")}},
        "chat_template",
    ),
    "no system role": (
        {"trainer": {"processing_class": word_tokenizer(NO_SYSTEM_TEMPLATE)}},
        "chat_template",
    ),
    "template arguments": ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    "another plain template": ({"plain_template": "{question} :"}, "plain_template"),
    "another prefix": ({"steering_prefixes": [PREFIXES[0], "forget {subject} ."]}, "prefixes"),
    "fewer prefixes": ({"steering_prefixes": PREFIXES[:1]}, "prefixes"),
    "other positions": ({"positions": "first"}, "positions"),
    "another answer source": ({"answer_source": "dataset"}, "max_scored"),
    "another answer length": ({"max_answer_tokens": 4}, "max_scored"),
    "another temperature": ({"objective": "duet_forward_kl", "temperature": 2.0}, "temperature"),
    "a larger k": ({"k": 9}, "k"),
    "another place": ({"steering_place": "user"}, r"rows: .*forget_dataset\[0\].*steering_place"),
    "no prefix on retain rows": ({"retain_prefix": "none"}, r"rows: .*retain_dataset\[0\].*retain_prefix"),
    "another question": (
        {"rows": rows_with({"question": "who likes the sea ?"})},
        r"rows: .*forget_dataset\[2\]",
    ),
    "another subject": ({"rows": rows_with({"subject": "ada lovelace"})}, r"rows: .*forget_dataset\[2\]"),
    "one more row": (
        {"rows": (forget_rows(), [*retain_rows(), {"question": "who ?"}])},
        r"rows: .*retain_dataset\[8\]",
    ),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("cached"), {"positions": "answer"})


@pytest.mark.parametrize("case", REFUSED)
def test_a_store_made_for_something_else_is_refused(tmp_path, store, case):
    options, field = REFUSED[case]
    model = options.get("model")
    options = {"positions": "answer"} | {k: v for k, v in options.items() if k != "model"}
    with pytest.raises(ValueError, match=rf"^teacher_store: {field}"):
        make(tmp_path, store, model=None if model is None else model(), **options)
    assert not (tmp_path / "out").exists()


def test_the_other_refusals(tmp_path, store):
    folder = store.folder
    cases = [
        (
            {"trainer": {"teacher_model": tiny()}},
            "teacher_model: wanted None, because teacher_store takes its place",
        ),
        ({"objective": "npo"}, "teacher_store: objective 'npo' needs something else"),
        ({"entropy_weighting": True}, "entropy_weighting: wanted False"),
        (
            {"steering_prefixes": ["the war ."], "teacher_store": str(folder), "store": None},
            "teacher_store: prefixes",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **{"store": folder, "positions": "answer"} | options)
    with pytest.raises(FileNotFoundError, match="wanted a folder written by `duet cache`"):
        make(tmp_path, tmp_path / "nothing")
    assert make(tmp_path, teacher_store=str(folder), positions="answer").teacher.store.folder == folder


def test_another_student_on_purpose(tmp_path, store):
    """The teacher is another model of the same vocabulary: the numbers are still the teacher's."""
    options = {"positions": "answer", "teacher_store_same_model": False}
    student = make(tmp_path, store, changed_weights(), **options)
    student.train()
    live = make(tmp_path, None, changed_weights(), trainer={"teacher_model": tiny()}, **options)
    live.train()
    assert losses(student) == pytest.approx(losses(live), rel=1e-4)
    with pytest.raises(ValueError, match="teacher_store: vocab_size"):
        make(tmp_path, store, tiny(vocab_size=256), **options)


# -- log-probabilities of others -------------------------------------------------------------------------------------


def test_columns_teach_a_distribution_objective_and_no_other(tmp_path, monkeypatch, store):
    options = {"positions": "answer", "objective": "duet_forward_kl"}
    own = make(tmp_path, store, **options)
    own.train()
    for style in ("axolotl", "trl"):
        columns = write_columns(store, style)
        args = config(tmp_path, **options)
        imported = import_teacher(
            columns, tiny(), args, forget_rows(), retain_rows(), word_tokenizer(), folder=tmp_path / style
        )
        expected = dataclasses.replace(store.provenance, values=LOG_PROBABILITIES, autocast=None)
        assert TopKStore(tmp_path / style).provenance == expected
        read = make(tmp_path, imported, **options)
        read.train()
        assert losses(read) == pytest.approx(losses(own), rel=1e-4)
        monkeypatch.setitem(OBJECTIVES, "mine", dataclasses.replace(OBJECTIVES["duet"]))  # raw_logits=True
        for objective in ("duet", "duet_adversarial", "bidirectional", "mine"):
            with pytest.raises(
                ValueError, match=f"teacher_store: values: objective '{objective}' compares raw logits"
            ):
                make(tmp_path, imported, positions="answer", objective=objective)


def test_columns_in_the_order_of_the_rows(tmp_path):
    """Without fingerprints: one row a prefix, prefixes of a row together; another number of positions is refused."""
    options = {"positions": "first", "objective": "duet_forward_kl", "steering_prefixes": PREFIXES[:1]}
    store = cached(tmp_path, options)
    columns = write_columns(store)
    by_print = {row["fingerprint"]: row for row in columns}
    prints = [print_.hex() for prints in store.rows.values() for print_ in prints]
    rows = [{k: v for k, v in by_print[each].items() if k != "fingerprint"} for each in prints]
    args = config(tmp_path, **options)
    more = (tiny(), args, forget_rows(), retain_rows(), word_tokenizer())
    imported = import_teacher(rows, *more, folder=tmp_path / "imported")
    for print_ in store:
        assert torch.equal(imported.read(print_).targets.indices, store.read(print_).targets.indices)
    for row in rows:
        row["target_token_ids"], row["target_logprobs"] = (
            row["target_token_ids"] * 2,
            row["target_logprobs"] * 2,
        )
        row["target_mask"] = row["target_mask"] * 2
    with pytest.raises(ValueError, match=r"columns: wanted 1 scored position\(s\) for .*, got 2"):
        import_teacher(rows, *more, folder=tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"columns: there is nothing for forget_dataset\[0\]"):
        import_teacher([columns[1]], *more, folder=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
