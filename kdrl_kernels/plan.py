"""Tells what a pass over the head holds, computes, reads and writes, before it runs."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from kdrl_kernels.chunks import (
    Geometry,
    accumulator,
    balanced,
    free_bytes_of,
    held_rows,
    max_rows,
    memory_of,
)
from kdrl_kernels.head import FLOATS, spare_columns
from kdrl_kernels.objective import Kd, Objective
from kdrl_kernels.plain import check_bytes, check_flag, check_number
from kdrl_kernels.rows.entries import ENTRY_BYTES, FORWARD, row_room
from kdrl_kernels.sketch import COARSE, FINE, Sketch, default_threshold

Backward = Literal["exact", "sketch"]
ROW_ENTRIES = {FINE: 150.0, COARSE: 64.0}
"""Entries of a row at each default threshold, with the entropies of RL: at 1e-4 122 and with an
exact KL 153 of V = 32,768 (bench/results/sketch-cpu), at 5e-4 46 and 58 there, and 67 and 92 of V =
152,064 (bench/results/predicted-h200)."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Tells what a pass over the head holds and computes; print it to read it."""

    geometry: Geometry
    rows: int
    """Rows of one chunk."""
    held_rows: int
    """Rows that each buffer of logits has room for."""
    chunks: int
    workspace_bytes: int
    """Bytes held besides inputs, outputs and gradients: logits, gathered rows, row work."""
    gradient_bytes: int
    """Bytes held until backward: dX and dW in float32, dW in bfloat16 where one chunk writes it, or
    the entries of a sketch."""
    flop: dict[str, int]
    """FLOP of each GEMM: project, teacher, dX, dW."""
    row_work_bytes: int
    """Bytes that the row kernels read and write."""
    entries: int = 0
    """Entries of the sketch of all rows; 0: the exact gradient."""
    product_bytes: int = 0
    """Bytes that the products of a sketch with W and X read and write."""
    update_bytes: int = 0
    """Bytes that dW's sum over the chunks, and its rounding, read and write beside the GEMMs."""
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
        logits = g.streams * self.held_rows * g.logit_bytes / 1e9
        teacher = f", teacher H {g.H_t:,}, V {g.V_t:,}" if g.H_t else ""
        return "\n".join(
            (
                f"{g.N:,} tokens, H {g.H:,}, V {g.V:,}{teacher}, {str(g.dtype)[6:]}, {g.impl}",
                f"chunks       {self.chunks} of {self.rows:,} rows, {g.streams} logits buffer(s)",
                f"workspace    {self.workspace_bytes / 1e9:.3f} GB, of which logits {logits:.3f}",
                f"gradients    {self.gradient_bytes / 1e9:.3f} GB until backward rounds them",
                f"GEMMs        {sum(self.flop.values()) / 1e12:.2f} TFLOP: {gemms}",
                f"row kernels  {self.row_work_bytes / 1e9:.1f} GB read and written",
                *self._updates(),
                *self._adapter(),
                *self._sketch(),
            )
        )

    def _updates(self) -> list[str]:
        """Return the line of dW's sum, if there is one."""
        if not self.update_bytes:
            return []
        return [
            f"sum of dW    {self.update_bytes / 1e9:.1f} GB read and written, partly beside GEMMs"
        ]

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


def usual_entries(dtype: torch.dtype) -> float:
    """Return how many entries a row of RL has at a dtype's default threshold, for large V."""
    return ROW_ENTRIES[COARSE if dtype.itemsize == 2 else FINE]


