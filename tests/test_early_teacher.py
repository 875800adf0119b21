"""Full fine-tuning without a second model: what is wanted of the untrained model is asked before the first step."""

import pytest
import torch
from learned_models import knowing
from peft import LoraConfig
from test_trainer import LORA, assert_same_weights, losses, make, state_of
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer

from duet import OBJECTIVES
from duet.config import DuetConfig
from duet.methods.views import asked_before_training
from duet.model.teacher import AdapterOffTeacher, EarlyTeacher, FrozenTeacher

STORABLE = ("npo", "npo_kl", "npo_sam", "graddiff_kl", "undial", "shred")
DEEP = {
    "objective": "duet_deep",
    "counterfactual_names": ["red river", "blue animal"],
    "num_counterfactuals": 2,
    "max_answer_tokens": 5,
}


def live(tmp_path, model=None, trainer_options=None, **options):
    """The same run with the base kept beside the student."""
    return make(
        tmp_path, model, trainer_options={"teacher_model": tiny()} | (trainer_options or {}), **options
    )


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        *((name, {}) for name in STORABLE),
        ("npo", {"positions": "text"}),
        ("undial", {"positions": "first_n", "num_positions": 2}),
        ("npo_kl", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        ("shred", {"trainer_options": {"processing_class": word_tokenizer(padding_side="left")}}),
    ],
)
def test_it_learns_what_a_model_kept_beside_it_teaches(tmp_path, objective, options):
    early = make(tmp_path / "early", objective=objective, **options)
    kept = live(tmp_path / "kept", objective=objective, **options)
    assert isinstance(early.teacher, EarlyTeacher) and isinstance(kept.teacher, FrozenTeacher)
    early.train()
    kept.train()
    assert losses(early) == pytest.approx(losses(kept), rel=1e-4, abs=1e-5)
    assert_same_weights(state_of(early.model), state_of(kept.model), rtol=0, atol=2e-3)


def test_deep_targets_need_no_second_model_either(tmp_path):
    early = make(tmp_path / "early", knowing(), **DEEP)
    kept = live(tmp_path / "kept", knowing(), trainer_options={"teacher_model": knowing()}, **DEEP)
    assert isinstance(early.teacher, EarlyTeacher)
    early.train()
    kept.train()
    assert losses(early) == pytest.approx(losses(kept), rel=1e-4)


def test_no_teacher_runs_after_the_first_step(tmp_path):
    trainer, calls = make(tmp_path, objective="npo"), []
    first, step = trainer.model.model.layers[0], trainer.training_step
    first.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def counted(*args, **kwargs):
        calls.clear()
        loss = step(*args, **kwargs)
        assert calls == [True], "one forward a step, the student's"
        return loss

    trainer.training_step = counted
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(RuntimeError, match="training has begun and no copy was kept"):
        trainer.ask_teacher(lambda model: model)


def test_at_the_first_step_the_model_is_its_own_reference(tmp_path):
    """log p_student = log p_base at every answer: NPO's first loss is (2 / beta) log 2, whatever the batch's padding."""
    trainer = make(tmp_path, objective="npo", npo_beta=0.5, max_steps=1)
    trainer.train()
    assert losses(trainer, "forget_loss") == pytest.approx([4 * 0.6931472], rel=1e-5)


def test_a_resumed_run_still_compares_with_the_base(tmp_path):
    """Not with the checkpoint, which is loaded before the first batch is drawn."""
    options = {"objective": "npo", "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert losses(resumed)[-1] == losses(whole)[-1]
    assert_same_weights(state_of(resumed.model), state_of(whole.model))
    resumed.train()  # again, from where it is
    assert losses(resumed)[0] < losses(whole)[0]


def test_rows_to_evaluate_on_are_asked_about_beforehand(tmp_path):
    rows = {"forget": forget_rows(3), "retain": retain_rows(3)}
    options = {"objective": "npo", "eval_strategy": "steps", "eval_steps": 1}
    early = make(tmp_path, trainer_options={"eval_dataset": rows}, **options)
    kept = live(tmp_path, trainer_options={"eval_dataset": rows}, **options)
    before = early.evaluate(forget_rows(2))
    assert before["eval_loss"] == pytest.approx(kept.evaluate(forget_rows(2))["eval_loss"], rel=1e-4)
    early.train()
    kept.train()
    for name in ("eval_forget_loss", "eval_retain_loss"):
        assert losses(early, name) == pytest.approx(losses(kept, name), rel=1e-3)
    with pytest.raises(
        RuntimeError, match=r"^eval_dataset: .*give all rows to DuetTrainer\(eval_dataset=...\)"
    ):
        early.evaluate(forget_rows(2))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"objective": "npo", "reverse_prompts": ["ignore"]}, FrozenTeacher),
        ({"objective": "npo", "prefills": ["yes"]}, FrozenTeacher),
        ({"objective": "duet"}, FrozenTeacher),
        ({"objective": "undo"}, FrozenTeacher),
        ({"objective": "rmu"}, FrozenTeacher),
        ({"objective": "npo", "trainer_options": {"peft_config": LoraConfig(**LORA)}}, AdapterOffTeacher),
        ({"objective": "npo"}, EarlyTeacher),
        ({"objective": "npo", "bf16_full_eval": True}, FrozenTeacher),  # an evaluation casts the model
        (DEEP, EarlyTeacher),
        (DEEP | {"reverse_prompts": ["ignore"]}, EarlyTeacher),  # its targets do not follow the view
    ],
)
def test_who_teaches(tmp_path, options, kind):
    assert type(make(tmp_path, **options).teacher) is kind


