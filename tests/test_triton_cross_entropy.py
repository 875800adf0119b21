"""linear_cross_entropy's kernels against full logits and autograd, judged in fp64 on the rounded inputs.

The schedule that it shares with `linear_divergence` is tested there.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from duet_kernels import reference
from duet_kernels.testing import assert_within_budget, make_problem
from duet_kernels.triton import cross_entropy as kernel
from duet_kernels.triton import dense
from duet_kernels.triton.dense_plan import Need, Plan, Sweep
from duet_kernels.triton.primitives import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D = 19, 103, 23
ALL = {"need_hidden": True, "need_weight": True, "need_bias": True}
FULL = {"bias": True, "softcap": 9.0, "scale": 1.3}
PLANS = {
    "at hand": Plan(8, 3, V, (), 0, 0.0),
    "recomputed": Plan(0, 5, 48, (Sweep(N, 8, 48, Need(True, True, True)),), 0, 0.0),
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def much_a_program(monkeypatch):
    """The interpreter runs programs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(kernel.tiles, "SLAB_ROWS", 32)
        monkeypatch.setattr(kernel.tiles, "SLAB_COLUMNS", {4: 128, 8: 128})
        monkeypatch.setattr(kernel.tiles, "SLAB_PROGRAMS", 2)


def problem(dtype=torch.float64, n=N, v=V, d=D, **options):
    return make_problem(n, v, d, dtype=dtype, device=DEVICE, **options)


def factors(case):
    """A factor a row, negative ones and a 0 among them."""
    acc = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    factor = torch.linspace(-0.5, 1.5, case.hidden.shape[0], dtype=acc, device=DEVICE)
    factor[3:4] = 0
    return factor


def run(case, factor=None, **need):
    """(f L, dh, dW, db)"""
    return kernel.linear_cross_entropy(
        *(case.hidden, case.weight, case.bias, case.softcap, case.scale, case.labels),
        factors(case) if factor is None else factor,
        **{**ALL, "need_bias": case.bias is not None, **need},
    )


def expected(case, factor=None):
    """(f L, dh, dW, db) from full logits and autograd, in the dtype of the problem (halves: fp32)."""
    factor = factors(case) if factor is None else factor
    case = case.to(torch.float64 if case.hidden.dtype == torch.float64 else torch.float32).requiring(
        case.leaves
    )
    z = reference.logits(case.hidden, case.head)
    rows = F.cross_entropy(z, torch.where(factor == 0, 0, case.labels), reduction="none")
    loss = torch.where(factor == 0, 0, rows * factor.to(z.dtype))
    gradients = torch.autograd.grad(loss.sum(), [getattr(case, name) for name in case.leaves])
    return loss.detach(), *gradients


def check(got, wanted, tolerance=1e-12):
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head", [{}, FULL, {"bias": True, "scale": -0.7}], ids=str)
@pytest.mark.parametrize("way", [None, *PLANS])
def test_fp64_equals_torch(way, head, monkeypatch):
    if way:
        monkeypatch.setattr(kernel.tiles, "SLAB_COLUMNS", {4: 16, 8: 16})
        monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(**head)
    got = run(case)
    check(got, expected(case))
    assert case.bias is not None or got[3] is None


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_budget(dtype, way, monkeypatch):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(dtype, **FULL)
    got = run(case)
    out = torch.float32 if dtype == torch.float16 else dtype
    assert [x.dtype for x in got] == [torch.float32, out, out, out]
    truth, baseline = expected(case.to(torch.float64), factors(case).double()), expected(case)
    chosen = torch.zeros(V, dtype=torch.bool, device=DEVICE).index_fill(0, case.labels, True)
    for name, a, b, c in zip(("loss", "dh", "dW", "db"), got, truth, baseline, strict=True):
        a = a if name == "loss" else a.to(dtype)
        selected = chosen if name in ("dW", "db") else None
        assert_within_budget(a, b, c.to(a.dtype), selected=selected, name=name)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, case):
        ctx.case = dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias)
        return run(ctx.case, torch.ones_like(hidden[:, 0]), **{name: False for name in ALL})[0]

    @staticmethod
    def backward(ctx, grad):
        return *run(ctx.case, grad.contiguous())[1:], None