def _entries(N: int, row_entries: float | None, dtype: torch.dtype) -> int:
    return round(N * (usual_entries(dtype) if row_entries is None else row_entries))


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
    memory_bytes: int | None = None,
    backward: Backward = "exact",
    row_entries: float | None = None,
    threshold: float | None = None,
    flat: float = 0.0,
    impl: str | None = None,
) -> ChunkPlan:
    """Plan how kdrl_loss cuts N tokens over a head [V, H], and what it holds and computes.

    Args:
        teacher: (H_t, V_t) of a TeacherHead, or None.
        kd, kd_baseline: as in Objective; "rkl", "fkl", "rkl+fkl", "jsd" and a baseline hold the
            teacher's logits beside the student's. A top-k kd is planned with its tail.
        dtype: dtype of hidden and weight.
        device: "cuda" works without a GPU too; where there is one, half of its free memory bounds
            the default.
        memory_bytes: memory of the whole GPU, which decides the default rows: 4,096 at V = 152,064
            with 80 GB, 8,192 with 141. None: that of `device`; 2,048 rows where there is none. If
            it is given, all that the chunk needs counts as free.
        hidden_grad, weight_grad: a frozen backbone or head costs no dX or dW.
        adapter: rank of a LowRank, whose B then has the gradient of the weight; 0: none.
        backward: "exact" or "sketch".
        row_entries: entries of a row of the sketch, with the sampled token's, on average:
            metrics["entries"] / N tells yours. None: those of RL at the dtype's default threshold.
        threshold: Sketch.threshold, on which the room for entries depends that Triton takes while a
            chunk is sketched.
        flat: share of rows too flat to be sketched, in [0, 1]: metrics["flat_rows"] / N.
        workspace_bytes, impl: as in kdrl_loss; impl None: "triton" on "cuda", else "torch".
    Returns: ChunkPlan. plan.predicted_ms(tflops, terabytes_per_s) is the time at rates you know.
    Raises: ValueError for a size below 1 or a budget that does not hold one row; TypeError for
        what is no number.
    """
    _check_sizes(N, H, V, teacher)
    _check_options(dtype, workspace_bytes, memory_bytes, adapter, backward, row_entries, flat)
    Sketch(threshold)  # checks it
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
    adapter += spare_columns(adapter)
    free = free_bytes_of(device) if memory_bytes is None else None
    memory_bytes = memory_of(device) if memory_bytes is None else int(memory_bytes)
    geometry = Geometry(N, H, V, H_t, V_t, exact_kd, dtype, device, impl, adapter, memory_bytes)
    most = max_rows(geometry, workspace_bytes, free_bytes=free)
    rows = balanced(N, most, device)
    chunks, held = max(1, -(-N // rows)), held_rows(rows, most, device)
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
    kept = whole = wide * outputs
    entries, product_bytes, room = 0, 0, 0
    direct = geometry.writes_at_once(chunks, trained) and weight_grad
    # the first chunk writes the sum, each later one reads it too; its last pass rounds or scales it
    last = wide + dtype.itemsize
    each = dtype.itemsize if direct else (2 * chunks - 1) * wide + last
    updates = each * trained * V if weight_grad else 0
    kept -= direct * (wide - dtype.itemsize) * trained * V
    if backward == "sketch" and learns:
        entries, writes = _entries(N, row_entries, dtype), round(flat * writes)
        flop |= {name: round(flat * flop[name]) for name in ("dX", "dW")}
        updates = 0
        kept = (
            entries * (4 + wide) + 8 * (N + 1) + (writes if 4 * writes <= wide * H * V else whole)
        )
        read = entries * (H * hidden_grad + trained * weight_grad)
        product_bytes = dtype.itemsize * (outputs + read)
        room = rows * row_room(V, threshold or default_threshold(dtype, V)) * (impl == "triton")
        # PyTorch reads a few blocks again; Triton p, and q where its entries count
        gradient = learns * (impl == "triton") * (2 if exact_kd in FORWARD else 1)
    reads = (sweeps + gradient) * N * geometry.logit_bytes
    return ChunkPlan(
        geometry=geometry,
        rows=rows,
        held_rows=held,
        chunks=chunks,
        workspace_bytes=geometry.chunk_bytes(rows, held) + room * ENTRY_BYTES,
        gradient_bytes=kept,
        flop=flop,
        row_work_bytes=reads + writes,
        entries=entries,
        product_bytes=product_bytes,
        update_bytes=updates,
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


def _check_options(
    dtype: torch.dtype,
    workspace_bytes: int | None,
    memory_bytes: int | None,
    adapter: int,
    backward: str,
    row_entries: float | None,
    flat: float,
) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    check_bytes("workspace_bytes", workspace_bytes)
    check_bytes("memory_bytes", memory_bytes)
    check_number("adapter", adapter, whole=True)
    if adapter < 0:
        raise ValueError(f"adapter must be a rank, at least 0, got {adapter}")
    if backward not in get_args(Backward):
        raise ValueError(f'backward must be "exact" or "sketch", got {backward!r}')
    check_number("row_entries", row_entries, optional=True)
    check_number("flat", flat)
    if not 0 <= flat <= 1:
        raise ValueError(f"flat must be in [0, 1], got {flat}")


def _check_rate(name: str, value: float) -> None:
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
