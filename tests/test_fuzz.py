"""Drawn shapes, dtypes, strides, tile sizes and special values: `chunked` and the kernels against the definition."""

import dataclasses

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402 - after the check that it is installed
from hypothesis import strategies as st  # noqa: E402

from duet_kernels import (  # noqa: E402
    LMHead,
    TopK,
    linear_cross_entropy,
    linear_distill_loss,
    linear_gather,
    linear_logsumexp,
    linear_token_stats,
    linear_topk,
    topk_distill_loss,
)
from duet_kernels.options import DIVERGENCES, NORMALIZATIONS  # noqa: E402
from duet_kernels.portable import cuts, gather  # noqa: E402
from duet_kernels.testing import OPS, gradients, make_problem  # noqa: E402

bounded = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# fp32 differs by the order of additions, which large logits amplify; fp64 shows every other difference.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@st.composite
def problems(draw, special=True):
    dtype = draw(
        st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16])
    )
    n, v, d = draw(st.integers(0, 9)), draw(st.integers(2, 90)), draw(st.integers(1, 20))
    problem = make_problem(
        n,
        v,
        d,
        dtype=dtype,
        seed=draw(st.integers(0, 10**6)),
        std=draw(st.sampled_from([0.1, 3.0, 20.0])) if dtype == torch.float64 else 3.0,
        gap=draw(st.sampled_from([0.01, 0.3, 2.0])) if dtype == torch.float64 else 0.3,
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 5.0, 30.0])),
        scale=draw(st.sampled_from([1.0, 0.3, -1.0])),
        pad=draw(st.sampled_from([0, 1])),
        teacher_d=draw(st.sampled_from([None, 7])),
    )
    if special and n and draw(st.booleans()):
        row = draw(st.integers(0, n - 1))
        hidden = problem.hidden.clone()
        hidden[row] = draw(st.sampled_from([0.0, torch.nan, 0.0]))
        problem = dataclasses.replace(problem, hidden=hidden)
    if draw(st.booleans()):
        wide = torch.cat([problem.hidden, problem.hidden], -1)
        problem = dataclasses.replace(
            problem, hidden=wide[..., : problem.hidden.shape[-1]], weight=problem.weight.T.contiguous().T
        )
    return problem


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few rows and columns, so that small problems have many of them."""

    def set_sizes(rows, tile_bytes):
        monkeypatch.setattr(cuts, "MAX_ROWS", rows)
        monkeypatch.setattr(cuts, "TILE_BYTES", tile_bytes)
        monkeypatch.setattr(gather, "_GATHER_BYTES", tile_bytes)

    return set_sizes


def _same(got, wanted, tolerance, what):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, what
    assert torch.equal(got.isnan(), wanted.isnan()), f"{what}: {got} {wanted}"
    infinite = wanted.isinf()
    assert torch.equal(got[infinite], wanted[infinite]), what
    finite = wanted.isfinite()
    got, wanted = got[finite].double(), wanted[finite].double()
    if wanted.numel():
        scale = float(wanted.abs().max())
        assert float((got - wanted).abs().max()) <= tolerance * scale + 1e-300 + _floor(tolerance), what


def _floor(tolerance):
    """What is nothing: losses and gradients of a student that is its teacher are rounding."""
    return tolerance * 1e-3


@bounded
@given(
    problem=problems(),
    op=st.sampled_from(OPS),
    rows=st.integers(1, 12),
    tile_bytes=st.sampled_from([64, 1024, 10**6]),
    masked=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_losses_and_gradients(small_tiles, problem, op, rows, tile_bytes, masked, reduction):
    small_tiles(rows, tile_bytes)
    options = {}
    if op.loss:
        options["reduction"] = reduction
        if masked:
            options["mask"] = torch.arange(problem.hidden.shape[0]) % 2 == 0
    results = []
    for impl in ("chunked", "reference"):
        case = problem.requiring(problem.leaves)
        output = op.run(case, impl, **options)
        finite = output.where(output.isfinite(), 0)
        results.append([output.detach(), *gradients(finite.sum(), case).values()])
    poisoned = bool(problem.hidden.isnan().any())
    for name, got, wanted in zip(("value", *problem.leaves), *results, strict=True):
        if poisoned and name != "value":
            # A NaN row has no gradient worth comparing, and the definition spreads it (0 * NaN) where we may not.
            if name == "hidden":
                kept = ~problem.hidden.isnan().any(-1)
                got, wanted = got[kept], wanted[kept]
            else:
                continue
        _same(got, wanted, TOLERANCE[problem.hidden.dtype], f"{op} {name}")


@bounded
@given(
    problem=problems(), data=st.data(), rows=st.integers(1, 12), tile_bytes=st.sampled_from([64, 2048, 10**6])
)
def test_selections(small_tiles, problem, data, rows, tile_bytes):
    small_tiles(rows, tile_bytes)
    k = data.draw(st.integers(1, problem.head.num_ids))
    temperature = data.draw(st.sampled_from([0.3, 1.0, 4.0]))
    got, wanted = (
        linear_topk(problem.hidden, problem.head, k, temperature=temperature, impl=i)
        for i in ("chunked", "reference")
    )
    tolerance = TOLERANCE[problem.hidden.dtype] if problem.hidden.dtype == torch.float64 else 1e-5
    _same(got.values, wanted.values, tolerance, "values")
    _same(got.tail_logsumexp, wanted.tail_logsumexp, tolerance, "tail")
    assert bool((got.values[..., 1:] <= got.values[..., :-1]).logical_or(got.values[..., 1:].isnan()).all())
    # Ids are the definition's wherever its own logits are further apart than rounding.
    gathered = linear_gather(problem.hidden, problem.head, got.indices, impl="reference")
    _same(gathered, wanted.values, tolerance, "values at the chosen ids")
    assert all(len(set(row)) == k for row in got.indices.view(-1, k).tolist())
    stats = [
        linear_token_stats(problem.hidden, problem.head, problem.labels, impl=i)
        for i in ("chunked", "reference")
    ]
    for name, a, b in zip(stats[0]._fields, *stats, strict=True):
        _same(a, b, max(tolerance, 1e-8), name)


@bounded
@given(
    n=st.integers(1, 6),
    v=st.integers(3, 40),
    k=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    divergence=st.sampled_from([*DIVERGENCES]),
    normalization=st.sampled_from(NORMALIZATIONS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_any_teacher(n, v, k, seed, divergence, normalization, temperature):
    """Teachers as nobody's top-k: any ids, absent slots, unordered values, an empty or a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    k = min(k, v)
    draw = torch.rand(n, k, generator=generator)
    values = 5 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    values[draw < 0.2] = -torch.inf
    values[(draw > 0.2) & (draw < 0.3)] -= 90
    tail = 5 * torch.randn(n, generator=generator, dtype=torch.float64)
    tail[draw[:, 0] > 0.8] = -torch.inf
    tail[(draw[:, 0] > 0.7) & (draw[:, 0] < 0.8)] -= 80
    ids = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(n)])
    if not DIVERGENCES[divergence].normalizations:
        normalization, temperature = None, 1.0
    elif normalization not in DIVERGENCES[divergence].normalizations:
        normalization = "tail"
    teacher = TopK(values, ids, tail, temperature)
    results = []
    for impl in ("chunked", "reference"):
        problem = make_problem(n, v, 5, dtype=torch.float64, seed=seed).requiring(("hidden", "weight"))
        rows = topk_distill_loss(
            problem.hidden,
            problem.head,
            teacher,
            divergence=divergence,
            normalization=normalization,
            temperature=temperature,
            reduction="none",
            impl=impl,
        )
        finite = rows.where(rows.isfinite(), 0)
        results.append([rows.detach(), *gradients(finite.sum(), problem).values()])
    for what, got, wanted in zip(("rows", "dhidden", "dweight"), *results, strict=True):
        if what == "rows":
            _same(got, wanted, 1e-9, what)
            continue
        finite = wanted.isfinite()
        _same(got[finite], wanted[finite], 1e-8, what)


