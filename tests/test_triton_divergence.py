"""linear_divergence's kernels and their schedule against the definition, judged in fp64 on the rounded inputs."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from duet_kernels import reference
from duet_kernels.options import Divergence
from duet_kernels.testing import assert_within_budget, make_problem
from duet_kernels.triton import dense, dense_plan
from duet_kernels.triton import divergence as kernel
from duet_kernels.triton.dense_plan import Need, Plan, Shape, Sweep
from duet_kernels.triton.primitives import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D = 19, 103, 23
RAW = ("huber", "mse", "l1")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", *RAW)
ALL = {"need_hidden": True, "need_weight": True, "need_bias": True}
FULL = {"bias": True, "softcap": 9.0, "scale": 1.3}
EVERYTHING = Need(True, True, True)

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


def factors(case, *, zero=3):
    """A factor a row, negative ones and a 0 among them."""
    acc = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    factor = torch.linspace(-0.5, 1.5, case.hidden.shape[0], dtype=acc, device=DEVICE)
    factor[zero : zero + 1] = 0
    return factor


def of(divergence, temperature=1.5):
    raw = divergence in RAW
    return Divergence(
        divergence, "none" if raw else "renormalize", 1.0 if raw else temperature, beta=0.3, delta=0.8
    )


def run(case, divergence, factor=None, **need):
    """(f L, dh, dW, db)"""
    spec = of(divergence)
    return kernel.linear_divergence(
        *(case.hidden, case.weight, case.bias, case.softcap, case.scale),
        *(case.teacher_hidden, case.teacher_weight, case.teacher_bias, case.softcap, case.scale),
        factors(case) if factor is None else factor,
        divergence=divergence,
        temperature=spec.temperature,
        beta=spec.beta,
        delta=spec.delta,
        **{**ALL, "need_bias": case.bias is not None, **need},
    )


def expected(case, divergence, factor=None):
    """(f L, dh, dW, db) from the definition and autograd, in the dtype of the problem (halves: fp32)."""
    factor = factors(case) if factor is None else factor
    acc = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    case = case.to(acc).requiring(case.leaves)
    z_s, z_t = (
        reference.logits(case.hidden, case.head),
        reference.logits(case.teacher_hidden, case.teacher_head),
    )
    rows = reference.divergence(z_s, z_t, None, None, of(divergence), absent_slots=False)
    loss = torch.where(factor == 0, 0, rows * factor.to(acc))
    gradients = torch.autograd.grad(loss.sum(), [getattr(case, name) for name in case.leaves])
    return loss.detach(), *gradients


def check(got, wanted, tolerance=1e-12):
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("head", [{}, FULL, {"bias": True, "scale": -0.7, "teacher_d": 31}], ids=str)
def test_fp64_equals_the_definition(divergence, head):
    case = problem(**head)
    got = run(case, divergence)
    check(got, expected(case, divergence))
    assert case.bias is not None or got[3] is None


def budget(got, case, divergence):
    truth = expected(case.to(torch.float64), divergence, factors(case).double())
    baseline = expected(case, divergence)
    for name, a, b, c in zip(("loss", "dh", "dW", "db"), got, truth, baseline, strict=False):
        if a is not None:
            assert_within_budget(a, b, c.to(a.dtype), name=f"{divergence} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
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
        none = {name: False for name in ALL}
        return run(ctx.case, divergence, factor, **none)[0]

    @staticmethod
    def backward(ctx, grad):
        return *run(ctx.case, ctx.divergence, grad.contiguous())[1:], None, None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_the_kernels(divergence):
    case = problem(n=4, v=9, d=5, **FULL).requiring(("hidden", "weight", "bias"))
    leaves = case.hidden, case.weight, case.bias
    assert torch.autograd.gradcheck(_Loss.apply, (*leaves, case, divergence), fast_mode=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_close_to_its_teacher_keeps_its_digits(divergence):
    """A gap of 0.02 at logits of standard deviation 4: fp32 is within a few eps of fp64, not 1e-3 off."""
    case = problem(torch.float32, n=9, v=603, d=64, std=4.0, gap=0.02)
    got = run(case, divergence)
    truth = expected(case.to(torch.float64), divergence, factors(case).double())
    budget(got, case, divergence)
    if divergence in ("forward_kl", "reverse_kl", "jsd"):
        for a, b in zip(got, truth, strict=False):
            assert (a.double() - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_no_loss(divergence, dtype):
    case = problem(dtype, bias=True)
    same = dataclasses.replace(
        case, teacher_hidden=case.hidden, teacher_weight=case.weight, teacher_bias=case.bias
    )
    assert all((x == 0).all() for x in run(same, divergence))


# --- schedules ---------------------------------------------------------------------------------------------------

PLANS = {
    "at hand, dW at once": Plan(N, 12, V, (), 0, 0.0),
    "at hand, dW in steps": Plan(12, 7, V, (), 0, 0.0),
    "recomputed": Plan(0, N, 64, (Sweep(N, N, 48, EVERYTHING),), 0, 0.0),
    "recomputed in blocks": Plan(0, 12, V, (Sweep(N, 12, 64, EVERYTHING),), 0, 0.0),
    "dW, then dh": Plan(
        0,
        12,
        64,
        (Sweep(N, 12, 64, Need(False, True, True)), Sweep(12, 7, V, Need(True, False, False))),
        0,
        0.0,
    ),
}


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "tvd", "l1"])
def test_every_way_is_the_same_sum(way, divergence, monkeypatch):
    """Blocks and slabs that are not full, maxima that grow from slab to slab, programs that share a row."""
    monkeypatch.setattr(kernel.tiles, "SLAB_COLUMNS", {4: 32, 8: 32})
    monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(**FULL)
    check(run(case, divergence), expected(case, divergence))


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_way_adds_up_in_fp32(way, dtype, monkeypatch):
    monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(dtype, **FULL)
    got = run(case, "forward_kl")
    budget([got[0], *(x.to(dtype) for x in got[1:])], case, "forward_kl")


@pytest.mark.parametrize("divergence", ["mse", "reverse_kl", "huber"])
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


def test_the_planner_finds_its_way_in_any_workspace(monkeypatch):
    """The smaller it is, the more is recomputed; the numbers do not change."""
    case = problem(n=17, v=131, d=16, **FULL)
    wanted = expected(case, "forward_kl")
    seen = []
    for size in (10**6, 60_000, 30_000, 20_000):
        monkeypatch.setattr(dense_plan, "workspace_bytes", lambda size=size: size)
        monkeypatch.setattr(dense, "plan", lambda shape: seen.append(dense_plan.plan(shape)) or seen[-1])
        check(run(case, "forward_kl"), wanted)
    assert [(plan.kept, plan.rows < 17, len(plan.sweeps)) for plan in seen] == [
        (17, False, 0),
        (17, True, 0),
        (0, False, 1),
        (0, False, 2),
    ]


# --- what must not leak --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "divergence, way",
    [*((name, None) for name in DIVERGENCES), ("l1", "dW, then dh"), ("reverse_kl", "recomputed")],
)
def test_a_masked_row_of_nan_leaves_no_trace(divergence, way, monkeypatch):
    if way:
        monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(torch.float32, bias=True)
    clean = run(case, divergence)
    hidden, teacher = case.hidden.clone(), case.teacher_hidden.clone()
    hidden[3] = teacher[3] = math.nan
    got = run(dataclasses.replace(case, hidden=hidden, teacher_hidden=teacher), divergence)
    assert got[0][3] == 0 and (got[1][3] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
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


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("width", [16, 128])
def test_banned_ids(divergence, width, monkeypatch):
    """-inf on both sides: as if the ids were not there. On the teacher's: a probability of 0. First slabs are all -inf."""
    monkeypatch.setattr(kernel.tiles, "SLAB_COLUMNS", {4: width, 8: width})
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
    teacher = dataclasses.replace(case, teacher_bias=both.teacher_bias)
    if divergence == "reverse_kl":
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
    case = problem(std=300.0, gap=2.0)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
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
    monkeypatch.setattr(dense, "plan", lambda shape: PLANS[way])
    case = problem(torch.bfloat16, **FULL)
    names = [f.name for f in dataclasses.fields(case) if isinstance(getattr(case, f.name), torch.Tensor)]
    before = {name: getattr(case, name).clone() for name in names}
    first, second = (run(case, "jsd") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(getattr(case, name), before[name]) for name in names)


