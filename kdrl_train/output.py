"""What is on the screen: output that survives its reader, and what a command is doing now.

stdout is for results, stderr for progress. On a terminal progress is one line that changes, which
makes way for anything else that is written; elsewhere it is a line now and then.
"""

import errno
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

EVERY_S = 30.0
"""Seconds without any output after which a line of progress is printed into a pipe or a file."""
REDRAW_S = 0.2
"""Seconds between two drawings of the line on a terminal."""
FIRST_S = 0.5
"""Seconds after which the first line comes at the latest."""
LONG_S = 10.0
"""Seconds from which on a stage says how long it has been going on."""
ERASE = "\r\x1b[K"
_LOCK = threading.RLock()
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
CONTROL = re.compile(_CONTROL)
"""Characters that command a terminal in place of being shown: controls but tab and newline, marks
of direction, separators of lines, and halves of characters, which no stream takes."""
_PLAIN = rf"(?!\A\r)(?!\r\n?\Z){_CONTROL}"
PLAIN = re.compile(_PLAIN)
"""The same, but for a return at either end of a text, by which a bar of progress is drawn again."""
STYLED = re.compile(rf"(?!\x1b\[[0-9;]*m){_PLAIN}")
"""The same, but for colours and the like."""

SECRET = re.compile(
    r"""(://)[^\s/@]+(?=@)|([?&;]\w{0,20}(?:token|key|secret|password)\w{0,20}=)[^&\s"'<]+""",
    re.IGNORECASE,
)
"""A user with a password, and a key in a query: what must not be read by others in an address."""


def escape(text: str, characters: re.Pattern[str] = CONTROL) -> str:
    """Write control characters as JSON does, ESC as \\u001b; all other text stays."""
    return characters.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def presentable(text: str, characters: re.Pattern[str] = CONTROL) -> str:
    """Escape a text for people, and put *** in place of passwords and keys in its addresses."""
    return escape(SECRET.sub(r"\1\2***", text), characters)


class Guarded:
    """A text stream that escapes control characters, hides passwords, and drops what is written
    once nobody can read it any more.

    Colours and the like pass to a terminal. Everything else is as in the stream. An error of a
    file, such as a full disk, is raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        colours = {"FORCE_COLOR", "TTY_COMPATIBLE"} & set(os.environ)  # rich reads these, too
        self.controls = STYLED if colours or stream.isatty() else PLAIN
        self.lost: OSError | None = None
        """The error of the write that found no reader; None: there is a reader."""

    def write(self, text: str) -> int:
        with _LOCK:
            if _shown is not None:
                _shown.make_way(text)
            self.put(presentable(text, self.controls))
        return len(text)

    def put(self, text: str) -> None:
        """Write, and leave the progress on the screen as it is."""
        self._try(lambda: self.stream.write(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, call: Callable[[], object]) -> None:
        """Call a method of the stream, unless its reader is gone."""
        if self.lost is not None:
            return
        try:
            call()
        except OSError as error:
            if not _no_reader(error, self.stream):
                raise
            self.lost = error
            _discard(self.stream)


def _no_reader(error: OSError, stream: TextIO) -> bool:
    """Say whether a write failed because the other end of a pipe, socket or terminal is gone."""
    if error.errno in (errno.EPIPE, errno.ECONNRESET):
        return True
    if error.errno not in (errno.EIO, errno.ENXIO):  # a terminal that is gone, or a broken disk
        return False
    return not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)


def _discard(stream: TextIO) -> None:
    """Lead stdout or stderr to nowhere, also for libraries that write to its descriptor, for
    processes that are started later, and for what the stream still holds when Python ends."""
    descriptor = stream.fileno()
    if descriptor in (1, 2):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def guard(stream: Any) -> Any:
    """Return a stream, guarded; None, which Python has for a closed one, stays None."""
    return stream if stream is None or isinstance(stream, Guarded) else Guarded(stream)


def fill_descriptors() -> None:
    """Lead each of the descriptors 0, 1 and 2 that is closed (`2>&-`) to nowhere.

    Otherwise the next file that is opened gets its number, and what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


@dataclass(frozen=True)
class _Escaped:
    """What a console prints, with the control characters of its texts escaped, and its styles."""

    content: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.content, options):
            yield Segment(text if control else presentable(text), style, control)


class _Escape(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(content) for content in renderables]


def guarded_console(console: Console | None = None, *, stderr: bool = False) -> Console:
    """Return a console whose file is guarded, and which escapes control characters.

    None: one on stdout, or stderr. It shows square brackets, numbers and :names: as they are.
    """
    before = None if console is None else console.file
    if console is None:
        console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not isinstance(before, Guarded):  # a new one, or with a file of the caller's
        console.file = guard(console.file)
        console.push_render_hook(_Escape())
    return console


@contextmanager
def guarded() -> Iterator[None]:
    """Guard stdout and stderr within the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(guard, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Guarded):
                stream.flush()  # here, as Python would complain at its end
        sys.stdout, sys.stderr = before


def loss(*streams: Any) -> OSError | None:
    """Return the error that ended a stream's readers: of these, of stdout or of stderr."""
    lost = (getattr(stream, "lost", None) for stream in (*streams, sys.stdout, sys.stderr))
    return next((error for error in lost if error is not None), None)


