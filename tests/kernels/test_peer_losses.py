"""Losses of TRL 1.16, verl 0.9 and Liger 0.8.5 come out of the public functions as through logits.

Token by token they are a loss of linear_token_loss (3u). Where a coefficient needs all tokens of a
sequence or of the batch, they are a later loss of linear_logprobs (4u). Formulas are those of the
libraries, without their means: normalizer and token_weights do these.

What none of our functions gives: total variation (Liger's tvd), cosine similarity of logits
(Liger's chunked distillation), and losses on sorted probabilities (ULD, TRL's GOLD trainer).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F64, SEED
from tests.tolerance import relative_error

B, T, H, V = 4, 5, 16, 37
LOW, HIGH = 0.8, 1.2


@dataclass(frozen=True, slots=True)
class Values:
    """Holds what a formula reads of each token: [B, T], or [C] of one chunk."""

    lp: Tensor
    entropy: Tensor
    old: Tensor
    A: Tensor
    reference: Tensor
    """Log-probabilities of a reference model."""
    mask: Tensor

    @property
    def ratio(self) -> Tensor:
        return (self.lp - self.old).exp()


def dual_clip(v: Values) -> Tensor:
    """verl's vanilla, clip_ratio_c = 3."""
    loss = torch.maximum(-v.A * v.ratio, -v.A * v.ratio.clamp(LOW, HIGH))
    return torch.where(v.A < 0, torch.minimum(-3 * v.A, loss), loss)


def delta(v: Values) -> Tensor:
    """TRL's delta: an upper bound of the ratio where it is not clipped either."""
    return -torch.minimum(v.ratio.clamp(max=1.5) * v.A, v.ratio.clamp(LOW, HIGH) * v.A)


def cispo(v: Values) -> Tensor:
    return -v.ratio.detach().clamp(LOW, HIGH) * v.A * v.lp


def sapo(v: Values) -> Tensor:
    """TRL's, verl's and Liger's: a sigmoid in the place of the clip."""
    tau = 1.05 - 0.05 * (v.A > 0).to(v.lp)
    return -torch.sigmoid(tau * (v.ratio - 1)) * 4 / tau * v.A


def dppo_tv(v: Values) -> Tensor:
    moved = v.lp.exp() - v.old.exp()
    used = torch.where(v.A > 0, moved <= 0.02, moved >= -0.02)
    return -v.A * v.ratio.clamp(max=20).detach() * v.lp * used.detach()


def dppo_kl(v: Values) -> Tensor:
    p, old = v.lp.exp(), v.old.exp()
    kl = old * (v.old - v.lp) + (1 - old) * ((1 - old + 1e-8) / (1 - p + 1e-8)).log()
    used = (kl <= 0.05) | torch.where(v.A > 0, p <= old, p >= old)
    return -v.A * v.ratio.clamp(max=20).detach() * v.lp * used.detach()


def gpg(v: Values) -> Tensor:
    return -v.lp * v.A


def dro(v: Values) -> Tensor:
    return -(v.lp * v.A - 0.5 * 0.3 * (v.lp - v.old).square())


def corrected_k3(v: Values) -> Tensor:
    """TRL's use_bias_correction_kl: k3 to a reference, its ratio differentiable."""
    log_ratio = v.reference - v.lp
    return dual_clip(v) + 0.04 * v.ratio * (log_ratio.exp() - log_ratio - 1)


def dft(v: Values) -> Tensor:
    """TRL's dft, Liger's token scaling: cross entropy weighted by the token's probability."""
    return -v.lp.exp().detach() * v.lp


def entropy_bonus(v: Values) -> Tensor:
    return dual_clip(v) - 0.01 * v.entropy


def sampler_weights(v: Values) -> Tensor:
    """TRL's and verl's correction for the sampler: bounded, and without a gradient."""
    return dual_clip(v) * (v.old - v.reference).exp().clamp(max=2).detach()


