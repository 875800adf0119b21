"""A divergence between a student's and a teacher's logits at K ids, and its gradient, in one pass over `[N, K]`.

Legend: N tokens, K slots, T temperature, s / t student and teacher logits, f the row's factor; p (teacher) and q (student)
the distributions at x = z / T; S the support; u = log q - log p. What each divergence sums over the slots is in `terms`.

    none          s and t themselves                                               (huber, mse, l1)
    renormalize   S = slots: p, q are softmaxes over the slots
    tail          S = slots and one bucket with the logits t_tail, s_tail
    zeroed        p over the slots, q over slots and tail; sum over the slots      (forward_kl)
    truncated     p and q over slots and tail;            sum over the slots      (forward_kl, reverse_kl)
    generalized   the same, sum of the terms of `terms`, each of which is >= 0     (forward_kl, reverse_kl)

With P and Q the sums of p and q over the slots, q_tail = 1 - Q:

    zeroed, truncated   forward   L = sum p (log p - log q),  dL/dx = q P - p,               dL/ds_tail = q_tail P
    truncated           reverse   L = sum q u,                dL/dx = q (u - L + q_tail),    dL/ds_tail = -q_tail (L + Q)
    generalized                   a = dL/d(log q) itself,     dL/dx = a - q sum a,           dL/ds_tail = -q_tail sum a

A clip C replaces each term above C (the tail's too) by C, and its a by 0.

Results: f L, f dL/ds = f dL/dx / T, and f dL/ds_tail for what reads the student's tail. Nats; no factor T^2.

A slot whose teacher logit is -inf is absent: it counts nowhere and its gradient is 0; nothing present gives 0. A row
with f = 0 is not read and gives exactly 0. A NaN stays in its row. l1 and tvd do not turn rounding into +-1: |d|, |u|
up to 8 eps of the row's largest finite logit count as 0, in value and gradient.

Where digits would be lost. Logits are compared before they are normalised: u = v - log(mean of exp(v) under p), where
v = (s - t) / T beyond the gap of the two largest logits. s - t of near logits is exact, while log q - log p carries
the rounding of both log-sum-exps; and the mean is 1 + mean of expm1(v) where v is small. A slot or a tail with more than
3/4 of q: a - q sum a would be the difference of two numbers near |a|, so it is minus the sum of all other gradients.

Bytes: 12 N K (fp32): 6 MB at N 8192, K 64, microseconds beside the gathers' milliseconds; about 60 FLOP a slot. A
program holds whole rows in registers, hence K <= 8192 (`tiles.MAX_SLOTS`). `compare` is also a part of the fused loss
(`gather_loss`), which has the student's logits in registers already.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import acc_dtype
from ..options import Divergence
from . import tiles
from .primitives import (
    ACCUMULATORS,
    expm1_near_zero,
    log1p,
    number,
    require_grid,
)
from .terms import clipped, expected, gradient, minus, of_distributions, of_logits

# --- distributions over the slots ------------------------------------------------------------------------------


@triton.jit
def _logits(x_ptr, stride_n, stride_k, n, k, mask, ACC: tl.constexpr):
    return tl.load(
        x_ptr + n[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k, mask=mask, other=0.0
    ).to(ACC)


@triton.jit
def _maximum(z, slot):
    """`[n]` the largest logit, 0 where there is none."""
    largest = tl.max(tl.where(slot, z, float("-inf")), axis=1)
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _softmax(z, slot, base, tail, T, HAS_TAIL: tl.constexpr):
    """(probabilities of the slots, of the tail, log-sum-exp as two parts: log(total) + origin, whether that is the tail).

    The origin is the largest of all: base / T, or the tail where it lies above every slot.
    """
    origin = base / T
    above = origin != origin  # nowhere, or NaN already
    if HAS_TAIL:
        above = tail > origin
        lift = tl.where(above, tail - origin, 0.0)
        e = tl.where(slot, tl.exp((z - base[:, None]) / T - lift[:, None]), 0.0)
        e_tail = tl.where(above, 1.0, tl.where(tail == float("-inf"), 0.0, tl.exp(tail - origin)))
        total = tl.sum(e, axis=1) + e_tail
        origin = tl.where(above, tail, origin)
    else:
        e = tl.where(slot, tl.exp((z - base[:, None]) / T), 0.0)
        e_tail = base * 0.0
        total = tl.sum(e, axis=1)
    # A sum of zero over no slot at all is no distribution; over slots it is 0 / 0 and must say so.
    nothing = (total == 0) & (tl.max(slot.to(tl.int32), axis=1) == 0)
    total = tl.where(nothing, 1.0, total)
    return e / total[:, None], e_tail / total, total, origin, above


# --- forward and gradient --------------------------------------------------------------------------------------


@triton.jit
def compare(
    s, t, slot, s_tail, t_tail,
    temperature, beta, delta, clip,
    DIVERGENCE: tl.constexpr, NORMALIZATION: tl.constexpr, CLIPPED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """(L `[n]`, dL/ds `[n, k]`, dL/ds_tail `[n]`) of rows of logits in ACC; what is no slot counts nowhere."""
    ACC: tl.constexpr = s.dtype
    s = tl.where(slot, s, 0.0)
    t = tl.where(slot, t, 0.0)
    dtail = tl.zeros_like(s_tail)

    size = tl.maximum(tl.abs(s), tl.abs(t))
    noise = 8 * EPS * tl.max(tl.where(size == float("inf"), 0.0, size), axis=1)

    if NORMALIZATION == "none":
        terms, ds = of_logits(s - t, noise[:, None], delta, DIVERGENCE)
        loss = tl.sum(terms, axis=1)
    else:
        STUDENT_TAIL: tl.constexpr = NORMALIZATION != "renormalize"
        TEACHER_TAIL: tl.constexpr = STUDENT_TAIL and NORMALIZATION != "zeroed"
        BUCKET: tl.constexpr = NORMALIZATION == "tail"
        T = number(temperature, ACC)
        s_base = _maximum(s, slot)
        t_base = _maximum(t, slot)
        q, q_tail, s_total, s_origin, s_above = _softmax(s, slot, s_base, s_tail, T, STUDENT_TAIL)
        p, p_tail, t_total, t_origin, t_above = _softmax(t, slot, t_base, t_tail, T, TEACHER_TAIL)
        # u = v - log(s_total / t_total): v is the gap of the logits beyond that of the origins.
        gap = (s_base - t_base) / T
        if STUDENT_TAIL:
            gap = tl.where(s_above | t_above, s_origin - t_origin, gap)
        v = tl.where(slot, (s - t) / T - gap[:, None], 0.0)
        # s_total / t_total is the mean of exp(v) under p; as 1 + mean of expm1(v) it keeps the digits of small v.
        moved = tl.sum(p * expm1_near_zero(v), axis=1)
        near = tl.min((tl.abs(v) <= 0.5).to(tl.int32), axis=1) == 1
        if TEACHER_TAIL:
            empty = (s_tail == float("-inf")) & (t_tail == float("-inf"))
            v_tail = tl.where(empty, 0.0, (s_tail - t_tail) - gap)
            moved += p_tail * expm1_near_zero(v_tail)
            near = near & (tl.abs(v_tail) <= 0.5)
        elif STUDENT_TAIL:
            moved += q_tail * (s_total / t_total)
        ratio = tl.where(near, log1p(moved), tl.log(s_total / t_total))
        u = tl.where(slot, v - ratio[:, None], 0.0)
        if BUCKET:
            u_tail = v_tail - ratio

        if NORMALIZATION == "zeroed" or (NORMALIZATION == "truncated" and DIVERGENCE != "reverse_kl"):
            tl.static_assert(DIVERGENCE == "forward_kl")
            loss = tl.sum(expected(p, -u), axis=1)
            ds = minus(q, p, u)
            mass = tl.sum(p, axis=1)
            dtail = q_tail * mass
            if NORMALIZATION == "truncated":
                # q P - p = P (q - p) - p (1 - P), and 1 - P is the tail's probability itself.
                ds = mass[:, None] * ds - p * p_tail[:, None]
        else:
            noise = noise / T
            if BUCKET:
                size_tail = tl.maximum(tl.abs(s_tail), tl.abs(t_tail))
                noise = tl.maximum(noise, tl.where(size_tail == float("inf"), 0.0, 8 * EPS * size_tail))
            terms, a = of_distributions(p, q, u, noise[:, None], beta, DIVERGENCE, False)
            if CLIPPED:
                terms, a = clipped(terms, a, clip)
            loss = tl.sum(terms, axis=1)
            total = tl.sum(a, axis=1)
            if BUCKET:
                term_tail, a_tail = of_distributions(p_tail, q_tail, u_tail, noise, beta, DIVERGENCE, False)
                if CLIPPED:
                    term_tail, a_tail = clipped(term_tail, a_tail, clip)
                loss += term_tail
                total += a_tail
                dtail = gradient(a_tail, q_tail, total)
            ds = gradient(a, q, total[:, None])
            if NORMALIZATION == "generalized":
                dtail = -expected(q_tail, total)
            elif NORMALIZATION == "truncated":
                loss = total
                ds += q * q_tail[:, None]
                dtail = -expected(q_tail, total + tl.sum(q, axis=1))
            lead = q > 0.75
            tail_leads = q_tail > 0.75
            others = tl.sum(tl.where(slot & ~lead, ds, 0.0), axis=1) + tl.where(tail_leads, 0.0, dtail)
            ds = tl.where(lead, -others[:, None], ds)
            dtail = tl.where(tail_leads, -others, dtail)
        ds = ds / T
    return loss, tl.where(slot, ds, 0.0), dtail


@triton.jit
def _divergence_kernel(
    student_ptr, teacher_ptr, student_tail_ptr, teacher_tail_ptr, factor_ptr,
    loss_ptr, dstudent_ptr, dtail_ptr,
    N, K,
    stride_sn, stride_sk, stride_tn, stride_tk, stride_st, stride_tt, stride_fn,
    temperature: tl.float64, beta: tl.float64, delta: tl.float64, clip: tl.float64,
    STUDENT_TAIL: tl.constexpr, TEACHER_TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr, NORMALIZATION: tl.constexpr, CLIPPED: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """TOKENS rows: f L, f dL/ds, f dL/ds_tail."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, COLUMNS)
    factor = tl.load(factor_ptr + n * stride_fn, mask=n < N, other=0.0).to(ACC)
    live = factor != 0
    inside = live[:, None] & (k < K)[None, :]
    t = _logits(teacher_ptr, stride_tn, stride_tk, n, k, inside, ACC)
    s = _logits(student_ptr, stride_sn, stride_sk, n, k, inside, ACC)
    s_tail = tl.full([TOKENS], 0.0, ACC)
    t_tail = tl.full([TOKENS], 0.0, ACC)
    if TEACHER_TAIL:
        t_tail = tl.load(teacher_tail_ptr + n * stride_tt, mask=live, other=0.0).to(ACC)
    if STUDENT_TAIL:
        s_tail = tl.load(student_tail_ptr + n * stride_st, mask=live, other=0.0).to(ACC)
    slot = inside & (t != float("-inf"))
    loss, ds, dtail = compare(
        s, t, slot, s_tail, t_tail, temperature, beta, delta, clip, DIVERGENCE, NORMALIZATION, CLIPPED, EPS
    )
    tl.store(loss_ptr + n, tl.where(live, factor * loss, 0.0), mask=n < N)
    ds = tl.where(slot, factor[:, None] * ds, 0.0)
    tl.store(dstudent_ptr + n[:, None] * K + k[None, :], ds, mask=(n < N)[:, None] & (k < K)[None, :])
    if STUDENT_TAIL:
        tl.store(dtail_ptr + n, tl.where(live, factor * dtail, 0.0), mask=n < N)


