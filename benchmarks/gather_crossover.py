"""From how many ids on a CPU makes all logits instead of gathering rows of W: `python -m benchmarks.gather_crossover`.

Both ways of `gather.linear_gather` at V = 32000, D = 1024, N = 256 on one thread, and of its gradient: the sparse one
that the package has, and the dense one that it does not have (written here), run in turn, so only ratios are read.
A correctness gate runs first. Writes results/cpu/gather_crossover.jsonl and .md, on which `portable/gather.py` rests.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import torch
from torch import Tensor

from benchmarks.harness import environment, measure
from duet_kernels import LMHead
from duet_kernels.head import Need
from duet_kernels.portable import gather

N, D, V = 256, 1024, 32000
COUNTS = (1024, 2048, 4096)  # V / 31, V / 16, V / 8: on both sides of where each dtype's ways cross
DTYPES = (torch.float32, torch.bfloat16)
STEP = 52  # rows of logits at a time: a fifth of N, as the package takes them
RESULTS = pathlib.Path(__file__).parent / "results" / "cpu"


def problem(n: int, d: int, v: int, k: int, dtype: torch.dtype) -> tuple[Tensor, LMHead, Tensor, Tensor]:
    """Hidden states, head, k different ids of every token, and a gradient of the values at them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (torch.randn(v, d, generator=generator) * (3 / d**0.5)).to(dtype)
    ids = torch.rand(n, v, generator=generator).topk(k, 1).indices
    return hidden, LMHead(weight, None, None, 1.0), ids, torch.randn(n, k, generator=generator)


def dense_backward(grad: Tensor, hidden: Tensor, head: LMHead, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, dW) by products with a row chunk of dz that is zero but at the ids."""
    dhidden = grad.new_empty(hidden.shape)
    dweight = grad.new_zeros(head.weight.shape)
    weight = head.weight.to(grad.dtype)
    for start in range(0, ids.shape[0], STEP):
        rows = slice(start, start + STEP)
        dz = grad.new_zeros(len(ids[rows]), head.weight.shape[0]).scatter_add_(1, ids[rows], grad[rows])
        dhidden[rows] = dz @ weight
        dweight.addmm_(dz.T, hidden[rows].to(grad.dtype))
    return dhidden, dweight


def sparse_backward(grad: Tensor, hidden: Tensor, head: LMHead, ids: Tensor) -> tuple[Tensor, ...]:
    return gather.linear_gather_backward(hidden, head, grad, grad, ids, Need(True, True))[:2]


def gate() -> bool:
    """Both ways give the same in fp64."""
    hidden, head, ids, grad = problem(60, 16, 300, 40, torch.float64)
    grad = grad.double()
    ways = (
        (gather.gather_rows(hidden, head, ids), *sparse_backward(grad, hidden, head, ids)),
        (gather.gather_from_logits(hidden, head, ids, STEP), *dense_backward(grad, hidden, head, ids)),
    )
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(*ways, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of ids a token")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each way")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not gate():
        print("correctness gate: RED - no speed is reported", file=sys.stderr)
        return 1
    where = environment("cpu")
    rows = []
    for dtype in DTYPES:
        for k in arguments.counts:
            hidden, head, ids, grad = problem(N, D, V, k, dtype)
            case = {"hidden": hidden, "head": head, "ids": ids}
            took = measure(
                {
                    "gather": lambda case=case: gather.gather_rows(**case),
                    "logits": lambda case=case: gather.gather_from_logits(**case, step=STEP),
                    "sparse dh, dW": lambda case=case, grad=grad: sparse_backward(grad, **case),
                    "dense dh, dW": lambda case=case, grad=grad: dense_backward(grad, **case),
                },
                device="cpu",
                min_rounds=arguments.rounds,
                max_rounds=arguments.rounds,
            )
            ms = {name: result.fields()["ms"] for name, result in took.items()}
            rows.append({**where, "n": N, "d": D, "v": V, "k": k, "dtype": str(dtype), "ms": ms})
    lines = [
        f"V = {V}, D = {D}, N = {N}; {where['device']}, torch {where['torch']}, commit {where['commit']}; "
        "`python -m benchmarks.gather_crossover`. Ratios above 1: the dense way is faster.",
        "",
        "| dtype | K | V / K | forward: gather ms | logits ms | ratio | backward: sparse ms | dense ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gathered, logits, sparse, dense = row["ms"].values()
        lines.append(
            f"| {row['dtype'].removeprefix('torch.')} | {row['k']} | {V / row['k']:.0f} | {gathered:.0f} | {logits:.0f} | "
            f"{gathered / logits:.2f} | {sparse:.0f} | {dense:.0f} | {sparse / dense:.2f} |"
        )
    table = "\n".join(lines)
    print(table)
    if not arguments.no_write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "gather_crossover.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (RESULTS / "gather_crossover.md").write_text(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
