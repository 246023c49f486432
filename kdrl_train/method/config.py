"""Settings of the objective: the method, and coefficients that change during a run."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from kdrl_train.config_file import at_least, in_unit_interval, positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """A coefficient as a function of the step s: method.kd_coef, method.policy_coef."""

    kind: Literal[
        "constant", "linear", "cosine", "step", "switch", "kl_budget", "reward_adaptive"
    ] = "constant"
    """constant: initial. linear, cosine: from initial to final over `steps`, then final. step:
    piecewise constant, see `at`. switch: initial, and final from step `steps` or a plateau on.
    kl_budget: moved so that the KL to the teacher stays at target_kl. reward_adaptive:
    initial · 4p(1 - p), p the share of right completions of each group."""
    initial: float = 2e-3
    """Value at step 0."""
    final: float = 2e-3
    """Value from step `steps` on; read by linear, cosine and switch."""
    steps: int = 80
    """Length of the change, in steps; switch: the step that it happens at the latest."""
    at: tuple[int, ...] = ()
    """step: from step at[i] on the value is values[i]; before at[0] it is initial."""
    values: tuple[float, ...] = ()
    """step: one value for each of `at`."""
    patience: int = 0
    """switch: a plateau is this many evaluations in a row without a gain; 0: by `steps` alone."""
    min_gain: float = 0.0
    """switch: an evaluation gains if its avg@k is above the best so far by more than this share."""
    target_kl: float = 0.1
    """kl_budget: mean KL to the teacher that is aimed at, in nats per distilled token."""
    gain: float = 0.1
    """kl_budget: largest change in one step, as a share of the value."""
    bounds: tuple[float, float] = (1e-4, 1.0)
    """kl_budget: smallest and largest value."""

    def check(self, key: str) -> None:
        """Raise ValueError for a number out of range; it names `key`, the schedule's own key."""
        low, high = self.bounds
        rising = all(a < b for a, b in pairwise((0, *self.at)))
        rules = {
            "initial": (0 <= self.initial < math.inf, "finite and at least 0"),
            "final": (0 <= self.final < math.inf, "finite and at least 0"),
            "steps": (self.steps >= 1, "at least 1"),
            "at": (rising, "increasing steps from 1 on"),
            "values": (
                len(self.values) == len(self.at) and all(0 <= v < math.inf for v in self.values),
                f"{len(self.at)} numbers, one for each of at, finite and at least 0",
            ),
            "patience": (self.patience >= 0, "at least 0"),
            "min_gain": (0 <= self.min_gain < math.inf, "finite and at least 0"),
            "target_kl": (0 < self.target_kl < math.inf, "positive and finite"),
            "gain": (0 < self.gain < 1, "in (0, 1)"),
            "bounds": (0 < low <= high < math.inf, "two positive numbers, the smaller one first"),
        }
        if self.kind == "step":
            rules["at"] = (rising and bool(self.at), "one or more increasing steps from 1 on")
        if self.kind == "kl_budget":
            rules["initial"] = (low <= self.initial <= high, f"in {key}.bounds, {low} to {high}")
        for name, (holds, what) in rules.items():
            if not holds:
                raise ValueError(f"{key}.{name} must be {what}, got {getattr(self, name)}")

    @property
    def waits_for_plateau(self) -> bool:
        """Whether the value depends on the validation score."""
        return self.kind == "switch" and self.patience > 0

    @property
    def reads_history(self) -> bool:
        """Whether the value depends on more than the step."""
        return self.waits_for_plateau or self.kind == "kl_budget"


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The objective. A preset is a value of this class, never a code path."""

    policy: Literal["clip", "none", "off"] = "clip"
    """Policy gradient: clip (GRPO, PPO), none (no clip), off (distillation alone)."""
    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    policy_coef: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(initial=1.0, final=1.0)
    )
    """Weight of the policy gradient, on the advantages; where it is 0 so are they."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (reward - mean) / std of the group; dr_grpo: no std; rloo: leave-one-out mean."""
    std_floor: float = 1e-4
    """Smallest standard deviation that `grpo` divides by, in units of the reward."""
    token_weights: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean over tokens; mean over completions of token means; sum / (R * max_new_tokens)."""
    kd: Literal["k2", "k3", "rkl", "fkl", "jsd", "reward"] | None = "k2"
    """Distillation: k2, k3 on sampled tokens; rkl, fkl, jsd over the vocabulary; None: off; reward:
    no term of the loss, but beta · sum over tokens of (log q - log p) added to the reward."""
    kd_baseline: Literal["kl"] | None = None
    """kl: k2 of log p - log q less the exact KL, usually with less noise; needs a teacher in this
    process."""
    jsd_alpha: float = 0.5
    """The teacher's share of the mixture of jsd, in (0, 1)."""
    kd_coef: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Beta: weight of the distillation term against the policy gradient."""
    kd_mask: Literal["none", "wrong", "wrong_group"] = "none"
    """Distil everywhere; on wrong completions only; only where the whole group is wrong."""
    kd_eos: Literal["keep", "mask"] = "keep"
    """mask: end-of-sequence tokens are not distilled; for a teacher that ends with others."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight each token's loss by w = p(trainer) / p(sampler), both before the first update:
    truncate: min(w, sampler_cap); mask: w, and 0 outside of [1 / sampler_cap, sampler_cap]. What
    the sum is divided by stays. Costs a forward pass of the policy."""
    sampler_cap: float = 2.0
    """Bound of sampler_correction, above 1."""

    def __post_init__(self) -> None:
        in_unit_interval("method.clip_low", self.clip_low)
        at_least(0, "method.clip_high", self.clip_high)
        positive("method.std_floor", self.std_floor)
        if self.kd_baseline is not None and self.kd != "k2":
            raise ValueError(f'method.kd must be "k2" with method.kd_baseline, got {self.kd}')
        if not 0 < self.jsd_alpha < 1:
            raise ValueError(f"method.jsd_alpha must be in (0, 1), got {self.jsd_alpha}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"method.entropy_coef must be finite, got {self.entropy_coef}")
        if not 1 < self.sampler_cap < math.inf:
            raise ValueError(
                f"method.sampler_cap must be above 1 and finite, got {self.sampler_cap}"
            )
        for key, schedule in self.schedules.items():
            schedule.check(key)
        if self.policy_coef.kind in ("kl_budget", "reward_adaptive"):
            raise ValueError(
                "method.policy_coef.kind must be a function of the step or a switch, got "
                f'"{self.policy_coef.kind}": it is for method.kd_coef'
            )
        if self.policy == "off" and self.kd in (None, "reward"):
            raise ValueError(
                'method.kd must be "k2", "k3", "rkl", "fkl" or "jsd" when method.policy is "off", '
                f"got {self.kd}: nothing would be trained; set one of the two"
            )

    @property
    def schedules(self) -> dict[str, ScheduleConfig]:
        """Every schedule by its key."""
        return {"method.kd_coef": self.kd_coef, "method.policy_coef": self.policy_coef}
