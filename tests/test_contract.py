"""One table of operations (`duet_kernels.testing.OPS`), one contract, every implementation that has the operation.

The second half holds what needs inputs of its own: ties, infinities, ragged rows, other shapes, settings.
"""

import dataclasses
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import pytest
import torch
from divergences import FORMS, SIGNS, UNBOUNDED
from settings import WAYS, checks_in

from duet_kernels import (
    LMHead,
    TopK,
    dispatch,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    resolve_impl,
    set_workspace_bytes,
    topk_distill_loss,
)
from duet_kernels.options import DIVERGENCES, RAW, Divergence
from duet_kernels.portable import cuts, gather
from duet_kernels.portable.topk_divergence import divergence_and_gradient
from duet_kernels.testing import (
    CHECKS,
    DISTRIBUTIONS,
    OPS,
    assert_within_budget,
    check_definition,
    check_masked_rows,
    check_reductions,
    check_upstream,
    gradients,
    judge,
    make_problem,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}
HEADS = {"plain": {}, "full": FULL}
BY_NAME = {op.name: op for op in OPS}


def _runs(op, impl):
    try:
        return resolve_impl(op.resolve, "cpu", torch.float32, impl)[0] == impl
    except RuntimeError:
        return False


NEEDS_TRITON = pytest.mark.skipif(not dispatch._TRITON_INSTALLED, reason="triton is not installed")
ON_TRITON = [op for op in OPS if _runs(op, "triton")]
# The interpreter takes a tenth of a second a kernel: the parts of the contract that are the same code for
# every divergence run on one raw one, one distribution and the gather.
SAMPLED = [
    op
    for op in ON_TRITON
    if op.name in ("gather", "topk-huber", "topk-forward_kl-renormalize", "linear-jsd", "cross-entropy")
]

# Around the kernels: the reduction, which two of them stand for; upstream gradients, in which test_upstream.py has cross-entropy.
AROUND = {
    check_reductions: ("topk-huber", "cross-entropy"),
    check_upstream: ("gather", "topk-huber", "linear-jsd"),
}
OF_KERNELS = [
    pytest.param(op, check, id=f"{op}-{check.__name__}")
    for op in SAMPLED
    for check in CHECKS
    if check is not check_definition and op.name in AROUND.get(check, (op.name,))
]

SETTINGS = [*zip(DTYPES + DTYPES[:1], ("full", "plain") * 2, strict=True)]


@pytest.mark.parametrize("setting", range(len(SETTINGS)), ids=[f"{dtype}-{head}" for dtype, head in SETTINGS])
@pytest.mark.parametrize("op", OPS, ids=str)
class TestChunked:
    def test_contract(self, op, setting):
        dtype, head = SETTINGS[setting]
        problem = make_problem(dtype=dtype, **HEADS[head])
        for check in checks_in(op, setting, len(SETTINGS)):
            check(op, problem, "chunked")


