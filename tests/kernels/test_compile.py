"""Every kernel compiles without a GPU, spills nothing, and loads as its docstring says."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")
from tests.kernels import aot

ARCHES = {"sm_80", "sm_90", "sm_100", "gfx942"}
SHARED_LIMIT_BYTES = {"sm_80": 48 * 1024, "sm_90": 48 * 1024, "sm_100": 48 * 1024, "gfx942": 65_536}
"""What a block gets without opting in to more; on AMD all that a compute unit has."""

Row = dict[str, int | str]
SLOW = pytest.mark.slow  # a minute of compiling


@pytest.fixture(
    scope="module",
    params=[pytest.param("sm_90 aligned", id="sm_90"), pytest.param("", id="all", marks=SLOW)],
)
def only(request: pytest.FixtureRequest) -> list[str]:
    """Name what is compiled: one target at aligned rows, or (an empty list) everything."""
    return request.param.split()


@pytest.fixture(scope="module")
def report(only: list[str]) -> list[Row]:
    """Return the resources of every kernel variant and target; its process has no interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.aot", *only]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_and_target_is_there(report: list[Row], only: list[str]) -> None:
    kernels = {str(row["kernel"]) for row in report}
    kinds = {"sweep", "jsd", "gradient", "objective", "sketch", "bags", "ids", "slots", "scale"}
    assert {name.split("-")[0] for name in kernels} == kinds
    for kd in ("None", "rkl", "fkl", "jsd"):
        assert {f"sweep-{kd}-{rows}" for rows in only[1:] or ("aligned", "ragged")} <= kernels
        assert {f"gradient-{kd}-bf16-aligned", f"gradient-{kd}-softcap-bf16-aligned"} <= kernels
    pairs = {(row["kernel"], row["arch"]) for row in report}
    assert pairs == {(kernel, arch) for kernel in kernels for arch in only[:1] or ARCHES}


def test_no_kernel_spills(report: list[Row]) -> None:
    assert not [row for row in report if row["spills"] or row["stack"]]


def test_shared_memory_is_bounded(report: list[Row]) -> None:
    assert not [row for row in report if row["shared_bytes"] > SHARED_LIMIT_BYTES[row["arch"]]]


def test_registers_leave_640_threads_an_sm(report: list[Row]) -> None:
    """So enough loads are in flight to hide the latency of memory; an SM has 65,536 registers."""
    assert not [
        row for row in report if row["arch"] != "gfx942" and row["registers"] > 65_536 // 640
    ]


def test_loads_are_16_bytes_wide_and_the_sweeps_loop_has_no_barrier(report: list[Row]) -> None:
    looked_at = [
        row
        for row in report
        if "wide_loads" in row and row["kernel"].split("-")[0] not in ("objective", "ids", "slots")
    ]
    assert looked_at
    for row in looked_at:
        one = ("None", "bags", "scale")
        streams = 1 if any(name in row["kernel"] for name in one) else 2
        assert row["wide_loads"] >= streams, row
        # a 16-bit gradient is written over the logits: one barrier, between load and store
        if "sketch" not in row["kernel"]:  # which sums over the tile
            assert row["barriers_in_loops"] == ("gradient" in row["kernel"]), row


def test_instructions_of_a_loop_are_counted() -> None:
    """Two loads of four columns in a loop of 5 instructions, and two more that are jumped over."""
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   FADD R4, R4, R8 ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   STG.E [R2.64], R4 ;
.L_x_0:
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""
    assert aot.loop_instructions(listing, streams=1) == 5 / 8
    assert aot.loop_instructions(listing, streams=2) == 5 / 4
