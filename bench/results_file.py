"""Writes and reads results.json, the file of a benchmark run.

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
                       {"max": max|result - exact| / max|exact|, "p999": its 99.9% quantile}}
              tried: [{"setting": ..., "ms": ...}], where there was a choice
              clock: readings of the device's clock (MHz), temperature (degrees C), power (W)
    memory    extra_bytes: peak beyond inputs, outputs and gradients; input_bytes, output_bytes,
              gradient_bytes
    scaling   axis: "N", "V" or "workspace", value, total_ms, extra_bytes (null: not measured,
              memory_status says why)
    step      model: {...}, step_ms, head_ms: forward and backward of everything, and of the head
    rows      bytes: read and written, total_ms, copy_ms: a copy that moves as many bytes

python -m bench.learning writes records of its own into the same file (learning/__main__.py).
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import machine_info
from bench.shapes import Shape

OURS = "kdrl-kernels"
SKETCH = "kdrl-kernels, sketch"
"""This library again, with a sketch of the gradient: another algorithm, and no peer."""
BOTH_OURS = (OURS, SKETCH)
NAME = "results.json"
OUT_OF_TIME = "out of time"
"""Status of a case that was not reached in time."""
Record = dict[str, Any]
Run = dict[str, Any]


def new_run(command: str) -> Run:
    """Return a run without records."""
    return {
        "machine": machine_info(),
        "command": command,
        "started": _now(),
        "finished": None,
        "failed": [],
        "records": [],
    }


def record(kind: str, op: str, shape: Shape, profile: str, provider: str, **more: Any) -> Record:
    """Make one record; its status is "ok" unless `more` holds another."""
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
    """Write folder/results.json; a stop leaves the new file or the old one, never a part."""
    run["finished"] = _now() if done else None
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{NAME}.partial"
    head = {name: value for name, value in run.items() if name != "records"}
    lines = ",\n".join(json.dumps(one) for one in run["records"])  # one a line, for a diff's sake
    partial.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "records": [\n{lines}\n]}}\n')
    os.replace(partial, folder / NAME)


def load(path: Path) -> Run:
    """Read a run from its folder, its file, or the JSON that `pytest bench/` wrote.

    Raises: ValueError where the file is none of these.
    """
    path = path / NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    if "benchmarks" in content and "kdrl" in content.get("machine_info", {}):
        records = [one for b in content["benchmarks"] for one in b["extra_info"].get("records", [])]
        return {
            "machine": content["machine_info"]["kdrl"],
            "command": "pytest bench/",
            "started": content["datetime"],
            "finished": content["datetime"],
            "records": records,
        }
    if not {"machine", "records"} <= content.keys():
        raise ValueError(f"{path} must be results.json of a benchmark run, got {sorted(content)}")
    return content


def merge(runs: list[Run]) -> Run:
    """Merge runs of one machine; the later record of a case wins, unless it ran out of time.

    Raises: ValueError where machines, threads or versions differ: such figures never share a table.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("device", "threads", "torch", "triton", "python"):
            theirs, ours = run["machine"][name], first["machine"][name]
            if theirs != ours:
                raise ValueError(f"runs must be of one machine, got {name} {ours} and {theirs}")
    cases: dict[tuple[Any, ...], Record] = {}
    for one in (one for run in runs for one in run["records"]):
        if case_of(one) not in cases or one["status"] != OUT_OF_TIME:
            cases[case_of(one)] = one
    return {**runs[-1], "records": list(cases.values())}


def case_of(one: Record) -> tuple[Any, ...]:
    """Return what identifies the case of a record: everything but its figures."""
    keys = ("kind", "op", "shape", "profile", "provider", "axis", "value")
    return tuple(one.get(key) for key in keys)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
