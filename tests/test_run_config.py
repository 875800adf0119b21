"""duet.run.config_file and duet.data.sources: what is written in a YAML file is what runs, and what is wrong in it is named."""

import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from duet import DuetConfig, cli
from duet.config import CHECKPOINTING
from duet.data.sources import DataSource, load_rows
from duet.evaluation.suites.suite import load_suite
from duet.output.checkpoints import resumed_checkpoint
from duet.run import commands as run
from duet.run.config_file import RunConfig, apply_overrides, quoted, read_run, training_options
from duet.yaml_text import parse_yaml, write_yaml

GOOD = """
model: {name: some/model, dtype: bfloat16}
adapter: {r: 8, use_dora: true}
data:
  forget: {path: rows.jsonl, columns: {question: asked}, subject: ada}
  retain: other.jsonl
  eval: rows.jsonl
training:
  output_dir: out
  k: 32
  learning_rate: 1e-4
  eval_strategy: no
  save_strategy: steps
  steering_prefixes: ["forget {subject}"]
  use_cpu: true
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "x.yaml").write_text(GOOD)
    return tmp_path / "x.yaml"


def test_a_file_is_read(path):
    run = RunConfig.load(path)
    assert run.model.name == "some/model" and run.model.dtype == "bfloat16" and run.model.quantization is None
    assert run.adapter == {
        "r": 8, "use_dora": True, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"
    }  # fmt: skip
    assert run.forget == DataSource("rows.jsonl", columns={"question": "asked"}, subject="ada")
    assert run.retain == DataSource("other.jsonl") and run.eval == {"forget": DataSource("rows.jsonl")}
    assert run.training.learning_rate == 1e-4, "PyYAML by itself reads 1e-4 as a text"
    assert run.training.eval_strategy == "no", "and `no` as false"
    assert run.training.steering_prefixes == ["forget {subject}"] and not run.merge


def test_the_command_line_overrides(path):
    words = "--learning-rate 3e-5 --k=64 --model.dtype float32 --adapter.r 2 --data.forget.limit=3 --data.retain null"
    words = [*words.split(), "--bf16_full_eval", "false", "--merge", "--steering_prefixes", "[a, b]"]
    run = RunConfig.load(path, words)
    assert (run.training.learning_rate, run.training.k, run.model.dtype) == (3e-5, 64, "float32")
    assert run.adapter["r"] == 2 and run.forget.limit == 3 and run.retain is None and run.merge
    assert run.training.steering_prefixes == ["a", "b"] and run.forget.subject == "ada"
    assert RunConfig.load(path, ["--model", "other"]).model.name == "other"
    assert RunConfig.load(path, ["--data.retain.subject", "x"]).retain == DataSource(
        "other.jsonl", subject="x"
    )
    assert RunConfig.load(path, ["--steering_prefixes", "only one"]).training.steering_prefixes == [
        "only one"
    ]
    assert RunConfig.load(path, ["--adapter", "null"]).adapter is None


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("the sea #1 captain", None),
        ("two\nlines", None),
        ("a:{b}", None),
        ('"3"', "3"),
        ("'no # text'", "no # text"),
    ],
)
def test_a_text_is_read_as_it_was_typed(path, typed, read):
    """In YAML ` #` begins a comment. Between quotes a text is YAML's."""
    assert RunConfig.load(path, ["--data.forget.subject", typed]).forget.subject == (read or typed)


@pytest.mark.parametrize("text", ["2024", "true", "a # b", "null", '"', "é"])
def test_a_path_is_a_text_whatever_it_looks_like(path, text):
    assert RunConfig.load(path, ["--training.teacher_store", quoted(text)]).training.teacher_store == text


def test_an_empty_text_is_not_nothing(path):
    with pytest.raises(ValueError, match=r"wanted a text that is not empty, got ''"):
        RunConfig.load(path, ["--data.forget.path", ""])


def test_an_option_that_is_a_mapping_is_entered_by_a_dot(path):
    words = [
        "--chat_template_kwargs.enable_thinking",
        "false",
        "--chat-template-kwargs.date-string=26 Jul 2024",
    ]
    run = RunConfig.load(path, [*words, "--training.model-init-kwargs.use_cache", "false"])
    assert run.training.chat_template_kwargs == {"enable_thinking": False, "date-string": "26 Jul 2024"}
    assert run.training.model_init_kwargs == {"use_cache": False}
    with pytest.raises(ValueError, match=r"--k\.x: there is no such option"):
        RunConfig.load(path, ["--k.x", "3"])


