"""What the kernels share: arithmetic that stays accurate near zero, loading rows, and what is checked before a launch.

Arithmetic is written once for the compiler and the CPU interpreter, hence three rules. A load is upcast in the line
that makes it (the interpreter computes bf16 wrongly and without a word). Only `tl.exp`, `tl.log` and arithmetic are
used (libdevice does not exist there). A number argument is declared `tl.float64` and narrowed by `number`: an
undeclared one is rounded to fp32, and fp64 inputs would see it.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2E x), and that is one instruction


@triton.jit
def number(value, ACC: tl.constexpr):
    """A number argument as a scalar of ACC."""
    return tl.full((), value, ACC)


@triton.jit
def expm1_near_zero(x):
    """exp(x) - 1 for |x| <= 1/2, to a few units in the last place of x's dtype; nonsense elsewhere."""
    if x.dtype == tl.float64:
        # x (1 + x/2 (1 + x/3 (1 + ...))): the first term left out is below 1e-16 of the result.
        series = x * 0.0 + 1.0
        for n in tl.static_range(16, 1, -1):
            series = series * (x * (1.0 / n)) + 1.0
    else:
        # A minimax polynomial, 4e-9 off before it is rounded.
        series = x * 0.00019979497301392257 + 0.0013997784117236733
        series = series * x + 0.00833311676979065
        series = series * x + 0.04166530445218086
        series = series * x + 0.1666666716337204
        series = series * x + 0.5000000596046448
        series = series * x + 1.0
    return x * series


