"""Watches the ranks of a run, so that one that is stuck is named and does not hold the others.

Each rank publishes where it is, and for how many seconds it has not moved, in the store that
torchrun keeps. It moves with each stage, token, verdict and micro-batch, so a rollout may take as
long as it likes. A rank that waits for others in a collective need not move.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from kdrl_train import output
from kdrl_train.settings import PositiveFloat, settings

BEATS = 20
"""How often a rank reports within its limit."""
LONGEST_BEAT_S = 15.0
GONE = "gone"
"""What a rank that is done writes in place of its report."""
GRACE_S = 1.0
"""Seconds in which the ranks say the verdict, and may finish a line they write."""
Note = Callable[..., object]
"""RunLog.event: takes the kind of an event, a message, and whether to print it (`say`)."""


@settings
class RanksConfig:
    """How long the ranks of a run wait for one that is stuck."""

    start_timeout_s: PositiveFloat = 7200.0
    """Seconds that one stage of the start may take: to load a model, or to start an engine. After
    them the rank that is stuck is named, and the run ends."""
    step_timeout_s: PositiveFloat = 3600.0
    """Seconds in which a rank must move during the steps. Each token, verdict and micro-batch is a
    move, so no rollout is too long; a save is one move, and so is a rollout of the engine
    `continuous`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Says what one rank does."""

    rank: int
    place: str
    still_s: float
    """Seconds since it moved."""
    waits: bool
    """Whether its main thread is in a collective, where it waits for other ranks."""
    beat: int = 0
    """Changes with each report."""
    silent_s: float = 0.0
    """Seconds since it reported, by the clock of this one."""

    def stuck(self, limit_s: float) -> bool:
        """Whether it has not moved for that long."""
        return self.still_s + self.silent_s >= limit_s


def behind(reports: Sequence[RankReport], limit_s: float) -> list[RankReport]:
    """Return the ranks that hold the others: none where each moves, or waits for one that does.

    Those whose process does not even report come first, then those that do not wait; where all wait
    for each other, it is all of them.
    """
    stuck = [report for report in reports if report.stuck(limit_s)]
    for choice in (
        [report for report in stuck if report.silent_s >= limit_s],
        [report for report in stuck if not report.waits],
    ):
        if choice:
            return choice
    return stuck if len(stuck) == len(reports) else []


class Watch:
    """Watches all ranks from this one, in two threads, until it is closed.

    Args:
        store: of torch.distributed, used by this object alone.
        config: gives the limits.
        folder: where a rank that is stuck writes its stack, and the checkpoints are.
    """

    def __init__(self, rank: int, size: int, store: Any, config: RanksConfig, folder: Path) -> None:
        self.rank, self.size, self.config, self.folder = rank, size, config, folder
        self.key, self.limit_s = "ranks.start_timeout_s", config.start_timeout_s
        self.note: Note = lambda *_, **__: None
        self._store = store
        self._ended = threading.Event()
        self._mine = RankReport(rank=rank, place="start", still_s=0.0, waits=False)
        self._theirs: dict[int, RankReport | None] = {}
        self.verdict = ""
        """Who holds the others, once that is certain on some rank: this process then ends."""
        works = (self._exchange, self._judge)
        self._threads = [threading.Thread(target=w, name="watch", daemon=True) for w in works]
        for thread in self._threads:
            thread.start()

    def begin_steps(self, note: Note) -> None:
        """Hold the ranks to the limit of steps from now on; `note` writes events, on rank 0."""
        self.note = note
        self.key, self.limit_s = "ranks.step_timeout_s", self.config.step_timeout_s

    def close(self) -> None:
        """Stop watching, and tell the others that this rank is done."""
        self._ended.set()
        self._threads[0].join(timeout=GRACE_S)

    @property
    def beat_s(self) -> float:
        """Seconds between two reports."""
        shortest = min(self.config.start_timeout_s, self.config.step_timeout_s)
        return min(shortest / BEATS, LONGEST_BEAT_S)

    def stack(self, rank: int) -> Path:
        """Return the file for the stack of a rank that is stuck."""
        return self.folder / f"stuck_rank_{rank}.txt"

    def _exchange(self) -> None:
        """Publish this rank's report and read those of the others, until the end.

        The store may be where a rank is stuck: then this thread is too, and all ranks are silent.
        """
        while not self._ended.wait(self.beat_s):
            with suppress(RuntimeError):  # no answer this time: it is tried again
                self._publish()
                self._read()
        with suppress(RuntimeError):  # the process with the store may have ended
            self._store.set(str(self.rank), GONE)

    def _publish(self) -> None:
        """Write this rank's report, and the verdict."""
        mine = self._mine
        text = json.dumps([mine.place, mine.still_s, mine.waits, mine.beat])
        self._store.set(str(self.rank), text)
        if self.verdict:
            self._store.set("verdict", self.verdict)
        elif self._store.check(["verdict"]):
            self.verdict = self._store.get("verdict").decode()

    def _read(self) -> None:
        """Read the reports of the other ranks that have written one."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        if len(self._theirs) < len(others):
            others = [rank for rank in others if self._store.check([str(rank)])]
        texts = self._store.multi_get([*map(str, others)]) if others else []
        for rank, text in zip(others, texts, strict=True):
            if text.decode() == GONE:
                self._theirs[rank] = None
                continue
            place, still_s, waits, beat = json.loads(text)
            self._theirs[rank] = RankReport(
                rank=rank, place=place, still_s=still_s, waits=waits, beat=beat
            )

    def _judge(self) -> None:
        """Say which rank holds the others, at half the limit and at the limit, then end."""
        moves, before, warned = -1, time.monotonic(), False
        silent = {
            rank: RankReport(rank=rank, place="start", still_s=0.0, waits=False)
            for rank in range(self.size)
        }
        while not self._ended.wait(self.beat_s):
            now = time.monotonic()
            passed = min(now - before, 2 * self.beat_s)  # not the time in which all were suspended
            before, mine = now, self._mine
            still_s = mine.still_s + passed if moves == output.moves() else 0.0
            moves = output.moves()
            self._mine = RankReport(
                rank=self.rank,
                place=output.place(),
                still_s=still_s,
                waits=in_collective(),
                beat=mine.beat + 1,
            )
            for rank, last in [*silent.items()]:
                news = self._theirs.get(rank, last) if rank != self.rank else self._mine
                if news is None:
                    del silent[rank]
                    continue
                quiet = last.silent_s + passed if news.beat == last.beat else 0.0
                silent[rank] = replace(news, silent_s=quiet)
            if self.verdict:
                self._end()
            if not behind([*silent.values()], self.limit_s / 2):
                warned = False
            elif not warned:
                warned = True
                self._warn(behind([*silent.values()], self.limit_s / 2))
            if held := behind([*silent.values()], self.limit_s):
                self.verdict = f"{self._describe(held)}. The run ends: {self._remedy()}"
                self._end()

    def _warn(self, held: list[RankReport]) -> None:
        """Write this rank's stack if it stands still, and note on rank 0 who is stuck."""
        if self._mine.stuck(self.limit_s / 2):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self.stack(self.rank).open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError as error:
                self.note("warning", f"{self.stack(self.rank)} cannot be written: {error}")
        message = f"{self._describe(held)}. The run ends after {self.limit_s:g} s"
        self._tell(lambda: self.note("warning", message))

    def _describe(self, held: Iterable[RankReport]) -> str:
        """Say of each rank that holds the others what must be, what it does, and where to look."""
        parts = []
        for one in held:
            at, where = "at", f"its stack is in {self.stack(one.rank)}"
            if one.silent_s >= self.limit_s / 2:
                at, where = "last seen at", "its process does not run, or the network is gone"
            elif one.waits:
                where = f"it waits for other ranks, {where}"
            seconds = one.still_s + one.silent_s
            parts.append(
                f"no move for {seconds:.0f} s from rank {one.rank}, {at} {one.place}: {where}"
            )
        return f"each rank must move within {self.key} = {self.limit_s:g} s, got " + "; ".join(
            parts
        )

    def _remedy(self) -> str:
        """Say what goes on from where."""
        newest = self.folder / "checkpoints" / "LATEST"
        if newest.exists():
            step = newest.read_text(encoding="utf-8").strip()
            return f"--resume goes on from {newest.with_name(step)}"
        return "nothing was saved yet"

    def _end(self) -> None:
        """Say the verdict and end this process, whose main thread may never come back."""

        def speak() -> None:
            self.note("failed", self.verdict, say=False)
            print(f"error: rank {self.rank}: {self.verdict}", file=sys.stderr, flush=True)

        self._tell(speak)
        time.sleep(GRACE_S + self.beat_s)  # the others read it; then their collectives break
        os._exit(1)

    def _tell(self, speak: Callable[[], object]) -> None:
        """Call a function that may wait for a lock of the main thread, a second at most."""
        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        thread.join(timeout=GRACE_S)


def in_collective() -> bool:
    """Whether the main thread is inside torch.distributed, beyond the writing of files."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    name = "/torch/_ops.py"
    while frame is not None and ("/torch/_ops.py" in name or "/torch/_library/" in name):
        name = frame.f_code.co_filename.replace(os.sep, "/")
        frame = frame.f_back
    return "/torch/distributed/" in name and "filesystem" not in name
