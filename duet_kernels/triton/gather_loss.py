"""A loss of the logits at K ids with its gradient in the hidden states, in one kernel that reads each row of W once.

    z[n,k]  = softcap tanh(scale (h[n] . W[i] + b[i]) / softcap),  i = ids[n,k]            (`gather`)
    f L[n], f dL/dz[n,k]                                                                   (`topk_divergence`)
    dx[n,k] = f dL/dz[n,k] scale (1 - (z[n,k] / softcap)^2)        dh[n] = sum_k dx[n,k] W[i]

Legend: N tokens, K slots, D hidden size, V vocabulary, f the row's factor, C bytes of an element, ACC fp32 (fp64 for fp64
inputs). Inputs have any strides. Absent slots, ids past the vocabulary and NaN as in `gather` and `topk_divergence`. A row
with f = 0 gives exactly 0 in f L, f dL/dz and dh, whatever it holds; the one kernel reads no row of W for it and gives 0 in z, too.

The forward pass needs all of a row of W before it knows dx, the backward pass needs the row again. Gathering twice costs
2 N K D C bytes; a token's K rows (512 KB) fit into no multiprocessor, but they do fit into 16 programs of 32 KB. So the
SPLITS programs of a token hold a strip of D each: every one loads its strip of the K rows into registers, writes its
K partial dot products to memory, waits for those of the other programs, makes z, L and dx of their sum (each for itself:
64 numbers), and multiplies dx with the strip that it still holds. Half operands stay packed in 32-bit words meanwhile and
are widened twice; kept wide they would take twice the registers.

Why it cannot hang. A program that waits keeps its place on the device, so a wait for a program that cannot start would be
for ever. Programs take numbers in the order in which they start, and SPLITS consecutive numbers share a token. So all
programs of every token but the newest have started, wait for nobody who has not, and end. Only those of the newest token,
SPLITS - 1 at most, can wait for one that has not started, and the places that the others leave are its. A device with
room for SPLITS programs at a time is enough, and every GPU has it.

A token's counter counts arrivals. An arrival is a release behind a barrier, the end of the wait an acquire before one: what
was written before is seen after.

It pays where the divergence costs less than the second gather: for raw logits and more than 48 slots. Everything else goes
one by one: logits, divergence, dh.

Bytes at N 8192, K 64, D 4096, bf16 (calculated): N K D C = 4.3 GB of rows once, 1.0 ms at 4.3 TB/s.

Memory: SPLITS K partial sums of each token that is launched, 4 KB; the tokens of a launch are as many as a quarter of the
workspace holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import grad_dtype, on_rocm, workspace_bytes
from ..head import LMHead, Need
from ..options import Divergence
from . import tiles
from .gather import linear_gather, slot_gradient, slot_gradients, sum_rows
from .primitives import (
    ACCUMULATORS,
    INTERPRETED,
    finish,
    require_grid,
)
from .topk_divergence import compare, topk_divergence


@triton.jit
def _widened(words, dtype: tl.constexpr):
    """The two halves of 32-bit words in fp32, the one at the lower address first."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _as_words(pointer, PACKED: tl.constexpr):
    """A pointer to what is loaded at a time: 32-bit words of two halves, or numbers."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True) if PACKED else pointer


@triton.jit
def _strip(split, D, WORDS: tl.constexpr, PIECE: tl.constexpr, EVEN: tl.constexpr):
    """(the places of a strip in a row of D words `[pieces, PIECE]`, which of them lie inside of the row)."""
    pieces = tl.arange(0, WORDS // PIECE)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    word = split * WORDS + pieces
    inside = tl.full(word.shape, 1, tl.int1) if EVEN else word < D
    return word, inside


@triton.jit
def _ids(row_ptr, stride, k, K, V):
    """The ids of a token's slots as int32: -1 for an absent slot, V for anything past the vocabulary."""
    ids = tl.load(row_ptr + k.to(tl.int64) * stride, mask=k < K, other=-1).to(tl.int64)
    return tl.maximum(tl.minimum(ids, V), -1).to(tl.int32)


