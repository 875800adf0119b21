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
    "archs, dtypes", [((90,), ("bfloat16", "float16", "float32")), ((80, 100), ("bfloat16",))]
)
def test_every_kernel_compiles_without_spills(archs, dtypes, tmp_path):
    """Every kernel, on sm_90 in every dtype. All launches, some 630 for each architecture: `make compile`."""
    out = tmp_path / "rows.json"
    done = outside_the_interpreter(
        tmp_path,
        *("-m", "benchmarks.compile_gate", "--sample", "1000", "--json", str(out)),
        *(word for arch in archs for word in ("--arch", str(arch))),
        *(word for dtype in dtypes for word in ("--dtype", dtype)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    # No kernel of the package is left out, in none of the dtypes it reads.
    defined = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())
    }
    assert len(defined) >= 6
    for arch in archs:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == defined
        for kernel in ("_forward_kernel", "_dhidden_kernel", "_partial_kernel", "_segments_kernel"):
            there = {row["dtype"] for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)}
            assert there == set(dtypes)
    gathers = [row for row in rows if row["case"].startswith("gather")]
    assert all(row["stack"] == row["local"] == 0 for row in gathers)
    # What tiles.py counts on: at least three programs a multiprocessor where rows begin on 16 bytes.
    assert all(row["programs_per_sm"] >= 3 for row in gathers if "D=4097" not in row["case"])


# Two kernels that the gate must refuse, and a launcher on the CPU: nothing of it needs a process of its own.
SCRIPT = r"""
import re, torch, triton, triton.language as tl
from benchmarks import compile_gate as gate
from duet_kernels import LMHead
from duet_kernels.ops import linear_gather
from triton.backends.amd.compiler import HIPOptions

@triton.jit
def _bad_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = 3 * (tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(x_ptr + i, x * tl.sum(y))
    tl.store(y_ptr + i, y * tl.sum(x))

@triton.jit
def _upcast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + i).to(tl.float32), tl.load(y_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, tl.dot(x, y, input_precision="ieee").to(tl.bfloat16))

def problems(case, limit=gate.SHARED_LIMIT[90]):
    gate.SHARED_LIMIT[90] = limit
    with gate.recorded(90) as launches:
        case.call()
    return gate.examine(case, launches[0], 90).problems

x = torch.empty(64, 64, device="meta")
call = lambda: _bad_kernel[(1,)](x, x, 64, num_warps=1)
print("kernel", problems(gate.Case("bad", torch.float32, call, True, ("_bad_kernel",)), limit=-1))
y = torch.empty(32, 32, device="meta", dtype=torch.bfloat16)
# A case that allows spills: a product may not have them all the same.
call = lambda: _upcast_kernel[(1,)](y, y, 32, num_warps=1, maxnreg=64)
print("product", problems(gate.Case("bad", torch.bfloat16, call, False)))

options = set()
torch.version.hip = "7.0"
for case in gate.cases():
    if case.dtype == torch.bfloat16 or "gather" not in case.name:
        with gate.recorded(0) as launches:
            case.call()
        options |= {option for launch in launches for option in launch.options}
torch.version.hip = None
print("options", *sorted(options))
print("unknown", sorted(options - set(HIPOptions.__dataclass_fields__)))

case = next(iter(gate.dense_cases(torch.bfloat16, divergences=(("reverse_kl", 0.5),))))
with gate.recorded(90) as launches:
    case.call()
launch = next(l for l in launches if l.kernel.fn.__name__ == "_gradient_kernel")
ptx, columns = gate.compile_launch(launch, 90).asm["ptx"], launch.constexprs["COLUMNS"] // 32
print("rounded", len(re.findall(r"fma\.rn\.f32[^;]*, 0f00000000;", ptx)), 2 * columns)

x = torch.ones(2, 4)
linear_gather(x, LMHead(x), torch.zeros(2, 1, dtype=torch.int64), "triton")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What the script printed, by the first word of the line, and its error."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT)
    done = outside_the_interpreter(folder, str(folder / "script.py"))
    assert done.returncode == 1, done.stderr
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines()) | {"error": done.stderr}


@pytest.mark.slow
def test_the_gate_can_fail(script):
    for problem in ("spills: stack", "no 16-byte load", "shared memory"):
        assert problem in script["kernel"]


@pytest.mark.slow
def test_a_product_may_neither_spill_nor_miss_the_tensor_cores(script):
    assert "spills: stack" in script["product"] and "no wgmma" in script["product"]
    assert "shared memory" not in script["product"]


@pytest.mark.slow
def test_no_launch_has_an_option_that_triton_for_amd_refuses(script):
    assert script["options"].split() == ["num_stages", "num_warps"] and script["unknown"] == "[]"


@pytest.mark.slow
def test_logits_are_rounded_before_they_are_subtracted(script):
    """Those of both sides times the scale of their head, a product that a compiler would fuse."""
    found, wanted = map(int, script["rounded"].split())
    assert found == wanted > 0


@pytest.mark.slow
def test_launchers_on_the_cpu_say_what_to_do(script):
    """Without the interpreter a CPU tensor is refused by a sentence, not by a driver's stack trace."""
    assert (
        "RuntimeError: hidden: Triton kernels read GPU tensors and this one is on the CPU" in script["error"]
    )


def test_the_gate_refuses_interpreted_kernels(capsys, monkeypatch):
    from benchmarks import compile_gate

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["compile_gate"])
    assert compile_gate.main() == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err