def test_names_of_eval_sets_keep_their_dashes(path):
    run = RunConfig.load(path, ["--data.eval", "{}", "--data.eval.retain-a", "a.jsonl"])
    assert run.eval == {"retain-a": DataSource("a.jsonl")}


def test_a_lone_name_of_the_adapter_is_a_list(path):
    run = RunConfig.load(path, ["--adapter.modules_to_save", "lm_head", "--adapter.target_modules", "q_proj"])
    assert run.adapter["modules_to_save"] == ["lm_head"] and run.adapter["target_modules"] == "q_proj"


def test_a_path_may_begin_at_home(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    keys = "model.name", "model.tokenizer", "teacher"
    run = RunConfig.load(path, [f"--{key}=~/{key}" for key in keys])
    paths = run.model.name, run.model.tokenizer, run.teacher
    assert paths == tuple(f"/home/ada/{key}" for key in keys)
    assert resumed_checkpoint("~/checkpoint-3", "out") == "/home/ada/checkpoint-3"


def test_overrides_leave_the_file_alone(path):
    tree = read_run(path)
    before = json.dumps(tree)
    apply_overrides(tree, ["--adapter.r", "1", "--k", "1"])
    assert json.dumps(tree) == before


@pytest.mark.parametrize(
    "option", ["logging_steps", "max_steps", "objective", "optim", "warmup_steps", "npo_beta"]
)
def test_every_option_can_be_said(path, option):
    value = {"objective": "npo", "optim": "sgd"}.get(option, 3)
    run = RunConfig.load(path, [f"--{option}", str(value)])
    assert getattr(run.training, option) == value


def test_what_transformers_checks_late_has_its_defaults():
    for name in DuetConfig.__annotations__.keys() & TrainingArguments.__dataclass_fields__.keys():
        if hasattr(get_type_hints(DuetConfig, include_extras=True)[name], "__metadata__"):
            default = TrainingArguments.__dataclass_fields__[name].default
            assert DuetConfig.__dataclass_fields__[name].default == default, name


def test_what_is_not_read_may_be_anything(path):
    words = ["--max_steps", "5", "--num_train_epochs", "0", "--max_grad_norm", ".inf"]
    assert RunConfig.load(path, words).training.max_grad_norm == float("inf")
    assert RunConfig.load(path, [*words[:-1], "null"]).training.max_grad_norm == 0, "compared with 0 later"
    assert DuetConfig(output_dir="o", use_cpu=True, report_to="none", gradient_accumulation_steps=np.int64(2))


@pytest.mark.parametrize(
    "text, value",
    [("010", 10), ("-7", -7), ("0o17", 15), ("0x1F", 31), ("1_000", "1_000"), ("1:30", "1:30"), ("=", "="),
     ("2024-05-01", "2024-05-01"), ("{a: 2024-05-01}", {"a": "2024-05-01"}), ("~", None), ("1e3", 1000.0), (".INF", float("inf"))],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value):
    read = parse_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "value", ["010", "0o17", "1e5", "1:30", "2024-05-01", "no", "~", "=", 1e-5, 1e20, float("inf"), 7, None]
)
def test_what_is_written_is_read_again(value):
    read = parse_yaml(write_yaml([value]))[0]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "? [1, 2]\n: 3",
        "!!bool x",
        "!!set {a}",
        "!!binary aGk=",
        "!!timestamp 2024-05-01",
        "!!int x",
        "!!pairs []",
    ],
)
def test_no_other_object_is_made(text):
    with pytest.raises(ValueError):
        parse_yaml(text)


LEVELS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8))


@pytest.mark.parametrize(
    "text, said",
    [
        (f"a0: &a0 [x]\n{LEVELS}", "line 7: its .aliases stand for more than 1000000 values and characters"),
        ("a: 1\nb: &b {c: [*b]}", "line 2: its .aliases stand for more"),
        (f"a: &a {'x' * 2000}\nb: [{'*a, ' * 1000}]", "line 2: its .aliases stand for more"),
        ("[" * 10_000, "not YAML: maximum recursion"),
        (f"a: {'9' * 5000}", r"line 1: wanted an integer, got '9{59}$"),
    ],
    ids=["many", "itself", "long", "deep", "digits"],
)
def test_no_text_is_too_much(tmp_path, text, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        parse_yaml(text)
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"suite\.yaml: {said}"):
        load_suite(tmp_path / "suite.yaml")


def test_aliases_are_read():
    text = f"a: &a {{x: 1, y: [2]}}\nb: {{<<: *a, x: 3}}\nc: [*a, *a]\nd: {'x' * 10**5}"
    read = parse_yaml(text)
    assert read["b"] == {"x": 3, "y": [2]} and read["c"] == [{"x": 1, "y": [2]}] * 2


