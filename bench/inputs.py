"""Makes seeded inputs with logits like a language model's; `python -m bench.inputs` checks it.

Heads have rows of length about 1, so that noise of length s in a hidden state gives logits of
standard deviation s. A hidden state is such noise plus a multiple of one head row, which lifts
that token's logit above the log-sum-exp of the rest by a margin drawn for each row:

    about half of the tokens have an entropy below 0.01 nat, a fifth above 0.67 nat

as on the reasoning models of arXiv:2506.01939. That is the profile "reasoning"; in "flat" nothing
is lifted, and every token is hard: 7.2 to 7.6 nats at V = 32,768 (quartiles). Logits of "hard" have
a wider spread, and as many nats as the hard tokens of real models: 3.7 to 4.8 (median 4.3, 90%
between 2.2 and 5.3). "rl" has the margins of "reasoning" and the spread of "hard": the hardest
twentieth of its tokens have 4 to 5.3 nats, that of "reasoning" 6.7 to 7.7. The teacher is a noisy
copy, so that its KL is a fraction of a nat.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine import DEVICE, set_up_cpu
from bench.shapes import SHAPES, Shape, default_shape

SPREADS = {"reasoning": 2.5, "rl": 4.0, "flat": 2.5, "hard": 4.0}
"""{profile: standard deviation of the logits that are not lifted, in nats}."""
LIFTED = ("reasoning", "rl")
"""Profiles in which a token of each row is lifted above the others."""
MARGIN_MEAN, MARGIN_SPREAD = 7.7, 5.2
"""Mean and spread of the lifted logit over the log-sum-exp of the others, in nats."""
TEACHER_NOISE = 0.35
"""Share of noise in the teacher's head and hidden states."""
PROFILES = ("reasoning", "flat")
"""Profiles of the scoreboard; the others are for measures/sketch.py alone."""
TOPK = 64
"""The teacher's best tokens whose log-probabilities are inputs, where there are as many."""
TEACHER_REST = 1e-4
"""Probability that the teacher leaves to other tokens at least: the numbers of a top-k list are
rounded, so they do not tell less."""
RANK = 16
ADAPTER_SCALE = 2.0
ADAPTER_SIZE = 1e-3
"""Rank of the low-rank matrix scale · B · A; its scale; the size of B, so small that ratios stay
inside the clip range."""
LEAVES = ("hidden", "weight", "adapter_a", "adapter_b")
"""Inputs that may get a gradient."""
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Quantiles of the entropy that are printed."""
SAMPLE_ROWS = 256
"""Rows of logits held while tokens are sampled."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of the benchmarked calls; LEAVES require gradients."""

    shape: Shape
    profile: str
    """Profile of the entropy: one of SPREADS."""
    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V, H]."""
    teacher_hidden: Tensor
    """[N, H_t]."""
    teacher_weight: Tensor
    """[V_t, H_t]."""
    tokens: Tensor
    """[N] int64, sampled from the student."""
    entropy: Tensor
    """[N] float32, of the student, in nats: to check the profile."""
    advantages: Tensor
    """[N] float32, none of them 0."""
    half_advantages: Tensor
    """[N] float32, half of them 0, at random places."""
    old_logprobs: Tensor
    """[N] float32, nats: a little off, so that the ratio is not 1, and inside the clip range."""
    teacher_topk_tokens: Tensor
    """[N, K] int64: the teacher's best tokens, the best first; K is TOPK where V allows."""
    teacher_topk_logprobs: Tensor
    """[N, K] float32, nats; their probabilities sum to 1 - TEACHER_REST at most."""
    adapter_a: Tensor
    """[RANK, H]."""
    adapter_b: Tensor
    """[V, RANK]."""
    both_hidden: Tensor | None = None
    """[N, 2 H_t]: teacher_hidden and that of a second teacher, side by side."""
    both_weights: Tensor | None = None
    """[V_t, 2 H_t], the same of the heads. None, as both_hidden, of inputs for one teacher."""

    @property
    def shared_weight(self) -> Tensor:
        """Return the head's rows that both models have, [min(V, V_t), H]."""
        return _cut(self.weight, self.shape)

    @property
    def shared_teacher_weight(self) -> Tensor:
        """Return the teacher's rows that both models have, [min(V, V_t), H_t]."""
        return _cut(self.teacher_weight, self.shape)

    @property
    def two_teachers(self) -> tuple[Tensor, Tensor]:
        """Return both teachers' hidden states, and their heads."""
        if self.both_hidden is None or self.both_weights is None:
            raise ValueError("inputs must be made with teachers=2, got those of one teacher")
        return self.both_hidden, self.both_weights

    @property
    def shared_adapter_b(self) -> Tensor:
        """Return the adapter's rows of shared_weight, [min(V, V_t), RANK]."""
        return _cut(self.adapter_b, self.shape)


