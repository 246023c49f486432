"""Cuts a pass over the head into chunks of rows by a byte budget, and tells what it costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from kdrl_kernels import rows as row_work
from kdrl_kernels.head import FLOATS, spare_columns
from kdrl_kernels.objective import DIVERGENCES, Kd, Objective
from kdrl_kernels.plain import check_bytes, check_flag, check_number
from kdrl_kernels.rows.entries import FORWARD

Backward = Literal["exact", "sketch"]
CPU_BYTES = 1 << 28
"""Default budget a stream on a CPU: GEMMs gain nothing from more rows than this holds."""
GPU_BYTES = 1_250_000_000
"""Default budget a stream elsewhere: 2,048 rows of float32 at V = 152,064."""
FLOOR_ROWS = 2048
"""Below about 735 rows an update of a float32 dW waits for memory, not for arithmetic."""


ALIGN_COLUMNS = 64
"""Rows of logits start at multiples of this, so that every load may be 16 bytes wide."""


def padded(V: int) -> int:
    """Return the columns that a row of logits takes in memory."""
    return -(-V // ALIGN_COLUMNS) * ALIGN_COLUMNS


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and gradients: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


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

    def chunk_bytes(self, rows: int) -> int:
        """Return what a chunk of so many rows holds, with the temporaries of its row work."""
        work = row_work.load(self.impl)
        block = min(rows, work.block_rows(self.V, self.device))
        return rows * self.row_bytes + block * work.BLOCK_BUFFERS * self.logit_bytes


def max_rows(geometry: Geometry, workspace_bytes: int | None) -> int:
    """Return the rows that the budget holds at once, at least 1.

    workspace_bytes: the budget; None: as many rows as GPU_BYTES (on a CPU CPU_BYTES) hold of the
    student's logits, at least FLOOR_ROWS on a GPU, and within a quarter of its free memory.
    Raises: ValueError when the budget does not hold one row.
    """
    work = row_work.load(geometry.impl)
    block = work.block_rows(geometry.V, geometry.device)
    buffers = work.BLOCK_BUFFERS * geometry.logit_bytes
    budget = workspace_bytes
    if budget is None:
        rows = _default_rows(geometry)
        budget = _free_budget(geometry)
        if budget is None or rows * geometry.row_bytes + block * buffers <= budget:
            return rows
    rows = (budget - block * buffers) // geometry.row_bytes
    if rows < block:  # then a block is no more than the chunk
        rows = budget // (geometry.row_bytes + buffers)
    if rows < 1:
        raise ValueError(
            f"workspace_bytes must be at least {geometry.row_bytes + buffers} "
            f"(one row at V = {geometry.V}), got {budget}"
        )
    return int(rows)


def balanced(N: int, rows: int) -> int:
    """Return the rows of a chunk where at most `rows` fit: the fewest chunks, of equal size."""
    chunks = max(1, -(-N // rows))
    return max(1, -(-N // chunks))


def chunks_of(N: int, size: int) -> Iterator[slice]:
    """Yield N rows in chunks; one empty chunk for no rows."""
    for start in range(0, max(N, 1), size):
        yield slice(start, min(start + size, N))


def _default_rows(geometry: Geometry) -> int:
    """Return the default rows of a chunk, the same for every loss on one head.

    So linear_logprobs and kdrl_loss give the same log-probabilities to the bit.
    """
    logits = padded(geometry.V) * accumulator(geometry.dtype).itemsize
    if geometry.device.type == "cpu":
        return max(1, CPU_BYTES // logits)
    return max(FLOOR_ROWS, GPU_BYTES // logits)


def _free_budget(geometry: Geometry) -> int | None:
    """Return a quarter of a GPU's free memory, at least one row; None where it is not known."""
    device = geometry.device
    known = device.type == "cuda" and torch.cuda.is_available()
    if not known or torch.compiler.is_compiling():
        return None
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free // 4, geometry.row_bytes)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Tells what a pass over the head holds and computes; print it to read it."""

    geometry: Geometry
    rows: int
    """Rows of one chunk."""
    chunks: int
    workspace_bytes: int
    """Bytes held besides inputs, outputs and gradients: logits, gathered rows, row work."""
    gradient_bytes: int
    """Bytes held until backward: dX and dW in float32, or the entries of a sketch."""
    flop: dict[str, int]
    """FLOP of each GEMM: project, teacher, dX, dW."""
    row_work_bytes: int
    """Bytes that the row kernels read and write."""
    entries: int = 0
    """Entries of the sketch of all rows; 0: the exact gradient."""
    product_bytes: int = 0
    """Bytes that the products of a sketch with W and X read and write."""
    copy_bytes: int = 0
    """Bytes of the wider weight and hidden states of an adapter, held beside the workspace."""

    def gemm_ms(self, tflops: float) -> float:
        """Return the time of all GEMMs at a rate in TFLOP/s."""
        _check_rate("tflops", tflops)
        return sum(self.flop.values()) / tflops / 1e9

    def row_work_ms(self, terabytes_per_s: float) -> float:
        """Return the time of row kernels and a sketch's products at a bandwidth, read + write."""
        _check_rate("terabytes_per_s", terabytes_per_s)
        return (self.row_work_bytes + self.product_bytes) / terabytes_per_s / 1e9

    def predicted_ms(self, tflops: float, terabytes_per_s: float) -> float:
        """Return the time of GEMMs and row kernels at these rates, one after the other."""
        return self.gemm_ms(tflops) + self.row_work_ms(terabytes_per_s)

    def __str__(self) -> str:
        g = self.geometry
        gemms = ", ".join(f"{name} {flop / 1e12:.2f}" for name, flop in self.flop.items() if flop)
        logits = g.streams * self.rows * g.logit_bytes / 1e9
        teacher = f", teacher H {g.H_t:,}, V {g.V_t:,}" if g.H_t else ""
        return "\n".join(
            (
                f"{g.N:,} tokens, H {g.H:,}, V {g.V:,}{teacher}, {str(g.dtype)[6:]}, {g.impl}",
                f"chunks       {self.chunks} of {self.rows:,} rows, {g.streams} logits buffer(s)",
                f"workspace    {self.workspace_bytes / 1e9:.3f} GB, of which logits {logits:.3f}",
                f"gradients    {self.gradient_bytes / 1e9:.3f} GB until backward rounds them",
                f"GEMMs        {sum(self.flop.values()) / 1e12:.2f} TFLOP: {gemms}",
                f"row kernels  {self.row_work_bytes / 1e9:.1f} GB read and written",
                *self._adapter(),
                *self._sketch(),
            )
        )

    def _adapter(self) -> list[str]:
        """Return the line of an adapter, if there is one."""
        if not self.copy_bytes:
            return []
        columns, copies = self.geometry.rank, self.copy_bytes / 1e9
        return [f"adapter      {columns} columns beside those of H, {copies:.3f} GB of copies"]

    def _sketch(self) -> list[str]:
        """Return the line of a sketch, if there is one."""
        if not self.entries:
            return []
        each = self.entries / max(self.geometry.N, 1)
        size = self.product_bytes / 1e9
        return [f"sketch       {each:,.0f} entries a row, {size:.1f} GB read and written"]


