"""The ids of a call: repeated, absent, excluded, ignored labels, more than a kernel holds."""

import dataclasses

import pytest
import torch
from contract import BY_NAME, DTYPES, NEEDS_TRITON, ON_TRITON, SPARSE_IMPLS, TOPK_OPTIONS

from duet_kernels import (
    TopK,
    dispatch,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    resolve_impl,
    topk_distill_loss,
)
from duet_kernels.testing import gradients, judge, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


def test_an_excluded_vocabulary_leaves_nothing():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    tail = linear_logsumexp(hidden, weight, exclude=torch.arange(5).expand(3, 5))
    assert bool((tail == -torch.inf).all())
    tail.masked_fill(tail == -torch.inf, 0).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(
        weight.grad, torch.zeros_like(weight)
    )


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
