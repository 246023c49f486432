"""Methods beyond the paper's, in the whole loop: presets, schedules, several updates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_train.config import EvalConfig, OptimConfig, TrainConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.method.schedules import budgeted
from kdrl_train.model.policy import Policy, Teacher
from tests.train.test_train import METRICS, run, weights, without_times

SCORED = {"seconds_score", "tokens_per_s_score"}
TAUGHT = {"seconds_teacher", "tokens_per_s_teacher"}
"""Here the teacher reads in the scoring pass."""
MEASURED = ("loss", "grad_norm", "kl_teacher", "entropy")
HELD_BUDGET = ScheduleConfig(
    kind="kl_budget", initial=0.1, target_kl=2.0, gain=0.4, bounds=(0.05, 0.3)
)
PLATEAU = ScheduleConfig(kind="switch", initial=1.0, final=0.0, patience=1, min_gain=1.0)
UPDATES = OptimConfig(learning_rate=3e-2, micro_batch_tokens=64, updates_per_rollout=4)


def at_step(name: str, steps: int) -> MethodConfig:
    """A preset of two switches, with their step."""
    method = PRESETS[name]
    kd, policy = (replace(s, steps=steps) for s in (method.kd_coef, method.policy_coef))
    return replace(method, kd_coef=kd, policy_coef=policy)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "name",
    ["plateau", *(pytest.param(x, marks=pytest.mark.slow) for x in ("kl budget", "updates"))],
)
def test_resumed_run_has_the_values_of_the_uninterrupted_one(
    config: Callable[..., TrainConfig], name: str
) -> None:
    every_second = EvalConfig(data=config().data, every=2, samples=1, max_problems=2)
    settings: dict[str, Any] = {
        "kl budget": {"method": MethodConfig(kd="rkl", kd_coef=HELD_BUDGET), "steps": 4},
        "plateau": {
            "method": MethodConfig(
                kd_coef=PLATEAU, policy_coef=replace(PLATEAU, initial=0.0, final=1.0)
            ),
            "eval": every_second,
            "steps": 5,
        },
        "updates": {
            "method": replace(PRESETS["kdrl"], sampler_correction="truncate"),
            "optim": UPDATES,
        },
    }[name]
    whole, parts = config("whole", **settings), config("parts", **settings)
    expected = run(whole)
    run(replace(parts, steps=1))
    rows = run(replace(parts, resume=True))
    if name == "plateau":  # the first run measured its last step, which is no second one
        assert "eval_avg_at_k" in rows[0]
        rows[0] = {k: v for k, v in rows[0].items() if not k.startswith("eval_")}
    assert without_times(rows) == without_times(expected)
    assert same(weights(parts.out / "model"), weights(whole.out / "model"))
    if name == "kl budget":
        kl = [row["kl_teacher"] for row in expected]
        assert [r["kd_coef"] for r in rows] == [budgeted(HELD_BUDGET, kl[:s]) for s in range(4)]
        assert len({row["kd_coef"] for row in rows}) > 2
    if name == "plateau":  # measured after steps 2 and 4, never better by 100 points
        assert [row["kd_coef"] for row in rows] == [1.0, 1.0, 1.0, 1.0, 0.0]
        assert [row["policy_coef"] for row in rows] == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_distillation_then_rl(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(method=at_step("opd_then_rl", 1), steps=2)
    first = run(replace(settings, steps=1))[0]
    distilled = run(config("distilled", method=PRESETS["kd_rkl"], steps=1))[0]
    for key in MEASURED:
        assert first[key] == pytest.approx(distilled[key], rel=1e-6), key
    assert (first["kd_share"], first["kd_coef"], first["policy_coef"]) == (1.0, 1.0, 0.0)
    one = weights(settings.out / "model")
    theirs = weights(config("distilled").out / "model")
    assert all((one[name] - theirs[name]).abs().max() < 1e-6 for name in one)

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "forward", refuse)
    second = run(replace(settings, resume=True))[1]
    assert (second["kd_share"], second["kd_coef"], second["policy_coef"]) == (0.0, 0.0, 1.0)
    assert second["kl_teacher"] is None
    assert second["grad_norm"] > 1e-3


@pytest.mark.parametrize("name", ["kdrl", "opd_then_rl", "reward_shaping"])
def test_changing_only_the_teacher_changes_the_update(
    config: Callable[..., TrainConfig], name: str
) -> None:
    rows, after = [], []
    for teacher in ("teacher", "other_teacher"):
        settings = config(teacher, teacher=teacher, steps=1, method=PRESETS[name])
        rows += run(settings)
        after.append(weights(settings.out / "model"))
    for key in ("reward", "response_length", "entropy", "kd_coef"):
        assert rows[0][key] == rows[1][key]
    assert rows[0]["kl_teacher"] != rows[1]["kl_teacher"]
    assert rows[0]["grad_norm"] != rows[1]["grad_norm"]
    moved = "model.layers.0.mlp.up_proj.weight"
    assert (after[0][moved] - after[1][moved]).abs().max() > 1e-6


def test_the_student_as_its_own_teacher_adds_nothing(config: Callable[..., TrainConfig]) -> None:
    itself = {"teacher": "student", "steps": 1}
    distilled = run(config("opd", method=PRESETS["opd_then_rl"], **itself))[0]
    assert distilled["kl_teacher"] == pytest.approx(0, abs=1e-6)
    assert distilled["grad_norm"] < 1e-5
    mixture = replace(PRESETS["kd_rkl"], kd="rkl+fkl", fkl_share=0.3)
    mixed = run(config("mixed", method=mixture, **itself))[0]
    assert mixed["kl_teacher"] == pytest.approx(0, abs=1e-6)
    assert mixed["grad_norm"] < 1e-5
    shaped = run(config("shaped", method=PRESETS["reward_shaping"], **itself))[0]
    plain = run(config("plain", method=PRESETS["grpo"], steps=1))[0]
    assert shaped["kl_teacher"] == pytest.approx(0, abs=1e-6)
    assert shaped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    assert plain["grad_norm"] > 1e-2
    strong = replace(PRESETS["reward_shaping"], kd_coef=ScheduleConfig(initial=0.5, final=0.5))
    other = run(config("other", method=strong, steps=1))[0]
    assert other["kl_teacher"] > 0.1
    assert other["grad_norm"] != pytest.approx(plain["grad_norm"], rel=2e-2)


def test_reward_shaping_has_no_term_in_the_loss(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher runs once a row, before the update; where no completion is rewarded never."""
    calls: list[bool] = []
    forward = Teacher.forward

    def counted(self: Teacher, *args: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(self, *args)

    monkeypatch.setattr(Teacher, "forward", counted)
    (row,) = run(config(method=PRESETS["reward_shaping"], steps=1))
    assert set(row) == (METRICS - TAUGHT) | SCORED
    assert (row["kd_coef"], row["kd_share"], row["clip_fraction"]) == (2e-3, 1.0, 0.0)
    assert calls
    assert not any(calls)
    calls.clear()
    masked = replace(PRESETS["reward_shaping"], kd_mask="wrong")
    (row,) = run(config("right", reward="always_right", method=masked, steps=1))
    assert not calls
    assert (row["kd_share"], row["grad_norm"]) == (0.0, 0.0)


def test_the_default_costs_no_extra_pass(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gradient: list[bool] = []
    forward = Policy.forward

    def counted(self: Policy, *args: Any) -> Any:
        with_gradient.append(torch.is_grad_enabled())
        return forward(self, *args)

    monkeypatch.setattr(Policy, "forward", counted)
    run(config(steps=1))
    assert with_gradient
    assert all(with_gradient)
    with_gradient.clear()
    run(config("updates", steps=1, optim=UPDATES))
    assert 0 < with_gradient.count(False) <= with_gradient.count(True)


def test_several_updates_of_one_rollout(config: Callable[..., TrainConfig]) -> None:
    """At this learning rate the second update is far off-policy; the sampler mismatch is still that
    of the weights it had."""
    once = replace(UPDATES, updates_per_rollout=1)
    rows = {n: run(config(str(n), steps=1, optim=o))[0] for n, o in ((1, once), (4, UPDATES))}
    assert rows[1]["clip_fraction"] == 0.0
    assert rows[4]["clip_fraction"] > 0.05
    assert rows[4]["sampler_mismatch_max"] < 1e-4
    for key in ("reward", "response_length", "learning_rate", "kd_coef"):
        assert rows[4][key] == rows[1][key]
    still = replace(UPDATES, learning_rate=1e-12)
    row = run(config("still", steps=1, optim=still))[0]
    assert row["clip_fraction"] == 0.0
    for key in ("kl_teacher", "entropy", "k2", "kd_share"):  # every token is counted once
        assert row[key] == pytest.approx(rows[1][key], rel=1e-5), key


def test_updates_learn_from_their_own_groups_alone(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four updates of one group each: the packed rows of an update hold its completions only."""
    seen: list[tuple[set[int], float]] = []
    forward = Policy.forward

    def noted(self: Policy, batch: Any, normalizer: Tensor, teacher: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append((set(batch.rollout.tolist()), normalizer.item()))
        return forward(self, batch, normalizer, teacher)

    monkeypatch.setattr(Policy, "forward", noted)
    (row,) = run(config(steps=1, optim=UPDATES))
    groups = [{r // 4 for r in completions} for completions, _ in seen]
    assert all(len(group) == 1 for group in groups)
    order = [group.pop() for group in groups]
    assert order == sorted(order)
    assert set().union(*(completions for completions, _ in seen)) == set(range(16))
    tokens = {group: normalizer for group, (_, normalizer) in zip(order, seen, strict=True)}
    assert sum(tokens.values()) == 16 * row["response_length"]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_faithful_sampler_needs_no_correction(
    config: Callable[..., TrainConfig], mode: str
) -> None:
    plain = run(config("plain", steps=1))[0]
    method = replace(config().method, sampler_correction=mode)
    row = run(config("corrected", steps=1, method=method))[0]
    assert set(row) == METRICS | SCORED | {"sampler_weight_mean", "sampler_limited"}
    assert row["sampler_weight_mean"] == pytest.approx(1.0, abs=1e-4)
    assert row["sampler_limited"] == 0.0
    for key in MEASURED:
        assert row[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-5), key


def test_a_teacher_of_undecided_groups_only(config: Callable[..., TrainConfig]) -> None:
    adaptive = ScheduleConfig(kind="reward_adaptive", initial=0.5)
    method = MethodConfig(kd="rkl", kd_coef=adaptive)
    row = run(config(steps=1, method=method))[0]
    assert 0 < row["kd_coef"] < 0.5
    assert row["kd_share"] > 0
    decided = run(config("right", reward="always_right", steps=1, method=method))[0]
    assert (decided["kd_coef"], decided["kd_share"], decided["grad_norm"]) == (0.0, 0.0, 0.0)
