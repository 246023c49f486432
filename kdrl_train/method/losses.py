"""Defines the losses of a token that methods are made of, beside those of kdrl_kernels.Objective.

A row is one token of a completion: p is the policy, q the teacher, r = p / old the ratio, A the
advantage, l = log p - log q; sg stops the gradient. A loss gets some rows of a pack at a time, so
the loss of a row depends on that row alone; what depends on a whole completion comes from
`sequence`, which is computed before, without a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kdrl_kernels.objective import Objective, clipped_log_ratio, policy_log_ratio, subtract
from kdrl_kernels.objective import token_losses as objective_losses
from kdrl_kernels.token_rows import Rows
from kdrl_train.method.config import MethodConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCoefficients:
    """Holds what a loss may read of each token beside its row: [C] of some rows, or [N] of a pack.

    Everything is constant.
    """

    advantages: Tensor
    """A, that of the token's completion, times the value of method.policy_coef."""
    kd_weight: Tensor
    """Beta times the masks of distillation; 0 where the token is not distilled."""
    sampled_logprobs: Tensor
    """Log-probability of the token as sampled, nats."""
    completion: Tensor
    """int64, the number of the token's completion in the step."""
    positions: Tensor
    """int64, the token's place in its completion, from 0."""
    lengths: Tensor
    """int64, tokens of its completion."""
    sequence: Tensor | None = None
    """What the loss's `sequence` function gave; None: it has none."""

    def take(self, index: Tensor) -> "TokenCoefficients":
        """Return the coefficients of some tokens."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v[index] for k, v in values.items() if v is not None})


RowLoss = Callable[[Rows, TokenCoefficients], Tensor]
"""Maps C rows and their coefficients to [C] losses, before token weights."""
SequenceValues = Callable[[Tensor, TokenCoefficients], Tensor]
"""Maps log r [N] of the tokens of whole completions, without a gradient, to [N] constants."""


@dataclass(frozen=True, slots=True)
class MethodLoss:
    """Holds the loss of a token, and what has to be computed for it."""

    losses: RowLoss
    sequence: SequenceValues | None = None
    clipped: Callable[[Rows, TokenCoefficients], Tensor] | None = None
    """Says of which rows a bound took hold, for the metric clip_fraction."""


def completions_of(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of each token's completion in a pack, [N], and the tokens of each, [N].

    There are fewer completions than tokens; how many would be to wait for on a GPU, so the counts
    go on with 0.

    numbers: [N] int64, the same for the tokens of a completion, which lie together.
    """
    begins = torch.ones_like(numbers)
    begins[1:] = numbers[1:] != numbers[:-1]
    place = begins.cumsum(0) - 1
    return place, torch.zeros_like(numbers).index_add(0, place, torch.ones_like(numbers))


def completion_mean(values: Tensor, tokens: TokenCoefficients) -> Tensor:
    """Return at each of N tokens the mean of [N] values over the tokens of its completion."""
    place, counts = completions_of(tokens.completion)
    sums = torch.segment_reduce(values.double(), "sum", lengths=counts, unsafe=True)
    return (sums / counts).index_select(0, place).to(values.dtype)


def weighted(rows: Rows, weight: Tensor) -> Tensor:
    """Return -weight · A, [C], whose derivative in log p is -weight · A too: sg(weight) · A log p
    has this gradient, and another value."""
    assert rows.advantages is not None
    one = subtract(rows.logprobs, rows.logprobs.detach()).exp()
    return -weight.detach() * rows.advantages * one


def clip_of(method: MethodConfig) -> Objective:
    """Make the objective whose bounds are those of the method."""
    return Objective(policy="clip", clip_low=method.clip_low, clip_high=method.clip_high, kd=None)


def cispo(method: MethodConfig) -> MethodLoss:
    """Weight the gradient of every token by its bounded ratio: CISPO, arXiv:2506.13585.

    -sg(clip(r, 1 - clip_low, 1 + clip_high)) · A · log p. PPO's clip takes the gradient of a token
    away once its ratio has left the range; here it stays, and only its weight is bounded.
    """

    def bounded(rows: Rows) -> tuple[Tensor, Tensor]:
        ratio = policy_log_ratio(rows).detach().exp()
        return ratio, ratio.clamp(1 - method.clip_low, 1 + method.clip_high)

    def clipped(rows: Rows, _: TokenCoefficients) -> Tensor:
        ratio, weight = bounded(rows)
        return ratio != weight

    return MethodLoss(lambda rows, _: weighted(rows, bounded(rows)[1]), clipped=clipped)


def dppo(method: MethodConfig) -> MethodLoss:
    """Leave out tokens whose probability has moved too far already: DPPO, arXiv:2602.04879.

    -M · r · A, where M is 0 if A > 0 and p - p_old > clip_high, or A < 0 and p - p_old < -clip_low,
    else 1: the form with a binary total variation |p - p_old|. So a rare token may double its
    probability, and a likely one may not lose much of it; PPO's ratio bounds both alike. r itself
    has no bound.
    """

    def masked(rows: Rows) -> Tensor:
        assert rows.advantages is not None
        old = rows.logprobs if rows.old_logprobs is None else rows.old_logprobs
        moved = rows.logprobs.detach().exp() - old.detach().exp()
        up, down = moved > method.clip_high, moved < -method.clip_low
        return torch.where(rows.advantages > 0, up, down)

    def losses(rows: Rows, _: TokenCoefficients) -> Tensor:
        ratio = policy_log_ratio(rows).detach().exp()
        return weighted(rows, torch.where(masked(rows), 0, ratio))

    return MethodLoss(losses, clipped=lambda rows, _: masked(rows))


