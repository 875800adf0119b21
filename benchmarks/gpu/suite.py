"""What the checks are made of: `Check`, the sizes, the operations and how each is judged.

`QUICK` sizes run the same code in Triton's interpreter on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import zipf_ids
from duet_kernels import (
    TopK,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    set_workspace_bytes,
    topk_distill_loss,
)
from duet_kernels.testing import (
    OPS,
    Error,
    Op,
    Problem,
    assert_within_budget,
    gradients,
    judge,
    make_problem,
    worst,
)

FULL: dict[str, Any] = {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "full": FULL}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIB = 2**20


class Skip(Exception):
    """This machine cannot say: the sentence is the check's status."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One claim. `alone`: it takes much or all of the device's memory, so nothing else may run beside it."""

    section: str
    name: str
    run: Callable[[], object]
    alone: bool = False
    seconds: float = 90.0  # after this it hangs

    @property
    def title(self) -> str:
        return f"{self.section}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes are (N, V, D), with K behind them where a check is about slots."""

    small: tuple[int, int, int] = (37, 203, 45)
    even: tuple[int, int, int] = (128, 1000, 64)
    ragged: tuple[int, int, int] = (300, 32003, 256)
    tight: tuple[int, int, int] = (300, 32003, 256)  # many slabs and blocks of tokens in a MiB of workspace
    obligations: tuple[int, int, int] = (37, 203, 45)
    tokens: tuple[int, ...] = (1, 16, 17, 64, 65, 4096)
    tokens_vd: tuple[int, int] = (1003, 72)
    ks: tuple[int, ...] = (1, 5, 64, 1000)
    ks_nvd: tuple[int, int, int] = (65, 3001, 128)
    zipf: tuple[int, int, int, int] = (3000, 20011, 128, 16)
    ascending: int = 16001
    middle: tuple[int, int, int] = (1024, 32000, 512)
    long_weight: tuple[int, int, int] = (96, 262144, 8256)
    long_logits: tuple[int, int, int] = (16896, 131072, 64)
    long_gather: tuple[int, int, int, int] = (8192, 32000, 4096, 72)
    long_slots: tuple[int, int, int, int] = (2**21, 1000, 16, 1040)
    memory: tuple[int, int, int] = (4096, 32000, 1024)
    workspace: int = 64 * MIB


QUICK = Sizes(
    small=(7, 43, 11),
    even=(16, 64, 16),
    ragged=(19, 203, 45),
    tight=(19, 203, 45),
    obligations=(7, 43, 11),
    tokens=(1, 17, 65),
    tokens_vd=(67, 19),
    ks=(1, 5, 64),
    ks_nvd=(7, 203, 16),
    zipf=(31, 61, 16, 4),
    ascending=257,
    middle=(9, 67, 16),
    long_weight=(12, 203, 24),
    long_logits=(24, 131, 16),
    long_gather=(9, 61, 16, 12),
    long_slots=(9, 61, 16, 12),
    memory=(9, 67, 16),
    workspace=MIB,
)


# --- the operations ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Selection:
    """An operation without a gradient: `judge(problem, impl)` compares it with the definition in fp64."""

    name: str
    resolve: str
    judge: Callable[[Problem, str], Error]
    call: Callable[..., tuple[Tensor, ...]]


def topk(problem: Problem, k: int = 8, **options: Any) -> tuple[Tensor, ...]:
    k = min(k, problem.head.num_ids)
    return linear_topk(problem.hidden, problem.head, k, temperature=1.5, **options)[:3]


