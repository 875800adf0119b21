"""topk_distill_stats against full logits in torch: values, the joint gradient, what runs, bad input."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import pytest
import torch
import torch.nn.functional as F

from duet_kernels import LMHead, TopK, dispatch, portable, topk_distill_loss, topk_distill_stats
from duet_kernels.testing import make_problem

IMPLS = ["reference", "chunked", *(["triton"] if dispatch._TRITON_INSTALLED else [])]
EVERYTHING = {"student_mass": True, "entropy": True, "overlap": True}
EXACT = {"rtol": 1e-9, "atol": 1e-11}
N, K, T = 9, 5, 1.3

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def case():
    """(problem, teacher, sampled tokens): absent slots, an id twice, tokens among the ids and outside of them."""
    problem = make_problem(N, 61, 16, dtype=torch.float64, bias=True, softcap=9.0, scale=1.2, pad=3)
    teacher = problem.teacher_topk(K, T)
    values, ids = teacher.values.clone(), teacher.indices.clone()
    values[3, 3:], values[4, 0] = -torch.inf, -torch.inf
    ids[3, 3:], ids[4, 0] = 0, ids[4, 2]  # an absent slot may hold any id
    ids[5, 4], values[5, 4] = ids[5, 1], values[5, 1]
    tokens = problem.labels.clone()
    tokens[:6] = ids[torch.arange(6), torch.arange(6) % 3]
    return problem, teacher._replace(values=values, indices=ids), tokens


def full_logits(problem):
    x = F.linear(problem.hidden, problem.weight, problem.bias)[:, : problem.vocab_size]
    return problem.softcap * torch.tanh(problem.scale * x / problem.softcap)


def constants(teacher, z):
    """The student's and the teacher's mass and the overlap, row by row."""
    rows = []
    for q, own, values, ids, tail in zip(
        (z / T).softmax(-1), z.argsort(descending=True), teacher.values / T, teacher.indices, teacher.tail_logsumexp, strict=True
    ):  # fmt: skip
        present = values != -torch.inf
        told = dict(zip(ids[present].tolist(), values[present].tolist(), strict=True))
        selected = torch.tensor(list(told.values()), dtype=torch.float64).exp().sum()
        shared = torch.isin(own[: len(told)], torch.tensor(list(told))).double().mean()
        rows.append(torch.stack([q[list(told)].sum(), selected / (selected + tail.exp()), shared]))
    return torch.stack(rows).unbind(1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "divergence, normalization", [("reverse_kl", None), ("reverse_kl", "generalized"), ("jsd", "tail")]
)
def test_values_and_the_joint_gradient(case, impl, divergence, normalization):
    problem, teacher, tokens = case
    problem = problem.requiring(problem.leaves)
    call, options = (problem.hidden, problem.head, teacher), {"divergence": divergence, "temperature": T}
    options["normalization"] = normalization
    stats = topk_distill_stats(*call, **options, token_ids=tokens, **EVERYTHING, impl=impl)
    loss = topk_distill_loss(*call, **options, reduction="none", impl="reference")
    z = full_logits(problem)
    student = torch.distributions.Categorical(logits=z / T)
    wanted = loss, student.log_prob(tokens), student.entropy(), *constants(teacher, z.detach())
    for got, truth in zip(stats, wanted, strict=True):
        torch.testing.assert_close(got, truth, **EXACT)
    assert [x.requires_grad for x in stats] == [True, True, False, False, False, False]
    one, two = torch.linspace(-1, 2, N).double(), torch.linspace(1, -3, N).double()
    leaves = [getattr(problem, name) for name in problem.leaves]
    truth = torch.autograd.grad((one * wanted[0] + two * wanted[1]).sum(), leaves)
    for a, b in zip(torch.autograd.grad((one * stats[0] + two * stats[1]).sum(), leaves), truth, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_each_of_the_two_alone(case):
    """The gradient of the loss without that of the log-probability, and the other way round."""
    problem, teacher, tokens = case
    problem = problem.requiring(["hidden"])
    options = {"divergence": "reverse_kl", "normalization": "tail", "temperature": T}
    call = problem.hidden, problem.head, teacher
    loss, logprob, *_ = topk_distill_stats(*call, **options, token_ids=tokens)
    z = full_logits(problem)
    truth = {
        loss: topk_distill_loss(*call, **options, reduction="none"),
        logprob: (z / T).log_softmax(-1).gather(1, tokens[:, None])[:, 0],
    }
    for got, wanted in truth.items():
        a, b = (torch.autograd.grad(x.sum(), problem.hidden, retain_graph=True)[0] for x in (got, wanted))
        torch.testing.assert_close(a, b, **EXACT)


ALONE = ["topk_loss", "linear_gather_backward"]  # the loss without a pass over the vocabulary
PASS = ["complement_and_values", "divergence_and_gradient"]


@pytest.mark.parametrize(
    "normalization, asked, runs",
    [
        (None, (), ALONE),
        (None, ("entropy", "student_mass"), [ALONE[0], *PASS, ALONE[1]]),
        (None, ("token_ids",), [*PASS, "complement_and_values_backward"]),
        ("tail", ("token_ids", "entropy", "student_mass"), [*PASS, "complement_and_values_backward"]),
        ("tail", ("overlap",), ["linear_topk", *PASS, "complement_and_values_backward"]),
    ],
)
def test_only_what_is_asked_for_runs(monkeypatch, normalization, asked, runs):
    """One pass and one backward for everything but the overlap; what nobody asked for is None."""
    problem = make_problem(N, 61, 16).requiring(["hidden", "weight"])
    ran = []

    def recorded(name, function):
        return lambda *args, **options: ran.append(name) or function(*args, **options)

    for name in set(portable.__all__) - {"times_rows"}:  # which reads no vocabulary
        monkeypatch.setattr(portable, name, recorded(name, getattr(portable, name)))
    options = {name: problem.labels if name == "token_ids" else True for name in asked}
    teacher = problem.teacher_topk(K)._replace(tail_logsumexp=torch.zeros(N) if normalization else None)
    options |= {"divergence": "reverse_kl", "normalization": normalization}
    stats = topk_distill_stats(problem.hidden, problem.head, teacher, **options)
    (stats.loss if stats.logprob is None else stats.loss + stats.logprob).sum().backward()
    assert ran == runs
    known = {"loss", *asked} - {"token_ids"} | ({"logprob"} if "token_ids" in asked else set())
    known |= {"teacher_mass"} if normalization else set()
    known |= {"student_mass"} if PASS[0] in runs else set()
    assert {name for name, value in stats._asdict().items() if value is not None} == known


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_tokens(case, impl):
    """0 in every result and gradient, whatever their hidden states, tokens and teacher are."""
    problem, teacher, tokens = case
    mask = torch.arange(N) % 3 != 1
    hidden = problem.hidden.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    options = {"divergence": "reverse_kl", "normalization": "generalized", "temperature": T, "impl": impl}
    options |= EVERYTHING
    whole = topk_distill_stats(problem.hidden, problem.head, teacher, token_ids=tokens, **options)
    tokens = tokens.masked_fill(~mask, -100)
    for kept in (mask, mask & False):
        stats = topk_distill_stats(
            hidden, problem.head, teacher, mask=kept, token_ids=tokens.where(kept, -100), **options
        )
        for got, wanted in zip(stats, whole, strict=True):
            torch.testing.assert_close(got, wanted * kept, **EXACT)
        (gradient,) = torch.autograd.grad((stats.loss + stats.logprob).sum(), hidden)
        assert bool((gradient[~kept] == 0).all()) and bool((gradient[kept] != 0).any(1).all())


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("among", [True, False])
def test_a_certain_token_keeps_its_digits(impl, among):
    """log q and the entropy of a token whose rest is 1e-9, in fp32."""
    z = torch.tensor([[0.0, 25.0, 3.0, 1.0, 2.0]], dtype=torch.float64)
    teacher = TopK(torch.tensor([[1.0, 0.5]]), torch.tensor([[1, 2] if among else [2, 3]]), torch.zeros(1))
    options = {"token_ids": torch.tensor([1]), "entropy": True, "divergence": "reverse_kl", "impl": impl}
    stats = topk_distill_stats(torch.ones(1, 1), LMHead(z.T.float()), teacher, **options)
    rest = (z[0, [0, 2, 3, 4]] - z[0, 1]).exp()
    p = torch.cat([torch.ones(1), rest]) / (1 + rest.sum())
    truth = rest.sum().log1p() * p[0] - (p[1:] * p[1:].log()).sum()
    torch.testing.assert_close(stats.logprob[0].double(), -rest.sum().log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.entropy[0].double(), truth, rtol=1e-5, atol=0)


def test_the_overlap_is_of_as_many_ids_of_the_student():
    """One present id of three slots, which the student ranks second; an id twice and another one."""
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    values = torch.tensor([[1.0, -torch.inf, -torch.inf], [1.0, 1.0, 0.5]])
    teacher = TopK(values, torch.tensor([[1, 0, 0], [0, 0, 2]]))
    for impl in IMPLS:
        stats = topk_distill_stats(torch.eye(2), z.T, teacher, overlap=True, impl=impl)
        assert stats.overlap.tolist() == [0.0, 0.5]


def test_a_teacher_may_have_more_slots_than_there_are_ids():
    teacher = TopK(torch.zeros(1, 3), torch.tensor([[0, 1, 1]]))
    for impl in IMPLS:
        stats = topk_distill_stats(torch.eye(2)[:1], torch.eye(2), teacher, overlap=True, impl=impl)
        assert stats.overlap.item() == 1


def test_the_overlap_of_a_token_without_logits_is_nan():
    hidden = torch.eye(2).index_fill(0, torch.tensor([1]), torch.nan)
    teacher = TopK(torch.ones(2, 1), torch.tensor([[0], [0]]))
    for impl in IMPLS:
        overlap = topk_distill_stats(hidden, torch.eye(2), teacher, overlap=True, impl=impl).overlap
        assert overlap[0] == 1 and overlap[1].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_teachers_mass_has_the_digits_of_fp32(dtype):
    values, ids, tail = (
        torch.tensor([[30.0, 29.0]], dtype=dtype),
        torch.tensor([[0, 1]]),
        torch.tensor([30.4]),
    )
    half, whole = TopK(values, ids, tail), TopK(values.float(), ids, tail)
    stats = [topk_distill_stats(torch.ones(1, 2), torch.eye(2), teacher) for teacher in (half, whole)]
    assert torch.equal(stats[0].teacher_mass, stats[1].teacher_mass)
    assert half.logsumexp.dtype == torch.float32 and torch.equal(half.logsumexp, whole.logsumexp)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_and_an_id_that_a_bias_rules_out(impl):
    problem = make_problem(2, 20, 8, dtype=torch.float64)
    bias = torch.zeros(20, dtype=torch.float64)
    bias[[0, 4]] = -torch.inf
    hidden = problem.hidden.clone().requires_grad_()
    teacher, tokens = TopK(torch.tensor([[1.0, 0.5]] * 2), torch.tensor([[4, 5]] * 2)), torch.tensor([0, 7])
    options = {"divergence": "forward_kl", "token_ids": tokens, "impl": impl}
    logprob = topk_distill_stats(hidden, LMHead(problem.weight, bias), teacher, **options).logprob
    truth = (F.linear(hidden, problem.weight, bias)).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprob, truth, **EXACT)
    (gradient,) = torch.autograd.grad(logprob[1], hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(truth[1], hidden)[0], **EXACT)


@pytest.mark.parametrize("normalization", ["tail", "generalized", "truncated"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_ruled_out_token_and_nothing_in_the_tail(impl, normalization):
    """The bias leaves nothing but the teacher's two ids: the gradient is that of the loss alone."""
    problem = make_problem(2, 6, 8, dtype=torch.float64)
    bias = torch.full((6,), -torch.inf, dtype=torch.float64)
    bias[[4, 5]] = 0
    hidden, head = problem.hidden.clone().requires_grad_(), LMHead(problem.weight, bias)
    teacher = TopK(
        torch.tensor([[1.0, 0.5]] * 2), torch.tensor([[4, 5]] * 2), torch.tensor([0.2, -torch.inf])
    )
    options = {"divergence": "reverse_kl", "normalization": normalization, "impl": impl}
    stats = topk_distill_stats(hidden, head, teacher, token_ids=torch.tensor([0, 4]), **options)
    loss = topk_distill_loss(hidden, head, teacher, reduction="none", **options)
    assert stats.logprob[0] == -torch.inf
    torch.testing.assert_close(stats.loss, loss, **EXACT)
    a, b = (torch.autograd.grad(x.sum(), hidden)[0] for x in (stats.loss, loss))
    assert bool(b.isfinite().all()) and bool((b != 0).any())
    torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_results_are_in_the_dtype_of_the_logits_whatever_the_teachers_is(dtype):
    """What the op returns is what torch.compile was told of it."""
    problem = make_problem(N, 61, 16)
    teacher = problem.teacher_topk(K)
    whole = teacher._replace(
        **{name: getattr(teacher, name).to(dtype).float() for name in teacher._fields[:3:2]}
    )
    given = teacher._replace(**{name: getattr(whole, name).to(dtype) for name in teacher._fields[:3:2]})

    def run(hidden, told):
        options = {"divergence": "reverse_kl", "normalization": "tail", "token_ids": problem.labels}
        return topk_distill_stats(hidden, problem.head, told, **options, **EVERYTHING)

    wanted = run(problem.hidden, whole)
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        for got, truth in zip(call(problem.hidden, given), wanted, strict=True):
            torch.testing.assert_close(got, truth, rtol=0, atol=0)


