"""Cuts the rows of a pass over the head into chunks: how many there is room for.

A chunk of more rows reads and writes the sum of dW fewer times, and fills the last wave of a GPU's
GEMMs better. The rows of a GPU follow from its whole memory, and from shapes: so a run that is
resumed has the chunks that it had, and each number of tokens the same buffer.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kdrl_kernels import rows as row_work
from kdrl_kernels.objective import DIVERGENCES

CPU_BYTES = 1 << 28
"""Default budget a stream on a CPU: GEMMs gain nothing from more rows than this holds."""
GPU_BYTES = 1_250_000_000
"""Default budget a stream on any GPU: 2,048 rows of float32 at V = 152,064."""
FLOOR_ROWS = 2048
"""Default rows on any GPU, however large its vocabulary."""
MOST_ROWS = 8192
"""Default rows on any GPU, however small its vocabulary: beyond, dW's sum costs next to nothing."""
SHARE = 28
"""Beyond GPU_BYTES and FLOOR_ROWS a stream takes at most this part of a GPU's memory."""
MULTIPLE = 128
"""Rows of a GPU's chunks are multiples: no GEMM then has a tile that is half empty."""
WAITING_ROWS = 735
"""Below this an update of a float32 dW, 8 V H bytes, takes longer than its 2 C V H FLOP, at 790
TFLOP/s and 4.3 TB/s."""
DIRECT_ELEMENTS = 1 << 24
"""The fewest elements of a dW that a GEMM writes in 16 bits: 512 tiles of 128 · 256, so that no GPU
splits the sum over rows and adds its parts in 16 bits. A smaller dW costs next to nothing."""
ALIGN_COLUMNS = 64
"""Rows of logits start at multiples of this, so that every load may be 16 bytes wide."""


