"""The losses that verl knows by our names: values, gradients, averages, settings, refusals."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="needs verl: bash tests/verl.sh")

from hydra import compose, initialize_config_module
from verl.trainer.distillation.losses import distillation_ppo_loss, get_distillation_loss_settings
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import DistillationConfig, DistillationLossConfig

from kdrl_kernels.integrations.logprob_losses import SampledKd
from kdrl_kernels.integrations.sequence_weights import WEIGHT
from kdrl_kernels.integrations.verl import KdrlDistillationLossConfig, losses
from kdrl_kernels.integrations.verl.config import term_of
from tests.integrations import verl_host as host

pytestmark = [
    pytest.mark.verl,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

AVERAGES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
AVERAGES += ["seq-mean-token-sum-norm"]


def policy_inputs() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    B, L = 6, 9
    lengths = torch.randint(1, L + 1, (B, 1), generator=rng)
    return {
        "old_log_prob": torch.randn(B, L, generator=rng) - 3,
        "log_prob": (torch.randn(B, L, generator=rng) - 3).requires_grad_(),
        "advantages": torch.randn(B, L, generator=rng),
        "response_mask": torch.arange(L) < lengths,
    }


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("corrected", [False, True])
def test_the_policy_loss_is_verls(average: str, corrected: bool) -> None:
    config = host.actor_config(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=2.0)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=77, global_batch_size=12)
    inputs: dict[str, Any] = policy_inputs() | {"loss_agg_mode": average, "config": config}
    if corrected:
        inputs["rollout_is_weights"] = torch.rand(6, 9)
    both = [get_policy_loss_fn(name)(**inputs) for name in ("kdrl", "vanilla")]
    grads = [torch.autograd.grad(loss, inputs["log_prob"])[0] for loss, _ in both]
    torch.testing.assert_close(both[0][0], both[1][0])
    torch.testing.assert_close(grads[0], grads[1])
    assert both[0][1] == pytest.approx(both[1][1])
    assert all(value != 0 for value in both[0][1].values())


def test_a_ratio_that_overflows_has_no_infinite_gradient() -> None:
    logprobs = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old, advantages = torch.tensor([[-200.0, -200.0]]), torch.tensor([[1.0, -1.0]])
    mask = torch.ones(1, 2)
    loss, _ = losses.policy_loss(old, logprobs, advantages, mask, config=host.actor_config())
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 3.0) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0, 0]]


# the distillation losses


def micro_batch(**tensors: Any) -> tuple[dict[str, Any], Any]:
    """Make what the engine passes to the loss: log-probabilities of all tokens, and the batch."""
    batch = host.rollouts()
    data = host.update_batch(batch, fused=True)
    host.tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(data["response_mask"].sum()))
    for name, tensor in tensors.items():
        data[name] = tensor
    rng = torch.Generator().manual_seed(9)
    packed = data["input_ids"].values()
    logprobs = (torch.randn(len(packed), generator=rng) - 4).requires_grad_()
    nested = torch.nested.nested_tensor_from_jagged(logprobs, data["input_ids"].offsets())
    return {"log_probs": nested, "leaf": logprobs}, data


def expected_terms(output: dict[str, Any], weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute s · l²/2 · weight of each response token by loops, [B, L]."""
    tensors = host.rollouts().batch
    B, L = tensors["responses"].shape
    P = tensors["prompts"].shape[1]
    terms = torch.zeros(B, L)
    rows = []
    for b, logprobs in enumerate(output["log_probs"].unbind()):
        length = int(tensors["attention_mask"][b, P:].sum())
        lp = logprobs[-length - 1 : -1]
        lq = tensors["teacher_logprobs"][b, P - 1 : P - 1 + length, 0]
        s = (lp - tensors["old_log_probs"][b, :length]).exp().clamp(max=2.0).detach()
        term = weight_B[b] * s * (lp - lq).square() / 2
        rows.append(torch.cat([term, terms[b, length:]]))
    return torch.stack(rows), tensors["response_mask"]


@pytest.mark.parametrize("average", AVERAGES)
def test_the_distillation_loss_is_averaged_as_verl_is_told(average: str) -> None:
    weight_B = torch.linspace(0, 1, 8)
    output, data = micro_batch(**{WEIGHT: weight_B})
    loss = host.joint_loss(host.actor_config(loss_agg_mode=average), use_task_rewards=False)
    value, metrics = loss(model_output=output, data=data)
    terms, mask = expected_terms(output, weight_B)
    sums, counts = (terms * mask).sum(1), mask.sum(1)
    expected = {
        "token-mean": sums.sum() / mask.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-mean": (sums / counts).mean(),
        "seq-mean-token-sum-norm": sums.mean() / mask.shape[1],
    }[average]
    torch.testing.assert_close(value, expected)
    grads = [
        torch.autograd.grad(x, output["leaf"], retain_graph=True)[0] for x in (value, expected)
    ]
    torch.testing.assert_close(*grads)
    assert metrics["distillation/loss"].values == [pytest.approx(value.item())]


