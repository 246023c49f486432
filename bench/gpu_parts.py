"""Lists the parts of bench/gpu.sh in their order, each with its command and its limit.

The order is that of what they are worth. The limits leave room for the grace of each within the
time of a run, the training run apart, which comes last.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5
WORKERS_GRACE = 15
"""pytest waits 10 s for its workers before it writes what failed."""
FIRST = ("test_rows", "test_no_sync")
"""Tests that start first: most kernels are compiled there, and no call may wait for the GPU."""
MARKS = " and ".join(f"not {name}" for name in ("slow", "vllm", "verl", "swift", "deepspeed"))
PYTEST = ("-m", "pytest", "-o", "addopts=", "-W", "default", "-v", "-m", MARKS)
"""A line a test, since that is all that a killed run leaves. What a GPU warns of fails no test."""
NO_PEERS = ("kdrl-kernels", "kdrl-kernels, sketch", "PyTorch, full logits", "PyTorch, chunk loop")
PEERS = (
    *("kdrl-kernels", "Liger, Triton GRPO", "Liger, Triton KL", "TRL", "Cut cross-entropy"),
    *("verl", "Liger, chunked", "Liger, Triton", "flash-linear-attention", "PyTorch, compiled"),
)
"""What compiles longest comes last."""
OPS = ("GRPO", "KDRL exact", "logprob + entropy", "GRPO, half at 0")
"""Operations of the scoreboards, the most wanted first."""
SCOREBOARD = ("-m", "bench", "--truth", "sampled", "--ops", *OPS)
TINY = ("--shape", "tiny", "--rounds", "3")
INSTALL = """
import subprocess, sys
pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "-q"]
options = [word for word in sys.argv[1:] if not word.endswith(".whl")]
wheels = [word for word in sys.argv[1:] if word.endswith(".whl")]
if not wheels:
    print("No wheels in ./wheels: what is installed here must do (bash bench/wheels.sh)")
elif subprocess.call([*pip, *options, *wheels]):  # one that does not fit stops all
    codes = [subprocess.call([*pip, *options, wheel]) for wheel in wheels]
    sys.exit(f"{sum(map(bool, codes))} of {len(wheels)} wheels are not installed")
"""
FAILURE = re.compile(r"^(FAILED|ERROR|E  |\[gw\d+\] .*(FAILED|ERROR) )")
TROUBLE = re.compile(r"^(\w+Error|ERROR|\d+ of \d+ wheels|No wheels)\b")
NOT_TIMED = re.compile(r"^(speed|memory|stage) .*(not installed|failed|differs)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the run: a Python process, whose output is NAME.log."""

    name: str
    budget: float
    """Seconds."""
    most: float = 0.0
    """Seconds that it may take where the parts before it left some; below budget: none of them."""
    grace: float = GRACE
    """Seconds that it has to write what it knows, once it is interrupted."""
    command: tuple[str, ...]
    """Arguments of Python. {out} is the folder of the results, {minutes} the part's own time."""
    rehearsal: tuple[str, ...] = ()
    """Arguments that a rehearsal adds: the later of two options counts."""
    tables: tuple[str, ...] = ()
    """Patterns of the files that the report shows."""
    lines: re.Pattern[str] = TROUBLE
    """The lines of its log that the report shows too, the last of them."""
    always: bool = False
    """Whether it runs whatever --parts names: what it does the others may need."""
    stop: int = 0
    """The exit code by which it says that the others cannot run; 0: it never does."""
    why: str = ""
    """Why they cannot."""


def parts(wheels: Sequence[str], rehearse: bool) -> tuple[Part, ...]:
    """Return all parts in their order."""
    install = replace(WHEELS, command=(*WHEELS.command, *wheels))
    kernels = replace(KERNELS, command=(*KERNELS.command, *kernel_tests(rehearse)))
    return (install, MACHINE, kernels, OURS, AGAINST_PEERS, TRAINER, SKETCH, GEMMS, CURVE)


def kernel_tests(rehearse: bool) -> tuple[str, ...]:
    """Return the files of kernel tests that use a GPU, the largest first after FIRST."""
    files = []
    for path in (ROOT / "tests/kernels").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if "device: str" in text or "mark.gpu" in text:
            files.append((not path.name.startswith(FIRST), -len(text), path.name))
    names = [f"tests/kernels/{name}" for *_, name in sorted(files)]
    return tuple(names[: len(FIRST) + 1] if rehearse else names)


WHEELS = Part(
    name="wheels", budget=20, command=("-c", INSTALL), rehearsal=("--dry-run",), always=True
)
MACHINE = Part(
    name="machine",
    budget=25,
    command=("-m", "bench.machine", "--device", "cuda"),
    rehearsal=("--device", "cpu"),
    tables=("machine.log",),
    always=True,
    stop=3,  # of --device
    why="no GPU",
)
KERNELS = Part(
    name="kernels",
    budget=140,
    most=180,
    grace=WORKERS_GRACE,
    command=(
        *(*PYTEST, "-n", "8", "--dist", "loadfile", "--no-loadscope-reorder"),
        "--junitxml={out}/kernels.xml",
    ),
    rehearsal=("-n", "2", "-k", "float32-plain or on_a_gpu"),
    lines=FAILURE,
)
OURS = Part(
    name="ours",
    budget=100,
    most=150,
    command=(
        *(*SCOREBOARD, "--out", "{out}/ours", "--minutes", "{minutes}", "--rounds", "8"),
        *("--stages", "speed", "rows", "memory", "--providers", *NO_PEERS),
    ),
    rehearsal=(*TINY, "--minutes", "0.5", "--ops", "GRPO", "--stages", "speed", "rows"),
    tables=("ours/short.md",),
    lines=NOT_TIMED,
)
AGAINST_PEERS = Part(
    name="peers",
    budget=110,
    most=170,
    command=(
        *(*SCOREBOARD, "--out", "{out}/peers", "--minutes", "{minutes}", "--rounds", "5"),
        *("--stages", "speed", "memory", "--providers", *PEERS),
    ),
    rehearsal=(
        *(*TINY, "--minutes", "0.5", "--ops", "GRPO", "--stages", "speed"),
        *("--providers", *PEERS[:4]),
    ),
    tables=("peers/short.md",),
    lines=NOT_TIMED,
)
TRAINER = Part(
    name="trainer",
    budget=50,
    command=(*PYTEST, "-n", "6", "tests/train/test_gpu.py"),
    rehearsal=("-n", "0"),
    lines=FAILURE,
)
SKETCH = Part(
    name="sketch",
    budget=40,
    command=(
        *("-m", "bench.measures.sketch", "--out", "{out}", "--minutes", "0.3"),
        *("--profiles", "reasoning", "--ops", "GRPO", "KDRL exact", "--no-memory"),
    ),
    rehearsal=(*TINY, "--minutes", "0.1"),
    tables=("sketch-*.md",),
)
GEMMS = Part(
    name="gemms",
    budget=35,
    command=("-m", "bench.gemms", "--out", "{out}", "--seconds", "25"),
    rehearsal=("--seconds", "3"),
    tables=("gemms.md",),
)
CURVE = Part(
    name="curve",
    budget=170,
    command=("-m", "bench.curve", "--out", "{out}/curve"),
    rehearsal=("--tiny",),
    tables=("curve/curve.md",),
)
