"""Weights the distillation of each completion of an update, before verl cuts it into micro-batches.

A distillation loss sees one micro-batch: neither which step it is, nor the other completions of a
group. BaseEngine.train_batch sees one update's completions of this rank, so schedule and masks are
computed there, and travel with the batch. The settings of a run are what has this module loaded,
since it loads verl's engines.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import BaseEngine

from kdrl_kernels.integrations.sequence_weights import (
    WEIGHT,
    needs_groups,
    rewards_by_group,
    sequence_weights,
)
from kdrl_kernels.integrations.verl.topk import KEY

Train = Callable[[Any, Any, Any], Any]


def install() -> None:
    """Let every engine of this process weight its batches; a second time changes nothing."""
    if not hasattr(BaseEngine.train_batch, "kdrl"):
        BaseEngine.train_batch = weighting(BaseEngine.train_batch)


def weighting(train_batch: Train) -> Train:
    """Wrap BaseEngine.train_batch: batches of a KDRL run get their weights first."""

    @wraps(train_batch)
    def train_weighted_batch(engine: Any, data: Any, loss_function: Any) -> Any:
        keywords = getattr(loss_function, "keywords", {})
        distillation = keywords.get("distillation_config")
        settings = getattr(distillation, "distillation_loss", None)
        if settings is not None and hasattr(settings, "method"):
            size = keywords["config"].rollout_n
            data[WEIGHT] = batch_weights(engine, data, settings, size)
            if settings.topk_term is not None:
                tu.assign_non_tensor_data(data, KEY, settings.topk_term)
        return train_batch(engine, data, loss_function)

    train_weighted_batch.kdrl = True  # type: ignore[attr-defined]
    return train_weighted_batch


def batch_weights(engine: Any, data: Any, settings: Any, group_size: int) -> Tensor:
    """Compute the weights [bsz] of one update's completions of this rank; all ranks call it.

    settings: a KdrlDistillationLossConfig.
    """
    method = settings.method
    rewards = rewards_of(data)
    groups = None
    if needs_groups(method):
        uids = uids_of(data)
        pairs = list(zip(uids, rewards, strict=True))
        everyone = shared(pairs, engine.get_data_parallel_group())
        groups = rewards_by_group(uids, everyone, group_size)
    weights = sequence_weights(
        rewards, method, step_of(engine), right_above=settings.right_above, groups=groups
    )
    return weights.to(data.device) if data.device is not None else weights


def step_of(engine: Any) -> int:
    """Return the number of the step, from 0: how often the learning rate was moved.

    verl moves it once a step, after the last update, and a checkpoint keeps the count.
    """
    step = getattr(getattr(engine, "lr_scheduler", None), "last_epoch", None)
    if step is None:
        raise ValueError(
            "the engine must have a learning-rate scheduler of PyTorch, whose steps "
            f"kd_coef_schedule counts, got {type(engine).__name__}: use the strategy fsdp or fsdp2"
        )
    return int(step)


def rewards_of(data: Any) -> list[float]:
    """Sum the rewards of the tokens of each completion."""
    for key in ("token_level_scores", "rm_scores"):
        scores = data.get(key, None)
        if scores is not None:
            rows = scores.unbind() if scores.is_nested else scores
            return [float(row.double().sum()) for row in rows]
    raise ValueError(
        "the batch must hold token_level_scores or rm_scores, by which kd_mask and schedules judge "
        f"completions, got {sorted(map(str, data.keys()))}"
    )


def uids_of(data: Any) -> list[Hashable]:
    """Return the name of the group of each completion."""
    uids = data.get("uid", None)
    if uids is None:
        raise ValueError(
            "the batch must hold uid, by which kd_mask wrong_group and schedule reward_adaptive "
            f"know a group, got {sorted(map(str, data.keys()))}"
        )
    return list(uids.tolist() if hasattr(uids, "tolist") else uids)


def shared(pairs: list[tuple[Hashable, float]], group: Any) -> list[tuple[Hashable, float]]:
    """Join the pairs of all ranks of a group; None: of all processes."""
    if not dist.is_initialized():
        return pairs
    parts: list[list[tuple[Hashable, float]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, pairs, group)
    return [pair for part in parts for pair in part]
