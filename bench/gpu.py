"""Runs what needs a GPU in one command, without a network: bash bench/gpu.sh OUT

Parts follow each other in the order of what they are worth, each in a process with a time limit of
its own. A part that reaches it is interrupted as by Ctrl-C, and killed if it goes on; what it wrote
until then counts. OUT/report.md, and the archive where one is named, are written anew after each
part. All parts end within --seconds; one that would get less than half of its limit is left out.

The training run, curve, comes last. Where it is left out, a second call with --parts curve has all
the time for it: wheels and machine come first whatever is named, and without a GPU nothing else
runs. --rehearse runs the same parts on a CPU with tiny sizes, to see that they work; --cut ends
each part early, to see that what is left is a report; --stretch 4 gives each four times as long, on
a slow machine or for figures of more rounds.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu_parts import ROOT, Part, parts

REPORT = "report.md"
SECONDS = 570
"""Of all parts together, unless --seconds says another number."""
AFTER_KILL = 5.0
"""Seconds to wait for a part that was killed."""
STARTUP = 14
"""Seconds that a scoreboard needs before it measures, and after."""
LINES, WIDTH = 16, 160
"""Most lines of a log that the report holds, and their length."""
RESULT = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) ")
COUNTS = re.compile(r"\d+ (passed|failed|skipped|error).* in \d")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part."""

    name: str
    status: str
    seconds: float = 0.0
    budget: float = 0.0