def stats(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    return tuple(linear_token_stats(problem.hidden, problem.head, problem.labels, **options))


def judge_topk(problem: Problem, impl: str, k: int = 8) -> Error:
    """The k largest values, their ids' own logits, and the log-sum-exp of exactly what those ids leave over.

    Ids are not compared with the definition's: two logits closer than fp32 rounding may stand in either order.
    """
    exact = problem.to(torch.float64)
    values, ids, tail = topk(problem, k, impl=impl)
    assert bool((values[:, 1:] <= values[:, :-1]).all()), "values are not descending"
    assert bool((ids.sort(1).values.diff(dim=1) > 0).all()), "an id is selected twice"
    assert bool(((ids >= 0) & (ids < problem.head.num_ids)).all()), "an id is outside the vocabulary"

    def defined(case: Problem) -> tuple[Tensor, Tensor, Tensor]:
        rest = linear_logsumexp(case.hidden, case.head, temperature=1.5, exclude=ids, impl="reference")
        own = linear_gather(case.hidden, case.head, ids, impl="reference")
        return topk(case, k, impl="reference")[0], own, rest

    pairs = zip((values, values, tail), defined(exact), defined(problem), strict=True)
    names = "values", "values at the ids", "tail"
    return worst(
        assert_within_budget(*pair, name=f"topk {name}") for name, pair in zip(names, pairs, strict=True)
    )


def judge_stats(problem: Problem, impl: str) -> Error:
    results = stats(problem, impl=impl), stats(problem.to(torch.float64), impl="reference")
    names = "logsumexp", "entropy", "variance", "label_logprob"
    baseline = stats(problem, impl="reference")
    return worst(
        assert_within_budget(*triple, name=f"token_stats {name}")
        for name, triple in zip(names, zip(*results, baseline, strict=True), strict=True)
    )


SELECTIONS = (
    Selection("topk", "linear_topk", judge_topk, topk),
    Selection("token-stats", "linear_token_stats", judge_stats, stats),
)


def at_k(k: int) -> Iterator[Op]:
    """The sparse operations at k slots; the table's own have 8."""
    return at_slots(f"k={k}", lambda problem: problem.teacher_topk(k))


def zipf(k: int) -> Iterator[Op]:
    """The sparse operations at ids as frequent as words are: long segments of dW, and many rows that nobody chose."""

    def teacher(problem: Problem) -> TopK:
        exact = problem.to(torch.float64)
        generator = torch.Generator(problem.hidden.device).manual_seed(0)
        ids = zipf_ids(len(problem.hidden), problem.teacher_head.num_ids, k, generator)
        at = exact.teacher_hidden, exact.teacher_head
        values, order = linear_gather(*at, ids, impl="reference").sort(-1, descending=True)
        tail = linear_logsumexp(*at, exclude=ids, impl="reference")
        acc = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
        return TopK(values.float().to(acc), ids.gather(-1, order), tail.float().to(acc))

    return at_slots(f"zipf k={k}", teacher)


def at_slots(name: str, teacher: Callable[[Problem], TopK]) -> Iterator[Op]:
    def distill(
        problem: Problem, divergence: str, normalization: str | None = None, **options: Any
    ) -> Tensor:
        options = {"divergence": divergence, "normalization": normalization, **options}
        return topk_distill_loss(problem.hidden, problem.head, teacher(problem), **options)

    def gather(problem: Problem, **options: Any) -> Tensor:
        return linear_gather(problem.hidden, problem.head, ids(problem), **options)

    def complement(problem: Problem, **options: Any) -> Tensor:
        return linear_logsumexp(problem.hidden, problem.head, exclude=ids(problem), **options)

    def ids(problem: Problem) -> Tensor:
        return teacher(problem).indices

    yield Op(f"gather {name}", gather, ids, "linear_gather", loss=False)
    yield Op(f"logsumexp-exclude {name}", complement, ids, "linear_logsumexp", loss=False)
    huber = functools.partial(distill, divergence="huber")
    yield Op(f"topk-huber {name}", huber, ids, "topk_distill_loss")
    tail = functools.partial(distill, divergence="jsd", normalization="tail")
    yield Op(f"topk-jsd-tail {name}", tail, ids, "topk_distill_loss/lse")


# One of every kernel family, where the whole table would compile the same kernels again.
SAMPLED = ("gather", "logsumexp-exclude", "cross-entropy", "topk-huber", "topk-jsd-tail", "linear-forward_kl")


# --- the suite --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _drawn(
    device: torch.device, shape: tuple[int, int, int], dtype: str, options: tuple[tuple[str, Any], ...]
) -> Problem:
    return make_problem(*shape, dtype=DTYPES[dtype], device=device, **dict(options))


