"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU, and spills nothing."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")

SHARED_LIMIT_BYTES = 48 * 1024
"""What every architecture gives a block without opting in to more."""


@pytest.fixture(scope="module")
def report() -> list[dict[str, object]]:
    """Resources of every kernel variant and architecture, from a process without interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.aot"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_and_architecture_is_there(report: list[dict[str, object]]) -> None:
    kernels = {row["kernel"] for row in report}
    assert {str(name).split("-")[0] for name in kernels} == {"sweep", "gradient", "objective"}
    assert {(row["kernel"], row["arch"]) for row in report} == {
        (kernel, arch) for kernel in kernels for arch in (80, 90, 100)
    }


def test_no_kernel_spills(report: list[dict[str, object]]) -> None:
    spilling = [row for row in report if row["STACK"] or row["LOCAL"]]
    assert not spilling


def test_shared_memory_is_bounded(report: list[dict[str, object]]) -> None:
    assert max(int(str(row["shared_bytes"])) for row in report) <= SHARED_LIMIT_BYTES


def test_registers_leave_three_blocks_an_sm(report: list[dict[str, object]]) -> None:
    """65,536 registers an SM, 256 threads a block: three blocks hide the latency of the loads."""
    assert max(int(str(row["REG"])) for row in report) <= 65_536 // (3 * 256)
