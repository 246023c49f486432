"""A policy with a sketched head: its gradient does not depend on how completions are packed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_train.config import ModelConfig, OptimConfig, TrainConfig
from kdrl_train.method.metrics import token_means
from kdrl_train.method.presets import PRESETS
from tests.train.model.test_policy import METHODS, pair, step_gradient
from tests.train.test_train import run


def test_the_setting_reaches_the_loss_and_the_log(config: Callable[..., TrainConfig]) -> None:
    base = config(steps=2, method=PRESETS["grpo"])
    exact = run(replace(base, out=base.out / "exact"))
    model = replace(base.model, head_backward="sketch", head_threshold=0.01)
    rows = run(replace(base, out=base.out / "sketch", model=model))
    assert "sketch_noise" not in exact[0]
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], abs=1e-6)
    assert 0 < rows[0]["sketch_noise"] < 1
    assert 1 < rows[0]["sketch_entries"] <= 102
    assert rows[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=rows[0]["sketch_noise"])
    assert rows[0]["grad_norm"] != exact[0]["grad_norm"]


@pytest.mark.parametrize("name", ["rkl sequence"])
def test_the_gradient_does_not_depend_on_packing(tiny: Callable[..., Any], name: str) -> None:
    gradients = {}
    for budget, seed in ((12, 3), (1000, 3), (1000, 4)):
        policy, teacher = pair(tiny, METHODS[name], torch.float64, "qwen2")
        policy.sketch = kk.Sketch(threshold=0.1)
        policy.draw_sketch(seed)
        _, parts, _ = step_gradient(policy, teacher, METHODS[name], budget)
        gradients[budget, seed] = torch.cat([part.flatten() for part in parts])
    size = gradients[12, 3].abs().max().item()
    torch.testing.assert_close(gradients[1000, 3], gradients[12, 3], rtol=0, atol=1e-10 * size)
    assert (gradients[1000, 4] - gradients[12, 3]).abs().max() > 1e-3 * size


def test_settings_that_do_not_fit_are_refused(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match="head_threshold must be in"):
        ModelConfig(head_threshold=2.0)
    optim = OptimConfig(head_impl="reference")
    with pytest.raises(ValueError, match='head_backward must be "exact" with'):
        config(model=ModelConfig(head_backward="sketch"), optim=optim)


def test_means_of_the_sketch() -> None:
    sums = {"entries": 60.0, "tokens": 4.0, "sketch_variance_sum": 0.5, "sketch_square_sum": 8.0}
    means = token_means({name: torch.tensor(value) for name, value in sums.items()})
    assert (means["sketch_entries"], means["sketch_noise"]) == (15.0, 0.25)
    nothing = token_means({name: torch.tensor(0.0) for name in sums} | {"tokens": torch.tensor(4)})
    assert (nothing["sketch_entries"], nothing["sketch_noise"]) == (0.0, None)
