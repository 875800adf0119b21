"""linear_logsumexp's kernels against full logits and autograd, judged in fp64 on the rounded inputs."""

import math

import pytest
import torch

pytest.importorskip("triton")

from duet_kernels.triton import logsumexp as kernel
from duet_kernels.triton.logsumexp import (
    Slab,
    complement_and_values,
    complement_and_values_backward,
    slab_of,
    sparse_bytes,
    tokens_at_a_time,
)
from duet_kernels.triton.primitives import INTERPRETED
from duet_kernels.triton.tiles import LogsumexpTile
from duet_kernels.workspace import set_workspace_bytes, workspace_bytes

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D, K = 19, 103, 45, 5
ALL = {"need_hidden": True, "need_weight": True, "need_bias": True}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def much_a_program(monkeypatch):
    """The interpreter runs programs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(kernel.tiles, "DENSE_ROWS", 32)
        monkeypatch.setattr(kernel.tiles, "DENSE_COLUMNS", 128)
        monkeypatch.setattr(kernel.tiles, "DWEIGHT_VOCABULARY", 64)


@pytest.fixture
def small_slabs(monkeypatch):
    """Several slabs of several blocks of tokens, in one pass or two."""

    def choose(one_pass: bool, tokens: int = 8, columns: int = 40):
        monkeypatch.setattr(
            kernel, "slab_of", lambda n, v, *args, **kwargs: (Slab(min(n, tokens), min(v, columns)), one_pass)
        )
        monkeypatch.setattr(kernel, "tokens_at_a_time", lambda n, d, itemsize: 12)

    return choose


def problem(dtype=torch.float64, *, n=N, v=V, d=D, k=K, seed=0):
    """(hidden, weight, bias, indices, upstream of the tail, upstream of the values), with absent slots and duplicates."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = randn(n, d), randn(v, d) * 2 / math.sqrt(max(d, 1)), randn(v)
    indices = torch.randint(0, v, (n, k), generator=generator)
    if n > 5 and k > 4:
        indices[:, 4] = 11 % v
        indices[3, 2] = -1
        indices[4] = -100
        indices[5, 0] = indices[5, 1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.to(dtype).to(DEVICE) for x in (hidden, weight, bias)]
    return [*inputs, indices.to(DEVICE), randn(n).to(acc).to(DEVICE), randn(n, k).to(acc).to(DEVICE)]


def expected(
    hidden, weight, bias, indices, grad_tail, grad_values,
    *, softcap=None, scale=1.0, temperature=1.0, acc=torch.float64,
):  # fmt: skip
    """(tail, values, dh, dW, db) from full logits and autograd in `acc`."""
    leaves = [None if x is None else x.detach().to(acc).requires_grad_() for x in (hidden, weight, bias)]
    h, w, b = leaves
    x = scale * (h @ w.T + (0 if b is None else b))
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    absent = indices < 0
    chosen = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device)
    chosen.scatter_(1, indices.masked_fill(absent, z.shape[1]), True)
    tail = torch.logsumexp((z / temperature).masked_fill(chosen[:, :-1], -math.inf), 1)
    values = z.gather(1, indices.clamp(min=0)).masked_fill(absent, 0)
    present = [leaf for leaf in leaves if leaf is not None]
    upstream = grad_tail.to(acc), grad_values.to(acc)
    gradients = torch.autograd.grad((tail, values), present, upstream)
    return tail.detach(), values.detach().masked_fill(absent, -math.inf), *gradients


def run(
    hidden, weight, bias, indices, grad_tail, grad_values,
    *, softcap=None, scale=1.0, temperature=1.0, tile=None, splits=None, **need,
):  # fmt: skip
    options = {"softcap": softcap, "scale": scale, "temperature": temperature}
    tail, values = complement_and_values(hidden, weight, bias, indices, **options, tile=tile, splits=splits)
    gradients = complement_and_values_backward(
        grad_tail, grad_values, tail, values, hidden, weight, bias, indices, **options, **{**ALL, **need}
    )
    return tail, values, *gradients


