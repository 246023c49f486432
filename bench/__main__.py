"""Makes the whole scoreboard in one command: python -m bench --minutes 8 --out DIR

Needs no network. results.json is written anew after every record and short.md, one row an
operation, after every operation, so that a run which is stopped keeps what it has; then come the
tables, plots and the page of bench/report.py. The stages follow each other in the order of
--stages's choices: what comes first is what matters most. Operations and providers follow each
other as they are typed.
"""

import argparse
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default will change

from bench import providers, report
from bench.inputs import PROFILES, make_inputs
from bench.machine import DEVICE, set_up_cpu
from bench.measures import memory, rows, scaling, speed, step
from bench.measures.timing import failure, free_cache, share
from bench.ops import KEY_OPS, OPS, OPS_BY_NAME, Op
from bench.providers import Provider, Setting
from bench.results_file import BOTH_OURS, Record, new_run, save
from bench.shapes import CPU_RAGGED, MODELS, RAGGED, SHAPES, Shape, default_shape

STAGES = {"speed": 50, "rows": 2, "step": 6, "memory": 16, "scaling": 16, "shapes": 10}
"""{stage: its share of the time}, in order; time that a stage leaves goes to the next ones."""
SCALING_ROUNDS = 3
INPUT_SETS = 2
"""Sets of inputs that are used in turn."""


class Scoreboard:
    """The scoreboard of one run: what is measured, and until when."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.shape: Shape = SHAPES[args.shape]
        self.profile: str = args.profile
        self.ops = tuple(OPS_BY_NAME[name] for name in args.ops)
        self.stages = [stage for stage in STAGES if stage in args.stages]
        self.rounds: int = args.rounds
        self.contestants = providers.load()
        if args.providers:
            by_name = {one.name: one for one in self.contestants}
            self.contestants = [by_name[name] for name in args.providers]
        self.sampled: bool = args.truth == "sampled"
        self.start, self.seconds = time.monotonic(), 60 * args.minutes
        self.settings: dict[tuple[str, str], Setting] = {}
        self.failed: list[str] = []
        """Stages that an error ended, each with the error."""

    def records(self) -> Iterator[Record]:
        """Yield the records of all chosen stages, the most important first."""
        for stage in self.stages:
            free_cache()
            try:
                yield from getattr(self, f"_{stage}")(self._deadline(stage))
            except Exception as error:  # the next stage may well do better
                self.failed.append(f"{stage} {failure(error)}")

    def _deadline(self, stage: str) -> float:
        shares = [STAGES[one] for one in self.stages]
        spent = sum(shares[: self.stages.index(stage) + 1])
        return self.start + self.seconds * spent / sum(shares)

    def _speed(self, deadline: float) -> Iterator[Record]:
        for one in self._timed([(self.shape, self.profile)], self.ops, deadline):
            self.settings[one["op"], one["provider"]] = one["setting"]
            yield one

    def _timed(
        self, places: Sequence[tuple[Shape, str]], ops: Sequence[Op], deadline: float
    ) -> Iterator[Record]:
        """Time every operation at every shape and profile, each with its share of the time."""
        parts = len(places) * len(ops)
        for index, (shape, profile) in enumerate(places):
            teachers = max(op.teachers for op in ops)
            inputs = [
                make_inputs(shape, profile, seed=seed, teachers=teachers)
                for seed in range(INPUT_SETS)
            ]
            for part, op in enumerate(ops, index * len(ops)):
                # the first counts as two: libraries are loaded and much is compiled in it
                until = share(deadline, part, parts if part else (parts + 1) / 2)
                yield from speed.records(
                    op, inputs, self.contestants, self.rounds, until, self.sampled
                )
                free_cache()

    def _memory(self, deadline: float) -> Iterator[Record]:
        """Measure memory, on a GPU in this process: its allocator counts what is asked of it."""
        chosen = memory.OPS if self.ops == OPS else self.ops
        ops = [one for one in chosen if one in memory.OPS]
        inputs = None
        if DEVICE == "cuda" and ops:
            teachers = max(op.teachers for op in ops)
            inputs = make_inputs(self.shape, self.profile, teachers=teachers)
        for op in ops:
            pairs = [(one, self._setting(op, one)) for one in self.contestants]
            yield from memory.records(op, self.shape, self.profile, pairs, deadline, inputs)

    def _setting(self, op: Op, provider: Provider) -> Setting:
        """Return the setting that the provider was timed with."""
        return self.settings.get((op.name, provider.name)) or provider.settings[0]

    def _rows(self, deadline: float) -> Iterator[Record]:
        yield from rows.records(make_inputs(self.shape, self.profile), self.rounds, deadline)

    def _step(self, deadline: float) -> Iterator[Record]:
        yield from step.records(self.rounds, deadline)

    def _scaling(self, deadline: float) -> Iterator[Record]:
        yield from scaling.records(SCALING_ROUNDS, deadline, memory.in_own_process)

    def _shapes(self, deadline: float) -> Iterator[Record]:
        """Time the other entropy profile, sizes that are not round, and other models' heads."""
        other = next(name for name in PROFILES if name != self.profile)
        cases = [(self.shape, other), (RAGGED if DEVICE == "cuda" else CPU_RAGGED, self.profile)]
        if DEVICE == "cuda":
            cases += [(shape, self.profile) for shape in MODELS if not shape.same(self.shape)]
        yield from self._timed(cases, KEY_OPS, deadline)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    lines = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=lines[0], epilog=lines[1], allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json")
    parser.add_argument("--minutes", type=float, default=8, help="of all stages (default: 8)")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls each (default: 10)")
    parser.add_argument("--shape", choices=SHAPES, default=default_shape().name)
    parser.add_argument("--profile", choices=PROFILES, default="reasoning")
    parser.add_argument("--ops", nargs="+", choices=OPS_BY_NAME, default=[op.name for op in OPS])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    names = [one.name for one in providers.load()]
    parser.add_argument("--providers", nargs="+", choices=names, help="default: all")
    truth = "sampled" if DEVICE == "cuda" else "whole"
    help_ = f"float64 gradients that others are compared with, see bench/sample.py (here: {truth})"
    parser.add_argument("--truth", choices=("whole", "sampled"), default=truth, help=help_)
    return parser


