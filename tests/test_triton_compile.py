"""Every kernel compiles for GPUs that are not there, at the tiles it would be launched with: benchmarks.compile_gate."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "duet_kernels" / "triton"


def outside_the_interpreter(tmp_path, *command):
    """A process of its own: this one decorated its kernels for the interpreter, which cannot be undone."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, dtypes",
    [(80, ["bfloat16"]), (90, ["bfloat16", "float16", "float32"]), (100, ["bfloat16"])],
    ids=["80", "90", "100"],
)
def test_every_kernel_compiles_without_spills(arch, dtypes, tmp_path):
    """Every kernel, on sm_90 in every dtype. All launches, some 250 for each architecture: `make compile`."""
    out = tmp_path / "rows.json"
    done = outside_the_interpreter(
        tmp_path,
        "-m",
        "benchmarks.compile_gate",
        "--arch",
        str(arch),
        "--sample",
        "1000",
        *(word for dtype in dtypes for word in ("--dtype", dtype)),
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    # No kernel of the package is left out, in none of the dtypes it reads.
    defined = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())
    }
    assert {row["kernel"] for row in rows} == defined and len(defined) >= 6
    for kernel in ("_forward_kernel", "_dhidden_kernel", "_partial_kernel", "_segments_kernel"):
        assert {row["dtype"] for row in rows if row["kernel"] == kernel} == set(dtypes)
    gathers = [row for row in rows if row["case"].startswith("gather")]
    assert all(row["stack"] == row["local"] == 0 for row in gathers)
    # What tiles.py counts on: at least three programs a multiprocessor where rows begin on 16 bytes.
    assert all(row["programs_per_sm"] >= 3 for row in gathers if "D=4097" not in row["case"])


BAD_KERNEL = """
import torch, triton, triton.language as tl
from benchmarks import compile_gate as gate

@triton.jit
def _bad_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = 3 * (tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(x_ptr + i, x * tl.sum(y))
    tl.store(y_ptr + i, y * tl.sum(x))

x = torch.empty(128, 128, device="meta")
case = gate.Case("bad", torch.float32, lambda: _bad_kernel[(1,)](x, x, 128, num_warps=1), True, ("_bad_kernel",))
gate.SHARED_LIMIT[90] = -1
with gate.recorded(90) as launches:
    case.call()
print(gate.examine(case, launches[0], 90).problems)
"""


@pytest.mark.slow
def test_the_gate_can_fail(tmp_path):
    script = tmp_path / "bad_kernel.py"
    script.write_text(BAD_KERNEL)
    done = outside_the_interpreter(tmp_path, str(script))
    assert done.returncode == 0, done.stderr
    for problem in ("spills: stack", "no 16-byte load", "shared memory"):
        assert problem in done.stdout


BAD_PRODUCT = """
import torch, triton, triton.language as tl
from benchmarks import compile_gate as gate

@triton.jit
def _upcast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + i).to(tl.float32), tl.load(y_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, tl.dot(x, y, input_precision="ieee").to(tl.bfloat16))

x = torch.empty(64, 64, device="meta", dtype=torch.bfloat16)
# A case that allows spills: a product may not have them all the same.
case = gate.Case("bad", torch.bfloat16, lambda: _upcast_kernel[(1,)](x, x, 64, num_warps=1), False)
with gate.recorded(90) as launches:
    case.call()
print(gate.examine(case, launches[0], 90).problems)
"""


@pytest.mark.slow
def test_a_product_may_neither_spill_nor_miss_the_tensor_cores(tmp_path):
    script = tmp_path / "bad_product.py"
    script.write_text(BAD_PRODUCT)
    done = outside_the_interpreter(tmp_path, str(script))
    assert done.returncode == 0, done.stderr
    assert "spills: stack" in done.stdout and "no wgmma" in done.stdout


def test_the_gate_refuses_interpreted_kernels(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_gate"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


def test_launchers_on_the_cpu_say_what_to_do(tmp_path):
    """Without the interpreter a CPU tensor is refused by a sentence, not by a driver's stack trace."""
    code = (
        "import torch; from duet_kernels import LMHead; from duet_kernels.triton import linear_gather\n"
        "x = torch.ones(2, 4)\n"
        "linear_gather(x, LMHead(x), torch.zeros(2, 1, dtype=torch.int64))"
    )
    done = outside_the_interpreter(tmp_path, "-c", code)
    assert done.returncode == 1
    assert "RuntimeError: hidden: Triton kernels read GPU tensors and this one is on the CPU" in done.stderr
