"""Checks arguments: each error names the argument, what it must be and what it is."""

import math
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.call import LossCall
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.head import Head, check_device
from kdrl_kernels.plain import check_flag, check_number, has_values, is_read

IMPLS = ("triton", "torch", "reference")


def choose_impl(impl: str | None, head: Head) -> str:
    """Return the named implementation, or raise if it cannot run; the best one for None."""
    device, dtype = head.hidden.device, head.hidden.dtype
    if impl is None:
        usable = device.type == "cuda" and dtype != torch.float64 and _has_triton()
        return "triton" if usable else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS} or None, got {impl!r}")
    if impl == "triton":
        if not _has_triton():
            raise ValueError("impl must be 'torch' or 'reference' where Triton is not installed")
        if device.type != "cuda" and not _interpreting():
            raise ValueError(
                f"impl='triton' must get GPU tensors, got hidden on {device}; "
                "use impl='torch', or TRITON_INTERPRET=1 to debug"
            )
        if dtype == torch.float64:
            raise TypeError("impl='triton' must get float32, float16 or bfloat16, got float64")
    return impl


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401, PLC0415 (optional: not on macOS or Windows)
    except ImportError:
        return False
    return True


def _interpreting() -> bool:
    import triton  # noqa: PLC0415 (optional)

    return bool(triton.knobs.runtime.interpret)


def check_tokens(tokens: Tensor, head: Head, name: str = "tokens") -> None:
    """Raise unless tokens are [N] int64 on the device of hidden; bad_tokens checks their range."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tokens).__name__}")
    check_int64(name, tokens)
    _check_rows(name, tokens, head)


def check_int64(name: str, ids: Tensor) -> None:
    """Raise TypeError unless ids are int64."""
    if ids.dtype != torch.int64:
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        remedy = ": convert them with .long()" if whole else ""
        raise TypeError(f"{name} must be int64, got {ids.dtype}{remedy}")


MOST_IDS = 512
"""K of extra_tokens is at most this."""


def check_extra_tokens(
    ids: Any, rest: Any, head: Head, name: str = "extra_tokens"
) -> Tensor | None:
    """Return extra_tokens, contiguous, after every check but that of their range."""
    check_flag("rest", rest)
    if ids is None:
        if rest:
            raise ValueError(
                "extra_tokens must be [N, K] with rest=True, got None: rest is what is on none of "
                "them"
            )
        return None
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(ids).__name__}")
    check_int64(name, ids)
    N = len(head.hidden)
    if ids.ndim != 2 or len(ids) != N or not 0 < ids.shape[1] <= MOST_IDS:
        raise ValueError(
            f"{name} must be [N, K] with N = {N} and K in [1, {MOST_IDS}], got {list(ids.shape)}"
        )
    check_device(name, ids, "hidden", head.hidden)
    return ids.contiguous()


def check_topk_size(topk: Any, extra_tokens: Any, head: Head) -> int:
    """Return K of linear_logprobs(topk=K), 0 for None."""
    check_number("topk", topk, optional=True, whole=True)
    if topk is None:
        return 0
    most = min(MOST_IDS, len(head.weight))
    if not 1 <= topk <= most:
        raise ValueError(f"topk must be in [1, {most}] or None, got {topk}")
    if extra_tokens is not None:
        raise ValueError(f"extra_tokens must be None with topk={topk}, got both: call twice")
    return int(topk)


def row_tensor(name: str, value: Any, head: Head, *, mask: bool = False) -> Tensor | None:
    """Return value as a detached, contiguous [N] tensor of the accumulation dtype, or None.

    mask: True also takes booleans and integers.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if not value.is_floating_point() and (not mask or value.is_complex()):
        kinds = "floating point, integer or bool" if mask else "floating point"
        remedy = "" if value.is_complex() else ": convert them with .float()"
        raise TypeError(f"{name} must be {kinds}, got {value.dtype}{remedy}")
    _check_rows(name, value, head)
    return value.detach().to(accumulator(head.hidden.dtype)).contiguous()


def _check_rows(name: str, tensor: Tensor, head: Head) -> None:
    N = head.hidden.shape[0]
    if tensor.shape != (N,):
        raise ValueError(f"{name} must be [N] with N = {N}, got {list(tensor.shape)}")
    check_device(name, tensor, "hidden", head.hidden)


def check_vocab_size(vocab_size: int | None, V: int, V_t: int | None) -> int:
    """Return how many columns both models use: vocab_size, or the smaller of V and V_t."""
    shared_size = V if V_t is None else min(V, V_t)
    check_number("vocab_size", vocab_size, optional=True, whole=True)
    if vocab_size is None:
        return shared_size
    if not 0 < vocab_size <= shared_size:
        raise ValueError(f"vocab_size must be in [1, {shared_size}], got {vocab_size}")
    return int(vocab_size)


