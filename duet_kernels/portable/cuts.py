"""One linear projection in pieces: logits of all rows against a slice of the vocabulary, or of a few rows against all of it.

    z = softcap tanh(scale (h W^T + b) / softcap)

* **Vocabulary tiles** (`vocab_tiles`): W is read once a pass, and a slice of dW is finished when its tile is.
* **Row chunks** (`row_chunks`, `chunk_logits`): rows that need the whole vocabulary twice have it at hand.

Pieces are sized by the workspace and never hold `[N, V]`, but for a few tokens on a GPU. Logits are fp32 (fp64 for fp64
inputs): halves are multiplied into fp32 where the library can (`products`), elsewhere they are upcast a piece at a time.

A CPU folds a piece faster that lies in its cache, and may look at values. On other devices a look waits for everything
that was queued, and every operation costs a launch: pieces are as large as the workspace lets them (`asynchronous`).

Legend: N tokens, D hidden size, V vocabulary, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dispatch import acc_dtype, workspace_bytes
from ..head import LMHead
from ..products import Scaled, operand, operand_dtype, pitch, product

MAX_ROWS = 8192  # rows of a vocabulary tile: keeps a tile wide enough to be an efficient product
TILE_BYTES = 8 * 2**20  # a tile that stays in the last-level cache is folded several times faster
# One part in so many of the workspace holds a slab of W that had to be cast, the others row chunks.
WEIGHT_SHARE = 8
HIDDEN_SHARE = 4  # likewise for hidden states that are cast, beside vocabulary tiles
ENOUGH_ROWS = 48  # rows of a chunk that are worth reading W for: three products of them beat four by tiles
FEW_ROWS = 256  # so few rows are not cut on a GPU: they may have all their logits at once


def asynchronous(device: torch.device) -> bool:
    """Whether work is queued: a look at a value is a synchronisation. A CPU has none of that, and a cache."""
    return device.type != "cpu"


# --- vocabulary tiles ------------------------------------------------------------------------------------------


def row_blocks(n: int, head: LMHead | None = None, share: int = HIDDEN_SHARE) -> Iterator[slice]:
    """Rows that are tiled together; with a head only as many as lie in a `share` of the workspace where they are cast."""
    step = MAX_ROWS
    if head is not None and operand_dtype(head.weight) != head.weight.dtype:
        room = workspace_bytes(head.weight.device) // share
        step = min(step, max(room // (head.weight.shape[1] * head.acc.itemsize), 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def tile_width(n: int, head: LMHead, copies: int, parts: int = 8) -> int:
    """Columns of a vocabulary tile: one of `parts` of the vocabulary or less, `copies` tiles inside the workspace."""
    (v, d), device = head.weight.shape, head.weight.device
    item = head.acc.itemsize
    upcast = d * item if operand_dtype(head.weight) != head.weight.dtype else 0
    rows = max(min(n, MAX_ROWS), 1)
    workspace = workspace_bytes(device)
    workspace -= min(rows * upcast, workspace // HIDDEN_SHARE)
    width = workspace // (copies * rows * item + upcast)
    if asynchronous(device):
        width = min(width, pitch(-(-v // (1 if n <= FEW_ROWS else parts))))
        return width // 16 * 16 or max(width, 1)
    width = max(1, min(width, max(TILE_BYTES // (rows * item), 512), -(-v // parts) | 15))
    return (width + 1) // 16 * 16 - 1 if width >= 32 else width  # with the spare column whole cache lines


def vocab_tiles(
    hidden: Tensor, head: LMHead, copies: int = 3, parts: int = 8, width: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield `(columns, W tile as an operand, z tile [rows, C])`; z is the caller's to overwrite. Without `width` that of `tile_width`.

    The z tile is a view of one reused buffer with a spare column on the right, which `with_spare_column` gives access to.
    """
    v = head.weight.shape[0]
    width = width or tile_width(hidden.shape[0], head, copies, parts)
    buffer = torch.empty(hidden.shape[0], pitch(width + 1), dtype=head.acc, device=hidden.device)
    for start in range(0, v, width):
        columns = slice(start, min(start + width, v))
        weight = operand(head.weight[columns])
        z = buffer[:, : len(weight)]
        product(hidden, weight.T, out=z)
        head.finish_(z, None if head.bias is None else head.bias[columns])
        yield columns, weight, z