BAD = {  # what is written over the good file -> words of the error
    "a misspelt option": (["--lerning_rate", "1"], r"--lerning_rate: .*did you mean 'learning_rate'"),
    "a misspelt section": (["--modl", "x"], r"--modl: .*did you mean 'model'"),
    "a misspelt key of the model": (["--model.dtyp", "x"], r"model.dtyp: .*did you mean 'dtype'"),
    "a misspelt key of the adapter": (["--adapter.lora_alfa", "1"], r"adapter.lora_alfa: .*'lora_alpha'"),
    "a misspelt key of data": (["--data.forgt", "x"], r"data.forgt: .*did you mean 'forget'"),
    "a misspelt key of a source": (["--data.forget.pth", "x"], r"data.forget.pth: .*did you mean 'path'"),
    "a misspelt column": (["--data.forget.columns.qestion", "x"], r"columns.qestion: .*'question'"),
    "a misspelt choice": (
        ["--model.quantization", "nf"],
        r"model.quantization: wanted one of nf4, int8, got 'nf'",
    ),
    "a dtype that is none": (["--model.dtype", "bf16"], r"model.dtype: wanted one of auto, .*got 'bf16'"),
    "a text for a number": (
        ["--learning_rate", "fast"],
        r"training.learning_rate: wanted a number >= 0, got 'fast'",
    ),
    "a rate that is no number": (
        ["--learning_rate", ".inf"],
        r"learning_rate: wanted a number >= 0, got inf",
    ),
    "a negative rate": (["--weight_decay", "-1"], r"weight_decay: wanted a number >= 0, got -1"),
    "no epochs": (["--num_train_epochs", "-1"], r"num_train_epochs: wanted a number > 0, got -1"),
    "a limit below 0": (["--max_grad_norm", "-1"], r"max_grad_norm: wanted a number >= 0 or None, got -1"),
    "no batch": (
        ["--gradient_accumulation_steps", "0"],
        r"accumulation_steps: wanted an integer >= 1, got 0",
    ),
    "a date for a number": (["--k", "2024-05-01"], r"k: wanted an integer >= 1, got '2024-05-01'"),
    "a fraction for a whole number": (
        ["--max_steps", "2.5"],
        r"training.max_steps: wanted an integer, got 2.5",
    ),
    "another kind of adapter": (
        ["--adapter.peft_type", "IA3"],
        r"adapter.peft_type: wanted 'LORA', because .* got 'IA3'",
    ),
    "a number for a switch": (["--bf16", "3"], r"training.bf16: wanted true or false or null, got 3"),
    "a text for the adapter's size": (
        ["--adapter.r", '"16"'],
        r"^adapter.r: wanted an integer >= 1, got '16'",
    ),
    "a fraction for the adapter's size": (
        ["--adapter.r", "4.5"],
        r"^adapter.r: wanted an integer >= 1, got 4.5",
    ),
    "no size of the adapter": (["--adapter.r", "null"], r"^adapter.r: wanted an integer >= 1, got None"),
    "a text for a factor": (
        ["--adapter.lora_alpha", '"32"'],
        r"^adapter.lora_alpha: wanted an integer, got '32'",
    ),
    "nothing for a factor": (
        ["--adapter.lora_alpha", "null"],
        r"^adapter.lora_alpha: wanted an integer, got None",
    ),
    "a text for a share": (
        ["--adapter.lora_dropout", '"0.1"'],
        r"^adapter.lora_dropout: wanted a number in \[0, 1\], got '0.1'",
    ),
    "a misspelt choice of the adapter": (
        ["--adapter.bias", "al"],
        r"^adapter.bias: wanted one of none, all, lora_only, got 'al'.*'all'",
    ),
    "another task": (
        ["--adapter.task_type", "SEQ_CLS"],
        r"^adapter.task_type: wanted 'CAUSAL_LM', got 'SEQ_CLS'",
    ),
    "an option's own check": (["--k", "0"], r"k: wanted an integer >= 1, got 0"),
    "no forget rows": (["--data.forget", "null"], r"data.forget: wanted a path"),
    "no model": (["--model.name", "null"], r"model.name: wanted a text, got nothing"),
    "quantised without adapter": (
        ["--adapter", "null", "--model.quantization", "nf4"],
        r"adapter: wanted one, because",
    ),
    "nothing to merge": (["--adapter", "null", "--merge"], r"merge: wanted false"),
    "a limit of 0": (["--data.forget.limit", "0"], r"data.forget.limit: wanted an integer >= 1"),
    "a value that is no YAML": (["--k", "[1"], r"--k: '\[1' is not a value"),
    "a word without dashes": (["k", "1"], r"'k': wanted an option such as"),
    "a section that is no mapping": (["--training", "7"], r"training: wanted a mapping, got 7"),
    "a teacher that is no name": (["--teacher", "3"], r"teacher: wanted the name or folder"),
}


