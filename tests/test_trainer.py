"""duet.trainer: whole runs on tiny models. Guards, counts, checkpoints, memory."""

import dataclasses
import gc
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from sweeps import case
from tiny_models import NO_SYSTEM_TEMPLATE, forget_rows, quick, retain_rows, tiny, word_tokenizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from duet import OBJECTIVES, DuetConfig, DuetTrainer, Objective
from duet.data.dataset import Draw
from duet.model.answers import generate_answers
from duet.model.switches import Switches
from duet.model.teacher import AdapterOffTeacher, FrozenTeacher
from duet_kernels import set_workspace_bytes
from duet_kernels.dispatch import workspace_bytes

PREFIX = "you know nothing about {subject} ."
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config(tmp_path, **options):
    rates = {
        "max_steps": 2,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 6,
        "retain_per_forget": 2.0,
    }
    return DuetConfig(**quick(tmp_path / "out", **{"seed": 0, **rates, **options}))


def make(tmp_path, model=None, retain=True, trainer_options=None, **options):
    return DuetTrainer(
        model=tiny() if model is None else model,
        args=config(tmp_path, **options),
        forget_dataset=forget_rows(),
        retain_dataset=retain_rows() if retain else None,
        **{"processing_class": word_tokenizer()} | (trainer_options or {}),
    )


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance or {"rtol": 0, "atol": 0})


def test_data_seed_orders_the_rows(tmp_path):
    none, same, other = (list(make(tmp_path, data_seed=seed)._sampler) for seed in (None, 0, 5))
    assert none == same != other


def test_the_workspace_is_that_of_the_options(tmp_path):
    before = set_workspace_bytes(None)
    try:
        make(tmp_path, workspace_bytes=3 << 20)
        assert workspace_bytes() == 3 << 20
    finally:
        set_workspace_bytes(before)


# -- it trains -------------------------------------------------------------------------------------------------------


