"""Under torchrun rank 0 reads the weights, and every rank gets its shards of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import RankError
from kdrl_train.model import fsdp
from kdrl_train.model import load as models
from kdrl_train.model.probe import probe
from kdrl_train.ranks import World
from kdrl_train.start import preflight
from kdrl_train.start.load import load
from kdrl_train.start.models import tied
from tests.train.ranks import on_processes, on_ranks

Config = Callable[..., TrainConfig]


def load_both(config: TrainConfig, world: World) -> list[str]:
    """List what differs between the sharded models and those of one process.

    Rank 1 may read no file of weights.
    """
    alone = [models.load_teacher(config), models.load_policy(config, None)]
    if not world.main:
        models._read = None
    together = [models.load_teacher(config, world), models.load_policy(config, None, world)]
    wrong = []
    for sharded, whole in zip(together, alone, strict=True):
        assert sharded is not None
        assert whole is not None
        exact = dict(whole.named_parameters())
        for name, parameter in sharded.named_parameters():
            if not isinstance(parameter, DTensor):
                wrong.append(f"{name} is not sharded")
            full = fsdp.full(parameter)
            if full.dtype != exact[name].dtype or not torch.equal(full, exact[name]):
                wrong.append(name)
            if parameter.requires_grad != exact.pop(name).requires_grad:
                wrong.append(f"requires_grad of {name}")
        buffers = dict(sharded.named_buffers())
        for name, buffer in whole.named_buffers():
            if buffers[name].dtype != buffer.dtype or not torch.equal(buffers[name], buffer):
                wrong.append(name)
        wrong += sorted(exact)
        if tied(sharded) != tied(whole):
            wrong.append("tied")
        if sharded.device != whole.device:
            wrong.append("device")
        if sharded.model.generation_config != whole.model.generation_config:
            wrong.append("generation_config")
    return wrong


@pytest.mark.parametrize(
    ("policy", "teacher", "dtype"),
    [
        ("student", "teacher", "float32"),
        pytest.param("llama", "other_teacher", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_shards_are_those_of_rank_0s_weights(
    config: Config, policy: str, teacher: str, dtype: Any, tmp_path: Path
) -> None:
    base = config(policy=policy, teacher=teacher)
    folder = shutil.copytree(base.model.policy, tmp_path / "two_ends")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}', encoding="utf-8")
    settings = replace(base, model=replace(base.model, policy=str(folder), dtype=dtype))
    assert on_ranks(2, partial(load_both, settings)) == [[], []]


def test_a_folder_without_weights_stops_all_ranks(config: Config, tmp_path: Path) -> None:
    base = config()
    folder = tmp_path / "half"
    folder.mkdir()
    text = (Path(base.model.policy) / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8")
    settings = replace(base, model=replace(base.model, policy=str(folder)))
    for error in on_ranks(2, partial(load, settings)):
        assert isinstance(error, RankError)
        assert "rank 0 stopped with ValueError: model.policy must be a folder with" in str(error)


def run_check(config: TrainConfig, _rank: int) -> int:
    return preflight.main(config)


def test_check_reads_with_sharded_models(config: Config) -> None:
    settings = config()
    assert on_processes(2, partial(run_check, settings)) == [0, 0]
    long = replace(settings, sampling=SamplingConfig(max_new_tokens=300))
    assert on_processes(2, partial(run_check, long)) == [1, 1]


def probe_another(config: TrainConfig, world: World) -> list[str]:
    """Name the checks that fail for a teacher whose own logits are twice those of its head."""
    loaded = load(config, world)
    (teacher,) = loaded.teacher_models.values()
    module = teacher.model
    forward = module.forward

    def twice(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits *= 2
        return out

    module.forward = twice
    with preflight.Verifier(config.reward) as verifier:
        results = preflight.preflight(config, loaded, verifier, world)
    sharded = all(isinstance(p, DTensor) for p in teacher.parameters())
    return [result.name for result in results if not result.passed] + ["whole"] * (not sharded)


def test_another_formula_is_found_through_shards(config: Config) -> None:
    assert on_ranks(2, partial(probe_another, config())) == [["teacher head"]] * 2


def probe_gathered(config: TrainConfig, world: World) -> list[Any]:
    """Probe a policy and read a prompt with it, gathered; then take its gradient, sharded."""
    policy = models.load_policy(config, None, world)
    head = policy.model.get_output_embeddings()
    with fsdp.gathered(policy):
        whole = not isinstance(head.weight, DTensor)
        error = probe(policy, "model.policy")
    ids = torch.arange(2, 12)[None]
    with fsdp.gathered(policy), torch.no_grad():
        logits = policy.model(input_ids=ids, use_cache=False).logits
    sharded = all(isinstance(p, DTensor) for p in policy.parameters())
    policy.call(lambda inner: inner.model(input_ids=ids).logits.logsumexp(dim=2).sum()).backward()
    gradients = [fsdp.full(p.grad).tolist() for p in policy.parameters()]
    return [whole, sharded, error, logits.tolist(), gradients]


def test_a_gathered_model_computes_what_a_whole_one_does(config: Config) -> None:
    settings = config()
    policy = models.load_policy(settings, None)
    exact_error = probe(policy, "model.policy")
    ids = torch.arange(2, 12)[None]
    exact_logits = policy.model(input_ids=ids, use_cache=False).logits
    exact_logits.logsumexp(dim=2).sum().backward()
    for results in on_ranks(2, partial(probe_gathered, settings)):
        whole, sharded, error, logits, gradients = results
        assert (whole, sharded) == (True, True)
        assert error == exact_error
        assert logits == exact_logits.tolist()
        for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
            torch.testing.assert_close(torch.tensor(gradient), parameter.grad, rtol=1e-5, atol=1e-6)
