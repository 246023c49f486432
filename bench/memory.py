"""Memory of one operation beyond inputs, outputs and gradients, measured in a fresh process.

python -m bench.memory --op "KDRL exact" --shape cpu --workspace-bytes 134217728

prints one JSON object. On a CPU (Linux) it is growth of the resident set's high-water mark, which
is first set back to what is resident; on a GPU growth of the allocator's peak.
"""

import argparse
import json
from pathlib import Path

import torch

from bench.inputs import Inputs, make_inputs
from bench.machine import DEVICE, use_threads
from bench.ops import OPS_BY_NAME, Op, clear_gradients, ours
from bench.shapes import SHAPES, TINY


def extra_bytes(inputs: Inputs, op: Op, workspace_bytes: int) -> int:
    """Peak of one call minus what was there before, and minus the gradients it leaves."""
    clear_gradients(inputs, op)
    before = _reset_peak()
    outputs = ours(inputs, op, workspace_bytes)
    grown = _peak() - before
    made = [*outputs.values(), *(getattr(inputs, name).grad for name in op.gradients)]
    return grown - sum(tensor.nbytes for tensor in made)


def _reset_peak() -> int:
    """Make the peak what is in use now, and return it in bytes."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # not getrusage: its maximum counts the parent's, from before the exec
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024


def main() -> None:
    """Measure one operation and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=OPS_BY_NAME, required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--workspace-bytes", type=int, required=True)
    args = parser.parse_args()
    use_threads()
    op = OPS_BY_NAME[args.op]
    extra_bytes(make_inputs(TINY), op, 1 << 20)  # libraries load and compile here
    inputs = make_inputs(SHAPES[args.shape])
    found = extra_bytes(inputs, op, args.workspace_bytes)
    print(json.dumps({"extra_bytes": found, "workspace_bytes": args.workspace_bytes}))


if __name__ == "__main__":
    main()
