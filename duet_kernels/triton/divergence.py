"""A divergence between a student's and a teacher's distribution over the whole vocabulary, from both hidden states.

    z[n,v] = softcap tanh(scale (sum_d h[n,d] W[v,d] + b[v]) / softcap)     s: of the student, t: of the teacher
    x = z / T         q = softmax(x_s)         p = softmax(x_t)         w = log q - log p         d = s - t
    L = sum of terms of d (raw logits) or of p, q, w; these and dL/ds are in `terms`

    dz = f dL/ds slope,  slope = scale (1 - (s / softcap)^2)        dh = dz W        dW = dz^T h        db = sum_n dz[n]

Legend: N tokens, D hidden size, V vocabulary, T temperature, C columns of a slab, f the row's factor, ACC fp32 (fp64
for fp64 inputs). Results are f L and the gradients of its sum. Nats; no factor T^2. A row with f = 0 gives exactly 0
and leaves no trace, whatever its hidden states are. A teacher's logit of -inf is a probability of 0; a pair of -inf
adds nothing. A NaN stays in its row (and is in every row of dW). l1 and tvd do not turn
rounding into +-1: |d|, |w| up to 8 eps of the row's largest finite logit count as 0, in value and gradient.

Where digits would be lost. A row keeps the maxima M_s, M_t, and with e = exp((z - M) / T) and
u = ((s - t) - (M_s - M_t)) / T, so that e_s = e_t exp(u):

    S_s = sum e_s      S_t = sum e_t      B = sum (e_s - e_t), as e_t expm1(u) where |u| <= 1/2
    A = sum e_t u (forward_kl)            A = sum e_s u (reverse_kl)
    log(S_s / S_t) = log1p(B / S_t)       w = u - log(S_s / S_t)        q - p = p expm1(w) where |w| <= 1/2
    forward_kl = log(S_s / S_t) - A / S_t                               reverse_kl = A / S_s - log(S_s / S_t)
                                                                        its dL/dx = q (u - A / S_s)

s - t of near logits is exact, while log q - log p carries the rounding of both log-sum-exps; so gradients of a student
close to its teacher keep their digits. Where both are certain of one id, its u is exactly 0 and its w = -log(S_s / S_t)
is tiny: added to (M_s - M_t) / T it would be rounded away. Higher maxima M' shrink what was summed, f = exp((M - M') / T),
and move u by delta = ((M_s - M_t) - (M_s' - M_t')) / T:
S' = f S,  B' = f_s B + f_t expm1(delta) S_t,  A' = f_t (A + delta S_t).

Passes over the logits of a block (`dense` says which blocks and slabs, and has them finished where a head has a bias or
a softcap): the moments above, of one tile of a row at a time, so that nothing is rescaled before they are merged; the sums
of terms and of a, for all distributions but the two of `ONE_SWEEP`; the gradient. Raw divergences need no moments: value
and gradient in one pass (l1 asks for the largest logit before). Bytes and FLOP at N 8192, D 4096, V 128256, bf16,
G = 2 N D V = 8.6 TFLOP; times of an H200, commit 471f8a8 (benchmarks/results/nvidia-h200/kernels.md, jsd frozen):

| step                 | work            | reads and writes of the kernels here   | bound by                    |
|----------------------|-----------------|----------------------------------------|-----------------------------|
| logits s and t       | 2 G             | the product's: 8 N V                   | product                     |
| moments              | 60 FLOP a pair  | 8 N V = 8.4 GB                         | 2.3 ms at 3.7 TB/s          |
| terms (jsd, ...)     | 60 FLOP a pair  | 8 N V = 8.4 GB                         | 2.8 ms at 3.0 TB/s          |
| dz                   | 40 FLOP a pair  | (8 + 2) N V = 10.5 GB                  | 3.2 ms at 3.2 TB/s          |
| dh, dW               | 1 G each        | the product's: 4 N V, W, dW            | product                     |
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import LMHead, Need
from ..options import Divergence
from . import dense, tiles
from .primitives import (
    ACCUMULATORS,
    LOG2E,
    expm1_near_zero,
    load_pair,
    load_rows,
    log1p,
    number,
    origin,
    require_grid,
    times,
)
from .terms import BOUNDS, expected, gradient, minus, of_distributions, of_logits

# Rows of the statistics `[6, N]`: the maxima, the sums S_s, S_t and B, and A or the largest finite |logit|.
MOMENTS = 6
# Moments give the value of these and all that their gradients need; the others wait for the sums of `_terms_kernel`.
ONE_SWEEP = ("forward_kl", "reverse_kl")

# --- the parts of a pass ---------------------------------------------------------------------------------------


@triton.jit
def _gap(s_max, t_max):
    """The student's origin above the teacher's."""
    return origin(s_max) - origin(t_max)


@triton.jit
def _moved(s_max, t_max, s_sum, t_sum, change, moment, s_top, t_top, inverse, DIVERGENCE: tl.constexpr):
    """The sums (S_s, S_t, B, A) relative to s_max and t_max as sums relative to the higher s_top and t_top."""
    s_shrink = tl.exp((s_max - origin(s_top)) * inverse)
    t_shrink = tl.exp((t_max - origin(t_top)) * inverse)
    shift = (_gap(s_max, t_max) - _gap(s_top, t_top)) * inverse
    finite = (tl.abs(s_max) < float("inf")) & (tl.abs(t_max) < float("inf"))
    near = s_shrink * change + t_shrink * expm1_near_zero(shift) * t_sum
    change = tl.where(finite & (tl.abs(shift) <= 0.5), near, s_shrink * s_sum - t_shrink * t_sum)
    if DIVERGENCE == "forward_kl":
        moment = tl.where(t_shrink == 0, 0.0, t_shrink * (moment + shift * t_sum))
    elif DIVERGENCE == "reverse_kl":
        moment = tl.where(s_shrink == 0, 0.0, s_shrink * (moment + shift * s_sum))
    return s_shrink * s_sum, t_shrink * t_sum, change, moment


@triton.jit
def _log_ratio(s_sum, t_sum, change):
    """log(S_s / S_t)."""
    relative = change / t_sum
    return tl.where(tl.abs(relative) <= 0.5, log1p(relative), tl.log(s_sum / t_sum))


@triton.jit
def _row(moments_ptr, slot: tl.constexpr, stride, n, live, ACC: tl.constexpr):
    """One of a row's moments; those of a row that does not count are 1, with which nothing becomes NaN."""
    return tl.load(moments_ptr + slot * stride + n, mask=live, other=1.0).to(ACC)


