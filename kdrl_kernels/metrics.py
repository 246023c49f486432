"""Sums and counts of a loss over its tokens, and the means that they give."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdrl_kernels.objective import Objective, clipped_log_ratio, kd_pull, policy_log_ratio, subtract
from kdrl_kernels.token_rows import Rows

MEANS = {
    "ratio_mean": ("ratio_sum", "tokens"),
    "clip_fraction": ("clipped", "tokens"),
    "entropy_mean": ("entropy_sum", "tokens"),
    "teacher_log_ratio_mean": ("teacher_log_ratio_sum", "kd_tokens"),
    "k2_mean": ("k2_sum", "kd_tokens"),
    "kl_mean": ("kl_sum", "kd_tokens"),
    "topk_divergence_mean": ("topk_divergence_sum", "kd_tokens"),
    "kd_flip_fraction": ("kd_flipped", "tokens"),
    "entries_mean": ("entries", "tokens"),
}
"""Name of a mean: the sum or count it comes from, and the count that divides it."""
UNCHANGED = ("ratio_max", "tokens", "gradient_rows", "bad_tokens")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums on a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_metrics(objective: Objective, rows: Rows, used: Tensor | None) -> dict[str, Tensor]:
    """Sum over the used rows what a training run watches; nothing here waits for the device.

    Args:
        objective: what the loss of the rows was.
        rows: [N] outputs and inputs of the loss. Rows that are not used may hold anything.
        used: [N] bool; None: all rows.
    Returns: 0-d tensors on the device, sums in sum_dtype and counts in int64, which kdrl_loss
        lists. They add up over micro-batches and ranks, but for ratio_max, whose maximum counts.
    """
    lp, advantages = rows.logprobs, rows.advantages
    wide = sum_dtype(lp.device)
    used = torch.ones_like(lp, dtype=torch.bool) if used is None else used
    log_ratio = policy_log_ratio(rows)
    ratio = torch.where(used, log_ratio.exp(), 0).to(wide)
    metrics = {"ratio_sum": ratio.sum(), "ratio_max": ratio.amax() if len(lp) else ratio.sum()}
    if objective.policy == "clip" and advantages is not None:
        outside = clipped_log_ratio(objective, log_ratio, advantages) != log_ratio
        metrics["clipped"] = (used & outside & (advantages != 0)).sum()
    if rows.entropy is not None:
        metrics["entropy_sum"] = torch.where(used, rows.entropy.to(wide), 0).sum()
    if rows.teacher_logprobs is not None:
        metrics |= _teacher_metrics(objective, rows, used)
    if objective.topk_kd is not None:
        assert rows.kl is not None
        distilled = _distilled(rows, used)
        divergence = torch.where(distilled, rows.kl, 0).to(wide).sum()
        metrics |= {"kd_tokens": distilled.sum(), "topk_divergence_sum": divergence}
    return metrics


def _distilled(rows: Rows, used: Tensor) -> Tensor:
    """Return [N] bool: used rows of positive kd_weight, so that the mask of the KD term counts."""
    return used if rows.kd_weight is None else used & (rows.kd_weight > 0)


def _teacher_metrics(objective: Objective, rows: Rows, used: Tensor) -> dict[str, Tensor]:
    """Sum over the used rows of positive kd_weight."""
    assert rows.teacher_logprobs is not None
    wide = sum_dtype(rows.logprobs.device)
    distilled = _distilled(rows, used)
    log_ratio = subtract(rows.logprobs, rows.teacher_logprobs)
    log_ratio = torch.where(distilled, log_ratio, 0).to(wide)
    metrics = {
        "kd_tokens": distilled.sum(),
        "teacher_log_ratio_sum": log_ratio.sum(),
        "k2_sum": (log_ratio.square() / 2).sum(),
    }
    kl = None
    if objective.exact_kd in ("rkl", "rkl+fkl"):
        assert rows.kl is not None
        kl = torch.where(distilled, rows.kl, 0).to(wide)
        metrics["kl_sum"] = kl.sum()
    if rows.advantages is not None and objective.policy != "off" and objective.kd != "jsd":
        pull = kd_pull(objective, log_ratio)
        if objective.kd_baseline is not None:
            assert kl is not None
            pull = pull - kl
        weight = 1.0 if rows.kd_weight is None else rows.kd_weight.to(wide)
        advantages = rows.advantages.to(wide)
        flipped = advantages * (advantages - objective.kd_coef * weight * pull) < 0
        metrics["kd_flipped"] = (distilled & flipped).sum()
    return metrics


def mean_metrics(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the sums and counts of LossOutput.metrics into means and shares, without waiting.

    Args:
        metrics: of one call, or of several, added up key by key (the maximum for ratio_max).
    Returns: 0-d tensors, each where its sum is in metrics and 0 where its count is 0: ratio_mean,
        clip_fraction, entropy_mean, kd_flip_fraction and entries_mean per token;
        teacher_log_ratio_mean, k2_mean, kl_mean and topk_divergence_mean per distilled token;
        sketch_noise anew from its two sums; ratio_max, tokens, gradient_rows and bad_tokens as they
        are.
    """
    means = {
        name: metrics[total].to(sum_dtype(metrics[total].device)) / metrics[count].clamp_min(1)
        for name, (total, count) in MEANS.items()
        if total in metrics
    }
    if "sketch_variance_sum" in metrics:
        squares = metrics["sketch_square_sum"].clamp_min(torch.finfo(torch.float64).tiny)
        means["sketch_noise"] = (metrics["sketch_variance_sum"] / squares).sqrt()
    return means | {name: metrics[name] for name in UNCHANGED if name in metrics}