def gspo(method: MethodConfig) -> MethodLoss:
    """Clip the ratio of a whole completion: GSPO, arXiv:2507.18071.

    -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean_t log r_t) over the T tokens of
    the completion. Its derivative in each log p_t is -s A / T, or 0 beyond the bound. So with
    token_weights sequence_mean, which give the 1 / T, it is a loss of tokens whose value is that of
    the completion and whose log-ratio is mean_t log r_t + log p - sg(log p).
    """
    clip = clip_of(method)

    def losses(rows: Rows, tokens: TokenCoefficients) -> Tensor:
        assert rows.advantages is not None
        assert tokens.sequence is not None
        log_ratio = tokens.sequence + subtract(rows.logprobs, rows.logprobs.detach())
        return -rows.advantages * clipped_log_ratio(clip, log_ratio, rows.advantages).exp()

    def clipped(_: Rows, tokens: TokenCoefficients) -> Tensor:
        assert tokens.sequence is not None
        return clipped_log_ratio(clip, tokens.sequence, tokens.advantages) != tokens.sequence

    return MethodLoss(losses, completion_mean, clipped)


def gmpo(method: MethodConfig) -> MethodLoss:
    """Weight a completion by the geometric mean of its clipped ratios: GMPO, arXiv:2507.20673.

    -A · exp(mean_t c_t), where c_t is log r_t, at most log(1 + clip_high) for A > 0 and at least
    log(1 - clip_low) for A < 0. Its derivative in log p_t is -A exp(mean c) / T, or 0 where token t
    is clipped; token_weights sequence_mean give the 1 / T.
    """
    clip = clip_of(method)

    def of_token(rows: Rows) -> Tensor:
        assert rows.advantages is not None
        return clipped_log_ratio(clip, policy_log_ratio(rows), rows.advantages)

    def sequence(log_ratio: Tensor, tokens: TokenCoefficients) -> Tensor:
        return completion_mean(clipped_log_ratio(clip, log_ratio, tokens.advantages), tokens)

    def losses(rows: Rows, tokens: TokenCoefficients) -> Tensor:
        assert rows.advantages is not None
        assert tokens.sequence is not None
        log_ratio = of_token(rows)
        return -rows.advantages * (tokens.sequence + log_ratio - log_ratio.detach()).exp()

    def clipped(rows: Rows, _: TokenCoefficients) -> Tensor:
        return of_token(rows) != policy_log_ratio(rows)

    return MethodLoss(losses, sequence, clipped)


POLICIES: Mapping[str, Callable[[MethodConfig], MethodLoss]] = {
    "cispo": cispo,
    "dppo": dppo,
    "gspo": gspo,
    "gmpo": gmpo,
}
"""The policy gradients that kdrl_kernels.Objective does not have."""


def distilled(method: MethodConfig, rows: Rows) -> Tensor:
    """Say which rows the method distils, of those whose kd_weight is not 0: [C] bool.

    kd_sign_gate: where -l, the pull on log p, does not oppose A: A · l <= 0. kd_min_entropy: where
    the policy's entropy is at least so many nats. kd_min_log_ratio: where |l| is. The first and the
    last depend on the sampled token, so what a sampled kd then minimises is no longer a KL.
    """
    assert rows.teacher_logprobs is not None
    log_ratio = subtract(rows.logprobs.detach(), rows.teacher_logprobs)
    kept = torch.ones_like(log_ratio, dtype=torch.bool)
    if method.kd_sign_gate:
        assert rows.advantages is not None
        kept &= rows.advantages * log_ratio <= 0
    if method.kd_min_entropy:
        assert rows.entropy is not None
        kept &= rows.entropy.detach() >= method.kd_min_entropy
    if method.kd_min_log_ratio:
        kept &= log_ratio.abs() >= method.kd_min_log_ratio
    return kept


def distilled_rows(method: MethodConfig, rows: Rows) -> Rows:
    """Return rows with a kd_weight of 0 where they are not distilled, and the teacher moved so that
    log p - log q is kd_tanh · tanh(l / kd_tanh), a constant.

    So the derivative of k2 in log p, which is l, is within kd_tanh; l itself near 0.
    """
    if rows.teacher_logprobs is None:
        return rows
    assert rows.kd_weight is not None
    teacher, bound = rows.teacher_logprobs, method.kd_tanh
    if bound is not None:
        student = rows.logprobs.detach()
        teacher = student - bound * (subtract(student, teacher) / bound).tanh()
    weight = rows.kd_weight * distilled(method, rows)
    return replace(rows, kd_weight=weight, teacher_logprobs=teacher)


def needs_token_loss(method: MethodConfig) -> bool:
    """Say whether a method has a part that kdrl_kernels.Objective lacks."""
    return method.loss is not None or method.policy in POLICIES or method.selects_tokens


def method_loss(method: MethodConfig, goal: Objective) -> MethodLoss:
    """Make the loss of a method without a loss of the user's own.

    Args:
        goal: of the method or of a part of it, with the policy "none" where it is one of POLICIES;
            with policy "off" that part has no policy gradient, with kd None no distillation.
    """
    policy = POLICIES.get(method.policy)
    part = None if policy is None or goal.policy == "off" else policy(method)

    def losses(rows: Rows, tokens: TokenCoefficients) -> Tensor:
        taught = distilled_rows(method, rows) if goal.kd is not None else rows
        if part is None:
            return objective_losses(goal, taught)
        rest = replace(taught, advantages=torch.zeros_like(rows.logprobs))
        return part.losses(rows, tokens) + objective_losses(goal, rest)

    if part is None:
        return MethodLoss(losses)
    return MethodLoss(losses, part.sequence, part.clipped)
