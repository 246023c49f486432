"""Makes the call that kdrl_loss and linear_token_loss have in common, and runs it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kdrl_kernels import checks, option_checks, reference, sketched
from kdrl_kernels.adapter import LowRank, check_adapter, with_adapter
from kdrl_kernels.call import LossCall, RowOutputs
from kdrl_kernels.caller_loss import TokenLoss
from kdrl_kernels.chunks import Geometry, free_bytes_of, max_rows, memory_of, warn_of_few_rows
from kdrl_kernels.gradients import sums_need_no_rounding, writes_at_once
from kdrl_kernels.head import Head, StudentHead, TeacherHead, gathered, needs_gradient
from kdrl_kernels.outputs import LossOutput
from kdrl_kernels.plain import check_bytes, check_flag, has_values
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.token_rows import Rows
from kdrl_kernels.topk_checks import check_topk
from kdrl_kernels.truncation import Truncation

Solved = tuple[Tensor, RowOutputs, Tensor]


def solved(
    call: LossCall, sketch: Sketch | None, solve: Callable[[LossCall], Solved]
) -> tuple[*Solved, dict[str, Tensor]]:
    """Return what solve(call) does, by a sketch where there is one, and metrics of the sketch."""
    if sketch is None or not any(call.needs) or not has_values(call.tokens):
        if call.needs[1] and call.impl != "reference":
            warn_of_few_rows(call.max_rows, len(call.tokens), call.tokens.device)
        return *solve(call), {}
    return sketched.loss(call, sketch)


def adapted(head: StudentHead, adapter: LowRank | None, impl: str) -> StudentHead:
    """Return a head with its adapter, if there is one, as an implementation takes it."""
    if adapter is None:
        return head
    return (reference.with_adapter if impl == "reference" else with_adapter)(head, adapter)


def whole(teacher: TeacherHead | None) -> TeacherHead | None:
    """Return a teacher with its head gathered from the ranks that shard it."""
    if teacher is None:
        return None
    hidden = teacher.hidden
    weight, bias = gathered(teacher.weight, hidden), gathered(teacher.bias, hidden)
    return replace(teacher, weight=weight, bias=bias)


def ids_of_rows(
    extra_tokens: Tensor | None,
    rest: bool,
    teacher_topk: tuple[Tensor, Tensor] | None,
    student: StudentHead,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the K ids of each row, and the teacher's log-probabilities if they are its best."""
    if teacher_topk is None:
        return checks.check_extra_tokens(extra_tokens, rest, student), None
    return check_topk(teacher_topk, student)


def loss_call(
    student: StudentHead,
    tokens: Tensor,
    loss: TokenLoss,
    *,
    adapter: LowRank | None,
    token_weights: Tensor | None,
    active_rows: int | None,
    teacher: TeacherHead | None,
    teacher_logprobs: Tensor | None,
    normalizer: float | Tensor | None,
    vocab_size: int | None,
    entropy: bool,
    compact: bool | None,
    truncation: Truncation | None,
    extra_tokens: Tensor | None,
    rest: bool = False,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    workspace_bytes: int | None,
    impl: str | None,
) -> LossCall:
    """Return the call after every check that reads no value."""
    checks.check_tokens(tokens, student)
    check_bytes("workspace_bytes", workspace_bytes)
    check_flag("entropy", entropy)
    check_flag("compact", compact, optional=True)
    option_checks.check_teacher(teacher, teacher_logprobs, student)
    check_adapter(adapter, student)
    impl = checks.choose_impl(impl, student)
    student = adapted(student, adapter, impl)
    teacher = whole(teacher)
    if compact is None:
        compact = student.hidden.device.type == "cpu" or token_weights is not None
    V, V_t = len(student.weight), None if teacher is None else len(teacher.weight)
    ids, topk_logprobs = ids_of_rows(extra_tokens, rest, teacher_topk, student)
    call = LossCall(
        student=student,
        tokens=tokens,
        vocab_size=checks.check_vocab_size(vocab_size, V, V_t),
        loss=loss,
        impl=impl,
        needs=needs_gradient(student),
        weights=checks.row_tensor("token_weights", token_weights, student, mask=True),
        active=checks.check_active_rows(active_rows, token_weights),
        normalizer=checks.normalizer_tensor(normalizer, student),
        teacher=teacher,
        teacher_logprobs=checks.row_tensor("teacher_logprobs", teacher_logprobs, student),
        entropy=entropy,
        compact=compact,
        truncation=option_checks.check_truncation(truncation, student, loss.exact_kd),
        extra_tokens=ids,
        rest=rest,
        teacher_topk=topk_logprobs,
    )
    return call if impl == "reference" else in_chunks(call, workspace_bytes)


def in_chunks(call: LossCall, workspace_bytes: int | None) -> LossCall:
    """Return the call with the rows of its chunks, and how their parts of dW are summed."""
    student, tokens = call.student, call.tokens
    sizes = geometry(student, call.teacher, call.loss.exact_kd, call.impl)
    rows = max_rows(sizes, workspace_bytes, free_bytes=free_bytes_of(tokens.device))
    direct, folded = False, call.needs[1] and sums_need_no_rounding(student)
    if call.needs[1] and not torch.compiler.is_compiling():  # a graph may have no number of tokens
        direct = writes_at_once(student, len(tokens) <= rows)
    return replace(call, max_rows=rows, direct=direct, folded=folded or direct)


def geometry(student: Head, teacher: Head | None, kd: str | None, impl: str) -> Geometry:
    (N, H), V = student.hidden.shape, student.weight.shape[0]
    V_t, H_t = (0, 0) if teacher is None else teacher.weight.shape
    dtype, device = student.hidden.dtype, student.hidden.device
    return Geometry(N, H, V, H_t, V_t, kd, dtype, device, impl, memory_bytes=memory_of(device))


def output(
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
        extra_logprobs=rows.extra_logprobs,
        rest_logprob=rows.rest_logprob,
        teacher_entropy=rows.teacher_entropy,
        metrics=metrics | dict(zip(names, counts.unbind(), strict=True)),
    )
