"""verifier: outcomes and counts; a bad completion costs the others nothing."""

import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from pebble import ProcessExpired, ProcessFuture

from kdrl_train.config import RewardConfig
from kdrl_train.rollouts.rewards import UnparseableError
from kdrl_train.rollouts.verifier import Deadlines, Verifier, _verdict

HERE = f"{__name__}:scripted_reward"

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
        judged = _verdict(task)
        assert judged is not None
        assert judged.outcome == "error"
        assert judged.message.startswith(message)
        assert len(judged.message) < 1000


@pytest.mark.slow
def test_a_worker_dies_at_once_when_told(scripted: Verifier) -> None:
    """A Python handler would make one hang in C stop the pool for pebble's seconds of grace."""
    assert scripted.score(["SIGTERM"], [str(signal.SIG_DFL)]).rewards == [1.0]


def test_a_hang_does_not_outlive_a_killed_trainer() -> None:
    code = f"""
from kdrl_train.rollouts import verifier_worker
verifier_worker.ORPHAN_GRACE_S = 0.1
rule = verifier_worker.JudgeRule(({HERE!r},), timeout_s=0.1)
verifier_worker.judge(rule, dict(completion="hang in C", answer="a"))
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
