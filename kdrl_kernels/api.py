"""Defines the public functions: contract, checks and choice of implementation."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from kdrl_kernels import checks, logprobs, operators, reference, sketched, token_loss
from kdrl_kernels.batches import takes_batches
from kdrl_kernels.call import LogprobCall, LossCall, RowOutputs, has_values
from kdrl_kernels.head import Head, TeacherHead, gathered, needs_gradient
from kdrl_kernels.metrics import row_metrics
from kdrl_kernels.objective import CallerLoss, Divergence, Objective, Rows, TokenLoss
from kdrl_kernels.outputs import LogprobOutput, LossOutput
from kdrl_kernels.plain import check_bytes, check_flag, check_number
from kdrl_kernels.plan import Backward, Geometry, max_rows
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.tangents import refuses_tangents
from kdrl_kernels.truncation import Truncation


@refuses_tangents
@takes_batches
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    truncation: Truncation | None = None,
    entropy: bool = False,
    workspace_bytes: int | None = None,
    cache_bytes: int = 0,
    backward: Backward = "exact",
    sketch: Sketch | None = None,
    impl: str | None = None,
) -> LogprobOutput:
    """Compute the log-probability of one token per row, and entropy, without [N, V] logits.

    z = softcap(hidden · weightᵀ + bias) / temperature
    logprobs[n] = z[n, tokens[n]] - log(sum_v exp(z[n, v]))

    Args:
        hidden: [N, H], float32, float16, bfloat16 or float64. A non-contiguous one is fine. Or
            [B, T, H]: every [N] below, of arguments and outputs, is then [B, T].
        weight: [V, H], on the device of hidden, in its dtype; or one of the two in float32 and the
            other in 16 bits, which computes in hidden's dtype, with a copy of weight in it, and
            gives each its gradient in its own dtype. A DTensor (FSDP2) is gathered once; its
            gradient comes back in its layout, averaged over the ranks as FSDP2 averages the
            body's. bias may be one too.
        tokens: [N] int64 in [0, V). One outside raises on a CPU; on a GPU, where raising would
            wait for the device, it makes every log-probability NaN.
        mask: [N] bool or number, None: all rows. Rows where it is 0 are never projected, may hold
            NaN and any token, and give 0 and no gradient. On a GPU it costs one synchronisation.
        bias: [V] or None.
        temperature: positive float or [N] tensor, a constant: no gradient reaches it.
        softcap: positive float or None.
        truncation: Truncation(top_k, top_p) of the sampler, or None: log-probabilities and entropy
            are those of the tokens that it keeps, renormalised. Not with a softcap.
        entropy: True also returns the entropy of each row.
        workspace_bytes: bound of the memory beyond inputs, outputs and gradients. None on a GPU:
            2,048 rows or 1.25 GB, whichever is more, and at most a quarter of the free memory.
            None on a CPU: 256 MB; 16-bit weights are widened 16 MB at a time in addition.
        cache_bytes: where a gradient is needed, as many chunks as fit keep their float32 logits
            until backward, which then does not compute them again: 3u instead of 4u for those
            rows (u = 2 N H V FLOP), and the same gradients to the bit. A compiled caller with a
            mask keeps the logits of all rows of the mask, or none.
        backward: "sketch" multiplies an unbiased sparse sketch of dL/dlogits in place of dX's and
            dW's GEMMs: 1u in all (u = 2 N H V FLOP), and no cache of logits. A graph of
            torch.compile breaks there.
        sketch: Sketch(threshold, seed, rows) of backward="sketch"; None: Sketch().
        impl: "triton", "torch" or "reference" (the definition, with full logits). None: Triton on
            GPU tensors, PyTorch elsewhere. A named one never falls back to another.
    Returns: LogprobOutput in nats, float32 (float64 for float64 inputs); differentiable once in
        hidden, weight and bias, for any later loss.
    Raises: ValueError for a shape, device, token or option; TypeError for a type or dtype.
    Memory: float32 logits of one chunk of rows; in backward float32 gradients, rounded once.
    Source: chunked recomputation; the log-sum-exp of arXiv:1805.02867. Maths: rows/README.md.
    """
    weight, bias = gathered(weight, hidden), gathered(bias, hidden)
    head = Head(hidden, weight, bias, temperature, softcap)
    checks.check_tokens(tokens, head)
    check_bytes("workspace_bytes", workspace_bytes)
    check_bytes("cache_bytes", cache_bytes, optional=False)
    check_flag("entropy", entropy)
    impl, truncation = checks.choose_impl(impl, head), checks.check_truncation(truncation, head)
    sketch = checks.check_sketch(backward, sketch, impl, head)
    used, N = checks.row_tensor("mask", mask, head, mask=True), len(tokens)
    used = used if has_values(tokens) else None
    active = slice(0, N) if used is None else used.nonzero().squeeze(1)
    if used is not None:
        head, tokens = head.select(active), tokens[active]
        sketch = None if sketch is None else sketch.select(active)
    if impl == "reference":
        outputs = RowOutputs(*reference.linear_logprobs(head, tokens, entropy, truncation))
    else:
        rows = max_rows(_geometry(head, None, None, impl), workspace_bytes)
        needs, cached = needs_gradient(head), 0
        if any(needs):
            V, dtype = weight.shape[0], hidden.dtype
            sizes = len(tokens), V, dtype, rows, cache_bytes, None if used is None else N
            cached = logprobs.cached_rows(*sizes)
        call = LogprobCall(head, tokens, entropy, impl, rows, cached, needs, truncation)
        if sketch is not None and any(needs) and has_values(tokens):
            outputs = RowOutputs(*sketched.linear_logprobs(call, sketch))
        else:
            outputs = RowOutputs(*operators.linear_logprobs(call))
    outputs = outputs.spread(active, N)
    return LogprobOutput(outputs.logprobs, outputs.entropy)


@refuses_tangents
@takes_batches
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
    truncation: Truncation | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    compact: bool | None = None,
    workspace_bytes: int | None = None,
    backward: Backward = "exact",
    sketch: Sketch | None = None,
    impl: str | None = None,
) -> LossOutput:
    """Compute policy gradient, teacher KL and entropy bonus of N tokens in one pass over the head.

    loss = (1 / normalizer) · sum_n token_weights[n] · (PG + kd_coef · kd_weight[n] · s · KD
           - entropy_coef · entropy), where Objective defines each term.

    Args:
        hidden, weight, bias, temperature, softcap, truncation, workspace_bytes, backward, sketch,
            impl: as in linear_logprobs. truncation is the student's: not with "fkl", which would
            be infinite.
        tokens: [N] int64, the sampled tokens. One outside [0, vocab_size) raises on a CPU; on a
            GPU it makes the loss NaN and is counted in metrics["bad_tokens"].
        advantages: [N] float; None with objective.policy "off". This and all that follows is
            constant: gradients reach hidden, weight and bias alone.
        token_weights: [N] float, integer or bool, None: 1. Rows of weight 0 are never projected,
            may hold NaN, and give exactly zero gradient. Passing weights on a GPU costs one
            synchronisation.
        old_logprobs: [N] float in nats, the policy's at sampling time; None: strictly on-policy
            (ratio 1).
        teacher: TeacherHead with N rows, for sampled or exact KD.
        teacher_logprobs: [N] float in nats, as a server returns them, for sampled KD without
            kd_baseline.
        kd_weight: [N] float, integer or bool, schedule and mask of the KD term; None: 1.
        normalizer: number or 0-d tensor, e.g. the token count of the step, divided by the ranks
            where gradients are averaged over them; None: sum(token_weights).
        vocab_size: number of columns that both models use; None: min(V, V_t).
        entropy: True also returns the entropy of each row.
        compact: True leaves rows whose logits have no gradient (clipped, or advantage 0 and no KD)
            out of dX and dW. On a GPU the host then waits, once a chunk, for the number of the
            others while the gradient kernel runs. None: True on a CPU and with token_weights.
    Returns: LossOutput. metrics: tokens (rows projected), gradient_rows (rows of dX and dW),
        bad_tokens, ratio_sum, ratio_max, clipped (policy "clip"), entropy_sum (where entropy is
        computed); with a teacher, over the rows of kd_weight > 0: kd_tokens (their number),
        teacher_log_ratio_sum (of l = lp - lq), k2_sum (of l²/2), kl_sum (where the loss computes
        KL(p‖q)) and kd_flipped (rows whose advantage minus the pull of the KD term has the other
        sign; not for "jsd" nor policy "off"). With a sketch: flat_rows (whose gradient is exact),
        entries (of dL/dlogits that are kept), sketch_noise (estimate of the relative error of dX)
        and its two sums, sketch_variance_sum and sketch_square_sum. mean_metrics turns all into
        means.
    Raises: ValueError for a shape, device, token or option; TypeError for a type or dtype.
    Memory: as linear_logprobs, but two chunks of logits for exact KD and for kd_baseline. The
        forward pass computes the gradients and keeps them in float32 until backward rounds them
        once. Under no_grad it computes none.
    Source: KDRL, arXiv:2506.02208. Derivations: rows/README.md.
    """
    checks.check_objective(objective, teacher, teacher_logprobs)
    student = Head(hidden, gathered(weight, hidden), gathered(bias, hidden), temperature, softcap)
    if advantages is None and objective.policy != "off":
        raise ValueError(f"advantages must be [N] for policy={objective.policy!r}, got None")
    call = _loss_call(
        student,
        tokens,
        objective,
        token_weights=token_weights,
        teacher=teacher,
        teacher_logprobs=teacher_logprobs,
        normalizer=normalizer,
        vocab_size=vocab_size,
        entropy=entropy,
        compact=compact,
        truncation=truncation,
        workspace_bytes=workspace_bytes,
        impl=impl,
    )
    call = replace(
        call,
        advantages=checks.row_tensor("advantages", advantages, student),
        old_logprobs=checks.row_tensor("old_logprobs", old_logprobs, student),
        kd_weight=checks.row_tensor("kd_weight", kd_weight, student, mask=True),
    )
    sketch = checks.check_sketch(backward, sketch, call.impl, student)
    solve = reference.loss if call.impl == "reference" else operators.kdrl_loss
    loss, outputs, counts, more = _solve(call, sketch, solve)
    used = None if call.weights is None else call.weights != 0
    rows = call.rows(outputs.map(Tensor.detach), slice(None))  # a number would fix N in a graph
    return _output(loss, rows, used, row_metrics(objective, rows, used) | more, counts)


@torch.compiler.disable(reason="the loss of linear_token_loss is a Python function")
@refuses_tangents
@takes_batches
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    loss_fn: Callable[[Rows], Tensor],
    *,
    token_weights: Tensor | None = None,
    teacher: TeacherHead | None = None,
    teacher_logprobs: Tensor | None = None,
    kl: Divergence | None = None,
    jsd_alpha: float = 0.5,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    truncation: Truncation | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    lse: bool = False,
    compact: bool | None = None,
    workspace_bytes: int | None = None,
    backward: Backward = "exact",
    sketch: Sketch | None = None,
    impl: str | None = None,
) -> LossOutput:
    """Compute a caller's loss of each token in one pass over the head, at the cost of kdrl_loss.

    loss = (1 / normalizer) · sum_n token_weights[n] · loss_fn(rows)[n]

    Args:
        loss_fn: rows -> [C] losses, called once a chunk under autograd. rows.index [C] says which
            of the N rows these are (advantages[rows.index]; rows are b · T + t where hidden is
            [B, T, H]: advantages.flatten()[rows.index]); rows.logprobs, rows.kl,
            rows.forward_kl, rows.entropy and rows.lse carry the gradient; rows.teacher_logprobs
            does not. The loss of a row may depend on that row alone, since the chunk plan decides
            which rows come together.
            Gradients reach hidden, weight and bias alone, so a parameter in loss_fn raises (impl
            "reference" is plain autograd, and reaches all).
        teacher, teacher_logprobs: set rows.teacher_logprobs.
        kl: "rkl", "fkl" or "jsd" sets rows.kl; "rkl+fkl" sets rows.kl to KL(p‖q) and
            rows.forward_kl to KL(q‖p), in one pass. Needs a TeacherHead.
        entropy: True sets rows.entropy, and returns it.
        lse: True sets rows.lse, the log-sum-exp of the logits (for a z-loss), and returns it.
        The other arguments: as in kdrl_loss.
    Returns: LossOutput; metrics: tokens, gradient_rows, bad_tokens.
    Raises: as kdrl_loss; ValueError or TypeError where loss_fn does not return [C] losses that
        depend on the rows.
    Memory: as kdrl_loss. torch.compile breaks the graph once, at this call, and traces nothing in
        it, since loss_fn is Python; with fullgraph=True that is an error.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if kl is not None and kl not in get_args(Divergence):
        raise ValueError(f"kl must be one of {get_args(Divergence)} or None, got {kl!r}")
    if kl is not None and teacher is None:
        raise ValueError(f"teacher must be a TeacherHead for kl={kl!r}, got None")
    check_flag("lse", lse)
    check_number("jsd_alpha", jsd_alpha)
    if not 0 < jsd_alpha < 1:
        raise ValueError(f"jsd_alpha must be in (0, 1), got {jsd_alpha}")
    call = _loss_call(
        Head(hidden, gathered(weight, hidden), gathered(bias, hidden), temperature, softcap),
        tokens,
        CallerLoss(loss_fn, kl, jsd_alpha, entropy, lse),
        token_weights=token_weights,
        teacher=teacher,
        teacher_logprobs=teacher_logprobs,
        normalizer=normalizer,
        vocab_size=vocab_size,
        entropy=entropy,
        compact=compact,
        truncation=truncation,
        workspace_bytes=workspace_bytes,
        impl=impl,
    )
    sketch = checks.check_sketch(backward, sketch, call.impl, call.student)
    solve = reference.loss if call.impl == "reference" else token_loss.token_loss
    loss, outputs, counts, more = _solve(call, sketch, solve)
    used = None if call.weights is None else call.weights != 0
    rows = call.rows(outputs.map(Tensor.detach), slice(0, len(tokens)))
    return _output(loss, rows, used, more, counts)


