"""The two cuts of the dense losses: the definition's numbers from either, and no more products than are promised.

The contract judges trainable heads, whose KLs are cut into rows; here heads are frozen, and tiles summed as they come.
"""

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from divergences import assert_digits_where_both_are_certain
from torch.utils._python_dispatch import TorchDispatchMode

from duet_kernels import LMHead, linear_distill_loss
from duet_kernels.head import Need
from duet_kernels.options import Divergence
from duet_kernels.portable import cuts, dense
from duet_kernels.portable.dense_rows import RunningKL
from duet_kernels.testing import assert_within_budget, make_problem

KLS = RunningKL.NAMES
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 8.0},
    "full": {"softcap": 8.0, "scale": 0.7, "bias": True},
    "negative scale": {"scale": -1.3},
    "teacher of another size": {"teacher_d": 21},
    "close": {"gap": 0.01},
    "far": {"std": 12.0, "gap": 2.0},
}


@pytest.fixture(params=["tiles", "rows"])
def cut(request, monkeypatch):
    """Either cut, whatever is cheaper; 37 rows are three blocks of tiles, or two chunks."""
    monkeypatch.setattr(dense, "_tiles_are_cheaper", lambda *shape: request.param == "tiles")
    monkeypatch.setattr(cuts, "MAX_ROWS", 16)
    return request.param


def _loss_and_gradient(problem, name, impl, **options):
    case = problem.requiring(["hidden"])
    loss = linear_distill_loss(
        case.hidden,
        case.head,
        case.teacher_hidden,
        case.teacher_head,
        divergence=name,
        impl=impl,
        **options,
    )
    return loss.detach(), torch.autograd.grad(loss.where(loss.isfinite(), 0).sum(), case.hidden)[0]


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize(
    "temperature, case",
    [*zip((0.4, 1.0, 3.0) * 3, CASES, strict=False), (1.0, "plain"), (3.0, "full"), (0.4, "close")],
)
def test_a_frozen_head_in_either_cut(name, case, temperature, cut):
    problem = make_problem(dtype=torch.float64, **CASES[case])
    options = {"temperature": temperature, "weights": torch.arange(37.0) % 5, "reduction": "sum"}
    got, wanted = (_loss_and_gradient(problem, name, impl, **options) for impl in ("chunked", "reference"))
    for x, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, truth, rtol=0, atol=1e-11 * float(truth.abs().max()))


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize(
    "dtype, case",
    [
        *((torch.float32, case) for case in CASES),
        *((torch.bfloat16, case) for case in ("full", "close", "far")),
        *((torch.float16, case) for case in ("negative scale", "close", "far")),
    ],
    ids=str,
)
def test_digits_of_a_frozen_head(name, case, dtype, cut):
    problem = make_problem(40, 1000, dtype=dtype, **CASES[case])
    options = {"divergence": name, "reduction": "none", "weights": torch.linspace(0.1, 2, 40)}

    def define(problem):
        case = problem.requiring(["hidden"])
        exact = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
        student, teacher = (
            LMHead(*(None if x is None else x.to(exact.get(x.dtype, x.dtype)) for x in tensors), *ends)
            for tensors, ends in (
                ((case.weight, case.bias), (case.softcap, case.scale)),
                ((case.teacher_weight, case.teacher_bias), (case.softcap, case.scale)),
            )
        )
        hidden, teacher_hidden = (x.to(student.weight.dtype) for x in (case.hidden, case.teacher_hidden))
        loss = linear_distill_loss(hidden, student, teacher_hidden, teacher, impl="reference", **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), case.hidden)[0]

    truth, baseline = define(problem.to(torch.float64)), define(problem)
    del options["divergence"]
    got = _loss_and_gradient(problem, name, "chunked", **options)
    for what, *judged in zip(("value", "dhidden"), got, truth, baseline, strict=True):
        assert_within_budget(*judged, name=f"{name} {what}")


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("order", ["ascending", "descending", "drawn"])
def test_a_flat_teacher_of_a_peaked_student(name, order, cut):
    """Sums of very different size, maxima that come late: neither side costs the other its digits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 24, generator=generator)
    hidden, teacher_hidden = (torch.randn(32, 24, generator=generator) * size for size in (3.0, 0.02))
    if order != "drawn":
        weight = weight[(weight @ hidden[0]).argsort(descending=order == "descending")]
    problem = dataclasses.replace(
        make_problem(32, 4000, 24),
        hidden=hidden,
        teacher_hidden=teacher_hidden,
        weight=weight,
        teacher_weight=weight,
    )
    for swapped in (problem, dataclasses.replace(problem, hidden=teacher_hidden, teacher_hidden=hidden)):
        truth = _loss_and_gradient(swapped.to(torch.float64), name, "reference", reduction="none")
        baseline = _loss_and_gradient(swapped, name, "reference", reduction="none")
        got = _loss_and_gradient(swapped, name, "chunked", reduction="none")
        for judged in zip(got, truth, baseline, strict=True):
            assert_within_budget(*judged)


def _strips(z, width):
    return z.split(width, 1)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_strips_seen_once_keep_the_digits_of_a_close_student(name, shift):
    """Gap 0.02 at logit std 4; the difference of the two softmax averages of W, each rounded, has lost them."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(16, 3000, generator=generator)
    student = teacher + 0.02 * torch.randn(16, 3000, generator=generator) + shift
    weight = torch.randn(3000, 8, generator=generator)
    running = RunningKL(student.new_empty(16, 8), Divergence(name, "renormalize", 1.0, 0.5, 1.0))
    for strip in zip(_strips(student, 200), _strips(teacher, 200), weight.split(200), strict=True):
        running.add(*strip)
    s = student.double().requires_grad_()
    logq, logp = s.log_softmax(1), teacher.double().log_softmax(1)
    terms = logp.exp() * (logp - logq) if name == "forward_kl" else logq.exp() * (logq - logp)
    truth = terms.sum(1)
    wanted = torch.autograd.grad(truth.sum(), s)[0] @ weight.double()
    digits = 1 + shift
    error = (running.gradient() - wanted).norm() / wanted.norm()
    assert error <= 1e-5 * digits
    assert (running.loss - truth).norm() / truth.norm() <= 1e-4 * digits
    if name == "forward_kl" and not shift:
        s_sum, t_sum = (z.exp().sum(1, keepdim=True) for z in (student, teacher))
        late = student.exp() @ weight / s_sum - teacher.exp() @ weight / t_sum
        assert (late - wanted).norm() / wanted.norm() > 2 * error


