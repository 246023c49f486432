"""Logs means over the tokens of all processes, from the counts and sums of a head's pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MEANS = {
    "teacher_log_ratio": ("teacher_log_ratio_sum", "kd_tokens"),
    "k2": ("k2_sum", "kd_tokens"),
    "kl": ("kl_sum", "kd_tokens"),
    "forward_kl": ("forward_kl_sum", "kd_tokens"),
    "jsd": ("jsd_sum", "kd_tokens"),
    "topk_divergence": ("topk_divergence_sum", "kd_tokens"),
    "kd_flipped": ("kd_flipped", "tokens"),
}
"""What is logged as kdrl/<name>: a sum, and the count that divides it, of LossOutput.metrics."""
DO_NOT_ADD_UP = ("ratio_max", "sketch_noise")


def log_means(
    log: Mapping[str, list[float]], metrics: Mapping[str, Tensor], ranks: Any
) -> dict[str, float]:
    """Append means to the lists of a log; every process must call it.

    Args:
        log: TRL's metrics, a list of numbers each.
        metrics: of this process, as in LossOutput.
        ranks: accelerate's Accelerator.
    Returns: the sums over all processes.
    """
    names = sorted(set(metrics) - set(DO_NOT_ADD_UP))
    local = torch.stack([metrics[name].double() for name in names])
    totals = dict(zip(names, ranks.reduce(local, "sum").tolist(), strict=True))
    for name, (total, count) in MEANS.items():
        if total in totals and totals.get(count):
            log[f"kdrl/{name}"].append(totals[total] / totals[count])
    if totals.get("sketch_square_sum"):
        noise = totals["sketch_variance_sum"] / totals["sketch_square_sum"]
        log["kdrl/sketch_noise"].append(noise**0.5)
    return totals
