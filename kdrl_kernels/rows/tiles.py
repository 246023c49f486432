"""Tiles of the row kernels: how many columns a program reads at a time, and with how many warps.

Written from the sweep of bench/tiles.py. Without a GPU that sweep has compiled resources only: the
table takes the widest tile that spills nothing and leaves three blocks an SM on sm_80, sm_90 and
sm_100, with 16-byte loads.
"""

from dataclasses import dataclass

from kdrl_kernels.rows import Stream

SWEEP, JSD, GRADIENT = "sweep", "jsd", "gradient"
OBJECTIVE_BLOCK = 256
"""Rows a program of the objective kernel."""


@dataclass(frozen=True, slots=True)
class Tile:
    """[depth, lanes] columns a step: lanes side by side, one 16-byte load a thread for each depth.

    Only the sweep tells the two apart: it keeps a running maximum a lane.
    """

    depth: int
    lanes: int
    warps: int

    @property
    def columns(self) -> int:
        """Columns a step."""
        return self.depth * self.lanes


TILES = {
    # kernel, streams, softcap in one of them
    (SWEEP, 1, False): Tile(4, 1024, 8),
    (SWEEP, 1, True): Tile(4, 1024, 8),
    (SWEEP, 2, False): Tile(2, 1024, 8),
    (SWEEP, 2, True): Tile(1, 1024, 8),
    (JSD, 2, False): Tile(2, 1024, 8),
    (JSD, 2, True): Tile(1, 1024, 8),
    (GRADIENT, 1, False): Tile(2, 1024, 8),
    (GRADIENT, 1, True): Tile(2, 1024, 8),
    (GRADIENT, 2, False): Tile(2, 1024, 8),
    (GRADIENT, 2, True): Tile(1, 1024, 8),
}


def tile_of(kernel: str, student: Stream, teacher: Stream | None) -> Tile:
    """The tile of a kernel on one stream, or on two."""
    softcap = any(x is not None and x.softcap is not None for x in (student, teacher))
    return TILES[kernel, 1 if teacher is None else 2, softcap]
