"""What the top-k losses cost on a CPU next to full logits: `python -m benchmarks.cpu_goals`.

One shape of a Llama-3 vocabulary (V = 128256, D = 1024, N = 512, K = 64, fp32, frozen head). A correctness gate runs
first; when it is red no time is printed. Writes results/cpu/goals.jsonl and goals.md. Exits 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import Row, environment, interleaved_seconds, peak_extra_bytes, quantile
from duet_kernels import LMHead, TopK, linear_gather, linear_topk, topk_distill_loss

N, D, V, K = 512, 1024, 128256, 64
RESULTS = pathlib.Path(__file__).parent / "results" / "cpu"

# (ours, theirs, pass, largest allowed time ratio ours / theirs, largest allowed memory ratio)
GOALS = [
    ("topk_distill_loss", "full logits, teacher and student", 1 / 60, 0.05),
    ("topk_distill_loss", "full logits, teacher given", 1 / 30, None),
    ("linear_topk", "mm + topk + logsumexp", 1.1, 0.15),
]


def inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher hidden states that mostly agree, and a weight that makes logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731 - three uses below
    teacher = draw(n, d)
    return teacher + 0.1 * draw(n, d), teacher, draw(v, d) * (3 / d**0.5)


def gate() -> bool:
    """On a small shape: selection, loss and gradient against full logits in fp64."""
    student, teacher, weight = inputs(64, 128, 4000, torch.float32)
    z_t, z_s = teacher.double() @ weight.double().T, student.double().requires_grad_()
    top = linear_topk(teacher, weight, 16)
    order = torch.sort(z_t, dim=-1, descending=True, stable=True)
    ok = torch.equal(top.indices, order.indices[:, :16])
    ok &= torch.allclose(top.tail_logsumexp.double(), order.values[:, 16:].logsumexp(-1), rtol=1e-5)
    chosen = order.indices[:, :16]
    logq = torch.log_softmax((z_s @ weight.double().T).gather(-1, chosen), -1)
    logp = torch.log_softmax(z_t.gather(-1, chosen), -1)
    truth = (logp.exp() * (logp - logq)).sum(-1).mean()
    truth.backward()
    hidden = student.clone().requires_grad_()
    loss = topk_distill_loss(hidden, weight, top, divergence="forward_kl")
    loss.backward()
    ok &= abs(loss.item() - truth.item()) <= 1e-4 * truth.item()
    error = (hidden.grad.double() - z_s.grad).norm() / z_s.grad.norm()
    ok &= error.item() <= 1e-4
    ok &= torch.allclose(
        linear_gather(teacher, weight, chosen).double(), z_t.gather(-1, chosen), rtol=1e-4, atol=1e-4
    )
    return bool(ok)


def variants() -> dict[str, tuple[str, str, str, Callable[[], object]]]:
    """name -> (op, provider, pass, call)"""
    student, teacher, weight = inputs(N, D, V, torch.float32)
    hidden = student.requires_grad_()
    head = LMHead(weight)
    top: TopK = linear_topk(teacher, head, K)
    given = torch.softmax(teacher @ weight.T, -1)

    def clear(loss: torch.Tensor) -> None:
        hidden.grad = None
        loss.backward()

    def ours() -> None:
        clear(topk_distill_loss(hidden, head, top, divergence="forward_kl"))

    def full() -> None:
        with torch.no_grad():
            logp = torch.log_softmax(teacher @ weight.T, -1)
        logq = torch.log_softmax(hidden @ weight.T, -1)
        clear(F.kl_div(logq, logp, log_target=True, reduction="batchmean"))

    def full_given() -> None:
        clear(F.kl_div(torch.log_softmax(hidden @ weight.T, -1), given, reduction="batchmean"))

    def select() -> object:
        return linear_topk(teacher, head, K)

    def select_full() -> object:
        z = teacher @ weight.T
        return torch.topk(z, K), torch.logsumexp(z, -1)

    return {
        "topk_distill_loss": ("topk_distill_loss", "duet_kernels", "full", ours),
        "full logits, teacher and student": ("topk_distill_loss", "torch", "full", full),
        "full logits, teacher given": ("topk_distill_loss", "torch", "full", full_given),
        "linear_topk": ("linear_topk", "duet_kernels", "forward", select),
        "mm + topk + logsumexp": ("linear_topk", "torch", "forward", select_full),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if not gate():
        print("correctness gate: RED - no speed is reported", file=sys.stderr)
        return 1
    print("correctness gate: green")
    runs = variants()
    seconds = interleaved_seconds({name: run[3] for name, run in runs.items()}, arguments.rounds)
    memory = {name: peak_extra_bytes(run[3]) for name, run in runs.items()}
    where = environment()
    rows = [
        Row(
            **where,
            gate="green",
            op=op,
            provider=name if provider != "duet_kernels" else provider,
            impl="chunked" if provider == "duet_kernels" else "eager",
            n=N,
            d=D,
            v=V,
            k=K,
            dtype="float32",
            which_pass=which,
            ms=round(1e3 * quantile(seconds[name], 0.5), 2),
            ms_p20=round(1e3 * quantile(seconds[name], 0.2), 2),
            ms_p80=round(1e3 * quantile(seconds[name], 0.8), 2),
            peak_mb=round(memory[name] / 2**20, 1),
        )
        for name, (op, provider, which, _) in runs.items()
    ]
    table, met = report(runs, rows, where)
    print(table)
    if not arguments.no_write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "goals.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
        (RESULTS / "goals.md").write_text(table + "\n")
    return 0 if met else 1


def report(runs: dict, rows: list[Row], where: dict[str, str]) -> tuple[str, bool]:
    by_name = dict(zip(runs, rows, strict=True))
    lines = [
        f"V = {V}, D = {D}, N = {N}, K = {K}, fp32, frozen head; {where['device']}, torch {where['torch']}, "
        f"commit {where['commit']}; `make bench`. `topk_distill_loss` (forward and backward) is given the teacher's top-k, as "
        "from a cache; with a live teacher add `linear_topk`.",
        "",
        "| | ms (p20 - p80) | extra memory, MiB |",
        "|---|---|---|",
    ]
    for name, row in by_name.items():
        label = f"**{name}**" if row.provider == "duet_kernels" else name
        lines.append(f"| {label} | {row.ms:.0f} ({row.ms_p20:.0f} - {row.ms_p80:.0f}) | {row.peak_mb:.0f} |")
    lines += ["", "| goal | measured | met |", "|---|---|---|"]
    all_met = True
    for ours, theirs, time_goal, memory_goal in GOALS:
        time = by_name[ours].ms / by_name[theirs].ms
        memory = by_name[ours].peak_mb / by_name[theirs].peak_mb
        checks = [(f"time of {ours} <= {time_goal:.3g} x {theirs}", time, time_goal)]
        if memory_goal is not None:
            checks.append((f"extra memory of {ours} <= {memory_goal:.0%} of {theirs}", memory, memory_goal))
        for text, measured, goal in checks:
            met = measured <= goal
            all_met &= met
            faster = f" ({1 / measured:.0f} x faster)" if goal < 1 and "time" in text else ""
            lines.append(f"| {text} | {measured:.3g}{faster} | {'yes' if met else 'NO'} |")
    return "\n".join(lines), all_met


if __name__ == "__main__":
    sys.exit(main())