BY_TOKEN: dict[str, Callable[[Values], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(dual_clip, delta, cispo, sapo, dppo_tv, dppo_kl, gpg, dro),
        *(corrected_k3, dft, entropy_bonus, sampler_weights),
    )
}


def _mean(values: Tensor, v: Values) -> Tensor:
    """Return the mean over the tokens of each sequence: [B]."""
    return (values * v.mask).sum(1) / v.mask.sum(1)


def _sequence_mean(losses: Tensor, v: Values) -> Tensor:
    return _mean(losses, v).mean()


def gspo(v: Values) -> Tensor:
    """verl's: the ratio of a sequence, with the gradient of each token."""
    of_sequence = _mean(v.lp - v.old, v).detach()[:, None]
    ratio = (v.lp - v.lp.detach() + of_sequence).exp()
    return _sequence_mean(torch.maximum(-v.A * ratio, -v.A * ratio.clamp(LOW, HIGH)), v)


def sequence_ratio(v: Values) -> Tensor:
    """TRL's and Liger's importance_sampling_level="sequence"."""
    ratio, A = _mean(v.lp - v.old, v).exp(), v.A[:, 0]
    return -torch.minimum(ratio * A, ratio.clamp(LOW, HIGH) * A).mean()


def vespo(v: Values) -> Tensor:
    log_w = ((v.lp - v.old).clamp(-20, 20) * v.mask).sum(1, keepdim=True).clamp(-18.42, 20)
    k, rate = (torch.where(v.A >= 0, *pair) for pair in ((2.0, 3.0), (3.0, 2.0)))
    phi = (rate + k * log_w - rate * log_w.exp()).exp().detach()
    return _sequence_mean(-phi * v.A * v.lp, v)


def gmpo(v: Values) -> Tensor:
    """verl's geo_mean: the geometric mean of clipped ratios."""
    log_ratio, sign = v.lp - v.old, v.A.sign()
    clipped = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-0.4, 0.4))
    return (-_mean(v.A, v) * _mean(clipped, v).exp()).mean()


def _covariance(v: Values) -> Tensor:
    used = v.mask > 0
    of_lp = v.lp.detach() - v.lp.detach()[used].mean()
    return ((v.A - v.A[used].mean()) * of_lp).masked_fill(~used, -math.inf)


def clip_cov(v: Values) -> Tensor:
    covariance = _covariance(v)
    kept = ~((covariance > 0.2) & (covariance < 5))
    return _sequence_mean(dual_clip(v) * kept, v)


def kl_cov(v: Values) -> Tensor:
    bound = _covariance(v).flatten().topk(3).values[-1]
    penalty = (v.lp - v.old).abs() * (_covariance(v) >= bound)
    return _sequence_mean(-v.A * v.ratio + penalty, v)


def entropy_mask(v: Values) -> Tensor:
    """TRL's top_entropy_quantile: only the tokens of the highest entropy have a loss."""
    bound = v.entropy[v.mask > 0].quantile(0.8)
    return _sequence_mean(dual_clip(v) * (v.entropy >= bound), v)


def off_policy_mask(v: Values) -> Tensor:
    """TRL's off_policy_mask_threshold: bad sequences that have moved too far are left out."""
    near = _mean(v.old - v.lp.detach(), v)[:, None] <= 0.1
    return _sequence_mean(dual_clip(v) * ((v.A >= 0) | near), v)


def dpo(v: Values) -> Tensor:
    """Sequences 0 and 1 are preferred to 2 and 3."""
    margin = ((v.lp - v.reference) * v.mask).sum(1)
    return -F.logsigmoid(0.1 * (margin[:2] - margin[2:])).mean()


def orpo(v: Values) -> Tensor:
    lp = _mean(v.lp, v)
    odds = lp - torch.log1p(-lp.exp())
    return -lp[:2].mean() - 0.1 * F.logsigmoid(odds[:2] - odds[2:]).mean()


