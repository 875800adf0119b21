"""A second unlearning request, and merges: whatever is done to an adapter, the model computes what it did before."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_trainer import make
from tiny_models import forget_rows, tiny, word_tokenizer
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import SaveStrategy
from typer.testing import CliRunner

from duet import cli
from duet.demo import checkpoint
from duet.evaluation import models
from duet.evaluation.attacks import weights
from duet.evaluation.commands import _trained_wordings
from duet.model import adapters
from duet.model.adapters import (
    adapter_layers,
    check_folder,
    check_same_logits,
    has_adapter,
    load_adapted,
    logits_of,
    merge_adapters,
)
from duet.model.loading import load_model
from duet.run import commands
from duet.run.commands import cache, make_trainer, merge_adapter, train
from duet.run.config_file import RunConfig
from duet.run.plan_report import DEFAULT_TREE, Plan

IDS = torch.tensor([[5, 9, 11, 30]])
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
OTHER = {"r": 2, "target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def moved(model, wanted):
    return (logits(model) - wanted).abs().max().item()


def shaken(model, seed=0):
    """The model with an adapter that says something."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if (
            "lora_B" in name
            or "lora_embedding_A" in name
            or "lora_embedding_B" in name
            or "modules_to_save" in name
        ):
            parameter.data.normal_(0, 0.3)
    return model


def save_base(folder, **options):
    tiny(**options).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def adapted_folder(tmp_path, name="first", lora=None, **options):
    base = save_base(tmp_path / f"base_of_{name}", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora or LORA))
    shaken(model).save_pretrained(tmp_path / name)
    word_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path / name, logits(model), base


def request(tmp_path, model, name, rows, **more):
    """One request as `duet train` runs it."""
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "output_dir": str(tmp_path / name), "k": 8, "max_steps": 2, "learning_rate": 5e-2, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    tree = {"model": str(model), "data": {"forget": str(path)}, "adapter": LORA, "training": training}
    for key, value in more.items():
        tree[key] = value | tree.get(key, {}) if isinstance(value, dict) else value
    return RunConfig.of(tree)


def test_three_requests_follow_each_other(tmp_path):
    """Each starts from what the one before does; each folder, read in any way, is what was trained there."""
    rows = forget_rows(3)
    model = save_base(tmp_path / "base")
    before = logits(AutoModelForCausalLM.from_pretrained(model))
    for number, row in enumerate(rows):
        run = request(tmp_path, model, f"request{number}", [row])
        starts = load_model(model, "model", None)
        assert moved(starts, before) < 1e-4
        trainer = train(run)
        after = logits(trainer.model)
        assert (after - before).abs().max() > 1e-2, "something was learnt"
        with trainer.model.disable_adapter():
            assert moved(trainer.model, before) < 1e-4, "the teacher is the model of the request before"
        folder = tmp_path / f"request{number}"
        for read in (
            models.load(folder, device="cpu")[0],
            AutoPeftModelForCausalLM.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(folder),
            merge_adapter(folder, tmp_path / f"merged{number}"),
            AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}"),
        ):
            assert moved(read, after) < 1e-4
        model, before = str(folder), after


def test_a_folder_that_was_moved_still_knows_its_base(tmp_path):
    first, _, _ = adapted_folder(tmp_path)
    trained = logits(train(request(tmp_path, first, "second", forget_rows(1))).model)
    (tmp_path / "second").rename(tmp_path / "moved")
    assert moved(models.load(tmp_path / "moved", device="cpu")[0], trained) < 1e-4
    assert moved(load_model(str(tmp_path / "moved"), "model", None), trained) < 1e-4


def test_an_adapter_on_a_relative_base_is_found_from_everywhere(tmp_path, monkeypatch):
    """In another working directory the same relative path may be another model, or none."""
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    trained = logits(train(request(tmp_path, "base", "first", forget_rows(1))).model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert moved(models.load(tmp_path / "first", device="cpu")[0], trained) < 1e-4


def test_an_adapter_on_an_adapter_is_read_as_it_was_trained(tmp_path):
    """Others save the folder of the first adapter as the base of the second."""
    first, wanted, _ = adapted_folder(tmp_path)
    on_top = shaken(get_peft_model(load_model(str(first), "model", None), LoraConfig(**OTHER)), 1)
    both = logits(on_top)
    on_top.save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first)
    assert (both - wanted).abs().max() > 1e-2
    assert moved(load_adapted(tmp_path / "second"), both) < 1e-4


