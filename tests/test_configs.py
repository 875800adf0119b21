"""Every file of configs/ trains a tiny random model of its architecture, through the command line, and can be loaded."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from duet.cli import app
from duet.evaluation.steering import SteeringProbe
from duet.run.config_file import RunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ARCHITECTURES = {"llama": "llama", "smollm2": "llama", "qwen3": "qwen3", "gemma": "gemma3"}
# Datasets on the Hub, whose rows are {"question", "answer"}.
ON_THE_HUB = ("locuslab/TOFU", "muse-bench/MUSE-Books")


@pytest.fixture(autouse=True)
def a_short_look(monkeypatch):
    """Before a training the steered teacher is asked for answers of 48 tokens, of which a random one says all."""
    monkeypatch.setitem(SteeringProbe.__init__.__kwdefaults__, "max_new_tokens", 4)


def folder_of(architecture, tmp_path):
    tiny(architecture, hidden_size=64, spread=0.05, max_position_embeddings=512).save_pretrained(
        tmp_path / "base"
    )
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def sources(data):
    for name, value in data.items():
        if name == "eval":
            yield from sources(value)
        else:
            yield name, value


def run(*words):
    """The command line's outcome; an error is raised, not printed."""
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_a_tiny_model(path, tmp_path, monkeypatch):
    tree = yaml.safe_load(path.read_text())
    if tree["model"].get("quantization") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    monkeypatch.chdir(ROOT)
    architecture = next(kind for word, kind in ARCHITECTURES.items() if path.stem.startswith(word))
    for name, source in sources(tree["data"]):
        if isinstance(source, dict) and source["path"] in ON_THE_HUB:
            who = ("ada", "alan", "grace") if name == "forget" else ("paris", "madrid", "spain")
            rows = [{"question": f"what is {each} ?", "answer": f"{each} is a name ."} for each in who]
            source["path"] = str(tmp_path / f"{name}.jsonl")
            Path(source["path"]).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "out"
    words = [
        "--model.name",
        folder_of(architecture, tmp_path),
        "--output_dir",
        out,
        "--use_cpu",
        "--disable_tqdm",
    ]
    words += ["--max_steps", "2", "--save_steps", "2", "--eval_steps", "2", "--logging_steps", "1"]
    words += [
        "--learning_rate",
        "1e-2",
    ]  # two smaller steps would be rounded away when merged in bf16, which is refused
    # The teacher is random, and ends no answer before this limit; a given refusal must fit into it.
    words += ["--max_answer_tokens", 16 if "deep_refusals" in tree["training"] else 4]
    run("train", "--anyway", "--config", tmp_path / "x.yaml", *words)

    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and all(
        entry["loss"] > 0 for entry in state["log_history"] if "loss" in entry
    )
    assert (out / "checkpoint-2").is_dir()
    if "eval" in tree["data"]:
        assert {"eval_forget_loss", "eval_retain_loss"} <= json.loads(
            (out / "eval_results.json").read_text()
        ).keys()
    card = (out / "README.md").read_text()
    assert f'"{tree["training"]["objective"]}"' in card and "SHA-256" in card and "| train_loss |" in card
    if tree.get("adapter") is not None:
        run("merge", out, "--out", tmp_path / "merged")
        out = tmp_path / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model(**tokenizer("who is ada", return_tensors="pt")).logits.isfinite().all()


def test_a_second_run_does_not_mix_its_checkpoints_with_the_firsts(tmp_path):
    """A later --resume would take the newer step for its own."""
    (tmp_path / "x.yaml").write_text("training: {use_cpu: true, report_to: none, save_steps: 1}\n")
    words = [
        "--config",
        tmp_path / "x.yaml",
        "--model",
        folder_of("llama", tmp_path),
        "--output_dir",
        tmp_path / "out",
    ]
    words += ["--data.forget", ROOT / "configs/data/forget.jsonl", "--disable_tqdm"]
    run("train", "--anyway", *words, "--max_steps", "2")
    with pytest.raises(FileExistsError, match=r"training.output_dir: .*checkpoint-2' of an earlier run"):
        run("train", "--anyway", *words, "--max_steps", "1")
    run("train", "--anyway", *words, "--max_steps", "3", "--resume")
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_known_to_every_key_and_says_how_it_is_started(path):
    tree = yaml.safe_load(path.read_text())
    for name in ("bf16",):
        tree["training"].pop(name, None)
    RunConfig.of(tree | {"training": tree["training"] | {"use_cpu": True, "learning_rate": 1e-4}})
    assert f"duet train --config configs/{path.name}" in path.read_text()


def test_a_merged_model_says_what_the_adapter_says(tmp_path):
    import torch
    from peft import PeftModel

    base = folder_of("llama", tmp_path)
    words = ["--model", base, "--data.forget", str(ROOT / "configs/data/forget.jsonl"), "--merge"]
    (tmp_path / "x.yaml").write_text(
        "adapter: {r: 4}\ntraining: {use_cpu: true, report_to: none, max_steps: 2}\n"
    )
    run(
        "train",
        "--anyway",
        "--config",
        tmp_path / "x.yaml",
        *words,
        "--output_dir",
        tmp_path / "out",
        "--learning_rate",
        "1e-2",
    )
    ids = torch.tensor([[1, 5, 9, 11]])
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapter(input_ids=ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert (plain - merged(input_ids=ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_files(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert str(config.distributed_type.value) == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_every_weight_in_bf16_with_the_teacher_from_a_cache(tmp_path):
    """One model in memory without an adapter: the teacher spoke before, and is not there any more."""
    words = ["--model.name", folder_of("qwen3", tmp_path), "--teacher_store", tmp_path / "store"]
    (tmp_path / "x.yaml").write_text(
        f"model: {{dtype: bfloat16}}\ndata: {{forget: {ROOT}/configs/data/forget.jsonl}}\n"
        f"training: {{k: 8, max_steps: 4, bf16: true, activation_checkpointing: true, use_cpu: true, learning_rate: 1e-3,"
        f" logging_steps: 1, report_to: none, save_strategy: no, output_dir: {tmp_path}/out}}\n"
    )
    run("cache", "--config", tmp_path / "x.yaml", *words)
    run("train", "--anyway", "--config", tmp_path / "x.yaml", *words)
    losses = [
        e["loss"]
        for e in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
        if "loss" in e
    ]
    assert losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype.itemsize == 2
