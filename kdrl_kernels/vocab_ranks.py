"""Runs a call whose weight is spread over the ranks of a group, after the ranks have agreed on it.

What a rank refuses alone, and what differs between ranks where it must not, is told to all before
the first collective of the pass, so that no rank waits for another that has stopped.
"""

import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor

from kdrl_kernels import logprobs, reference, scaling
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.call import LogprobCall, LossCall, RowOutputs
from kdrl_kernels.checks import check_vocab_size
from kdrl_kernels.head import AnyHead, Head, gradient_dtypes
from kdrl_kernels.logprobs import BackwardCall, Scores
from kdrl_kernels.operators import logprobs as operator
from kdrl_kernels.plain import check_number, has_values
from kdrl_kernels.token_loss import token_loss
from kdrl_kernels.vocab_shard import VocabShard, gather

P = ParamSpec("P")
R = TypeVar("R")
OF_A_RANK = {"weight", "bias", "constant", "vocab_size", "max_rows", "cached", "needs"}
OF_A_RANK |= {"folded", "direct"}
"""Fields of a call, its heads and its loss that may differ between ranks."""
OF_A_CALL = {"", "student", "head", "loss"}
"""Fields of a call whose own fields are arguments of the public functions, or of Objective."""
ARGUMENTS = {"weights": "token_weights", "active": "active_rows", "exact_kd": "kl"}
"""Fields of a call whose names are not those of the arguments."""
COLUMNS = (
    *("valid", "N", "active", "options", "rows", "teacher_rows", "vocab_size", "max_rows"),
    "folded",
)
"""What each rank tells the others at the beginning of a call."""
OUTPUTS = ("logprobs", "entropy", "extra_logprobs", "rest_logprob", "topk_tokens")
"""What linear_logprobs returns of each row."""


