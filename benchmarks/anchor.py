"""How far every operation is from what it has to reach at the anchor: `python -m benchmarks.anchor --seconds 200`.

Within the given time, most telling first: compile in several processes; then ours beside plain torch, each judged by the
correctness gate of `benchmarks.run` and measured in turn with the bare product; then the kernels of each operation by
torch.profiler; then torch.compile and peers, and the portable way. What is not reached is said. The last lines are the
table of `targets`: measured, target, met or not.

    --only TEXT      cases that have this text: an operation, a divergence
    --parts NAME ... ours, kernels, chunked, others: in this order
    --out DIR        bench.jsonl, bench.md, kernels.jsonl, kernels.md, targets.md
    --figures        nothing is measured: the tables of what lies in DIR
    --quick          tiny shapes; with TRITON_INTERPRET=1 also on a CPU, where the times say nothing
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import harness, report, targets
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.harness import Row
from benchmarks.presets import GPU_ANCHOR
from benchmarks.providers import OURS, PROVIDERS, Provider
from benchmarks.run import Judge, benchmark
from benchmarks.targets import Figure, Kernel
from duet_kernels import resolve_impl, set_workspace_bytes

TOY = {"n": 16, "d": 16, "v": 160, "k": 4, "dtype": torch.float32}
ROW_SECONDS = 0.3  # timed: six calls of 50 ms
SLOW_SECONDS = 1.0
WARM_SECONDS = 90.0
PROFILED = ("triton", "triton 3 GiB")
PARTS = "ours", "kernels", "chunked", "others"
FILES = "bench.jsonl", "bench.md", "kernels.jsonl", "kernels.md", "targets.md"


def figures_of(shape: dict, only: Sequence[str]) -> list[Figure]:
    return [f for f in targets.figures(**shape) if not only or any(text in str(f.case) for text in only)]


def cases_of(shape: dict, only: Sequence[str]) -> list[Case]:
    """The cases of the table, in its order, and those that are shown beside them."""
    more = [
        Case("linear_cross_entropy", **shape),
        Case("topk_distill_loss", divergence="forward_kl", **shape),
    ]
    more = [case for case in more if not only or any(text in str(case) for text in only)]
    return list(dict.fromkeys([*(figure.case for figure in figures_of(shape, only)), *more]))


def providers_of(quick: bool) -> dict[str, list[Provider]]:
    """Who is measured when: ours with plain torch as the judge of values at full size, then the others."""
    kernels = [p for p in PROVIDERS if p.name == OURS and p.impl.startswith("triton")]
    if quick:  # in the interpreter
        kernels = [dataclasses.replace(p, devices=("cpu", "cuda")) for p in kernels]
    eager = [p for p in PROVIDERS if (p.name, p.impl) == ("torch", "eager")]
    chunked = [p for p in PROVIDERS if (p.name, p.impl) == (OURS, "chunked")]
    rest = [p for p in PROVIDERS if p not in eager and p.name != OURS]
    return {"ours": [*kernels, *eager], "chunked": chunked, "others": [*eager, *rest]}


# --- compiling --------------------------------------------------------------------------------------------------


def side_by_side(target: Callable[..., None], arguments: Sequence[tuple], seconds: float) -> None:
    """`target` of each arguments in a process of its own; those that have not ended in time are ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.run"])  # what takes long to import
    processes = [context.Process(target=target, args=given) for given in arguments]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def compile_cases(cases: Sequence[Case], device: str, quick: bool) -> None:
    """One call of each kernel of ours and of torch.compile, at the gate's size and at full size: it is in the caches then.

    What fails here is reported where it is measured.
    """
    torch.set_num_threads(2)
    who = providers_of(quick)
    wanted = [p for p in (*who["ours"], *who["others"]) if p.name == OURS or p.impl.endswith("compile")]
    for case in cases:
        for size in (case,) if quick else (case.small(), case):
            inputs = make_inputs(size, device)
            for provider in (p for p in wanted if p.takes(case) and p.absent(case, device) is None):
                try:
                    call_of(provider, size, inputs)()
                except Exception as error:
                    print(f"compiling {case.op} {provider.label}: {harness.why(error)}", flush=True)
                torch.compiler.reset()
                torch.cuda.empty_cache()


def call_of(provider: Provider, case: Case, inputs: Inputs) -> Callable[[], object]:
    """Forward and, where there is one, backward, within the provider's workspace."""
    run = provider.build(case)

    def call() -> object:
        before = set_workspace_bytes(provider.workspace_mb << 20 if provider.workspace_mb else None)
        try:
            output = run(inputs)
            return torch.autograd.grad(output, inputs.leaves) if case.has_gradient else output
        finally:
            set_workspace_bytes(before)

    return call


