"""Logits that are written, read once and forgotten: tokens of a product x columns of the vocabulary, and their memory.

The caller gives a function from the columns to the elements that a token needs.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import tiles
from .tiles import cdiv

ALIGNED = 16  # elements on which every field of a call's memory begins


def allocate(sizes: Iterable[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Views of at least that many elements each, of one allocation."""
    rounded = [cdiv(size, ALIGNED) * ALIGNED for size in sizes]
    return torch.empty(sum(rounded), dtype=dtype, device=device).split(rounded)


def cut_logits(
    n: int,
    v: int,
    block: int,
    limit: int,
    elements: Callable[[int], list[int]],
    itemsize: int,
    budget: int,
    arch: int,
) -> tuple[int, int]:
    """(tokens, columns): the most tokens for which a few slabs of the vocabulary fit into `budget` bytes.

    Slabs are whole blocks of at most `limit` columns, of one size; with so many columns a token has `elements` of each
    field. Fewer than TOPK_TOKENS tokens are taken only where these have no room for a narrow slab: W would be read too often.
    """
    least, room = tiles.measured_number("TOPK_TOKENS", arch), budget - len(elements(v)) * ALIGNED * itemsize

    def token_bytes(columns: int) -> int:
        return itemsize * sum(elements(columns))

    def width(slabs: int) -> int:
        return min(v, cdiv(cdiv(v, slabs), block) * block)

    fewest = cdiv(v, limit)
    tokens = min(n, room // token_bytes(width(max(fewest, tiles.LOGITS_SLABS))))
    if tokens >= min(n, least):
        # Blocks of one size, in whole tiles of the library's product.
        tokens = min(tokens, cdiv(cdiv(n, cdiv(n, tokens)), 128) * 128)
    else:
        tokens = min(n, least)
        while tokens > 1 and tokens * token_bytes(min(v, limit, 32 * block)) > room:
            tokens //= 2
    slabs = max(fewest, tokens * token_bytes(v) // max(room, 1))
    while tokens * token_bytes(width(slabs)) > room and width(slabs) > block:
        slabs += 1
    return tokens, width(slabs)
