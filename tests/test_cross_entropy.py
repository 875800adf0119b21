"""linear_cross_entropy's two ways in `chunked`: which one runs, what it multiplies, and the digits it keeps."""

from math import exp, log1p

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from duet_kernels import LMHead, linear_cross_entropy, set_workspace_bytes
from duet_kernels.head import Need
from duet_kernels.portable import cuts, dense
from duet_kernels.testing import assert_within_budget, gradients, make_problem

N, V, D = 300, 530, 24
BOTH = pytest.mark.parametrize("way", ["rows", "tiles"])


@pytest.fixture
def by(monkeypatch):
    """Forces one way by what counts as enough rows."""
    return lambda way: monkeypatch.setattr(cuts, "ENOUGH_ROWS", 1 if way == "rows" else 10**9)


class Products(TorchDispatchMode):
    """FLOP of all products, in units of one N x D x V product."""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[:2] if name == "aten::mm" else args[1:3]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out

    @property
    def products(self):
        return self.flop / (2 * N * D * V)


def _call(problem, *need, factor=None):
    factor = torch.full((N,), 1 / N) if factor is None else factor
    head = LMHead(problem.weight, problem.bias, problem.softcap, problem.scale)
    return dense.linear_cross_entropy(problem.hidden, head, problem.labels, factor, Need(*need))


@pytest.mark.parametrize(
    "need, dtype, products",
    [
        ((False, False, False), torch.float32, 1),
        ((True, False, False), torch.float32, 2),
        ((True, True, True), torch.float32, 3),
        ((False, True, False), torch.float32, 2),
        ((True, True, True), torch.bfloat16, 4),  # no dW in fp32 beside the half one
    ],
)
def test_how_often_it_multiplies(need, dtype, products):
    with Products() as mode:
        _call(make_problem(N, V, D, dtype=dtype, bias=True), *need)
    assert mode.products == pytest.approx(products)


def test_rows_that_do_not_fit_take_tiles():
    """The smallest workspace holds 14 rows of this vocabulary: four products, each of whose tiles is read once."""
    problem = make_problem(N, 18000, 4)
    previous = set_workspace_bytes(2**20)
    try:
        with Products() as mode:
            _call(problem, True, True, False)
    finally:
        set_workspace_bytes(previous)
    assert mode.flop == 4 * 2 * N * 4 * 18000


@BOTH
@pytest.mark.parametrize(
    "head",
    [{}, {"softcap": 20.0}, {"scale": -0.7}, {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}],
    ids=["plain", "softcap", "scale", "full"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_ways_against_the_definition(by, way, head, dtype, reduction):
    by(way)
    problem = make_problem(N, V, D, dtype=dtype, **head)
    labels = problem.labels.masked_fill(torch.arange(N) % 7 == 3, -100)
    results = []
    for case, impl in (
        (problem.to(torch.float64), "reference"),
        (problem, "reference"),
        (problem, "chunked"),
    ):
        case = case.requiring(case.leaves)
        loss = linear_cross_entropy(case.hidden, case.head, labels, reduction=reduction, impl=impl)
        upstream = torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(loss.dtype)
        results.append({"loss": loss.detach(), **gradients(loss, case, upstream)})
    for name in results[0]:
        truth, baseline, got = (result[name] for result in results)
        assert_within_budget(got, truth, baseline, name=f"{way} {name}")


@BOTH
def test_an_almost_certain_token_keeps_its_digits(by, way):
    """Losses from 1e-3 to 1e-30: q_label - 1 would be 0 in fp32 for most of them, and so would their gradients."""
    by(way)
    gaps = torch.linspace(7, 69, N)
    hidden = gaps[:, None].clone().requires_grad_()
    weight = torch.zeros(V, 1)
    weight[11] = 1.0
    weight.requires_grad_()
    bias = torch.linspace(-1, 1, V)
    bias[11] = 0.0
    bias.requires_grad_()
    loss = linear_cross_entropy(hidden, LMHead(weight, bias), torch.full((N,), 11), reduction="sum")
    got = loss, *torch.autograd.grad(loss, (hidden, weight, bias))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    z = exact[0] @ exact[1].T + exact[2]
    others = torch.cat([z[:, :11], z[:, 12:]], 1).logsumexp(1)
    truth = torch.nn.functional.softplus(others - z[:, 11], threshold=700).sum()
    wanted = truth, *torch.autograd.grad(truth, exact)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=0)


@BOTH
def test_a_loss_of_22_nats_has_the_digits_of_fp64(by, way):
    by(way)
    hidden = torch.tensor([[0.0, 22.0]], dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2, dtype=torch.float64), torch.tensor([0]))
    assert loss.item() == pytest.approx(22 + log1p(exp(-22)), rel=2e-16, abs=0)


@BOTH
def test_special_rows(by, way):
    """A NaN row, a label of probability 0, a label that is the only id left, and an unknown label."""
    by(way)
    bias = torch.zeros(V)
    bias[3] = -torch.inf
    problem = make_problem(N, V, D)
    hidden = problem.hidden.clone()
    hidden[2, 0] = torch.nan
    labels = problem.labels.clone()
    labels[labels == 3] = 4
    labels[7] = 3
    alone = torch.full((V,), -torch.inf)
    alone[5] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # ids are not looked at, as on a GPU
        labels[9] = V
        leaf = hidden.requires_grad_()
        weight = problem.weight.clone().requires_grad_()
        rows = linear_cross_entropy(leaf, LMHead(weight, bias), labels, reduction="none")
        (dhidden,) = torch.autograd.grad(rows.sum(), leaf)
        certain = linear_cross_entropy(
            leaf[10:], LMHead(weight, alone), torch.full((N - 10,), 5), reduction="sum"
        )
        (nothing,) = torch.autograd.grad(certain, leaf)
    assert torch.equal(rows.isnan().nonzero()[:, 0], torch.tensor([2, 9]))
    assert rows[7] == torch.inf and rows.isinf().sum() == 1
    others = torch.ones(N, dtype=torch.bool)
    others[[2, 7, 9]] = False
    assert bool(dhidden[others].isfinite().all())
    assert certain == 0 and bool((nothing == 0).all())
