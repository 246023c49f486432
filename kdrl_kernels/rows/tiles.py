"""Tiles of the row kernels: how many columns a program reads at a time, and with how many warps.

Written by `python -m bench.tiles`, here from compiled resources alone (bench/results/aot-sm_90):
of the tiles with three blocks an SM, at most 64 registers and no spills, one with 48 KB of loads
in flight an SM, the deepest and then the smallest. Not yet from times on a GPU.
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
}


def tile_of(kernel: str, student: Stream, teacher: Stream | None) -> Tile:
    """The tile of a kernel on one stream, or on two."""
    softcap = any(x is not None and x.softcap is not None for x in (student, teacher))
    return TILES[kernel, 1 if teacher is None else 2, softcap]
