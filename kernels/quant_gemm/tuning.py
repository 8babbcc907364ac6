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
    """

    index: int
    rows: int
    columns: int
    step_us: float


TILES = (
    Tile(0, 16, 16, 0.173),
    Tile(1, 16, 32, 0.185),
    Tile(2, 16, 64, 0.200),
    Tile(3, 16, 128, 0.250),
    Tile(4, 64, 16, 0.167),
    Tile(5, 64, 32, 0.175),
    Tile(6, 64, 64, 0.203),
    Tile(7, 64, 128, 0.248),
    Tile(8, 128, 32, 0.230),
    Tile(9, 128, 64, 0.280),
    Tile(10, 128, 128, 0.373),
    Tile(11, 128, 256, 0.700),
)
GATED = {16: Tile(12, 16, 128, 0.5), 64: Tile(13, 64, 128, 0.5), 128: Tile(14, 128, 128, 0.64)}
_GROUPED = {16: TILES[2], 64: TILES[7], 128: TILES[11]}
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
    PackedTile(1, 8, 128),
    PackedTile(2, 16, 128),
    PackedTile(3, 32, 128),
    PackedTile(4, 48, 128),
)
PACKED_COLUMNS = 512  # K that a row's 16 bytes of 1x32 scales cover
_PACKED_MEAN = (
    128  # rows of an expert; beyond, expanding once costs less than unpacking in every tile
)
_VERY_FEW_ROWS = 12  # of all experts together: narrow tiles occupy more of the machine


def choose(rows: int, columns: int, multiprocessors: int) -> Tile:
    """The tile for one weight: the one whose waves over the machine take the least time."""

    def cost(tile: Tile) -> tuple[float, int]:
        tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
        return -(-tiles // multiprocessors) * tile.step_us, -tile.columns

    # A tile with many rows beyond the last is slow: the copy engine fills them with zeros one by one.
    heights = (16,) if rows <= 16 else (64,) if rows <= 64 else (64, 128)
    return min((tile for tile in TILES if tile.rows in heights), key=cost)


def choose_grouped(rows: int, groups: int) -> Tile:
    """The tile for many weights, by the mean number of rows of one."""
    mean = rows / groups
    return _GROUPED[16 if mean <= 16 else 64 if mean <= 48 else 128]


def choose_gated(rows: int, groups: int) -> Tile | None:
    """The gated tile for many weights; None where narrower tiles and a SwiGLU of its own are faster."""
    if rows <= _FEW_ROWS:
        return None
    mean = rows / groups
    return GATED[16 if mean <= 16 else 64 if mean <= 48 else 128]


def choose_packed(rows: int, groups: int, depth: int) -> PackedTile | None:
    """The tile that reads packed FP4 weights of ``depth`` columns; None where they are expanded."""
    mean = rows / groups
    if depth % PACKED_COLUMNS or mean > _PACKED_MEAN:
        return None
    if rows <= _VERY_FEW_ROWS:
        return PACKED_TILES[0]
    return PACKED_TILES[1 if mean <= 4 else 2 if mean <= 12 else 3 if mean <= 24 else 4]


def gated_fills(rows: int, columns: int, multiprocessors: int) -> bool:
    """Whether the gated tiles of one weight occupy most of the machine."""
    return 4 * -(-rows // 128) * -(-columns // 128) >= 3 * multiprocessors