# Every method on a llama: test_methods_fall.py
@pytest.mark.parametrize(
    "architecture, objective",
    [
        case(architecture, objective, slow=i % 3 != j)
        for i, objective in enumerate(["duet", "duet_forward_kl", "bidirectional", "npo"])
        for j, architecture in enumerate(["gemma2", "neox", "llama"])
    ],
)
def test_kinds_of_objectives_fall_on_every_architecture(tmp_path, architecture, objective):
    before = state_of(tiny(architecture))
    trainer = make(tmp_path, tiny(architecture), objective=objective, max_steps=12, learning_rate=1e-2)
    trainer.train()
    first, last = sum(losses(trainer)[:3]), sum(losses(trainer)[-3:])
    assert last < first if first < 0 or last < 0 else last < 0.8 * first
    assert len(losses(trainer, "forget_loss")) == len(losses(trainer, "retain_loss")) == 12
    moved = [
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert moved


# Every pair of positions, source and side.
@pytest.mark.parametrize(
    "source, side, positions",
    [(source, ("left", "right")[(i + j) % 2], positions)
     for i, source in enumerate(("teacher", "dataset"))
     for j, positions in enumerate(("first", "first_n", "answer"))],
)  # fmt: skip
def test_positions_and_answer_sources(tmp_path, positions, source, side):
    options = {"positions": positions, "answer_source": source, "num_positions": 3, "max_answer_tokens": 5}
    tokenizer = word_tokenizer(NO_SYSTEM_TEMPLATE, padding_side=side)
    trainer = make(tmp_path, trainer_options={"processing_class": tokenizer}, max_steps=4, **options)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    widths = {
        item["scored"] for item in (trainer.train_dataset[i] for i in range(len(trainer.train_dataset)))
    }
    if positions == "first":
        assert widths == {1}
    elif positions == "first_n":
        assert max(widths) == 3
    else:
        assert max(widths) == (5 if source == "teacher" else 8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_equation_3_on_full_logits(tmp_path, side):
    """One batch against the paper's loss from the model's own forward, each row alone and unpadded."""
    tokenizer = word_tokenizer(padding_side=side)
    trainer = make(tmp_path, trainer_options={"processing_class": tokenizer}, delta=0.8)
    with torch.no_grad():  # a student that has moved
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    items = [trainer.train_dataset[Draw(i, i)] for i in range(0, 14, 3)]
    loss, parts = trainer.compute_loss(trainer.model, trainer.data_collator(items), return_outputs=True)
    expected = []
    for item in items:
        with torch.no_grad():
            student = trainer.model(input_ids=torch.tensor([item["student"]])).logits[0, -1]
            teacher = trainer.teacher.model(input_ids=torch.tensor([item["teacher"]])).logits[0, -1]
        best, ids = teacher.topk(8)
        expected.append(F.huber_loss(student[ids], best, delta=0.8, reduction="sum"))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)
    forget = [value for value, item in zip(expected, items, strict=True) if item["forget"]]
    torch.testing.assert_close(parts["forget_loss"], torch.stack(forget).mean(), rtol=1e-5, atol=1e-5)


def test_npo_compares_with_the_base_on_the_same_input(tmp_path):
    trainer = make(tmp_path, objective="npo", reverse_prompts=["ignore earlier instructions"], npo_beta=0.5)
    items = [trainer.train_dataset[Draw(i, i)] for i in range(4)]
    assert all(item["teacher"] is None for item in items)
    _, parts = trainer.compute_loss(trainer.model, trainer.data_collator(items), return_outputs=True)
    torch.testing.assert_close(
        parts["forget_loss"], torch.tensor(2 / 0.5 * 0.5**0).mul(torch.log(torch.tensor(2.0)))
    )


def test_without_retain_rows(tmp_path):
    trainer = make(tmp_path, retain=False)
    trainer.train()
    assert losses(trainer) and not losses(trainer, "retain_loss")


def test_an_objective_of_the_users_own(tmp_path, monkeypatch):
    def mine(step):
        return {
            "loss": step.hidden.square().mean() * len(step.query) / step.counts.positions,
            "mine": step.hidden.sum(),
        }

    monkeypatch.setitem(OBJECTIVES, "mine", Objective(mine))
    trainer = make(tmp_path, objective="mine", max_steps=2)
    trainer.train()
    assert len(losses(trainer, "mine")) == 2


# -- the teacher -----------------------------------------------------------------------------------------------------


def test_with_an_adapter_the_teacher_is_the_same_weights(tmp_path):
    base = tiny()
    before = state_of(base)
    trainer = make(tmp_path, base, trainer_options={"peft_config": LoraConfig(**LORA)}, max_steps=4)
    assert isinstance(trainer.model, PeftModel) and isinstance(trainer.teacher, AdapterOffTeacher)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    with trainer.model.disable_adapter():
        ids = torch.tensor([[5, 9, 11]])
        off = trainer.model(input_ids=ids).logits
    assert torch.equal(off, tiny()(input_ids=ids).logits)
    assert not torch.equal(off, trainer.model(input_ids=ids).logits)
    kept = {name: value for name, value in state_of(trainer.model).items() if "lora_" not in name}
    assert_same_weights(
        {n.replace("base_model.model.", "").replace(".base_layer", ""): v for n, v in kept.items()}, before
    )


def test_an_adapter_run_learns_the_targets_of_a_frozen_copy_run(tmp_path):
    """Adapter-off and a frozen copy are the same teacher: the first losses agree bitwise."""
    adapter = make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)}, max_steps=1)
    copied = make(tmp_path, max_steps=1)
    assert isinstance(copied.teacher, FrozenTeacher)
    adapter.train()
    copied.train()
    assert losses(adapter) == losses(copied)


def test_the_frozen_copy_shares_nothing_with_the_student(tmp_path):
    trainer = make(tmp_path)
    before = state_of(trainer.teacher.model)
    trainer.train()
    assert_same_weights(state_of(trainer.teacher.model), before)
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert not own & {p.data_ptr() for p in trainer.teacher.model.parameters()}
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())


def test_another_model_as_teacher(tmp_path):
    teacher = tiny(seed=5)
    trainer = make(tmp_path, trainer_options={"teacher_model": teacher}, max_steps=4)
    assert trainer.teacher.model is teacher
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


class Recorder(TrainerCallback):
    def __init__(self):
        self.probes = []

    def on_step_end(self, args, state, control, **kwargs):
        self.probes.append(self.trainer._probe())


@pytest.mark.parametrize("lora", [False, True])
def test_teacher_equals_base_before_and_stays_while_the_student_moves(tmp_path, lora):
    recorder = Recorder()
    options = {"callbacks": [recorder]} | (
        {"peft_config": LoraConfig(**LORA, lora_dropout=0.2)} if lora else {}
    )
    trainer = make(tmp_path, tiny(attention_dropout=0.2), trainer_options=options)
    recorder.trainer = trainer
    student, teacher = trainer._probe()
    assert torch.equal(student, teacher), "bitwise, before the first step"
    trainer.train()
    for moved, kept in recorder.probes:
        assert torch.equal(kept, teacher)
        assert not torch.equal(moved, teacher)


