"""Under DeepSpeed ZeRO-3, on two processes, ours gives TRL's losses and gradient norms.

bash tests/deepspeed.sh runs these tests, in an environment of their own.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deepspeed


def run(kind: str, sharded: str, folder: Path) -> list[list[float]]:
    """Train on two processes; return loss and gradient norm of each step."""
    out = folder / "out.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("deepspeed_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", port, str(script), kind, sharded, str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps: list[list[float]] = json.loads(out.read_text())
    assert len(steps) == 2
    return steps


@pytest.mark.parametrize(
    ("host", "kind"), [("trl", "patch_trl"), ("trl", "one pass"), ("trl, cispo", "cispo")]
)
def test_it_trains_as_trl_does(host: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = run(host, "zero3", tmp_path), run(kind, "zero3", tmp_path)
    for step, expected in zip(ours, theirs, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_teacher_is_read_whole(tmp_path: Path) -> None:
    sharded, whole = run("rkl", "zero3", tmp_path), run("rkl", "ddp", tmp_path)
    for step, expected in zip(sharded, whole, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