def check(got, wanted, tolerance=1e-12):
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def relative_rms(got, wanted):
    keep = wanted.isfinite()
    assert torch.equal(got.double()[~keep], wanted.double()[~keep])
    got, wanted = got.double()[keep], wanted.double()[keep]
    return ((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item()


# --- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, K])
@pytest.mark.parametrize(
    ("softcap", "scale", "with_bias"), [(None, 1.0, False), (None, -0.7, True), (2.5, 0.7, True)]
)
def test_fp64_equals_torch(softcap, scale, with_bias, k):
    hidden, weight, bias, *others = problem(k=k)
    bias = bias if with_bias else None
    options = {"softcap": softcap, "scale": scale, "temperature": 1.7}
    got = run(hidden, weight, bias, *others, **options)
    check(got, expected(hidden, weight, bias, *others, **options))
    assert with_bias or got[4] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_error_budget(dtype, softcap):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    inputs = problem(dtype)
    options = {"softcap": softcap, "scale": 0.7, "temperature": 1.3}
    truth = expected(*inputs, **options)
    baseline = expected(*inputs, **options, acc=torch.float32)
    got = run(*inputs, **options)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [dtype] * 3
    for a, b, t in zip(got, baseline, truth, strict=True):
        assert relative_rms(a, t) <= 2 * relative_rms(b.to(a.dtype), t) + 4 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_rounded_probability_does_not_meet_what_it_cancels(dtype):
    """Student within 1e-3 of the teacher: q - p at the ids is far below the rounding of q in half precision."""
    hidden, weight, bias, indices, *_ = problem(dtype, k=4)
    indices = torch.arange(4, device=DEVICE).expand(N, 4) + torch.arange(N, device=DEVICE)[:, None]
    tail, values = complement_and_values(
        hidden, weight, bias, indices, softcap=None, scale=1.0, temperature=1.0
    )
    q = torch.softmax(torch.cat([values, tail[:, None]], 1), 1)
    wobble = torch.linspace(-1e-3, 1e-3, q.numel(), device=DEVICE).view_as(q)
    gradient = q * torch.expm1(wobble)
    inputs = hidden, weight, bias, indices, gradient[:, 4], gradient[:, :4]
    for a, t in zip(run(*inputs)[2:], expected(*inputs)[2:], strict=True):
        assert relative_rms(a, t) <= 4 * torch.finfo(dtype).eps


def test_small_weights_survive_fp16():
    """Upstream as of a mean over many tokens times q is below the least number of fp16; its product with h is not."""
    hidden, weight, bias, indices, grad_tail, _ = problem(torch.float16)
    inputs = hidden * 256, weight / 256, bias, indices, grad_tail * 2**-18, torch.zeros(N, K, device=DEVICE)
    dweight, wanted = run(*inputs)[3], expected(*inputs)[3]
    assert relative_rms(dweight, wanted) <= 4 * torch.finfo(torch.float16).eps


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, indices, softcap):
        ctx.options = {"softcap": softcap, "scale": 0.7, "temperature": 1.3}
        pair = complement_and_values(hidden, weight, bias, indices, **ctx.options)
        ctx.save_for_backward(*pair, hidden, weight, bias, indices)
        return pair

    @staticmethod
    def backward(ctx, grad_tail, grad_values):
        saved = ctx.saved_tensors
        gradients = complement_and_values_backward(grad_tail, grad_values, *saved, **ctx.options, **ALL)
        return *gradients, None, None


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck_of_the_kernels(softcap):
    hidden, weight, bias, indices, *_ = problem(n=4, v=9, d=5, k=3)
    indices[1, 2] = indices[1, 1]
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(_Pair.apply, (*leaves, indices, softcap), fast_mode=True)


# --- shapes and layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "v", "d", "k"), [(1, 1, 1, 0), (1, 2, 1, 1), (2, 17, 33, 20), (5, 129, 64, 3), (70, 9, 16, 1)]
)
def test_shapes(n, v, d, k):
    inputs = problem(n=n, v=v, d=d, k=k)
    check(run(*inputs, temperature=0.5), expected(*inputs, temperature=0.5))


