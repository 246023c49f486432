"""start.optimizer: an optimiser by its name, whose state survives a checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdrl_train.config import OptimConfig, TrainConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder import checkpoint
from kdrl_train.start.optimizer import make_optimizer


def one_step(config: OptimConfig, steps: int = 1) -> torch.Tensor:
    """Return the weight 1.0 after steps along the gradient 2.0."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(config, [weight])
    for _ in range(steps):
        weight.grad = torch.full((1,), 2.0)
        optimizer.step()
    return weight.detach()


def test_sgd_by_hand() -> None:
    sgd = OptimConfig(name="sgd", learning_rate=0.1)
    assert one_step(sgd).item() == pytest.approx(1 - 0.1 * 2)
    decayed = one_step(replace(sgd, weight_decay=0.5))
    assert decayed.item() == pytest.approx(1 - 0.1 * (2 + 0.5))
    # the second direction is 0.9 · 2 + 2
    heavy = one_step(replace(sgd, momentum=0.9), steps=2)
    assert heavy.item() == pytest.approx(1 - 0.1 * 2 - 0.1 * (0.9 * 2 + 2))


def test_adamw_is_the_default() -> None:
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.5, 0.5))
    assert one_step(config).item() == pytest.approx(1 - 0.1 * 0.5 - 0.1)


def test_frozen_weights_are_left_out() -> None:
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(OptimConfig(), [frozen, trained])
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(trained)]


def test_bitsandbytes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(torch.optim.AdamW):
        pass

    module = SimpleNamespace(PagedAdamW8bit=Small)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=module))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    config = OptimConfig(name="paged_adamw_8bit", learning_rate=0.1, betas=(0.8, 0.9))
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(1))])
    assert type(optimizer) is Small
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    message = r'must be "adamw" or "sgd" with torchrun, got "paged_adamw_8bit"'
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, [], replace(ALONE, launched=True))


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"pip install 'kdrl-kernels\[bitsandbytes\]'"):
        make_optimizer(OptimConfig(name="adamw_8bit"), [torch.nn.Parameter(torch.ones(1))])


def test_momentum_is_of_sgd() -> None:
    with pytest.raises(ValueError, match=r'name must be "sgd" with momentum 0\.9, got "adamw"'):
        OptimConfig(momentum=0.9)
    with pytest.raises(ValueError, match=r"name must be an AdamW with betas \(0\.9, 0\.95\), got"):
        OptimConfig(name="sgd", betas=(0.9, 0.95))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(name="sgd"),
        OptimConfig(name="sgd", momentum=0.9),
        OptimConfig(name="adamw_8bit"),
        OptimConfig(name="paged_adamw_8bit"),
    ],
    ids=lambda config: f"{config.name}-{config.momentum}",
)
def test_state_survives_a_checkpoint(
    tiny: Callable[..., Any], tmp_path: Path, config: OptimConfig
) -> None:
    """Two steps, and two after a checkpoint, are four steps to the bit."""
    if config.name != "sgd":
        pytest.importorskip("bitsandbytes", reason="it is not installed")
    config = replace(config, learning_rate=0.01)

    def make(seed: int) -> tuple[Policy, torch.optim.Optimizer]:
        model = tiny("qwen2", seed=seed, hidden=64, tie_word_embeddings=True)
        policy = Policy(model, MethodConfig(kd=None))
        return policy, make_optimizer(config, policy.parameters())

    def train(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            ids = torch.randint(258, (1, 9))
            policy.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    policy, optimizer = make(0)
    train(policy, optimizer)
    state = checkpoint.RunState(step=2, model=policy, optimizer=optimizer, config=TrainConfig())
    checkpoint.save(tmp_path, state)
    train(policy, optimizer)
    other, other_optimizer = make(9)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    checkpoint.load(newest, model=other, optimizer=other_optimizer)
    train(other, other_optimizer)
    for a, b in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