RULED_OUT = {
    "the first tiles": slice(0, 90),
    "here and there": slice(3, None, 7),
    "the last": slice(170, None),
}


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("where", RULED_OUT)
@pytest.mark.parametrize("who", ["both", "student", "teacher"])
def test_ids_that_are_ruled_out(name, where, who, cut):
    """A bias of -inf: nothing where both have no probability, infinite where only the divisor has none."""
    problem = make_problem(dtype=torch.float64, bias=True)
    bias, teacher_bias = problem.bias.clone(), problem.teacher_bias.clone()
    if who != "teacher":
        bias[RULED_OUT[where]] = -torch.inf
    if who != "student":
        teacher_bias[RULED_OUT[where]] = -torch.inf
    # Far below what an origin of 0 would bear, to either side.
    for level in (0.0, -2000.0, 2000.0):
        case = dataclasses.replace(problem, bias=bias + level, teacher_bias=teacher_bias - level)
        got, wanted = (
            _loss_and_gradient(case, name, impl, reduction="none") for impl in ("chunked", "reference")
        )
        infinite = who == ("student" if name == "forward_kl" else "teacher")
        assert bool(wanted[0].isinf().all()) == infinite
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-9)
        if not infinite:
            torch.testing.assert_close(got[1], wanted[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*KLS, "huber", "jsd"])
def test_a_row_that_is_not_a_number_stays_alone(name, cut):
    problem = make_problem()
    whole = _loss_and_gradient(problem, name, "chunked", reduction="none")
    hidden = problem.hidden.clone()
    hidden[5] = torch.nan
    spoilt = _loss_and_gradient(
        dataclasses.replace(problem, hidden=hidden), name, "chunked", reduction="none"
    )
    others = torch.arange(37) != 5
    assert bool(spoilt[0][5].isnan())
    for x, y in zip(whole, spoilt, strict=True):
        torch.testing.assert_close(x[others], y[others])
    # A weight of 0 takes it out.
    weights = others.float()
    loss, gradient = _loss_and_gradient(
        dataclasses.replace(problem, hidden=hidden), name, "chunked", weights=weights
    )
    assert bool(loss.isfinite()) and not gradient[5].any() and bool(gradient.isfinite().all())


class _Products(TorchDispatchMode):
    """Multiplications and additions of all matrix products."""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_"):
            left, right = args[-2:]
            self.flop += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert not any(product in name for product in ("mm", "mv", "dot", "linear", "einsum")), name
        return func(*args, **(kwargs or {}))


def _products(name, n=64, v=1024, need=(True, False, False)):
    """Products of all rows with the whole W."""
    problem = make_problem(n, v, 16)
    sides = [
        (problem.hidden, LMHead(problem.weight, None, None, 1.0)),
        (problem.teacher_hidden, LMHead(problem.teacher_weight, None, None, 1.0)),
    ]
    spec = Divergence(name, "renormalize", 1.0, 0.5, 1.0)
    with _Products() as products:
        dense.linear_divergence(*sides[0], *sides[1], torch.ones(n), spec, Need(*need))
    return products.flop / (2 * n * v * 16)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "huber", "mse", "jsd", "tvd", "l1"])
