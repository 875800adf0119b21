"""`repselect`: which directions of a gradient are collapsed, by hand; the steps that follow; resuming and refusals."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from test_trainer import LORA, assert_same_weights, config, losses, make, state_of
from tiny_models import forget_rows, tiny, word_tokenizer

from duet import DuetConfig, DuetTrainer
from duet.methods import selectivity
from duet.methods.selectivity import adversary, collapsed, selective_direction

FIXED = {"objective": "repselect", "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def test_singular_values_by_hand():
    """Of 8, 4, 2, 1 the two largest become 4^2 / 8 and 4^2 / 4; a direction without gradient is none of the k."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(6, 6)).Q for _ in range(2))
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0, 0.0])
    gradient = left @ values.diag() @ right.T
    for components, wanted in (
        (2, [2.0, 4.0, 2.0, 1.0, 0.0, 0.0]),
        (6, [1 / 8, 1 / 4, 1 / 2, 1.0, 0.0, 0.0]),
    ):
        expected = left @ torch.tensor(wanted).diag() @ right.T
        torch.testing.assert_close(collapsed(gradient, components), expected, rtol=1e-4, atol=1e-5)
    assert collapsed(torch.zeros(3, 2), 2).tolist() == [[0, 0]] * 3


def test_steps_against_plain_torch(tmp_path):
    """One batch, no attacker, one component, which changes nothing: W - n lr (the gradient of -NLL at the start)."""
    options = FIXED | {"learning_rate": 0.1, "repselect_lora_rate": 0.0, "repselect_components": 1}
    trainer = make(tmp_path, per_device_train_batch_size=18, max_steps=3, **options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.train()
    model = tiny()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    (-F.cross_entropy(logits[batch["positions"]], batch["labels"])).backward()
    moved = set()
    for (name, ours), (_, weight) in zip(
        trainer.model.named_parameters(), model.named_parameters(), strict=True
    ):
        if "mlp" in name:
            weight.data -= 0.3 * weight.grad
            moved.add(name.rsplit(".", 2)[1])
        torch.testing.assert_close(ours.detach(), weight.detach(), rtol=1e-5, atol=1e-6)
    assert moved == {"gate_proj", "up_proj", "down_proj"}
    assert losses(trainer)[-1] < losses(trainer)[0]  # -NLL of the forget answers


def test_the_attacker_is_there_and_leaves_nothing():
    model, ids = tiny(), torch.arange(3, 9)[None]
    name = "model.layers.0.mlp.up_proj.weight"
    before = model(ids).logits
    with adversary(model, [name], 2) as (down, up):
        assert torch.equal(model(ids).logits, before)  # B is 0
        with torch.no_grad():
            up.add_(0.5)
        inside = model(ids).logits
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        model.get_parameter(name).add_(up @ down)
    torch.testing.assert_close(model(ids).logits, inside)


def test_the_attacker_learns_the_forget_answers(tmp_path, monkeypatch):
    seen, losses_of = [], selectivity._losses

    def kept(trainer, doing):
        for loss in losses_of(trainer, doing):
            seen.append(loss.item())  # -NLL
            yield loss

    monkeypatch.setattr(selectivity, "_losses", kept)
    options = FIXED | {"per_device_train_batch_size": 6, "repselect_lora_rate": 0.1}
    selective_direction(make(tmp_path, **options))
    before, after = seen  # one batch of all six forget rows, twice
    assert after > before


def test_the_gradients_of_batches_are_averaged(tmp_path):
    rows = [forget_rows()[0], forget_rows()[0] | {"question": "who was ada lovelace ?"}]
    found = []
    for size in (1, 2):
        options = FIXED | {"repselect_lora_rate": 0.0, "repselect_components": 1}
        args = config(tmp_path, per_device_train_batch_size=size, **options)
        found.append(selective_direction(DuetTrainer(tiny(), args, rows, None, word_tokenizer())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_direction_follows_from_the_seed_alone(tmp_path):
    found = []
    for count in (0, 5):
        trainer = make(tmp_path, **FIXED | {"repselect_lora_rate": 0.1, "per_device_train_batch_size": 3})
        torch.rand(count)
        found.append(selective_direction(trainer))
    assert all(map(torch.equal, *found))


def test_a_resumed_run_takes_the_gradient_of_the_untrained_model(tmp_path):
    options = FIXED | {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.5}
    options |= {"repselect_components": 3, "repselect_lora_rate": 0.1, "gradient_accumulation_steps": 2}
    whole = make(tmp_path, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_same_weights(state_of(resumed.model), state_of(whole.model))
    assert losses(resumed)[-1] == losses(whole)[-1]


def test_where_it_cannot_work_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="repselect_components: wanted an integer >= 1, got 0"):
        DuetConfig(str(tmp_path), repselect_components=0)
    with pytest.raises(ValueError, match=r"optim: wanted 'sgd', got 'adamw_torch.*Set optim: sgd"):
        DuetTrainer("/nowhere", config(tmp_path, objective="repselect"), forget_rows())
    with pytest.raises(ValueError, match="peft_config: 'repselect' changes the MLP matrices"):
        make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)}, **FIXED)
