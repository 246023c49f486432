"""Defines what the loss of a token reads of its row, and the derivatives that come back."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Holds what a token's loss may depend on, [C] where no other shape stands, in nats."""

    logprobs: Tensor
    """lp, the student's log-probability of the sampled token."""
    old_logprobs: Tensor | None = None
    """old, the policy's log-probability at sampling time; None: strictly on-policy."""
    advantages: Tensor | None = None
    """A, the advantage of each token; None with policy "off"."""
    kd_weight: Tensor | None = None
    """Weight of the KD term, its schedule and mask; None: 1."""
    teacher_logprobs: Tensor | None = None
    """lq, the teacher's log-probability of the sampled token."""
    kl: Tensor | None = None
    """KL(p‖q) for "rkl", "rkl+fkl" and a baseline, KL(q‖p) for "fkl", Jensen-Shannon for "jsd"."""
    entropy: Tensor | None = None
    """Entropy of the student's distribution."""
    index: Tensor | None = None
    """int64, where these rows are in the [N] tensors of the call; linear_token_loss sets it."""
    forward_kl: Tensor | None = None
    """KL(q‖p), beside kl, for "rkl+fkl"."""
    lse: Tensor | None = None
    """log(sum_v exp(z_v)) of the student's logits, after softcap and temperature."""
    extra_logprobs: Tensor | None = None
    """[C, K], the student's log-probability at each of extra_tokens; 0 where there is none."""
    rest_logprob: Tensor | None = None
    """log of the probability that is on none of a row's extra_tokens."""
    teacher_entropy: Tensor | None = None
    """Entropy of the teacher's distribution, a constant."""
    positions: Tensor | None = None
    """int64, what the caller passed as `positions`."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Holds derivatives of each row's weighted loss; None where the loss has no such term.

    [C] each, extra [C, K].
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    forward_kl: Tensor | None = None
    lse: Tensor | None = None
    extra: Tensor | None = None
    rest: Tensor | None = None

    @property
    def reads_ids(self) -> bool:
        """True where the loss reads log-probabilities at K ids of a row, or that of the rest."""
        return self.extra is not None or self.rest is not None

    def present(self) -> dict[str, Tensor]:
        """Return the fields that are not None, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Coefficients":
        """Apply fn to every field that is not None."""
        return replace(self, **{name: fn(value) for name, value in self.present().items()})

    def used(self) -> Tensor:
        """Return [C] bool, true for rows whose logits have a gradient other than 0."""
        return self.sizes().ne(0)

    def of_rows(self, rows: Tensor) -> "Coefficients":
        """Return these derivatives with 0 in all rows but those where a [C] bool is true."""
        return self.map(lambda x: torch.where(rows if x.ndim == 1 else rows[:, None], x, 0))

    def sizes(self) -> Tensor:
        """Return the largest absolute value of each row, [C]; NaN where one is."""
        values = (x if x.ndim == 1 else x.abs().amax(dim=1) for x in self.present().values())
        return torch.stack(list(values)).abs().amax(dim=0)
