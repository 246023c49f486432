"""results.json: what a benchmark run leaves, and how it is read.

    {"machine": {...}, "command": ..., "started": ..., "finished": ... or null, "failed": [...],
     "records": [...]}

failed: stages that an error ended, and the error.

Every record has

    kind      "speed", "memory", "scaling", "step" or "rows"
    op        name of the operation (ops.py); for "rows" of the row kernel
    shape     name (shapes.py), and sizes {N, H, V, H_t, V_t}, dtype
    profile   of the entropy: "reasoning" or "flat" (inputs.py)
    provider  as in the tables; FLOORS are bare GEMMs. package, version (null: home-made)
    setting   named arguments used, {} by default
    status    "ok", or why there is no figure: "not installed", "not supported: ...",
              "differs: ...", "failed: ...", "out of time"

and where status is "ok", by kind (sample i of every provider of a case was taken in round i; the
order within a round is drawn for each, inputs rotate):

    speed     total_ms, forward_ms, backward_ms: [every sample] (FLOORS: total_ms alone)
              flop: of the algorithm's own GEMMs
              errors: {"logprobs" "entropy" "kl" "loss" "dhidden" "dweight":
                       {"max": max|found - exact| / max|exact|, "p999": its 99.9% quantile}}
              tried: [{"setting": ..., "ms": ...}], where there was a choice
              clock: readings of the device's clock (MHz), temperature (degrees C), power (W)
    memory    extra_bytes: peak beyond inputs, outputs and gradients; input_bytes, output_bytes,
              gradient_bytes
    scaling   axis: "N", "V" or "workspace", value, total_ms, extra_bytes (null: not measured,
              memory_status says why)
    step      model: {...}, step_ms, head_ms: forward and backward of everything, and of the head
    rows      bytes: read and written, total_ms, copy_ms: a copy that moves as many bytes
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import machine_info
from bench.shapes import Shape

OURS = "kdrl-kernels"
NAME = "results.json"
OUT_OF_TIME = "out of time"
"""Status of a case whose turn did not come."""
Record = dict[str, Any]
Run = dict[str, Any]


def new_run(command: str) -> Run:
    """A run that has no record yet."""
    return {
        "machine": machine_info(),
        "command": command,
        "started": _now(),
        "finished": None,
        "failed": [],
        "records": [],
    }


def record(kind: str, op: str, shape: Shape, profile: str, provider: str, **more: Any) -> Record:
    """One record; status is "ok" unless more says otherwise."""
    return {
        "kind": kind,
        "op": op,
        "shape": shape.name,
        "sizes": {name: getattr(shape, name) for name in ("N", "H", "V", "H_t", "V_t")},
        "dtype": str(shape.dtype).removeprefix("torch."),
        "profile": profile,
        "provider": provider,
        "status": "ok",
        **more,
    }


def save(run: Run, folder: Path, done: bool = False) -> None:
    """Write folder/results.json: all of it, or what was there before."""
    run["finished"] = _now() if done else None
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{NAME}.partial"
    head = {name: value for name, value in run.items() if name != "records"}
    lines = ",\n".join(json.dumps(one) for one in run["records"])  # one a line, for a diff's sake
    partial.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "records": [\n{lines}\n]}}\n')
    os.replace(partial, folder / NAME)


def load(path: Path) -> Run:
    """A run from its folder, its file, or the JSON that pytest-benchmark wrote of `pytest bench/`.

    Raises: ValueError where the file is none of these.
    """
    path = path / NAME if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    found = found if isinstance(found, dict) else {}
    if "benchmarks" in found and "kdrl" in found.get("machine_info", {}):
        records = [one for b in found["benchmarks"] for one in b["extra_info"].get("records", [])]
        return {
            "machine": found["machine_info"]["kdrl"],
            "command": "pytest bench/",
            "started": found["datetime"],
            "finished": found["datetime"],
            "records": records,
        }
    if not {"machine", "records"} <= found.keys():
        raise ValueError(f"{path} must be results.json of a benchmark run, got {sorted(found)}")
    return found


def merge(runs: list[Run]) -> Run:
    """Runs of one machine as one; of the same case a later one wins, if it was run.

    Raises: ValueError where machines, threads or versions differ: such figures never share a table.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("device", "threads", "torch", "triton", "python"):
            theirs, own = run["machine"][name], first["machine"][name]
            if theirs != own:
                raise ValueError(f"runs must be of one machine, got {name} {own} and {theirs}")
    cases: dict[tuple[Any, ...], Record] = {}
    for one in (one for run in runs for one in run["records"]):
        if case_of(one) not in cases or one["status"] != OUT_OF_TIME:
            cases[case_of(one)] = one
    return {**runs[-1], "records": list(cases.values())}


def case_of(one: Record) -> tuple[Any, ...]:
    """What makes a record another case: all but its figures."""
    keys = ("kind", "op", "shape", "profile", "provider", "axis", "value")
    return tuple(one.get(key) for key in keys)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
