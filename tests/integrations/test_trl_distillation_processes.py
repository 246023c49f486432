"""KdrlDistillationTrainer on two processes: DDP and FSDP2 (gloo), a process without tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from tests.integrations.test_trl_processes import assert_same
from tests.integrations.trl_ranks import TrlRun, train_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "fsdp"),
    [
        ({"beta": 0.3}, True),
        pytest.param(
            {"beta": 1.0, "gradient_accumulation_steps": 2}, False, marks=pytest.mark.slow
        ),
        pytest.param({"beta": 0.0, "gradient_accumulation_steps": 2}, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_distil_as_with_trl(
    tmp_path: Path, options: dict[str, Any], fsdp: bool
) -> None:
    run = TrlRun(folder=tmp_path, distil=True, options=options, fsdp=fsdp, tool_mask=True)
    ours, theirs = train_ranks(run), train_ranks(replace(run, kdrl=False))
    assert ours.sharded == fsdp
    assert all("kdrl/teacher_log_ratio" in record for record in ours.log)
    log = [
        {name: value for name, value in record.items() if not name.startswith("kdrl/")}
        for record in ours.log
    ]
    assert_same(replace(ours, log=log), theirs)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("kd", ["k2", "jsd", "topk_rkl"])
def test_two_processes_distil_as_one(tmp_path: Path, kd: str, fsdp: bool) -> None:
    run = TrlRun(folder=tmp_path, distil=True, options={"kd": kd}, fsdp=fsdp, masked_from=4)
    both, alone = train_ranks(run), train_ranks(replace(run, fsdp=False), 1)
    assert_same(both, alone)
    assert sum(name.startswith("kdrl/") for name in alone.log[0]) > 0
