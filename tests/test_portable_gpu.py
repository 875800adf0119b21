"""`chunked` as it runs on a GPU, on CPU tensors: the definition's numbers, no look at a value, halves as they are.

`as_on_a_gpu` (conftest) flips the two functions that know the device.
"""

import contextlib
import math
import weakref

import pytest
import torch
from settings import WAYS, checks_in
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duet_kernels import (
    LMHead,
    TopK,
    dispatch,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    portable,
    products,
    set_workspace_bytes,
    topk_distill_loss,
)
from duet_kernels.options import DIVERGENCES
from duet_kernels.portable import cuts, gather
from duet_kernels.testing import (
    OPS,
    assert_within_budget,
    check_masked_rows,
    judge,
    make_problem,
)

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

FULL = {"bias": True, "softcap": 20.0, "scale": 1.3, "pad": 5}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("setting", range(3), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_contract(op, setting):
    """A full head where products differ from those on a CPU: fp32 has one in `test_in_many_pieces`."""
    problem = make_problem(dtype=DTYPES[setting], **({}, FULL, FULL)[setting])
    for check in checks_in(op, setting, settings=3):
        check(op, problem, "chunked")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "op, dtype", [(op, dtype) for op in OPS for dtype in DTYPES[: 3 if op.name in WAYS else 2]], ids=str
)
def test_in_many_pieces(op, dtype, monkeypatch):
    """A workspace of 40 KiB: rows, tiles, strips, gathered rows and slabs of dW are all cut, and add up."""
    monkeypatch.setattr(dispatch, "_set", 40 << 10)
    monkeypatch.setattr(cuts, "MAX_ROWS", 16)
    monkeypatch.setattr(cuts, "FEW_ROWS", 4)
    problem = make_problem(37, 203, 45, dtype=dtype, bias=True, softcap=25.0)
    judge(op, problem, "chunked")
    if op.name in WAYS or dtype == torch.bfloat16:
        check_masked_rows(op, problem, "chunked")


@pytest.mark.parametrize(
    "op, dtype", [(op, dtype) for op in OPS for dtype in DTYPES[1 : 3 if op.name in WAYS else 2]], ids=str
)
def test_where_the_library_upcasts(op, dtype, monkeypatch):
    """A GPU whose library does not multiply halves into fp32: pieces of W are upcast, nothing else changes."""
    monkeypatch.setattr(dispatch, "half_products", lambda device, dtype: False)
    monkeypatch.setattr(dispatch, "_set", 80 << 10)
    judge(op, make_problem(37, 203, 45, dtype=dtype, **FULL), "chunked")


