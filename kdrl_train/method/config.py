"""Settings of the objective: the method, and coefficients that change during a run."""

from dataclasses import field, replace
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from kdrl_train.settings import (
    Finite,
    NaturalFloat,
    NaturalInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
    Switch,
    settings,
)


@settings
class ScheduleConfig:
    """A coefficient as a function of the step s: method.kd_coef, method.policy_coef."""

    kind: Literal[
        "constant", "linear", "cosine", "step", "switch", "kl_budget", "reward_adaptive"
    ] = "constant"
    """How the value changes. constant: it stays at initial. linear, cosine: from initial to final
    in `steps` steps, then final. step: it jumps at the steps in `at`. switch: initial first, final
    from step `steps` on, or from a plateau on if that is earlier. kl_budget: it is adapted so that
    the KL to the teacher stays near target_kl. reward_adaptive: initial · 4p(1 - p), where p is the
    share of right completions in each group."""
    initial: NaturalFloat = 2e-3
    """The coefficient (kd_coef: beta) at step 0."""
    final: NaturalFloat = 2e-3
    """The coefficient from step `steps` on; used by linear, cosine and switch."""
    steps: PositiveInt = 80
    """Length of the change, in steps; switch: the latest step at which it happens."""
    at: tuple[PositiveInt, ...] = ()
    """step: from step at[i] on the value is values[i]; before at[0] it is initial."""
    values: tuple[NaturalFloat, ...] = ()
    """step: one value for each step in `at`."""
    patience: NaturalInt = 0
    """switch: this many evaluations in a row without a gain are a plateau; 0: switch at `steps`
    only."""
    min_gain: NaturalFloat = 0.0
    """switch: an evaluation is a gain if its avg@k is above the best so far by more than this."""
    target_kl: PositiveFloat = 0.1
    """kl_budget: the mean KL to the teacher to keep, in nats per distilled token."""
    gain: OpenUnitInterval = 0.1
    """kl_budget: largest change in one step, as a share of the value."""
    bounds: tuple[PositiveFloat, PositiveFloat] = (1e-4, 1.0)
    """kl_budget: smallest and largest value."""

    def __post_init__(self) -> None:
        low, high = self.bounds
        rules = {
            "at": (all(a < b for a, b in pairwise(self.at)), "increasing steps"),
            "values": (
                len(self.values) == len(self.at),
                f"{len(self.at)} numbers, one for each of at",
            ),
            "bounds": (low <= high, "two numbers, the smaller one first"),
        }
        if self.kind == "step" and not self.at:
            rules["at"] = (False, 'one or more increasing steps for kind "step"')
        if self.kind == "kl_budget":
            rules["initial"] = (low <= self.initial <= high, f"in bounds, {low} to {high}")
        for name, (holds, what) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)}")

    @property
    def waits_for_plateau(self) -> bool:
        """Whether the value depends on the validation score."""
        return self.kind == "switch" and self.patience > 0

    @property
    def reads_history(self) -> bool:
        """Whether the value depends on more than the step."""
        return self.waits_for_plateau or self.kind == "kl_budget"


SELECTIONS = ("kd_sign_gate", "kd_min_entropy", "kd_min_log_ratio", "kd_tanh")
"""Settings of MethodConfig by which the distillation of a token depends on its row in the head."""
OF_THE_TERMS = (
    "policy",
    "clip_low",
    "clip_high",
    "kd_baseline",
    "fkl_share",
    "entropy_coef",
    *SELECTIONS,
)
"""Settings of MethodConfig that a loss of the user's own does not read."""

KdMask = Literal["none", "wrong", "wrong_group"]


@settings
class TeacherMethod:
    """How one of several teachers is distilled; what is not set is that of the method.

    The kind of distillation (method.kd) is one for all, so that the sums and the KL of a step mean
    the same for each of its tokens.
    """

    kd_coef: ScheduleConfig | None = None
    """Beta of this teacher, a whole schedule; None: method.kd_coef."""
    kd_mask: KdMask | None = None
    """Which completions this teacher distils; None: method.kd_mask."""
    kd_weight: NaturalFloat = 1.0
    """Beta of this teacher is multiplied by it."""


