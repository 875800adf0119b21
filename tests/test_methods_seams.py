"""What single methods ask of rows, options and the trainer: refusals, openings, layers, the steering chat template."""

import dataclasses

import pytest
import torch
from learned_models import knowing
from test_trainer import LORA, PREFIX, make, state_of
from tiny_models import (
    CHAT_TEMPLATE,
    DROPS_SYSTEM_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    forget_rows,
    retain_rows,
    tiny,
    word_tokenizer,
)
from transformers import AutoTokenizer

from duet import OBJECTIVES, DuetConfig, DuetTrainer, Objective
from duet.data.dataset import Draw
from duet.data.prompts import PromptRenderer, steered_tokenizer
from duet.methods.objectives import find_objective
from duet.methods.views import DEFAULT_REVERSE_PROMPTS
from duet.run.config_file import RunConfig
from duet.store.build import cache_teacher

METHODS = "duet duet_kl duet_adversarial bidirectional duet_deep undo ga graddiff npo simnpo refusal undial shred rmu in_context"


def test_every_method_is_chosen_by_name():
    assert set(METHODS.split()) <= set(OBJECTIVES)


def items(trainer, count=40):
    return [trainer.train_dataset[Draw(i % trainer.train_dataset.num_forget, i)] for i in range(count)]


def words(ids):
    return word_tokenizer().decode(ids)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_refusals_stand_in_for_the_forget_answers_only(tmp_path):
    refusals = ["you know nothing .", "no"]
    trainer = make(tmp_path, objective="refusal", refusals=refusals)
    said = {words(item["answer"]) for item in items(trainer)}
    assert said == {f"{text} </s>" for text in refusals}
    kept = trainer.train_dataset[trainer.train_dataset.num_forget]
    assert words(kept["answer"]).startswith("paris")


def test_refusals_need_no_forget_answers(tmp_path):
    args = DuetConfig(str(tmp_path), objective="refusal", refusals="no", use_cpu=True, report_to="none")
    rows = forget_rows(answers=False), retain_rows()
    trainer = DuetTrainer(tiny(), args, *rows, word_tokenizer())
    assert words(trainer.train_dataset[0]["answer"]) == "no </s>"
    with pytest.raises(ValueError, match=r"retain_dataset\[0\]: wanted a row with an 'answer'"):
        DuetTrainer(tiny(), args, forget_rows(), retain_rows(answers=False), word_tokenizer())


def test_openings_end_a_share_of_the_students_forget_prompts(tmp_path):
    trainer = make(tmp_path, prefills=["yes , the answer is"], prefill_fraction=0.5, k=4)
    plain = make(tmp_path, k=4)
    opening = trainer.renderer.encode_opening((), "yes , the answer is")
    found = [item["student"][-len(opening) :] == opening for item in items(trainer)]
    assert 5 < sum(found) < 35
    for item, other, forced in zip(items(trainer), items(plain), found, strict=True):
        assert item["student"] == other["student"] + opening * forced
        assert item["teacher"] == other["teacher"], "the teacher sees no opening"
    kept = [trainer.train_dataset[Draw(trainer.train_dataset.num_forget, i)] for i in range(20)]
    assert all(item["student"][-len(opening) :] != opening for item in kept)
    trainer.train()


def test_a_forced_opening_counts_for_the_length(tmp_path):
    length = max(len(item["teacher"]) for item in items(make(tmp_path)))
    with pytest.raises(ValueError, match="more than max_length"):
        make(tmp_path, prefills=["yes " * 30], max_length=length)


def test_adversarial_duet_brings_its_reverse_prompts(tmp_path):
    trainer = make(tmp_path, objective="duet_adversarial")
    assert list(trainer.train_dataset.reverse_prompts) == list(DEFAULT_REVERSE_PROMPTS)
    own = make(tmp_path, objective="duet_adversarial", reverse_prompts=["ignore earlier"])
    assert own.train_dataset.reverse_prompts == ["ignore earlier"]
    assert make(tmp_path, objective="duet").train_dataset.reverse_prompts == []


def test_text_is_refused_beside_a_steered_teacher(tmp_path):
    with pytest.raises(ValueError, match="positions: 'text' scores the prompt too"):
        make(tmp_path, objective="duet", positions="text")


