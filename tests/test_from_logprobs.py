"""A teacher's top-k from log-probabilities: it says the same as the logits that they came from."""

import pytest
import torch

from duet_kernels import TopK, linear_topk, topk_distill_loss
from duet_kernels.testing import make_problem

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 - after the check that it is installed
from hypothesis import strategies as st  # noqa: E402


def as_served(top: TopK, seed: int, repeat: bool = True):
    """(indices, logprobs) as a server gives them: in some order, one id twice, absent slots of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = top.values / top.temperature - top.logsumexp[..., None]
    ids, logprobs = top.indices, logprobs.clone()
    if repeat:
        again = torch.randint(0, ids.shape[-1], ids[..., :1].shape, generator=generator)
        ids = torch.cat([ids, ids.gather(-1, again)], -1)
        logprobs = torch.cat([logprobs, logprobs.gather(-1, again)], -1)
    ids = torch.cat([ids, torch.full_like(ids[..., :2], -1)], -1)
    logprobs = torch.cat([logprobs, torch.full_like(logprobs[..., :2], -1.5)], -1)
    ids[..., -1], logprobs[..., -1] = 0, -torch.inf
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    return ids.gather(-1, order), logprobs.gather(-1, order)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 12),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_says_what_the_logits_say(seed, k, temperature, dtype):
    problem = make_problem((2, 5), 31, 8, seed=seed, dtype=dtype)
    logits = linear_topk(problem.teacher_hidden, problem.teacher_head, k, temperature=temperature)
    ids, logprobs = as_served(logits, seed)
    top = TopK.from_logprobs(ids, logprobs, temperature=temperature)
    assert torch.equal(top.indices[..., :k], logits.indices)
    assert bool((top.values[..., k:] == -torch.inf).all()) and top.log_probabilities
    assert top.temperature == temperature and top.values.dtype == dtype
    # What log p has lost of the tail by its own rounding is eps of the mass on the k.
    mass = 1 - (logits.tail_logsumexp - logits.logsumexp).exp()
    wanted = logits.tail_logsumexp - logits.logsumexp
    eps, size = torch.finfo(dtype).eps, logits.values.abs().amax(-1) / temperature + 4
    error = 4 * eps * size * mass / wanted.exp() + 8 * eps * (wanted.abs() + size)
    known = error < 0.1  # a tail that is lighter than the rounding of log p is not in log p: it may be -inf
    assert bool((((top.tail_logsumexp - wanted).abs() <= error) | ~known).all())
    assert bool((top.tail_logsumexp <= wanted + error.log1p()).all())
    for name, normalization in [("forward_kl", "renormalize"), ("reverse_kl", "tail"), ("jsd", "tail")]:
        options = {
            "divergence": name,
            "normalization": normalization,
            "temperature": temperature,
            "mask": known,
        }
        got, wanted = (
            topk_distill_loss(problem.hidden, problem.head, teacher, **options) for teacher in (top, logits)
        )
        # A loss moves with the tail's logarithm by the tail's mass, 1 at most.
        atol = 1e-6 + float(error[known].max()) if bool(known.any()) else 0.0
        torch.testing.assert_close(got, wanted, rtol=2e-4 if dtype == torch.float32 else 1e-10, atol=atol)


def test_a_light_tail_keeps_its_digits():
    """1 - sum p by subtraction has none left at a tail of 1e-12, in fp64 log-probabilities that hold it."""
    tail = torch.tensor([1e-3, 1e-7, 1e-12], dtype=torch.float64)
    logprobs = torch.log1p(-tail)[:, None]
    top = TopK.from_logprobs(torch.zeros(3, 1, dtype=torch.long), logprobs)
    torch.testing.assert_close(top.tail_logsumexp.exp(), tail, rtol=2e-4, atol=0)


def test_the_k_hold_all_the_mass():
    top = TopK.from_logprobs(torch.tensor([[4, 2]]), torch.tensor([[0.0, -torch.inf]]))
    assert top.tail_logsumexp.item() == -torch.inf
    over = TopK.from_logprobs(torch.tensor([[4, 2]]), torch.tensor([[0.5005, 0.5001]]).log())
    assert over.tail_logsumexp.item() == -torch.inf


def test_a_mass_above_1_is_refused_beyond_rounding():
    ids = torch.tensor([[0, 1]])
    TopK.from_logprobs(ids, torch.tensor([[0.5, 0.505]]).log())
    with pytest.raises(ValueError, match=r"got a sum of 1\.05"):
        TopK.from_logprobs(ids, torch.tensor([[0.5, 0.55]]).log())


def test_nothing_present():
    top = TopK.from_logprobs(torch.tensor([[-1, -1]]), torch.tensor([[-0.5, -0.1]]))
    assert top.indices.tolist() == [[0, 0]] and top.tail_logsumexp.tolist() == [0.0]
    assert bool((top.values == -torch.inf).all())


def test_the_first_value_of_a_repeated_id_counts():
    top = TopK.from_logprobs(torch.tensor([[5, 3, 5]]), torch.tensor([[-1.0, -2.0, -1.1]]))
    assert top.indices.tolist() == [[5, 3, 0]]
    torch.testing.assert_close(top.values[0, :2], torch.tensor([-1.0, -2.0]))


@pytest.mark.parametrize("name", ["huber", "mse", "l1"])
def test_raw_logits_are_refused(name):
    top = TopK.from_logprobs(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]).log())
    with pytest.raises(ValueError, match=r"teacher: holds log-probabilities.*forward_kl"):
        topk_distill_loss(torch.zeros(1, 3), torch.zeros(4, 3), top, divergence=name)


def test_no_tail_where_none_is_read():
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    top = TopK(torch.randn(2, 2), torch.tensor([[0, 1], [2, 3]]))
    for impl in ("chunked", "reference"):
        assert topk_distill_loss(hidden, weight, top, impl=impl).isfinite()
        with pytest.raises(
            ValueError, match=r"teacher\.tail_logsumexp: normalization='tail' reads it, got None"
        ):
            topk_distill_loss(hidden, weight, top, divergence="forward_kl", normalization="tail", impl=impl)
    with pytest.raises(ValueError, match="tail_logsumexp: is None"):
        _ = top.logsumexp


IDS, LOGPROBS = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopK.from_logprobs([1], LOGPROBS), "indices: wanted a tensor, got list"),
        (lambda: TopK.from_logprobs(IDS, [0.1]), "logprobs: wanted a tensor, got list"),
        (lambda: TopK.from_logprobs(IDS.float(), LOGPROBS), "indices: wanted int64 or int32"),
        (lambda: TopK.from_logprobs(IDS, IDS), "logprobs: wanted floating-point"),
        (lambda: TopK.from_logprobs(IDS, LOGPROBS[:, :1]), r"logprobs: wanted shape \[\.\.\., K\]"),
        (lambda: TopK.from_logprobs(IDS[:, :0], LOGPROBS[:, :0]), "logprobs: wanted shape"),
        (lambda: TopK.from_logprobs(IDS, LOGPROBS, temperature=0), "temperature: wanted a finite number > 0"),
        (lambda: TopK.from_logprobs(IDS, LOGPROBS + 3), "logprobs: .* sum to 1 at most, got a sum of 10"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
