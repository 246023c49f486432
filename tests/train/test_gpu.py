"""The trainer on a GPU in bfloat16: one process, one rank of FSDP2, the attention and the engines.

With an absolute scale in bfloat16: what is compared are log-probabilities near -5 nats.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_train.config import EngineConfig, ModelConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model import attention
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.runfolder.log import Stages, read_records
from tests.kernels.test_no_sync import set_mode
from tests.train.coefficients import coefficients_of
from tests.train.model.test_policy import some_rollouts
from tests.train.ranks import torchrun
from tests.train.test_train import run

pytestmark = pytest.mark.gpu
Config = Callable[..., TrainConfig]
LENGTHS = (5, 1, 17, 30, 16, 3, 31)


def on_gpu(config: TrainConfig, **model: Any) -> TrainConfig:
    return replace(config, model=replace(config.model, device="cuda", dtype="bfloat16", **model))


def test_steps_are_those_of_a_cpu(config: Config) -> None:
    rows = run(on_gpu(config("gpu")))
    exact = run(config("cpu", steps=1))
    assert len(rows) == 3
    assert rows[0]["kl_teacher"] == pytest.approx(exact[0]["kl_teacher"], rel=0.1)
    for row in rows:
        assert row["sampler_mismatch_mean"] < 0.05
        assert row["peak_memory_bytes"] > 0


def test_one_rank_of_fsdp2_is_one_process(config: Config) -> None:
    whole, sharded = on_gpu(config("whole")), on_gpu(config("sharded"))
    run(whole)
    save_yaml(sharded, sharded.out.with_suffix(".yaml"))
    torchrun(1, "-m", "kdrl_train", "train", "--config", str(sharded.out.with_suffix(".yaml")))
    first, other = read_records(sharded.out)[0], read_records(whole.out)[0]
    for name in ("loss", "grad_norm", "kl_teacher", "entropy"):
        assert first[name] == pytest.approx(other[name], rel=0.1, abs=1e-3), name


@pytest.mark.parametrize("offload", ["offload_policy", "offload_teacher"])
def test_offloading_changes_nothing(config: Config, offload: str) -> None:
    settings = on_gpu(config(), **{offload: True})
    save_yaml(settings, settings.out.with_suffix(".yaml"))
    torchrun(1, "-m", "kdrl_train", "train", "--config", str(settings.out.with_suffix(".yaml")))
    assert len(read_records(settings.out)) == 3


def test_the_variable_length_kernel_computes_what_padded_batches_do(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the policy, whose float32 weights run under autocast."""
    model = tiny("llama", hidden=64, num_attention_heads=2, head_dim=32).cuda()
    model.set_attn_implementation(attention.NAME)
    policy = Policy(model, MethodConfig(kd=None), compute_dtype=torch.bfloat16)
    ids = torch.randint(2, 258, (1, sum(LENGTHS)), device="cuda")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].cuda()
    calls = []
    kernel = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *args: calls.append(0) or kernel(*args))
    with torch.no_grad():
        result = policy.hidden(ids, positions, None, LENGTHS).float()
        monkeypatch.setattr(attention, "_has_varlen", lambda _query: False)
        expected = policy.hidden(ids, positions, None, LENGTHS).float()
    assert len(calls) == 2  # layers
    error = (result - expected).norm() / expected.norm()
    assert error < 0.02


def test_continuous_batching_agrees_with_the_trainer(config: Config) -> None:
    base = on_gpu(config(steps=2))
    for row in run(replace(base, engine=replace(base.engine, kind="continuous"))):
        assert row["sampler_mismatch_mean"] < 0.05


def test_prefetched_rollouts_agree_with_the_trainer(config: Config) -> None:
    settings = on_gpu(
        config(steps=4, save_every=1, save_async=True, engine=EngineConfig(staleness=1))
    )
    rows = run(settings)
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    for row in rows[:3]:
        assert row["sampler_mismatch_mean"] < 0.05
    assert sorted(path.name for path in (settings.out / "checkpoints").glob("step_*")) == [
        "step_000003",
        "step_000004",
    ]


def test_liger_layers_agree(config: Config, folders: dict[str, Path]) -> None:
    pytest.importorskip("liger_kernel")
    model = ModelConfig(policy=str(folders["llama"]), teacher=None, device="cuda", liger=True)
    settings = replace(config(), model=model, method=MethodConfig(kd=None))
    plain = replace(
        settings, out=settings.out.with_name("plain"), model=replace(model, liger=False)
    )
    ours, theirs = run(settings)[0], run(plain)[0]
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)


def test_no_pack_is_waited_for(tiny: Callable[..., Any], device: str) -> None:
    """The proof of tests/train/step/test_waits.py, whose GPU is a pretended one."""
    config = {"hidden": 64, "num_attention_heads": 2, "head_dim": 32}
    models = [tiny(family, **config).to(device) for family in ("qwen2", "llama")]
    for model in models:
        model.set_attn_implementation(attention.NAME)
    method = MethodConfig(kd="rkl", kd_coef=ScheduleConfig(initial=0.5, final=0.5))
    policy = Policy(models[0], method, compute_dtype=torch.bfloat16)
    teacher = Teacher(models[1], compute_dtype=torch.bfloat16)
    rollouts, rewards = some_rollouts()
    normalizer = torch.tensor(10.0).to(device)

    def step() -> None:
        for batch in pack(rollouts, coefficients_of(rewards, method), 24):
            packed = batch.to(device)
            policy(packed, normalizer, teacher(packed)).loss.backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    set_mode("error")
    try:
        step()
    finally:
        set_mode("default")


def test_a_stage_lasts_as_long_as_its_work_on_the_gpu() -> None:
    stages, tick = Stages(), torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    with stages("teacher"):
        torch.cuda._sleep(10**9)  # clock cycles, half a second or so
    queued = time.perf_counter() - start
    with stages("update"):
        tick += 1
    stages.settle()
    assert queued < 0.1 < stages.seconds["teacher"]
    assert stages.seconds["update"] < 0.1
