"""The kernels of the dense family find elements more than 2^31 in: rows of logits, of dz, of ids and of factors."""

import math

import pytest
import torch

pytest.importorskip("triton")

from dense_walks import few_programs

from duet_kernels import LMHead
from duet_kernels.options import DIVERGENCES, Divergence
from duet_kernels.triton import complement, dense, divergence, tiles
from duet_kernels.triton.primitives import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
ROWS, V = 3, 16
FAR = 2**30 + 64  # from one row to the next


@pytest.fixture(autouse=True)
def tiles_of_few_columns(monkeypatch):
    few_programs(monkeypatch)
    for name in ("SLAB_COLUMNS", "DENSE_FOLD_COLUMNS", "TERMS_COLUMNS"):
        monkeypatch.setattr(tiles, name, {4: V, 8: V})
    monkeypatch.setattr(tiles, "SLAB_ROWS", 1)


@pytest.fixture
def far(tmp_path):
    """The same matrix or vector with rows that lie far apart; what is not touched takes neither memory nor disk."""

    def spread(values):
        width = values.shape[1] if values.dim() > 1 else 1
        size, dtype = (ROWS - 1) * FAR + width, values.dtype
        if INTERPRETED:  # a file without contents
            path = tmp_path / str(len(list(tmp_path.iterdir())))
            with open(path, "wb") as file:
                file.truncate(size * dtype.itemsize)
            storage = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        else:
            storage = torch.empty(size, dtype=dtype, device=DEVICE)
        return storage.as_strided(values.shape, (FAR, 1)[: values.dim()]).copy_(values)

    return spread


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, V, generator=generator).to(DEVICE)


@pytest.fixture
def side():
    return torch.ones(ROWS, 4, device=DEVICE), LMHead(torch.ones(V, 4, device=DEVICE))


FACTOR = [1.0, -0.5, 2.0]


def block(*sides):
    return dense.Block(slice(0, ROWS), slice(0, V), list(sides))


def test_log_sum_exps(side, far):
    z, ids = logits(0), torch.tensor([[1, 5], [0, 0], [15, 3]], device=DEVICE)
    factor = torch.tensor(FACTOR, device=DEVICE)
    loss = complement._Complement(*side, far(ids), far(factor))
    dz = far(torch.zeros(ROWS, V, device=DEVICE))
    walk = block(far(z))
    loss._fold(walk)
    rest = z.scatter(1, ids, -math.inf)
    torch.testing.assert_close(loss.values, z.gather(1, ids))
    torch.testing.assert_close(loss.sums[2], rest.logsumexp(1))
    loss.gradient(walk, dz, None, True)
    torch.testing.assert_close(dz, rest.softmax(1) * factor[:, None], rtol=1e-5, atol=1e-6)
    loss.upstream = torch.arange(6.0, device=DEVICE).view(3, 2)
    loss.gradient(walk, dz, None, True)
    assert dz.gather(1, ids).tolist() == [[0, 1], [5, 5], [4, 5]]


def test_labels(side, far):
    z, labels = logits(1), torch.tensor([[1], [15], [7]], device=DEVICE)
    loss = complement._CrossEntropy(*side, far(labels), far(torch.tensor(FACTOR, device=DEVICE)))
    loss._fold(block(far(z)))
    loss.settle(slice(0, ROWS))
    wanted = torch.nn.functional.cross_entropy(z, labels[:, 0], reduction="none")
    torch.testing.assert_close(loss.loss, wanted * torch.tensor(FACTOR, device=DEVICE))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name, side, far):
    s, t, factor = logits(2), logits(3), torch.tensor(FACTOR, device=DEVICE)
    spec = Divergence(name, "renormalize" if DIVERGENCES[name].normalizations else "none", 1.0, 0.5, 1.0)
    results = []
    for place in (far, lambda x: x):
        loss = divergence._Divergence(dense.Side(*side), dense.Side(*side), place(factor), spec, True)
        dz, walk = place(torch.zeros(ROWS, V, device=DEVICE)), block(place(s), place(t))
        for fold in loss.folds:
            fold(walk)
        loss.gradient(walk, dz, None, True)
        results.append((loss.values(), dz))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert results[0][1][2].abs().sum() > 0


def test_softcaps(side, far):
    z = logits(4)
    there = far(z)
    dense.finish_in_place(dense.Side(side[0], LMHead(side[1].weight, softcap=2.0)), there, 0)
    torch.testing.assert_close(there, 2 * torch.tanh(z / 2))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would touch every element")
def test_the_upstream_gradient_of_a_large_dweight():
    x = torch.ones(2**31 + 5000, dtype=torch.float16, device=DEVICE)
    dense.times_upstream(x, torch.full((), 2.0, device=DEVICE), torch.float16)
    assert bool((x[-5000:] == 2).all()) and bool((x[:5000] == 2).all())