def main() -> int:
    """Run, save, report; return 1 if this library is wrong or fails anywhere, 130 if stopped."""
    args = arguments().parse_args()
    set_up_cpu()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` too leaves a whole file
    run, stopped = new_run(_command(sys.argv[1:])), False
    scoreboard = Scoreboard(args)
    try:
        for one in scoreboard.records():
            before = run["records"][-1:]
            run["records"].append(one)
            save(run, args.out)
            _progress(one)
            if before and _place(before[0]) != _place(one):
                report.write_short(args.out)
    except KeyboardInterrupt:
        stopped = True
    run["failed"] = scoreboard.failed
    save(run, args.out, done=not stopped)
    print(report.write(args.out))
    wrong = [one for one in run["records"] if _is_wrong(one)]
    for one in wrong:
        print(f"{one['kind']} {one['op']}, {one['shape']}: {one['status']}", file=sys.stderr)
    for stage in scoreboard.failed:
        print(f"stage {stage}", file=sys.stderr)
    return 130 if stopped else int(bool(wrong or scoreboard.failed))


def _place(one: Record) -> tuple[str, str, str]:
    return one["kind"], one["op"], one["shape"]


def _command(typed: list[str]) -> str:
    """Return the command as typed, without the folder, which a published file should not name."""
    shown = ["--out=DIR" if one.startswith("--out=") else one for one in typed]
    if "--out" in shown:
        shown[shown.index("--out") + 1] = "DIR"
    return shlex.join(["python", "-m", "bench", *shown])


def _progress(one: Record) -> None:
    figure = one["status"]
    if figure == "ok" and "total_ms" in one:
        figure = f"{statistics.median(one['total_ms']):.4g} ms"
    elif figure == "ok" and "extra_bytes" in one:
        figure = f"{one['extra_bytes'] / 1e6:.4g} MB"
    value = f" {one['axis']} = {one['value']}" if "axis" in one else ""
    print(
        f"{one['kind']} {one['shape']}{value} | {one['op']} | {one['provider']}: {figure}",
        flush=True,
    )


def _is_wrong(one: Record) -> bool:
    return one["provider"] in BOTH_OURS and one["status"].startswith(("differs", "failed"))


if __name__ == "__main__":
    sys.exit(main())
