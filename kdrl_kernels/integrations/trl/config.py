"""The arguments of KdrlTrainer: those of TRL's GRPOConfig, and what a teacher adds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args

from transformers.utils import logging
from trl import GRPOConfig
from trl.trainer.utils import get_config_model_id

import kdrl_kernels as kk
from kdrl_kernels.integrations.logprob_losses import SampledKind
from kdrl_kernels.objective import Kd, Policy, TopkKd
from kdrl_kernels.plain import check_flag, check_number
from kdrl_train.method.config import MethodConfig, ScheduleConfig

Arguments = TypeVar("Arguments")
logger = logging.get_logger(__name__)

TEACHER_APIS = ("kdrl", "openai")
HEAD_BACKWARDS = ("exact", "sketch")

WHOLE = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Settings of the sampler with which it draws from the whole distribution."""

READERS: dict[str, tuple[str, ...]] = {
    "k3_bound": ("k3", "k3_ratio"),
    "jsd_alpha": ("jsd", "topk_jsd"),
    "kd_topk": get_args(TopkKd),
}
"""Options that only some kinds of distillation read; Objective checks the others itself."""

TRL_NAMES = {"clip_low": "epsilon", "clip_high": "epsilon_high"}
"""Settings of Objective and MethodConfig whose value comes from a field of TRL."""

KD_REWARD_REFUSED = (
    "kd must not be 'reward': TRL computes advantages from the rewards before the teacher is read; "
    "use kd='k2', whose gradient is that of the reverse KL"
)


def check_sampler(args: Any) -> None:
    """Warn where a kind that reads the sampled tokens gets them from another distribution.

    Its expected gradient is that of a KL for tokens that are drawn by the log-probabilities of the
    loss: at TRL's temperature, from the whole vocabulary. An exact kind is its own at any token.

    args: KdrlConfig or KdrlDistillationConfig.
    """
    if args.kd not in get_args(SampledKind):
        return
    loss = WHOLE | {"temperature": args.temperature}
    sampler = {name: getattr(args, name) for name in loss} | (args.generation_kwargs or {})
    others = [f"{n}={sampler[n]}" for n, value in loss.items() if (sampler[n] or 0) != value]
    if others:
        logger.warning(
            "the sampler should draw from the distribution of the loss with kd=%r, got %s: the "
            "expected gradient is then not that of the KL; leave it out, or take an exact kind",
            args.kd,
            " and ".join(others),
        )


def _help(text: str) -> dict[str, str]:
    """Return what makes the command lines of TRL and transformers print a field's help."""
    return {"help": text}


