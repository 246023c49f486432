"""Defines the arms of the study, which train on as many samples by different methods."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.presets import PRESETS

PAPER_STEPS = 280
"""Steps that the presets' schedules are written for; an arm stretches them to the study's steps."""
SKETCH_THRESHOLD = 2.0**-3
"""Threshold of the sketched arms: coarse, so that the noise is far above that of the default."""
NO_ROW_IS_FLAT = 1e9
"""model.head_flat of the sketched arms: at 320 tokens all rows would else be exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """An arm is one way to train the student."""

    title: str
    """What the arm does, in a few words."""
    method: MethodConfig | None = None
    """None: the student samples nothing; it learns from the teacher's samples, or not at all."""
    tuned: bool = False
    """Whether beta is swept; else it is the preset's."""
    k1_as_loss: bool = False
    """Whether the distillation term is l itself, as a control (k1_control.py)."""
    sketched: bool = False
    """Whether the head's gradient is a sketch, at SKETCH_THRESHOLD."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run beside the method, as in a YAML file; {task} in a text stands for the
    folder of the task."""
    successor: bool = False
    """Whether it is of methods that came after the paper: bench/study/successors.yaml runs it."""
    models: tuple[str, ...] = ()
    """Models of the task that the arm needs beside student and middle teacher."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates of the arm's own sweep, where those of the study are not for it."""
    like: str | None = None
    """Arm whose learning rate and beta this arm takes; None: it has a sweep of its own."""

    def at(self, beta: float | None, steps: int) -> MethodConfig:
        """Return the method at beta (None: the preset's), its schedules stretched to `steps`."""
        assert self.method is not None
        kd, policy = self.method.kd_coef, self.method.policy_coef
        factor = 1.0 if beta is None else beta / kd.initial
        return replace(
            self.method,
            kd_coef=_stretched(kd, factor, steps),
            policy_coef=_stretched(policy, 1.0, steps),
        )


def _stretched(schedule: ScheduleConfig, factor: float, steps: int) -> ScheduleConfig:
    """Multiply a schedule's values by `factor`, and its steps by steps / PAPER_STEPS."""
    share = steps / PAPER_STEPS
    at = [max(1, round(step * share)) for step in schedule.at]
    return replace(
        schedule,
        initial=schedule.initial * factor,
        final=schedule.final * factor,
        values=tuple(value * factor for value in schedule.values),
        steps=max(1, round(schedule.steps * share)),
        at=tuple(max(step, i + 1) for i, step in enumerate(at)),
    )


_KDRL, _ALONE = PRESETS["kdrl"], PRESETS["kd_rkl"]
_KDRL_EXACT = replace(_KDRL, kd="rkl")
_FIXED = _KDRL.kd_coef
_TO_ZERO = ScheduleConfig(kind="linear", initial=1.0, final=0.0, steps=PAPER_STEPS)
_STAIRS = ScheduleConfig(kind="step", initial=1.0, at=(93, 187), values=(0.3, 0.1))
_UNDECIDED = ScheduleConfig(kind="reward_adaptive", initial=1.0)


_SELF = {
    "model": {"teacher": "self", "self_teacher": "live"},
    "data": {"teacher_template": "{prompt} {answer}\n"},
}
"""The policy is its own teacher, which sees the answer behind the question."""
_LORA = {"model": {"lora": {"rank": 8}}}
_LORA_RATES = (5e-4, 1e-3, 2e-3)
_SPECIALISTS = ("teacher_product", "teacher_sum")
_START = {"model": {"reference": "{task}/student"}}
"""The student as it was is the reference of an extrapolated teacher."""
_TOPK = replace(_KDRL, kd="topk_rkl", kd_topk=8)


def _successor(title: str, method: MethodConfig, like: str | None = "kdrl", **fields: Any) -> Arm:
    tuned = method.kd is not None and method.kd_coef == _FIXED
    return Arm(title=title, method=method, tuned=tuned, like=like, successor=True, **fields)


def _scheduled(schedule: ScheduleConfig) -> MethodConfig:
    return replace(_KDRL, kd_coef=schedule)


