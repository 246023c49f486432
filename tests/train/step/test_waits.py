"""Where a step waits for a GPU: every wait is listed here with its reason, and there is no other.

On a pretended GPU, with the PyTorch row work of the head: update() with two packs, from sending the
first one to the metrics of the step.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_train.batch import OUTCOMES, Batch, Example, Rollouts, Verdicts
from kdrl_train.config import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.method.schedules import History
from kdrl_train.model import attention
from kdrl_train.model.lora import inject
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder import log
from kdrl_train.start.optimizer import make_optimizer
from kdrl_train.step.run import Position
from kdrl_train.step.samples import SampleRecorder
from kdrl_train.step.update import update
from tests.kernels.test_waits import COMPACT, SKETCH
from tests.pretended_gpu import Event, move, pretend

BETA = ScheduleConfig(initial=0.5, final=0.5)
PACKS = 2
Waits = Counter[str]
SETTLE = "kdrl_train/runfolder/log.py Stages.settle: Event.synchronize"
UPDATE = Waits(
    {
        # before the ranks meet, so that no rank counts this wait as one for other ranks
        SETTLE: 1,
        # the loss, and the sums that the metrics are made of, together
        "kdrl_train/ranks.py World.sum: to": 1,
        # a norm that is not finite must stop the run before the weights change
        "kdrl_train/step/update.py clip: _local_scalar_dense": 1,
    }
)
"""Of each update, however many packs it has."""
STEP = Waits({SETTLE: 1})
"""The time of the stages, at the end of each step."""
SAMPLES = Waits({"kdrl_train/step/samples.py SampleRecorder._numbers: to": 1})
"""What the teacher says of the completions that are written down, at the end of each step."""
SCORES = Waits({"kdrl_train/step/score.py score_packs: to": 2})
"""Log-probabilities that decide coefficients: once for those of all packs, once for the sums."""
IDLE = Waits({what: PACKS * count for what, count in COMPACT.items()})
"""Of each chunk in which rows may be left out, one a pack here."""
SKETCHED = Waits({what: PACKS * count for what, count in SKETCH.items()})
"""Of each chunk of a sketched head without flat rows."""


def _batch(rewards: list[list[float]]) -> Batch:
    """Return four completions of two prompts."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (3, 7), (4, 2), (4, 8)]
    ids = [torch.randint(2, 64, (p + c,), generator=draw) for p, c in sizes]
    rollouts = Rollouts(
        prompt_ids=[x[:p] for x, (p, _) in zip(ids, sizes, strict=True)],
        completion_ids=[x[p:] for x, (p, _) in zip(ids, sizes, strict=True)],
        logprobs=[torch.full((c,), -5.0) for _, c in sizes],
        truncated=torch.zeros(4, dtype=torch.bool),
        texts=[""] * 4,
    )
    flat = [reward for group in rewards for reward in group]
    verdicts = Verdicts(rewards=flat, outcomes=[OUTCOMES[int(reward < 1)] for reward in flat])
    examples = [Example(str(i), "", "") for i in range(4)]
    return Batch(examples, rollouts, verdicts, torch.tensor(rewards), [None] * 4, 0)