@bounded
@given(problem=problems(special=False), seed=st.integers(0, 99), many=st.integers(0, 20))
def test_excluded_and_gathered_ids(problem, seed, many):
    """Any ids, repeated or not, none or all of the vocabulary."""
    v = problem.head.num_ids
    ids = torch.randint(0, v, (*problem.lead, many), generator=torch.Generator().manual_seed(seed))
    tolerance = TOLERANCE[problem.hidden.dtype]
    for function in (
        lambda case, impl: linear_gather(case.hidden, case.head, ids, impl=impl),
        lambda case, impl: linear_logsumexp(case.hidden, case.head, exclude=ids, temperature=2.0, impl=impl),
    ):
        results = []
        for impl in ("chunked", "reference"):
            case = problem.requiring(problem.leaves)
            output = function(case, impl)
            finite = output.where(output.isfinite(), 0)
            results.append([output.detach(), *gradients(finite.sum(), case).values()])
        for name, got, wanted in zip(("value", *problem.leaves), *results, strict=True):
            if wanted.isfinite().all():
                _same(got, wanted, tolerance, name)


@bounded
@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    v=st.integers(1, 12),
    seed=st.integers(0, 99),
    ignored=st.booleans(),
)
def test_leading_shapes(lead, v, seed, ignored):
    """Any number of leading dimensions, of any size."""
    problem = make_problem(tuple(lead), v, 4, seed=seed)
    labels = problem.labels.masked_fill(torch.rand(problem.lead) < 0.3, -100) if ignored else problem.labels
    for impl in ("chunked", "reference"):
        assert linear_cross_entropy(
            problem.hidden, problem.head, labels, reduction="none", impl=impl
        ).shape == tuple(lead)
        dense = linear_distill_loss(
            problem.hidden, LMHead(problem.weight), problem.teacher_hidden, problem.teacher_head, impl=impl
        )
        assert dense.shape == () and bool(dense.isfinite())