ARMS: Mapping[str, Arm] = {
    "student": Arm(title="the student, not trained"),
    "teacher": Arm(title="the teacher"),
    "sft": Arm(title="SFT on the teacher's right samples"),
    "grpo": Arm(title="GRPO", method=PRESETS["grpo"]),
    "kd_rkl": Arm(title="distillation alone, k2", method=_ALONE),
    "kd_rkl_exact": Arm(title="distillation alone, exact", method=replace(_ALONE, kd="rkl")),
    "kdrl": Arm(title="KDRL, k2, constant beta", method=_KDRL, tuned=True),
    "kdrl_annealed": Arm(
        title="KDRL, k2, beta to a fifth in 80 of 280 steps",
        method=PRESETS["kdrl_annealed"],
        tuned=True,
    ),
    "kdrl_exact": Arm(title="KDRL, exact KL", method=_KDRL_EXACT, tuned=True),
    "kdrl_centred": Arm(
        title="KDRL, centred k2", method=replace(_KDRL, kd_baseline="kl"), tuned=True
    ),
    "kdrl_k3": Arm(title="KDRL, k3", method=replace(_KDRL, kd="k3"), tuned=True),
    "kdrl_masked": Arm(
        title="KDRL on wrong completions", method=PRESETS["kdrl_masked"], tuned=True
    ),
    "kdrl_group_masked": Arm(
        title="KDRL where the whole group is wrong",
        method=PRESETS["kdrl_group_masked"],
        tuned=True,
    ),
    "reward_shaping": Arm(
        title="the teacher in the reward", method=PRESETS["reward_shaping"], tuned=True
    ),
    "opd_then_rl": Arm(title="distil, then RL", method=PRESETS["opd_then_rl"]),
    "k1_as_loss": Arm(
        title="control: k1 as a loss", method=_KDRL, tuned=True, k1_as_loss=True, like="kdrl"
    ),
    "grpo_sketch": Arm(
        title="GRPO, sketched gradient", method=PRESETS["grpo"], sketched=True, like="grpo"
    ),
    "kdrl_sketch": Arm(
        title="KDRL, k2, sketched gradient", method=_KDRL, tuned=True, sketched=True, like="kdrl"
    ),
    "kdrl_exact_sketch": Arm(
        title="KDRL, exact KL, sketched gradient",
        method=_KDRL_EXACT,
        tuned=True,
        sketched=True,
        like="kdrl_exact",
    ),
    "kdrl_linear": Arm(title="KDRL, beta to 0, linear", method=_scheduled(_TO_ZERO), tuned=True),
    "kdrl_cosine": Arm(
        title="KDRL, beta to 0, cosine",
        method=_scheduled(replace(_TO_ZERO, kind="cosine")),
        tuned=True,
    ),
    "kdrl_step": Arm(
        title="KDRL, beta 1, 0.3, 0.1 times by thirds", method=_scheduled(_STAIRS), tuned=True
    ),
    "kdrl_adaptive": Arm(
        title="KDRL, beta times 4p(1 - p) of the group", method=_scheduled(_UNDECIDED), tuned=True
    ),
    "kdrl_tanh": _successor("KDRL, bounded k2", replace(_KDRL, kd_tanh=1.0)),
    "kdrl_sign_gate": _successor("KDRL, k2 where signs agree", replace(_KDRL, kd_sign_gate=True)),
    "kdrl_topk": _successor("KDRL, top-8 KL with a tail", _TOPK, like="kdrl_exact"),
    "kdrl_topk_alone": _successor(
        "KDRL, top-8 KL without a tail", replace(_TOPK, kd_tail=False), like="kdrl_exact"
    ),
    "constant_advantage": _successor(
        "control: KDRL with advantage 1", replace(_KDRL, advantage="constant")
    ),
    "exopd": _successor(
        "distillation alone, beyond the teacher", PRESETS["exopd"], like="kd_rkl", settings=_START
    ),
    "kdrl_beyond": _successor(
        "KDRL, k2, beyond the teacher", replace(_KDRL, extrapolation=1.25), settings=_START
    ),
    "grpo_lora": _successor(
        "GRPO, LoRA of rank 8",
        PRESETS["grpo"],
        like=None,
        settings=_LORA,
        learning_rates=_LORA_RATES,
    ),
    "kdrl_lora": _successor(
        "KDRL, LoRA of rank 8", _KDRL, like=None, settings=_LORA, learning_rates=_LORA_RATES
    ),
    "two_teachers": _successor(
        "KDRL, a teacher for products and one for sums",
        _KDRL,
        settings={
            "model": {
                "teacher": None,
                "teachers": {kind: f"{{task}}/teacher_{kind}" for kind in ("product", "sum")},
            },
            "data": {"teacher_column": "domain"},
        },
        models=_SPECIALISTS,
    ),
    "product_teacher": _successor(
        "KDRL, the teacher for products alone",
        _KDRL,
        settings={"model": {"teacher": "{task}/teacher_product"}},
        models=_SPECIALISTS,
    ),
    "sum_teacher": _successor(
        "KDRL, the teacher for sums alone",
        _KDRL,
        settings={"model": {"teacher": "{task}/teacher_sum"}},
        models=_SPECIALISTS,
    ),
    "self_live": _successor("KDRL, taught by itself with the answer", _KDRL, settings=_SELF),
    "self_frozen": _successor(
        "KDRL, taught by its start with the answer",
        _KDRL,
        settings={**_SELF, "model": {"teacher": "self", "self_teacher": "frozen"}},
    ),
    "self_alone": _successor(
        "distillation alone, by itself with the answer", _ALONE, like="kd_rkl", settings=_SELF
    ),
}
"""The arms by name. Each differs from its preset by what is written here, and by nothing else."""

NOT_TRAINED = ("student", "teacher")
SCHEDULES = (
    "kdrl",
    "kdrl_annealed",
    "kdrl_linear",
    "kdrl_cosine",
    "kdrl_step",
    "kdrl_adaptive",
)
"""Arms whose sensitivity to beta is measured."""
