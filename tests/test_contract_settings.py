"""What is around a call: autocast, loss scales, no_grad and inference mode, checkpointing; and inputs stay as they are."""

import dataclasses

import pytest
import torch
from contract import ON_TRITON, SAMPLED
from settings import WAYS

from duet_kernels.testing import OPS, assert_within_budget, gradients, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    "impl, op",
    [("chunked", op) for op in OPS] + [("reference", op) for op in OPS if op.name in WAYS],
    ids=str,
)
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
    [
        (op, "chunked", leaf)
        for i, op in enumerate(OPS)
        for leaf in (LEAVES if op.name in WAYS else LEAVES[i % 3 :][:1])
    ]
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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_recomputes_the_same(reduction):
    """Activation checkpointing runs the forward pass once without and once with gradients, and gives each saved tensor once."""
    problem = make_problem(13, 61, 16)
    for op in OPS:
        if not op.loss:
            continue
        grads = []
        for wrapped in (False, True):
            case = problem.requiring(problem.leaves)

            def run(hidden, case=case, op=op):
                return op.run(dataclasses.replace(case, hidden=hidden), "chunked", reduction=reduction)

            if wrapped:
                loss = torch.utils.checkpoint.checkpoint(run, case.hidden, use_reentrant=False)
            else:
                loss = run(case.hidden)
            grads.append(gradients(loss.sum(), case))
        for name in grads[0]:
            assert torch.equal(grads[0][name], grads[1][name]), (op.name, name)
