"""torch.compile without graph breaks gives what eager gives, and every custom op says the truth about itself."""

import pytest
import torch
from contract import NEEDS_TRITON
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from duet_kernels import (
    LinearCrossEntropyLoss,
    LinearDistillLoss,
    LMHead,
    TopKDistillLoss,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    ops,
    topk_distill_loss,
    topk_distill_stats,
)
from duet_kernels.testing import gradients, make_problem


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _agree(eager, compiled):
    for wanted, got in zip(eager, compiled, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        size = float(wanted[wanted.isfinite()].abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * size, equal_nan=True)


def _both_ways(function, problem, backend="aot_eager", dynamic=None):
    """(eager, compiled) values and gradients of `function(hidden, weight, bias)`."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)):
        case = problem.requiring(problem.leaves)
        output = run(case.hidden, case.weight, case.bias)
        results.append([output.detach(), *gradients(output.sum() * 1.5, case).values()])
    return results


def _distill(**options):
    def call(hidden, head, problem, teacher, **more):
        live = problem.teacher_hidden, problem.teacher_head
        return linear_distill_loss(hidden, head, *live, **options, **more)

    return call


def _topk(**options):
    return lambda hidden, head, problem, teacher, **more: topk_distill_loss(
        hidden, head, teacher, **options, **more
    )


LOSSES = {
    "huber": _topk(),
    "jsd-tail": _topk(divergence="jsd", normalization="tail", temperature=1.5),
    "zeroed": _topk(divergence="forward_kl", normalization="zeroed"),
    "generalized": _topk(divergence="reverse_kl", normalization="generalized", temperature=1.5),
    "dense": _distill(divergence="reverse_kl"),
    "linear-tail": _distill(k=5, normalization="tail"),
    "linear-union": _distill(k=5, support="union", divergence="tvd"),
}


def _stats(hidden, head, problem, teacher):
    options = {"divergence": "reverse_kl", "normalization": "tail", "temperature": 1.5, "entropy": True}
    stats = topk_distill_stats(hidden, head, teacher, token_ids=problem.labels, **options)
    return stats.loss + stats.logprob + stats.entropy


PRIMITIVES = {
    "stats": _stats,
    "gather": lambda hidden, head, problem, teacher: linear_gather(hidden, head, teacher.indices),
    "logsumexp": lambda hidden, head, problem, teacher: linear_logsumexp(
        hidden, head, exclude=teacher.indices
    ),
    "cross-entropy": lambda hidden, head, problem, teacher: linear_cross_entropy(
        hidden, head, problem.labels
    ),
}


def _function(call, problem, **options):
    """`call` of the leaves alone; everything else is a constant of the graph."""
    teacher = problem.teacher_topk(5, 1.5)
    softcap, scale, size = problem.softcap, problem.scale, problem.vocab_size

    def function(hidden, weight, bias=None):
        return call(hidden, LMHead(weight, bias, softcap, scale, size), problem, teacher, **options)

    return function


@pytest.mark.parametrize("name", [*LOSSES, *PRIMITIVES])
def test_fullgraph_forward_and_backward(name):
    problem = make_problem(13, 61, 16, bias=True, softcap=20.0, scale=1.1, pad=3)
    mask = {"mask": torch.arange(13) % 3 != 0} if name in LOSSES else {}
    _agree(*_both_ways(_function({**LOSSES, **PRIMITIVES}[name], problem, **mask), problem))


@pytest.mark.parametrize("wrapped", ["weight", "ids", "hidden"])
@pytest.mark.parametrize("impl", ["chunked", pytest.param("triton", marks=NEEDS_TRITON)])
def test_a_tensor_that_is_still_on_its_way(impl, wrapped):
    """What a collective returns: a tensor without memory of its own, in any place of an operation."""
    problem = make_problem(5, 61, 16)
    inputs = {"hidden": problem.hidden, "weight": problem.weight, "ids": problem.labels[:, None]}
    wanted = linear_gather(*inputs.values(), impl=impl)
    inputs[wrapped] = AsyncCollectiveTensor(inputs[wrapped])
    assert torch.equal(linear_gather(*inputs.values(), impl=impl), wanted)


def test_a_number_of_items_may_be_a_fraction():
    problem = make_problem(13, 61, 16)

    def loss(hidden, num_items):
        return linear_cross_entropy(hidden, problem.weight, problem.labels, num_items=num_items)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for num_items in (6.5, 7.25, 7, 0.0):
        torch.testing.assert_close(compiled(problem.hidden, num_items), loss(problem.hidden, num_items))


@pytest.mark.parametrize("name", ["huber", "dense"])
def test_per_token_losses_and_half_precision(name):
    problem = make_problem(13, 61, 16, dtype=torch.bfloat16, bias=True)
    _agree(*_both_ways(_function(LOSSES[name], problem, reduction="none"), problem))


@pytest.mark.slow
def test_inductor():
    """The default backend, on the loss that the trainer uses."""
    problem = make_problem(13, 61, 16, bias=True)
    function = _function(LOSSES["huber"], problem)
    _agree(*_both_ways(function, problem, backend="inductor"))


@pytest.mark.slow
def test_dynamic_shapes():
    """One graph for two numbers of tokens."""
    compiled = torch.compile(linear_distill_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (13, 17):
        problem = make_problem(n, 61, 16)
        results = []
        for run in (linear_distill_loss, compiled):
            case = problem.requiring(problem.leaves)
            loss = run(
                case.hidden, case.head, case.teacher_hidden, case.teacher_head, k=5, divergence="huber"
            )
            results.append([loss.detach(), *gradients(loss, case).values()])
        _agree(*results)


def test_selections():
    problem = make_problem(13, 61, 16)

    def function(hidden, weight, labels):
        head = LMHead(weight, softcap=20.0)
        return *linear_topk(hidden, head, 5)[:3], *linear_token_stats(hidden, head, labels)

    arguments = problem.hidden, problem.weight, problem.labels
    _agree(function(*arguments), torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments))


@pytest.mark.parametrize("loss", ["topk", "distill", "cross-entropy"])
def test_modules(loss):
    problem = make_problem(13, 61, 16)
    module, extra = {
        "topk": (TopKDistillLoss(divergence="mse"), (problem.teacher_topk(5),)),
        "distill": (LinearDistillLoss(divergence="jsd"), (problem.teacher_hidden, problem.teacher_head)),
        "cross-entropy": (LinearCrossEntropyLoss(reduction="sum"), (problem.labels,)),
    }[loss]

    def function(hidden, weight, bias):
        return module(hidden, weight, *extra)

    _agree(*_both_ways(function, problem))


def test_under_autocast():
    problem = make_problem(13, 61, 16, bias=True)
    function = _function(LOSSES["huber"], problem)

    def cast(*leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*leaves)

    _agree(*_both_ways(cast, problem))


def _samples():
    """Arguments for every custom op: with and without bias, softcap, tail and gradients."""
    samples = {}
    for full in (False, True):
        p = make_problem(7, 37, 9, bias=full, softcap=15.0 if full else None, scale=1.2 if full else 1.0)
        p = p.requiring(p.leaves)
        teacher = p.teacher_topk(4)
        linear = p.hidden, p.weight, p.bias
        shape = p.softcap, p.scale
        ids = teacher.indices
        values = torch.randn(7, 4)
        rows = torch.randn(7)
        plain = [x if x is None else x.detach() for x in linear]
        need = True, True, full
        both = *linear, *shape, p.teacher_hidden, p.teacher_weight, p.teacher_bias, *shape
        options = "jsd", "renormalize", (1.5, 0.5, 1.0, 0.01 if full else float("inf"))
        tail_options = "jsd" if full else "forward_kl", "tail" if full else "zeroed", options[2]
        given = ids, teacher.values
        samples[full] = {
            "linear_topk": (*plain, *shape, 5, 1.5, "chunked"),
            "linear_gather": (*linear, *shape, ids, "chunked"),
            "linear_gather_backward": (*plain, *shape, values, values, ids, need, "chunked"),
            "topk_loss": (*linear, *shape, *given, torch.rand(7), *options, (True, False, False), "chunked"),
            "topk_loss_with_tail": (
                *linear,
                *shape,
                *given,
                teacher.tail_logsumexp if full else None,
                torch.rand(7),
                *tail_options,
                *(not full, need, "chunked"),
            ),
            # Without its gradient the op has none to give in the hidden states: then they do not ask for one.
            "complement_and_values": (
                *(linear if full else (plain[0], *linear[1:])),
                *shape,
                ids,
                1.5,
                *(full, full, (full, False, False), "chunked"),
            ),
            "complement_and_values_backward": (
                *plain,
                *shape,
                ids,
                1.5,
                torch.randn(7),
                torch.randn(7, 4),
                torch.randn(7, 9),
                torch.randn(7),
                torch.randn(7, 4),
                need,
                "chunked",
            ),
            "divergence_and_gradient": (
                values.clone().requires_grad_(),
                teacher.values,
                rows.clone().requires_grad_() if full else None,
                teacher.tail_logsumexp if full else None,
                torch.rand(7),
                "jsd",
                "tail" if full else "renormalize",
                options[2],
                "chunked",
            ),
            "linear_cross_entropy": (
                *linear,
                *shape,
                p.labels,
                torch.rand(7),
                *(not full, need, "chunked"),
            ),
            "linear_divergence": (
                *both,
                torch.rand(7),
                *options[:2],
                (1.5, 0.5, 1.0, float("inf")),
                not full,
                need,
                "chunked",
            ),
            "token_stats": (*plain, *shape, p.labels if full else None, "chunked"),
        }
    return samples


SAMPLES = _samples()
OPERATORS = {
    op.custom._qualname.removeprefix("duet_kernels::"): op.custom
    for room in (ops.primitives, ops.losses)
    for op in vars(room).values()
    if isinstance(op, ops.op.Op)
}


def test_every_custom_op_is_checked():
    assert set(OPERATORS) == set(SAMPLES[True])


# What they return depends on the options in which the samples differ; others only lack a bias and a softcap.
OTHER_RESULTS = "complement_and_values", "divergence_and_gradient"
FUSED = "linear_divergence", "linear_cross_entropy", "topk_loss_with_tail"
QUICK = "test_schema", "test_autograd_registration", "test_faketensor"
OTHER_DTYPES = torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, full):
    """Schema, fake kernel, autograd registration, and tracing with dynamic shapes."""
    traced = ("test_aot_dispatch_dynamic",) if full or name in (*OTHER_RESULTS, *FUSED) else ()
    torch.library.opcheck(OPERATORS[name], SAMPLES[full][name], test_utils=QUICK + traced)


# Every loss in every dtype; each loss, and each dtype, with and without `reduce`.
@pytest.mark.parametrize(
    "name, reduce, dtype",
    [(name, (i + j) % 2 == 1, dtype) for i, name in enumerate(FUSED) for j, dtype in enumerate(OTHER_DTYPES)],
    ids=str,
)
def test_opcheck_of_the_fused_losses_in_other_dtypes(name, dtype, reduce):
    """Their gradients are outputs, whose dtype the fake kernel has to know."""
    arguments = [
        x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in SAMPLES[True][name]
    ]
    factor = {"linear_divergence": 10, "linear_cross_entropy": 6, "topk_loss_with_tail": 8}[name]
    arguments[-3] = reduce
    arguments[factor] = arguments[factor].to(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(OPERATORS[name], tuple(arguments), test_utils=QUICK)


# complement_and_values: with_values, with_entropy, and whether hidden states need a gradient.
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [(False, False, True), (False, False, False), (True, True, True), (True, False, False)],
    ids=str,
)
def test_opcheck_of_absent_results_in_other_dtypes(dtype, options):
    """The fake kernel has to know the dtype of a result that is absent, too."""
    hidden = torch.randn(6, 8, dtype=dtype).requires_grad_(options[2])
    weight, ids = torch.randn(19, 8, dtype=dtype).requires_grad_(), torch.tensor([[0, 3]] * 6)
    with_values, with_entropy, need = options
    arguments = hidden, weight, None, None, 1.0, ids, 1.0, with_values, with_entropy, [need, False, False]
    torch.library.opcheck(OPERATORS["complement_and_values"], (*arguments, "chunked"), test_utils=QUICK)


@pytest.mark.parametrize("more", [(), (3, "chunked")], ids=len)
def test_an_op_counts_its_arguments(more):
    """A surplus one would be taken for the implementation."""
    op, hidden = ops.primitives._linear_gather, torch.randn(2, 8)
    with pytest.raises(TypeError, match=r"linear_gather: wanted 7 arguments, hidden, weight, .* got"):
        op(hidden, LMHead(torch.randn(19, 8)), torch.zeros(2, 1, dtype=torch.int64), *more)
