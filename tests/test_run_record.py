"""duet.output.record: a run is resumed as it began, or refused with the names of what changed."""

import dataclasses
import json
import shutil

import pytest
from peft import LoraConfig
from test_crashes import prepare, run_of
from test_trainer import LORA, assert_same_weights, config, losses, make, state_of
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer

from duet import OBJECTIVES, DuetConfig, DuetTrainer
from duet.methods.directions import DirectionOptions
from duet.methods.views import ViewOptions
from duet.output.record import MAY_CHANGE, MAY_GROW, RECORD, _plain, read_record, refuse_another, write_record
from duet.store.build import cache_teacher

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of 2 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("begun")
    make(folder, **SAVING).train()
    return folder


@pytest.fixture
def copy(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "copy")


def resume(folder, model=None, rows=None, trainer_options=None, **options):
    rows = rows or (forget_rows(), retain_rows())
    given = {"processing_class": word_tokenizer()} | (trainer_options or {})
    args = config(folder, **SAVING | options)
    trainer = DuetTrainer(model or tiny(), args, *rows, **given)
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))
    return trainer


CHANGED = {  # what another is -> (how it is resumed, the error)
    "an option": ({"learning_rate": 1e-3}, r"^learning_rate: .*began with 0\.003, this one has 0\.001"),
    "two options": (
        {"k": 9, "seed": 1},
        r"seed: the run in .* began with 0, this one has 1; k: .* 8, .* 9\. Change it back",
    ),
    "the method": ({"objective": "duet_kl"}, r"^objective: .*'duet', this one has 'duet_kl'"),
    "a prefix": (
        {"steering_prefixes": ["forget {subject}"]},
        r"^steering_prefixes: .*nothing about.*\['forget",
    ),
    "a shorter run": ({"max_steps": 1}, r"^max_steps: .*began with 2, this one has 1 \(it may only grow\)"),
    "larger steps": ({"gradient_accumulation_steps": 2}, r"^queries_per_step: .*began with 6, .* has 12"),
    "a forget row": (
        {"rows": ([*forget_rows()[:-1], forget_rows()[0] | {"answer": "no"}], retain_rows())},
        r"^forget rows: .*began with \[6, '\w{64}'\], this one has \[6, '\w{64}'\]",
    ),
    "a row less": ({"rows": (forget_rows(), retain_rows()[1:])}, r"^retain rows: .*\[8, .*\[7, "),
    "no retain rows": ({"rows": (forget_rows(), None)}, r"^retain rows: .*\[8, .* this one has None"),
    "another model": ({"model": tiny(seed=1)}, r"^weights: the run in"),
    "another configuration": ({"model": tiny(rms_norm_eps=1e-3)}, r"^model_config: the run in"),
    "another template": (
        {"trainer_options": {"processing_class": word_tokenizer("{{ messages[0]['content'] }}")}},
        r"^tokenizer: ",
    ),
    "an adapter": (
        {"trainer_options": {"peft_config": LoraConfig(**LORA)}},
        r"^adapter.peft_type: .*began with None, this one has 'LORA'",
    ),
    "another teacher": ({"trainer_options": {"teacher_model": tiny(seed=3)}}, r"^teacher: .*with None, "),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_changed_is_named(copy, what):
    how, message = CHANGED[what]
    before = (copy / "out" / RECORD).read_bytes()
    with pytest.raises(ValueError, match=message):
        resume(copy, **how)
    assert (copy / "out" / RECORD).read_bytes() == before


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)}, **SAVING).train()
    again = {"peft_config": LoraConfig(**LORA | {"lora_alpha": 32})}
    with pytest.raises(ValueError, match=r"^adapter.lora_alpha: .*began with 8, this one has 32"):
        resume(tmp_path, trainer_options=again)
    resume(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)})


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 3},
        {"logging_steps": 2, "run_name": "x", "save_steps": 2, "report_to": "none"},
        {"impl": "reference", "workspace_bytes": 1 << 20, "activation_checkpointing": True},
    ],
)
def test_what_may_change(copy, options):
    trainer = resume(copy, **options)
    assert trainer.state.global_step == options.get("max_steps", 2)
    assert read_record(copy / "out")["max_steps"] == options.get("max_steps", 2), (
        "the next resume compares with this one"
    )