def _cut(weight: Tensor, shape: Shape) -> Tensor:
    V = min(shape.V, shape.V_t)
    # a slice, even of everything, costs a copy of its gradient
    return weight if len(weight) == V else weight[:V]


@torch.no_grad()
def make_inputs(
    shape: Shape,
    profile: str = "reasoning",
    device: str = DEVICE,
    seed: int = 0,
    teachers: int = 1,
) -> Inputs:
    """Make the inputs of a shape, the same on every call with this device and seed.

    teachers: 2 adds a second teacher, and changes nothing else.
    Raises: ValueError for a profile that is not one of SPREADS.
    """
    if profile not in SPREADS:
        raise ValueError(f"profile must be one of {', '.join(SPREADS)}, got {profile!r}")
    spread = SPREADS[profile]
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=device)

    N, V = shape.N, min(shape.V, shape.V_t)
    hidden, weight = _student(shape, profile, rng)
    teacher_weight = _noisy_copy(weight, randn(shape.V_t, shape.H_t) / math.sqrt(shape.H_t))
    teacher_hidden = _noisy_copy(hidden, spread * randn(N, shape.H_t))
    heads = (t.to(shape.dtype) for t in (hidden, weight, teacher_hidden, teacher_weight))
    hidden, weight, teacher_hidden, teacher_weight = heads
    tokens, logprobs, entropy = _sample(hidden, weight[:V], rng)
    advantages = randn(N)
    advantages += advantages.sign() * 0.1
    kept = torch.randperm(N, generator=rng, device=device) < N // 2
    old_logprobs = logprobs + 0.02 * randn(N)
    ids, teacher_logprobs = _best(teacher_hidden, teacher_weight[:V])
    a, b = randn(RANK, shape.H) / math.sqrt(shape.H), ADAPTER_SIZE * randn(shape.V, RANK)
    both_hidden, both_weights = None, None
    if teachers == 2:
        second_weight = _noisy_copy(weight, randn(shape.V_t, shape.H_t) / math.sqrt(shape.H_t))
        second_hidden = _noisy_copy(hidden, spread * randn(N, shape.H_t))
        both_hidden = torch.cat([teacher_hidden, second_hidden.to(shape.dtype)], dim=1)
        both_weights = torch.cat([teacher_weight, second_weight.to(shape.dtype)], dim=1)
    return Inputs(
        shape,
        profile,
        hidden.requires_grad_(),
        weight.requires_grad_(),
        teacher_hidden,
        teacher_weight,
        tokens,
        entropy,
        advantages,
        half_advantages=torch.where(kept, advantages, 0),
        old_logprobs=old_logprobs,
        teacher_topk_tokens=ids,
        teacher_topk_logprobs=teacher_logprobs,
        adapter_a=a.to(shape.dtype).requires_grad_(),
        adapter_b=b.to(shape.dtype).requires_grad_(),
        both_hidden=both_hidden,
        both_weights=both_weights,
    )