def test_weights_of_rollout_correction_multiply_it() -> None:
    weights = torch.rand(8, 6)
    output, data = micro_batch(rollout_is_weights=weights, **{WEIGHT: torch.ones(8)})
    config = DistillationConfig(distillation_loss=KdrlDistillationLossConfig())
    ours, _ = losses.distillation_losses(host.actor_config(), config, output, data)
    terms, mask = expected_terms(output, torch.ones(8))
    torch.testing.assert_close(ours, terms * weights * mask)


def test_they_multiply_a_divergence_over_the_best_tokens_too() -> None:
    weights = torch.rand(8, 6)
    settings = KdrlDistillationLossConfig(loss_mode="kdrl_topk_rkl")
    config, terms = DistillationConfig(distillation_loss=settings), []
    for corrections in ({}, {"rollout_is_weights": weights}):
        output, data = micro_batch(**{WEIGHT: torch.ones(8)}, **corrections)
        numbers = ("distillation_losses", "student_mass", "teacher_mass")
        output |= dict.fromkeys(numbers, output["log_probs"])
        terms.append(losses.topk_distillation_losses(host.actor_config(), config, output, data)[0])
    torch.testing.assert_close(terms[1], terms[0] * weights)
    assert terms[0].abs().max() > 1


def test_a_term_has_all_settings() -> None:
    settings = KdrlDistillationLossConfig(
        loss_mode="kdrl_k3", kd_ratio_cap=1.5, kd_clamp=4.0, k3_bound=3.0
    )
    assert term_of(settings) == SampledKd("k3", ratio_cap=1.5, clamp=4.0, k3_bound=3.0)


