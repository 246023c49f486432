"""Holds the logits of one chunk of rows, and computes them."""

from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import gemm
from kdrl_kernels import rows as row_work
from kdrl_kernels.call import RowSet, take
from kdrl_kernels.chunks import accumulator, padded
from kdrl_kernels.head import Head
from kdrl_kernels.rows.streams import Stream
from kdrl_kernels.vocab_shard import VocabShard


class Buffers:
    """Holds one logits buffer [rows, vocab_size] per stream, which every chunk uses again."""

    def __init__(
        self,
        head: Head,
        vocab_size: int,
        rows: int,
        streams: int,
        impl: str,
        masses: bool = False,
        shard: VocabShard | None = None,
    ) -> None:
        self.work: Any = row_work.load(impl)
        self.vocab_size = vocab_size
        hidden = head.hidden
        shape = rows, padded(vocab_size)
        dtype = accumulator(hidden.dtype)
        self.streams = [
            hidden.new_empty(shape, dtype=dtype)[:, :vocab_size] for _ in range(streams)
        ]
        self.masses: list[Tensor | None] = [None] * streams
        if masses and self.work.BLOCK:
            shape = rows, padded(vocab_size) // self.work.BLOCK
            self.masses = [hidden.new_empty(shape, dtype=dtype) for _ in range(streams)]
        if shard is not None:
            self.work = shard

    def project(
        self, head: Head, rows: RowSet, stream: int = 0, out: Tensor | None = None
    ) -> Stream:
        """Compute the logits of some rows, in the buffer of a stream or in out."""
        hidden = take(head.hidden, rows)
        logits = self.streams[stream][: len(hidden)] if out is None else out
        gemm.project(hidden, head.weight[: self.vocab_size], logits)
        if head.bias is not None:
            logits += head.bias[: self.vocab_size]
        masses = self.masses[stream]
        return stream_of(head, rows, logits, None if masses is None else masses[: len(hidden)])


def stream_of(head: Head, rows: RowSet, logits: Tensor, masses: Tensor | None = None) -> Stream:
    """Put beside the logits of some rows what turns them into z."""
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = take(temperature, rows)
    return Stream(logits, temperature, head.softcap, masses=masses)


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """View the memory of float32 logits [C, V] as [C, V] of dtype, rows where they were."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]
