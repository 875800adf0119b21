"""Tile shapes as plain data, by architecture, element size and row length. Nothing is tuned while a program runs.

A gather is bound by the memory system, so a tile is chosen by the bytes it keeps in flight. Little's law on an H200:
4.3 TB/s x 0.7 us = 3 MB, 23 KB on each of 132 SMs; 16 KB a program and at least three programs an SM (at most 168
registers a thread at 128 threads) leave a factor of two. A row of a tile is 1 KB where rows are long enough: each
warp reads 512 contiguous bytes an instruction, 16 bytes a thread.

The rows below are reasoned and shared by all architectures (0). What was measured on a GPU lies in `measured.json`
and goes before them: `adopt`, the last step of this room's import, adds a row for each entry.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton

from .. import measured
from ..dispatch import architecture as architecture  # asked for here by every launcher


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up. `triton.cdiv`, which kernels can call too, takes microseconds more."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()


class GatherTile(NamedTuple):
    """ROWS gathered rows (slots or sorted pairs) x COLUMNS of D, held by one program of WARPS warps."""

    rows: int
    columns: int
    warps: int


class SegmentsTile(NamedTuple):
    """VOCABULARY rows of dW x COLUMNS of D, AHEAD rows of h under way, held by one program of WARPS warps."""

    vocabulary: int
    columns: int
    ahead: int
    warps: int


class LossTile(NamedTuple):
    """ROWS slots x COLUMNS of D in pieces of PIECE, kept by a program of WARPS warps with REGISTERS a thread at most."""

    rows: int
    columns: int
    piece: int
    warps: int
    registers: int


class DivergenceTile(NamedTuple):
    """TOKENS rows of COLUMNS >= K slots, held by one program of WARPS warps."""

    tokens: int
    columns: int
    warps: int


# (architecture, bytes of an element) -> tile for long rows. Architecture 0 is every chip that has no row of its own.
GATHER_FORWARD, GATHER_DHIDDEN, DWEIGHT_CHUNK_SUMS = (
    {(0, 2): GatherTile(16, 512, 4), (0, 4): GatherTile(16, 256, 4), (0, 8): GatherTile(16, 128, 4)}
    for _ in range(3)
)
# A warp a program: a segment's end is a branch, and other warps would wait at it.
DWEIGHT_SEGMENTS = {
    (0, 2): SegmentsTile(16, 512, 4, 1),
    (0, 4): SegmentsTile(16, 256, 4, 1),
    (0, 8): SegmentsTile(16, 128, 4, 1),
}
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# (architecture, bytes that an element takes in a register): 64 registers a thread hold 32 KB of W.
LOSS = {
    (0, 2): LossTile(64, 256, 128, 4, 128 if TRITON >= (3, 7) else 96),
    (0, 4): LossTile(64, 128, 64, 4, 112),
    (0, 8): LossTile(64, 64, 32, 4, 128),
    # With fewer registers the compilers for these, and every one of Triton 3.7, keep some bytes in memory.
    (80, 2): LossTile(64, 256, 128, 4, 128),
    (100, 2): LossTile(64, 256, 64, 4, 160 if TRITON >= (3, 7) else 128),
}
LOSS_MASKED_REGISTERS = 176 if TRITON >= (3, 7) else 160
LOSS_SLOTS = LOSS[0, 2].rows
MAX_GATHER_ROWS = 128
SLOTS_BLOCK = 1024  # elements of [N, K] a program of the elementwise kernels handles
# (architecture, bytes of an element) -> from V / this many ids on, all logits by the library's product are cheaper than
# K gathered rows of W a token. Calculated: N K D bytes at 4.3 TB/s against 2 N D V FLOP at 790 TFLOP/s (fp32: 50, fp64: 60)
# and 8 N V bytes (D 4096).
GATHER_CROSSOVER = {(0, 2): 156, (0, 4): 23, (0, 8): 55}
# Tokens of a product whose logits the workspace must hold: fewer would read W too often.
GATHER_MIN_TOKENS = 256
DWEIGHT_CHUNK = 256  # sorted pairs summed ahead of time when all of them belong to one vocabulary row
DWEIGHT_PARTIAL_BYTES = 64 << 20  # at most this much for those sums: above it the chunks grow

# (slots up to, tokens, warps): elements a thread holds stay near 8, below the registers of every architecture.
DIVERGENCE = (
    (16, 64, 4),
    (32, 32, 4),
    (64, 16, 4),
    (128, 8, 4),
    (256, 4, 4),
    (512, 2, 4),
    (1024, 1, 4),
    (2048, 1, 8),
    (4096, 1, 16),
    (8192, 1, 32),
)
MAX_SLOTS = DIVERGENCE[-1][0]


def gather_tile(
    table: dict[tuple[int, int], GatherTile], arch: int, itemsize: int, rows: int, columns: int
) -> GatherTile:
    """The table's tile, reshaped to a matrix of short rows or to a problem of few: the bytes in flight stay.

    16 columns are the least worth a program.
    """
    tile = table.get((arch, itemsize)) or table[0, itemsize]
    elements, needed = tile.rows * tile.columns, next_power_of_2(rows)
    wide = min(max(tile.columns, elements // needed), max(16, next_power_of_2(columns)))
    tall = min(elements // wide, needed, MAX_GATHER_ROWS)
    return GatherTile(tall, wide, tile.warps)


def segments_tile(arch: int, itemsize: int, columns: int) -> SegmentsTile:
    """The table's tile, no wider than a matrix of short rows."""
    tile = DWEIGHT_SEGMENTS.get((arch, itemsize)) or DWEIGHT_SEGMENTS[0, itemsize]
    return tile._replace(columns=min(tile.columns, max(16, next_power_of_2(columns))))


