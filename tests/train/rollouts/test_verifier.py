"""verifier: outcomes and counts; a bad completion costs the others nothing."""

import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pebble import ProcessExpired, ProcessFuture

from kdrl_train import cli
from kdrl_train.batch import Verdicts
from kdrl_train.config import RewardConfig
from kdrl_train.rollouts.rewards import UnparseableError
from kdrl_train.rollouts.verifier import Deadlines, Verifier, _verdict
from kdrl_train.runfolder.signals import Stopped

HERE = f"{__name__}:scripted_reward"
PID_REWARD = RewardConfig(
    function="tests.train.scripted_rewards:pid_reward", workers=1, timeout_s=60
)

SCORES = {
    "pair": (1.0, "yes"),
    "half": 0.5,
    "format": 0.1,
    "0.6": 0.6,
    "judged": (0.1, True),
    "refused": (2.0, False),
}


class StrangeError(Exception):
    """Is pickled, but cannot be read back: its constructor takes two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def scripted_reward(completion: str, answer: str) -> object:
    """Do what the completion says; the tests name this function as module:function."""
    if completion == "hang in C":
        return sum(range(10**12))  # no byte code for an hour, so no Python signal handler either
    if completion == "hang":
        time.sleep(3600)
    if completion == "slow":
        time.sleep(0.3)
        return 1.0
    if completion == "10 GB":
        return len(bytearray(10 * 2**30))
    if completion == "surrogate":
        raise ValueError("half \ud800 and \x1b[2J")
    if completion == "raise":
        raise StrangeError("went", " wrong")
    if completion == "exit":
        raise SystemExit(3)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "SIGTERM":
        return str(signal.getsignal(signal.SIGTERM)) == answer
    if completion == "no answer":
        raise UnparseableError("nothing there")
    return {"nan": math.nan, "inf": math.inf, "none": None, "text": "1.0", **SCORES}.get(
        completion, completion == answer
    )


@pytest.fixture(scope="module")
def scripted() -> Iterator[Verifier]:
    with Verifier(RewardConfig(function=HERE, timeout_s=0.5)) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Verifier]:
    with Verifier(RewardConfig(timeout_s=1.0)) as verifier:
        yield verifier


def test_rewards_and_counts_by_hand(mathematics: Verifier) -> None:
    completions = [r"\boxed{5}", r"\boxed{6}", "I give up", "#### 1,234", r"\boxed{\frac{}}"]
    verdicts = mathematics.score(completions, ["5", "5", "5", "1234", "5"])
    assert verdicts.rewards == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert verdicts.outcomes == ["right", "wrong", "unparseable", "right", "unparseable"]
    assert verdicts.counts == {"right": 2, "wrong": 1, "unparseable": 2, "timeout": 0, "error": 0}
    assert verdicts.errors == {}
    assert verdicts.answers == ["5", "6", None, "1234", None]


@pytest.mark.slow
@pytest.mark.fault("reward function")
@pytest.mark.parametrize("hang", ["hang", "hang in C"])
def test_a_hang_costs_its_own_completion_only(scripted: Verifier, hang: str) -> None:
    scripted.score(["a"], ["a"])  # the workers are up
    completions = ["a", hang, "b", hang, hang, *["a"] * 40]
    verdicts = scripted.score(completions, ["a"] * len(completions))
    assert verdicts.rewards == [1.0, 0.0, 0.0, 0.0, 0.0, *[1.0] * 40]
    expected = ["right", "timeout", "wrong", "timeout", "timeout", *["right"] * 40]
    assert verdicts.outcomes == expected
    assert scripted.score(["a"] * 4, ["a"] * 4).counts["right"] == 4


@pytest.mark.slow  # a hang costs its worker
@pytest.mark.fault("reward function")
@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_clock_that_is_set_changes_no_deadline(
    scripted: Verifier, jump_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, 0.3 s of a reward were a timeout; back, a hang outlived its deadline of 0.5 s."""
    scripted.score(["a"], ["a"])  # the workers are up
    real, start, polls = time.time, time.monotonic(), 0

    def set_clock() -> None:
        nonlocal polls
        polls += 1
        if polls == 4:  # the tasks have begun
            monkeypatch.setattr(time, "time", lambda: real() + jump_s)

    assert scripted.score(["slow", "hang"], ["", ""], set_clock).outcomes == ["right", "timeout"]
    assert time.monotonic() < start + 20


