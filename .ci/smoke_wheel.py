"""Unpack the built wheel into an empty folder and use it from there, away from the checkout."""

import os
import pathlib
import subprocess
import sys
import tempfile

USE = """
import pathlib, torch, duet, duet_kernels
for package in (duet, duet_kernels):
    assert pathlib.Path(package.__file__).is_relative_to(pathlib.Path.cwd()), package.__file__
    assert (pathlib.Path(package.__file__).parent / "py.typed").exists()
assert (pathlib.Path(duet_kernels.__file__).parent / "MATH.md").exists()
hidden = torch.randn(3, 8, requires_grad=True)
teacher = duet_kernels.linear_topk(torch.randn(3, 8), torch.randn(50, 8), k=5)
duet_kernels.topk_distill_loss(hidden, torch.randn(50, 8), teacher).backward()
assert hidden.grad.abs().sum() > 0
from transformers import AutoModelForCausalLM
from duet.demo.checkpoint import load_base
model, tokenizer = load_base()
print("wheel works from", pathlib.Path.cwd(), "with a model of", model.num_parameters(), "parameters")
"""


def main(dist: str) -> None:
    (wheel,) = pathlib.Path(dist).resolve().glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder, str(wheel)], check=True)
        environment = {**os.environ, "PYTHONPATH": folder}
        subprocess.run([sys.executable, "-c", USE], check=True, cwd=folder, env=environment)
        subprocess.run([sys.executable, "-m", "duet.cli", "env"], check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    main(sys.argv[1])
