"""Addresses beyond 2^31 elements, the workspace, and a device without memory.

beyond   more than 2^31 elements in W, in the logits, in the gathered rows, in the slots
memory   the workspace is kept to; after an out-of-memory error the next call is right
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.suite import (
    MIB,
    SELECTIONS,
    Check,
    Selection,
    Suite,
    assert_equal,
    kernels,
    with_cached_teacher,
    workspace,
)
from duet_kernels import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_token_stats,
    linear_topk,
)
from duet_kernels.testing import Error, Op, Problem, assert_within_budget, gradients, worst

GIB = 2**30
# Small tensors (ids, factors, sums of a token), and 32 MiB that the library's products may use.
SLACK = 48 * MIB


# --- beyond 2^31 ------------------------------------------------------------------------------------------------


def blocks_of(weight: Tensor, count: int = 4096) -> Iterator[tuple[slice, Tensor]]:
    """W in fp64, some rows at a time."""
    for start in range(0, weight.shape[0], count):
        yield slice(start, start + count), weight[start : start + count].double()


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([hidden.double() @ block.T for _, block in blocks_of(weight)], 1)


def torch_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """What torch makes of these operands, in fp32: on a GPU its own product of halves."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def beyond(suite: Suite) -> Iterator[Check]:
    sizes = suite.sizes
    draw = functools.partial(torch.randn, device=suite.device)

    def inputs(n: int, v: int, d: int) -> tuple[Tensor, Tensor]:
        """The last ids are the largest logits of the first tokens: addresses near the end decide."""
        torch.manual_seed(0)
        hidden = draw(n, d, dtype=torch.bfloat16)
        weight = draw(v, d, dtype=torch.bfloat16).mul_(3 / d**0.5)
        weight[-8:] = (hidden[:8] * (24 / d)).to(weight.dtype)
        return hidden, weight

    def long_weight(n: int) -> Error:
        suite.needs_memory(24)
        hidden, weight = inputs(*sizes.long_weight)
        hidden = hidden[:n]
        v = weight.shape[0]
        z, z32 = exact_logits(hidden, weight), torch_logits(hidden, weight)
        top = linear_topk(hidden, weight, 8, impl="triton")
        first = int(top.indices[:8, 0].amin())
        assert first >= v - 8, f"the largest logits of the first tokens stand at the last ids, got id {first}"
        errors = [
            assert_within_budget(top.values, z.topk(8).values, z32.topk(8).values, name="topk values"),
            assert_within_budget(
                top.values, z.gather(1, top.indices), z32.gather(1, top.indices), name="at the ids"
            ),
        ]
        left, left32 = (x.scatter(1, top.indices, -torch.inf).logsumexp(1) for x in (z, z32))
        errors.append(assert_within_budget(top.tail_logsumexp, left, left32, name="topk tail"))
        return worst([*errors, *dense_gradients(hidden, weight, z, z32)])

    def dense_gradients(hidden: Tensor, weight: Tensor, z: Tensor, z32: Tensor) -> Iterator[Error]:
        """Cross-entropy with a trainable head: loss, dh, and dW at the first, the last and some other rows."""
        n, v = z.shape
        labels = v - 1 - torch.arange(n, device=z.device) % 8
        rows = torch.cat([torch.arange(4, device=z.device), torch.arange(v - 16, v, device=z.device)])
        hidden, weight = hidden.clone().requires_grad_(), weight.requires_grad_()
        loss = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="triton")
        dh, dw = torch.autograd.grad(loss.sum(), [hidden, weight])
        results = []
        for logits in (z, z32):
            p = logits.softmax(1)
            p[torch.arange(n, device=z.device), labels] -= 1
            wide_h = sum(p[:, place].double() @ block for place, block in blocks_of(weight.detach()))
            wide_w = p[:, rows].double().T @ hidden.detach().double()
            nll = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
            results.append((nll, wide_h, wide_w))
        truth, baseline = results
        yield assert_within_budget(loss.detach(), truth[0], baseline[0], name="cross-entropy")
        yield assert_within_budget(dh, truth[1], baseline[1].to(dh.dtype), name="dh")
        yield assert_within_budget(dw[rows], truth[2], baseline[2].to(dw.dtype), name="dW")

    most = sizes.long_weight[0]
    for name, n in (("N=1", 1), ("few tokens", min(64, most)), ("more tokens", most)):
        yield Check("beyond", f"W elements, {name}", functools.partial(long_weight, n), alone=True)

    def long_logits(op: str) -> Error:
        suite.needs_memory(12)
        n = sizes.long_logits[0]
        hidden, weight = inputs(*sizes.long_logits)
        rows = torch.tensor([0, 1, 2, n // 2, n - 3, n - 2, n - 1], device=suite.device)
        z, z32 = exact_logits(hidden[rows], weight), torch_logits(hidden[rows], weight)
        if op == "topk":
            top = linear_topk(hidden, weight, 8, impl="triton")
            got = top.values[rows], top.tail_logsumexp[rows]
            results = [
                (x.topk(8).values, x.scatter(1, top.indices[rows], -torch.inf).logsumexp(1)) for x in (z, z32)
            ]
        elif op == "token-stats":
            got = tuple(x[rows] for x in linear_token_stats(hidden, weight, impl="triton")[:2])
            results = [
                (x.logsumexp(1), torch.distributions.Categorical(logits=x).entropy()) for x in (z, z32)
            ]
        else:
            labels = torch.arange(n, device=suite.device) % weight.shape[0]
            leaf = hidden.clone().requires_grad_()
            if op == "cross-entropy":
                loss = linear_cross_entropy(leaf, weight, labels, reduction="none", impl="triton")
            else:
                teacher = torch.roll(weight, 1, 0)
                loss = linear_distill_loss(leaf, weight, hidden, teacher, reduction="none", impl="triton")
            (dh,) = torch.autograd.grad(loss.sum(), [leaf])
            got = loss.detach()[rows], dh[rows]
            results = []
            for x in (z, z32):
                q = x.softmax(1)
                if op == "cross-entropy":
                    nll = x.logsumexp(1) - x.gather(1, labels[rows][:, None])[:, 0]
                    p = torch.zeros_like(q).scatter(1, labels[rows][:, None], 1.0)
                else:
                    t = x.roll(1, 1)
                    p = t.softmax(1)
                    nll = (p * (t.log_softmax(1) - x.log_softmax(1))).sum(1)
                grad = sum((q - p)[:, place].double() @ block for place, block in blocks_of(weight))
                results.append((nll, grad.to(dh.dtype) if x is z32 else grad))
        return worst(assert_within_budget(*triple, name=op) for triple in zip(got, *results, strict=True))

    for name in ("topk", "cross-entropy", "token-stats", "forward_kl"):
        yield Check("beyond", f"logits {name}", functools.partial(long_logits, name), alone=True)

    def long_gather() -> Error:
        suite.needs_memory(12)
        n, v, d, k = sizes.long_gather
        hidden, weight = inputs(n, v, d)
        ids = torch.randint(0, v, (n, k), device=suite.device)
        upstream = draw(n, k)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = linear_gather(*leaves, ids, impl="triton")
        dh, dw = torch.autograd.grad(values, leaves, upstream)
        tokens = torch.tensor([0, n // 2, n - 2, n - 1], device=suite.device)
        rows = ids[-1, :4]
        results = []
        for cast in (torch.Tensor.double, torch.Tensor.float):
            chosen = cast(weight[ids[tokens]])
            z = torch.einsum("nd,nkd->nk", cast(hidden[tokens]), chosen)
            wide_h = torch.einsum("nk,nkd->nd", cast(upstream[tokens]), chosen)
            share = torch.stack([(cast(upstream) * (ids == row)).sum(1) for row in rows])
            results.append((z, wide_h, share @ cast(hidden)))
        truth, baseline = results
        got = values[tokens].detach(), dh[tokens], dw[rows]
        return worst(
            assert_within_budget(a, t, b.to(a.dtype), name=name)
            for name, a, t, b in zip(("values", "dh", "dW"), got, truth, baseline, strict=True)
        )

    yield Check("beyond", "gathered elements", long_gather, alone=True)

    def long_slots() -> str:
        suite.needs_memory(16)
        n, v, d, k = sizes.long_slots
        hidden, weight = inputs(n, v, d)
        ids = (torch.arange(k, device=suite.device) % v).expand(n, k)
        hidden.requires_grad_()
        values = linear_gather(hidden, weight, ids, impl="triton")
        for token in (0, n // 2, n - 1):
            truth = hidden[token].detach().double() @ weight[ids[token]].double().T
            plain = (hidden[token].detach().float() * weight[ids[token]].float()).sum(1)
            assert_within_budget(values[token].detach(), truth, plain, name=f"slots of token {token}")
        if n * k < 2**31:
            return "forward"
        try:
            torch.autograd.grad(values, [hidden], values)
        except ValueError as error:
            assert str(error).startswith("indices:"), error
            return "forward; the backward pass is refused by name"
        raise AssertionError("the backward pass of more than 2^31 slots was not refused")

    yield Check("beyond", "slots", long_slots, alone=True)


# --- memory -----------------------------------------------------------------------------------------------------


def memory(suite: Suite) -> Iterator[Check]:
    def kept(op: Op | Selection, impl: str, trainable: bool) -> str:
        """Peak bytes beyond inputs and results stay below the workspace, in forward and backward together."""
        suite.needs_cuda()
        problem = with_cached_teacher(suite.problem(suite.sizes.memory, "bf16"))
        names = problem.leaves if trainable else ("hidden",)
        with workspace(suite.sizes.workspace):
            peaks = [
                peak(op, problem, impl, names) for _ in range(2)
            ]  # the first loads kernels and libraries
        allowed = suite.sizes.workspace + SLACK
        if trainable and op.resolve == "linear_distill_loss":
            # Blocks of tokens add up in an fp32 dW. The other losses finish a slice of dW before they begin the next.
            allowed += 4 * problem.weight.numel()
        sentence = f"{peaks[1] / MIB:.0f} MiB beyond inputs and results, {allowed / MIB:.0f} MiB allowed"
        assert peaks[1] <= allowed, sentence
        return sentence

    for op, impl in kernels(suite, (*suite.sampled, *SELECTIONS)):
        for trainable in (False,) if isinstance(op, Selection) else (False, True):
            head = "trainable" if trainable else "frozen"
            run = functools.partial(kept, op, impl, trainable)
            yield Check("memory", f"workspace {head} {impl} {op.name}", run)

    for op, impl in kernels(suite, (*suite.sampled, *SELECTIONS)):
        run = functools.partial(exhausted, suite, op, impl)
        yield Check("memory", f"out of memory, then again {impl} {op.name}", run, alone=True)


def peak(op: Op | Selection, problem: Problem, impl: str, names: tuple[str, ...]) -> int:
    torch.cuda.synchronize()
    case = problem if isinstance(op, Selection) else with_leaves(problem, names)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if isinstance(op, Selection):
        results = list(op.call(case, impl=impl))
    else:
        options = {"reduction": "mean"} if op.loss else {}
        output = op.run(case, impl, **options)
        results = [output.detach(), *gradients(output.sum(), case).values()]
        del output
    torch.cuda.synchronize()
    kept = sum(x.untyped_storage().nbytes() for x in results)
    return torch.cuda.max_memory_allocated() - before - kept


def with_leaves(problem: Problem, names: tuple[str, ...]) -> Problem:
    """Leaves that share the problem's memory."""
    fresh = {n: getattr(problem, n).detach().requires_grad_(n in names) for n in problem.leaves}
    return dataclasses.replace(problem, **fresh)


def exhausted(suite: Suite, op: Op | Selection, impl: str) -> str:
    """A call that finds no memory raises torch's own error and leaves nothing behind: the next one matches."""
    suite.needs_cuda()
    problem = with_cached_teacher(suite.problem(suite.sizes.memory, "bf16", bias=True))
    case = problem if isinstance(op, Selection) else with_leaves(problem, problem.leaves)

    def run() -> list[Tensor]:
        if isinstance(op, Selection):
            return list(op.call(case, impl=impl))
        output = op.run(case, impl)
        return [output.detach(), *gradients(output.sum(), case).values()]

    wanted = run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hoard = [torch.empty(max(free - 64 * MIB, 0), dtype=torch.uint8, device=suite.device)]
    try:
        while True:  # what is left, down to blocks too small for any result
            hoard.append(torch.empty(2 * MIB, dtype=torch.uint8, device=suite.device))
    except torch.OutOfMemoryError:
        pass
    try:
        run()
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the call found memory although all of it was taken")
    finally:
        hoard.clear()
        torch.cuda.empty_cache()
    assert_equal(run(), wanted, "after running out of memory")
    return f"with all of {free / GIB:.0f} GiB taken"


SECTIONS = beyond, memory