@pytest.mark.parametrize("tile", [LogsumexpTile(16, 32, 16, 1, 1), LogsumexpTile(32, 64, 32, 1, 1)], ids=str)
@pytest.mark.parametrize("splits", [1, 3, 1000])
def test_tiles_and_splits_do_not_matter(tile, splits, monkeypatch):
    """Splits that are not full, groups of blocks that are not full, ids on both sides of every border."""
    monkeypatch.setattr(kernel.tiles, "LOGSUMEXP_GROUP", 2)
    hidden, weight, bias, indices, *others = problem(n=37, k=8)
    indices[:, :6] = torch.tensor([0, 31, 32, 63, 64, V - 1], device=DEVICE)
    wanted = expected(hidden, weight, bias, indices, *others)
    for columns in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 1, 7, 3, 0, 2, 4, 6]):
        ids = indices[:, columns]
        got = complement_and_values(
            hidden, weight, bias, ids, softcap=None, scale=1.0, temperature=1.0, tile=tile, splits=splits
        )
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], wanted[1][:, columns], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("k", [0, K])
def test_several_slabs(one_pass, k, small_slabs):
    inputs = problem(k=k)
    small_slabs(one_pass)
    check(run(*inputs, softcap=2.5), expected(*inputs, softcap=2.5))


@pytest.mark.parametrize(("n", "d"), [(0, D), (3, 0)])
def test_nothing_to_multiply(n, d):
    inputs = problem(n=n, d=d, k=2)
    check(run(*inputs), expected(*inputs))


def test_any_strides():
    hidden, weight, bias, indices, grad_tail, grad_values = problem()
    wanted = expected(hidden, weight, bias, indices, grad_tail, grad_values)
    padded = torch.full((V + 21, D + 3), math.nan, dtype=torch.float64, device=DEVICE)
    padded[:V, :D] = weight
    for w in (weight.T.contiguous().T, padded[:V, :D]):
        odd = (
            torch.stack([hidden, hidden + 1], -1)[..., 0],
            w,
            torch.stack([bias, bias], -1)[:, 0],
            indices.T.contiguous().T,
            torch.stack([grad_tail, grad_tail], -1)[:, 0],
            grad_values.T.contiguous().T,
        )
        check(run(*odd), wanted)
    # What autograd hands on for a sum: one number with strides of 0.
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    flat = hidden, weight, bias, indices, one.expand(N), one.expand(N, K)
    check(run(*flat), expected(*flat))


# --- what must not leak ----------------------------------------------------------------------------------------


def test_everything_excluded():
    """A tail of -inf and no gradient from it, whatever its upstream is."""
    hidden, weight, bias, _, grad_tail, _ = problem(v=K)
    indices = torch.arange(K, device=DEVICE).flip(0).expand(N, K)
    zeros = torch.zeros(N, K, dtype=torch.float64, device=DEVICE)
    tail, values, *gradients = run(hidden * 300, weight, bias, indices, grad_tail, zeros)
    assert (tail == -math.inf).all() and values.isfinite().all()
    assert all((g == 0).all() for g in gradients)


def test_banned_ids_weigh_nothing():
    hidden, weight, bias, indices, grad_tail, grad_values = problem()
    bias[20:] = -math.inf
    indices = indices % 20
    got = run(hidden, weight, bias, indices, grad_tail, grad_values)
    wanted = expected(hidden, weight[:20], bias[:20], indices, grad_tail, grad_values)
    check(got[:3], wanted[:3])
    for a, b in zip(got[3:], wanted[3:], strict=True):
        torch.testing.assert_close(a[:20], b, rtol=1e-12, atol=1e-12)
        assert (a[20:] == 0).all()


def test_ids_past_the_vocabulary_make_their_row_nan():
    hidden, weight, bias, indices, *_ = problem()
    options = {"softcap": None, "scale": 1.0, "temperature": 1.0}
    clean = complement_and_values(hidden, weight, bias, indices, **options)
    indices = indices.clone()
    indices[8, 1], indices[9, 0] = V, 2**40
    tail, values = complement_and_values(hidden, weight, bias, indices, **options)
    assert tail[8:10].isnan().all() and values[8, 1].isnan() and values[9, 0].isnan()
    others = torch.arange(N) // 2 != 4
    assert torch.equal(tail[others], clean[0][others]) and torch.equal(values[others], clean[1][others])


