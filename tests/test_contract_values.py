"""Special values: ties, zeros of both signs, NaN, infinities, almost certain tokens, the ends of what options allow."""

import dataclasses

import pytest
import torch
from contract import DTYPES, NEEDS_TRITON
from divergences import UNBOUNDED

from duet_kernels import LMHead, linear_cross_entropy, linear_distill_loss, linear_token_stats, linear_topk
from duet_kernels.options import DIVERGENCES, RAW, Divergence
from duet_kernels.portable.topk_divergence import divergence_and_gradient
from duet_kernels.testing import DISTRIBUTIONS, OPS, gradients, judge, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("ties", ["quantised", "equal"])
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("v, k", [(203, 1), (203, 203), (5000, 40), (4097, 3)])
def test_ties_go_to_the_lowest_id(ties, dtype, v, k):
    problem = make_problem(11, v, 6, dtype=dtype, ties=ties)
    got = linear_topk(problem.hidden, problem.head, k, impl="chunked")
    wanted = linear_topk(problem.hidden, problem.head, k, impl="reference")
    assert torch.equal(got.indices, wanted.indices) and torch.equal(got.values, wanted.values)
    torch.testing.assert_close(got.tail_logsumexp, wanted.tail_logsumexp)
    if ties == "equal":
        assert torch.equal(got.indices, torch.arange(k).expand(11, k))


@pytest.mark.parametrize("v, k", [(5000, 7), (5000, 300), (997, 16)])
@pytest.mark.parametrize("order", ["ascending", "descending", "zigzag"])
def test_ordered_rows(order, v, k):
    """Rows in which every tile, or no tile, holds something better than all before it."""
    logits = torch.arange(v, dtype=torch.float32) / 64
    if order == "descending":
        logits = -logits
    elif order == "zigzag":
        logits = logits * (1 - 2 * (torch.arange(v) % 2))
    got = linear_topk(torch.ones(3, 1), logits[:, None], k)
    assert torch.equal(got.values, logits.topk(k).values.expand(3, k))
    assert torch.equal(logits[got.indices], got.values)
    rest = logits.clone()
    rest[got.indices[0]] = -torch.inf
    torch.testing.assert_close(got.tail_logsumexp, rest.double().logsumexp(0).float().expand(3))


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=NEEDS_TRITON)])
def test_negative_zero_ties_with_zero(impl):
    """A product never is -0; a scale makes zeros of both signs of products that are too small."""
    head = LMHead(torch.tensor([[-1e-42], [1e-42], [-1e-42], [-1.0]]), scale=1e-4)
    top = linear_topk(torch.ones(1, 1), head, 3, impl=impl)
    assert bool((top.values == 0).all()) and top.values.signbit().sum() == 2
    assert top.indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_nan_is_never_passed_over(impl):
    """inf - inf is a NaN with its sign bit set on x86; a sort by bits would put it last."""
    problem = make_problem(9, 900, 16)
    hidden = problem.hidden.clone()
    hidden[2, 0], hidden[2, 1], hidden[4, 3] = torch.inf, -torch.inf, torch.nan
    top = linear_topk(hidden, problem.head, 5, impl=impl)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 4]] = True
    assert bool(top.values[bad].isnan().all()) and bool(top.tail_logsumexp[bad].isnan().all())
    clean = linear_topk(problem.hidden, problem.head, 5, impl=impl)
    assert torch.equal(top.values[~bad], clean.values[~bad])
    assert torch.equal(top.indices[~bad], clean.indices[~bad])
    stats = linear_token_stats(hidden, problem.head, problem.labels, impl=impl)
    for field in stats:
        assert bool(field[bad].isnan().all()) and bool(field[~bad].isfinite().all())


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_row_whose_factor_is_0_is_skipped(name, garbage):
    """The row factor is an input of the op: at 0 the row gives exactly 0, whatever its logits are."""
    normalization = "tail" if name in DISTRIBUTIONS else "none"
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, generator=generator) for _ in range(2))
    tails = [torch.randn(4, generator=generator) for _ in range(2)]
    for x in (student, teacher, *tails):
        x[1::2] = garbage
    factor = torch.tensor([1.0, 0.0, 0.5, 0.0])
    given = tails if name in DISTRIBUTIONS else (None, None)
    spec = Divergence(name, normalization, 1.0, 0.5, 1.0)
    results = divergence_and_gradient(student, teacher, *given, factor, spec)
    for result in results:
        assert bool((result[1::2] == 0).all()) and bool(result[::2].isfinite().all())


# The difference of two logits of -inf is no number; the dense reverse KL has a test of its own below.
NO_BANS = tuple(f"linear-{name}" for name in (*RAW, *UNBOUNDED))


