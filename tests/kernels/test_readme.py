"""The example of kdrl_kernels/README.md runs as it stands, on tiny tensors."""

import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import kdrl_kernels as kk

README = Path(kk.__file__).with_name("README.md").read_text(encoding="utf-8")
N, H, V = 5, 4, 11


def _inputs() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "hidden": randn(N, H).requires_grad_(),
        "weight": randn(V, H).requires_grad_(),
        "tokens": torch.randint(V, (N,), generator=rng),
        "advantages": randn(N),
        "old_logprobs": randn(N) - 2,
        "t_hidden": randn(N, H + 1),
        "t_weight": randn(V + 2, H + 1),
        "base_hidden": randn(N, H),
        "base_weight": randn(V, H),
        "tokens_of_the_step": 2 * N,
        "ranks": 2,
        "model": SimpleNamespace(lm_head=_lora_linear()),
    }


def _lora_linear() -> nn.Module:
    """Return a layer with the names of peft.tuners.lora.Linear, its base frozen, its B not 0."""
    layer = nn.Module()
    layer.base_layer = nn.Linear(H, V, bias=False).requires_grad_(False)
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(H, 2, bias=False)})
    layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, V, bias=False)})
    layer.scaling = {"default": 1.5}
    return layer


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = _inputs()
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names = dict(inputs)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    out, scores = names["out"], names["scores"]
    torch.testing.assert_close(scores.logprobs, out.logprobs)
    assert out.kl.min() > 0
    assert names["means"]["ratio_mean"] == 1
    assert names["means"]["kl_mean"] > 0
    weight, cispo = inputs["weight"], names["cispo"]
    assert weight.grad.abs().sum() > 0
    loss = kk.linear_token_loss(
        inputs["hidden"], weight, inputs["tokens"], cispo, impl="reference"
    ).loss
    ours = kk.linear_token_loss(inputs["hidden"], weight, inputs["tokens"], cispo).loss
    torch.testing.assert_close(ours, loss)
    logits, rivals = inputs["hidden"] @ weight.T, names["rivals"]
    share = sum((logits.gather(1, rivals.clamp(min=0)).exp() * (rivals >= 0)).unbind(1))
    chosen = logits.gather(1, inputs["tokens"][:, None]).squeeze(1)
    expected = torch.log1p(share / chosen.exp()).mean()
    torch.testing.assert_close(names["contrasted"].loss, expected)
    lora = names["lora"]
    A, B = lora.lora_A["default"], lora.lora_B["default"]
    assert A.weight.grad.abs().max() > 0
    assert B.weight.grad.abs().max() > 0
    z = lora.base_layer(inputs["hidden"]) + 1.5 * B(A(inputs["hidden"]))
    expected = z.log_softmax(-1).gather(1, inputs["tokens"][:, None]).squeeze(1)
    torch.testing.assert_close(names["adapted"].logprobs, expected.detach())
    assert "16,384 tokens" in capsys.readouterr().out


def _topk_loss(inputs: dict[str, Any]) -> kk.LossOutput:
    ids = torch.arange(3).expand(N, 3)
    return kk.kdrl_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["tokens"],
        advantages=inputs["advantages"],
        teacher_topk=(ids, torch.full((N, 3), -2.0)),
        objective=kk.Objective(kd="topk_rkl"),
    )


def test_the_metrics_table_names_every_key() -> None:
    inputs = _inputs()
    metrics: set[str] = set()
    objectives = kk.Objective(kd="rkl", entropy_coef=0.1), kk.Objective(kd_baseline="kl")
    for objective, backward in product(objectives, ("exact", "sketch")):
        out = kk.kdrl_loss(
            inputs["hidden"],
            inputs["weight"],
            inputs["tokens"],
            advantages=inputs["advantages"],
            teacher=kk.TeacherHead(inputs["t_hidden"], inputs["t_weight"]),
            objective=objective,
            backward=backward,
        )
        metrics |= out.metrics.keys()
    metrics |= _topk_loss(inputs).metrics.keys()
    section = README.split("## Metrics")[1].split("##")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(metrics)
    assert {name for name in kk.mean_metrics(out.metrics) if name not in metrics} <= set(
        re.findall(r"`(\w+)`", section)
    )


def test_files_that_are_named_exist() -> None:
    folder = Path(kk.__file__).parent
    pages = "".join(page.read_text(encoding="utf-8") for page in folder.rglob("*.md"))
    names = re.findall(r"`(tests/[\w/]+\.py)`", pages)
    assert len(names) > 20
    assert [name for name in names if not (folder.parent / name).is_file()] == []
