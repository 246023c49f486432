"""Trains with TRL's GRPOTrainer by a lean head and a teacher. Guide: ../README.md."""

from kdrl_kernels.integrations.versions import require

require("trl", "1.16", "pip install 'kdrl-kernels[trl]'")

from kdrl_kernels.integrations.trl.config import KdrlConfig  # noqa: E402 (after the check)
from kdrl_kernels.integrations.trl.distillation import (  # noqa: E402
    KdrlDistillationConfig,
    KdrlDistillationTrainer,
)
from kdrl_kernels.integrations.trl.patch import patch_trl, unpatch_trl  # noqa: E402
from kdrl_kernels.integrations.trl.trainer import KdrlTrainer  # noqa: E402

__all__ = [
    "KdrlConfig",
    "KdrlDistillationConfig",
    "KdrlDistillationTrainer",
    "KdrlTrainer",
    "patch_trl",
    "unpatch_trl",
]
