"""Predicts the time of the sketch on a GPU: python -m bench.measures.predict

chunk_plan's bytes and FLOP at the reference shape, at rates that large GEMMs and copies reached on
an H200: 0.8 and 0.9 of the peaks, as `kdrl_train plan` has them. Entries a row and their noise are
those of each profile at the shape's vocabulary, from a few rows on this machine; they do not depend
on the hidden size, which is small here.
"""

import argparse
from dataclasses import replace

import torch

import kdrl_kernels as kk
from bench.inputs import SPREADS, make_inputs
from bench.machine import set_up_cpu
from bench.measures.sketch import GRADIENTS, OPS, gradients, sketch_metrics
from bench.ops import Op
from bench.shapes import REFERENCE
from kdrl_kernels.sketch import COLUMNS_PER_ENTRY

SAMPLE = replace(REFERENCE, name="sample", N=256, H=128, H_t=128, dtype=torch.float32)
TFLOPS, TERABYTES_PER_S = 790.0, 4.3
AS_ON_A_GPU = COLUMNS_PER_ENTRY["cpu"] / COLUMNS_PER_ENTRY["cuda"]
"""What a row's limit of entries is multiplied with here, so that rows are flat as on a GPU."""
COLUMNS = (
    *("operation", "gradient", "profile", "entries a row", "flat rows", "noise of dX"),
    *("GEMMs ms", "row kernels ms", "products ms", "sum ms"),
)


def line(
    op: Op, tflops: float, terabytes_per_s: float, texts: list[str], entries: float, flat: float
) -> str:
    """Write the line of a gradient; entries 0: the exact one."""
    shape = REFERENCE
    plan = kk.chunk_plan(
        shape.N,
        shape.H,
        shape.V,
        teacher=(shape.H_t, shape.V_t) if op.kd else None,
        kd=op.kd,
        dtype=shape.dtype,
        backward="sketch" if entries else "exact",
        row_entries=entries,
        flat=flat,
    )
    gemms = plan.gemm_ms(tflops)
    products = plan.product_bytes / terabytes_per_s / 1e9
    row_kernels = plan.row_work_ms(terabytes_per_s) - products
    times = (gemms, row_kernels, products, gemms + row_kernels + products)
    return " | ".join(["", op.name, *texts, *(f"{ms:.1f}" for ms in times), ""]).strip()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tflops", type=float, default=TFLOPS)
    parser.add_argument("--terabytes-per-s", type=float, default=TERABYTES_PER_S)
    args = parser.parse_args()
    set_up_cpu()
    rates = args.tflops, args.terabytes_per_s
    ops = [op for op in OPS if op.policy]
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for op in ops:
        print(line(op, *rates, ["exact", "", "", "", ""], 0, 0))
    for profile in SPREADS:
        inputs = make_inputs(SAMPLE, profile)
        for op in ops:
            for name, cpu_sketch in GRADIENTS.items():
                if cpu_sketch is None:
                    continue
                sketch = replace(cpu_sketch, flat=cpu_sketch.flat * AS_ON_A_GPU)
                known = sketch_metrics(inputs, op, gradients(inputs, op, sketch), sketch)
                entries, flat = known["entries"], known["flat_rows"]
                texts = [name, profile, f"{entries:.0f}"]
                texts += [f"{flat:.0%}", f"{known['predicted']:.1e}"]
                print(line(op, *rates, texts, entries, flat), flush=True)


if __name__ == "__main__":
    main()