def test_products(name, cut):
    assert _products(name, need=(False, False, False)) == 2
    assert _products(name) == (4 if name in KLS and cut == "tiles" else 3)
    assert _products(name, need=(True, True, True)) == 4
    assert _products(name, need=(False, True, False)) == 3


def test_tiles_where_they_are_cheaper():
    """Few rows, or a workspace of few rows: W would be read too often. A W in the cache may be read."""
    large, small = torch.empty(32000, 512, device="meta"), torch.empty(2000, 512, device="meta")
    cheaper = dense._tiles_are_cheaper
    assert cheaper(1, 1, large) and cheaper(16, 8, large) and cheaper(256, 52, large)
    assert not cheaper(512, 103, large) and not cheaper(8192, 1639, large)
    assert cheaper(8192, 10, large) and not cheaper(16, 8, small)


@pytest.mark.parametrize("name", KLS)
def test_the_gradient_in_hidden_states_does_not_care_for_the_cut(name):
    """A frozen head's tiles and a trainable one's rows: the same to rounding, at a size where the rule takes both."""
    problem = make_problem(16, 24000, 96)
    assert dense._tiles_are_cheaper(16, 8, problem.weight)
    found = []
    for leaves in (["hidden"], ["hidden", "weight"]):
        case = problem.requiring(leaves)
        loss = linear_distill_loss(
            case.hidden,
            case.weight,
            case.teacher_hidden,
            case.teacher_weight,
            divergence=name,
            impl="chunked",
        )
        found.append((loss.detach(), torch.autograd.grad(loss, case.hidden)[0]))
    for x, y in zip(*found, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


def test_a_half_dweight_is_summed_over_blocks_in_fp32(monkeypatch):
    """256 rows add 2^-9 each to a sum near 1, where bf16 would stay."""
    monkeypatch.setattr(cuts, "MAX_ROWS", 1)
    hidden = torch.full((256, 2), 2.0**-9, dtype=torch.bfloat16)
    hidden[0] = 1
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    ones, teacher = hidden.new_ones(256, 1), hidden.new_full((3, 1), -0.5)  # s - t = 0.5: dloss/dz = 1
    linear_distill_loss(hidden, weight, ones, teacher, divergence="mse", reduction="sum").backward()
    assert weight.grad.float().unique().item() == pytest.approx(1 + 255 * 2.0**-9, rel=2**-8)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd"])
def test_both_certain_of_one_id(name, temperature):
    def gradients(h, teacher, weight):
        h, w = (x.clone().requires_grad_() for x in (h, weight))
        options = {"divergence": name, "temperature": temperature, "reduction": "sum", "impl": "chunked"}
        dh, dw = torch.autograd.grad(linear_distill_loss(h, w, teacher, weight, **options), (h, w))
        frozen = torch.autograd.grad(linear_distill_loss(h, weight, teacher, weight, **options), h)[0]
        assert (dh - frozen).norm() <= 2e-5 * dh.norm()
        return dh, dw

    assert_digits_where_both_are_certain(
        name, gradients, ((20, 18), (25, 24), (30, 28), (30, 10)), temperature
    )


def test_origins_keep_the_sums_of_one_size():
    """A row of 30 000 equal logits does not sum up to 30 000."""
    running = RunningKL(torch.zeros(2, 1), Divergence("forward_kl", "renormalize", 1.0, 0.5, 1.0), False)
    for strip in torch.zeros(2, 30000).split(1000, 1):
        running.add(strip, strip)
    assert running.sums[0].amax() <= 2 and not running.loss.any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd"])
def test_a_certain_student_at_a_low_temperature(name):
    """Beside log_softmax of fp32 logits: q has to add up to 1, where T times a large log-sum-exp is rounded, too."""
    generator = torch.Generator().manual_seed(5)
    h, gap, w = (torch.randn(n, 64, generator=generator) for n in (64, 64, 1000))
    w = w / 2

    def gradient(make, dtype):
        x = h.to(dtype, copy=True).requires_grad_()
        make(x, w.to(dtype), (h + 0.3 * gap).to(dtype)).backward()
        return x.grad.double()

    def ours(x, w, t):
        return linear_distill_loss(x, LMHead(w), t, LMHead(w), divergence=name, temperature=0.01)

    def plain(x, w, t):
        kl = partial(F.kl_div, log_target=True, reduction="batchmean")
        log_q, log_p = ((z @ w.T / 0.01).log_softmax(-1) for z in (x, t))
        forward, reverse = kl(log_q, log_p), kl(log_p, log_q)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        of_jsd = (kl(log_m, log_p) + kl(log_m, log_q)) / 2
        sums = {"forward_kl": forward, "reverse_kl": reverse, "symmetric_kl": (forward + reverse) / 2}
        return sums.get(name, of_jsd)

    true = gradient(plain, torch.float64)
    errors = [(gradient(make, torch.float32) - true).norm() / true.norm() for make in (ours, plain)]
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps, errors
