"""Defines linear_token_loss."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kdrl_kernels import checks, option_checks, reference, token_loss
from kdrl_kernels.adapter import LowRank
from kdrl_kernels.api.calls import loss_call, output, solved
from kdrl_kernels.batches import takes_batches
from kdrl_kernels.caller_loss import CallerLoss
from kdrl_kernels.head import StudentHead, TeacherHead, gathered
from kdrl_kernels.objective import Divergence
from kdrl_kernels.outputs import LossOutput
from kdrl_kernels.plain import check_flag, check_number
from kdrl_kernels.plan import Backward
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.tangents import refuses_tangents
from kdrl_kernels.token_rows import Rows
from kdrl_kernels.truncation import Truncation
from kdrl_kernels.vocab_ranks import VocabRanks, takes_vocab_group


@torch.compiler.disable(reason="the loss of linear_token_loss is a Python function")
@takes_vocab_group
@refuses_tangents
@takes_batches
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    loss_fn: Callable[[Rows], Tensor],
    *,
    token_weights: Tensor | None = None,
    active_rows: int | None = None,
    teacher: TeacherHead | None = None,
    teacher_logprobs: Tensor | None = None,
    kl: Divergence | None = None,
    jsd_alpha: float = 0.5,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    adapter: LowRank | None = None,
    truncation: Truncation | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    lse: bool = False,
    extra_tokens: Tensor | None = None,
    rest: bool = False,
    teacher_entropy: bool = False,
    positions: Tensor | None = None,
    compact: bool | None = None,
    workspace_bytes: int | None = None,
    backward: Backward = "exact",
    sketch: Sketch | None = None,
    impl: str | None = None,
    vocab_group: ProcessGroup | None = None,
) -> LossOutput:
    """Compute a caller's loss of each token in one pass over the head, at the cost of kdrl_loss.

    loss = (1 / normalizer) · sum_n token_weights[n] · loss_fn(rows)[n]

    Args:
        hidden, weight, tokens: [N, H], [V, H] and [N] int64 in [0, vocab_size); or [B, T, H] and
            [B, T], as every [N]. For bias ([V]), temperature (float or [N]), softcap, adapter,
            workspace_bytes, backward, sketch, impl and vocab_group see help(linear_logprobs); for
            token_weights ([N]), active_rows, teacher (TeacherHead), teacher_logprobs ([N] in nats),
            normalizer, truncation, vocab_size and compact help(kdrl_loss).
        loss_fn: rows -> [C] losses, called once a chunk under autograd. rows.index [C] says which
            of the N rows these are: advantages[rows.index]; or, where hidden is [B, T, H], rows
            b · T + t: advantages.flatten()[rows.index]. rows.logprobs, rows.kl, rows.forward_kl,
            rows.entropy, rows.lse, rows.extra_logprobs and rows.rest_logprob carry the gradient;
            rows.teacher_logprobs does not. The loss of a row may depend on that row alone, since
            the chunk plan decides which rows come together (on a CPU a gradient in another row
            raises). Gradients reach hidden, weight, bias and adapter alone, so a parameter in
            loss_fn raises (impl "reference" is plain autograd, and reaches all).
        teacher, teacher_logprobs: set rows.teacher_logprobs.
        kl: "rkl", "fkl" or "jsd" sets rows.kl; "rkl+fkl" sets rows.kl to KL(p‖q) and
            rows.forward_kl to KL(q‖p), in one pass. Needs a TeacherHead.
        jsd_alpha: the teacher's share of the mixture of "jsd", in (0, 1).
        entropy: True sets rows.entropy, and returns it.
        lse: True sets rows.lse, the log-sum-exp of the logits (for a z-loss), and returns it.
        extra_tokens: as in linear_logprobs, in [0, vocab_size) or -1: sets rows.extra_logprobs
            [C, K], and returns them.
        rest: as in linear_logprobs: sets rows.rest_logprob [C], and returns it.
        teacher_entropy: True sets rows.teacher_entropy, the entropy in nats of the TeacherHead's
            distribution over the columns of both models, a constant, and returns it.
        positions: [N] int64, passed through: rows.positions holds those of the rows, e.g. their
            places in their completions.
    Returns: LossOutput; metrics: tokens, gradient_rows, bad_tokens.
    Raises: as kdrl_loss; ValueError or TypeError where loss_fn does not return [C] losses that
        depend on the rows.
    Memory: as kdrl_loss. torch.compile breaks the graph once, at this call, and traces nothing in
        it, since loss_fn is Python; with fullgraph=True that is an error.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    check_flag("lse", lse)
    check_flag("teacher_entropy", teacher_entropy)
    if kl is not None and kl not in get_args(Divergence):
        raise ValueError(f"kl must be one of {get_args(Divergence)} or None, got {kl!r}")
    if kl is not None and teacher is None:
        raise ValueError(f"teacher must be a TeacherHead for kl={kl!r}, got None")
    if teacher_entropy and teacher is None:
        raise ValueError("teacher must be a TeacherHead for teacher_entropy=True, got None")
    check_number("jsd_alpha", jsd_alpha)
    if not 0 < jsd_alpha < 1:
        raise ValueError(f"jsd_alpha must be in (0, 1), got {jsd_alpha}")
    weight, bias = gathered(weight, hidden), gathered(bias, hidden)
    student = StudentHead(hidden, weight, bias, temperature, softcap)
    if positions is not None:
        checks.check_tokens(positions, student, "positions")
    call = loss_call(
        student,
        tokens,
        CallerLoss(loss_fn, kl, jsd_alpha, entropy, lse, teacher_entropy, positions),
        adapter=adapter,
        token_weights=token_weights,
        active_rows=active_rows,
        teacher=teacher,
        teacher_logprobs=teacher_logprobs,
        normalizer=normalizer,
        vocab_size=vocab_size,
        entropy=entropy,
        compact=compact,
        truncation=truncation,
        extra_tokens=extra_tokens,
        rest=rest,
        workspace_bytes=workspace_bytes,
        impl=impl,
    )
    sketch = option_checks.check_sketch(backward, sketch, call.impl, call.student)
    solve = reference.loss if call.impl == "reference" else token_loss.token_loss
    if isinstance(vocab_group, VocabRanks):
        solve = vocab_group.loss
    loss, outputs, counts, more = solved(call, sketch, solve)
    used = None if call.weights is None else call.weights != 0
    rows = call.rows(outputs.map(Tensor.detach), slice(0, len(tokens)))
    return output(loss, rows, used, more, counts)
