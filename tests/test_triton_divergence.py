"""linear_divergence's kernels and their schedule against the definition, judged in fp64 on the rounded inputs."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from dense_walks import WALKS, columns, few_programs, force
from divergences import ALL, SMOOTH, UNBOUNDED, assert_digits_where_both_are_certain

from duet_kernels import reference
from duet_kernels.head import LMHead, Need
from duet_kernels.options import DISTRIBUTION, RAW, Divergence
from duet_kernels.testing import assert_within_budget, make_problem
from duet_kernels.triton import dense
from duet_kernels.triton import divergence as kernel
from duet_kernels.triton.primitives import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D = 19, 70, 23
EVERYTHING = Need(True, True, True)
FULL = {"bias": True, "softcap": 9.0, "scale": 1.3}
HEADS = ({}, {"softcap": 9.0}, FULL, {"scale": -0.7}, {"bias": True, "scale": -0.7, "teacher_d": 31})

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def tiles_of_many_rows(monkeypatch):
    few_programs(monkeypatch)


def problem(dtype=torch.float64, n=N, v=V, d=D, **options):
    return make_problem(n, v, d, dtype=dtype, device=DEVICE, **options)


def factors(case, *, zero=3):
    """A factor a row, negative ones and a 0 among them."""
    acc = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    factor = torch.linspace(-0.5, 1.5, case.hidden.shape[0], dtype=acc, device=DEVICE)
    factor[zero : zero + 1] = 0
    return factor


def of(divergence, temperature=1.5, beta=0.3):
    raw = divergence in RAW
    return Divergence(divergence, "none" if raw else "renormalize", 1.0 if raw else temperature, beta, 0.8)


def run(case, divergence, factor=None, need=EVERYTHING, beta=0.3):
    """(f L, dh, dW, db)"""
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    factor = factors(case) if factor is None else factor
    need = Need(need.hidden, need.weight, need.bias and case.bias is not None)
    return kernel.linear_divergence(*sides, factor, of(divergence, beta=beta), need)


def expected(case, divergence, factor=None, beta=0.3):
    """(f L, dh, dW, db) from the definition and autograd, in the dtype of the problem (halves: fp32)."""
    factor = factors(case) if factor is None else factor
    acc = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    case = case.to(acc).requiring(case.leaves)
    z_s, z_t = (
        reference.logits(case.hidden, case.head),
        reference.logits(case.teacher_hidden, case.teacher_head),
    )
    rows = reference.divergence(z_s, z_t, None, None, of(divergence, beta=beta), absent_slots=False)
    loss = torch.where(factor == 0, 0, rows * factor.to(acc))
    gradients = torch.autograd.grad(loss.sum(), [getattr(case, name) for name in case.leaves])
    return loss.detach(), *gradients


def check(got, wanted, tolerance=1e-12):
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_fp64_equals_the_definition(divergence, head):
    case = problem(**head)
    got = run(case, divergence)
    check(got, expected(case, divergence))
    assert case.bias is not None or got[3] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_half_and_half_is_a_jsd_as_any(dtype):
    """beta 1/2 has a series of its own."""
    case = problem(dtype, **FULL)
    if dtype == torch.float64:
        check(run(case, "jsd", beta=0.5), expected(case, "jsd", beta=0.5))
    else:
        budget(run(case, "jsd", beta=0.5), case, "jsd", beta=0.5)


def budget(got, case, divergence, **options):
    truth = expected(case.to(torch.float64), divergence, factors(case).double(), **options)
    baseline = expected(case, divergence, **options)
    for name, a, b, c in zip(("loss", "dh", "dW", "db"), got, truth, baseline, strict=False):
        if a is not None:
            assert_within_budget(a, b, c.to(a.dtype), name=f"{divergence} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ALL)
def test_error_budget(divergence, dtype):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    case = problem(dtype, **FULL)
    got = run(case, divergence)
    out = torch.float32 if dtype == torch.float16 else dtype
    assert [x.dtype for x in got] == [torch.float32, out, out, out]
    # dz of a half is a half: of its own rounding the budget in fp32 knows nothing.
    budget([got[0], *(x.to(dtype) for x in got[1:])], case, divergence)


@pytest.mark.parametrize("teacher", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student", [torch.float64, torch.bfloat16], ids=str)
def test_a_teacher_of_another_dtype(student, teacher):
    case, other = problem(student, bias=True), problem(teacher, bias=True)
    mixed = dataclasses.replace(
        case,
        teacher_hidden=other.teacher_hidden,
        teacher_weight=other.teacher_weight,
        teacher_bias=other.teacher_bias,
    )
    wanted = expected(mixed.to(torch.float64), "jsd", factors(case).double())
    got = run(mixed, "jsd")
    tolerance = 1e-12 if teacher == torch.float64 else 1e-5  # the teacher's logits are in its own ACC
    check([x.double() for x in got], wanted, 2e-2 if student == torch.bfloat16 else tolerance)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, case, divergence):
        ctx.case, ctx.divergence = (
            dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias),
            divergence,
        )
        factor = torch.ones_like(hidden[:, 0])
        return run(ctx.case, divergence, factor, Need(False))[0]

    @staticmethod
    def backward(ctx, grad):
        return *run(ctx.case, ctx.divergence, grad.contiguous())[1:], None, None


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "huber"])
def test_gradcheck_of_the_kernels(divergence):
    """With a softcap; every loss and head is in `test_fp64_equals_the_definition`."""
    case = problem(n=4, v=9, d=5, **FULL).requiring(("hidden", "weight", "bias"))
    leaves = case.hidden, case.weight, case.bias
    assert torch.autograd.gradcheck(_Loss.apply, (*leaves, case, divergence), fast_mode=True)


@pytest.mark.parametrize("divergence", ALL)
def test_a_student_close_to_its_teacher_keeps_its_digits(divergence):
    """A gap of 0.02 at logits of standard deviation 4: fp32 is within a few eps of fp64, not 1e-3 off."""
    case = problem(torch.float32, n=9, v=603, d=64, std=4.0, gap=0.02)
    got = run(case, divergence)
    truth = expected(case.to(torch.float64), divergence, factors(case).double())
    budget(got, case, divergence)
    if divergence in SMOOTH:
        for a, b in zip(got, truth, strict=False):
            assert (a.double() - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric_kl"])
def test_both_certain_of_one_id(divergence, temperature):
    def gradients(*tensors):
        h, th, weight = (x.to(DEVICE) for x in tensors)
        factor = torch.ones(len(h), device=DEVICE)
        sides, spec = (h, LMHead(weight), th, LMHead(weight)), of(divergence, temperature, beta=0.5)
        return [x.cpu() for x in kernel.linear_divergence(*sides, factor, spec, Need(True, True))[1:3]]

    margins = (20, 18), (25, 24), (30, 28), (30, 10)
    assert_digits_where_both_are_certain(divergence, gradients, margins, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ALL)
def test_a_student_that_is_the_teacher_has_no_loss(divergence, dtype):
    case = problem(dtype, bias=True)
    same = dataclasses.replace(
        case, teacher_hidden=case.hidden, teacher_weight=case.weight, teacher_bias=case.bias
    )
    assert all((x == 0).all() for x in run(same, divergence))


# --- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WALKS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "symmetric_kl", "tvd", "l1", "mse"])
def test_every_way_is_the_same_sum(way, divergence, monkeypatch):
    """Blocks and slabs that are not full, maxima that grow from slab to slab, programs that share a row."""
    columns(monkeypatch, 32)
    force(monkeypatch, way)
    case = problem(**FULL)
    check(run(case, divergence), expected(case, divergence))


@pytest.mark.parametrize("way", WALKS)
def test_the_noise_is_that_of_the_largest_logit_of_all_slabs(way, monkeypatch):
    """A logit of 1e9 in the first slab: differences of 1e-7 in the others are its rounding."""
    columns(monkeypatch, 32)
    force(monkeypatch, way)
    case = problem(bias=True)
    same = {"teacher_hidden": case.hidden, "teacher_weight": case.weight}
    case = dataclasses.replace(case, **same, bias=case.bias.clone(), teacher_bias=case.bias + 1e-7)
    assert all((x != 0).any() for x in run(case, "l1"))
    case.bias[0] = case.teacher_bias[0] = 1e9
    assert all((x == 0).all() for x in run(case, "l1"))


@pytest.mark.parametrize(
    "way, dtype",
    [
        *((way, torch.bfloat16) for way in WALKS),
        *((way, torch.float16) for way in ("at hand, dW in steps", "recomputed in blocks")),
        *((way, torch.float32) for way in ("at hand, dW at once", "recomputed")),
    ],
    ids=str,
)
def test_every_way_adds_up_in_fp32(way, dtype, monkeypatch):
    force(monkeypatch, way)
    case = problem(dtype, **FULL)
    got = run(case, "forward_kl")
    budget([got[0], *(x.to(dtype) for x in got[1:])], case, "forward_kl")


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("size", [1e-7, 1e-2, 1e3])
def test_fp16_neither_underflows_nor_overflows(divergence, size, monkeypatch):
    """A factor of 1 / N, a large one, differences of a hundred: dz is brought into the range of fp16 and back."""
    case = problem(torch.float16, std=30.0)
    factor = (factors(case) * size).float()
    truth = expected(case.to(torch.float64), divergence, factor.double())
    got = run(case, divergence, factor)
    for a, b in zip(got, truth, strict=False):
        if a is not None:
            assert a.isfinite().all() and (a.double() - b).norm() <= 2e-3 * b.norm()


@pytest.mark.parametrize("delta", [4096.0, 1e10])
def test_fp16_has_the_digits_of_a_huber_loss_with_a_large_delta(delta):
    """All differences are far below it: as half the squared error."""
    case, factor = problem(torch.float16), torch.full((N,), 1 / N, device=DEVICE)
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    spec = dataclasses.replace(of("huber"), delta=delta)
    got = kernel.linear_divergence(*sides, factor, spec, Need(True, True))
    truth = expected(case.to(torch.float64), "mse", factor.double() / 2)
    for a, b in zip(got[:3], truth, strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


# --- what must not leak --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "divergence, way",
    [*((name, None) for name in ALL), ("l1", "dW, then dh"), ("reverse_kl", "recomputed")],
)
def test_a_masked_row_of_nan_leaves_no_trace(divergence, way, monkeypatch):
    if way:
        force(monkeypatch, way)
    case = problem(torch.float32, bias=True)
    clean = run(case, divergence)
    hidden, teacher = case.hidden.clone(), case.teacher_hidden.clone()
    hidden[3] = teacher[3] = math.nan
    got = run(dataclasses.replace(case, hidden=hidden, teacher_hidden=teacher), divergence)
    assert got[0][3] == 0 and (got[1][3] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("divergence", ALL)
def test_nan_stays_in_its_row(divergence):
    case = problem(bias=True)
    clean = run(case, divergence)
    others = torch.arange(N, device=DEVICE) != 6
    for side in ("hidden", "teacher_hidden"):
        poisoned = getattr(case, side).clone()
        poisoned[6, 0] = math.nan
        loss, dhidden, dweight, _ = run(dataclasses.replace(case, **{side: poisoned}), divergence)
        assert loss[6].isnan() and dhidden[6].isnan().all() and dweight.isnan().all()
        assert torch.equal(loss[others], clean[0][others]) and torch.equal(dhidden[others], clean[1][others])


@pytest.mark.parametrize("divergence", [*DISTRIBUTION, *RAW])
@pytest.mark.parametrize("width", [16, 128])
def test_banned_ids(divergence, width, monkeypatch):
    """-inf on both sides: as if the ids were not there. On the teacher's: a probability of 0. First slabs are all -inf."""
    columns(monkeypatch, width)
    case = problem(bias=True)
    both = dataclasses.replace(case, bias=case.bias.clone(), teacher_bias=case.teacher_bias.clone())
    both.bias[:40] = both.teacher_bias[:40] = -math.inf
    kept = ("weight", "bias", "teacher_weight", "teacher_bias")
    small = dataclasses.replace(case, **{name: getattr(case, name)[40:] for name in kept})
    got, wanted = run(both, divergence), expected(small, divergence)
    check(got[:2], wanted[:2])
    for a, b in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a[40:], b, rtol=1e-12, atol=1e-12)
        assert (a[:40] == 0).all()
    if divergence in RAW:  # on one side only: infinitely far
        return
    teacher = dataclasses.replace(case, teacher_bias=both.teacher_bias)
    if divergence in UNBOUNDED:
        loss = run(teacher, divergence)[0]
        counts = factors(case) != 0
        assert loss[counts].isinf().all() and (loss[~counts] == 0).all()
    else:
        check(run(teacher, divergence), expected(teacher, divergence))
    if divergence == "forward_kl":
        loss = run(dataclasses.replace(case, bias=both.bias), divergence)[0]
        assert (loss[factors(case) != 0].abs() == math.inf).all()


