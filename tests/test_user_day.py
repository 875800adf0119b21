"""What happens to a user on an ordinary bad day: odd rows, odd tokenizers, a wrong wrapper; and where the numbers go."""

import contextlib
import importlib.util
import json

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from test_trainer import PREFIX, losses, make
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer

from duet import DuetTrainer
from duet.data.rows import check_repeats, read_rows
from duet.model.loading import can_pack

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def dataset(rows):
    return read_rows(rows, "forget_dataset")


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, r"forget_dataset\[1\]: wanted exactly one of 'question', 'prompt' and 'messages', got the keys"),
        ({"question": ""}, r"forget_dataset\[1\]\['question'\]: wanted a text that is not empty"),
        ({"question": " \n"}, "wanted a text that is not empty"),
        ({"question": "who ?", "answer": ""}, r"\['answer'\]: wanted a text that is not empty"),
        ({"question": None, "answer": "ada"}, "wanted exactly one of"),
        ({"question": "who " * 300}, r"forget_dataset\[1\]: .* tokens, more than max_length=256"),
        ({"question": json.loads('"who \\ud800 ?"')}, r"forget_dataset\[1\]\['question'\]: "),
    ],
)
def test_odd_rows_are_named(tmp_path, row, message):
    rows = [forget_rows(1)[0], {"subject": "ada lovelace", **row}]
    with pytest.raises(ValueError, match=message):
        DuetTrainer(tiny(), make(tmp_path).args, rows, retain_rows(), word_tokenizer())


def test_a_row_to_forget_and_to_keep_is_refused(tmp_path):
    retain = [*retain_rows(2), {"question": f" {forget_rows(1)[0]['question'].upper()}"}]
    with pytest.raises(ValueError, match=r"retain_dataset\[2\]: .* got the question of forget_dataset\[0\]"):
        DuetTrainer(tiny(), make(tmp_path).args, forget_rows(), retain, word_tokenizer())


