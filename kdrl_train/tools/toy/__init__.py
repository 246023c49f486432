"""Makes toy tasks: problems with worked solutions, from a seed."""

from kdrl_train.tools.toy.arithmetic import ArithmeticConfig, make_arithmetic
from kdrl_train.tools.toy.countdown import CountdownConfig, countdown_reward, make_countdown
from kdrl_train.tools.toy.splits import TASKS, make_splits

__all__ = [
    "TASKS",
    "ArithmeticConfig",
    "CountdownConfig",
    "countdown_reward",
    "make_arithmetic",
    "make_countdown",
    "make_splits",
]