def test_gradcheck_of_the_kernels():
    case = problem(n=4, v=9, d=5, **FULL).requiring(("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(_Loss.apply, (case.hidden, case.weight, case.bias, case), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_almost_certain_token_keeps_its_digits(dtype):
    """Losses and gradients of 1e-8 beside logits of 120, where q - 1 and logsumexp - z are 0 or noise."""
    z = 100 + torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 7] += 22.0
    z = z.to(dtype).to(DEVICE)
    hidden, weight = torch.eye(4, dtype=dtype, device=DEVICE), z.T.contiguous()
    labels, factor = torch.full((4,), 7, device=DEVICE), torch.ones(4, device=DEVICE)
    loss, dhidden, dweight, _ = kernel.linear_cross_entropy(
        hidden, weight, None, None, 1.0, labels, factor, need_hidden=True, need_weight=True, need_bias=False
    )
    exact = z.double()
    ratio = (exact - exact[:, 7:8]).exp()
    ratio[:, 7] = 0
    torch.testing.assert_close(loss.double(), torch.log1p(ratio.sum(1)), rtol=1e-5, atol=0)
    digits = {"rtol": 1e-5 if dtype == torch.float32 else 5e-3, "atol": 0}
    torch.testing.assert_close(dweight[7].double(), -ratio.sum(1) / (1 + ratio.sum(1)), **digits)
    assert dhidden.isfinite().all()


@pytest.mark.parametrize("distance", [-200.0, 0.0, 200.0])
def test_labels_far_above_and_below_the_others(distance):
    case = problem(bias=True)
    case.bias[case.labels[0]] += distance
    same = dataclasses.replace(case, labels=case.labels[:1].expand(N))
    check(run(same), expected(same))


@pytest.mark.parametrize("way", PLANS)
def test_labels_that_are_no_ids_make_their_row_nan(way, monkeypatch):
    monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(bias=True)
    clean = run(case)
    labels = case.labels.clone()
    labels[5], labels[8], labels[9], labels[3] = (
        V,
        2**40,
        -1,
        -100,
    )  # that of the row whose factor is 0 is not read
    loss, dhidden, dweight, _ = run(dataclasses.replace(case, labels=labels))
    bad = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    bad[[5, 8, 9]] = True
    assert loss[bad].isnan().all() and dhidden[bad].isnan().all() and dweight.isnan().all()
    assert torch.equal(loss[~bad], clean[0][~bad]) and torch.equal(dhidden[~bad], clean[1][~bad])


def test_nan_stays_in_its_row_and_a_masked_one_leaves_no_trace():
    case = problem(torch.float32, bias=True)
    clean = run(case)
    for row, masked in ((6, False), (3, True)):
        hidden = case.hidden.clone()
        hidden[row] = math.nan
        got = run(dataclasses.replace(case, hidden=hidden))
        others = torch.arange(N, device=DEVICE) != row
        assert torch.equal(got[0][others], clean[0][others]) and torch.equal(got[1][others], clean[1][others])
        if masked:
            assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
        else:
            assert got[0][row].isnan() and got[1][row].isnan().all() and got[2].isnan().all()


def test_banned_ids_weigh_nothing():
    case = problem(bias=True)
    case.bias[40:] = -math.inf
    banned = dataclasses.replace(case, labels=case.labels % 40)
    small = dataclasses.replace(banned, weight=case.weight[:40], bias=case.bias[:40])
    got, wanted = run(banned), expected(small)
    check(got[:2], wanted[:2])
    for a, b in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a[:40], b, rtol=1e-12, atol=1e-12)
        assert (a[40:] == 0).all()


@pytest.mark.parametrize("z", [-1e3, 0.0, 1e3])
def test_a_label_that_is_the_only_id_left_has_no_loss_and_no_gradient(z):
    hidden, weight = torch.full((1, 1), z, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    bias = torch.tensor([-math.inf, 0.0, -math.inf], device=DEVICE)
    label, factor = torch.ones(1, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
    results = kernel.linear_cross_entropy(hidden, weight, bias, None, 1.0, label, factor, **ALL)
    for result in results:
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize(("n", "v", "d"), [(0, 5, 3), (1, 1, 2), (1, 2, 1), (70, 16, 5), (3, 300, 8)])
def test_shapes(n, v, d):
    case = problem(n=n, v=v, d=d, bias=True)
    factor = torch.linspace(0.5, 1.5, n, dtype=torch.float64, device=DEVICE)
    check(run(case, factor), expected(case, factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal_and_write_no_input(dtype):
    case = problem(dtype, **FULL)
    before = [x.clone() for x in (case.hidden, case.weight, case.bias, case.labels)]
    first, second = (run(case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    after = case.hidden, case.weight, case.bias, case.labels
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("only", [*ALL, None])
def test_each_gradient_alone(only):
    case = problem(**FULL)
    every = run(case)
    alone = run(case, **{name: name == only for name in ALL})
    torch.testing.assert_close(alone[0], every[0], rtol=1e-12, atol=1e-12)
    for a, b, name in zip(alone[1:], every[1:], ALL, strict=True):
        if name == only:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a is None
