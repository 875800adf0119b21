"""One linear projection in pieces: logits of all rows against a slice of the vocabulary, or of a few rows against all of it.

    z = softcap tanh(scale (h W^T + b) / softcap)

* **Vocabulary tiles** (`vocab_tiles`): W is read once a pass, and a slice of dW is finished when its tile is.
* **Row chunks** (`row_chunks`, `chunk_logits`): rows that need the whole vocabulary twice have it at hand.

Pieces are sized by the workspace, never hold `[N, V]`, and are computed in fp32 (fp64 for fp64 inputs): half precisions
are upcast a piece at a time.

Legend: N tokens, D hidden size, V vocabulary, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..head import LMHead
from ..workspace import workspace_bytes

MAX_ROWS = 8192  # rows of a vocabulary tile: keeps a tile wide enough to be an efficient product
TILE_BYTES = 8 * 2**20  # a tile that stays in the last-level cache is folded several times faster
WEIGHT_SHARE = (
    8  # one part in so many of the workspace holds a slab of W that had to be cast, the others row chunks
)
ENOUGH_ROWS = 48  # rows of a chunk that are worth reading W for: three products of them beat four by tiles


# --- vocabulary tiles ------------------------------------------------------------------------------------------


def row_blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, MAX_ROWS):
        yield slice(start, min(start + MAX_ROWS, n))


def tile_width(n: int, head: LMHead, copies: int, parts: int = 8) -> int:
    """Columns of a vocabulary tile: one of `parts` of the vocabulary or less, `copies` tiles inside the workspace."""
    v, d = head.weight.shape
    item = head.acc.itemsize
    upcast = d * item if head.weight.dtype != head.acc else 0
    rows = max(min(n, MAX_ROWS), 1)
    by_workspace = workspace_bytes() // (copies * rows * item + upcast)
    by_cache = max(TILE_BYTES // (rows * item), 512)
    width = max(1, min(by_workspace, by_cache, -(-v // parts) | 15))
    return (width + 1) // 16 * 16 - 1 if width >= 32 else width  # with the spare column whole cache lines


def vocab_tiles(
    hidden: Tensor, head: LMHead, copies: int = 3, parts: int = 8
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Yield `(columns, width, W tile in the accumulation dtype, z tile [rows, C])`; z is the caller's to overwrite.

    The z tile is a view of one reused buffer with a spare column on the right, which `with_spare_column` gives access to.
    """
    v = head.weight.shape[0]
    width = tile_width(hidden.shape[0], head, copies, parts)
    pitch = -(-(width + 1) // 16) * 16  # rows that begin on a cache line are written faster
    buffer = torch.empty(hidden.shape[0], pitch, dtype=head.acc, device=hidden.device)
    for start in range(0, v, width):
        columns = slice(start, min(start + width, v))
        weight = head.weight[columns].to(head.acc)
        size = columns.stop - columns.start
        z = buffer[:, :size]
        torch.mm(hidden, weight.T, out=z)
        head.finish_(z, None if head.bias is None else head.bias[columns])
        yield columns, size, weight, z


def locate(ids: Tensor, columns: slice, size: int) -> tuple[Tensor, Tensor]:
    """(which ids lie in the tile, their columns; the spare column for all others)."""
    inside = (ids >= columns.start) & (ids < columns.stop)
    return inside, torch.where(inside, ids - columns.start, size)


def with_spare_column(z: Tensor) -> Tensor:
    """The tile and the column on its right that `vocab_tiles` keeps spare."""
    return z.as_strided((z.shape[0], z.shape[1] + 1), z.stride(), z.storage_offset())


def whole_lines(z: Tensor, value: float) -> Tensor:
    """The tile and the columns on its right, which `vocab_tiles` keeps spare, up to a multiple of 16; they get `value`."""
    size = z.shape[1]
    wide = z.as_strided((z.shape[0], -(-size // 16) * 16), z.stride(), z.storage_offset())
    wide[:, size:] = value
    return wide


# --- row chunks ------------------------------------------------------------------------------------------------


def rows_that_fit(n: int, v: int, acc: torch.dtype, copies: int) -> int:
    """Rows whose `copies` `[rows, V]` temporaries lie in 7/8 of the workspace, 0 perhaps.

    At most a fifth of all rows; of few rows half of them, because every chunk reads W again.
    """
    budget = workspace_bytes() - workspace_bytes() // WEIGHT_SHARE
    return min(budget // (copies * v * acc.itemsize), max(-(-n // 5), min(-(-n // 2), ENOUGH_ROWS)))


def row_chunks(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, max(1, step)):
        yield slice(start, min(start + max(1, step), n))


def weight_slabs(weight: Tensor, acc: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`(ids, their rows of W in the dtype of the sums)`: all at once, or slabs where W has to be cast.

    A slab is cast while its user still holds the one before: both lie in their share of the workspace.
    """
    v, d = weight.shape
    if weight.dtype == acc:
        yield slice(0, v), weight
        return
    step = max(1, workspace_bytes() // (2 * WEIGHT_SHARE * d * acc.itemsize))
    for start in range(0, v, step):
        columns = slice(start, min(start + step, v))
        yield columns, weight[columns].to(acc)


def chunk_logits(hidden: Tensor, head: LMHead, out: Tensor | None = None) -> Tensor:
    h = hidden.to(head.acc)
    z = h.new_empty(h.shape[0], head.weight.shape[0]) if out is None else out
    for columns, weight in weight_slabs(head.weight, head.acc):
        torch.mm(h, weight.T, out=z[:, columns])
    return head.finish_(z, head.bias)


def times_weight(dz: Tensor, weight: Tensor) -> Tensor:
    """dz W"""
    out = dz.new_zeros(dz.shape[0], weight.shape[1])
    for columns, slab in weight_slabs(weight, dz.dtype):
        out.addmm_(dz[:, columns], slab)
    return out
