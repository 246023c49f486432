"""The check of a sketched head measures what the sketch does to a model's own tokens."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from kdrl_train.config import TrainConfig
from kdrl_train.ranks import ALONE, World
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.start.head_gradient import check_sketch
from kdrl_train.start.load import load
from kdrl_train.start.preflight import preflight
from tests.train.ranks import on_ranks

Config = Callable[..., TrainConfig]


def sketching(config: TrainConfig, threshold: float, flat: float = 1e9) -> TrainConfig:
    sketch = {"head_threshold": threshold, "head_flat": flat}
    return replace(config, model=replace(config.model, head_backward="sketch", **sketch))


def checked(config: TrainConfig, world: World) -> str:
    return check_sketch(config, load(config, world))


def test_entries_and_noise_are_measured(config: Config) -> None:
    """Each of 258 columns is kept at 2^-24, and one beside the sampled token's at 1."""
    every = checked(sketching(config(), 2.0**-24), ALONE)
    assert "0% have their exact gradient; 258 entries a token of 258 columns" in every
    assert every.endswith("noise 0.00% of the gradient")
    few = checked(sketching(config(), 1.0), ALONE)
    assert "; 2 entries a token of 258 columns, noise" in few
    assert float(few.partition("noise ")[2].partition("%")[0]) > 50


def test_a_vocabulary_too_small_for_a_sketch_is_said(config: Config) -> None:
    with pytest.raises(UserWarning, match=r"100% have their exact gradient, .* 258 columns would"):
        checked(sketching(config(), 2.0**-11, flat=0.5), ALONE)


@pytest.mark.parametrize("sketched", [False, True])
def test_it_is_a_line_of_the_check_of_a_sketched_head(config: Config, sketched: bool) -> None:
    settings = sketching(config(), 2.0**-11, flat=0.5) if sketched else config()
    with Verifier(settings.reward) as verifier:
        results = preflight(settings, load(settings, ALONE), verifier)
    lines = [one for one in results if one.name == "head gradient"]
    assert [(one.passed, one.warning) for one in lines] == [(True, True)] * sketched


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["student", "llama"], ids=["tied", "untied"])
def test_sharded_models_give_the_same_line(config: Config, policy: str) -> None:
    settings = sketching(config(policy=policy), 0.05)
    assert on_ranks(2, partial(checked, settings)) == [checked(settings, ALONE)] * 2


def checked_on_rank_1(config: TrainConfig, world: World) -> str:
    return checked(config if world.main else sketching(config, 0.05), world)


@pytest.mark.slow
def test_ranks_with_different_settings_are_refused(config: Config) -> None:
    """Rank 1 alone would check its head, and wait for rank 0's part of it."""
    results = on_ranks(2, partial(checked_on_rank_1, config()))
    assert len(results) == 2
    for error in results:
        assert isinstance(error, ValueError)
        assert str(error) == (
            "model.head_backward must be the same on all ranks, got exact on rank 0 and sketch on "
            "rank 1: start all of them with the same file and options"
        )
