"""`adapter_directions: contrast`: which directions A gets, by hand and from the inputs of a run; that they stay; refusals."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import LORA, assert_same_weights, config, losses, make, state_of
from tiny_models import forget_rows, tiny, word_tokenizer

from duet import DuetTrainer
from duet.methods import directions
from duet.methods.directions import contrast
from duet.model.adapters import adapter_layers

CONTRAST = {"adapter_directions": "contrast"}
WITH_LORA = {"peft_config": LoraConfig(**LORA)}


def downs(trainer):
    return [layer.lora_A["default"] for layer in adapter_layers(trainer.model)]


def test_what_both_have_in_common_is_left_out():
    """One direction of forget rows alone, however weak, beats a strong one that retain rows have, too."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6).double()).Q
    common, own, rest = axes[:, 0], axes[:, 1], axes[:, 2:]
    noise = 1e-3 * rest @ rest.T
    forget = 100 * torch.outer(common, common) + torch.outer(own, own) + noise
    retain = 100 * torch.outer(common, common) + noise
    [found] = contrast(forget, retain, 1)
    assert (found @ own).abs() > 0.999 * found.norm() and (found @ common).abs() < 1e-2 * found.norm()
    assert found @ forget @ found == pytest.approx((forget.trace() / 18).item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_few_retain_tokens_leave_no_rounding_to_divide_by(tokens):
    """Most eigenvalues of C_r are then rounding, of either sign: none of them may be lambda."""
    torch.manual_seed(tokens)
    sizes = torch.logspace(4, 0, 96, dtype=torch.float64)
    x, y = sizes * torch.randn(tokens, 96), sizes * torch.randn(30, 96)
    forget, retain = y.T @ y / 30, x.T @ x / tokens
    values = torch.linalg.eigvalsh(retain)
    assert values[0] < 0 and values[48].abs() < 1e-12 * values[-1]
    found = contrast(forget, retain, 4)
    louder = ((found @ forget) * found).sum(1) / ((found @ retain) * found).sum(1)
    assert (louder > 2 * forget.trace() / retain.trace()).all()


def test_directions_are_at_most_so_long():
    forget, retain = (torch.tensor(each).double().diag() for each in ([1e6, 1.0, 1e-6], [1e6, 1e-6, 1e-6]))
    [found] = contrast(forget, retain, 1)
    assert found.norm() == pytest.approx(20)


def test_a_stays_and_answers_forget_rows_louder_than_retain_rows(tmp_path):
    trainer = make(tmp_path, trainer_options=WITH_LORA, **CONTRAST)
    before = state_of(trainer.model)
    trainer.train()
    after = state_of(trainer.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert not any(down.weight.requires_grad for down in downs(trainer))
    assert any(".lora_B." in name for name in changed)

    # The first layer reads what it read before the training: embeddings, which do not change.
    down = downs(trainer)[0]
    dataset, loud = trainer.train_dataset, []
    for rows in (range(dataset.num_forget), range(dataset.num_forget, len(dataset))):
        seen = []
        hook = down.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(output.flatten(0, 1))
        )
        for i in rows:
            item = dataset[i]
            trainer.model(torch.tensor([[*item["student"], *item["answer"][:-1]]]))
        hook.remove()
        loud.append(torch.cat(seen).square().mean().item())
    assert loud[0] > 2 * loud[1], loud


def test_padding_and_the_size_of_batches_change_no_direction(tmp_path, monkeypatch):
    found = []
    for size, most in ((8, 1 << 30), (1, 1)):
        monkeypatch.setattr(directions, "_MOST_BYTES", most)
        options = {"max_steps": 1, "per_device_eval_batch_size": size, "learning_rate": 0.0}
        trainer = make(tmp_path / str(size), trainer_options=WITH_LORA, **CONTRAST, **options)
        trainer.train()
        found.append([down.weight.T @ down.weight for down in downs(trainer)])  # a sign says nothing
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_the_uses_of_rows_follow_from_the_seed(tmp_path):
    options = CONTRAST | {"objective": "npo", "prefills": ["yes", "no"]}
    found = []
    for seed in (0, 1):
        trainer = make(tmp_path, trainer_options=WITH_LORA, data_seed=seed, seed=seed, **options)
        trainer.prepare_rows(trainer.train_dataset)
        trainer._place(trainer._loras()[0][:1])
        found.append(downs(trainer)[0].weight)
    assert not torch.equal(*found)


def test_a_resumed_run_is_the_whole_run(tmp_path):
    options = CONTRAST | {"save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, trainer_options=WITH_LORA, **options)
    whole.train()
    resumed = make(tmp_path, trainer_options=WITH_LORA, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_same_weights(state_of(resumed.model), state_of(whole.model))
    assert losses(resumed)[-1] == losses(whole)[-1]


def test_a_layer_that_no_row_reaches_is_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, trainer_options=WITH_LORA, **CONTRAST)
    alone = [torch.nn.Linear(*sizes, bias=False) for sizes in ((4, 2), (2, 4))]
    monkeypatch.setattr(trainer, "_loras", lambda: [tuple(alone)])
    with pytest.raises(ValueError, match=r"adapter_directions: .*do not reach every layer"):
        trainer.train()


def test_where_it_cannot_work_it_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"adapter_directions: wanted 'drawn'.*no LoRA of linear layers is trained"
    ):
        make(tmp_path, **CONTRAST)
    trained = get_peft_model(tiny(), WITH_LORA["peft_config"])
    torch.nn.init.ones_(adapter_layers(trained)[0].lora_B["default"].weight)
    with pytest.raises(ValueError, match=r"adapter_directions: .*the LoRA changes the model already"):
        make(tmp_path, model=trained, **CONTRAST)
    with pytest.raises(ValueError, match=r"adapter_directions: .*no retain rows"):
        make(tmp_path, retain=False, trainer_options=WITH_LORA, **CONTRAST)
    with pytest.raises(ValueError, match=r"adapter_directions: wanted one of drawn, contrast, got 'null'"):
        DuetTrainer(
            tiny(), config(tmp_path, adapter_directions="null"), forget_rows(), None, word_tokenizer()
        )