def locate(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(which ids lie in the tile, their columns; the spare column for all others)."""
    inside = (ids >= columns.start) & (ids < columns.stop)
    return inside, torch.where(inside, ids, columns.stop) - columns.start


def with_spare_column(z: Tensor) -> Tensor:
    """The tile and the column on its right that `vocab_tiles` keeps spare."""
    return z.as_strided((z.shape[0], z.shape[1] + 1), z.stride(), z.storage_offset())


def whole_lines(z: Tensor) -> Tensor:
    """The tile and the columns on its right, which `vocab_tiles` keeps spare, up to a multiple of 16; they get -inf."""
    size = z.shape[1]
    wide = z.as_strided((z.shape[0], pitch(size)), z.stride(), z.storage_offset())
    wide[:, size:] = -torch.inf
    return wide


def to_the_next_row(z: Tensor) -> Tensor:
    """The tile and all that lies between its rows, as contiguous memory, where that is a few columns; they get -inf.

    Torch reads and writes contiguous memory 16 bytes at a time.
    """
    size, step = z.shape[1], z.stride(0)
    if not size < step <= size + 16:
        return z
    wide = z.as_strided((z.shape[0], step), z.stride(), z.storage_offset())
    wide[:, size:] = -torch.inf
    return wide


# --- row chunks ------------------------------------------------------------------------------------------------


def rows_that_fit(n: int, head: LMHead, copies: int) -> int:
    """Rows whose `copies` `[rows, V]` temporaries lie in 7/8 of the workspace, 0 perhaps.

    At most a fifth of all rows; of few rows half of them, because every chunk reads W again. On a GPU half of the
    workspace and half of the rows: the rest is for what is made of them.
    """
    v, device = len(head.weight), head.weight.device
    workspace = workspace_bytes(device)
    if asynchronous(device):
        return min(workspace // 2 // (copies * v * head.acc.itemsize), max(-(-n // 2), min(n, FEW_ROWS)))
    budget = workspace - workspace // WEIGHT_SHARE
    return min(budget // (copies * v * head.acc.itemsize), max(-(-n // 5), min(-(-n // 2), ENOUGH_ROWS)))


def row_chunks(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, max(1, step)):
        yield slice(start, min(start + max(1, step), n))


def weight_slabs(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`(ids, their rows of W as an operand)`: all at once, or slabs where W has to be cast.

    A slab is cast while its user still holds the one before: both lie in their share of the workspace.
    """
    (v, d), dtype = weight.shape, operand_dtype(weight)
    if weight.dtype == dtype:
        yield slice(0, v), weight
        return
    step = max(1, workspace_bytes(weight.device) // (2 * WEIGHT_SHARE * d * dtype.itemsize))
    for start in range(0, v, step):
        columns = slice(start, min(start + step, v))
        yield columns, weight[columns].to(dtype)


def logits_buffer(rows: int, head: LMHead) -> Tensor:
    """Memory for the logits `[rows, V]`; on a GPU rows begin where products write them fast, whatever V is."""
    v, device = len(head.weight), head.weight.device
    size = pitch(v) if asynchronous(device) else v
    return torch.empty(rows, size, dtype=head.acc, device=device)[:, :v]


def chunk_logits(hidden: Tensor, head: LMHead, out: Tensor | None = None) -> Tensor:
    h = operand(hidden)
    z = logits_buffer(len(h), head) if out is None else out
    for columns, weight in weight_slabs(head.weight):
        product(h, weight.T, out=z[:, columns])
    return head.finish_(z, head.bias)


def times_weight(dz: Scaled, weight: Tensor) -> Tensor:
    """dz W"""
    out = dz.values.new_zeros(dz.values.shape[0], weight.shape[1], dtype=acc_dtype(dz.values.dtype))
    for columns, slab in weight_slabs(weight):
        dz.columns(columns).add_to(out, slab)
    return out


# --- elementwise -----------------------------------------------------------------------------------------------


def multiply_(x: Tensor, factor: Tensor | float) -> Tensor:
    """x factor in place, without a pass where the factor is the number 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def divide_(x: Tensor, divisor: float) -> Tensor:
    return x if divisor == 1.0 else x.div_(divisor)


def origin(top: Tensor) -> Tensor:
    """What exponentials are relative to: the largest logit, or 0 where it is infinite and inf - inf would be NaN."""
    return top.masked_fill(top.isinf(), 0)