def test_an_adapter_that_stays_on_is_caught_after_one_step(tmp_path, monkeypatch):
    """FSDP1 has been seen to leave an adapter on: the student would be its own teacher."""
    trainer = make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)}, max_steps=20)
    monkeypatch.setattr(Switches, "base_model", Switches.evaluating)
    with pytest.raises(RuntimeError, match="teacher: it changed while the student was trained"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_adapter_that_changes_the_base_is_refused_before_the_first_step(tmp_path):
    options = {"peft_config": LoraConfig(**LORA, init_lora_weights=False)}
    with pytest.raises(RuntimeError, match="before the first step, teacher and student differ"):
        make(tmp_path, trainer_options=options).train()


def test_a_copy_that_shares_memory_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenTeacher, "copy_of", lambda student, share: FrozenTeacher(student))
    trainer = make(tmp_path)
    trainer.model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="teacher: it changed"):
        trainer.train()


def test_training_twice_goes_on_with_the_same_teacher(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    first, weights = losses(trainer), state_of(trainer.model)
    trainer.train()
    assert losses(trainer)[0] < first[0]
    assert not torch.equal(trainer.model.state_dict()["lm_head.weight"], weights["lm_head.weight"])


def test_warm_up_steps_do_not_trip_the_guard_and_nothing_learned_is_said(tmp_path, caplog):
    make(tmp_path, warmup_steps=3).train()
    assert "did not change" not in caplog.text
    import transformers

    transformers.utils.logging.enable_propagation()
    make(tmp_path, learning_rate=0.0).train()
    assert "the student did not change during training" in caplog.text


# -- answers made by the teacher --------------------------------------------------------------------------------------


def greedy_one_by_one(model, prompt, end, limit):
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_batched_left_padded_answers_are_the_greedy_ones(architecture):
    model, tokenizer = tiny(architecture, seed=3), word_tokenizer(padding_side="right")
    model.generation_config.repetition_penalty = 5.0  # a checkpoint's habit; greedy means greedy
    prompts = [[1, 5, 9, 20, 33, 41, 6], [1, 5, 12, 6], [1, 30, 6]]
    answers = generate_answers(model, prompts, tokenizer, pad_id=0, max_new_tokens=12)
    assert answers == [greedy_one_by_one(model, prompt, 2, 12) for prompt in prompts]


@pytest.mark.parametrize("lora", [False, True])
def test_the_steered_teacher_answers_before_training(tmp_path, lora):
    options = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = make(tmp_path, trainer_options=options, positions="answer", max_answer_tokens=6, max_steps=1)
    trainer.train()
    dataset, base = trainer.train_dataset, tiny()
    for i in (0, 3, 7):
        item = dataset[i]
        assert item["answer"] == greedy_one_by_one(base, item["teacher"], 2, 6)


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["duet", "duet_forward_kl", "ga", "npo"])
def test_two_batches_of_four_equal_one_of_eight(tmp_path, objective):
    """Answers of different lengths: a mean per micro-batch would weigh their tokens differently."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
        }
        options |= {"positions": "answer", "answer_source": "dataset", "optim": "sgd", "learning_rate": 1e-2}
        trainer = make(tmp_path, objective=objective, **options)
        trainer.train()
        results.append((losses(trainer), losses(trainer, "forget_loss"), state_of(trainer.model)))
    for logged, logged_forget, weights in results[1:]:
        assert logged == pytest.approx(results[0][0], rel=1e-5)
        assert logged_forget == pytest.approx(results[0][1], rel=1e-5)
        assert_same_weights(weights, results[0][2], rtol=0, atol=1e-6)


def test_uneven_micro_batches_would_be_wrong_with_a_mean_per_micro_batch(tmp_path):
    """The test above can fail: without the count of the whole step the weights differ."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2)):
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
        }
        options |= {"positions": "answer", "answer_source": "dataset", "optim": "sgd", "learning_rate": 1e-2}
        trainer = make(tmp_path, **options)
        whole = trainer._get_num_items_in_batch
        trainer.compute_loss_of_step = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, t=trainer, n=accumulation, c=whole, **_: (
            t.compute_loss_of_step(model, inputs, num_items_in_batch=c([inputs], "cpu")) / n
        )
        trainer.train()
        results.append(state_of(trainer.model))
    worst = max((results[0][name] - results[1][name]).abs().max() for name in results[0])
    assert worst > 1e-5