def loss_tile(arch: int, itemsize: int, slots: int, columns: int) -> LossTile:
    """The table's tile with as many rows as there are slots, as wide as that allows.

    The masks of a last strip that is not full take registers, too.
    """
    generation = arch // 10 * 10  # sm_86 and sm_89 have the registers and the compiler of sm_80
    tile = LOSS.get((arch, itemsize)) or LOSS.get((generation, itemsize)) or LOSS[0, itemsize]
    rows = next_power_of_2(slots)
    wide = min(tile.rows * tile.columns // rows, max(16, next_power_of_2(columns)))
    registers = tile.registers if columns % wide == 0 else max(tile.registers, LOSS_MASKED_REGISTERS)
    return tile._replace(
        rows=rows, columns=wide, piece=min(tile.rows * tile.piece // rows, wide), registers=registers
    )


def gather_product_tokens(arch: int, operand: int, acc: int, n: int, v: int, k: int, workspace: int) -> int:
    """Tokens of a product for which all logits are made, of which k are picked; 0 where gathering rows is cheaper.

    `operand` and `acc` are bytes of an element of W and of a logit. N K gathered rows below V never pay a pass over W.
    """
    crossover = GATHER_CROSSOVER.get((arch, operand)) or GATHER_CROSSOVER[0, operand]
    tokens = min(n, workspace // (v * acc))
    if k * min(crossover, n) < v or tokens < min(n, GATHER_MIN_TOKENS):
        return 0
    return tokens if tokens == n else tokens - tokens % 128


def divergence_tile(slots: int) -> DivergenceTile:
    """The tile that holds whole rows of 1 to `MAX_SLOTS` slots."""
    tokens, warps = next((tokens, warps) for limit, tokens, warps in DIVERGENCE if slots <= limit)
    return DivergenceTile(tokens, next_power_of_2(slots), warps)


class SkinnyTile(NamedTuple):
    """VOCABULARY rows of W x DEPTH of D, STAGES of them under way, held by one program of WARPS warps."""

    vocabulary: int
    depth: int
    stages: int
    warps: int


# (architecture, bytes of an element, tokens up to): a few tokens against the whole of W, bound by reading W once.
# 48 KB of W or more under way in an SM, by Little's law above; several programs an SM hide each other's ends.
SKINNY = {
    (0, 2, 16): SkinnyTile(128, 64, 4, 4),
    (90, 2, 16): SkinnyTile(128, 128, 4, 4),  # 144 KB of shared memory, which smaller cards do not have
    (0, 2, 64): SkinnyTile(128, 64, 4, 4),
    (0, 4, 16): SkinnyTile(128, 32, 3, 8),
    (0, 4, 64): SkinnyTile(128, 32, 3, 8),
    (0, 8, 16): SkinnyTile(128, 16, 2, 4),
    (0, 8, 64): SkinnyTile(128, 16, 2, 8),
}
# Up to this many tokens one kernel reads W once and folds as it goes; above, the library's product and a fold.
TOPK_SKINNY_TOKENS = 64
# Fewest tokens of a library product where the workspace leaves a choice, and the slabs of the vocabulary that are cut
# for more tokens: fewer tokens read W more often, more slabs select more often.
TOPK_TOKENS = 1024
LOGITS_SLABS = 3
FOLD_ROWS = 16  # blocks of 128 logits that a program folds: 8 KB
FOLD_PIECE = 16  # of a block, side by side: the pieces of a block lie on top of each other in a thread
FOLD_WARPS = 2
CHOOSE_ELEMENTS = 8192  # most block maxima of a token: a program holds them in registers
SELECT_ELEMENTS = 512  # several tokens a program where all of its lists are short
SELECT_HELD = 4096  # most candidates of a token that a program holds at a time
SELECT_COLUMNS = 1024  # most elements of chosen blocks that a program takes at a time; 8 a thread
SELECT_RANKED, SELECT_COMPARED = 32, 32  # candidates ranked at a time, and those they are compared with


class FoldTile(NamedTuple):
    """BLOCKS blocks of one token in pieces of PIECE columns, held by one program of WARPS warps."""

    blocks: int
    piece: int
    warps: int


class SelectTile(NamedTuple):
    """TOKENS a program; candidates HELD, elements (COLUMNS), candidates RANKED and COMPARED at a time; WARPS warps."""

    tokens: int
    held: int
    columns: int
    ranked: int
    compared: int
    warps: int


def topk_block(k: int, columns: int) -> int:
    """Columns of a block in top-k selection: as many as leave the k best blocks a quarter of the vocabulary."""
    for block in (128, 64, 32):
        if k * block <= columns // 4:
            return block
    return 16


def topk_room(k: int) -> int:
    """Candidates of a token that there is memory for: hardly more than k are expected."""
    return max(64, next_power_of_2(2 * k))


def fold_tile(arch: int, block: int, itemsize: int) -> FoldTile:
    """As many bytes whatever the block and the element."""
    blocks = max(1, measured_number("FOLD_ROWS", arch) * 128 * 4 // (block * itemsize))
    return FoldTile(blocks, min(FOLD_PIECE, block), FOLD_WARPS)


def select_tile(k: int, blocks: int, block: int) -> SelectTile:
    """The tile for k of that many blocks a slab."""
    room, slots = topk_room(k), next_power_of_2(min(k, blocks))
    held, ranked, compared = (min(room, most) for most in (SELECT_HELD, SELECT_RANKED, SELECT_COMPARED))
    padded = next_power_of_2(blocks)
    warps = max(2, min(16, padded // 256))
    columns = max(block, min(SELECT_COLUMNS, 256 * warps, slots * block))
    tokens = max(1, SELECT_ELEMENTS // max(padded, columns, held))
    return SelectTile(tokens, held, columns, ranked, compared, warps)


def skinny_tile(arch: int, itemsize: int, tokens: int) -> SkinnyTile:
    """The tile for at most 64 tokens."""
    limit = 16 if tokens <= 16 else 64
    return SKINNY.get((arch, itemsize, limit)) or SKINNY[0, itemsize, limit]


STATS_COLUMNS = 512  # logits of a block of the statistics
STATS_FOLD = FoldTile(2, 64, 1)  # blocks of fp32: 4 KB; (8, 64, 2) is 4 % faster and spills with a softcap
STATS_MERGE = 4096  # partial statistics a program of the merge holds


def stats_tile(block: int, itemsize: int) -> FoldTile:
    """As many bytes whatever the block and the element."""
    blocks, piece, warps = STATS_FOLD
    blocks = max(1, blocks * 512 * 4 // (block * itemsize))
    return FoldTile(blocks, min(piece, block), warps)


# The losses that read every logit (`dense`). What writes dz of one side's logits, and what finishes logits: a program takes
# SLAB_ROWS rows, SLAB_COLUMNS at a time.
SLAB_ROWS = 1
SLAB_COLUMNS = {4: 1024, 8: 512}  # by the bytes of a logit: 8 (4) pairs a thread, 10 programs an SM
SLAB_WARPS = 4
SOFTMAX_PROGRAMS = 8192  # rows are split until there are as many
# What folds once, and what writes dz of two sides' logits: one row and so many columns a program, in one warp. A loop over
# 4 warps was slower on an H200.
DENSE_FOLD_COLUMNS = {4: 1024, 8: 512}
DENSE_FOLD_WARPS = 1
# What sums over a longer piece of a row, so many columns at a time.
TERMS_COLUMNS, TERMS_STEPS, TERMS_WARPS = {4: 512, 8: 256}, 16, 2
DENSE_MERGE = 512  # partial statistics of a kind that a program of a merge holds
SLOTS = 256  # ids that a program picks, rows of a loss of the label
SLOTS_TILE = 64  # slots a program compares with the other slots of their row
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 2112  # sixteen programs for every SM of an H200

# Sizes of a walk (`dense_plan`): so few tokens may have their logits over the whole vocabulary at once; fewer rows of
# logits at hand, fewer rows of dz for a sum of dW, narrower slabs, and fewer rows of a slab are not worth it.
DENSE_WHOLE_ROWS = 256
DENSE_LEAST_ROWS, DENSE_LEAST_SUMMED, DENSE_LEAST_COLUMNS, DENSE_ENOUGH_ROWS = 128, 512, 2048, 1024


# --- what was measured -----------------------------------------------------------------------------------------

# Numbers above that a measurement may replace, for one architecture each, and the largest that the kernels take.
NUMBERS = {
    "TOPK_SKINNY_TOKENS": 64,
    "TOPK_TOKENS": 8192,
    "FOLD_ROWS": 128,
}
_numbers: dict[tuple[str, int], int] = {}


def measured_number(name: str, arch: int) -> int:
    """One of `NUMBERS` on that architecture."""
    return _numbers.get((name, arch), globals()[name])


def place_of(entry: measured.Tile) -> tuple[dict[Any, Any], Any, Any]:
    """(table, key, row) of a measured entry. Refused by name: a table, a key or a shape that this room does not have."""
    table, name = globals().get(entry.table), f"measured.json: {entry.table}{list(entry.key)}"
    if not entry.key or entry.key[0] < 1:
        raise ValueError(f"{name}: wanted an architecture first, 90 for sm_90")
    if entry.table in NUMBERS:
        limit = NUMBERS[entry.table]
        if len(entry.key) != 1 or len(entry.value) != 1 or not 1 <= entry.value[0] <= limit:
            raise ValueError(
                f"{name}: wanted an architecture and one number from 1 to {limit}, got {list(entry.value)}"
            )
        return _numbers, (entry.table, *entry.key), entry.value[0]
    default = table.get((0, *entry.key[1:])) if isinstance(table, dict) else None
    if default is None:
        raise ValueError(f"{name}: no such entry in tiles.py")
    fields = getattr(default, "_fields", ("a number",))
    if len(entry.value) != len(fields) or min(entry.value) < 1:
        raise ValueError(f"{name}: wanted {', '.join(fields)}, each at least 1, got {list(entry.value)}")
    return table, entry.key, type(default)(*entry.value)


def adopt(entries: Iterable[measured.Tile]) -> None:
    """Put measured rows into the tables."""
    for entry in entries:
        table, key, row = place_of(entry)
        table[key] = row


adopt(measured.MEASURED.tiles)