# --- launcher --------------------------------------------------------------------------------------------------


def topk_divergence(
    student_nk: Tensor,
    teacher_nk: Tensor,
    student_tail_n: Tensor | None,
    teacher_tail_n: Tensor | None,
    factor_n: Tensor,
    spec: Divergence,
) -> tuple[Tensor, Tensor, Tensor]:
    """(`[N]` f L, `[N, K]` f dL/ds, `[N]` f dL/ds_tail or an empty tensor), in ACC."""
    student_tail_n = student_tail_n if spec.needs_student_logsumexp else None
    teacher_tail_n = teacher_tail_n if spec.needs_teacher_logsumexp else None
    n, k = student_nk.shape
    acc = acc_dtype(student_nk.dtype)
    loss = torch.empty(n, dtype=acc, device=student_nk.device)
    dstudent = torch.empty(n, k, dtype=acc, device=student_nk.device)
    dtail = torch.empty(0 if student_tail_n is None else n, dtype=acc, device=student_nk.device)
    if n == 0:
        return loss, dstudent, dtail
    if k == 0:
        return loss.zero_(), dstudent, dtail.zero_()
    tile = tiles.divergence_tile(k)
    _divergence_kernel[(require_grid(tiles.cdiv(n, tile.tokens), "topk_divergence"),)](
        student_nk, teacher_nk, student_tail_n, teacher_tail_n, factor_n,
        loss, dstudent, dtail,
        n, k,
        *student_nk.stride(), *teacher_nk.stride(),
        0 if student_tail_n is None else student_tail_n.stride(0),
        0 if teacher_tail_n is None else teacher_tail_n.stride(0),
        factor_n.stride(0),
        spec.temperature, spec.beta, spec.delta, spec.clip,
        STUDENT_TAIL=student_tail_n is not None, TEACHER_TAIL=teacher_tail_n is not None,
        DIVERGENCE=spec.name, NORMALIZATION=spec.normalization, CLIPPED=spec.clip < torch.inf, EPS=torch.finfo(acc).eps, ACC=ACCUMULATORS[acc],
        TOKENS=tile.tokens, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return loss, dstudent, dtail