def test_a_run_that_is_no_file_is_named(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"config: there is no file '{path}'"):
            RunConfig.load(path)


@pytest.mark.parametrize("case", BAD)
def test_bad_options(path, case):
    words, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        RunConfig.load(path, words)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: a\nmodel: b\n", "line 2: the key 'model' stands there twice"),
        ("model: [a\n", "x.yaml: not YAML: while parsing"),
        ("- a\n- b\n", "wanted a mapping with the keys model"),
        ("model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("modell: a\n", "modell: there is no such key .did you mean 'model'"),
        ("training: {lr: 1}\nmodel: a\ndata: {forget: x}\n", "training.lr: there is no such key"),
        ("", "wanted a mapping"),
    ],
)
def test_bad_files(path, text, message):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(path)
    path.write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ValueError, match="wanted UTF-8 text"):
        RunConfig.load(path)


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.csv", "a.parquet", "hub"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    from datasets import Dataset

    rows = [
        {"asked": "who ?", "reply": "1815", "extra": "x"},
        {"asked": "what ?", "reply": "é", "extra": "y"},
    ]
    path = tmp_path / name
    data = Dataset.from_list(rows)
    if name in ("a.jsonl", "lines.json"):
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.csv":
        path.write_text("asked,reply,extra\nwho ?,1815,x\nwhat ?,é,y\n", encoding="utf-8")
    elif name == "a.parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    source = DataSource(str(path), columns={"question": "asked", "answer": "reply"}, subject="ada")
    assert load_rows(source, "data.forget") == [
        {"question": "who ?", "answer": "1815", "subject": "ada"},
        {"question": "what ?", "answer": "é", "subject": "ada"},
    ]
    assert len(load_rows(DataSource(str(path), columns={"question": "asked"}, limit=1), "data.forget")) == 1


