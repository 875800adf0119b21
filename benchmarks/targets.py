"""What each operation has to reach at the anchor, as one table; and how a figure is read off the measured rows.

A figure is a ratio to the floor's products (`x G`: measured in turn with the operation), a time on the device (`ms`), the
time of one call begun on an idle device (`wall ms`), the summed time of kernels by name (`kernel ms`), the bytes that a
kernel cannot avoid moving over that time (`TB/s`), or the ratio of the portable way to the kernel (`x triton`). Knows
rows, nothing of how they are made.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import torch

from benchmarks.cases import Case, floor_ms
from benchmarks.harness import Floors, Row
from benchmarks.report import OURS, has_k, number, title

LEGEND = (
    "`1.1 x 3 G`: 1.1 times as long as 3 bare products G. `ms`: on the device, launches ahead of it. `wall ms`: one call begun on "
    "an idle device and waited for, with Python. `kernel ms`: the named kernels of a call together. `TB/s`: what these kernels "
    "cannot avoid moving, over their time. `x triton`: against the kernel's way."
)
UNITS = ("x G", "ms", "wall ms", "kernel ms", "TB/s", "x triton")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The calls of one kernel within one call of an operation, and the time that they take together."""

    commit: str
    device: str
    op: str
    divergence: str
    ids: str
    head: str
    n: int
    k: int
    impl: str
    kernel: str
    calls: float
    ms: float


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number to reach: at most `target`, of `TB/s` at least.

    Attributes:
        case: what is called, forward and backward where it has one.
        unit: one of `UNITS`.
        impl: of ours; "triton" has the default workspace, "triton 3 GiB" that one.
        kernel: a pattern that the name of every kernel that counts contains.
        moved: bytes that those kernels read and write in one call.
    """

    case: Case
    unit: str
    target: float
    impl: str = "triton"
    kernel: str = ""
    moved: int = 0

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit: wanted one of {', '.join(UNITS)}, got {self.unit!r}")

    @property
    def key(self) -> tuple:
        c = self.case
        return c.op, c.divergence, c.ids, c.head, c.n, c.k, self.impl

    def value(self, rows: dict[tuple, Row], kernels: Sequence[Kernel]) -> float | None:
        """The measured value; None where it was not measured, or no kernel has such a name."""
        if self.unit in ("kernel ms", "TB/s"):
            mine = [x for x in kernels if key_of(x) == self.key and re.search(self.kernel, x.kernel)]
            ms = sum(x.ms for x in mine)
            return None if not ms else ms if self.unit == "kernel ms" else self.moved / ms / 1e9
        row = rows.get(self.key)
        if row is None or row.ms is None:
            return None
        if self.unit == "x triton":
            kernel = rows.get((*self.key[:-1], "triton"))
            return None if kernel is None or kernel.ms is None else row.ms / kernel.ms
        return {"x G": row.ms / row.floor_ms, "ms": row.ms, "wall ms": row.wall_ms}[self.unit]

    @property
    def measure(self) -> str:
        """The unit, with the number of products: `x 3 G`."""
        products = floor_ms(self.case, Floors(product_ms=1.0, copy_gb_s=1.0), self.case.passes[-1])
        return f"x {products:g} G" if self.unit == "x G" and products != 1 else self.unit

    def met(self, value: float) -> bool:
        return value >= self.target if self.unit == "TB/s" else value <= self.target


def key_of(row: Row | Kernel) -> tuple:
    return row.op, row.divergence, row.ids, row.head, row.n, row.k, row.impl


def figures(n: int, d: int, v: int, k: int, dtype: torch.dtype) -> list[Figure]:
    """The targets of the anchor (N 8192, D 4096, V 128256, K 64, bf16), at any size."""

    def case(op: str, divergence: str = "", **fields: object) -> Case:
        return Case(
            op, **{"n": n, "d": d, "v": v, "k": k, "dtype": dtype, "divergence": divergence, **fields}
        )

    logits, weight = 4 * n * v, v * d * dtype.itemsize  # logits are fp32
    topk, huber = case("linear_topk"), case("topk_distill_loss", "huber")
    trained = dataclasses.replace(huber, trainable=True)
    frequent, trained_frequent = (dataclasses.replace(c, ids="zipf") for c in (huber, trained))
    kl, jsd = case("linear_distill_loss", "forward_kl"), case("linear_distill_loss", "jsd")
    kl_trained = dataclasses.replace(kl, trainable=True)
    ce, ce_trained = case("linear_cross_entropy"), case("linear_cross_entropy", trainable=True)
    stats = case("linear_token_stats")
    few, one = (dataclasses.replace(topk, n=max(1, min(tokens, n // 4))) for tokens in (64, 1))
    return [
        Figure(trained, "ms", 3.5),
        Figure(trained, "kernel ms", 0.8, kernel="segment|stream"),
        Figure(trained_frequent, "ms", 3.5),
        Figure(trained_frequent, "kernel ms", 0.8, kernel="segment|stream"),
        Figure(huber, "ms", 1.6),
        Figure(frequent, "ms", 1.6),
        Figure(topk, "x G", 1.2),
        Figure(dataclasses.replace(topk, k=2 * k), "x G", 1.2),
        Figure(topk, "TB/s", 3.8, kernel="fold", moved=logits),
        Figure(few, "wall ms", 0.45),
        Figure(few, "kernel ms", 0.30, kernel=""),
        Figure(one, "wall ms", 0.45),
        Figure(one, "kernel ms", 0.30, kernel=""),
        Figure(stats, "x G", 1.12),
        Figure(stats, "TB/s", 3.8, kernel="fold|stats", moved=logits),
        Figure(case("topk_distill_loss", "forward_kl/tail"), "x G", 1.2),
        Figure(case("linear_logsumexp"), "x G", 1.17),
        Figure(case("linear_logsumexp", "exclude"), "x G", 1.25),
        Figure(kl, "x G", 1.12, "triton 3 GiB"),
        Figure(kl, "x G", 1.2),
        Figure(kl, "TB/s", 3.8, "triton 3 GiB", kernel="moments", moved=2 * logits),
        Figure(kl_trained, "x G", 1.15, "triton 3 GiB"),
        Figure(jsd, "x G", 1.15, "triton 3 GiB"),
        Figure(jsd, "TB/s", 3.8, "triton 3 GiB", kernel="terms", moved=2 * logits),
        Figure(ce_trained, "x G", 1.15, "triton 3 GiB"),
        Figure(ce_trained, "x G", 1.15),
        Figure(ce_trained, "TB/s", 3.8, "triton 3 GiB", kernel="_sum_kernel|_merge_sums", moved=logits),
        # dW in the head's dtype read and written once at 3.5 TB/s; a kernel that finds an upstream gradient of 1 moves nothing.
        Figure(ce_trained, "kernel ms", 2 * weight / 3.5e9, "triton 3 GiB", kernel="scale|upstream"),
        *(Figure(c, "x triton", 3.0, "chunked") for c in (topk, huber, trained, kl, ce, stats)),
    ]


def table(wanted: Iterable[Figure], rows: Iterable[Row], kernels: Sequence[Kernel]) -> tuple[list[str], str]:
    """One line a figure, and the sentence that counts them."""
    measured = {key_of(row): row for row in rows if row.provider == OURS}
    lines = ["| operation | measured | target | | commit |", "|---|---:|---:|---|---|"]
    counts = {"met": 0, "NOT MET": 0, "not measured": 0}
    for figure in wanted:
        row, value = measured.get(figure.key), figure.value(measured, kernels)
        verdict = "not measured" if value is None else "met" if figure.met(value) else "NOT MET"
        counts[verdict] += 1
        why = f" ({row.status})" if row is not None and row.status != "ok" else ""
        sign = ">=" if figure.unit == "TB/s" else "<="
        commit = "" if row is None else row.commit
        lines.append(
            f"| {name_of(figure)} | {number(value)} {figure.measure} | {sign} {number(figure.target)} | "
            f"{verdict}{why} | {commit} |"
        )
    return lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def name_of(figure: Figure) -> str:
    """`linear_topk`, forward; N = 64, triton 3 GiB; kernels fold."""
    of = (
        f", kernels `{figure.kernel}`"
        if figure.kernel
        else ", all kernels"
        if figure.unit == "kernel ms"
        else ""
    )
    return what(figure.key) + of.replace("|", " or ")


def what(key: tuple) -> str:
    """A `key_of` in words: `linear_topk`, forward, N 64, K 64, triton."""
    op, divergence, ids, head, n, k, impl = key
    row = Row(
        **dict.fromkeys(("commit", "device", "torch", "triton", "gate", "dtype", "provider"), ""),
        **{"op": op, "divergence": divergence, "head": head, "ids": ids, "impl": impl},
        **{"n": n, "d": 0, "v": 0, "k": k, "which_pass": "forward" if head == "none" else "full"},
    )
    return f"{title(row)}, N {n}{f', K {k}' if has_k(row) else ''}, {impl}"
