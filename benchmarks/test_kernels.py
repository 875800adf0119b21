"""Microbenchmarks for pytest-benchmark: `pytest benchmarks/ --benchmark-only`, one group an operation.

Small shapes, for watching a change while it is written (`--benchmark-autosave`, `--benchmark-compare`). The numbers
that are published come from `benchmarks.run`, which measures memory and correctness as well.
"""

import pytest
import torch

from benchmarks.cases import DIVERGENCES, OPS, Case, make_inputs
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.run import gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (
    {"n": 1024, "d": 2048, "v": 32000, "dtype": torch.bfloat16}
    if DEVICE.type == "cuda"
    else {"n": 64, "d": 256, "v": 8000}
)
CASES = [Case(op, k=32, divergence=DIVERGENCES.get(op, ("",))[-1], **SHAPE) for op in OPS]
PAIRS = [
    pytest.param(case, provider, id=f"{case.op}-{provider.name}-{provider.impl}".replace(" ", "_"))
    for case in CASES
    for provider in PROVIDERS
    if provider.takes(case) and provider.impl != "compile"  # which takes longer to compile than to measure
]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_speed(benchmark, case: Case, provider: Provider):
    absent = provider.absent(case, DEVICE)
    if absent is not None:
        pytest.skip(absent)
    verdict = gate(provider, case, DEVICE)
    if verdict.reason.startswith("absent"):
        pytest.skip(verdict.reason)
    assert verdict.green, verdict.reason
    inputs = make_inputs(case, DEVICE)
    run = provider.build(case)

    def call():
        output = run(inputs)
        if case.has_gradient:
            torch.autograd.grad(output, inputs.leaves)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {case.divergence}".strip()
    benchmark.extra_info["error"] = verdict.error
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
