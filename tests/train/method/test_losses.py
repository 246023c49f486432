"""losses, own_loss: every policy gradient and choice of tokens by hand-worked numbers."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_kernels import Rows
from kdrl_train import cli
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import load_yaml, save_yaml, update
from kdrl_train.method import presets
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.grpo import group_advantages
from kdrl_train.method.losses import (
    POLICIES,
    TokenCoefficients,
    completion_mean,
    completions_of,
    distilled_rows,
    needs_token_loss,
)
from kdrl_train.method.own_loss import as_declared, load_loss, token_loss
from kdrl_train.method.presets import PRESETS
from tests.train import own_losses

HERE = own_losses.__name__
METHODS = Path(presets.__file__).parent
P, OLD, A = [0.5, 0.2, 0.6], [0.25, 0.4, 0.5], [1.0, 1.0, -2.0]
"""Three tokens: the first two are one completion, the third is another. Ratios: 2, 0.5 and 1.2."""


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def three_tokens(**fields: Any) -> tuple[Rows, TokenCoefficients]:
    rows = Rows(
        logprobs=numbers(P).log().requires_grad_(),
        old_logprobs=numbers(OLD).log(),
        advantages=numbers(A),
        kd_weight=torch.ones(3, dtype=torch.float64),
        **fields,
    )
    assert rows.advantages is not None
    assert rows.kd_weight is not None
    tokens = TokenCoefficients(
        advantages=rows.advantages,
        kd_weight=rows.kd_weight,
        sampled_logprobs=rows.logprobs.detach(),
        completion=torch.tensor([4, 4, 7]),
        positions=torch.tensor([0, 1, 0]),
        lengths=torch.tensor([2, 2, 1]),
    )
    return rows, tokens


@pytest.mark.parametrize(
    ("method", "values", "gradient", "clipped"),
    [
        pytest.param(  # min(2, 1.5), max(0.5, 0.8), 1.2: all keep a gradient
            MethodConfig(policy="cispo", clip_low=0.2, clip_high=0.5),
            [-1.5, -0.8, 2.4],
            [-1.5, -0.8, 2.4],
            [True, True, False],
            id="cispo",
        ),
        pytest.param(
            MethodConfig(policy="cispo", clip_low=1.0, clip_high=4.0),
            [-2.0, -0.5, 2.4],
            [-2.0, -0.5, 2.4],
            [False, False, False],
            id="cispo without a bound",
        ),
        pytest.param(  # p - old: 0.25, -0.2, 0.1; only a rise counts where A > 0
            MethodConfig(policy="dppo", clip_low=0.15, clip_high=0.15),
            [0.0, -0.5, 2.4],
            [0.0, -0.5, 2.4],
            [True, False, False],
            id="dppo",
        ),
        pytest.param(  # s: (2 · 0.5)^(1/2) = 1, and 1.2: not below 0.8
            MethodConfig(policy="gspo", clip_low=0.2, clip_high=0.1),
            [-1.0, -1.0, 2.4],
            [-1.0, -1.0, 2.4],
            [False, False, False],
            id="gspo",
        ),
        pytest.param(  # c: min(2, 1.1) and 0.5; S = 0.55^(1/2)
            MethodConfig(policy="gmpo", clip_low=0.2, clip_high=0.1),
            [-(0.55**0.5), -(0.55**0.5), 2.4],
            [0.0, -(0.55**0.5), 2.4],
            [True, False, False],
            id="gmpo",
        ),
    ],
)
def test_policy_gradients_of_three_tokens(
    method: MethodConfig, values: list[float], gradient: list[float], clipped: list[bool]
) -> None:
    rows, tokens = three_tokens()
    loss = POLICIES[method.policy](method)
    if loss.sequence is not None:
        log_ratio = (rows.logprobs - rows.old_logprobs).detach()
        tokens = replace(tokens, sequence=loss.sequence(log_ratio, tokens))
    losses = loss.losses(rows, tokens)
    torch.testing.assert_close(losses.detach(), numbers(values))
    losses.sum().backward()
    torch.testing.assert_close(rows.logprobs.grad, numbers(gradient))
    assert loss.clipped is not None
    assert loss.clipped(rows, tokens).tolist() == clipped


def test_gspo_leaves_a_completion_out_whose_ratio_is_beyond_the_bound() -> None:
    rows, tokens = three_tokens()
    rows = replace(rows, old_logprobs=numbers([0.25, 0.2, 0.9]).log())  # s: 2^(1/2), 2/3
    method = MethodConfig(policy="gspo", clip_low=0.2, clip_high=0.1)
    loss = POLICIES["gspo"](method)
    assert loss.sequence is not None
    log_ratio = (rows.logprobs - rows.old_logprobs).detach()
    tokens = replace(tokens, sequence=loss.sequence(log_ratio, tokens))
    losses = loss.losses(rows, tokens)
    torch.testing.assert_close(losses.detach(), numbers([-1.1, -1.1, 1.6]))
    losses.sum().backward()
    assert rows.logprobs.grad.tolist() == [0, 0, 0]


def test_means_of_completions() -> None:
    _, tokens = three_tokens()
    assert completion_mean(numbers([1.0, 4.0, 7.0]), tokens).tolist() == [2.5, 2.5, 7.0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [  # log p - log q: log 5, -log 2, log 3; A: 1, 1, -2
        ({"kd_sign_gate": True}, [0, 1, 1]),
        ({"kd_min_log_ratio": 1.0}, [1, 0, 1]),
        ({"kd_min_entropy": 0.5}, [0, 1, 1]),
        ({"kd_sign_gate": True, "kd_min_log_ratio": 1.0}, [0, 0, 1]),
        ({}, [1, 1, 1]),
    ],
)
def test_which_tokens_are_distilled(settings: dict[str, Any], kept: list[int]) -> None:
    rows, _ = three_tokens(
        teacher_logprobs=numbers([0.1, 0.4, 0.2]).log(), entropy=numbers([0.2, 0.5, 0.7])
    )
    method = MethodConfig(**settings)
    assert distilled_rows(method, rows).kd_weight.tolist() == kept
    assert needs_token_loss(method) == bool(settings)


def test_tanh_bounds_the_pull() -> None:
    """log p - log q = log 5, -log 2, log 3 at c = 2: tanh(x / 2) = (e^x - 1) / (e^x + 1)."""
    rows, _ = three_tokens(teacher_logprobs=numbers([0.1, 0.4, 0.2]).log())
    moved = distilled_rows(MethodConfig(kd_tanh=2.0), rows)
    pull = rows.logprobs - moved.teacher_logprobs
    torch.testing.assert_close(pull.detach(), numbers([4 / 3, -2 / 3, 1.0]))
    (pull.square() / 2).sum().backward()  # k2
    torch.testing.assert_close(rows.logprobs.grad, numbers([4 / 3, -2 / 3, 1.0]))


def test_a_constant_advantage_reads_no_reward() -> None:
    rewards = torch.tensor([[1.0, 0.0, math.nan], [0.0, 0.0, 0.0]])
    assert group_advantages(rewards, "constant").tolist() == [[1, 1, 0], [1, 1, 1]]


def test_rows_that_are_not_distilled_hold_nothing_of_the_teacher() -> None:
    """Whether it ran in their pack or not, so that a pack may hold any completions."""
    loss = load_loss(MethodConfig(kd="rkl+fkl", loss=f"{HERE}:mixture"))
    assert loss is not None
    nan, entropy = numbers([math.nan, 0.1, math.nan]), numbers([1.0, 1.0, 1.0])
    results = []
    for known in (None, nan):
        rows, tokens = three_tokens(
            teacher_logprobs=known, kl=known, forward_kl=known, entropy=entropy
        )
        weight = numbers([0.0, 0.0 if known is None else 0.5, 0.0])
        losses = loss.losses(replace(rows, kd_weight=weight), replace(tokens, kd_weight=weight))
        (gradient,) = torch.autograd.grad(losses.sum(), rows.logprobs)
        results.append((losses.detach()[::2], gradient[::2]))
    (losses, gradient), (theirs, others) = results
    assert losses.isfinite().all()
    torch.testing.assert_close(losses, theirs)
    torch.testing.assert_close(gradient, others)


@pytest.mark.parametrize("known", [None, [math.nan, math.nan, 0.5]])
def test_a_loss_of_ones_own_gets_whole_rows(known: list[float] | None) -> None:
    seen: list[Rows] = []

    @token_loss(kd="rkl")
    def loss(rows: Rows, _: TokenCoefficients) -> Tensor:
        seen.append(rows)
        return rows.logprobs + rows.kl

    values = None if known is None else numbers(known)
    rows, tokens = three_tokens(teacher_logprobs=values, kl=values)
    weight = numbers([0.0, 0.0, 0.0 if known is None else 1.0])
    as_declared(loss, loss.kdrl_declared)(
        replace(rows, old_logprobs=None), replace(tokens, kd_weight=weight)
    )
    student = rows.logprobs.detach()
    last = student[2].item() if known is None else 0.5
    assert seen[0].teacher_logprobs.tolist() == [*student[:2].tolist(), last]
    assert seen[0].kl.tolist() == [0, 0, 0 if known is None else 0.5]
    assert torch.equal(seen[0].old_logprobs, student)


def test_the_readmes_loss_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """method/README.md: ratio 1.5 of the first completion, capped; 256 tokens halve the KD."""
    text = (METHODS / "README.md").read_text(encoding="utf-8")
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "token_loss" in x]
    (tmp_path / "readme_loss.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    loss = load_loss(MethodConfig(loss="readme_loss:loss", loss_options={"cap": 1.5}))
    assert loss is not None
    assert loss.sequence is completion_mean
    rows, tokens = three_tokens(teacher_logprobs=numbers([0.1, 0.4, 0.2]).log())
    tokens = replace(
        tokens, sequence=numbers([2.0, 1.0, 0.8]).log(), positions=torch.tensor([0, 256, 0])
    )
    lp, k2 = numbers(P).log(), numbers([5.0, 0.5, 3.0]).log().square() / 2
    expected = -numbers([1.5, 1.0, -1.6]) * lp + numbers([1.0, 0.5, 1.0]) * k2
    torch.testing.assert_close(loss.losses(rows, tokens).detach(), expected)


def test_the_readmes_options_are_those_of_the_command_line() -> None:
    text = (METHODS / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(--(?:preset gspo|method\.loss) [^`]*)`", " ".join(text.split()))
    configs = [cli.parse(TrainConfig(), shlex.split(line), "train", "") for line in commands]
    combined, of_ones_own = (config.method for config in configs)
    assert (combined.policy, combined.kd, combined.kd_sign_gate) == ("gspo", "rkl", True)
    assert of_ones_own.loss == "my_module:loss"
    assert of_ones_own.loss_options == {"cap": 2.0}


def test_presets_of_other_papers() -> None:
    assert PRESETS["dapo"] == MethodConfig(kd=None, clip_high=0.28)
    assert PRESETS["cispo"].clip_low == 1
    for name in ("gspo", "gmpo"):
        assert PRESETS[name].token_weights == "sequence_mean"
        assert PRESETS[name].policy == name
    low, high = PRESETS["gmpo"].clip_low, PRESETS["gmpo"].clip_high
    assert (1 - low, 1 + high) == pytest.approx((math.exp(-0.4), math.exp(0.4)), abs=2e-3)
    assert PRESETS["constant_advantage"].advantage == "constant"
    selected = {
        "kdrl_tanh": "kd_tanh",
        "kdrl_sign_gate": "kd_sign_gate",
        "kdrl_entropy": "kd_min_entropy",
        "kdrl_gap": "kd_min_log_ratio",
        "kdrl_prefix": "kd_prefix",
    }
    for name, setting in selected.items():
        default = getattr(MethodConfig(), setting)
        assert getattr(PRESETS[name], setting) != default
        assert replace(PRESETS[name], **{setting: default}) == PRESETS["kdrl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.0}, 'clip_low must be below 1 with policy "clip"'),
        ({"policy": "gspo", "clip_low": 1.0}, 'clip_low must be below 1 with policy "gspo"'),
        ({"kd": None, "kd_prefix": 0.5}, "kd must be a term of the loss with kd_prefix 0.5"),
        ({"kd": None, "kd_sign_gate": True}, "kd must be a term of the loss with kd_sign_gate"),
        ({"kd": "reward", "kd_min_entropy": 1.0}, "with kd_min_entropy 1.0, got reward"),
        ({"kd": "rkl", "kd_tanh": 1.0}, 'kd must be "k2" or "k3" with kd_tanh 1.0'),
        ({"kd_baseline": "kl", "kd_tanh": 1.0}, "and kd_baseline None, got"),
        ({"policy": "gspo", "kd": "topk_rkl"}, 'another one than "topk_rkl" with policy gspo'),
        ({"policy": "off", "kd_sign_gate": True}, 'policy must not be "off" with kd_sign_gate'),
        ({"loss_options": {"a": 1.0}}, "loss must be module:function with loss_options"),
        ({"loss": "a:b", "clip_high": 0.3}, "clip_high must be 0.2 with loss a:b, got 0.3"),
        ({"loss": "a:b", "policy": "none"}, "policy must be clip with loss a:b, got none"),
        ({"loss": "a:b", "entropy_coef": 0.1}, "entropy_coef must be 0.0 with loss a:b"),
        ({"loss": "a:b", "kd_sign_gate": True}, "kd_sign_gate must be False with loss a:b"),
        ({"loss": "a:b", "kd": "reward"}, 'kd must not be "reward" with loss a:b'),
    ],
)
def test_settings_that_nothing_would_read_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MethodConfig(**settings)


def test_a_reward_in_the_loss_may_have_a_prefix() -> None:
    assert MethodConfig(kd="reward", kd_prefix=0.5).kd_prefix == 0.5
    assert MethodConfig(policy="off", loss="a:b").policy == "off"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kdrl"}, "method.loss must be module:function, got 'kdrl'"),
        ({"loss": "absent_module:loss"}, "No module named 'absent_module'; install it"),
        ({"loss": f"{HERE}:absent"}, "absent of tests.train.own_losses must be a function under"),
        ({"loss": f"{HERE}:undeclared"}, "must be a function under @kdrl_train.method.own_loss"),
        ({"loss": "os:popen"}, "popen of os must be a function under"),
        ({"loss": f"{HERE}:kdrl", "kd": None}, 'method.kd must be "k2", as method.loss tests'),
        ({"loss": f"{HERE}:early"}, "method.kd must be None, as method.loss tests"),
        ({"loss": f"{HERE}:early", "kd": None}, "method.loss_options must set half_life"),
        (
            {"loss": f"{HERE}:early", "kd": None, "loss_options": {"half_live": 2.0}},
            f"must be of half_life, scale for method.loss {HERE}:early, got half_live (did you",
        ),
    ],
)
def test_a_loss_that_cannot_be_loaded_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_loss(MethodConfig(**settings))


def test_a_loss_with_options_survives_a_file(tmp_path: Path) -> None:
    options = {"half_life": 2.0, "scale": 3.0}
    method = MethodConfig(loss=f"{HERE}:early", kd=None, loss_options=options)
    save_yaml(TrainConfig(method=method), tmp_path / "config.yaml")
    read = update(TrainConfig(), load_yaml(tmp_path / "config.yaml"))
    assert read.method == method
    loss = load_loss(read.method)
    assert loss is not None
    rows, tokens = three_tokens(entropy=numbers([1.0, 1.0, 1.0]))
    sequence = numbers([0.0, 0.0, math.log(2)])
    losses = loss.losses(rows, replace(tokens, sequence=sequence))
    expected = -3 * numbers([0.5, 0.5 * 0.5**0.5, -4.0]) * numbers(P).log()
    torch.testing.assert_close(losses.detach(), expected)


@pytest.mark.parametrize(
    ("numbers", "places", "counts"),
    [
        ([4, 4, 7], [0, 0, 1], [2, 1, 0]),
        ([5], [0], [1]),
        ([0, 3, 3, 3, 2], [0, 1, 1, 1, 2], [1, 3, 1, 0, 0]),
        ([], [], []),
    ],
)
def test_the_completions_of_a_pack_are_found(
    numbers: list[int], places: list[int], counts: list[int]
) -> None:
    place, count = completions_of(torch.tensor(numbers, dtype=torch.int64))
    assert (place.tolist(), count.tolist()) == (places, counts)