def test_smaller_micro_batches_of_the_same_step(copy):
    """After an out-of-memory error, say: 2 x 3 queries are the 6 that they were, and so are the weights."""
    whole = resume(copy)
    parts = resume(copy, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert parts.state.global_step == 2
    assert losses(parts)[-1] == pytest.approx(losses(whole)[-1], rel=1e-4)
    assert_same_weights(state_of(parts.model), state_of(whole.model), rtol=1e-3, atol=1e-4)


def test_a_checkpoint_as_the_model_is_refused(copy):
    """Its own frozen copy would be the teacher: the student as it was at step 1, not the base."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(copy / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"^weights: "):
        resume(copy, model=student)


def test_another_of_two_teacher_models_is_refused(tmp_path):
    given = [{"teacher_model": tiny(seed=seed)} for seed in (3, 4)]
    make(tmp_path, trainer_options=given[0], **SAVING).train()
    with pytest.raises(ValueError, match=r"^teacher: "):
        resume(tmp_path, trainer_options=given[1])
    resume(tmp_path, trainer_options=given[0])


def test_another_store_is_refused(tmp_path):
    options = SAVING | {"retain_subjects": "fixed"}
    for seed in (0, 1):
        args = config(tmp_path, seed=seed, **options)
        cache_teacher(
            tiny(), args, forget_rows(), retain_rows(), word_tokenizer(), folder=tmp_path / f"{seed}"
        )
    given = [{"teacher_store": tmp_path / f"{seed}"} for seed in (0, 1)]
    make(tmp_path, trainer_options=given[0], **options).train()
    with pytest.raises(ValueError, match=r"^teacher: "):
        resume(tmp_path, trainer_options=given[1], **options)
    resume(tmp_path, trainer_options=given[0], **options)


def test_a_resumed_run_does_not_look_at_its_teacher_again(copy, monkeypatch):
    monkeypatch.setattr("duet.trainer.look_at_teacher", lambda *_: pytest.fail("looked again"))
    resume(copy)


def test_a_trained_trainer_still_knows_what_it_began_with(tmp_path):
    trainer = make(tmp_path, **SAVING)
    trainer.train()
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and read_record(tmp_path / "out")["max_steps"] == 3
    trainer.args.k = 9
    with pytest.raises(ValueError, match=r"^k: .*began with 8, this one has 9"):
        trainer.train(resume_from_checkpoint=True)


def test_a_folder_without_a_record_is_resumed_with_a_warning(copy, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    (copy / "out" / RECORD).unlink()
    resume(copy, k=9)
    assert f"has no {RECORD}" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record_is_named(copy, text):
    (copy / "out" / RECORD).write_text(text)
    with pytest.raises(ValueError, match=f"{RECORD}: wanted the record of a run"):
        resume(copy)


def test_the_command_line_compares_too(tmp_path):
    from duet.run.commands import train

    prepare(tmp_path)
    train(run_of(tmp_path, tmp_path / "out", max_steps=1))
    with pytest.raises(ValueError, match=r"^learning_rate: .*began with 0\.003, this one has 0\.01"):
        train(run_of(tmp_path, tmp_path / "out", max_steps=2, learning_rate=1e-2), resume=True)
    rows = (tmp_path / "forget.jsonl").read_text().splitlines()
    (tmp_path / "forget.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(ValueError, match=r"^forget rows: .*began with \[6, .*this one has \[5, "):
        train(run_of(tmp_path, tmp_path / "out", max_steps=2), resume=True)
    (tmp_path / "forget.jsonl").write_text("\n".join(rows))
    assert train(run_of(tmp_path, tmp_path / "out", max_steps=2), resume=True).state.global_step == 2


@pytest.mark.parametrize("lost", ["weights alone", "optimizer.pt", "scheduler.pt"])
def test_weights_alone_are_not_resumed(tmp_path, lost):
    """The Trainer would begin with a new optimizer and the first learning rate, and say nothing."""
    make(tmp_path, **SAVING, save_only_model=lost == "weights alone").train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    if lost != "weights alone":
        (checkpoint / lost).unlink()
        shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    for resume_from in (str(checkpoint), True):
        trainer = make(tmp_path, **SAVING)
        with pytest.raises(
            ValueError, match=r"^resume_from_checkpoint: '.*checkpoint-\d' holds the weights, but not"
        ):
            trainer.train(resume_from_checkpoint=resume_from)


def test_an_unfinished_checkpoint_is_not_resumed(tmp_path):
    """The Trainer would take the newest one, whatever is in it."""
    make(tmp_path, **SAVING).train()
    first, second = (tmp_path / "out" / f"checkpoint-{step}" for step in (1, 2))
    (second / "trainer_state.json").unlink()
    trainer = make(tmp_path, **SAVING)
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: '.*-2' is not finished: .* is .*checkpoint-1$"
    ):
        trainer.train(resume_from_checkpoint=str(second))
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    for checkpoint in (first, second):
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: there is no finished checkpoint in '.*out'"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_weights_alone_are_refused_before_a_model_is_loaded(tmp_path):
    from duet.run.commands import train

    prepare(tmp_path)
    train(run_of(tmp_path, tmp_path / "out", max_steps=1, save_only_model=True))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: '.*checkpoint-1' holds the weights"):
        train(run_of(tmp_path, tmp_path / "out", max_steps=2), resume=True)


def test_every_excused_option_is_one():
    """And none that shapes a loss or an update is among them."""
    names = {f.name for f in dataclasses.fields(DuetConfig)}
    excused = [name for group in MAY_CHANGE.values() for name in group.split()]
    assert set(excused) <= names and set(MAY_GROW) <= names
    assert len(excused) == len(set(excused)) and not set(excused) & set(MAY_GROW)
    decide = {name for objective in OBJECTIVES.values() for name in objective.reads}
    decide |= {f.name for options in (ViewOptions, DirectionOptions) for f in dataclasses.fields(options)}
    decide |= {
        "objective", "entropy_weighting", "retain_per_forget", "data_seed", "seed", "bf16", "fp16", "tf32", "optim", "optim_args",
        "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_drop_last", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "neftune_noise_alpha", "label_smoothing_factor",
    }  # fmt: skip
    assert decide <= names and not decide & set(excused)


def test_a_record_is_whole_or_not_there(tmp_path, monkeypatch):
    write_record(tmp_path, {"k": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("duet.output.record.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path, {"k": 2})
    assert read_record(tmp_path) == {"k": 1}
    assert read_record(tmp_path / "elsewhere") is None


def test_names_of_one_version_only_are_passed_over():
    refuse_another({"k": 8, "gone": 1}, {"k": 8, "new": 2}, "out")
    with pytest.raises(ValueError, match="num_train_epochs"):
        refuse_another({"num_train_epochs": 3.0}, {"num_train_epochs": 2.0}, "out")
    with pytest.raises(ValueError, match="max_steps"):  # counted in epochs before: it could be fewer steps
        refuse_another({"max_steps": -1}, {"max_steps": 5}, "out")


def test_the_record_holds_plain_values_and_no_secret(begun):
    record = json.loads((begun / "out" / RECORD).read_text())
    assert record["learning_rate"] == 3e-3 and record["queries_per_step"] == 6
    assert "hub_token" not in record and "output_dir" not in record
    assert record["weights"].startswith("2:") and len(record["weights"]) == 34


def test_a_set_is_written_in_one_order():
    assert _plain({"v_proj", "q_proj", "o_proj"}) == ["o_proj", "q_proj", "v_proj"]
