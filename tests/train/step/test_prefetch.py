"""Prefetched rollouts: whose they are, what is learnt from them, and that none is lost."""

import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_train import train
from kdrl_train.batch import Rollouts, Verdicts
from kdrl_train.config import EngineConfig, EvalConfig, OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError, RewardError
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.schedules import History
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import ALONE
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.log import Stages, read_records
from kdrl_train.step import score
from kdrl_train.step.coefficients import Prepared, prepare
from kdrl_train.waiting import Poll
from tests.train.model.test_policy import KD, pair, relative_error
from tests.train.ranks import train_ranks
from tests.train.test_train import run, weights, without_times
from tests.train.test_two_ranks import (
    alone,
    assert_same_metrics,
    leave_the_tied_head_stale,
    push_nothing_but_say_so,
    skip_a_push,
    together,
)

Config = Callable[..., TrainConfig]
STALE = EngineConfig(staleness=1)
PREFIXES = [[5], [20, 21, 22]]
V = 258


def next_logprobs(model: Any) -> Tensor:
    """[prefix, V] at temperature 0.8, of the token after each of PREFIXES."""
    rows = [model(input_ids=torch.tensor([prefix])).logits[0, -1] / 0.8 for prefix in PREFIXES]
    return torch.stack(rows).log_softmax(1)


