"""The recipes for TRL beside the losses that they replace, on a CPU: `python -m benchmarks.drop_ins`; needs trl.

The code that is measured is that of RECIPES.md and of the installed TRL, from hidden states to the gradients of hidden
states and head, fp32. First loss and gradients are compared with fp64; where the recipe's are wrong by more than 1e-5,
no time is printed. Writes results/cpu/drop_ins.jsonl and .md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import environment, measure, version
from duet_kernels import linear_topk

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
SHAPES = ((512, 49152, 576, 8), (128, 128256, 1024, 64))  # N, V, D, K
TOLERANCE = 1e-5

Loss = Callable[[], Tensor]


class Pair(NamedTuple):
    """One loss in two ways, the tensors whose gradients are taken, and the loss as a function of them in fp64."""

    what: str
    theirs: Loss
    ours: Loss
    leaves: tuple[Tensor, ...]
    exact: Callable[..., Tensor]


def recipe(name: str) -> dict[str, Any]:
    """The names that a block of RECIPES.md leaves behind."""
    text = (ROOT / "RECIPES.md").read_text()
    code = re.findall(rf"^## {name}\n.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)[0]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(code, f"RECIPES.md, {name}", "exec"), names)
    return names


def problem(n: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head with real mass on few ids, and the hidden states of a teacher near the student."""
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * (4 / d**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), hidden.detach() + 0.3 * torch.randn(n, d)


def async_pairs(n: int, v: int, d: int, k: int) -> list[Pair]:
    """The sums of `AsyncDistillationTrainer`: forward KL with and without the tail bucket, and JSD with it."""
    from trl.experimental.async_distillation import async_distillation_trainer as trl

    lean = recipe("TRL: async distillation")["LeanAsyncDistillationTrainer"]
    hidden, weight, told_hidden = problem(n, v, d)
    told = linear_topk(told_hidden, weight.detach(), k)
    logp = told.values - told.logsumexp.unsqueeze(-1)
    of_teacher = told.indices, logp, torch.ones_like(logp, dtype=torch.bool)

    def pair(what: str, beta: float, tail: bool) -> Pair:
        rest = None, 1.0, None, *of_teacher, beta, 1.0, tail, None, 1, 256
        theirs, ours = (
            lambda way=way: way(hidden, weight, *rest)[0] for way in (trl._chunked_jsd_loss, lean.sums)
        )
        return Pair(what, theirs, ours, (hidden, weight), lambda *leaves: lean.sums(*leaves, *rest)[0])

    return [
        pair("async, forward KL, tail", 0.0, True),
        pair("async, JSD, tail", 0.5, True),
        pair("async, forward KL, no tail", 0.0, False),
    ]


def gkd_pairs(n: int, v: int, d: int) -> list[Pair]:
    """`compute_loss` of `GKDTrainer` on models that are a table of hidden states and a head."""
    lean = recipe("TRL: GKD")["LeanGKDTrainer"]
    hidden, weight, told_hidden = problem(n + 1, v, d)
    ids = torch.zeros(1, n + 1, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss(kind: Any, student: tuple[Tensor, Tensor]) -> Tensor:
        teacher = Table(*(x.detach().to(student[0].dtype) for x in (told_hidden, weight)))
        trainer = SimpleNamespace(
            teacher_model=teacher, beta=0.5, generalized_jsd_loss=lean.generalized_jsd_loss
        )
        return kind.compute_loss(trainer, Table(*student), inputs, num_items_in_batch=n)

    leaves, theirs = (hidden, weight), lean.__mro__[1]
    ways = [lambda kind=kind: loss(kind, leaves) for kind in (theirs, lean)]
    return [Pair("GKD, JSD", *ways, leaves, lambda *double: loss(theirs, double))]


class Table(nn.Module):
    """A model as far as GKD's `compute_loss` reads it: hidden states that are given, and a head."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        super().__init__()
        self.hidden, self.config = hidden, SimpleNamespace(model_type="llama")
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        del self.head.weight
        self.head.weight = weight  # a tensor that may be a leaf of the caller's, not a copy as a Parameter

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self) -> Callable[..., tuple[Tensor]]:
        return lambda *_: (self.hidden.unsqueeze(0),)

    def forward(self, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.hidden.unsqueeze(0) @ self.head.weight.T)


def errors(pair: Pair) -> tuple[float, float]:
    """(TRL's, the recipe's): the largest error of loss and gradients against fp64, as norms ||x - exact|| / ||exact||."""

    def results(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    double = tuple(x.detach().double().requires_grad_() for x in pair.leaves)
    exact = results(pair.exact(*double), double)
    theirs, ours = (
        max(float((a - b).norm() / b.norm()) for a, b in zip(results(way(), pair.leaves), exact, strict=True))
        for way in (pair.theirs, pair.ours)
    )
    return theirs, ours


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    where, rows = environment("cpu") | {"trl_version": version("trl")}, []
    for n, v, d, k in SHAPES:
        torch.manual_seed(0)
        for pair in [*async_pairs(n, v, d, k), *gkd_pairs(n, v, d)]:
            theirs, ours = errors(pair)
            if not ours <= TOLERANCE:
                print(f"{pair.what}: an error of {ours:.1e} - no speed is reported", file=sys.stderr)
                return 1
            calls = {
                name: lambda way=way, pair=pair: torch.autograd.grad(way(), pair.leaves)
                for name, way in (("trl", pair.theirs), ("recipe", pair.ours))
            }
            rounds = {"min_rounds": arguments.rounds, "max_rounds": arguments.rounds}
            took = {name: each.fields() for name, each in measure(calls, device="cpu", **rounds).items()}
            sparse = k if pair.what.startswith("async") else None
            rows.append(
                {
                    **where,
                    "what": pair.what,
                    "n": n,
                    "v": v,
                    "d": d,
                    "k": sparse,
                    "errors": (theirs, ours),
                    **took,
                }
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            if not arguments.no_write:
                RESULTS.mkdir(parents=True, exist_ok=True)
                (RESULTS / "drop_ins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (RESULTS / "drop_ins.md").write_text(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    where = rows[0]
    lines = [
        f"The recipes of [RECIPES.md](../../../RECIPES.md) and the losses of trl {where['trl_version']} that they replace: forward and "
        f"backward, fp32, trainable head; {where['device']}, torch {where['torch']}, commit {where['commit']}; "
        "`python -m benchmarks.drop_ins`. "
        "Memory: what a call adds at its highest point, gradients included. The async rows compute what TRL logs, too "
        "(entropies); without the tail only the student's entropy needs a pass over the vocabulary. "
        "Error: the largest of loss and gradients against fp64, ||x - exact|| / ||exact||.",
        "",
        "| loss | N, V, D, K | TRL ms | recipe ms | ratio | TRL MiB | recipe MiB | TRL error | recipe error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs, ours = row["trl"], row["recipe"]
        shape = ", ".join(str(row[x]) for x in "nvdk" if row[x] is not None)
        lines.append(
            f"| {row['what']} | {shape} | {theirs['ms']:.0f} | {ours['ms']:.0f} | {theirs['ms'] / ours['ms']:.1f} | "
            f"{theirs['peak_mb']:.0f} | {ours['peak_mb']:.0f} | {row['errors'][0]:.0e} | {row['errors'][1]:.0e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
