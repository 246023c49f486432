"""Tests that a sample of the gradients is that of the whole, and shows who is wrong."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import definition, sample
from bench.inputs import Inputs, make_inputs
from bench.measures import accuracy, speed
from bench.ops import OPS, OPS_BY_NAME, Op
from bench.providers import Outputs, Provider
from bench.providers.home import PROVIDERS as HOME
from bench.results_file import OURS, SKETCH
from bench.sample import PROBED, GradientSample
from bench.shapes import TINY

GRPO = OPS_BY_NAME["GRPO"]
ODD = replace(TINY, name="odd", N=37, H=65, V=513, H_t=97, V_t=401)
"""The student knows tokens that the teacher does not: their dW is 0."""
OUR_OWN, OUR_SKETCH = HOME[:2]
Spoil = Callable[[dict[str, Tensor], GradientSample], None]


@pytest.fixture(scope="module")
def odd() -> Inputs:
    return make_inputs(ODD, device="cpu", teachers=2)


@pytest.fixture(scope="module")
def odd_sample(odd: Inputs) -> GradientSample:
    return sample.draw(odd)


def test_a_sample_has_one_of_each_run_of_neighbours(
    odd: Inputs, odd_sample: GradientSample
) -> None:
    wide = make_inputs(replace(TINY, N=1024, H=4, H_t=4, V=8192, V_t=8192), device="cpu")
    drawn = sample.draw(wide)
    for kept, total, each in ((drawn.rows, 1024, 32), (drawn.vocab, 8192, 64)):
        assert {0, total - 1} <= {*kept.tolist()}
        assert set(range(total // each)) == {*(kept // each).tolist()}
        assert len(kept) < total / each + 2 + 34
        assert kept.diff().min() > 0
        assert len((kept % each).unique()) > 16, "at random places"
    assert {*wide.tokens[drawn.rows].tolist()} <= {*drawn.vocab.tolist()}
    assert torch.equal(sample.draw(odd).vocab, odd_sample.vocab)
    assert not torch.equal(sample.draw(odd, seed=1).rows, odd_sample.rows)
    assert odd_sample.vocab.max() >= ODD.V_t, "of tokens that the teacher does not know too"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_sample_is_that_of_the_whole(odd: Inputs, odd_sample: GradientSample, op: Op) -> None:
    whole = accuracy.exact(odd, op)
    reduced = odd_sample.reduce(whole)
    sampled = sample.compute(odd, op, odd_sample, torch.float64, rows=8)
    assert sampled.keys() == reduced.keys()
    if op.gradients:
        assert len(reduced["dhidden"]) == len(odd_sample.rows) < ODD.N
    for name, expected in reduced.items():
        assert sampled[name].dtype == torch.float64
        torch.testing.assert_close(sampled[name], expected, rtol=1e-10, atol=1e-14, msg=name)


def _row(name: str, factor: float) -> Spoil:
    """Scale the largest row of a gradient that is not in the sample."""

    def spoil(gradients: dict[str, Tensor], drawn: GradientSample) -> None:
        norms = gradients[name].norm(dim=1)
        norms[drawn.rows if name == "dhidden" else drawn.vocab] = 0
        gradients[name][norms.argmax()] *= factor

    return spoil


def _swap(gradients: dict[str, Tensor], drawn: GradientSample) -> None:
    """Give two rows that are not in the sample each other's gradient."""
    norms = gradients["dhidden"].norm(dim=1)
    norms[drawn.rows] = 0
    first, second = norms.topk(2).indices.tolist()
    gradients["dhidden"][[first, second]] = gradients["dhidden"][[second, first]]


def _last_columns(gradients: dict[str, Tensor], _: GradientSample) -> None:
    """Leave out the last 16 columns, as a tile that is cut off does."""
    for gradient in gradients.values():
        gradient[:, -16:] = 0


def _one_nan(gradients: dict[str, Tensor], drawn: GradientSample) -> None:
    missing = set(range(len(gradients["dweight"]))) - {*drawn.vocab.tolist()}
    gradients["dweight"][min(missing), 3] = math.nan


