"""engines: they record what the trainer computes, for the weights that it has pushed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.load import load_policy, load_tokenizer
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.engines import require_agreement, require_version
from kdrl_train.rollouts.engines.continuous import ContinuousEngine
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.rollouts.sampler import SampleRequest
from tests.train.test_train import run

Config = Callable[..., TrainConfig]
PROMPTS = [[5], [20, 21, 22, 23], [30, 31, 32]]
SAMPLING = SamplingConfig(group_size=4, max_new_tokens=10, temperature=0.8)
REQUEST = SampleRequest(prompts=PROMPTS, sampling=SAMPLING, seed=0, step=0)


@pytest.fixture(params=["generate", "continuous"])
def engine(request: pytest.FixtureRequest, config: Config) -> tuple[Any, Policy]:
    """Make an engine with a copy of a policy, and the policy."""
    settings = config(sampling=SAMPLING)
    policy = load_policy(settings, None)
    tokenizer = load_tokenizer(settings.model.policy)
    if request.param == "continuous":
        return ContinuousEngine(settings, policy, tokenizer), policy
    return GenerateEngine(settings, policy, tokenizer, shared=False), policy


def assert_logprobs_are_of(policy: Policy, rollouts: Rollouts) -> None:
    """Compare the recorded log-probabilities with those of the policy."""
    for prompt, ids, logprobs in zip(
        rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs, strict=True
    ):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0] / 0.8
        expected = logits.log_softmax(dim=1)[len(prompt) - 1 : -1]
        expected = expected.gather(1, ids[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_it_samples_from_the_weights_that_were_pushed(engine: tuple[Any, Policy]) -> None:
    sampler, policy = engine
    before = sampler.generate(REQUEST)
    assert len(before.texts) == 12
    assert [ids.tolist() for ids in before.prompt_ids] == [p for p in PROMPTS for _ in range(4)]
    assert_logprobs_are_of(policy, before)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    again = sampler.generate(REQUEST)
    assert again.texts == before.texts  # the policy moved, its copy did not
    sampler.load(policy, 1)
    assert sampler.version == 1
    assert_logprobs_are_of(policy, sampler.generate(REQUEST))


def test_greedy_completions_are_the_most_probable_tokens(engine: tuple[Any, Policy]) -> None:
    sampler, policy = engine
    rollouts = sampler.generate(replace(REQUEST, greedy=True))
    for prompt, ids in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0]
        assert ids.tolist() == logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def test_stops_and_truncation(engine: tuple[Any, Policy]) -> None:
    sampler, _ = engine
    sampler.model.generation_config.eos_token_id = list(range(100, 200))
    rollouts = sampler.generate(replace(REQUEST, seed=1, step=3))
    for ids, cut in zip(rollouts.completion_ids, rollouts.truncated.tolist(), strict=True):
        ends = [token == 0 or 100 <= token < 200 for token in ids.tolist()]
        assert not any(ends[:-1])
        assert cut == (not ends[-1])
        assert len(ids) == 10 if cut else len(ids) <= 10
    assert 0 < rollouts.truncated.sum() + 1 <= 12


def test_a_weight_that_is_missing_is_named(config: Config) -> None:
    settings = config()
    policy = load_policy(settings, None)
    sampler = GenerateEngine(settings, policy, None, shared=False)
    sampler.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"got none for \['extra'\]"):
        sampler.load(policy, 1)
    assert sampler.version == 0


def test_a_wider_head_needs_generate(config: Config) -> None:
    settings = config()
    policy = load_policy(settings, None)
    policy.sampled_vocab_size = 200
    with pytest.raises(ValueError, match=r'engine.kind must be "generate" .* 258 and 200'):
        ContinuousEngine(settings, policy, None)


def test_versions_and_mismatches() -> None:
    sampler = type("Sampler", (), {"version": 3})()
    require_version(sampler, 3)
    with pytest.raises(EngineError, match="rollouts of step 5 must come from the weights after 4"):
        require_version(sampler, 4)
    require_agreement(None, 0.1, 0)
    require_agreement(0.1, 0.1, 0)
    for mismatch in (0.11, float("nan")):
        with pytest.raises(EngineError, match=r"engine.max_sampler_mismatch = 0\.1 nats"):
            require_agreement(mismatch, 0.1, 0)


@pytest.mark.slow  # the engine itself is tested below
def test_a_run_with_continuous_batching(config: Config) -> None:
    base = config(steps=2)
    records = run(replace(base, engine=replace(base.engine, kind="continuous")))
    assert len(records) == 2
    for record in records:
        assert record["sampler_mismatch_mean"] < 1e-4