def kto(v: Values) -> Tensor:
    """With a baseline over the batch, which has no gradient."""
    log_ratio = ((v.lp - v.reference) * v.mask).sum(1)
    baseline = log_ratio.detach().mean().clamp(min=0)
    signs = torch.tensor([1.0, 1, -1, -1]).to(log_ratio)
    return (1 - torch.sigmoid(0.1 * signs * (log_ratio - baseline))).mean()


LATER: dict[str, Callable[[Values], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(gspo, sequence_ratio, vespo, gmpo, clip_cov, kl_cov),
        *(entropy_mask, off_policy_mask, dpo, orpo, kto),
    )
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds a head, sampled tokens, and values whose lp and entropy are not computed yet."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    values: Values

    def leaves(self) -> "Problem":
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)

    def logp(self) -> Tensor:
        return (self.hidden @ self.weight.T).log_softmax(dim=-1)

    def plain(self) -> Values:
        """Compute lp and entropy through full logits."""
        logp = self.logp()
        lp = logp.gather(-1, self.tokens[..., None]).squeeze(-1)
        return replace(self.values, lp=lp, entropy=-(logp.exp() * logp).sum(-1))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))]


@pytest.fixture
def problem() -> Problem:
    rng = torch.Generator().manual_seed(SEED + 18)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64)

    tokens = torch.randint(V, (B, T), generator=rng)
    mask = torch.ones(B, T, dtype=F64)
    mask[1, 3:] = mask[2, 4:] = 0
    advantages = torch.tensor([1.3, -0.8, 0.4, -1.1], dtype=F64)[:, None].expand(B, T)
    nothing = torch.zeros(B, T, dtype=F64)
    values = Values(nothing, nothing, nothing, advantages, nothing, mask)
    problem = Problem(randn(B, T, H), randn(V, H) / 2, tokens, values)
    lp = problem.plain().lp
    near = replace(values, old=lp + 0.3 * randn(B, T), reference=lp + 0.5 * randn(B, T))
    return replace(problem, values=near).leaves()


def _assert_equal(ours: list[Tensor], exact: list[Tensor]) -> None:
    for value, expected in zip(ours, exact, strict=True):
        assert relative_error(value, expected) <= 1e-10
    assert exact[2].abs().max() > 0


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_loss_of_each_token(name: str, problem: Problem) -> None:
    flat = {
        name: getattr(problem.values, name).flatten() for name in ("old", "A", "reference", "mask")
    }

    def loss_fn(rows: kk.Rows) -> Tensor:
        assert rows.entropy is not None
        of_rows = {name: value[rows.index] for name, value in flat.items()}
        return BY_TOKEN[name](Values(rows.logprobs, rows.entropy, **of_rows))

    head = problem.hidden, problem.weight, problem.tokens
    ours = kk.linear_token_loss(
        *head, loss_fn, token_weights=problem.values.mask, entropy=True, impl="torch"
    ).loss
    values = problem.plain()
    exact = (BY_TOKEN[name](values) * values.mask).sum() / values.mask.sum()
    _assert_equal(problem.gradients(ours), problem.gradients(exact))


@pytest.mark.parametrize("name", LATER)
def test_a_loss_of_sequences_or_the_batch(name: str, problem: Problem) -> None:
    head, mask = (problem.hidden, problem.weight, problem.tokens), problem.values.mask
    out = kk.linear_logprobs(*head, mask=mask, entropy=True, impl="torch")
    assert out.entropy is not None
    ours = LATER[name](replace(problem.values, lp=out.logprobs, entropy=out.entropy))
    _assert_equal(problem.gradients(ours), problem.gradients(LATER[name](problem.plain())))


def forward_kl_topk(lp: Tensor, _: Tensor, lq: Tensor) -> Tensor:
    """verl's, with its log_prob_min_clamp."""
    lp, lq = lp.clamp(min=-2.5), lq.clamp(min=-2.5)
    return (lq.exp() * (lq - lp)).sum(-1)