class Progress:
    """Shows on stderr what a command is doing.

    Args:
        stream: a guarded stream.
        terminal: whether to keep one line that changes, or to print a line every EVERY_S seconds in
            which nothing else was written.
        clock: seconds that only grow.
    """

    def __init__(
        self, stream: Guarded, terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream, self.terminal, self.clock = stream, terminal, clock
        self.heading = self.stage = self.counts = ""
        self.since = clock()
        """When the stage began."""
        self._written = self.since - EVERY_S + FIRST_S
        self._drawn = ""
        self._at_line_start = True

    def line(self) -> str:
        """Say what is being done, and since when where that is long."""
        seconds = self.clock() - self.since
        parts = [f"{self.stage} {self.counts}".rstrip()]
        parts += [hours(seconds)] if seconds >= LONG_S else []
        return presentable((f"{self.heading}: " if self.heading else "") + ", ".join(parts))

    def begin(self, stage: str, at_once: bool) -> None:
        """Begin a stage; at_once: elsewhere than on a terminal, too, it gets its line."""
        self.stage, self.counts, self.since = stage, "", self.clock()
        self.update(at_once)

    def update(self, at_once: bool = False) -> None:
        """Write the line, if it is time."""
        if not self.stage:
            return
        now, line = self.clock(), self.line()
        due = now - self._written >= (REDRAW_S if self.terminal else EVERY_S)
        if self.terminal:
            line = line[: _columns(self.stream) - 1]
            if self._at_line_start and line != self._drawn and (at_once or not self._drawn or due):
                self.stream.put(ERASE + line)
                self._drawn, self._written = line, now
        elif due or (at_once and line != self._drawn):
            self.stream.put(line + "\n")
            self._drawn, self._written = line, now
        self.stream.flush()

    def make_way(self, text: str = "") -> None:
        """Take the line off the screen, for a text that is written next, or for good."""
        if self._drawn and self.terminal:
            self.stream.put(ERASE)
            self.stream.flush()
        self._drawn, self._written = "", self.clock()
        if text:
            self._at_line_start = text.endswith(("\n", "\r"))


_shown: Progress | None = None


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Guard stdout and stderr within the block, and show progress on stderr.

    On other ranks than rank 0, and where stderr is closed, nothing is shown.

    name: the command, which stands before each stage until `heading` is called.
    """
    global _shown  # noqa: PLW0603  a process has one screen
    with guarded():
        if os.environ.get("RANK", "0") != "0" or _shown is not None or sys.stderr is None:
            yield
            return
        stream: Any = sys.stderr
        terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        progress = Progress(stream, terminal)
        progress.heading = name
        ended = threading.Event()

        def keep_up() -> None:
            while not ended.wait(FIRST_S / 2):
                with _LOCK:
                    if not ended.is_set():
                        progress.update()

        _shown = progress
        thread = threading.Thread(target=keep_up, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            with _LOCK:
                progress.make_way()
                _shown = None


class Place:
    """Says where this process is, whether or not a screen shows it."""

    heading = stage = ""
    moves = 0


def move() -> None:
    """Count that the process goes on: a token, a verdict or a micro-batch is done."""
    Place.moves += 1


def moves() -> int:
    """Return how often the process has moved."""
    return Place.moves


def place() -> str:
    """Say where the process is: the step and the stage."""
    return ": ".join(filter(None, (Place.heading or "start", Place.stage)))


def heading(text: str) -> None:
    """Set what stands before each stage, such as the step; nothing is shown where no screen is."""
    Place.heading = text
    move()
    with _LOCK:
        if _shown is not None:
            _shown.heading = text


def begin(stage: str, at_once: bool = False) -> None:
    """Say what is done from now on; nothing is shown of a stage without a name.

    at_once: write its line also into a pipe or a file, for what happens once in a run.
    """
    Place.stage = stage
    move()
    with _LOCK:
        if _shown is not None:
            _shown.begin(stage, at_once)


def count(stage: str, done: int, total: int | None, more: str = "") -> None:
    """Say how much of a stage is done; nothing happens while another one is shown.

    total: None where it is not known.
    """
    move()
    with _LOCK:
        if _shown is not None and _shown.stage == stage:
            _shown.counts = f"{done:,}" + ("" if total is None else f" of {total:,}") + more
            if _shown.terminal:
                _shown.update()


def meter(
    stage: str, total: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Return a function that shows completions that are done, of `total`, and tokens a second.

    It takes the completions that are done and the tokens that are drawn since this call.
    """
    start = clock()

    def report(done: int, tokens: int) -> None:
        rate = tokens / max(clock() - start, 1e-3)
        count(stage, done, total, f", {rate:,.0f} tokens/s" if tokens else "")

    return report


def hours(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _columns(stream: Guarded) -> int:
    """Return the width of a terminal; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
