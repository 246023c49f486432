"""Brings KDRL to verl: importing this package is loading the plugin.

verl does so by itself, by the entry point "kdrl" of the group verl.plugins, in every process where
it is imported; VERL_USE_EXTERNAL_MODULES=kdrl_kernels.integrations.verl does so where the
distribution is not installed. Names are added to verl's, and nothing that verl does under its own
names changes:

    model.fused_kernel_options.impl_backend  "kdrl": the fused head, by linear_logprobs
    actor.policy_loss.loss_mode              "kdrl": the clipped policy gradient
    distillation.distillation_loss.loss_mode "kdrl_k2", "kdrl_k3", "kdrl_k3_ratio"; with
                                             _target_ KdrlDistillationLossConfig also schedule,
                                             mask and clamp, and "kdrl_topk_rkl", "kdrl_topk_fkl",
                                             "kdrl_topk_jsd"

README.md here shows a command line.
"""

import logging

from kdrl_kernels.integrations.versions import require

try:
    require("verl", "0.9", 'pip install "kdrl-kernels[verl]"')
except ImportError as error:  # verl hides what a plugin raises
    logging.getLogger(__name__).warning("%s", error)
    raise

from kdrl_kernels.integrations.verl import head, losses
from kdrl_kernels.integrations.verl.config import KdrlDistillationLossConfig

__all__ = ["KdrlDistillationLossConfig"]

head.install()
losses.register()
