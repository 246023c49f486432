"""The table of injected faults counts each try once, by what became of it."""

from types import SimpleNamespace
from typing import Any

from tests.faults import HANGS, Faults


def report(outcome: str, kind: str | None = "full disk", when: str = "call", **more: Any) -> Any:
    """Return what pytest reports of a test."""
    properties = [] if kind is None else [("fault", kind)]
    passed, failed, skipped = (outcome == name for name in ("passed", "failed", "skipped"))
    return SimpleNamespace(
        user_properties=[*properties, *more.get("properties", [])],
        when=when,
        passed=passed,
        failed=failed,
        skipped=skipped,
        longreprtext=more.get("text", ""),
    )


def test_outcomes_are_counted_by_kind() -> None:
    faults = Faults()
    for one in (
        report("passed"),
        report("passed", when="setup"),
        report("passed", properties=[("tried", 80)]),
        report("failed"),
        report("failed", kind="killed", when="setup"),
        report("failed", kind="killed", text=f"TimeoutError: {HANGS} for 300 s"),
        report("skipped", kind="killed"),
        report("passed", kind=None),
    ):
        faults.pytest_runtest_logreport(one)
    assert faults.table().splitlines()[2:] == [
        "| full disk | 82 | 81 | 1 | 0 |",
        "| killed | 2 | 0 | 1 | 1 |",
        "| **all** | 84 | 81 | 2 | 1 |",
    ]
