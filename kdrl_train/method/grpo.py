"""Computes advantages, distillation weights and token weights by pure functions, without a model.

P prompts, G completions per prompt, R = P * G completions, N tokens of one micro-batch.

Departures from KDRL (arXiv 2506.02208) and GRPO, each a setting of MethodConfig where it matters:

- The advantage divides by max(std, std_floor), std with G - 1 degrees of freedom as in the public
  trainers; GRPO writes std alone. A group whose rewards are all equal has advantage exactly 0.
- Token weights default to the mean over all tokens of the step (`token_mean`); GRPO's own mean of
  completion means is `sequence_mean`.
- A completion whose reward is NaN (the reward function failed) leaves its group: it enters neither
  mean nor std, its tokens have weight 0 and are not counted in the normaliser.
- Both models are read at the sampling temperature, so that the KL is that of the distributions
  that are sampled from.
- Several updates per rollout are mini-batches of whole groups, each completion used once, as the
  public trainers do it; GRPO's own mu counts passes over the same completions.
"""

import math

import torch
from torch import Tensor

from kdrl_train.method.config import MethodConfig, ScheduleConfig


def group_advantages(rewards_PG: Tensor, estimator: str, std_floor: float = 1e-4) -> Tensor:
    """Compute the advantages of groups; the arithmetic is float64.

    grpo: (r - mean) / max(std, std_floor) · dr_grpo: r - mean · rloo: r - mean of the others ·
    constant: 1. On-policy E[log p's gradient] = 0, so constant's policy gradient is 0 on average:
    a control that has the noise of a policy gradient and nothing of the reward.

    Args:
        rewards_PG: [P, G] float. NaN marks a completion without a reward: it enters no mean or std.
        estimator: "grpo", "dr_grpo", "rloo" or "constant".
        std_floor: smallest standard deviation that "grpo" divides by, in units of the reward.
    Returns: [P, G] float32; 0 where the reward is NaN; but for "constant", where a group has one
        reward only, and, exactly, where all rewards of a group are equal.
    Raises: ValueError for an unknown estimator, a rank other than 2, or a group without any number.
    """
    if rewards_PG.ndim != 2:
        raise ValueError(f"rewards_PG must be [P, G], got {list(rewards_PG.shape)}")
    rewards = rewards_PG.double()
    valid = ~rewards.isnan()
    count = valid.sum(dim=1, keepdim=True)
    if (count == 0).any():
        group = int((count == 0).flatten().nonzero()[0])
        raise ValueError(
            f"rewards_PG must hold a number in every group, got only NaN in group {group} of this "
            "step: the reward function failed on all of its completions; leave the group out"
        )
    rewards = rewards.where(valid, 0.0)
    mean = rewards.sum(dim=1, keepdim=True) / count
    centred = (rewards - mean).where(valid & ~all_equal(rewards_PG), 0.0)
    others = (count - 1).clamp_min(1)
    if estimator == "grpo":
        std = (centred.square().sum(dim=1, keepdim=True) / others).sqrt()
        return (centred / std.clamp_min(std_floor)).float()
    if estimator == "dr_grpo":
        return centred.float()
    if estimator == "rloo":
        return (centred * count / others).float()
    if estimator == "constant":
        return valid.float()
    raise ValueError(
        f'estimator must be "grpo", "dr_grpo", "rloo" or "constant", got "{estimator}"'
    )


def all_equal(rewards_PG: Tensor) -> Tensor:
    """Whether all rewards of a group that are numbers are the same number, [P, 1] bool."""
    high = rewards_PG.nan_to_num(nan=-math.inf).amax(dim=1, keepdim=True)
    low = rewards_PG.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True)
    return high == low


def kd_mask(right_PG: Tensor, mask: str) -> Tensor:
    """Mask the completions that are distilled, by the verdicts on them.

    Args:
        right_PG: [P, G] bool; False also where there is no reward.
        mask: "none" (all), "wrong" (not right), "wrong_group" (no right one in the whole group).
    Returns: [P, G] float32 of 0 and 1.
    Raises: ValueError for an unknown mask.
    """
    wrong = ~right_PG
    if mask == "none":
        return torch.ones_like(right_PG, dtype=torch.float32)
    if mask == "wrong":
        return wrong.float()
    if mask == "wrong_group":
        return wrong.all(dim=1, keepdim=True).expand_as(wrong).float()
    raise ValueError(f'mask must be "none", "wrong" or "wrong_group", got "{mask}"')