def chunk_plan(
    N: int,
    H: int,
    V: int,
    *,
    teacher: tuple[int, int] | None = None,
    kd: Kd | None = None,
    kd_baseline: Literal["kl"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    adapter: int = 0,
    workspace_bytes: int | None = None,
    backward: Backward = "exact",
    row_entries: float = 16.0,
    flat: float = 0.0,
    impl: str | None = None,
) -> ChunkPlan:
    """Plan how kdrl_loss cuts N tokens over a head [V, H], and what it holds and computes.

    Args:
        teacher: (H_t, V_t) of a TeacherHead, or None.
        kd, kd_baseline: as in Objective; "rkl", "fkl", "rkl+fkl", "jsd" and a baseline hold the
            teacher's logits beside the student's. A top-k kd is planned with its tail.
        dtype: dtype of hidden and weight.
        device: "cuda" works without a GPU too; the free memory of a GPU bounds the default.
        hidden_grad, weight_grad: a frozen backbone or head costs no dX or dW.
        adapter: rank of a LowRank, whose B then has the gradient of the weight; 0: none.
        backward: "exact" or "sketch".
        row_entries: entries of a row of the sketch, with the sampled token's, on average:
            metrics["entries"] / N tells yours.
        flat: share of rows too flat to be sketched, in [0, 1]: metrics["flat_rows"] / N.
        workspace_bytes, impl: as in kdrl_loss; impl None: "triton" on "cuda", else "torch".
    Returns: ChunkPlan. plan.predicted_ms(tflops, terabytes_per_s) is the time at rates you know.
    Raises: ValueError for a size below 1 or a budget that does not hold one row; TypeError for
        what is no number.
    """
    _check_sizes(N, H, V, teacher)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    check_bytes("workspace_bytes", workspace_bytes)
    H_t, V_t = teacher or (0, 0)
    for name, value in (("hidden_grad", hidden_grad), ("weight_grad", weight_grad)):
        check_flag(name, value)
    objective = Objective(kd=kd, kd_baseline=kd_baseline)
    exact_kd = objective.exact_kd
    if objective.topk_kd is not None and teacher is not None:
        raise ValueError(
            f"teacher must be None for kd={kd!r}, got {teacher}: it reads K numbers a row"
        )
    if exact_kd is not None and teacher is None:
        raise ValueError(f"teacher must be (H_t, V_t) for kd={kd!r}, got None")
    device = torch.device(device)
    impl = impl or ("triton" if device.type == "cuda" else "torch")
    if impl not in ("triton", "torch"):
        raise ValueError(f"impl must be 'triton', 'torch' or None, got {impl!r}")
    check_number("adapter", adapter, whole=True)
    if adapter < 0:
        raise ValueError(f"adapter must be a rank, at least 0, got {adapter}")
    adapter += spare_columns(adapter)
    geometry = Geometry(N, H, V, H_t, V_t, exact_kd, dtype, device, impl, adapter)
    if backward not in get_args(Backward):
        raise ValueError(f'backward must be "exact" or "sketch", got {backward!r}')
    check_number("row_entries", row_entries)
    check_number("flat", flat)
    if not 0 <= flat <= 1:
        raise ValueError(f"flat must be in [0, 1], got {flat}")
    rows = balanced(N, max_rows(geometry, workspace_bytes))
    wide = accumulator(dtype).itemsize
    H, trained = H + adapter, adapter or H
    hidden_grad = hidden_grad or (weight_grad and adapter > 0)  # that of A goes through dX
    flop = {
        "project": 2 * N * H * V,
        "teacher": 2 * N * H_t * V_t,
        "dX": 2 * N * H * V if hidden_grad else 0,
        "dW": 2 * N * trained * V if weight_grad else 0,
    }
    streams, learns = geometry.streams, hidden_grad or weight_grad
    sweeps = streams * (1 + (kd == "jsd")) + (1 if H_t and streams == 1 else 0)
    sweeps += objective.topk_kd is not None and impl == "triton"  # of the rest, on its own
    gradient = learns * (streams if kd_baseline is None else 1)
    writes = N * V * dtype.itemsize if learns else 0
    outputs = N * H * hidden_grad + V * trained * weight_grad
    held = wide * outputs
    entries, product_bytes = 0, 0
    if backward == "sketch" and learns:
        entries, writes = round(N * row_entries), round(flat * writes)
        flop |= {name: round(flat * flop[name]) for name in ("dX", "dW")}
        held = entries * (4 + wide) + 8 * (N + 1) + (writes if 4 * writes <= wide * H * V else held)
        read = entries * (H * hidden_grad + trained * weight_grad)
        product_bytes = dtype.itemsize * (outputs + read)
        # PyTorch reads a few blocks again; Triton p, and q where its entries count
        gradient = learns * (impl == "triton") * (2 if exact_kd in FORWARD else 1)
    reads = (sweeps + gradient) * N * geometry.logit_bytes
    return ChunkPlan(
        geometry=geometry,
        rows=rows,
        chunks=max(1, -(-N // rows)),
        workspace_bytes=geometry.chunk_bytes(rows),
        gradient_bytes=held,
        flop=flop,
        row_work_bytes=reads + writes,
        entries=entries,
        product_bytes=product_bytes,
        copy_bytes=(N + V) * H * dtype.itemsize if adapter else 0,
    )


def _check_sizes(N: int, H: int, V: int, teacher: Any) -> None:
    if teacher is not None and not (isinstance(teacher, tuple | list) and len(teacher) == 2):
        raise TypeError(f"teacher must be (H_t, V_t) or None, got {teacher!r}")
    least = {"H": (H, 1), "V": (V, 1), "N": (N, 0)}
    for i, size in enumerate(teacher or ()):
        least[f"teacher[{i}]"] = (size, 1)
    for name, (value, lowest) in least.items():
        check_number(name, value, whole=True)
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")


def _check_rate(name: str, value: float) -> None:
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