@pytest.mark.fault("stopped by a signal")
def test_the_time_that_all_processes_were_stopped_counts_for_no_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After Ctrl-Z, an hour and fg, each completion at work was a timeout, with reward 0."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    task = ProcessFuture()
    task.set_running_or_notify_cancel()
    deadlines = Deadlines([task], timeout_s=5)
    monkeypatch.setattr(task, "cancel", lambda: task.set_result("late"))
    for second in (100.2, 3700.0, 3700.2, 3703.9):
        clock.append(second)
        deadlines.enforce()
    assert not task.done()
    assert deadlines.idle_s == pytest.approx(2.2)  # 1 s of the hour, 0.2 s, 1 s of 3.7 s
    for tenth in range(40):
        clock.append(3704 + tenth / 10)
        deadlines.enforce()
    assert task.done()


@pytest.mark.fault("reward function")
def test_only_of_a_worker_that_died_it_is_said() -> None:
    """Of 10^400, which is no float, the message was that the worker had died."""
    for error, message in (
        (OverflowError("too large\x1b" + "!" * 10**6), r"OverflowError: too large\u001b!"),
        (ProcessExpired("killed"), "worker died: ProcessExpired: killed"),
    ):
        task = ProcessFuture()
        task.set_running_or_notify_cancel()
        task.set_exception(error)
        _, outcome, text, _ = _verdict(task)
        assert outcome == "error"
        assert text.startswith(message)
        assert len(text) < 1000


@pytest.mark.slow
def test_a_worker_dies_at_once_when_told(scripted: Verifier) -> None:
    """A Python handler would make one hang in C stop the pool for pebble's seconds of grace."""
    assert scripted.score(["SIGTERM"], [str(signal.SIG_DFL)]).rewards == [1.0]


def test_a_hang_does_not_outlive_a_killed_trainer() -> None:
    code = f"""
from kdrl_train.rollouts import verifier_worker
verifier_worker.ORPHAN_GRACE_S = 0.1
verifier_worker.judge({HERE!r}, "hang in C", "a", timeout_s=0.1)
"""
    folders = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": folders}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGALRM


@pytest.mark.fault("reward function")
@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("10 GB", "MemoryError: more than reward.memory_bytes"),
        ("surrogate", r"ValueError: half \ud800 and \u001b[2J"),
        ("raise", "StrangeError: went wrong"),
        ("nan", "must be a finite number, got nan"),
        ("inf", "must be a finite number, got inf"),
        ("none", "must be a finite number, got None"),
        ("text", "must be a finite number, got '1.0'"),
        ("pair", "(reward, right) must be a finite number and True or False, got (1.0, 'yes')"),
        ("exit", "SystemExit: 3"),
        ("die", "worker died"),
    ],
)
def test_a_failing_reward_is_nan_and_keeps_its_message(
    scripted: Verifier, completion: str, message: str
) -> None:
    verdicts = scripted.score(["a", completion, "b"], ["a", "a", "a"])
    assert verdicts.outcomes == ["right", "error", "wrong"]
    assert math.isnan(verdicts.rewards[1])
    assert [verdicts.rewards[0], verdicts.rewards[2]] == [1.0, 0.0]
    assert list(verdicts.errors) == [1]
    assert message in verdicts.errors[1]
    assert scripted.score(["a"], ["a"]).rewards == [1.0]


def test_a_users_reward_may_be_partial_and_unparseable(scripted: Verifier) -> None:
    verdicts = scripted.score(["half", "format", "0.6", "no answer"], ["a"] * 4)
    assert verdicts.rewards == [0.5, 0.1, 0.6, 0.0]
    assert verdicts.outcomes == ["wrong", "wrong", "right", "unparseable"]


