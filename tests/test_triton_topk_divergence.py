"""topk_divergence's kernel against the definition, written row by row with torch's log_softmax and autograd, in fp64."""

import math

import pytest
import torch

pytest.importorskip("triton")

from divergences import FORMS, SIGNS, UNBOUNDED, of_distributions, of_logits

from duet_kernels.options import DISTRIBUTION, Divergence
from duet_kernels.portable.topk_divergence import divergence_and_gradient
from duet_kernels.triton import tiles
from duet_kernels.triton.primitives import INTERPRETED
from duet_kernels.triton.tiles import MAX_SLOTS, DivergenceTile
from duet_kernels.triton.topk_divergence import topk_divergence as kernel

DEVICE = "cpu" if INTERPRETED else "cuda"
N, K = 12, 7
DISTRIBUTIONS = [form for form in FORMS if form[1] != "none"]
every_loss = pytest.mark.parametrize(("divergence", "normalization"), FORMS)
every_distribution = pytest.mark.parametrize(("divergence", "normalization"), DISTRIBUTIONS)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(dtype=torch.float64, *, n=N, k=K, gap=1.0, std=3.0, seed=0):
    """(student, teacher, student tail, teacher tail, factor): correlated logits, teacher descending, ragged rows."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher = (std * randn(n, k)).sort(-1, descending=True).values
    student = teacher + gap * randn(n, k)
    tails = randn(2, n)
    factor = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    if n > 5 and k > 4:
        teacher[3, 4:] = -math.inf
        student[3, 4] = -math.inf  # what linear_gather gives for an absent slot
        teacher[4, 1:] = -math.inf
        factor[5] = 0
    return [x.to(dtype).to(DEVICE) for x in (student, teacher, tails[0], tails[1], factor)]


def options(divergence, normalization, **changes):
    raw = normalization == "none"
    named = {"temperature": 1.0 if raw else 1.7, "beta": 0.3, "delta": 0.8, **changes}
    return {"divergence": divergence, "normalization": normalization, **named}


def topk_divergence(student, teacher, student_tail, teacher_tail, factor, **named):
    spec = Divergence(named.pop("divergence"), **named)
    return kernel(student, teacher, student_tail, teacher_tail, factor, spec)


def row_loss(s, t, s_tail, t_tail, eps, *, divergence, normalization, temperature, beta, delta):
    """The loss of one row from its definition; s and t hold the present slots only. eps: of the logits given."""
    if normalization == "none":
        return of_logits(divergence, s, t, delta=delta, noise=8 * eps * largest(s, t)).sum()
    x_s, x_t = s / temperature, t / temperature
    with_s, with_t = torch.cat([x_s, s_tail[None]]), torch.cat([x_t, t_tail[None]])
    if normalization == "zeroed":
        with_t = torch.cat([x_t, torch.full_like(t_tail, -math.inf)[None]])
    if normalization == "renormalize":
        with_s, with_t = x_s, x_t
    log_q, log_p = with_s.log_softmax(0), with_t.log_softmax(0)
    if normalization in ("zeroed", "truncated", "generalized"):
        log_q, log_p = log_q[:-1], log_p[:-1]
    noise = 8 * eps * largest(with_s, with_t)
    loss = of_distributions(divergence, log_q, log_p, beta=beta, noise=noise)
    if normalization == "generalized":
        more = (log_p.exp() - log_q.exp()).sum()
        loss = loss + (more if divergence == "reverse_kl" else -more)
    return loss


def largest(*logits):
    logits = torch.cat(logits).detach()
    return logits[logits.isfinite()].abs().max()


def expected(student, teacher, student_tail, teacher_tail, factor, *, acc=torch.float64, **named):
    """(loss, its gradient in the student's logits, in the student's tail) by autograd, in `acc`."""
    eps = torch.finfo(torch.float64 if student.dtype == torch.float64 else torch.float32).eps
    student, teacher, t_tail, factor = (x.detach().to(acc) for x in (student, teacher, teacher_tail, factor))
    s_leaf, tail_leaf = student.clone().requires_grad_(), student_tail.detach().to(acc).requires_grad_()
    rows = []
    for n in range(student.shape[0]):
        present = teacher[n] != -math.inf
        if factor[n] == 0 or not present.any():
            rows.append(student.new_zeros(()))
        else:
            loss = row_loss(s_leaf[n][present], teacher[n][present], tail_leaf[n], t_tail[n], eps, **named)
            rows.append(factor[n] * loss)
    loss = torch.stack(rows)
    inputs = (s_leaf, tail_leaf)
    gradients = (
        torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
        if loss.requires_grad
        else [torch.zeros_like(x) for x in inputs]
    )
    dtail = gradients[1] if named["normalization"] not in ("none", "renormalize") else gradients[1][:0]
    return loss.detach(), gradients[0], dtail


def relative_rms(got, wanted, floor=0.0):
    """RMS error over the RMS of what is wanted; `floor`: what is wanted below it is judged absolutely."""
    difference = (got.double() - wanted.double()).square().mean().sqrt()
    return (difference / wanted.double().square().mean().sqrt().clamp(min=floor)).item()


# --- values and gradients --------------------------------------------------------------------------------------


@every_loss
def test_fp64_equals_the_definition(divergence, normalization):
    inputs, named = problem(), options(divergence, normalization)
    for a, b in zip(topk_divergence(*inputs, **named), expected(*inputs, **named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_loss
@pytest.mark.parametrize("k", [1, 2, 64, 65, 300])
def test_numbers_of_slots(divergence, normalization, k):
    inputs, named = problem(n=5, k=k), options(divergence, normalization, temperature=1.0)
    for a, b in zip(topk_divergence(*inputs, **named), expected(*inputs, **named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_distribution
@pytest.mark.parametrize("sides", [kernel, divergence_and_gradient])
@pytest.mark.parametrize("leader", ["slot", "tail"])
def test_a_student_that_is_sure_has_digits_in_every_gradient(divergence, normalization, sides, leader):
    """One slot, or the tail, has nearly all of q: its own small gradient is as exact as the largest of its row."""
    (student, teacher, student_tail, teacher_tail, _), named = (
        problem(n=5),
        options(divergence, normalization),
    )
    if leader == "slot":
        student[:, 0] += 20
    else:
        student_tail += student.amax(1) + 20
    inputs = [student, teacher, student_tail, teacher_tail, torch.ones_like(student_tail)]
    inputs = [x.float() for x in inputs]
    _, *wanted = expected(*inputs, **named)
    spec = Divergence(named.pop("divergence"), **named)
    inputs[3] = inputs[3] if spec.needs_teacher_logsumexp else None
    _, *found = sides(*inputs, spec)
    found, wanted = (torch.cat([x.double().reshape(5, -1) for x in each], 1) for each in (found, wanted))
    size = wanted.abs().amax(1)
    assert (size > 1e-12).any() and ((found - wanted).abs().amax(1) <= 2e-6 * size + 1e-18).all()


@pytest.mark.parametrize("k", [4096, MAX_SLOTS - 1])
def test_many_slots(k):
    inputs, named = problem(n=2, k=k), options("jsd", "tail")
    for a, b in zip(topk_divergence(*inputs, **named), expected(*inputs, **named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("tile", [DivergenceTile(1, 8, 1), DivergenceTile(8, 16, 4)], ids=str)
@pytest.mark.parametrize(("divergence", "normalization"), [("huber", "none"), ("jsd", "tail")])
def test_tiles_do_not_matter(divergence, normalization, tile, monkeypatch):
    monkeypatch.setattr(tiles, "divergence_tile", lambda slots: tile)
    inputs, named = problem(), options(divergence, normalization)
    for a, b in zip(topk_divergence(*inputs, **named), expected(*inputs, **named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [1.0, 0.02])
def test_error_budget(divergence, normalization, dtype, gap):
    """Relative RMS error at most twice that of torch in fp32 from the same rounded inputs, + 4 eps."""
    if dtype == torch.bfloat16 and gap < 1:
        gap = 0.1  # less is under the spacing of the inputs
    inputs, named = problem(dtype, k=33, std=4.0, gap=gap), options(divergence, normalization)
    truth = expected(*inputs, **named)
    baseline = expected(*inputs, **named, acc=torch.float32)
    for a, b, t in zip(topk_divergence(*inputs, **named), baseline, truth, strict=True):
        assert a.dtype == torch.float32 and a.shape == t.shape
        if t.numel():
            assert relative_rms(a, t) <= 2 * relative_rms(b, t) + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("divergence", "normalization"), DISTRIBUTIONS)
def test_a_near_student_keeps_its_digits(divergence, normalization):
    """Logits of std 4 around 20, a gap of 0.02: the gradient in fp32 within 1e-6 (log q - log p: 1e-5)."""
    student, teacher, *rest = problem(torch.float32, n=16, k=33, std=4.0, gap=0.02)
    inputs = [(student.double() + 20).float(), (teacher.double() + 20).float(), *rest]
    inputs[2], inputs[3] = inputs[2] + 10, inputs[2] + 10.01
    named = options(divergence, normalization, temperature=1.0)
    got, truth = topk_divergence(*inputs, **named), expected(*inputs, **named)
    assert relative_rms(got[1], truth[1]) <= 1e-6
    assert relative_rms(got[0], truth[0]) <= 1e-4


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_tail, teacher, teacher_tail, factor, named):
        loss, dstudent, dtail = topk_divergence(student, teacher, student_tail, teacher_tail, factor, **named)
        ctx.save_for_backward(dstudent, dtail)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dstudent, dtail = ctx.saved_tensors
        return grad[:, None] * dstudent, grad * dtail if dtail.numel() else None, None, None, None, None


@every_loss
def test_gradcheck_of_the_kernel(divergence, normalization):
    student, teacher, s_tail, t_tail, factor = problem(n=6, k=5)
    student[3, 4] = 0.0  # an absent slot: its value is not read, and finite differences dislike -inf
    student.masked_fill_(student == -math.inf, 0)
    leaves = student.requires_grad_(), s_tail.requires_grad_()
    named = options(divergence, normalization)
    assert torch.autograd.gradcheck(
        _Divergence.apply, (*leaves, teacher, t_tail, factor, named), fast_mode=True
    )


# --- identities ------------------------------------------------------------------------------------------------


@every_loss
def test_equal_logits_give_exactly_zero(divergence, normalization):
    _, teacher, _, tail, factor = problem(torch.float32)
    named = options(divergence, normalization)
    loss, dstudent, dtail = topk_divergence(teacher, teacher, tail, tail, factor, **named)
    if normalization == "zeroed":  # compares different distributions of the same logits
        assert (loss[factor != 0] > 0).all()
    elif normalization == "truncated":
        assert (loss == 0).all()  # but not a minimum: mass may move to the tail
    else:
        assert (loss == 0).all() and (dstudent == 0).all() and (dtail == 0).all()


@every_distribution
def test_shift_of_all_logits_changes_nothing(divergence, normalization):
    student, teacher, s_tail, t_tail, factor = problem()
    named = options(divergence, normalization, temperature=2.0)
    wanted = topk_divergence(student, teacher, s_tail, t_tail, factor, **named)
    moved = topk_divergence(student + 500, teacher - 300, s_tail + 250, t_tail - 150, factor, **named)
    for a, b in zip(moved, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", SIGNS)
def test_rounding_has_no_sign(divergence):
    """Differences of a few eps of the logits' scale give loss 0 and gradient 0, larger ones do not."""
    named = options(divergence, "renormalize" if divergence in DISTRIBUTION else "none")
    eps = torch.finfo(torch.float32).eps
    teacher = torch.tensor([[16.0, 15.0, 14.0, 1.0]], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    noisy = teacher * (1 + torch.tensor([[1.0, -1.0, 1.0, 0.0]], device=DEVICE) * 2 * eps)
    loss, gradient, _ = topk_divergence(noisy, teacher, None, None, one, **named)
    assert loss.item() == 0 and (gradient == 0).all()
    moved = teacher + torch.tensor([[0.01, 0.0, 0.0, 0.0]], device=DEVICE)
    loss, gradient, _ = topk_divergence(moved, teacher, None, None, one, **named)
    assert loss.item() > 0 and gradient[0, 0] > 0


def test_an_infinite_student_logit_does_not_silence_l1():
    student = torch.tensor([[1.0, -math.inf]], device=DEVICE)
    teacher = torch.tensor([[0.5, 0.0]], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    loss, gradient, _ = topk_divergence(student, teacher, None, None, one, **options("l1", "none"))
    assert loss.item() == math.inf and gradient.tolist() == [[1.0, -1.0]]


@every_distribution
@pytest.mark.parametrize("tail", [-60.0, 60.0, 300.0])
def test_tails_far_from_the_slots(divergence, normalization, tail):
    """exp(tail - max) over- or underflows fp32; the loss does not."""
    student, teacher, s_tail, t_tail, factor = problem(torch.float32)
    inputs = student, teacher, s_tail + tail, t_tail + tail, factor
    named = options(divergence, normalization)
    for a, t in zip(topk_divergence(*inputs, **named), expected(*inputs, **named), strict=True):
        assert a.isfinite().all()
        if t.numel():  # a probability of 1 - 1e-26 is 1, and its gradient 0
            assert relative_rms(a, t, floor=0.01) <= 1e-5


@every_distribution
def test_far_apart_distributions(divergence, normalization):
    """A student whose probabilities underflow where the teacher's do not, and the other way round."""
    inputs = problem(torch.float32, gap=60.0, std=40.0)
    named = options(divergence, normalization, temperature=0.5)
    truth = expected(*inputs, **named)
    for a, t in zip(topk_divergence(*inputs, **named), truth, strict=True):
        assert a.isfinite().all()
        if t.numel():
            assert relative_rms(a, t, floor=0.01) <= 1e-5


@pytest.mark.parametrize("divergence", DISTRIBUTION)
def test_empty_buckets(divergence):
    """K = V leaves nothing outside the slots: `tail` is then `renormalize`."""
    student, teacher, s_tail, _, factor = problem()
    empty = torch.full_like(s_tail, -math.inf)
    loss, dstudent, dtail = topk_divergence(
        student, teacher, empty, empty, factor, **options(divergence, "tail")
    )
    wanted = topk_divergence(student, teacher, None, None, factor, **options(divergence, "renormalize"))
    torch.testing.assert_close(loss, wanted[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dstudent, wanted[1], rtol=1e-12, atol=1e-14)
    assert (dtail == 0).all()


@pytest.mark.parametrize("divergence", DISTRIBUTION)
def test_teacher_bucket_empty_student_bucket_not(divergence):
    student, teacher, s_tail, _, factor = problem()
    empty = torch.full_like(s_tail, -math.inf)
    inputs, named = (student, teacher, s_tail, empty, factor), options(divergence, "tail")
    results = topk_divergence(*inputs, **named)
    if divergence in UNBOUNDED:  # infinite where the student has mass and the teacher has none, and says so
        assert (results[0][factor != 0] == math.inf).all()
    else:
        for a, b in zip(results, expected(*inputs, **named), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# --- what must not leak ----------------------------------------------------------------------------------------


@every_loss
def test_rows_without_any_slot(divergence, normalization):
    student, teacher, s_tail, t_tail, factor = problem()
    clean = topk_divergence(student, teacher, s_tail, t_tail, factor, **options(divergence, normalization))
    teacher = teacher.clone()
    teacher[8] = -math.inf
    results = topk_divergence(student, teacher, s_tail, t_tail, factor, **options(divergence, normalization))
    if normalization != "tail":  # there the bucket remains, and both put all their mass on it
        assert all((x[8] == 0).all() for x in results if x.numel())
    assert all(x[8].abs().max() <= 1e-15 for x in results if x.numel())
    others = torch.arange(N) != 8
    for a, b in zip(results, clean, strict=True):
        assert a.numel() == 0 or torch.equal(a[others], b[others])


@every_loss
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_stays_in_its_row(divergence, normalization, where):
    inputs, named = problem(), options(divergence, normalization)
    clean = topk_divergence(*inputs, **named)
    broken = [x.clone() for x in inputs]
    broken[0 if where == "student" else 1][6, 2] = math.nan
    loss, dstudent, dtail = topk_divergence(*broken, **named)
    others = torch.arange(N) != 6
    assert loss[6].isnan() and dstudent[6, 2].isnan()
    if normalization != "none":
        assert dstudent[6].isnan().all() and dtail[6:7].isnan().all()
    for a, b in zip((loss, dstudent, dtail), clean, strict=True):
        assert a.numel() == 0 or torch.equal(a[others], b[others])


@pytest.mark.parametrize("normalization", ["tail", "zeroed", "truncated", "generalized"])
@pytest.mark.parametrize("where", [2, 3])
def test_nan_tail_stays_in_its_row(normalization, where):
    inputs, named = problem(), options("forward_kl", normalization)
    clean = topk_divergence(*inputs, **named)
    inputs[where] = inputs[where].clone()
    inputs[where][6] = math.nan
    loss, dstudent, _ = topk_divergence(*inputs, **named)
    if normalization == "zeroed" and where == 3:
        assert torch.equal(loss, clean[0])  # does not read the teacher's tail
    else:
        assert loss[6].isnan() and dstudent[6].isnan().all() and loss.isnan().sum() == 1


@every_loss
def test_factor_zero_skips_rows_of_nan(divergence, normalization):
    inputs, named = problem(), options(divergence, normalization)
    inputs[4][[5, 9, 11]] = 0
    clean = topk_divergence(*inputs, **named)
    broken = [x.clone() for x in inputs]
    for x in broken[:4]:
        x[[5, 9]] = math.nan
    results = topk_divergence(*broken, **named)
    for a, b in zip(results, clean, strict=True):
        assert torch.equal(a, b)
        assert a.numel() == 0 or (a[[5, 9, 11]] == 0).all()


@every_loss
def test_nan_factor_gives_nan(divergence, normalization):
    inputs = problem()
    inputs[4][2] = math.nan
    assert topk_divergence(*inputs, **options(divergence, normalization))[0].isnan().nonzero().tolist() == [
        [2]
    ]


# --- layouts and limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "normalization"), [("huber", "none"), ("jsd", "tail")])
def test_any_strides(divergence, normalization):
    inputs, named = problem(), options(divergence, normalization)
    odd = [x.T.contiguous().T if x.ndim == 2 else torch.stack([x, x + 1], -1)[:, 0] for x in inputs]
    assert not any(x.is_contiguous() for x in odd)
    odd[4] = odd[4][:1].expand(N)
    inputs[4] = odd[4].contiguous()
    for a, b in zip(topk_divergence(*odd, **named), topk_divergence(*inputs, **named), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert a.is_contiguous()


@every_loss
@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(divergence, normalization, n):
    inputs, named = problem(n=n), options(divergence, normalization)
    loss, dstudent, dtail = topk_divergence(*inputs, **named)
    has_tail = normalization not in ("none", "renormalize")
    assert (loss.shape, dstudent.shape, dtail.shape) == ((n,), (n, K), (n if has_tail else 0,))
    assert all(x.isfinite().all() for x in (loss, dstudent, dtail))


def test_no_slots_give_zero():
    inputs = problem(n=3, k=0)
    loss, dstudent, dtail = topk_divergence(*inputs, **options("forward_kl", "truncated"))
    assert loss.tolist() == dtail.tolist() == [0, 0, 0] and dstudent.shape == (3, 0)


@every_loss
def test_two_runs_are_bitwise_equal_and_inputs_stay(divergence, normalization):
    inputs, named = problem(torch.float32), options(divergence, normalization)
    before = [x.clone() for x in inputs]
    first, second = (topk_divergence(*inputs, **named) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
