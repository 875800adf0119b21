"""linear_topk's kernels against a stable sort of full logits, judged in fp64 on the rounded inputs."""

import math

import pytest
import torch
from far_programs import FarPrograms

pytest.importorskip("triton")

from duet_kernels import LMHead
from duet_kernels.triton import slabs
from duet_kernels.triton import topk as kernel
from duet_kernels.triton.primitives import INTERPRETED
from duet_kernels.triton.topk import Plan, linear_topk, plan, token_elements

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, D, K = 37, 203, 45, 7
# One slab and several, both products, a last block that is not full, a block of tokens left over.
CUTS = [Plan(N, V, 16, True), Plan(N, V, 16, False), Plan(N, 80, 16, True), Plan(24, 112, 16, False)]
BOTH = [CUTS[0], Plan(N, 112, 16, False)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def many_tokens_a_program(monkeypatch):
    """The interpreter runs programs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(kernel.tiles, "SELECT_ELEMENTS", 2**14)
        monkeypatch.setattr(kernel.tiles, "FOLD_ROWS", 2**7)


def problem(dtype=torch.float32, *, n=N, v=V, d=D, seed=0):
    """(hidden, weight, bias)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (v, d), (v,))
    )
    weight *= 2 / math.sqrt(max(d, 1))
    return [x.to(dtype).to(DEVICE) for x in (hidden, weight, bias)]


def logits(hidden, weight, bias, *, softcap=None, scale=1.0, acc=torch.float64):
    x = scale * (hidden.to(acc) @ weight.to(acc).T + (0 if bias is None else bias.to(acc)))
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def expected(z, k, temperature=1.0):
    """(values, ids, tail) of full logits, equal ones by lowest id."""
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    tail = torch.logsumexp(z.gather(1, order[:, k:]) / temperature, 1)
    return z.gather(1, order[:, :k]), order[:, :k], tail


def run(hidden, weight, bias, k=K, *, softcap=None, scale=1.0, temperature=1.0, cut=None):
    return linear_topk(hidden, LMHead(weight, bias, softcap, scale), k, temperature, cut=cut)


def check(got, wanted, tolerance=1e-12):
    assert torch.equal(got[1], wanted[1])
    for a, b in ((got[0], wanted[0]), (got[2], wanted[2])):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def one_hot_problem(z, dtype=torch.float32):
    """hidden and weight whose product is exactly z: `[N, V]` numbers that dtype holds."""
    return torch.eye(z.shape[0], dtype=dtype, device=DEVICE), z.T.to(dtype).to(DEVICE)


# --- values, ids and tail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("softcap", "scale", "with_bias", "cut"),
    [(None, 1.0, False, CUTS[1]), (2.5, 0.7, True, CUTS[2]), (2.5, 1.0, False, CUTS[3])]
    + [options for cut in BOTH for options in ((None, -0.7, True, cut), (2.5, 0.7, False, cut))]
    + [(9.0, 0.7, True, CUTS[3])],
    ids=str,
)
def test_fp64_equals_a_stable_sort(softcap, scale, with_bias, cut):
    hidden, weight, bias = problem(torch.float64)
    bias = bias if with_bias else None
    z = logits(hidden, weight, bias, softcap=softcap, scale=scale)
    got = run(hidden, weight, bias, softcap=softcap, scale=scale, temperature=1.7, cut=cut)
    assert [x.dtype for x in got] == [torch.float64, torch.int64, torch.float64]
    check(got, expected(z, K, 1.7))


@pytest.mark.parametrize(
    "dtype, cut, options",  # every pair of the three
    [
        (dtype, cut, ({"softcap": 20.0}, {"softcap": 9.0, "scale": 0.7})[(i + j) % 2])
        for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
        for j, cut in enumerate(CUTS[1:3])
    ],
    ids=str,
)
def test_error_budget(dtype, cut, options):
    """Values and tail as close to fp64 as fp32 logits of torch are; ids that a rounding cannot explain are errors."""
    hidden, weight, bias = problem(dtype)
    truth = logits(hidden, weight, bias, **options)
    values, indices, tail = run(hidden, weight, bias, **options, cut=cut)
    assert values.dtype == tail.dtype == torch.float32
    baseline = logits(hidden, weight, bias, **options, acc=torch.float32)
    error = (baseline - truth).square().mean().sqrt()
    assert (values - truth.gather(1, indices)).square().mean().sqrt() <= 2 * error + 4e-7 * truth.abs().max()
    best = expected(truth, K)
    torch.testing.assert_close(values.double(), best[0], rtol=0, atol=1e-4)
    assert all(len(set(row)) == K for row in indices.tolist())
    rest = torch.logsumexp(truth.scatter(1, indices, -math.inf), 1)
    torch.testing.assert_close(tail.double(), rest, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cut", BOTH, ids=str)
@pytest.mark.parametrize("k", [1, 40, V])
def test_every_k(k, cut):
    hidden, weight, bias = problem()
    got = run(hidden, weight, bias, k, cut=cut)
    z = logits(hidden, weight, bias)
    wanted = expected(z, k)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2].double(), wanted[2], rtol=1e-5, atol=1e-5)
    if k == V:
        assert (got[2] == -math.inf).all() and torch.equal(got[1].sort(1).values[0].cpu(), torch.arange(V))