def test_repeated_rows_are_said(caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    check_repeats(dataset(forget_rows(6)), [])
    assert not caplog.text
    check_repeats(dataset(forget_rows(8)), [])
    assert "forget_dataset[6]: the same row as forget_dataset[0]; 2 of 8 rows" in caplog.text


@pytest.mark.parametrize(
    "objective, retain, said",
    [("duet", False, True), ("npo", False, True), ("ga", False, False), ("duet", True, False)],
)
def test_a_training_that_keeps_nothing_is_said(tmp_path, caplog, objective, retain, said):
    import transformers

    transformers.utils.logging.enable_propagation()
    make(tmp_path, retain=retain, objective=objective)
    named = f"retain_dataset (data.retain): got no rows, so that nothing says what objective {objective!r} is to keep"
    assert caplog.text.count(named) == said


@pytest.mark.parametrize("special", [{"bos_token": None}, {"pad": False}, {"bos_token": None, "pad": False}])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }} {% endfor %}"])
def test_tokenizers_without_bos_or_pad(tmp_path, special, template):
    tokenizer = word_tokenizer(chat_template=template, **special)
    trainer = make(tmp_path, trainer_options={"processing_class": tokenizer}, max_steps=4, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


# -- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp1_with_an_adapter_is_refused(tmp_path, monkeypatch, version):
    """Where the wrapper would leave the adapter on. A frozen copy is another module, and is let through."""
    create = DuetTrainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        self.is_fsdp_enabled = True
        monkeypatch.setattr(type(self.accelerator), "is_fsdp2", version == 2)

    monkeypatch.setattr(DuetTrainer, "create_accelerator_and_postprocess", sharded)
    refused = (
        pytest.raises(ValueError, match="fsdp_version: wanted 2, got 1")
        if version == 1
        else contextlib.nullcontext()
    )
    with refused:
        make(tmp_path, trainer_options={"peft_config": LORA})
    make(tmp_path)


# -- where the numbers go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_trackers_get_the_parts_of_the_loss(tmp_path, monkeypatch, tracker):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    seen = set()
    if tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        monkeypatch.setattr(SummaryWriter, "add_scalar", lambda self, name, *_, **__: seen.add(name))
    elif tracker == "wandb":
        from wandb.sdk.wandb_run import Run

        monkeypatch.setattr(Run, "log", lambda self, values, **_: seen.update(values))
    else:
        import trackio

        monkeypatch.setattr(trackio, "log", lambda values, **_: seen.update(values))
    make(tmp_path, report_to=tracker, project="duet").train()
    assert {"train/loss", "train/forget_loss", "train/retain_loss"} <= seen


def test_the_hub_is_the_trainers_own_switch(tmp_path, monkeypatch):
    """`push_to_hub: true` uploads what was saved, model card included; nothing is sent here."""
    sent = []
    monkeypatch.setattr(
        DuetTrainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/forgetful")
    )

    class Hub:
        def upload_folder(self, folder_path, **_):
            sent.append({path.name for path in (tmp_path / "out").iterdir()} if str(folder_path) else None)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make(tmp_path, trainer_options={"peft_config": LORA}, push_to_hub=True, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert sent and {"README.md", "adapter_model.safetensors"} <= sent[-1]


def test_the_model_card_says_how_and_from_what(tmp_path):
    trainer = make(tmp_path, trainer_options={"peft_config": LORA})
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("forgetful")
    card = (tmp_path / "out" / "README.md").read_text()
    shown = "# forgetful", "library_name: peft", "| objective |", "| k | 8 |", "| adapter_directions |"
    for words in (*shown, PREFIX.split("{")[0]):
        assert words in card
    for part in ("loss", "forget_loss", "retain_loss"):
        value = [entry[part] for entry in trainer.state.log_history if part in entry][-1]
        assert f"| {part} | {value:.6g} |" in card
    digests = [
        line.split("`")[1] for line in card.splitlines() if line.startswith(("| forget |", "| retain |"))
    ]
    assert len(set(digests)) == 2 and all(len(digest) == 64 for digest in digests)
    other = forget_rows()
    other[2]["answer"] = "nobody"
    again = DuetTrainer(tiny(), trainer.args, other, retain_rows(), word_tokenizer())
    assert again._fingerprints["forget"][1] != digests[0] and again._fingerprints["retain"][1] == digests[1]


def test_the_card_names_a_base_of_the_hub_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make(tmp_path, trainer_options={"peft_config": LORA})
    (tmp_path / "out").mkdir(exist_ok=True)
    trainer.args.teacher_store = str(tmp_path / "store")
    for name, shown in (("out", False), (f"{tmp_path}/gone", False), ("somebody/model", True)):
        trainer.model.get_base_model().config._name_or_path = name
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert (card.count(f"base_model: {name}") > 0) == shown and str(tmp_path) not in card


@pytest.mark.parametrize(
    "options, adapter, there, absent",
    [
        (
            {"objective": "undial", "undial_gamma": 7.5},
            LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            ["| undial_gamma | 7.5 |", "| k | 8 |", "LoHaConfig"],
            ["| delta |", "| npo_beta |", "LoRA"],
        ),
        (
            {"objective": "duet_kl", "clip": 0.25, "steering_place": "user", "retain_prefix": "none"},
            None,
            [
                "| clip | 0.25 |",
                PREFIX.split("{")[0],
                '| steering_place | "user" |',
                '| retain_prefix | "none" |',
            ],
            ["| delta |", "| beta |"],
        ),
        (
            {"objective": "simnpo", "simnpo_gamma": 0.25, "chat_template_kwargs": {"loud": True}},
            None,
            [
                "| simnpo_beta | 2.5 |",
                "| simnpo_gamma | 0.25 |",
                '{"loud": true}',
                '| trained | "all weights" |',
            ],
            ["| k |", "| temperature |", "| clip |", "| steering_", "| retain_prefix |"],
        ),
    ],
)
def test_the_model_card_tells_the_options_of_its_method(tmp_path, options, adapter, there, absent):
    trainer = make(tmp_path, trainer_options={"peft_config": adapter}, **options)
    (tmp_path / "out").mkdir(exist_ok=True)
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(words in card for words in there) and not any(words in card for words in absent)


@pytest.mark.parametrize(
    "dtype, adapter, said",
    [(torch.bfloat16, None, True), (torch.float32, None, False), (torch.bfloat16, LORA, False)],
)
def test_half_precision_weights_that_are_trained_are_said(tmp_path, caplog, dtype, adapter, said):
    import transformers

    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.get_logger("duet.model.loading").warning_once.__func__.cache_clear()
    make(tmp_path, tiny().to(dtype), trainer_options={"peft_config": adapter})
    wanted = (
        "weights are trained in bfloat16" in caplog.text
        and "model.dtype: float32 with bf16: true" in caplog.text
    )
    assert wanted == said


# -- padding-free batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, objective",
    [("llama", "duet"), ("gemma2", "npo"), ("neox", "duet"), ("qwen3", "npo"), ("gemma3", "duet"),
     ("mistral", "npo"), ("phi", "duet"), ("phi3", "npo")],
)  # fmt: skip
def test_packed_batches_are_padded_ones(tmp_path, architecture, objective):
    """Losses and gradients; sequences longer than a sliding window, too."""
    found = []
    for packed in (False, True):
        options = {
            "positions": "answer",
            "answer_source": "dataset",
            "padding_free": packed,
            "objective": objective,
        }
        trainer = make(tmp_path, tiny(architecture, spread=0.1), **options)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(0, 14, 2)])
        assert ("attention_mask" in batch) != packed and (len(batch["input_ids"]) == 1) == packed
        trainer.compute_loss(trainer.model, batch).backward()
        gradients = [p.grad for p in trainer.model.parameters()]
        found.append((trainer.compute_loss(trainer.model, batch).item(), gradients))
    (loss, gradients), (packed_loss, packed_gradients) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    whole = torch.stack([g.norm() for g in gradients]).norm()
    apart = torch.stack([(p - g).norm() for p, g in zip(packed_gradients, gradients, strict=True)]).norm()
    assert apart <= 1e-5 * whole