# --- kernels ----------------------------------------------------------------------------------------------------


def profiled(case: Case, provider: Provider, device: torch.device, where: dict[str, str]) -> Iterator[Kernel]:
    """What runs on the device in one call, by kernel name, the longest first. On a CPU: torch's own operations."""
    call = call_of(provider, case, make_inputs(case, device))
    for _ in range(2):
        call()
    on_gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    repeats = 3 if on_gpu else 1
    with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
        for _ in range(repeats):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in profile.events():
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name][0] += 1
            sums[event.name][1] += event.device_time_total if on_gpu else event.self_cpu_time_total
    about = {"op": case.op, "divergence": case.divergence, "ids": case.ids, "head": case.head}
    about |= {"n": case.n, "k": case.k, "impl": provider.impl}
    about |= {"commit": where["commit"], "device": where["device"]}
    for name, (calls, us) in sorted(sums.items(), key=lambda item: -item[1][1]):
        yield Kernel(**about, kernel=name, calls=calls / repeats, ms=us / repeats / 1e3)


def kernel_tables(kernels: Sequence[Kernel], most: int = 12) -> str:
    lines = ["Summed time of the kernels of one call, forward and backward.", ""]
    groups: dict[tuple, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(targets.key_of(kernel), []).append(kernel)
    for key, group in groups.items():
        total = sum(kernel.ms for kernel in group)
        lines += [
            "",
            f"**{targets.what(key)}**: {report.number(total)} ms",
            "",
            "| ms | calls | kernel |",
            "|---:|---:|---|",
        ]
        lines += [f"| {x.ms:.3f} | {x.calls:g} | `{x.kernel[:100]}` |" for x in group[:most]]
    return "\n".join(lines)


# --- the run ----------------------------------------------------------------------------------------------------


class Run:
    """What is measured until the time is over, each row written as soon as it is there."""

    def __init__(self, options: argparse.Namespace, shape: dict) -> None:
        self.options, self.shape = options, shape
        self.device = torch.device(options.device)
        self.start = time.monotonic()
        self.cases = cases_of(shape, options.only)
        contested = (f.case for f in figures_of(shape, options.only) if f.impl == "chunked")
        self.contested = list(dict.fromkeys(contested))
        self.who = providers_of(options.quick)
        self.rows: dict[tuple, Row] = {}
        self.judge = Judge(self.device, (lambda case: case) if options.quick else Case.small)
        self.skipped: list[str] = []

    def has_time(self, what: str) -> bool:
        if time.monotonic() - self.start < self.options.seconds:
            return True
        self.skipped.append(what)
        return False

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.start:6.0f} s  {text}", flush=True)

    def write(self, name: str, line: str) -> None:
        with (self.options.out / name).open("a") as file:
            file.write(line + "\n")

    def all(self) -> bool:
        """False when the device stopped answering: what was begun is lost, and the rest needs another process."""
        if not self.options.begun:
            for name in FILES:
                (self.options.out / name).unlink(missing_ok=True)
            self.say(f"{self.device}: {auto_choices(self.device, self.shape['dtype'])}")
            if self.options.jobs:
                shares = [self.cases[start :: self.options.jobs] for start in range(self.options.jobs)]
                given = [(share, self.options.device, self.options.quick) for share in shares if share]
                side_by_side(compile_cases, given, min(WARM_SECONDS, 0.4 * self.options.seconds))
                self.say("compiled")
        else:
            rows = self.options.out / "bench.jsonl"
            self.add(harness.read_rows(rows) if rows.exists() else [])
        for part, case in self.steps()[self.options.begun :]:
            self.options.begun += 1
            try:
                if part == "kernels":
                    self.profile(case)
                else:
                    self.measure(case, part)
            except Exception as error:
                self.say(f"{part} of {case}: {harness.why(error)}")
            if not harness.answers(self.device):
                self.say(f"the device no longer answers after {part} of {case}: the rest in another process")
                return False
        if self.skipped:
            self.say(f"no time for {len(self.skipped)}: {'; '.join(self.skipped)}")
        return True

    def steps(self) -> list[tuple[str, Case]]:
        cases = dict.fromkeys(PARTS, self.cases) | {"chunked": self.contested}
        return [(part, case) for part in PARTS if part in self.options.parts for case in cases[part]]

    def add(self, rows: Sequence[Row]) -> list[Row]:
        """Those that are new: plain torch is the judge of two parts."""
        new = [row for row in rows if (*targets.key_of(row), row.provider) not in self.rows]
        self.rows |= {(*targets.key_of(row), row.provider): row for row in new}
        return new

    def measure(self, case: Case, part: str) -> None:
        if not self.has_time(
            f"{part} of {case.op} {case.divergence} {case.head} {case.ids} N {case.n} K {case.k}"
        ):
            return
        made = benchmark(
            [case],
            self.who[part],
            device=self.device,
            seconds=ROW_SECONDS,
            slow_seconds=0.0 if self.options.quick else SLOW_SECONDS,
            passes=["full"],
            judge=self.judge,
        )
        for row in self.add(made):
            self.write("bench.jsonl", row.to_json())
            self.say(report.line(row))

    def profile(self, case: Case) -> None:
        where = harness.environment(self.device)
        for provider in self.who["ours"]:
            if provider.impl not in PROFILED or not provider.takes(case):
                continue
            if provider.absent(case, self.device) or not self.judge(provider, case).green:
                continue
            if not self.has_time(f"kernels of {case.op} {provider.impl}"):
                return
            found = list(profiled(case, provider, self.device, where))
            for kernel in found:
                self.write("kernels.jsonl", json.dumps(dataclasses.asdict(kernel)))
            self.say(f"kernels of {case.op} {case.divergence} {case.head} {provider.impl}: "
                     f"{report.number(sum(kernel.ms for kernel in found))} ms")  # fmt: skip