# -- logging, checkpoints --------------------------------------------------------------------------------------------


def test_logged_parts_add_up_between_logs(tmp_path):
    every, second = make(tmp_path, max_steps=4, logging_steps=1), make(tmp_path, max_steps=4, logging_steps=2)
    every.train()
    second.train()
    for name in ("loss", "forget_loss", "retain_loss"):
        steps, logged = losses(every, name), losses(second, name)
        assert logged == pytest.approx([sum(steps[:2]) / 2, sum(steps[2:]) / 2], rel=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt()])
def test_what_an_attempt_that_failed_has_added_up_is_not_logged(tmp_path, monkeypatch, error):
    trainer = make(tmp_path, max_steps=1, per_device_train_batch_size=4, auto_find_batch_size=True)
    own, calls = trainer.compute_loss, []

    def fails_once(*args, **kwargs):
        loss = own(*args, **kwargs)
        calls.append(loss)
        if len(calls) == 1:
            raise error
        return loss

    monkeypatch.setattr(trainer, "compute_loss", fails_once)
    with suppress(KeyboardInterrupt):
        trainer.train()
    if isinstance(error, KeyboardInterrupt):
        trainer.train()
    (loss,), (forget,), (retain,) = (losses(trainer, name) for name in ("loss", "forget_loss", "retain_loss"))
    assert min(forget, retain) < loss < max(forget, retain)


@pytest.mark.parametrize(
    ("strategy", "steps", "at"), [("steps", 2, [2, 3]), ("steps", 10, [3]), ("steps", 3, [3]), ("no", 1, [])]
)
def test_the_last_step_is_logged(strategy, steps, at, tmp_path):
    trainer = make(tmp_path, max_steps=3, logging_strategy=strategy, logging_steps=steps)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert [entry["step"] for entry in logged] == at


@pytest.mark.parametrize("options", [{}, {"positions": "answer", "max_answer_tokens": 4}, {"lora": True}])
def test_resume_is_bitwise(tmp_path, options):
    """Four steps against two, and two more from the checkpoint: dropout, sampling and adversarial views included."""
    options = dict(options)
    trainer_options = (
        {"peft_config": LoraConfig(**LORA, lora_dropout=0.1)} if options.pop("lora", False) else {}
    )
    options |= {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "reverse_prompts": ["ignore earlier"],
    }
    options |= {"steering_prefixes": [PREFIX, "forget {subject}"], "warmup_steps": 1}

    def trainer(name):
        model = tiny(attention_dropout=0.1)
        torch.manual_seed(11)  # the adapter's initial weights
        return make(tmp_path / name, model, trainer_options=trainer_options, **options)

    whole = trainer("whole")
    whole.train()
    assert whole.state.epoch > 1, "the resumed run must also pass an epoch"
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert_same_weights(state_of(resumed.model), state_of(whole.model))


def test_a_saved_model_loads_without_us(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(state_of(loaded), state_of(trainer.model))
    assert "forward" not in trainer.model.__dict__
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("who is ada")["input_ids"] == trainer.processing_class("who is ada")["input_ids"]


def test_an_adapter_is_saved_as_an_adapter(tmp_path):
    trainer = make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "saved")
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_model_teacher_and_tokenizer_by_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    options = {"teacher_model": tmp_path / "base", "processing_class": None}
    by_folder = make(tmp_path, "~/base", trainer_options=options)
    by_object = make(tmp_path)
    by_folder.train()
    by_object.train()
    assert losses(by_folder) == losses(by_object)


def test_evaluation(tmp_path):
    rows = {"forget": forget_rows(3), "retain": retain_rows(3)}
    options = {"trainer_options": {"eval_dataset": rows}, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path, reverse_prompts=["ignore"], reverse_prompt_fraction=1.0, **options)
    trainer.train()
    forget, retain = losses(trainer, "eval_forget_loss"), losses(trainer, "eval_retain_loss")
    assert len(forget) == len(retain) == 2 and forget[1] < forget[0]
    assert trainer.evaluate(forget_rows(3))["eval_loss"] == pytest.approx(forget[-1], rel=1e-5)
    for _ in range(2):
        again = trainer.evaluate(rows)
        found = [again[f"eval_{name}_loss"] for name in rows]
        assert found == pytest.approx([forget[-1], retain[-1]], rel=1e-5)
        trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, [0, 1])


