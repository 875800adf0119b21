"""One table of operations (`duet_kernels.testing.OPS`), one contract, every implementation that has the operation."""

import dataclasses

import pytest
import torch
from contract import DTYPES, FULL, HEADS, ON_TRITON, SAMPLED, TOPK_OPTIONS
from divergences import SIGNS
from settings import checks_in

from duet_kernels import (
    TopK,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    topk_distill_loss,
)
from duet_kernels.testing import (
    CHECKS,
    DISTRIBUTIONS,
    OPS,
    assert_within_budget,
    check_definition,
    check_reductions,
    check_upstream,
    gradients,
    make_problem,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

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
        check_definition(op, make_problem(13, 67, 19, **FULL), "triton")

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("op", SAMPLED, ids=str)
    def test_half_precisions(self, op, dtype):
        check_definition(op, make_problem(7, 67, 19, dtype=dtype, **FULL), "triton")

    @pytest.mark.parametrize("op, check", OF_KERNELS)
    def test_contract(self, op, check):
        check(op, make_problem(5, 43, 11, bias=True), "triton")


@pytest.mark.parametrize("k, temperature", [(1, 3.0), (8, 0.5), (150, 1.0), (203, 3.0)])
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


@pytest.mark.parametrize(
    "d, dtype", [(45, torch.float32), (768, torch.bfloat16), (768, torch.float16)], ids=str
)
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
