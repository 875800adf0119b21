"""`make gpu`: is it right on this GPU, and then how fast. Installs nothing, needs no network, ends by itself.

    python -m benchmarks.gpu --seconds 480                 gate, anchor benchmark, tables
    python -m benchmarks.gpu --gate [--only TEXT] [--sections contract k]
    python -m benchmarks.gpu --bench                       without the gate; every provider is judged by the benchmark's own
    python -m benchmarks.gpu --device cpu --quick          the same code in Triton's interpreter, on tiny shapes

Writes gate.jsonl, one row a check, and the benchmark's rows and tables to benchmarks/results/<device> or to --out. A
red gate prints no speed: the benchmark does not run (--anyway runs it, and its tables say that the gate was red). Where
the gate's time did not suffice for every check the benchmark runs, and the exit status says that the gate is not green.
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
SECONDS = 480.0
BENCHMARK_SHARE = 0.4  # of all time, kept for the benchmark; it gets what the gate leaves as well
GRACE_SECONDS = 40.0  # of its time, in which the benchmark begins nothing: it starts, and what was begun ends


def benchmark(arguments: argparse.Namespace, out: pathlib.Path, seconds: float, gate: str) -> int:
    """`benchmarks.anchor` within `seconds`, and the tables of whatever it measured until then."""
    command = [sys.executable, "-m", "benchmarks.anchor", "--device", arguments.device, "--out", str(out)]
    command += ["--quick"] * arguments.quick + ["--gate", gate] * bool(gate)
    command += [word for text in arguments.case for word in ("--only", text)]
    # Users do not set what makes two runs of a library product equal; the gate does.
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    measuring = [*command, "--seconds", f"{max(0.0, seconds - GRACE_SECONDS):.0f}"]
    try:
        status = subprocess.run(
            measuring, cwd=ROOT, env=environment, timeout=max(1.0, seconds), check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"\nthe benchmark did not end in {seconds:.0f} s and was ended; its rows until then are kept")
        status = subprocess.run([*command, "--figures"], cwd=ROOT, check=False).returncode or 1
    rows = out / "bench.jsonl"
    if out.parent == RESULTS and rows.exists() and rows.read_text():
        # The README's tables are made of these rows.
        status = (
            subprocess.run([sys.executable, "-m", "benchmarks.readme"], cwd=ROOT, check=False).returncode
            or status
        )
    return status


def results_folder(device: str) -> pathlib.Path:
    """benchmarks/results/nvidia-h200, say."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--gate", action="store_true", help="the gate only")
    parser.add_argument("--bench", action="store_true", help="the benchmark only")
    parser.add_argument("--anyway", action="store_true", help="benchmark behind a red gate too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, sampled operations")
    parser.add_argument("--sections", nargs="+", default=[], help="of the gate")
    parser.add_argument("--only", action="append", default=[], help="checks whose section/name has this text")
    parser.add_argument("--skip", action="append", default=[], help="checks to leave out")
    parser.add_argument("--case", action="append", default=[], help="benchmark cases that have this text")
    parser.add_argument("--jobs", type=int, help="processes of the gate; 0: this one")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/<device>")
    arguments = parser.parse_args(words)
    if arguments.gate and arguments.bench:
        parser.error("--gate and --bench: wanted one of them")
    return arguments


def main(words: list[str] | None = None) -> int:
    start = time.monotonic()
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
    out = arguments.out or results_folder(arguments.device)
    result = ""  # of a gate that was not asked for
    if not arguments.bench:
        from benchmarks.gpu import gate  # brings the kernels along

        share = 1.0 if arguments.gate else 1.0 - BENCHMARK_SHARE
        result = gate.run(arguments, out, share * arguments.seconds - (time.monotonic() - start))
        if arguments.gate:
            return int(result != gate.GREEN)
        if result == gate.RED and not arguments.anyway:
            print("no speed is measured behind a red gate (--anyway measures it)", file=sys.stderr)
            return 1
    left = arguments.seconds - (time.monotonic() - start)
    return benchmark(arguments, out, left, result) or int(result not in ("", "green"))


if __name__ == "__main__":
    sys.exit(main())
