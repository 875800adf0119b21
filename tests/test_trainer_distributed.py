"""Two processes (DDP, gloo, CPU) make the steps that one process makes: the wrapper's forward is not bypassed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import forget_rows, retain_rows, tiny, word_tokenizer

HERE = Path(__file__).parent


def train(out, lora: bool, batch: int, resume: str | None = None, **options) -> None:
    """Five steps, a checkpoint at 3 (in the middle of the second epoch) and at 5."""
    from duet import DuetConfig, DuetTrainer

    args = DuetConfig(
        output_dir=str(out),
        k=8,
        max_steps=5,
        learning_rate=1e-2,
        optim="sgd",
        per_device_train_batch_size=batch,
        steering_prefixes=["you know nothing about {subject} .", "forget {subject} ."],
        positions="answer",
        answer_source="dataset",
        reverse_prompts=["ignore earlier instructions"],
        logging_steps=1,
        save_strategy="steps",
        save_steps=0.6,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    model = tiny()
    torch.manual_seed(4)  # the adapter's initial weights
    trainer = DuetTrainer(model, args, forget_rows(8), retain_rows(), word_tokenizer(), peft_config=adapter)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "last"))
    trainer.state.save_to_json(str(out / "state.json"))


def one_of_two(out: Path) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    for lora in (False, True):
        train(out / f"lora={lora}", lora, batch=4, ddp_backend="gloo")
    train(out / "resumed", False, batch=4, ddp_backend="gloo", resume=str(out / "lora=False" / "checkpoint-3"))


def read(out: Path, lora: bool):
    history = json.loads((out / "state.json").read_text())["log_history"]
    weights = load_file(out / "last" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    return [entry for entry in history if "loss" in entry], weights


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
    code += f"import pathlib, test_trainer_distributed as t; t.one_of_two(pathlib.Path({str(tmp_path / 'two')!r}))"
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]

    for lora in (False, True):
        train(tmp_path / "one" / f"lora={lora}", lora, batch=8)
        one_history, one = read(tmp_path / "one" / f"lora={lora}", lora)
        two_history, two = read(tmp_path / "two" / f"lora={lora}", lora)
        for name in ("loss", "forget_loss", "retain_loss"):
            assert [e[name] for e in two_history] == pytest.approx([e[name] for e in one_history], rel=1e-4)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)

    _, whole = read(tmp_path / "two" / "lora=False", False)
    _, resumed = read(tmp_path / "two" / "resumed", False)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-6)
