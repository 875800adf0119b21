"""The arithmetic helpers of the kernels against torch in higher precision, and the launchers' checks."""

import ast
import inspect
import math

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import duet_kernels as dk  # noqa: E402
from duet_kernels.head import LMHead, Need  # noqa: E402
from duet_kernels.triton import dense, primitives, tiles  # noqa: E402

DEVICE = "cpu" if primitives.INTERPRETED else "cuda"


@triton.jit
def _apply(x_ptr, y_ptr, count, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    if OP == "expm1":
        y = primitives.expm1(x)
    elif OP == "log1p":
        y = primitives.log1p(x)
    elif OP == "tanh":
        y = primitives.tanh(x)
    else:
        y = primitives.sign(x)
    tl.store(y_ptr + i, y, mask=i < count)


@triton.jit
def _number(y_ptr, value: tl.float64, ACC: tl.constexpr):
    tl.store(y_ptr, primitives.number(value, ACC) * tl.load(y_ptr))


def apply(op: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _apply[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), OP=op, BLOCK=1024)
    return y


def exact(op: str, x: torch.Tensor) -> torch.Tensor:
    """The function of the very number x, from the C library in fp64: within 1 ulp."""
    return torch.tensor([getattr(math, op)(v) for v in x.double().tolist()], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "low", "high"), [("expm1", -30, 8), ("log1p", -0.999, 9), ("tanh", -12, 12)])
def test_accurate_relative_to_the_result(op, low, high, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = low + (high - low) * torch.rand(1500, generator=generator, dtype=torch.float64)
    near_zero = 10 ** (-12 * torch.rand(1500, generator=generator, dtype=torch.float64))
    near_zero *= torch.where(torch.rand(1500, generator=generator) < 0.5, -1, 1)
    # Both sides of every switch between a series and a logarithm or exponential.
    seams = torch.tensor([0.25, 0.5, 1.0]).double()
    seams = torch.cat([seams * (1 + e) * sign for e in (-1e-7, 0.0, 1e-7) for sign in (1, -1)])
    x = torch.cat([wide, near_zero.clamp(min=max(low, -0.99)), seams[seams > low]]).to(dtype)
    error = (apply(op, x.to(DEVICE)).cpu().double() - exact(op, x)).abs() / exact(op, x).abs()
    # exp(x) - 1 at x = -1/2 loses one and a half bits; a GPU's exp and log are 2 ulp by themselves.
    assert error.max() <= 8 * torch.finfo(dtype).eps, x[error.argmax()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values(dtype):
    inf, nan = math.inf, math.nan
    x = torch.tensor([0.0, inf, -inf, nan], dtype=dtype, device=DEVICE)
    for op, wanted in (
        ("expm1", [0.0, inf, -1.0, nan]),
        ("tanh", [0.0, 1.0, -1.0, nan]),
        ("sign", [0.0, 1.0, -1.0, nan]),
    ):
        torch.testing.assert_close(apply(op, x).cpu(), torch.tensor(wanted, dtype=dtype), equal_nan=True)
    edge = torch.tensor([0.0, -1.0, inf, nan], dtype=dtype, device=DEVICE)
    torch.testing.assert_close(
        apply("log1p", edge).cpu(), torch.tensor([0.0, -inf, inf, nan], dtype=dtype), equal_nan=True
    )


def test_number_arguments_keep_fp64():
    y = torch.ones(1, dtype=torch.float64, device=DEVICE)
    _number[(1,)](y, 0.1, ACC=tl.float64)
    assert y.item() == 0.1
    y = torch.ones(1, device=DEVICE)
    _number[(1,)](y, 0.1, ACC=tl.float32)
    assert y.item() == torch.tensor(0.1).item()


def test_cpu_tensor_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(primitives, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"hidden: Triton kernels read GPU tensors.*impl='chunked'"):
        primitives.launching({"bias": None, "hidden": torch.zeros(2)})


def test_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="indices: is on meta, but hidden is on cpu"):
        primitives.launching({"hidden": torch.zeros(2), "indices": torch.zeros(2, device="meta")})


def test_grid_beyond_the_axis_is_refused():
    assert primitives.require_grid(2**31 - 1, "op") == 2**31 - 1
    with pytest.raises(ValueError, match=f"op: {2**31} programs"):
        primitives.require_grid(2**31, "op")


def _wide(v, d):
    """Operands of that size that take no memory."""
    return torch.zeros(1, 1).expand(2, d), torch.zeros(1, 1).expand(v, d)


@pytest.mark.parametrize("size", ["weight", "hidden"])
def test_a_dimension_that_32_bits_cannot_count_is_refused(size):
    """Half of them: the end of a tile or a split beyond the last position has to fit as well."""
    most = primitives.MAX_SIZE + 1
    hidden, weight = _wide(most, 3) if size == "weight" else _wide(3, most)
    labels, options = torch.zeros(2, dtype=torch.int64), {"impl": "triton"}
    ids = labels[:, None]
    teacher = dk.TopK(ids.float(), ids)
    calls = (
        lambda: dk.linear_gather(hidden, weight, ids, **options),
        lambda: dk.linear_topk(hidden, weight, 1, **options),
        lambda: dk.linear_logsumexp(hidden, weight, exclude=ids, **options),
        lambda: dk.linear_token_stats(hidden, weight, **options),
        lambda: dk.linear_cross_entropy(hidden, weight, labels, **options),
        lambda: dk.linear_distill_loss(hidden, weight, hidden, weight, **options),
        lambda: dk.topk_distill_loss(hidden, weight, teacher, **options),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{size}: .* in 32 bits, at most {2**30}, got {most}"):
            call()


def test_tokens_whose_statistics_32_bits_cannot_find_are_refused():
    n = dense.MAX_TOKENS + 1
    hidden, weight, row = torch.zeros(1, 1).expand(n, 2), torch.zeros(3, 2), torch.ones(1).expand(n)
    loss = dense.Loss()
    loss.sides, loss.factor = (dense.Side(hidden, LMHead(weight)),), row
    with pytest.raises(ValueError, match=f"hidden: .* at most {2**27} tokens at a time, got {n}"):
        dense.run(loss, Need(True))


def test_no_number_replaces_another_of_its_name():
    """The second of two lines `WARPS = ...` would be the first one's value, too, and nobody would see why it is slow."""
    names = [
        name.id
        for line in ast.parse(inspect.getsource(tiles)).body
        if isinstance(line, ast.Assign)
        for target in line.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    ]
    assert len(names) > 30 and sorted(names) == sorted(set(names))


def test_every_architecture_and_dtype_has_a_tile():
    for table in (tiles.GATHER_FORWARD, tiles.GATHER_DHIDDEN, tiles.DWEIGHT_CHUNK_SUMS):
        for arch in (0, 80, 86, 90, 100, 120):
            for itemsize in (2, 4, 8):
                for rows in (1, 3, 64, 4096):
                    for columns in (1, 45, 512, 513, 16384):
                        tile = tiles.gather_tile(table, arch, itemsize, rows, columns)
                        for side in (tile.rows, tile.columns):
                            assert side & (side - 1) == 0
                        # As many bytes in flight as the table says, never more.
                        assert tile.rows * tile.columns <= 16 * 512


def test_divergence_tiles_hold_whole_rows():
    for slots in (1, 2, 7, 64, 65, 1000, 4096, tiles.MAX_SLOTS):
        tile = tiles.divergence_tile(slots)
        assert tile.columns >= slots and tile.columns & (tile.columns - 1) == 0
