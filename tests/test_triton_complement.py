"""Cross-entropy, log-sum-exps and losses with a tail against full logits and autograd, judged in fp64 on the rounded inputs."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from dense_walks import WALKS, columns, few_programs, force
from divergences import FORMS

from duet_kernels import portable, reference
from duet_kernels.head import LMHead, Need
from duet_kernels.ops import primitives
from duet_kernels.options import Divergence
from duet_kernels.testing import assert_within_budget, make_problem
from duet_kernels.triton import complement as kernel
from duet_kernels.triton import dense
from duet_kernels.triton.primitives import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D, K = 19, 70, 23, 6
ALL = Need(True, True, True)
HEADS = (
    {},
    {"softcap": 9.0},
    {"bias": True, "softcap": 9.0, "scale": 1.3},
    {"scale": -0.7},
    {"bias": True, "scale": -0.7},
)
FULL = HEADS[2]
FAMILIES = ("cross-entropy", "logsumexp", "forward_kl-tail", "jsd-tail", "forward_kl-zeroed")
WITH_TAIL = tuple("-".join(form) for form in FORMS if form[1] not in ("none", "renormalize"))

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def tiles_of_many_rows(monkeypatch):
    few_programs(monkeypatch)


@dataclasses.dataclass
class Case:
    """A problem with ids of every token: an absent slot, duplicates, one id in all rows; factors with a 0 among them."""

    problem: object
    ids: torch.Tensor
    teacher: torch.Tensor
    teacher_tail: torch.Tensor
    factor: torch.Tensor

    def to(self, dtype):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        rows = {name: getattr(self, name).to(acc) for name in ("teacher", "teacher_tail", "factor")}
        return dataclasses.replace(self, problem=self.problem.to(dtype), **rows)


def make_case(dtype=torch.float64, n=N, v=V, d=D, k=K, seed=0, **options):
    problem = make_problem(n, v, d, dtype=dtype, device=DEVICE, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, v, (n, k), generator=generator)
    if n > 5 and k > 4:
        ids[:, 4] = 11 % v
        ids[3, 2] = -1
        ids[4] = -100
        ids[5, 0] = ids[5, 1]
        ids[6, :4] = ids[6, 5]
    z = reference.logits(problem.teacher_hidden.double(), problem.to(torch.float64).teacher_head).cpu()
    teacher = z.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    tail = z.scatter(1, ids.clamp(min=0), -math.inf).logsumexp(1)
    factor = torch.linspace(-0.5, 1.5, n, dtype=torch.float64)
    factor[1:2] = 0
    case = Case(problem, *(x.to(DEVICE) for x in (ids, teacher, tail, factor)))
    return case.to(dtype)


def spec_of(family):
    name, normalization = family.split("-")
    return Divergence(name, normalization, 1.7, 0.3, 1.0)


def run(family, case, need=ALL):
    """(f L, dh, dW, db)"""
    p = case.problem
    need = Need(need.hidden, need.weight, need.bias and p.bias is not None)
    inputs = p.hidden, p.head.narrowed()
    if family == "cross-entropy":
        return kernel.linear_cross_entropy(*inputs, p.labels, case.factor, need)
    if family == "logsumexp":
        inputs = *inputs, case.ids, 1.7
        tail, _, dhidden, _ = kernel.complement_and_values(*inputs, False, False, Need(need.hidden))
        zeros = torch.zeros_like(case.teacher)
        saved = tail, zeros, dhidden, case.factor, zeros
        backward = kernel.complement_and_values_backward
        gradients = backward(*inputs, *saved, need._replace(hidden=False))[1:]
        skip = case.factor == 0
        if dhidden is not None:
            dhidden = (dhidden * case.factor[:, None]).masked_fill(skip[:, None], 0).to(dhidden.dtype)
        return (tail * case.factor).masked_fill(skip, 0), dhidden, *gradients
    teacher = case.teacher, case.teacher_tail if spec_of(family).needs_teacher_logsumexp else None
    return kernel.topk_loss_with_tail(*inputs, case.ids, *teacher, case.factor, spec_of(family), need)


def expected(family, case):
    """(f L, dh, dW, db) from full logits and autograd, in the dtype of the problem (halves: fp32)."""
    acc = torch.float64 if case.problem.hidden.dtype == torch.float64 else torch.float32
    p = case.problem.to(acc).requiring(case.problem.leaves)
    if family == "cross-entropy":
        labels = torch.where(case.factor == 0, 0, p.labels)
        rows = F.cross_entropy(reference.logits(p.hidden, p.head), labels, reduction="none")
    elif family == "logsumexp":
        rows = reference.complement_and_values(p.hidden, p.head, case.ids, 1.7)[0]
    else:
        given = case.ids, case.teacher, case.teacher_tail
        rows = reference.topk_loss(p.hidden, p.head, *given, spec_of(family))
    loss = torch.where(case.factor == 0, 0, rows * case.factor)
    gradients = torch.autograd.grad(loss.sum(), [getattr(p, name) for name in p.leaves])
    return loss.detach(), *gradients


def check(got, wanted, tolerance=1e-11):
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("family", ["cross-entropy", "logsumexp", *WITH_TAIL])
def test_fp64_equals_torch(family, head):
    case = make_case(**head)
    got = run(family, case)
    check(got, expected(family, case))
    assert case.problem.bias is not None or got[3] is None


@pytest.mark.parametrize("way", WALKS)
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_every_walk_is_the_same_sum(family, way, monkeypatch):
    """Blocks and slabs that are not full, ids on both sides of every border, sums that grow from slab to slab."""
    force(monkeypatch, way)
    columns(monkeypatch, 16)
    case = make_case(**FULL)
    case.ids[7:12] = torch.tensor([0, 31, 32, 63, 64, V - 1], device=DEVICE)
    case.problem.labels[:6] = torch.tensor([0, 16, 32, 48, 64, V - 1], device=DEVICE)
    check(run(family, case), expected(family, case))


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["cross-entropy", "logsumexp", "reverse_kl-tail"])
def test_error_budget(family, dtype, way, monkeypatch):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    force(monkeypatch, way)
    case = make_case(dtype, **FULL)
    got = run(family, case)
    out = torch.float32 if dtype == torch.float16 else dtype
    assert [x.dtype for x in got] == [torch.float32, out, out, out]
    truth, baseline = expected(family, case.to(torch.float64)), expected(family, case)
    ids = case.problem.labels if family == "cross-entropy" else case.ids.flatten().clamp(min=0)
    chosen = torch.zeros(V, dtype=torch.bool, device=DEVICE).index_fill(0, ids, True)
    for name, a, b, c in zip(("loss", "dh", "dW", "db"), got, truth, baseline, strict=True):
        a = a if name == "loss" else a.to(dtype)
        selected = chosen if name in ("dW", "db") else None
        assert_within_budget(a, b, c.to(a.dtype), selected=selected, name=name)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, case, family):
        problem = dataclasses.replace(case.problem, hidden=hidden, weight=weight, bias=bias)
        ctx.case, ctx.family = dataclasses.replace(case, problem=problem), family
        ones = torch.ones_like(hidden[:, 0])
        return run(family, dataclasses.replace(ctx.case, factor=ones), Need(False))[0]

    @staticmethod
    def backward(ctx, grad):
        case = dataclasses.replace(ctx.case, factor=grad.contiguous())
        return *run(ctx.family, case)[1:], None, None


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed", "dW, then dh"])
def test_the_pair_its_entropy_and_its_gradient(way, monkeypatch):
    """Tail, values and the entropy of what is not excluded; dh, dW and db from gradients of the first two."""
    force(monkeypatch, way)
    columns(monkeypatch, 16)
    case = make_case(**FULL)
    p = case.problem.requiring(case.problem.leaves)
    head, ids = p.head.narrowed(), case.ids
    plain = p.hidden.detach(), head.detach()
    tail, values, dtail, entropy = kernel.complement_and_values(*plain, ids, 1.7, True, True, ALL)
    wanted = reference.complement_and_values(p.hidden, head, ids, 1.7)
    check((tail, values), wanted)
    z = reference.logits(*plain)
    excluded = torch.zeros(N, V + 1, dtype=torch.bool, device=DEVICE).scatter(1, ids.where(ids >= 0, V), True)
    rest = torch.distributions.Categorical(logits=(z / 1.7).masked_fill(excluded[:, :V], -1e9))
    check((entropy,), (rest.entropy(),))
    grads = torch.randn_like(tail), torch.randn_like(values).masked_fill(ids < 0, 0)
    got = kernel.complement_and_values_backward(*plain, ids, 1.7, tail, values, dtail, *grads, ALL)
    leaves = [getattr(p, name) for name in p.leaves]
    check(got, torch.autograd.grad([wanted[0], wanted[1].where(ids >= 0, 0)], leaves, grads))


@pytest.mark.parametrize("backward", [kernel, portable], ids=["triton", "chunked"])
def test_values_that_are_not_there_have_no_gradient(backward):
    """Without columns the ids are excluded and nothing more: as with gradients of 0 in their logits."""
    case = make_case(**FULL)
    head, hidden = case.problem.head.narrowed().detach(), case.problem.hidden.detach()
    inputs = hidden, head, case.ids, 1.7
    tail, values, dtail, _ = kernel.complement_and_values(*inputs, True, False, ALL)
    grad, zeros, none = torch.randn_like(tail), torch.zeros_like(values), values[:, :0]
    wanted = backward.complement_and_values_backward(*inputs, tail, values, dtail, grad, zeros, ALL)
    got = backward.complement_and_values_backward(*inputs, tail, none, dtail, grad, none, ALL)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b) and bool(a.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_gradients_have_the_dtype_of_the_inputs(impl, dtype):
    """As the fake kernel says: a compiled graph reads their memory as this dtype."""
    hidden, ids = torch.randn(4, 8, dtype=dtype), torch.tensor([[0, 3]] * 4)
    head = LMHead(torch.randn(37, 8, dtype=dtype), torch.randn(37, dtype=dtype))
    row, slots = torch.ones(4), torch.ones(4, 2)
    given = row, slots, torch.ones(4, 8), row, slots, Need(True, True, True), impl
    found = primitives.complement_and_values_backward(hidden, head, ids, 1.0, *given)
    assert [x.dtype for x in found] == [dtype] * 3


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_gradcheck_of_the_kernels(family):
    """With a softcap; every family and head is in `test_fp64_equals_torch`."""
    case = make_case(n=4, v=11, d=5, k=3, bias=True, softcap=4.0)
    case.ids[1, 2] = case.ids[1, 1]
    p = case.problem.requiring(("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(_Loss.apply, (p.hidden, p.weight, p.bias, case, family), fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("n", "v", "d", "k"), [(1, 1, 2, 1), (1, 2, 1, 1), (2, 17, 33, 20), (70, 16, 5, 1), (5, 300, 8, 3)]
)
def test_shapes(family, n, v, d, k):
    case = make_case(n=n, v=v, d=d, k=k, bias=True)
    case.factor = torch.linspace(0.5, 1.5, n, dtype=torch.float64, device=DEVICE)
    wanted = expected(family, case)
    wanted = [torch.where(x.isnan(), 0.0, x) for x in wanted]  # torch's gradient of a tail of nothing
    check(run(family, case), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "d"), [(0, D), (3, 0)])
def test_nothing_to_multiply(family, n, d):
    problem = make_problem(n, V, max(d, 1), dtype=torch.float64, device=DEVICE, bias=True)
    problem = dataclasses.replace(problem, hidden=problem.hidden[:, :d], weight=problem.weight[:, :d])
    rows = torch.ones(n, dtype=torch.float64, device=DEVICE)
    ids = torch.arange(2, device=DEVICE).expand(n, 2)
    case = Case(problem, ids, torch.ones(n, 2, dtype=torch.float64, device=DEVICE), rows, rows)
    check(run(family, case), expected(family, case))


def test_no_ids_and_many(monkeypatch):
    """K = 0, and more slots than a program holds at a time."""
    case = make_case(k=0, **FULL)
    check(run("logsumexp", case), expected("logsumexp", case))
    monkeypatch.setattr(kernel.tiles, "SLOTS", 16)
    monkeypatch.setattr(kernel.tiles, "SLOTS_TILE", 16)
    case = make_case(n=5, k=70, **FULL)
    case.ids[2] = case.ids[2, 0]
    for family in ("logsumexp", "forward_kl-tail"):
        check(run(family, case), expected(family, case))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_strides(family):
    case = make_case(bias=True)
    wanted, p = expected(family, case), case.problem
    padded = torch.full((V + 21, D + 3), math.nan, dtype=torch.float64, device=DEVICE)
    padded[:V, :D] = p.weight
    twice = {
        name: torch.stack([getattr(case, name)] * 2, -1)[..., 1]
        for name in ("ids", "teacher", "teacher_tail", "factor")
    }
    for weight in (p.weight.T.contiguous().T, padded[:V, :D]):
        odd = dataclasses.replace(
            p,
            hidden=torch.stack([p.hidden, p.hidden + 1], -1)[..., 0],
            weight=weight,
            bias=torch.stack([p.bias] * 2, -1)[:, 0],
            labels=torch.stack([p.labels] * 2, -1)[:, 0],
        )
        check(run(family, dataclasses.replace(case, problem=odd, **twice)), wanted)
    one = torch.ones((), dtype=torch.float64, device=DEVICE).expand(N)  # what autograd hands on for a sum
    flat = dataclasses.replace(case, factor=one)
    check(run(family, flat), expected(family, flat))


# --- digits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_almost_certain_token_keeps_its_digits(dtype):
    """Losses and gradients of 1e-8 beside logits of 120, where q - 1 and logsumexp - z are 0 or noise."""
    z = 100 + torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 7] += 22.0
    z = z.to(dtype).to(DEVICE)
    case = make_case(dtype, n=4)
    problem = dataclasses.replace(
        case.problem, hidden=torch.eye(4, dtype=dtype, device=DEVICE), weight=z.T.contiguous()
    )
    problem = dataclasses.replace(problem, labels=torch.full((4,), 7, device=DEVICE))
    case = dataclasses.replace(case, problem=problem, factor=torch.ones(4, device=DEVICE))
    loss, dhidden, dweight, _ = run("cross-entropy", case)
    exact = z.double()
    ratio = (exact - exact[:, 7:8]).exp()
    ratio[:, 7] = 0
    torch.testing.assert_close(loss.double(), torch.log1p(ratio.sum(1)), rtol=2e-6, atol=0)
    digits = {"rtol": 2e-6 if dtype == torch.float32 else 5e-3, "atol": 0}
    torch.testing.assert_close(dweight[7].double(), -ratio.sum(1) / (1 + ratio.sum(1)), **digits)
    assert dhidden.isfinite().all()


@pytest.mark.parametrize("distance", [-200.0, -1.0, 0.0, 1.0, 200.0])
def test_labels_far_above_and_below_the_others(distance):
    case = make_case(bias=True)
    label = case.problem.labels[0]
    case.problem.bias[label] += distance
    case.problem = dataclasses.replace(case.problem, labels=label.expand(N))
    check(run("cross-entropy", case), expected("cross-entropy", case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["at hand, dW at once", "recomputed"])
def test_a_rounded_probability_does_not_meet_what_it_cancels(dtype, way, monkeypatch):
    """A student within 1e-3 of its teacher: q - p at the ids is far below the rounding of q in half precision."""
    force(monkeypatch, way)
    case = make_case(dtype, k=4)
    case.ids = torch.arange(4, device=DEVICE).expand(N, 4) + torch.arange(N, device=DEVICE)[:, None]
    p = case.problem
    tail, values = reference.complement_and_values(p.hidden.double(), p.to(torch.float64).head, case.ids, 1.7)
    wobble = torch.linspace(-1e-3, 1e-3, values.numel(), device=DEVICE, dtype=torch.float64).view_as(values)
    case.teacher, case.teacher_tail = (values + wobble).float(), tail.float()
    truth = expected("forward_kl-tail", case.to(torch.float64))
    for a, t in zip(run("forward_kl-tail", case)[1:3], truth[1:3], strict=True):
        assert (a.double() - t).norm() <= 4 * torch.finfo(dtype).eps * t.norm()


@pytest.mark.parametrize("family", ["logsumexp", "cross-entropy", "reverse_kl-tail"])
@pytest.mark.parametrize("size", [1e-7, 1e3])
def test_fp16_neither_underflows_nor_overflows(family, size):
    """A factor of 1 / N, a large one: dz is brought into the range of fp16 and back."""
    case = make_case(torch.float16)
    case.factor *= size
    for a, b in zip(run(family, case)[1:3], expected(family, case.to(torch.float64))[1:3], strict=True):
        assert a.isfinite().all() and (a.double() - b).norm() <= 2e-3 * b.norm()


def test_a_tail_too_small_to_be_a_difference():
    z = torch.full((4, V), -17.5, device=DEVICE)
    z[:, 3::30] = 2.0
    case = make_case(torch.float32, n=4)
    ids = torch.arange(3, V, 30, device=DEVICE).expand(4, -1)
    head = dataclasses.replace(case.problem.head, weight=z.T.contiguous())
    eye, options = torch.eye(4, device=DEVICE), (False, False, Need(False))
    tail = kernel.complement_and_values(eye, head, ids, 1.0, *options)[0]
    wanted = torch.full((4,), -17.5 + math.log(V - ids.shape[1]), device=DEVICE)
    torch.testing.assert_close(tail, wanted, rtol=0, atol=1e-5)


# --- what must not leak ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed"])
def test_labels_that_are_no_ids_make_their_row_nan(way, monkeypatch):
    force(monkeypatch, way)
    case = make_case(bias=True)
    clean = run("cross-entropy", case)
    labels = case.problem.labels.clone()
    # That of the row whose factor is 0 is not read.
    labels[5], labels[8], labels[9], labels[1] = V, 2**40, -1, -100
    case.problem = dataclasses.replace(case.problem, labels=labels)
    loss, dhidden, dweight, _ = run("cross-entropy", case)
    bad = torch.zeros(N, dtype=torch.bool, device=DEVICE)
    bad[[5, 8]] = True
    assert loss[bad].isnan().all() and dhidden[bad].isnan().all() and dweight.isnan().all()
    assert torch.equal(loss[1], clean[0][1]) and torch.equal(dhidden[1], clean[1][1])
    bad[9] = True
    assert not loss[9].isfinite()
    assert torch.equal(loss[~bad], clean[0][~bad]) and torch.equal(dhidden[~bad], clean[1][~bad])


def test_ids_past_the_vocabulary_make_their_row_nan():
    case = make_case(bias=True)
    clean = {family: run(family, case) for family in ("logsumexp", "forward_kl-tail")}
    case.ids = case.ids.clone()
    case.ids[8, 1], case.ids[9, 0] = V, 2**40
    others = torch.arange(N, device=DEVICE) // 2 != 4
    for family, (loss, dhidden, *_) in clean.items():
        got = run(family, case)
        assert got[0][8:10].isnan().all()
        assert torch.equal(got[0][others], loss[others]) and torch.equal(got[1][others], dhidden[others])


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_stays_in_its_row_and_a_masked_one_leaves_no_trace(family, way, monkeypatch):
    force(monkeypatch, way)
    case = make_case(torch.float32, bias=True)
    clean = run(family, case)
    for row, masked in ((6, False), (1, True)):
        hidden = case.problem.hidden.clone()
        hidden[row] = math.nan
        got = run(family, dataclasses.replace(case, problem=dataclasses.replace(case.problem, hidden=hidden)))
        others = torch.arange(N, device=DEVICE) != row
        assert torch.equal(got[0][others], clean[0][others]) and torch.equal(got[1][others], clean[1][others])
        if masked:
            assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
        else:
            assert got[0][row].isnan() and got[1][row].isnan().all() and got[2].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_banned_ids_weigh_nothing(family):
    case = make_case(bias=True)
    case.problem.bias[40:] = -math.inf
    case.problem = dataclasses.replace(case.problem, labels=case.problem.labels % 40)
    case.ids = torch.where(case.ids < 0, case.ids, case.ids % 40)
    p = case.problem
    small = dataclasses.replace(p, weight=p.weight[:40], bias=p.bias[:40])
    got, wanted = run(family, case), expected(family, dataclasses.replace(case, problem=small))
    check(got[:2], wanted[:2])
    for a, b in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a[:40], b, rtol=1e-11, atol=1e-11)
        assert (a[40:] == 0).all()


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed"])
def test_everything_excluded(way, monkeypatch):
    """A tail of -inf and no gradient from it, whatever its upstream is and however large the logits are."""
    force(monkeypatch, way)
    case = make_case(torch.float32, v=K, bias=True)
    case.ids = torch.arange(K, device=DEVICE).flip(0).expand(N, K)
    case.problem = dataclasses.replace(case.problem, hidden=case.problem.hidden * 300)
    loss, *gradients = run("logsumexp", dataclasses.replace(case, factor=torch.ones(N, device=DEVICE)))
    assert (loss == -math.inf).all()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("z", [-1e3, 0.0, 1e3])
def test_a_label_that_is_the_only_id_left_has_no_loss_and_no_gradient(z):
    case = make_case(torch.float32, n=1, v=3, d=1, bias=True)
    problem = dataclasses.replace(
        case.problem,
        hidden=torch.full((1, 1), z, device=DEVICE),
        weight=torch.ones(3, 1, device=DEVICE),
        bias=torch.tensor([-math.inf, 0.0, -math.inf], device=DEVICE),
        labels=torch.ones(1, dtype=torch.int64, device=DEVICE),
    )
    case = dataclasses.replace(case, problem=problem, factor=torch.ones(1, device=DEVICE))
    for result in run("cross-entropy", case):
        assert torch.equal(result, torch.zeros_like(result))


# --- order and cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["at hand, dW in steps", "recomputed in blocks"])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_two_runs_are_bitwise_equal_and_write_no_input(family, way, monkeypatch):
    force(monkeypatch, way)
    case = make_case(torch.bfloat16, **FULL)
    p = case.problem
    inputs = p.hidden, p.weight, p.bias, p.labels, case.ids, case.teacher, case.teacher_tail, case.factor
    before = [x.clone() for x in inputs]
    first, second = (run(family, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("only", [*range(3), None])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_each_gradient_alone(family, only):
    case = make_case(**FULL)
    every = run(family, case)
    alone = run(family, case, Need(*(i == only for i in range(3))))
    torch.testing.assert_close(alone[0], every[0], rtol=1e-12, atol=1e-12)
    for i, (a, b) in enumerate(zip(alone[1:], every[1:], strict=True)):
        if i == only:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a is None


@pytest.mark.parametrize("family", ["cross-entropy", "forward_kl-tail"])
def test_how_often_logits_are_multiplied(family, monkeypatch):
    """At hand nothing is multiplied twice; a tail that is known needs no fold."""
    case, seen = make_case(v=103, bias=True), []
    logits, fold = dense._Walk._logits, kernel._Complement._fold
    monkeypatch.setattr(dense._Walk, "_logits", lambda *args: seen.append("logits") or logits(*args))
    monkeypatch.setattr(kernel._Complement, "_fold", lambda *args: seen.append("fold") or fold(*args))
    force(monkeypatch, "at hand, dW at once")
    run(family, case)
    assert seen == ["logits", "fold"] * -(-N // 12)
    seen.clear()
    force(monkeypatch, "recomputed")
    run(family, case)
    assert seen == ["logits", "fold"] * 2 + ["logits"] * 3
    seen.clear()
    p = case.problem
    tail, zeros = torch.zeros_like(case.factor), torch.zeros_like(case.teacher)
    saved = tail, zeros, tail, case.factor, zeros
    kernel.complement_and_values_backward(p.hidden, p.head, case.ids, 1.0, *saved, ALL._replace(hidden=False))
    assert seen == ["logits"] * 3