@triton.jit
def _arrive_and_wait(counter_ptr, wanted):
    """Count this program in, and go on when `wanted` have been counted."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    while arrived < wanted:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _topk_loss_kernel(
    hidden_ptr, weight_ptr, bias_ptr, indices_ptr, teacher_ptr, factor_ptr,
    scratch_ptr, counter_ptr, loss_ptr, values_ptr, dvalues_ptr, dhidden_ptr,
    K, V, D,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_bv, stride_in, stride_ik, stride_tn, stride_tk, stride_fn,
    softcap: tl.float64, scale: tl.float64, temperature: tl.float64, beta: tl.float64, delta: tl.float64,
    HAS_SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr,
    DIVERGENCE: tl.constexpr, NORMALIZATION: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One token, one strip of WORDS words of D. FIRST: up to the wait, SECOND: from it on.

    The strip is `[slots, pieces, PIECE]`: a thread has the same words of all pieces, so that most sums are its own.
    """
    HALVES: tl.constexpr = 2 if PACKED else 1
    program = tl.program_id(0)
    if FIRST and SECOND and SPLITS > 1:
        program = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    n = (program // SPLITS).to(tl.int64)
    split = program % SPLITS
    # One slot a thread, not four that a wide load would bring: the strip leaves no registers for more.
    # `tl.minimum(program, 0)` is always 0. The compiler does not know it and then uses fewer registers.
    k = tl.max_contiguous(tl.arange(0, ROWS) + tl.minimum(program, 0), [2])
    word, inside = _strip(split, D // HALVES, WORDS, PIECE, EVEN)
    # No branch: the factor and the ids are under way together.
    live = tl.load(factor_ptr + n * stride_fn) != 0
    ids = tl.where(live, _ids(indices_ptr + n * stride_in, stride_ik, k, K, V), -1)
    known = (ids >= 0) & (ids < V)
    if FIRST or HIDDEN:
        row = _as_words(weight_ptr, PACKED) + ids.to(tl.int64)[:, None, None] * (stride_wv // HALVES)
        keep = known[:, None, None] & inside[None, :, :]
        w = tl.load(row + (word if PACKED else word.to(tl.int64) * stride_wd)[None, :, :], mask=keep, other=0)
    if FIRST:
        row = _as_words(hidden_ptr, PACKED) + n * (stride_hn // HALVES)
        h = tl.load(row + (word if PACKED else word.to(tl.int64) * stride_hd), mask=inside, other=0)
        if PACKED:
            h_low, h_high = _widened(h, hidden_ptr.dtype.element_ty)
            w_low, w_high = _widened(w, weight_ptr.dtype.element_ty)
            products = w_low * h_low[None, :, :] + w_high * h_high[None, :, :]
        else:
            products = w.to(ACC) * h.to(ACC)[None, :, :]
        x = tl.sum(tl.sum(products, 1), 1)
    place = scratch_ptr + n * (SPLITS * ROWS)
    if FIRST and not (SECOND and SPLITS == 1):
        tl.store(place + split * ROWS + k, x)
    if FIRST and SECOND and SPLITS > 1:
        _arrive_and_wait(counter_ptr + 1 + n, SPLITS)
    if SECOND:
        # Read again instead of kept.
        factor = tl.load(factor_ptr + n * stride_fn).to(ACC)
        live = factor != 0
        ids = _ids(indices_ptr + n * stride_in, stride_ik, k, K, V)
        known = (ids >= 0) & (ids < V)
        t = tl.load(
            teacher_ptr + n * stride_tn + k.to(tl.int64) * stride_tk, mask=k < K, other=float("-inf")
        ).to(ACC)
        if not (FIRST and SPLITS == 1):
            x = tl.full([ROWS], 0.0, ACC)
            for start in range(0, SPLITS, PARTS):
                other = start + tl.arange(0, PARTS)[:, None]
                part = place + other * ROWS + k[None, :]
                x += tl.sum(tl.load(part, mask=other < SPLITS, other=0.0, cache_modifier=".cg"), 0)
        z = finish(x, ids, bias_ptr, stride_bv, known, softcap, scale, HAS_SOFTCAP)
        z = tl.where(known, z, tl.where(ids < 0, float("-inf"), float("nan")))
        slot = t != float("-inf")
        none = tl.full([1], 0.0, ACC)
        loss, ds, _dtail = compare(
            z[None, :], t[None, :], slot[None, :], none, none, temperature, beta, delta, float("inf"),
            DIVERGENCE, NORMALIZATION, False, EPS,
        )  # fmt: skip
        dz = tl.where(live, tl.sum(factor * ds, 0), 0.0)
        dx = slot_gradient(dz, z, ids, V, softcap, scale, HAS_SOFTCAP)
        if split == 0:
            tl.store(loss_ptr + n + tl.arange(0, 1), tl.where(live, factor * loss, 0.0))
            tl.store(values_ptr + n * K + k, tl.where(live, z, 0.0), mask=k < K)
            tl.store(dvalues_ptr + n * K + k, dz, mask=k < K)
        # A row that counts nothing is 0, whatever it holds. And the compiler cannot know these words: it keeps
        # the strip packed while it waits and widens it again, instead of keeping it wide.
        counts = tl.where(dx != 0, -1, 0)[:, None, None]
        if HIDDEN:
            out = dhidden_ptr + n * D
            if PACKED:
                w_low, w_high = _widened(w & counts, weight_ptr.dtype.element_ty)
                low = tl.sum(w_low * dx[:, None, None], 0)
                high = tl.sum(w_high * dx[:, None, None], 0)
                dh = tl.join(low, high).to(dhidden_ptr.dtype.element_ty)
                d = word[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
                tl.store(out + d, dh, mask=inside[:, :, None])
            else:
                dh = tl.sum(tl.where(counts != 0, w.to(ACC), 0.0) * dx[:, None, None], 0)
                tl.store(out + word, dh.to(dhidden_ptr.dtype.element_ty), mask=inside)


# --- launcher --------------------------------------------------------------------------------------------------


def topk_loss(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    teacher: Tensor,
    factor: Tensor,
    spec: Divergence,
    need: Need,
    *,
    tile: tiles.LossTile | None = None,
    phases: bool = INTERPRETED,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(`[N]` f L, `[N, K]` z at the ids, f dL/dz, dh if needed; fp32 for fp16) of a loss without a log-sum-exp.

    `tile` asks for one kernel with that tile, `phases` for its two phases as two launches, for tests and measurements.
    """
    k = indices.shape[1]
    together = need.hidden and spec.raw and 4 * k > 3 * tiles.LOSS_SLOTS
    if not (together or tile) or k > tiles.LOSS_SLOTS or 0 in (*hidden.shape, k, len(head.weight)):
        return _one_by_one(hidden, head, indices, teacher, factor, spec, need)
    (n, d), v, weight, bias = hidden.shape, len(head.weight), head.weight, head.bias
    device, arch = hidden.device, tiles.architecture(hidden.device)
    packed = _packs(hidden, weight)
    halves = 2 if packed else 1
    tile = tile or tiles.loss_tile(arch, weight.element_size() if packed else head.acc.itemsize, k, d)
    splits = tiles.cdiv(d, tile.columns)
    loss = torch.empty(n, dtype=head.acc, device=device)
    values = torch.empty(n, k, dtype=head.acc, device=device)
    dvalues = torch.empty_like(values)
    dhidden = torch.empty(n, d, dtype=grad_dtype(hidden.dtype), device=device) if need.hidden else None
    each = splits * tile.rows
    tokens = min(n, max(1, workspace_bytes(device) // (4 * each * head.acc.itemsize)))
    scratch = torch.empty(tokens * each if splits > 1 else 0, dtype=head.acc, device=device)

    def launch(rows: slice, first: bool, second: bool) -> None:
        counters, options = None, {}
        if first and second and splits > 1:
            counters = torch.zeros(1 + rows.stop - rows.start, dtype=torch.int32, device=device)
            if not on_rocm():  # Triton's compiler for AMD knows no such option
                options = {"maxnreg": tile.registers}
        h, ids, t, f = hidden[rows], indices[rows], teacher[rows], factor[rows]
        _topk_loss_kernel[(require_grid(len(h) * splits, "topk_distill_loss"),)](
            h, weight, bias, ids, t, f,
            scratch, counters, loss[rows], values[rows], dvalues[rows], None if dhidden is None else dhidden[rows],
            k, v, d,
            *h.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *ids.stride(), *t.stride(), f.stride(0),
            head.softcap or 0.0, head.scale, spec.temperature, spec.beta, spec.delta,
            HAS_SOFTCAP=head.softcap is not None, HIDDEN=need.hidden,
            DIVERGENCE=spec.name, NORMALIZATION=spec.normalization, EPS=torch.finfo(head.acc).eps, ACC=ACCUMULATORS[head.acc],
            FIRST=first, SECOND=second,
            PACKED=packed, EVEN=d % tile.columns == 0, SPLITS=splits, PARTS=min(16, tiles.next_power_of_2(splits)),
            ROWS=tile.rows, WORDS=tile.columns // halves, PIECE=tile.piece // halves,
            num_warps=tile.warps, **options,
        )  # fmt: skip

    for start in range(0, n, tokens):
        rows = slice(start, min(start + tokens, n))
        if phases and splits > 1:
            launch(rows, True, False)
            launch(rows, False, True)
        else:
            launch(rows, True, True)
    return loss, values, dvalues, dhidden


def _packs(hidden: Tensor, weight: Tensor) -> bool:
    """Whether rows of both can be read as 32-bit words of two halves."""
    halves = hidden.dtype == weight.dtype and hidden.element_size() == 2 and hidden.shape[1] % 2 == 0
    return halves and all(
        x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0 for x in (hidden, weight)
    )


def _one_by_one(
    hidden: Tensor,
    head: LMHead,
    indices: Tensor,
    teacher: Tensor,
    factor: Tensor,
    spec: Divergence,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`topk_loss` by logits, divergence, slots and dh, each in its own kernel."""
    weight, out = head.weight, grad_dtype(hidden.dtype)
    values = linear_gather(hidden, head, indices)
    loss, dvalues, _ = topk_divergence(values, teacher, None, None, factor, spec)
    if not need.hidden:
        return loss, values, dvalues, None
    if values.numel() == 0 or weight.numel() == 0:
        nothing = torch.zeros_like(hidden, dtype=out, memory_format=torch.contiguous_format)
        return loss, values, dvalues, nothing
    dx, row = slot_gradients(dvalues, values, hidden, head, indices)
    return loss, values, dvalues, sum_rows(dx, row, hidden, weight, out)
