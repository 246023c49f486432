"""coefficients: scores before the first update, and off-policy losses."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_train.batch import Example, Rollouts
from kdrl_train.config import OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.config.models import DEFAULT_TEACHER
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.metrics import add_sums, token_means
from kdrl_train.method.presets import PRESETS
from kdrl_train.method.schedules import History
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder.log import Stages
from kdrl_train.step.coefficients import Prepared, correction, prepare
from kdrl_train.step.score import score_packs
from tests.train.coefficients import coefficients_of, uniform
from tests.train.model.test_policy import KD, METHODS, pair, relative_error, some_rollouts

REWARD = MethodConfig(kd="reward", kd_coef=KD, advantage="dr_grpo")
WITH_REWARD = (0, 1, 2, 3, 5)  # the fifth completion of some_rollouts has none


def own_logprobs(model: Any, rollouts: Rollouts, r: int) -> Tensor:
    """[T] log-probabilities of completion r, from the logits of the whole model."""
    ids = torch.cat([rollouts.prompt_ids[r], rollouts.completion_ids[r]])
    n = len(rollouts.completion_ids[r])
    logits = model(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.8
    return logits.log_softmax(-1).gather(1, ids[-n:, None]).squeeze(1)


def shifted(policy: Policy, rollouts: Rollouts, seed: int) -> dict[int, Tensor]:
    """Completion -> log-probabilities of another policy, ratios of 1/4 to 4 away."""
    draw = torch.Generator().manual_seed(seed)
    shifted_logprobs = {}
    with torch.no_grad():
        for r in range(6):
            logprobs = own_logprobs(policy.model, rollouts, r)
            noise = torch.rand(len(logprobs), generator=draw, dtype=logprobs.dtype) - 0.5
            shifted_logprobs[r] = logprobs + noise * 2.7
    return shifted_logprobs


def packs(
    rollouts: Rollouts, rewards: Tensor, kd_weight: Tensor, budget: int, **fields: Any
) -> list[PackedBatch]:
    weights = (~rewards.isnan()).float().flatten()
    coefficients = uniform(6, token_weights=weights, kd_weight=kd_weight, **fields)
    return list(pack(rollouts, coefficients, budget))


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_scores_are_those_of_the_models_own_logits(tiny: Callable[..., Any], budget: int) -> None:
    policy, teacher = pair(tiny, REWARD, torch.float64, "qwen2")
    rollouts, rewards = some_rollouts()
    kd_weight = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    scores = score_packs(
        policy,
        Teachers((DEFAULT_TEACHER,), {0: teacher}),
        packs(rollouts, rewards, kd_weight, budget),
    )
    assert sorted(scores.logprobs) == list(WITH_REWARD)
    total, count = 0.0, 0
    for r in WITH_REWARD:
        with torch.no_grad():
            ours = own_logprobs(policy.model, rollouts, r)
            log_ratio = ours - own_logprobs(teacher.model, rollouts, r)
        torch.testing.assert_close(scores.logprobs[r], ours, rtol=1e-6, atol=1e-6)
        expected = log_ratio.sum().item() if kd_weight[r] > 0 else 0.0
        assert scores.teacher_log_ratio.get(r, 0.0) == pytest.approx(expected, rel=1e-6)
        if kd_weight[r] > 0:
            total, count = total + expected, count + len(ours)
    assert token_means(scores.sums)["kl_teacher"] == pytest.approx(total / count, rel=1e-6)


def test_a_rank_without_completions_scores_none(tiny: Callable[..., Any]) -> None:
    """Its packs have no token; those of the other rank have all."""
    policy, teacher = pair(tiny, REWARD, torch.float64, "qwen2")
    rollouts, _ = some_rollouts()
    only = uniform(6, token_weights=torch.eye(6)[3], kd_weight=torch.ones(6))
    teachers = Teachers((DEFAULT_TEACHER,), {0: teacher})
    ours, theirs = (
        score_packs(policy, teachers, pack(rollouts, only, 12, rank=rank, ranks=2))
        for rank in (0, 1)
    )
    assert (sorted(ours.logprobs), sorted(theirs.logprobs)) == ([3], [])
    assert (theirs.teacher_log_ratio, theirs.sums["tokens"].item()) == ({}, 0)


def test_the_first_update_has_a_ratio_of_exactly_one(tiny: Callable[..., Any]) -> None:
    policy, _ = pair(tiny, PRESETS["grpo"], torch.float32, "qwen2")
    rollouts, rewards = some_rollouts()
    scores = score_packs(policy, None, packs(rollouts, rewards, torch.zeros(6), 12))
    policy.train()
    for batch in packs(rollouts, rewards, torch.zeros(6), 12, old_logprobs=scores.logprobs):
        out = policy(batch, torch.tensor(1.0), None)
        assert out.logprobs.requires_grad is False
        assert torch.equal(out.logprobs, batch.old_logprobs)


@pytest.mark.parametrize("mode", ["none", "truncate", "mask"])
@pytest.mark.parametrize("name", ["k2", "rkl sequence"])
def test_off_policy_loss_is_that_of_the_models_own_logits(
    tiny: Callable[..., Any], name: str, mode: str
) -> None:
    method = replace(METHODS[name], entropy_coef=0.0, sampler_correction=mode)
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    rollouts, rewards = some_rollouts()
    old = shifted(policy, rollouts, seed=1)
    rollouts = replace(rollouts, logprobs=list(shifted(policy, rollouts, seed=2).values()))
    factors: Mapping[int, Tensor] = {r: torch.ones(len(old[r])).double() for r in range(6)}
    if mode != "none":
        factors, _ = correction(old, rollouts, method)
    weights, normalizer = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), method.token_weights, 9
    )
    coefficients = coefficients_of(
        rewards, method, token_weights=weights, old_logprobs=old, sampler_weights=factors
    )
    advantages, kd_weight = coefficients.advantages, coefficients.kd_weight
    result = off_policy_gradient(policy, teacher, normalizer, pack(rollouts, coefficients, 12))

    expected = torch.zeros((), dtype=torch.float64)
    clipped, used = 0, 0
    for r in WITH_REWARD:
        logp = own_logprobs(policy.model, rollouts, r)
        ratio, A = (logp - old[r]).exp(), advantages[r]
        gain = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
        w = (old[r] - rollouts.logprobs[r]).exp()
        w = {
            "none": torch.ones_like(w),
            "truncate": w.clamp(max=2),
            "mask": w * ((w < 2) & (w > 0.5)),
        }[mode]
        kd = ratio.detach().clamp(max=2.0) * distillation(method, policy, teacher, rollouts, r)
        expected = expected + weights[r] * (w * (-gain + kd_weight[r] * kd)).sum()
        clipped += ((gain != ratio * A) & (w != 0)).sum().item()
        used += (w != 0).sum().item()
    policy.zero_grad()
    (expected / normalizer).backward()

    assert result[0].item() == pytest.approx((expected / normalizer).item(), rel=1e-6)
    assert relative_error(result[1], [p.grad for p in policy.parameters()]) <= 1e-6
    assert result[2]["clip_fraction"] == pytest.approx(clipped / used, rel=1e-6)
    assert clipped > 0


def distillation(
    method: MethodConfig, policy: Policy, teacher: Teacher, rollouts: Rollouts, r: int
) -> Tensor:
    """[T] k2 or exact reverse KL of completion r, from whole models."""
    if method.kd == "k2":
        lq = own_logprobs(teacher.model, rollouts, r).detach()
        return (own_logprobs(policy.model, rollouts, r) - lq).square() / 2
    ids = torch.cat([rollouts.prompt_ids[r], rollouts.completion_ids[r]])[None]
    n = len(rollouts.completion_ids[r])
    p, q = (
        (m.model(input_ids=ids).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
        for m in (policy, teacher)
    )
    return (p.exp() * (p - q.detach())).sum(dim=1)


def off_policy_gradient(
    policy: Policy, teacher: Teacher, normalizer: Tensor, batches: Iterable[PackedBatch]
) -> tuple[Tensor, list[Tensor], dict[str, float | None]]:
    total, sums = torch.zeros((), dtype=torch.float64), {}
    for batch in batches:
        head = teacher(batch) if batch.needs_teacher else None
        out = policy(batch, normalizer, head)
        out.loss.backward()
        total += out.loss.detach()
        sums = add_sums(sums, out.sums)
    return total, [p.grad.clone() for p in policy.parameters()], token_means(sums)


def prepared(
    policy: Policy,
    teacher: Teacher | None,
    rollouts: Rollouts,
    method: MethodConfig,
    updates: int,
    staleness: int = 0,
) -> tuple[Prepared, Stages]:
    stages = Stages()
    config = TrainConfig(
        method=method,
        sampling=SamplingConfig(prompts_per_step=3, group_size=2),
        optim=OptimConfig(updates_per_rollout=updates, micro_batch_tokens=12),
    )
    rewards = some_rollouts()[1]
    run: Any = SimpleNamespace(
        config=config,
        policy=policy,
        teachers=Teachers() if teacher is None else Teachers((DEFAULT_TEACHER,), {0: teacher}),
        history=History(),
        world=ALONE,
    )
    batch: Any = SimpleNamespace(
        examples=[Example("1", "", "")] * 6,
        rollouts=rollouts,
        rewards=rewards,
        right=rewards > 0.5,
        staleness=staleness,
    )
    return prepare(run, batch, 0, stages), stages


def test_only_what_needs_scores_runs_a_model(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr(Policy, "forward", refuse)
    rollouts, _ = some_rollouts()
    policy, teacher = pair(tiny, METHODS["k2"], torch.float32, "qwen2")
    for name in ("grpo", "kd_rkl", "kdrl", "opd_then_rl"):
        step, stages = prepared(policy, teacher, rollouts, PRESETS[name], 1)
        assert step.coefficients.old_logprobs is None
        assert step.coefficients.sampler_weights is None
        assert sorted(step.metrics) == ["kd_coef", "policy_coef"]
        assert stages.seconds == {}
    corrected = replace(PRESETS["grpo"], sampler_correction="mask")
    for method, updates in ((PRESETS["grpo"], 3), (corrected, 1), (REWARD, 1)):
        with pytest.raises(AssertionError, match="a model ran"):
            prepared(policy, teacher, rollouts, method, updates)


def test_no_teacher_is_read_where_no_completion_is_rewarded_by_it(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, teacher = pair(tiny, REWARD, torch.float32, "qwen2")
    rollouts, _ = some_rollouts()
    read = prepared(policy, teacher, rollouts, REWARD, 1)[0]
    assert read.metrics["kd_share"] == 1.0
    assert abs(read.metrics["kl_teacher"]) > 0.1

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "forward", refuse)
    off = replace(REWARD, kd_coef=ScheduleConfig(kind="switch", initial=0.0, steps=1))
    step = prepared(policy, teacher, rollouts, off, 1)[0]
    assert step.metrics["kd_share"] == 0.0
    plain = coefficients_of(some_rollouts()[1], replace(off, kd=None))
    assert torch.equal(step.coefficients.advantages, plain.advantages)
    assert torch.equal(step.coefficients.kd_weight, plain.kd_weight)
    prepared(policy, teacher, rollouts, METHODS["k2"], 3)  # old log-probabilities need none


def test_shaped_advantages_by_hand(tiny: Callable[..., Any]) -> None:
    policy, teacher = pair(tiny, REWARD, torch.float64, "qwen2")
    rollouts, rewards = some_rollouts()
    step, stages = prepared(policy, teacher, rollouts, REWARD, 1)
    with torch.no_grad():
        shaped = [
            rewards.flatten()[r].item()
            + 0.3
            * (own_logprobs(teacher.model, rollouts, r) - own_logprobs(policy.model, rollouts, r))
            .sum()
            .item()
            for r in range(4)
        ]
    half = [(shaped[0] - shaped[1]) / 2, (shaped[2] - shaped[3]) / 2]
    expected = [half[0], -half[0], half[1], -half[1], 0.0, 0.0]
    assert step.coefficients.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert step.coefficients.kd_weight.tolist() == [0.0] * 6
    assert list(stages.seconds) == ["score"]


def test_correction_is_measured_over_all_tokens(tiny: Callable[..., Any]) -> None:
    """The sampler gave the first token of every completion a quarter of the trainer's chance."""
    rollouts, _ = some_rollouts()
    policy, _ = pair(tiny, PRESETS["grpo"], torch.float64, "qwen2")
    with torch.no_grad():
        sampled = [own_logprobs(policy.model, rollouts, r) for r in range(6)]
    for logprobs in sampled:
        logprobs[0] -= torch.tensor(4.0).log()
    rollouts = replace(rollouts, logprobs=sampled)
    share = 5 / (4 + 9 + 1 + 5 + 2)  # of the completions with a reward
    for mode, weight in (("truncate", 2.0), ("mask", 0.0)):
        method = replace(PRESETS["grpo"], sampler_correction=mode)
        step, _ = prepared(policy, None, rollouts, method, 1)
        assert step.coefficients.old_logprobs is None
        for r in WITH_REWARD:
            expected = [weight] + [1.0] * (len(sampled[r]) - 1)
            assert step.coefficients.sampler_weights[r].tolist() == pytest.approx(
                expected, rel=1e-5
            )
        assert step.metrics["sampler_limited"] == pytest.approx(share)
        assert step.metrics["sampler_weight_mean"] == pytest.approx(1 + share * (weight - 1))
        assert step.metrics["sampler_mismatch_max"] == pytest.approx(1.3863, abs=1e-4)