def test_nan_stays_in_its_row():
    inputs = problem()
    clean = run(*inputs, softcap=2.5)
    inputs[0] = inputs[0].clone()
    inputs[0][6] = math.nan
    tail, values, dhidden, dweight, _ = run(*inputs, softcap=2.5)
    others = torch.arange(N) != 6
    assert tail[6].isnan() and values[6].isnan().all() and dhidden[6].isnan().all() and dweight.isnan().all()
    for a, b in zip((tail, values, dhidden), clean, strict=False):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_masked_row_of_nan_leaves_no_trace(dtype):
    hidden, weight, bias, indices, grad_tail, grad_values = problem(dtype)
    grad_tail[6] = 0
    grad_values[6] = 0
    clean = run(hidden, weight, bias, indices, grad_tail, grad_values)
    hidden = hidden.clone()
    hidden[6] = math.nan
    _, _, dhidden, dweight, dbias = run(hidden, weight, bias, indices, grad_tail, grad_values)
    assert (dhidden[6] == 0).all()
    for a, b in zip((dhidden, dweight, dbias), clean[2:], strict=True):
        assert torch.equal(a, b)


def test_a_tail_too_small_to_be_a_difference():
    z = torch.full((4, V), -17.5)
    z[:, 3::30] = 2.0
    hidden, weight = torch.eye(4, device=DEVICE), z.T.contiguous().to(DEVICE)
    indices = torch.arange(3, V, 30, device=DEVICE).expand(4, -1)
    tail, _ = complement_and_values(hidden, weight, None, indices, softcap=None, scale=1.0, temperature=1.0)
    wanted = torch.full((4,), -17.5 + math.log(V - indices.shape[1]), device=DEVICE)
    torch.testing.assert_close(tail, wanted, rtol=0, atol=1e-5)


# --- cost and order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal_and_write_no_input(dtype, small_slabs):
    inputs = problem(dtype)
    before = [x.clone() for x in inputs]
    small_slabs(True)
    first, second = (run(*inputs, softcap=2.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("only", ["need_hidden", "need_weight", "need_bias"])
def test_each_gradient_alone(only, monkeypatch):
    inputs = problem()
    every = run(*inputs, softcap=2.5)[2:]
    need = {name: name == only for name in ALL}
    if only == "need_hidden":
        monkeypatch.setattr(kernel, "_Pairs", None)  # a frozen head sorts nothing
    alone = run(*inputs, softcap=2.5, **need)[2:]
    for a, b, needed in zip(alone, every, need.values(), strict=True):
        if needed:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert a is None


@pytest.mark.parametrize("megabytes", [1, 64, 256, 3072])
def test_slabs_keep_the_workspace(megabytes):
    before = set_workspace_bytes(megabytes << 20)
    try:
        for n in (1, 64, 1024, 8192):
            for v, d in ((203, 45), (32000, 2048), (128256, 4096), (262144, 8192)):
                for k in (0, 1, 64):
                    slab, large = slab_of(n, v, d, k, 4, 2, hidden=False, weight=True)
                    assert 1 <= slab.tokens <= n and 1 <= slab.columns <= v
                    used = slab.tokens * slab.columns * 6 + slab.columns * d * 8 + slab.tokens * d * 2
                    sparse = sparse_bytes(n * k, d, 4)
                    # Below what one block of the smallest slab needs there is nothing left to give up.
                    smallest = 64 * 128 * 6 + 128 * d * 8 + 64 * d * 2
                    assert used <= max(workspace_bytes() - sparse, workspace_bytes() // 2, smallest)
                    both, large = slab_of(n, v, d, k, 4, 2, hidden=True, weight=True)
                    used = (
                        n * d * 4
                        + both.tokens * both.columns * 6
                        + both.columns * d * 8
                        + both.tokens * d * 6
                    )
                    assert not large or used <= workspace_bytes()
                    tokens = tokens_at_a_time(n, d, 4)
                    slab, _ = slab_of(tokens, v, d, k, 4, 2, hidden=True, weight=False)
                    used = tokens * d * 4 + slab.tokens * (slab.columns * 6 + d * 4)
                    assert used <= max(workspace_bytes(), 128 * tokens * 6 + tokens * d * 8)
    finally:
        set_workspace_bytes(before)
