"""Warms the `math` reward up when it is imported.

The verifier's fork server, which can be told to import modules and nothing else, imports it. The
workers forked from that server, also those that replace a killed one, are then warm at once.
"""

from kdrl_train.rollouts.rewards import math_reward, warm_up

warm_up(math_reward)
