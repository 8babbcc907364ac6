"""Which tile of ``cuda/product_shapes.h`` serves a plain product. Every choice gives the same bits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """One compiled tile.

    Args:
        index: its index in ``product_shapes.h``.
        rows: rows of the tile.
        columns: columns of the tile.
        clusters: clusters of four blocks, which share K, that an H200 holds at once; 0 for a tile
            whose block walks all of K.
        step_us: time that a tile spends on 64 columns of K when all processors work: fitted, with the
            two constants below, so that the choice is the fastest tile or close to it on an H200.
    """

    index: int
    rows: int
    columns: int
    clusters: int
    step_us: float


TILES = (
    Tile(0, 16, 64, 0, 0.126),
    Tile(1, 16, 128, 0, 0.25),
    Tile(2, 64, 64, 0, 0.139),
    Tile(3, 64, 128, 0, 0.25),
    Tile(4, 128, 64, 0, 0.183),
    Tile(5, 128, 128, 0, 0.337),
    Tile(6, 128, 192, 0, 0.493),
    Tile(7, 16, 16, 60, 0.042),
    Tile(8, 16, 32, 60, 0.11),
    Tile(9, 16, 64, 60, 0.09),
    Tile(10, 64, 16, 60, 0.161),
    Tile(11, 64, 32, 60, 0.215),
    Tile(12, 64, 64, 60, 0.324),
    Tile(13, 128, 32, 60, 0.324),
    Tile(14, 128, 64, 60, 0.541),
    Tile(15, 128, 128, 30, 0.37),
    Tile(16, 32, 32, 60, 0.13),
    Tile(17, 32, 64, 60, 0.2),
    Tile(18, 64, 128, 60, 0.5),
)
_PIECE_US = 2.82  # what a cluster adds to its steps: its start, and the sums that meet
_BYTES_PER_US = 4.2e6  # of weight, from memory


@functools.cache
def multiprocessors(index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def choose(rows: int, columns: int, k: int, processors: int) -> int:
    """Index of the tile whose waves over the machine take the least time."""
    steps = max(3, -(-k // 64))
    least = 2 * columns * k / _BYTES_PER_US

    def cost(tile: Tile) -> tuple[float, int]:
        tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
        if tile.clusters:
            work = _waves(tiles, tile.clusters, 3) * (tile.step_us * -(-steps // 4) + _PIECE_US)
        else:
            work = _waves(tiles, processors, 6) * tile.step_us * steps
        return max(work, least), -tile.columns

    heights = (16,) if rows <= 16 else (32, 64) if rows <= 32 else (64, 128)
    return min((tile for tile in TILES if tile.rows in heights), key=cost).index


def _waves(tiles: int, slots: int, many: int) -> float:
    """Rounds of ``slots`` tiles; over many rounds the ends of tiles spread."""
    waves = tiles / slots
    return math.ceil(waves) if waves < many else waves + 0.5
