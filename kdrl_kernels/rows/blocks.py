"""Cuts rows into blocks whose logits stay in a CPU's cache."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 1 << 19
"""Logits of one block of rows on a CPU: 2 MB of float32."""
GPU_BLOCK_ELEMENTS = 1 << 23
"""Logits of one block of rows on a GPU: enough to fill it."""
BLOCK_BUFFERS = 6
"""The most temporaries of a block's size that are alive together."""


def block_rows(V: int, device: torch.device) -> int:
    """Return the rows of one block, at least 1."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, elements // V)


def row_blocks(rows: int, logits: Tensor) -> Iterator[slice]:
    step = block_rows(logits.shape[1], logits.device)
    for start in range(0, max(rows, 1), step):  # no rows: one empty block
        yield slice(start, min(start + step, rows))


def column(value: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    return value[rows, None] if isinstance(value, Tensor) else value


def nan_to_0(values: Tensor) -> Tensor:
    """Replace NaN, which is 0 · inf here, by 0 in place."""
    return values.nan_to_num_(nan=0, posinf=math.inf, neginf=-math.inf)
