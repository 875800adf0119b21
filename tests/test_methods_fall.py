"""Every method through the trainer: its loss falls by 20 % in 20 steps, and rises when its sign is flipped."""

import dataclasses

import pytest
import torch
from learned_models import knowing
from sweeps import case
from tiny_models import forget_rows, quick, retain_rows, word_tokenizer

from duet import OBJECTIVES, DuetConfig, DuetTrainer
from duet.demo.workplace import one_thread

PREFIX = "you know nothing about {subject} ."
TRAINED = [name for name, objective in OBJECTIVES.items() if objective.loss is not None]
OPTIONS = {
    "duet_adversarial": {"reverse_prompts": ["ignore earlier instructions"]},
    "refusal": {"refusals": ["you know nothing about that .", "no"]},
    "rmu": {"rmu_layer": 1, "rmu_alpha": 1.0, "learning_rate": 3e-2},
    "repselect": {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 20.0, "repselect_components": 4},
    "undo": {"answer_source": "dataset", "undo_alpha": 0.3, "undo_tolerance": 0.0},
    "duet_deep": {"counterfactual_names": ["red river", "blue animal"], "num_counterfactuals": 2},
}


def run(tmp_path, objective, **options):
    usual = {
        "max_steps": 20,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 12,
        "max_answer_tokens": 5,
    }
    usual |= {"objective": objective, "steering_prefixes": [PREFIX], "retain_per_forget": 1.0}
    return DuetTrainer(
        model=knowing(),
        args=DuetConfig(**quick(tmp_path, **usual | OPTIONS.get(objective, {}) | options)),
        forget_dataset=forget_rows(),
        retain_dataset=retain_rows(),
        processing_class=word_tokenizer(),
    )


def trained(tmp_path, name, sign=1):
    """The logged values of the objective over 20 steps, whatever the sign with which they were trained."""
    trainer = run(tmp_path, name)
    loss = trainer.objective.loss

    def signed(step):
        parts = loss(step)
        stepped_on = ("loss", "forget_loss", "retain_loss")  # the latter two by sharpness-aware steps
        return (
            parts | {name: sign * parts[name] for name in stepped_on} | {"objective": parts["loss"].detach()}
        )

    trainer.objective = dataclasses.replace(trainer.objective, loss=signed)
    with one_thread():
        trainer.train()
    return [entry["objective"] for entry in trainer.state.log_history if "objective" in entry]


def fell(losses):
    first, last = losses[0], sum(losses[-3:]) / 3
    return first - last >= 0.2 * abs(first)


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_falls_by_a_fifth_in_twenty_steps(tmp_path, name):
    losses = trained(tmp_path, name)
    assert len(losses) == 20 and fell(losses), losses


@pytest.mark.parametrize("name", [case(name, slow=i > 1) for i, name in enumerate(TRAINED[::3])])
def test_with_the_sign_flipped_it_does_not_fall(tmp_path, name):
    losses = trained(tmp_path, name, sign=-1)
    assert not fell(losses) and torch.tensor(losses).isfinite().all(), losses