BUGS = {
    "another scale": lambda gradients, _: gradients["dweight"].mul_(1.1),
    "a row of dX": _row("dhidden", 0.0),
    "the sign of a row of dX": _row("dhidden", -1.0),
    "a row of dW": _row("dweight", 0.0),
    "rows in each other's place": _swap,
    "the last columns": _last_columns,
    "one NaN": _one_nan,
}


class _Spoilt(torch.autograd.Function):
    """Passes gradients through, after a bug."""

    @staticmethod
    def forward(ctx, spoil, hidden, weight):  # type: ignore[no-untyped-def]
        ctx.spoil = spoil
        return hidden.clone(), weight.clone()

    @staticmethod
    def backward(ctx, dhidden, dweight):  # type: ignore[no-untyped-def]
        gradients = {"dhidden": dhidden.clone(), "dweight": dweight.clone()}
        ctx.spoil(gradients)
        return None, gradients["dhidden"], gradients["dweight"]


def _status(case: Inputs, spoil: Spoil | None, name: str = "peer") -> str:
    drawn = sample.draw(case)

    def call(inputs: Inputs, op: Op) -> Outputs:
        if spoil is not None:
            pair = _Spoilt.apply(lambda grads: spoil(grads, drawn), inputs.hidden, inputs.weight)
            inputs = replace(inputs, hidden=pair[0], weight=pair[1])
        whole = HOME[2].whole
        assert whole is not None
        return whole(inputs, op)

    provider = Provider(name=name, whole=call)
    every = speed.records(GRPO, [case], [provider], 1, math.inf, sampled=True)
    return {one["provider"]: one for one in every}[name]["status"]


@pytest.fixture(scope="module")
def case() -> Inputs:
    return make_inputs(replace(TINY, N=64, V=1024, V_t=1024), device="cpu")


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_gradient_is_caught_at_a_sample(case: Inputs, bug: str) -> None:
    assert _status(case, BUGS[bug]).startswith("differs: d")


def test_right_ones_pass_and_say_of_which_sample(case: Inputs) -> None:
    assert _status(case, None) == "ok"
    every = speed.records(GRPO, [case], [OUR_OWN, OUR_SKETCH], 1, math.inf, sampled=True)
    ours, sketched = (one for one in every if one["provider"] in (OURS, SKETCH))
    for one in (ours, sketched):
        assert one["status"] == "ok"
        assert one["sample"] == {"rows": 18, "vocab": one["sample"]["vocab"], "probes": 4}
    assert ours["errors"]["dweight" + PROBED]["max"] < 1e-5


def test_our_own_budget_counts_at_a_sample(case: Inputs) -> None:
    """A row that is off by 0.1% of its numbers is no error of a peer, and one of ours."""
    slightly = _row("dweight", 1.001)
    assert _status(case, slightly) == "ok"
    assert _status(case, slightly, OURS).startswith("differs: error of dweight · probes")


def test_a_biased_sketch_is_caught_where_no_sample_is(case: Inputs) -> None:
    def half(gradients: dict[str, Tensor], drawn: GradientSample) -> None:
        kept = gradients["dhidden"][drawn.rows].clone()
        gradients["dhidden"] *= 1.2
        gradients["dhidden"][drawn.rows] = kept

    drawn = sample.draw(case)

    def call(inputs: Inputs, op: Op, seed: int = 0) -> Outputs:  # noqa: ARG001
        pair = _Spoilt.apply(lambda grads: half(grads, drawn), inputs.hidden, inputs.weight)
        whole = HOME[2].whole
        assert whole is not None
        return whole(replace(inputs, hidden=pair[0], weight=pair[1]), op)

    every = speed.records(GRPO, [case], [Provider(name=SKETCH, whole=call)], 1, math.inf, True)
    status = {one["provider"]: one for one in every}[SKETCH]["status"]
    assert status.startswith("differs: relative error of dhidden · probes")


def test_the_product_may_be_another(odd: Inputs, odd_sample: GradientSample) -> None:
    def twice(hidden: Tensor, weight: Tensor) -> Tensor:
        return 2 * definition.plain_product(hidden, weight)

    plain = sample.compute(odd, GRPO, odd_sample, torch.float64, 8)
    other = sample.compute(odd, GRPO, odd_sample, torch.float64, 8, twice)
    assert (plain["logprobs"] - other["logprobs"]).abs().max() > 1
