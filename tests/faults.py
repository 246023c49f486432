"""Runs the tests that inject faults, and writes their table into kdrl_train/runfolder/README.md.

python tests/faults.py                      # all of them, on all cores
python tests/faults.py tests/train/runfolder  # prints the table of a folder

A test that injects a fault bears `@pytest.mark.fault("full disk")`, the kind of its fault. Each of
its cases counts as one try; one that tries more says so with `record_property("tried", n)`.
"""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

HERE = Path(__file__).parent
README = HERE.parent / "kdrl_train" / "runfolder" / "README.md"
HEADER = "| fault | tried | survived | lost | hung |"
DEADLINE_S = 300
"""A test that takes longer has hung."""
HANGS = "a fault has hung the test"


class Faults:
    """A plugin of pytest that bounds each test and counts outcomes by the kind of fault."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Let each test's report say its kind of fault."""
        for item in items:
            if marker := item.get_closest_marker("fault"):
                item.user_properties.append(("fault", marker.args[0]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """End a test that hangs."""
        previous = signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(DEADLINE_S)
        try:
            return (yield)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that has run, or whose preparation failed."""
        properties = dict(report.user_properties)
        if "fault" not in properties or (report.when != "call" and not report.failed):
            return
        outcome = "survived" if report.passed else "lost"
        if report.skipped:
            return
        if HANGS in report.longreprtext:
            outcome = "hung"
        counts = self.outcomes.setdefault(str(properties["fault"]), Counter())
        counts[outcome] += int(str(properties.get("tried", 1)))

    def table(self) -> str:
        """Write a line for each kind of fault, and their sum."""
        rows = sorted(self.outcomes.items())
        rows.append(("**all**", sum((counts for _, counts in rows), Counter())))
        lines = [HEADER, "|---|---|---|---|---|"]
        for kind, counts in rows:
            numbers = [counts.total(), *(counts[name] for name in ("survived", "lost", "hung"))]
            lines.append(f"| {kind} | {' | '.join(str(number) for number in numbers)} |")
        return "\n".join(lines)


def _hangs(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"{HANGS} for {DEADLINE_S} s")


PLUGIN = Faults()
"""What `-p tests.faults` registers in the processes of pytest-xdist."""
pytest_collection_modifyitems = PLUGIN.pytest_collection_modifyitems
pytest_runtest_protocol = PLUGIN.pytest_runtest_protocol
pytest_runtest_logreport = PLUGIN.pytest_runtest_logreport


def main(places: list[str]) -> int:
    """Run the tests and print the table; write it where they are all of them."""
    sys.path.insert(0, str(HERE.parent))
    options = ["-p", "tests.faults", "-m", "fault and not vllm"]
    code = pytest.main([*options, *(places or [str(HERE)])])
    table = sys.modules["tests.faults"].PLUGIN.table()  # pytest's, not that of __main__
    print(table)
    if not places:
        before, _, rest = README.read_text(encoding="utf-8").partition(HEADER)
        _, blank, after = rest.partition("\n\n")
        README.write_text(before + table + (blank + after or "\n"), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
