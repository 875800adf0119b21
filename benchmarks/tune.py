"""`make tune`: the fastest tiles on this GPU, and where `chunked` beats a kernel, into duet_kernels/triton/measured.json.

    python -m benchmarks.tune --plan                     what would be measured; needs no GPU
    python -m benchmarks.tune --budget-seconds 400       measures in the order of the plan until the time is over

A `Knob` is one entry of a table in `triton/tiles.py`, the values it may have, and the call whose time it decides. A
`Contest` is one operation at one size, `triton` against `chunked`: `auto` runs `triton` but for the exceptions that are
found here. Every value is compared with fp64 before its time counts; a value that is wrong, or cannot run, cannot win. A
tile or an exception is written only where it gains `GAIN`; where it gains nothing an older entry for the same goes.
Entries of other architectures stay. The file is reviewed and committed like code: nothing reads a clock later.

The tiles of the kernels that walk over a product's logits (`SLAB_*`, `DENSE_*`, `STATS_*`) have no knob: reckoned at full
bandwidth they are 5 to 7 of a dense loss's 40 ms (`triton/divergence.py`), so a faster tile gains less than `GAIN`.

A new table needs only a `Knob` here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duet_kernels import (
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    measured,
    topk_distill_loss,
)

GAIN = 1.03
SECONDS = 0.15  # timed for each value: ten calls of 15 ms, or the most that `harness.measure` makes
D, V = 4096, 128256  # the anchor: Llama-3's head
DTYPES = {2: torch.bfloat16, 4: torch.float32}

Timer = Callable[
    [Mapping[str, Callable[[], object]]], dict[str, float]
]  # name -> ms, without those that failed


# --- what is measured -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    n: int
    k: int = 64
    d: int = D
    v: int = V
    itemsize: int = 2

    def __str__(self) -> str:
        dtype = str(DTYPES[self.itemsize]).removeprefix("torch.")
        return f"N {self.n}, D {self.d}, V {self.v}, k {self.k}, {dtype}"


@dataclasses.dataclass(frozen=True)
class Knob:
    """One entry of a table; `key` without the architecture. `plan` puts the value of the table first."""

    table: str
    key: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]
    call: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.table}{list(self.key)}: {len(self.values)} values, {self.call} at {self.shape}"


@dataclasses.dataclass(frozen=True)
class Contest:
    """One operation, `triton` against `chunked`; the answer holds from the least to the most tokens and ids (0: any)."""

    op: str
    shape: Shape
    tokens: tuple[int, int]
    k: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"{self.op}: triton or chunked at {self.shape}"


GATHER_TILES = (
    (16, 512, 4),
    (8, 1024, 4),
    (16, 1024, 8),
    (32, 256, 4),
    (32, 512, 8),
    (8, 512, 2),
    (16, 256, 2),
)
GATHER_TILES_FP32 = ((16, 256, 4), (8, 512, 4), (16, 512, 8), (32, 128, 4), (16, 128, 2))
LARGE, FEW, ONE = Shape(8192), Shape(64), Shape(16)

FIRST_KNOBS = (
    Knob(
        "SKINNY", (2, 64),
        ((128, 64, 4, 4), (128, 64, 6, 4), (128, 128, 3, 4), (128, 128, 4, 8), (256, 64, 3, 8), (256, 32, 4, 8)),
        "linear_topk", FEW,
    ),
    Knob(
        "SKINNY", (2, 16),
        ((128, 64, 4, 4), (128, 64, 6, 4), (128, 128, 4, 4), (128, 256, 3, 8), (256, 64, 4, 8)),
        "linear_topk", ONE,
    ),
    Knob("GATHER_FORWARD", (2,), GATHER_TILES, "linear_gather", LARGE),
    Knob("GATHER_DHIDDEN", (2,), GATHER_TILES, "linear_gather dh", LARGE),
    Knob("FOLD_ROWS", (), ((16,), (32,), (64,)), "linear_topk", LARGE),
    # From V / this many ids on a product replaces the gather: at 512 ids, below the reckoned border, and at 1000, above.
    Knob("GATHER_CROSSOVER", (2,), ((156,), (256,)), "linear_gather", Shape(8192, k=640)),
)  # fmt: skip
LATER_KNOBS = (
    Knob(
        "DWEIGHT_SEGMENTS", (2,),
        ((16, 512, 4, 1), (16, 512, 8, 1), (32, 512, 4, 1), (16, 512, 2, 1), (16, 1024, 4, 2)),
        "linear_gather dW", LARGE,
    ),
    Knob(
        "LOSS", (2,),
        ((64, 256, 128, 4, 96), (64, 256, 64, 4, 96), (64, 256, 128, 4, 128), (64, 128, 128, 2, 128)),
        "topk_distill_loss", LARGE,
    ),
    Knob("TOPK_SKINNY_TOKENS", (), ((64,), (32,)), "linear_topk", FEW),
    Knob("TOPK_TOKENS", (), ((1024,), (512,), (2048,)), "linear_topk", Shape(8192, v=262144)),
    Knob("GATHER_FORWARD", (4,), GATHER_TILES_FP32, "linear_gather", Shape(8192, itemsize=4)),
    Knob("GATHER_DHIDDEN", (4,), GATHER_TILES_FP32, "linear_gather dh", Shape(8192, itemsize=4)),
    Knob(
        "SKINNY", (4, 64),
        ((128, 32, 3, 8), (128, 16, 3, 8), (128, 64, 2, 8)),
        "linear_topk", Shape(64, itemsize=4),
    ),
)  # fmt: skip


BY_K = ("linear_topk", "linear_gather", "topk_distill_loss")  # large k has a contest of its own


def contests(itemsize: int) -> Iterator[Contest]:
    """Small batches, middling ones, all larger ones."""
    for n, tokens in ((8192, (4097, 0)), (64, (1, 64)), (1024, (65, 4096))):
        for op in CONTESTED:
            yield Contest(op, Shape(n, itemsize=itemsize), tokens, (0, 256) if op in BY_K else (0, 0))
    for op in BY_K:
        yield Contest(op, Shape(8192, k=1000, itemsize=itemsize), (1, 0), (257, 0))


def against_the_table(knob: Knob) -> Knob:
    """The table's own value first, then the others: some values depend on the version of Triton."""
    from duet_kernels.triton import tiles

    table = getattr(tiles, knob.table)
    row = table[0, *knob.key] if isinstance(table, dict) else table
    default = tuple(row) if isinstance(row, tuple) else (row,)
    return dataclasses.replace(knob, values=tuple(dict.fromkeys((default, *knob.values))))