def test_a_reward_function_may_give_the_verdict(scripted: Verifier) -> None:
    verdicts = scripted.score(["judged", "refused"], ["a", "a"])
    assert verdicts.rewards == [0.1, 2.0]
    assert verdicts.outcomes == ["right", "wrong"]


def test_the_threshold_of_right_is_a_setting() -> None:
    function = "tests.train.scripted_rewards:format_pays"  # 0.1 for letters that are not ASCII
    with Verifier(RewardConfig(function=function, workers=1, right_above=0.05)) as verifier:
        assert verifier.score(["é", "e"], ["1"] * 2).outcomes == ["right", "right"]
    with Verifier(RewardConfig(function=function, workers=1)) as verifier:
        assert verifier.score(["é", "e"], ["1"] * 2).outcomes == ["wrong", "right"]


@pytest.mark.fault("hostile completion")
def test_hostile_completions_end_within_the_deadline(mathematics: Verifier) -> None:
    hostile = {
        r"\boxed{10^{10^{10^{10}}}}": {"wrong"},
        r"\boxed{9999!!!}": {"unparseable"},
        r"\boxed{" + "{" * 400 + "5" + "}" * 400 + "}": {"timeout", "unparseable"},
        r"\boxed{" + r"\sqrt{" * 150 + "5" + "}" * 150 + "}": {"timeout", "unparseable", "wrong"},
        r"\boxed{" + "9" * 900 + "}": {"wrong"},
        r"\boxed{" + "9" * 1_000_000 + "}": {"unparseable"},
        r"\boxed{" * 100_000 + "}" * 100_000: {"unparseable"},
        "{" * 200_000: {"unparseable"},
        "#### \ud800": {"unparseable"},
        "\udfff" * 1000 + r"\boxed{5}": {"right"},
        "\0" * 1000 + r"\boxed{5}": {"right"},
    }
    verdicts = mathematics.score([*hostile, r"\boxed{5}"], ["5"] * (len(hostile) + 1))
    for completion, outcome in zip(hostile, verdicts.outcomes, strict=False):
        assert outcome in hostile[completion], ascii(completion[:40])
    assert verdicts.outcomes[-1] == "right"


def test_a_gold_answer_that_does_not_parse_is_an_error(mathematics: Verifier) -> None:
    verdicts = mathematics.score([r"\boxed{5}"], ["#"])
    assert verdicts.outcomes == ["error"]
    assert (
        "answer must be a number, LaTeX, a word or a choice that math reads whole, got '#'"
        in verdicts.errors[0]
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


def test_empty_batch(mathematics: Verifier) -> None:
    verdicts = mathematics.score([], [])
    assert verdicts.rewards == []
    assert set(verdicts.counts.values()) == {0}


def test_many_completions_keep_their_order(mathematics: Verifier) -> None:
    completions = [f"{'thinking ' * 30}\\boxed{{{number}}}" for number in range(512)]
    golds = [str(number + number % 2) for number in range(512)]
    assert mathematics.score(completions, golds).outcomes == ["right", "wrong"] * 256


def test_an_unknown_reward_fails_before_any_worker_starts() -> None:
    with pytest.raises(ValueError, match=r"reward\.function must be .*, got 'maths'"):
        Verifier(RewardConfig(function="maths"))


def test_a_script_without_a_guard_is_refused_before_any_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    script.write_text("train.main(config)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r'script\.py must call .* `if __name__ == "__main__":`'):
        Verifier(RewardConfig(function="exact"))
    script.write_text("if __name__ == '__main__':\n    train.main(config)\n", encoding="utf-8")
    with pytest.raises(ValueError, match="got 'maths'"):  # the next check
        Verifier(RewardConfig(function="maths"))


def test_bad_calls_are_named(scripted: Verifier) -> None:
    with pytest.raises(ValueError, match=r"got 1 for 2 completions: repeat each gold answer"):
        scripted.score(["a", "b"], ["a"])
    closed = Verifier(RewardConfig(function="exact", workers=1))
    closed.close()
    closed.close()
    with pytest.raises(ValueError, match="must be open to score, got a closed Verifier"):
        closed.score(["a"], ["a"])


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
