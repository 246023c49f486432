"""Rows of weight 0 are never projected; rows without a gradient are left out of dX and dW."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import gemm, operators
from kdrl_kernels.rows import blocks as row_work
from tests.kernels.params import F16, F32, F64, IMPLS
from tests.kernels.problem import make_problem
from tests.kernels.token_losses import CASES, call, make_setup, with_leaves

V, H = 37, 16
IMPL_DTYPES = [("torch", F64), ("torch", F32), ("torch", F16), ("triton", F32), ("triton", F16)]
IDS = [f"{impl}-{str(dtype).removeprefix('torch.')}" for impl, dtype in IMPL_DTYPES]
ANY = pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES, ids=IDS)
SHIFTS = {"kept": 0.05, "above": 1.0, "below": -1.0}
"""lp - old of a row: inside the clip range of 0.2, or outside on either side."""


@dataclass(frozen=True, slots=True)
class Row:
    """Holds what decides whether a row has a gradient."""

    ratio: str = "kept"
    advantage: float = 1.0
    kd_weight: float = 1.0
    weight: float = 1.0

    def has_gradient(self, kd: bool) -> bool:
        """Say whether the definition of Objective gives this row a gradient."""
        outside = "above" if self.advantage > 0 else "below"
        policy = self.advantage != 0 and self.ratio != outside
        return self.weight != 0 and (policy or (kd and self.kd_weight != 0))


class Gemms:
    """Counts the rows of every GEMM."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[int]] = {}
        for name in ("project", "grad_hidden", "add_grad_weight"):
            patch.setattr(gemm, name, self._counting(name, getattr(gemm, name)))

    def _counting(self, name: str, fn: Any) -> Any:
        def counted(operand: Tensor, *rest: Tensor, **options: bool) -> None:
            self.rows.setdefault(name, []).append(len(operand))
            fn(operand, *rest, **options)

        return counted

    def total(self, name: str) -> int:
        """Return the rows of all chunks."""
        return sum(self.rows[name])


@dataclass(frozen=True, slots=True)
class Solved:
    """Holds one call with its gradients and its GEMMs."""

    result: kk.LossOutput
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    gemms: Gemms

    @property
    def counts(self) -> tuple[int, int]:
        """The counts of the metrics: (tokens, gradient_rows)."""
        metrics = self.result.metrics
        return int(metrics["tokens"]), int(metrics["gradient_rows"])

    def assert_gemms(self, projections: int = 1) -> None:
        """Assert that the GEMMs have the rows that the metrics count."""
        tokens, gradient_rows = self.counts
        assert self.gemms.total("project") == projections * tokens
        assert self.gemms.total("grad_hidden") == gradient_rows
        assert self.gemms.total("add_grad_weight") == gradient_rows