def every_token(
    policy: Policy, method: MethodConfig, b: Tensor, updates: int, staleness: int
) -> Any:
    """Every token after each of PREFIXES, as the completions of a step that b [prefix, V] has
    sampled, and what `prepare` makes of them."""
    rollouts = Rollouts(
        prompt_ids=[torch.tensor(prefix) for prefix in PREFIXES for _ in range(V)],
        completion_ids=[torch.tensor([token]) for _ in PREFIXES for token in range(V)],
        logprobs=list(b.flatten()[:, None]),
        truncated=torch.zeros(2 * V, dtype=torch.bool),
        texts=[""] * (2 * V),
    )
    rewards = torch.randn(2, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    config = TrainConfig(
        method=method,
        sampling=SamplingConfig(prompts_per_step=2, group_size=V),
        optim=OptimConfig(updates_per_rollout=updates),
    )
    stub: Any = SimpleNamespace(
        config=config, policy=policy, teachers=Teachers(), history=History(), world=ALONE
    )
    batch: Any = SimpleNamespace(
        rollouts=rollouts, rewards=rewards, right=rewards > 0.5, staleness=staleness
    )
    return rollouts, prepare(stub, batch, 0, Stages())


def expected_gradient(
    policy: Policy, teacher: Teacher | None, rollouts: Rollouts, step: Prepared, chance_R: Tensor
) -> list[Tensor]:
    """Gradient of the loss over tokens that come with the given chance."""
    policy.zero_grad()
    coefficients = replace(step.coefficients, token_weights=chance_R)
    for batch in pack(rollouts, coefficients, 300):
        head = teacher(batch) if teacher is not None else None
        policy(batch, torch.tensor(1.0), head).loss.backward()
    return [p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
@pytest.mark.parametrize("term", ["policy gradient", "k2"])
def test_stale_samples_give_the_gradient_of_fresh_ones(
    tiny: Callable[..., Any], term: str, correction: str, updates: int
) -> None:
    """In expectation over every token, prefix given, without the bounds."""
    method = MethodConfig(policy="none", kd=None, sampler_correction=correction, sampler_cap=1e9)
    if term == "k2":
        method = replace(method, policy="off", kd="k2", kd_coef=KD)
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    policy.objective = replace(policy.objective, kd_ratio_cap=1e9)
    stale = tiny("qwen2", seed=1).double()
    with torch.no_grad():
        for parameter in stale.parameters():
            parameter.mul_(0.9)
        b = next_logprobs(stale)
    rollouts, step = every_token(policy, method, b, updates, staleness=1)
    gradient = expected_gradient(policy, teacher, rollouts, step, b.exp().flatten())
    lp = next_logprobs(policy.model)
    value = -(lp.exp().flatten() * step.coefficients.advantages).sum()
    if teacher is not None:
        lq = next_logprobs(teacher.model).detach()
        value = step.coefficients.kd_weight[0].double() * (lp.exp() * (lp - lq)).sum()
    expected = list(torch.autograd.grad(value, list(policy.parameters())))
    assert relative_error(gradient, expected) < 1e-5  # weights are float32
    fresh = every_token(policy, replace(method, sampler_correction="none"), b, 1, staleness=0)[1]
    wrong = expected_gradient(policy, teacher, rollouts, fresh, b.exp().flatten())
    assert relative_error(wrong, expected) > 0.05


def test_the_ratio_is_to_the_sampler_unless_weights_carry_it(tiny: Callable[..., Any]) -> None:
    method = MethodConfig(kd=None)
    policy, _ = pair(tiny, method, torch.float64, "qwen2")
    b = torch.full((2, V), 1 / V).log()
    p0 = next_logprobs(policy.model).detach().flatten()
    coefficients = every_token(policy, method, b, 2, staleness=1)[1].coefficients
    assert torch.cat(list(coefficients.old_logprobs.values())).equal(b.flatten())
    assert coefficients.sampler_weights is None
    corrected = replace(method, sampler_correction="truncate", sampler_cap=1.5)
    for updates in (1, 2):
        coefficients = every_token(policy, corrected, b, updates, staleness=1)[1].coefficients
        bounded = (p0 - b.flatten()).exp().clamp(max=1.5).float()
        weights = torch.cat([coefficients.sampler_weights[r] for r in range(2 * V)])
        torch.testing.assert_close(weights.float(), bounded, rtol=1e-5, atol=1e-6)
        if updates == 1:
            assert coefficients.old_logprobs is None
        else:
            old = torch.cat([coefficients.old_logprobs[r] for r in range(2 * V)])
            torch.testing.assert_close(old.double(), p0, rtol=1e-5, atol=1e-5)


def test_each_step_learns_from_the_weights_before_the_last(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, drawn = GenerateEngine.generate, []

    def watch(self: GenerateEngine, request: SampleRequest, poll: Poll) -> Rollouts:
        thread = threading.current_thread() is not threading.main_thread()
        drawn.append((request.step, self.version, thread))
        return generate(self, request, poll)

    monkeypatch.setattr(GenerateEngine, "generate", watch)
    rows = run(config(steps=4, engine=STALE))
    assert drawn == [(0, 0, False), (1, 0, True), (2, 1, True), (3, 2, True)]
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    (fresh,) = run(config("fresh", steps=1))
    assert (rows[0]["loss"], rows[0]["grad_norm"]) == (fresh["loss"], fresh["grad_norm"])
    assert rows[0]["stale_sampler_mismatch_mean"] is None
    assert rows[3]["sampler_mismatch_mean"] is None
    for row in rows[:3]:
        assert row["sampler_mismatch_mean"] < 1e-5
    for row in rows[1:]:
        assert row["stale_sampler_mismatch_mean"] > 1e-3  # a step of 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("updates", "correction"), [(1, "none"), (2, "truncate")])
def test_two_ranks_learn_what_one_process_learns(
    config: Config, updates: int, correction: str
) -> None:
    settings: dict[str, Any] = {
        "engine": STALE,
        "optim": OptimConfig(
            learning_rate=1e-3, micro_batch_tokens=64, updates_per_rollout=updates
        ),
        "method": replace(config().method, sampler_correction=correction),
        "eval": EvalConfig(data=config().data, every=2, samples=2, max_problems=3),
    }
    whole, parts = (config(out, **settings) for out in ("whole", "parts"))
    assert_same_metrics(together(parts, 2), alone(whole))


@pytest.mark.slow  # two ranks that prefetch are tested above
def test_one_process_resumes_with_the_rollouts_that_two_ranks_saved(config: Config) -> None:
    whole, parts = (config(out, steps=4, save_every=2, engine=STALE) for out in ("whole", "parts"))
    expected = alone(whole)
    broken = train_ranks(parts, 2, sabotage=fail_in_the_thread)
    for words in broken:
        assert words.endswith("RankError: rank 1 stopped with EngineError: it broke")
    assert checkpoint.latest(parts.out / "checkpoints").step == 2
    assert_same_metrics(alone(replace(parts, resume=True)), expected)


def fail_in_the_thread(rank: int) -> None:
    """Of rank 1, when it draws for the step after the next."""
    generate = GenerateEngine.generate

    def fail(self: GenerateEngine, request: SampleRequest, poll: Poll) -> Rollouts:
        if rank == 1 and request.step == 3:
            raise EngineError("it broke")
        return generate(self, request, poll)

    GenerateEngine.generate = fail  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param("thread", marks=pytest.mark.slow), "update"])
def test_what_stops_a_step_leaves_its_rollouts(
    config: Config, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A signal while the next step is drawn, or an error in the update: resumed to the bit."""
    whole, parts = (config(out, steps=4, engine=STALE) for out in ("whole", "parts"))
    expected = run(whole)
    generate, clip = GenerateEngine.generate, train.update.__globals__["clip"]
    clipped: list[int] = []

    def stop(self: GenerateEngine, request: SampleRequest, poll: Poll) -> Rollouts:
        if request.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, request, poll)

    def fail(*arguments: Any) -> float:
        clipped.append(0)
        if len(clipped) == 3:
            raise EngineError("it broke")
        return clip(*arguments)

    with monkeypatch.context() as patch:
        if place == "thread":
            patch.setattr(GenerateEngine, "generate", stop)
            run(parts)
        else:
            patch.setitem(train.update.__globals__, "clip", fail)
            with pytest.raises(EngineError, match="it broke"):
                run(parts)
    assert len(read_records(parts.out)) == 2
    assert not any(thread.name.startswith("rollouts") for thread in threading.enumerate())
    saved = checkpoint.latest(parts.out / "checkpoints")
    assert (saved.step, "rollouts.pt" in saved.files) == (2, True)
    assert without_times(run(replace(parts, resume=True))) == without_times(expected)
    theirs = weights(whole.out / "model")
    for name, tensor in weights(parts.out / "model").items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_corrected_reward_judges_the_next_step_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(steps=4, save_every=1, engine=STALE)
    generate, score, steps = GenerateEngine.generate, Verifier.score, []

    def watch(self: GenerateEngine, request: SampleRequest, poll: Poll) -> Rollouts:
        steps.append(request.step)
        return generate(self, request, poll)

    def fail(self: Verifier, texts: list[str], *arguments: Any, **more: Any) -> Verdicts:
        verdicts = score(self, texts, *arguments, **more)
        if steps[-1:] == [2]:
            verdicts.rewards[:4] = [math.nan] * 4
            verdicts.errors.update(dict.fromkeys(range(4), "a slip"))
        return verdicts

    with monkeypatch.context() as patch:
        patch.setattr(GenerateEngine, "generate", watch)
        patch.setattr(Verifier, "score", fail)
        with pytest.raises(RewardError, match=r"none for the 4 of .* at step 2; first: a slip"):
            run(settings)
    assert checkpoint.latest(settings.out / "checkpoints").step == 2
    rows = run(replace(settings, resume=True))
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1]


def test_rollouts_that_rot_are_named(config: Config) -> None:
    settings = config(steps=2, save_every=1, engine=STALE)
    run(settings)
    folder = settings.out / "checkpoints" / "step_000001"
    path = folder / "rollouts.pt"
    path.write_bytes(bytes(path.stat().st_size))
    (settings.out / "checkpoints" / "step_000002").rename(settings.out / "newer")
    again = replace(settings, resume=True)
    with pytest.raises(ValueError, match=r"rollouts.pt must have the SHA-256 .* when it was saved"):
        run(again)
    with pytest.raises(ValueError, match=r"rollouts.pt must hold the rollouts of the next step"):
        run(replace(again, checkpoint_hashes=False))


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (skip_a_push, "rollouts of step 2 must come from the weights after 1"),
        (push_nothing_but_say_so, "the engine's log-probabilities must be within"),
        (leave_the_tied_head_stale, "the engine's log-probabilities must be within"),
    ],
)
def test_an_engine_with_other_weights_stops_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, sabotage: Any, message: str
) -> None:
    monkeypatch.setattr(GenerateEngine, "load", GenerateEngine.load)  # put back afterwards
    sabotage(0)
    settings = config(steps=3, engine=STALE)
    with pytest.raises(EngineError, match=message):
        run(settings)
    assert [row["step"] for row in read_records(settings.out)] == [0]


def test_probes_are_spread_over_the_step(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has drawn a part of it, with an engine of its own; here the second one is off."""
    monkeypatch.setattr(score, "PROBED", 2)
    policy, _ = pair(tiny, MethodConfig(kd=None), torch.float64, "qwen2")
    exact = next_logprobs(policy.model)[0].detach().float()
    rollouts = Rollouts(
        prompt_ids=[torch.tensor(PREFIXES[0])] * 8,
        completion_ids=[torch.tensor([token]) for token in range(8)],
        logprobs=[exact[r, None] - float(r >= 4) for r in range(8)],
        truncated=torch.zeros(8, dtype=torch.bool),
        texts=[""] * 8,
    )
    config = TrainConfig(sampling=SamplingConfig(prompts_per_step=4, group_size=2))
    mismatch = score.probe_mismatch(policy, rollouts, config, ALONE)
    assert mismatch["sampler_mismatch_mean"] == pytest.approx(0.5, abs=1e-4)
    assert mismatch["sampler_mismatch_max"] == pytest.approx(1.0, abs=1e-4)
