"""dW and db of a reduced loss are made before the upstream gradient is known, and multiplied by it in place, once."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

import pytest
import torch

from duet_kernels import linear_cross_entropy
from duet_kernels.ops.op import implementation
from duet_kernels.testing import OPS, check_upstream, make_problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("numel", [0, 1, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_times_upstream(impl, dtype, numel, monkeypatch):
    room = implementation(impl)
    if impl == "triton":
        tiles = pytest.importorskip("duet_kernels.triton.tiles")
        monkeypatch.setattr(tiles, "SCALE_BLOCK", 64)  # several rounds of three programs
        monkeypatch.setattr(tiles, "SCALE_PROGRAMS", 3)
    x = torch.randn(numel).to(dtype)
    for factor in (1.0, -0.37):
        upstream = torch.tensor(factor)
        y = x.clone()
        assert room.times_upstream(y, upstream, dtype) is y
        # The interpreter cuts a bf16 off where a GPU rounds it.
        cut = torch.finfo(dtype).eps if dtype == torch.bfloat16 and INTERPRETED else 0
        torch.testing.assert_close(y, (x.float() * factor).to(dtype), rtol=cut, atol=0)
        wide = x.float()
        narrow = room.times_upstream(wide, upstream, torch.float16)
        assert torch.equal(narrow, (x.float() * factor).half()) and torch.equal(wide, x.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_times_rows(impl, dtype, monkeypatch):
    room = implementation(impl)
    if impl == "triton":
        tiles = pytest.importorskip("duet_kernels.triton.tiles")
        monkeypatch.setattr(tiles, "SCALE_BLOCK", 32)  # two rounds, the last one not full
    x, rows = torch.randn(5, 37).to(dtype), torch.randn(5, 2)[:, 1]
    cut = torch.finfo(dtype).eps if dtype == torch.bfloat16 and INTERPRETED else 0
    for factor, each in (
        (torch.tensor(-0.37), -0.37),
        (rows, rows[:, None]),
        (torch.tensor(2.0).expand(5), 2.0),
    ):
        wide = room.times_rows(x.float(), factor, torch.float32)
        torch.testing.assert_close(wide, x.float() * each, rtol=1e-7, atol=0)
        torch.testing.assert_close(
            room.times_rows(x, factor, dtype), (x.float() * each).to(dtype), rtol=cut, atol=0
        )
    assert room.times_rows(x[:0], rows[:0], dtype).shape == (0, 37)


def test_a_factor_of_one_writes_nothing(monkeypatch):
    """A kernel that looks at the number first, and torch on a CPU that does not multiply."""
    for impl in ("chunked", "triton"):
        x = torch.randn(100)
        before = x._version
        implementation(impl).times_upstream(x, torch.ones(()), torch.float32)
        assert x._version == before


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_the_forward_pass_made_the_memory_of_grad(impl):
    """One dW: what autograd makes the leaf's `grad` is what the forward pass wrote."""
    case = make_problem(7, 43, 11, bias=True)
    case = case.requiring(case.leaves)
    loss = linear_cross_entropy(case.hidden, case.head, case.labels, impl=impl)
    made = loss.grad_fn.saved_tensors[1].data_ptr()
    (3 * loss).backward()
    assert case.weight.grad.data_ptr() == made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_every_pass_over_a_retained_graph(impl, dtype):
    (op,) = (op for op in OPS if op.name == "cross-entropy")
    check_upstream(op, make_problem(5, 31, 11, dtype=dtype, bias=True), impl)


def test_a_pass_that_writes_what_it_gave_away_is_found(monkeypatch):
    """The check sees what it is for: a later pass that scales the same memory once more."""
    (op,) = (op for op in OPS if op.name == "cross-entropy")
    from duet_kernels.ops import losses

    gradient = losses._gradient

    def careless(ctx, *rest):
        ctx.given_away = False
        return gradient(ctx, *rest)

    monkeypatch.setattr(losses, "_gradient", careless)
    with pytest.raises(AssertionError, match=r"wrote into|second pass"):
        check_upstream(op, make_problem(7, 43, 11), "chunked")


def test_a_compiled_backward_pass_writes_nothing_in_place():
    case = make_problem(7, 43, 11, bias=True)
    results = []
    for compiled in (False, True):
        leaves = case.requiring(case.leaves)

        def loss(hidden, weight, bias, leaves=leaves):
            head = type(leaves.head)(weight, bias)
            return 3 * linear_cross_entropy(hidden, head, leaves.labels, impl="chunked")

        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        value = run(leaves.hidden, leaves.weight, leaves.bias)
        value.backward(retain_graph=True)
        value.backward()
        results.append([leaves.hidden.grad, leaves.weight.grad, leaves.bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