@pytest.mark.parametrize("given, objective", [("folder", "duet"), ("attached", "npo"), ("frozen", "ga")])
def test_a_run_starts_from_the_adapter_that_is_there(tmp_path, given, objective):
    first, wanted, base = adapted_folder(tmp_path)
    model = {
        "folder": lambda: str(first),
        "attached": lambda: AutoModelForCausalLM.from_pretrained(first),
        "frozen": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first),
    }[given]()
    for adapter in (LoraConfig(**OTHER), None):
        if given == "frozen" and adapter is None:
            with pytest.raises(ValueError, match=r"model: wanted weights that can be trained, .* is frozen"):
                make(tmp_path, PeftModel.from_pretrained(tiny(), first), objective=objective)
            continue
        if given == "attached":
            model = AutoModelForCausalLM.from_pretrained(first)
        trainer = make(
            tmp_path / str(adapter is None),
            model,
            trainer_options={"peft_config": adapter},
            objective=objective,
        )
        assert moved(trainer.model, wanted) < 1e-4
        trainer.train()
        assert moved(trainer.model, wanted) > 1e-4
        trainer.save_model()
        trained = logits(trainer.model)
        assert moved(models.load(trainer.args.output_dir, device="cpu")[0], trained) < 1e-4


def test_a_cached_teacher_is_the_model_of_the_first_request(tmp_path):
    first, _, _ = adapted_folder(tmp_path)
    run = request(tmp_path, first, "second", forget_rows(2))
    run.training.teacher_store = str(tmp_path / "store")
    cache(run)
    cached = train(run).state.log_history
    live = train(request(tmp_path, first, "second_live", forget_rows(2))).state.log_history
    assert cached[-1]["train_loss"] == pytest.approx(live[-1]["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "names, trained",
    [
        (["foo"], "foo"),
        (["default", "second"], "second"),
        (["second", "default"], "second"),
        (["default", "second"], "default"),
    ],
)
def test_the_trained_adapter_is_what_is_saved_whatever_its_name(tmp_path, names, trained):
    """Folder and checkpoint, read in any way, are the model that was trained; the checkpoint is resumed."""
    base = save_base(tmp_path / "base")
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
    }

    def trainer(steps, **more):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, LoraConfig(**(LORA if names[0] == trained else OTHER)), names[0])
        for name in names[1:]:
            model.add_adapter(name, LoraConfig(**(LORA if name == trained else OTHER)))
        shaken(model).set_adapter(trained)
        for name, parameter in model.named_parameters():
            if f"lora_B.{trained}." in name:  # it starts as it would without the other
                parameter.data.zero_()
        return make(tmp_path, model, max_steps=steps, **options, **more)

    first = trainer(1)
    first.train()
    first.save_model()
    first.create_model_card()
    out, after = tmp_path / "out", logits(first.model)
    for folder in (out, out / "checkpoint-1"):
        for read in (models.load(folder, device="cpu")[0], AutoModelForCausalLM.from_pretrained(folder)):
            assert moved(read, after) <= 1e-5 * after.abs().max()
    assert {path.parent for path in out.rglob("adapter_*")} == {out, out / "checkpoint-1"}
    assert json.loads((out / "run_record.json").read_text())["adapter.r"] == LORA["r"]
    resumed, whole = trainer(2), trainer(2, output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    whole.train()
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_several_active_adapters_are_refused(tmp_path):
    model = get_peft_model(tiny(), LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**OTHER))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(
        ValueError, match=r"model: wanted .* one active adapter, .* \['default', 'second'\] active"
    ):
        make(tmp_path, model)


def test_a_peft_config_is_not_written_into(tmp_path):
    given = LoraConfig(r=2, target_modules="all-linear")
    before = given.to_dict()
    for layers in (2, 3):
        model = make(tmp_path, tiny(num_hidden_layers=layers), trainer_options={"peft_config": given}).model
        assert (
            len({name.split(".layers.")[1][0] for name, _ in model.named_parameters() if "lora_A" in name})
            == layers
        )
    assert given.to_dict() == before


