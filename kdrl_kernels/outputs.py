"""Defines what the public functions return."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogprobOutput:
    """Holds what linear_logprobs returns."""

    logprobs: Tensor
    """[N] float32 (float64 for float64 inputs), the log-probability of each token, in nats."""
    entropy: Tensor | None
    """[N] in nats, the entropy of each row in the dtype of logprobs; None unless entropy=True."""
    extra_logprobs: Tensor | None = None
    """[N, K] in nats, the log-probability at each of extra_tokens, 0 where that is -1; else None.
    """
    rest_logprob: Tensor | None = None
    """[N], log of the probability on none of a row's extra_tokens, or of its K best with topk=K;
    None unless rest=True."""
    topk_tokens: Tensor | None = None
    """[N, K] int64, the likeliest tokens of each row, the likeliest first and of equal ones the
    lowest; -1 where a row has fewer of probability above 0; None unless topk=K."""
    topk_logprobs: Tensor | None = None
    """[N, K] in nats, the log-probabilities of topk_tokens, 0 where that is -1; else None."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Holds what kdrl_loss and linear_token_loss return, in float32 (float64 for float64 inputs).

    [N] fields are detached, and 0 in rows of weight 0.
    """

    loss: Tensor
    """0-d, the loss, differentiable once."""
    logprobs: Tensor
    """[N], the student's log-probability of each token, in nats."""
    teacher_logprobs: Tensor | None
    """[N], the teacher's log-probability of each token, in nats; None without a teacher."""
    kl: Tensor | None
    """[N], the exact divergence of each row in nats: KL(p‖q) for "rkl", "rkl+fkl" and kd_baseline
    "kl", KL(q‖p) for "fkl", Jensen-Shannon for "jsd", that over K tokens for a top-k kd; else
    None."""
    forward_kl: Tensor | None
    """[N], KL(q‖p) of each row in nats; None unless kd (linear_token_loss: kl) is "rkl+fkl"."""
    entropy: Tensor | None
    """[N], the entropy of each row in nats; None unless entropy=True or the loss reads it."""
    lse: Tensor | None
    """[N], log(sum_v exp(z_v)) of each row; None unless lse=True (linear_token_loss)."""
    extra_logprobs: Tensor | None
    """[N, K] in nats, the log-probability at each of extra_tokens, or of teacher_topk's ids; 0
    where that is -1; None without either."""
    rest_logprob: Tensor | None
    """[N], log of the probability on none of them; None unless rest=True (linear_token_loss) or the
    loss is a top-k divergence with its tail."""
    teacher_entropy: Tensor | None
    """[N], the teacher's entropy of each row in nats; None unless teacher_entropy=True
    (linear_token_loss)."""
    metrics: dict[str, Tensor]
    """0-d sums and counts on the device, over the rows of non-zero weight; kdrl_loss lists them."""
