"""Measures GEMM variants, where they exist: python -m bench.gemms --out DIR [--seconds 60]

The three GEMMs of a chunk of C rows, z = X · Wᵀ, dX = dz · W and dW (+)= dzᵀ · X, with 16-bit and
float32 results, for C from 1,024 to 16,384 on a GPU; and a large copy. A variant that this PyTorch
refuses stands in the table with its error, one that runs with its error against float64 on a
corner. DIR/gemms.json and gemms.md are written again after every C, so that a stop loses one C.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import DEVICE, clock, machine_info, one_line, set_up_cpu

GPU_SIZES = (3584, 152064, (1024, 2048, 4096, 8192, 16384))
CPU_SIZES = (256, 8192, (64, 128, 256, 512))
"""H, V, every C."""
COPY_BYTES = 1 << (32 if DEVICE == "cuda" else 26)
FILL = 64.0
"""Value of out before its first call: as large as the products, so that a lost beta shows."""
CORNER = 16
"""Rows and columns of a result that are computed again in float64."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant is one way to compute out = beta · out + a · b."""

    gemm: str
    call: str
    """The call, as one would write it."""
    result: torch.dtype
    beta: int
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(a, b, out) -> the result, out where it is written there."""


def variants(dtype: torch.dtype) -> Iterator[Variant]:
    """Yield all variants for operands of this dtype."""
    wide = torch.float32

    def into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return torch.mm(a, b, out=out)

    def wide_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=wide, out=out)

    for gemm in ("project", "dX", "dW"):
        yield Variant(gemm, "mm(out=)", dtype, 0, into)
        yield Variant(gemm, "mm(out_dtype=float32, out=)", wide, 0, wide_into)
    yield Variant("dW", "out.addmm_", dtype, 1, lambda a, b, out: out.addmm_(a, b))
    yield Variant(
        "dW",
        "addmm(out_dtype=float32, out=)",
        wide,
        1,
        lambda a, b, out: torch.addmm(out, a, b, out_dtype=wide, out=out),
    )
    yield Variant(
        "dW",
        "addmm(out_dtype=float32), new result",
        wide,
        1,
        lambda a, b, out: torch.addmm(out, a, b, out_dtype=wide),
    )
    yield Variant(
        "dW",
        "baddbmm(out_dtype=float32, out=)",
        wide,
        1,
        lambda a, b, out: torch.baddbmm(out[None], a[None], b[None], out_dtype=wide, out=out[None])[
            0
        ],
    )
    yield Variant(
        "dW",
        "out += mm(out_dtype=float32)",
        wide,
        1,
        lambda a, b, out: out.add_(torch.mm(a, b, out_dtype=wide)),
    )


def describe(variant: Variant) -> dict[str, Any]:
    """Describe the variant in words."""
    return {
        "gemm": variant.gemm,
        "call": variant.call,
        "result": str(variant.result).removeprefix("torch."),
        "beta": variant.beta,
    }


def measure(variant: Variant, a: Tensor, b: Tensor, out: Tensor) -> dict[str, Any]:
    """Measure median ms, rate and error of one variant, or say why it does not run."""
    M, K, N = *a.shape, b.shape[1]
    row = describe(variant)
    try:
        out.fill_(FILL)
        corner = variant.run(a, b, out)[:CORNER, :CORNER].double()
        exact = a[:CORNER].double() @ b[:, :CORNER].double() + variant.beta * FILL
        row["error"] = ((corner - exact).abs().max() / exact.abs().max()).item()
        row["ms"] = median_ms(lambda: variant.run(a, b, out))
        row["tflop_per_s"] = 2 * M * K * N / (row["ms"] * 1e9)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # the experiment's other result
        row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return row


def median_ms(call: Callable[[], object], repeats: int = 11) -> float:
    """Return the median of several calls, each timed alone, after two that warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(1e3 * (clock() - start))
    return statistics.median(times)


def copy_row() -> dict[str, Any]:
    """Measure a large copy on the device, reads and writes counted."""
    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    return {"bytes": COPY_BYTES, "ms": ms, "tb_per_s": 2 * COPY_BYTES / (ms * 1e9)}


def gemm_rows(H: int, V: int, C: int, dtype: torch.dtype, deadline: float) -> list[dict[str, Any]]:
    """Measure all variants for chunks of C rows; after the deadline (s) they count as not run."""
    hidden = torch.randn(C, H, device=DEVICE).to(dtype)
    weight = (torch.randn(V, H, device=DEVICE) / H**0.5).to(dtype)
    dz = (V * torch.softmax(hidden @ weight.T, dim=1, dtype=torch.float32)).to(dtype)
    operands = {"project": (hidden, weight.T), "dX": (dz, weight), "dW": (dz.T, hidden)}
    rows = []
    for variant in variants(dtype):
        a, b = operands[variant.gemm]
        if time.monotonic() > deadline:
            row = describe(variant) | {"refused": "not run: out of time"}
        else:
            out = torch.empty(a.shape[0], b.shape[1], dtype=variant.result, device=DEVICE)
            row = measure(variant, a, b, out)
        rows.append({"C": C} | row)
    return rows


def table(report: dict[str, Any]) -> str:
    """Write the markdown table, a row a variant and a column a C, then what was refused."""
    sizes = sorted({row["C"] for row in report["gemms"]})
    cases: dict[tuple[str, ...], dict[int, str]] = {}
    worst: dict[tuple[str, ...], float] = {}
    refused: dict[str, None] = {}
    for row in report["gemms"]:
        key = (row["gemm"], row["call"], row.get("result", ""), str(row.get("beta", "")))
        cell = f"{row['tflop_per_s']:.3g} ({row['ms']:.3g})" if "ms" in row else "refused"
        cases.setdefault(key, {})[row["C"]] = cell
        if "refused" in row:
            refused[f"- {row['gemm']} {row['call']}: {row['refused'][:160]}"] = None
        else:
            worst[key] = max(worst.get(key, 0.0), row["error"])
    heads = ["GEMM", "call", "result", "beta", *(f"C = {C}" for C in sizes), "error"]
    lines = [heads, ["---"] * len(heads)]
    lines += [
        [*key, *(cells.get(C, "") for C in sizes), f"{worst[key]:.0e}" if key in worst else ""]
        for key, cells in cases.items()
    ]
    copy = report["copy"]
    title = f"H = {report['H']}, V = {report['V']}, operands {report['dtype']}: TFLOP/s (ms)"
    footer = f"copy of {copy['bytes'] / 1e9:.2g} GB: {copy['tb_per_s']:.3g} TB/s"
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([one_line(report["machine"]), title, "", *body, "", footer, *refused])


def run(path: Path, deadline: float) -> dict[str, Any]:
    """Measure every C until the deadline (s) and write the report to path after each."""
    set_up_cpu()
    torch.manual_seed(0)
    H, V, sizes = GPU_SIZES if DEVICE == "cuda" else CPU_SIZES
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    report: dict[str, Any] = {
        "machine": machine_info(),
        "H": H,
        "V": V,
        "dtype": str(dtype).removeprefix("torch."),
        "copy": copy_row(),
        "gemms": [],
    }
    for C in sizes:
        report["gemms"] += gemm_rows(H, V, C, dtype, deadline)
        path.write_text(json.dumps(report, indent=1))
        path.with_suffix(".md").write_text(table(report) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Measure, write DIR/gemms.json, print the table; or print that of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for gemms.json")
    what.add_argument("--show", type=Path, help="a gemms.json, measured before")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    print(table(run(args.out / "gemms.json", time.monotonic() + args.seconds)))


if __name__ == "__main__":
    main()
