"""Settings of the distillation of a run of verl, beside verl's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from verl.workers.config import DistillationLossConfig

from kdrl_kernels.integrations.logprob_losses import SampledKd
from kdrl_kernels.integrations.sequence_weights import schedule_of
from kdrl_kernels.integrations.verl import topk
from kdrl_kernels.objective import Objective, TopkKd
from kdrl_kernels.plain import check_number
from kdrl_train.method.config import MethodConfig

NAMES = {"kdrl_k2": "k2", "kdrl_k3": "k3", "kdrl_k3_ratio": "k3_ratio"}
"""loss_mode -> kd, of the sampled tokens."""
TOPK_NAMES = {f"kdrl_{kd}": kd for kd in get_args(TopkKd)}
"""loss_mode -> kd, of the teacher's K best tokens."""


@dataclass
class KdrlDistillationLossConfig(DistillationLossConfig):
    """The settings of distillation.distillation_loss and those of KDRL, by its `_target_`.

    Args:
        loss_mode: "kdrl_k2", "kdrl_k3", "kdrl_k3_ratio"; or, over the teacher's topk tokens,
            "kdrl_topk_rkl", "kdrl_topk_fkl", "kdrl_topk_jsd".
        kd_coef_schedule: the kind of a schedule, or the fields of
            kdrl_train.method.config.ScheduleConfig, which then takes the place of
            distillation_loss_coef; None: the constant distillation_loss_coef.
        kd_mask: "none", "wrong" or "wrong_group": which completions are distilled.
        right_above: a completion whose rewards (token_level_scores, else rm_scores) have a larger
            sum is right.
        kd_ratio_cap, kd_clamp, k3_bound: as in SampledKd.
        tail, jsd_alpha: as in kdrl_kernels.Objective, of the top-k modes.
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
    tail: bool = True
    jsd_alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("right_above", self.right_above)
        modes = [*NAMES, *TOPK_NAMES]
        if self.loss_mode not in modes:
            raise ValueError(
                f"loss_mode must be one of {modes} with KdrlDistillationLossConfig, got "
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
        if self.topk_term is not None:
            topk.install()

    @property
    def method(self) -> MethodConfig:
        """Schedule and mask, as kdrl_train has them."""
        schedule = self.kd_coef_schedule
        if isinstance(schedule, Mapping):
            schedule = {key: value for key, value in schedule.items() if key != "_target_"}
        return MethodConfig(kd_coef=schedule_of(schedule), kd_mask=self.kd_mask)  # type: ignore[arg-type]

    @property
    def topk_term(self) -> topk.TopkTerm | None:
        """The divergence over the teacher's tokens, or None."""
        kd = TOPK_NAMES.get(self.loss_mode)
        if kd is None:
            return None
        if self.kd_clamp is not None:
            raise ValueError(
                f'kd_clamp must be null with loss_mode "{self.loss_mode}", got {self.kd_clamp}: a '
                "divergence has no single log ratio"
            )
        Objective(policy="off", kd=kd, tail=self.tail, jsd_alpha=self.jsd_alpha)  # checks them
        return topk.TopkTerm(kd, self.tail, self.jsd_alpha)


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
    """Read the term of a token. verl's own settings class will do: it has the defaults of ours.

    Of a top-k mode it is the weight s alone that counts.
    """
    default = SampledKd()
    return SampledKd(
        kd=NAMES.get(config.loss_mode, default.kd),  # type: ignore[arg-type]
        ratio_cap=config.get("kd_ratio_cap", default.ratio_cap),
        clamp=config.get("kd_clamp", default.clamp),
        k3_bound=config.get("k3_bound", default.k3_bound),
    )
