"""linear_topk's ways through the vocabulary in `chunked`: each is taken, and each is exact where selection is delicate."""

import pytest
import torch

from duet_kernels import linear_topk, set_workspace_bytes
from duet_kernels.portable import cuts, topk
from tests.test_memory import _peak_bytes

N, V = 9, 5000
WAYS = ("rows", "tiles", "few rows", "blocks")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Whole rows, tiles with a threshold, a few rows at a time, and the best blocks of rows that a GPU takes."""
    taken = []

    def spy(name):
        good = getattr(topk, name)
        monkeypatch.setattr(topk, name, lambda *args: taken.append(name) or good(*args))

    if request.param != "rows":
        monkeypatch.setattr(cuts, "TILE_BYTES", 2 * 700 * 4)
    if request.param == "few rows":
        monkeypatch.setattr(cuts, "ENOUGH_ROWS", 1)
        monkeypatch.setattr(topk, "_MANY_CANDIDATES", V)
    if request.param == "blocks":
        monkeypatch.setattr(cuts, "asynchronous", lambda device: True)
    expected = {"tiles": "_topk_by_tiles", "blocks": "_topk_by_blocks"}.get(request.param, "_topk_of_rows")
    spy("_topk_of_rows"), spy("_topk_by_tiles"), spy("_topk_by_blocks")
    yield request.param
    assert set(taken) == {expected} and (len(taken) > 1) >= (request.param == "few rows")


def _check(z, k, temperature=1.0):
    """Every row of z as the head of two tokens, against a stable sort and the log-sum-exp of what it leaves."""
    order = torch.sort(z, dim=1, descending=True, stable=True)
    tails = (order.values[:, k:].double() / temperature).logsumexp(1).to(z.dtype)
    hidden = torch.ones(2, 1, dtype=z.dtype)
    for row, values, ids, tail in zip(z, order.values, order.indices, tails, strict=True):
        got = linear_topk(hidden, row[:, None], k, temperature=temperature, impl="chunked")
        torch.testing.assert_close(got.values, values[:k].expand(2, k), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.indices, ids[:k].expand(2, k))
        torch.testing.assert_close(got.tail_logsumexp, tail.expand(2), rtol=2e-6, atol=2e-6, equal_nan=True)


def _random(dtype=torch.float32, std=3.0):
    return std * torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    "k, dtype",
    [*((k, torch.float32) for k in (1, 7, 64, 500, 2500, V)), (7, torch.float64), (500, torch.float64)],
    ids=str,
)
def test_random_rows(way, k, dtype):
    _check(_random(dtype), k, temperature=0.7)


@pytest.mark.parametrize(
    "levels, k, dtype",
    [
        *((levels, k, torch.float32) for levels in (1, 2, 40) for k in (1, 7, 64, 500)),
        (2, 7, torch.float64),
        (40, 500, torch.float64),
    ],
    ids=str,
)
def test_equals(way, k, levels, dtype):
    """The k-th largest has equals in the same group, in other groups, in other tiles; some rows have none."""
    z = (_random(dtype) * levels).round() / levels
    z[3] = 0.0
    z[4, ::2] = -0.0
    z[5] = _random(dtype)[5]
    _check(z, k)


@pytest.mark.parametrize("k", [1, 7, 64, 500])
def test_few_ids_that_count(way, k):
    """Fewer logits above -inf than k: the lowest of the others fill up, and no column beyond the vocabulary does."""
    z = _random()
    z[:, k // 2 :] = -torch.inf
    z[0] = -torch.inf
    z[1, -3:] = 1.0
    _check(z, k)


@pytest.mark.parametrize("k", [1, 7, 64])
def test_infinities_and_nan(way, k):
    z = _random()
    z[0, 17] = torch.nan
    z[1, [3, V - 1]] = torch.nan
    z[2, 100 : 100 + k] = torch.inf
    z[3] = torch.nan
    z[4, -2:] = torch.inf
    z[5, V - 2] = torch.nan
    _check(z, k)


def test_a_nan_in_one_row_changes_no_other(way):
    z = _random()
    weight = torch.cat([z.T, torch.zeros(V, 1)], 1)
    hidden = torch.eye(N, N + 1)
    clean = linear_topk(hidden, weight, 7)
    hidden[2, N] = torch.nan
    dirty = linear_topk(hidden, weight, 7)
    others = torch.arange(N) != 2
    for a, b in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(a[others], b[others])
    assert bool(dirty.values[2].isnan().all()) and bool(dirty.tail_logsumexp[2].isnan())


def test_zeros_where_denormals_are_flushed(way):
    """The threshold is compared as it is; a number just below 0 would be 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        _check(torch.zeros(N, V), 7)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("k", [8, 200])
@pytest.mark.parametrize("logits", ["equal", "ascending"])
def test_the_worst_rows_stay_in_the_workspace(logits, k):
    """All equal, or better with every tile: everything survives the threshold of the first tile, or of every one."""
    v = 65536
    weight = torch.zeros(v, 1) if logits == "equal" else torch.arange(v)[:, None] / 64
    previous = set_workspace_bytes(8 * 2**20)
    try:
        peak = _peak_bytes(lambda: linear_topk(torch.ones(64, 1), weight, k))
    finally:
        set_workspace_bytes(previous)
    assert peak <= 8 * 2**20 + 64 * k * 64
