"""Computes the metrics of a step from its rewards and from sums over its tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdrl_train.method.grpo import all_equal
from kdrl_train.method.histogram import PERCENTILES, quantiles


def reward_metrics(
    rewards_PG: Tensor, right_PG: Tensor, parts: Mapping[str, Sequence[float]] | None = None
) -> dict[str, float]:
    """Compute mean reward, share of right completions and share of groups with signal.

    A reward of NaN is left out. A group has signal when two of its rewards differ: only then has it
    a policy gradient.

    Args:
        rewards_PG: [P, G] float.
        right_PG: [P, G] bool, as the verifier says.
        parts: name -> [P * G] values of each reward; where there are several, their means count.
    """
    known_PG = ~rewards_PG.isnan()
    return {
        "reward": rewards_PG[known_PG].double().mean().item(),
        "accuracy": right_PG[known_PG].double().mean().item(),
        "groups_with_signal": (~all_equal(rewards_PG)).double().mean().item(),
        "rewards_missing": float((~known_PG).sum()),
        **{
            f"reward/{name}": torch.tensor(values, dtype=torch.float64)[known_PG.flatten()]
            .mean()
            .item()
            for name, values in (parts or {}).items()
            if len(parts or {}) > 1
        },
    }


LARGEST = ("sampler_mismatch_max",)
"""Keys of which the largest counts where others are added up."""


def add_sums(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add `part` to `total` key by key (of LARGEST take the larger); a missing key counts as 0."""
    joined = dict(total)
    for key, value in part.items():
        join = torch.maximum if key in LARGEST else torch.add
        joined[key] = join(joined[key], value) if key in joined else value
    return joined


OF_TEACHERS = ("kd_tokens", "kl_sum", "teacher_log_ratio_sum")
"""Sums that are kept for each of several teachers too, under KEY/NAME."""


def teacher_sums(sums: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the sums of a pack again, under keys of the teacher of all its completions."""
    return {f"{key}/{name}": sums[key] for key in OF_TEACHERS if key in sums}


def _mean(values: Mapping[str, float], key: str, count: str) -> float | None:
    """Divide a sum by a count; None where there is no such sum, or nothing was counted."""
    if key not in values or values.get(count, 0.0) == 0.0:
        return None
    return values[key] / values[count]


def _share(values: Mapping[str, float], count: str) -> float:
    """Return which share of the step's tokens was counted; 0 for a step without tokens."""
    return values.get(count, 0.0) / max(values.get("tokens", 0.0), 1.0)


def _sketch_means(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return the means of a sketched head, none for another one."""
    if "entries" not in values:
        return {}
    variance = _mean(values, "sketch_variance_sum", "sketch_square_sum")
    return {
        "sketch_entries": _mean(values, "entries", "tokens"),
        "sketch_flat_share": _mean(values, "flat_rows", "tokens"),
        "sketch_noise": None if variance is None else variance**0.5,
    }


def _teacher_means(values: Mapping[str, float], name: str) -> dict[str, float | None]:
    """Return the means of one of several teachers."""
    log_ratio = _mean(values, f"teacher_log_ratio_sum/{name}", f"kd_tokens/{name}")
    exact = _mean(values, f"kl_sum/{name}", f"kd_tokens/{name}")
    return {
        f"kl_teacher/{name}": log_ratio if exact is None else exact,
        f"teacher_log_ratio/{name}": log_ratio,
        f"kd_share/{name}": _share(values, f"kd_tokens/{name}"),
    }


def token_means(sums: dict[str, Tensor], teachers: Sequence[str] = ()) -> dict[str, float | None]:
    """Divide a step's sums into means per token; None where the step has no such token.

    kl_teacher is the exact KL(student ‖ teacher) where the loss computes it, otherwise its
    unbiased estimate, the mean of l = log p - log q over the sampled tokens; nats per token.
    teacher_log_ratio_p50 and its like are quantiles of l, to the width of a histogram's interval.
    With a sketched head, sketch_entries is the number of entries kept of a token's dL/dlogits,
    sketch_flat_share the share of tokens too flat to be sketched, whose gradient is exact, and
    sketch_noise the relative error to expect of the gradient of its hidden state; None where no
    entry was kept but that of the sampled token.
    topk_divergence is the mean of a divergence over the teacher's likeliest tokens.
    kd_selected is the share of the distilled tokens that the method's settings of single tokens
    (kd_sign_gate and its like) leave; only where it has some. kd_flip_share is the share of tokens
    whose advantage changes its sign when the pull of distillation is subtracted.

    Args:
        sums: the keys of kk.LossOutput.metrics that add up, sampler_mismatch_sum and _max, and
            teacher_log_ratio_histogram [SIZE]; a key that no loss had may be missing.
        teachers: the names of several teachers, whose teacher_sums are among the sums. Each gets
            kl_teacher/NAME, teacher_log_ratio/NAME and kd_share/NAME, which add up to kd_share.
    """
    values = {key: value.item() for key, value in sums.items() if value.ndim == 0}
    kl = _mean(values, "kl_sum", "kd_tokens")
    log_ratio = _mean(values, "teacher_log_ratio_sum", "kd_tokens")
    spread: list[float | None] = [None] * len(PERCENTILES)
    if values.get("kd_tokens", 0.0) > 0:
        spread = [*quantiles(sums["teacher_log_ratio_histogram"])]
    means = {
        "entropy": _mean(values, "entropy_sum", "tokens"),
        "clip_fraction": _mean(values, "clipped", "tokens"),
        "kl_teacher": log_ratio if kl is None else kl,
        "teacher_log_ratio": log_ratio,
        **{f"teacher_log_ratio_p{q}": value for q, value in zip(PERCENTILES, spread, strict=True)},
        "k2": _mean(values, "k2_sum", "kd_tokens"),
        "kd_flip_share": _mean(values, "kd_flipped", "tokens"),
        "kd_share": _share(values, "kd_tokens"),
        "sampler_mismatch_mean": _mean(values, "sampler_mismatch_sum", "tokens"),
        "sampler_mismatch_max": values.get("sampler_mismatch_max"),
        **_sketch_means(values),
    }
    if "kd_selected" in values:
        means["kd_selected"] = _mean(values, "kd_selected", "kd_tokens")
    if "topk_divergence_sum" in values:
        means["topk_divergence"] = _mean(values, "topk_divergence_sum", "kd_tokens")
    for name in teachers:
        means |= _teacher_means(values, name)
    return means