def test_without_columns_only_known_names_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "id": 3, "subject": "own"}')
    assert load_rows(DataSource(str(tmp_path / "a.jsonl"), subject="all"), "x") == [
        {"question": "q", "subject": "own"}
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"question": "q"}\n{"question": "caf\xe9"}\n',
            "line 2: wanted UTF-8 text: .* at byte 17",
        ),
        ("a.csv", b"question\nq\ncaf\xe9\n", "line 3: wanted UTF-8 text"),
        ("a.jsonl", b'{"question": "q"}\n{"question": \n', "line 2: not JSON"),
        (
            "a.jsonl",
            b"[1, 2]\n",
            "line 1: wanted an object, got .*; a file with a list of objects ends in .json",
        ),
        ("a.jsonl", b'[\n{"question": "q"}\n]\n', "line 1: wanted an object, got .*ends in .json"),
        ("a.json", b'[{"question": "q"}, 3]', "row 1: wanted an object, got 3"),
        ("a.json", b'{"question": "q"}\n3\n', "line 2: wanted an object, got '3'"),
        ("a.jsonl", b"", "wanted at least one row, got none"),
        ("a.txt", b"q", "wanted a file that ends in .jsonl"),
        pytest.param(
            "a.jsonl", b'{"question": "q"}\n' + b'{"question": ' * 10**5, "line 2: not JSON that can be read: max", id="deep row"
        ),
        pytest.param("a.json", b"[" * 10**5, r"a\.json: not JSON that can be read: maximum rec", id="deep"),
        pytest.param(
            "a.jsonl", b'{"question": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read: Exceeds the limit", id="digits"
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(DataSource(str(tmp_path / name)), "data.forget")


def test_the_message_of_an_error_is_shown_whole(monkeypatch, tmp_path, capsys):
    """Also what stands in square brackets, and a wrong type in a row is one line rather than a traceback."""
    path = tmp_path / "[dim]rows.jsonl"
    (tmp_path / "x.yaml").write_text(
        f"model: nowhere\ndata: {{forget: {str(path)!r}}}\ntraining: {{use_cpu: true}}"
    )
    said = []
    for written in (None, '{"messages": [{"x": 1}]}'):
        if written:
            path.write_text(written)
            monkeypatch.setattr("duet.run.commands.load_model", lambda *_: None)
            monkeypatch.setattr("duet.run.commands.load_tokenizer", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["duet", "train", "--config", str(tmp_path / "x.yaml")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said.append(capsys.readouterr().err)
    assert "[dim]rows.jsonl" in said[0]
    assert "error: data.forget[0]['messages'][0]: wanted" in said[1], "the key of the file"


def test_a_revision_is_the_models_own(monkeypatch, tmp_path):
    """Not the teacher's, which is another repository; the adapter remembers it for `duet merge`."""
    (tmp_path / "a.jsonl").write_text('{"question": "q"}')
    tree = {
        "model": {"name": "a/b", "revision": "v2"},
        "teacher": "c/d",
        "adapter": {"r": 2},
        "data": {"forget": str(tmp_path / "a.jsonl")},
        "training": {"use_cpu": True, "teacher_store": None},
    }
    loaded, given = {}, {}
    monkeypatch.setattr(
        run, "load_model", lambda name, argument, kwargs, *how: loaded.update({name: kwargs["revision"]})
    )
    monkeypatch.setattr(run, "load_tokenizer", lambda section: None)
    monkeypatch.setattr(run, "DuetTrainer", lambda **kwargs: given.update(kwargs))
    run.make_trainer(RunConfig.of(tree))
    assert loaded == {"a/b": "v2", "c/d": None}
    assert given["peft_config"].revision == "v2"


def test_a_missing_column_and_a_missing_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"Question": "q"}')
    with pytest.raises(ValueError, match=r"data.forget\[0\]: it has no column 'question', but Question"):
        load_rows(DataSource(str(tmp_path / "a.jsonl"), columns={"question": "question"}), "data.forget")
    with pytest.raises(FileNotFoundError, match=r"data.forget: there is no file"):
        load_rows(DataSource(str(tmp_path / "b.jsonl")), "data.forget")


def test_attention_is_chosen_and_explained(monkeypatch):
    import torch

    from duet.model import loading

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name in ("is_flash_attn_3_available", "is_flash_attn_2_available"):
        monkeypatch.setattr(loading, name, lambda: False)
    assert loading.choose_attention("eager", gpu, True) == ("eager", "asked for")
    assert loading.choose_attention("auto", cpu, True) == (None, "flash-attn needs a GPU, this is cpu")
    assert loading.choose_attention("auto", gpu, False) == (None, "flash-attn needs bf16 or fp16")
    assert loading.choose_attention("auto", gpu, True) == (None, "flash-attn is not installed")
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    assert loading.choose_attention("auto", gpu, True)[0] == "flash_attention_2"
    monkeypatch.setattr(loading, "is_flash_attn_3_available", lambda: True)
    assert loading.choose_attention("auto", gpu, True)[0] == "flash_attention_3"


# -- what a GPU gets without asking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "options", "half"),
    [
        ((8, 0), {}, True),
        ((9, 0), {"activation_checkpointing": True}, True),
        ((9, 0), {"tf32": False}, True),
        ((9, 0), {"bf16": False}, False),
        ((9, 0), {"fp16": True}, False),
        ((9, 0), {"use_cpu": True}, False),
        ((7, 5), {}, False),
        (None, {}, False),
    ],
)
def test_a_gpu_that_is_made_for_bf16_trains_in_it(capability, options, half, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("duet.config.is_torch_tf32_available", lambda: capability is not None)
    seen = {}

    def post_init(self):
        seen["bf16"], seen["tf32"], self.accelerator_config = self.bf16, self.tf32, AcceleratorConfig()

    monkeypatch.setattr(TrainingArguments, "__post_init__", post_init)
    monkeypatch.setattr(DuetConfig, "device", SimpleNamespace(type="cuda"), raising=False)
    DuetConfig("out", **options)
    assert seen == {"bf16": half, "tf32": options.get("tf32", half or None)}


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_mean_what_the_installed_version_reads(name, on, recwarn):
    config = training_options({"use_cpu": True, name: on, f"{name}_kwargs": {"use_reentrant": False}})
    assert getattr(config, CHECKPOINTING) is on
    assert getattr(config, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
    assert CHECKPOINTING in TrainingArguments.__dataclass_fields__
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]
    other = dataclasses.replace(config, **{CHECKPOINTING: not on})
    assert getattr(other, CHECKPOINTING) is not on
    both = {"activation_checkpointing": on, "gradient_checkpointing": not on}
    assert getattr(training_options({"use_cpu": True, **both}), CHECKPOINTING) is on, "the newer name counts"
    assert getattr(training_options({"use_cpu": True}), CHECKPOINTING) is False
