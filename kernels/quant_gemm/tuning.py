"""Which tile of ``cuda/gemm_shapes.h`` serves a product. Every choice gives the same bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """One compiled tile.

    Args:
        index: its index in ``gemm_shapes.h``.
        rows: rows of the tile.
        columns: columns of the tile.
        step_us: measured time that a tile spends on 128 columns of K on an H200.
        blocks: multiprocessors that make a tile together.
    """

    index: int
    rows: int
    columns: int
    step_us: float
    blocks: int = 1


TILES = (
    Tile(0, 16, 16, 0.105),
    Tile(1, 16, 32, 0.143),
    Tile(2, 16, 64, 0.245),
    Tile(3, 16, 128, 0.485),
    Tile(4, 64, 16, 0.130),
    Tile(5, 64, 32, 0.148),
    Tile(6, 64, 64, 0.208),
    Tile(7, 64, 128, 0.320),
    Tile(8, 128, 32, 0.204),
    Tile(9, 128, 64, 0.267),
    Tile(10, 128, 128, 0.373),
    Tile(11, 128, 256, 0.700),
    Tile(19, 32, 16, 0.110),
    Tile(20, 32, 32, 0.147),
    Tile(21, 32, 64, 0.250),
    Tile(22, 32, 128, 0.485),
)
PAIRS = (  # of one weight and more than 128 rows
    Tile(15, 256, 256, 0.655, 2),
    Tile(16, 128, 256, 0.66),
    Tile(17, 256, 192, 0.55, 2),
    Tile(18, 256, 96, 0.35, 2),
)
OVERLAPS = (  # of one weight, more than 128 rows, at most OVERLAP_BLOCKS blocks of K, and one wave
    Tile(23, 128, 96, 0.30),
    Tile(24, 128, 128, 0.34),
)
OVERLAP_BLOCKS = 128
DUOS = (  # of one weight and 65 to 128 rows
    Tile(25, 128, 32, 0.115, 2),
    Tile(26, 128, 64, 0.165, 2),
    Tile(27, 128, 96, 0.22, 2),
    Tile(28, 128, 112, 0.255, 2),
    Tile(29, 128, 128, 0.27, 2),
)
DUO_OF_MANY = Tile(30, 128, 128, 0.26, 2)  # faster where a block of threads has several tiles
GATED = {
    16: Tile(12, 16, 128, 0.5),
    64: Tile(13, 64, 128, 0.5),
    128: Tile(14, 128, 128, 0.64),
    256: Tile(32, 256, 128, 0.6, 2),
}
GROUPED = Tile(31, 256, 256, 0.6, 2)  # of many weights only
_GROUPED = {16: TILES[3], 64: TILES[7], 128: TILES[11], 256: GROUPED}
_FEW_ROWS = 64  # of all experts together


@dataclass(frozen=True, slots=True)
class PackedTile:
    """One compiled tile of packed FP4 weights.

    Args:
        index: its index in ``packed_shapes.h``.
        rows: rows of the tile.
        columns: columns of the tile.
    """

    index: int
    rows: int
    columns: int


PACKED_TILES = (
    PackedTile(0, 8, 64),
    PackedTile(1, 16, 128),
    PackedTile(2, 32, 128),
    PackedTile(3, 48, 128),
)
PACKED_COLUMNS = 512  # K that a row's 16 bytes of 1x32 scales cover
# Mean rows of an expert up to which a tile is the fastest; beyond, expanding the weights costs less.
_PACKED_MEANS = (
    (4, PACKED_TILES[0]),
    (12, PACKED_TILES[1]),
    (32, PACKED_TILES[2]),
    (128, PACKED_TILES[3]),
)


def choose(rows: int, columns: int, blocks: int, multiprocessors: int) -> Tile:
    """The tile for one weight of ``blocks`` blocks of K: its waves take the least time."""

    def count(tile: Tile) -> int:
        return -(-rows // tile.rows) * -(-columns // tile.columns)

    def cost(tile: Tile) -> tuple[float, int]:
        waves = -(-count(tile) // (multiprocessors // tile.blocks))
        return waves * tile.step_us, -tile.columns

    # A tile with many rows beyond the last is slow: the copy engine fills them with zeros one by one.
    few = next((height for height in (16, 32, 64) if rows <= height), None)
    heights = (64, 128) if few is None else (few,)
    tiles = [tile for tile in TILES if tile.rows in heights]
    if rows > 128:
        tiles += PAIRS
        if blocks <= OVERLAP_BLOCKS:
            tiles += [tile for tile in OVERLAPS if count(tile) <= multiprocessors]
    elif few is None:
        many = columns > DUO_OF_MANY.columns * (multiprocessors // DUO_OF_MANY.blocks)
        tiles = [*DUOS, DUO_OF_MANY] if many else list(DUOS)
    return min(tiles, key=cost)


def _height(mean: float) -> int:
    """The key of the tile for this mean number of rows of an expert."""
    return next((height for most, height in ((16, 16), (48, 64), (192, 128)) if mean <= most), 256)


def choose_grouped(rows: int, groups: int) -> Tile:
    """The tile for many weights, by the mean number of rows of one."""
    return _GROUPED[_height(rows / groups)]


def choose_gated(rows: int, groups: int) -> Tile | None:
    """The gated tile for many weights; None where narrower tiles and a SwiGLU of its own are faster."""
    if rows <= _FEW_ROWS:
        return None
    return GATED[_height(rows / groups)]


def choose_packed(rows: int, groups: int, depth: int) -> PackedTile | None:
    """The tile that reads packed FP4 weights of ``depth`` columns; None where they are expanded."""
    if depth % PACKED_COLUMNS:
        return None
    mean = rows / groups
    return next((tile for most, tile in _PACKED_MEANS if mean <= most), None)


def gated_fills(rows: int, columns: int, multiprocessors: int) -> bool:
    """Whether the gated tiles of one weight occupy most of the machine."""
    return 4 * -(-rows // 128) * -(-columns // 128) >= 3 * multiprocessors
