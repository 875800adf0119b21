"""How operations behave inside a program: no host synchronisation, autocast, torch.compile, CUDA graphs, sanitizers.

Run as a program (`python -m benchmarks.gpu.conduct NAME ...`) it calls operations once: what compute-sanitizer watches.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.suite import (
    FULL,
    SELECTIONS,
    Check,
    Selection,
    Skip,
    Suite,
    assert_equal,
    kernels,
    outcome,
    with_cached_teacher,
)
from duet_kernels import (
    LMHead,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    topk_distill_loss,
)
from duet_kernels.testing import Op, gradients

ROOT = pathlib.Path(__file__).parents[2]

# What torch.compile traces: public functions of leaves and constants, by the name that `resolve_impl` knows.
TRACED: dict[str, Callable[..., Tensor]] = {
    "topk_distill_loss": lambda hidden, head, problem, teacher, **impl: topk_distill_loss(
        hidden, head, teacher, **impl
    ),
    "topk_distill_loss/lse": lambda hidden, head, problem, teacher, **impl: topk_distill_loss(
        hidden, head, teacher, divergence="jsd", normalization="tail", **impl
    ),
    "linear_gather": lambda hidden, head, problem, teacher, **impl: linear_gather(
        hidden, head, teacher.indices, **impl
    ),
    "linear_logsumexp": lambda hidden, head, problem, teacher, **impl: linear_logsumexp(hidden, head, **impl),
    "linear_cross_entropy": lambda hidden, head, problem, teacher, **impl: linear_cross_entropy(
        hidden, head, problem.labels, **impl
    ),
    "linear_distill_loss": lambda hidden, head, problem, teacher, **impl: linear_distill_loss(
        hidden, head, problem.teacher_hidden, problem.teacher_head, **impl
    ),
}


def conduct(suite: Suite) -> Iterator[Check]:
    def no_sync(op: Op | Selection, impl: str) -> None:
        suite.needs_cuda()
        problem = with_cached_teacher(suite.problem(suite.sizes.small, "bf16", bias=True))
        mask = torch.arange(problem.hidden.shape[0], device=suite.device) % 3 != 1
        uses: list[dict[str, Any]] = [{}]
        if isinstance(op, Op) and op.loss:
            uses += [{"mask": mask, "reduction": "mean"}, {"mask": mask, "reduction": "mean", "num_items": 7}]
        for options in uses:
            outcome(op, problem, impl, **options)  # compiling and loading a kernel may wait
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                outcome(op, problem, impl, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def autocast(op: Op | Selection, impl: str) -> None:
        problem = suite.problem(suite.sizes.small, "fp32", bias=True)
        plain = outcome(op, problem, impl)
        with torch.autocast(suite.device.type, dtype=torch.bfloat16):
            assert_equal(outcome(op, problem, impl), plain, "under autocast")

    def compiled(name: str, impl: str, backend: str) -> None:
        problem = suite.problem(suite.sizes.small, "fp32", bias=True)
        teacher = problem.teacher_topk()

        def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return TRACED[name](hidden, LMHead(weight, bias), problem, teacher, impl=impl).sum()

        results = []
        torch.compiler.reset()
        for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
            case = problem.requiring(problem.leaves)
            loss = run(case.hidden, case.weight, case.bias)
            results.append([loss.detach(), *gradients(loss, case).values()])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6 * float(eager.abs().max()))

    for op, impl in kernels(suite, (*suite.broad, *SELECTIONS)):
        yield Check(
            "conduct", f"no host synchronisation {impl} {op.name}", functools.partial(no_sync, op, impl)
        )
    for op, impl in kernels(suite, (*suite.sampled, *SELECTIONS)):
        yield Check("conduct", f"autocast {impl} {op.name}", functools.partial(autocast, op, impl))
    cases = [(name, "triton", "aot_eager") for name in (list(TRACED)[:1] if suite.quick else TRACED)]
    cases += [] if suite.quick else [("topk_distill_loss", impl, "inductor") for impl in ("triton", "auto")]
    for name, impl, backend in cases:
        run = functools.partial(compiled, name, impl, backend)
        yield Check("conduct", f"torch.compile {backend} {impl} {name}", run, seconds=180)
    for op in suite.sampled:
        if op.name in ("topk-huber", "topk-jsd-tail"):
            yield Check("conduct", f"CUDA graph {op.name}", functools.partial(captured, suite, op))


def captured(suite: Suite, op: Op) -> None:
    """Forward and backward recorded once, replayed on other numbers in the same memory."""
    suite.needs_cuda()
    problem = with_cached_teacher(suite.problem(suite.sizes.small, "bf16", bias=True))
    other = suite.problem(suite.sizes.small, "bf16", bias=True, seed=1)
    case = problem.requiring(problem.leaves)

    def step() -> list[Tensor]:
        output = op.run(case, "triton")
        return [output, *gradients(output.sum(), case).values()]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for name in case.leaves:
            getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [x.detach().clone() for x in results]
    assert_equal(replayed, [x.detach() for x in step()], "a replayed graph")


# --- compute-sanitizer ------------------------------------------------------------------------------------------

SANITIZER_SECONDS = 120
# One process for each tool and group of operations. Races are looked for where a kernel's warps share memory.
SANITIZED = {
    "memcheck": (
        ("gather", "topk-huber"),
        ("logsumexp-exclude", "topk-jsd-tail"),
        ("cross-entropy", "linear-forward_kl"),
        ("topk", "token-stats"),
    ),
    "racecheck": (("topk", "gather"), ("cross-entropy", "linear-forward_kl")),
}
REFUSAL = "Device not supported"  # said of a machine, not of a kernel


def sanitizer(suite: Suite) -> Iterator[Check]:
    for tool, groups in SANITIZED.items():
        for names in groups:
            run = functools.partial(sanitized, suite, tool, names)
            yield Check("sanitizer", f"{tool} {' '.join(names)}", run, seconds=SANITIZER_SECONDS + 10)


def sanitized(suite: Suite, tool: str, names: tuple[str, ...]) -> str:
    suite.needs_cuda()
    binary = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if binary is None:
        raise Skip("absent: compute-sanitizer is not on the PATH")
    command = [
        binary,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "benchmarks.gpu.conduct",
    ]
    # Without the caching allocator every tensor is an allocation of its own, with edges to run over.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False}
    try:
        done = subprocess.run([*command, *names], timeout=SANITIZER_SECONDS, **options)
    except subprocess.TimeoutExpired:
        raise Skip(f"not finished in {SANITIZER_SECONDS} s") from None
    return verdict(done.returncode, done.stdout + done.stderr)


def verdict(status: int, said: str) -> str:
    """The tool's summary of a clean run; a machine that it does not run on is no finding."""
    summary = " ".join(line.strip("= ") for line in said.splitlines() if "SUMMARY" in line)
    if status == 0:
        return summary
    if REFUSAL in said:
        raise Skip(f"absent: compute-sanitizer does not run on this machine: {REFUSAL}")
    raise AssertionError(f"exit status {status}: {summary or said[-600:]}")


def main(names: list[str]) -> None:
    """Each operation's kernel once, at a shape whose kernels are compiled already."""
    suite = Suite(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    problem = suite.problem(suite.sizes.small, "bf16", **FULL)
    by_name = {op.name: op for op in (*suite.sampled, *SELECTIONS)}
    for name in names:
        outcome(by_name[name], problem, "triton")
    if suite.cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