def token_weights(
    lengths_R: Tensor, used_R: Tensor, mode: str, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Weight each token of a completion, and say what the weighted sum is divided by.

    token_mean: 1, divided by the step's tokens · sequence_mean: 1 / length, divided by the
    step's completions · constant: 1, divided by completions · max_new_tokens

    Args:
        lengths_R: [R] int, tokens of each completion, at least 1.
        used_R: [R] bool; False takes the completion out of weights and normaliser.
        mode: "token_mean", "sequence_mean" or "constant".
        max_new_tokens: longest completion allowed, in tokens.
    Returns: weights [R] float32, one for all tokens of a completion; normaliser, 0-d float64.
    Raises: ValueError for an unknown mode.
    """
    kept = used_R.double()
    if mode == "token_mean":
        return kept.float(), (kept * lengths_R).sum()
    if mode == "sequence_mean":
        return (kept / lengths_R).float(), kept.sum()
    if mode == "constant":
        return kept.float(), kept.sum() * max_new_tokens
    raise ValueError(
        f'mode must be "token_mean", "sequence_mean" or "constant", got "{mode}": '
        "set method.token_weights"
    )


def group_factor(schedule: ScheduleConfig, rewards_PG: Tensor, right_PG: Tensor) -> Tensor:
    """Compute each group's share of the scheduled coefficient, [P, 1] float64.

    reward_adaptive: 4p(1 - p), p the share of right completions among those with a reward: 1 where
    the group is undecided, 0 where it is all right or all wrong. Every other kind: 1.
    """
    if schedule.kind != "reward_adaptive":
        return torch.ones(len(rewards_PG), 1, dtype=torch.float64)
    known = (~rewards_PG.isnan()).sum(dim=1, keepdim=True)
    p = right_PG.sum(dim=1, keepdim=True).double() / known
    return 4 * p * (1 - p)


def kd_weights(rewards_PG: Tensor, right_PG: Tensor, method: MethodConfig, beta: float) -> Tensor:
    """Weight each completion's distillation: beta · group factor · mask, [R] float32.

    Args:
        rewards_PG: [P, G] float; NaN marks a completion whose reward function failed.
        right_PG: [P, G] bool, the verdicts.
        beta: the schedule's value at this step.
    Returns: [R] float32; 0 without distillation.
    """
    if method.kd is None:
        return torch.zeros(rewards_PG.numel())
    factor = beta * group_factor(method.kd_coef, rewards_PG, right_PG)
    return (factor.float() * kd_mask(right_PG, method.kd_mask)).flatten()


def shaped_rewards(rewards_PG: Tensor, kd_weight_R: Tensor, log_ratio_R: Tensor) -> Tensor:
    """Add beta · sum_t (log q - log p) of each completion to its reward (kd "reward").

    Args:
        rewards_PG: [P, G] float64.
        kd_weight_R: [R] float32, of kd_weights.
        log_ratio_R: [R] float64, sum over the tokens of log p - log q, nats.
    Returns: [P, G] float64, before the group is normalised.
    """
    return rewards_PG - (kd_weight_R * log_ratio_R).view_as(rewards_PG)


def advantages(rewards_PG: Tensor, method: MethodConfig, policy_coef: float) -> Tensor:
    """Advantage of each completion times the weight of the policy gradient, [R] float32.

    Args:
        rewards_PG: [P, G] float, shaped where the method shapes them; NaN: no reward.
        policy_coef: the schedule's value at this step.
    Returns: [R] float32; 0 where the method has no policy gradient.
    """
    if method.policy == "off":
        return torch.zeros(rewards_PG.numel())
    groups_PG = group_advantages(rewards_PG, method.advantage, method.std_floor)
    return (groups_PG * policy_coef).flatten()


def sampler_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, mode: str, cap: float
) -> tuple[Tensor, Tensor]:
    """Compute the importance weight w = exp(trainer - sampler) of each token, bounded.

    truncate: min(w, cap) (truncated importance sampling) · mask: w, and 0 outside [1 / cap, cap]
    (IcePop). NaN stays NaN, so that the loss shows it.

    Args:
        logprobs, sampled_logprobs: [N] nats, of the trainer's policy that was sent to the sampler,
            and as sampled.
        mode: "truncate" or "mask".
        cap: above 1.
    Returns: weights [N], and [N] bool, true where the bound or the mask took hold.
    Raises: ValueError for an unknown mode.
    """
    ratio = (logprobs - sampled_logprobs).exp()
    if mode == "truncate":
        return ratio.clamp(max=cap), ratio > cap
    if mode == "mask":
        outside = (ratio > cap) | (ratio < 1 / cap)
        return ratio.masked_fill(outside, 0.0), outside
    raise ValueError(
        f'mode must be "truncate" or "mask", got "{mode}": set method.sampler_correction'
    )


def minibatches(P: int, G: int, updates: int) -> list[Tensor]:
    """Masks [R] bool, one for each update: the completions that it learns from.

    The prompts are cut into `updates` equal runs (they come in random order), so that every
    completion is used once and no group is split. `updates` must divide P.
    """
    update_R = (torch.arange(P) // (P // updates)).repeat_interleave(G)
    return [update_R == update for update in range(updates)]
