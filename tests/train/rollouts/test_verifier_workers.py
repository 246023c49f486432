"""verifier: worker processes die, stop, break and start anew; none sees the trainer's memory."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_train import cli
from kdrl_train.batch import Verdicts
from kdrl_train.config import RewardConfig
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder.signals import Stopped
from tests.train.rollouts.test_verifier import HERE

PID_REWARD = RewardConfig(
    function="tests.train.scripted_rewards:pid_reward", workers=1, timeout_s=60
)


def worker_pid(verifier: Verifier) -> int:
    """Return the process id of the only worker."""
    verdicts = verifier.score([""], [""])
    assert verdicts.outcomes == ["right"]  # a timeout's reward of 0 would kill our process group
    return int(verdicts.rewards[0])


@pytest.mark.slow  # it starts two pools
@pytest.mark.fault("reward function")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_idle_worker_that_is_stopped_holds_nobody_up(workers: int) -> None:
    with Verifier(replace(PID_REWARD, workers=workers)) as verifier:
        pid = worker_pid(verifier)
        os.kill(pid, signal.SIGSTOP)
        start, texts = time.monotonic(), ["x" * 1000] * 300  # more than the pipe to it holds
        verdicts = verifier.score(texts, texts)
        assert time.monotonic() < start + 60  # it takes 2 s, and a new worker's start
    assert verdicts.counts["right"] == 300
    assert pid not in verdicts.rewards


@pytest.mark.slow  # it starts two pools
@pytest.mark.fault("reward function")
def test_a_lock_that_a_dead_worker_held_ends_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrl_train.rollouts.verifier.STUCK_S", 1.0)
    with Verifier(replace(PID_REWARD, timeout_s=2)) as verifier:
        worker_pid(verifier)
        verifier._pool._pool_manager.worker_manager.workers_channel.mutex.acquire()
        verdicts = verifier.score(["a"] * 9, ["a"] * 9)
    assert (verdicts.counts["right"], verdicts.restarts) == (9, 1)


@pytest.mark.slow  # a hang costs its worker in the tests above
@pytest.mark.fault("reward function")
def test_workers_killed_while_idle_are_replaced() -> None:
    with Verifier(PID_REWARD) as verifier:
        pid = worker_pid(verifier)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while verifier._pool.active and time.monotonic() < deadline:
            time.sleep(0.05)  # pebble looks at its workers ten times a second
        other = worker_pid(verifier)
    assert other not in (pid, os.getpid())


@pytest.mark.slow  # a hang costs its worker in the tests above
@pytest.mark.fault("reward function")
def test_a_pool_that_breaks_is_started_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(PID_REWARD) as verifier:
        pid = worker_pid(verifier)
        started, start = [], verifier._start
        monkeypatch.setattr(verifier, "_start", lambda: started.append(0) or start())
        os.kill(pid, signal.SIGKILL)
        verdicts = verifier.score([""] * 20, [""] * 20)  # at once: pebble has not seen it yet
        # one that pebble takes to have died at work costs its completion instead
        assert (len(started), verdicts.restarts) in ((1, 1), (0, 0))
        assert verdicts.counts["right"] + verdicts.counts["error"] == 20
        verifier._pool.stop()
        verdicts = verifier.score([""] * 20, [""] * 20)
        assert verdicts.restarts == 1
        assert verdicts.counts["right"] == 20
        broken = verifier._pool
        broken.stop()
        monkeypatch.setattr(verifier, "_start", lambda: broken)
        with pytest.raises(ChildProcessError, match="must start, but all of them died, twice"):
            verifier.score([""], [""])


def test_restarts_add_up() -> None:
    parts = [Verdicts([1.0], ["right"], restarts=n) for n in (1, 0, 1)]
    assert Verdicts.join(parts).restarts == 2


@pytest.mark.slow  # a hang costs its worker in the tests above
def test_waiting_for_verdicts_can_be_ended() -> None:
    def stop() -> None:
        if time.monotonic() > start + 0.5:
            raise Stopped

    with Verifier(RewardConfig(function=HERE, timeout_s=60, workers=1)) as verifier:
        verifier.score(["a"], ["a"])
        start = time.monotonic()
        with pytest.raises(Stopped):
            verifier.score(["hang"] * 4, [""] * 4, stop)
        assert time.monotonic() < start + 5


def test_workers_stay_light() -> None:
    names = ["kdrl_train.rollouts.rewards", "torch", "transformers"]
    with Verifier(
        RewardConfig(function="tests.train.scripted_rewards:imported_reward", workers=1)
    ) as verifier:
        assert verifier.score(names, [""] * 3).rewards == [1.0, 0.0, 0.0]


memory_of_this_process: list[str] = []


def inherited_reward(completion: str, answer: str) -> int:
    """Return more than 0 where the worker sees the trainer's memory."""
    return len(memory_of_this_process) + len(completion + answer)


@pytest.mark.slow
def test_workers_are_not_forked_from_the_trainer() -> None:
    """A fork would copy the locks that torch's threads hold at that moment."""
    memory_of_this_process.append("seen only by a fork")
    with Verifier(RewardConfig(function=f"{__name__}:inherited_reward", workers=1)) as verifier:
        assert verifier.score([""], [""]).rewards == [0.0]


def test_workers_that_cannot_start_are_one_message_and_exit_code_1(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "import multiprocessing\nassert multiprocessing.parent_process() is None\n"
    code += "def reward(completion, answer):\n    return 1.0\n"
    (tmp_path / "trainer_only.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        Verifier(RewardConfig(function="trainer_only:reward", workers=1)) as verifier,
        pytest.raises(ChildProcessError, match="workers must start, but all of them died"),
    ):
        verifier.score(["a"], ["a"])
    options = ["--model.policy", str(folders["student"]), "--data.path", str(folders["task"])]
    options += ["--reward.function", "trainer_only:reward", "--reward.workers", "1"]
    options += ["--model.device", "cpu", "--sampling.max-new-tokens", "2", "--max-problems", "1"]
    assert cli.main(["eval", *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: verifier workers must start")]
    assert not [line for line in lines if "kdrl_train/cli.py" in line]
