"""Registers KDRL's terms with verl: a policy loss, and distillation losses.

Both work on log-probabilities, outside the head: verl's engine has them from the fused head, and
its backward pass takes their sum through it. verl's distillation_ppo_loss adds the two,

    policy loss + distillation_loss_coef · distillation loss,

each averaged by loss_agg_mode, so that "kdrl" and "kdrl_k2" together are KDRL's joint loss. verl
passes no teacher to a policy loss, but the whole micro-batch to a distillation loss. There
teacher_logprobs [bsz, j, 1] is what the servers of distillation.teacher_models said of each
completion's tokens, at temperature 1, right after it was sampled.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation import losses as distillation
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import masked_mean
from verl.workers.utils.padding import no_padding_2_padding

from kdrl_kernels.integrations.logprob_losses import policy_losses, read_numbers
from kdrl_kernels.integrations.sequence_weights import WEIGHT
from kdrl_kernels.integrations.verl.config import NAMES, TOPK_NAMES, check, term_of

POLICY_LOSS = "kdrl"


def register() -> None:
    """Register the losses under their names; a second time changes nothing."""
    if POLICY_LOSS not in POLICY_LOSS_REGISTRY:
        register_policy_loss(POLICY_LOSS)(policy_loss)
    kinds = (NAMES, "use_estimator", distillation_losses)
    for modes, reads, loss in (kinds, (TOPK_NAMES, "use_topk", topk_distillation_losses)):
        names = [name for name in modes if name not in distillation.DISTILLATION_LOSS_REGISTRY]
        if names:
            settings = distillation.DistillationLossSettings(names=names, **{reads: True})
            distillation.register_distillation_loss(settings)(loss)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the clipped policy gradient of kdrl_kernels.Objective, by verl's settings.

    clip_ratio_low, clip_ratio_high and clip_ratio_c (dual clip) are verl's; the values are those of
    its "vanilla". The ratio is bounded as a logarithm, so neither it nor its gradient overflows.
    """
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    dual = config.get("clip_ratio_c", 3.0)
    losses = policy_losses(
        log_prob, old_log_prob, advantages, clip_low=low, clip_high=high, dual_clip=dual
    )
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(
        loss_mat=losses,
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    with torch.no_grad():
        log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        down = advantages < 0
        clipped = ((advantages > 0) & (ratio > 1 + high)) | (down & (ratio < 1 - low))
        shares = {
            "actor/pg_clipfrac": clipped,
            "actor/pg_clipfrac_lower": down & (ratio > dual),
            "actor/ppo_kl": -log_ratio,
        }
        means = {name: masked_mean(share.float(), response_mask) for name, share in shares.items()}
        metrics = read_numbers(means)
    return loss, metrics


def distillation_losses(
    config: Any,  # noqa: ARG001 (verl passes it)
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute weight · s · KD of each token of the responses, [bsz, length], for verl's averages.

    weight is the schedule's value and the mask of the completion; s = min(p / old_log_probs,
    kd_ratio_cap). Weights of rollout correction multiply it, as they do the policy loss.
    """
    settings = distillation_config.distillation_loss
    check(settings)
    logprobs = no_padding_2_padding(model_output["log_probs"], data)
    teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    mask, weight = weights_of(settings, data, like=logprobs)
    old = padded(data["old_log_probs"], like=logprobs)
    losses = corrected(term_of(settings).losses(logprobs, teacher, old, weight), data)
    log_ratio = logprobs.detach() - teacher
    means = {"teacher_log_ratio": log_ratio, "k2": log_ratio.square() / 2}
    return losses, token_metrics(weight, mask, means)


def topk_distillation_losses(
    config: Any,  # noqa: ARG001 (verl passes it)
    distillation_config: Any,
    model_output: dict[str, Any],
    data: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Weight the divergences that the fused head has computed, [bsz, length], as above.

    Without task rewards verl leaves the sampled tokens' log-probabilities out: s is then 1.
    """
    settings = distillation_config.distillation_loss
    check(settings)
    name = "distillation_losses"
    if name not in model_output or getattr(settings, "topk_term", None) is None:
        raise ValueError(
            f'loss_mode "{settings.loss_mode}" must be used with KdrlDistillationLossConfig, the '
            "strategy fsdp or fsdp2, and model.fused_kernel_options.impl_backend=kdrl"
        )
    numbers = [name, "student_mass", "teacher_mass"]
    values, *masses = (no_padding_2_padding(model_output[key], data) for key in numbers)
    mask, weight = weights_of(settings, data, like=values)
    scale = weight
    if model_output.get("log_probs") is not None:
        logprobs = no_padding_2_padding(model_output["log_probs"], data)
        old = padded(data["old_log_probs"], like=values)
        scale = weight * term_of(settings).ratio_weight(logprobs, old)
    losses = corrected(torch.where(scale == 0, 0, scale * values), data)
    means = dict(zip(("topk_divergence", *numbers[1:]), (values.detach(), *masses), strict=True))
    return losses, token_metrics(weight, mask, means)


def weights_of(settings: Any, data: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of the responses, bool, and each token's weight, [bsz, length] both."""
    temperature = tu.get_non_tensor_data(data, "temperature", 1.0)
    if not isinstance(temperature, Tensor) and temperature != 1:
        raise ValueError(
            f"actor_rollout_ref.rollout.temperature must be 1.0 with a teacher, got {temperature}: "
            "the student's log-probabilities would be at this temperature, but verl asks a "
            "teacher's server for its own at 1.0"
        )
    mask = padded(data["response_mask"], like=like).bool()
    weight = mask.to(like.dtype)
    if hasattr(settings, "method"):
        if WEIGHT not in data.keys():  # noqa: SIM118 (a TensorDict iterates over its batch)
            raise ValueError(
                f"the micro-batch must hold {WEIGHT}, which BaseEngine.train_batch adds for "
                "verl's distillation_ppo_loss: this engine or loss function is another one"
            )
        weight = weight * data[WEIGHT].to(like)[:, None]
    return mask, weight


def corrected(losses: Tensor, data: Any) -> Tensor:
    """Multiply by the weights of rollout correction, where there are any."""
    correction = data.get("rollout_is_weights", None)
    return losses if correction is None else losses * padded(correction, like=losses)


def padded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a padded [bsz, length] tensor of a nested or a padded one."""
    if not tensor.is_nested:
        return tensor
    return torch.nested.to_padded_tensor(tensor, 0.0, output_size=tuple(like.shape))


def token_metrics(weight: Tensor, mask: Tensor, numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Report the distilled tokens: their share, and over them means of weight and of numbers."""
    used = weight > 0
    count = used.sum().clamp(min=1)
    means = {"kd_share": used.sum() / mask.sum().clamp(min=1), "kd_weight": weight.sum() / count}
    for name, number in numbers.items():
        means[name] = torch.where(used, number, 0).sum() / count
    return read_numbers({f"distillation/{name}": mean for name, mean in means.items()})