@dataclasses.dataclass(frozen=True)
class Suite:
    """The checks for one device. `quick`: the interpreter's sizes, and sampled operations only."""

    device: torch.device
    quick: bool = False
    ops: tuple[Op, ...] = OPS

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else Sizes()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sampled(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.name in SAMPLED)

    @property
    def broad(self) -> tuple[Op, ...]:
        return self.sampled if self.quick else self.ops

    def problem(self, shape: tuple[int, int, int], dtype: str = "fp32", **options: Any) -> Problem:
        """The last ones drawn are kept: checks of one shape follow each other, and drawing is done by the CPU."""
        return _drawn(self.device, shape, dtype, tuple(options.items()))

    def needs_cuda(self) -> None:
        if not self.cuda:
            raise Skip("needs CUDA")

    def needs_memory(self, gib: int) -> None:
        """Of the whole GPU; the interpreter's sizes need nothing."""
        if self.cuda and not self.quick and torch.cuda.mem_get_info(self.device)[1] < gib << 30:
            raise Skip(f"needs a GPU with {gib} GiB")


# --- what a check runs in ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace(num_bytes: int) -> Iterator[None]:
    previous = set_workspace_bytes(num_bytes)
    try:
        yield
    finally:
        set_workspace_bytes(previous)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN: an element that nobody writes cannot pass for a zero."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        # Only the filling is wanted, not an error from every torch operation without a deterministic form.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = before


# --- what checks do with an operation ---------------------------------------------------------------------------


def judged(
    suite: Suite,
    section: str,
    name: str,
    op: Op | Selection,
    impl: str,
    shape: tuple[int, int, int],
    tight: bool = False,
    **options: Any,
) -> Check:
    """One operation against fp64; `tight`: its sum over tokens, within a MiB of workspace."""

    def run() -> Error:
        problem = suite.problem(shape, **options)
        with poisoned_memory(), workspace(MIB) if tight else contextlib.nullcontext():
            if isinstance(op, Selection):
                return op.judge(problem, impl)
            # A sum makes its gradients along with the loss, tokens on their own make them afterwards. (A mean does as a
            # sum does, but its gradients end below the smallest normal number of fp16 unless the loss is scaled.)
            return judge(op, problem, impl, **({"reduction": "sum"} if tight and op.loss else {}))

    return Check(section, f"{name} {impl} {op.name}", run)


def outcome(op: Op | Selection, problem: Problem, impl: str, **options: Any) -> list[Tensor]:
    """Values and, where there are any, gradients."""
    if isinstance(op, Selection):
        return list(op.call(problem, impl=impl))
    case = problem.requiring(problem.leaves)
    output = op.run(case, impl, **options)
    return [output.detach(), *gradients(output.sum(), case).values()]


def assert_equal(first: list[Tensor], second: list[Tensor], what: str) -> None:
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"{what}: result {position} differs"


def kernels(suite: Suite, ops: tuple[Op | Selection, ...]) -> Iterator[tuple[Op | Selection, str]]:
    """Every operation with the kernel and, sampled, with the portable way, which `auto` may choose."""
    for op in ops:
        yield op, "triton"
        if op.name in SAMPLED or isinstance(op, Selection):
            yield op, "chunked"


def with_cached_teacher(problem: Problem) -> Problem:
    """The problem with the teacher's selection made once: making it is the test's work, not the operation's."""
    made: dict[tuple[int, float], Any] = {}

    class Cached(Problem):
        def teacher_topk(self, k: int = 8, temperature: float = 1.0) -> Any:
            if (k, temperature) not in made:
                made[k, temperature] = problem.teacher_topk(k, temperature)
            return made[k, temperature]

    return Cached(**{field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)})
