"""The file for --external_plugins of swift rlhf: GRPO and GKD by the head of kdrl_kernels.

ms-swift loads it by its path, for the sake of what it changes: the table of trainers, and the
checks that refuse a teacher, and more, beside use_liger_kernel. Those are limits of Liger's loss,
which these trainers do not use.
"""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from swift.arguments import RLHFArguments
from swift.trainers.trainer_factory import TrainerFactory

from kdrl_kernels.integrations.swift import PLUGIN

TRAINERS = {
    "grpo": "kdrl_kernels.integrations.swift.grpo.SwiftGRPOTrainer",
    "gkd": "kdrl_kernels.integrations.swift.gkd.SwiftGKDTrainer",
}
CHECKS = ("_check_teacher", "_check_grpo", "_check_gkd")
LIFTED = "lifted_by_kdrl"


def without_liger(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a check of RLHFArguments that does not see use_liger_kernel in GRPO and GKD."""

    @wraps(check)
    def lifted(self: Any) -> None:
        liger = self.use_liger_kernel
        self.use_liger_kernel = liger and self.rlhf_type not in TRAINERS
        try:
            check(self)
        finally:
            self.use_liger_kernel = liger

    setattr(lifted, LIFTED, True)
    return lifted


def install() -> None:
    """Put the trainers and checks in their places; a second call changes nothing."""
    TrainerFactory.TRAINER_MAPPING.update(TRAINERS)
    for name in CHECKS:
        check = getattr(RLHFArguments, name)
        if not hasattr(check, LIFTED):
            setattr(RLHFArguments, name, without_liger(check))


folder = str(Path(PLUGIN).parent)  # ms-swift put it first in the path, where "import head" looks
sys.path[:] = [path for path in sys.path if path != folder]
install()