def bad_tokens(
    tokens: Tensor, vocab_size: int, size_name: str, weights: Tensor | None = None
) -> Tensor:
    """Count the tokens outside [0, vocab_size) in rows of non-zero weight; 0-d.

    Raises: ValueError on a CPU; on a GPU raising would wait for the device.
    """
    bad = (tokens < 0) | (tokens >= vocab_size)
    if weights is not None:
        bad &= weights != 0
    count = bad.sum()
    if is_read(tokens) and count:
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"tokens must be in [0, {size_name}) with {size_name} = {vocab_size}, "
            f"got {int(tokens[row])} in row {row}; give padding a token_weight or mask of 0"
        )
    return count


def bad_ids(
    ids: Tensor | None,
    vocab_size: int,
    size_name: str,
    weights: Tensor | None = None,
    name: str = "extra_tokens",
) -> Tensor | int:
    """Count the extra_tokens [N, K] outside [-1, vocab_size) in rows of non-zero weight, 0-d.

    Raises: as bad_tokens.
    """
    if ids is None:
        return 0
    bad = (ids < -1) | (ids >= vocab_size)
    if weights is not None:
        bad &= weights[:, None] != 0
    count = bad.sum()
    if is_read(ids) and count:
        row, k = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be in [0, {size_name}) with {size_name} = {vocab_size}, or -1 for none, "
            f"got {int(ids[row, k])} in row {row}"
        )
    return count


def poison(values: Tensor, bad: Tensor) -> Tensor:
    """Return values, all of them NaN where a token was out of range."""
    return values * torch.where(bad > 0, torch.nan, 1.0).to(values.dtype)


def check_head_values(head: Head, weights: Tensor | None = None, prefix: str = "") -> None:
    """Raise on a CPU unless the temperatures of all rows of non-zero weight are positive."""
    temperature = head.temperature
    if not isinstance(temperature, Tensor) or not is_read(temperature):
        return
    if weights is not None:
        temperature = temperature[weights != 0]
    if temperature.numel() and not (temperature > 0).all():
        raise ValueError(
            f"{prefix}temperature must be positive, got a minimum of {temperature.min().item()}"
        )


def check_values(call: LossCall) -> Tensor:
    """Make every check that reads a value, none of which waits for a GPU; count bad tokens, 0-d.

    These checks are separate from those of shapes, so that a compiled caller has no branch on a
    value. Raises: ValueError, on a CPU.
    """
    check_head_values(call.student, call.weights)
    if call.teacher is not None:
        check_head_values(call.teacher, call.weights, "teacher.")
    normalizer = call.normalizer
    if normalizer is not None and is_read(normalizer):
        _check_normalizer(float(normalizer))
    weights = call.weights
    if normalizer is None and weights is not None and is_read(weights):
        total = float(weights.sum())
        if total <= 0 and (weights != 0).any():
            raise ValueError(
                f"token_weights must have a positive sum where normalizer is None, got {total}"
            )
    wrong = _wrong_active_rows(call)
    sizes = call.vocab_size, "vocab_size", call.weights
    name = "extra_tokens" if call.teacher_topk is None else "teacher_topk[0]"
    return bad_tokens(call.tokens, *sizes) + bad_ids(call.extra_tokens, *sizes, name) + wrong


def check_active_rows(active_rows: Any, token_weights: Tensor | None) -> int | None:
    """Return the number of rows of non-zero weight, where the caller knows it; None: it does not.

    Raises: ValueError for a number that cannot be right. check_values compares it with the weights.
    """
    check_number("active_rows", active_rows, optional=True, whole=True)
    if active_rows is None:
        return None
    if token_weights is None:
        raise ValueError(f"active_rows must be None without token_weights, got {active_rows}")
    if not 0 <= active_rows <= token_weights.numel():
        N = token_weights.numel()
        raise ValueError(f"active_rows must be in [0, N] with N = {N}, got {active_rows}")
    return int(active_rows)


def _wrong_active_rows(call: LossCall) -> Tensor | int:
    """Return by how much call.active is wrong, 0-d; raise on a CPU where it is."""
    weights = call.weights
    if call.active is None or weights is None:
        return 0
    count = (weights != 0).sum()
    if is_read(weights) and count != call.active:
        raise ValueError(
            f"active_rows must be the number of token_weights that are not 0, {int(count)}, got "
            f"{call.active}"
        )
    return (count - call.active).abs()


def normalizer_tensor(normalizer: Any, head: Head) -> Tensor | None:
    """Return the normalizer as a 0-d tensor on the device of the head, or None."""
    if normalizer is None:
        return None
    hidden, dtype = head.hidden, accumulator(head.hidden.dtype)
    if isinstance(normalizer, Tensor):
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"normalizer must be a real number, got {normalizer.dtype}")
        if normalizer.ndim:
            raise ValueError(f"normalizer must be 0-d, got {list(normalizer.shape)}")
        if normalizer.device == hidden.device:
            return normalizer.detach().to(dtype)
        if not has_values(normalizer):
            raise ValueError(
                f"normalizer must be on the device of hidden ({hidden.device}), "
                f"got one without a value on {normalizer.device}"
            )
    else:
        check_number("normalizer", normalizer, optional=True)
    _check_normalizer(float(normalizer))
    return torch.full((), float(normalizer), dtype=dtype, device=hidden.device)


def _check_normalizer(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"normalizer must be positive and finite, got {value}")
