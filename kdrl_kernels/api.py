"""The public functions: contract, checks and choice of implementation."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from kdrl_kernels import checks, gemm, logprobs, one_pass, reference
from kdrl_kernels.call import LossCall
from kdrl_kernels.head import Head, TeacherHead
from kdrl_kernels.objective import Objective, row_metrics


@dataclass(frozen=True, slots=True)
class LogprobOutput:
    """What linear_logprobs returns."""

    logprobs: Tensor
    """[N] float32 (float64 for float64 inputs), log-probability of each row's token, in nats."""
    entropy: Tensor | None
    """[N] in nats, dtype of logprobs, where asked for."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What kdrl_loss returns, in float32 (float64 for float64 inputs).

    [N] fields are detached, and 0 in rows of weight 0.
    """

    loss: Tensor
    """0-d, differentiable once."""
    logprobs: Tensor
    """[N], the student's log-probability of each token, in nats."""
    teacher_logprobs: Tensor | None
    """[N], the teacher's; None without a teacher."""
    kl: Tensor | None
    """[N], exact KL(p‖q) for "rkl", KL(q‖p) for "fkl", in nats; else None."""
    entropy: Tensor | None
    """[N] in nats, where asked for or part of the loss."""
    metrics: dict[str, Tensor]
    """0-d tensors on the device, over the rows of non-zero weight: see kdrl_loss."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    workspace_bytes: int | None = None,
    impl: str | None = None,
) -> LogprobOutput:
    """Log-probability of one token per row, and entropy, without [N, V] logits.

    z = softcap(hidden · weightᵀ + bias) / temperature
    logprobs[n] = z[n, tokens[n]] - log(sum_v exp(z[n, v]))

    Args:
        hidden: [N, H], float32, float16, bfloat16 or float64. A non-contiguous one is fine.
        weight: [V, H], dtype and device of hidden.
        tokens: [N] int64 in [0, V). One outside raises on a CPU; on a GPU, where raising would
            wait for the device, every log-probability is NaN.
        bias: [V] or None.
        temperature: positive float or [N] tensor.
        softcap: positive float or None.
        entropy: also return the entropy of each row.
        workspace_bytes: bound of the memory beyond inputs, outputs and gradients; None: 2,048
            rows or 1.25 GB, the larger, and at most a quarter of what is free; on a CPU 256 MB,
            where 16-bit weights are widened 16 MB at a time beside it.
        impl: "triton", "torch" or "reference" (full logits, the definition). None: Triton on GPU
            tensors, PyTorch elsewhere. A named one never falls back.
    Returns: LogprobOutput in nats, float32 (float64 for float64 inputs); differentiable once in
        hidden, weight and bias, for any later loss.
    Raises: ValueError for a shape, device, token or option; TypeError for a type or dtype.
    Memory: C rows of float32 logits; backward float32 gradients, each rounded once.
    Source: chunked recomputation; the log-sum-exp of arXiv:1805.02867. Maths: rows/README.md.
    """
    head = Head(hidden, weight, bias, temperature, softcap)
    checks.check_tokens(tokens, head)
    checks.check_workspace(workspace_bytes)
    impl = checks.choose_impl(impl, head)
    bad = checks.bad_tokens(tokens, weight.shape[0], "V")
    tokens = tokens.clamp(0, weight.shape[0] - 1)  # a kernel must not read elsewhere
    with _as_given(hidden.device):
        if impl == "reference":
            terms = reference.row_terms(head, tokens, weight.shape[0], entropy=entropy)
            lp, entropies = terms.logprobs, terms.entropy
        else:
            lp, entropies = logprobs.linear_logprobs(head, tokens, entropy, impl, workspace_bytes)
    return LogprobOutput(_poison(lp, bad), entropies)


def kdrl_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    advantages: Tensor | None,
    token_weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    teacher: TeacherHead | None = None,
    teacher_logprobs: Tensor | None = None,
    kd_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    workspace_bytes: int | None = None,
    impl: str | None = None,
) -> LossOutput:
    """Policy gradient, teacher KL and entropy bonus of N tokens in one pass over the head.

    loss = (1 / normalizer) · sum_n token_weights[n] · (PG + kd_coef · kd_weight[n] · s · KD
           - entropy_coef · entropy), each term as in Objective.

    Args:
        hidden, weight, bias, temperature, softcap, workspace_bytes, impl: as linear_logprobs.
        tokens: [N] int64, the sampled tokens. One outside [0, vocab_size) raises on a CPU; on a
            GPU it makes the loss NaN and is counted in metrics["bad_tokens"].
        advantages: [N] float; None with objective.policy "off".
        token_weights: [N] float, None: 1. Rows of weight 0 are never projected, may hold NaN, and
            give exactly zero gradient. Passing weights on a GPU costs one synchronisation.
        old_logprobs: [N] float in nats, at sampling time; None: strictly on-policy (ratio 1).
        teacher: TeacherHead with N rows, for sampled or exact KD.
        teacher_logprobs: [N] float in nats, from a server, for sampled KD only.
        kd_weight: [N] float, schedule and mask of the KD term; None: 1.
        normalizer: number or 0-d tensor, e.g. the global token count; None: sum(token_weights).
        vocab_size: columns from here on do not exist in either model; None: min(V, V_t).
        entropy: also return the entropy of each row.
    Returns: LossOutput. metrics: tokens, bad_tokens, ratio_mean, ratio_max, clip_fraction (policy
        "clip"), with a teacher teacher_gap_mean (mean lp - lq, nats) and k2_mean, and with a
        sampled KD kd_flip_fraction (share of tokens where it turns the sign of the advantage).
    Raises: ValueError for a shape, device, token or option; TypeError for a type or dtype.
    Memory: as linear_logprobs, two buffers for exact KD; gradients are taken in the forward pass
        and kept in float32 until backward rounds them once. Under no_grad none are computed.
    Source: KDRL, arXiv:2506.02208. Derivations: rows/README.md.
    """
    student = Head(hidden, weight, bias, temperature, softcap)
    checks.check_tokens(tokens, student)
    checks.check_workspace(workspace_bytes)
    checks.check_teacher(objective, teacher, teacher_logprobs, student)
    if advantages is None and objective.policy != "off":
        raise ValueError(f"advantages must be [N] for policy={objective.policy!r}, got None")
    weights = checks.row_tensor("token_weights", token_weights, student)
    if weights is None:
        weights = torch.ones_like(tokens, dtype=gemm.accumulator(hidden.dtype))
    call = LossCall(
        student=student,
        tokens=tokens,
        vocab_size=checks.check_vocab_size(vocab_size, student, teacher),
        objective=objective,
        weights=weights,
        normalizer=checks.normalizer_tensor(normalizer, weights),
        advantages=checks.row_tensor("advantages", advantages, student),
        old_logprobs=checks.row_tensor("old_logprobs", old_logprobs, student),
        kd_weight=checks.row_tensor("kd_weight", kd_weight, student),
        teacher=teacher,
        teacher_logprobs=checks.row_tensor("teacher_logprobs", teacher_logprobs, student),
        entropy=entropy,
        workspace_bytes=workspace_bytes,
    )
    impl = checks.choose_impl(impl, student)
    bad = checks.bad_tokens(tokens, call.vocab_size, "vocab_size", weights)
    call = replace(call, tokens=tokens.clamp(0, call.vocab_size - 1))
    active = None
    if token_weights is not None:
        call, active = call.drop_masked_rows()
    with _as_given(hidden.device):
        if impl == "reference":
            loss, terms = reference.kdrl_loss(call)
        else:
            loss, terms = one_pass.kdrl_loss(call, impl)
    rows = call.rows(terms.detach())
    metrics = row_metrics(objective, rows)
    metrics |= {"tokens": torch.full_like(bad, len(call.tokens)), "bad_tokens": bad}
    return LossOutput(
        loss=_poison(loss, bad),
        logprobs=_spread(rows.logprobs, active, len(tokens)),
        teacher_logprobs=_spread(rows.teacher_logprobs, active, len(tokens)),
        kl=_spread(rows.kl, active, len(tokens)),
        entropy=_spread(rows.entropy, active, len(tokens)),
        metrics=metrics,
    )


@contextmanager
def _as_given(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes given, whatever autocast says, and launch on the tensors' own GPU."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield


def _poison(values: Tensor, bad: Tensor) -> Tensor:
    """values, or NaN in value and gradient where a token was out of range."""
    return values * torch.where(bad > 0, torch.nan, 1.0).to(values.dtype)


@overload
def _spread(values: Tensor, active: Tensor | None, N: int) -> Tensor: ...
@overload
def _spread(values: None, active: Tensor | None, N: int) -> None: ...
def _spread(values: Tensor | None, active: Tensor | None, N: int) -> Tensor | None:
    """[N] with values in the active rows and 0 elsewhere."""
    if values is None or active is None:
        return values
    return values.new_zeros(N).index_copy_(0, active, values)
