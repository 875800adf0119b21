"""linear_token_stats' kernels against full logits, judged in fp64 on the rounded inputs."""

import math

import pytest
import torch
from far_programs import FarPrograms

pytest.importorskip("triton")

from duet_kernels import LMHead, linear_token_stats
from duet_kernels.triton import stats as kernel
from duet_kernels.triton.primitives import INTERPRETED
from duet_kernels.triton.stats import Plan, plan, token_elements, token_stats

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D = 13, 203, 45
NAMES = ("logsumexp", "entropy", "variance", "logprob")
CUTS = [None, Plan(5, 64, 32), Plan(13, 256, 256), Plan(8, 96, 32)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(dtype=torch.float64, *, n=N, v=V, d=D, std=2.0):
    """(hidden, weight, bias, labels)"""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = randn(n, d), std * randn(v, d) / math.sqrt(d), randn(v)
    labels = torch.randint(0, v, (n,), generator=generator)
    return [*(x.to(dtype).to(DEVICE) for x in inputs), labels.to(DEVICE)]


def run(hidden, weight, bias, labels, *, softcap=None, scale=1.0, cut=None):
    return token_stats(hidden, LMHead(weight, bias, softcap, scale), labels, cut=cut)


def expected(hidden, weight, bias, labels, *, softcap=None, scale=1.0, acc=torch.float64):
    z = scale * (hidden.to(acc) @ weight.to(acc).T + (0 if bias is None else bias.to(acc)))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = z.log_softmax(1)
    terms = logp.masked_fill(logp == -math.inf, 0)
    p = logp.exp()
    entropy = -(p * terms).sum(1)
    variance = (p * (terms + entropy[:, None]).square()).sum(1)
    logprob = None if labels is None else logp.gather(1, labels[:, None])[:, 0]
    return z.logsumexp(1), entropy, variance, logprob


@pytest.mark.parametrize(
    "softcap, scale, with_bias, cut",  # every head in two cuts
    [
        (*head, CUTS[(i + j) % 4])
        for i, head in enumerate(
            [(None, -0.7, True), (2.5, 1.0, False), (None, 1.0, False), (2.5, 0.7, True)]
        )
        for j in range(2)
    ],
    ids=str,
)
def test_fp64_equals_torch(softcap, scale, with_bias, cut):
    hidden, weight, bias, labels = problem()
    bias = bias if with_bias else None
    got = token_stats(hidden, LMHead(weight, bias, softcap, scale), labels, cut=cut)
    wanted = expected(hidden, weight, bias, labels, softcap=softcap, scale=scale)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "dtype, cut, options",  # every pair of the three
    [
        (dtype, cut, ({"softcap": 20.0}, {"softcap": 9.0, "scale": 1.3})[(i + j) % 2])
        for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
        for j, cut in enumerate(CUTS[:2])
    ],
    ids=str,
)
def test_error_budget(dtype, cut, options):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    inputs = problem(dtype)
    got = run(*inputs, **options, cut=cut)
    truth, baseline = (expected(*inputs, **options, acc=acc) for acc in (torch.float64, torch.float32))
    for name, a, b, t in zip(NAMES, got, baseline, truth, strict=True):
        assert a.dtype == torch.float32
        ours, theirs, size = (x.double().square().mean().sqrt().item() for x in (a - t, b - t, t))
        assert ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps * size, name