def test_a_packed_run_trains_and_evaluates(tmp_path):
    logged = []
    for packed in (False, True):
        options = {
            "trainer_options": {"eval_dataset": forget_rows(5)},
            "eval_strategy": "steps",
            "eval_steps": 1,
        }
        trainer = make(
            tmp_path, tiny(spread=0.1), padding_free=packed, per_device_eval_batch_size=2, **options
        )
        trainer.train()
        logged.append(losses(trainer) + losses(trainer, "eval_loss"))
    assert len(logged[0]) == 4 and logged[1] == pytest.approx(logged[0], rel=1e-4)


def test_packing_follows_flash_attn(tmp_path):
    trainer = make(tmp_path)
    assert not trainer.data_collator.packed and can_pack(trainer.model) == (
        False,
        "attn_implementation is sdpa",
    )
    trainer.model.config._attn_implementation = "flash_attention_2"
    assert can_pack(trainer.model) == (True, "attn_implementation is flash_attention_2")


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plain, steered, told",
    [
        ("you know nothing", "you know nothing", 3),
        ("you know nothing", "maybe", 0),
        ("ada", "yes a mathematician to you", 2),
    ],
)
def test_a_teacher_that_still_tells_is_named_before_training(
    tmp_path, monkeypatch, caplog, plain, steered, told
):
    """Where it answers as without the prefix, or with the row's answer: here that of every third row."""
    import transformers

    transformers.utils.logging.enable_propagation()
    asked = []

    def says(self, prompts, most):
        asked.extend(prompts)
        words = [plain] * (len(prompts) // 2) + [steered] * (len(prompts) // 2)
        return [word_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in words]

    monkeypatch.setattr(DuetTrainer, "teacher_says", says)
    forget = [
        row | ({} if told == 2 else {"answer": "the sea"}) for row in forget_rows(6 if told == 2 else 3)
    ]
    trainer = DuetTrainer(tiny(), make(tmp_path, max_steps=1).args, forget, None, word_tokenizer())
    trainer.train()
    query = trainer.train_dataset.prompt(0)
    assert asked[0] == query and asked[len(asked) // 2] == trainer.train_dataset.first_steered(0) != query
    named = f"the steered teacher answers {told} of {len(forget)} forget queries"
    assert (named in caplog.text) == bool(told)


def test_the_teacher_is_looked_at_when_it_is_cached(tmp_path, caplog):
    import transformers

    from duet.store.build import cache_teacher

    transformers.utils.logging.enable_propagation()
    args = make(tmp_path, steering_prefixes=["."]).args
    deaf = tiny()
    deaf.lm_head.weight.data[:] = deaf.lm_head.weight.data[:1]  # says the same to everything
    cache_teacher(deaf, args, forget_rows(2), None, word_tokenizer(), folder=tmp_path / "store")
    assert "the steered teacher answers 2 of 2 forget queries" in caplog.text
