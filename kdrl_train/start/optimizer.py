"""Makes the optimiser of a run by its name."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kdrl_train.config import OptimConfig
from kdrl_train.config.learning import OF_BITSANDBYTES
from kdrl_train.ranks import ALONE, World


def require_optimizer(config: OptimConfig, world: World = ALONE) -> Any:
    """Return the class of optim.name in bitsandbytes; None for torch's optimisers.

    Raises: ValueError for one of bitsandbytes, whose states are not sharded, with torchrun, or
        where that is not installed or has no code for the device.
    """
    if config.name not in OF_BITSANDBYTES:
        return None
    if world.launched:
        raise ValueError(
            f'optim.name must be "adamw" or "sgd" with torchrun, got "{config.name}": bitsandbytes '
            "takes no sharded weights; start one process, or set optim.name"
        )
    try:
        return getattr(importlib.import_module("bitsandbytes.optim"), OF_BITSANDBYTES[config.name])
    except (ImportError, RuntimeError) as error:  # RuntimeError: its library is for other GPUs
        raise ValueError(
            f'optim.name must be "adamw" or "sgd" without bitsandbytes, got "{config.name}" and '
            f"{error}: pip install 'kdrl-kernels[bitsandbytes]'"
        ) from error


def make_optimizer(
    config: OptimConfig, parameters: Iterable[nn.Parameter], world: World = ALONE
) -> torch.optim.Optimizer:
    """Make optim.name over those of the parameters that are trained.

    Raises: ValueError as require_optimizer.
    """
    kind = require_optimizer(config, world)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    on_gpu = all(parameter.is_cuda for parameter in trained)
    if config.name == "sgd":
        return torch.optim.SGD(trained, momentum=config.momentum, **options, fused=on_gpu or None)
    options["betas"] = config.betas
    if kind is None:
        # one kernel for all weights in place of a dozen for each group of them
        return torch.optim.AdamW(trained, **options, fused=on_gpu or None)
    optimizer: torch.optim.Optimizer = kind(trained, **options)
    return optimizer