@pytest.mark.parametrize("op", [op for op in OPS if op.name not in NO_BANS], ids=str)
def test_ids_that_a_bias_rules_out(op):
    """A bias of -inf takes ids out of the vocabulary; losses that compare only others do not notice."""
    problem = make_problem(19, 203, 16, bias=True)
    out = torch.arange(203) % 5 == 3
    labels = problem.labels.where(problem.labels % 5 != 3, 0)
    banned = dataclasses.replace(
        problem,
        bias=problem.bias.masked_fill(out, -torch.inf),
        teacher_bias=problem.teacher_bias.masked_fill(out, -torch.inf),
        labels=labels,
    )
    judge(op, banned, "chunked")
    # Where a bias is -inf the gradients of bias and weight are 0, as if the ids were not there.
    case = banned.requiring(banned.leaves)
    grads = gradients(op.run(case, "chunked").sum(), case)
    assert bool((grads["weight"][out] == 0).all()) and bool((grads["bias"][out] == 0).all())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ids_that_both_biases_rule_out_leave_the_dense_loss(name):
    problem = make_problem(19, 203, 16, bias=True)
    kept = torch.arange(203) % 5 != 3
    banned, small = (problem.requiring(problem.leaves) for _ in range(2))
    bias_s, bias_t = (b.masked_fill(~kept, -torch.inf) for b in (banned.bias, banned.teacher_bias))
    got = linear_distill_loss(
        banned.hidden,
        LMHead(banned.weight, bias_s),
        problem.teacher_hidden,
        LMHead(problem.teacher_weight, bias_t),
        divergence=name,
    )
    wanted = linear_distill_loss(
        small.hidden,
        LMHead(small.weight[kept], small.bias[kept]),
        problem.teacher_hidden,
        LMHead(problem.teacher_weight[kept], problem.teacher_bias[kept]),
        divergence=name,
        impl="reference",
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(got, banned).values(), gradients(wanted, small).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", RAW)
def test_raw_dense_losses_leave_out_ids_that_both_heads_rule_out(divergence, dtype, impl):
    """A bias of -inf in both heads: the loss and its gradients are those of the vocabulary without these ids."""
    problem = make_problem(7, 43, 11, dtype=dtype, bias=True)
    out = torch.arange(43) % 5 == 2
    results = []
    for kept in (slice(None), ~out):
        case = problem.requiring(problem.leaves)
        bias, teacher_bias = (
            (b.masked_fill(out, -torch.inf) if isinstance(kept, slice) else b)[kept]
            for b in (case.bias, case.teacher_bias)
        )
        head, teacher = LMHead(case.weight[kept], bias), LMHead(case.teacher_weight[kept], teacher_bias)
        sides = case.hidden, head, case.teacher_hidden, teacher
        rows = linear_distill_loss(*sides, divergence=divergence, reduction="none", impl=impl)
        results.append([rows.detach(), *gradients(rows.sum(), case).values()])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5 if got.dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=NEEDS_TRITON)])
def test_an_id_that_one_head_rules_out_is_infinitely_far(impl):
    problem = make_problem(3, 43, 11, bias=True)
    bias = problem.bias.index_fill(0, torch.tensor([4]), -torch.inf)
    head = LMHead(problem.weight, bias)
    for sides in ((head, problem.teacher_head), (problem.head, head)):
        for divergence in RAW:
            hidden = problem.hidden, sides[0], problem.teacher_hidden, sides[1]
            rows = linear_distill_loss(*hidden, divergence=divergence, reduction="none", impl=impl)
            assert bool((rows == torch.inf).all())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_almost_certain_tokens_keep_their_digits(impl):
    """Losses and entropies of 1e-5 beside logits of 120: nothing is the difference of two large numbers."""
    z = torch.randn(5, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 7] += 22.0
    z = (z + 100).float()
    hidden, weight, labels = torch.eye(5), z.T.contiguous(), torch.full((5,), 7)
    truth = torch.distributions.Categorical(logits=z.double())
    loss = linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl)
    complement = torch.log1p((z.double() - z[:, 7:8]).exp().index_fill(1, torch.tensor([7]), 0).sum(1))
    torch.testing.assert_close(loss, complement.float(), rtol=5e-6, atol=0)
    stats = linear_token_stats(hidden, weight, labels, impl=impl)
    # The largest probability is 1 - 1e-6, which a softmax in fp32 knows to a few eps of 1 (and not of 120).
    digits = {"rtol": 1e-5, "atol": 6e-7} if impl == "reference" else {"rtol": 5e-6, "atol": 0}
    torch.testing.assert_close(stats.entropy, truth.entropy().float(), **digits)
    if impl == "chunked":
        torch.testing.assert_close(stats.label_logprob, -complement.float(), rtol=5e-6, atol=0)