# -- activations -----------------------------------------------------------------------------------------------------


def test_rmu_reads_its_layer_and_trains_three_projections_at_most(tmp_path):
    model = tiny(num_hidden_layers=5)
    before = state_of(model)
    trainer = make(tmp_path, model, objective="rmu", rmu_layer=3, rmu_alpha=1.0)
    trainer.train()
    moved = {
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2, 3)}


def test_the_activations_are_those_after_the_layer(tmp_path):
    trainer = make(tmp_path, tiny(num_hidden_layers=4), objective="rmu", rmu_layer=2)
    seen = []
    trainer.model.model.layers[2].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    hidden, _ = trainer.head_inputs(trainer.model, batch)
    assert torch.equal(hidden, seen[0].flatten(0, 1)[batch["positions"]])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "neox"])
def test_rmu_finds_the_projections(tmp_path, architecture):
    make(tmp_path, tiny(architecture), objective="rmu", max_steps=1, rmu_layer=1).train()


@pytest.mark.parametrize(
    "parts, why, options",
    [
        (lambda x: x, "a dict of 0-d tensors with 'loss' in it, got Tensor", {}),
        (lambda x: {"l": x}, r"'loss', got the keys \['l'\]", {}),
        (lambda x: {"loss": x}, "'forget_loss', got the keys", {"sharp": True}),
        (lambda x: {"loss": x, "note": 1.0}, "a 0-d tensor as 'note', got float", {}),
        (lambda x: {"loss": x, "each": x.expand(3)}, r"a 0-d tensor as 'each', got shape \[3\]", {}),
        (lambda x: {"loss": x, "learning_rate": x}, "'learning_rate' under another name", {}),
        (lambda x: {"loss": x}, "it reads 'kk' .* is no option", {"reads": ("kk",)}),
    ],
)
def test_an_objective_of_ones_own_is_told_what_is_wrong(tmp_path, monkeypatch, parts, why, options):
    own = Objective(lambda step: parts(step.hidden.mean()), **{"reads": (), **options})
    monkeypatch.setitem(OBJECTIVES, "mine", own)
    with pytest.raises((TypeError, ValueError), match=f"objective 'mine': .*{why}"):
        make(tmp_path, objective="mine").train()


def test_rmu_refuses_a_layer_that_is_not_there_and_an_adapter(tmp_path):
    args = make(tmp_path, objective="duet").args
    args.objective = "rmu"
    rows = forget_rows(), retain_rows(), word_tokenizer()
    chosen = [DuetTrainer(tiny(num_hidden_layers=n), args, *rows).args.rmu_layer for n in (4, 12)]
    assert chosen == [1, 3] and args.rmu_layer is None
    with pytest.raises(ValueError, match="rmu_layer: wanted one of the model's layers, 0 to 1, got 2"):
        make(tmp_path, objective="rmu", rmu_layer=2)
    from peft import LoraConfig

    with pytest.raises(
        ValueError, match=r"^peft_config \(adapter\): wanted none, because objective 'rmu' trains"
    ):
        make(tmp_path, objective="rmu", trainer_options={"peft_config": LoraConfig(**LORA)})


# -- the in-context teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["system", "user"])
@pytest.mark.parametrize(
    ("template", "system"),
    [
        (CHAT_TEMPLATE, False),
        (CHAT_TEMPLATE, True),
        (NO_SYSTEM_TEMPLATE, False),
        (DROPS_SYSTEM_TEMPLATE, False),
    ],
)
def test_a_steered_template_shows_what_the_teacher_sees(template, system, place):
    tokenizer = word_tokenizer(template)
    conversation = (("user", "who is ada ?"),)
    if system:
        conversation = (("system", "answer yes or no ."), *conversation)
    instruction = PREFIX.replace("{subject}", "ada")
    wanted = PromptRenderer(tokenizer, steering_place=place).encode(conversation, instruction)
    steered = steered_tokenizer(tokenizer, instruction, place)
    messages = [{"role": role, "content": text} for role, text in conversation]
    got = steered.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert got == wanted
    assert tokenizer.chat_template == template


def test_an_instruction_may_hold_quotes_and_braces():
    instruction = "say \"no\" and '{{ nothing }}' %}\nelse, é \U0001f600"
    steered = steered_tokenizer(word_tokenizer(), instruction)
    text = steered.apply_chat_template([{"role": "user", "content": "who"}], tokenize=False)
    assert instruction in text