def test_operands_begin_where_products_are_fast():
    """Rows of halves and of logits begin on 16 elements, whatever the vocabulary is; tiles are multiples of 16."""
    x = torch.randn(5, 203)
    for dtype in (torch.bfloat16, torch.float16):
        assert products.scaled(x, dtype).values.stride() == (208, 1)
    head = make_problem(600, 16390, 24, dtype=torch.bfloat16).head
    assert cuts.logits_buffer(3, head).stride() == (16400, 1)
    for n, wanted in ((600, -(-16390 // 8)), (1, 16390)):
        width = cuts.tile_width(n, head, 3)
        assert width % 16 == 0 and wanted <= width < wanted + 16
        _, _, z = next(cuts.vocab_tiles(torch.randn(n, 24).bfloat16(), head))
        assert z.stride(0) % 16 == 0 and z.shape[1] == min(width, 16390)


# --- what it does on the way -----------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Inside the bodies of chunked operations: live bytes beyond `known` tensors, FLOP of products, upcast halves.

    A look at a value, which would wait for a GPU, is an error.
    """

    LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal")

    def __init__(self, *known):
        super().__init__()
        self.seen = weakref.WeakSet(x.untyped_storage() for x in known)
        self.now = self.peak = self.flop = self.largest_upcast = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        assert name not in self.LOOKS, f"{func} looks at a value"
        out = func(*args, **(kwargs or {}))
        if name in ("mm", "bmm", "addmm"):
            a, b = args[1:3] if name == "addmm" else args[:2]
            self.flop += 2 * math.prod(a.shape) * b.shape[-1]
        # Below autograd, where the bodies run, a cast is still `to`.
        if name in ("_to_copy", "to") and args[0].dtype in dispatch.HALVES and out.dtype == torch.float32:
            self.largest_upcast = max(self.largest_upcast, out.numel())
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
                self.seen.add(storage)
                weakref.finalize(storage, self._freed, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size):
        self.now -= size


@contextlib.contextmanager
def watching(*known):
    watch = Watch(*known)

    def watched(function):
        def run(*args, **kwargs):
            with watch:
                return function(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in portable.__all__:
            patch.setattr(portable, name, watched(getattr(portable, name)))
        yield watch


N, V, D, K = 300, 4096, 24, 8


def _case(dtype, n=N, v=V, d=D):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (0.6 * torch.randn(v, d, generator=generator)).to(dtype).requires_grad_()
    teacher = (hidden + 0.3 * torch.randn(n, d, generator=generator)).detach().to(dtype)
    ids = torch.randint(0, v, (n, K), generator=generator)
    top = TopK(torch.randn(n, K, generator=generator), ids, torch.zeros(n))
    return hidden, weight, teacher, top


def _dense(divergence, **options):
    return lambda h, w, t, top: linear_distill_loss(h, w, t, w, divergence=divergence, **options)


def _sparse(divergence, **options):
    return lambda h, w, t, top: topk_distill_loss(h, w, top, divergence=divergence, **options)


def _capped(h, w, t, top):
    head = LMHead(w, w[:, 0], softcap=20.0, scale=1.1)
    return linear_cross_entropy(h, head, top.indices[:, 0]) + linear_distill_loss(
        h, head, t, head, divergence="jsd"
    )


# Operation: (what runs, products with a frozen head, with a trainable one), in units of 2 N D V.
OPERATIONS = {
    "topk": (lambda h, w, t, top: linear_topk(t, w, K).values.sum() + h.sum() + w.sum(), 1, 1),
    "topk-2000": (lambda h, w, t, top: linear_topk(t, w, 2000).values.sum() + h.sum() + w.sum(), 1, 1),
    "token-stats": (
        lambda h, w, t, top: linear_token_stats(t, w, top.indices[:, 0]).entropy.sum() + h.sum() + w.sum(),
        1,
        1,
    ),
    "logsumexp": (lambda h, w, t, top: linear_logsumexp(h, w, exclude=top.indices).sum(), 2, 4),
    "gather": (lambda h, w, t, top: linear_gather(h, w, top.indices).sum(), 0, 0),
    "gather-300": (lambda h, w, t, top: linear_gather(h, w, torch.arange(300).expand(N, 300)).sum(), 1, 1),
    "huber": (_sparse("huber"), 0, 0),
    "jsd": (_sparse("jsd"), 0, 0),
    "tail": (_sparse("forward_kl", normalization="tail"), 2, 4),
    "cross-entropy": (lambda h, w, t, top: linear_cross_entropy(h, w, top.indices[:, 0]), 2, 4),
    "softcap-bias": (_capped, 2 + 3, 4 + 4),
    **{f"dense-{name}": (_dense(name), 3, 4) for name in DIVERGENCES},
    "dense-none": (lambda *x: _dense("forward_kl", reduction="none")(*x).sum(), 3, 6),
}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in OPERATIONS]
    + [
        (name, torch.float32)
        for name in ("dense-forward_kl", "dense-jsd", "dense-huber", "topk", "cross-entropy")
    ],
    ids=str,
)
def test_products_bytes_and_looks(name, dtype, frozen):
    """No value is looked at, W is never upcast, nothing is multiplied twice, and temporaries keep the workspace."""
    run, *units = OPERATIONS[name]
    hidden, weight, teacher, top = _case(dtype)
    weight.requires_grad_(not frozen)
    size = 3 << 19  # the logits of one model are 4.7 MiB
    previous = set_workspace_bytes(size)
    try:
        with watching(hidden, weight, teacher, *top[:3]) as watch:
            run(hidden, weight, teacher, top).backward()
    finally:
        set_workspace_bytes(previous)
    vocabulary = watch.flop / (2 * N * D * V)
    ids = int(name.partition("-")[2]) if name[-1] == "0" else K
    sparse = 4 * ids / V  # products with gathered rows
    wanted = units[not frozen]
    if name == "cross-entropy" and dtype == torch.float32 and not frozen:
        wanted = 3  # enough whole rows fit, and dW is in the dtype of its sum
    assert wanted <= vocabulary <= wanted + sparse
    assert watch.largest_upcast <= N * D
    of_ids = 0 if "dense" in name else 512 * K + 12 * ids
    of_weights = 0 if frozen else 8 * V * D  # dW, and its sum in fp32
    assert watch.peak <= size + (of_ids + 16 * D) * N + of_weights, f"{watch.peak / 2**20:.1f} MiB"


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["gather", "huber"])
def test_gathered_rows_and_sums_of_pairs_stay_in_the_workspace(name, dtype, frozen):
    """All gathered rows would be 9.4 MiB, dW in fp32 32 MiB beside the 16 of dW."""
    n = 1200
    hidden, weight, teacher, top = _case(dtype, n=n, v=16384, d=512)
    weight.requires_grad_(not frozen)
    size = 2 << 20
    previous = set_workspace_bytes(size)
    try:
        with watching(hidden, weight, teacher, *top[:3]) as watch:
            OPERATIONS[name][0](hidden, weight, teacher, top).backward()
    finally:
        set_workspace_bytes(previous)
    results = 8 * hidden.numel() + 160 * n * K + (0 if frozen else weight.nbytes + 8 * 16384)
    assert watch.peak <= size + results, f"{watch.peak / 2**20:.1f} MiB for {(size + results) / 2**20:.1f}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_few_tokens_take_few_steps(name):
    """One token: every product is made at once, because reading W is all that it costs."""
    run, *units = OPERATIONS[name]
    hidden, weight, teacher, top = _case(torch.bfloat16, n=1)
    if name == "gather-300":
        return
    weight.requires_grad_(False)
    calls = []
    with watching() as watch, pytest.MonkeyPatch.context() as patch:
        for each in ("product", "add_product"):
            good = getattr(products, each)
            counted = lambda *args, good=good, **kw: calls.append(args) or good(*args, **kw)  # noqa: E731
            patch.setattr(products, each, counted)
            for room in (cuts, portable.dense):
                if hasattr(room, each):
                    patch.setattr(room, each, counted)
        run(hidden, weight, teacher, top).backward()
    assert len(calls) <= units[0] and watch.flop > 0


def test_the_watch_sees():
    """Bytes inside a body, a copy of W in fp32, and a look."""
    weight = torch.randn(64, 8).bfloat16()
    with Watch(weight) as watch:
        kept = weight.float() + 1
    assert watch.largest_upcast == 512 and watch.peak == 2 * 512 * 4 and watch.now == 512 * 4
    del kept
    assert watch.now == 0
    with Watch(), pytest.raises(AssertionError, match="looks"):
        bool(weight.sum() > 0)


def test_everything_is_cut_by_a_small_workspace(monkeypatch):
    """The pieces of `test_in_many_pieces` are many: else it would say nothing."""
    monkeypatch.setattr(dispatch, "_set", 40 << 10)
    monkeypatch.setattr(cuts, "FEW_ROWS", 4)
    problem = make_problem(37, 203, 45, dtype=torch.bfloat16)
    ids = torch.zeros(37, 8, dtype=torch.int64)
    assert len(gather._pieces(ids, problem.weight)) > 1
    assert cuts.rows_that_fit(37, problem.head, 2) < 37 // 2
    assert cuts.tile_width(16, problem.head, 3) < 203
    assert portable.dense_rows.strip_bytes(problem.weight.device) // (8 * 4) < 203


# --- selections, extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 8, 60, 203])
def test_selections_in_halves(dtype, k):
    """Integers are exact in every dtype: ids, values and tails are those of the definition, ties included."""
    for ties in ("quantised", "equal"):
        problem = make_problem(300, 203, 6, dtype=dtype, ties=ties)
        got, wanted = (
            linear_topk(problem.hidden, problem.head, k, impl=impl) for impl in ("chunked", "reference")
        )
        assert torch.equal(got.indices, wanted.indices) and torch.equal(got.values, wanted.values)
        torch.testing.assert_close(got.tail_logsumexp, wanted.tail_logsumexp)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_gradients_next_to_fp16_keep_their_range(size):
    """Gradients far below and above what fp16 holds are scaled by a power of two before they are multiplied."""
    generator = torch.Generator().manual_seed(0)
    x = size * torch.randn(30, 50, generator=generator)
    x[:, 3] *= 1e-6
    b = torch.randn(50, 20, generator=generator).half()
    b[:, 0] = 0
    b[3, 0] = 1  # sees the small ones alone
    truth, baseline = x.double() @ b.double(), x.half().float() @ b.float()
    got = products.scaled(x, torch.float16).times(b)
    out = torch.ones(30, 20)
    products.scaled(x, torch.float16).add_to(out, b)
    torch.testing.assert_close(out, got + 1)
    for column in (slice(0, 1), slice(1, None)):
        error = (got[:, column] - truth[:, column]).norm() / truth[:, column].norm()
        assert error < 2**-10, error
    without = (baseline[:, 0] - truth[:, 0]).norm() / truth[:, 0].norm()
    assert size == 1.0 or not without < 0.1


def test_a_row_that_is_not_a_number_leaves_the_gain_alone():
    x = torch.randn(3, 4)
    x[1] = torch.nan
    values, gain = products.scaled(x, torch.float16)
    assert gain.isfinite() and values[[0, 2]].isfinite().all() and values[1].isnan().all()
    assert products.scaled(torch.zeros(2, 2), torch.float16).gain == 1


def test_sums_of_gathered_halves_are_short(monkeypatch):
    """A tensor core cuts off what a sum cannot hold: 4096 products in one run were 7.6e-7 off in a mean loss on an H200."""
    lengths, product = [], gather.batched_product
    monkeypatch.setattr(gather, "batched_product", lambda a, b: lengths.append(a.shape[-1]) or product(a, b))
    problem = make_problem(5, 61, 1100, dtype=torch.bfloat16)
    ids = torch.arange(15).view(5, 3)
    got = linear_gather(problem.hidden, problem.head, ids, impl="chunked")
    assert sum(lengths) >= 1100 and max(lengths) <= 512
    truth = (problem.hidden.double() @ problem.weight.double().T).gather(1, ids)
    assert_within_budget(
        got, truth, (problem.hidden.float() @ problem.weight.float().T).gather(1, ids), name="z"
    )