@triton.jit
def _normalisers(moments_ptr, stride, n, live, ACC: tl.constexpr):
    """(origins of s and t, 1 / S_s, 1 / S_t, the gap of the origins, log(S_s / S_t)) of rows."""
    s_max = _row(moments_ptr, 0, stride, n, live, ACC)
    t_max = _row(moments_ptr, 1, stride, n, live, ACC)
    s_sum = _row(moments_ptr, 2, stride, n, live, ACC)
    t_sum = _row(moments_ptr, 3, stride, n, live, ACC)
    ratio = _log_ratio(s_sum, t_sum, _row(moments_ptr, 4, stride, n, live, ACC))
    return origin(s_max), origin(t_max), 1.0 / s_sum, 1.0 / t_sum, _gap(s_max, t_max), ratio


@triton.jit
def _compared(s, t, norms, inverse):
    """(p, q, u, w) of logits, given `_normalisers`; of two that are -inf u and w are NaN."""
    s_zero, t_zero, s_share, t_share, gap, ratio = norms
    q = tl.exp2((s - s_zero[:, None]) * (inverse * LOG2E)) * s_share[:, None]
    p = tl.exp2((t - t_zero[:, None]) * (inverse * LOG2E)) * t_share[:, None]
    u = ((s - t) - gap[:, None]) * inverse
    return p, q, u, u - ratio[:, None]


# --- statistics of a row -----------------------------------------------------------------------------------------


@triton.jit
def _finite_size(z):
    return tl.where(tl.abs(z) == float("inf"), 0.0, tl.abs(z))


