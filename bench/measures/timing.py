"""Times one call of a provider, and takes samples of many calls in turns.

Gradients of the call before are dropped outside of the clock: adding to them would be timed too.
"""

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from bench.inputs import LEAVES, Inputs
from bench.machine import DEVICE, clock
from bench.ops import Op
from bench.providers import Provider, Setting, forward
from bench.results_file import OUT_OF_TIME

"""Inputs that may require a gradient."""
ENOUGH_ROUNDS = 3
"""Rounds that are enough for a figure, where time ends before all of them."""
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def clear_gradients(inputs: Inputs, op: Op) -> None:
    """Drop the gradients of the last call; the weight requires one unless the head is frozen."""
    for name in LEAVES:
        getattr(inputs, name).grad = None
    inputs.weight.requires_grad_(not op.frozen_head)


def gradients_left(inputs: Inputs) -> tuple[str, ...]:
    """Name the inputs that hold a gradient."""
    return tuple(name for name in LEAVES if getattr(inputs, name).grad is not None)


def timed_call(provider: Provider, inputs: Inputs, op: Op, setting: Setting) -> tuple[float, float]:
    """Time (forward, backward) of one call in ms; backward is 0 where the operation has none.

    The gradients stay in inputs until the next call.
    Raises: RuntimeError where the call did not leave the gradients of the operation, all of them.
    """
    clear_gradients(inputs, op)
    start = clock()
    outputs = forward(provider, inputs, op, setting)
    middle = clock()
    if op.gradients:
        outputs["loss"].backward()
    end = clock()
    gradients = gradients_left(inputs)
    if gradients != op.gradients:
        raise RuntimeError(
            f"{provider.name}, {op.name} must leave gradients of {op.gradients}, got {gradients}"
        )
    return 1e3 * (middle - start), 1e3 * (end - middle) if op.gradients else 0.0


def device_ms(prepare: Callable[[], object], call: Callable[[], object]) -> float:
    """Measure the time that the device spends in a call after prepare, which is not timed.

    On a GPU prepare must keep the device busy for longer than the host takes to ask for the call:
    a kernel of a fifth of a millisecond is not timed with the Python in front of it.
    """
    if DEVICE == "cpu":
        prepare()
        start = clock()
        call()
        return 1e3 * (clock() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepare()
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


@dataclass(frozen=True, slots=True)
class RoundSamples(Generic[Value]):
    """The samples of one measure, one for every round."""

    status: str
    """A status as in results_file.py."""
    values: list[Value]
    """One value a round; none unless status is "ok"."""


def sample_rounds(
    measures: Mapping[Key, Callable[[int], Value]],
    rounds: int,
    deadline: float,
    warm_up: bool = True,
) -> dict[Key, RoundSamples[Value]]:
    """Take all measures once a round, in an order drawn for it.

    Args:
        measures: called with the number of the round, by which it may choose its inputs.
        warm_up: a round comes first that does not count.
        deadline: of time.monotonic. At it the round that is not complete is dropped, and all of
            them if fewer than ENOUGH_ROUNDS of the rounds are complete.
    Returns: samples by key. What raises is left out from then on, and has no values.
    """
    values: dict[Key, list[Value]] = {key: [] for key in measures}
    failed: dict[Key, str] = {}
    numbers = range(-1 if warm_up else 0, rounds)
    done = _run_rounds(measures, numbers, deadline, values, failed)
    status = "ok" if done >= min(rounds, ENOUGH_ROUNDS) else OUT_OF_TIME
    samples = {}
    for key, taken in values.items():
        state = failed.get(key, status)
        samples[key] = RoundSamples(state, taken[:done] if state == "ok" else [])
    return samples


def _run_rounds(
    measures: Mapping[Key, Callable[[int], Value]],
    numbers: range,
    deadline: float,
    values: dict[Key, list[Value]],
    failed: dict[Key, str],
) -> int:
    """Fill values and failed; return the number of complete rounds. Round -1 warms up."""
    for n in numbers:
        keys = [key for key in measures if key not in failed]
        random.Random(n).shuffle(keys)
        for key in keys:
            if time.monotonic() > deadline:
                return max(0, n)
            try:
                value = measures[key](max(0, n))
            except Exception as error:
                failed[key] = failure(error)
                continue
            if n >= 0:
                values[key].append(value)
    return len(numbers) + min(numbers.start, 0)


def free_cache() -> None:
    """Free a GPU's unused memory, for other processes too, unless the device has failed."""
    gc.collect()
    if DEVICE == "cuda":
        with contextlib.suppress(RuntimeError):  # a peer's illegal access fails every later call
            torch.cuda.empty_cache()


def failure(error: Exception) -> str:
    """Return the status of a call that raised, in one line, and free what it left on a GPU."""
    free_cache()
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    text = str(error).strip()
    return f"failed: {type(error).__name__}: {text.splitlines()[0][:120] if text else ''}"


def trial_ms(provider: Provider, inputs: Inputs, op: Op, setting: Setting) -> float:
    """Return the faster of two calls in ms, by which a setting is chosen."""
    return min(sum(timed_call(provider, inputs, op, setting)) for _ in range(2))


def fastest_setting(provider: Provider, inputs: Inputs, op: Op, deadline: float) -> Setting:
    """Return the fastest of the provider's settings by trial_ms; the first if none was tried."""
    if len(provider.settings) == 1:
        return provider.settings[0]
    tried: list[float] = []
    for setting in provider.settings:
        ms = math.inf
        if time.monotonic() < deadline:
            try:
                ms = trial_ms(provider, inputs, op, setting)
            except Exception as error:
                failure(error)
        tried.append(ms)
    return provider.settings[tried.index(min(tried))]


def share(deadline: float, part: int, parts: float) -> float:
    """Return the deadline of one part of several; time that earlier parts left is shared."""
    now = time.monotonic()
    return now + (deadline - now) / (parts - part)