def renormalised_rkl(lp: Tensor, _: Tensor, lq: Tensor) -> Tensor:
    """TRL's without a tail bucket: both distributions are those of the K tokens alone."""
    lp, lq = (x - x.logsumexp(-1, keepdim=True) for x in (lp, lq))
    return (lp.exp() * (lp - lq)).sum(-1)


def jsd_with_tail(lp: Tensor, rest: Tensor, lq: Tensor) -> Tensor:
    """TRL's at beta = 0.3: a bucket for all tokens but the K."""
    lp = torch.cat([lp, rest[..., None]], -1)
    lq = torch.cat([lq, (1 - lq.exp().sum(-1, keepdim=True)).log()], -1)
    p, q = lp.exp(), lq.exp()
    lm = (0.7 * p + 0.3 * q).log()
    return (0.3 * q * (lq - lm) + 0.7 * p * (lp - lm)).sum(-1)


BY_IDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    loss.__name__: loss for loss in (forward_kl_topk, renormalised_rkl, jsd_with_tail)
}


@pytest.mark.parametrize("name", BY_IDS)
def test_a_divergence_at_the_teachers_best_tokens(name: str, problem: Problem) -> None:
    logp = problem.logp()
    lq, ids = (2 * logp.detach().roll(1, -1)).log_softmax(-1).topk(5, dim=-1)

    def loss_fn(rows: kk.Rows) -> Tensor:
        assert rows.extra_logprobs is not None
        assert rows.rest_logprob is not None
        lq_of_rows = lq.flatten(0, 1)[rows.index]
        return BY_IDS[name](rows.extra_logprobs, rows.rest_logprob, lq_of_rows)

    head = problem.hidden, problem.weight, problem.tokens
    ours = kk.linear_token_loss(*head, loss_fn, extra_tokens=ids, rest=True, impl="torch").loss
    rest = logp.scatter(-1, ids, -math.inf).logsumexp(-1)
    exact = BY_IDS[name](logp.gather(-1, ids), rest, lq).mean()
    _assert_equal(problem.gradients(ours), problem.gradients(exact))


def test_label_smoothing_is_a_uniform_teacher(problem: Problem) -> None:
    """Liger's and TRL's label_smoothing: mean of -log p over the vocabulary, by KL(q‖p) + log V."""
    uniform = kk.TeacherHead(torch.zeros(B, T, 1, dtype=F64), torch.zeros(V, 1, dtype=F64))

    def loss_fn(rows: kk.Rows) -> Tensor:
        assert rows.kl is not None
        return -0.9 * rows.logprobs + 0.1 * (rows.kl + math.log(V))

    head = problem.hidden, problem.weight, problem.tokens
    ours = kk.linear_token_loss(*head, loss_fn, teacher=uniform, kl="fkl", impl="torch").loss
    exact = F.cross_entropy(
        (problem.hidden @ problem.weight.T).flatten(0, 1),
        problem.tokens.flatten(),
        label_smoothing=0.1,
    )
    _assert_equal(problem.gradients(ours), problem.gradients(exact))


def test_the_sum_of_squared_probabilities_is_a_second_temperature(problem: Problem) -> None:
    """WPO's weights in TRL, verl's optimal baseline: log Σ p² = lse(2 z) - 2 lse(z)."""
    head = problem.hidden.detach(), problem.weight.detach(), problem.tokens
    sharp, plain = (
        kk.linear_token_loss(
            *head, lambda rows: -rows.logprobs, temperature=t, lse=True, impl="torch"
        ).lse
        for t in (0.5, 1.0)
    )
    assert sharp is not None
    assert plain is not None
    exact = (2 * problem.logp()).logsumexp(dim=-1)
    torch.testing.assert_close(sharp - 2 * plain, exact.detach(), rtol=1e-10, atol=1e-10)
