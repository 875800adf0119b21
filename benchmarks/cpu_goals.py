"""What the top-k losses cost on a CPU next to full logits: `python -m benchmarks.cpu_goals`.

One shape of a Llama-3 vocabulary (V = 128256, D = 1024, N = 512, K = 64, fp32, frozen head), against what people write
who have no top-k loss: the divergence of full softmaxes. Beside them what plain torch takes for the same k logits. The
correctness gate of `benchmarks.run` comes first; when it is red no time is printed. Writes results/cpu/goals.jsonl and
goals.md. Exits 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.harness import environment, measure
from benchmarks.presets import CPU_ANCHOR
from benchmarks.providers import Provider, Run, chosen
from benchmarks.run import gate, row_of

CPU = torch.device("cpu")
RESULTS = pathlib.Path(__file__).parent / "results" / "cpu"
LOSS = Case("topk_distill_loss", divergence="forward_kl", **CPU_ANCHOR)
SELECTION = Case("linear_topk", **CPU_ANCHOR)

# (ours, theirs, largest allowed time ratio ours / theirs, largest allowed memory ratio)
GOALS = [
    ("topk_distill_loss", "full logits, teacher and student", 1 / 60, 0.05),
    ("topk_distill_loss", "full logits, teacher given", 1 / 30, None),
    ("linear_topk", "mm + topk + logsumexp", 1.1, 0.15),
]
GATHERED = "k rows of W gathered, plain torch"  # has no goal: stands beside the others
OURS_NAMES = ("topk_distill_loss", "linear_topk")
NAMES = tuple(dict.fromkeys(name for goal in GOALS for name in goal[:2]))


def full_logits(case: Case) -> Run:
    def run(x: Inputs) -> torch.Tensor:
        with torch.no_grad():
            logp = torch.log_softmax(x.teacher_hidden @ x.teacher_weight.T, -1)
        logq = torch.log_softmax(x.hidden @ x.weight.T, -1)
        return F.kl_div(logq, logp, log_target=True, reduction="batchmean")

    return run


def full_logits_given(case: Case) -> Run:
    given: list[torch.Tensor] = []

    def run(x: Inputs) -> torch.Tensor:
        if not given:  # made in the warm-up: it stands for what a cache holds
            with torch.no_grad():
                given.append(torch.softmax(x.teacher_hidden @ x.teacher_weight.T, -1))
        return F.kl_div(torch.log_softmax(x.hidden @ x.weight.T, -1), given[0], reduction="batchmean")

    return run


def variants() -> dict[str, tuple[Case, Provider]]:
    ours = {provider.op: provider for provider in chosen(["duet_kernels/chunked"])}
    eager = {provider.op: provider for provider in chosen(["torch/eager"])}
    gathered = {provider.op: provider for provider in chosen(["torch/gather"])}
    full = dataclasses.replace(eager["topk_distill_loss"], build=full_logits)
    return {
        "topk_distill_loss": (LOSS, ours["topk_distill_loss"]),
        "full logits, teacher and student": (LOSS, full),
        "full logits, teacher given": (LOSS, dataclasses.replace(full, build=full_logits_given)),
        GATHERED: (LOSS, gathered["topk_distill_loss"]),
        "linear_topk": (SELECTION, ours["linear_topk"]),
        "mm + topk + logsumexp": (SELECTION, eager["linear_topk"]),
    }


def judged(measured: dict[str, tuple[float, float]]) -> tuple[str, bool]:
    """The goals as a table, from name -> (ms, MiB), and whether all are met."""
    lines = ["| goal | measured | met |", "|---|---|---|"]
    all_met = True
    for ours, theirs, time_goal, memory_goal in GOALS:
        time, memory = (a / b for a, b in zip(measured[ours], measured[theirs], strict=True))
        checks = [(f"time of {ours} <= {time_goal:.3g} x {theirs}", time, time_goal)]
        if memory_goal is not None:
            checks.append((f"extra memory of {ours} <= {memory_goal:.0%} of {theirs}", memory, memory_goal))
        for text, ratio, goal in checks:
            met = ratio <= goal
            all_met &= met
            faster = f" ({1 / ratio:.0f} x faster)" if goal < 1 and "time" in text else ""
            lines.append(f"| {text} | {ratio:.3g}{faster} | {'yes' if met else 'NO'} |")
    return "\n".join(lines), all_met


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    pairs = variants()
    verdicts = {name: gate(pairs[name][1], pairs[name][0], CPU) for name in OURS_NAMES}
    for name, verdict in verdicts.items():
        if not verdict.green:
            print(f"correctness gate: RED - no speed is reported ({name}: {verdict.reason})", file=sys.stderr)
            return 1
    print("correctness gate: green")
    inputs = make_inputs(LOSS, CPU)
    calls = {}
    for name, (case, provider) in pairs.items():
        run = provider.build(case)
        if case.has_gradient:
            calls[name] = lambda run=run: torch.autograd.grad(run(inputs), inputs.leaves)
        else:
            calls[name] = lambda run=run: run(inputs)
    took = measure(calls, device=CPU, min_rounds=arguments.rounds, max_rounds=arguments.rounds)
    where = environment(CPU)
    rows = {
        name: row_of(case, provider, where, case.passes[-1], gate="green", **took[name].fields())
        for name, (case, provider) in pairs.items()
    }
    for name, row in rows.items():
        row.provider = row.provider if name in OURS_NAMES else name
    goals, met = judged({name: (row.ms, row.peak_mb) for name, row in rows.items()})
    lines = [
        f"V = {LOSS.v}, D = {LOSS.d}, N = {LOSS.n}, K = {LOSS.k}, fp32, frozen head; {where['device']}, "
        f"torch {where['torch']}, commit {where['commit']}; `make bench`. `topk_distill_loss` (forward and backward) is "
        "given the teacher's top-k, as from a cache; with a live teacher add `linear_topk`.",
        "",
        "| | ms (p20 - p80) | extra memory, MiB |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        label = f"**{name}**" if name in OURS_NAMES else name
        lines.append(f"| {label} | {row.ms:.0f} ({row.ms_p20:.0f} - {row.ms_p80:.0f}) | {row.peak_mb:.0f} |")
    table = "\n".join([*lines, "", goals])
    print(table)
    if not arguments.no_write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "goals.jsonl").write_text("".join(row.to_json() + "\n" for row in rows.values()))
        (RESULTS / "goals.md").write_text(table + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