def takes_vocab_group(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function take the vocab_group over which the rows of weight are sharded.

    The function gets VocabRanks in its place, and no vocab_size, which VocabRanks then hold. Where
    it raises before the ranks have agreed, the others are told.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("vocab_group") is None:
            return function(*args, **kwargs)
        return over_ranks(function, args, kwargs)

    return wrapper


@torch.compiler.disable(reason="the ranks of a vocab_group agree on values")
def over_ranks(function: Callable[..., R], args: tuple[Any, ...], options: dict[str, Any]) -> R:
    """Call a function with VocabRanks in the place of a group."""
    has_size = "vocab_size" in signature(function).parameters
    vocab_size = options.pop("vocab_size", None) if has_size else None
    ranks = VocabRanks(options["vocab_group"], vocab_size)
    try:
        arguments = signature(function).bind_partial(*args, **options).arguments
        _check_arguments(arguments)
        numbers = {"normalizer": arguments.get("normalizer")}
        numbers["adapter.scale"] = getattr(arguments.get("adapter"), "scale", None)
        ranks.numbers = {k: float(x) for k, x in numbers.items() if isinstance(x, int | float)}
        return function(*args, **options | {"vocab_group": ranks})
    except Exception:
        if not ranks.agreed:
            ranks.tell({"valid": 0})
        raise


class VocabRanks:
    """Stands for the ranks that hold the rows of weight, during one call."""

    def __init__(self, group: Any, vocab_size: int | None) -> None:
        if not isinstance(group, ProcessGroup):
            remedy = ": take .get_group()" if isinstance(group, DeviceMesh) else ""
            raise TypeError(
                "vocab_group must be a torch.distributed ProcessGroup or None, got "
                f"{type(group).__name__}{remedy}"
            )
        if group.rank() < 0:
            raise ValueError("vocab_group must hold this rank, got a group of others")
        self.group, self.vocab_size = group, vocab_size
        self.numbers: dict[str, float] = {}
        """Those of the arguments that a call holds as a tensor, or not at all."""
        self.agreed = False

    def loss(self, call: LossCall) -> tuple[Tensor, RowOutputs, Tensor]:
        """Return what token_loss does, of a call whose weight is this rank's."""
        call, shard = self._agree(call, call.student, call.teacher)
        if call.impl != "reference":
            return token_loss(call, shard)
        teacher = None if call.teacher is None else self._whole(call.teacher)
        return reference.loss(replace(call, student=self._whole(call.student), teacher=teacher))

    def logprobs(self, call: LogprobCall) -> RowOutputs:
        """Return the outputs of each row, differentiable once in the head's tensors.

        All ranks must run the backward pass.
        """
        call, shard = self._agree(call, call.head, None)
        head = call.head
        if call.impl == "reference":
            return reference.linear_logprobs(replace(call, head=self._whole(head)))
        values = _Logprobs.apply(head.hidden, head.weight, head.bias, call, shard)
        return RowOutputs(**dict(zip(OUTPUTS, values, strict=True)))

    def _whole(self, head: AnyHead) -> AnyHead:
        """Return a head with the rows of all ranks."""
        sizes = gather(torch.tensor(len(head.weight), device=head.weight.device), self.group)
        weight = _Whole.apply(head.weight, sizes.tolist(), self.group)
        bias = None if head.bias is None else _Whole.apply(head.bias, sizes.tolist(), self.group)
        return replace(head, weight=weight, bias=bias)

    def tell(self, values: dict[str, int]) -> list[dict[str, int]]:
        """Return what each rank tells; 0 stands for what is not told."""
        self.agreed = True
        backends = dist.get_backend_config(self.group)
        told = torch.tensor([values.get(name, 0) for name in COLUMNS])
        if "cpu:" not in backends:  # from pinned memory, so that the host waits for the reply alone
            device = torch.device("cuda", torch.cuda.current_device())
            told = told.pin_memory().to(device, non_blocking=True)
        everyone = gather(told, self.group).tolist()
        return [dict(zip(COLUMNS, row, strict=True)) for row in everyone]

    def _agree(self, call: Any, student: Head, teacher: Head | None) -> tuple[Any, VocabShard]:
        """Return the call with its whole vocabulary and what else is common, and the shard."""
        _refuse(call)
        settings = _settings({"hidden.requires_grad": call.needs[0], "": call} | self.numbers)
        check_number("vocab_size", self.vocab_size, optional=True, whole=True)
        if self.vocab_size is not None and not 0 < self.vocab_size < 2**63:
            raise ValueError(f"vocab_size must be positive and below 2^63, got {self.vocab_size}")
        weights, active = getattr(call, "weights", None), getattr(call, "active", None)
        N = len(student.hidden)
        if active is None:
            active = N if weights is None else int(weights.count_nonzero())
        told = self.tell(
            {
                "valid": 1,
                "N": N,
                "active": active,
                "options": zlib.crc32(repr(settings).encode()),
                "rows": len(student.weight),
                "teacher_rows": 0 if teacher is None else len(teacher.weight),
                "vocab_size": -1 if self.vocab_size is None else self.vocab_size,
                "max_rows": call.max_rows,
                "folded": int(getattr(call, "folded", False)),
            }
        )
        each = {name: [values[name] for values in told] for name in COLUMNS}
        _check_agreement(each)
        if len(set(each["options"])) > 1:
            raise ValueError(_difference(settings, self.group))
        sizes = _columns(each, self.vocab_size)
        shard = VocabShard(self.group, sizes, call.impl, student.hidden.device)
        call = replace(call, max_rows=min(each["max_rows"]))
        if isinstance(call, LossCall):
            folded = all(each["folded"])  # dX adds up what all ranks multiplied, or none
            call = replace(call, folded=folded, direct=call.direct and folded)
            call = replace(call, vocab_size=shard.vocab_size, teacher=_cut(teacher, each, shard))
        return call, shard


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise for a DTensor, and for a backward pass that does not run over ranks."""
    teacher, adapter = arguments.get("teacher"), arguments.get("adapter")
    tensors = {name: arguments.get(name) for name in ("weight", "bias")}
    tensors |= {f"teacher.{name}": getattr(teacher, name, None) for name in ("weight", "bias")}
    tensors |= {f"adapter.{name}": getattr(adapter, name, None) for name in ("A", "B")}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            continue
        part = "to_local(), this rank's rows, and vocab_group=mesh.get_group()"
        if name == "adapter.A":
            part = "full_tensor()"
        elif name.startswith("teacher"):
            part += f", or {name}.full_tensor()"
        raise TypeError(
            f"{name} must be a plain tensor with a vocab_group, got a DTensor: pass {name}.{part}"
        )
    if arguments.get("backward") == "sketch":
        raise ValueError(
            'backward must be "exact" with a vocab_group, got "sketch": it needs the whole weight'
        )


def _refuse(call: LossCall | LogprobCall) -> None:
    """Raise for what is not computed over ranks."""
    if call.truncation is not None and call.impl != "reference":
        raise ValueError(
            f"truncation must be None with a vocab_group, got {call.truncation}: its bounds are "
            "those of the whole vocabulary, which impl='reference' gathers"
        )
    if not has_values(call.tokens):
        raise ValueError("tokens must have values with a vocab_group, got a tensor without")


def _settings(value: Any, name: str = "") -> dict[str, str]:
    """Describe, by name, what must be the same on all ranks: tensors by dtype and shape."""
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.name not in OF_A_RANK]
        value = {field: getattr(value, field) for field in names}
    if isinstance(value, dict):
        outer = "" if name in OF_A_CALL else f"{name}."
        parts = [_settings(part, f"{outer}{field}") for field, part in value.items()]
        return {field: text for part in parts for field, text in part.items()}
    text = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return {ARGUMENTS.get(name, name): "a function" if callable(value) else text}


def _difference(settings: dict[str, str], group: ProcessGroup) -> str:
    """Return the message, the same on all ranks, for settings that are not; all ranks must call."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, settings, group=group)
    names = dict.fromkeys(name for each in everyone for name in each)
    values = {name: [each.get(name, "nothing") for each in everyone] for name in names}
    name = next(name for name in names if len(set(values[name])) > 1)
    return (
        f"{name} must be the same on all ranks of vocab_group, got "
        f"{' and '.join(dict.fromkeys(values[name]))}"
    )


def _check_agreement(each: dict[str, list[int]]) -> None:
    """Raise, on all ranks alike, where a rank has refused its arguments or they differ."""
    refused = [rank for rank, valid in enumerate(each["valid"]) if not valid]
    if refused:
        raise ValueError(
            f"the arguments must be valid on all ranks of vocab_group, got an error on {refused}: "
            "its message says which"
        )
    what = {
        "N": "hidden must have the same number of rows",
        "active": "token_weights must be non-zero in the same number of rows",
        "vocab_size": "vocab_size must be the same",
    }
    for name, message in what.items():
        if len(set(each[name])) > 1:
            raise ValueError(f"{message} on all ranks of vocab_group, got {each[name]}")


def _is_sharded(each: dict[str, list[int]]) -> bool:
    """Say whether the teacher's rows are spread as the student's, but for padding at the end."""
    return each["rows"][:-1] == each["teacher_rows"][:-1]


def _columns(each: dict[str, list[int]], vocab_size: int | None) -> list[int]:
    """Return the columns of each rank: its rows of weight, but for those past vocab_size."""
    rows, teacher_rows = each["rows"], each["teacher_rows"]
    V_t = None
    if any(teacher_rows):
        V_t = sum(teacher_rows) if _is_sharded(each) else teacher_rows[0]
        if not _is_sharded(each) and len(set(teacher_rows)) > 1:
            raise ValueError(
                "teacher.weight must be whole, or have as many rows on each rank of vocab_group "
                f"as weight, {rows}, but for the last, got {teacher_rows}"
            )
    vocab_size = check_vocab_size(vocab_size, sum(rows), V_t)
    starts = [sum(rows[:rank]) for rank in range(len(rows))]
    columns = [min(n, vocab_size - start) for n, start in zip(rows, starts, strict=True)]
    if min(columns) < 1:
        raise ValueError(
            f"vocab_size must leave each rank of vocab_group a column, got {vocab_size} of rows "
            f"{rows}: spread the first {vocab_size} rows evenly"
        )
    return columns


def _cut(teacher: Head | None, each: dict[str, list[int]], shard: VocabShard) -> Head | None:
    """Return the teacher with this rank's columns alone."""
    if teacher is None or _is_sharded(each):
        return teacher
    columns, bias = slice(shard.start, shard.start + shard.columns), teacher.bias
    bias = bias if bias is None else bias[columns]
    return replace(teacher, weight=teacher.weight[columns], bias=bias)


class _Whole(torch.autograd.Function):
    """Puts the rows of all ranks together; back comes the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.rank, ctx.sizes = group.rank(), sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        each = zip(gather(padded, group), sizes, strict=True)
        return torch.cat([part[:size] for part, size in each])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.split(ctx.sizes)[ctx.rank], None, None


class _Logprobs(torch.autograd.Function):
    """Computes log-probabilities and entropies; backward projects this rank's columns again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LogprobCall,
        shard: VocabShard,
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(hidden.device):
            scores = logprobs.score(call, shard=shard)
        values = (getattr(scores, field.name) for field in fields(Scores))
        head = replace(call.head, hidden=hidden, weight=weight, bias=bias)
        operator.save(ctx, operator.LAYOUT.flatten(replace(call, head=head)), tuple(values))
        ctx.shard = shard
        if scores.topk_tokens is not None:
            ctx.mark_non_differentiable(scores.topk_tokens)
        return tuple(getattr(scores, name) for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        (call, scores), others = operator.saved(ctx), grads[:3]
        if grad is None and all(other is None for other in others):
            return (None,) * 5
        grad = torch.zeros_like(scores.logprobs) if grad is None else grad
        if call.topk:
            call = replace(call, extra_tokens=scores.topk_tokens)
        with without_autocast(grad.device):
            backward = BackwardCall(call, scores, grad, *others)
            total, scale = logprobs.gradients(backward, shard=ctx.shard)
            pairs = zip(total.tensors(), gradient_dtypes(call.head), strict=True)
            sums = [
                x if x is None else scaling.scaled_(x, scale, dtype, call.impl)
                for x, dtype in pairs
            ]
        return *sums, None, None
