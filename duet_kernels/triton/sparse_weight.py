"""dW and db of logits at given ids: for every row of W the sum over the (token, slot) pairs that chose it.

    dW[v] = sum over (n,k) with i[n,k] = v of dx[n,k] h[n]        db[v] = sum over the same pairs of dx[n,k]

Legend: N tokens, K slots, D hidden size, V vocabulary, E = N K pairs, C bytes of an element, ACC fp32 (fp64 for fp64
inputs). A pair's row is an int32, V where it belongs to no row of W. Hidden states have any strides.

No atomics. A stable sort orders the pairs by row, then token; the pairs of one row of W, its segment, are consecutive
and are summed in that order, so two runs are bitwise equal. The rows that nobody chose are written as zeros by the same
program, so no zero fill comes before.

A program owns 16 rows of W and a strip of D. Their segments lie one behind the other, and it walks over them as over one
stream: 8 rows of h are under way at a time, whichever segments they belong to, and a sum is written where the row
changes. A segment is a few pairs long (4 at the shape below): to wait for the loads of each one by itself took ten times
as long. dW is written with `evict_first`: it is not read again, and L2 is for the strip of h (8 MB).

Segments may be long (one id that every token chose), so the sorted pairs are also cut into chunks of fixed length, and
a chunk that lies inside one segment is summed ahead of time by a program of its own. Their number E / chunk is known on
the host, so nothing is synchronised; the stream then takes such a chunk as one step.

Bytes (calculated) and time at N 8192, K 64, D 4096, V 128256, bf16, of an H200, commit 471f8a8
(benchmarks/results/nvidia-h200/kernels.md, Huber trainable):

| kernel   | reads                         | writes                | likeliest / Zipf ids |
|----------|-------------------------------|-----------------------|----------------------|
| sort     | E rows (torch)                | 12 E                  | 0.05 ms              |
| pairs    | E dx and places               | 8 E                   | 0.02 ms              |
| chunks   | h of whole chunks, from L2    | E / 256 x 4 D at most | 0.02 / 0.16 ms       |
| segments | N K D C of h, mostly from L2  | V D C                 | 0.58 / 0.62 ms       |

Memory: the sort (about 24 E bytes), the sorted pairs (8 E) and the sums of chunks (at most 64 MiB).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .primitives import ACCUMULATORS, load_rows, require_grid


@triton.jit
def _pairs_kernel(
    row_ptr, order_ptr, dx_ptr, token_ptr, sorted_ptr, offset_ptr,
    E, K, V, STEPS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK sorted pairs: token and dx. BLOCK rows of W: where the segment begins, found by halving."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(order_ptr + i, mask=i < E, other=0)
    tl.store(token_ptr + i, (order // K).to(tl.int32), mask=i < E)
    tl.store(sorted_ptr + i, tl.load(dx_ptr + order, mask=i < E, other=0.0), mask=i < E)
    low = i * 0
    high = low + E
    for _ in range(0, STEPS):
        middle = (low + high) // 2
        open_ = low < high
        row = tl.load(row_ptr + middle, mask=open_ & (i <= V), other=0)
        low = tl.where(open_ & (row < i), middle + 1, low)
        high = tl.where(open_ & (row >= i), middle, high)
    tl.store(offset_ptr + i, low.to(tl.int32), mask=i <= V)


@triton.jit
def _partial_kernel(
    row_ptr, token_ptr, dx_ptr, hidden_ptr, partial_ptr,
    CHUNKS, CHUNK, V, D,
    stride_hn, stride_hd,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One chunk of sorted pairs, COLUMNS of D: their sum of dx h, if they all belong to one row of W."""
    c = (tl.program_id(0) % CHUNKS).to(tl.int64)
    d = (tl.program_id(0) // CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(row_ptr + c * CHUNK)
    last = tl.load(row_ptr + c * CHUNK + CHUNK - 1)
    if (first == last) & (first < V):
        total = tl.full([ROWS, COLUMNS], 0.0, ACC)
        for start in range(0, CHUNK, ROWS):
            e = c * CHUNK + start + tl.arange(0, ROWS)
            keep = (start + tl.arange(0, ROWS)) < CHUNK
            token = tl.load(token_ptr + e, mask=keep, other=0)
            dx = tl.load(dx_ptr + e, mask=keep, other=0.0)
            keep_nd = keep[:, None] & (d < D)[None, :]
            total += load_rows(hidden_ptr, token, d, stride_hn, stride_hd, keep_nd, ACC) * dx[:, None]
        tl.store(partial_ptr + c * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def _segments_kernel(
    offset_ptr, row_ptr, token_ptr, dx_ptr, hidden_ptr, partial_ptr, dweight_ptr,
    BLOCKS, CHUNK, V, D,
    stride_hn, stride_hd,
    ACC: tl.constexpr, VOCABULARY: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """VOCABULARY rows of W, COLUMNS of D: each row's sum of dx h, or zeros."""
    dtype = dweight_ptr.dtype.element_ty
    v = (tl.program_id(0) % BLOCKS) * VOCABULARY + tl.arange(0, VOCABULARY)
    d = (tl.program_id(0) // BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    empty = tl.load(offset_ptr + v, mask=v < V, other=0) == tl.load(offset_ptr + v + 1, mask=v < V, other=-1)
    tl.store(
        dweight_ptr + v.to(tl.int64)[:, None] * D + d[None, :],
        tl.full([VOCABULARY, COLUMNS], 0.0, dtype),
        mask=empty[:, None] & (d < D)[None, :], eviction_policy="evict_first",
    )  # fmt: skip
    block = (tl.program_id(0) % BLOCKS) * VOCABULARY
    begin = tl.load(offset_ptr + block)
    end = tl.load(offset_ptr + tl.minimum(block + VOCABULARY, V))
    if begin < end:
        current = tl.load(row_ptr + begin)
        total = tl.full([COLUMNS], 0.0, ACC)
        strip = hidden_ptr + d.to(tl.int64) * stride_hd
        # From a multiple of AHEAD on, as chunks are: the stream meets where each of them begins. Of the first chunk
        # that it meets some pairs may be an earlier program's; such a chunk has two rows and is not whole.
        e = begin - begin % AHEAD
        while e < end:
            whole = e < 0
            if (e % CHUNK == 0) & (e + CHUNK <= end):
                whole = tl.load(row_ptr + e) == tl.load(row_ptr + e + CHUNK - 1)
            if whole:
                row = tl.load(row_ptr + e)
                part = tl.load(partial_ptr + (e // CHUNK).to(tl.int64) * D + d, mask=d < D, other=0.0)
                if row != current:
                    here = dweight_ptr + current.to(tl.int64) * D + d
                    tl.store(here, total.to(dtype), mask=d < D, eviction_policy="evict_first")
                    total = tl.full([COLUMNS], 0.0, ACC)
                    current = row
                total += part
                e += CHUNK
            else:
                pairs = ()
                for i in tl.static_range(AHEAD):
                    on = (e + i >= begin) & (e + i < end)
                    row = tl.load(row_ptr + e + i, mask=on, other=0)
                    token = tl.load(token_ptr + e + i, mask=on, other=0).to(tl.int64)
                    dx = tl.load(dx_ptr + e + i, mask=on, other=0.0)
                    pairs = pairs + ((on, row, token, dx),)  # noqa: RUF005 (Triton has no starred tuples)
                rows_of_h = ()
                for i in tl.static_range(AHEAD):
                    on, row, token, dx = pairs[i]
                    h = tl.load(strip + token * stride_hn, mask=on & (d < D), other=0.0).to(ACC)
                    rows_of_h = rows_of_h + (h,)  # noqa: RUF005
                for i in tl.static_range(AHEAD):
                    on, row, token, dx = pairs[i]
                    if on & (row != current):
                        here = dweight_ptr + current.to(tl.int64) * D + d
                        tl.store(here, total.to(dtype), mask=d < D, eviction_policy="evict_first")
                        total = tl.full([COLUMNS], 0.0, ACC)
                        current = row
                    total += dx * rows_of_h[i]
                e += AHEAD
        here = dweight_ptr + current.to(tl.int64) * D + d
        tl.store(here, total.to(dtype), mask=d < D, eviction_policy="evict_first")


# --- launchers -------------------------------------------------------------------------------------------------


def require_pairs(n: int, k: int, d: int) -> None:
    """Refuse more (token, slot) pairs than an int32 numbers; it has to hold a chunk or a tile past the last one, too."""
    if n * k + dweight_chunk(n * k, d, 8) + tiles.MAX_GATHER_ROWS >= 2**31:
        raise ValueError(
            f"indices: {n} tokens x {k} slots; the sparse gradient counts pairs in 32 bits, pass fewer tokens at a time"
        )


def dweight_chunk(pairs: int, d: int, itemsize: int) -> int:
    """Pairs a chunk: the table's, doubled until the partial sums of all chunks fit their budget."""
    chunk = tiles.DWEIGHT_CHUNK
    while (pairs // chunk) * d * itemsize > tiles.DWEIGHT_PARTIAL_BYTES:
        chunk *= 2
    return chunk


class SortedPairs:
    """The (token, slot) pairs in the order of (row of W, token), and where each row's segment begins."""

    def __init__(self, dx: Tensor, row: Tensor, v: int):
        """`dx` and `row` `[N, K]`, contiguous; a pair without a row has the row V and comes behind the last segment."""
        self.v, pairs = v, row.numel()
        self.row, order = torch.sort(row.flatten(), stable=True)
        self.token = torch.empty(pairs, dtype=torch.int32, device=row.device)
        self.dx = torch.empty(pairs, dtype=dx.dtype, device=row.device)
        self.offset = torch.empty(v + 1, dtype=torch.int32, device=row.device)
        _pairs_kernel[(tiles.cdiv(max(pairs, v + 1), tiles.SLOTS_BLOCK),)](
            self.row, order, dx, self.token, self.dx, self.offset,
            pairs, row.shape[1], v, pairs.bit_length(),
            BLOCK=tiles.SLOTS_BLOCK, num_warps=4,
        )  # fmt: skip

    def sum(self, hidden_nd: Tensor, dtype: torch.dtype) -> Tensor:
        """`[V, D]` the sum of dx h over each row's pairs."""
        pairs, d, itemsize = self.row.numel(), hidden_nd.shape[1], hidden_nd.element_size()
        arch, acc = tiles.architecture(hidden_nd.device), ACCUMULATORS[self.dx.dtype]
        chunk = dweight_chunk(pairs, d, self.dx.element_size())
        chunks = pairs // chunk
        # The sums of the chunks that belong to one row of W; nothing is written for the others.
        partial = torch.empty(chunks, d, dtype=self.dx.dtype, device=self.dx.device)
        if chunks:
            tile = tiles.gather_tile(tiles.DWEIGHT_CHUNK_SUMS, arch, itemsize, pairs, d)
            _partial_kernel[(require_grid(tiles.cdiv(d, tile.columns) * chunks, "linear_gather"),)](
                self.row, self.token, self.dx, hidden_nd, partial,
                chunks, chunk, self.v, d,
                *hidden_nd.stride(),
                ACC=acc, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        out = torch.empty(self.v, d, dtype=dtype, device=self.dx.device)
        tile = tiles.segments_tile(arch, itemsize, d)
        assert chunk % tile.ahead == 0
        blocks = tiles.cdiv(self.v, tile.vocabulary)
        _segments_kernel[(require_grid(tiles.cdiv(d, tile.columns) * blocks, "linear_gather"),)](
            self.offset, self.row, self.token, self.dx, hidden_nd, partial, out,
            blocks, chunk, self.v, d,
            *hidden_nd.stride(),
            ACC=acc, VOCABULARY=tile.vocabulary, COLUMNS=tile.columns, AHEAD=tile.ahead, num_warps=tile.warps,
        )  # fmt: skip
        return out