@settings
class MethodConfig:
    """The objective. A preset is a value of this class, never a code path."""

    policy: Literal["clip", "none", "off", "cispo", "dppo", "gspo", "gmpo"] = "clip"
    """Policy gradient: clip (as in GRPO and PPO), none (no clip), off (distillation only); cispo: a
    token keeps its gradient, weighted by its clipped ratio; dppo: tokens whose probability has
    moved too far are left out; gspo: the ratio is that of the whole completion; gmpo: the ratios of
    a completion count by their geometric mean; both are meant for token_weights sequence_mean."""
    clip_low: Probability = 0.2
    """The ratio is clipped from below at 1 - clip_low; cispo: 1 is no bound; dppo: the largest fall
    of a token's probability."""
    clip_high: NaturalFloat = 0.2
    """The ratio is clipped from above at 1 + clip_high; dppo: the largest rise of a token's
    probability."""
    policy_coef: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(initial=1.0, final=1.0)
    )
    """Weight of the policy gradient: advantages are multiplied by it."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "constant"] = "grpo"
    """Advantage of a completion. grpo: (reward - mean) / std of its group. dr_grpo: without the
    std. rloo: reward - mean of the other completions of its group. constant: 1, whatever the
    reward; a control, whose policy gradient is noise around 0."""
    std_floor: PositiveFloat = 1e-4
    """Smallest standard deviation that `grpo` divides by, in units of the reward."""
    token_weights: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How the loss is averaged. token_mean: over all tokens. sequence_mean: over the tokens of each
    completion, then over completions. constant: sum / (R * max_new_tokens)."""
    kd: (
        Literal[
            "k2", "k3", "rkl", "fkl", "jsd", "rkl+fkl", "topk_rkl", "topk_fkl", "topk_jsd", "reward"
        ]
        | None
    ) = "k2"
    """Distillation from teacher q to policy p. k2, k3: on sampled tokens. Over the whole
    vocabulary: rkl, the reverse KL(p‖q); fkl, the forward KL(q‖p); jsd; rkl+fkl, a mixture of both
    KLs (fkl_share). topk_rkl, topk_fkl, topk_jsd: the same over the teacher's kd_topk likeliest
    tokens. reward: no term in the loss; beta · sum over tokens of (log q - log p) is added to the
    reward. None: no distillation."""
    kd_topk: Annotated[int, Field(ge=1, le=512)] = 64
    """topk_*: how many of the teacher's likeliest tokens count at each place, 1 to 512."""
    kd_tail: Switch = True
    """topk_*: count the probability on none of these tokens as one more token. Without it topk_rkl
    and topk_fkl have another minimum than p = q."""
    kd_baseline: Literal["kl"] | None = None
    """kl: subtract the exact KL from log p - log q in k2: less noise for diffuse rows, more for
    peaked ones whose teacher is less sure. A teacher behind a URL needs teacher.head."""
    extrapolation: NaturalFloat = 1.0
    """lambda: the teacher's distribution is q^lambda · ref^(1 - lambda), normalised, where ref is
    model.reference. Above 1 it is beyond the teacher, seen from the reference (ExOPD); 1: the
    teacher alone."""
    jsd_alpha: OpenUnitInterval = 0.5
    """Share of the teacher in the mixture of jsd, above 0 and below 1."""
    fkl_share: OpenUnitInterval = 0.5
    """Share of the forward KL in rkl+fkl, above 0 and below 1; the rest is the reverse KL's."""
    kd_coef: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Beta: weight of the distillation term relative to the policy gradient."""
    kd_mask: KdMask = "none"
    """Which completions are distilled. none: all. wrong: wrong completions only. wrong_group: only
    those of groups in which every completion is wrong."""
    teachers: dict[str, TeacherMethod] = field(default_factory=dict, hash=False)
    """Name of one of model.teachers, or default -> its own kd_coef, kd_mask and kd_weight: {code:
    {kd_weight: 2, kd_mask: wrong}}."""
    kd_eos: Literal["keep", "mask"] = "keep"
    """mask: do not distil end-of-sequence tokens, for a teacher that ends with other tokens."""
    kd_prefix: Share = 1.0
    """Distil this share of each completion's tokens, the first ones (rounded up)."""
    kd_sign_gate: Switch = False
    """Distil only tokens whose pull to the teacher, log q - log p, does not oppose the sign of the
    advantage; all tokens where that, or policy_coef, is 0."""
    kd_min_entropy: NaturalFloat = 0.0
    """Distil only tokens where the policy's entropy is at least this, in nats; 0: all."""
    kd_min_log_ratio: NaturalFloat = 0.0
    """Distil only tokens where |log p - log q| is at least this, in nats; 0: all."""
    kd_tanh: PositiveFloat | None = None
    """c in nats: k2 and k3 read c · tanh((log p - log q) / c), so that no token is pulled by more
    than k2's c; None: no bound."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus, per nat."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Multiply each token's loss by w = p(trainer) / p(sampler), both before the step's first
    update. truncate: min(w, sampler_cap). mask: w, and 0 outside of [1 / sampler_cap, sampler_cap].
    The divisor of the mean does not change. Costs one more forward pass of the policy."""
    sampler_cap: Annotated[float, Field(gt=1)] = 2.0
    """Largest weight that sampler_correction gives, above 1."""
    loss: str | None = None
    """A loss of each token of your own in the place of policy gradient and distillation term, as
    module:function; the function is declared by kdrl_train.method.own_loss.token_loss."""
    loss_options: dict[str, Finite] = field(default_factory=dict, hash=False)
    """Numbers that `loss` takes as arguments, by name: {cap: 2.0}."""

    def __post_init__(self) -> None:
        self._check_policy()
        self._check_topk()
        self._check_tokens()
        self._check_loss()
        if self.kd_baseline is not None and self.kd != "k2":
            raise ValueError(f'kd must be "k2" with kd_baseline, got {self.kd}')
        if self.fkl_share != 0.5 and self.kd != "rkl+fkl":
            raise ValueError(
                f'kd must be "rkl+fkl" with fkl_share {self.fkl_share}, got {self.kd}: set kd, or '
                "leave fkl_share out"
            )
        if self.policy_coef.kind in ("kl_budget", "reward_adaptive"):
            raise ValueError(
                "policy_coef.kind must be a function of the step or a switch, got "
                f'"{self.policy_coef.kind}": this kind is allowed for kd_coef only'
            )
        if self.policy == "off" and self.kd in (None, "reward"):
            raise ValueError(
                'kd must be a term of the loss ("k2", "rkl", ...) when policy is "off", got '
                f"{self.kd}: nothing would be trained; set one of the two"
            )

    def _check_policy(self) -> None:
        """Raises ValueError for a bound that a policy gradient cannot have."""
        if self.clip_low == 1 and self.policy not in ("cispo", "dppo"):
            raise ValueError(
                f'clip_low must be below 1 with policy "{self.policy}", got {self.clip_low}: only '
                '"cispo" and "dppo" have no lower bound then'
            )

    def _check_topk(self) -> None:
        """Raises ValueError for what divergences over the likeliest tokens do not go with."""
        if not self.is_topk:
            if self.kd_topk != 64 or not self.kd_tail:
                raise ValueError(
                    'kd must be "topk_rkl", "topk_fkl" or "topk_jsd" with kd_topk or kd_tail, got '
                    f"{self.kd}: set kd, or leave the two out"
                )
            return
        rows = {"policy": self.policy, "loss": self.loss}
        rows |= {name: getattr(self, name) for name in SELECTIONS}
        for name, value in rows.items():
            if value not in ("clip", "none", "off", None, False):
                raise ValueError(
                    f'kd must be another one than "{self.kd}" with {name} {value}: what reads a '
                    'single row of the head does not have its likeliest tokens; use "k2" or "rkl"'
                )

    def _check_tokens(self) -> None:
        """Raises ValueError for a choice of distilled tokens that nothing would read."""
        selected = {name: getattr(self, name) for name in SELECTIONS}
        changed = {name: value for name, value in selected.items() if value not in (False, None)}
        changed |= {} if self.kd_prefix == 1 else {"kd_prefix": self.kd_prefix}
        for name, value in changed.items():
            if self.kd is None or (self.kd == "reward" and name != "kd_prefix"):
                raise ValueError(
                    f"kd must be a term of the loss with {name} {value}, got {self.kd}: set kd, or "
                    f"leave {name} out"
                )
        if self.kd_tanh is not None and (self.kd not in ("k2", "k3") or self.kd_baseline):
            raise ValueError(
                f'kd must be "k2" or "k3" with kd_tanh {self.kd_tanh}, and kd_baseline None, got '
                f'"{self.kd}" and {self.kd_baseline}: it bounds log p - log q of sampled tokens'
            )
        if self.kd_sign_gate and self.policy == "off":
            raise ValueError(
                'policy must not be "off" with kd_sign_gate, got "off": there are no advantages to '
                "compare with"
            )

    def _check_loss(self) -> None:
        """Raises ValueError for settings that a loss of the user's own would ignore."""
        if self.loss is None:
            if self.loss_options:
                raise ValueError(f"loss must be module:function with loss_options, got {self.loss}")
            return
        fields = type(self).__dataclass_fields__
        for name in OF_THE_TERMS:
            value, default = getattr(self, name), fields[name].default
            if value != default and (name, value) != ("policy", "off"):
                raise ValueError(
                    f"{name} must be {default} with loss {self.loss}, got {value}: the loss alone "
                    "decides; pass it numbers by loss_options"
                )
        if self.kd == "reward":
            raise ValueError(
                f'kd must not be "reward" with loss {self.loss}, got "reward": the loss declares '
                "what it reads of the teacher"
            )

    @property
    def reads_completions(self) -> bool:
        """Whether the policy gradient of a token depends on the ratios of its completion."""
        return self.policy in ("gspo", "gmpo")

    @property
    def selects_tokens(self) -> bool:
        """Whether what is distilled of a token depends on its row in the head."""
        return any(getattr(self, name) not in (False, None) for name in SELECTIONS)

    @property
    def is_exact(self) -> bool:
        """Whether the loss reads the teacher's whole distribution at each token."""
        return self.kd in ("rkl", "fkl", "jsd", "rkl+fkl") or self.kd_baseline is not None

    @property
    def is_topk(self) -> bool:
        """Whether the loss reads the teacher's likeliest tokens."""
        return self.kd in ("topk_rkl", "topk_fkl", "topk_jsd")

    @property
    def reads_logprobs(self) -> bool:
        """Whether the loss reads of the teacher the log-probabilities of sampled tokens alone."""
        return not (self.is_exact or self.is_topk)

    @property
    def schedules(self) -> dict[str, ScheduleConfig]:
        """Every schedule by its key."""
        of_teachers = {
            f"method.teachers.{name}.kd_coef": teacher.kd_coef
            for name, teacher in self.teachers.items()
            if teacher.kd_coef is not None
        }
        return {
            "method.kd_coef": self.kd_coef,
            "method.policy_coef": self.policy_coef,
            **of_teachers,
        }

    def of_teacher(self, name: str) -> "MethodConfig":
        """Return the method with the kd_coef and kd_mask of one teacher in place of its own."""
        settings_of = self.teachers.get(name, TeacherMethod())
        return replace(
            self,
            kd_coef=settings_of.kd_coef or self.kd_coef,
            kd_mask=settings_of.kd_mask or self.kd_mask,
            teachers={},
        )

    def kd_weight(self, name: str) -> float:
        """Return what beta is multiplied by for one teacher."""
        return self.teachers[name].kd_weight if name in self.teachers else 1.0
