"""Times one operation by every provider that can do it, side by side.

First every provider is compared with float64; who computes something else, or fails, has no time.
Of several settings the faster in a trial is kept. Then come the rounds: in each one everybody is
called once, in an order drawn for that round, so that what slows the machine for a while slows
all of them alike; inputs alternate, so that nothing stays in a cache.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import machine, providers, sample
from bench.floor import Floor
from bench.inputs import Inputs
from bench.measures import accuracy
from bench.measures.timing import (
    OUT_OF_TIME,
    RoundSamples,
    clear_gradients,
    failure,
    sample_rounds,
    timed_call,
    trial_ms,
)
from bench.ops import FLOORS, Op
from bench.providers import Outputs, Provider, Refusal, Setting
from bench.results_file import OURS, SKETCH, Record, record
from bench.sample import PROBED

ENTRY_SHARE = 0.6
"""Share of an operation's time for the trials; a provider not tried by then is left out."""


class Contest:
    """A contest of providers in one operation on one shape, each with its fastest setting."""

    def __init__(
        self, op: Op, inputs: Sequence[Inputs], deadline: float, sampled: bool = False
    ) -> None:
        """inputs: at least one set, used in turn. deadline: of time.monotonic(), in seconds.

        sampled: gradients are compared at a sample.
        """
        self.op, self.inputs, self.deadline = op, inputs, deadline
        self.sample = sample.draw(inputs[0]) if sampled and op.gradients else None
        self.entry_deadline = time.monotonic() + (deadline - time.monotonic()) * ENTRY_SHARE
        self.truth = {} if self._late() else accuracy.exact(inputs[0], op, self.sample)
        self.chosen: dict[str, tuple[Provider, Setting]] = {}
        self.entries: dict[str, dict[str, Any]] = {}

    def enter(self, provider: Provider) -> None:
        """Try a provider's settings; it takes part if one is right, else its status says why."""
        entry = self.entries[provider.name] = {
            "package": provider.package,
            "version": providers.version(provider),
            "setting": {},
        }
        try:
            providers.check(provider, self.op)
        except Refusal as refusal:
            entry["status"] = str(refusal)
            return
        if self._late():
            entry["status"] = OUT_OF_TIME
            return
        trials = [self._trial(provider, setting) for setting in provider.settings]
        right = [one for one in trials if one["status"] == "ok"]
        best = min(right, key=lambda one: one["ms"]) if right else trials[0]
        entry |= {name: best[name] for name in ("status", "setting", "errors") if name in best}
        if right:
            self.chosen[provider.name] = provider, best["setting"]
        if len(trials) > 1:
            entry["tried"] = [
                {name: one.get(name) for name in ("setting", "ms", "status")} for one in trials
            ]

    def race(self, floor: Floor, rounds: int) -> Iterator[Record]:
        """Time the providers that take part against the bare GEMMs; yield a record for everyone."""
        before = machine.readings()
        measures: dict[str, Callable[[int], tuple[float, float]]] = {
            name: self._bare_gemms(floor, projections)
            for projections, name in enumerate(self.op.floors, 1)
        }
        for name, (provider, setting) in self.chosen.items():
            measures[name] = self._call(provider, setting)
        samples = sample_rounds(measures, rounds, self.deadline)
        clear_gradients(self.inputs[0], self.op)
        clock = {"before": before, "after": machine.readings()}
        floor_entry: dict[str, Any] = {"package": None, "version": None, "setting": {}}
        floors = {name: dict(floor_entry) for name in self.op.floors}
        for name, entry in (floors | self.entries).items():
            if name in samples:
                entry["status"] = samples[name].status
            yield self._record(name, entry, samples.get(name), clock)

    def _late(self) -> bool:
        return time.monotonic() > self.entry_deadline

    def _trial(self, provider: Provider, setting: Setting) -> dict[str, Any]:
        """Measure the accuracy of one setting, and its time where there are several."""
        first = self.inputs[0]
        trial: dict[str, Any] = {"setting": dict(setting), "status": "ok"}
        try:
            results = self._results(provider, setting)
            trial["errors"] = accuracy.errors(results, self.truth)
            trial["status"] = self._judge(provider, setting, results, trial["errors"]) or "ok"
            del results
            trial["ms"] = 0.0
            if len(provider.settings) > 1 and trial["status"] == "ok":
                trial["ms"] = trial_ms(provider, first, self.op, setting)
        except Refusal as refusal:
            trial["status"] = str(refusal)
        except Exception as error:  # of other people's code: it stands in the table
            trial["status"] = failure(error)
        return trial

    def _judge(
        self, provider: Provider, setting: Setting, results: Outputs, errors: accuracy.Errors
    ) -> str | None:
        sketched = self._gradients if provider.name == SKETCH else ()
        sketched = tuple(name for name in results if name.removesuffix(PROBED) in sketched)
        errors = {name: error for name, error in errors.items() if name not in sketched}
        different = accuracy.difference(results, self.truth, errors, self.op)
        if different or provider.name not in (OURS, SKETCH):
            return different
        whole = (results, errors, self.truth, self.inputs[0], self.op)
        beyond = accuracy.beyond_budget(*whole, self.sample)
        if beyond or not sketched:
            return beyond
        return accuracy.biased(self._draws(provider, setting), self.truth, sketched)

    def _draws(self, provider: Provider, setting: Setting) -> Iterator[Outputs]:
        """Yield the gradients of a sketch with several seeds."""
        for seed in range(accuracy.DRAWS):
            yield self._results(provider, {**setting, "seed": seed})

    def _results(self, provider: Provider, setting: Setting) -> Outputs:
        """Call a provider once, and return its outputs and gradients."""
        first = self.inputs[0]
        clear_gradients(first, self.op)
        outputs = providers.forward(provider, first, self.op, setting)
        if self._gradients:
            outputs["loss"].backward()
        results = accuracy.with_gradients(outputs, first, self.op)
        return self.sample.reduce(results) if self.sample else results

    @property
    def _gradients(self) -> tuple[str, ...]:
        return tuple(f"d{name}" for name in self.op.gradients)

    def _inputs_of_round(self, n: int) -> Inputs:
        return self.inputs[n % len(self.inputs)]

    def _bare_gemms(self, floor: Floor, projections: int) -> Callable[[int], tuple[float, float]]:
        def call(n: int) -> tuple[float, float]:
            start = machine.clock()
            floor.run(self.op, self._inputs_of_round(n), projections)
            return 1e3 * (machine.clock() - start), 0.0

        return call

    def _call(self, provider: Provider, setting: Setting) -> Callable[[int], tuple[float, float]]:
        return lambda n: timed_call(provider, self._inputs_of_round(n), self.op, setting)

    def _record(
        self,
        name: str,
        entry: dict[str, Any],
        samples: RoundSamples[tuple[float, float]] | None,
        clock: Any,
    ) -> Record:
        shape = self.inputs[0].shape
        speed_record = record("speed", self.op.name, shape, self.inputs[0].profile, name, **entry)
        if speed_record["status"] != "ok" or samples is None:
            return speed_record
        if self.sample:
            speed_record["sample"] = self.sample.describe()
        speed_record |= {"total_ms": [sum(pair) for pair in samples.values], "clock": clock}
        speed_record["flop"] = self.op.flop(shape)
        if name not in FLOORS:
            pairs = zip(*samples.values, strict=True)
            speed_record["forward_ms"], speed_record["backward_ms"] = (list(part) for part in pairs)
        return speed_record


def records(
    op: Op,
    inputs: Sequence[Inputs],
    contestants: Sequence[Provider],
    rounds: int,
    deadline: float,
    sampled: bool = False,
) -> Iterator[Record]:
    """Yield the records of kind "speed" of one operation, those of the floors first."""
    contest = Contest(op, inputs, deadline, sampled)
    for provider in contestants:
        contest.enter(provider)
    yield from contest.race(Floor(inputs[0]), rounds)