EXTREMES = {
    **{f"softcap {c:g}": ({"softcap": c}, {}) for c in (1e-4, 1e4)},
    **{f"scale {c:g}": ({"scale": c}, {}) for c in (1e-4, -1e4)},
    "softcap 0.0001, scale 10000": ({"softcap": 1e-4, "scale": 1e4}, {}),
    "softcap 10000, scale 0.0001": ({"softcap": 1e4, "scale": 1e-4}, {}),
    **{f"temperature {t:g}": ({}, {"temperature": t}) for t in (1e-3, 1e3)},
    **{
        f"{name} beta {b:g}": ({}, {"divergence": name, "beta": b})
        for name, traits in DIVERGENCES.items()
        if "beta" in traits.reads
        for b in (1e-3, 1 - 1e-3)
    },
    **{f"delta {d:g}": ({}, {"divergence": "huber", "delta": d}) for d in (1e-10, 1e10)},
}


@pytest.mark.parametrize("impl", ["chunked", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_ends_of_what_is_allowed(extreme, k, impl):
    """No overflow, no division by a rounded 0: values and gradients as near to fp64 as fp32 logits let them be."""
    head, options = EXTREMES[extreme]
    problem = make_problem(3, 43, 11)
    results = []
    for dtype, which in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, impl)):
        case = problem.to(dtype).requiring(problem.leaves)
        sides = (
            case.hidden,
            LMHead(case.weight, **head),
            case.teacher_hidden,
            LMHead(case.teacher_weight, **head),
        )
        loss = linear_distill_loss(*sides, k=k, impl=which, **{"divergence": "forward_kl", **options})
        results.append([loss.detach(), *gradients(loss, case).values()])
    for truth, baseline, got in zip(*results, strict=True):
        size = truth.norm()
        allowed = 2 * (baseline - truth).norm() + 1e-4 * size + 1e-12
        assert (got - truth).norm() <= allowed, f"{got.norm():.3e} for {size:.3e}"


@pytest.mark.parametrize("support", ["student", "union"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_an_id_that_only_the_teacher_rules_out(impl, support):
    """Dense it counts; with k it is an absent slot, whose mass the tail has."""
    z, bias = torch.tensor([[3.0, 1.0, 0.5, 0.0]]), torch.tensor([-torch.inf, 0.0, 0.0, 0.0])
    hidden, teacher = (
        torch.ones(1, 1),
        (torch.ones(1, 1), LMHead(torch.tensor([[0.0], [2.0], [0.0], [0.0]]), bias)),
    )
    options = {"divergence": "reverse_kl", "impl": impl}
    assert linear_distill_loss(hidden, z.T, *teacher, **options) == torch.inf
    q, p = z[0].softmax(0), torch.tensor([0.0, 2.0, 0.0, 0.0]).add(bias).softmax(0)
    ids = [1] if support == "student" else [1, 2]  # but for id 0, which the student chooses
    alone = linear_distill_loss(hidden, z.T, *teacher, k=2, support=support, **options)
    q_s, p_s = q[ids] / q[ids].sum(), p[ids] / p[ids].sum()
    torch.testing.assert_close(alone, (q_s * (q_s / p_s).log()).sum())
    q, p = (torch.cat([x[ids], 1 - x[ids].sum(0, True)]) for x in (q, p))
    bucket = linear_distill_loss(hidden, z.T, *teacher, k=2, support=support, normalization="tail", **options)
    torch.testing.assert_close(bucket, (q * (q / p).log()).sum())


EVERY_IMPL = pytest.mark.parametrize(
    "impl", ["reference", "chunked", pytest.param("triton", marks=NEEDS_TRITON)]
)


@EVERY_IMPL
def test_noise_is_that_of_the_larger_of_both_logits(impl):
    """8 eps of 100 are 1e-4: a difference of 5e-5 has no sign."""
    hidden = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.00005, 0.0, 100.0]])
    linear_distill_loss(hidden, torch.eye(3), teacher, torch.eye(3), divergence="l1", impl=impl).backward()
    assert hidden.grad.tolist() == [[0, 0, -1]]


@EVERY_IMPL
@pytest.mark.parametrize("k", [None, 3])
def test_noise_follows_the_temperature(k, impl):
    """Logits that differ by rounding do so at every temperature."""
    hidden = torch.tensor([[100.0, 99.9, 99.8]], requires_grad=True)
    teacher = torch.tensor([[100.00005, 99.9, 99.8]])
    options = {"k": k, "divergence": "tvd", "temperature": 0.1, "impl": impl}
    loss = linear_distill_loss(hidden, torch.eye(3), teacher, torch.eye(3), **options)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()