def test_no_leading_dimension_and_several():
    problem = make_problem((2, 3), 61, 16)
    teacher = problem.teacher_topk(K)
    stats = topk_distill_stats(problem.hidden, problem.head, teacher, token_ids=problem.labels, **EVERYTHING)
    assert all(x.shape == (2, 3) and x.dtype == torch.float32 for x in stats)
    one = TopK(*(x[1, 2] for x in teacher[:3]))
    single = topk_distill_stats(
        problem.hidden[1, 2], problem.head, one, token_ids=problem.labels[1, 2], **EVERYTHING
    )
    for a, b in zip(stats, single, strict=True):
        torch.testing.assert_close(a[1, 2], b)


def test_a_tail_of_another_shape_is_refused():
    problem = make_problem(N, 61, 16)
    teacher = problem.teacher_topk(K)._replace(tail_logsumexp=torch.zeros(N, 1))
    with pytest.raises(ValueError, match=r"teacher.tail_logsumexp: wanted shape \[9\], got \[9, 1\]"):
        topk_distill_stats(problem.hidden, problem.head, teacher)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"token_ids": [1]}, TypeError, "token_ids: wanted a tensor, got list"),
        ({"token_ids": torch.zeros(N)}, TypeError, "token_ids: wanted int64 or int32 ids"),
        ({"token_ids": torch.zeros(N, 1).long()}, ValueError, r"token_ids: wanted shape \[9\]"),
        ({"token_ids": torch.full((N,), -100)}, ValueError, r"token_ids: wanted ids in \[0, 61\), got -100"),
        (
            {"divergence": "jsd", "normalization": "generalized"},
            ValueError,
            "normalization: 'generalized' exists for",
        ),
        ({"mask": torch.ones(N)}, TypeError, "mask: wanted bool"),
    ],
)
def test_bad_input(options, error, words):
    problem = make_problem(N, 61, 16)
    with pytest.raises(error, match=words):
        topk_distill_stats(problem.hidden, problem.head, problem.teacher_topk(K), **options)
