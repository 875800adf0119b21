"""`accelerate launch` with two CPU processes (gloo) against one: losses, gradients, evaluation; nothing hangs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import forget_rows, quick, retain_rows, tiny, word_tokenizer
from transformers import TrainerCallback

HERE = Path(__file__).parent
ROOT = HERE.parent
CASES = {
    "all weights": {},
    "adapter": {"adapter": {"r": 4, "target_modules": "all-linear"}},
    # 7 + 18 rows in batches of 2 x 2: the last has one row, which leaves a process without any, and most batches of a process hold no
    # forget row.
    "few forget rows": {"forget": 7, "retain_per_forget": 2.5, "objective": "npo", "max_steps": 8},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 2},
}


class Gradients(TrainerCallback):
    """The gradients of every step, as the optimizer sees them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {
                n.removeprefix("module."): p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
        )


def train(out: Path, processes: int, adapter=None, forget=8, **options) -> None:
    from peft import LoraConfig

    from duet import DuetConfig, DuetTrainer

    size = 4 // processes
    args = DuetConfig(
        learning_rate=1e-3,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_eval_batch_size=size,
        positions="answer",
        answer_source="dataset",
        eval_strategy="steps",
        eval_steps=2,
        **quick(out, **{"max_steps": 4, "per_device_train_batch_size": size} | options),
    )
    seen = Gradients()
    trainer = DuetTrainer(
        tiny(spread=0.1),
        args,
        forget_rows(forget),
        retain_rows(12),
        word_tokenizer(),
        peft_config=None if adapter is None else LoraConfig(task_type="CAUSAL_LM", **adapter),
        eval_dataset={"forget": forget_rows(5), "retain": retain_rows(3)},  # no multiple of anything
        callbacks=[seen],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        (out / "history.json").write_text(json.dumps(trainer.state.log_history))
        save_file(
            {f"{i}/{n}": g for i, step in enumerate(seen.steps) for n, g in step.items()}, out / "gradients"
        )


def main(out: str) -> None:
    """What each of the two processes runs: every case, and the command line."""
    torch.set_num_threads(1)
    for name, options in CASES.items():
        train(Path(out) / name, processes=2, **options)
    from duet.cli import app

    os.chdir(Path(out) / "command line")
    app(["train", "--anyway", "--config", "x.yaml", "--learning_rate", "1e-3"], standalone_mode=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have trained: one launch, since every process imports for seconds."""
    out = tmp_path_factory.mktemp("two")
    folder = out / "command line"
    tiny().save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    (folder / "f.jsonl").write_text("\n".join(map(json.dumps, forget_rows(5))))
    (folder / "x.yaml").write_text(
        "model: base\nadapter: {r: 4}\ndata: {forget: f.jsonl, eval: f.jsonl}\nmerge: true\n"
        "training: {output_dir: out, k: 8, max_steps: 3, save_steps: 2, use_cpu: true, report_to: none}\n"
    )
    launch(2, str(HERE / "test_launch.py"), str(out))
    return out


def assert_same_steps(these: Path, those: Path) -> None:
    """Every logged loss, and the gradients of every step as one vector, within 1e-6 relative."""
    histories = [json.loads((out / "history.json").read_text()) for out in (these, those)]
    for name in ("loss", "forget_loss", "retain_loss", "eval_forget_loss", "eval_retain_loss"):
        ours, theirs = ([e[name] for e in history if name in e] for history in histories)
        assert ours and ours == pytest.approx(theirs, rel=1e-6), name
    ours, theirs = load_file(these / "gradients"), load_file(those / "gradients")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for step in {name.split("/")[0] for name in ours}:
        names = [name for name in ours if name.startswith(f"{step}/")]
        apart = torch.stack([(ours[n] - theirs[n]).double().norm() for n in names]).norm()
        assert apart <= 1e-6 * torch.stack([theirs[n].double().norm() for n in names]).norm(), step


def launch(processes: int, *program: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--config_file", str(ROOT / "configs/accelerate/ddp.yaml"), "--num_processes", str(processes)]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *words,
        "--main_process_port",
        str(port),
        *program,
    ]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{HERE}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two, tmp_path, case):
    train(tmp_path, processes=1, **CASES[case])
    assert_same_steps(two / case, tmp_path)


def test_two_batches_of_four_are_one_of_eight(tmp_path):
    train(tmp_path / "whole", processes=1, per_device_train_batch_size=8, max_steps=3)
    train(tmp_path / "halves", processes=1, gradient_accumulation_steps=2, max_steps=3)
    assert_same_steps(tmp_path / "halves", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_the_command_line_under_accelerate(two):
    out = two / "command line" / "out"
    assert {"README.md", "adapter_model.safetensors", "merged", "checkpoint-3"} <= set(os.listdir(out))
    assert (out / "checkpoint-2/rng_state_1.pth").is_file()
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


if __name__ == "__main__":
    main(sys.argv[1])