@pytest.mark.parametrize(
    ("n", "v", "d", "k"), [(1, 1, 1, 1), (1, 300, 20, 5), (2, 17, 33, 17), (5, 129, 64, 3), (3, 40, 0, 4)]
)
def test_shapes(n, v, d, k):
    hidden, weight, bias = problem(torch.float64, n=n, v=v, d=d)
    for cut in (None, Plan(n, 160, 16, False)):
        check(run(hidden, weight, bias, k, cut=cut), expected(logits(hidden, weight, bias), k))


def test_no_tokens():
    hidden, weight, bias = problem(n=0)
    values, indices, tail = run(hidden, weight, bias)
    assert values.shape == indices.shape == (0, K) and tail.shape == (0,)


@pytest.mark.parametrize("cut", BOTH, ids=str)
def test_any_strides(cut):
    hidden, weight, bias = problem(torch.float64)
    wanted = expected(logits(hidden, weight, bias), K)
    padded = torch.full((V + 9, D + 3), math.nan, dtype=torch.float64, device=DEVICE)
    padded[:V, :D] = weight
    wide = torch.stack([hidden, hidden + 1], -1)[..., 0]
    for w in (padded[:V, :D], weight.T.contiguous().T):
        check(run(wide, w, torch.stack([bias, bias], -1)[:, 0], cut=cut), wanted)


# --- addresses -------------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU would have to hold the memory: benchmarks.gpu does"
)


@pytest.mark.parametrize("skinny", [True, False])
def test_offsets_beyond_32_bits(skinny):
    """Rows of W, and entries of the bias, that lie more than 2^31 elements in; untouched memory is never mapped."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 8, dtype=torch.float16, device=DEVICE)
    weight, bias = storage.as_strided((3, 8), (stride, 1)), storage.as_strided((3,), (stride,), 7)
    weight.copy_(torch.arange(24).reshape(3, 8))
    hidden = storage.as_strided((3, 8), (stride, 1))
    cut = Plan(3, 3, 16, skinny)
    values, indices, tail = run(hidden, weight, bias, 2, cut=cut)
    z = logits(hidden, weight, bias).double()
    torch.testing.assert_close(values.double(), expected(z, 2)[0])
    assert torch.equal(indices, expected(z, 2)[1]) and torch.equal(tail.double(), expected(z, 2)[2])


@interpreted
def test_blocks_beyond_32_bits(monkeypatch, tmp_path):
    """The last blocks of a slab of more than 2^31 logits."""
    far = FarPrograms(monkeypatch, tmp_path)
    memory = far.memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    block, j, pairs = 64, 3, 3 * 2**24
    z, top, total = (
        memory(pairs * block, torch.float32),
        memory(pairs, torch.int32),
        memory(pairs, torch.float32),
    )
    rows = torch.randn(4, block)
    z[-4 * block :] = rows.flatten()
    bias = torch.arange(j * block, dtype=torch.float32) / 8
    far.start(pairs // 4 - 1)
    kernel._fold_kernel[(1,)](
        z, bias, top, total, pairs, 0, j * block, j, 1, 0.0, 1.0, 1.0,
        HAS_SOFTCAP=False, RAGGED=False, ACC=kernel.tl.float32, BLOCKS=4, BLOCK=block, PIECE=32,
    )  # fmt: skip
    rows += bias.view(j, block)[[2, 0, 1, 2]]
    sums = (rows - rows.amax(1, keepdim=True)).exp().sum(1)
    torch.testing.assert_close(total[-4:], sums)
    assert torch.equal(top[-4:].view(torch.float32), rows.amax(1))


@interpreted
def test_tokens_beyond_32_bits(monkeypatch, tmp_path):
    """A token whose logits, candidates and results lie beyond 2^31 elements."""
    far = FarPrograms(monkeypatch, tmp_path)
    memory = far.memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    n, k = 2**25 + 4, 64
    token = torch.randn(k)
    z, value, out = (
        memory(n * k, torch.float32),
        memory(n * 2 * k, torch.float32),
        memory(n * k, torch.float32),
    )
    ids, index = memory(n * 2 * k, torch.int32), memory(n * k, torch.int64)
    top, total, chosen, count = (memory(n, torch.int32) for _ in range(4))
    rest_max, rest_sum, tail = (memory(n, torch.float32) for _ in range(3))
    z[-k:] = token
    top[-1] = token.max().view(torch.int32)
    far.start(n - 1)
    kernel._select_kernel[(1,)](
        z, None, top, total.view(torch.float32), chosen, value, ids, count, rest_max, rest_sum, out, index, tail,
        n, k, 0, k, 1, k, 1, 2 * k, 0, 1.0, 1.0,
        FINISHED=False, INT=kernel.tl.int32, ACC=kernel.tl.float32,
        ROWS=1, BLOCKS=2, KNOWN=1, HELD=64, COLUMNS=64, BLOCK=k, RANKED=32, COMPARED=32,
    )  # fmt: skip
    wanted = token.sort(descending=True)
    assert torch.equal(out[-k:], wanted.values) and torch.equal(index[-k:], wanted.indices)
    assert tail[-1] == -math.inf


# --- ties and orders that are the worst case -------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_ties_and_worst_orders(cut):
    """Quantised, equal, ascending, descending, two values, signed zeros: some tokens of each, side by side."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(N, V, generator=generator)
    ramp = torch.arange(V, dtype=torch.float32).expand(N, V) / 8
    kinds = [
        noise.mul(2).round() / 2,
        torch.full((N, V), 1.25),
        ramp,
        -ramp,
        (noise > 1.9).float(),
        torch.where(noise > 0, -0.0, 0.0),
    ]
    z = torch.stack(kinds)[torch.arange(N) % len(kinds), torch.arange(N)]
    hidden, weight = one_hot_problem(z)
    values, indices, tail = run(hidden, weight, None, temperature=0.5, cut=cut)
    wanted = expected(z.double().to(DEVICE), K, 0.5)
    assert torch.equal(indices, wanted[1]) and torch.equal(values.double(), wanted[0])
    torch.testing.assert_close(tail.double(), wanted[2], rtol=1e-6, atol=1e-6)