@pytest.fixture
def waits_of(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Waits]:
    """waits_of(method, rewards=[[1, 0], [0, 1]], lora=None, sketch=None, **optim) -> what waited in
    the first step."""
    gpu = pretend(monkeypatch)
    events = SimpleNamespace(is_available=lambda: True, Event=Event)
    monkeypatch.setattr(log, "torch", SimpleNamespace(cuda=events))

    def measure(
        method: MethodConfig,
        rewards: list[list[float]] | None = None,
        lora: LoraConfig | None = None,
        sketch: kk.Sketch | None = None,
        **optim: Any,
    ) -> Waits:
        config = TrainConfig(
            out=tmp_path / "run",
            steps=3,
            model=ModelConfig(policy="policy", teacher="teacher"),
            data=DataConfig(path="task.jsonl"),
            sampling=SamplingConfig(prompts_per_step=2, group_size=2, max_new_tokens=8),
            method=method,
            optim=OptimConfig(micro_batch_tokens=24, **optim),
            engine=EngineConfig(max_sampler_mismatch=9.0),
        )
        models = [tiny(family, seed=1) for family in ("qwen2", "llama")]
        for model in models:
            model.set_attn_implementation(attention.NAME)
        if lora is not None:
            inject(models[0], lora, seed=0)
        with gpu:
            policy = Policy(move(models[0]), method, sketch=sketch)
            teacher = Teacher(move(models[1]))
            run: Any = SimpleNamespace(
                config=config,
                world=ALONE,
                policy=policy,
                teachers=Teachers(("default",), {0: teacher}),
                optimizer=make_optimizer(config.optim, policy.parameters()),
                history=History(),
                prefetch=None,
                position=Position(0),
                stop_if_signalled=lambda: None,
                waited=lambda *_: None,
            )
            stages, recorder = log.Stages(), SampleRecorder(4, 2)
            gpu.waits.clear()
            update(run, _batch(rewards or [[1.0, 0.0], [0.0, 1.0]]), 0, stages, recorder)
            recorder._numbers()
            stages.metrics(22)
        return gpu.waits

    return measure


@pytest.mark.parametrize("kd", ["k2", "rkl", "topk_rkl"])
def test_a_step_of_kdrl(kd: str, waits_of: Callable[..., Waits]) -> None:
    assert waits_of(MethodConfig(kd=kd, kd_coef=BETA)) == UPDATE + STEP + SAMPLES


def test_a_step_of_grpo(waits_of: Callable[..., Waits]) -> None:
    assert waits_of(PRESETS["grpo"]) == UPDATE + STEP


def test_a_step_in_which_a_group_has_no_signal(waits_of: Callable[..., Waits]) -> None:
    """Its rows are left out of two matrix products, which is worth a wait."""
    assert waits_of(PRESETS["grpo"], [[1.0, 0.0], [1.0, 1.0]]) == UPDATE + STEP + IDLE


def test_a_step_of_two_updates(waits_of: Callable[..., Waits]) -> None:
    """Completions are scored first. A clipped token is distilled all the same: none is left out."""
    kdrl = MethodConfig(kd="k2", kd_coef=BETA)
    expected = UPDATE + UPDATE + STEP + SCORES + SAMPLES
    assert waits_of(kdrl, updates_per_rollout=2) == expected


def test_a_step_whose_sampler_is_corrected(waits_of: Callable[..., Waits]) -> None:
    """The correction may give a token a weight of 0; the packer counts those that count."""
    method = MethodConfig(kd="k2", kd_coef=BETA, sampler_correction="mask", sampler_cap=1.5)
    assert waits_of(method) == UPDATE + STEP + SCORES + SAMPLES


def test_a_step_whose_teacher_is_a_reward(waits_of: Callable[..., Waits]) -> None:
    assert waits_of(PRESETS["reward_shaping"]) == UPDATE + STEP + SCORES + SAMPLES


@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_a_step_of_another_policy_gradient(name: str, waits_of: Callable[..., Waits]) -> None:
    assert waits_of(PRESETS[name]) == UPDATE + STEP


def test_a_step_that_chooses_its_rows(waits_of: Callable[..., Waits]) -> None:
    """Which rows it distils is not known before."""
    assert waits_of(PRESETS["kdrl_sign_gate"]) == UPDATE + STEP + SAMPLES + IDLE


def test_a_step_of_adapters(waits_of: Callable[..., Waits]) -> None:
    """They are on all layers and on the head."""
    method = MethodConfig(kd="rkl", kd_coef=BETA)
    adapters = LoraConfig(rank=2, targets=("all-linear", "lm_head"))
    assert waits_of(method, lora=adapters) == UPDATE + STEP + SAMPLES


def test_a_step_of_a_sketched_head(waits_of: Callable[..., Waits]) -> None:
    waits = waits_of(PRESETS["grpo"], sketch=kk.Sketch(flat=math.inf))
    assert waits == UPDATE + STEP + SKETCHED
