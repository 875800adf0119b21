"""Every architecture that is said to work: the teacher is the base at step 0, to the last bit, and stays it."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from sweeps import case
from test_trainer import PREFIX, losses, make
from tiny_models import tiny
from transformers import TrainerCallback

from duet.model.teacher import AdapterOffTeacher, FrozenTeacher

ARCHITECTURES = ("llama", "gemma2", "neox", "qwen3", "gemma3", "mistral", "phi", "phi3")
IDS = torch.tensor([[5, 9, 11, 30, 41, 7]])


class Watch(TrainerCallback):
    """What student and teacher say to plain queries, before training and after every step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(self.trainer._probe())

    on_step_end = on_train_begin


@pytest.mark.parametrize(
    "architecture, trained",
    [
        *((architecture, "lora") for architecture in ARCHITECTURES),
        *((architecture, "all weights") for architecture in ("llama", "gemma2", "neox", "qwen3")),
        ("llama", "dora"),
        case("gemma2", "dora", slow=True),
    ],
)
def test_the_teacher_is_the_base_and_the_student_leaves_it(tmp_path, architecture, trained):
    base = tiny(architecture)
    with torch.no_grad():
        logits = base(input_ids=IDS).logits
    options = {}
    if trained != "all weights":
        options["peft_config"] = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=trained == "dora"
        )
    watch = Watch()
    trainer = make(
        tmp_path,
        tiny(architecture),
        trainer_options={"callbacks": [watch], **options},
        max_steps=6,
        learning_rate=5e-3,
        activation_checkpointing=True,
        steering_prefixes=[PREFIX],
    )
    watch.trainer = trainer
    assert isinstance(trainer.teacher, FrozenTeacher if trained == "all weights" else AdapterOffTeacher)
    trainer.train()
    (student, teacher), *later = watch.seen
    assert torch.equal(student, teacher)
    for moved, kept in later:
        assert torch.equal(kept, teacher) and not torch.equal(moved, teacher)
    model = trainer.model.eval()
    with torch.no_grad(), contextlib.nullcontext() if trained == "all weights" else model.disable_adapter():
        said = (trainer.teacher.model if trained == "all weights" else model)(input_ids=IDS).logits
    assert torch.equal(said, logits), "the teacher is the model that was given, logits and all"
    assert sum(losses(trainer)[-2:]) < 0.9 * sum(losses(trainer)[:2])


def test_dora_in_half_precision_starts_within_rounding(tmp_path):
    """peft's DoRA factor is 1 only up to bf16's rounding; the teacher is the base all the same."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    trainer = make(tmp_path, tiny().bfloat16(), trainer_options={"peft_config": config}, max_steps=2)
    student, teacher = trainer._probe()
    assert not torch.equal(student, teacher), "otherwise the allowance is not needed any more"
    trainer.train()
    assert torch.equal(trainer._probe()[1], teacher)
    wrong = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with pytest.raises(RuntimeError, match="before the first step"):
        make(tmp_path, tiny().bfloat16(), trainer_options={"peft_config": wrong}).train()
