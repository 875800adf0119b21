"""A loss of the logits at K ids with its gradient in the hidden states, in one kernel that reads each row of W once.

    z[n,k]  = softcap tanh(scale (h[n] . W[i] + b[i]) / softcap),  i = ids[n,k]            (`gather`)
    f L[n], f dL/dz[n,k]                                                                   (`topk_divergence`)
    dx[n,k] = f dL/dz[n,k] scale (1 - (z[n,k] / softcap)^2)        dh[n] = sum_k dx[n,k] W[i]

Legend: N tokens, K slots, D hidden size, V vocabulary, f the row's factor, C bytes of an element, ACC fp32 (fp64 for fp64
inputs). Inputs have any strides. Absent slots, ids past the vocabulary and NaN as in `gather` and `topk_divergence`. A row
with f = 0 is not read and gives exactly 0 in all results.

The forward pass needs all of a row of W before it knows dx, the backward pass needs the row again. Gathering twice costs
2 N K D C bytes; a token's K rows (512 KB) fit into no multiprocessor, but they do fit into 16 programs of 32 KB. So the
SPLITS programs of a token hold a strip of D each: every one loads its strip of the K rows into registers, writes its
K partial dot products to memory, waits for those of the other programs, makes z, L and dx of their sum (each for itself:
64 numbers), and multiplies dx with the strip that it still holds. Half operands stay packed in 32-bit words meanwhile and
are widened twice; kept wide they would take twice the registers.

Why it cannot hang. A program that waits occupies its multiprocessor, so a wait for a program that has not started could
be for ever. Two things exclude that. First, the grid is launched as a *cooperative* one: the driver starts it only if all
of its programs fit on the device at the same time, and refuses it otherwise. So every program that anybody waits for
is running. Second, all programs of a group take the same tokens in the same order (group, group + GROUPS, ...) and wait once
a token, and none waits for another group: the slowest of a group waits for nobody, hence always one of them goes on.
A refused launch is no error: the two phases then run as two launches, which wait by their order.

The counter of a group counts arrivals and is never set back: of its `step`-th token all partial sums are there when it
says SPLITS x (step + 1). The sums of consecutive tokens lie in two places in turn. Who writes the sums of token step + 2
over those of step has seen all programs arrive at step + 1, and each had read the sums of step before. A program's
arrival is a release behind a barrier, a wait is an acquire before one: what was written before is seen after.

Bytes at N 8192, K 64, D 4096, bf16 (calculated): N K D C = 4.3 GB of rows once, 1.0 ms at 4.3 TB/s. Measured, H200, prototype:
1.47 ms for both passes in one, 2.00 ms for the two gathers.

Memory: SPLITS K partial sums for each group that runs, twice: 0.3 MB. As two phases: for each token, 34 MB.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import grad_dtype
from ..head import LMHead, Need
from ..options import Divergence
from . import tiles
from .gather import linear_gather, slot_gradient, slot_gradients, sum_rows
from .primitives import (
    INTERPRETED,
    accumulator,
    current_device,
    finish,
    require_device,
    require_grid,
    require_sizes,
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
def _words(piece, D, PIECE: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr):
    """(the positions of a piece of D in words, which of them lie inside of a row)."""
    HALVES: tl.constexpr = 2 if PACKED else 1
    word = piece * (PIECE // HALVES) + tl.arange(0, PIECE // HALVES)
    inside = tl.full(word.shape, 1, tl.int1) if EVEN else word < D // HALVES
    return word.to(tl.int64), inside


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
    scratch_ptr, loss_ptr, values_ptr, dvalues_ptr, dhidden_ptr,
    N, K, V, D, GROUPS,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_bv, stride_in, stride_ik, stride_tn, stride_tk, stride_fn,
    softcap: tl.float64, scale: tl.float64, temperature: tl.float64, beta: tl.float64, delta: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr,
    DIVERGENCE: tl.constexpr, NORMALIZATION: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One strip of PIECES PIECE of D; its group's tokens one after the other. FIRST: up to the wait, SECOND: from it on."""
    group = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    step = 0
    n = group.to(tl.int64)
    # What does not change from token to token is made again: kept, it would take registers that hold W.
    for _ in tl.range(group, N, GROUPS, disable_licm=True):
        # One slot a thread, not four that a wide load would bring: the strip leaves no registers for more.
        k = tl.max_contiguous(tl.arange(0, ROWS), [2])
        if tl.load(factor_ptr + n * stride_fn) != 0:
            ids = _ids(indices_ptr + n * stride_in, stride_ik, k, K, V)
            known = (ids >= 0) & (ids < V)
            strip = ()
            for i in tl.static_range(PIECES if FIRST or HIDDEN else 0):
                word, inside = _words(split * PIECES + i, D, PIECE, PACKED, EVEN)
                row = _as_words(weight_ptr, PACKED) + word[None, :] * stride_wd
                keep = known[:, None] & inside[None, :]
                w = tl.load(
                    row + ids.to(tl.int64)[:, None] * (stride_wv // 2 if PACKED else stride_wv),
                    mask=keep,
                    other=0,
                )
                strip = strip + (w if PACKED else w.to(ACC),)  # noqa: RUF005 (Triton has no starred tuples)
            if FIRST:
                # A thread's four words of a row are one sum at once: 32 sums would take the registers of the strip.
                WORDS: tl.constexpr = PIECE // 2 if PACKED else PIECE
                dots = tl.full([ROWS, WORDS // 4], 0.0, ACC)
                for i in tl.static_range(PIECES):
                    word, inside = _words(split * PIECES + i, D, PIECE, PACKED, EVEN)
                    row = _as_words(hidden_ptr, PACKED) + word * stride_hd
                    h = tl.load(row + n * (stride_hn // 2 if PACKED else stride_hn), mask=inside, other=0)
                    if PACKED:
                        h_low, h_high = _widened(h, hidden_ptr.dtype.element_ty)
                        w_low, w_high = _widened(strip[i], weight_ptr.dtype.element_ty)
                        dots += tl.sum(tl.reshape(w_low * h_low[None, :], [ROWS, WORDS // 4, 4]), 2)
                        dots += tl.sum(tl.reshape(w_high * h_high[None, :], [ROWS, WORDS // 4, 4]), 2)
                    else:
                        dots += tl.sum(tl.reshape(strip[i] * h.to(ACC)[None, :], [ROWS, WORDS // 4, 4]), 2)
                x = tl.sum(dots, 1)
            place = scratch_ptr + (group * 2 + step % 2 if FIRST and SECOND else n) * (SPLITS * ROWS)
            if FIRST and not (SECOND and SPLITS == 1):
                tl.store(place + split * ROWS + k, x)
            if FIRST and SECOND and SPLITS > 1:
                # The counters lie behind two places of partial sums for each group.
                counters = (scratch_ptr + GROUPS * 2 * SPLITS * ROWS).to(
                    tl.pointer_type(tl.int32), bitcast=True
                )
                _arrive_and_wait(counters + group, (step + 1) * SPLITS)
            if SECOND:
                # Read again instead of kept.
                factor = tl.load(factor_ptr + n * stride_fn).to(ACC)
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
                z = finish(x, ids, bias_ptr, stride_bv, known, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
                z = tl.where(known, z, tl.where(ids < 0, float("-inf"), float("nan")))
                slot = t != float("-inf")
                none = tl.full([1], 0.0, ACC)
                loss, ds, _dtail = compare(
                    z[None, :], t[None, :], slot[None, :], none, none, temperature, beta, delta,
                    DIVERGENCE, NORMALIZATION, EPS,
                )  # fmt: skip
                dz = tl.sum(factor * ds, 0)
                dx = slot_gradient(dz, z, ids, V, softcap, scale, HAS_SOFTCAP)
                if split == 0:
                    tl.store(loss_ptr + n + tl.arange(0, 1), factor * loss)
                    tl.store(values_ptr + n * K + k, z, mask=k < K)
                    tl.store(dvalues_ptr + n * K + k, dz, mask=k < K)
                # A row that counts nothing is 0, whatever it holds. And the compiler cannot know these words: it keeps
                # the strip packed while it waits and widens it again, instead of keeping it wide.
                counts = tl.where(dx != 0, -1, 0)[:, None]
                for i in tl.static_range(PIECES if HIDDEN else 0):
                    if PACKED:
                        w_low, w_high = _widened(strip[i] & counts, weight_ptr.dtype.element_ty)
                        terms = tl.join(w_low * dx[:, None], w_high * dx[:, None])
                        dh = tl.reshape(tl.sum(terms, 0), [PIECE])
                    else:
                        dh = tl.sum(tl.where(counts != 0, strip[i], 0.0) * dx[:, None], 0)
                    d, inside = _words(split * PIECES + i, D, PIECE, False, EVEN)
                    tl.store(dhidden_ptr + n * D + d, dh.to(dhidden_ptr.dtype.element_ty), mask=inside)
            step += 1
        elif SECOND:
            if split == 0:
                tl.store(loss_ptr + n, 0.0)
                tl.store(values_ptr + n * K + k, tl.full([ROWS], 0.0, ACC), mask=k < K)
                tl.store(dvalues_ptr + n * K + k, tl.full([ROWS], 0.0, ACC), mask=k < K)
            for i in tl.static_range(PIECES if HIDDEN else 0):
                d, inside = _words(split * PIECES + i, D, PIECE, False, EVEN)
                zero = tl.full([PIECE], 0.0, dhidden_ptr.dtype.element_ty)
                tl.store(dhidden_ptr + n * D + d, zero, mask=inside)
        n += GROUPS


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

    `tile` replaces the table's choice, `phases` asks for two launches, for tests and measurements.
    """
    (n, d), (v, k) = hidden.shape, (head.weight.shape[0], indices.shape[1])
    if k > tiles.LOSS_SLOTS or 0 in (n, d, k, v):
        return _one_by_one(hidden, head, indices, teacher, factor, spec, need)
    weight, bias = head.weight, head.bias
    require_device(hidden=hidden, weight=weight, bias=bias, indices=indices, teacher=teacher, factor=factor)
    require_sizes("topk_distill_loss", hidden=max(n, d), weight=v)
    torch_acc, acc = accumulator(hidden, weight)
    device, arch = hidden.device, tiles.architecture(hidden.device)
    packed = _packs(hidden, weight)
    tile = tile or tiles.loss_tile(arch, weight.element_size() if packed else torch_acc.itemsize, k, d)
    splits = triton.cdiv(d, tile.columns)
    groups = min(n, tiles.multiprocessors(device) * tile.programs // splits)
    loss = torch.empty(n, dtype=torch_acc, device=device)
    values = torch.empty(n, k, dtype=torch_acc, device=device)
    dvalues = torch.empty_like(values)
    dhidden = torch.empty(n, d, dtype=grad_dtype(hidden.dtype), device=device) if need.hidden else None

    def launch(groups: int, scratch: Tensor, **options: object) -> None:
        _topk_loss_kernel[(require_grid(groups * splits, "topk_distill_loss"),)](
            hidden, weight, bias, indices, teacher, factor,
            scratch, loss, values, dvalues, dhidden if need.hidden else loss,
            n, k, v, d, groups,
            *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
            *indices.stride(), *teacher.stride(), factor.stride(0),
            head.softcap or 0.0, head.scale, spec.temperature, spec.beta, spec.delta,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=head.softcap is not None, HIDDEN=need.hidden,
            DIVERGENCE=spec.name, NORMALIZATION=spec.normalization, EPS=torch.finfo(torch_acc).eps, ACC=acc,
            PACKED=packed, EVEN=d % tile.columns == 0, SPLITS=splits, PARTS=min(16, triton.next_power_of_2(splits)),
            ROWS=tile.rows, PIECES=tile.columns // tile.piece, PIECE=tile.piece,
            num_warps=tile.warps, **options,
        )  # fmt: skip

    with current_device(hidden):
        if splits == 1:
            launch(n, loss, FIRST=True, SECOND=True)
        elif phases or groups == 0 or not _together(launch, groups, splits * tile.rows, tile.registers, loss):
            partial = torch.empty(n * splits * tile.rows, dtype=torch_acc, device=device)
            launch(n, partial, FIRST=True, SECOND=False)
            launch(n, partial, FIRST=False, SECOND=True)
    return loss, values, dvalues, dhidden


_refused: set[torch.device] = set()  # devices, or shares of one, on which the programs do not fit together


def _together(launch: Callable[..., None], groups: int, sums: int, registers: int, like: Tensor) -> bool:
    """Launch programs that wait for each other; False where the driver says that they cannot run at the same time."""
    if like.device in _refused:
        return False
    counters = triton.cdiv(4 * groups, like.element_size())
    scratch = torch.zeros(2 * groups * sums + counters, dtype=like.dtype, device=like.device)
    try:
        launch(groups, scratch, FIRST=True, SECOND=True, maxnreg=registers, launch_cooperative_grid=True)
    except RuntimeError as error:
        if "cooperative launch" not in str(error):
            raise
        _refused.add(like.device)
        return False
    return True


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
    """`topk_loss` for more slots than a program holds: logits, divergence, slots and dh, each by its own kernel."""
    weight, out = head.weight, grad_dtype(hidden.dtype)
    values = linear_gather(hidden, head, indices)
    loss, dvalues, _ = topk_divergence(values, teacher, None, None, factor, spec)
    if not need.hidden:
        return loss, values, dvalues, None
    if values.numel() == 0 or weight.numel() == 0:
        return (
            loss,
            values,
            dvalues,
            torch.zeros_like(hidden, dtype=out, memory_format=torch.contiguous_format),
        )
    with current_device(hidden):
        dx, row = slot_gradients(dvalues, values, hidden, weight, indices, head.softcap, head.scale)
        return loss, values, dvalues, sum_rows(dx, row, hidden, weight, out)
