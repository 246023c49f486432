"""Compile every row kernel ahead of time, without a GPU, and print its resources as JSON lines.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.aot [TARGET aligned|ragged]`.
The arguments name one target and one alignment of the rows; without them all are compiled. sm_*
give a cubin, whose resource report comes from the cuobjdump inside the triton wheel; gfx942 gives
assembly, which ends in a report of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdrl_kernels.rows import (
    kernel_bags,
    kernel_compaction,
    kernel_gradient,
    kernel_ids,
    kernel_objective,
    kernel_scale,
    kernel_sketch,
    kernels,
    tiles,
)
from kdrl_kernels.rows.entries import FORWARD
from kdrl_kernels.rows.kernel_math import KD_CODES, OPTIONS
from kdrl_kernels.rows.tiles import GRADIENT, JSD, SKETCH, SWEEP, Tile

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DIVISIBLE = [["tt.divisibility", 16]]
ENDS = ("_ptr", "_zn", "_tn", "_dn", "_table", "_out", "width", "size")
"""Ends of the names of arguments that are multiples of 16."""

INT64 = {"token_ptr", "source_ptr", "begin_ptr", "offset_ptr", "id_ptr"}
INT64 |= {"hole_ptr", "rank_ptr", "total_ptr"}
"""Arguments that point to int64 numbers."""
HALF_RATE = {"FSEL", "SEL", "FSETP", "ISETP", "FMNMX", "IMNMX", "VIMNMX", "IADD3", "VIADD", "LOP3"}
HALF_RATE |= {"SHF", "LEA", "PLOP3", "P2R", "F2FP", "I2FP", "PRMT", "FSET", "ISET", "LOP", "R2P"}
"""Instructions that half of the lanes of an sm_90 take (CUDA C programming guide, throughput)."""

Variant = tuple[str, Any, dict[str, Any], dict[str, str | None], int]
"""Name, kernel, constexprs, types that differ from the usual ones (None: no argument), warps."""


def variants(table: dict[tuple[str, int, bool], Tile] = tiles.TILES) -> Iterator[Variant]:
    """Yield every kernel and KD term, with and without softcaps, at the table's tiles."""
    for kd, cap in product((None, "rkl", "fkl", "jsd", "rkl+fkl"), (None, "fp32")):
        caps = {"softcap": cap, "t_softcap": cap}
        name = f"{kd}{'-softcap' if cap else ''}"
        key = 2 if kd else 1, cap is not None
        swept = table[SWEEP, *key]
        flags = {"HAS_ENTROPY": True, "KD": KD_CODES[kd]}
        shape = {"DEPTH": swept.depth, "LANES": swept.lanes, "TEACHER_ENTROPY": False}
        if kd is not None:
            both = flags | shape | {"TEACHER_ENTROPY": True}
            yield f"sweep-{name}-teacher_entropy", kernels._sweep_kernel, both, caps, swept.warps
        yield f"sweep-{name}", kernels._sweep_kernel, flags | shape, caps, swept.warps
        if kd == "jsd":
            tile = table[JSD, *key]
            block = {"BLOCK_V": tile.columns}
            yield f"jsd-{name}", kernels._jsd_kernel, block, caps, tile.warps
        tile = table[GRADIENT, *key]
        block = flags | {"BLOCK_V": tile.columns}
        if kd in (None, "rkl"):  # no entropy, nothing left out: the default call
            plain = {"HAS_ENTROPY": False, "KD": KD_CODES[kd]}
            yield f"sweep-{name}-plain", kernels._sweep_kernel, plain | shape, caps, swept.warps
            types = caps | {"dz_ptr": "*bf16", "source_ptr": None}
            columns = {"BLOCK_V": tile.columns}
            kernel = kernel_gradient._gradient_kernel
            yield f"gradient-{name}-plain", kernel, plain | columns, types, tile.warps
        for dtype in ("bf16", "fp16", "fp32") if name == "rkl" else ("bf16",):
            types = caps | {"dz_ptr": f"*{dtype}"}
            kernel = kernel_gradient._gradient_kernel
            yield f"gradient-{name}-{dtype}", kernel, block, types, tile.warps
        tile = table[SKETCH, *key]
        block = flags | {"BLOCK_V": tile.columns}
        yield f"sketch-{name}", kernel_sketch._sketch_kernel, block, caps, tile.warps
        for most, source in ((64, "*i64"), (512, None)):
            block = flags | {"BLOCK_K": most, "TILE": kernel_ids.TILE}
            types = {"softcap": cap, "dz_ptr": "*bf16", "source_ptr": source}
            yield f"ids-{name}-{most}", kernel_ids._ids_kernel, block, types, max(1, most // 64)
    shape = {"ENTRIES": kernel_bags.ENTRIES, "BLOCK_H": kernel_bags.BLOCK_H}
    types = {"table_ptr": "*bf16", "out_ptr": "*bf16"}
    yield "bags-bf16", kernel_bags._bags_kernel, shape, types, 4
    block = {"BLOCK": kernel_compaction.BLOCK}
    others = [f"{letter}_ptr" for letter in "bcdefg"]  # the derivatives that a loss may lack
    count, warps = kernel_compaction._count_kernel, kernel_compaction.WARPS
    yield "slots-count_one", count, block, dict.fromkeys(others), warps
    yield "slots-count_all", count, block, {}, warps
    yield "slots-fill", kernel_compaction._fill_kernel, block, {}, warps
    for dtype in ("bf16", "fp16", "fp32"):
        shape = {"IN_PLACE": dtype == "fp32", "BLOCK": kernel_scale.BLOCK}
        types = {"out_ptr": f"*{dtype}"}
        yield f"scale-{dtype}", kernel_scale._scale_kernel, shape, types, kernel_scale.WARPS
    for kd, code in KD_CODES.items():
        flags = {"HAS_POLICY": True, "HAS_ENTROPY": True, "KD": code}
        block = flags | {"BLOCK": tiles.OBJECTIVE_BLOCK}
        yield f"objective-{kd}", kernel_objective._objective_kernel, block, {}, 4


def compile_one(variant: Variant, target: GPUTarget, aligned: bool) -> Any:
    """Compile a kernel for padded rows; aligned says that V is a multiple of 16 as well."""
    _, kernel, constexprs, types, warps = variant
    constexprs = constexprs | {name: None for name, kind in types.items() if kind is None}

    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name in INT64:
            return "*i64"
        if name in ("column_ptr", "count_ptr", "index_ptr"):
            return "*i32"
        if name.endswith("_ptr"):
            return types.get(name) or "*fp32"
        sizes = ("V", "C", "H", "K", "width", "slots", "programs")
        if name == "size":
            return "i64"
        return "i32" if name in sizes or name.startswith("stride_") else "fp32"

    names = kernel.arg_names
    divisible = {name for name in names if name.endswith(ENDS)}
    divisible |= {"V", "H"} & set(names) if aligned else set()
    attrs = {(i,): DIVISIBLE for i, name in enumerate(names) if name in divisible}
    signature = {name: type_of(name) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = OPTIONS | {"num_warps": warps}
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Return registers, stack and spilled bytes per thread, and bytes of shared memory."""
    if "amdgcn" in compiled.asm:
        report = compiled.asm["amdgcn"]
        names = {"registers": "vgpr_count", "spills": "vgpr_spill_count"}
        names |= {"stack": "private_segment_fixed_size"}
        matches = {key: re.search(rf"\.{name}:\s+(\d+)", report) for key, name in names.items()}
        numbers = {key: int(match[1]) for key, match in matches.items()}
    else:
        report = _cuobjdump(compiled.asm["cubin"])
        numbers = {
            key: report[name]
            for key, name in {"registers": "REG", "spills": "LOCAL", "stack": "STACK"}.items()
        }
    return numbers | {"shared_bytes": compiled.metadata.shared}


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    """Read REG, STACK, LOCAL and SHARED of a cubin."""
    report = _tool("cuobjdump", "--dump-resource-usage", cubin)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}


def _tool(name: str, option: str, cubin: bytes) -> str:
    """Return what a tool inside the triton wheel prints of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def logits_read(name: str) -> int | None:
    """Return the logits that a variant's loop reads for each column; None: it has no such loop."""
    kernel, kd = name.split("-")[:2]
    if kernel not in (SWEEP, JSD, GRADIENT, SKETCH):
        return None
    # a sketch reads the teacher where q alone makes an entry, else in tiles with one
    alone = kd == "None" or (kernel == "sketch" and kd not in FORWARD)
    return 1 if alone else 2


def instructions(compiled: Any, streams: int) -> float:
    """Count the machine instructions of a kernel's loop for each column of an aligned row, on sm_*.

    Of a sketch that is a tile without an entry.
    """
    return operations(compiled, streams)["instructions"]


def operations(compiled: Any, streams: int) -> dict[str, float]:
    """Count `loop_operations` of a compiled kernel, on sm_*."""
    return loop_operations(_tool("nvdisasm", "-c", compiled.asm["cubin"]), streams)


def loop_operations(listing: str, streams: int) -> dict[str, float]:
    """Count what an nvdisasm listing's longest loop that loads does for each column.

    Forward branches are taken. mufu: what the special function unit does (exp2, 1 / x), 16 a cycle
    and SM on sm_90; half_rate: comparisons, choices, integers and conversions, 64 a cycle. All
    instructions together are 128 a cycle.
    """
    run, columns = _loop(listing)
    names = [re.sub(r"^@!?U?P\w+ +", "", text).split()[0] for text in run]
    counts = {
        "instructions": len(names),
        "mufu": sum(name.startswith("MUFU") for name in names),
        "half_rate": sum(name.split(".")[0] in HALF_RATE for name in names),
    }
    return {key: count * streams / columns for key, count in counts.items()}


def _loop(listing: str) -> tuple[list[str], int]:
    """Return the instructions of the longest loop that loads, and how many logits it loads."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*) ;", line):
            code.append(instruction[1])
    jumps = {i: re.search(r"BRA `\((\.L_x_\d+)\)", text) for i, text in enumerate(code)}
    targets = {i: labels[jump[1]] for i, jump in jumps.items() if jump}
    runs = [_run(code, targets, start, end) for end, start in targets.items() if start < end]
    loads = [4 * sum("LDG.E.128" in text for text in run) for run in runs]
    columns, _, run = max((count, len(run), run) for count, run in zip(loads, runs, strict=True))
    return run, columns


def _run(code: list[str], targets: dict[int, int], start: int, end: int) -> list[str]:
    """Return the instructions of a loop in the order in which they run."""
    place, run = start, []
    while place <= end:
        run.append(code[place])
        target = targets.get(place, 0)
        place = target if place < target <= end else place + 1
    return run


def main(*only: str) -> None:
    """Print one JSON line for each kernel variant, alignment and target; only: one of them."""
    targets = {name: target for name, target in TARGETS.items() if name in (only[:1] or TARGETS)}
    alignments = [name == "aligned" for name in only[1:] or ("aligned", "ragged")]
    for variant, aligned, (arch, target) in product(variants(), alignments, targets.items()):
        if not aligned and (
            variant[0].startswith(("objective", "bags", "ids", "slots", "scale"))
            or "softcap" in variant[0]
        ):
            continue  # the first have no V; the others differ by nothing more
        compiled = compile_one(variant, target, aligned)
        name = f"{variant[0]}-{'aligned' if aligned else 'ragged'}"
        row = {"kernel": name, "arch": arch, "warps": variant[-1]} | resources(compiled)
        if aligned and arch == "sm_90":
            row["wide_loads"] = len(re.findall(r"ld\.global\.v4", compiled.asm["ptx"]))
            row["barriers_in_loops"] = barriers_in_loops(compiled.asm["ptx"])
            if (loads := logits_read(variant[0])) is not None:
                row |= operations(compiled, loads)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def barriers_in_loops(ptx: str) -> int:
    """Count the barriers between a label and a later branch back to it."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB")}
    inside = set()
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if target and labels[target[1]] < i:
            inside |= set(range(labels[target[1]], i))
    return sum("bar.sync" in lines[i] for i in inside)


if __name__ == "__main__":
    main(*sys.argv[1:])