@pytest.mark.parametrize("only", [*ALL, None])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "l1"])
def test_each_gradient_alone(only, divergence, monkeypatch):
    case = problem(**FULL)
    every = run(case, divergence)
    written = []
    write = kernel._Divergence.gradient
    monkeypatch.setattr(
        kernel._Divergence, "gradient", lambda *args, **how: written.append(write(*args, **how))
    )
    alone = run(case, divergence, **{name: name == only for name in ALL})
    torch.testing.assert_close(alone[0], every[0], rtol=1e-12, atol=1e-12)
    for a, b, name in zip(alone[1:], every[1:], ALL, strict=True):
        if name == only:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a is None
    assert bool(written) == (only is not None)  # the loss alone writes no gradient


@pytest.mark.parametrize(
    "divergence, passes", [("forward_kl", 2), ("jsd", 3), ("tvd", 3), ("huber", 1), ("l1", 2)]
)
def test_how_often_logits_are_read_and_multiplied(divergence, passes, monkeypatch):
    """At hand nothing is multiplied twice; recomputed, a loss without folds pays nothing."""
    case = problem(bias=True)
    counts = {"read": 0, "multiplied": 0}

    def counting(name, function):
        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(kernel.dense, "grid", counting("read", dense.grid))
    monkeypatch.setattr(dense._Walk, "_logits", counting("multiplied", dense._Walk._logits))
    monkeypatch.setattr(dense, "plan", lambda shape: Plan(N, N, V, (), 0, 0.0))
    run(case, divergence)
    assert counts == {"read": passes, "multiplied": 1}
    counts.update(read=0, multiplied=0)
    monkeypatch.setattr(dense, "plan", lambda shape: Plan(0, N, V, (Sweep(N, N, V, EVERYTHING),), 0, 0.0))
    run(case, divergence)
    assert counts == {"read": passes, "multiplied": 1 if divergence == "huber" else 2}


