"""Mistakes of a user's day, by kind: each ends in one sentence with the name and the way out, and none is silent."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_crashes import prepare, run_of
from test_trainer import make
from tiny_models import CHAT_TEMPLATE, forget_rows, tiny, word_tokenizer

from duet import DuetTrainer, cli
from duet.data.prompts import Prompting, PromptRenderer
from duet.data.rows import read_rows
from duet.data.sources import DataSource, load_rows, read_table
from duet.evaluation import models
from duet.evaluation.commands import run_attack
from duet.evaluation.suites.suite import load_table
from duet.model.loading import load_model
from duet.run.commands import cache, merge_adapter, train
from duet.run.config_file import RunConfig
from duet.run.plan_report import parse_size
from duet.store.read import TopKStore


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`base`, and `adapter` on it."""
    path = tmp_path_factory.mktemp("models")
    tiny().save_pretrained(path / "base")
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(path / "base")
    model.save_pretrained(path / "adapter")
    for name in ("base", "adapter"):
        word_tokenizer().save_pretrained(path / name)
    return path


def pickled(folder):
    """Weights as a pickle that makes an object, which torch refuses to load."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": Path(".")}, folder / "adapter_model.bin")


# -- folders -----------------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_what_it_is_made_from(folders, tmp_path):
    """A base that holds the sum would get the adapter once more."""
    before = (folders / "base" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"out: .*base' is the base of the adapter, on which it is loaded"):
        merge_adapter(folders / "adapter", folders / "base")
    for peft_config in (None, LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(ValueError, match=r"output_dir: .*base' is the model that is trained"):
            make(
                tmp_path,
                str(folders / "base"),
                trainer_options={"peft_config": peft_config},
                output_dir=str(folders / "base"),
            )
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"out: wanted a folder, but .*file' is a file"):
        merge_adapter(folders / "adapter", tmp_path / "file")
    assert (folders / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "resume, why", [(False, "run, which"), (True, "run, but no finished checkpoint to resume from, which")]
)
def test_the_model_of_an_earlier_run_is_not_written_over(folders, tmp_path, resume, why):
    for name, run in ((each, run_of(tmp_path, tmp_path / each, max_steps=1)) for each in ("adapter", "base")):
        shutil.copytree(folders / name, tmp_path / name)
        said = f"training.output_dir: '.*{name}' holds the model of an earlier {why} would be overwritten"
        with pytest.raises(FileExistsError, match=said):
            train(run, resume=resume)


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"xx"), "an adapter on the base '.*base'"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "property name"),
        (lambda f: edit(f, base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda f: edit(f, base_model_name_or_path="/gone/base"), "an adapter on the base '/gone/base'"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "'list' object"),
        (lambda f: edit(f, peft_type="LORE"), "LORE"),
        (lambda f: edit(f, base_model_name_or_path=5), "not int"),
        (pickled, "Weights only load failed"),
    ],
)
def test_a_damaged_adapter_is_named(folders, tmp_path, damage, why):
    folder = tmp_path / "damaged"
    shutil.copytree(folders / "adapter", folder)
    damage(folder)
    for work in (
        lambda: merge_adapter(folder, tmp_path / "out"),
        lambda: models.load(folder, device="cpu"),
        lambda: load_model(str(folder), "model", None),
    ):
        with pytest.raises(FileNotFoundError, match=f"(?s)damaged.*{why}"):
            work()


def test_a_folder_that_is_not_there_is_no_name_on_the_hub():
    for name in ("out/k1/merged", "./merged"):
        with pytest.raises(FileNotFoundError, match=f"^model: there is no folder '{name}'"):
            Prompting.saved_with(name)


def test_a_merge_removes_and_replaces_no_file_of_others(folders, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"out: .*merged' holds the config.json of another model; wanted a new"
    ):
        merge_adapter(folders / "adapter", out)
    assert (out / "config.json").read_text() == "{}"
    own = ("model.safetensors.bak", "model-before.safetensors.txt", "model_of_mine.safetensors")
    earlier = ("model-00002-of-00002.safetensors", "model.safetensors.index.json")
    for name in (*own, *earlier):
        (out / name).write_text(name)
    merge_adapter(folders / "adapter", out, replaces=True)
    assert {name for name in (*own, *earlier) if (out / name).exists()} == set(own)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folders, tmp_path):
    """And where neither has one, nothing is written."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folders / "adapter" / name, alone / name)
    merge_adapter(alone, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match=r"out: '.*merged' holds a model already; wanted a new folder"):
        merge_adapter(alone, tmp_path / "merged")
    shutil.copytree(folders / "base", tmp_path / "base")
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    edit(alone, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(
        FileNotFoundError, match=r"adapter: no tokenizer could be loaded from '.*alone' or '.*base'"
    ):
        merge_adapter(alone, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_half_precision_on_a_cpu_is_said(folders, tmp_path, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    shutil.copytree(folders / "base", tmp_path / "half")
    tiny().bfloat16().save_pretrained(tmp_path / "half")
    models.load(folders / "base", device="cpu")
    models.load(tmp_path / "half", "bfloat16", "cpu")
    assert "float32" not in caplog.text
    models.load(tmp_path / "half", device="cpu")
    assert "model: computes in bfloat16, as it was saved; on most CPUs --dtype float32" in caplog.text


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_damaged_weights_are_named(folders, tmp_path):
    shutil.copytree(folders / "base", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(
        FileNotFoundError, match=r"teacher: .*damaged' is not a folder with a causal language model"
    ):
        load_model(str(tmp_path / "damaged"), "teacher", None)


# -- names that are not read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, near", [("answr", "answer"), ("Subject", "subject"), ("vlaue", "value")])
def test_a_key_like_one_of_ours_is_said_not_to_be_read(tmp_path, caplog, key, near):
    import transformers

    transformers.utils.logging.enable_propagation()
    row = {"question": "who is ada ?", key: "ada"}
    read_rows([row], "forget_dataset")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    load_rows(DataSource(str(tmp_path / "rows.jsonl")), "data.forget")
    for where in ("forget_dataset", "data.forget"):
        assert f"{where}[0]: {key!r} is not read; did you mean {near!r}?" in caplog.text
    caplog.clear()
    read_rows([row | {near: "ada", "source": "a book"}], "forget_dataset")
    load_rows(DataSource(str(tmp_path / "rows.jsonl"), columns={"question": "question"}), "data.forget")
    assert not caplog.text


def test_an_option_that_the_chat_template_does_not_read_is_named(caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    thinks = CHAT_TEMPLATE + "{% if enable_thinking %}think{% endif %}"
    PromptRenderer(word_tokenizer(thinks), chat_template_kwargs={"enable_thinking": False})
    assert not caplog.text
    for number, (template, why) in enumerate(
        [(thinks, "the chat template does not read it"), (None, "has no chat template")]
    ):
        PromptRenderer(word_tokenizer(template), chat_template_kwargs={f"enable_thinkin{number}": False})
        assert f"chat_template_kwargs.enable_thinkin{number}: " in caplog.text and why in caplog.text


def test_another_model_is_read_as_the_file_says():
    """`--model NAME` after `quantization: nf4` is quantised, too."""
    tree = {"model": {"name": "a", "quantization": "nf4", "dtype": "bfloat16", "revision": "x"}}
    from duet.run.config_file import apply_overrides

    made = apply_overrides(tree, ["--model", "out/first"])
    assert made["model"] == {"name": "out/first", "quantization": "nf4", "dtype": "bfloat16"}
    assert tree["model"]["name"] == "a" and apply_overrides({"model": "a"}, ["--model", "b"]) == {
        "model": "b"
    }
    with pytest.raises(
        ValueError,
        match=r"(?s)--steering_prefixes: .* a text is written between quotes: '\"{subject} hides\"'",
    ):
        apply_overrides({}, ["--steering_prefixes", "{subject} hides"])
    for more, options, why in (
        ({}, {}, "no new adapter"),
        ({"adapter": {}}, {"fsdp": True}, "FSDP and DeepSpeed"),
    ):
        training = {"earlier_adapter": "keep", **options}
        with pytest.raises(
            ValueError, match=f"^training.earlier_adapter: wanted 'merge', got 'keep', because {why}"
        ):
            RunConfig.of({"model": "a", "data": {"forget": "b"}, "training": training, **more})


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, why",
    [
        (
            "a.csv",
            "question;subject\nwho ?;ada\n",
            "wanted cells between commas, got the one column 'question;subject'",
        ),
        ("a.csv", "question\tsubject\nwho ?\tada\n", "wanted cells between commas"),
        ("a.parquet", "PAR1", "a.parquet: not Parquet"),
        ("a.jsonl", '{"conversations": [{"from": "human"}]}', r"columns: \{messages: conversations\}"),
        ("", "", "the dataset .* could not be loaded"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, text, why):
    (tmp_path / "model.safetensors").write_bytes(b"xx")  # a folder, but no dataset
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=f"data.forget.*{why}"):
        load_rows(DataSource(str(tmp_path / name)), "data.forget")
    if "commas" in why:  # `duet elicit`, `duet attack`
        with pytest.raises(ValueError, match=f"questions: .*a.csv, line 1: {why}"):
            read_table(tmp_path / name, "questions")


def test_a_folder_of_several_files_is_no_set_of_rows(tmp_path):
    """What is to be forgotten and what is to be kept would be one."""
    for name in ("forget", "neighbour", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"{name} ?"}))
    for key, name in (("data.retain", "retain"), ("data.eval.own", "forget")):
        said = rf"{key}: wanted one file of rows, such as .*{name}.jsonl, got a folder with 3 of them"
        with pytest.raises(ValueError, match=said):
            load_rows(DataSource(str(tmp_path)), key)


@pytest.mark.parametrize(
    "names",
    [
        ("qa_train", "qa_test"),
        ("train-00000-of-00002", "train-00001-of-00002"),
        ("rows-00000-of-00002", "rows-00001-of-00002"),
    ],
)
def test_splits_and_shards_of_a_folder_are_one_set(tmp_path, monkeypatch, names):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"{name} ?"}) + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    rows = load_rows(DataSource("~"), "data.forget")
    assert rows[0]["question"] == f"{names[0]} ?"


def test_a_row_of_empty_cells_is_said_to_be_empty():
    with pytest.raises(ValueError, match=r"forget_dataset\[1\]: .*, got no value at all"):
        read_rows([forget_rows(1)[0], {"question": None, "answer": None}], "forget_dataset")


def test_answers_of_the_base_that_never_end_are_named(folders, tmp_path):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "who is ada ?"}) + "\n")
    base = str(folders / "base")
    with pytest.raises(
        ValueError, match=r"forget: wanted rows with an answer.*the base's was empty, cut or refused"
    ):
        run_attack(
            base, str(tmp_path / "questions.jsonl"), tmp_path / "out", base=base, elicit=True, device="cpu"
        )


