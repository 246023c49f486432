"""Finds the tile that each row kernel should use: python -m bench.tiles --out DIR

Compiles the row kernels over a grid of tiles for sm_90: registers, spills, blocks an SM, bytes of
loads in flight an SM, instructions of the loop for a column. On a GPU each is timed too, over
[2048, 152064] float32 logits, against a device copy. Prints a table, and the lines of
kdrl_kernels/rows/tiles.py it would write: the fastest tile; or without a GPU, of those with three
blocks an SM and at most 64 registers, one with enough bytes in flight to hide the latency of
memory, the deepest, the smallest.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gemms import median_ms
from bench.machine import DEVICE, machine_info, one_line
from kdrl_kernels.rows import kernel_sketch, kernels
from kdrl_kernels.rows.streams import Stream, TeacherStream
from kdrl_kernels.rows.tiles import GRADIENT, JSD, SKETCH, SWEEP, TILES, Tile
from kdrl_kernels.sketch import COARSE, Sketch
from kdrl_kernels.token_rows import Coefficients
from tests.kernels import aot

GRID = [
    Tile(depth, 128 * warps, warps)  # one 16-byte load a thread for each depth
    for warps in (4, 8, 16)
    for depth in (1, 2, 4)
]
ENOUGH_IN_FLIGHT = 48 << 10
"""Bytes an SM: 4.8 TB/s times a latency of about 1 us, over 132 SMs, and a third."""
MOST_REGISTERS = 65_536 // 640
"""What leaves 640 threads an SM, for a kernel that has no tile of 64 registers, as the sketch."""
WITH_TILES = {kernel for kernel, _, _ in TILES}
"""Kernels whose tile the table says; the others have one of their own."""
ROWS, COLUMNS = 2048, 152_064
ROUNDS = 20

Key = tuple[str, int, bool]
TileRow = dict[str, Any]


def compiled(tile: Tile) -> Iterator[tuple[Key, dict[str, float]]]:
    """Compile every variant at one tile; yield its key in the table and its resources on sm_90."""
    for variant in aot.variants(dict.fromkeys(TILES, tile)):
        kernel, kd, *options = variant[0].split("-")
        rare = {"fp16", "fp32", "plain", "teacher_entropy"}
        if kernel not in WITH_TILES or rare & set(options):
            continue
        streams = 1 if kd == "None" else 2
        kernel_of_tile = aot.compile_one(variant, aot.TARGETS["sm_90"], aligned=True)
        loads = aot.logits_read(variant[0])
        assert loads is not None, "the kernels of the table have a loop over the columns"
        count = {"instructions": aot.instructions(kernel_of_tile, loads)}
        yield (kernel, streams, "softcap" in options), aot.resources(kernel_of_tile) | count


def describe(key: Key, tile: Tile, resources: list[dict[str, float]]) -> TileRow:
    """Describe a tile by one line of the table, from the worst of its variants."""
    registers = int(max(one["registers"] for one in resources))
    threads = 32 * tile.warps
    blocks = min(65_536 // (-(-registers // 8) * 8 * threads), 2048 // threads, 32)
    return {
        "kernel": key[0],
        "streams": key[1],
        "softcap": key[2],
        "tile": [tile.depth, tile.lanes, tile.warps],
        "registers": registers,
        "spills": max(one["spills"] + one["stack"] for one in resources),
        "instructions": max(one["instructions"] for one in resources),
        "blocks_per_sm": blocks,
        "in_flight_bytes_per_sm": blocks * tile.columns * 4 * key[1],
        "ms": _measure(key, tile) if DEVICE == "cuda" else None,
    }


def _measure(key: Key, tile: Tile) -> float:
    """Measure the median time of the kernel alone, ms."""
    kernel, streams, softcap = key
    cap = 30.0 if softcap else None
    z, t = (torch.randn(ROWS, COLUMNS, device="cuda").mul_(4) for _ in range(2))
    tokens = torch.randint(COLUMNS, (ROWS,), device="cuda")
    student = Stream(z, 1.0, cap)
    kd = "jsd" if kernel == JSD else "rkl"
    teacher = TeacherStream(t, 1.0, cap, kd) if streams == 2 else None
    stats = kernels.sweep(student, tokens, teacher=teacher)
    coef = Coefficients(torch.randn(ROWS, device="cuda"), kl=stats.max if teacher else None)
    grid = Sketch(COARSE).of_head(z, COLUMNS).grid(slice(None), COLUMNS, coef)
    out = torch.empty(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)
    temperatures = torch.ones(2, ROWS, device="cuda")
    row_sums = torch.randn(kernels.STATS, ROWS, device="cuda")

    def call() -> None:
        if kernel == GRADIENT:
            kernels.gradient(student, tokens, stats, coef, out=out, teacher=teacher, tile=tile)
        elif kernel == SKETCH:  # with the lists made of what it wrote
            kernel_sketch.sketch(student, stats, coef, grid, teacher, tile)
        elif kernel == SWEEP:
            kernels.sweep(student, tokens, teacher=teacher, tile=tile)
        elif teacher is not None:
            kernels.add_mixture_kl(student, teacher, temperatures, row_sums, tile)

    return _kernel_ms(call, f"_{kernel}_kernel")


def _kernel_ms(call: Callable[[], object], name: str) -> float:
    """Measure the median time of a kernel in calls that launch others too, ms on the device."""
    call()  # it compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    times = [event.device_time_total for event in profile.events() if event.name == name]
    if len(times) != ROUNDS:
        raise RuntimeError(f"the profiler must see {ROUNDS} launches of {name}, got {len(times)}")
    return statistics.median(times) / 1e3


def copy_ms() -> float:
    """Measure the time to copy one buffer of logits, which reads and writes as many bytes."""
    source = torch.randn(ROWS, COLUMNS, device="cuda")
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source), ROUNDS)


def best(rows: list[TileRow]) -> TileRow:
    """Choose the tile among those of one key."""
    usable = [row for row in rows if not row["spills"] and row["blocks_per_sm"] >= 3]
    if DEVICE == "cuda":
        return min(usable, key=lambda row: row["ms"])
    few = [row for row in usable if row["registers"] <= 64]
    return max(
        few or [row for row in usable if row["registers"] <= MOST_REGISTERS],
        key=lambda row: (
            min(row["in_flight_bytes_per_sm"], ENOUGH_IN_FLIGHT),
            row["tile"][0],
            row["blocks_per_sm"],
        ),
    )


def markdown(rows: list[TileRow]) -> str:
    """Write the table, one line a tile, with a mark at each chosen tile."""
    taken = [best(group) for group in _by_key(rows).values()]
    lines = [
        "| kernel | streams | softcap | depth x lanes, warps | registers | spills | instructions "
        "a column | blocks an SM | KB in flight an SM | ms | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        depth, lanes, warps = row["tile"]
        ms = "" if row["ms"] is None else f"{row['ms']:.3f}"
        lines.append(
            f"| {row['kernel']} | {row['streams']} | {row['softcap']} | {depth} x {lanes}, {warps} "
            f"| {row['registers']} | {row['spills']} | {row['instructions']:.1f} "
            f"| {row['blocks_per_sm']} "
            f"| {row['in_flight_bytes_per_sm'] >> 10} | {ms} | {'taken' if row in taken else ''} |"
        )
    return "\n".join(lines)


def _by_key(rows: list[TileRow]) -> dict[Key, list[TileRow]]:
    groups: dict[Key, list[TileRow]] = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["streams"], row["softcap"]].append(row)
    return groups


def main() -> None:
    """Try all tiles, save tiles.json and tiles.md, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tiles.json, tiles.md")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[TileRow] = []
    for tile in GRID:
        resources_by_key: dict[Key, list[dict[str, float]]] = defaultdict(list)
        for key, resources in compiled(tile):
            resources_by_key[key].append(resources)
        rows += [describe(key, tile, resources) for key, resources in resources_by_key.items()]
    rows.sort(key=lambda row: (row["kernel"], row["streams"], row["softcap"]))
    info = machine_info() | {"copy_ms": copy_ms() if DEVICE == "cuda" else None}
    (out / "tiles.json").write_text(json.dumps({"machine": info, "rows": rows}, indent=1))
    table = f"{one_line(info)}\n\n{markdown(rows)}\n"
    (out / "tiles.md").write_text(table)
    lines = [
        f"    {key}: Tile{tuple(best(group)['tile'])}," for key, group in _by_key(rows).items()
    ]
    print(table, *lines, sep="\n")


if __name__ == "__main__":
    main()