@pytest.mark.parametrize("megabytes", [1, 256, 3072])
@pytest.mark.parametrize("folds", [0, 2])
@pytest.mark.parametrize(
    "need",
    [EVERYTHING, Need(True, False, False), Need(False, True, False), Need(False, False, False)],
    ids=str,
)
def test_plans_keep_the_workspace(megabytes, folds, need, monkeypatch):
    monkeypatch.setattr(kernel.tiles, "SLAB_ROWS", 1)
    monkeypatch.setattr(kernel.tiles, "SLAB_PROGRAMS", 1056)
    for n in (1, 1000, 32768):
        for v, d in ((203, 45), (128256, 4096), (262144, 8192)):
            for operand, out in ((2, 2), (2, 4), (4, 4)):
                shape = Shape(n, v, (d, d), 8, operand, 4, out, folds, need)
                plan = dense_plan._plan.__wrapped__(shape, megabytes << 20)
                parts = [dense_plan.kept_bytes(shape, plan.kept, plan.rows)] if plan.kept else []
                parts += [dense_plan.sweep_bytes(shape, sweep) for sweep in plan.sweeps]
                if folds and not plan.kept:
                    parts.append(plan.rows * dense_plan.pitch(plan.columns) * shape.logit)
                used = max(parts, default=0)
                # Below one row and sixteen columns, and what is as long as a row of W, nothing can be given up.
                smallest = 16 * (12 + 8) + d * (operand + 4 + 16 * 4) + 8 * v
                statistics = dense_plan.statistics_bytes(shape)
                assert used <= max((megabytes << 20) - statistics, megabytes << 19, smallest)
                assert plan.kept <= n and 0 < plan.rows <= n and 0 < plan.columns <= v
                assert all(s.group <= n and 0 < s.rows <= s.group and 0 < s.columns <= v for s in plan.sweeps)
                for wanted, done in zip(need, zip(*(s.need for s in plan.sweeps), strict=True), strict=False):
                    assert sum(done) == wanted  # every gradient is made, and made once


@pytest.mark.parametrize(
    "megabytes, folds, sides, weight, at_hand, milliseconds",
    [
        (3072, 1, 2, True, True, 52.7),
        (1024, 1, 2, True, False, 71.4),
        (256, 1, 2, True, False, 78.4),
        (3072, 2, 2, True, True, 54.7),
        (1024, 2, 2, True, False, 73.4),
        (256, 2, 2, True, False, 80.4),
        (3072, 1, 2, False, True, 37.1),
        (1024, 1, 2, False, True, 37.1),
        (256, 1, 2, False, True, 48.6),
        (3072, 1, 1, True, True, 39.8),
        (1024, 1, 1, True, False, 47.3),
        (256, 1, 1, True, False, 53.0),
    ],
)
def test_reckoned_time_at_the_anchor(megabytes, folds, sides, weight, at_hand, milliseconds, monkeypatch):
    """The table in the docstring of `dense`: N 8192, D 4096, V 128256 in bf16."""
    monkeypatch.setattr(kernel.tiles, "SLAB_ROWS", 1)
    monkeypatch.setattr(kernel.tiles, "SLAB_PROGRAMS", 1056)
    shape = Shape(8192, 128256, (4096,) * sides, 4 * sides, 2, 4, 2, folds, Need(True, weight, False))
    plan = dense_plan._plan.__wrapped__(shape, megabytes << 20)  # with the tiles of a GPU
    assert bool(plan.kept) == at_hand and abs(plan.seconds * 1e3 - milliseconds) < 0.06


def peak_bytes(function):
    """High-water mark of the allocator while `function` runs, above what was allocated before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.skipif(not INTERPRETED, reason="the record is that of the CPU's allocator")
@pytest.mark.parametrize("kilobytes, divergence", [(2000, "jsd"), (900, "jsd"), (300, "huber")])
def test_the_allocator_agrees_with_the_plan(kilobytes, divergence, monkeypatch):
    """Beyond its results a call allocates no more than the workspace. In fp32, which a CPU multiplies without copies."""
    monkeypatch.setattr(kernel.tiles, "SLAB_COLUMNS", {4: 512, 8: 512})
    monkeypatch.setattr(dense_plan, "workspace_bytes", lambda: kilobytes << 10)
    seen = []
    monkeypatch.setattr(dense, "plan", lambda shape: seen.append(dense_plan.plan(shape)) or seen[-1])
    case = problem(torch.float32, n=64, v=2000, d=16, bias=True)
    factor = factors(case)
    results = 4 * (64 + 64 * 16 + 2000 * 16 + 2000)
    peak = peak_bytes(lambda: run(case, divergence, factor))
    assert (seen[0].kept > 0) == (divergence == "jsd")
    assert results + seen[0].bytes / 2 < peak <= results + (kilobytes << 10)
