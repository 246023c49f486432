"""diagnostics: the two gradients add up to that of the step, and measuring changes nothing."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import kdrl_kernels as kk
from kdrl_train import train
from kdrl_train.config import (
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.ranks import World
from kdrl_train.runfolder.log import read_records
from kdrl_train.step.gradient_split import gradient_split
from tests.train import scripted_rewards
from tests.train.ranks import on_ranks

NAMES = ("rl_grad_norm", "kd_grad_norm", "rl_kd_cosine")
BETA = 0.3


def batch() -> PackedBatch:
    """Two sequences of 9 tokens in a row, of which 6 each carry a loss."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 258, (1, 18), generator=draw)
    rows = torch.tensor([*range(2, 8), *range(11, 17)])
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(9).repeat(2)[None],
        loss_index=rows,
        tokens=ids[0, rows + 1],
        rollout=torch.tensor([0] * 6 + [1] * 6),
        sampled_logprobs=torch.full((12,), -1.0),
        advantages=torch.tensor([1.0] * 6 + [-0.5] * 6),
        token_weights=torch.ones(12),
        kd_weight=torch.full((12,), BETA),
        lengths=(9, 9),
        needs_teacher=True,
    )


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.flatten() for p in parameters])


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig(),
        MethodConfig(kd_baseline="kl"),
        MethodConfig(kd="rkl"),
        MethodConfig(kd="rkl+fkl", fkl_share=0.3),
    ],
)
def test_the_two_gradients_add_up(tiny: Callable[..., Any], method: MethodConfig) -> None:
    policy = Policy(tiny("qwen2", seed=1), method)
    teacher = Teacher(tiny("llama", seed=2))
    head, twelve = teacher(batch()), torch.tensor(12.0)
    policy(batch(), twelve, head).loss.backward()
    kept = [p.grad for p in policy.parameters()]
    whole, random = flat(kept).double(), torch.get_rng_state()
    split = gradient_split(policy, batch(), twelve, head)
    assert tuple(split) == NAMES
    rl, kl, cosine = split.values()
    assert rl**2 + kl**2 + 2 * rl * kl * cosine == pytest.approx((whole @ whole).item(), rel=1e-4)
    assert -1 < cosine < 1
    # what was accumulated is where it was, and as it was
    assert all(p.grad is k for p, k in zip(policy.parameters(), kept, strict=True))
    assert torch.equal(flat(kept).double(), whole)
    assert torch.equal(torch.get_rng_state(), random)
    policy.zero_grad()
    alone = policy.objective_alone
    policy(batch(), twelve, None, alone).loss.backward()
    assert flat(p.grad for p in policy.parameters()).norm().item() == pytest.approx(rl, rel=1e-5)


@pytest.mark.parametrize("sign", [-1, 1])
def test_cosine_of_what_pulls_together_and_apart(tiny: Callable[..., Any], sign: int) -> None:
    """With the advantages -l and l the policy gradient is that of k2, but for beta and the sign."""
    policy, row = Policy(tiny("qwen2", seed=1), MethodConfig(kd="k2")), batch()
    head, twelve = Teacher(tiny("llama", seed=2))(row), torch.tensor(12.0)
    lq = kk.linear_logprobs(head.hidden, head.weight, row.tokens).logprobs
    log_ratio = policy(row, twelve, head).logprobs - lq
    split = gradient_split(policy, replace(row, advantages=sign * log_ratio), twelve, head)
    assert split["rl_kd_cosine"] == pytest.approx(-sign, abs=1e-4)
    assert split["kd_grad_norm"] == pytest.approx(BETA * split["rl_grad_norm"], rel=1e-4)


def test_a_sketched_head_is_measured_without_its_noise(tiny: Callable[..., Any]) -> None:
    policy, row = Policy(tiny("qwen2", seed=1), MethodConfig(kd="k2")), batch()
    head, twelve = Teacher(tiny("llama", seed=2))(row), torch.tensor(12.0)
    exact = gradient_split(policy, row, twelve, head)
    policy.sketch = sketch = kk.Sketch(threshold=0.5, flat=math.inf)
    assert gradient_split(policy, row, twelve, head) == exact
    assert policy.sketch is sketch


def norms_of_shards(policy: Policy, head: kk.TeacherHead, _world: World) -> None:
    """Check one of two ranks, which hold half of the weights each and see the same row."""
    twelve = torch.tensor(12.0)
    whole = gradient_split(policy, batch(), twelve, head)
    fully_shard(policy)
    assert gradient_split(policy, batch(), twelve, head) == pytest.approx(whole, rel=1e-5)
    assert all(p.grad is None for p in policy.parameters())


def test_shards_have_the_norms_of_the_whole(tiny: Callable[..., Any]) -> None:
    policy = Policy(tiny("qwen2", seed=1), MethodConfig(kd="k2"))
    head = Teacher(tiny("llama", seed=2))(batch())
    assert on_ranks(2, partial(norms_of_shards, policy, head)) == [None, None]


def test_a_term_that_is_not_there_has_no_norm(tiny: Callable[..., Any]) -> None:
    teacher, twelve = Teacher(tiny("llama", seed=2)), torch.tensor(12.0)
    for method, present in (
        (MethodConfig(kd=None), "rl_grad_norm"),
        (MethodConfig(kd="rkl", policy="off"), "kd_grad_norm"),
    ):
        policy = Policy(tiny("qwen2", seed=1), method)
        split = gradient_split(policy, batch(), twelve, teacher(batch()) if method.kd else None)
        assert split.pop(present) > 0
        assert set(split.values()) == {None}


def settings(folders: dict[str, Path], out: Path, every: int) -> TrainConfig:
    return TrainConfig(
        out=out,
        steps=3,
        model=ModelConfig(
            policy=str(folders["student"]), teacher=str(folders["teacher"]), device="cpu"
        ),
        data=DataConfig(path=str(folders["task"])),
        sampling=SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=6),
        reward=RewardConfig(function=f"{scripted_rewards.__name__}:early_bytes", workers=1),
        method=MethodConfig(kd="rkl", kd_coef=ScheduleConfig(initial=BETA, final=BETA)),
        optim=OptimConfig(learning_rate=1e-3, micro_batch_tokens=64),
        log=LogConfig(diagnostics_every=every),
    )


def test_measuring_leaves_the_run_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for every in (0, 2):
        folder = train.main(
            settings(folders, tmp_path / str(every), every), Console(file=io.StringIO())
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        runs.append((read_records(folder), flat(model.parameters())))
    (plain, weights), (measured, weights_measured) = runs
    assert torch.equal(weights, weights_measured)
    assert [all(name in row for name in NAMES) for row in measured] == [True, False, True]
    assert "seconds_diagnostics" in measured[0]
    times = ("seconds", "tokens_per_s", "peak_memory_bytes", *NAMES)
    for with_numbers, without in zip(measured, plain, strict=True):
        for key in (k for k in without if not k.startswith(times)):
            assert with_numbers[key] == without[key], key