@dataclass
class KdrlConfig(GRPOConfig):
    """Adds a teacher's settings to GRPOConfig; every field's help says what it does.

    They have the names and meanings of kdrl_kernels.Objective and of the trainer's MethodConfig and
    ScheduleConfig, which check them.

    Raises: ValueError or TypeError, one line, for an option that is wrong or that would do nothing.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "kd_coef_schedule",
        "teacher_model_init_kwargs",
    ]

    kd: str | None = field(
        default="k2",
        metadata=_help(
            "Distillation from the teacher: k2, k3 or k3_ratio of the sampled tokens; rkl, fkl, "
            "jsd or rkl+fkl over the whole vocabulary; topk_rkl, topk_fkl or topk_jsd over the "
            "teacher's kd_topk best tokens. None (none on a command line): no teacher."
        ),
    )
    kd_coef: float = field(
        default=2e-3,
        metadata=_help(
            "Beta: weight of the distillation term beside the policy gradient, at least 0."
        ),
    )
    kd_coef_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help(
            "Beta as a function of the optimizer step, a dict or its JSON with the keys of "
            "ScheduleConfig: kind (constant, linear, cosine, step, switch, kl_budget or "
            "reward_adaptive), initial (kd_coef, if left out), final, steps, at, values, patience, "
            "min_gain, target_kl, gain, bounds."
        ),
    )
    kd_mask: str = field(
        default="none",
        metadata=_help(
            "Completions that are distilled. none: all. wrong: those whose reward is not above "
            "right_above. wrong_group: those of groups in which every reward is so."
        ),
    )
    right_above: float = field(
        default=0.5,
        metadata=_help(
            "A completion whose reward, the weighted sum of the reward functions, is above this is "
            "right, for kd_mask and for a schedule of kind reward_adaptive."
        ),
    )
    kd_eos: str = field(
        default="keep",
        metadata=_help(
            "mask: do not distil end-of-sequence tokens, for a teacher that ends with other tokens."
        ),
    )
    kd_baseline: str | None = field(
        default=None,
        metadata=_help(
            "kl: subtract the exact KL from log p - log q in k2. Needs a teacher in this process."
        ),
    )
    kd_ratio_cap: float = field(
        default=2.0,
        metadata=_help(
            "Bound of the importance ratio that multiplies the distillation term, positive."
        ),
    )
    k3_bound: float = field(
        default=20.0,
        metadata=_help(
            "k3, k3_ratio: where log q - log p is above this many nats, the term is linear."
        ),
    )
    jsd_alpha: float = field(
        default=0.5, metadata=_help("jsd, topk_jsd: the teacher's share of the mixture, in (0, 1).")
    )
    fkl_share: float = field(
        default=0.5, metadata=_help("rkl+fkl: share of the forward KL, in (0, 1).")
    )
    kd_topk: int = field(
        default=64, metadata=_help("topk_*: number of the teacher's best tokens, 1 to 512.")
    )
    tail: bool = field(
        default=True,
        metadata=_help(
            "topk_*: count the probability on none of the best tokens as one more token."
        ),
    )
    head_backward: str = field(
        default="exact",
        metadata=_help(
            "Gradient of the LM head: exact, or sketch, an unbiased sparse one without the two "
            "GEMMs of dX and dW."
        ),
    )
    sketch_threshold: float | None = field(
        default=None,
        metadata=_help(
            "sketch: the probability from which an entry is kept exactly, in [2^-24, 1]; None: "
            "1e-4, and 5e-4 where hidden states have 16 bits, but at least 2 / V, the vocabulary."
        ),
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help(
            "Keyword arguments of from_pretrained for a teacher that is named by its folder or id. "
            "dtype is the student's unless they hold another."
        ),
    )
    teacher_api: str = field(
        default="kdrl",
        metadata=_help(
            "Protocol of a teacher behind a URL: kdrl (python -m kdrl_train serve) or openai "
            "(vLLM, or another server whose /v1/completions returns prompt log-probabilities)."
        ),
    )

    def __post_init__(self) -> None:
        for name in ("kd_coef_schedule", "teacher_model_init_kwargs"):
            setattr(self, name, _parsed(name, getattr(self, name)))
        super().__post_init__()
        if self.kd == "none":
            self.kd = None
        self._check_values()
        self._check_readers()
        if self.kd is not None:
            self.objective("off")
        self.method()

    def _check_values(self) -> None:
        """Check what neither Objective nor MethodConfig does."""
        if self.kd == "reward":
            raise ValueError(KD_REWARD_REFUSED)
        if self.kd == "k1" or (self.kd is not None and self.kd not in get_args(Kd)):
            kk.Objective(kd=self.kd)  # type: ignore[arg-type]
        choices = {"head_backward": HEAD_BACKWARDS, "teacher_api": TEACHER_APIS}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        check_flag("tail", self.tail)
        check_number("right_above", self.right_above)
        check_number("kd_topk", self.kd_topk, whole=True)
        if not 1 <= self.kd_topk <= 512:
            raise ValueError(f"kd_topk must be in 1 to 512, got {self.kd_topk}")
        check_number("sketch_threshold", self.sketch_threshold, optional=True)
        try:
            kk.Sketch(threshold=self.sketch_threshold)
        except ValueError as error:
            raise ValueError(str(error).replace("sketch.threshold", "sketch_threshold")) from None

    def _check_readers(self) -> None:
        """Refuse options that would do nothing."""
        changed = [name for name in KD_OPTIONS if getattr(self, name) != DEFAULTS[name]]
        if self.kd is None and changed:
            raise ValueError(
                f"kd must be set with {changed[0]}={getattr(self, changed[0])!r}, got None: "
                "without a teacher it does nothing"
            )
        for name, kinds in READERS.items():
            if name in changed and self.kd not in kinds:
                raise ValueError(
                    f"{name} must be {DEFAULTS[name]} for kd={self.kd!r}, got "
                    f"{getattr(self, name)}: only {' and '.join(map(repr, kinds))} read it"
                )
        if self.head_backward == "exact" and self.sketch_threshold != DEFAULTS["sketch_threshold"]:
            raise ValueError(
                "head_backward must be 'sketch' with sketch_threshold="
                f"{self.sketch_threshold}, got 'exact': it does nothing there"
            )
        if "right_above" in changed and not self.judges:
            raise ValueError(
                f"right_above must be {DEFAULTS['right_above']} for kd_mask='none', got "
                f"{self.right_above}: only a mask and the schedule reward_adaptive read it"
            )

    @property
    def judges(self) -> bool:
        """Whether the weight of a completion's distillation depends on the rewards."""
        return self.kd_mask != "none" or self.schedule().kind == "reward_adaptive"

    def schedule(self) -> ScheduleConfig:
        """Return the schedule of beta. Raises: ValueError that names the field."""
        values = dict(self.kd_coef_schedule or {})  # type: ignore[arg-type]
        if "initial" in values and self.kd_coef not in (DEFAULTS["kd_coef"], values["initial"]):
            raise ValueError(
                f"kd_coef must be left out where kd_coef_schedule has initial, got {self.kd_coef} "
                f"and {values['initial']}"
            )
        try:
            schedule = ScheduleConfig(**{"initial": self.kd_coef} | values)
        except ValueError as error:
            text, name = str(error).splitlines()[0], "kd_coef_schedule"
            if text.startswith("unknown key "):
                raise ValueError(text.replace("key ", f"key {name}.", 1)) from None
            if text.startswith("initial ") and "initial" not in values:
                raise ValueError(text.replace("initial", "kd_coef", 1)) from None
            raise ValueError(f"{name}.{text}") from None
        moves = schedule.kind in ("linear", "cosine", "switch")
        if moves and schedule.final == schedule.initial:
            raise ValueError(
                f"kd_coef_schedule.final must differ from initial for {schedule.kind!r}, got "
                f"{schedule.final} for both: nothing would change"
            )
        return schedule

    def objective(self, policy: Policy = "clip", *, distil: bool = True) -> kk.Objective:
        """Return the settings of kdrl_loss; kd_coef is 1, since beta is in each token's kd_weight.

        Args:
            policy: "off": the distillation term alone, where TRL computes the policy gradient.
            distil: False leaves the distillation term out.
        Raises: ValueError that names the field.
        """
        clip, term = {}, {}
        if policy == "clip":
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            clip = {"clip_low": self.epsilon, "clip_high": high}
        if distil and self.kd is not None:
            names = ("kd", "kd_baseline", "k3_bound", "kd_ratio_cap", "jsd_alpha")
            term = {name: getattr(self, name) for name in (*names, "fkl_share", "tail")}
        return _named(kk.Objective, **{"kd": None} | clip | term, policy=policy, kd_coef=1.0)

    def method(self) -> MethodConfig:
        """Return what says which completions are distilled, and how much.

        kd is "k2" there for the kinds that MethodConfig does not have; the mask and the schedule do
        not depend on it. Raises: ValueError that names the field.
        """
        return _named(
            MethodConfig,
            kd=None if self.kd is None else "k2",
            kd_coef=self.schedule(),
            kd_mask=self.kd_mask,
            kd_eos=self.kd_eos,
        )


