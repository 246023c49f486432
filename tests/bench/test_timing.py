"""Tests bench/measures/timing.py: gradients of a call, whole rounds, failures, deadlines."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.inputs import Inputs, make_inputs
from bench.measures import timing
from bench.ops import OPS_BY_NAME
from bench.providers import Provider
from bench.providers.home import PROVIDERS
from bench.results_file import OURS
from bench.shapes import TINY

GRPO = OPS_BY_NAME["GRPO"]
HOME = {one.name: one for one in PROVIDERS}
no_head = Provider(name="no head", whole=lambda inputs, _: {"loss": inputs.weight.sum()})
"""Its loss does not depend on the hidden states."""


def later() -> float:
    return time.monotonic() + 600


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(TINY)


class FakeClock:
    """A clock in the place of time.monotonic, which moves only when a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: self.now))

    def second(self, number: int) -> int:
        """Let one second pass and return the number of the round: a measure of sample_rounds."""
        self.now += 1
        return number


def test_gradients_are_those_of_one_call(inputs: Inputs) -> None:
    timing.timed_call(HOME[OURS], inputs, GRPO, {})
    once = inputs.hidden.grad, inputs.weight.grad
    timing.timed_call(HOME[OURS], inputs, GRPO, {})
    for first, second in zip(once, (inputs.hidden.grad, inputs.weight.grad), strict=True):
        assert first.abs().max() > 0
        assert torch.equal(first, second)


def test_a_frozen_head_has_no_gradient_and_thaws(inputs: Inputs) -> None:
    timing.timed_call(HOME[OURS], inputs, OPS_BY_NAME["GRPO, frozen head"], {})
    assert timing.gradients_left(inputs) == ("hidden",)
    timing.timed_call(HOME["PyTorch, full logits"], inputs, OPS_BY_NAME["GRPO, head adapter"], {})
    assert timing.gradients_left(inputs) == ("hidden", "adapter_a", "adapter_b")
    timing.timed_call(HOME[OURS], inputs, GRPO, {})
    assert timing.gradients_left(inputs) == ("hidden", "weight")
    timing.clear_gradients(inputs, GRPO)
    assert timing.gradients_left(inputs) == ()


def test_forward_only_has_no_backward(inputs: Inputs) -> None:
    forward_ms, backward_ms = timing.timed_call(
        HOME[OURS], inputs, OPS_BY_NAME["logprob + entropy"], {}
    )
    assert forward_ms > 0
    assert backward_ms == 0


def test_a_call_without_its_gradients_is_no_sample(inputs: Inputs) -> None:
    with pytest.raises(RuntimeError, match=r"no head, GRPO must leave gradients of"):
        timing.timed_call(no_head, inputs, GRPO, {})


@pytest.mark.parametrize(("deadline", "whole"), [(100, 5), (9.5, 4), (8.5, 3), (6.5, 0), (-1, 0)])
def test_only_whole_rounds_count(
    monkeypatch: pytest.MonkeyPatch, deadline: float, whole: int
) -> None:
    clock = FakeClock(monkeypatch)  # two measures: the warm-up ends at 2, round n at 2 n + 4
    samples_by_key = timing.sample_rounds({"a": clock.second, "b": clock.second}, 5, deadline)
    for samples in samples_by_key.values():
        assert samples.values == list(range(whole))
        assert samples.status == ("ok" if whole else "out of time")


def test_fewer_rounds_than_enough_may_be_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    samples_by_key = timing.sample_rounds({"a": clock.second}, 2, 100)
    assert samples_by_key["a"] == timing.RoundSamples("ok", [0, 1])


def test_order_is_drawn_for_each_round() -> None:
    called: list[tuple[int, str]] = []
    measures = {name: lambda n, name=name: called.append((n, name)) for name in "abc"}
    timing.sample_rounds(measures, 20, later(), warm_up=False)
    assert [n for n, _ in called] == [n for n in range(20) for _ in "abc"]
    in_rounds = ["".join(name for _, name in called[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in in_rounds)
    assert len(set(in_rounds)) == 6, "some order never comes: a neighbour could be a burden"


def test_who_fails_is_out_and_the_others_go_on() -> None:
    def fails(number: int) -> int:
        if number == 1:
            raise ValueError("bad rows\nand more")
        return number

    def too_much(_: int) -> int:
        raise torch.OutOfMemoryError

    samples_by_key = timing.sample_rounds({"f": fails, "o": too_much, "a": lambda n: n}, 4, later())
    assert samples_by_key["a"] == timing.RoundSamples("ok", [0, 1, 2, 3])
    assert samples_by_key["f"] == timing.RoundSamples("failed: ValueError: bad rows", [])
    assert samples_by_key["o"] == timing.RoundSamples("failed: out of memory", [])


def test_fastest_setting(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    settings = ({"rows": 1}, {"rows": 2}, {"rows": 3})
    provider = Provider(name="x", settings=settings)
    times = {1: [(1, 4), (1, 3)], 2: [(90, 9), (1, 1)], 3: []}  # 2 warms up slowly, 3 fails

    def fake(*args: Any) -> tuple[float, float]:
        return times[args[-1]["rows"]].pop(0)

    monkeypatch.setattr(timing, "timed_call", fake)
    assert timing.fastest_setting(provider, inputs, GRPO, later()) == {"rows": 2}
    assert timing.fastest_setting(provider, inputs, GRPO, -1) == {"rows": 1}
    alone = replace(provider, settings=({"rows": 3},))
    assert timing.fastest_setting(alone, inputs, GRPO, later()) == {"rows": 3}


def test_what_one_part_leaves_is_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    assert timing.share(30, 0, 3) == 10
    clock.now = 6
    assert timing.share(30, 1, 3) == 18
    assert timing.share(30, 2, 3) == 30