def test_distant_logits_overflow_nothing():
    """Logits of a thousand, student and teacher at opposite ends."""
    case = problem(v=103, std=300.0, gap=2.0)
    for divergence in DISTRIBUTION:
        for a, b in zip(run(case, divergence), expected(case, divergence), strict=False):
            # A certain row's gradient is rounding; the others' are right to the digits that logits of 1000 leave.
            assert a.isfinite().all() and (a - b).norm() <= 1e-8 * b.norm()


# --- shapes, order, cost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 2), (1, 2, 1), (2, 17, 33), (70, 16, 5), (3, 300, 8)])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "mse"])
def test_shapes(n, v, d, divergence):
    case = problem(n=n, v=v, d=d, bias=True)
    factor = torch.linspace(0.5, 1.5, n, dtype=torch.float64, device=DEVICE)
    check(run(case, divergence, factor), expected(case, divergence, factor))


def test_no_tokens():
    case = problem(n=0, bias=True)
    loss, dhidden, dweight, dbias = run(case, "jsd")
    assert loss.shape == (0,) and dhidden.shape == (0, D)
    assert torch.equal(dweight, torch.zeros_like(case.weight))
    assert torch.equal(dbias, torch.zeros_like(case.bias))


def test_any_strides():
    case = problem(bias=True)
    wanted = expected(case, "reverse_kl")
    odd = dataclasses.replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        weight=torch.stack([case.weight, case.weight], -1)[..., 0],
        bias=torch.stack([case.bias, case.bias], -1)[:, 0],
        teacher_weight=case.teacher_weight.T.contiguous().T,
        teacher_bias=torch.stack([case.teacher_bias, case.teacher_bias], -1)[:, 1],
    )
    factor = factors(case)
    check(run(odd, "reverse_kl", torch.stack([factor, factor], -1)[:, 1]), wanted)
    one = torch.ones((), dtype=torch.float64, device=DEVICE).expand(N)
    check(run(odd, "reverse_kl", one), expected(case, "reverse_kl", one))


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed in blocks"])
def test_two_runs_are_bitwise_equal_and_write_no_input(way, monkeypatch):
    force(monkeypatch, way)
    case = problem(torch.bfloat16, **FULL)
    names = [f.name for f in dataclasses.fields(case) if isinstance(getattr(case, f.name), torch.Tensor)]
    before = {name: getattr(case, name).clone() for name in names}
    first, second = (run(case, "jsd") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(getattr(case, name), before[name]) for name in names)


