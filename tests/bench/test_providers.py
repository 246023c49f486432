"""Tests that every provider computes the operations of bench/definition.py."""

import math
import warnings
from importlib import metadata
from typing import Any

import pytest
import torch

from bench import definition, providers
from bench.inputs import PROFILES, Inputs, make_inputs
from bench.machine import DEVICE
from bench.measures.accuracy import difference, errors, exact, with_gradients
from bench.measures.timing import clear_gradients
from bench.ops import OPS, OPS_BY_NAME, Op
from bench.providers import Provider, Refusal
from bench.results_file import SKETCH
from bench.shapes import TINY, Shape

RAGGED = Shape("odd", 37, 48, 301, 32, 310, torch.float32, "none: no size is round")
BOUND = 1e-4
"""Of a relative error. Float32 rounding stays below 1e-5 here, while another formula (a mean over
other rows, a divergence the other way round, the teacher's padded tokens) is off by percents."""
PROVIDERS = providers.load()
COMPILED = ("GRPO", "JSD")
"""Of "PyTorch, compiled" these only, on one shape: compiling each anew takes seconds."""


def _id(named: Provider | Op | Shape) -> str:
    return named.name


@pytest.fixture(scope="module", params=[TINY, RAGGED], ids=_id)
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


@pytest.fixture(scope="module", params=PROFILES)
def inputs(request: pytest.FixtureRequest, shape: Shape) -> Inputs:
    return make_inputs(shape, request.param, teachers=2)


@pytest.mark.parametrize("op", OPS, ids=_id)
@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(one, marks=pytest.mark.slow if one.name == "PyTorch, compiled" else ())
        for one in PROVIDERS
    ],
    ids=_id,
)
def test_computes_the_definition(provider: Provider, op: Op, inputs: Inputs) -> None:
    if provider.name == "PyTorch, compiled" and (op.name not in COMPILED or inputs.shape != TINY):
        pytest.skip("compiled for two operations only")
    try:
        providers.check(provider, op)
    except Refusal as refusal:
        pytest.skip(str(refusal))
    truth = exact(inputs, op)
    every_entry: dict[str, float] = {"threshold": 2**-24, "flat": math.inf}  # without noise
    for setting in (every_entry,) if provider.name == SKETCH else provider.settings:
        clear_gradients(inputs, op)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's code
            outputs = providers.forward(provider, inputs, op, setting)
            if op.gradients:
                outputs["loss"].backward()
        results = with_gradients(outputs, inputs, op)
        wrong = errors(results, truth)
        assert difference(results, truth, wrong, op) is None, setting
        assert max(error["max"] for error in wrong.values()) < BOUND, (setting, wrong)


def _no_package(_name: str) -> str:
    raise metadata.PackageNotFoundError


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p.package], ids=_id)
def test_package_that_is_not_installed(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", _no_package)
    with pytest.raises(Refusal, match=r"^not installed$"):
        providers.check(provider, OPS_BY_NAME["GRPO"])
    assert providers.version(provider) is None


def _refusal(provider: Provider, op_name: str) -> str:
    with pytest.raises(Refusal) as refused:
        providers.check(provider, OPS_BY_NAME[op_name])
    return str(refused.value)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs a machine without a GPU")
def test_gpu_only_on_a_cpu() -> None:
    provider = Provider(name="kernels", gpu_only="Triton kernels", whole=lambda *_: {})
    assert _refusal(provider, "GRPO") == "not supported: Triton kernels"


@pytest.mark.parametrize(
    ("op_name", "missing"),
    [
        ("logprob + entropy", "log-probabilities"),
        ("KDRL k2", "log-probabilities"),
        ("reverse KL", "divergence"),
        ("KDRL exact", "divergence"),
    ],
)
def test_missing_piece_is_named(op_name: str, missing: str) -> None:
    provider = Provider(name="half", policy=lambda *_: torch.zeros(()))
    assert _refusal(provider, op_name) == f"not supported: no {missing}"


def test_all_missing_pieces_are_named() -> None:
    reason = _refusal(Provider(name="nothing"), "KDRL exact")
    assert reason == "not supported: no divergence and no policy gradient"
    assert _refusal(Provider(name="nothing"), "cross entropy") == "not supported: no cross entropy"


@pytest.mark.parametrize("key", ["KDRL exact", "rkl"])
def test_reason_is_given_by_operation_or_by_term(key: str) -> None:
    provider = Provider(name="k3", whole=lambda *_: {}, refused={key: "its KL is k3"})
    assert _refusal(provider, "KDRL exact") == "not supported: its KL is k3"
    providers.check(provider, OPS_BY_NAME["forward KL"])


def _pieces(**pieces: Any) -> Provider:
    """Return a provider whose divergence is 2 for the reverse KL, 6 for the forward KL."""
    values = {"rkl": 2.0, "fkl": 6.0}
    return Provider(
        name="pieces",
        divergence=lambda inputs, kd: torch.full_like(inputs.advantages, values[kd]),
        **pieces,
    )


def test_a_weight_of_each_token_needs_its_divergence_and_the_entropy() -> None:
    name, no_score = "entropy-weighted reverse KL", _pieces(token_divergence=True)
    assert _refusal(Provider(name="nothing"), name) == "not supported: no divergence"
    assert _refusal(_pieces(), name) == "not supported: no divergence of each token"
    assert _refusal(no_score, name) == "not supported: no teacher's entropy"
    no_entropy = {"logprob + entropy": "no entropy"}
    half = _pieces(token_divergence=True, score=lambda *_: None, refused=no_entropy)
    assert _refusal(half, name) == "not supported: no teacher's entropy"
    providers.check(_pieces(token_divergence=True, score=lambda *_: None), OPS_BY_NAME[name])


def test_a_mixture_of_divergences_is_refused_for_the_reason_of_either() -> None:
    one_way = _pieces(refused={"fkl": "no forward KL"}, policy=lambda *_: torch.zeros(()))
    assert _refusal(one_way, "GRPO + both KLs") == "not supported: no forward KL"
    providers.check(one_way, OPS_BY_NAME["KDRL exact"])


def test_pieces_are_put_together() -> None:
    """The mixture is the mean of two calls, and two teachers are passed as one head."""
    seen = []

    def divergence(inputs: Inputs, kd: str) -> torch.Tensor:
        seen.append((inputs.teacher_hidden @ inputs.shared_teacher_weight.T).softmax(dim=1))
        return torch.tensor({"rkl": 2.0, "fkl": 6.0}[kd])

    inputs = make_inputs(TINY, device="cpu", teachers=2)
    pieces = Provider(
        name="pieces",
        divergence=divergence,
        policy=lambda *_: torch.tensor(10.0, dtype=torch.float64),
    )
    outputs = providers.forward(pieces, inputs, OPS_BY_NAME["GRPO + both KLs"], {})
    assert outputs["loss"] == 14
    seen.clear()
    op = OPS_BY_NAME["KDRL, two teachers"]
    assert providers.forward(pieces, inputs, op, {})["loss"] == 12
    expected = definition.teacher_logprobs(inputs, op).exp()
    torch.testing.assert_close(seen, [expected], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("provider", PROVIDERS, ids=_id)
def test_every_refusal_says_of_what_kind_it_is(provider: Provider) -> None:
    for op in OPS:
        try:
            providers.check(provider, op)
        except Refusal as refusal:
            message = str(refusal)
            assert message == "not installed" or message.startswith("not supported: "), op.name
            assert not message.endswith((".", ": ")), op.name


def test_names_are_unique() -> None:
    names = [provider.name for provider in PROVIDERS]
    assert len(names) == len(set(names))
