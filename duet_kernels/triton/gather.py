"""Logits at given ids without a pass over the vocabulary, and their gradient.

    x[n,k]  = scale (sum_d h[n,d] W[i,d] + b[i]),  i = indices[n,k]
    z[n,k]  = softcap tanh(x[n,k] / softcap)                        (z = x without a softcap)
    dx[n,k] = dz[n,k] scale (1 - (z[n,k] / softcap)^2)
    dh[n]   = sum_k dx[n,k] W[i]                                    (dW and db: `sparse_weight`)

Legend: N tokens, K slots, D hidden size, V vocabulary, E = N K (token, slot) pairs, C bytes of an element,
ACC fp32 (fp64 for fp64 inputs). Inputs have any strides.

A slot with id < 0 is absent: z = -inf, no gradient. An id >= V gives NaN, in z and in that token's dh. A slot whose
dz is exactly 0 is skipped: neither its row of W nor its token's row of h is read, so a masked token whose hidden state
is NaN leaves no trace.

Bytes and FLOP (calculated, at N 8192, K 64, D 4096, bf16; the times measured on an H200, commit 8576f91):

| kernel    | reads                       | writes  | FLOP  | bound by                                |
|-----------|-----------------------------|---------|-------|-----------------------------------------|
| forward   | N K D C gathered = 4.3 GB   | N K 4   | 2 NKD | memory: 0.997 ms = 4.3 TB/s             |
| dh        | N K D C gathered = 4.3 GB   | N D C   | 2 NKD | memory: 0.998 ms = 4.3 TB/s             |

4.3 GFLOP on the plain fp32 units are 0.15 ms with the conversions, an order below the loads; tensor cores have nothing
to do here, because no two tokens share their K rows. Products accumulate in a 2-D tile that is reduced once at the end:
a reduction in the loop would put shuffles and barriers between the loads.

Order of programs, which decides what L2 (50 MB on an H200) holds. Forward: the slots of a token side by side, so that
h[n] is read from memory once, and a row of W that is wanted again within about a hundred tokens comes from L2.
dh: one slab of D after the other, all tokens in each; of a slab L2 holds the rows of the last several hundred tokens,
and the price is reading the ids and dx once a slab, 8 K bytes against the 1 KB K of the slab's rows.

Many ids: from K = V / 156 (bf16, calculated; `tiles.GATHER_CROSSOVER`) all logits of a block of tokens by the library's
product, of which a small kernel picks K, are cheaper than K rows of W a token: 1 G = 2 N D V FLOP and 8 N V bytes. The
backward pass stays sparse whatever K is: as a product in the operands' dtype it would round dx, a sum of corrections that
have to stay exact, and in fp32 it costs an order more than in bf16 (50 against 790 TFLOP/s).

Workspace: of the forward pass none, or the logits of a block of tokens within `workspace_bytes()`. Of the backward pass
dx and ids, 8 E bytes (ACC fp32), and with a trainable head what `sparse_weight` says: 21 MB + 34 MB at the shape above.
**With a trainable head that is 40 bytes a pair whatever the workspace is set to**: from E = 6.7 million pairs
(N 8192, K 820) it is more than 256 MiB; pass fewer tokens at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import workspace_bytes
from ..head import LMHead, Need
from ..products import product
from . import tiles
from .primitives import ACCUMULATORS, finish, load_rows, number, require_grid
from .sparse_weight import SortedPairs, require_pairs

# --- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, indices_ptr, values_ptr,
    K, V, D,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_bv, stride_in, stride_ik,
    softcap: tl.float64, scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token, ROWS of its slots: z."""
    blocks = tl.cdiv(K, ROWS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    ids = tl.load(indices_ptr + n * stride_in + k.to(tl.int64) * stride_ik, mask=k < K, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    # A masked token has no id at all: its program reads nothing.
    stop = tl.where(tl.max(known.to(tl.int32), 0) > 0, D, 0)
    dots = tl.full([ROWS, COLUMNS], 0.0, ACC)
    for start in range(0, stop, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        keep = known[:, None] & (d < D)[None, :]
        # W before h: h changes layout through shared memory, and its barrier would hold back W's loads.
        w = load_rows(weight_ptr, ids, d, stride_wv, stride_wd, keep, ACC)
        h = tl.load(hidden_ptr + n * stride_hn + d.to(tl.int64) * stride_hd, mask=d < D, other=0.0).to(ACC)
        dots += w * h[None, :]
    z = finish(tl.sum(dots, axis=1), ids, bias_ptr, stride_bv, known, softcap, scale, HAS_SOFTCAP)
    z = tl.where(known, z, tl.where(ids < 0, float("-inf"), float("nan")))
    tl.store(values_ptr + n * K + k, z, mask=k < K)


@triton.jit
def _pick_kernel(
    product_ptr, bias_ptr, indices_ptr, values_ptr,
    E, K, V,
    stride_bv, stride_in, stride_ik,
    softcap: tl.float64, scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK (token, slot) pairs: z from the products h W^T of all ids."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = e // K
    ids = tl.load(indices_ptr + n * stride_in + (e % K) * stride_ik, mask=e < E, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    x = tl.load(product_ptr + n * V + ids, mask=known, other=0.0).to(ACC)
    z = finish(x, ids, bias_ptr, stride_bv, known, softcap, scale, HAS_SOFTCAP)
    z = tl.where(known, z, tl.where(ids < 0, float("-inf"), float("nan")))
    tl.store(values_ptr + e, z, mask=e < E)


# --- backward --------------------------------------------------------------------------------------------------


@triton.jit
def slot_gradient(dz, z, ids, V, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """dx in ACC of slots with the gradient dz at the logits z: 0 where no slot is, NaN past the vocabulary."""
    ACC: tl.constexpr = dz.dtype
    dx = dz * number(scale, ACC)
    if HAS_SOFTCAP:
        # (c - z)(c + z) / c^2: near saturation c - z is exact, where 1 - (z / c)^2 would lose every digit.
        cap = number(softcap, ACC)
        dx = dx * ((cap - z) / cap) * ((cap + z) / cap)
    # Past the vocabulary there is no row: its zeros times NaN are a dh of NaN.
    return tl.where((ids >= 0) & (dz != 0.0), tl.where(ids < V, dx, float("nan")), 0.0)


@triton.jit
def _slots_kernel(
    grad_ptr, values_ptr, indices_ptr, dx_ptr, row_ptr,
    E, K, V,
    stride_gn, stride_gk, stride_vn, stride_vk, stride_in, stride_ik,
    softcap: tl.float64, scale: tl.float64,
    HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pairs: dx, and the row of W it belongs to as int32; V, a row that does not exist, where there is none."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = e // K
    k = e % K
    inside = e < E
    ids = tl.load(indices_ptr + n * stride_in + k * stride_ik, mask=inside, other=-1).to(tl.int64)
    dz = tl.load(grad_ptr + n * stride_gn + k * stride_gk, mask=inside, other=0.0).to(ACC)
    z = dz
    if HAS_SOFTCAP:
        z = tl.load(values_ptr + n * stride_vn + k * stride_vk, mask=inside, other=0.0).to(ACC)
    dx = slot_gradient(dz, z, ids, V, softcap, scale, HAS_SOFTCAP)
    row = tl.where((ids >= 0) & (ids < V) & (dz != 0.0), ids, V)
    tl.store(dx_ptr + e, dx, mask=inside)
    tl.store(row_ptr + e, row.to(tl.int32), mask=inside)


@triton.jit
def _dhidden_kernel(
    dx_ptr, row_ptr, weight_ptr, dhidden_ptr,
    N, K, V, D,
    stride_wv, stride_wd,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token, COLUMNS of D: dh[n] = sum_k dx[n,k] W[row[n,k]]."""
    n = (tl.program_id(0) % N).to(tl.int64)
    d = (tl.program_id(0) // N) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0.0, ACC)
    k = tl.arange(0, ROWS)
    row = tl.load(row_ptr + n * K + k, mask=k < K, other=V)
    for start in range(0, K, ROWS):
        keep = (row < V)[:, None] & (d < D)[None, :]
        w = load_rows(weight_ptr, row, d, stride_wv, stride_wd, keep, ACC)
        k = start + tl.arange(0, ROWS)
        dx = tl.load(dx_ptr + n * K + k, mask=k < K, other=0.0)
        # The next addresses travel together with this block's rows instead of before the next one's.
        k = k + ROWS
        row = tl.load(row_ptr + n * K + k, mask=k < K, other=V)
        total += w * dx[:, None]
    dh = tl.sum(total, axis=0)
    tl.store(dhidden_ptr + n * D + d, dh.to(dhidden_ptr.dtype.element_ty), mask=d < D)


# --- launchers -------------------------------------------------------------------------------------------------


def linear_gather(hidden_nd: Tensor, head: LMHead, indices_nk: Tensor) -> Tensor:
    """z at the ids, `[N, K]` in ACC."""
    weight_vd, bias_v, softcap, scale = head.weight, head.bias, head.softcap, head.scale
    (n, d), v, k = hidden_nd.shape, weight_vd.shape[0], indices_nk.shape[1]
    values_nk = torch.empty(n, k, dtype=head.acc, device=hidden_nd.device)
    if values_nk.numel() == 0:
        return values_nk
    arch, itemsize = tiles.architecture(hidden_nd.device), weight_vd.element_size()
    tokens = tiles.gather_product_tokens(
        arch, itemsize, head.acc.itemsize, n, v, k, workspace_bytes(hidden_nd.device)
    )
    if tokens:
        _pick(hidden_nd, head, indices_nk, values_nk, tokens)
        return values_nk
    tile = tiles.gather_tile(tiles.GATHER_FORWARD, arch, itemsize, k, d)
    grid = (require_grid(n * tiles.cdiv(k, tile.rows), "linear_gather"),)
    _forward_kernel[grid](
        hidden_nd, weight_vd, bias_v, indices_nk, values_nk,
        k, v, d,
        *hidden_nd.stride(), *weight_vd.stride(), 0 if bias_v is None else bias_v.stride(0), *indices_nk.stride(),
        softcap or 0.0, scale,
        HAS_SOFTCAP=softcap is not None, ACC=ACCUMULATORS[head.acc],
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return values_nk


def _pick(hidden: Tensor, head: LMHead, indices: Tensor, values: Tensor, tokens: int) -> None:
    """Write the values out of all logits of `tokens` tokens at a time."""
    (n, k), (weight, bias) = indices.shape, (head.weight, head.bias)
    v = weight.shape[0]
    logits = torch.empty(tokens * v, dtype=values.dtype, device=values.device)
    for start in range(0, n, tokens):
        rows = slice(start, min(start + tokens, n))
        count = rows.stop - rows.start
        x = product(hidden[rows], weight.T, out=logits[: count * v].view(count, v))
        ids = indices[rows]
        _pick_kernel[(require_grid(tiles.cdiv(count * k, tiles.SLOTS_BLOCK), "linear_gather"),)](
            x, bias, ids, values[rows],
            count * k, k, v,
            0 if bias is None else bias.stride(0), *ids.stride(),
            head.softcap or 0.0, head.scale,
            HAS_SOFTCAP=head.softcap is not None, ACC=ACCUMULATORS[head.acc],
            BLOCK=tiles.SLOTS_BLOCK, num_warps=4,
        )  # fmt: skip


def linear_gather_backward(
    hidden_nd: Tensor,
    head: LMHead,
    grad_nk: Tensor,
    values_nk: Tensor,
    indices_nk: Tensor,
    need: Need,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dh, dW, db) in the dtypes of hidden, weight and bias; None for what is not needed, which costs nothing."""
    weight_vd, bias_v = head.weight, head.bias
    need = need._replace(bias=need.bias and bias_v is not None)
    (n, d), v, k = hidden_nd.shape, weight_vd.shape[0], indices_nk.shape[1]
    if n * k == 0 or d == 0 or v == 0 or not any(need):
        return (
            torch.zeros_like(hidden_nd, memory_format=torch.contiguous_format) if need.hidden else None,
            torch.zeros_like(weight_vd, memory_format=torch.contiguous_format) if need.weight else None,
            torch.zeros_like(bias_v, memory_format=torch.contiguous_format) if need.bias else None,
        )
    require_pairs(n, k, d)
    dweight = dbias = None
    dx, row = slot_gradients(grad_nk, values_nk, hidden_nd, head, indices_nk)
    dhidden = sum_rows(dx, row, hidden_nd, weight_vd) if need.hidden else None
    if need.weight or need.bias:
        pairs = SortedPairs(dx, row, v)
        if need.weight:
            dweight = pairs.sum(hidden_nd, weight_vd.dtype)
        if need.bias:
            dbias = pairs.sum(dx.new_ones(1, 1).expand(n, 1), bias_v.dtype)[:, 0]
    return dhidden, dweight, dbias


def slot_gradients(
    grad_nk: Tensor, values_nk: Tensor, hidden_nd: Tensor, head: LMHead, indices_nk: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx in ACC, its row of W in int32), both `[N, K]`."""
    n, k = indices_nk.shape
    dx = torch.empty(n, k, dtype=head.acc, device=hidden_nd.device)
    row = torch.empty(n, k, dtype=torch.int32, device=hidden_nd.device)
    _slots_kernel[(tiles.cdiv(n * k, tiles.SLOTS_BLOCK),)](
        grad_nk, values_nk, indices_nk, dx, row,
        n * k, k, head.weight.shape[0],
        *grad_nk.stride(), *values_nk.stride(), *indices_nk.stride(),
        head.softcap or 0.0, head.scale,
        HAS_SOFTCAP=head.softcap is not None, ACC=ACCUMULATORS[head.acc], BLOCK=tiles.SLOTS_BLOCK, num_warps=4,
    )  # fmt: skip
    return dx, row


def sum_rows(
    dx: Tensor, row: Tensor, hidden_nd: Tensor, weight_vd: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """dh `[N, D]` in `dtype`, or that of `hidden_nd`: the sum over k of dx times its row of W."""
    (n, d), (_, k) = hidden_nd.shape, dx.shape
    arch, itemsize = tiles.architecture(hidden_nd.device), weight_vd.element_size()
    tile = tiles.gather_tile(tiles.GATHER_DHIDDEN, arch, itemsize, k, d)
    dhidden = torch.empty(n, d, dtype=dtype or hidden_nd.dtype, device=hidden_nd.device)
    grid = (require_grid(n * tiles.cdiv(d, tile.columns), "linear_gather"),)
    _dhidden_kernel[grid](
        dx, row, weight_vd, dhidden,
        n, k, weight_vd.shape[0], d,
        *weight_vd.stride(),
        ACC=ACCUMULATORS[dx.dtype], ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return dhidden