class Course:
    """The course of a run: parts, one after the other, and what is known of each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out.resolve()
        self.archive: Path | None = args.archive and args.archive.resolve()
        self.rehearse: bool = args.rehearse
        self.cut: float = args.cut
        self.start = time.monotonic()
        self.deadline = self.start + (args.seconds or SECONDS * args.stretch)
        wheels = sorted(str(path) for path in (ROOT / "wheels").glob("*.whl"))
        every = parts(wheels, self.rehearse)
        self.parts = [
            replace(part, budget=part.budget * args.stretch, most=part.most * args.stretch)
            for part in every
            if part.always or not args.parts or part.name in args.parts
        ]
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Run all parts. Raises: KeyboardInterrupt, after the report, where it is stopped."""
        self.out.mkdir(parents=True, exist_ok=True)
        planned = self.start  # when the part should begin
        for place, part in enumerate(self.parts):
            now = time.monotonic()
            budget = max(part.budget, min(part.most, part.budget + planned - now))
            planned += part.budget + part.grace
            left = self.deadline - now - part.grace
            if left < part.budget / 2:
                self.outcomes.append(Outcome(part.name, "left out: no time"))
                continue
            try:
                self.outcomes.append(self._run(part, min(budget, left)))
            except KeyboardInterrupt:
                self.outcomes.append(Outcome(part.name, "stopped with the run"))
                self._leave_out(place + 1, "stopped")
                raise
            finally:
                self.save()
            if part.stop and self.outcomes[-1].status == _failed(part.stop):
                self._leave_out(place + 1, part.why)
                break
        self.save()

    def _leave_out(self, place: int, why: str) -> None:
        """Say of all parts from a place on why they are left out."""
        self.outcomes += [Outcome(one.name, f"left out: {why}") for one in self.parts[place:]]

    def _run(self, part: Part, budget: float) -> Outcome:
        """Run one part until it ends, or for budget seconds, at most --cut of them."""
        values = {"{out}": str(self.out), "{minutes}": f"{(budget - STARTUP) / 60:.2f}"}
        command = [sys.executable]
        for word in (*part.command, *(part.rehearsal if self.rehearse else ())):
            command.append(word)
            for name, value in values.items():
                command[-1] = command[-1].replace(name, value)
        budget, start = min(budget, self.cut), time.monotonic()
        with (self.out / f"{part.name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it started can be killed with it
            )
            status = _end(process, budget, part.grace)
        return Outcome(part.name, status, time.monotonic() - start, budget)

    def _environment(self) -> dict[str, str]:
        variables = {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        return {**os.environ, **variables}

    def save(self) -> None:
        """Write the report, and everything into the archive."""
        (self.out / REPORT).write_text(self.report(), encoding="utf-8")
        if self.archive:
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            partial = self.archive.with_name(f".{self.archive.name}.partial")
            with tarfile.open(partial, "w:gz") as archive:
                archive.add(self.out, arcname=self.out.name, filter=_without_weights)
            partial.replace(self.archive)

    def report(self) -> str:
        """Return the tables of all parts, what failed, and the table of the parts last."""
        title = "Rehearsal on a CPU with tiny sizes: no figure here is of a GPU.\n\n"
        sections = [title if self.rehearse else "", *self._sections()]
        rows = ["| part | seconds | limit | status |", "|---|---|---|---|"]
        for one in self.outcomes:
            figures = f"{one.seconds:.0f} | {one.budget:.0f}" if one.budget else " | "
            counts = self._counts(one.name) if one.budget else ""
            rows.append(f"| {one.name} | {figures} | {one.status}{counts} |")
        return "".join(sections) + "\n".join(rows) + "\n"

    def _sections(self) -> Iterator[str]:
        for part in self.parts:
            for pattern in part.tables:
                for path in sorted(self.out.glob(pattern)):
                    yield f"{path.read_text('utf-8', 'replace').strip()}\n\n"
            lines = [line for line in self._log(part.name) if part.lines.search(line)]
            if lines:
                yield f"{part.name}:\n\n"
                yield f"    {len(lines) - LINES} more\n" if len(lines) > LINES else ""
                yield "".join(f"    {line[:WIDTH]}\n" for line in lines[-LINES:]) + "\n"

    def _counts(self, name: str) -> str:
        """Return the last line of a log that counts tests, else how many are named in it."""
        log = self._log(name)
        counts = [line.strip("= ") for line in log if COUNTS.search(line)]
        if not counts:
            results = Counter(match[1].lower() for line in log if (match := RESULT.search(line)))
            counts = [", ".join(f"{n} {result}" for result, n in results.items())]
        return f": {counts[-1]}" if counts[-1] else ""

    def _log(self, name: str) -> list[str]:
        path = self.out / f"{name}.log"
        return path.read_text("utf-8", "replace").splitlines() if path.exists() else []


def _end(process: "subprocess.Popen[bytes]", seconds: float, grace: float) -> str:
    """Wait for a part, stop it at its limit, and kill what it leaves; return its status."""
    try:
        code = process.wait(seconds)
        return _failed(code) if code else "ok"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            return "stopped at its limit"
        return "killed after its limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # what hangs in a driver does not die
            process.wait(AFTER_KILL)


def _failed(code: int) -> str:
    return f"failed with exit code {code}"


def _without_weights(file: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave models and checkpoints out of the archive."""
    heavy = (".safetensors", ".distcp", ".pt")
    return None if file.name.endswith(heavy) else file


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    lines = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="bash bench/gpu.sh", description=lines[0], epilog=lines[1], allow_abbrev=False
    )
    names = [part.name for part in parts((), rehearse=True)]
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of OUT, elsewhere, no weights")
    parser.add_argument("--parts", nargs="+", choices=names, help="default: all")
    parser.add_argument("--seconds", type=float, help=f"of all parts (default: {SECONDS})")
    parser.add_argument("--stretch", type=float, default=1.0, help="times all limits (default: 1)")
    parser.add_argument(
        "--cut", type=float, default=float("inf"), help="seconds of each part at most"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    return parser


def main() -> int:
    """Run all parts and print the report; return 1 if a part failed, 130 if stopped."""
    parser = arguments()
    args = parser.parse_args()
    if (args.out / REPORT).exists():
        parser.error(f"OUT must be a new folder, got {args.out}, which holds a {REPORT}")
    if args.archive and args.archive.resolve().is_relative_to(args.out.resolve()):
        parser.error(f"--archive must be a file outside OUT, got {args.archive}")
    course = Course(args)
    # started with & it ignores SIGINT, and so would its parts, which could then not be stopped
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    stopped = False
    try:
        course.run()
    except KeyboardInterrupt:
        stopped = True
    print(course.report())
    failed = any(one.status.startswith("failed") for one in course.outcomes)
    return 130 if stopped else int(failed)


if __name__ == "__main__":
    sys.exit(main())
