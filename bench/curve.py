"""Trains the demo's task with GRPO and a teacher: python -m bench.curve --out DIR

A teacher and a student are trained on worked solutions, as `kdrl_train demo` does; then the student
with the preset `kdrl` and the exact KL, on the GPU where there is one. DIR/curve.md and curve.png
show reward, KL and tokens per second by step. curve.md is written anew every few seconds, so that a
run which is stopped leaves a curve. The models are the demo's, which learn in these steps: with so
few numbers a GPU waits for its launches, so that tokens per second are those of the loop.
"""

import argparse
import importlib.util
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import machine_info, one_line
from kdrl_train import train
from kdrl_train.config import TrainConfig
from kdrl_train.tools import demo, sft

GPU = demo.DemoConfig(prompts_per_step=64, group_size=16)
TINY = demo.DemoConfig(
    problems=64,
    held_out=4,
    teacher_steps=4,
    student_steps=4,
    sft_batch_tokens=256,
    steps=3,
    prompts_per_step=2,
    group_size=4,
    max_new_tokens=8,
)
MICRO_BATCH_TOKENS = 16384
RECORDS = 9
"""Rows of the table at most, each the mean of as many steps."""
EVERY_S = 3.0
"""Seconds between two tables."""
COLUMNS = {"reward": ".3f", "accuracy": ".1%", "kl_teacher": ".4f", "tokens_per_s": ",.0f"}
STAGES = ("rollout", "verify", "teacher", "score", "update", "sync")
Records = list[dict[str, Any]]


def run_config(config: demo.DemoConfig, out: Path) -> TrainConfig:
    """Configure the demo's run on this machine's device, in large micro-batches."""
    run = demo.train_config(config, out)
    return replace(
        run,
        model=replace(run.model, device="auto"),
        optim=replace(run.optim, micro_batch_tokens=MICRO_BATCH_TOKENS),
    )


def read(folder: Path) -> Records:
    """Read the records of a run that may go on: its last line may be a part of one."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def document(records: Records, seconds: dict[str, float]) -> str:
    """Write the machine, the means of each run of steps, and where the time of a step goes."""
    head = f"{one_line(machine_info())}\n\n"
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    if not records:
        return f"{head}No step is done. {spent}\n"
    names = " | ".join(name.replace("_per_s", "/s") for name in COLUMNS)
    lines = [f"| steps | {names} |", "|---" * (len(COLUMNS) + 1) + "|"]
    each = -(-len(records) // RECORDS)
    for start in range(0, len(records), each):
        part = records[start : start + each]
        cells = " | ".join(_mean(part, name, style) for name, style in COLUMNS.items())
        lines.append(f"| {part[0]['step']} to {part[-1]['step']} | {cells} |")
    later = records[1:] or records  # the first step compiles
    stages = [(name, _median(later, f"seconds_{name}")) for name in STAGES]
    shares = ", ".join(f"{name} {value:.2f} s" for name, value in stages if value is not None)
    peak = max(one["peak_memory_bytes"] or 0 for one in records) / 1e9
    rate = _median(later, "tokens_per_s") or 0.0
    lines += ["", f"Median of a step: {rate:,.0f} tokens/s, {_median(later, 'seconds'):.2f} s;"]
    lines += [f"{shares}. Peak memory {peak:.2f} GB. {spent}"]
    return head + "\n".join(lines) + "\n"


def _mean(records: Records, name: str, style: str) -> str:
    values = [one[name] for one in records if one.get(name) is not None]
    return format(statistics.mean(values), style) if values else ""


def _median(records: Records, name: str) -> float | None:
    values = [one[name] for one in records if one.get(name) is not None]
    return statistics.median(values) if values else None


@contextmanager
def kept_up(folder: Path, seconds: dict[str, float]) -> Iterator[None]:
    """Write curve.md every EVERY_S within the block, and after it."""
    ended = threading.Event()

    def write() -> None:
        (folder / "curve.md").write_text(document(read(folder), seconds), encoding="utf-8")

    def keep() -> None:
        while not ended.wait(EVERY_S):
            write()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()


def plot(records: Records, path: Path) -> None:
    """Draw reward and KL by step, and tokens per second."""
    import matplotlib as mpl  # noqa: PLC0415  not everywhere

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    steps = [one["step"] for one in records]
    names = ("reward", "kl_teacher", "tokens_per_s")
    figure, panels = pyplot.subplots(1, len(names), figsize=(12, 3.5), layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        panel.plot(steps, [one.get(name) for one in records])
        panel.set(xlabel="step", title=name.replace("_per_s", " / s"))
        panel.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(typed: Sequence[str] | None = None) -> None:
    """Train both models and the run; write the curve whenever it ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.curve", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--tiny", action="store_true", help="in seconds, to see that it works")
    args = parser.parse_args(typed)
    config, out = (TINY if args.tiny else GPU), args.out
    out.mkdir(parents=True)
    console, seconds = Console(width=160), dict[str, float]()
    with kept_up(out, seconds):
        demo.write_task(config, out)
        for name in ("teacher", "student"):
            start = time.monotonic()
            sft.main(replace(demo.sft_config(config, out, name), device="auto"), console)
            seconds[name] = time.monotonic() - start
        train.main(run_config(config, out), console)
    records = read(out)
    if records and importlib.util.find_spec("matplotlib"):
        plot(records, out / "curve.png")
    print((out / "curve.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
