"""Reads what a teacher's server replies, whoever sends it: each value that is used is checked.

Arrays come in the format of safetensors: the length of a header, the header in JSON, the numbers.
"""

import json
import math
import reprlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kdrl_train.batch import TopkScores
from kdrl_train.exchange import REPLY_BYTES, BadReplyError, member, typed

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
FORBIDDEN = -9998.0
"""A log-probability below this stands for -inf, which vLLM writes as -9999."""
ROUNDING = 1e-3
"""A log-probability above this is wrong: rounding alone stays below it."""
MOST = 2**53
"""No count or token id of a server is as large."""
LENGTHS = 8
"""How many states are looked at; who scales one scales all."""
LENGTH_ROUNDING = 5e-3
"""A state in bfloat16 that was scaled to length 1 is within this of it."""
MOST_MASS = 1.001
"""The most that the probabilities of a place may sum to: rounding of float32 stays far below."""


def most_bytes(shapes: Shapes) -> int:
    """Count the bytes of the longest reply with arrays of these shapes."""
    numbers = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values())
    return REPLY_BYTES + numbers


def read_arrays(data: bytes, shapes: Shapes) -> tuple[dict[str, Tensor], str]:
    """Return the arrays of the first sequence by name, and the fingerprint of a reply.

    Args:
        shapes: dtype and shape of each array that must be there, by name.
    Raises: BadReplyError for other bytes, names, dtypes and shapes.
    """
    length = int.from_bytes(data[:8], "little")
    if length > REPLY_BYTES:
        raise BadReplyError(f"{bytes(data[:40])!r}, no safetensors")
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + length])
    except (SafetensorError, ValueError, KeyError, RecursionError, OverflowError) as error:
        raise BadReplyError(f"{bytes(data[:40])!r}, no safetensors ({error})") from error
    fingerprint: str = member(member(header, "__metadata__", dict), "fingerprint", str)
    if tensors.keys() != {f"0.{name}" for name in shapes}:
        raise BadReplyError(f"arrays {reprlib.repr(sorted(tensors))} in place of {list(shapes)}")
    arrays = {name: tensors[f"0.{name}"] for name in shapes}
    for name, (dtype, shape) in shapes.items():
        array = arrays[name]
        if (array.dtype, array.shape) != (dtype, shape):
            raise BadReplyError(
                f"{name} of {list(array.shape)} {array.dtype} in place of {list(shape)} {dtype}"
            )
    return arrays, fingerprint


def read_states(data: bytes, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Return the hidden states of a reply that holds their numbers alone.

    Raises: BadReplyError for another number of them, ones that are not finite, and states which the
        server has scaled to length 1.
    """
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) != expected:
        raise BadReplyError(f"{len(data):,} bytes in place of {expected:,}, {list(shape)} {dtype}")
    states = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    if not states.isfinite().all():
        raise BadReplyError("states that are not finite")
    first = states[:LENGTHS].float()  # of a whole reply it would be a large copy
    if bool(((first.norm(dim=1) - 1).abs() < LENGTH_ROUNDING).all()):
        raise BadReplyError("states of length 1, as of embeddings: the server has scaled them")
    return states


def topk_problem(topk: TopkScores, columns: int) -> str | None:
    """Say what is wrong with the likeliest tokens of a reply; None: nothing is.

    columns: how many tokens they may be.
    """
    ids, used = topk.ids, topk.ids >= 0
    if not bool(((ids >= -1) & (ids < columns)).all()):
        return f"an id outside of [0, {columns})"
    ordered = ids.sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        return "an id twice at one place"
    mass = topk.logprobs.masked_fill(~used, -torch.inf).exp().sum(dim=1)
    if not bool((mass <= MOST_MASS).all()):  # NaN is wrong too
        worst = mass[~(mass <= MOST_MASS)][0].item()
        return f"probabilities that sum to {worst:.6g} at one place"
    if not bool(used.any(dim=1).all()):
        return "no token at one place"
    return None


def described(version: Any) -> dict[str, Any]:
    """Read the fields of a TeacherInfo in the reply to /version. Raises: BadReplyError."""
    window = member(version, "window", int, type(None))
    typed(version.get("chat_template"), "chat_template", str, dict, type(None))
    weights = version.get("weights")  # servers before 0.1 have no hash of them
    return dict(
        model=member(version, "model", str),
        window=None if window is None else integer(window, "window", 1),
        vocab_size=integer(member(version, "vocab_size", int), "vocab_size", 1),
        dtype=member(version, "dtype", str),
        tokenizer=member(version, "tokenizer", str),
        eos_ids=[integer(token, "eos_ids", 0) for token in member(version, "eos_ids", list)],
        weights=typed(weights, "weights", str, type(None)),
        **_head_numbers(version),
        fingerprint=member(version, "fingerprint", str),
    )


def _head_numbers(version: Any) -> dict[str, Any]:
    """Read what the reply to /version says of the head; servers before 0.6 say nothing."""
    if "hidden_size" not in version:
        return {}
    softcap = member(version, "softcap", float, type(None))
    return {
        "hidden_size": integer(version["hidden_size"], "hidden_size", 1),
        "logit_scale": positive(member(version, "logit_scale", float), "logit_scale"),
        "softcap": None if softcap is None else positive(softcap, "softcap"),
    }


def positive(value: float, name: str) -> float:
    """Return a number of a reply. Raises: BadReplyError unless it is above 0 and finite."""
    if not 0 < value < math.inf:
        raise BadReplyError(f"{name} {value}")
    return value


def integer(value: Any, name: str, least: int) -> int:
    """Return a number of a reply. Raises: BadReplyError unless it is in [least, MOST)."""
    if not least <= typed(value, name, int) < MOST:
        raise BadReplyError(f"{name} {reprlib.repr(value)}")
    return int(value)


def of_completion(entries: Any, ids: list[int], prompt_tokens: int) -> list[dict[str, Any]]:
    """Return what a reply of vLLM holds for each token of a completion. Raises: BadReplyError."""
    if len(typed(entries, "prompt_logprobs", list)) != len(ids):
        raise BadReplyError(f"{len(entries)} prompt_logprobs for {len(ids)} tokens")
    pairs = list(zip(ids, entries, strict=True))[prompt_tokens:]
    return [member(entry, str(token), dict) for token, entry in pairs]


def logprob_problem(values: list[Any], ids: list[int]) -> str | None:
    """Say what is wrong with the log-probabilities of tokens; None: nothing is."""
    if len(values) != len(ids):
        return f"{len(values)} for {len(ids)} tokens"
    for t, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and FORBIDDEN < value < ROUNDING):
            shown = f"{value:g}" if isinstance(value, float) else reprlib.repr(value)
            return f"{shown} for token {t} (id {ids[t]})"
    return None
