"""Warms `math` up when imported. For the verifier's fork server alone, which can only be asked for
imports: workers forked from it, also those that replace a killed one, are warm at once."""

from kdrl_train.rollouts.rewards import math_reward, warm_up

warm_up(math_reward)
