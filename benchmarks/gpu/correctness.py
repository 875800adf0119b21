"""Values and gradients against fp64, at every shape at which a kernel takes another path, and the same twice.

contract     every op, dtype and head: plain, ragged, with every option
obligations  the gradient contract of duet_kernels.testing: masks, subsets, strides, second backward, NaN rows
tokens, k    the edges of the tiles: N = 1, 16, 17, 64, 65, ..., K = 1 to 1000
zipf         ids as frequent as words are: segments of thousands of tokens beside rows of the head that nobody chose
order        ties, ascending and descending rows, -inf logits
same         two runs, bit for bit
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.suite import (
    DTYPES,
    FULL,
    HEADS,
    SELECTIONS,
    Check,
    Selection,
    Suite,
    assert_equal,
    at_k,
    judge_topk,
    judged,
    kernels,
    outcome,
    poisoned_memory,
    topk,
    zipf,
)
from duet_kernels import linear_gather, linear_logsumexp, linear_topk
from duet_kernels.testing import (
    CHECKS,
    Error,
    Op,
    Problem,
    assert_within_budget,
    check_definition,
    make_problem,
    worst,
)


def contract(suite: Suite) -> Iterator[Check]:
    everything = (*suite.broad, *SELECTIONS)
    sampled = (*suite.sampled, *SELECTIONS)
    for op in everything:
        for head, dtype in itertools.product(HEADS, DTYPES):
            if suite.quick and (head, dtype) not in (("full", "bf16"), ("plain", "fp32")):
                continue
            options = {"dtype": dtype, **HEADS[head]}
            yield judged(suite, "contract", f"{head} {dtype}", op, "triton", suite.sizes.small, **options)
    for op in everything:
        options = {"dtype": "bf16", **FULL}
        yield judged(suite, "contract", "ragged bf16", op, "triton", suite.sizes.ragged, **options)
    for op in sampled:
        for dtype in () if suite.quick else ("fp32", "fp16"):
            options = {"dtype": dtype, **FULL}
            yield judged(suite, "contract", f"ragged {dtype}", op, "triton", suite.sizes.ragged, **options)
        for dtype in ("bf16",) if suite.quick else DTYPES:
            options = {"dtype": dtype, "tight": True, **FULL}
            yield judged(suite, "contract", f"tight {dtype}", op, "triton", suite.sizes.tight, **options)
        yield judged(suite, "contract", "even bf16", op, "triton", suite.sizes.even, dtype="bf16")
        for dtype in ("bf16",) if suite.quick else DTYPES:
            options = {"dtype": dtype, **FULL}
            yield judged(suite, "contract", f"ragged {dtype}", op, "chunked", suite.sizes.ragged, **options)


def obligations(suite: Suite) -> Iterator[Check]:
    for op in suite.sampled[:2] if suite.quick else suite.ops:
        for check in CHECKS:
            if check is check_definition:
                continue

            def run(op: Op = op, check: Callable[..., None] = check) -> None:
                with poisoned_memory():
                    check(op, suite.problem(suite.sizes.obligations, "fp32", bias=True), "triton")

            yield Check("obligations", f"{check.__name__.removeprefix('check_')} {op.name}", run)


def tokens_and_k(suite: Suite) -> Iterator[Check]:
    sizes = suite.sizes
    ops = (*suite.sampled, *SELECTIONS)
    for n, op in itertools.product(sizes.tokens, ops if not suite.quick else ops[-2:]):
        shape = n, *sizes.tokens_vd
        yield judged(suite, "tokens", f"N={n} bf16", op, "triton", shape, dtype="bf16")
    for k in sizes.ks:
        selection = Selection(f"topk k={k}", "linear_topk", functools.partial(judge_topk, k=k), topk)
        for op in (selection, *at_k(k)):
            yield judged(suite, "k", f"K={k} bf16", op, "triton", sizes.ks_nvd, dtype="bf16", bias=True)


def frequent(suite: Suite) -> Iterator[Check]:
    n, v, d, k = suite.sizes.zipf
    for op in zipf(k):
        for dtype, impl in (("bf16", "triton"), ("fp32", "triton"), ("bf16", "chunked")):
            yield judged(suite, "zipf", dtype, op, impl, (n, v, d), dtype=dtype)

        def run(op: Op = op) -> None:
            problem = suite.problem((n, v, d), "bf16")
            assert_equal(outcome(op, problem, "triton"), outcome(op, problem, "triton"), "two runs")

        yield Check("zipf", f"same triton {op.name}", run)


def order(suite: Suite) -> Iterator[Check]:
    """Ids are exact where logits are: small integers, whatever the dtype."""

    def same_selection(problem: Problem, k: int) -> str:
        wanted = linear_topk(problem.hidden.double(), problem.to(torch.float64).head, k, impl="reference")
        for impl in ("triton", "chunked"):
            got = linear_topk(problem.hidden, problem.head, k, impl=impl)
            assert torch.equal(got.indices, wanted.indices), f"{impl}: other ids than the definition's"
            assert torch.equal(got.values.double(), wanted.values), f"{impl}: other values"
        return f"{wanted.indices.numel()} ids equal"

    def ties(kind: str, dtype: str, k: int) -> str:
        return same_selection(suite.problem(suite.sizes.ks_nvd, dtype, ties=kind), k)

    for kind, dtype in itertools.product(("quantised", "equal"), DTYPES):
        for k in (5,) if suite.quick else (5, 64, 1000):
            yield Check("order", f"{kind} ties {dtype} k={k}", functools.partial(ties, kind, dtype, k))

    def line(sign: int, n: int) -> str:
        """z = v, or -v: the best case and the worst for a running threshold. 64 a + b is exact in any dtype."""
        v = torch.arange(suite.sizes.ascending, device=suite.device)
        weight = torch.stack([v // 64, v % 64], 1).to(torch.bfloat16)
        hidden = sign * torch.tensor([[64.0, 1.0]], device=suite.device).expand(n, 2).to(torch.bfloat16)
        blank = make_problem(1, 2, 2, device=suite.device)
        return same_selection(dataclasses.replace(blank, hidden=hidden, weight=weight), 64)

    for sign, n in itertools.product((1, -1), (3,) if suite.quick else (3, 200)):
        way = "ascending" if sign > 0 else "descending"
        yield Check("order", f"{way} logits N={n}", functools.partial(line, sign, n))

    def banned(impl: str) -> Error:
        """A bias of -inf removes an id from every softmax."""
        problem = suite.problem(suite.sizes.small, "fp32", bias=True)
        bias = problem.bias.clone()
        bias[::7] = -torch.inf
        problem = dataclasses.replace(problem, bias=bias)
        exact = problem.to(torch.float64)
        ids = problem.labels[:, None] // 7 * 7

        def results(case: Problem, impl: str) -> tuple[Tensor, ...]:
            top = linear_topk(case.hidden, case.head, 5, impl=impl)
            rest = linear_logsumexp(case.hidden, case.head, exclude=top.indices, impl=impl)
            return top.values, rest, linear_gather(case.hidden, case.head, ids, impl=impl)

        triples = zip(
            results(problem, impl), results(exact, "reference"), results(problem, "reference"), strict=True
        )
        return worst(assert_within_budget(*triple, name="with -inf logits") for triple in triples)

    for impl in ("triton", "chunked"):
        yield Check("order", f"-inf logits {impl}", functools.partial(banned, impl))


def same(suite: Suite) -> Iterator[Check]:
    for op, impl in kernels(suite, (*suite.broad, *SELECTIONS)):

        def run(op: Op | Selection = op, impl: str = impl) -> None:
            problem = suite.problem(suite.sizes.middle, "bf16", bias=True)
            assert_equal(outcome(op, problem, impl), outcome(op, problem, impl), "two runs")

        yield Check("same", f"{impl} {op.name}", run)


SECTIONS = contract, obligations, tokens_and_k, frequent, order, same
