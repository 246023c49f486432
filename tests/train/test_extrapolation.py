"""A teacher extrapolated from a reference (ExOPD): its gradient, its ranks, and what is refused."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_train import cli
from kdrl_train.batch import Example
from kdrl_train.config import DataConfig, OptimConfig, TrainConfig
from kdrl_train.config.models import LoraConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.model.teachers import Teachers
from kdrl_train.rollouts.routing import require_teachers
from kdrl_train.start.load import LoadedTeacher, require_no_cap, require_reference
from tests.tolerance import relative_error
from tests.train.coefficients import uniform
from tests.train.conftest import EXACT
from tests.train.model.test_policy import some_rollouts
from tests.train.test_train import run
from tests.train.test_two_ranks import alone, assert_same_metrics, together

Config = Callable[..., TrainConfig]
BETA = ScheduleConfig(initial=0.5, final=0.5)


def gradients(policy: Policy, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def papers_loss(policy: Policy, teachers: list[Teacher], strength: float, exact: bool) -> Tensor:
    """lambda · log(q / ref) - log(p / ref) as the advantage of each token, by full logits.

    exact: of every token of the vocabulary by its probability, as its expectation; else of the
    sampled ones, with the target normalised.
    """
    rollouts, _ = some_rollouts()
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids, n = torch.cat([prompt, completion])[None], len(completion)
        lp, lq, ref = (
            model.model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)
            for model in (policy, *teachers)
        )
        target = strength * lq + (1 - strength) * ref
        if exact:
            pull = (lp - target).detach()  # log(p / ref) - lambda · log(q / ref)
            total = total + (lp.detach().exp() * pull * lp).sum()
        else:
            sampled = (lp - target.log_softmax(-1)).gather(1, completion[:, None])
            total = total + sampled.square().sum() / 2
    return 0.5 * total / 27


@pytest.mark.parametrize("kd", ["rkl", "k2"])
@pytest.mark.parametrize("strength", [1.5, 0.5, 1.0])
def test_gradient_is_that_of_the_papers_reward(
    tiny: Callable[..., Any], kd: str, strength: float
) -> None:
    model = tiny("qwen2", seed=1).double()
    policy = Policy(
        model, MethodConfig(policy="off", kd=kd, kd_coef=BETA), compute_dtype=torch.float64
    )
    sizes = {"teacher": (2, 48), "reference": (3, 32)}
    teacher, reference = (
        Teacher(tiny("llama", seed=seed, hidden=H).double(), compute_dtype=torch.float64)
        for seed, H in sizes.values()
    )
    both = {0: teacher, 1: reference}
    teachers = Teachers(("default", "reference"), both, extrapolation=strength)
    rollouts, _ = some_rollouts()
    (batch,) = pack(rollouts, uniform(6, kd_weight=torch.full((6,), 0.5)), 1000)
    out = policy(batch, torch.tensor(27.0), teachers.head(batch))
    expected = papers_loss(policy, [teacher, reference], strength, exact=kd == "rkl")
    ours, theirs = gradients(policy, out.loss), gradients(policy, expected)
    assert relative_error(ours, theirs) < 1e-8
    plain = gradients(policy, papers_loss(policy, [teacher] * 2, 1.0, exact=kd == "rkl"))
    assert (relative_error(theirs, plain) > 0.01) == (strength != 1)


def test_a_pack_that_nobody_distils_runs_neither_model() -> None:
    def fail(_: PackedBatch) -> None:
        raise AssertionError

    teachers: Any = Teachers(("default", "reference"), {0: fail, 1: fail}, extrapolation=2.0)
    rollouts, _ = some_rollouts()
    (batch,) = pack(rollouts, uniform(6), 1000)
    assert teachers.head(batch) is None
    assert teachers.routed == ()
    assert replace(teachers, names=("default", "b", "reference"), several=True).routed == (
        "default",
        "b",
    )


@pytest.fixture
def extrapolated(config: Config, folders: dict[str, Path]) -> Config:
    """config(..., reference="other_teacher"), at lambda 1.5."""

    def make(out: str = "run", reference: str = "other_teacher", **fields: Any) -> TrainConfig:
        base = config(out, **({"method": replace(EXACT, extrapolation=1.5)} | fields))
        place = "self" if reference == "self" else str(folders[reference])
        return replace(base, model=replace(base.model, reference=place))

    return make


def test_a_run_learns_from_beyond_its_teacher(extrapolated: Config, config: Config) -> None:
    (ours,) = run(extrapolated(steps=1))
    (plain,) = run(config("plain", steps=1))
    assert ours.keys() == plain.keys()
    assert ours["kl_teacher"] > 1.05 * plain["kl_teacher"]
    out = extrapolated().out
    assert (out / "teacher.json").exists()
    assert (out / "teacher_reference.json").exists()


@pytest.mark.slow
def test_two_ranks_extrapolate_as_one(extrapolated: Config, folders: dict[str, Path]) -> None:
    optim = OptimConfig(learning_rate=1e-3, micro_batch_tokens=64, updates_per_rollout=2)
    whole, parts = (extrapolated(out, "self", optim=optim, steps=2) for out in ("whole", "parts"))
    assert_same_metrics(together(parts, 2), alone(whole))
    other = replace(whole.model, reference=str(folders["student"]))
    with pytest.raises(ValueError, match=r"model\.reference: self before"):
        run(replace(whole, model=other, resume=True, steps=3))


@pytest.mark.slow
def test_a_resumed_run_keeps_its_reference(extrapolated: Config, folders: dict[str, Path]) -> None:
    settings = extrapolated(steps=1)
    run(settings)
    reference = Path(str(settings.model.reference))
    copy = reference.rename(reference.with_name("kept"))
    try:
        reference.symlink_to(folders["teacher"])
        with pytest.raises(TeacherError, match=r"must be that of .*teacher_reference\.json"):
            run(replace(settings, resume=True, steps=2))
    finally:
        reference.unlink()
        copy.rename(reference)
    assert len(run(replace(settings, resume=True, steps=2))) == 2


def test_the_preset_takes_a_reference() -> None:
    options = ["--preset", "exopd", "--model.reference", "base", "--model.teacher", "expert"]
    config = cli.parse(TrainConfig(), options, "train", "")
    require_reference(config)
    assert (config.method.extrapolation, config.method.policy) == (1.25, "off")
    assert list(config.model.teacher_places) == ["default", "reference"]
    with pytest.raises(ValueError, match=r"model\.reference must be set with a method\.extrap"):
        require_reference(TrainConfig(method=PRESETS["exopd"]))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ({}, {"method": MethodConfig()}, "not without one, got base and 1: set both"),
        ({}, {"method": MethodConfig(kd=None, extrapolation=2.0)}, "method.kd must be a kind of"),
        ({"teacher": "self"}, {}, "model.teacher must be another model than self"),
        ({"teacher": "http://a:1"}, {}, "must be in this process, since a server gives no head"),
        ({"reference": "http://a:1"}, {}, "must be in this process, since a server gives no head"),
        ({"tensor_parallel": 2}, {}, "model.tensor_parallel must be 1, with model.reference"),
        ({"move_teachers": True}, {}, "model.move_teachers must be false"),
        ({}, {"data": DataConfig(teacher_template="{prompt}!")}, "data.teacher_template must be"),
        (
            {"reference": "self", "weights": Path("a"), "lora": LoraConfig(rank=2)},
            {},
            "model.weights must be None with adapters and the reference self",
        ),
    ],
)
def test_what_a_reference_does_not_go_with_is_refused(
    model: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    base = TrainConfig(method=MethodConfig(extrapolation=2.0))
    settings = replace(base.model, **({"teacher": "a", "reference": "base"} | model))
    config = replace(base, model=settings, **more)
    with pytest.raises(ValueError, match=re.escape(message)):
        require_reference(config)


def test_a_reference_teaches_no_problem() -> None:
    base = TrainConfig(method=MethodConfig(extrapolation=2.0))
    model = replace(base.model, teacher="a", teachers={"b": "b"}, reference="base")
    config = replace(base, model=model, data=DataConfig(teacher_column="teacher"))
    example = Example(id="1", prompt="p", gold="g", columns={}, teacher="reference")
    with pytest.raises(ValueError, match=r"must be a teacher of model\.teachers, b, got 'refer"):
        require_teachers([example], config)
    with pytest.raises(ValueError, match=r'nor "reference", got \'reference\''):
        replace(model, teachers={"reference": "b"})


def test_a_soft_cap_is_refused(tiny: Callable[..., Any]) -> None:
    model = Teacher(tiny("gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=16))
    with pytest.raises(ValueError, match=r"model\.reference must have no soft cap"):
        require_no_cap(LoadedTeacher("reference", "model.reference", "place", model))