def test_ties_that_a_softcap_makes():
    """Logits that saturate to the same number are equal, whatever the product was."""
    z = torch.linspace(50, 90, V).expand(3, V).contiguous()
    hidden, weight = one_hot_problem(z)
    for cut in (Plan(3, V, 16, True), Plan(3, 80, 16, False)):
        values, indices, tail = run(hidden, weight, None, softcap=2.0, cut=cut)
        assert (values == 2.0).all() and torch.equal(indices.cpu(), torch.arange(K).expand(3, K))
        torch.testing.assert_close(tail.cpu(), torch.full((3,), 2 + math.log(V - K)))


@pytest.mark.parametrize("cut", [Plan(3, V, 16, False), Plan(3, 112, 16, True)], ids=str)
def test_lists_longer_than_a_program_holds(cut, monkeypatch):
    """Candidates, elements and ranks in several steps of a program, one token each, with ties across the steps."""
    monkeypatch.setattr(kernel.tiles, "SELECT_ELEMENTS", 1)
    monkeypatch.setattr(kernel.tiles, "SELECT_COLUMNS", 64)
    monkeypatch.setattr(kernel.tiles, "SELECT_HELD", 32)
    monkeypatch.setattr(kernel.tiles, "SELECT_RANKED", 32)
    monkeypatch.setattr(kernel.tiles, "SELECT_COMPARED", 16)
    monkeypatch.setattr(kernel.tiles, "FOLD_ROWS", 1)
    z = torch.randn(3, V, generator=torch.Generator().manual_seed(3)).mul(2).round() / 2
    z[1], z[2] = 1.25, torch.arange(V) / 8
    hidden, weight = one_hot_problem(z)
    values, indices, tail = run(hidden, weight, None, 40, cut=cut)
    wanted = expected(z.double().to(DEVICE), 40)
    assert torch.equal(indices, wanted[1]) and torch.equal(values.double(), wanted[0])
    torch.testing.assert_close(tail.double(), wanted[2], rtol=1e-6, atol=1e-6)


