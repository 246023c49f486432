"""Predicts the time of each row kernel from its bytes and its instructions.

    python -m bench.instructions --out DIR

Compiles every row kernel for sm_90 at the tiles of kdrl_kernels/rows/tiles.py, counts for each
column of the loop the bytes that it reads and writes, the machine instructions, and among them
those that have fewer lanes; and divides by the rates of an H200. Writes instructions.json, which
tests/kernels/test_compile.py holds the kernels to under the same version of Triton, and
instructions.md. Nothing is measured.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.machine import machine_info, one_line
from bench.shapes import REFERENCE
from tests.kernels import aot

RESULTS = Path(__file__).parent / "results/aot-sm_90"
"""Where the committed table is."""
ROWS, COLUMNS = 2048, REFERENCE.V
TERABYTES_PER_S = 4.3
"""What large copies reach on an H200: 0.9 of its peak, as in bench.measures.predict."""
LANES_PER_S = 132 * 1.75e9
"""SMs times a clock below the highest, 1.98 GHz: the rate of one lane of every SM."""
LANES = {"instructions": 128, "half_rate": 64, "mufu": 16}
"""Lanes of an SM that take an instruction of a kind in a cycle (CUDA C programming guide, 9.0)."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Says what the loop of a kernel does for each column of a row."""

    kernel: str
    bytes: float
    instructions: float
    half_rate: float
    mufu: float

    def times_ms(self) -> dict[str, float]:
        """Return the time that each resource takes for [ROWS, COLUMNS], ms: what binds it first."""
        elements = ROWS * COLUMNS
        times = {"bytes": self.bytes * elements / TERABYTES_PER_S / 1e9}
        for kind, lanes in LANES.items():
            times[kind] = getattr(self, kind) * elements / (lanes * LANES_PER_S) * 1e3
        return dict(sorted(times.items(), key=lambda item: -item[1]))

    @property
    def binds(self) -> str:
        """Name the resource that takes the longest."""
        return next(iter(self.times_ms()))

    @property
    def ms(self) -> float:
        """Predict the time for [ROWS, COLUMNS], ms."""
        return max(self.times_ms().values())


def bytes_of(variant: aot.Variant) -> int:
    """Count the bytes that a variant reads and writes for each column."""
    loads = aot.logits_read(variant[0])
    assert loads is not None, "a kernel without a loop over the columns has no bytes a column"
    dz = {None: 0, "*bf16": 2, "*fp16": 2, "*fp32": 4}[variant[3].get("dz_ptr")]
    return 4 * loads + dz


def loops() -> list[Loop]:
    """Compile every variant that has a loop over the columns, and count."""
    rows = []
    for variant in aot.variants():
        if (loads := aot.logits_read(variant[0])) is None:
            continue
        compiled = aot.compile_one(variant, aot.TARGETS["sm_90"], aligned=True)
        rows.append(Loop(variant[0], bytes_of(variant), **aot.operations(compiled, loads)))
    return rows


def saved(folder: Path) -> dict[str, Loop]:
    """Read the loops of an instructions.json, by their names."""
    rows = json.loads((folder / "instructions.json").read_text("utf-8"))["loops"]
    return {row["kernel"]: Loop(**row) for row in rows}


def compiler_of(folder: Path) -> str:
    """Read the version of the Triton that compiled what is counted in an instructions.json."""
    version: str = json.loads((folder / "instructions.json").read_text("utf-8"))["machine"][
        "triton"
    ]
    return version


# what a chunk of each operation runs; a term that is not named reads what GRPO reads
_GRPO = ("sweep-None-plain", "gradient-None-plain")
OPERATIONS: dict[str, tuple[str, ...]] = {
    "GRPO; k2, k3 of a server's numbers": _GRPO,
    "k2, k3, a teacher's head": ("sweep-None-plain", *_GRPO),
    "k2, kd_baseline": ("sweep-rkl-plain", "gradient-None-plain"),
    "GRPO, entropy": ("sweep-None", "gradient-None-bf16"),
    "topk_* with a tail, `rest`": ("sweep-None-plain", *_GRPO),
    "rkl": ("sweep-rkl-plain", "gradient-rkl-plain"),
    "fkl": ("sweep-fkl", "gradient-fkl-bf16"),
    "rkl+fkl": ("sweep-rkl+fkl", "gradient-rkl+fkl-bf16"),
    "jsd": ("sweep-jsd", "jsd-jsd", "gradient-jsd-bf16"),
    "GRPO, softcap": ("sweep-None-softcap-plain", "gradient-None-softcap-plain"),
    "rkl, softcaps": ("sweep-rkl-softcap-plain", "gradient-rkl-softcap-plain"),
    "jsd, softcaps": ("sweep-jsd-softcap", "jsd-jsd-softcap", "gradient-jsd-softcap-bf16"),
    "GRPO, sketch": ("sweep-None-plain", "sketch-None"),
    "rkl, sketch": ("sweep-rkl-plain", "sketch-rkl"),
    "fkl, sketch": ("sweep-fkl", "sketch-fkl"),
    "jsd, sketch": ("sweep-jsd", "jsd-jsd", "sketch-jsd"),
    "GRPO, sketch, softcap": ("sweep-None-softcap-plain", "sketch-None-softcap"),
}


def markdown(table: dict[str, Loop], caption: str) -> str:
    """Write both tables: of kernels, and of operations."""
    lines = [
        caption,
        "",
        f"Predicted, not measured: [{ROWS:,}, {COLUMNS:,}] float32 logits on an H200.",
        "",
        "| kernel | bytes | instructions | half rate | MUFU | ms by bytes | by instructions "
        "| by half rate | by MUFU | binds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.values():
        ms = row.times_ms()
        times = " | ".join(f"{ms[key]:.2f}" for key in ("bytes", *LANES))
        lines.append(
            f"| {row.kernel} | {row.bytes} | {row.instructions:.1f} | {row.half_rate:.1f} "
            f"| {row.mufu:.2f} | {times} | {row.binds} |"
        )
    lines += [
        "",
        "| operation | kernels | ms by bytes | predicted ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, kernels in OPERATIONS.items():
        rows = [table[kernel] for kernel in kernels]
        least = sum(row.times_ms()["bytes"] for row in rows)
        total = sum(row.ms for row in rows)
        lines.append(
            f"| {name} | {', '.join(kernels)} | {least:.2f} | {total:.2f} | {total / least:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile, save instructions.json and instructions.md, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for instructions.*")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = loops()
    info: dict[str, Any] = machine_info()
    text = json.dumps({"machine": info, "loops": [asdict(row) for row in rows]}, indent=1)
    (out / "instructions.json").write_text(text, "utf-8")
    table = markdown({row.kernel: row for row in rows}, one_line(info)) + "\n"
    (out / "instructions.md").write_text(table, "utf-8")
    print(table)


if __name__ == "__main__":
    main()
