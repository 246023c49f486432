"""Chunks stay within the budget and are balanced; the plan tells bytes, FLOP and time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdrl_kernels as kk
from kdrl_kernels.chunks import Geometry, balanced, max_rows

F32, BF16 = torch.float32, torch.bfloat16


@given(
    N=st.integers(0, 5000),
    H=st.integers(1, 5000),
    V=st.integers(1, 200_000),
    kd=st.sampled_from([None, "k2", "rkl"]),
    impl=st.sampled_from(["torch", "triton"]),
    budget_rows=st.integers(10, 4000),
)
def test_budget_holds(N: int, H: int, V: int, kd: str | None, impl: str, budget_rows: int) -> None:
    teacher = (H + 1, V + 5) if kd else None
    budget = budget_rows * (V * 4 + 256 + H * 24)
    plan = kk.chunk_plan(
        N, H, V, teacher=teacher, kd=kd, dtype=F32, device="cpu", impl=impl, workspace_bytes=budget
    )
    assert 1 <= plan.rows <= max(N, 1)
    assert plan.workspace_bytes <= budget
    assert plan.rows * plan.chunks >= N
    assert plan.rows * plan.chunks - max(N, 1) < plan.chunks  # the last is hardly shorter


@given(N=st.integers(0, 10_000), rows=st.integers(1, 5000))
def test_balanced(N: int, rows: int) -> None:
    size = balanced(N, rows, torch.device("cpu"))
    assert 1 <= size <= rows
    assert -(-N // size) == -(-N // rows)  # no chunk too many
    on_gpu = balanced(N, rows, torch.device("cuda"))
    assert size <= on_gpu <= rows
    assert on_gpu % 128 == 0 or on_gpu in (rows, max(N, 1))
    assert -(-N // on_gpu) <= -(-N // rows)


def test_default_is_2048_rows_at_the_reference_shape() -> None:
    for V, kd in ((152_064, None), (152_064, "rkl"), (256_000, None)):
        geometry = Geometry(16_384, 3584, V, 3584, V, kd, BF16, torch.device("xpu"), "triton")
        assert balanced(16_384, max_rows(geometry, None), geometry.device) == 2048


def test_too_small_a_budget_says_what_one_row_needs() -> None:
    with pytest.raises(ValueError, match=r"workspace_bytes must be at least 1245184 \(one row at"):
        kk.chunk_plan(
            8, 3584, 152_064, teacher=(3584, 152_064), kd="rkl", impl="triton",
            workspace_bytes=1_000_000,
        )  # fmt: skip


def test_a_bad_size_is_named() -> None:
    with pytest.raises(ValueError, match="V must be at least 1, got 0"):
        kk.chunk_plan(8, 16, 0)


def test_flop_bytes_and_time_of_the_reference_shape() -> None:
    """1u is 22.6 ms at 790 TFLOP/s, and two streams of float32 are 2.5 GB."""
    plan = kk.chunk_plan(
        16_384, 3584, 152_064, teacher=(3584, 152_064), kd="rkl", workspace_bytes=2_600_000_000
    )
    u = 2 * 16_384 * 3584 * 152_064
    assert plan.flop == {"project": u, "teacher": u, "dX": u, "dW": u}
    assert plan.gemm_ms(790) == pytest.approx(4 * 22.6, rel=0.01)
    assert (plan.rows, plan.chunks) == (2048, 8)
    assert plan.workspace_bytes == 2048 * (2 * 4 * 152_064 + 2 * 2 * 3584 + 4 * 3584)
    assert plan.gradient_bytes == 4 * 3584 * (16_384 + 152_064)
    # sweep 8, gradient 8 + 2 bytes a logit
    assert plan.row_work_bytes == 18 * 16_384 * 152_064
    assert plan.row_work_ms(4.3) == pytest.approx(10.4, rel=0.01)
    assert plan.predicted_ms(790, 4.3) == plan.gemm_ms(790) + plan.row_work_ms(4.3)
    # 8 chunks write dW's sum, 7 read it, and its rounding reads it once more
    assert plan.update_bytes == (16 * 4 + 2) * 3584 * 152_064
    text = str(plan)
    assert "8 of 2,048 rows" in text
    assert "sum of dW    36.0 GB read and written" in text
    assert "project 17.86, teacher 17.86, dX 17.86, dW 17.86" in text


def test_one_chunk_writes_dw_once() -> None:
    """In bfloat16, on a GPU; two chunks write, read and write, then read a sum, and round it."""
    N, H, V = 2048, 1024, 1 << 15
    one, half = kk.chunk_plan(N, H, V), kk.chunk_plan(2 * 8192, H, V)
    assert (one.chunks, one.update_bytes) == (1, 2 * V * H)
    assert one.gradient_bytes == 4 * N * H + 2 * V * H
    assert (half.chunks, half.update_bytes) == (2, (3 * 4 + 4 + 2) * V * H)
    for change in ({"H": 256}, {"dtype": F32}, {"device": "cpu", "workspace_bytes": 10**10}):
        sizes = {"N": N, "H": H, "V": V} | change
        plan = kk.chunk_plan(**sizes)
        b = plan.geometry.dtype.itemsize
        assert plan.chunks == 1
        assert plan.update_bytes == (4 + 4 + b) * V * sizes["H"]
        assert plan.gradient_bytes == 4 * (N + V) * sizes["H"]


def test_what_is_frozen_costs_nothing() -> None:
    frozen = kk.chunk_plan(64, 16, 128, weight_grad=False)
    assert frozen.flop["dW"] == 0
    assert frozen.update_bytes == 0
    assert "sum of dW" not in str(frozen)
    assert frozen.flop["dX"] == frozen.flop["project"]
    assert frozen.gradient_bytes == 4 * 64 * 16
    forward = kk.chunk_plan(64, 16, 128, weight_grad=False, hidden_grad=False)
    assert sum(forward.flop.values()) == forward.flop["project"]
    assert forward.row_work_bytes == 64 * 128 * 4


def test_an_adapter_costs_two_gemms_and_copies_weight_and_hidden_states() -> None:
    N, H, V, r = 64, 16, 128, 8
    plan, plain = kk.chunk_plan(N, H, V, adapter=r), kk.chunk_plan(N, H, V)
    wider = 2 * N * (H + r) * V
    assert plan.flop == {"project": wider, "teacher": 0, "dX": wider, "dW": 2 * N * r * V}
    assert plan.gradient_bytes == 4 * (N * (H + r) + V * r)
    assert plan.copy_bytes == 2 * (N + V) * (H + r)
    assert plan.workspace_bytes - plain.workspace_bytes == N * r * (2 + 4)
    assert plan.row_work_bytes == plain.row_work_bytes
    assert "adapter      8 columns beside those of H, 0.000 GB of copies" in str(plan)
    assert "adapter" not in str(plain)
    assert kk.chunk_plan(N, H, V, adapter=r, hidden_grad=False).flop == plan.flop
    assert kk.chunk_plan(N, H, V, adapter=r - 1) == plan  # as many columns, of zeros
    sketch = kk.chunk_plan(N, H, V, adapter=r, backward="sketch", row_entries=2)
    assert sketch.product_bytes == 2 * (N * (H + r) + V * r + 2 * N * (H + 2 * r))


def test_a_sketch_costs_one_projection_and_the_gemms_of_its_flat_rows() -> None:
    N, H, V = 1000, 64, 5000
    exact, sketch, mixed, all_flat = (
        kk.chunk_plan(N, H, V, **options)
        for options in (
            {},
            {"backward": "sketch", "row_entries": 10},
            {"backward": "sketch", "row_entries": 10, "flat": 0.02},
            {"backward": "sketch", "row_entries": 0, "flat": 1.0},
        )
    )
    u = 2 * N * H * V
    assert sketch.flop == {"project": u, "teacher": 0, "dX": 0, "dW": 0}
    assert mixed.flop == {"project": u, "teacher": 0, "dX": u // 50, "dW": u // 50}
    assert all_flat.flop == exact.flop
    lists = 8 * (N + 1) + 8 * 10 * N  # offsets; an int32 column and a float32 value an entry
    assert sketch.gradient_bytes == lists
    assert mixed.gradient_bytes == lists + 20 * V * 2  # their dz in bfloat16
    assert all_flat.gradient_bytes == exact.gradient_bytes + 8 * (N + 1)


def test_triton_has_room_for_all_entries_of_a_chunk() -> None:
    """Of 16 bytes; at most 1 / threshold and two of a row, or all columns."""
    N, H, V = 1000, 64, 9000

    def room(threshold: float | None, dtype: torch.dtype = BF16, impl: str = "triton") -> float:
        plain = kk.chunk_plan(N, H, V, dtype=dtype, impl=impl)
        plan = kk.chunk_plan(
            N, H, V, backward="sketch", threshold=threshold, dtype=dtype, impl=impl
        )
        return (plan.workspace_bytes - plain.workspace_bytes) / 16 / plan.rows

    assert room(None) == 2002  # 5e-4
    assert room(None, F32) == 4502  # 2 / V
    assert room(1e-4, F32) == V
    assert room(0.1) == 12
    assert room(2**-24) == V
    assert room(None, impl="torch") == 0
    with pytest.raises(ValueError, match=r"threshold must be in \[2\^-24, 1\], got 2"):
        kk.chunk_plan(N, H, V, backward="sketch", threshold=2)


@pytest.mark.parametrize(("dtype", "entries"), [(BF16, 64), (F32, 150)])
def test_without_a_number_a_row_has_the_entries_of_rl(dtype: torch.dtype, entries: int) -> None:
    """As bench/results/predicted-h200 has them for heads of 16 bits, and sketch-cpu for others."""
    plan = kk.chunk_plan(100, 64, 5000, backward="sketch", dtype=dtype)
    assert plan.entries == entries * 100


def test_a_sampled_kd_takes_one_buffer_and_one_more_sweep() -> None:
    exact = kk.chunk_plan(64, 16, 128, teacher=(8, 128), kd="rkl")
    sampled = kk.chunk_plan(64, 16, 128, teacher=(8, 128), kd="k2")
    assert exact.geometry.streams == 2
    assert sampled.geometry.streams == 1
    assert sampled.flop == exact.flop
    assert exact.row_work_bytes - sampled.row_work_bytes == 64 * 128 * 4


def test_a_baseline_takes_two_buffers_of_which_the_gradient_reads_one() -> None:
    exact = kk.chunk_plan(64, 16, 128, teacher=(8, 128), kd="rkl")
    centred = kk.chunk_plan(64, 16, 128, teacher=(8, 128), kd="k2", kd_baseline="kl")
    assert centred.geometry.streams == 2
    assert (centred.flop, centred.workspace_bytes) == (exact.flop, exact.workspace_bytes)
    assert exact.row_work_bytes - centred.row_work_bytes == 64 * 128 * 4


def test_k_tokens_cost_no_gemm_and_their_rest_one_sweep_on_triton() -> None:
    """PyTorch sums the rest in the block that it has just swept."""
    for impl, sweeps in (("triton", 1), ("torch", 0)):
        plain = kk.chunk_plan(64, 16, 128, impl=impl)
        topk = kk.chunk_plan(64, 16, 128, kd="topk_rkl", impl=impl)
        assert (topk.flop, topk.workspace_bytes) == (plain.flop, plain.workspace_bytes)
        assert topk.row_work_bytes - plain.row_work_bytes == sweeps * 64 * 128 * 4


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_every_loss_on_a_head_has_the_same_default_rows(device: str) -> None:
    impl = "torch" if device == "cpu" else "triton"
    rows = {
        max_rows(
            Geometry(9999, 4096, 128_256, H_t, V_t, kd, BF16, torch.device(device), impl), None
        )
        for H_t, V_t, kd in ((0, 0, None), (8192, 128_256, "k2"), (8192, 128_000, "rkl"))
    }
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd": "k4"}, "kd must be one of"),
        ({"adapter": -1}, "adapter must be a rank, at least 0, got -1"),
        ({"kd": "rkl"}, r"teacher must be \(H_t, V_t\) for kd='rkl', got None"),
        ({"kd": "k2", "kd_baseline": "kl"}, r"teacher must be \(H_t, V_t\) for kd='k2'.* got None"),
        ({"teacher": (-1, 5)}, r"teacher\[0\] must be at least 1, got -1"),
        ({"impl": "reference"}, "impl must be 'triton', 'torch' or None, got 'reference'"),
    ],
)
def test_what_cannot_be_planned_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kk.chunk_plan(64, 16, 100, **changes)