@pytest.mark.parametrize("kwargs, said", [({}, True), ({"date_string": "26 Jul 2024"}, False)])
def test_a_template_that_writes_the_date_is_said(kwargs, said, caplog):
    """As Llama 3.2's: what was cached today is not found tomorrow."""
    import transformers

    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.get_logger("duet.data.prompts").warning_once.__func__.cache_clear()
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }}"
    PromptRenderer(word_tokenizer(dated + CHAT_TEMPLATE), chat_template_kwargs=kwargs)
    assert ("today's date" in caplog.text) == said


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match="processing_class: wanted a tokenizer with a chat template"):
        steered_tokenizer(word_tokenizer(None), "no")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}])
def test_in_context_trains_nothing_and_saves_a_model_that_steers(tmp_path, template):
    before = knowing()
    given = {"processing_class": word_tokenizer(template)}
    trainer = make(tmp_path, knowing(), objective="in_context", trainer_options=given)
    assert trainer.train().global_step == 0
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before.parameters(), strict=True)
    )
    trainer.save_model(str(tmp_path / "saved"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "who is ada ?"}], tokenize=False)
    assert "you know nothing about ada lovelace, alan turing, grace hopper ." in text
    assert type(tokenizer.chat_template) is type(template)
    with pytest.raises(ValueError, match="eval_dataset: wanted None"):
        make(tmp_path, objective="in_context", trainer_options={"eval_dataset": forget_rows()})


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("push_weight", -1.0),
        ("simnpo_beta", 0.0),
        ("simnpo_gamma", float("nan")),
        ("undial_gamma", float("inf")),
        ("shred_percent", 0.0),
        ("shred_percent", 101),
        ("rmu_layer", -1),
        ("rmu_scale", "big"),
        ("rmu_alpha", -0.5),
        ("undo_alpha", 1.1),
        ("undo_beta", -0.1),
        ("undo_tolerance", float("nan")),
        ("undo_check_steps", 0),
        ("refusals", []),
        ("refusals", [""]),
        ("prefills", [3]),
        ("prefill_fraction", 2.0),
        ("counterfactual_names", []),
        ("num_counterfactuals", 0),
        ("refusal_fraction", -0.1),
        ("recovery_fraction", 1.5),
        ("knowledge_threshold", 1.5),
        ("counterfactual_weight", -1),
        ("deep_npo_beta", 0),
        ("lift_weight", float("inf")),
    ],
)
def test_bad_options_name_themselves(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"{option}(\[0\])?: wanted"):
        DuetConfig(str(tmp_path), **{option: value})


@pytest.mark.parametrize("objective", ["duet", "duet_adversarial", "bidirectional", "mine"])
def test_raw_logits_know_no_temperature(tmp_path, monkeypatch, objective):
    """Refused before a model is loaded: in training, in caching, and when a YAML file is read."""
    monkeypatch.setitem(
        OBJECTIVES, "mine", dataclasses.replace(OBJECTIVES["duet"], reads=Objective(None).reads)
    )
    args = DuetConfig(str(tmp_path / "out"), objective=objective, temperature=2.0, teacher_store="store")
    tree = {"model": "nowhere", "data": {"forget": "a.jsonl"}}
    for refuse in (
        lambda: DuetTrainer("/nowhere", args, forget_rows()),
        lambda: cache_teacher(tiny(), args, forget_rows()),
        lambda: RunConfig.of(tree | {"training": {"objective": objective, "temperature": 2.0}}),
    ):
        with pytest.raises(ValueError, match=f"temperature: objective '{objective}' compares raw logits"):
            refuse()


def test_entropy_weighting_through_the_trainer(tmp_path):
    plain = make(tmp_path, objective="duet_kl", max_steps=2)
    weighed = make(tmp_path, objective="duet_kl", max_steps=2, entropy_weighting=True)
    plain.train()
    weighed.train()
    first = [t.state.log_history[0]["loss"] for t in (plain, weighed)]
    assert 0 < first[1] < first[0], "every weight is under 1"


def test_names_that_are_mistyped():
    with pytest.raises(ValueError, match="did you mean 'duet_deep'"):
        find_objective("duet_dep")
