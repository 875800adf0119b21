"""`clip`: no id adds more than so many nats, and an id above adds no gradient of its own."""

import math

import pytest
import torch
from divergences import of_distributions

from duet_kernels import (
    LMHead,
    TopK,
    TopKDistillLoss,
    linear_distill_loss,
    topk_distill_loss,
    topk_distill_stats,
)
from duet_kernels.options import CLIPPED, DISTRIBUTION, DIVERGENCES

N, V, D, K, CLIP = 7, 23, 5, 4, 0.05
PAIRS = [(name, how) for name in DISTRIBUTION for how in DIVERGENCES[name].normalizations if how in CLIPPED]


def problem(dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    hidden, weight, logits = (
        torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)
        for shape in ((N, D), (V, D), (N, V))
    )
    values, ids = logits.topk(K)
    rest = logits.scatter(1, ids, -math.inf).logsumexp(1)
    return hidden.requires_grad_(), weight.requires_grad_(), TopK(values, ids, rest), logits


def outcome(impl, dtype=torch.float64, **options):
    hidden, weight, teacher, _ = problem(dtype)
    loss = topk_distill_loss(hidden, weight, teacher, impl=impl, reduction="none", **options)
    factors = torch.linspace(0.5, 2, N, dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad((loss * factors).sum(), (hidden, weight))


def terms_by_hand(name, normalization, logits, teacher, ids):
    """`[N, slots]` of full distributions: what each slot adds."""

    def logprobs(x):
        slots, rest = x.gather(1, ids), x.scatter(1, ids, -math.inf).logsumexp(1)[:, None]
        if normalization == "generalized":
            return slots - x.logsumexp(1, keepdim=True)
        return (torch.cat((slots, rest), 1) if normalization == "tail" else slots).log_softmax(1)

    log_q, log_p = (logprobs(x)[..., None] for x in (logits, teacher))  # every slot a row of its own
    return of_distributions(name, log_q, log_p, nonnegative=True)


@pytest.mark.parametrize("name, normalization", PAIRS)
def test_every_divergence_by_hand(name, normalization):
    """Values and gradients, by the definition in full distributions and by every implementation."""
    options = {"divergence": name, "normalization": normalization, "clip": CLIP}
    hidden, weight, teacher, logits = problem()
    terms = terms_by_hand(name, normalization, hidden @ weight.T, logits, teacher.indices)
    assert 0 < (terms > CLIP).sum() < terms.numel()
    loss = terms.clamp(max=CLIP).sum(1)
    gradients = torch.autograd.grad(
        (loss * torch.linspace(0.5, 2, N, dtype=loss.dtype)).sum(), (hidden, weight)
    )
    for impl in ("reference", "chunked", "triton"):
        for found, wanted in zip(outcome(impl, **options), (loss, *gradients), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    for impl in ("chunked", "triton"):
        for found, wanted in zip(outcome(impl, torch.float32, **options), (loss, *gradients), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", CLIPPED)
def test_a_clip_above_every_term_changes_nothing(normalization):
    options = {"divergence": "reverse_kl", "normalization": normalization}
    for impl in ("reference", "chunked", "triton"):
        for clipped, plain in zip(
            outcome(impl, clip=100.0, **options), outcome(impl, **options), strict=True
        ):
            torch.testing.assert_close(clipped, plain, rtol=1e-12, atol=1e-14)


def test_the_loss_of_equal_models_is_zero_and_least():
    """Where a clip of p log(p/q) itself prefers a student that differs: MATH.md's example."""
    p = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    teacher = TopK(p.log(), torch.tensor([[0, 1]]), torch.tensor([-math.inf], dtype=torch.float64))
    shares = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)

    def ours(share):
        logits = torch.stack([share, 1 - share]).log()[None]
        return topk_distill_loss(
            logits, torch.eye(2, dtype=torch.float64), teacher, divergence="forward_kl", clip=0.05
        )

    losses = torch.stack([ours(share) for share in shares])
    assert losses.min() == losses[89] and losses[89].abs() < 1e-12  # at q = p
    q = torch.stack([shares, 1 - shares], 1)
    bare = (p * (p / q).log()).clamp(max=0.05).sum(1)
    assert bare.min() < -0.1 and bare.argmin() != 89 and bare[89].abs() < 1e-12


def test_the_other_functions_take_it():
    hidden, weight, teacher, logits = problem()
    options = {"divergence": "reverse_kl", "normalization": "tail", "clip": CLIP}
    plain = topk_distill_loss(hidden, weight, teacher, reduction="none", **options)
    torch.testing.assert_close(topk_distill_stats(hidden, weight, teacher, **options).loss, plain)
    torch.testing.assert_close(TopKDistillLoss(**options)(hidden, weight, teacher), plain.mean())
    eye = torch.eye(V, dtype=torch.float64)
    both = linear_distill_loss(hidden, weight, logits, eye, k=K, reduction="none", **options)
    torch.testing.assert_close(both, plain)


@pytest.mark.parametrize("name", ["reverse_kl", "symmetric_kl"])
def test_an_infinite_term_is_clipped_without_a_gradient(name):
    """The teacher's two ids hold all mass, so that the student's tail has an infinite term."""
    teacher = TopK.from_logprobs(
        torch.tensor([[3, 5]]), torch.tensor([[0.6, 0.4]], dtype=torch.float64).log()
    )
    assert teacher.tail_logsumexp.item() == -math.inf
    found = []
    for impl in ("reference", "chunked", "triton"):
        hidden, weight, *_ = problem()
        options = {"divergence": name, "normalization": "tail", "clip": 10.0, "impl": impl}
        loss = topk_distill_loss(hidden[:1], weight, teacher, **options)
        found.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    assert loss > 10 and found[0][1].abs().sum() > 0
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_nan_stays_in_its_row():
    for impl in ("reference", "chunked", "triton"):
        hidden, weight, teacher, _ = problem()
        hidden = hidden.detach()
        hidden[2, 0] = math.nan
        options = {"divergence": "forward_kl", "normalization": "tail", "clip": CLIP, "reduction": "none"}
        loss = topk_distill_loss(hidden, weight, teacher, impl=impl, **options)
        assert loss.isnan().tolist() == [row == 2 for row in range(N)], impl


@pytest.mark.parametrize(
    "options, said",
    [
        ({"divergence": "huber", "clip": 1.0}, "clip: .*raw logits of 'huber'"),
        ({"divergence": "forward_kl", "normalization": "truncated", "clip": 1.0}, "clip: .*'truncated'"),
        ({"divergence": "forward_kl", "normalization": "zeroed", "clip": 1.0}, "clip: .*'zeroed'"),
        ({"divergence": "forward_kl", "clip": 0.0}, "clip: wanted a finite number > 0"),
        ({"divergence": "forward_kl", "clip": math.inf}, "clip: wanted a finite number > 0"),
        ({"divergence": "forward_kl", "clip": True}, "clip: wanted a finite number > 0"),
    ],
)
def test_bad_input(options, said):
    hidden, weight, teacher, _ = problem()
    with pytest.raises(ValueError, match=said):
        topk_distill_loss(hidden, weight, teacher, **options)


def test_the_dense_loss_has_none():
    hidden, weight, _, logits = problem()
    with pytest.raises(ValueError, match=r"clip: the dense loss .*pass k"):
        linear_distill_loss(hidden, LMHead(weight), logits, torch.eye(V, dtype=torch.float64), clip=1.0)
