"""What every operation of the table has to obey: its definition, and the manners of a gradient."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .budget import Error, assert_within_budget, rms, worst
from .operations import Op
from .problems import Problem

# Relative, between two ways of summing the products of one logit.
LOGITS_ERROR = 2 * torch.finfo(torch.float32).eps


def gradients(
    output: Tensor, problem: Problem, upstream: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Gradients of the leaves that require grad, by name."""
    names = [name for name in problem.leaves if getattr(problem, name).requires_grad]
    leaves = [getattr(problem, name) for name in names]
    return dict(zip(names, torch.autograd.grad(output, leaves, upstream, **options), strict=True))


def _upstream(output: Tensor) -> Tensor:
    """Another factor for every element, in its dtype, some negative and one of them 0."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    if upstream.dim() and upstream.shape[0] > 1:
        upstream[1] = 0
    return upstream.to(output)


def _selected_rows(op: Op, problem: Problem) -> Tensor:
    chosen = torch.zeros(problem.weight.shape[0], dtype=torch.bool, device=problem.weight.device)
    return chosen.index_fill(0, op.ids(problem).flatten().clamp(min=0), True)


def judge(op: Op, problem: Problem, impl: str, **options: Any) -> Error:
    """Values and all gradients, with another upstream factor for each element, against the definition in fp64.

    The baseline is torch's own result. Of an `independent` operation it makes both models' logits in one way, and what
    the two err in common cancels; there the teacher's logits are off by 2 eps of fp32 on top, which is what one way of
    summing D products differs from another by.

    Returns the error that used most of its budget.
    """

    def results(case: Problem, run: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        case = case.requiring(case.leaves)
        output = run(case, **options)
        return output.detach(), gradients(output, case, _upstream(output))

    exact = problem.to(torch.float64)
    truth, true_grads = results(exact, op.define)
    baseline, torch_grads = results(problem, op.define)
    if op.independent and problem.hidden.dtype != torch.float64:
        off = dataclasses.replace(exact, teacher_hidden=exact.teacher_hidden * (1 + LOGITS_ERROR))
        shifted, shifted_grads = results(off, op.define)
        baseline = _plus(baseline, shifted - truth)
        torch_grads = {
            name: _plus(x, shifted_grads[name] - true_grads[name]) for name, x in torch_grads.items()
        }
    actual, grads = results(problem, functools.partial(op.run, impl=impl))
    errors = [assert_within_budget(actual, truth, baseline, name=f"{op} value")]
    chosen = _selected_rows(op, problem)
    for name in problem.leaves:
        error = assert_within_budget(
            grads[name],
            true_grads[name],
            torch_grads[name],
            selected=None if name == "hidden" else chosen,
            name=f"{op} d{name}",
        )
        errors.append(error)
    return worst(errors)


def _plus(baseline: Tensor, change: Tensor) -> Tensor:
    return (baseline.double() + change).to(baseline.dtype)


def check_definition(op: Op, problem: Problem, impl: str) -> None:
    """Values and gradients agree with the definition."""
    judge(op, problem, impl)


def check_backward_twice(op: Op, problem: Problem, impl: str) -> None:
    """Every backward pass over a retained graph gives the same; accumulated, exactly twice the gradient."""
    case = problem.requiring(problem.leaves)
    output = op.run(case, impl)
    upstream = _upstream(output)
    first = gradients(output, case, upstream, retain_graph=True)
    before = {name: gradient.clone() for name, gradient in first.items()}
    for _ in range(2):
        output.backward(upstream, retain_graph=True)
    for name in case.leaves:
        assert torch.equal(first[name], before[name]), f"{op}: a later backward pass wrote into d{name}"
        assert torch.equal(getattr(case, name).grad, 2 * before[name]), (
            f"{op}: d{name} twice is not twice d{name}"
        )


def check_upstream(op: Op, problem: Problem, impl: str) -> None:
    """A reduced loss under upstream gradients of 1 and of other sizes, over a retained graph: each pass as if alone.

    What a pass returned, or made a leaf's `grad`, is no later pass's to write into.
    """
    if not op.loss:
        return
    for reduction in ("mean", "sum"):
        case = problem.requiring(problem.leaves)
        loss = op.run(case, impl, reduction=reduction)
        alone = {}
        for size in (1.0, -2.5):
            other = problem.requiring(problem.leaves)
            one = op.run(other, impl, reduction=reduction)
            alone[size] = gradients(one, other, torch.full_like(one, size))
        for name in case.leaves:
            _assert_close(
                alone[-2.5][name], -2.5 * alone[1.0][name], f"{op} {reduction} d{name} of -2.5 times"
            )
        loss.backward(retain_graph=True)
        leaves = [getattr(case, name) for name in case.leaves]
        first = [leaf.grad for leaf in leaves]
        kept = [gradient.clone() for gradient in first]
        again = gradients(loss, case, torch.full_like(loss, -2.5), retain_graph=True)
        for name, leaf, gradient, before in zip(case.leaves, leaves, first, kept, strict=True):
            assert torch.equal(before, alone[1.0][name]), f"{op} {reduction}: d{name} of backward()"
            assert torch.equal(gradient, before), f"{op} {reduction}: a later pass wrote into d{name}"
            assert torch.equal(again[name], alone[-2.5][name]), f"{op} {reduction}: d{name} of a second pass"
            leaf.grad = None
        for _ in range(2):
            loss.backward(retain_graph=True)
        for name, leaf, gradient, before in zip(case.leaves, leaves, first, kept, strict=True):
            assert torch.equal(leaf.grad, 2 * before), f"{op} {reduction}: d{name} twice is not twice d{name}"
            assert torch.equal(gradient, before), f"{op} {reduction}: a later pass wrote into d{name}"


def check_subsets(op: Op, problem: Problem, impl: str) -> None:
    """Every subset of the leaves that require grad gets the gradients that it gets among all; nobody else gets one."""
    case = problem.requiring(problem.leaves)
    output = op.run(case, impl)
    upstream = _upstream(output)
    everything = gradients(output, case, upstream)
    for size in range(len(problem.leaves)):
        for names in itertools.combinations(problem.leaves, size):
            case = problem.requiring(names)
            output = op.run(case, impl)
            assert output.requires_grad == bool(names), (
                f"{op}: requires_grad={output.requires_grad} with {names}"
            )
            if names:
                for name, gradient in gradients(output, case, upstream).items():
                    assert torch.equal(gradient, everything[name]), (
                        f"{op}: d{name} depends on who else requires grad"
                    )


def check_layouts(op: Op, problem: Problem, impl: str) -> None:
    """Strided inputs and a leading shape of several dimensions give the gradients of the flat contiguous ones."""
    flat = problem.requiring(problem.leaves)
    output = op.run(flat, impl)
    upstream = _upstream(output)
    wanted = gradients(output, flat, upstream)
    n = problem.hidden.shape[0]
    odd = problem.requiring(problem.leaves)
    strided = {
        "hidden": torch.stack([odd.hidden, odd.hidden], 1)[:, 1].T.contiguous().T[:, None],
        "weight": torch.cat([odd.weight, odd.weight], 1)[:, : odd.weight.shape[1]],
        "bias": None if odd.bias is None else torch.stack([odd.bias, odd.bias], 1)[:, 0],
        "labels": odd.labels[:, None],
        "teacher_hidden": torch.cat([odd.teacher_hidden] * 2, 1)[:, None, : odd.teacher_hidden.shape[1]],
        "teacher_weight": odd.teacher_weight.T.contiguous().T,
    }
    output = op.run(dataclasses.replace(odd, **strided), impl)
    assert output.shape[:2] == (n, 1), f"{op}: leading shape {list(output.shape)}"
    got = gradients(output, odd, upstream[:, None])
    for name in problem.leaves:
        _assert_close(got[name], wanted[name], f"{op} strided d{name}")


def check_masked_rows(op: Op, problem: Problem, impl: str) -> None:
    """Masked tokens (even with NaN in them) add nothing; all masked is a zero loss with zero gradients."""
    if not op.loss:
        return
    n = problem.hidden.shape[0]
    mask = torch.arange(n, device=problem.hidden.device) % 3 != 1
    poisoned = problem.hidden.clone()
    poisoned[~mask] = torch.nan
    teacher = problem.teacher_hidden.clone()
    teacher[~mask] = torch.nan
    clean = dataclasses.replace(problem, hidden=problem.hidden[mask], labels=problem.labels[mask])
    clean = dataclasses.replace(clean, teacher_hidden=problem.teacher_hidden[mask]).requiring(problem.leaves)
    dirty = dataclasses.replace(problem, hidden=poisoned, teacher_hidden=teacher).requiring(problem.leaves)
    for reduction in ("none", "mean", "sum"):
        wanted = op.define(clean, reduction=reduction)
        got = op.run(dirty, impl, mask=mask, reduction=reduction)
        if reduction == "none":
            assert torch.equal(got[~mask], torch.zeros_like(got[~mask])), f"{op}: masked tokens have a loss"
            got = got[mask]
        _assert_close(got, wanted, f"{op} {reduction} value with a mask")
        wanted, got = gradients(wanted.sum(), clean), gradients(got.sum(), dirty)
        assert torch.equal(got["hidden"][~mask], torch.zeros_like(got["hidden"][~mask])), (
            f"{op}: masked dhidden"
        )
        got["hidden"] = got["hidden"][mask]
        for name in problem.leaves:
            _assert_close(got[name], wanted[name], f"{op} {reduction} d{name} with a mask")
    nobody = torch.zeros_like(mask)
    for reduction in ("none", "mean", "sum"):
        loss = op.run(dirty, impl, mask=nobody, reduction=reduction)
        assert torch.equal(loss, torch.zeros_like(loss)), f"{op}: all masked, loss {loss}"
        for name, gradient in gradients(loss.sum(), dirty).items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), f"{op}: all masked, d{name} is not zero"


def check_reductions(op: Op, problem: Problem, impl: str) -> None:
    """mean, sum, weights and num_items are the token losses added up as documented, and so are their gradients."""
    if not op.loss:
        return
    n = problem.hidden.shape[0]
    mask = torch.arange(n, device=problem.hidden.device) % 4 != 2
    weights = torch.linspace(-0.5, 2.0, n, device=problem.hidden.device)
    case = problem.requiring(problem.leaves)
    rows = op.run(case, impl)
    count = int(mask.sum())
    wanted = {
        "sum": (rows.sum(), {"reduction": "sum"}),
        "mean": (rows.mean(), {"reduction": "mean"}),
        "weights": (
            (rows * weights)[mask].sum() / count,
            {"reduction": "mean", "mask": mask, "weights": weights},
        ),
        "num_items": (rows[mask].sum() / 1000, {"reduction": "mean", "mask": mask, "num_items": 1000}),
        "num_items tensor": (
            rows.sum() / 7,
            {"reduction": "mean", "num_items": torch.tensor(7, device=rows.device)},
        ),
    }
    for what, (truth, options) in wanted.items():
        got = op.run(case, impl, **options)
        assert got.dim() == 0, f"{op}: {what} has shape {list(got.shape)}"
        _assert_close(got, truth, f"{op} {what}")
        # An upstream factor other than 1: it has to reach gradients that were made in the forward pass.
        truth_grads = gradients(-2.5 * truth, case, retain_graph=True)
        for name, gradient in gradients(-2.5 * got, case).items():
            _assert_close(gradient, truth_grads[name], f"{op} {what} d{name}")


def check_nan_row(op: Op, problem: Problem, impl: str) -> None:
    """A NaN in one token makes its own loss NaN and leaves all others alone."""
    hidden = problem.hidden.clone()
    hidden[2, 0] = torch.nan
    case = dataclasses.replace(problem, hidden=hidden).requiring(["hidden"])
    clean = problem.requiring(["hidden"])
    got, wanted = op.run(case, impl), op.run(clean, impl)
    others = torch.arange(hidden.shape[0], device=hidden.device) != 2
    assert bool(got[2].isnan().all()), f"{op}: a NaN token has the loss {got[2]}"
    _assert_close(got[others], wanted[others], f"{op} beside a NaN row")
    got, wanted = gradients(got.sum(), case)["hidden"], gradients(wanted.sum(), clean)["hidden"]
    _assert_close(got[others], wanted[others], f"{op} dhidden beside a NaN row")


def check_second_derivative(op: Op, problem: Problem, impl: str) -> None:
    """A second derivative is refused or right, never silently wrong."""
    small = dataclasses.replace(problem, hidden=problem.hidden[:5], labels=problem.labels[:5])
    small = dataclasses.replace(small, teacher_hidden=problem.teacher_hidden[:5])

    def penalty(run: Callable[..., Tensor]) -> Tensor:
        case = small.requiring(["hidden"])
        first = gradients(run(case).sum(), case, create_graph=True)["hidden"]
        # The hidden states themselves keep the result connected where a gradient was cut off.
        return gradients(first.square().sum() + case.hidden.sum(), case)["hidden"]

    try:
        got = penalty(functools.partial(op.run, impl=impl))
    except RuntimeError as error:
        assert "derivative" in str(error) or "autograd" in str(error), error
        return
    _assert_close(got, penalty(op.define), f"{op} second derivative")


def _assert_close(got: Tensor, wanted: Tensor, name: str) -> None:
    """Equal but for the order of additions: 64 eps of the coarser dtype, relative to the whole tensor."""
    assert got.shape == wanted.shape, f"{name}: shape {list(got.shape)}, wanted {list(wanted.shape)}"
    got, wanted, eps = got.detach(), wanted.detach(), max(torch.finfo(x.dtype).eps for x in (got, wanted))
    error, size = rms(got.double() - wanted.double()), rms(wanted.double())
    bound = (64 if eps < 1e-4 else 4) * eps * size
    assert error <= bound, f"{name}: off by {error:.1e} where the size is {size:.1e}"


CHECKS: tuple[Callable[[Op, Problem, str], None], ...] = (
    check_definition,
    check_backward_twice,
    check_upstream,
    check_subsets,
    check_layouts,
    check_masked_rows,
    check_reductions,
    check_nan_row,
    check_second_derivative,
)


def gradient_contract(op: Op, problem: Problem, impl: str = "auto") -> None:
    """Run every check of `CHECKS` on an operation; `problem` has one leading dimension of at least 5 tokens.

    Example:
        >>> from duet_kernels.testing import OPS, Op, make_problem
        >>> mine = Op(
        ...     "twice",
        ...     lambda problem, **options: 2 * OPS[4].call(problem, **options),
        ...     ids=OPS[4].ids,
        ...     resolve="topk_distill_loss",
        ... )
        >>> gradient_contract(mine, make_problem(9, 31, 8, bias=True))
    """
    for check in CHECKS:
        check(op, problem, impl)