def _solve(
    rows: list[Row],
    *,
    impl: str = "torch",
    dtype: torch.dtype = F32,
    device: str = "cpu",
    kd: str | None = None,
    chunk: int = 3,
    block: int = 1000,
    **options: Any,
) -> Solved:
    """Run kdrl_loss on rows, `chunk` at a time, the PyTorch row work in blocks of `block`."""
    rng = torch.Generator().manual_seed(len(rows))
    N = len(rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype).to(device)

    def of_rows(name: str) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], device=device).to(dtype)

    hidden, weight = randn(N, H), randn(V, H) * 0.5
    bias = torch.linspace(0, 1, V).to(weight)
    temperature = torch.linspace(0.6, 1.4, N).to(hidden)
    tokens = torch.randint(V, (N,), generator=rng).to(device)
    head = {"bias": bias, "softcap": 5.0, "temperature": temperature}
    lp = kk.linear_logprobs(hidden, weight, tokens, impl="torch", **head).logprobs
    old = lp - torch.tensor([SHIFTS[row.ratio] for row in rows], device=device).to(lp)
    hidden[of_rows("weight") == 0] = torch.nan
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    if kd in ("k2", "rkl", "fkl", "jsd", "rkl+fkl"):
        teacher = kk.TeacherHead(randn(N, H + 3), randn(V, H + 3) * 0.5)
        options |= {"teacher": teacher, "kd_weight": of_rows("kd_weight")}
    sizes = {"teacher": (H + 3, V) if kd else None, "kd": kd, "dtype": dtype, "device": "cpu"}
    plan = kk.chunk_plan(chunk, H, V, impl=impl, **sizes)
    entropy_coef = options.pop("entropy_coef", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CPU_BLOCK_ELEMENTS", "GPU_BLOCK_ELEMENTS"):
            patch.setattr(row_work, name, block * V)
        gemms = Gemms(patch)
        result = kk.kdrl_loss(
            *(hidden, weight, tokens),
            advantages=of_rows("advantage"),
            token_weights=of_rows("weight"),
            old_logprobs=old,
            objective=kk.Objective(kd=kd, kd_coef=0.5, entropy_coef=entropy_coef),
            workspace_bytes=plan.workspace_bytes,
            impl=impl,
            **head,
            **options,
        )
        result.loss.backward()
    return Solved(result, *(x.grad for x in leaves), gemms)


def _assert_close(solved: Tensor, expected: Tensor, bound: float) -> None:
    error = (solved.double() - expected.double()).abs().max()
    assert error <= bound * expected.double().abs().max(), f"{error:.1e}"


def _assert_same_without_compaction(
    rows: list[Row], solved: Solved, dtype: torch.dtype, **options: Any
) -> None:
    """Assert that everything but the count of rows is as with compact=False."""
    full = _solve(rows, dtype=dtype, compact=False, **options)
    assert full.counts == (solved.counts[0], solved.counts[0])
    assert torch.equal(solved.result.loss, full.result.loss)
    assert torch.equal(solved.result.logprobs, full.result.logprobs)
    # sums over columns, then over fewer rows, in another order; a 16-bit result may round off
    bounds = {F64: 1e-12, F32: 1e-6, F16: torch.finfo(F16).eps}
    _assert_close(solved.hidden, full.hidden, bounds[dtype])
    _assert_close(solved.weight, full.weight, bounds[dtype])
    _assert_close(solved.bias, full.bias, bounds[dtype])


def _used(rows: list[Row], kd: str | None) -> list[int]:
    return [n for n, row in enumerate(rows) if row.has_gradient(kd is not None)]


POLICY = [
    Row("above", 1.0),  # clipped
    Row("above", -1.0),
    Row("kept", 0.0),
    Row("kept", 1.5),
    Row("below", -0.5),  # clipped
    Row("below", 0.5),
    Row("kept", -1.0, weight=0.0),
    Row("kept", -1.0, weight=0.3),
    Row("above", 2.0, weight=0.0),
    Row("above", 2.0, weight=2.0),  # clipped
    Row("kept", 1.0),
]
"""Five of the nine rows of weight > 0 have a gradient."""
KD = [
    Row("above", 1.0, kd_weight=0.0),  # clipped
    Row("above", 1.0),
    Row("kept", 0.0, kd_weight=0.0),
    Row("kept", 0.0),
    Row("kept", 0.0, kd_weight=0.0),
    Row("kept", 1.0, kd_weight=0.0),
    Row("kept", 0.0, weight=0.0),
    Row("below", 1.0, kd_weight=0.5),
    Row("kept", 0.0, kd_weight=0.0, weight=3.0),
    Row("below", -1.0, kd_weight=0.2),
]
"""Five of the nine rows of weight > 0 have a gradient."""
TABLES = {None: POLICY, "k2": KD, "rkl": KD, "fkl": KD, "jsd": KD, "rkl+fkl": KD}


CHUNKS = [
    pytest.param(impl, dtype, chunk, id=f"{name}-{chunk}")
    for (impl, dtype), name in zip(IMPL_DTYPES, IDS, strict=True)
    for chunk in ([3, 100] if impl == "torch" else [4])
]


@pytest.mark.parametrize(("impl", "dtype", "chunk"), CHUNKS)
@pytest.mark.parametrize("kd", TABLES)
def test_rows_of_each_gemm(
    kd: str | None, impl: str, dtype: torch.dtype, chunk: int, device: str
) -> None:
    rows, run = TABLES[kd], {"impl": impl, "device": device, "kd": kd, "chunk": chunk}
    solved = _solve(rows, dtype=dtype, **run)
    assert solved.counts == (9, 5)
    solved.assert_gemms(projections=1 if kd is None else 2)
    left = (solved.hidden != 0).any(dim=1).nonzero().squeeze(1).tolist()
    assert left == _used(rows, kd)
    _assert_same_without_compaction(rows, solved, dtype, **run)


@ANY
@pytest.mark.parametrize("kd", [None, "k2", "rkl"])
def test_no_row_has_a_gradient(kd: str | None, impl: str, dtype: torch.dtype, device: str) -> None:
    rows = [Row("kept", 0.0, 0.0), Row("above", 1.0, 0.0), Row(weight=0.0), Row("below", -1, 0.0)]
    solved = _solve(rows, impl=impl, dtype=dtype, device=device, kd=kd, chunk=2)
    assert solved.counts == (3, 0)
    solved.assert_gemms(projections=1 if kd is None else 2)
    for gradient in (solved.hidden, solved.weight, solved.bias):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@ANY
@pytest.mark.parametrize("compact", [True, False, None])
def test_every_row_has_a_gradient(
    compact: bool | None, impl: str, dtype: torch.dtype, device: str
) -> None:
    rows = [Row(advantage=a) for a in (1.0, -2.0, 0.5, 1.5, -1.0)]
    solved = _solve(rows, impl=impl, dtype=dtype, device=device, compact=compact, chunk=2)
    assert solved.counts == (5, 5)
    solved.assert_gemms()
    assert (solved.hidden != 0).any(dim=1).all()


@ANY
def test_an_entropy_bonus_leaves_no_row_out(impl: str, dtype: torch.dtype, device: str) -> None:
    solved = _solve(POLICY, impl=impl, dtype=dtype, device=device, entropy_coef=0.1)
    assert solved.counts == (9, 9)
    solved.assert_gemms()
    kept = (solved.hidden != 0).any(dim=1).nonzero().squeeze(1).tolist()
    assert kept == [n for n, row in enumerate(POLICY) if row.weight]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_loss_of_weight_zero_everywhere(impl: str, device: str) -> None:
    solved = _solve([Row(weight=0.0)] * 4, impl=impl, device=device, normalizer=2.0)
    assert solved.counts == (0, 0)
    assert solved.gemms.total("project") == 0
    assert solved.result.loss == 0
    for gradient in (solved.hidden, solved.weight, solved.bias):
        assert torch.equal(gradient, torch.zeros_like(gradient))


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_without_token_weights_a_cpu_leaves_rows_out(impl: str) -> None:
    """compact=None leaves rows out of a slice, where no rows were gathered before."""
    rows = [Row(row.ratio, row.advantage) for row in POLICY]
    solved = _solve(rows, impl=impl)
    assert solved.counts == (11, len(_used(rows, None)))
    solved.assert_gemms()
    _assert_same_without_compaction(rows, solved, F32, impl=impl)


ROWS = st.builds(
    Row,
    ratio=st.sampled_from(list(SHIFTS)),
    advantage=st.sampled_from([0.0, 1.0, -2.0]),
    kd_weight=st.sampled_from([0.0, 0.0, 1.0]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(
    rows=st.lists(ROWS, min_size=1, max_size=24).filter(lambda rows: any(r.weight for r in rows)),
    kd=st.sampled_from([None, "k2", "rkl", "jsd"]),
    chunk=st.integers(1, 24),
    block=st.sampled_from([2, 3, 1000]),
    dtype=st.sampled_from([F64, F32, F16]),
)
@settings(deadline=None, max_examples=120)
def test_random_rows(
    rows: list[Row], kd: str | None, chunk: int, block: int, dtype: torch.dtype
) -> None:
    run: dict[str, Any] = {"kd": kd, "chunk": chunk, "block": block}
    solved = _solve(rows, dtype=dtype, **run)
    used = _used(rows, kd)
    assert solved.counts == (sum(row.weight != 0 for row in rows), len(used))
    solved.assert_gemms(projections=1 if kd is None else 2)
    unused = [n for n in range(len(rows)) if n not in used]
    assert torch.equal(solved.hidden[unused], torch.zeros_like(solved.hidden[unused]))
    assert not solved.hidden.isnan().any()
    _assert_same_without_compaction(rows, solved, dtype, **run)


@given(
    rows=st.lists(ROWS, min_size=2, max_size=6).filter(lambda rows: any(r.weight for r in rows)),
    kd=st.sampled_from([None, "k2", "rkl"]),
    chunk=st.integers(2, 6),
    dtype=st.sampled_from([F32, F16]),
)
@settings(deadline=None, max_examples=6)
@pytest.mark.slow  # tables of rows are tested on Triton above
def test_random_rows_on_triton(
    rows: list[Row], kd: str | None, chunk: int, dtype: torch.dtype
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run: dict[str, Any] = {"kd": kd, "chunk": chunk, "impl": "triton", "device": device}
    solved = _solve(rows, dtype=dtype, **run)
    assert solved.counts == (sum(row.weight != 0 for row in rows), len(_used(rows, kd)))
    _assert_same_without_compaction(rows, solved, dtype, **run)


@pytest.mark.parametrize(("device", "weighted", "compact"), [
    ("cpu", False, True), ("cpu", True, True), ("meta", False, False), ("meta", True, True),
])  # fmt: skip
def test_a_gpu_leaves_rows_out_where_it_waits_for_the_weights_anyway(
    device: str, weighted: bool, compact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meta device stands for a GPU: every device but a CPU is treated as one."""
    calls, solve = [], operators.kdrl_loss

    def record(call: Any) -> Any:
        calls.append(call)
        return solve(call)

    monkeypatch.setattr(operators, "kdrl_loss", record)
    problem = make_problem(kd=None, device=device)
    options = problem.options | ({} if weighted else {"token_weights": None})
    kk.kdrl_loss(tokens=problem.tokens, **problem.student, **options)
    assert calls[0].compact == compact


@pytest.mark.parametrize("output", ["logprobs", "entropy", "kl", "forward_kl", "lse"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_is_kept_for_any_output_that_its_loss_reads(
    impl: str, output: str, device: str
) -> None:
    setup = with_leaves(make_setup(CASES["rkl_and_fkl"], F32, device))
    read = torch.tensor([1, 2, 8], device=device)

    def loss_fn(rows: kk.Rows) -> Tensor:
        return getattr(rows, output) * torch.isin(rows.index, read)

    result = call(setup, loss_fn, impl=impl, lse=True, compact=True)
    result.loss.backward()
    assert result.metrics["gradient_rows"] == 3
    used = (setup.student["hidden"].grad != 0).any(dim=1).nonzero().squeeze(1)
    assert used.tolist() == [1, 2, 8]