# --- the kernels, in the interpreter ----------------------------------------------------------------------------
# A program of the interpreter takes milliseconds, a test of many drawn cases is bounded by its number of examples:
# shapes are tiny, tiles small enough that there are several of each.

triton = pytest.importorskip("triton")

from duet_kernels.triton import tiles  # noqa: E402

on_kernels = settings(bounded, max_examples=12)


@st.composite
def kernel_problems(draw):
    """fp32 and fp64, K up to V, strided inputs, ties, a NaN token, ids that a bias of -inf rules out."""
    n, v, d = draw(st.integers(1, 5)), draw(st.integers(2, 23)), draw(st.integers(1, 9))
    problem = make_problem(
        n,
        v,
        d,
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        seed=draw(st.integers(0, 10**6)),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 5.0])),
        scale=draw(st.sampled_from([1.0, -0.7])),
        ties=draw(st.sampled_from([None, None, "quantised", "equal"])),
    )
    special = draw(st.sampled_from(["nothing", "nothing", "nan", "inf"]))
    if special == "nan":
        hidden = problem.hidden.clone()
        hidden[draw(st.integers(0, n - 1)), 0] = torch.nan
        problem = dataclasses.replace(problem, hidden=hidden)
    if special == "inf" and problem.bias is not None and problem.softcap is None and problem.scale > 0:
        out = torch.arange(v) % 3 == draw(st.integers(0, 2))
        if not out.all():
            kept = int((~out).nonzero()[0])
            labels = problem.labels.where(~out[problem.labels], kept)
            problem = dataclasses.replace(
                problem, bias=problem.bias.masked_fill(out, -torch.inf), labels=labels
            )
    if draw(st.booleans()):
        odd = torch.cat([problem.hidden, problem.hidden], 1)[:, :d], problem.weight.T.contiguous().T
        problem = dataclasses.replace(problem, hidden=odd[0], weight=odd[1])
    return problem


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Several programs of every kind, also on rows of a few logits; few enough for the interpreter."""
    monkeypatch.setattr(tiles, "SLOTS_BLOCK", 16)
    monkeypatch.setattr(tiles, "STATS_COLUMNS", 8)
    monkeypatch.setattr(tiles, "DWEIGHT_CHUNK", 8)
    for name in ("SLAB_COLUMNS", "DENSE_FOLD_COLUMNS", "TERMS_COLUMNS"):
        monkeypatch.setattr(tiles, name, {4: 16, 8: 16})
    monkeypatch.setattr(tiles, "SLAB_ROWS", 4)


def _on_kernels(problem, function, tolerance, what):
    """Values and gradients of `function(case, impl)` on the kernels and by the definition."""
    results = []
    for impl in ("triton", "reference"):
        case = problem.requiring(problem.leaves)
        output = function(case, impl)
        finite = output.where(output.isfinite(), 0)
        results.append([output.detach(), *gradients(finite.sum(), case).values()])
    for name, got, wanted in zip(("value", *problem.leaves), *results, strict=True):
        # Where an input is not finite the definition spreads it (0 * NaN) into gradients that we keep clean.
        if name == "value" or (problem.hidden.isfinite().all() and wanted.isfinite().all()):
            _same(got, wanted, tolerance, f"{what} {name}")


@on_kernels
@given(problem=kernel_problems(), k=st.integers(1, 23), seed=st.integers(0, 99), dense=st.booleans())
def test_kernels_at_any_ids(tiny_tiles, problem, k, seed, dense):
    """Gathers and complements at drawn ids, repeated ones and all of them; rows of W, or picked logits."""
    v = problem.head.num_ids
    ids = torch.randint(0, v, (problem.hidden.shape[0], k), generator=torch.Generator().manual_seed(seed))
    tolerance = TOLERANCE[problem.hidden.dtype]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "gather_product_tokens", lambda *args: 2 if dense else 0)
        _on_kernels(
            problem,
            lambda case, impl: linear_gather(case.hidden, case.head, ids, impl=impl),
            tolerance,
            "gather",
        )
        _on_kernels(
            problem,
            lambda case, impl: linear_logsumexp(
                case.hidden, case.head, exclude=ids, temperature=0.7, impl=impl
            ),
            tolerance,
            "complement",
        )


@on_kernels
@given(problem=kernel_problems(), data=st.data())
def test_kernels_over_the_vocabulary(tiny_tiles, problem, data):
    """Selection up to K = V, statistics, and the cross-entropy."""
    k = data.draw(st.one_of(st.just(problem.head.num_ids), st.integers(1, problem.head.num_ids)))
    tolerance = TOLERANCE[problem.hidden.dtype] if problem.hidden.dtype == torch.float64 else 1e-5
    got, wanted = (linear_topk(problem.hidden, problem.head, k, impl=i) for i in ("triton", "reference"))
    _same(got.values, wanted.values, tolerance, "values")
    _same(got.tail_logsumexp, wanted.tail_logsumexp, tolerance, "tail")
    gathered = linear_gather(problem.hidden, problem.head, got.indices, impl="reference")
    _same(gathered, wanted.values, tolerance, "values at the chosen ids")
    assert all(len(set(row)) == k for row in got.indices.tolist())
    stats = [
        linear_token_stats(problem.hidden, problem.head, problem.labels, impl=i)
        for i in ("triton", "reference")
    ]
    for name, a, b in zip(stats[0]._fields, *stats, strict=True):
        _same(a, b, max(tolerance, 1e-8), name)
    reduction = data.draw(st.sampled_from(["none", "mean"]))
    _on_kernels(
        problem,
        lambda case, impl: linear_cross_entropy(
            case.hidden, case.head, problem.labels, reduction=reduction, impl=impl
        ),
        TOLERANCE[problem.hidden.dtype],
        "cross-entropy",
    )


SPARSE = [op for op in OPS if op.resolve.startswith("topk_distill_loss")]


@on_kernels
@given(
    problem=kernel_problems(),
    op=st.sampled_from(SPARSE),
    reduction=st.sampled_from(["none", "mean"]),
    masked=st.booleans(),
)
def test_kernels_of_the_topk_losses(tiny_tiles, problem, op, reduction, masked):
    problem = dataclasses.replace(problem, teacher_bias=None)
    options = {"reduction": reduction}
    if masked:
        options["mask"] = torch.arange(problem.hidden.shape[0]) % 2 == 0
    _on_kernels(
        problem,
        lambda case, impl: op.run(case, impl, **options),
        TOLERANCE[problem.hidden.dtype],
        str(op),
    )