def in_another_process(words: Sequence[str], begun: int, seconds: float) -> None:
    """This program anew, in the place of this process; it skips the steps that were begun."""
    more = ["--begun", str(begun), "--seconds", str(seconds)]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.anchor", *words, *more])


def auto_choices(device: torch.device, dtype: torch.dtype) -> str:
    names = "linear_topk", "topk_distill_loss", "topk_distill_loss/lse", "linear_distill_loss"
    names += "linear_cross_entropy", "linear_token_stats", "linear_logsumexp", "linear_gather"
    return "auto takes " + ", ".join(f"{resolve_impl(name, device, dtype)[0]} for {name}" for name in names)


def machine(rows: Sequence[Row]) -> str:
    """What the floors are made of, over the run."""
    products = [row.floor_ms for row in rows if row.op == "linear_token_stats" and row.floor_ms]
    copies = sorted({f"copy {report.number(row.copy_gb_s / 1e3)} TB/s" for row in rows if row.copy_gb_s})
    said = (
        [f"bare product G {report.number(min(products))} to {report.number(max(products))} ms"]
        if products
        else []
    )
    return ", ".join(said + copies)


def print_figures(out: pathlib.Path, figures: Sequence[Figure], gate: str) -> None:
    """All tables of what lies in `out`, written, and the last one printed."""
    rows = harness.read_rows(out / "bench.jsonl") if (out / "bench.jsonl").exists() else []
    path = out / "kernels.jsonl"
    kernels = [Kernel(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    if rows:
        (out / "bench.md").write_text(report.tables(rows) + "\n")
    (out / "kernels.md").write_text(kernel_tables(kernels) + "\n")
    lines, counted = targets.table(figures, rows, kernels)
    last = [f"correctness gate: {gate if gate == 'green' else 'NOT GREEN: ' + gate}"] if gate else []
    ours = [row for row in rows if row.provider == OURS]
    head = [report.where(ours) + ". The targets are an H200's.", machine(ours)] if ours else []
    head += ["", targets.LEGEND, ""]
    text = "\n".join([*head, *lines, "", *last, f"figures: {counted}"])
    (out / "targets.md").write_text(text + "\n")
    print(text, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--jobs", type=int, help="processes that compile first; 0: none")
    parser.add_argument("--gate", default="", help="the colour of the gate before, for the tables")
    parser.add_argument("--begun", type=int, default=0, help=argparse.SUPPRESS)
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    if options.jobs is None:
        options.jobs = 0 if options.device == "cpu" else min(6, os.cpu_count() or 1)
    options.out.mkdir(parents=True, exist_ok=True)
    shape = TOY if options.quick else GPU_ANCHOR
    wrong = False
    if not options.figures:
        run = Run(options, shape)
        if not run.all():
            in_another_process(words, options.begun, options.seconds - (time.monotonic() - run.start))
        wrong = any(row.gate == "red" and row.provider == OURS for row in run.rows.values())
    print_figures(options.out, figures_of(shape, options.only), options.gate)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