def test_the_home_of_nobody_is_named():
    said = "there is no user whose home is meant by '~nobody-of-that-name/x'"
    path = "~nobody-of-that-name/x"
    for name, work in {
        "data.forget": lambda: load_rows(DataSource(path), "data.forget"),
        "data": lambda: load_table(path, "facts", None, "task"),
        "teacher_store": lambda: TopKStore(path),
        "training.teacher_store": lambda: cache(
            RunConfig.of(
                {"model": "m", "data": {"forget": "f"}, "training": {"teacher_store": path, "use_cpu": True}}
            )
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: {said}"):
            work()
    assert not Path("~nobody-of-that-name").exists()


@pytest.mark.parametrize("wordings", [5, "all", ["a", 5], {"a": 1}])
def test_wordings_of_a_record_that_are_none_are_named(tmp_path, wordings):
    (tmp_path / "run_record.json").write_text(json.dumps({"override_wordings": wordings}))
    with pytest.raises(
        ValueError, match=r"^model: .*run_record.json, 'override_wordings': wanted a list of texts, got"
    ):
        run_attack(str(tmp_path), "rows.jsonl", tmp_path / "out")


def test_chat_without_an_input_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr("sys.argv", ["duet", "chat", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (
        ended.value.code == 2 and "chat: wanted questions from the standard input" in capsys.readouterr().err
    )


# -- numbers, packages -----------------------------------------------------------------------------------------------------


def test_no_memory_at_all_is_no_size():
    with pytest.raises(ValueError, match="gpu-memory: wanted a size such as 24GiB, got '0GiB'"):
        parse_size("0GiB")
    assert parse_size("0", "reserve") == 0


@pytest.mark.parametrize(
    "error, code",
    [
        (ImportError("FlashAttention2 cannot be used: the package is not installed"), 2),
        (ImportError("cannot import name 'x'", name="duet.data"), 1),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_an_absent_package_is_a_sentence(monkeypatch, capsys, error, code):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == code and str(error) in said and "Traceback" not in said
    monkeypatch.setitem(cli._shown, "traceback", False)
    monkeypatch.setattr(cli, "app", lambda: (cli._shown.update(traceback=True), fail()))
    with pytest.raises(type(error)):
        cli.main()


def test_a_long_word_in_an_error_takes_no_time(monkeypatch, capsys):
    def fail():
        raise ValueError(f"forget_dataset: got {'x' * 40_000}")

    monkeypatch.setattr(cli, "app", fail)
    began = time.process_time()
    with pytest.raises(SystemExit):
        cli.main()
    assert time.process_time() - began < 5 and "error: data.forget: got xx" in capsys.readouterr().err


def test_a_peft_config_that_fits_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"peft_config \(adapter.target_modules\): .*nope"):
        make(tmp_path, trainer_options={"peft_config": LoraConfig(target_modules=["nope"])})


def test_an_evaluation_that_fails_after_the_training_loses_nothing(tmp_path, monkeypatch):
    def fails(trainer):
        raise RuntimeError("no memory left")

    prepare(tmp_path)
    monkeypatch.setattr(DuetTrainer, "evaluate", fails)
    run = run_of(tmp_path, tmp_path / "out", max_steps=1, save_strategy="no")
    with pytest.raises(RuntimeError, match="no memory left"):
        train(replace(run, eval={"forget": run.forget}))
    assert {"adapter_model.safetensors", "prompting.json", "trainer_state.json", "README.md"} <= set(
        os.listdir(tmp_path / "out")
    )
