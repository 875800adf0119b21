"""`npo_sam`: where its gradients are taken, by hand and against plain torch; accumulation, adapters, resuming, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from test_trainer import LORA, assert_same_weights, config, losses, make, state_of
from tiny_models import forget_rows, retain_rows, tiny

from duet import DuetConfig, DuetTrainer
from duet.methods.sharpness import moved, perturbation

SGD = {"objective": "npo_sam", "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def test_a_step_by_hand(tmp_path):
    """forget = (a^2 + b^2) / 2 at (3, 4): rho 0.5 moves it by (0.3, 0.4), where its gradient is (3.3, 4.4)."""
    options = SGD | {"learning_rate": 0.1, "sam_rho": 0.5, "retain_weight": 2.0, "max_steps": 1}
    trainer = make(tmp_path, **options)
    weight = trainer.model.model.norm.weight
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(parameter is weight)
    with torch.no_grad():
        weight[:2] = torch.tensor([3.0, 4.0])

    def parts_of(model, inputs, counts):
        forget, retain = weight[:2].square().sum() / 2, 1 * weight[0]
        return {"loss": forget + 2 * retain, "forget_loss": forget, "retain_loss": retain}

    trainer.parts_of = parts_of
    trainer.train()
    # 3 - 0.1 (3.3 + 2 * 1) and 4 - 0.1 * 4.4
    torch.testing.assert_close(weight[:2].detach(), torch.tensor([2.47, 3.56]))
    assert losses(trainer, "forget_loss") == pytest.approx([(3.3**2 + 4.4**2) / 2])
    assert losses(trainer, "retain_loss") == pytest.approx(
        [3.0]
    )  # where the weights are, not where they are moved to
    assert losses(trainer, "sharpness") == pytest.approx([(5.5**2 - 5**2) / 2])
    assert losses(trainer) == pytest.approx([5.5**2 / 2 + 2 * 3])


def test_a_step_of_a_model_against_plain_torch(tmp_path):
    """All rows in one batch, SGD: theta - lr (grad NPO(theta + eps) + retain_weight grad NLL(theta))."""
    rate, rho, beta, factor = 0.05, 0.3, 0.5, 0.5
    options = SGD | {"learning_rate": rate, "sam_rho": rho, "npo_beta": beta, "retain_weight": factor}
    options |= {"per_device_train_batch_size": 18, "max_steps": 1, "retain_per_forget": 2.0}
    trainer = make(tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()

    model = tiny()
    weights = list(model.parameters())
    ids, mask, places = (batch[name] for name in ("input_ids", "attention_mask", "positions"))
    labels, query, forget = batch["labels"], batch["query"], batch["forget"]

    def log_p():
        logits = model(ids, attention_mask=mask).logits.flatten(0, 1)[places]
        each = -F.cross_entropy(logits, labels, reduction="none")
        return torch.zeros(len(forget)).index_add(0, query, each), each

    base = log_p()[0].detach()

    def npo():
        ratio = (log_p()[0] - base)[forget]
        return (-2 / beta * F.logsigmoid(-beta * ratio)).mean()

    retain = torch.autograd.grad(-log_p()[1][~forget[query]].mean(), weights)
    ahead = torch.autograd.grad(npo(), weights)
    norm = math.sqrt(sum(float(g.square().sum()) for g in ahead))
    theta = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, ahead, strict=True):
            w += rho * g / norm
    there = torch.autograd.grad(npo(), weights)
    for (name, ours), w, f, r in zip(trainer.model.named_parameters(), theta, there, retain, strict=True):
        torch.testing.assert_close(ours.detach(), w - rate * (f + factor * r), msg=name, rtol=1e-4, atol=1e-6)
    assert losses(trainer, "sharpness")[0] > 0.01


def test_an_accumulated_step_is_the_step_of_the_whole_batch(tmp_path):
    """The perturbation is of the whole step, not of a micro-batch; the last step of an epoch is a short one."""
    options = SGD | {"learning_rate": 0.05, "sam_rho": 0.3, "retain_per_forget": 1.0, "max_steps": 3}
    whole = make(tmp_path, per_device_train_batch_size=8, **options)
    parts = make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    whole.train()
    parts.train()
    assert_same_weights(state_of(whole.model), state_of(parts.model), rtol=1e-4, atol=1e-6)
    for name in ("loss", "forget_loss", "retain_loss"):
        assert losses(parts, name) == pytest.approx(losses(whole, name), rel=1e-4)


def test_a_step_after_an_evaluation_is_looked_at_in_training_mode(tmp_path):
    options = {"objective": "npo_sam", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = make(tmp_path, trainer_options={"eval_dataset": forget_rows(2)}, **options)
    modes, parts_of = set(), trainer.parts_of

    def seen(model, *args):
        modes.add((torch.is_grad_enabled(), model.training))
        return parts_of(model, *args)

    trainer.parts_of = seen
    trainer.train()
    assert modes == {(True, True), (False, False)}


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_same_run(tmp_path, lora):
    options = {"objective": "npo_sam", "save_strategy": "steps", "save_steps": 1}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "sam_rho": 0.1}
    given = {"peft_config": LoraConfig(**LORA, lora_dropout=0.1)} if lora else {}
    whole = make(tmp_path, trainer_options=given, **options)
    before = state_of(whole.model)
    whole.train()
    resumed = make(tmp_path, trainer_options=given, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert losses(resumed)[-1] == losses(whole)[-1]
    assert_same_weights(state_of(resumed.model), state_of(whole.model))
    after = state_of(whole.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        changed and all("lora" in name for name in changed) == lora
    )  # the base below an adapter is never moved
    plain = make(tmp_path, objective="npo", trainer_options=given, max_steps=1).evaluate(forget_rows(2))
    sharp = make(tmp_path, objective="npo_sam", trainer_options=given, max_steps=1).evaluate(forget_rows(2))
    assert sharp["eval_loss"] == plain["eval_loss"]  # measured where the weights are


def test_the_weights_come_back_bitwise():
    weights = [torch.tensor([0.1, 1e8]), torch.tensor([2.0])]
    before = [w.clone() for w in weights]
    with pytest.raises(KeyError), moved(weights, [torch.tensor([1e9, 3.0]), None]):
        assert weights[0][0] > 1e8
        raise KeyError
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert perturbation([torch.zeros(3), None], 0.5)[0].tolist() == [0, 0, 0]  # no direction, no NaN


def test_where_it_cannot_work_it_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="sam_rho: wanted a number > 0, got 0"):
        DuetConfig(str(tmp_path), sam_rho=0)
    with pytest.raises(ValueError, match=r"model: wanted trained weights in float32, got bfloat16.*sam_rho"):
        make(tmp_path, tiny().bfloat16(), objective="npo_sam")
    for name, value, match in (
        ("fp16", True, "fp16: wanted False"),
        ("optim", "galore_adamw_layerwise", "optim: wanted one that steps after the backward"),
    ):
        args = config(tmp_path, objective="npo_sam")
        setattr(args, name, value)
        with pytest.raises(ValueError, match=match):
            DuetTrainer("/nowhere", args, forget_rows(), retain_rows())
    monkeypatch.setattr(DuetConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"args: wanted one process .* because objective 'npo_sam' moves"):
        DuetTrainer("/nowhere", config(tmp_path, objective="npo_sam"), forget_rows(), retain_rows())