@triton.jit
def expm1(x):
    """exp(x) - 1, accurate relative to the result."""
    return tl.where(tl.abs(x) <= 0.5, expm1_near_zero(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), accurate relative to the result."""
    # log(1 + x) = 2 artanh(z) with z = x / (2 + x), |z| <= 1/7 for |x| <= 1/4; the logarithm of a GPU is accurate
    # to a fixed number of decimals, not of digits, where its result is near 0.
    TERMS: tl.constexpr = 9 if x.dtype == tl.float64 else 4
    near = tl.where(tl.abs(x) <= 0.25, x, 0.0)
    z = near / (near + 2.0)
    zz = z * z
    series = zz * 0.0 + 1.0 / (2 * TERMS + 1)
    for n in tl.static_range(TERMS - 1, -1, -1):
        series = series * zz + 1.0 / (2 * n + 1)
    return tl.where(tl.abs(x) <= 0.25, 2.0 * z * series, tl.log(x + 1.0))


@triton.jit
def log1p_half(x):
    """log(1 + x) for -1/2 <= x <= 0, accurate relative to the result; nonsense elsewhere."""
    if x.dtype == tl.float64:
        return log1p(x)
    else:  # a minimax polynomial, 4e-9 off before it is rounded: no division
        series = x * -1.7770181894302368 - 2.5557680130004883
        series = series * x - 2.049731969833374
        series = series * x - 0.6350128650665283
        series = series * x - 0.35381534695625305
        series = series * x + 0.17321175336837769
        series = series * x - 0.2521698474884033
        series = series * x + 0.3332449793815613
        series = series * x - 0.5000013709068298
        series = series * x + 1.0
        return x * series


@triton.jit
def log_to_mixture(w, beta, HALF: tl.constexpr):
    """(log(p / m), log(q / m)) of m = beta p + (1 - beta) q, given w = log(q / p); HALF says that beta is 1/2."""
    # With the share of the smaller of the two: log(m / larger) = log1p(share (smaller / larger - 1)).
    shrink = expm1(-tl.abs(w))
    if HALF:
        mixture = log1p_half(shrink * 0.5)
    else:
        x = shrink * tl.where(w >= 0, beta, 1.0 - beta)
        mixture = tl.where(x >= -0.5, log1p_half(x), tl.log(x + 1.0))
    return tl.where(w >= 0, -w, 0.0) - mixture, tl.where(w >= 0, 0.0, w) - mixture


@triton.jit
def tanh(x):
    """tanh(x) = -e / (2 + e) with e = expm1(-2 |x|), with the sign of x: accurate relative to the result."""
    e = expm1(tl.abs(x) * -2.0)
    t = e / (e + 2.0)
    return tl.where(x < 0, t, -t)


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))


@triton.jit
def load_rows(base, rows, columns, stride_row, stride_column, keep, ACC: tl.constexpr):
    """`[R, C]` tile base[rows, columns] in ACC; what is not kept is 0 and is not read. Addresses are int64."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(base + offsets, mask=keep, other=0.0).to(ACC)


@triton.jit
def load_tile(ptr, n, c, pitch, live, whole, C, by, ACC: tl.constexpr):
    """`[R, C]` tile of logits, read once, in ACC and times `by`: rows that are not live are 0, columns beyond C -inf.

    `whole` says that no column is beyond C: then nothing is masked by the column.
    """
    place = ptr + n[:, None] * pitch + c[None, :]
    if whole:
        z = tl.load(place, mask=live[:, None], other=0.0, eviction_policy="evict_first").to(ACC) * by
    else:
        inside = (c < C)[None, :]
        z = tl.load(place, mask=live[:, None] & inside, other=0.0, eviction_policy="evict_first").to(ACC) * by
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def times(x, by):
    """x by, rounded before it is used: a compiler fuses a product with a difference that follows, but not this sum with 0.

    A fused s - t has what the rounding of one logit left; two kernels may fuse differently, and their u must be the same.
    """
    return tl.fma(x, by, 0.0)


@triton.jit
def load_pair(s_ptr, t_ptr, n, c, s_pitch, t_pitch, live, whole, C, s_by, t_by, ACC: tl.constexpr):
    """The tiles of two sides as `load_tile` makes them; both loads are under way before one is waited for."""
    s_place = s_ptr + n[:, None] * s_pitch + c[None, :]
    t_place = t_ptr + n[:, None] * t_pitch + c[None, :]
    if whole:
        s = tl.load(s_place, mask=live[:, None], other=0.0, eviction_policy="evict_first").to(ACC)
        t = tl.load(t_place, mask=live[:, None], other=0.0, eviction_policy="evict_first").to(ACC)
        s = times(s, s_by)
        t = times(t, t_by)
    else:
        inside = (c < C)[None, :]
        keep = live[:, None] & inside
        s = tl.load(s_place, mask=keep, other=0.0, eviction_policy="evict_first").to(ACC)
        t = tl.load(t_place, mask=keep, other=0.0, eviction_policy="evict_first").to(ACC)
        s = tl.where(inside, times(s, s_by), float("-inf"))
        t = tl.where(inside, times(t, t_by), float("-inf"))
    return s, t


@triton.jit
def finish(x, columns, bias_ptr, stride_bv, keep, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """z = softcap tanh(scale (x + b) / softcap) of products x in ACC; b is read at the columns that are kept."""
    ACC: tl.constexpr = x.dtype
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns.to(tl.int64) * stride_bv, mask=keep, other=0.0).to(ACC)
    z = x * number(scale, ACC)
    if HAS_SOFTCAP:
        cap = number(softcap, ACC)
        z = cap * tanh(z / cap)
    return z


@triton.jit
def ordered(z):
    """z as an integer of its width in the same order: -0 equals 0, any NaN stands above everything.

    The least integer belongs to no number: it marks what is not there.
    """
    INT: tl.constexpr = tl.int64 if z.dtype == tl.float64 else tl.int32
    TOP: tl.constexpr = 0x7FFFFFFFFFFFFFFF if z.dtype == tl.float64 else 0x7FFFFFFF
    bits = tl.where(z == 0.0, 0.0, z).to(INT, bitcast=True)
    return tl.where(z == z, tl.where(bits < 0, bits ^ TOP, bits), TOP)


@triton.jit
def unordered(order):
    """The number that `ordered` made an integer of."""
    FLOAT: tl.constexpr = tl.float64 if order.dtype == tl.int64 else tl.float32
    TOP: tl.constexpr = 0x7FFFFFFFFFFFFFFF if order.dtype == tl.int64 else 0x7FFFFFFF
    return tl.where(order < 0, order ^ TOP, order).to(FLOAT, bitcast=True)


# A sum of exponentials is a pair (m, s) = (largest x, sum of exp(x - origin(m))). Infinite maxima need the origin:
# inf - inf is NaN, while exp(-inf - 0) = 0 and exp(inf - 0) = inf are what the sum should hold.


@triton.jit
def origin(m):
    """What the exponentials of a sum with the maximum m are relative to: m, or 0 where m is infinite."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def add_exponentials(m, s, x, counted):
    """(m, s) with the counted columns of x `[R, C]` taken in; a NaN among them makes s NaN."""
    top = tl.maximum(m, tl.max(tl.where(counted, x, float("-inf")), 1))
    zero = origin(top)
    terms = tl.where(counted, tl.exp(x - zero[:, None]), 0.0)
    return top, s * tl.exp(m - zero) + tl.sum(terms, 1)


ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}  # Triton's name of the dtype of logits

# True when TRITON_INTERPRET=1 was set before the first import: kernels then run on the CPU, one program at a time.
INTERPRETED = not isinstance(expm1, triton.JITFunction)

# CUDA's limit on the x axis of a grid; the other axes stop at 65535, so every grid here is one-dimensional.
MAX_GRID = 2**31 - 1
# Products of two sizes are int64 in the kernels; a position along one dimension is an int32, and twice it must be one.
MAX_SIZE = 2**30


def launching(inputs: dict[str, Any]) -> contextlib.AbstractContextManager[object]:
    """The device of an op's inputs as the current one, on which Triton launches; refuses what the kernels would read wrongly.

    That is a CPU tensor without the interpreter, two devices, and a dimension whose positions (and the end of a tile or a
    split past the last) 32 bits cannot count.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    first = next(iter(tensors))
    for name, x in tensors.items():
        if x.device.type == "cpu" and not INTERPRETED:
            raise RuntimeError(
                f"{name}: Triton kernels read GPU tensors and this one is on the CPU; move it to a GPU, use "
                "impl='chunked', or set TRITON_INTERPRET=1 before the first import to run the interpreter"
            )
        if x.device != tensors[first].device:
            raise RuntimeError(f"{name}: is on {x.device}, but {first} is on {tensors[first].device}")
        if max(x.shape, default=0) > MAX_SIZE:
            raise ValueError(
                f"{name}: the kernels count the positions of a dimension in 32 bits, at most {MAX_SIZE}, got {max(x.shape)}"
            )
    device = tensors[first].device
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def require_grid(programs: int, what: str) -> int:
    """The number of programs as a grid's x axis, refused when the axis cannot hold it."""
    if programs > MAX_GRID:
        raise ValueError(
            f"{what}: {programs} programs are more than a grid holds ({MAX_GRID}); pass fewer tokens"
        )
    return programs
