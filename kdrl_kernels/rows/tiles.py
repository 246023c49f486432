"""Tells the row kernels how many columns a program reads at a time, and with how many warps.

`python -m bench.tiles` wrote the table, from compiled resources alone (bench/results/aot-sm_90):
it took tiles with three blocks per SM, at most 64 registers and no spills, of those one with 48 KB
of loads in flight per SM, and of those the deepest, then the smallest. No tile was timed on a GPU.
Where it takes a deeper tile for 3% fewer instructions, two entries stay as they were until one is:
of (JSD, 2, False), which bytes bind and which has 48 KB in flight, sums would round otherwise, and
of (GRADIENT, 2, True) the deeper tile has just 64 registers.
"""

from dataclasses import dataclass

from kdrl_kernels.rows.streams import Stream

SWEEP, JSD, GRADIENT, SKETCH = "sweep", "jsd", "gradient", "sketch"
OBJECTIVE_BLOCK = 256
"""Rows that one program of the objective kernel computes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Describes one step: [depth, lanes] columns, lanes side by side, 16-byte loads per depth.

    Only the sweep distinguishes the two: it keeps a running maximum per lane.
    """

    depth: int
    lanes: int
    warps: int

    @property
    def columns(self) -> int:
        """Columns of one step."""
        return self.depth * self.lanes


TILES = {
    # kernel, streams, softcap in one of them
    (SWEEP, 1, False): Tile(4, 512, 4),
    (SWEEP, 1, True): Tile(4, 512, 4),
    (SWEEP, 2, False): Tile(2, 512, 4),
    (SWEEP, 2, True): Tile(2, 512, 4),
    (JSD, 2, False): Tile(1, 512, 4),
    (JSD, 2, True): Tile(2, 512, 4),
    (GRADIENT, 1, False): Tile(4, 512, 4),
    (GRADIENT, 1, True): Tile(4, 512, 4),
    (GRADIENT, 2, False): Tile(2, 512, 4),
    (GRADIENT, 2, True): Tile(2, 512, 4),
    (SKETCH, 1, False): Tile(1, 512, 4),
    (SKETCH, 1, True): Tile(1, 512, 4),
    (SKETCH, 2, False): Tile(1, 512, 4),
    (SKETCH, 2, True): Tile(1, 512, 4),
}


def tile_of(kernel: str, student: Stream, teacher: Stream | None) -> Tile:
    """Return the tile of a kernel on one stream or on two."""
    softcap = any(x is not None and x.softcap is not None for x in (student, teacher))
    return TILES[kernel, 1 if teacher is None else 2, softcap]
