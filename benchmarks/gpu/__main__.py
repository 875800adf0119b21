"""`make gpu`: is it right on this GPU, and then how fast. Installs nothing, needs no network.

    python -m benchmarks.gpu                           gate, benchmark, tables and figures: under nine minutes
    python -m benchmarks.gpu --gate [--only TEXT]      the gate alone
    python -m benchmarks.gpu --device cpu --quick      the same code in Triton's interpreter, on tiny shapes

Writes gate.jsonl, one row a check, and the benchmark's rows, tables and figures to benchmarks/results/<device>. A red
gate prints no speed: the benchmark does not run. Where the gate's time did not suffice for every check the benchmark
runs, and the exit status says that the gate is not green.

Must not know what is checked (`correctness`, `conduct`, `limits`) nor how speed is measured (`benchmarks.run`).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GATE_SECONDS = 260.0
BENCHMARK_SECONDS = 180.0
LEAST_BENCHMARK_SECONDS = 60.0
SECONDS_A_ROW = 0.3  # timed: twenty calls of 15 ms


def benchmark(arguments: argparse.Namespace, out: pathlib.Path) -> int:
    """`benchmarks.run` within the time that is left for it; what it measured until then is kept."""
    preset = "quick" if arguments.quick else arguments.preset
    rows = out / "bench.jsonl"
    command = [sys.executable, "-m", "benchmarks.run"]
    measuring = [*command, "--device", arguments.device, "--preset", preset, "--out", str(rows)]
    measuring += ["--passes", "full", "--budget-seconds", str(SECONDS_A_ROW)]
    try:
        status = subprocess.run(
            measuring, cwd=ROOT, timeout=arguments.benchmark_seconds, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(
            f"\nthe benchmark was ended after {arguments.benchmark_seconds:.0f} s, its later cases unmeasured"
        )
        status = 0
    if not rows.exists() or not rows.read_text():
        return status or 1
    table = subprocess.run(
        [*command, "--table", str(rows)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if table.returncode == 0:
        rows.with_suffix(".md").write_text(table.stdout)
        print(table.stdout)
    made = [[*command, "--plots", str(rows)]]
    if out.parent == RESULTS:
        made.append([sys.executable, "-m", "benchmarks.readme"])  # the README's tables are made of these rows
    failed = [step for step in made if subprocess.run(step, cwd=ROOT, check=False).returncode]
    return status or table.returncode or len(failed)


def left_for_benchmark(arguments: argparse.Namespace, gate_took: float) -> float:
    """Its own time less what the gate took beyond its own: the last check of each batch may end late."""
    late = max(0.0, gate_took - arguments.gate_seconds)
    wanted = arguments.benchmark_seconds
    return max(wanted - late, min(wanted, LEAST_BENCHMARK_SECONDS))


def results_folder(device: str) -> pathlib.Path:
    """benchmarks/results/nvidia-h200, say."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gate", action="store_true", help="the gate only")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, sampled operations")
    parser.add_argument("--only", action="append", default=[], help="checks whose section/name has this text")
    parser.add_argument("--skip", action="append", default=[], help="checks to leave out")
    parser.add_argument("--jobs", type=int, help="processes of the gate; 0: this one")
    parser.add_argument("--gate-seconds", type=float, default=GATE_SECONDS)
    parser.add_argument("--benchmark-seconds", type=float, default=BENCHMARK_SECONDS)
    parser.add_argument("--preset", default="anchor", help="of benchmarks.run")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = parsed(words)
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated: before the first import
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # two runs of a library product are equal
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu: this torch sees no CUDA device; --device cpu --quick runs the interpreter", file=sys.stderr
        )
        return 2
    from benchmarks.gpu import gate  # brings the kernels along
    from benchmarks.gpu.suite import Suite

    if arguments.worker:
        gate.serve(gate.checks_of(Suite(torch.device(arguments.device), arguments.quick)))
        return 0
    out = arguments.out or results_folder(arguments.device)
    start = time.monotonic()
    result = gate.run(arguments, out)
    if arguments.gate:
        return int(result != gate.GREEN)
    if result == gate.RED:
        print("no speed is measured behind a red gate", file=sys.stderr)
        return 1
    arguments.benchmark_seconds = left_for_benchmark(arguments, time.monotonic() - start)
    return benchmark(arguments, out) or int(result != gate.GREEN)


if __name__ == "__main__":
    sys.exit(main())
