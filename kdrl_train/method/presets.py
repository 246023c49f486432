"""Methods by name. A preset is a value, not a code path."""

from dataclasses import replace

from kdrl_train.method.config import MethodConfig, ScheduleConfig

_FIXED = ScheduleConfig()
_ANNEALED = ScheduleConfig(kind="linear", initial=5e-3, final=1e-3, steps=80)
_DISTIL_FIRST = ScheduleConfig(kind="switch", initial=1.0, final=0.0, steps=140)
_BY_COMPLETION = MethodConfig(kd=None, token_weights="sequence_mean")
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
    "kdrl_topk": MethodConfig(kd="topk_rkl", kd_coef=_FIXED),
    "reward_shaping": MethodConfig(kd="reward", kd_coef=_FIXED),
    "cispo": MethodConfig(kd=None, policy="cispo", clip_low=1.0, clip_high=4.0),
    "gspo": replace(_BY_COMPLETION, policy="gspo", clip_low=3e-4, clip_high=4e-4),
    "gmpo": replace(_BY_COMPLETION, policy="gmpo", clip_low=0.33, clip_high=0.49),
    "dapo": MethodConfig(kd=None, clip_high=0.28),
    "dppo": MethodConfig(kd=None, policy="dppo", clip_low=0.15, clip_high=0.15),
    "kdrl_tanh": MethodConfig(kd_coef=_FIXED, kd_tanh=1.0),
    "kdrl_sign_gate": MethodConfig(kd_coef=_FIXED, kd_sign_gate=True),
    "kdrl_prefix": MethodConfig(kd_coef=_FIXED, kd_prefix=0.5),
    "kdrl_entropy": MethodConfig(kd_coef=_FIXED, kd_min_entropy=0.5),
    "kdrl_gap": MethodConfig(kd_coef=_FIXED, kd_min_log_ratio=0.5),
    "exopd": MethodConfig(
        policy="off", kd_coef=ScheduleConfig(initial=1.0, final=1.0), extrapolation=1.25
    ),
    "constant_advantage": MethodConfig(kd_coef=_FIXED, advantage="constant"),
    "self_distillation": MethodConfig(kd="rkl", kd_coef=ScheduleConfig(initial=0.1, final=0.1)),
}
"""The paper's methods (arXiv 2506.02208); beta(s) of kdrl_annealed is max(5e-3 - 5e-5 s, 1e-3).

opd_then_rl: on-policy distillation, then RL. Both weights switch at the same step, or, given the
same patience, at the same plateau. That the step is half of the default 280 is our choice.

kdrl_topk: kdrl with a reverse KL over the teacher's kd_topk likeliest tokens and all others as one,
in the place of k2.

reward_shaping: reward + beta · sum_t (log q - log p) of the completion, before the group is
normalised; the loss has no distillation term. It is our reading of the form that the paper saw
collapse, kept as a baseline.

cispo, gspo, gmpo, dppo: policy gradients of method/losses.py, with the papers' formulas. gmpo's
bounds are exp(-0.4) and exp(0.4); cispo's ratio is at most 5, from below it has no bound. With
method.kd any of them takes a teacher. They are all the same, but for the weights of tokens, where
the ratio is 1: set optim.updates_per_rollout or engine.staleness. dppo's paper compares with the
sampler's own probabilities, as engine.staleness does here; without it these are the trainer's
before the step's first update.

dapo (arXiv:2503.14476): the clip is wider above, and the mean is over all tokens. Its length
penalty is a reward: set reward.overlong_buffer and reward.overlong_penalty. Groups without signal
are not sampled anew, as the paper does; they have no gradient.

kdrl_tanh to kdrl_gap: KDRL with the distillation of tokens bounded or chosen (MethodConfig's kd_
settings), related to arXiv:2606.09304 (signs), 2602.15260 (prefixes) and 2604.14084 (entropy and
disagreement), whose rules differ. The thresholds are ours, in nats.

self_distillation: for model.teacher self and data.teacher_template. The policy gradient, and the
exact reverse KL to the policy's own weights after a prompt that shows more; beta is our choice. The
form is that of arXiv:2606.04036 and 2602.04942. A teacher that has seen the answer, matched alone,
leaks what it was shown and becomes unstable (arXiv:2604.03128): that is method.policy "off", the
form of arXiv:2601.18734. Frozen weights (model.self_teacher) keep what is matched from moving.

exopd (arXiv:2602.12125): distillation alone, from q^1.25 · ref^-0.25. The paper weights log-ratios
of sampled tokens, lambda · log(q / ref) - log(p / ref); here that target is normalised in each row,
which changes the pull by a constant of the row, and so not its mean. Needs model.reference.

constant_advantage: a control. Every completion has advantage 1, so that the policy gradient is
noise around 0, and what is learnt comes from the teacher alone.
"""