def _student(shape: Shape, profile: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw hidden states [N, H] and a head [V, H] with logits of the profile, in float32."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=rng.device)

    N, V, spread = shape.N, min(shape.V, shape.V_t), SPREADS[profile]
    weight = randn(shape.V, shape.H) / math.sqrt(shape.H)
    lifted = torch.randint(V, (N,), generator=rng, device=rng.device)
    margin = MARGIN_MEAN + MARGIN_SPREAD * randn(N)
    lift = math.log(V) + spread**2 / 2 + margin
    hidden = spread * randn(N, shape.H)
    if profile in LIFTED:
        hidden += lift[:, None] * weight[lifted]
    return hidden, weight


def _noisy_copy(student: Tensor, noise: Tensor) -> Tensor:
    """Mix the student's numbers into the noise where sizes overlap, keeping products of rows."""
    rows, cols = (min(a, b) for a, b in zip(student.shape, noise.shape, strict=True))
    keep = math.sqrt((1 - TEACHER_NOISE**2) * student.shape[1] / cols)
    noise[:rows, :cols].mul_(TEACHER_NOISE).add_(student[:rows, :cols], alpha=keep)
    return noise


def _sample(hidden: Tensor, weight: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sample tokens by the Gumbel trick: (token, its log-probability, row entropy), each [N]."""
    parts = []
    wide = weight.float()  # 16-bit logits near 30 are off by a third of the clip range
    for x in hidden.split(SAMPLE_ROWS):
        logp = (x.float() @ wide.T).log_softmax(dim=1)
        noise = torch.empty_like(logp).exponential_(generator=rng).clamp_min_(1e-30).log_()
        token = (logp - noise).argmax(dim=1)
        logprob = logp.gather(1, token[:, None]).squeeze(1)
        parts.append((token, logprob, -(logp.exp() * logp).sum(dim=1)))
    token, logprob, entropy = (torch.cat(parts) for parts in zip(*parts, strict=True))
    return token, logprob, entropy


def _best(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best tokens [N, K] of a head, and their log-probabilities less TEACHER_REST."""
    parts = []
    wide = weight.float()
    for x in hidden.split(SAMPLE_ROWS):
        logq = (x.float() @ wide.T).double().log_softmax(dim=1)  # float32 loses log(1 - 1e-9)
        parts.append(logq.topk(min(TOPK, len(weight) - 1), dim=1))
    logprobs, tokens = (torch.cat(values) for values in zip(*parts, strict=True))
    return tokens, (logprobs + math.log1p(-TEACHER_REST)).float()


def print_profile(inputs: Inputs) -> None:
    """Print shares of tokens by entropy, its quantiles, and the mean distance to the teacher."""
    log_ratios = []
    for x, t, token in zip(
        *(v.split(SAMPLE_ROWS) for v in (inputs.hidden, inputs.teacher_hidden, inputs.tokens)),
        strict=True,
    ):
        pair = ((x, inputs.shared_weight), (t, inputs.shared_teacher_weight))
        logp, logq = ((a @ w.T).float().log_softmax(dim=1) for a, w in pair)
        log_ratios.append((logp - logq).gather(1, token[:, None]).squeeze(1))
    low, high = ((m.float().mean().item()) for m in (inputs.entropy < 0.01, inputs.entropy > 0.67))
    quantiles = ", ".join(f"{q:.0%} {inputs.entropy.quantile(q):.2f}" for q in QUANTILES)
    print(
        f"shape {inputs.shape.name}, {inputs.profile}: entropy below 0.01 nat in {low:.0%} of the "
        f"tokens, above 0.67 nat in {high:.0%}; quantiles {quantiles}, at most "
        f"{inputs.entropy.max():.1f} nats; "
        f"mean log p - log q {torch.cat(log_ratios).mean():.2f} nats"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default=default_shape().name)
    parser.add_argument("--profile", choices=SPREADS, default="reasoning")
    args = parser.parse_args()
    set_up_cpu()
    with torch.no_grad():
        print_profile(make_inputs(SHAPES[args.shape], args.profile))
