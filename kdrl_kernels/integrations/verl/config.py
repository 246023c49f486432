"""Settings of the distillation of a run of verl, beside verl's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl.workers.config import DistillationLossConfig

from kdrl_kernels.integrations.logprob_losses import SampledKd
from kdrl_kernels.integrations.sequence_weights import schedule_of
from kdrl_kernels.plain import check_number
from kdrl_train.method.config import MethodConfig

NAMES = {"kdrl_k2": "k2", "kdrl_k3": "k3", "kdrl_k3_ratio": "k3_ratio"}
"""loss_mode -> kd."""


@dataclass
class KdrlDistillationLossConfig(DistillationLossConfig):
    """The settings of distillation.distillation_loss and those of KDRL, by its `_target_`.

    Args:
        loss_mode: "kdrl_k2", "kdrl_k3" or "kdrl_k3_ratio".
        kd_coef_schedule: the kind of a schedule, or the fields of
            kdrl_train.method.config.ScheduleConfig, which then takes the place of
            distillation_loss_coef; None: the constant distillation_loss_coef.
        kd_mask: "none", "wrong" or "wrong_group": which completions are distilled.
        right_above: a completion whose rewards (token_level_scores, else rm_scores) have a larger
            sum is right.
        kd_ratio_cap, kd_clamp, k3_bound: as in SampledKd.
    Raises: ValueError or TypeError, one line, for an option that cannot be right.
    """

    loss_mode: str = "kdrl_k2"
    use_policy_gradient: bool = False
    loss_max_clamp: float | None = None
    kd_coef_schedule: Any = None
    kd_mask: str = "none"
    right_above: float = 0.5
    kd_ratio_cap: float = 2.0
    kd_clamp: float | None = None
    k3_bound: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("right_above", self.right_above)
        if self.loss_mode not in NAMES:
            raise ValueError(
                f"loss_mode must be one of {sorted(NAMES)} with KdrlDistillationLossConfig, got "
                f'"{self.loss_mode}": its other settings would be read by nobody'
            )
        if self.kd_coef_schedule is not None and self.distillation_loss_coef != 1:
            raise ValueError(
                "distillation_loss_coef must be 1.0 with kd_coef_schedule, whose values would be "
                f"multiplied by it, got {self.distillation_loss_coef}"
            )
        check(self)
        assert self.method  # which checks schedule and mask
        # not before a run is distilled: it loads verl's engines
        from kdrl_kernels.integrations.verl import steps  # noqa: PLC0415

        steps.install()

    @property
    def method(self) -> MethodConfig:
        """Schedule and mask, as kdrl_train has them."""
        schedule = self.kd_coef_schedule
        if isinstance(schedule, Mapping):
            schedule = {key: value for key, value in schedule.items() if key != "_target_"}
        return MethodConfig(kd_coef=schedule_of(schedule), kd_mask=self.kd_mask)  # type: ignore[arg-type]


def check(config: Any) -> None:
    """Refuse settings of verl's that would make a term of ours another one."""
    if config.use_policy_gradient:
        raise ValueError(
            f'use_policy_gradient must be False with loss_mode "{config.loss_mode}", got True: '
            "minus this loss as a reward pushes every token down that the teacher does not give "
            "the student's probability, too likely or not"
        )
    if config.loss_max_clamp is not None:
        raise ValueError(
            f'loss_max_clamp must be null with loss_mode "{config.loss_mode}", got '
            f"{config.loss_max_clamp}: it would take the gradient of the tokens away from which "
            "the teacher differs most; use kd_clamp"
        )
    assert term_of(config)


def term_of(config: Any) -> SampledKd:
    """Read the term of a token. verl's own settings class will do: it has the defaults of ours."""
    default = SampledKd()
    return SampledKd(
        kd=NAMES[config.loss_mode],  # type: ignore[arg-type]
        ratio_cap=config.get("kd_ratio_cap", default.ratio_cap),
        clamp=config.get("kd_clamp", default.clamp),
        k3_bound=config.get("k3_bound", default.k3_bound),
    )
