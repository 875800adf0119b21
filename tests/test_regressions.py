"""Defects that were found in comparable libraries, each as a case that would find it here."""

import dataclasses
import math
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import pytest
import torch
import torch.nn.functional as F
from divergences import DISTRIBUTION, SMOOTH, UNBOUNDED, of_distributions
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from duet_kernels import (
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_topk,
    portable,
    reference,
    set_workspace_bytes,
    topk_distill_loss,
    topk_distill_stats,
)
from duet_kernels.head import Need
from duet_kernels.options import NORMALIZATIONS
from duet_kernels.portable import topk_divergence
from duet_kernels.portable.dense_rows import DenseRows
from duet_kernels.testing import DISTRIBUTIONS, OPS, gradients, make_problem

IMPLS = ("chunked", "reference")
TEMPERED = [op for op in OPS if any(name in op.name for name in DISTRIBUTIONS)]


@pytest.mark.parametrize("op", TEMPERED, ids=str)
def test_loss_and_gradient_are_scaled_alike(op):
    """A loss times T^2 beside a gradient without it: a finite difference of the loss is the gradient."""
    problem = make_problem(5, 61, 8, dtype=torch.float64).requiring(["hidden"])
    loss = op.run(problem, "chunked").sum()
    gradient = gradients(loss, problem)["hidden"]
    direction = torch.randn(
        problem.hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        problem.hidden.add_(1e-5 * direction)
        above = op.run(problem, "chunked").sum()
        problem.hidden.sub_(2e-5 * direction)
        below = op.run(problem, "chunked").sum()
    torch.testing.assert_close((above - below) / 2e-5, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [None, 8])
def test_teacher_pads_do_not_count(impl, name, k):
    """A teacher vocabulary that is larger by pads at logit -30 gives 0 when the student is the teacher."""
    problem = make_problem(13, 203, 16)
    hidden = torch.cat([problem.hidden, torch.ones(13, 1)], 1)
    head = LMHead(torch.cat([problem.weight, torch.zeros(203, 1)], 1))
    pads = torch.zeros(64, 17)
    pads[:, -1] = -30.0
    teacher_head = LMHead(torch.cat([head.weight, pads]))
    for student, teacher in ((head, teacher_head), (teacher_head, head)):
        loss = linear_distill_loss(hidden, student, hidden, teacher, k=k, divergence=name, impl=impl)
        assert abs(loss.item()) < 8 * 1.2e-7 * 12
    # vocab_size says the same in one word.
    cut = LMHead(teacher_head.weight, vocab_size=203)
    got = linear_distill_loss(problem.hidden, problem.head, hidden, cut, k=k, divergence=name, impl=impl)
    wanted = linear_distill_loss(problem.hidden, problem.head, hidden, head, k=k, divergence=name, impl=impl)
    assert torch.equal(got, wanted)


class _Largest(TorchDispatchMode):
    """The largest tensor in bytes that any operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


@pytest.mark.parametrize("n", [8, 9, 1023, 1024, 1025, 1026])
def test_chunks_never_round_up_past_the_workspace(n):
    """Rounding a chunk up to a power of two doubles the memory right behind one."""
    problem = make_problem(n, 513, 4)
    budget = 2**20
    previous = set_workspace_bytes(budget)
    try:
        with _Largest() as rows, torch.no_grad():
            portable.linear_divergence(
                problem.hidden,
                LMHead(problem.weight, None, None, 1.0),
                problem.teacher_hidden,
                LMHead(problem.teacher_weight, None, None, 1.0),
                torch.ones(n),
                _spec("forward_kl"),
                Need(True, True),
            )
        with _Largest() as tiles:
            portable.token_stats(problem.hidden, LMHead(problem.weight, None, None, 1.0), problem.labels)
    finally:
        set_workspace_bytes(previous)
    assert rows.bytes <= max(budget / 2, n * 4 * 4) and tiles.bytes <= max(budget / 4, n * 4 * 4)


def _spec(name, normalization="renormalize", temperature=1.0):
    from duet_kernels.options import Divergence

    return Divergence.of(name, normalization, temperature, 0.5, 1.0)


def _close_student(dtype, gap=0.02):
    """Student and teacher logits that differ by `gap` at standard deviation 4, through shared hidden states."""
    generator = torch.Generator().manual_seed(0)
    weight = 4 / 8 * torch.randn(1000, 64, generator=generator)
    hidden = torch.randn(40, 64, generator=generator)
    teacher_hidden = hidden + gap / 4 * torch.randn(40, 64, generator=generator)
    return hidden.to(dtype), weight.to(dtype), teacher_hidden.to(dtype)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("k, normalization", [(None, None), (16, "renormalize"), (16, "tail")])
def test_a_student_close_to_its_teacher(name, k, normalization):
    """Logits rounded to bf16 would give over 5 % of gradient error here."""
    options = {"divergence": name, "k": k, "normalization": normalization}
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        hidden, weight, teacher_hidden = _close_student(dtype)
        results = []
        for run, impl in ((dtype, "chunked"), (torch.float64, "reference")):
            h = hidden.to(run).requires_grad_()
            loss = linear_distill_loss(
                h, weight.to(run), teacher_hidden.to(run), weight.to(run), impl=impl, **options
            )
            results.append((loss.detach().double(), torch.autograd.grad(loss, h)[0].double()))
        (got_loss, got), (loss, wanted) = results
        assert (got - wanted).norm() / wanted.norm() <= bound, dtype
        assert abs(got_loss - loss) / loss <= 1e-3
        # Rounding the logits first is what this guards against.
        if dtype == torch.float32 and name == "forward_kl" and k is None:
            rounded = (hidden @ weight.T).bfloat16().float().requires_grad_()
            target = F.log_softmax((teacher_hidden @ weight.T).bfloat16().float(), -1)
            kl = F.kl_div(F.log_softmax(rounded, -1), target, log_target=True, reduction="batchmean")
            wrong = (torch.autograd.grad(kl, rounded)[0] @ weight).double()
            assert (wrong - wanted).norm() / wanted.norm() > 0.05


@pytest.mark.parametrize("name", SMOOTH)
def test_logits_are_compared_before_they_are_normalised(name):
    """Gap 0.02 at logit std 4: gradient within 2e-6; from rounded log-probabilities forward KL errs over 1e-5."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(64, 16, generator=generator) + 5
    student = teacher + 0.02 * torch.randn(64, 16, generator=generator)
    spec = _spec(name, "renormalize", 1.0)
    ones = torch.ones(64)
    loss, got, _ = topk_divergence.divergence_and_gradient(student, teacher, None, None, ones, spec)
    inputs = student.double().requires_grad_(), teacher.double()
    truth = reference.divergence(*inputs, None, None, spec)
    wanted = torch.autograd.grad(truth.sum(), inputs[0])[0]
    assert (got - wanted).norm() / wanted.norm() <= 2e-6
    assert (loss - truth).norm() / truth.norm() <= 2e-4
    if name == "forward_kl":
        logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
        late = logp.exp() * torch.expm1(logq - logp)
        assert (late - wanted).norm() / wanted.norm() > 1e-5


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_whole_rows_keep_the_digits_of_a_close_student(name, shift):
    """The same over a vocabulary, where a softmax's rounding is larger; a shift costs the digits of z_s - z_t alone."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(16, 3000, generator=generator)
    student = teacher + 0.02 * torch.randn(16, 3000, generator=generator) + shift
    spec = _spec(name)
    inputs = student.double().requires_grad_(), teacher.double()
    truth = reference.divergence(*inputs, None, None, spec, absent_slots=False)
    wanted = torch.autograd.grad(truth.sum(), inputs[0])[0]
    got = teacher.clone()  # in whose memory the gradient is left
    loss = DenseRows(student.clone(), got, spec).compare_(torch.ones(16), with_gradient=True)
    digits = 1 + shift
    assert (got - wanted).norm() / wanted.norm() <= 2e-5 * digits
    assert (loss - truth).norm() / truth.norm() <= 1e-4 * digits
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    late = (logp.exp() * (logp - logq)).sum(-1) if name == "forward_kl" else loss + 1
    assert (late - truth).norm() / truth.norm() > 1e-3


@pytest.mark.parametrize("name", ["reverse_kl", "symmetric_kl", "jsd", "tvd"])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_whole_rows_keep_the_digits_of_a_certain_student(name, temperature):
    """Certain of an id that the teacher rules out; each row beside fp64 from the same logits, where a - m q has 3 digits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 64, 1000, generator=generator)
    student[:, 7], teacher[:, 7] = student.amax(1) + 13, teacher.amin(1) - 20
    student, teacher = student * temperature, teacher * temperature
    spec = _spec(name, temperature=temperature)
    inputs = student.double().requires_grad_(), teacher.double()
    truth = reference.divergence(*inputs, None, None, spec, absent_slots=False)
    wanted = torch.autograd.grad(truth.sum(), inputs[0])[0]
    got = teacher.clone()  # in whose memory the gradient is left
    DenseRows(student.clone(), got, spec).compare_(torch.ones(64), with_gradient=True)
    assert ((got - wanted).norm(dim=1) <= 5e-6 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("z", [0.0, -200.0])
def test_a_label_that_is_the_only_id_left_has_no_loss_and_no_gradient(impl, z):
    """All other ids are ruled out by their bias: nothing is left to be wrong about, and nothing is NaN."""
    hidden, weight = torch.full((1, 1), z).requires_grad_(), torch.ones(3, 1).requires_grad_()
    bias = torch.tensor([-math.inf, 0.0, -math.inf])
    loss = linear_cross_entropy(hidden, LMHead(weight, bias), torch.tensor([1]), impl=impl)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_small_tail_keeps_its_digits(impl):
    """log of a tail mass of 5e-7: 1 - sum(p) has one digit of it, the complement has all."""
    z = torch.zeros(1000)
    z[:8] = 18.85 + torch.arange(8) / 8
    hidden, weight = torch.ones(3, 1), z[:, None].clone()
    top = linear_topk(hidden, weight, 8, impl=impl)
    truth = torch.logsumexp(z.double()[8:], 0)
    mass = (truth - torch.logsumexp(z.double(), 0)).exp().item()
    assert 3e-7 < mass < 8e-7
    log_tail = top.tail_logsumexp - top.logsumexp
    assert (log_tail.double() - math.log(mass)).abs().max() <= 1e-5
    exclude = linear_logsumexp(hidden, weight, exclude=top.indices, impl=impl)
    assert (exclude.double() - truth).abs().max() <= 1e-5
    by_subtraction = torch.log(1 - F.softmax(z, 0)[:8].sum())
    assert abs(by_subtraction.item() - math.log(mass)) > 1e-2


def test_a_small_tail_in_the_loss():
    """The bucket's share of a forward KL at tail masses of 1e-7 and 1e-6, judged in fp64."""
    z_t = torch.cat([torch.linspace(20, 23, 8), torch.randn(992, generator=torch.Generator().manual_seed(0))])
    z_s = z_t + torch.cat([torch.zeros(8), torch.full((992,), 2.0)])
    rows = {}
    for dtype, impl in ((torch.float32, "chunked"), (torch.float64, "reference")):
        weight = z_s[:, None].to(dtype).requires_grad_()
        top = linear_topk(torch.ones(1, 1, dtype=dtype), z_t[:, None].to(dtype), 8, impl=impl)
        loss = topk_distill_loss(
            torch.ones(1, 1, dtype=dtype),
            weight,
            top,
            divergence="forward_kl",
            normalization="tail",
            impl=impl,
        )
        rows[dtype] = torch.autograd.grad(loss, weight)[0].double()
    error = (rows[torch.float32] - rows[torch.float64])[8:].norm() / rows[torch.float64][8:].norm()
    assert error < 1e-4


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_third_backward_pass_is_like_the_first(op):
    """Gradients written in place by a backward pass make the next one wrong."""
    problem = make_problem(9, 61, 8).requiring(("hidden", "weight"))
    loss = op.run(problem, "chunked", **({"reduction": "mean"} if op.loss else {})).sum()
    passes = [gradients(loss, problem, retain_graph=True) for _ in range(3)]
    for later in passes[1:]:
        assert all(torch.equal(later[name], passes[0][name]) for name in later)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_option_of_the_head_is_ignored(op, impl):
    """softcap, scale, bias and vocab_size each change the result."""
    problem = make_problem(9, 61, 8, std=4.0)
    plain = op.run(problem, impl)
    bias = torch.linspace(-2, 2, 61)
    for change in ({"softcap": 3.0}, {"scale": 0.5}, {"bias": bias}, {"vocab_size": 40}):
        labels = problem.labels.clamp(max=39) if "vocab_size" in change else problem.labels
        if "vocab_size" in change:
            base = op.run(dataclasses.replace(problem, labels=labels), impl)
        else:
            base = plain
        other = op.run(dataclasses.replace(problem, labels=labels, **change), impl)
        assert not torch.allclose(base, other, rtol=1e-3), change


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_labels_and_masks_are_not_ignored(impl):
    problem = make_problem(9, 61, 8)
    labels = problem.labels.clone()
    labels[::2] = -100
    rows = linear_cross_entropy(problem.hidden, problem.head, labels, reduction="none", impl=impl)
    full = linear_cross_entropy(problem.hidden, problem.head, problem.labels, reduction="none", impl=impl)
    assert bool((rows[::2] == 0).all()) and torch.equal(rows[1::2], full[1::2])
    mean = linear_cross_entropy(problem.hidden, problem.head, labels, impl=impl)
    torch.testing.assert_close(mean, full[1::2].mean())


def _masked_calls(divergence, problem, mask):
    """Losses of a mask, from (hidden, head) and an implementation."""
    options = {"divergence": divergence, "mask": mask}
    teacher = TopK(torch.zeros(3, 2), torch.tensor([[1, 2], [0, 3], [0, 1]]), torch.zeros(3))
    live = problem.teacher_hidden, problem.teacher_head
    return {
        "topk": lambda *leaves, **how: topk_distill_loss(*leaves, teacher, **options, **how),
        "k": lambda *leaves, **how: linear_distill_loss(*leaves, *live, k=5, **options, **how),
        "dense": lambda *leaves, **how: linear_distill_loss(*leaves, *live, **options, **how),
        "stats": lambda *leaves, **how: topk_distill_stats(
            *leaves, teacher, **options, token_ids=problem.labels, **how
        ).loss.sum(),
    }


@pytest.mark.parametrize("name", ["topk", "k", "dense", "stats"])
@pytest.mark.parametrize("divergence", ["huber", "mse", "l1", "reverse_kl"])
@pytest.mark.parametrize("impl", [*IMPLS, "kept"])
def test_a_masked_token_whose_id_the_bias_rules_out_leaves_no_nan(impl, divergence, name, monkeypatch):
    """Its difference is infinite, and 0 times that is NaN. `kept`: chunked where masked rows are not left out."""
    problem = make_problem(3, 7, 4).requiring(["hidden", "weight"])
    bias = torch.zeros(7).index_fill_(0, torch.tensor([0]), -torch.inf).requires_grad_()
    mask = torch.tensor([name not in ("k", "dense"), False, False])
    if impl == "kept":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    call = _masked_calls(divergence, problem, mask)[name]
    loss = call(problem.hidden, LMHead(problem.weight, bias), impl="chunked" if impl == "kept" else impl)
    leaves = problem.hidden, problem.weight, bias
    for gradient in torch.autograd.grad(loss, leaves):
        assert bool(gradient.isfinite().all()) and bool((gradient != 0).any()) == bool(mask.any())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_ignored_label_is_any_that_is_asked_for(impl):
    """Some pad with an id of the vocabulary, or with -1."""
    problem = make_problem(9, 61, 8)
    for ignored in (-1, int(problem.labels[0])):
        labels = problem.labels.clone()
        labels[::3] = ignored
        options = {"ignore_index": ignored, "impl": impl}
        rows = linear_cross_entropy(problem.hidden, problem.head, labels, reduction="none", **options)
        assert bool((rows[labels == ignored] == 0).all() and (rows[labels != ignored] > 0).all())
        mean = linear_cross_entropy(problem.hidden, problem.head, labels, **options)
        torch.testing.assert_close(mean, rows[labels != ignored].mean())


class _Products(TorchDispatchMode):
    """Shapes that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.shapes.append((str(func), tuple(x.shape)))
        return out


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_frozen_head_pays_nothing(op, monkeypatch):
    """No operation of a step with a frozen head, inside the custom ops too, returns anything of dW's shape."""
    problem = make_problem(9, 67, 8, bias=True)
    mode = _Products()

    def watched(function):
        def run(*args, **kwargs):
            with mode:  # a dispatch mode does not look into a custom op by itself
                return function(*args, **kwargs)

        return run

    for name in portable.__all__:
        monkeypatch.setattr(portable, name, watched(getattr(portable, name)))

    def made(names):
        mode.shapes.clear()
        case = problem.requiring(names)
        loss = op.run(case, "chunked", **({"reduction": "mean"} if op.loss else {})).sum()
        with mode:
            gradients(loss, case)
        return [s for s in mode.shapes if s[1] == (67, 8) and "detach" not in s[0]]

    assert made(problem.leaves), "the detector does not see dW"
    assert not made(["hidden"])


def test_a_truncated_vocabulary_is_not_renormalised_in_secret():
    """The normalizations are what their names say, and differ from each other."""
    problem = make_problem(9, 61, 8)
    teacher = problem.teacher_topk(4)
    losses = {
        n: topk_distill_loss(
            problem.hidden, problem.head, teacher, divergence="forward_kl", normalization=n, reduction="none"
        )
        for n in NORMALIZATIONS
    }
    names = list(losses)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(losses[a], losses[b], rtol=1e-2), (a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_out_of_range_ids_where_nobody_looks(impl):
    """Compiled code (and a GPU) does not look at ids: NaN for that row, never a finite number or an infinity."""
    if impl == "reference":
        return  # the definition gathers, which raises
    problem = make_problem(4, 61, 8)
    ids = torch.tensor([[1, 2], [3, 61], [-1, 4], [5, 6]])
    nan = torch.tensor([False, True, True, False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        gathered = linear_gather(problem.hidden, problem.head, ids)
        rest = linear_logsumexp(problem.hidden, problem.head, exclude=ids)
        teacher = TopK(torch.zeros(4, 2), ids, torch.zeros(4))
        losses = [
            topk_distill_loss(problem.hidden, problem.head, teacher, reduction="none", **options)
            for options in (
                {"divergence": "huber"},
                {"divergence": "forward_kl"},
                {"divergence": "jsd", "normalization": "tail"},
                {"divergence": "forward_kl", "normalization": "zeroed"},
            )
        ]
        labels = torch.tensor([1, 61, -7, 3])
        losses.append(linear_cross_entropy(problem.hidden, problem.head, labels, reduction="none"))
    assert torch.equal(gathered.isnan().any(1), nan)
    for result in (rest, *losses):
        assert torch.equal(result.isnan(), nan)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_invalid_ids_of_tokens_that_do_not_count(impl):
    """Where nobody looks at ids: a padding token may hold any, and adds nothing to the loss and to the gradients."""
    if impl == "triton":
        pytest.importorskip("triton")
    problem = make_problem(4, 61, 8)
    ids, labels = problem.teacher_topk(3).indices, torch.tensor([1, 2, 3, -1])
    ids[3] = -1
    teacher = problem.teacher_topk(3)._replace(indices=ids)
    counted = torch.tensor([True, True, True, False])
    tail = {"divergence": "forward_kl", "normalization": "tail", "impl": impl}

    def results(rows, mask):
        hidden, weight = (getattr(problem, name).clone().requires_grad_() for name in ("hidden", "weight"))
        call = hidden[rows], LMHead(weight), TopK(*(x[rows] for x in teacher[:3]))
        stats = topk_distill_stats(*call, mask=mask, token_ids=labels[rows], **tail)
        losses = [
            topk_distill_loss(*call, mask=mask, reduction="sum", **tail),
            linear_cross_entropy(*call[:2], labels[rows], weights=mask.float(), reduction="sum", impl=impl),
            (stats.loss + stats.logprob).sum(),
        ]
        return [x for loss in losses for x in (loss, *torch.autograd.grad(loss, (hidden, weight)))]

    wanted = results(slice(3), counted[:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = results(slice(4), counted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


FAR = [-math.inf, -200.0, -90.0, -61.0, -40.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("name", DISTRIBUTION)
def test_mass_where_the_teacher_has_none(name, far, dtype):
    """The mean of q / p under p does not see it: normalising by that mean alone gave a loss of 0 for one of 4.8."""
    student = torch.tensor([[0.3, -0.2, 4.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.3, -0.1, far, far]], dtype=torch.float64)
    rows = [(z, torch.cat([z[:, :2], z[:, 2:].logsumexp(-1, keepdim=True)], -1)) for z in (student, teacher)]
    wanted, wanted_bucket = (
        of_distributions(name, *(z.log_softmax(-1) for z in pair)).sum() for pair in zip(*rows, strict=True)
    )
    hidden, head = torch.ones(1, 1, dtype=dtype), student.T.to(dtype)
    dense = linear_distill_loss(hidden, head, hidden, teacher.T.to(dtype), divergence=name)
    tail = TopK(
        teacher[:, :2].to(dtype), torch.tensor([[0, 1]]), teacher[:, 2:].logsumexp(-1).to(dtype)
    )  # ids 2 and 3 in one bucket, which joins their masses
    bucket = topk_distill_loss(hidden, head, tail, divergence=name, normalization="tail")
    assert wanted > 0.4 and wanted.isinf() == (name in UNBOUNDED and far == -math.inf)
    torch.testing.assert_close(dense.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(bucket.double(), wanted_bucket, rtol=1e-6, atol=0)


def test_the_slope_near_the_softcap_keeps_its_digits():
    """dz/dx = 1 - (z / c)^2 from a z just below c, judged in fp64 at that same z."""
    cap = 30.0
    z = cap - torch.logspace(-4, 0, 50)
    head = LMHead(torch.zeros(1, 1), None, cap, 1.0)
    truth = (cap - z.double()) * (cap + z.double()) / cap**2
    assert ((head.slope(z).double() - truth) / truth).abs().max() <= 1e-6
    assert ((1 - (z / cap).square()).double() / truth - 1).abs().max() > 1e-3  # what the plain form loses


ONE_OF_EACH = list({op.resolve: op for op in OPS}.values())


@pytest.mark.parametrize("op", ONE_OF_EACH, ids=str)
def test_forward_mode_is_refused_and_never_zero(op):
    """torch drops the tangents of a custom op's inputs without a word: torch.func.jvp said 0."""
    problem = make_problem(3, 13, 5, dtype=torch.float64, bias=True)
    for leaf, name in (("hidden", "hidden"), ("weight", "head.weight"), ("bias", "head.bias")):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(getattr(problem, leaf), torch.ones_like(getattr(problem, leaf)))
            with pytest.raises(RuntimeError, match=f"{name}: carries a forward-mode tangent .*'reference'"):
                op.run(dataclasses.replace(problem, **{leaf: dual}), "chunked")


@pytest.mark.parametrize("op", ONE_OF_EACH, ids=str)
def test_a_gradient_by_torch_func_is_refused_by_name(op):
    problem = make_problem(3, 13, 5, dtype=torch.float64, bias=True)
    for leaf, name in (("hidden", "hidden"), ("weight", "head.weight"), ("bias", "head.bias")):

        def value(x, leaf=leaf):
            return op.run(dataclasses.replace(problem, **{leaf: x}), "chunked").sum()

        with pytest.raises(RuntimeError, match=f"{name}: is differentiated by torch.func.grad .*'reference'"):
            torch.func.grad(value)(getattr(problem, leaf))


def test_a_selection_that_nobody_differentiates_may_stand_in_a_gradient_by_torch_func():
    problem = make_problem(3, 13, 5, dtype=torch.float64)

    def loss(hidden):
        teacher = linear_topk(problem.teacher_hidden, problem.teacher_head, 4, impl="chunked")
        return topk_distill_loss(hidden, problem.head, teacher, impl="reference")

    hidden = problem.hidden.clone().requires_grad_()
    loss(hidden).backward()
    torch.testing.assert_close(torch.func.grad(loss)(problem.hidden), hidden.grad)


def test_the_definition_has_forward_mode():
    problem = make_problem(3, 13, 5, dtype=torch.float64)
    loss, tangent = torch.func.jvp(
        lambda hidden: linear_cross_entropy(hidden, problem.head, problem.labels, impl="reference"),
        (problem.hidden,),
        (problem.hidden,),
    )
    hidden = problem.hidden.clone().requires_grad_()
    linear_cross_entropy(hidden, problem.head, problem.labels, impl="chunked").backward()
    torch.testing.assert_close(tangent, (hidden.grad * problem.hidden).sum())
    assert loss.item() > 0


@pytest.mark.parametrize("op", ONE_OF_EACH, ids=str)
def test_a_second_derivative_is_refused_by_name(op):
    problem = make_problem(3, 13, 5).requiring(["hidden"])
    with pytest.raises(RuntimeError, match=r"^(linear|topk)_.* has no second derivative .*'reference'"):
        (first,) = torch.autograd.grad(op.run(problem, "chunked").sum(), [problem.hidden], create_graph=True)
        torch.autograd.grad(first.square().sum(), [problem.hidden])