@triton.jit
def _moments_kernel(
    s_ptr, t_ptr, factor_ptr, partial_ptr,
    R, C, SPLITS,
    s_pitch, t_pitch, stride_f, stride_p,
    s_by: tl.float64, t_by: tl.float64, inverse_temperature: tl.float64,
    DIVERGENCE: tl.constexpr, RAW: tl.constexpr, NOISE: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLUMNS of a slab in registers: their moments `[6, R, SPLITS]` (RAW: of these the last alone)."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = split * COLUMNS + tl.arange(0, COLUMNS)
    live = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0) != 0
    whole = (split + 1) * COLUMNS <= C
    s, t = load_pair(
        s_ptr, t_ptr, n, c, s_pitch, t_pitch, live, whole, C, number(s_by, ACC), number(t_by, ACC), ACC
    )
    inverse = number(inverse_temperature, ACC)
    place = partial_ptr + n * SPLITS + split
    if not RAW:
        s_max = tl.max(s, 1)
        t_max = tl.max(t, 1)
        s_exp = tl.exp2((s - origin(s_max)[:, None]) * (inverse * LOG2E))
        t_exp = tl.exp2((t - origin(t_max)[:, None]) * (inverse * LOG2E))
        # Of two that are -inf u is NaN: not near, so that 0 - 0 is taken, and where it is weighted with 0 it does not count.
        u = ((s - t) - _gap(s_max, t_max)[:, None]) * inverse
        tl.store(place, tl.where(live, s_max, float("-inf")), mask=n < R)
        tl.store(place + stride_p, tl.where(live, t_max, float("-inf")), mask=n < R)
        tl.store(place + 2 * stride_p, tl.where(live, tl.sum(s_exp, 1), 0.0), mask=n < R)
        tl.store(place + 3 * stride_p, tl.where(live, tl.sum(t_exp, 1), 0.0), mask=n < R)
        tl.store(place + 4 * stride_p, tl.where(live, tl.sum(minus(s_exp, t_exp, u), 1), 0.0), mask=n < R)
    if DIVERGENCE == "forward_kl":
        moment = tl.sum(expected(t_exp, u), 1)
    elif DIVERGENCE == "reverse_kl":
        moment = tl.sum(expected(s_exp, u), 1)
    elif NOISE:
        moment = tl.max(tl.maximum(_finite_size(s), _finite_size(t)), 1)
    else:
        moment = s_max * 0.0  # `_terms_kernel` has its sums
    tl.store(place + 5 * stride_p, tl.where(live, moment, 0.0), mask=n < R)


