"""Defines the training objective: its settings, and a token's loss as a function of its row.

`token_losses` is the definition, which the reference differentiates through the logits. The table
of rows/README.md gives value and coefficients of each row, and rows/eager.py and
rows/kernel_objective.py compute them. A caller's own loss gets its coefficients by autograd.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from kdrl_kernels.plain import check_flag, check_number
from kdrl_kernels.token_rows import Rows

Policy = Literal["clip", "none", "off"]
TopkKd = Literal["topk_rkl", "topk_fkl", "topk_jsd"]
Divergence = Literal["rkl", "fkl", "jsd", "rkl+fkl"]
"""What one pass computes from the logits of both models; the last is a pair of divergences."""
Kd = Literal["k2", "k3", "k3_ratio", Divergence, TopkKd]
DIVERGENCES = get_args(Divergence)

K1_REFUSED = (
    "k1 as a loss has no teacher in its gradient (the teacher's log-probability is a "
    "constant there); use 'k2' for reverse KL on sampled tokens or 'rkl' for the exact one"
)

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "clip_low": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "clip_high": (lambda x: 0 <= x < math.inf, "finite and at least 0"),
    "dual_clip": (lambda x: 1 < x < math.inf, "above 1 and finite, or None"),
    "k3_bound": (lambda x: 0 < x <= 60, "in (0, 60]"),
    "kd_coef": (lambda x: 0 <= x < math.inf, "finite and at least 0"),
    "kd_ratio_cap": (lambda x: x > 0, "positive"),
    "jsd_alpha": (lambda x: 0 < x < 1, "in (0, 1)"),
    "fkl_share": (lambda x: 0 < x < 1, "in (0, 1)"),
    "entropy_coef": (math.isfinite, "finite"),
}
"""Name of a number of Objective -> whether it is right, and what it must be."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Says what is minimised per token: PG + kd_coef · kd_weight · s · KD - entropy_coef · entropy.

    p is the student, q the teacher, lp and lq their log-probabilities of the sampled token, old the
    sampling policy's, A the advantage. With r = exp(lp - old), l = lp - lq, and
    s = min(r, kd_ratio_cap) detached:

    Args:
        policy: "clip": -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A); "none": -r·A; "off": 0.
        clip_low, clip_high: clip range of the ratio, clip_low in [0, 1), clip_high >= 0.
        dual_clip: for A < 0 the term is at most -dual_clip·A; above 1, or None.
        kd: the KD term; None: no teacher. Of the sampled token: "k2", l²/2, with the expected
            gradient of KL(p‖q); "k3", exp(-l) - 1 + l, with that of the forward KL(q‖p);
            "k3_ratio", the value of k3 with s differentiable, so that its derivative in lp is s·l,
            with that of KL(p‖q). Of the whole vocabulary: "rkl", KL(p‖q); "fkl", KL(q‖p); "jsd",
            jsd_alpha·KL(q‖m) + (1 - jsd_alpha)·KL(p‖m), m = jsd_alpha·q + (1 - jsd_alpha)·p;
            "rkl+fkl", fkl_share·KL(q‖p) + (1 - fkl_share)·KL(p‖q). Of K tokens of each row:
            "topk_rkl", "topk_fkl" and "topk_jsd", the sums of these over the K tokens.
        tail: True adds one bucket to a top-k divergence, the probability on none of the K tokens.
            False: "topk_rkl" and "topk_fkl" then have another minimum than p = q (README.md).
        kd_baseline: "kl", with kd "k2" alone: (l - KL(p‖q))²/2, the exact KL of the row without
            gradient; the same expected gradient where s is not capped, of less variance for diffuse
            rows, of more for peaked ones whose teacher is less sure (README.md).
        k3_bound: b in nats, in (0, 60]. k3 at -l > b goes on along its tangent, since exp(-l)
            overflows at 88: exp(b)·(1 - l - b) - 1 + l, with the derivative 1 - exp(b) in lp. So
            these tokens keep the largest pull; a bound of the value would take their gradient away.
        kd_coef: beta, at least 0.
        kd_ratio_cap: bound of the weight s of the KD term, positive; math.inf: no bound. Below 1
            it scales the term on-policy too, where r is 1.
        jsd_alpha: the teacher's share of the mixture m of "jsd" and "topk_jsd", in (0, 1).
        fkl_share: the forward KL's share of "rkl+fkl", in (0, 1); 0.5 for any other kd.
        entropy_coef: weight of the entropy bonus.
    Raises: ValueError for an unknown option or a number out of range, TypeError for what is none.
    Source: KDRL, arXiv:2506.02208; dual clip, arXiv:1912.09729.
    """

    policy: Policy = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kd: Kd | None = "k2"
    kd_baseline: Literal["kl"] | None = None
    k3_bound: float = 20.0
    kd_coef: float = 0.002
    kd_ratio_cap: float = 2.0
    jsd_alpha: float = 0.5
    fkl_share: float = 0.5
    entropy_coef: float = 0.0
    tail: bool = True

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(
                f"policy must be one of {get_args(Policy)}, got {self.policy!r}: that of PPO and "
                "GRPO is 'clip'"
            )
        if self.kd == "k1":
            raise ValueError(f"kd must not be 'k1': {K1_REFUSED}")
        if self.kd is not None and self.kd not in get_args(Kd):
            raise ValueError(f"kd must be one of {get_args(Kd)} or None, got {self.kd!r}")
        if self.kd_baseline not in (None, "kl"):
            raise ValueError(f"kd_baseline must be 'kl' or None, got {self.kd_baseline!r}")
        if self.kd_baseline is not None and self.kd != "k2":
            raise ValueError(
                f"kd_baseline must be None for kd={self.kd!r}, got {self.kd_baseline!r}: "
                "it centres the coefficient of 'k2'"
            )
        check_flag("tail", self.tail)
        if not self.tail and self.topk_kd is None:
            raise ValueError(
                f"tail must be True for kd={self.kd!r}, got False: only {get_args(TopkKd)} have one"
            )
        if self.policy == "off" and self.kd is None:
            raise ValueError("kd must be set when policy is 'off', got None: nothing to minimise")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name, (holds, must) in RANGES.items():
            value = getattr(self, name)
            check_number(name, value, optional=name == "dual_clip")
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {must}, got {value}")
        if self.kd != "rkl+fkl" and self.fkl_share != 0.5:
            raise ValueError(
                f"fkl_share must be 0.5 for kd={self.kd!r}, got {self.fkl_share}: it is the share "
                "of the forward KL in kd='rkl+fkl'"
            )

    @property
    def exact_kd(self) -> Divergence | None:
        """The divergence from the teacher's whole distribution that the loss reads, or None."""
        if self.kd_baseline is not None:
            return "rkl"
        return self.kd if self.kd in ("rkl", "fkl", "jsd", "rkl+fkl") else None

    @property
    def topk_kd(self) -> TopkKd | None:
        """The divergence over K tokens of each row that the loss reads, or None."""
        return self.kd if self.kd in ("topk_rkl", "topk_fkl", "topk_jsd") else None

    @property
    def entropy(self) -> bool:
        """True where the loss reads the entropy of each row."""
        return self.entropy_coef != 0

    @property
    def lse(self) -> bool:
        """False: the loss does not read the log-sum-exp of each row."""
        return False

    @property
    def teacher_entropy(self) -> bool:
        """False: the loss does not read the teacher's entropy of each row."""
        return False

    def centred(self, rows: Rows) -> Rows:
        """Put lq + KL in the place of lq where there is a baseline, so that l becomes l - KL."""
        if self.kd_baseline is None:
            return rows
        assert rows.teacher_logprobs is not None
        assert rows.kl is not None
        return replace(rows, teacher_logprobs=rows.teacher_logprobs + rows.kl.detach(), kl=None)

    def divergence(self, rows: Rows) -> Tensor | None:
        """Return the [C] divergence of the KD term, that of a mixture; None for a sampled term."""
        if rows.kl is None or rows.forward_kl is None:
            return rows.kl
        return (1 - self.fkl_share) * rows.kl + self.fkl_share * rows.forward_kl

    def shares(self, derivative: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Split the derivative in the divergence into those in Rows.kl and in Rows.forward_kl."""
        if derivative is None or self.kd != "rkl+fkl":
            return derivative, None
        return (1 - self.fkl_share) * derivative, self.fkl_share * derivative

    def losses(self, rows: Rows) -> Tensor:
        """Return the [C] losses of token_losses, differentiable."""
        return token_losses(self, rows)

    @property
    def log_ratio_bounds(self) -> tuple[float, float, float]:
        """The bounds of lp - old in nats: (upper for A > 0, lower for A < 0, upper for A < 0)."""
        if self.policy != "clip":
            return math.inf, -math.inf, math.inf
        dual = math.inf if self.dual_clip is None else math.log(self.dual_clip)
        return math.log1p(self.clip_high), math.log1p(-self.clip_low), dual


def token_losses(objective: Objective, rows: Rows) -> Tensor:
    """Return [C] losses before weights, differentiable in logprobs, kl, forward_kl and entropy."""
    log_ratio = policy_log_ratio(rows)
    loss = torch.zeros_like(log_ratio)
    if objective.policy != "off":
        assert rows.advantages is not None
        loss = (
            loss - rows.advantages * clipped_log_ratio(objective, log_ratio, rows.advantages).exp()
        )
    if objective.kd is not None:
        loss = loss + _kd_term(objective, rows, log_ratio.detach())
    if objective.entropy_coef:
        assert rows.entropy is not None
        loss = loss - objective.entropy_coef * rows.entropy
    return loss


def subtract(logprobs: Tensor, other: Tensor) -> Tensor:
    """Return logprobs - other, with derivative 1 in logprobs; 0 where both are -inf.

    A token of probability 0 has a log-probability of -inf, whose difference would be NaN.
    """
    difference = logprobs.clone()
    with torch.no_grad():  # changes the values, not the derivative
        difference.copy_(torch.where(logprobs == other, 0, logprobs - other))
    return difference


def policy_log_ratio(rows: Rows) -> Tensor:
    """Return lp - old, [C]: 0 on-policy, with derivative 1 in lp."""
    old = rows.logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
    return subtract(rows.logprobs, old)


def clipped_log_ratio(objective: Objective, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Bound lp - old as its advantage's sign says: no gradient outside, r = 1 where A = 0.

    min(r·A, clip(r)·A) is A·min(r, 1 + high) for A > 0 and A·max(r, 1 - low) for A < 0. Bounding
    the logarithm instead of the ratio keeps exp, and its gradient, from overflowing.
    """
    positive_max, negative_min, negative_max = objective.log_ratio_bounds

    def by_sign(positive: float, negative: float) -> Tensor:
        full = log_ratio.detach()  # full_like fills on the device: no copy from the host
        return torch.where(
            advantages > 0, torch.full_like(full, positive), torch.full_like(full, negative)
        )

    upper, lower = by_sign(positive_max, negative_max), by_sign(-math.inf, negative_min)
    return torch.where(advantages == 0, 0, log_ratio.clamp(lower, upper))


def _kd_term(objective: Objective, rows: Rows, log_ratio: Tensor) -> Tensor:
    """Return kd_coef · kd_weight · s · KD, [C], exactly 0 for weight 0 even if KD is infinite."""
    scale = log_ratio.clamp(max=math.log(objective.kd_ratio_cap)).exp() * objective.kd_coef
    if rows.kd_weight is not None:
        scale = scale * rows.kd_weight
    rows = objective.centred(rows)
    divergence = objective.divergence(rows)
    if divergence is not None:
        return scale * torch.where(scale == 0, 0, divergence)
    assert rows.teacher_logprobs is not None
    teacher_log_ratio = torch.where(scale == 0, 0, subtract(rows.logprobs, rows.teacher_logprobs))
    return scale * sampled_kd(objective, teacher_log_ratio)


def sampled_kd(objective: Objective, teacher_log_ratio: Tensor) -> Tensor:
    """Return a sampled KD term of l = log p - log q at the sampled tokens, [C], before s."""
    k2 = teacher_log_ratio.square() / 2
    if objective.kd == "k2":
        return k2
    bounded = (-teacher_log_ratio).clamp(max=objective.k3_bound)
    slope = torch.expm1(bounded)
    k3 = slope - bounded + slope * (-teacher_log_ratio - objective.k3_bound).relu()
    if objective.kd == "k3":
        return k3
    with torch.no_grad():  # the value of k3, the derivative of k2: see rows/README.md
        return k2.copy_(k3)


def kd_pull(objective: Objective, teacher_log_ratio: Tensor) -> Tensor:
    """Return the derivative of the KD term in log p: what it takes off the token's advantage, [C].

    Of the exact "rkl" and "fkl" it is that of "k2" and "k3", which have their expected gradient; of
    "rkl+fkl" it is their mixture.
    """
    if objective.kd in ("k2", "k3_ratio", "rkl"):
        return teacher_log_ratio
    assert objective.kd in ("k3", "fkl", "rkl+fkl"), objective.kd
    forward = -torch.expm1((-teacher_log_ratio).clamp(max=objective.k3_bound))
    if objective.kd == "rkl+fkl":
        return (1 - objective.fkl_share) * teacher_log_ratio + objective.fkl_share * forward
    return forward