@pytest.mark.parametrize("framework", ["FSDP", "DEEPSPEED"])
def test_sharded_parameters_keep_a_copy(tmp_path, monkeypatch, framework):
    from duet.model.loading import is_sharded

    args = DuetConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert not is_sharded(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{framework}", "true")
    assert is_sharded(args)


def test_only_what_is_said_to_be_storable_is_stored():
    args = DuetConfig("out", use_cpu=True, report_to="none")
    early = {name for name, objective in OBJECTIVES.items() if asked_before_training(objective, args)}
    assert early == {*STORABLE, "duet_deep"}


# -- a copy of what is trained, and nothing else -----------------------------------------------------------------------


def test_a_frozen_copy_shares_what_is_not_trained(tmp_path):
    trainer = make(tmp_path, tiny(num_hidden_layers=5), objective="rmu", rmu_layer=2)
    own = dict(trainer.model.named_parameters())
    copied = {name for name, p in trainer.teacher.model.named_parameters() if p is not own[name]}
    assert copied == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 2)}
    before = state_of(trainer.teacher.model)
    trainer.train()
    assert_same_weights(state_of(trainer.teacher.model), before)


def test_a_perturbed_student_shares_nothing(tmp_path):
    """`undo` moves parameters that require no gradient, too."""
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    before = state_of(model)
    trainer = make(tmp_path, model, objective="undo", max_steps=1)
    assert_same_weights(state_of(trainer.teacher.model), before)
    assert not torch.equal(trainer.model.lm_head.weight, trainer.teacher.model.lm_head.weight)


# -- activations of a layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox", "phi"])
def test_the_last_layers_activations_are_those_before_the_norm(architecture):
    from duet.model.lm import check_layer, find_backbone, hidden_states_at

    model = tiny(architecture)
    assert check_layer(model, 1) == 1
    ids = torch.arange(5, 21).view(2, 8)
    mask, places = torch.ones_like(ids), torch.arange(16)
    backbone, seen = find_backbone(model), {}
    names = [n for n, child in backbone.named_children() if "norm" in n]
    for index, layer in enumerate(backbone.layers):
        layer.register_forward_hook(
            lambda module, args, output, index=index: seen.update(
                {index: output[0] if isinstance(output, tuple) else output}
            )
        )
    (norm,) = [getattr(backbone, name) for name in names]
    norm.register_forward_pre_hook(lambda module, args: seen.update(normed=args[0]))
    with torch.no_grad():
        final = hidden_states_at(model, ids, mask, places)
        whole = dict(seen)
        found = [hidden_states_at(model, ids, mask, places, layer=layer) for layer in (0, 1)]
    for layer in (0, 1):
        assert torch.equal(found[layer], whole[layer].flatten(0, 1))
    assert torch.equal(found[1], whole["normed"].flatten(0, 1)) and not torch.equal(found[1], final)
    assert len(backbone.layers) == 2, "and the model has its layers again"


def test_layers_above_the_chosen_one_do_not_run(tmp_path):
    """In neither model, with and without activation checkpointing, which runs a layer's forward in a forward of its own."""
    found = []
    for checkpointing in (False, True):
        trainer = make(
            tmp_path,
            tiny(num_hidden_layers=5),
            objective="rmu",
            rmu_layer=2,
            rmu_alpha=1.0,
            activation_checkpointing=checkpointing,
        )
        trainer.callback_handler.callbacks = [  # the guard looks at the last hidden states
            each for each in trainer.callback_handler.callbacks if type(each).__name__ != "TeacherGuard"
        ]
        ran = []
        for who, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
            for index, layer in enumerate(model.model.layers):
                layer.register_forward_hook(
                    lambda *_, who=who, index=index, ran=ran: ran.append((who, index))
                )
        trainer.train()
        assert set(ran) == {(who, index) for who in ("student", "teacher") for index in (0, 1, 2)}
        found.append((losses(trainer), losses(trainer, "grad_norm")))
    assert min(found[0][1]) > 0
    assert found[1] == (pytest.approx(found[0][0], rel=1e-5), pytest.approx(found[0][1], rel=1e-4))


def test_an_error_gives_the_layers_back():
    from duet.model.lm import hidden_states_at

    model = tiny()
    model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_states_at(
            model, torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2), torch.tensor([0]), layer=0
        )
    assert len(model.model.layers) == 2 and not model.model.layers[0]._forward_hooks


def test_a_model_without_a_list_of_layers_is_refused(monkeypatch):
    from duet.model.lm import check_layer

    model = tiny()
    model.config.num_hidden_layers = 7
    with pytest.raises(TypeError, match="model: no list of 7 decoder layers was found in LlamaModel"):
        check_layer(model, 1)