Solved = tuple[Tensor, RowOutputs, Tensor]


def _solve(
    call: LossCall, sketch: Sketch | None, solve: Callable[[LossCall], Solved]
) -> tuple[*Solved, dict[str, Tensor]]:
    """Return what solve(call) does, by a sketch where there is one, and metrics of the sketch."""
    if sketch is None or not any(call.needs) or not has_values(call.tokens):
        return *solve(call), {}
    return sketched.loss(call, sketch)


def _loss_call(
    student: Head,
    tokens: Tensor,
    loss: TokenLoss,
    *,
    token_weights: Tensor | None,
    teacher: TeacherHead | None,
    teacher_logprobs: Tensor | None,
    normalizer: float | Tensor | None,
    vocab_size: int | None,
    entropy: bool,
    compact: bool | None,
    truncation: Truncation | None,
    workspace_bytes: int | None,
    impl: str | None,
) -> LossCall:
    """Return the call after every check that reads no value."""
    checks.check_tokens(tokens, student)
    check_bytes("workspace_bytes", workspace_bytes)
    check_flag("entropy", entropy)
    check_flag("compact", compact, optional=True)
    checks.check_teacher(teacher, teacher_logprobs, student)
    impl = checks.choose_impl(impl, student)
    if teacher is not None:
        hidden = teacher.hidden
        weight, bias = gathered(teacher.weight, hidden), gathered(teacher.bias, hidden)
        teacher = replace(teacher, weight=weight, bias=bias)
    if compact is None:
        compact = student.hidden.device.type == "cpu" or token_weights is not None
    call = LossCall(
        student=student,
        tokens=tokens,
        vocab_size=checks.check_vocab_size(vocab_size, student, teacher),
        loss=loss,
        impl=impl,
        needs=needs_gradient(student),
        weights=checks.row_tensor("token_weights", token_weights, student, mask=True),
        normalizer=checks.normalizer_tensor(normalizer, student),
        teacher=teacher,
        teacher_logprobs=checks.row_tensor("teacher_logprobs", teacher_logprobs, student),
        entropy=entropy,
        compact=compact,
        truncation=checks.check_truncation(truncation, student, loss.exact_kd),
    )
    if impl == "reference":
        return call
    geometry = _geometry(student, teacher, loss.exact_kd, impl)
    return replace(call, max_rows=max_rows(geometry, workspace_bytes))


def _geometry(student: Head, teacher: Head | None, kd: str | None, impl: str) -> Geometry:
    (N, H), V = student.hidden.shape, student.weight.shape[0]
    V_t, H_t = (0, 0) if teacher is None else teacher.weight.shape
    return Geometry(N, H, V, H_t, V_t, kd, student.hidden.dtype, student.hidden.device, impl)


def _output(
    loss: Tensor, rows: Rows, used: Tensor | None, metrics: dict[str, Tensor], counts: Tensor
) -> LossOutput:
    names = ("tokens", "gradient_rows", "bad_tokens")
    lq = rows.teacher_logprobs
    return LossOutput(
        loss=loss,
        logprobs=rows.logprobs,
        teacher_logprobs=lq if lq is None or used is None else torch.where(used, lq, 0),
        kl=rows.kl,
        forward_kl=rows.forward_kl,
        entropy=rows.entropy,
        lse=rows.lse,
        metrics=metrics | dict(zip(names, counts.unbind(), strict=True)),
    )
