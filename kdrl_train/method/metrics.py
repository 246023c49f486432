"""Metrics of a step: pure functions of rewards and of token sums."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_train.method.grpo import _equal
from kdrl_train.method.histogram import PERCENTILES, histogram, quantiles


def reward_metrics(rewards_PG: Tensor) -> dict[str, float]:
    """Mean reward, share of right completions, and share of groups with signal; NaN is left out.

    A group has signal when two of its rewards differ: only then has it a policy gradient.
    """
    known = rewards_PG[~rewards_PG.isnan()].double()
    return {
        "reward": known.mean().item(),
        "accuracy": (known > 0).double().mean().item(),
        "groups_with_signal": (~_equal(rewards_PG)).double().mean().item(),
        "rewards_missing": float(rewards_PG.isnan().sum()),
    }


_PULL: dict[str | None, Callable[[Tensor], Tensor]] = {
    "k2": lambda log_ratio: log_ratio,
    "rkl": lambda log_ratio: log_ratio,
    "k3": lambda log_ratio: -torch.expm1(-log_ratio),
    "fkl": lambda log_ratio: -torch.expm1(-log_ratio),
}
"""What distillation takes off a token's advantage, per unit of its weight: the derivative of the
term in log p; of an exact KL that of its sampled form, which has the same expectation."""


def token_sums(
    *,
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    entropy: Tensor | None,
    teacher_logprobs: Tensor | None,
    kl: Tensor | None,
    clip_fraction: Tensor | None,
    token_weights: Tensor,
    kd_weight: Tensor,
    advantages: Tensor,
    kd: str | None,
    kd_baseline: str | None = None,
) -> dict[str, Tensor]:
    """Sums over the tokens of one micro-batch, on the device, float64: `token_means` divides them.

    All are 0-d and add up over micro-batches and ranks, but for sampler_mismatch_max, whose
    largest counts, and teacher_log_ratio_histogram, which is [BINS] counts (histogram.py).

    Args:
        logprobs, sampled_logprobs: [N] nats, of the trainer and as sampled.
        entropy: [N] nats, or None.
        teacher_logprobs: [N] nats, or None where no token of the micro-batch is distilled.
        kl: [N] nats, exact KL(student ‖ teacher), or None.
        clip_fraction: 0-d share of clipped tokens, or None.
        token_weights: [N]; tokens of weight 0 are left out.
        kd_weight: [N]; KL sums run over the tokens with a positive one, whatever shares their
            micro-batch, so that the means do not depend on packing.
        advantages: [N].
        kd: MethodConfig.kd, for the sign of `kd_flipped`; None: no two terms to compare.
        kd_baseline: MethodConfig.kd_baseline, for the same; "kl" needs kl.
    """
    used = token_weights > 0
    gap = (logprobs.detach() - sampled_logprobs).abs().double()[used]
    sums = {
        "tokens": used.sum().double(),
        "sampler_mismatch_sum": gap.sum(),
        "sampler_mismatch_max": gap.max() if gap.numel() else gap.new_zeros(()),
    }
    if entropy is not None:
        sums["entropy_sum"] = entropy.detach().double()[used].sum()
    if clip_fraction is not None:
        sums["clipped"] = clip_fraction.detach().double() * used.sum()
    if teacher_logprobs is not None:
        distilled = used & (kd_weight > 0)
        log_ratio = (logprobs.detach() - teacher_logprobs).double()[distilled]
        sums["kd_tokens"] = distilled.sum().double()
        sums["teacher_log_ratio_sum"] = log_ratio.sum()
        sums["k2_sum"] = (log_ratio.square() / 2).sum()
        sums["teacher_log_ratio_histogram"] = histogram(log_ratio)
        if kd in _PULL:
            pull = _PULL[kd](log_ratio)
            if kd_baseline is not None:
                assert kl is not None
                pull = pull - kl.detach().double()[distilled]
            left = advantages[distilled] - kd_weight[distilled] * pull
            sums["kd_flipped"] = (advantages[distilled] * left < 0).sum().double()
        if kl is not None:
            sums["kl_sum"] = kl.detach().double()[distilled].sum()
    return sums


def add_sums(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """total + part key by key (of sampler_mismatch_max the larger); a missing key counts as 0."""
    out = dict(total)
    for key, value in part.items():
        if key not in out:
            out[key] = value
        else:
            larger = key == "sampler_mismatch_max"
            out[key] = torch.maximum(out[key], value) if larger else out[key] + value
    return out


def token_means(sums: dict[str, Tensor]) -> dict[str, float | None]:
    """Per-token means of a step from its sums; None where the step has no such token.

    kl_teacher is the exact KL(student ‖ teacher) where the loss computes it, otherwise its
    unbiased estimate, the mean of l = log p - log q over the sampled tokens; nats per token.
    teacher_log_ratio_p50 and its like are quantiles of l, to one interval. kd_flip_share is the share of tokens whose advantage less the pull of distillation has the other sign.
    """
    values = {key: value.item() for key, value in sums.items() if value.ndim == 0}

    def mean(key: str, count: str) -> float | None:
        if key not in values or values.get(count, 0.0) == 0.0:
            return None
        return values[key] / values[count]

    kl = mean("kl_sum", "kd_tokens")
    spread: list[float | None] = [None] * len(PERCENTILES)
    if values.get("kd_tokens", 0.0) > 0:
        spread = [*quantiles(sums["teacher_log_ratio_histogram"])]
    log_ratio = mean("teacher_log_ratio_sum", "kd_tokens")
    return {
        "entropy": mean("entropy_sum", "tokens"),
        "clip_fraction": mean("clipped", "tokens"),
        "kl_teacher": log_ratio if kl is None else kl,
        "teacher_log_ratio": log_ratio,
        **{f"teacher_log_ratio_p{q}": value for q, value in zip(PERCENTILES, spread, strict=True)},
        "k2": mean("k2_sum", "kd_tokens"),
        "kd_flip_share": mean("kd_flipped", "tokens"),
        "kd_share": values.get("kd_tokens", 0.0) / max(values.get("tokens", 0.0), 1.0),
        "sampler_mismatch_mean": mean("sampler_mismatch_sum", "tokens"),
        "sampler_mismatch_max": values.get("sampler_mismatch_max"),
    }
