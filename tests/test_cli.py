"""What the command line prints when all is well, and what it keeps quiet about."""

import io
import json
import logging
import warnings
from types import SimpleNamespace

import pytest
from test_crashes import prepare, run_of

from duet import DuetConfig, cli, extras
from duet.run import commands
from duet.run.commands import train


def said(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["duet", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()


def test_the_version(monkeypatch, capsys):
    code, printed = said(monkeypatch, capsys, "--version")
    assert code == 0 and printed.out.startswith("duet-kernels ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_an_output_of_another_encoding_ends_no_command(monkeypatch, encoding):
    """The answers of a chat, the table of an attack, and the one line of an error."""

    def command():
        cli.console.print("1 … of 2: 東京")
        raise ValueError("東京: wanted Tokyo")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    for stream in (out, err):
        stream.flush()
    assert out.buffer.getvalue().decode(encoding).rstrip() in ("1 ? of 2: ??", "1 … of 2: ??")
    assert err.buffer.getvalue() == b"error: ??: wanted Tokyo\n"


def test_train_and_merge_say_where_the_model_is(monkeypatch, capsys, tmp_path):
    prepare(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'base'}\nadapter: {{r: 2}}\ndata: {{forget: {tmp_path / 'forget.jsonl'}}}\n"
        f"training: {{output_dir: {tmp_path / 'out'}, k: 4, max_steps: 2, use_cpu: true, report_to: none,\n"
        "  steering_prefixes: ['forget {subject}'], disable_tqdm: true}\n"
    )
    code, printed = said(monkeypatch, capsys, "train", "--config", tmp_path / "run.yaml", "--anyway")
    assert code == 0 and f"{tmp_path / 'out'}: the model after 2 steps" in printed.out
    code, printed = said(monkeypatch, capsys, "merge", tmp_path / "out", "--out", tmp_path / "whole")
    assert code == 0 and f"{tmp_path / 'whole'}: the merged model" in printed.out
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_bf16_without_a_device_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr("duet.config.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match=r"^bf16: wanted None or False, because no device here .* got True"):
        DuetConfig(output_dir=str(tmp_path), bf16=True)
    assert DuetConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16


def test_a_store_cannot_be_a_file(monkeypatch, capsys, tmp_path):
    prepare(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'base'}\ndata: {{forget: {tmp_path / 'forget.jsonl'}}}\n"
        f"training: {{output_dir: {tmp_path / 'out'}, k: 4, use_cpu: true, steering_prefixes: ['forget {{subject}}']}}\n"
    )
    config = tmp_path / "run.yaml"
    code, printed = said(monkeypatch, capsys, "cache", "--config", config, "--out", config)
    assert code == 2 and "is a file, wanted a folder" in printed.err.replace("\n", " ")


@pytest.mark.parametrize("process", [0, 1])
def test_one_process_says_what_was_cached(monkeypatch, capsys, tmp_path, process):
    prepare(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'base'}\ndata: {{forget: {tmp_path / 'forget.jsonl'}}}\n"
        f"training: {{output_dir: {tmp_path / 'out'}, k: 4, use_cpu: true, steering_prefixes: ['forget {{subject}}']}}\n"
    )
    store = type("Store", (), {"folder": "store", "__len__": lambda self: 3})()
    done = SimpleNamespace(store=store, added=3, saving="")
    monkeypatch.setattr(commands, "cache", lambda run, dtype: done)
    monkeypatch.setattr(DuetConfig, "process_index", process)
    code, printed = said(
        monkeypatch, capsys, "cache", "--config", tmp_path / "run.yaml", "--out", tmp_path / "s"
    )
    assert code == 0 and bool(printed.out) == (process == 0)


@pytest.mark.parametrize(
    "step, how", [(None, "there is no finished checkpoint in"), (7, "the same command with --resume")]
)
def test_an_interrupted_training_says_how_to_go_on(tmp_path, monkeypatch, capsys, step, how):
    (tmp_path / "run.yaml").write_text(
        f"model: x\ndata: {{forget: rows.jsonl}}\ntraining: {{output_dir: {tmp_path}, use_cpu: true}}\n"
    )
    if step:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupted)
    code, printed = said(monkeypatch, capsys, "train", "--config", tmp_path / "run.yaml")
    assert code == 130 and how in printed.out.replace("\n", " ")


def test_a_finished_run_that_is_resumed_is_not_suspected(tmp_path, caplog):
    prepare(tmp_path)
    train(run_of(tmp_path, tmp_path / "out", max_steps=1))
    train(run_of(tmp_path, tmp_path / "out", max_steps=1), resume=True)
    assert "did not change" not in caplog.text
    train(run_of(tmp_path, tmp_path / "idle", max_steps=1, learning_rate=0.0))
    assert "did not change" in caplog.text


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    prepare(tmp_path)
    with pytest.raises(ValueError, match="learning_rate: after step 1 trained weights are NaN or infinite"):
        train(run_of(tmp_path, tmp_path / "out", max_steps=2, learning_rate=1e38))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_other_libraries_words_about_themselves_are_left_out():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        extras.silence_what_no_user_can_change()
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1
        )
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then", stacklevel=1)
        warnings.warn("something that matters", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["something that matters"]
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