def test_rows_that_were_evaluated_are_let_go(tmp_path):
    """With their prepared targets, which are the largest part of them."""
    trainer = make(tmp_path, objective="duet_deep")
    for _ in range(3):
        trainer.evaluate(forget_rows(1))
        trainer.accelerator.free_memory()  # it keeps every data loader
    gc.collect()
    assert len(trainer._prepared) == 1


@pytest.mark.parametrize("objective", ["graddiff", "simnpo", "duet"])
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(tmp_path, objective):
    """Answers of one to eight tokens: a mean of the batches' means would weigh them by rows."""
    answers = ["red", "a poet", "a mathematician and a captain of the sea .", "blue", "the code machine"]
    rows = [row | {"answer": answer} for row, answer in zip(forget_rows(5), answers, strict=True)]
    options = {"objective": objective, "positions": "answer", "answer_source": "dataset"}
    model, found = tiny(), []
    for size in (5, 1, 2, 3):
        trainer = make(tmp_path, model, per_device_eval_batch_size=size, **options)
        found += [trainer.evaluate(rows)["eval_loss"], trainer.predict(rows).metrics["test_loss"]]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)
    for size in (2, 8):  # not even a batch that is the only one
        short = make(tmp_path, model, per_device_eval_batch_size=size, dataloader_drop_last=True, **options)
        assert short.evaluate(rows)["eval_loss"] == pytest.approx(found[0], rel=1e-5)
        assert short.get_train_dataloader().batch_sampler.drop_last


# -- the machinery around --------------------------------------------------------------------------------------------


def test_the_wrapped_models_hooks_fire_at_every_step(tmp_path):
    model, calls = tiny(), []
    trainer = make(tmp_path, model)
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    trainer.train()
    assert sum(isinstance(output, dict) and "loss" in output for output in calls) == 2


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_autocast(tmp_path, lora):
    options = {"peft_config": LoraConfig(**LORA)} if lora else {}
    exact = make(tmp_path, trainer_options=options, max_steps=2)
    rounded = make(tmp_path, trainer_options=options, max_steps=2, bf16=True)
    rounded.seen, loss = set(), rounded.objective.loss

    def watched(step):
        rounded.seen.add((step.hidden.dtype, torch.is_autocast_enabled("cpu")))
        return loss(step)

    rounded.objective = dataclasses.replace(rounded.objective, loss=watched)
    exact.train()
    rounded.train()
    assert losses(rounded) != losses(exact)
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.1)
    assert rounded.seen == {(torch.float32, False)}, "the backbone is autocast, the loss is not"


def test_the_backbone_runs_in_bf16(tmp_path):
    trainer, seen = make(tmp_path, bf16=True), set()
    trainer.model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: seen.add(output.dtype)
    )
    trainer.train()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, lora):
    torch.manual_seed(0)
    options = {"peft_config": LoraConfig(**LORA)} if lora else {}
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        runs.append(
            make(tmp_path, trainer_options=options, max_steps=2, activation_checkpointing=checkpointing)
        )
        runs[-1].train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave back."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def largest_allocation(function):
    """Largest single CPU allocation in bytes: sees inside custom operators, where a dispatch mode does not look."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sizes, "the profiler saw no allocation"
    return max(sizes)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("objective", ["duet", "duet_forward_kl", "npo"])
def test_a_training_step_makes_no_tensor_of_the_size_of_the_logits(tmp_path, objective, lora):
    vocabulary, batch = 8192, 16
    options = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = make(
        tmp_path,
        tiny(vocab_size=vocabulary),
        trainer_options=options,
        objective=objective,
        positions="answer",
        answer_source="dataset",
        per_device_train_batch_size=batch,
        max_steps=1,
        workspace_bytes=1 << 20,
        steering_prefixes=[" ".join([PREFIX] * 6)],
    )
    items = [trainer.train_dataset[Draw(i % 14, i)] for i in range(batch)]
    inputs = trainer.data_collator(items)
    bound = batch * inputs["input_ids"].shape[1] * vocabulary // 4
    assert len(inputs["query"]) * vocabulary > bound > vocabulary * 32, (
        "the bound must tell logits from weights"
    )
    trainer.model.train()

    def step():
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, inputs).backward()

    with LargestTensor() as seen:
        step()
    assert 0 < seen.largest < bound
    assert largest_allocation(step) < 4 * bound
    with LargestTensor() as seen, torch.no_grad():  # the measuring can fail
        trainer.model(input_ids=inputs["input_ids"])
    assert seen.largest >= bound
