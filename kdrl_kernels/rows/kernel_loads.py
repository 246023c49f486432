"""Loads tiles of logits on Triton, and what launchers must know of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.kernel_math import capped
from kdrl_kernels.rows.streams import Stream


@triton.jit
def load_a(row_ptr, v, V, width, softcap):
    """Load a = softcap · tanh(logits / softcap) at columns v; -inf from V on.

    Memory is read up to `width`, a multiple of 16 where rows are padded: 16 bytes at a time.
    """
    a = tl.load(row_ptr + v, mask=v < width, other=0.0)
    if softcap is not None:
        a = capped(a, softcap)
    return tl.where(v < V, a, float("-inf"))


def width_of(V: int, *strides: int) -> int:
    """Return the columns of a row in memory: V rounded up to 16 where rows are padded."""
    padded = -(-V // 16) * 16
    return padded if min(strides) >= padded else V


def temperatures_of(stream: Stream) -> Tensor:
    """Return the temperature of each row, [C] float32."""
    logits, temperature = stream.logits, stream.temperature
    if isinstance(temperature, Tensor):
        return temperature.to(logits.dtype)
    return torch.full((len(logits),), temperature, dtype=logits.dtype, device=logits.device)