@pytest.mark.parametrize("only", [*range(3), None])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "l1"])
def test_each_gradient_alone(only, divergence, monkeypatch):
    case = problem(**FULL)
    every = run(case, divergence)
    written = []
    write = kernel._Divergence.gradient
    monkeypatch.setattr(
        kernel._Divergence, "gradient", lambda *args, **how: written.append(write(*args, **how))
    )
    alone = run(case, divergence, need=Need(*(i == only for i in range(3))))
    torch.testing.assert_close(alone[0], every[0], rtol=1e-12, atol=1e-12)
    for i, (a, b) in enumerate(zip(alone[1:], every[1:], strict=True)):
        if i == only:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a is None
    assert bool(written) == (only is not None)  # the loss alone writes no gradient


@pytest.mark.parametrize(
    "divergence, folds",
    [("forward_kl", 1), ("symmetric_kl", 2), ("jsd", 2), ("tvd", 2), ("huber", 0), ("l1", 1)],
)
def test_how_often_logits_are_read_and_multiplied(divergence, folds, monkeypatch):
    """At hand nothing is multiplied twice; recomputed, a loss without folds pays nothing."""
    case, seen = problem(bias=True), []
    for name in ("_fold_moments", "_fold_terms", "_fold_values", "gradient"):
        whole = getattr(kernel._Divergence, name)
        note = "write" if name == "gradient" else "fold"
        monkeypatch.setattr(
            kernel._Divergence,
            name,
            lambda *args, f=whole, note=note, **how: seen.append(note) or f(*args, **how),
        )
    logits = dense._Walk._logits
    monkeypatch.setattr(dense._Walk, "_logits", lambda *args: seen.append("multiply") or logits(*args))
    force(monkeypatch, "at hand, dW at once")
    run(case, divergence)
    assert seen == ["multiply", *["fold"] * folds, "write"] * 2
    seen.clear()
    force(monkeypatch, "recomputed in blocks")
    run(case, divergence)
    assert seen == ["multiply", *["fold"] * folds] * (2 if folds else 0) + ["multiply", "write"] * 4