def test_nested_fields_are_read_as_padded_ones() -> None:
    """verl's newer trainer passes every field of the responses as a nested tensor."""
    config = DistillationConfig(distillation_loss=KdrlDistillationLossConfig())
    output, data = micro_batch(**{WEIGHT: torch.ones(8)})
    padded, metrics = losses.distillation_losses(host.actor_config(), config, output, data)
    batch = host.rollouts().batch
    used = batch["attention_mask"].bool()
    P = batch["prompts"].shape[1]
    for name in ("prompts", "responses", "response_mask", "old_log_probs"):
        kept = used[:, :P] if name == "prompts" else used[:, P:]
        rows = [row[keep] for row, keep in zip(batch[name], kept, strict=True)]
        data[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    host.tu.assign_non_tensor(data, max_response_len=-1)
    nested, same = losses.distillation_losses(host.actor_config(), config, output, data)
    torch.testing.assert_close(nested, padded[:, : nested.shape[1]])
    assert same == metrics


def test_verls_own_settings_have_our_defaults() -> None:
    plain = DistillationLossConfig(
        loss_mode="kdrl_k2", use_policy_gradient=False, loss_max_clamp=None
    )
    output, data = micro_batch(**{WEIGHT: torch.ones(8)})
    values = [
        losses.distillation_losses(
            host.actor_config(), DistillationConfig(distillation_loss=settings), output, data
        )[0]
        for settings in (plain, KdrlDistillationLossConfig())
    ]
    torch.testing.assert_close(*values)


def test_a_batch_without_weights_is_refused() -> None:
    output, data = micro_batch()
    loss = host.joint_loss(host.actor_config(), kd_mask="wrong")
    with pytest.raises(ValueError, match="the micro-batch must hold kdrl_kd_weight"):
        loss(model_output=output, data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_mode": "k3"}, r"loss_mode must be one of \['kdrl_k2'.*got \"k3\""),
        ({"loss_max_clamp": 10.0}, "loss_max_clamp must be null.*got 10.0.*use kd_clamp"),
        ({"use_policy_gradient": True}, "use_policy_gradient must be False"),
        ({"kd_mask": "right"}, "kd_mask"),
        ({"kd_clamp": -1.0}, "kd_clamp must be positive or None, got -1.0"),
        ({"kd_ratio_cap": 0.0}, "kd_ratio_cap must be"),
        ({"right_above": "half"}, "right_above must be"),
        ({"loss_mode": "kdrl_topk_rkl", "kd_clamp": 1.0}, "kd_clamp must be null with"),
        ({"loss_mode": "kdrl_topk_jsd", "jsd_alpha": 1.0}, "jsd_alpha must be"),
        ({"kd_coef_schedule": "kl_budget"}, "kd_coef_schedule must depend on"),
        (
            {"kd_coef_schedule": "constant", "distillation_loss_coef": 0.1},
            "distillation_loss_coef must be 1.0 with kd_coef_schedule",
        ),
    ],
)
def test_settings_that_cannot_be_right_are_refused(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        KdrlDistillationLossConfig(**options)


def test_verls_own_settings_that_cannot_be_right_are_refused() -> None:
    output, data = micro_batch()
    settings = DistillationLossConfig(loss_mode="kdrl_k2", use_policy_gradient=False)
    config = DistillationConfig(distillation_loss=settings)
    with pytest.raises(ValueError, match="loss_max_clamp must be null"):
        distillation_ppo_loss(host.actor_config(), config, output, data)


@pytest.mark.parametrize("mode", ["kdrl_k2", "kdrl_topk_rkl"])
def test_a_temperature_at_which_no_teacher_answers_is_refused(mode: str) -> None:
    output, data = micro_batch(**{WEIGHT: torch.ones(8)})
    numbers = ("log_probs", "distillation_losses", "student_mass", "teacher_mass")
    output |= dict.fromkeys(numbers, output["log_probs"])
    loss = host.joint_loss(host.actor_config(), loss_mode=mode)
    loss(model_output=output, data=data)
    host.tu.assign_non_tensor(data, temperature=0.6)
    with pytest.raises(
        ValueError, match=r"rollout.temperature must be 1.0 with a teacher, got 0.6"
    ):
        loss(model_output=output, data=data)


def test_a_topk_term_without_its_settings_or_head_is_refused() -> None:
    output, data = micro_batch(**{WEIGHT: torch.ones(8)})
    mode, message = "kdrl_topk_fkl", '"kdrl_topk_fkl" must be used with KdrlDistillationLossConfig'
    plain = DistillationLossConfig(loss_mode=mode, use_policy_gradient=False, loss_max_clamp=None)
    for settings, key in (
        (plain, "distillation_losses"),
        (KdrlDistillationLossConfig(loss_mode=mode), "no distillation_losses"),
    ):
        config = DistillationConfig(distillation_loss=settings)
        of_the_head = {key: output["log_probs"]}
        with pytest.raises(ValueError, match=message):
            losses.topk_distillation_losses(host.actor_config(), config, of_the_head, data)


def test_every_name_asks_the_teacher_for_what_it_reads() -> None:
    for name in ("kdrl_k2", "kdrl_k3", "kdrl_k3_ratio"):
        settings = get_distillation_loss_settings(name)
        assert (settings.use_estimator, settings.use_topk) == (True, False)
    for name in ("kdrl_topk_rkl", "kdrl_topk_fkl", "kdrl_topk_jsd"):
        settings = get_distillation_loss_settings(name)
        assert (settings.use_estimator, settings.use_topk) == (False, True)


def test_a_second_loading_changes_nothing() -> None:
    before = get_policy_loss_fn("kdrl")
    losses.register()
    assert get_policy_loss_fn("kdrl") is before


# the command line


def overrides() -> list[str]:
    """Read the settings of the command line in the page on verl."""
    page = Path(__file__).parents[2] / "kdrl_kernels" / "integrations" / "verl" / "README.md"
    command = re.search(r"```bash\npython -m verl.trainer.main_ppo(.*?)```", page.read_text(), re.S)
    assert command is not None
    return shlex.split(command[1].replace("\\\n", " "))


def test_the_command_line_of_the_page_makes_the_settings() -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides())
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.policy_loss.loss_mode == "kdrl"
    assert config.actor_rollout_ref.model.use_fused_kernels
    assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend == "kdrl"
    distillation = omega_conf_to_dataclass(config.distillation)
    assert distillation.enabled
    settings = distillation.distillation_loss
    assert isinstance(settings, KdrlDistillationLossConfig)
    schedule = settings.method.kd_coef
    assert (schedule.kind, schedule.initial) == ("linear", 5e-3)
    assert (schedule.final, schedule.steps) == (1e-3, 200)
    assert (settings.loss_mode, settings.method.kd_mask) == ("kdrl_k2", "wrong")
    assert settings.kd_clamp == 5.0
