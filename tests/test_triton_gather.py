"""linear_gather's kernels against torch's own products and autograd, judged in fp64 on the rounded inputs."""

import math
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from duet_kernels import LMHead
from duet_kernels.head import Need
from duet_kernels.triton import gather as kernel
from duet_kernels.triton import sparse_weight
from duet_kernels.triton.gather import linear_gather, linear_gather_backward
from duet_kernels.triton.primitives import INTERPRETED
from duet_kernels.triton.tiles import GatherTile, SegmentsTile, gather_product_tokens

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D, K = 11, 61, 45, 6
ALL = Need(True, True, True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BOTH = pytest.mark.parametrize("rows_or_logits", ["rows", "logits"], indirect=True)


@pytest.fixture(autouse=True)
def rows_or_logits(request, monkeypatch):
    """Which way the forward pass goes: rows of W unless a test asks for `logits`, a few tokens' at a time."""
    way = getattr(request, "param", "rows")
    tokens = 0 if way == "rows" else 8
    monkeypatch.setattr(kernel.tiles, "gather_product_tokens", lambda *args: tokens)
    return way


def problem(dtype=torch.float64, *, n=N, v=V, d=D, k=K, seed=0):
    """(hidden, weight, bias, indices, upstream gradient) with an absent slot, duplicates and one id in every token."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = randn(n, d), randn(v, d) / math.sqrt(d) * 2, randn(v)
    indices = torch.randint(0, v, (n, k), generator=generator)
    if n > 5 and k > 4:
        indices[:, 4] = 11 % v
        indices[3, 2] = -1
        indices[5, 0] = indices[5, 1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [x.to(dtype) for x in (hidden, weight, bias)]
    return [x.to(DEVICE) for x in (*tensors, indices, randn(n, k).to(acc))]


def expected(hidden, weight, bias, indices, grad, *, softcap=None, scale=1.0, acc=torch.float64):
    """(values, dh, dW, db) from full logits and autograd in `acc`: what the kernels must give."""
    leaves = [None if x is None else x.detach().to(acc).requires_grad_() for x in (hidden, weight, bias)]
    h, w, b = leaves
    x = scale * (h @ w.T + (0 if b is None else b))
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    absent = indices < 0
    picked = z.gather(1, indices.clamp(min=0)).masked_fill(absent, 0)
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(picked, present, grad.to(acc))
    return picked.detach().masked_fill(absent, -math.inf), *gradients


def run(hidden, weight, bias, indices, grad, *, softcap=None, scale=1.0, need=ALL):
    head = LMHead(weight, bias, softcap, scale)
    values = linear_gather(hidden, head, indices)
    return values, *linear_gather_backward(hidden, head, grad, values, indices, need)


def relative_rms(got, wanted):
    keep = wanted.isfinite()
    assert torch.equal(got.double()[~keep], wanted.double()[~keep])
    got, wanted = got.double()[keep], wanted.double()[keep]
    return ((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item()


# --- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "softcap, scale, with_bias, rows_or_logits",  # every pair of head, bias and way
    [
        (*head, bias, ("logits", "rows")[(i + bias) % 2])
        for i, head in enumerate([(2.5, 0.7), (None, 1.0), (None, 0.7)])
        for bias in (True, False)
    ],
    indirect=["rows_or_logits"],
)
def test_fp64_equals_torch(softcap, scale, with_bias):
    hidden, weight, bias, indices, grad = problem(n=21, v=67, k=7)
    bias = bias if with_bias else None
    wanted = expected(hidden, weight, bias, indices, grad, softcap=softcap, scale=scale)
    got = run(hidden, weight, bias, indices, grad, softcap=softcap, scale=scale)
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert with_bias or got[3] is None


@pytest.mark.parametrize(
    "dtype, softcap, rows_or_logits",  # every pair of the three
    [
        (dtype, (None, 2.5)[(i + j) % 2], way)
        for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
        for j, way in enumerate(("rows", "logits"))
    ],
    indirect=["rows_or_logits"],
    ids=str,
)
def test_error_budget(dtype, softcap):
    """Relative RMS error at most twice that of torch with fp32 logits from the same rounded inputs, + 4 eps."""
    inputs = problem(dtype)
    truth = expected(*inputs, softcap=softcap, scale=0.7)
    baseline = expected(*inputs, softcap=softcap, scale=0.7, acc=torch.float32)
    got = run(*inputs, softcap=softcap, scale=0.7)
    assert got[0].dtype == torch.float32
    for a, b, t in zip(got, baseline, truth, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert relative_rms(a, t) <= 2 * relative_rms(b.to(a.dtype), t) + 4 * eps
    assert [g.dtype for g in got[1:]] == [dtype] * 3


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, indices, softcap, scale):
        head = LMHead(weight, bias, softcap, scale)
        values = linear_gather(hidden, head, indices)
        ctx.save_for_backward(values, hidden, weight, bias, indices)
        ctx.options = softcap, scale
        return values

    @staticmethod
    def backward(ctx, grad):
        values, hidden, weight, bias, indices = ctx.saved_tensors
        head = LMHead(weight, bias, *ctx.options)
        return *linear_gather_backward(hidden, head, grad, values, indices, ALL), None, None, None


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck_of_the_kernels(softcap):
    hidden, weight, bias, indices, _ = problem(n=6, v=9, d=5, k=5)
    indices[3, 2] = indices[3, 1]  # an absent slot is -inf, which finite differences cannot see
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(_Gather.apply, (*leaves, indices, softcap, 0.7), fast_mode=True)


# --- shapes and layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "v", "d", "k"),
    [(1, 1, 1, 1), (3, 7, 16, 1), (2, 5, 17, 33), (5, 64, 1030, 2), (4, 300, 8, 130), (1, 3, 512, 16)],
)
def test_shapes(n, v, d, k):
    """D below, at and above a tile's columns; K = 1 and K above a tile's rows; more slots than ids."""
    inputs = problem(n=n, v=v, d=d, k=k)
    wanted = expected(*inputs, softcap=3.0, scale=0.5)
    for a, b in zip(run(*inputs, softcap=3.0, scale=0.5), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [GatherTile(1, 16, 1), GatherTile(4, 64, 1)], ids=str)
def test_tiles_do_not_matter(tile, monkeypatch):
    monkeypatch.setattr(kernel.tiles, "gather_tile", lambda *args: tile)
    inputs = problem(n=21, v=13, d=37, k=5)
    for a, b in zip(run(*inputs), expected(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [SegmentsTile(2, 16, 8, 1), SegmentsTile(8, 64, 4, 1)], ids=str)
@pytest.mark.parametrize("chunk", [8, 16, 10_000])
def test_segments_and_chunks_do_not_matter(tile, chunk, monkeypatch):
    """Segments shorter than a chunk, ending at one, spanning several, and one chunk with less than a tile in it."""
    monkeypatch.setattr(kernel.tiles, "segments_tile", lambda *args: tile)
    monkeypatch.setattr(kernel.tiles, "DWEIGHT_CHUNK", chunk)
    inputs = problem(n=21, v=13, d=37, k=5)
    inputs[3][8:20, :3] = 12  # the last row of W gets a long segment as well
    wanted = expected(*inputs)
    for a, b in zip(run(*inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", ["uniform", "zipf"])
def test_ids_as_a_vocabulary_has_them(law, monkeypatch):
    """Most rows empty, some of a few pairs, one that every other token chose: each segment at every kind of border."""
    monkeypatch.setattr(kernel.tiles, "DWEIGHT_CHUNK", 8)
    hidden, weight, bias, _, grad = problem(n=30, v=200, d=20, k=4)
    generator = torch.Generator().manual_seed(3)
    share = torch.ones(200) if law == "uniform" else 1 / torch.arange(1, 201).float()[torch.randperm(200)]
    indices = torch.multinomial(share.expand(30, -1), 4, generator=generator).to(DEVICE)
    wanted = expected(hidden, weight, bias, indices, grad)
    for a, b in zip(run(hidden, weight, bias, indices, grad), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_id_in_every_slot():
    hidden, weight, bias, indices, grad = problem(n=50, v=5, d=20, k=6)
    indices.fill_(3)
    wanted = expected(hidden, weight, bias, indices, grad)
    for a, b in zip(run(hidden, weight, bias, indices, grad), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_partial_sums_keep_their_budget(monkeypatch):
    monkeypatch.setattr(kernel.tiles, "DWEIGHT_PARTIAL_BYTES", 1 << 20)
    for pairs, d in ((100, 4096), (524288, 4096), (33_000_000, 8192)):
        chunk = sparse_weight.dweight_chunk(pairs, d, 4)
        assert (pairs // chunk) * d * 4 <= 1 << 20
        assert chunk == kernel.tiles.DWEIGHT_CHUNK or (2 * pairs // chunk) * d * 4 > 1 << 20


@BOTH
def test_any_strides():
    hidden, weight, bias, indices, grad = problem()
    wanted = run(hidden, weight, bias, indices, grad, softcap=2.5, scale=0.7)
    odd = (
        torch.stack([hidden, hidden + 1], -1)[..., 0],
        weight.T.contiguous().T,
        torch.stack([bias, bias], -1)[:, 0],
        indices.T.contiguous().T,
        grad.T.contiguous().T,
    )
    assert not any(x.is_contiguous() for x in odd)
    # Not bitwise: another width of loads is another order of sums.
    for a, b in zip(run(*odd, softcap=2.5, scale=0.7), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # What autograd hands on for a sum: one number with strides of 0.
    grad = torch.ones((), dtype=torch.float64, device=DEVICE).expand(N, K)
    a = run(*odd[:4], grad, softcap=2.5, scale=0.7)
    b = run(hidden, weight, bias, indices, grad.contiguous(), softcap=2.5, scale=0.7)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@BOTH
def test_vocabulary_slice_of_a_padded_weight():
    hidden, weight, bias, indices, grad = problem()
    padded = torch.full((V + 21, D + 3), math.nan, dtype=torch.float64, device=DEVICE)
    padded[:V, :D] = weight
    got = run(hidden, padded[:V, :D], bias, indices, grad)
    for a, b in zip(got, run(hidden, weight, bias, indices, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_do(n):
    hidden, weight, bias, _, _ = problem(n=n)
    indices = torch.zeros(n, 0 if n else K, dtype=torch.int64, device=DEVICE)
    grad = torch.zeros(indices.shape, dtype=torch.float64, device=DEVICE)
    values, dhidden, dweight, dbias = run(hidden, weight, bias, indices, grad)
    assert values.shape == indices.shape
    for gradient, like in ((dhidden, hidden), (dweight, weight), (dbias, bias)):
        assert torch.equal(gradient, torch.zeros_like(like))


def test_offsets_beyond_32_bits():
    """A row of W that begins more than 2^31 elements in; memory that is not touched is never mapped."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 8, dtype=torch.float16, device=DEVICE)
    weight = storage.as_strided((3, 8), (stride, 1))
    weight.copy_(torch.arange(24).reshape(3, 8))
    hidden = torch.ones(1, 8, dtype=torch.float16, device=DEVICE)
    indices = torch.tensor([[2, 0]], device=DEVICE)
    values, dhidden, _, _ = run(
        hidden,
        weight,
        None,
        indices,
        torch.ones(1, 2, device=DEVICE),
        softcap=None,
        scale=1.0,
        need=Need(True),
    )
    assert values.tolist() == [[156.0, 28.0]]
    assert dhidden.tolist() == [[16.0 + 2 * i for i in range(8)]]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would have to hold the memory")
def test_a_row_of_dw_beyond_32_bits(tmp_path):
    """Rows of dW that begin more than 2^31 elements in, the first of them where another row follows."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    v, d, columns = 4, 2**30 + 64, 16
    path = tmp_path / "dweight"
    dweight = torch.from_file(str(path), shared=True, size=(v - 1) * d + columns, dtype=torch.float16)
    row, token, offset = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 3], [0, 0, 1, 1], [0, 1, 1, 3, 4])
    )
    hidden, dx = torch.arange(2.0 * columns).view(2, columns), torch.tensor([1.0, 2.0, 3.0, 4.0])
    sparse_weight._segments_kernel[(1,)](
        offset, row, token, dx, hidden, hidden, dweight,
        1, 8, v, d,
        *hidden.stride(),
        ACC=sparse_weight.ACCUMULATORS[dx.dtype], VOCABULARY=4, COLUMNS=columns, AHEAD=4, num_warps=1,
    )  # fmt: skip
    wanted = [hidden[0], 0 * hidden[0], 2 * hidden[0] + 3 * hidden[1], 4 * hidden[1]]
    for i, each in enumerate(wanted):
        assert torch.equal(dweight[i * d : i * d + columns].float(), each)


def test_more_pairs_than_32_bits_are_refused():
    hidden = torch.zeros(1, 4).expand(2**20, 4)
    indices = torch.zeros(1, 1, dtype=torch.int64).expand(2**20, 2**11)
    grad = torch.zeros(1, 1).expand(2**20, 2**11)
    with pytest.raises(ValueError, match=r"indices: 1048576 tokens x 2048 slots; .* pass fewer tokens"):
        linear_gather_backward(hidden, LMHead(hidden[:9]), grad, grad, indices, ALL)


def test_the_last_pairs_that_32_bits_can_number(tmp_path, monkeypatch):
    """The most pairs that are not refused: the ends of their last chunk and tile are numbers of 32 bits, too."""
    d, pairs = 5, 2**31 - 1
    with pytest.raises(ValueError, match="indices: "):
        sparse_weight.require_pairs(pairs, 1, d)
    pairs -= sparse_weight.dweight_chunk(pairs, d, 8) + kernel.tiles.MAX_GATHER_ROWS
    sparse_weight.require_pairs(pairs, 1, d)
    begin, end = pairs - 90, pairs

    def memory(name, dtype):
        if not INTERPRETED:
            return torch.empty(pairs, dtype=dtype, device=DEVICE)
        # A file without contents: what is not touched takes neither disk nor memory.
        return torch.from_file(str(tmp_path / name), shared=True, size=pairs, dtype=dtype)

    hidden = torch.randn(end - begin, d, device=DEVICE)
    one_row = object.__new__(sparse_weight.SortedPairs)
    one_row.v = 1
    one_row.row, one_row.token = memory("row", torch.int32), memory("token", torch.int32)
    one_row.dx = memory("dx", torch.float32)
    one_row.row[begin - 8 : end] = 0
    one_row.token[begin:end] = torch.arange(end - begin, dtype=torch.int32, device=DEVICE)
    one_row.dx[begin:end] = 2.0
    one_row.offset = torch.tensor([begin, end], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(sparse_weight, "_partial_kernel", mock.MagicMock())  # the last pairs fill no chunk
    torch.testing.assert_close(one_row.sum(hidden, torch.float32)[0], 2 * hidden.sum(0))


# --- what must not leak ----------------------------------------------------------------------------------------


@BOTH
def test_absent_slots():
    hidden, weight, bias, indices, grad = problem()
    indices[:] = torch.where(torch.rand(indices.shape).to(DEVICE) < 0.4, -1, indices)
    indices[7] = -100
    wanted = expected(hidden, weight, bias, indices, grad, softcap=2.5, scale=0.7)
    # What stands upstream of an absent slot says nothing.
    grad = grad.masked_fill(indices < 0, math.nan)
    for a, b in zip(run(hidden, weight, bias, indices, grad, softcap=2.5, scale=0.7), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@BOTH
def test_ids_past_the_vocabulary_give_nan_in_their_row():
    hidden, weight, bias, indices, grad = problem()
    clean = run(hidden, weight, bias, indices, grad)
    indices = indices.clone()
    indices[8, 1], indices[9, 0] = V, 2**40
    values, dhidden, dweight, dbias = run(hidden, weight, bias, indices, grad)
    assert values[8, 1].isnan() and values[9, 0].isnan() and values.isnan().sum() == 2
    assert dhidden[8:10].isnan().all()
    others = torch.arange(N) // 2 != 4
    assert torch.equal(dhidden[others], clean[1][others])
    assert dweight.isfinite().all() and dbias.isfinite().all()


@BOTH
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_nan_stays_in_its_row(softcap):
    inputs = problem()
    clean = run(*inputs, softcap=softcap, scale=0.7)
    inputs[0] = inputs[0].clone()
    inputs[0][6] = math.nan
    values, dhidden, dweight, _ = run(*inputs, softcap=softcap, scale=0.7)
    others = torch.arange(N) != 6
    assert values[6].isnan().all()
    assert torch.equal(values[others], clean[0][others])
    assert torch.equal(dhidden[others], clean[1][others])
    untouched = torch.ones(V, dtype=torch.bool)
    untouched[inputs[3][6].cpu()] = False
    assert torch.equal(dweight[untouched], clean[2][untouched]) and dweight[~untouched].isnan().all()


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_a_masked_row_of_nan_leaves_no_trace(softcap):
    """Its upstream gradient is 0: dh is exactly 0 there, and dW and db are those of the other tokens."""
    hidden, weight, bias, indices, grad = problem()
    grad[6] = 0
    clean = run(hidden, weight, bias, indices, grad, softcap=softcap, scale=0.7)
    hidden = hidden.clone()
    hidden[6] = math.nan
    _, dhidden, dweight, dbias = run(hidden, weight, bias, indices, grad, softcap=softcap, scale=0.7)
    assert (dhidden[6] == 0).all()
    for a, b in zip((dhidden, dweight, dbias), clean[1:], strict=True):
        assert torch.equal(a, b)


def test_rows_nobody_chose_are_exactly_zero():
    hidden, weight, bias, indices, grad = problem(torch.bfloat16, v=130)
    _, _, dweight, dbias = run(hidden, weight, bias, indices, grad)
    untouched = torch.ones(130, dtype=torch.bool)
    untouched[indices[indices >= 0].cpu()] = False
    assert untouched.sum() > 3
    assert (dweight[untouched] == 0).all() and (dbias[untouched] == 0).all()
    assert (dweight[~untouched] != 0).any(dim=1).all()


# --- cost and order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal_and_write_no_input(dtype, monkeypatch):
    monkeypatch.setattr(kernel.tiles, "DWEIGHT_CHUNK", 16)
    inputs = problem(dtype, n=16)
    before = [x.clone() for x in inputs]
    first, second = (run(*inputs, softcap=2.5, scale=0.7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_frozen_head_pays_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the pairs of a frozen head were sorted")

    hidden, weight, bias, indices, grad = problem()
    wanted = run(hidden, weight, bias, indices, grad)
    monkeypatch.setattr(kernel, "SortedPairs", refuse)
    monkeypatch.setattr(torch, "sort", refuse)
    inputs = hidden, weight, bias, indices, grad
    _, dhidden, dweight, dbias = run(*inputs, need=Need(True))
    assert dweight is None and dbias is None
    assert torch.equal(dhidden, wanted[1])
    nothing = run(*inputs, need=Need(False))
    assert nothing[1:] == (None, None, None)


@pytest.mark.parametrize("only", Need._fields)
def test_each_gradient_alone(only):
    inputs = problem()
    every = run(*inputs, softcap=2.5, scale=0.7)
    need = Need(*[name == only for name in Need._fields])
    alone = run(*inputs, softcap=2.5, scale=0.7, need=need)
    for a, b, needed in zip(alone[1:], every[1:], need, strict=True):
        assert torch.equal(a, b) if needed else a is None


def test_softcap_near_saturation_keeps_its_gradient():
    """1 - (z / c)^2 of a logit within 1e-4 of the cap, in fp32, to the digits that z itself carries."""
    hidden = torch.full((1, 1), 4.9, device=DEVICE)
    weight, indices, grad = (torch.ones(1, 1, device=DEVICE) for _ in range(3))
    indices = indices.long() * 0
    values, dhidden, _, _ = run(hidden, weight, None, indices, grad, softcap=1.0, scale=1.0)
    z = values.double().item()
    assert dhidden.item() == pytest.approx((1 - z) * (1 + z), rel=1e-6)


# --- many ids: all logits ---------------------------------------------------------------------------------------


@BOTH
def test_which_way_runs(rows_or_logits, monkeypatch):
    """`logits` picks from products of at most so many tokens and never gathers; `rows` makes no product."""
    seen = []
    monkeypatch.setattr(kernel, "product", lambda a, b, out: seen.append(len(a)) or torch.mm(a, b, out=out))
    hidden, weight, bias, indices, _ = problem()
    linear_gather(hidden, LMHead(weight, bias, None, 1.0), indices)
    assert seen == ([8, 3] if rows_or_logits == "logits" else [])


BIG = 256 << 20


@pytest.mark.parametrize(
    ("n", "v", "k", "workspace", "wanted"),
    [
        (8192, 128256, 64, BIG, 0),  # DUET's own case
        (8192, 128256, 821, BIG, 0),
        (8192, 128256, 823, BIG, 512),  # V / 156, whole tiles of a product
        (8192, 32000, 1000, BIG, 2048),
        (400, 32000, 1000, BIG, 400),  # all tokens at once
        (8, 32000, 1000, BIG, 0),  # fewer rows than W has
        (8192, 128256, 1000, 64 << 20, 0),  # the logits of too few tokens fit
    ],
)
def test_the_crossover(n, v, k, workspace, wanted):
    tokens = gather_product_tokens(90, 2, 4, n, v, k, workspace)
    assert tokens == wanted and tokens * v * 4 <= workspace