SCHEDULE = '{"kind": "linear", "final": 0.0, "steps": 200}'


def _parsed(name: str, value: Any) -> dict[str, Any] | None:
    """Return a dictionary, which a command line gives as JSON."""
    try:
        values = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        values = value
    if values is not None and not isinstance(values, Mapping):
        example = "" if name != "kd_coef_schedule" else f"; for instance {SCHEDULE}"
        raise TypeError(f"{name} must be a dict, its JSON or None, got {value!r}{example}")
    return None if values is None else dict(values)


def _named(kind: Any, **values: Any) -> Any:
    """Make a settings object; the first line of its error names TRL's fields."""
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        text = str(error).splitlines()[0]
        for name, of_trl in TRL_NAMES.items():
            text = text.replace(f"{name} must", f"{of_trl} must")
        raise type(error)(text) from None


DEFAULTS = {one.name: one.default for one in fields(KdrlConfig)}
KD_OPTIONS = [
    one.name
    for one in fields(KdrlConfig)
    if one.name not in {other.name for other in fields(GRPOConfig)}
    and one.name not in ("kd", "head_backward", "sketch_threshold")
]
"""The fields that only a teacher reads."""


def arguments_of(args: Any, kind: type[Arguments], model: Any, suffix: str) -> Arguments:
    """Return the arguments of a trainer; where there are none, the defaults for the model.

    Raises: TypeError for those of another trainer.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = kind(f"{name.split('/')[-1]}-{suffix}")  # type: ignore[call-arg]
    if not isinstance(args, kind):
        raise TypeError(
            f"args must be a {kind.__name__}, got {type(args).__name__}: it takes all arguments of "
            f"{kind.__mro__[1].__name__}, and those of the distillation"
        )
    return args
