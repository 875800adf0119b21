"""The checker can fail: every kind of wrong gradient that published tolerances let through is rejected here."""

import dataclasses

import pytest
import torch

from duet_kernels import linear_distill_loss
from duet_kernels.testing import (
    CHECKS,
    OPS,
    IllConditioned,
    Op,
    assert_within_budget,
    check_backward_twice,
    check_definition,
    check_layouts,
    check_masked_rows,
    check_nan_row,
    check_reductions,
    check_second_derivative,
    check_subsets,
    check_upstream,
    gradients,
    make_problem,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAIL = next(op for op in OPS if op.name == "topk-forward_kl-tail")


def _gradients(problem, run, dtype):
    case = problem.to(dtype).requiring(problem.leaves)
    return gradients(run(case).sum(), case)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def case(request):
    """(ours, truth, torch's own) gradients and the chosen rows of dW, in one dtype."""
    problem = make_problem((700,), dtype=request.param, bias=True)
    ours = _gradients(problem, lambda p: TAIL.run(p, "chunked"), request.param)
    truth = _gradients(problem, TAIL.define, torch.float64)
    baseline = _gradients(problem, TAIL.define, request.param)
    chosen = torch.zeros(203, dtype=torch.bool)
    chosen[TAIL.ids(problem)[:, :1].flatten()[:40]] = True
    return ours, truth, baseline, chosen


def _judge(case, wrong, leaf="weight"):
    _, truth, baseline, chosen = case
    assert_within_budget(wrong, truth[leaf], baseline[leaf], selected=chosen if leaf != "hidden" else None)


def _one_nan(g, chosen):
    g = g.clone()
    g.view(-1)[-1] = torch.nan
    return g


def _stale_row(g, chosen):
    g = g.clone()
    g[5] = g[6]
    return g


WRONG = {
    "zeros": lambda g, chosen: torch.zeros_like(g),
    "sign": lambda g, chosen: -g,
    "5 % too large": lambda g, chosen: 1.05 * g,
    "5 % too small": lambda g, chosen: 0.95 * g,
    "target only": lambda g, chosen: g * chosen[:, None],
    "all but target": lambda g, chosen: g * ~chosen[:, None],
    "one NaN": _one_nan,
    "one stale row": _stale_row,
    "other dtype": lambda g, chosen: g.double(),
    "other shape": lambda g, chosen: g[:-1],
}


def test_right_gradients_pass(case):
    ours, _, baseline, _ = case
    for leaf in ours:
        _judge(case, ours[leaf], leaf)
        _judge(case, baseline[leaf], leaf)


# dW has target rows, dh has none.
@pytest.mark.parametrize(
    "leaf, kind",
    [(leaf, k) for k in WRONG for leaf in ("weight", "hidden") if leaf == "weight" or "target" not in k],
)
def test_wrong_gradients_are_rejected(case, kind, leaf):
    ours, _, _, chosen = case
    with pytest.raises(AssertionError):
        _judge(case, WRONG[kind](ours[leaf], chosen), leaf)


def test_parts_are_judged_apart():
    """An error of the small part that would drown in the large one."""
    truth = torch.cat([torch.full((10, 8), 100.0), torch.full((90, 8), 0.01)]).double()
    wrong = truth.float()
    wrong[10:] *= 1.5
    selected = torch.arange(100) < 10
    assert (wrong - truth).norm() / truth.norm() < 1e-3
    with pytest.raises(AssertionError, match="the rest"):
        assert_within_budget(wrong, truth, truth.float(), selected=selected)


def test_ill_conditioned_cases_fail_as_cases():
    truth = torch.ones(5, 5, dtype=torch.float64)
    bad = truth.float() * 1.03
    with pytest.raises(IllConditioned, match="baseline"):
        assert_within_budget(bad, truth, bad)


def test_zero_truth_accepts_zero_only():
    truth = torch.zeros(4, 4, dtype=torch.float64)
    assert_within_budget(torch.zeros(4, 4), truth, torch.zeros(4, 4))
    with pytest.raises(AssertionError):
        assert_within_budget(torch.full((4, 4), 1e-30), truth, torch.zeros(4, 4))


def test_nonfinite_entries_have_to_match():
    truth = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    assert_within_budget(truth.float(), truth, truth.float())
    for wrong in (
        [1.0, -torch.inf, torch.nan],
        [1.0, 5.0, torch.nan],
        [torch.nan] * 3,
        [1.0, torch.nan, torch.nan],
    ):
        with pytest.raises(AssertionError):
            assert_within_budget(torch.tensor(wrong), truth, truth.float())


class _WritesWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = torch.ones_like(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.kept *= 2
        return grad * ctx.kept / 2


class _ForgetsItsFactor(torch.autograd.Function):
    """Loss and gradient scaled apart: what a T^2 on the loss alone does."""

    @staticmethod
    def forward(ctx, x):
        return 2.25 * x

    @staticmethod
    def backward(ctx, grad):
        return grad


class _ForgetsItsUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones_like(grad)


HUBER = next(op for op in OPS if op.name == "topk-huber")


def _broken(change, op=HUBER, **fields):
    return dataclasses.replace(
        op, call=change, definition=lambda p, **o: op.call(p, impl="reference", **o), **fields
    )


def _detached_head(problem, **options):
    return HUBER.call(dataclasses.replace(problem, weight=problem.weight.detach()), **options)


def _always_trains_the_head(problem, **options):
    return HUBER.call(
        dataclasses.replace(problem, weight=problem.weight.detach().requires_grad_()), **options
    )


def _no_mask(problem, *, mask=None, **options):
    return HUBER.call(dataclasses.replace(problem, hidden=problem.hidden.nan_to_num(0.5)), **options)


def _no_weights(problem, *, weights=None, **options):
    return HUBER.call(problem, **options)


def _flat_only(problem, **options):
    return HUBER.call(problem, **options).flatten()


def _hides_nan(problem, **options):
    return HUBER.call(dataclasses.replace(problem, hidden=problem.hidden.nan_to_num(0.5)), **options)


def _gradient_as_constant(problem, **options):
    hidden = problem.hidden
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        inner = dataclasses.replace(problem, hidden=leaf)
        loss = linear_distill_loss(
            leaf, inner.head, inner.teacher_hidden, inner.teacher_head, reduction="none"
        )
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return loss.detach().clone()

        @staticmethod
        def backward(ctx, grad):
            return gradient * grad[:, None]

    return Constant.apply(hidden)


BROKEN = [
    (
        "gradient scaled apart",
        check_definition,
        lambda p, **o: _ForgetsItsFactor.apply(HUBER.call(p, **o)) / 2.25,
    ),
    ("upstream ignored", check_definition, lambda p, **o: _ForgetsItsUpstream.apply(HUBER.call(p, **o))),
    ("value off by 1e-5", check_definition, lambda p, **o: HUBER.call(p, **o) * (1 + 1e-5)),
    (
        "writes what it saved",
        check_backward_twice,
        lambda p, **o: _WritesWhatItSaved.apply(HUBER.call(p, **o)),
    ),
    (
        "a later pass writes what it gave away",
        check_upstream,
        lambda p, **o: _WritesWhatItSaved.apply(HUBER.call(p, **o)),
    ),
    ("always trains the head", check_subsets, _always_trains_the_head),
    ("drops dW", check_subsets, _detached_head),
    ("flat only", check_layouts, _flat_only),
    ("ignores the mask", check_masked_rows, _no_mask),
    ("ignores weights", check_reductions, _no_weights),
    ("hides NaN", check_nan_row, _hides_nan),
]


@pytest.mark.parametrize("what, check, call", BROKEN, ids=[row[0] for row in BROKEN])
def test_the_contract_rejects(what, check, call):
    problem = make_problem(11, 61, 16, bias=True)
    check(HUBER, problem, "chunked")
    with pytest.raises((AssertionError, RuntimeError)):
        check(_broken(call), problem, "chunked")


def test_the_contract_rejects_a_constant_second_derivative():
    dense = next(op for op in OPS if op.name == "linear-forward_kl")
    problem = make_problem(11, 61, 16)
    check_second_derivative(dense, problem, "chunked")
    broken = dataclasses.replace(
        dense,
        call=_gradient_as_constant,
        definition=lambda p, **o: linear_distill_loss(
            p.hidden, p.head, p.teacher_hidden, p.teacher_head, impl="reference", **o
        ),
    )
    with pytest.raises(AssertionError, match="second derivative"):
        check_second_derivative(broken, problem, "chunked")


@pytest.mark.parametrize(
    "name, eps_off, passes",
    [("huber-teacher", 3, True), ("huber-teacher", 32, False), ("huber", 3, False)],
)
def test_rounding_that_does_not_cancel_is_budgeted_where_logits_are_made_in_two_ways(name, eps_off, passes):
    """Of a difference of logits; the dense loss makes both models' logits in one way and is held to that."""
    op = next(op for op in OPS if op.name == f"linear-{name}")
    problem = make_problem(64, 1003, 64)

    def call(p, **options):
        factor = 1 + eps_off * torch.finfo(torch.float32).eps
        return op.call(dataclasses.replace(p, teacher_hidden=p.teacher_hidden * factor), **options)

    off = dataclasses.replace(op, call=call, definition=op.define)
    if passes:
        check_definition(off, problem, "chunked")
    else:
        with pytest.raises(AssertionError, match="relative error"):
            check_definition(off, problem, "chunked")


def test_every_check_is_shown_to_bite():
    shown = {row[1] for row in BROKEN} | {check_second_derivative}
    assert shown == set(CHECKS)


def test_an_op_of_ones_own():
    mine = Op("mine", lambda p, **o: 3 * HUBER.call(p, **o), ids=HUBER.ids, resolve=HUBER.resolve)
    for check in CHECKS:
        check(mine, make_problem(7, 31, 8), "chunked")