# --- what is not a number --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", BOTH, ids=str)
def test_nan_stays_in_its_row(cut):
    hidden, weight, bias = problem()
    clean = run(hidden, weight, bias, cut=cut)
    hidden = hidden.clone()
    hidden[6] = math.nan
    values, indices, tail = run(hidden, weight, bias, cut=cut)
    assert values[6].isnan().all() and tail[6].isnan() and torch.equal(indices[6].cpu(), torch.arange(K))
    others = torch.arange(N) != 6
    for a, b in zip((values, indices, tail), clean, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("cut", BOTH, ids=str)
def test_a_nan_logit_stands_first(cut):
    hidden, weight, bias = problem(torch.float64)
    bias[150] = math.nan
    values, indices, tail = run(hidden, weight, bias, cut=cut)
    assert (indices[:, 0] == 150).all() and values[:, 0].isnan().all() and tail.isfinite().all()
    bias[:] = 0
    bias[100:] = math.nan
    values, indices, tail = run(hidden, weight, bias, cut=cut)
    assert torch.equal(indices.cpu(), torch.arange(100, 100 + K).expand(N, K)) and tail.isnan().all()


@pytest.mark.parametrize("cut", BOTH, ids=str)
@pytest.mark.parametrize("finite", [0, 3])
def test_logits_of_minus_infinity(finite, cut):
    """Banned ids stand last, by lowest id, and weigh nothing; a row of nothing else has a tail of -inf."""
    hidden, weight, bias = problem(torch.float64)
    bias = torch.where(torch.arange(V, device=DEVICE) % (V // max(finite, 1)) == 0, bias, -math.inf)
    if not finite:
        bias[:] = -math.inf
    check(run(hidden, weight, bias, cut=cut), expected(logits(hidden, weight, bias), K))


def test_infinite_logits_are_selected_and_leave_no_trace():
    hidden, weight, bias = problem(torch.float64)
    bias[[5, 160]] = math.inf
    for cut in BOTH:
        values, indices, tail = run(hidden, weight, bias, cut=cut)
        assert torch.equal(indices[:, :2].cpu(), torch.tensor([5, 160]).expand(N, 2))
        assert (values[:, :2] == math.inf).all() and tail.isfinite().all()
        assert (run(hidden, weight, bias, 1, cut=cut)[2] == math.inf).all()


@pytest.mark.parametrize("far", [5e-7, 1e-200])
def test_a_tail_too_small_to_be_a_difference(far):
    """Mass 5e-7 outside the ids: 1 - sum(p) has no digit of it in fp32; and one that has no exponential there."""
    z = torch.full((4, V), -14.5)
    z[:, 3::40] = torch.linspace(0.5, 5, 5) - math.log(far / 5e-7)
    z += math.log(far) + 3
    hidden, weight = one_hot_problem(z)
    for cut, k in ((Plan(4, V, 16, True), 5), (Plan(4, V, 16, True), 6), (Plan(4, 80, 16, False), 5)):
        tail = run(hidden, weight, None, k, cut=cut)[2]
        wanted = expected(weight.T.double(), k)[2]
        torch.testing.assert_close(tail.double(), wanted, rtol=1e-6, atol=1e-6)


# --- cost and order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", BOTH, ids=str)
def test_two_runs_are_bitwise_equal(cut):
    inputs = problem(torch.bfloat16)
    first, second = (run(*inputs, softcap=2.5, cut=cut) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("megabytes", [1, 64, 256, 1024, 2200, 3072])
def test_plans_keep_the_workspace(megabytes):
    budget = megabytes << 20
    for n in (1, 16, 64, 65, 1024, 8192, 32768):
        for v in (203, 32000, 50257, 128256, 262144):
            for k in (1, 8, 64, 128, 512, 1000):
                if k <= v:
                    cut = plan(n, v, k, 4, budget)
                    assert cut.tokens * 4 * sum(token_elements(cut.columns, k, cut.block)) <= budget
                    assert 1 <= cut.tokens <= n and 1 <= cut.columns <= v
                    assert cut.columns == v or cut.columns % cut.block == 0
                    assert cut.columns <= kernel.tiles.CHOOSE_ELEMENTS * cut.block
                    assert not cut.skinny or cut.tokens <= kernel.tiles.TOPK_SKINNY_TOKENS


@pytest.mark.parametrize(
    ("megabytes", "tokens", "slabs"), [(256, 1408, 3), (1024, 4096, 2), (2200, 8192, 2), (4500, 8192, 1)]
)
def test_products_of_many_tokens(megabytes, tokens, slabs):
    """The anchor: W is read a few times, not once for every few hundred tokens."""
    cut = plan(8192, 128256, 64, 4, megabytes << 20)
    assert (cut.tokens, -(-128256 // cut.columns)) == (tokens, slabs)


def test_one_allocation_that_token_elements_count(monkeypatch):
    """Beside the outputs there is one `torch.empty`, of what the plan counts."""
    hidden, weight, bias = problem(n=20)
    allocated = []
    for name in ("empty", "full", "empty_like", "zeros"):
        make = getattr(torch, name)

        def record(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            allocated.append(x.numel() * x.element_size())
            return x

        monkeypatch.setattr(torch, name, record)
    linear_topk(hidden, LMHead(weight, bias), K, 1.0, cut=Plan(20, 96, 16, False))
    outputs = [20 * K * 4, 20 * K * 8, 20 * 4]
    assert allocated[:3] == outputs
    (scratch,) = allocated[3:]
    assert 0 <= scratch - 20 * 4 * sum(token_elements(96, K, 16)) <= 9 * slabs.ALIGNED * 4


def test_inputs_are_not_written():
    inputs = problem()
    before = [x.clone() for x in inputs]
    run(*inputs, softcap=2.5, cut=CUTS[3])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
