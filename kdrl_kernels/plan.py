"""How many rows of logits are held at once, from a byte budget."""

import torch

CPU_BYTES = 1 << 28
"""Default budget a stream on a CPU: GEMMs gain nothing from more rows than this holds."""
GPU_BYTES = 1_250_000_000
"""Default budget a stream elsewhere: 2,048 rows of float32 at V = 152,064."""
FLOOR_ROWS = 2048
"""Below about 735 rows an update of a float32 dW waits for memory, not for arithmetic."""


def rows_per_chunk(
    N: int,
    V: int,
    *,
    streams: int,
    dtype: torch.dtype,
    device: torch.device,
    block_rows: int = 0,
    block_buffers: int = 0,
    workspace_bytes: int | None = None,
) -> int:
    """C, the rows of one chunk: what the budget holds, in chunks of equal size, at least 1.

    C rows take C · V · itemsize · streams bytes of logits, and block_buffers temporaries of
    min(C, block_rows) rows beside them.

    Args:
        streams: logits held together: 2 (student and teacher) for exact KD, else 1.
        dtype: of the logits, float32 or float64.
        workspace_bytes: the budget; None: a default for each stream, at least FLOOR_ROWS rows and
            at most a quarter of the free memory on a GPU.
    Raises: ValueError when the budget does not hold one row.
    """
    row_bytes = V * dtype.itemsize
    budget = workspace_bytes
    if budget is None:
        budget = _default_budget(row_bytes * streams, streams, device)
        budget += block_rows * block_buffers * row_bytes
    if budget >= block_rows * (streams + block_buffers) * row_bytes:
        rows = (budget - block_rows * block_buffers * row_bytes) // (streams * row_bytes)
    else:
        rows = budget // ((streams + block_buffers) * row_bytes)
    if rows < 1:
        need = (streams + block_buffers) * row_bytes
        raise ValueError(
            f"workspace_bytes must be at least {need} (one row at V = {V}), got {budget}"
        )
    chunks = -(-N // rows)
    return -(-N // max(1, chunks)) or 1


def _default_budget(row_bytes: int, streams: int, device: torch.device) -> int:
    if device.type == "cpu":
        return max(CPU_BYTES * streams, row_bytes)
    wanted = max(GPU_BYTES * streams, FLOOR_ROWS * row_bytes)
    if device.type != "cuda":
        return wanted
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(min(wanted, free // 4), row_bytes)