@triton.jit
def _merge_moments_kernel(
    partial_ptr, moments_ptr,
    R, SPLITS,
    stride_p, stride_m,
    inverse_temperature: tl.float64,
    DIVERGENCE: tl.constexpr, RAW: tl.constexpr, NOISE: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the splits of a slab taken into the moments of the slabs before it."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, COLUMNS)
    known = n < R
    keep = known[:, None] & (split < SPLITS)[None, :]
    inverse = number(inverse_temperature, ACC)
    place = partial_ptr + n[:, None] * SPLITS + split[None, :]
    running = moments_ptr + n
    moment = tl.load(running + 5 * stride_m, mask=known, other=0.0)
    moments = tl.load(place + 5 * stride_p, mask=keep, other=0.0)
    if not RAW:
        s_max = tl.load(running, mask=known, other=float("-inf"))
        t_max = tl.load(running + stride_m, mask=known, other=float("-inf"))
        s_maxima = tl.load(place, mask=keep, other=float("-inf"))
        t_maxima = tl.load(place + stride_p, mask=keep, other=float("-inf"))
        s_top = tl.maximum(s_max, tl.max(s_maxima, 1))
        t_top = tl.maximum(t_max, tl.max(t_maxima, 1))
        s_sum, t_sum, change, moved = _moved(
            s_max, t_max,
            tl.load(running + 2 * stride_m, mask=known, other=0.0),
            tl.load(running + 3 * stride_m, mask=known, other=0.0),
            tl.load(running + 4 * stride_m, mask=known, other=0.0),
            moment, s_top, t_top, inverse, DIVERGENCE,
        )  # fmt: skip
        s_sums, t_sums, changes, movings = _moved(
            s_maxima, t_maxima,
            tl.load(place + 2 * stride_p, mask=keep, other=0.0),
            tl.load(place + 3 * stride_p, mask=keep, other=0.0),
            tl.load(place + 4 * stride_p, mask=keep, other=0.0),
            moments, s_top[:, None], t_top[:, None], inverse, DIVERGENCE,
        )  # fmt: skip
        tl.store(running, s_top, mask=known)
        tl.store(running + stride_m, t_top, mask=known)
        tl.store(running + 2 * stride_m, s_sum + tl.sum(tl.where(keep, s_sums, 0.0), 1), mask=known)
        tl.store(running + 3 * stride_m, t_sum + tl.sum(tl.where(keep, t_sums, 0.0), 1), mask=known)
        tl.store(running + 4 * stride_m, change + tl.sum(tl.where(keep, changes, 0.0), 1), mask=known)
    if NOISE:
        tl.store(running + 5 * stride_m, tl.maximum(moment, tl.max(moments, 1)), mask=known)
    else:
        tl.store(running + 5 * stride_m, moved + tl.sum(tl.where(keep, movings, 0.0), 1), mask=known)


@triton.jit
def _terms_kernel(
    s_ptr, t_ptr, factor_ptr, moments_ptr, partial_ptr,
    R, C, SPLITS, SPLIT_COLUMNS,
    s_pitch, t_pitch, stride_f, stride_m, stride_p,
    s_by: tl.float64, t_by: tl.float64, inverse_temperature: tl.float64, beta: tl.float64,
    DIVERGENCE: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, one split of a slab `[2, R, SPLITS]`: the sum of the loss's terms and of a."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0) != 0
    s_times = number(s_by, ACC)
    t_times = number(t_by, ACC)
    inverse = number(inverse_temperature, ACC)
    norms = _normalisers(moments_ptr, stride_m, n, live, ACC)
    noise = _row(moments_ptr, 5, stride_m, n, live, ACC) * inverse * (8 * EPS)
    # Summed by column, and over the columns once at the end.
    one = tl.full([ROWS, COLUMNS], 0.0, ACC)
    other = tl.full([ROWS, COLUMNS], 0.0, ACC)
    begin = split * SPLIT_COLUMNS
    for start in range(begin, tl.minimum(begin + SPLIT_COLUMNS, C), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        whole = start + COLUMNS <= C
        s, t = load_pair(s_ptr, t_ptr, n, c, s_pitch, t_pitch, live, whole, C, s_times, t_times, ACC)
        p, q, _u, w = _compared(s, t, norms, inverse)
        terms, a = of_distributions(p, q, w, noise[:, None], beta, DIVERGENCE, HALF)
        one += terms
        other += a
    place = partial_ptr + n * SPLITS + split
    tl.store(place, tl.where(live, tl.sum(one, 1), 0.0), mask=n < R)
    tl.store(place + stride_p, tl.where(live, tl.sum(other, 1), 0.0), mask=n < R)


# --- value of a raw divergence, gradient of all ------------------------------------------------------------------


@triton.jit
def _gradient_kernel(
    s_ptr, t_ptr, factor_ptr, moments_ptr, terms_ptr, gain_ptr, partial_ptr, dz_ptr,
    R, C, SPLITS,
    s_pitch, t_pitch, stride_f, stride_m, stride_e, dz_pitch,
    s_by: tl.float64, t_by: tl.float64, softcap: tl.float64, scale: tl.float64,
    inverse_temperature: tl.float64, beta: tl.float64, delta: tl.float64,
    DIVERGENCE: tl.constexpr, RAW: tl.constexpr, HALF: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_GAIN: tl.constexpr, WRITE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLUMNS of a slab in registers: gain dz `[R, C]` if WRITE, and a raw divergence's sum `[R, SPLITS]`."""
    split = tl.program_id(0) % SPLITS
    n = (tl.program_id(0) // SPLITS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr + n * stride_f, mask=n < R, other=0.0).to(ACC)
    live = factor != 0
    inverse = number(inverse_temperature, ACC)
    cap = number(softcap, ACC)
    s_times = number(s_by, ACC)
    t_times = number(t_by, ACC)
    upstream = factor * number(scale, ACC)
    if HAS_GAIN:
        upstream = upstream * tl.load(gain_ptr)
    noise = _row(moments_ptr, 5, stride_m, n, live, ACC) * inverse * (8 * EPS)
    if not RAW:
        upstream = upstream * inverse
        norms = _normalisers(moments_ptr, stride_m, n, live, ACC)
        if DIVERGENCE == "reverse_kl":
            total = _row(moments_ptr, 5, stride_m, n, live, ACC) * norms[2]
        elif DIVERGENCE != "forward_kl":
            total = _row(terms_ptr, 1, stride_e, n, live, ACC)
    c = split * COLUMNS + tl.arange(0, COLUMNS)
    counted = live[:, None] & (c < C)[None, :]
    # Rows are as long as their pitch, a multiple of 16: a mask of whole groups of columns keeps loads wide.
    s = load_rows(s_ptr, n, c, s_pitch, 1, live[:, None] & (c < s_pitch)[None, :], ACC)
    t = load_rows(t_ptr, n, c, t_pitch, 1, live[:, None] & (c < t_pitch)[None, :], ACC)
    s = times(s, s_times)
    t = times(t, t_times)
    if RAW:
        absent = (s == t) & (s == float("-inf"))  # ruled out by both
        d = tl.where(counted & (absent == 0), s - t, 0.0)
        terms, dx = of_logits(d, noise[:, None], delta, DIVERGENCE)
        tl.store(partial_ptr + n * SPLITS + split, tl.sum(terms, 1), mask=n < R)
    else:
        p, q, u, w = _compared(s, t, norms, inverse)
        if DIVERGENCE == "reverse_kl":  # a = q u, as A is made of u
            w = u
        _, dx = of_distributions(p, q, w, noise[:, None], beta, DIVERGENCE, HALF)
        if DIVERGENCE != "forward_kl":  # there a = q - p, of which the sum is 0
            dx = gradient(dx, q, total[:, None])
    if WRITE:
        dz = dx * upstream[:, None]
        if HAS_SOFTCAP:
            dz = dz * ((cap - s) / cap) * ((cap + s) / cap)
        dz = tl.where(counted, dz, 0.0)
        place = dz_ptr + n[:, None] * dz_pitch + c[None, :]
        tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=(n < R)[:, None] & (c < dz_pitch)[None, :])


# --- launchers -------------------------------------------------------------------------------------------------


class _Divergence(dense.Loss):
    """What `dense` asks of a loss: its passes over the logits of a block."""

    partials, token_bytes = MOMENTS, 8 * (MOMENTS + 4)

    def __init__(
        self, student: dense.Side, teacher: dense.Side, factor: Tensor, spec: Divergence, with_gradient: bool
    ) -> None:
        n = factor.shape[0]
        self.acc, self.acc_tl = student.head.acc, ACCUMULATORS[student.head.acc]
        self.sides = self.student, self.teacher = student, teacher
        self.factor, self.spec = factor, spec
        self.divergence, self.raw = spec.name, spec.raw
        self.with_gradient = with_gradient
        # fp16 weights are multiplied by a number that only the values of a block's rows tell.
        self.bounded = not (BOUNDS[spec.name].of_loss(spec) and student.operand == torch.float16)
        self.moments = factor.new_zeros(MOMENTS, n, dtype=self.acc)
        self.moments[:2] = -torch.inf
        self.terms = factor.new_zeros(2, n, dtype=self.acc)

    @property
    def folds(self) -> tuple[Callable[[dense.Block], None], ...]:
        """The passes before the gradient's."""
        first = () if self.raw and not self.spec.noise else (self._fold_moments,)
        if not self.raw and self.divergence not in ONE_SWEEP:
            return *first, self._fold_terms
        if self.raw and not (self.with_gradient and self.bounded):
            return *first, self._fold_values
        return first

    def _fold_moments(self, block: dense.Block) -> None:
        grid, shape = dense.fold_grid(block)
        rows, splits = block.shape[0], shape["SPLITS"]
        partial = self.moments.new_empty(MOMENTS, rows, splits)
        _moments_kernel[grid](
            **self._inputs(block), **shape,
            partial_ptr=partial, stride_p=partial.stride(0),
            DIVERGENCE=self.divergence, RAW=self.raw, NOISE=self.spec.noise,
        )  # fmt: skip
        moments = self.moments[:, block.rows]
        grid, merge = dense.merge_grid(rows, splits)
        _merge_moments_kernel[grid](
            partial, moments,
            rows, splits,
            partial.stride(0), moments.stride(0),
            1.0 / self.spec.temperature,
            DIVERGENCE=self.divergence, RAW=self.raw, NOISE=self.spec.noise, ACC=self.acc_tl, **merge,
        )  # fmt: skip

    def _fold_terms(self, block: dense.Block) -> None:
        (rows, columns), width = block.shape, tiles.TERMS_COLUMNS[self.acc.itemsize]
        split = width * tiles.TERMS_STEPS
        splits, row_blocks = tiles.cdiv(columns, split), tiles.cdiv(rows, tiles.SLAB_ROWS)
        partial = self.terms.new_empty(2, rows, splits)
        moments = self.moments[:, block.rows]
        _terms_kernel[(require_grid(row_blocks * splits, "the dense losses"),)](
            **self._inputs(block), moments_ptr=moments, partial_ptr=partial,
            SPLITS=splits, SPLIT_COLUMNS=split, stride_m=moments.stride(0), stride_p=partial.stride(0),
            beta=self.spec.beta, DIVERGENCE=self.divergence, HALF=self.spec.beta == 0.5, EPS=torch.finfo(self.acc).eps,
            ROWS=tiles.SLAB_ROWS, COLUMNS=width, num_warps=tiles.TERMS_WARPS,
        )  # fmt: skip
        self.terms[:, block.rows] += partial.sum(2)

    def _fold_values(self, block: dense.Block) -> None:
        self._gradient(block, None, None, add=True)

    def gradient(self, block: dense.Block, dz: Tensor, gain: Tensor | None, first: bool) -> None:
        """Write gain dz of the block; a raw divergence's values come with it."""
        self._gradient(block, dz, gain, add=first and self.bounded)

    def _gradient(self, block: dense.Block, dz: Tensor | None, gain: Tensor | None, *, add: bool) -> None:
        grid, shape = dense.fold_grid(block)
        rows, head = block.shape[0], self.student.head
        partial = self.terms.new_empty(rows, shape["SPLITS"]) if self.raw else None
        moments, terms = self.moments[:, block.rows], self.terms[:, block.rows]
        _gradient_kernel[grid](
            **self._inputs(block), **shape,
            moments_ptr=moments, terms_ptr=terms, gain_ptr=gain, partial_ptr=partial, dz_ptr=dz,
            stride_m=moments.stride(0), stride_e=terms.stride(0), dz_pitch=0 if dz is None else dz.stride(0),
            softcap=head.softcap or 0.0, scale=head.scale, beta=self.spec.beta, delta=self.spec.delta,
            DIVERGENCE=self.divergence, RAW=self.raw, HALF=self.spec.beta == 0.5, HAS_SOFTCAP=head.softcap is not None,
            HAS_GAIN=gain is not None, WRITE=dz is not None, EPS=torch.finfo(self.acc).eps,
        )  # fmt: skip
        if partial is not None and add:
            self.terms[0, block.rows] += partial.sum(1)

    def _inputs(self, block: dense.Block) -> dict[str, object]:
        (s, t), factor = block.logits, self.factor[block.rows]
        return {
            "s_ptr": s, "t_ptr": t, "factor_ptr": factor, "R": block.shape[0], "C": block.shape[1],
            "s_pitch": s.stride(0), "t_pitch": t.stride(0), "stride_f": factor.stride(0),
            "s_by": self.student.by, "t_by": self.teacher.by, "inverse_temperature": 1.0 / self.spec.temperature,
            "ACC": self.acc_tl,
        }  # fmt: skip

    def values(self, rows: slice = slice(None)) -> Tensor:
        """`[R]` the losses, without their factors."""
        s_sum, t_sum, change, moment = self.moments[2:, rows]
        if self.divergence not in ONE_SWEEP:
            return self.terms[0, rows]
        relative = change / t_sum
        ratio = torch.where(relative.abs() <= 0.5, relative.log1p(), (s_sum / t_sum).log())
        return ratio - moment / t_sum if self.divergence == "forward_kl" else moment / s_sum - ratio

    def bound(self, rows: slice) -> Tensor | float:
        """What no |dL/dz| of a row exceeds."""
        return BOUNDS[self.divergence].at(self.spec, self.values(rows))


def linear_divergence(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(`[N]` f L in ACC, dh, dW, db of its sum; None for what is not needed, which costs nothing).

    Gradients have the dtype of the hidden states; those of fp16 are fp32, because a loss scale comes after them.
    """
    sides = dense.Side(hidden, head), dense.Side(teacher_hidden, teacher_head)
    loss = _Divergence(*sides, factor, spec, any(need))
    gradients = dense.run(loss, need)
    values = torch.where(factor == 0, 0.0, factor * loss.values()).to(loss.acc)
    return values, *gradients