@pytest.mark.parametrize("v", [1, 2, 31, 32, 33, 64, 130])
def test_vocabularies_beside_and_on_the_edges_of_blocks(v):
    inputs = problem(v=v)
    got = run(*inputs, cut=Plan(N, 64, 32))
    for a, b in zip(got, expected(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", CUTS[:2], ids=str)
@pytest.mark.parametrize("certain", [0, 60, 202])
def test_almost_certain_tokens_keep_their_digits(cut, certain):
    """Entropies and losses of 1e-4 to 1e-30 in fp32, whose 1 + R is 1."""
    gaps = torch.linspace(12, 70, N, device=DEVICE)
    weight = torch.zeros(V, 1, device=DEVICE)
    weight[certain] = 1.0
    bias = torch.linspace(-1, 1, V, device=DEVICE)
    bias[certain] = 0.0
    labels = torch.full((N,), certain, device=DEVICE)
    _, entropy, variance, logprob = token_stats(gaps[:, None], LMHead(weight, bias), labels, cut=cut)
    others = torch.arange(V, device=DEVICE) != certain
    x = bias.double()[others][None, :] - gaps.double()[:, None]
    rest = x.exp().sum(1)
    p = x.exp() / (1 + rest)[:, None]
    log_total = rest.log1p()
    h = log_total - (p * x).sum(1)
    second = (p * (x - log_total[:, None] + h[:, None]).square()).sum(1)
    wanted = h, second + (h - log_total).square() / (1 + rest), -log_total
    for a, b in zip((entropy, variance, logprob), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=0)


def test_ties_and_flat_rows():
    """The largest logit may be there many times, in one block and in several: one of them leaves the rest."""
    hidden = torch.ones(3, 1, device=DEVICE, dtype=torch.float64)
    weight = torch.zeros(V, 1, device=DEVICE, dtype=torch.float64)
    labels = torch.tensor([0, 50, 202], device=DEVICE)
    for cut in (Plan(3, 64, 32), None):
        logsumexp, entropy, variance, logprob = token_stats(hidden, LMHead(weight), labels, cut=cut)
        flat = torch.full_like(entropy, math.log(V))
        torch.testing.assert_close(logsumexp, flat)
        torch.testing.assert_close(entropy, flat)
        torch.testing.assert_close(logprob, -flat)
        assert bool((variance.abs() <= 1e-12).all())


def test_special_rows():
    """NaN stays in its row; ids ruled out by a bias, whole blocks of them too; an unknown label is NaN."""
    hidden, weight, bias, labels = problem()
    bias[torch.arange(V) % 3 == 1] = -math.inf
    bias[:64] = -math.inf
    labels[labels < 64] = 65
    labels[(labels % 3) == 1] = 65
    labels[3], labels[5], labels[6] = 70, V, -1
    hidden[2, 7] = math.nan
    got = token_stats(hidden, LMHead(weight, bias), labels, cut=Plan(5, 64, 32))
    wanted = expected(hidden, weight, bias, labels.clamp(0, V - 1), softcap=None)
    wanted[3][[5, 6]] = math.nan
    assert got[3][3] == -math.inf
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
        assert bool(a[2].isnan())


def test_an_unknown_label_is_nan_whatever_lay_in_memory(monkeypatch):
    monkeypatch.setattr(kernel.torch, "empty", torch.ones)
    hidden, weight, bias, labels = problem()
    labels[3], labels[5] = V, -1
    logprob = run(hidden, weight, bias, labels, cut=Plan(5, 64, 32))[3]
    assert logprob.isnan().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("impl", ["triton", "chunked"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_no_distribution(impl, value):
    """All logits -inf, or one +inf: the log-sum-exp says so, nothing else is a number; as the definition."""
    weight = torch.full((7, 1), -math.inf)
    weight[3] = value
    arguments = (
        torch.ones(2, 1, device=DEVICE),
        LMHead(weight.to(DEVICE)),
        torch.tensor([3, 4], device=DEVICE),
    )
    got, wanted = (linear_token_stats(*arguments, impl=i) for i in (impl, "reference"))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_strides_and_no_labels():
    hidden, weight, bias, labels = problem()
    odd = (
        torch.stack([hidden, hidden], 1)[:, 1].T.contiguous().T,
        weight.T.contiguous().T,
        torch.stack([bias, bias], 1)[:, 0],
    )
    every_other = torch.stack([labels, labels], 1)[:, 1]
    wanted = token_stats(hidden, LMHead(weight, bias), labels)
    got = run(*odd, every_other)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    *stats, logprob = run(*odd, None)
    assert logprob is None
    for a, b in zip(stats, wanted[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would have to hold the memory: benchmarks.gpu does")
def test_tokens_beyond_32_bits(monkeypatch, tmp_path):
    """A token whose logits, and then one whose partial results, lie beyond 2^31 elements."""
    far = FarPrograms(monkeypatch, tmp_path)
    memory = far.memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    n, block = 2**25 + 4, 64
    z, labels = memory(n * block, torch.float32), memory(n, torch.int64)
    partial, value = [memory(n, torch.float32) for _ in range(4)], memory(n, torch.float32)
    token = torch.randn(block)
    z[-block:], labels[-1] = token, 5
    far.start(n - 1)
    kernel._fold_kernel[(1,)](
        z, None, labels, *partial, value, 1, block, block, 0, 1, 0, 1, 0.0, 1.0,
        HAS_SOFTCAP=False, HAS_LABEL=True, RAGGED=False, ACC=kernel.tl.float32,
        BLOCKS=1, BLOCK=block, PIECE=32,
    )  # fmt: skip
    top, rest = partial[0][-1], partial[1][-1]
    assert top == token.max() and value[-1] == token[5]
    torch.testing.assert_close(top + rest.log1p(), token.logsumexp(0))

    rows = [memory(n * block, torch.float32) for _ in range(4)]
    results = [memory(n, torch.float32) for _ in range(4)]
    for row, fill in zip(rows, (1.5, 0.0, 0.0, 0.0), strict=True):
        row[-block:] = fill
    kernel._merge_kernel[(1,)](*rows, *results, n, block, HAS_LABEL=True, ROWS=1, COLUMNS=block)
    torch.testing.assert_close(results[0][-1], torch.tensor(1.5 + math.log(block)))
    torch.testing.assert_close(results[1][-1], torch.tensor(math.log(block)))


def test_offsets_beyond_32_bits():
    """Rows of W, and entries of the bias, that lie more than 2^31 elements in; untouched memory is never mapped."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 8, dtype=torch.float16, device=DEVICE)
    weight, bias = storage.as_strided((3, 8), (stride, 1)), storage.as_strided((3,), (stride,), 7)
    weight.copy_(torch.arange(24).reshape(3, 8) / 64)
    labels = storage.as_strided((3,), (stride,), 2).to(torch.int64)
    inputs = weight, weight, bias, labels
    for a, b in zip(run(*inputs), expected(*inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bitwise_equal():
    inputs = problem(torch.float32)
    runs = [run(*inputs, cut=Plan(5, 64, 32)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_public_function():
    hidden, weight, bias, labels = problem(torch.float32, n=12)
    head = LMHead(weight, bias, softcap=20.0, scale=1.1, vocab_size=V - 7)
    arguments = hidden.view(3, 4, D), head, labels.clamp(max=V - 8).view(3, 4)
    got, wanted = (linear_token_stats(*arguments, impl=impl) for impl in ("triton", "reference"))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == (3, 4)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert linear_token_stats(hidden[:0], head, labels[:0], impl="triton").label_logprob.shape == (0,)
    assert linear_token_stats(hidden, head, impl="triton").label_logprob is None


# --- the plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 63, 8192, 200_000])
@pytest.mark.parametrize("v", [1, 32000, 128256, 262144, 5_000_000])
@pytest.mark.parametrize("workspace", [2**22, 2**28, 3 * 2**30])
def test_slabs_and_partial_results_fit_the_workspace(n, v, workspace):
    tokens, columns, block = plan(n, v, 4, workspace)
    assert -(-v // block) <= kernel.tiles.STATS_MERGE and 1 <= tokens <= n
    assert columns == v or columns % block == 0
    least = tokens == 1 and columns <= block  # one token and one block are the least there is
    assert tokens * 4 * sum(token_elements(columns, v, block)) <= workspace or least
    assert -(-v // columns) <= 3 or columns >= 4096 or tokens == 1
