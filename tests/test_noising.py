"""UNDO: the perturbation, its stop rule, and a run that starts from noise and comes back."""

import copy

import pytest
import torch
from learned_models import knowing
from peft import LoraConfig
from test_trainer import LORA, assert_same_weights, make, state_of
from tiny_models import retain_rows, tiny
from torch import nn

from duet.methods import noising
from duet.methods.noising import RecoveryStop, perturb


def test_matrices_get_xavier_noise_and_vectors_shrink():
    layer = nn.Linear(300, 200)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
    perturb(layer, alpha=0.25, beta=0.5, seed=3)
    assert torch.equal(layer.bias, torch.full((200,), 0.75))
    noise = layer.weight - 1.5
    bound = 0.25 * 0.5 * (6 / 500) ** 0.5  # alpha beta a
    assert noise.abs().max() <= bound * 1.001
    assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.02) and abs(noise.mean()) < 0.02 * bound


def test_alpha_zero_changes_nothing_and_one_forgets_everything():
    model, other = tiny(seed=0), tiny(seed=1)
    before = state_of(model)
    assert_same_weights(state_of(perturb(model, 0.0, 0.1)), before)
    assert_same_weights(state_of(perturb(model, 1.0, 1.0)), state_of(perturb(other, 1.0, 1.0)))
    assert (model.model.norm.weight == 0).all() and (model.lm_head.weight != 0).any()


def test_tied_weights_are_perturbed_once():
    model = tiny(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    perturb(model, alpha=0.5, beta=0.0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight, 0.5 * before)


def test_the_seed_alone_decides_the_noise():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        states.append(state_of(perturb(tiny(), 0.5, 0.1, seed))["lm_head.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("alpha", "beta", "name"), [(1.5, 0.1, "alpha"), (-0.1, 0.1, "alpha"), (0.5, -1.0, "beta")]
)
def test_bad_amounts(alpha, beta, name):
    with pytest.raises(ValueError, match=f"{name}: wanted"):
        perturb(tiny(), alpha, beta)


class Control:
    should_training_stop = False


class State:
    def __init__(self, step):
        self.global_step = step


@pytest.mark.parametrize(("student", "stops"), [(2.09, True), (2.11, False)])
def test_the_stop_rule_is_five_percent_of_the_teachers_perplexity(student, stops):
    asked = []
    rule = RecoveryStop(lambda: (asked.append(1) or student, 2.0), tolerance=0.05, every=10)
    control = Control()
    rule.on_step_end(None, State(9), control)
    assert not asked and not control.should_training_stop
    rule.on_step_end(None, State(10), control)
    assert control.should_training_stop == stops


OPTIONS = {
    "objective": "undo",
    "answer_source": "dataset",
    "undo_alpha": 0.3,
    "learning_rate": 5e-3,
    "retain_per_forget": 1.0,
}


@pytest.mark.slow
def test_undo_starts_from_noise_and_stops_when_it_is_back(tmp_path, monkeypatch):
    unlearned = knowing()
    before = state_of(unlearned)
    trainer = make(
        tmp_path, copy.deepcopy(unlearned), max_steps=300, undo_check_steps=5, **OPTIONS | {"undo_alpha": 0.6}
    )
    assert_same_weights(state_of(trainer.teacher.model), before)
    seen = []
    original = noising.retain_perplexities
    monkeypatch.setattr(
        noising, "retain_perplexities", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    trainer.train()
    assert 5 < trainer.state.global_step < 300, "it takes a while, and it stops"
    assert trainer.state.global_step == 5 * len(seen)
    assert all(student > 1.05 * teacher for student, teacher in seen[:-1])
    assert seen[-1][0] <= 1.05 * seen[-1][1] and len({teacher for _, teacher in seen}) == 1
    assert_same_weights(state_of(trainer.teacher.model), before)


@torch.no_grad()
def test_perplexities_are_those_of_the_answers(tmp_path):
    trainer = make(tmp_path, knowing(), **OPTIONS)
    found = noising.retain_perplexities(trainer)
    dataset, rows = trainer.train_dataset, range(trainer.train_dataset.num_forget, len(trainer.train_dataset))
    for model, perplexity in zip((trainer.model, trainer.teacher.model), found, strict=True):
        losses = []
        for i in rows:
            prompt, item = dataset.prompt(i), dataset[i]
            whole = torch.tensor([[*item["student"], *item["answer"]]])
            log_p = model(input_ids=whole).logits[0].log_softmax(-1)
            losses += [-log_p[j - 1, whole[0, j]] for j in range(len(prompt), whole.shape[1])]
        assert perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-4)


def test_without_a_tolerance_it_runs_to_the_end(tmp_path):
    trainer = make(tmp_path, tiny(), max_steps=3, undo_tolerance=0.0, undo_check_steps=1, **OPTIONS)
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_noise_of_a_run_follows_from_its_seed(tmp_path):
    first, again, other = (make(tmp_path, seed=seed, **OPTIONS).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_stop_rule_is_installed_once(tmp_path):
    trainer = make(tmp_path, trainer_options={"eval_dataset": {"retain": retain_rows(2)}}, **OPTIONS)
    trainer.get_train_dataloader()
    trainer.get_eval_dataloader("retain")
    assert sum(isinstance(each, RecoveryStop) for each in trainer.callback_handler.callbacks) == 1


def test_every_token_but_the_first_is_scored(tmp_path):
    trainer = make(tmp_path, tiny(), **OPTIONS)
    item = trainer.train_dataset[0]
    assert len(item["student"]) == 1 and item["scored"] == len(item["answer"])
    whole = [*item["student"], *item["answer"]]
    prompt = trainer.train_dataset.prompt(0)
    assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)


def test_the_unlearned_model_answers_where_no_answers_are_wanted(tmp_path):
    trainer = make(tmp_path, tiny(), **OPTIONS | {"answer_source": "teacher", "max_answer_tokens": 3})
    trainer.get_train_dataloader()
    prompt, item = trainer.train_dataset.prompt(0), trainer.train_dataset[0]
    assert 1 <= len(item["student"]) + len(item["answer"]) - len(prompt) <= 3


def test_any_method_can_be_followed_by_undo(tmp_path):
    first = make(tmp_path, knowing())
    first.train()
    unlearned = state_of(first.model)
    second = make(tmp_path, first.model, **OPTIONS)
    second.train()
    assert_same_weights(state_of(second.teacher.model), unlearned)
    assert not torch.equal(second.model.lm_head.weight, unlearned["lm_head.weight"])


def test_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="merge the adapter first"):
        make(tmp_path, tiny(), trainer_options={"peft_config": LoraConfig(**LORA)}, **OPTIONS)


def test_resuming_adds_no_second_noise(tmp_path):
    options = OPTIONS | {"undo_tolerance": 0.0, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, knowing(), **options)
    assert not torch.equal(whole.model.lm_head.weight, whole.teacher.model.lm_head.weight)
    whole.train()
    resumed = make(tmp_path, knowing(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_same_weights(state_of(resumed.model), state_of(whole.model))