# -- merges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, tied",
    [
        (LORA, False),
        (LORA, True),
        ({"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, True),
        ({"r": 4, "target_modules": ["lm_head", "q_proj"]}, True),
        ({"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"r": 4, "target_modules": ["q_proj"], "use_dora": True}, False),
    ],
)
def test_a_merge_is_the_model_that_was_examined(tmp_path, lora, tied):
    folder, wanted, _ = adapted_folder(
        tmp_path, lora=lora | {"task_type": "CAUSAL_LM"}, tie_word_embeddings=tied
    )
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base_of_first")
    assert moved(before, wanted) > 1e-2
    merged = merge_adapter(folder, tmp_path / "merged")
    assert moved(merged, wanted) < 1e-3 and not has_adapter(merged)
    assert moved(load_model(str(folder), "model", None), wanted) < 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(
        folder
    )  # transformers 5.17 loses modules_to_save of a tied model
    wanted = logits(loaded)
    assert moved(merge_adapters(loaded), wanted) < 1e-3


@pytest.mark.parametrize("target", ["embed_tokens", "q_proj"])
def test_the_attack_merged_asks_the_same_model_and_leaves_it(tmp_path, target):
    model = tiny(tie_word_embeddings=True)
    shared = model.lm_head.weight
    model = shaken(get_peft_model(model, LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM")))
    wanted = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with weights.merged(model):
        assert moved(model, wanted) < 1e-3
    assert torch.equal(logits(model), wanted)
    assert model.get_output_embeddings().weight is shared
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def in_half(tmp_path, size, **record):
    """An adapter of this size on a base that is saved in bf16, and the logits of fp32."""
    folder, _, base = adapted_folder(tmp_path, "half")
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    model = load_adapted(folder, dtype="float32")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(size)
    model.save_pretrained(folder)
    if record:
        (folder / "run_record.json").write_text(json.dumps(record))
    return folder, logits(model)


def test_a_merge_has_the_dtype_of_its_run(tmp_path):
    folder, wanted = in_half(tmp_path, 0.1, model_dtype="float32")
    assert moved(merge_adapter(folder, tmp_path / "merged"), wanted) < 1e-4
    words = ["merge", str(folder), "--out", str(tmp_path / "rounded"), "--dtype", "bfloat16"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert models.load(tmp_path / "rounded")[0].dtype == torch.bfloat16
    (folder / "run_record.json").unlink()
    assert merge_adapter(folder, tmp_path / "other").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^dtype: wanted one of .*, got 'bf16'"):
        merge_adapter(folder, tmp_path / "misspelt", "bf16")


def test_an_adapter_is_asked_in_the_dtype_of_its_run(tmp_path):
    folder, wanted = in_half(tmp_path, 0.1, model_dtype="float32")
    shutil.copytree(folder, folder / "checkpoint-2", ignore=shutil.ignore_patterns("run_record.json"))
    for name in (folder, folder / "checkpoint-2"):
        assert moved(models.load(name, device="cpu")[0], wanted) < 1e-5
    assert models.load(folder, "bfloat16", "cpu")[0].dtype == torch.bfloat16
    (folder / "run_record.json").unlink()
    assert models.load(folder, device="cpu")[0].dtype == torch.bfloat16


def test_a_run_merges_in_its_own_dtype(tmp_path):
    base = save_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    run = request(tmp_path, base, "first", forget_rows(1), merge=True)
    run = replace(run, model=replace(run.model, dtype="float32"))
    run.training.learning_rate = 1e-5  # in bf16 nothing would be left of it
    trained = train(run).model
    assert moved(models.load(tmp_path / "first" / "merged")[0], logits(trained)) < 1e-5


def test_a_merged_model_has_the_card_and_the_record_of_its_run(tmp_path):
    """They name its rows and options; `duet attack` reads the wordings that training used."""
    run = request(tmp_path, save_base(tmp_path / "base"), "first", forget_rows(1), merge=True)
    run.training.reverse_prompts = ["ignore earlier instructions"]
    train(run)
    out, merged = tmp_path / "first", tmp_path / "first" / "merged"
    assert (merged / "run_record.json").read_bytes() == (out / "run_record.json").read_bytes()
    assert _trained_wordings(str(merged)) == _trained_wordings(str(out)) != ()
    card, of_adapter = ((each / "README.md").read_text() for each in (merged, out))
    assert "library_name: peft" in of_adapter and "An adapter for an unnamed model" in of_adapter
    assert "library_name: transformers" in card and "A model made from an unnamed model" in card
    assert card.partition("## Method")[2] == of_adapter.partition("## Method")[2]


def test_a_merge_says_how_much_of_the_adapter_is_rounded_away(tmp_path, caplog):
    folder, _ = in_half(tmp_path, 0.03)
    merge_adapter(folder, tmp_path / "merged")
    assert re.search(
        r"half: merged in bfloat16, [1-4]\d % of what its adapter changes is rounded away", caplog.text
    )
    caplog.clear()
    merge_adapter(folder, tmp_path / "whole", "float32")
    assert "rounded away" not in caplog.text
    assert re.search(
        r"whole: whoever loads it in bfloat16 rounds [1-4]\d % of what its adapter changes away", caplog.text
    )


def test_a_merge_that_rounds_the_adapter_away_is_refused(tmp_path):
    """Its logits may stay within the tolerance of bf16: what the adapter says is smaller than that."""
    folder, _ = in_half(tmp_path, 1e-3)
    for work in (
        lambda: merge_adapter(folder, tmp_path / "merged"),
        lambda: load_model(str(folder), "model", {"dtype": torch.bfloat16}),
    ):
        with pytest.raises(
            ValueError,
            match=r"9\d % of what its adapter changes .* told again; wanted float32: `duet merge ADAPTER --out NEW --dtype",
        ):
            work()
    assert not (tmp_path / "merged").exists()
    merge_adapter(folder, tmp_path / "merged", "float32")


def test_what_is_no_merge_to_be_published_is_not_refused(tmp_path, caplog):
    """An adapter on top of another one is loaded; a run that is over ends well, with its adapter and a warning."""
    folder, _ = in_half(tmp_path, 1e-3)
    above = Path(shutil.copytree(folder, tmp_path / "above"))
    config = json.loads((above / "adapter_config.json").read_text())
    (above / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    assert adapters.load_adapted(above, dtype=torch.bfloat16).peft_config
    assert "of what its adapter changes is rounded away" in caplog.text
    caplog.clear()
    merge_adapter(folder, tmp_path / "merged", replaces=True)
    assert "9" in caplog.text and "of what its adapter changes is rounded away" in caplog.text


def test_a_wrong_argument_of_the_base_is_not_a_damaged_folder(tmp_path):
    with pytest.raises(TypeError):
        load_model(str(save_base(tmp_path / "base")), "model", {"no_such_argument": 1})


def test_a_merge_that_changes_the_model_is_refused(tmp_path, monkeypatch):
    folder, _, _ = adapted_folder(tmp_path)
    from peft.tuners.lora import Linear

    merge = Linear.merge
    monkeypatch.setattr(
        Linear, "merge", lambda self, *a, **k: (merge(self, *a, **k), self.weight.data.mul_(1.001))[0]
    )
    for work in (
        lambda: merge_adapter(folder, tmp_path / "merged"),
        lambda: load_model(str(folder), "model", None),
        lambda: weights.merged(load_adapted(folder)).__enter__(),
    ):
        with pytest.raises(ValueError, match="merging its adapter: changed the model: its logits moved by"):
            work()


@pytest.mark.parametrize("stops_in", ["saving", "comparing"])
def test_a_merge_that_does_not_end_leaves_no_model(tmp_path, stops_in, monkeypatch):
    folder, _, _ = adapted_folder(tmp_path)
    (tmp_path / "merged.new").mkdir()  # the user's own
    with monkeypatch.context() as patch:
        if stops_in == "saving":
            patch.setattr(type(word_tokenizer()), "save_pretrained", lambda *_, **__: 1 / 0)
        else:
            compare = commands.check_same_logits
            patch.setattr(
                commands, "check_same_logits", lambda *a: 1 / 0 if "merged model" in a[2] else compare(*a)
            )
        with pytest.raises(ZeroDivisionError):
            merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged.*"))
    merged = merge_adapter(folder, tmp_path / "merged")
    assert merged.name_or_path == str(tmp_path / "merged") and (tmp_path / "merged.new").is_dir()
    assert (tmp_path / "merged").stat().st_mode & 0o777 == (tmp_path / "merged.new").stat().st_mode & 0o777
    assert moved(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logits(merged)) < 1e-6


def test_the_logits_are_compared_to_five_digits():
    model = tiny()
    wanted = logits_of(model)
    check_same_logits(model, wanted, "nothing")
    with pytest.raises(ValueError, match="a change: changed the model"):
        check_same_logits(model, wanted * (1 + 1e-4), "a change")
    with pytest.raises(ValueError, match="a change"):
        check_same_logits(model, wanted * torch.nan, "a change")
    half = tiny().bfloat16()
    check_same_logits(half, wanted, "rounding to half precision", torch.bfloat16)


def test_an_adapter_that_is_no_change_of_weights_is_named(tmp_path):
    model = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="model: wanted an adapter that can be merged into its base"):
        merge_adapters(model)


@pytest.mark.parametrize(
    "options, why",
    [
        (
            {"modules_to_save": ["lm_hed"]},
            r"\(adapter.modules_to_save\): the model has no module 'lm_hed'.*'lm_head'",
        ),
        (
            {"target_modules": ["q_proj", "v_prj"]},
            r"\(adapter.target_modules\): the model has no module 'v_prj'.*'v_proj'",
        ),
        ({"task_type": "SEQ_CLS"}, r"\(adapter.task_type\): wanted 'CAUSAL_LM', got 'SEQ_CLS'"),
    ],
    ids=["saved", "targets", "task"],
)
def test_an_adapter_that_would_not_be_what_was_asked_for_is_refused(tmp_path, options, why):
    """peft takes them in silence: two names are not trained, and what is of another task is saved and cannot be loaded."""
    with pytest.raises(ValueError, match=f"^peft_config {why}"):
        make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA | options)})


def test_one_list_of_modules_may_be_for_several_families(tmp_path, caplog):
    lora = LoraConfig(**LORA | {"target_modules": ["q_proj", "word_embeddings_of_another"]})
    trainer = make(tmp_path, trainer_options={"peft_config": lora})
    assert "the model has no module 'word_embeddings_of_another'" in caplog.text
    assert any("q_proj.lora_A" in name for name, _ in trainer.model.named_parameters())


def test_a_merged_model_of_an_earlier_run_is_met_before_the_training(tmp_path):
    base = save_base(tmp_path / "base")
    run = request(tmp_path, base, "first", forget_rows(1), merge=True)
    train(run)
    before = (tmp_path / "first" / "adapter_model.safetensors").read_bytes()
    run.training.learning_rate = 1e-2
    with pytest.raises(
        ValueError, match=r"^merge: '.*merged' holds a model already; wanted another training"
    ):
        train(run)
    again = replace(run, model=replace(run.model, name=str(tmp_path / "first" / "merged")))
    with pytest.raises(ValueError, match=r"^out: '.*merged' is the base of the adapter"):
        train(again, resume=True)
    assert (tmp_path / "first" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_sharded_model_is_not_asked_by_the_one_process_that_merges(tmp_path, monkeypatch, fsdp):
    """Its forward gathers weights from the others, which make none."""
    run, trainer, compared = request(tmp_path, "base", "first", forget_rows(1), merge=True), Mock(), []
    run.training.fsdp = fsdp
    monkeypatch.setattr(commands, "make_trainer", lambda run: trainer)
    monkeypatch.setattr(commands, "merge_adapter", lambda *_, trained, **__: compared.append(trained))
    train(run)
    assert compared == [None if fsdp else trainer.accelerator.unwrap_model()]


def test_a_resumed_run_replaces_its_merged_model(tmp_path):
    run = request(tmp_path, save_base(tmp_path / "base"), "first", forget_rows(2), merge=True)
    run.training.save_strategy, run.training.save_steps = SaveStrategy.STEPS, 1
    half, merged = logits(train(run).model), tmp_path / "first" / "merged"
    (merged / "notes.txt").write_text("mine")
    (merged / "model-00001-of-00002.safetensors").write_text("of a version that wrote two files")
    run.training.max_steps = 4
    after = logits(train(run, resume=True).model)
    assert (after - half).abs().max() > 1e-2
    assert moved(AutoModelForCausalLM.from_pretrained(merged), after) < 1e-4
    assert (merged / "notes.txt").read_text() == "mine" and not list(merged.glob("model-*"))
    assert not list((tmp_path / "first").glob(".merged.*"))


# -- folders ---------------------------------------------------------------------------------------------------------


def test_weights_and_an_adapter_never_share_a_folder(tmp_path):
    folder, _, base = adapted_folder(tmp_path)
    with pytest.raises(ValueError, match=r"out: '.*first' holds an adapter, .*merged'$"):
        merge_adapter(folder, folder)
    second, _, _ = adapted_folder(tmp_path, "second")
    with pytest.raises(ValueError, match=r"out: '.*second' holds an adapter"):
        merge_adapter(folder, second)
    assert not list(folder.glob("model*.safetensors"))
    with pytest.raises(ValueError, match=r"output_dir: .* is the model that is trained"):
        make_trainer(request(tmp_path, folder, "first", forget_rows(1)))
    with pytest.raises(ValueError, match=r"output_dir: .* holds an adapter"):
        check_folder(folder, adapter=False)
    with pytest.raises(ValueError, match=r"output_dir: .* holds the weights of a model"):
        check_folder(base, adapter=True)
    check_folder(folder, adapter=True)
    check_folder(base, adapter=False)


def test_a_trainer_does_not_mix_the_kinds(tmp_path):
    adapter = make(tmp_path, trainer_options={"peft_config": LoraConfig(**LORA)}, max_steps=1)
    whole = make(tmp_path, max_steps=1)
    adapter.save_model()
    for work in (whole.save_model, whole.train):
        with pytest.raises(ValueError, match=r"output_dir: .* holds an adapter, and the weights of a model"):
            work()
    whole.save_model(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"output_dir: .* holds the weights of a model, and an adapter"):
        adapter.save_model(str(tmp_path / "whole"))


# -- an earlier adapter that is kept beside the weights ----------------------------------------------------------------


def keeping(tmp_path, model, name, rows, lora=LORA):
    run = request(tmp_path, model, name, rows)
    run.training.earlier_adapter = "keep"
    return replace(run, adapter=lora)


def test_three_requests_can_be_kept_as_one_adapter(tmp_path):
    """As `test_three_requests_follow_each_other`, with adapters of other layers and ranks, and one base that nobody copies."""
    base = save_base(tmp_path / "base")
    model, before = base, logits(AutoModelForCausalLM.from_pretrained(base))
    for number, (row, lora) in enumerate(
        zip(forget_rows(3), (LORA, OTHER, LORA | {"use_rslora": True, "lora_alpha": 3}), strict=True)
    ):
        run = keeping(tmp_path, model, f"request{number}", [row], lora)
        trainer = train(run)
        after, folder = logits(trainer.model), tmp_path / f"request{number}"
        assert (after - before).abs().max() > 1e-2, "something was learnt"
        with trainer.model.disable_adapter():
            assert moved(trainer.model, before) <= 1e-5 * before.abs().max(), (
                "the teacher is the model before"
            )
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base and not (folder / "base").exists()
        for read in (
            models.load(folder, device="cpu")[0],
            AutoPeftModelForCausalLM.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(folder),
            load_model(str(folder), "model", None, earlier="keep"),
            merge_adapter(folder, tmp_path / f"merged{number}"),
            *([load_adapted(folder / "on_top")] if number else []),
        ):
            assert moved(read, after) <= 1e-5 * after.abs().max()
        model, before = str(folder), after
    ranks = {
        len(layer.lora_A["default"].weight) for layer in adapter_layers(models.load(folder, device="cpu")[0])
    }
    assert ranks == {4 + 4, 2}


def test_a_run_that_keeps_is_resumed_and_cached(tmp_path):
    first, _, base = adapted_folder(tmp_path)

    def steady(name):
        run = keeping(tmp_path, first, name, forget_rows(2))
        run.training.lr_scheduler_type = "constant"
        return run

    whole, run = train(steady("whole")), steady("parts")
    run.training.save_strategy, run.training.max_steps, run.training.save_steps = SaveStrategy.STEPS, 1, 1
    half = logits(train(run).model)
    assert (
        moved(models.load(tmp_path / "parts" / "checkpoint-1", device="cpu")[0], half)
        <= 1e-5 * half.abs().max()
    )
    run.training.max_steps = 2
    assert torch.equal(logits(train(run, resume=True).model), logits(whole.model))

    run = steady("second")
    run.training.teacher_store = str(tmp_path / "store")
    cache(run)
    assert torch.allclose(logits(train(run).model), logits(whole.model), atol=1e-4)
    with pytest.raises(
        ValueError, match="weights"
    ):  # the store is of the first request's model, not of the base
        make_trainer(replace(run, model=replace(run.model, name=base)))


@pytest.mark.parametrize("given", ["attached", "frozen"])
def test_an_adapter_in_memory_is_kept(tmp_path, given):
    first, wanted, base = adapted_folder(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(first if given == "attached" else base)
    model = plain if given == "attached" else PeftModel.from_pretrained(plain, first)
    options = {"trainer_options": {"peft_config": LoraConfig(**OTHER)}, "earlier_adapter": "keep"}
    trainer = make(tmp_path, model, **options)
    assert moved(trainer.model, wanted) <= 1e-5 * wanted.abs().max()
    trainer.train()
    trainer.save_model()
    trained = logits(trainer.model)
    assert (
        moved(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"), trained)
        <= 1e-5 * trained.abs().max()
    )


@pytest.mark.parametrize(
    "earlier, new, why",
    [
        (LORA | {"use_dora": True}, LORA, "the adapter that is there has use_dora=True"),
        (LORA, LORA | {"use_dora": True}, "the new adapter has use_dora=True"),
        (LORA, LORA | {"modules_to_save": ["lm_head"]}, "the new adapter has modules_to_save="),
        (
            LORA,
            LORA | {"init_lora_weights": "pissa"},
            "the new adapter has init_lora_weights='pissa', which changes",
        ),
        (
            LORA | {"target_modules": ["embed_tokens"]},
            LORA,
            "the adapter changes model.embed_tokens, a Embedding",
        ),
        (LORA, None, "because no new adapter is put on top"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, earlier, new, why):
    first, _, _ = adapted_folder(tmp_path, lora=earlier)
    peft_config = None if new is None else LoraConfig(**new)
    with pytest.raises(ValueError, match=f"earlier_adapter: wanted 'merge', got 'keep'.* {why}"):
        make(tmp_path, str(first), trainer_options={"peft_config": peft_config}, earlier_adapter="keep")


def test_the_base_of_another_run_is_not_taken(tmp_path):
    """`base` beside an adapter is what it is loaded on."""
    first, _, base = adapted_folder(tmp_path)
    train(request(tmp_path, first, "second", forget_rows(1)))
    for run in (
        keeping(tmp_path, first, "second", forget_rows(1)),
        request(tmp_path, base, "second", forget_rows(1)),
    ):
        with pytest.raises(
            ValueError, match=r"output_dir: .*base' is the base of an adapter that an earlier run saved"
        ):
            make_trainer(run)


def test_an_evaluation_named_base_is_no_base(tmp_path):
    """`duet eval BASE --out out/mine/base`: the folder holds no model."""
    first, wanted, base = adapted_folder(tmp_path)
    for folder in (first, tmp_path / "second"):
        (folder / "base").mkdir(parents=True)
        (folder / "base" / "metrics.json").write_text("{}")
    for read in (
        models.load(first, device="cpu")[0],
        load_model(str(first), "model", None),
        load_model(str(first), "model", None, earlier="keep"),
        merge_adapter(first, tmp_path / "merged"),
    ):
        assert moved(read, wanted) < 1e-3
    train(request(tmp_path, base, "second", forget_rows(1)))
    assert load_adapted(tmp_path / "second")


# -- code of a model's own ---------------------------------------------------------------------------------------------

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = {config}
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_own_code(folder, ran, file, change, config="OwnConfig"):
    """A model whose `file` names the classes of own.py, which leaves a mark at `ran` when it runs."""
    save_base(folder)
    (folder / "own.py").write_text(OWN_CODE.format(ran=str(ran), config=config))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    return str(folder)


OWN_MODEL = {
    "model_type": "own",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
}
OWN_TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
# A family that transformers knows, of which it has no causal language model.
OWN_HEAD = {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
CODE = r"trust_remote_code|Unrecognized"
PLAN = {"memory": 2**30, "length": 8, "prefix_length": 0, "scored": 1, "reserve": 0}


@pytest.fixture
def yes(tmp_path, monkeypatch):
    """Whoever asks whether code may run is told so; classes that ran are copied into the test's folder."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("yes")
def test_code_of_a_model_does_not_run_unasked(tmp_path):
    """Also not when somebody would answer yes: such a yes may be the first question of `duet chat`."""
    ran, adapter = tmp_path / "ran", adapted_folder(tmp_path)[0]
    own = with_own_code(tmp_path / "own", ran, "config.json", OWN_MODEL)
    head = with_own_code(tmp_path / "head", ran, "config.json", OWN_HEAD)
    reader = with_own_code(tmp_path / "reader", ran, "tokenizer_config.json", OWN_TOKENIZER)
    told = json.loads((adapter / "adapter_config.json").read_text())
    on_top = tmp_path / "on_top"
    shutil.copytree(adapter, on_top)
    (on_top / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(adapter)}))
    (adapter / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": own}))
    beside = tmp_path / "beside"
    shutil.copytree(adapter, beside)
    shutil.copytree(own, beside / "base")
    for name in (own, head, adapter, on_top, beside):
        with pytest.raises(FileNotFoundError, match=CODE):
            models.load(name, device="cpu")
        with pytest.raises(FileNotFoundError, match=CODE):
            load_model(str(name), "model", None)
        with pytest.raises((FileNotFoundError, ValueError), match=CODE):
            Plan.of({**DEFAULT_TREE, "model": str(name)}, **PLAN)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer (.|\n)*trust_remote_code"):
        models.load(reader, device="cpu")
    shutil.copy(checkpoint.CHECKPOINT / checkpoint.QUALITY, own)
    with pytest.raises(ValueError, match=CODE):
        checkpoint.load_base(own)
    assert not ran.exists()


@pytest.mark.usefixtures("yes")
def test_code_of_a_model_runs_where_it_is_trusted(tmp_path):
    """As a model, as the base of an adapter, and in what a second request writes and reads again."""
    ran, (adapter, wanted, _) = tmp_path / "ran", adapted_folder(tmp_path)
    own = with_own_code(tmp_path / "base_of_first", ran, "config.json", OWN_MODEL)
    trusted = {"trust_remote_code": True}
    for name in (own, adapter):
        model = load_model(str(name), "model", trusted)
        assert type(model).__name__ == "OwnModel" and ran.exists()
        adapters.save_base(model, word_tokenizer(), tmp_path / "second" / "base")
    assert moved(model, wanted) < 1e-3
    known = {"auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}  # a head that duet knows
    own = with_own_code(tmp_path / "known", ran, "config.json", known, "LlamaConfig")
    run = request(tmp_path, own, "out", forget_rows(1), training={"model_init_kwargs": trusted})
    assert type(train(run).model.get_base_model()).__name__ == "OwnModel"


def test_no_from_pretrained_leaves_the_question_open():
    """But in `run/commands.py`, which reads the model that it has just saved, and in a docstring."""
    for path in Path(adapters.__file__).parents[1].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        calls = re.findall(r"(?<!# )Auto\w+\.from_(?:pretrained|config)\((?!new, |folder\) loads)(.*)", text)
        for call in calls:
            assert "trust_remote_code=" in call or ("**" in call and '"trust_remote_code": False' in text), (
                path
            )
