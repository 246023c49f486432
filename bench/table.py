"""pytest-benchmark JSON -> one markdown table. python -m bench.table speed.json memory.json"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.machine import one_line

COLUMNS = (
    "op",
    "ours ms (quartiles)",
    "floor ms (quartiles)",
    "ratio",
    "bar",
    "plain ms",
    "TFLOP/s",
    "extra MB (asked for)",
    "error lp",
    "dX",
    "dW",
)
ERRORS = ("logprobs", "dhidden", "dweight")


def table(reports: list[dict[str, Any]]) -> str:
    """One row an operation and shape, of all reports together; a later one wins."""
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        for case in report["benchmarks"]:
            info = case["extra_info"]
            if "op" not in info:
                continue  # stopped in the middle, or wrong: no figure
            cases.setdefault((info["shape"], info["op"]), {}).update(info)
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    captions = dict.fromkeys(_caption(info) for info in cases.values())
    lines += [_line(_cells(info)) for info in cases.values()]
    machines = dict.fromkeys(one_line(report["machine_info"]["kdrl"]) for report in reports)
    return "\n".join([*machines, *captions, "", *lines])


def _caption(info: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} = {info[name]}" for name in ("N", "H", "V", "H_t", "V_t"))
    return f"shape {info['shape']}: {sizes}, {info['dtype'].removeprefix('torch.')}"


def _cells(info: dict[str, Any]) -> list[str]:
    errors = info.get("errors") or {}
    rate, bar, naive = (info.get(name) for name in ("tflop_per_s", "bar", "naive_ms"))
    return [
        info["op"],
        _spread(info.get("ours_ms")),
        _spread(info.get("floor_ms")),
        f"{info['ratio'][1]:.2f}" if "ratio" in info else "",
        f"{bar:.2f}" if bar else "",
        f"{naive[1]:.0f}" if naive else "",
        f"{rate:.3g}" if rate else "",
        _memory(info),
        *(f"{errors[name]:.1e}" if name in errors else "" for name in ERRORS),
    ]


def _spread(quartiles: list[float] | None) -> str:
    """Median and quartiles in ms, to four digits."""
    if quartiles is None:
        return ""
    low, median, high = (f"{value:.4g}" for value in quartiles)
    return f"{median} ({low}-{high})"


def _memory(info: dict[str, Any]) -> str:
    if "extra_bytes" not in info:
        return ""
    extra, asked = (round(info[name] / 1e6) for name in ("extra_bytes", "workspace_bytes"))
    return f"{extra} ({asked})"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    print(table([json.loads(path.read_text()) for path in parser.parse_args().reports]))