def padded(V: int) -> int:
    """Return the columns that a row of logits takes in memory."""
    return -(-V // ALIGN_COLUMNS) * ALIGN_COLUMNS


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and gradients: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def needs_no_sum(dtype: torch.dtype, elements: int) -> bool:
    """Say whether the GEMM of a GPU's only chunk may write so many elements of dW in their dtype.

    Not in float16, whose range needs the scale of backward first.
    """
    return dtype == torch.bfloat16 and elements >= DIRECT_ELEMENTS


@dataclass(frozen=True, slots=True)
class Geometry:
    """Holds the sizes of one pass, on which its memory and its arithmetic depend."""

    N: int
    H: int
    V: int
    H_t: int
    """Hidden size of the teacher; 0: no teacher head."""
    V_t: int
    kd: str | None
    """The divergence over both models' logits; a sampled KD or None where there is none."""
    dtype: torch.dtype
    device: torch.device
    impl: str
    rank: int = 0
    """Columns that an adapter adds to hidden states and weight."""
    memory_bytes: int | None = None
    """Memory of the whole device; None: not known."""

    @property
    def streams(self) -> int:
        """Chunks of logits held together: 2 (student and teacher) for exact KD, else 1."""
        return 2 if self.H_t and self.kd in DIVERGENCES else 1

    @property
    def logit_bytes(self) -> int:
        """Bytes of one row of logits of one stream."""
        return padded(min(self.V, self.V_t or self.V)) * accumulator(self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a chunk's row: logits, and hidden states and dX of a row that was gathered."""
        H, wide = self.H + self.rank, accumulator(self.dtype).itemsize
        return self.logit_bytes * self.streams + (H + self.H_t) * self.dtype.itemsize + H * wide

    def writes_at_once(self, chunks: int, trained: int) -> bool:
        """Say whether one chunk's GEMM writes dW, of so many columns, in the dtype of weight."""
        on_gpu = self.device.type == "cuda"
        return chunks == 1 and on_gpu and needs_no_sum(self.dtype, self.V * trained)

    def chunk_bytes(self, rows: int, held: int | None = None) -> int:
        """Return what a chunk of so many rows holds, with the temporaries of its row work.

        held: rows that the buffers of logits have room for; None: as many.
        """
        work = row_work.load(self.impl)
        block = min(rows, work.block_rows(self.V, self.device))
        spare = 0 if held is None else (held - rows) * self.streams
        logits = block * work.BLOCK_BUFFERS + spare
        return rows * self.row_bytes + logits * self.logit_bytes


@torch.compiler.assume_constant_result
def _card_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, whoever uses it; a graph takes it for a constant."""
    return torch.cuda.get_device_properties(device).total_memory


def memory_of(device: torch.device) -> int | None:
    """Return the memory of a whole GPU; None where it is not known, and for a CPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _card_bytes(device)


def max_rows(
    geometry: Geometry, workspace_bytes: int | None, *, free_bytes: int | None = None
) -> int:
    """Return the rows that the budget holds at once, at least 1.

    workspace_bytes: the budget; None: the default of the device, or as many of these rows as half
    of free_bytes, a GPU's free memory, holds.
    Raises: ValueError when the budget does not hold one row.
    """
    if workspace_bytes is not None:
        return _rows_of_budget(geometry, int(workspace_bytes))
    rows = _default_rows(geometry)
    if free_bytes is None or geometry.chunk_bytes(rows) <= free_bytes // 2:
        return rows
    return _rows_of_a_full_card(geometry, rows, free_bytes // 2)


def _rows_of_budget(geometry: Geometry, budget: int) -> int:
    """Return the rows that a budget holds; on a GPU a multiple, where it holds so many."""
    work = row_work.load(geometry.impl)
    block = work.block_rows(geometry.V, geometry.device)
    buffers = work.BLOCK_BUFFERS * geometry.logit_bytes
    rows = (budget - block * buffers) // geometry.row_bytes
    if rows < block:  # then a block is no more than the chunk
        rows = budget // (geometry.row_bytes + buffers)
    if rows < 1:
        raise ValueError(
            f"workspace_bytes must be at least {geometry.row_bytes + buffers} "
            f"(one row at V = {geometry.V}), got {budget}"
        )
    return rows if geometry.device.type == "cpu" else _rounded_down(rows)


def _rounded_down(rows: int) -> int:
    """Return the multiple at or below some rows; rows that are less than one as they are."""
    return rows // MULTIPLE * MULTIPLE or rows


def _default_rows(geometry: Geometry) -> int:
    """Return the default rows of a chunk, the same for every loss on one head.

    So linear_logprobs and kdrl_loss give the same log-probabilities to the bit.
    """
    logits = padded(geometry.V) * accumulator(geometry.dtype).itemsize
    if geometry.device.type == "cpu":
        return max(1, CPU_BYTES // logits)
    rows = min(MOST_ROWS, max(FLOOR_ROWS, _rounded_down(GPU_BYTES // logits)))
    fit = min(MOST_ROWS, (geometry.memory_bytes or 0) // SHARE // logits)
    return max(rows, 1 << fit.bit_length() - 1 if fit else 0)  # a power of two


def free_bytes_of(device: torch.device) -> int | None:
    """Return a GPU's free memory; None where it is not known, as in a graph."""
    known = device.type == "cuda" and torch.cuda.is_available()
    if not known or torch.compiler.is_compiling():
        return None
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _rows_of_a_full_card(geometry: Geometry, rows: int, budget: int) -> int:
    """Return how many rows fit where the default does not, by halves; warn if that is one more cut.

    By halves, so that a little more or less memory seldom makes another number of rows.
    """
    if rows > geometry.N and geometry.chunk_bytes(geometry.N) <= budget:
        return max(1, geometry.N)  # one chunk, as it would have been
    fewer = rows
    while fewer > MULTIPLE and geometry.chunk_bytes(fewer) > budget:
        fewer = _rounded_down(fewer // 2)
    if geometry.chunk_bytes(fewer) > budget:
        fewer = _rows_of_budget(geometry, budget)
    warnings.warn(
        f"half of the GPU's free memory must hold a chunk of {rows} rows of the head's logits, got "
        f"room for {fewer}: a run that is resumed with more room rounds otherwise; set "
        "workspace_bytes, or leave more memory free",
        stacklevel=2,
    )
    return fewer


def warn_of_few_rows(rows: int, N: int, device: torch.device) -> None:
    """Warn where dW's updates wait for a GPU's memory, since a budget cuts N rows too often."""
    if torch.compiler.is_compiling() or device.type == "cpu":
        return
    if rows < min(N, WAITING_ROWS):
        warnings.warn(
            f"a chunk must have at least {WAITING_ROWS} rows, so that sums of the head's gradient "
            f"do not wait for memory, got {rows}: raise workspace_bytes or leave more memory free",
            stacklevel=2,
        )


def balanced(N: int, most: int, device: torch.device) -> int:
    """Return the rows of a chunk where at most `most` fit: the fewest chunks, of equal size.

    On a GPU they are multiples, as far as `most` and N are, so the last may be shorter.
    """
    chunks = max(1, -(-N // most))
    rows = max(1, -(-N // chunks))
    if device.type == "cpu":
        return rows
    return min(-(-rows // MULTIPLE) * MULTIPLE, most, max(1, N))


def held_rows(rows: int, most: int, device: torch.device) -> int:
    """Return the rows that a buffer of logits has room for, if chunks have `rows` and `most` fit.

    On a GPU these are `most` for every N: buffers of many sizes would leave gaps between them that
    nothing fits into.
    """
    return rows if device.type == "cpu" else most


def chunks_of(N: int, size: int) -> Iterator[slice]:
    """Yield N rows in chunks; one empty chunk for no rows."""
    for start in range(0, max(N, 1), size):
        yield slice(start, min(start + size, N))