@pytest.mark.parametrize("head", [{"softcap": 20.0}, {"scale": -0.7}], ids=["softcap", "scale"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_softcap_and_a_scale_alone(op, head):
    """One end of a head without the other, whose factor would hide that it is forgotten."""
    check_definition(op, make_problem(**head), "chunked")


class TestTriton:
    """The kernels in the interpreter."""

    def test_which_operations_have_a_kernel(self):
        if not ON_TRITON:
            pytest.skip("triton is not installed")
        assert {op.resolve for op in ON_TRITON} == {
            "linear_gather",
            "linear_logsumexp",
            "linear_cross_entropy",
            "linear_distill_loss",
            "topk_distill_loss",
            "topk_distill_loss/lse",
        }

    @pytest.mark.parametrize("op", ON_TRITON, ids=str)
    def test_definition(self, op):
        check_definition(op, make_problem(13, 67, 19, bias=True, softcap=20.0, scale=1.3, pad=5), "triton")

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("op", SAMPLED, ids=str)
    def test_half_precisions(self, op, dtype):
        check_definition(op, make_problem(13, 67, 19, dtype=dtype, **FULL), "triton")

    @pytest.mark.parametrize("op, check", OF_KERNELS)
    def test_contract(self, op, check):
        check(op, make_problem(7, 43, 11, bias=True), "triton")


# --- shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("lead, v, d", [(16, 2, 3), (24, 7, 2), (16, 129, 16), (16, 512, 8), (19, 1025, 5)])
def test_odd_shapes(op, lead, v, d):
    """Two ids, few features, vocabularies beside and on the edges of tiles."""
    judge(op, make_problem(lead, v, d, bias=True, std=2.0), "chunked")


@pytest.mark.parametrize("op", [op for op in OPS if "-" in op.name], ids=str)
def test_a_vocabulary_of_one_id(op):
    """Its distribution is certain: nothing is lost and nothing is learned."""
    if any(raw in op.name for raw in (*RAW, "logsumexp")):
        return
    problem = make_problem(16, 1, 3).requiring(("hidden", "weight"))
    rows = op.run(problem, "chunked")
    assert rows.abs().max() <= 1e-7
    assert all(g.abs().max() <= 1e-6 for g in gradients(rows.sum(), problem).values())


@pytest.mark.parametrize("op", OPS, ids=str)
def test_one_token_at_a_time(op):
    """N = 1, sixteen times over: the rows of one call, and the sum of their gradients for the head."""
    problem = make_problem(16, 203, 45, bias=True)

    def one_by_one(case, impl, **options):
        if impl == "reference":
            return op.call(case, impl=impl, **options)
        per_token = ("hidden", "teacher_hidden", "labels")
        rows = [
            dataclasses.replace(case, **{name: getattr(case, name)[i : i + 1] for name in per_token})
            for i in range(16)
        ]
        return torch.cat([op.run(row, impl) for row in rows])

    judge(dataclasses.replace(op, call=one_by_one), problem, "chunked")


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_no_tokens(op, impl, lead):
    """Zero tokens: an empty result, a zero loss, zero (not missing) gradients."""
    problem = make_problem(lead, bias=True)
    problem = problem.requiring(problem.leaves)
    output = op.run(problem, impl)
    assert output.shape[: len(lead)] == lead
    outputs = [output, *([op.run(problem, impl, reduction=r) for r in ("mean", "sum")] if op.loss else [])]
    for output in outputs:
        assert bool((output == 0).all())
        for name, gradient in gradients(output.sum(), problem).items():
            assert gradient.shape == getattr(problem, name).shape
            assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("op", [op for op in OPS if op.loss], ids=str)
def test_masked_rows_that_stay(op, monkeypatch):
    """Where leaving masked rows out would be a synchronisation they are computed, and count exactly nothing."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    check_masked_rows(op, make_problem(13, 61, 16, bias=True), "chunked")


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


@pytest.mark.parametrize("op", [op for op in ON_TRITON if op.name in ("gather", "topk-huber")], ids=str)
def test_no_tokens_on_triton(op):
    test_no_tokens(op, "triton", (0,))


def test_selections_of_no_tokens():
    problem = make_problem(0)
    top = linear_topk(problem.hidden, problem.head, 4)
    assert top.values.shape == (0, 4) and top.indices.shape == (0, 4) and top.tail_logsumexp.shape == (0,)
    assert all(x.shape == (0,) for x in linear_token_stats(problem.hidden, problem.head, problem.labels))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_leading_shapes(impl):
    """Any leading shape: a single vector, three dimensions; results follow it."""
    problem = make_problem((2, 3, 4))
    sides = problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head
    flat = [x.reshape(24, *x.shape[3:]) for x in (problem.hidden, problem.teacher_hidden, problem.labels)]
    top = linear_topk(sides[0], sides[1], 5, impl=impl)
    flat_top = linear_topk(flat[0], sides[1], 5, impl=impl)
    assert top.values.shape == top.indices.shape == (2, 3, 4, 5) and top.tail_logsumexp.shape == (2, 3, 4)
    assert torch.equal(top.indices.view(24, 5), flat_top.indices)
    for k in (None, 5):
        rows = linear_distill_loss(*sides, k=k, reduction="none", impl=impl)
        wanted = linear_distill_loss(flat[0], sides[1], flat[1], sides[3], k=k, reduction="none", impl=impl)
        torch.testing.assert_close(rows, wanted.view(2, 3, 4))
    assert linear_token_stats(*sides[:2], problem.labels, impl=impl).label_logprob.shape == (2, 3, 4)
    one = linear_cross_entropy(
        sides[0][0, 0, 0], sides[1], problem.labels[0, 0, 0], reduction="none", impl=impl
    )
    assert one.shape == ()


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_row_blocks_and_small_workspaces(op, dtype, monkeypatch):
    """Row blocks add up, and a hundred times smaller tiles give the same numbers."""
    problem = make_problem(37, 203, 45, dtype=dtype, bias=True, softcap=25.0)
    monkeypatch.setattr(cuts, "MAX_ROWS", 8)
    monkeypatch.setattr(cuts, "TILE_BYTES", 1024)
    monkeypatch.setattr(gather, "_GATHER_BYTES", 8 * 45 * 4 * 3)
    judge(op, problem, "chunked")
    if op.name in WAYS or dtype == torch.float32:
        check_masked_rows(op, problem, "chunked")


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_workspace_setting_changes_no_result(op):
    # With seed 0 one of the 900,000 differences lies on the edge of tvd's noise, where rounding decides.
    problem = make_problem(600, 1500, 8, seed=1).requiring(("hidden", "weight"))
    results = []
    for size in (2**20, 2**30):
        previous = set_workspace_bytes(size)
        try:
            output = op.run(problem, "chunked")
            results.append([output.detach(), *gradients(output.sum(), problem).values()])
        finally:
            set_workspace_bytes(previous)
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-5, atol=float(large.abs().max()) * 1e-6)


@pytest.mark.parametrize(
    "teacher", [{"teacher_d": 31}, {"teacher_d": 64}, {"teacher_v": 150}, {"teacher_v": 260}]
)
@pytest.mark.parametrize("op", [op for op in OPS if op.resolve == "linear_distill_loss"], ids=str)
def test_other_models_as_teachers(op, teacher):
    """Another hidden size; another vocabulary, of which the common ids count."""
    for dtype in (torch.float32, torch.bfloat16):
        judge(op, make_problem(dtype=dtype, bias=True, **teacher), "chunked")


@pytest.mark.parametrize("student", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("teacher", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("k", [None, 6])
def test_a_teacher_of_another_dtype(student, teacher, k):
    if student == teacher:
        return
    problem, other = make_problem(9, 61, 16, dtype=student), make_problem(9, 61, 16, dtype=teacher)
    results = {}
    for impl in ("chunked", "reference"):
        case = problem.requiring(problem.leaves)
        loss = linear_distill_loss(
            case.hidden, case.head, other.teacher_hidden, other.teacher_head, k=k, reduction="none", impl=impl
        )
        results[impl] = [loss.detach(), *gradients(loss.sum(), case).values()]
    for got, wanted in zip(results["chunked"], results["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2 if student == torch.bfloat16 else 1e-4, atol=1e-5)


# --- selection: ties, order, infinities ------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["quantised", "equal"])
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("v, k", [(203, 1), (203, 8), (203, 203), (5000, 8), (5000, 40), (4097, 3)])
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


@pytest.mark.parametrize("k", [1, 8, 150, 203])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_against_the_definition(k, temperature, dtype):
    problem = make_problem(dtype=dtype, **FULL)
    got = linear_topk(problem.hidden, problem.head, k, temperature=temperature)
    wide = problem.to(torch.float64)
    truth = linear_topk(wide.hidden, wide.head, k, temperature=temperature, impl="reference")
    own = linear_topk(problem.hidden, problem.head, k, temperature=temperature, impl="reference")
    assert torch.equal(got.indices, truth.indices)
    assert_within_budget(got.values, truth.values, own.values, name="values")
    if k < 203:
        assert_within_budget(got.tail_logsumexp, truth.tail_logsumexp, own.tail_logsumexp, name="tail")
    else:
        assert bool((got.tail_logsumexp == -torch.inf).all())


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=NEEDS_TRITON)])
def test_ignored_labels_have_a_log_probability_of_0(impl):
    """Whatever the ignored label is, an id of the vocabulary as well; the other statistics do not see labels."""
    problem = make_problem((3, 5), 61, 16)
    plain = linear_token_stats(problem.hidden, problem.head, problem.labels, impl=impl)
    ignored = torch.arange(15).view(3, 5) % 4 == 1
    for index in (-100, 61, 7, -1):
        labels = problem.labels.masked_fill(problem.labels == index, 8).masked_fill(ignored, index)
        wanted = linear_token_stats(problem.hidden, problem.head, labels.masked_fill(ignored, 0), impl=impl)
        got = linear_token_stats(problem.hidden, problem.head, labels, ignore_index=index, impl=impl)
        assert torch.equal(got.label_logprob, wanted.label_logprob.masked_fill(ignored, 0))
        assert all(torch.equal(a, b) for a, b in zip(got[:3], plain[:3], strict=True))
    everything = torch.full((3, 5), -100)
    got = linear_token_stats(problem.hidden, problem.head, everything, ignore_index=-100, impl=impl)
    assert torch.equal(got.label_logprob, torch.zeros(3, 5))
    assert linear_token_stats(problem.hidden, problem.head, ignore_index=-100).label_logprob is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_token_stats_against_the_definition(dtype, head):
    problem = make_problem(dtype=dtype, **HEADS[head])
    wide = problem.to(torch.float64)
    truth, own, got = (
        linear_token_stats(p.hidden, p.head, p.labels, impl=impl)
        for p, impl in ((wide, "reference"), (problem, "reference"), (problem, "chunked"))
    )
    for name in got._fields:
        assert_within_budget(getattr(got, name), getattr(truth, name), getattr(own, name), name=name)


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


def test_an_excluded_vocabulary_leaves_nothing():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    tail = linear_logsumexp(hidden, weight, exclude=torch.arange(5).expand(3, 5))
    assert bool((tail == -torch.inf).all())
    tail.masked_fill(tail == -torch.inf, 0).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(
        weight.grad, torch.zeros_like(weight)
    )


# --- ids: repeated, absent -------------------------------------------------------------------------------------

SPARSE_IMPLS = ["chunked", *(["triton"] if ON_TRITON else [])]


@pytest.mark.parametrize("impl", SPARSE_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_ids_add_up(impl, dtype):
    """Within a token and across tokens: their gradients meet in one row of dW."""
    problem = make_problem(13, 31, 11, dtype=dtype, bias=True)
    ids = torch.randint(0, 4, (13, 6), generator=torch.Generator().manual_seed(0)) * 7
    gather = dataclasses.replace(
        BY_NAME["gather"],
        call=lambda p, **options: linear_gather(p.hidden, p.head, ids, **options),
        ids=lambda p: ids,
    )
    judge(gather, problem, impl)
    grads = gradients(gather.run(p := problem.requiring(problem.leaves), impl).sum(), p)
    untouched = torch.ones(31, dtype=torch.bool).index_fill(0, ids.flatten(), False)
    assert bool((grads["weight"][untouched] == 0).all())
    complement = dataclasses.replace(
        gather, call=lambda p, **o: linear_logsumexp(p.hidden, p.head, exclude=ids, **o), name="complement"
    )
    judge(complement, problem, "chunked")
    # Both parts of the op with one backward pass: a teacher that names an id twice compares it twice.
    teacher = TopK(torch.randn(13, 6, generator=torch.Generator().manual_seed(2)), ids, torch.ones(13))
    both = dataclasses.replace(
        BY_NAME["topk-forward_kl-tail"],
        call=lambda p, **o: topk_distill_loss(
            p.hidden, p.head, teacher, divergence="forward_kl", normalization="tail", **o
        ),
        ids=lambda p: ids,
    )
    judge(both, problem, "chunked")


def test_the_gather_gradient_is_deterministic():
    problem = make_problem(300, 31, 11).requiring(("hidden", "weight"))
    ids = torch.randint(0, 31, (300, 20), generator=torch.Generator().manual_seed(0))
    runs = [
        gradients(linear_gather(problem.hidden, problem.head, ids).square().sum(), problem) for _ in range(3)
    ]
    assert all(torch.equal(run["weight"], runs[0]["weight"]) for run in runs)


def _ragged(op, absent):
    """A top-k operation whose teacher has slots of -inf, and its options."""

    def call(problem, **options):
        top = problem.teacher_topk(8, 1.5)
        top = top._replace(values=top.values.masked_fill(absent, -torch.inf))
        return topk_distill_loss(problem.hidden, problem.head, top, **op, **options)

    return dataclasses.replace(BY_NAME["topk-huber"], name=f"ragged {op}", call=call)


TOPK_OPTIONS = [
    *({"divergence": name} for name in RAW),
    *(
        {"divergence": name, "normalization": normalization, "temperature": 1.5}
        for name, normalization in FORMS
        if name in DISTRIBUTIONS
    ),
]


@pytest.mark.parametrize("options", TOPK_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_absent_slots(options):
    """Ragged rows, down to no slot at all: absent slots are excluded everywhere and get no gradient."""
    absent = torch.arange(8) >= torch.arange(13)[:, None] % 9
    assert bool(absent[0].all()) and not bool(absent[8].any())
    judge(_ragged(options, absent), make_problem(13, 61, 16, bias=True), "chunked")


WITHOUT_SUM = [o for o in TOPK_OPTIONS if o.get("normalization") in (None, "renormalize")]


# The kernels run every loss once, every other one with a softcap.
ABSENT = [
    pytest.param(impl, options, softcap, id=f"{softcap}-options{i}-{impl}")
    for impl in SPARSE_IMPLS
    for i, options in enumerate(WITHOUT_SUM)
    for softcap in (None, 20.0)
    if impl != "triton" or i % 2 != (softcap is None)
]


@pytest.mark.parametrize("impl, options, softcap", ABSENT)
def test_absent_slots_are_as_if_not_there(impl, options, softcap):
    """The same as a shorter top-k; with none left the loss is 0. The slope of a softcap is infinite at -inf."""
    problem = make_problem(7, 61, 16, softcap=softcap)
    top = problem.teacher_topk(8)
    short = TopK(top.values[:, :5], top.indices[:, :5], top.tail_logsumexp)
    ragged = top._replace(values=top.values.masked_fill(torch.arange(8) >= 5, -torch.inf))
    empty = top._replace(values=torch.full_like(top.values, -torch.inf))
    results = []
    for teacher in (ragged, short, empty):
        case = problem.requiring(problem.leaves)
        loss = topk_distill_loss(case.hidden, case.head, teacher, impl=impl, **options)
        results.append((loss.detach(), gradients(loss, case)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(results[0][1][name], results[1][1][name], rtol=1e-4, atol=1e-8)
    loss, grads = results[2]
    assert loss == 0 and all(bool((g == 0).all()) for g in grads.values())


# --- properties of the losses ----------------------------------------------------------------------------------

SHIFT_FREE = [op for op in OPS if any(d in op.name for d in DISTRIBUTIONS) or op.name == "cross-entropy"]


@pytest.mark.parametrize("op", SHIFT_FREE, ids=str)
def test_distribution_losses_do_not_see_a_shift(op):
    """A constant added to all of the student's logits changes nothing: db sums to 0."""
    problem = make_problem(13, 61, 16, dtype=torch.float64, bias=True)
    case = problem.requiring(problem.leaves)
    loss = op.run(case, "chunked").sum()
    shifted = op.run(dataclasses.replace(case, bias=case.bias + 3.0), "chunked").sum()
    torch.testing.assert_close(loss, shifted, rtol=1e-11, atol=0)
    dbias = gradients(loss, case)["bias"]
    assert dbias.abs().sum() > 1e-3
    if "truncated" not in op.name:
        assert abs(dbias.sum()) <= 1e-12 * dbias.abs().sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [45, 768])
@pytest.mark.parametrize("options", TOPK_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_student_that_is_the_teacher_has_no_loss(options, dtype, d):
    """0 within 8 eps of the logits' scale; l1 and tvd do not turn rounding into gradients of +-1."""
    problem = make_problem(23, 203, d, dtype=dtype)
    case = problem.requiring(problem.leaves)
    temperature = options.get("temperature", 1.0)
    teacher = linear_topk(case.hidden, case.head, 16, temperature=temperature)
    if options.get("normalization") in ("zeroed", "truncated"):
        teacher = linear_topk(case.hidden, case.head, 203, temperature=temperature)  # else these are not 0
    noise = 8 * torch.finfo(torch.float32).eps * float(teacher.values.abs().max())
    for sides in (
        lambda **o: topk_distill_loss(case.hidden, case.head, teacher, **options, **o),
        *(
            (
                lambda **o: linear_distill_loss(
                    case.hidden, case.head, case.hidden.detach(), case.head, **options, **o
                ),
            )
            if options.get("normalization") in (None, "renormalize")
            else ()
        ),
    ):
        rows = sides(reduction="none")
        assert rows.abs().max() <= noise, f"{rows.abs().max():.1e} > {noise:.1e}"
        grads = gradients(rows.sum(), case)
        if options["divergence"] in SIGNS:
            assert bool((rows == 0).all()) and all(bool((g == 0).all()) for g in grads.values())
        # Elsewhere a gradient of rounding's size: the noise of K logits against rows of W.
        assert grads["hidden"].abs().max() <= 16 * 4 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_l1_and_tvd_have_their_gradient_above_the_noise(dtype):
    """The dead zone is rounding, not a hole: a gap of 1e-3 has its full gradient."""
    problem = make_problem(13, 61, 16, dtype=dtype)
    top = linear_topk(problem.hidden, problem.head, 5)
    for divergence in SIGNS:
        case = problem.requiring(["hidden"])
        nudged = top._replace(values=top.values + 1e-3 * torch.tensor([1.0, -1, 1, -1, 1]))
        loss = topk_distill_loss(case.hidden, case.head, nudged, divergence=divergence, reduction="sum")
        assert loss > 0 and gradients(loss, case)["hidden"].abs().max() > 1e-3


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


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("normalization", ["renormalize", "tail"])
def test_support_is_who_chooses_the_ids(support, normalization):
    problem = make_problem(13, 61, 16, gap=0.8)
    ids = {
        "teacher": linear_topk(problem.teacher_hidden, problem.teacher_head, 6).indices,
        "student": linear_topk(problem.hidden, problem.head, 6).indices,
    }
    ids["union"] = [
        sorted({*a.tolist(), *b.tolist()}) for a, b in zip(ids["teacher"], ids["student"], strict=True)
    ]
    options = {"normalization": normalization, "reduction": "none", "divergence": "jsd"}
    got = linear_distill_loss(
        problem.hidden,
        problem.head,
        problem.teacher_hidden,
        problem.teacher_head,
        k=6,
        support=support,
        **options,
    )
    for row in range(13):
        chosen = torch.as_tensor(ids[support][row])[None]
        hidden = problem.teacher_hidden[row : row + 1]
        teacher = TopK(
            linear_gather(hidden, problem.teacher_head, chosen),
            chosen,
            linear_logsumexp(hidden, problem.teacher_head, exclude=chosen),
        )
        wanted = topk_distill_loss(
            problem.hidden[row : row + 1], problem.head, teacher, impl="reference", **options
        )
        torch.testing.assert_close(got[row : row + 1], wanted, rtol=1e-5, atol=1e-7)


def test_edited_targets():
    """A TopK is plain data: a demoted id gives the loss of the demoted values."""
    problem = make_problem(5, 61, 16)
    top = problem.teacher_topk(4)
    values = top.values.clone()
    values[:, 0] -= 10
    demoted = top._replace(values=values)
    got = topk_distill_loss(problem.hidden, problem.head, demoted, divergence="mse", reduction="none")
    z = linear_gather(problem.hidden, problem.head, top.indices)
    torch.testing.assert_close(got, (z - values).square().sum(-1))


# --- extreme numbers ---------------------------------------------------------------------------------------------

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
    problem = make_problem(7, 43, 11)
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


# --- settings around a call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_changes_no_dtype_inside(op, impl):
    """fp32 logits stay fp32 under autocast, and hidden states follow the head's dtype."""
    problem = make_problem(13, 203, 45, bias=True)
    plain = problem.requiring(problem.leaves)
    wanted = op.run(plain, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = problem.requiring(problem.leaves)
        got = op.run(cast, impl)
        half = dataclasses.replace(cast, hidden=cast.hidden.bfloat16())
        rounded = op.run(half, impl)
    assert torch.equal(got, wanted)
    for name, gradient in gradients(wanted.sum(), plain).items():
        assert torch.equal(gradients(got.sum(), cast, retain_graph=True)[name], gradient), name
    again = dataclasses.replace(plain, hidden=plain.hidden.bfloat16().float())
    torch.testing.assert_close(rounded, op.run(again, impl), rtol=1e-6, atol=1e-6)
    assert gradients(rounded.sum(), cast)["hidden"].dtype == torch.float32


def test_backward_inside_autocast():
    problem = make_problem(13, 203, 45)
    for op in OPS:
        results = []
        for enabled in (False, True):
            case = problem.requiring(problem.leaves)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                results.append(gradients(op.run(case, "chunked").sum(), case))
        for name in results[0]:
            assert torch.equal(results[0][name], results[1][name]), (op.name, name)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_loss_scale_survives_fp16(op):
    """A factor of 2^16 is more than fp16 holds, and fp16 gradients without it would be subnormal."""
    problem = make_problem(13, 61, 16, dtype=torch.float16)
    grads = {}
    for dtype in (torch.float16, torch.float64):
        case = problem.to(dtype).requiring(problem.leaves)
        options = {"reduction": "mean", "num_items": 10**6} if op.loss else {}
        output = op.run(case, "chunked" if dtype == torch.float16 else "reference", **options)
        factor = 2.0**16 if op.loss else 2.0**-4
        grads[dtype] = gradients(output.sum() * factor, case)
    for name, gradient in grads[torch.float16].items():
        truth = grads[torch.float64][name]
        assert_within_budget(gradient, truth, truth.half(), name=f"{op} d{name}")


@pytest.mark.parametrize("op", OPS, ids=str)
def test_no_grad_and_inference_mode(op):
    problem = make_problem(13, 61, 16)
    wanted = op.run(problem, "chunked")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = op.run(problem.requiring(problem.leaves), "chunked")
        assert not got.requires_grad and torch.equal(got, wanted)


def _made_in_inference_mode(problem, leaf):
    """The problem with everything but one leaf made as by a teacher's, or a frozen backbone's, forward pass."""
    with torch.inference_mode():
        made = {
            field.name: x.clone() if isinstance(x := getattr(problem, field.name), torch.Tensor) else x
            for field in dataclasses.fields(problem)
        }
    made[leaf] = getattr(problem, leaf).clone().requires_grad_()
    return dataclasses.replace(problem, **made)


LEAVES = "hidden", "weight", "bias"
KERNELS = [*SAMPLED, *(op for op in ON_TRITON if op.name in ("logsumexp", "topk-forward_kl-tail"))]


@pytest.mark.parametrize(
    "op, impl, leaf",
    [(op, "chunked", leaf) for op in OPS for leaf in LEAVES]
    + [(op, "triton", LEAVES[i % 3]) for i, op in enumerate(KERNELS)],  # a kernel does not know of leaves
    ids=str,
)
def test_inputs_from_inference_mode(op, impl, leaf):
    """Autograd saves no tensor of inference mode; what is saved is copied, and the gradients are those of plain inputs."""
    problem = make_problem(5, 31, 11, bias=True)
    for reduction in ("none", "mean") if op.loss else ("none",):
        options = {"reduction": reduction} if op.loss else {}
        plain, odd = problem.requiring([leaf]), _made_in_inference_mode(problem, leaf)
        wanted = gradients(op.run(plain, impl, **options).sum(), plain)[leaf]
        output = op.run(odd, impl, **options).sum()
        (got,) = torch.autograd.grad(output, getattr(odd, leaf))
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_inputs_are_not_written(op):
    problem = make_problem(13, 61, 16, bias=True, softcap=9.0)
    case = problem.requiring(problem.leaves)
    op.run(case, "chunked").sum().backward()
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "labels"):
        assert torch.equal(getattr(case, name), getattr(problem, name)), name


def test_checkpointing_recomputes_the_same():
    """Activation checkpointing runs the forward pass once without and once with gradients."""
    problem = make_problem(13, 61, 16)
    for op in OPS:
        if not op.loss:
            continue
        grads = []
        for wrapped in (False, True):
            case = problem.requiring(problem.leaves)

            def run(hidden, case=case, op=op):
                return op.run(dataclasses.replace(case, hidden=hidden), "chunked", reduction="mean")

            if wrapped:
                loss = torch.utils.checkpoint.checkpoint(run, case.hidden, use_reentrant=False)
            else:
                loss = run(case.hidden)
            grads.append(gradients(loss, case))
        for name in grads[0]:
            assert torch.equal(grads[0][name], grads[1][name]), (op.name, name)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("fill", [-1, 10**6])
def test_an_absent_slot_may_hold_any_id(impl, fill):
    """Ragged rows are padded with what is at hand; only its value says that a slot is absent."""
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    full = linear_topk(torch.randn(3, 4), weight, k=4)
    absent = torch.tensor([[False, False, True, True]] * 3)
    ragged = full._replace(values=full.values.masked_fill(absent, -torch.inf))
    padded = ragged._replace(indices=full.indices.masked_fill(absent, fill))
    for options in ({"divergence": "huber"}, {"divergence": "forward_kl", "normalization": "tail"}):
        expected = topk_distill_loss(hidden, weight, ragged, impl=impl, **options)
        assert torch.equal(topk_distill_loss(hidden, weight, padded, impl=impl, **options), expected)
    with pytest.raises(ValueError, match=r"teacher\.indices"):
        topk_distill_loss(hidden, weight, full._replace(indices=padded.indices), impl=impl)


@pytest.mark.skipif(not ON_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("op", ["topk_distill_loss", "topk_distill_loss/lse"])
def test_more_ids_than_a_kernel_holds(op, monkeypatch):
    """`auto` runs chunked and says why; an explicit choice is refused with the same reason, before anything ran."""
    from duet_kernels.triton import tiles

    assert dispatch.MAX_SLOTS == tiles.MAX_SLOTS
    many = dispatch.MAX_SLOTS + 1
    monkeypatch.setattr(dispatch, "architecture", lambda device: 90)
    assert resolve_impl(op, "cuda", k=many - 1)[0] == "triton"
    choice, reason = resolve_impl(op, "cuda", k=many)
    assert choice == "chunked" and str(dispatch.MAX_SLOTS) in reason and str(many) in reason
    teacher = TopK(torch.zeros(1, many), torch.arange(many)[None], torch.zeros(1))
    normalization = {"divergence": "forward_kl", "normalization": "tail"} if op.endswith("lse") else {}
    arguments = torch.zeros(1, 2), torch.zeros(many + 1, 2), teacher
    assert topk_distill_loss(*arguments, **normalization).isfinite()
    with pytest.raises(RuntimeError, match=str(many)):
        topk_distill_loss(*arguments, impl="triton", **normalization)