def plan() -> list[Knob | Contest]:
    """In the order of worth: what is left when the time is over is left out."""
    first, later = ([against_the_table(knob) for knob in knobs] for knobs in (FIRST_KNOBS, LATER_KNOBS))
    return [*first, *contests(2), *later, *contests(4)]


# --- the calls --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random operands whose logits have a standard deviation of 3, on one device."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    teacher: TopK

    @classmethod
    @functools.lru_cache(maxsize=1)
    def of(cls, shape: Shape, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        draw = functools.partial(torch.randn, device=device, dtype=DTYPES[shape.itemsize])
        hidden = draw(shape.n, shape.d)
        weight = draw(shape.v, shape.d).mul_(3 / shape.d**0.5)
        ids = torch.randint(0, shape.v, (shape.n, shape.k), device=device)
        values = torch.randn(shape.n, shape.k, device=device).mul_(3).sort(1, descending=True).values
        return cls(hidden, weight, ids, TopK(values, ids, torch.zeros(shape.n, device=device)))


def _backward(loss: Callable[[Tensor, Tensor], Tensor], wanted: str = "hidden") -> Callable[[Inputs], object]:
    """Forward and backward with respect to hidden states, or to the head's weight."""

    def call(inputs: Inputs) -> object:
        leaves = [
            getattr(inputs, name).detach().requires_grad_(name == wanted) for name in ("hidden", "weight")
        ]
        return torch.autograd.grad(loss(*leaves).sum(), [leaf for leaf in leaves if leaf.requires_grad])

    return call


def call_of(name: str, inputs: Inputs, impl: str) -> Callable[[], object]:
    """The operation at its full size, ready to be timed."""
    hidden, weight, ids, teacher = inputs.hidden, inputs.weight, inputs.ids, inputs.teacher
    by_gradient = {
        "linear_gather dh": _backward(lambda h, w: linear_gather(h, w, ids, impl=impl)),
        "linear_gather dW": _backward(lambda h, w: linear_gather(h, w, ids, impl=impl), "weight"),
        "topk_distill_loss": _backward(
            lambda h, w: topk_distill_loss(h, w, teacher, divergence="forward_kl", impl=impl)
        ),
        "topk_distill_loss/lse": _backward(
            lambda h, w: topk_distill_loss(
                h, w, teacher, divergence="forward_kl", normalization="tail", impl=impl
            )
        ),
        "linear_distill_loss": _backward(lambda h, w: linear_distill_loss(h, w, hidden, weight, impl=impl)),
        "linear_cross_entropy": _backward(lambda h, w: linear_cross_entropy(h, w, ids[:, 0], impl=impl)),
    }
    if name in by_gradient:
        return functools.partial(by_gradient[name], inputs)
    forward: dict[str, Callable[[], object]] = {
        "linear_topk": lambda: linear_topk(hidden, weight, ids.shape[1], impl=impl),
        "linear_gather": lambda: linear_gather(hidden, weight, ids, impl=impl),
        "linear_logsumexp": lambda: linear_logsumexp(hidden, weight, impl=impl),
        "linear_token_stats": lambda: linear_token_stats(hidden, weight, ids[:, 0], impl=impl),
    }
    return forward[name]


# Every operation that has a kernel and another way.
CONTESTED = (
    "linear_topk",
    "topk_distill_loss",
    "topk_distill_loss/lse",
    "linear_distill_loss",
    "linear_cross_entropy",
    "linear_token_stats",
    "linear_logsumexp",
    "linear_gather",
)


def is_right(name: str, shape: Shape, impl: str, device: torch.device) -> str | None:
    """None, or what is wrong: every operation of that name against fp64, ragged, with as many tokens."""
    from benchmarks.gpu.suite import SELECTIONS, judge_topk
    from duet_kernels.testing import OPS, judge, make_problem

    n = min(shape.n, 150)
    problem = make_problem(n, 1003, 200, dtype=DTYPES[shape.itemsize], device=device, bias=True)
    resolve = name.split(" ")[0]
    try:
        for op in OPS:
            if op.resolve == resolve:
                judge(op, problem, impl)
        for selection in SELECTIONS:
            if selection.resolve == resolve:
                selection.judge(problem, impl)
        if resolve == "linear_topk":
            judge_topk(problem, impl, min(shape.k, 1000))
    except Exception as error:  # a tile that cannot be compiled, or that is wrong, is a result
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


# --- measuring --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def applied(entry: measured.Tile) -> Iterator[None]:
    """The table's entry replaced while the context lasts."""
    from duet_kernels.triton import tiles

    table, key, row = tiles.place_of(entry)
    before = table.get(key)
    table[key] = row
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


Entry = measured.Tile | measured.Slower


class Verdict(NamedTuple):
    """What stands in the file for a knob or a contest from now on: an entry, or nothing."""

    place: tuple[Any, ...]
    entry: Entry | None


def place_of(entry: Entry) -> tuple[Any, ...]:
    """What an entry is about: one that is about the same replaces it."""
    if isinstance(entry, measured.Tile):
        return entry.table, entry.key
    return entry.op, entry.arch, entry.itemsize, entry.tokens, entry.k


@dataclasses.dataclass(frozen=True)
class Tuner:
    """Measures on one device; `timer` and `right` are arguments so that a test can stand in for a GPU."""

    device: torch.device
    arch: int
    device_name: str
    commit: str
    timer: Timer
    right: Callable[[str, Shape, str, torch.device], str | None] = is_right
    say: Callable[[str], None] = print

    def tile(self, knob: Knob) -> Verdict | None:
        """The knob's fastest right value, if it gains enough over the reasoned one, which stands first and must run."""
        make = functools.partial(
            measured.Tile, knob.table, (self.arch, *knob.key),
            ms=0.0, default_ms=0.0, shape=str(knob.shape), device=self.device_name, commit=self.commit,
        )  # fmt: skip
        entries = {str(value): make(value=value) for value in knob.values}
        inputs = Inputs.of(knob.shape, self.device)
        call = call_of(knob.call, inputs, "triton")
        calls: dict[str, Callable[[], object]] = {}
        for name, entry in entries.items():
            with applied(entry):
                wrong = self.right(knob.call, knob.shape, "triton", self.device)
            if wrong is None:
                calls[name] = functools.partial(_applied_call, entry, call)
            else:
                self.say(f"  {name}: {wrong}")
        times = self._timed(calls)
        default = str(knob.values[0])
        if default not in times:
            return None
        best = min(times, key=times.__getitem__)
        entry = entries[best]._replace(ms=round(times[best], 4), default_ms=round(times[default], 4))
        return Verdict(place_of(entry), entry if times[default] >= GAIN * times[best] else None)

    def exception(self, contest: Contest) -> Verdict | None:
        """The entry that gives these calls to `chunked`, if that gains enough; both must be right and run."""
        calls: dict[str, Callable[[], object]] = {}
        for impl in ("triton", "chunked"):
            wrong = self.right(contest.op, contest.shape, impl, self.device)
            if wrong is not None:
                self.say(f"  {impl}: {wrong}")
                return None
            calls[impl] = call_of(contest.op, Inputs.of(contest.shape, self.device), impl)
        times = self._timed(calls)
        if len(times) < len(calls):
            return None
        entry = measured.Slower(
            op=contest.op,
            arch=self.arch,
            itemsize=contest.shape.itemsize,
            tokens=contest.tokens,
            k=contest.k,
            triton_ms=round(times["triton"], 4),
            chunked_ms=round(times["chunked"], 4),
            shape=str(contest.shape),
            device=self.device_name,
            commit=self.commit,
        )
        return Verdict(place_of(entry), entry if times["triton"] >= GAIN * times["chunked"] else None)

    def _timed(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        times = self.timer(calls)
        for name, ms in times.items():
            self.say(f"  {name}: {ms:.4g} ms")
        return times

    def run(self, steps: Iterable[Knob | Contest], seconds: float) -> Iterator[Verdict]:
        """Verdicts as they are found; a tile that won is used from then on."""
        from duet_kernels.triton import tiles

        end = time.monotonic() + seconds
        for step in steps:
            if time.monotonic() > end:
                self.say(f"no time left for {step}")
                continue
            self.say(str(step))
            verdict = self.tile(step) if isinstance(step, Knob) else self.exception(step)
            if verdict is None:
                continue
            entry = verdict.entry
            if isinstance(entry, measured.Tile):
                tiles.adopt([entry])
                gain = entry.default_ms / entry.ms
                self.say(f"  -> {list(entry.value)}, {gain:.2f} x the speed of the default")
            elif entry is not None:
                self.say(f"  -> chunked: {entry.reason}")
            yield verdict


def _applied_call(entry: measured.Tile, call: Callable[[], object]) -> object:
    with applied(entry):
        return call()


def merged(before: measured.Measured, found: Iterable[Verdict]) -> dict[str, Any]:
    """The file's content: each verdict replaces what stood in its place, everything else stays."""
    entries = {place_of(entry): entry for entry in (*before.exceptions, *before.tiles)}
    entries |= dict(found)
    kept = [entry for _, entry in sorted(entries.items()) if entry is not None]
    return {
        "format": measured.FORMAT,
        "exceptions": [entry._asdict() for entry in kept if isinstance(entry, measured.Slower)],
        "tiles": [entry._asdict() for entry in kept if isinstance(entry, measured.Tile)],
    }


def write(path: pathlib.Path, found: Iterable[Verdict]) -> None:
    before = measured.load(path) if path.exists() else measured.Measured()
    path.write_text(json.dumps(merged(before, found), indent=1) + "\n")
    measured.load(path)  # what could not be read would stop every program


# --- command line -----------------------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="print what would be measured")
    parser.add_argument("--only", default="", help="steps of the plan that contain this text")
    parser.add_argument("--budget-seconds", type=float, default=480.0)
    parser.add_argument("--out", type=pathlib.Path, default=measured.PATH)
    arguments = parser.parse_args(words)
    steps = [step for step in plan() if arguments.only in str(step)]
    if arguments.plan:
        for step in steps:
            print(step)
            if isinstance(step, Knob):
                print("".join(f"    {list(value)}\n" for value in step.values), end="")
        return 0
    if not torch.cuda.is_available():
        print("tune: this torch sees no CUDA device; --plan says what would be measured", file=sys.stderr)
        return 2
    from benchmarks import harness
    from duet_kernels.dispatch import architecture

    device = torch.device("cuda", torch.cuda.current_device())
    where = harness.environment(device)

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        results = harness.measure(calls, device=device, seconds=SECONDS)
        return {name: harness.quantile(r.ms, 0.5) for name, r in results.items() if r.status == "ok"}

    tuner = Tuner(device, architecture(device), where["device"], where["commit"], timer)
    count = 0
    for verdict in tuner.run(steps, arguments.budget_seconds):
        write(arguments.out, [verdict])  # at once: a tile that ends the process takes nothing along
        count += verdict.entry is not None
    print(f"\n{count} entries written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
