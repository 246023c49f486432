"""Methods by name. A preset is a value, not a code path."""

from dataclasses import replace

from kdrl_train.method.config import MethodConfig, ScheduleConfig

_FIXED = ScheduleConfig()
_ANNEALED = ScheduleConfig(kind="linear", initial=5e-3, final=1e-3, steps=80)
_DISTIL_FIRST = ScheduleConfig(kind="switch", initial=1.0, final=0.0, steps=140)
PRESETS: dict[str, MethodConfig] = {
    "grpo": MethodConfig(kd=None),
    "kd_rkl": MethodConfig(policy="off", kd_coef=ScheduleConfig(initial=1.0, final=1.0)),
    "kdrl": MethodConfig(kd_coef=_FIXED),
    "kdrl_annealed": MethodConfig(kd_coef=_ANNEALED),
    "kdrl_masked": MethodConfig(kd_coef=_FIXED, kd_mask="wrong"),
    "kdrl_group_masked": MethodConfig(kd_coef=_FIXED, kd_mask="wrong_group"),
    "opd_then_rl": MethodConfig(
        kd_coef=_DISTIL_FIRST, policy_coef=replace(_DISTIL_FIRST, initial=0.0, final=1.0)
    ),
    "reward_shaping": MethodConfig(kd="reward", kd_coef=_FIXED),
}
"""The paper's methods (arXiv 2506.02208); beta(s) of kdrl_annealed is max(5e-3 - 5e-5 s, 1e-3).

opd_then_rl: on-policy distillation, then RL. Both weights switch at the same step, or, given the
same patience, at the same plateau. That the step is half of the default 280 is our choice.

reward_shaping: reward + beta · sum_t (log q - log p) of the completion, before the group is
normalised; the loss has no distillation term. It is our reading of the form that the paper saw
collapse, kept as a baseline.
"""
