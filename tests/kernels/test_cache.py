"""linear_logprobs gives the same bits with a cache, and the same results in any memory layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import gemm, logprobs
from kdrl_kernels.chunks import accumulator, padded
from tests.kernels.params import F16, F32, F64, IMPLS
from tests.kernels.problem import make_problem
from tests.tolerance import relative_error

N, H, V = 7, 16, 37
CHUNK = 2
"""Rows of a chunk: 2, 2, 2 and 1."""
IMPL_DTYPES = [("torch", F64), ("torch", F32), ("torch", F16), ("triton", F32), ("triton", F16)]
IDS = [f"{impl}-{str(dtype).removeprefix('torch.')}" for impl, dtype in IMPL_DTYPES]
ANY = pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES, ids=IDS)
BOUNDS = {F64: 1e-12, F32: 2e-6, F16: 2 * torch.finfo(F16).eps}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "temperature_of_each_row": {"temperature": torch.linspace(0.5, 1.5, N)},
    "both": {"temperature": torch.linspace(0.5, 1.5, N), "softcap": 3.0},
}


def _cache_bytes(rows: int, dtype: torch.dtype) -> int:
    return rows * padded(V) * accumulator(dtype).itemsize


def _leaves(dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    problem = make_problem(N, H, V, kd=None, dtype=dtype, device=device)
    return {k: v.requires_grad_() for k, v in problem.student.items()}, problem.tokens


def _score(
    student: dict[str, Tensor], tokens: Tensor, impl: str, rows: int, **options: Any
) -> kk.LogprobOutput:
    """Call linear_logprobs in chunks of CHUNK rows, with a cache for `rows` of them."""
    dtype, device = student["hidden"].dtype, student["hidden"].device
    # by a CPU's plan: a GPU's has a buffer for many more rows, so holds all of these in one chunk
    sizes = {"dtype": dtype, "device": "cpu", "impl": "torch" if impl == "reference" else impl}
    budget = kk.chunk_plan(CHUNK, H, V, **sizes).workspace_bytes
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return kk.linear_logprobs(
        tokens=tokens,
        impl=impl,
        workspace_bytes=budget,
        cache_bytes=_cache_bytes(rows, dtype),
        **student,
        **options,
    )


def _scalar(out: kk.LogprobOutput) -> Tensor:
    """Sum the outputs with different weights."""
    upstream = torch.linspace(-1, 2, 2 * N).view(2, N).to(out.logprobs)
    total = out.logprobs @ upstream[0]
    return total if out.entropy is None else total + out.entropy @ upstream[1]


def _solve(
    impl: str, dtype: torch.dtype, device: str, rows: int, **options: Any
) -> dict[str, Tensor]:
    """Return outputs and gradients."""
    student, tokens = _leaves(dtype, device)
    out = _score(student, tokens, impl, rows, **options)
    _scalar(out).backward()
    results = {"logprobs": out.logprobs.detach()} | {f"d{k}": v.grad for k, v in student.items()}
    return results if out.entropy is None else results | {"entropy": out.entropy.detach()}


class Calls:
    """Records the rows of each projection, and of the cache of each forward pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.projected: list[int] = []
        self.cached: list[int] = []
        project, score = gemm.project, logprobs.score

        def counted(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
            self.projected.append(len(hidden))
            project(hidden, weight, out)

        def watched(*args: Any, **options: Any) -> logprobs.Scores:
            scores = score(*args, **options)
            self.cached.append(len(scores.cache))
            return scores

        monkeypatch.setattr(gemm, "project", counted)
        monkeypatch.setattr(logprobs, "score", watched)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record calls of the library."""
    return Calls(monkeypatch)


CASES = [
    pytest.param(impl, dtype, head, entropy, id=f"{name}-{head}-{'entropy' if entropy else 'lp'}")
    for (impl, dtype), name in zip(IMPL_DTYPES, IDS, strict=True)
    for head in HEADS
    for entropy in (False, True)
    if impl == "torch" or (head in ("plain", "both") and (dtype == F32 or entropy))
]


@pytest.mark.parametrize(("impl", "dtype", "head", "entropy"), CASES)
def test_a_cache_changes_no_bit(
    impl: str, dtype: torch.dtype, head: str, entropy: bool, device: str
) -> None:
    options = {"entropy": entropy, **HEADS[head]}
    expected = _solve(impl, dtype, device, 0, **options)
    assert all(value.isfinite().all() for value in expected.values())
    for rows in (2 * CHUNK, N):
        for name, value in _solve(impl, dtype, device, rows, **options).items():
            assert torch.equal(value, expected[name]), f"{name}, {rows} rows kept"


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("rows", "kept"), [(0, 0), (1, 0), (2, 2), (5, 4), (6, 6), (7, 7), (99, 7)]
)
def test_what_is_kept_is_not_projected_again(
    rows: int, kept: int, impl: str, calls: Calls, device: str
) -> None:
    """A pass costs 4u without a cache, 3u where all is kept (u = 2 N H V).

    Only whole chunks are kept.
    """
    student, tokens = _leaves(F32, device)
    out = _score(student, tokens, impl, rows)
    assert calls.cached == [kept]
    assert sum(calls.projected) == N
    calls.projected.clear()
    _scalar(out).backward()
    assert sum(calls.projected) == N - kept


@pytest.mark.parametrize("rows", [0, 2 * CHUNK, N])
@ANY
def test_backward_twice(impl: str, dtype: torch.dtype, rows: int, device: str) -> None:
    student, tokens = _leaves(dtype, device)
    total = _scalar(_score(student, tokens, impl, rows, entropy=True, **HEADS["both"]))
    first = torch.autograd.grad(total, list(student.values()), retain_graph=True)
    second = torch.autograd.grad(total, list(student.values()), retain_graph=True)
    (2 * total).backward()
    for a, b, (name, tensor) in zip(first, second, student.items(), strict=True):
        assert torch.equal(a, b), name
        bound = torch.finfo(F16).eps if dtype == F16 else 0  # a power of two, but for subnormals
        assert relative_error(tensor.grad, 2 * a) <= bound, name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_autograd_holds(impl: str, device: str) -> None:
    """The cache is the only tensor of V columns besides the weight that autograd saves."""
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    for rows in (0, 2 * CHUNK):
        held.clear()
        student, tokens = _leaves(F32, device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _score(student, tokens, impl, rows)
        assert held.count(V * H) == 1
        beside = max(size for size in held if size != V * H)
        assert beside == (rows * padded(V) or N * H)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_is_kept_without_a_gradient(impl: str, calls: Calls, device: str) -> None:
    student, tokens = _leaves(F32, device)
    with torch.no_grad():
        out = _score(student, tokens, impl, N)
    frozen = _score({k: v.detach() for k, v in student.items()}, tokens, impl, N)
    assert calls.cached == [0, 0]
    assert not out.logprobs.requires_grad
    expected = _score(student, tokens, impl, N)
    assert calls.cached == [0, 0, N]
    assert torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(frozen.logprobs, expected.logprobs)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_gradient_is_enough_for_a_cache(
    impl: str, name: str, calls: Calls, device: str
) -> None:
    student, tokens = _leaves(F32, device)
    expected = _solve(impl, F32, device, 0)[f"d{name}"]
    frozen = {k: v if k == name else v.detach() for k, v in student.items()}
    _scalar(_score(frozen, tokens, impl, N)).backward()
    assert calls.cached[-1] == N
    assert torch.equal(student[name].grad, expected)


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def _columns(x: Tensor) -> Tensor:
    """Return the tensor as a slice of columns; the others are NaN."""
    wide = torch.full((len(x), x.shape[1] + 5), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def _every_third_row(x: Tensor) -> Tensor:
    """Return the tensor as rows of a larger one, with two rows of NaN after each."""
    tall = torch.full((3 * len(x), *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
    tall[::3] = x
    return tall[::3]


def _every_second_column(x: Tensor) -> Tensor:
    """Return the tensor with no dimension of stride 1."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=2)[:, :, 0]


LAYOUTS = [_transposed, _columns, _every_third_row, _every_second_column]
ALL = [
    pytest.param(impl, dtype, layout, id=f"{name}-{layout.__name__.strip('_')}")
    for (impl, dtype), name in zip(
        [*IMPL_DTYPES, ("reference", F32)], [*IDS, "reference-float32"], strict=True
    )
    for layout in (LAYOUTS[:1] if impl == "triton" else LAYOUTS)
]
"""Of Triton one layout: its kernels read logits, whose layout is that of a buffer."""


def _laid_out(tensors: dict[str, Tensor], layout: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Put hidden and weight into another layout, and the bias into every third element."""
    results = {k: (_every_third_row if k == "bias" else layout)(v) for k, v in tensors.items()}
    assert not any(x.is_contiguous() for x in results.values())
    return results


def _assert_same(
    results: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        error = relative_error(value, expected[name])
        assert error <= BOUNDS[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize(("impl", "dtype", "layout"), ALL)
def test_layout_of_linear_logprobs(
    impl: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], device: str
) -> None:
    problem = make_problem(N, H, V, kd=None, dtype=dtype, device=device)
    solved = []
    for student, tokens, row_layout in (
        (problem.student, problem.tokens, lambda x: x),
        (
            _laid_out(problem.student, layout),
            torch.stack([problem.tokens, problem.tokens + 1], 1)[:, 0],
            _every_third_row,
        ),
    ):
        leaves = {k: v.detach().requires_grad_() for k, v in student.items()}
        temperature = row_layout(HEADS["both"]["temperature"].to(device))
        out = _score(
            leaves, tokens, impl, CHUNK, entropy=True, softcap=3.0, temperature=temperature
        )
        _scalar(out).backward()
        results = {"logprobs": out.logprobs.detach(), "entropy": out.entropy.detach()}
        solved.append(results | {f"d{k}": v.grad for k, v in leaves.items()})
    _assert_same(solved[1], solved[0], dtype)


@pytest.mark.parametrize("kd", ["k2", "rkl"])
@pytest.mark.parametrize(("impl", "dtype", "layout"), ALL)
def test_layout_of_kdrl_loss(
    impl: str, dtype: torch.dtype, kd: str, layout: Callable[[Tensor], Tensor], device: str
) -> None:
    """kdrl_loss reads student and teacher in any layout, with rows of weight 0 and without."""
    problem = make_problem(N, H, V, kd=kd, dtype=dtype, device=device)
    sizes = {"teacher": (H + 3, V), "kd": kd, "dtype": dtype, "device": "cpu"}
    budget = kk.chunk_plan(CHUNK, H, V, impl="torch", **sizes).workspace_bytes
    for weights in (None, problem.options["token_weights"] * (torch.arange(N) % 3 > 0).to(device)):
        options = {"token_weights": weights, "workspace_bytes": budget, "impl": impl}
        expected = problem.solve(**options)
        student = _laid_out(problem.student, layout)
        leaves = {k: v.detach().requires_grad_() for k, v in student.items()}
        teacher = kk.TeacherHead(**_laid_out(problem.teacher, layout))
        result = kk.kdrl_loss(
            tokens=problem.tokens, teacher=teacher, **leaves, **{**problem.options, **options}
        )
        result.loss.backward()
        names = [name for name in expected if not name.startswith("d")]
        results = {name: getattr(result, name).detach() for name in names}
        _assert_same(results | {f"d{k}": v.grad for k, v in leaves.items()}, expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cache_of_no_rows(impl: str, device: str) -> None:
    student, tokens = _leaves(F32, device)
    hidden = student["hidden"][:0]
    rest = {"weight": student["weight"], "bias": student["bias"], "impl": impl}
    out = kk.linear_logprobs(hidden, tokens=tokens[:0], cache_bytes=1 << 20, **rest)
    out.logprobs.sum().backward()
    assert torch.equal(student["weight"].grad, torch.zeros_like(student["weight"]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_negative_cache_is_refused(impl: str, device: str) -> None:
    student, tokens = _leaves(F32, device)
    with pytest.raises(ValueError, match="cache_bytes must be at least 0, got -1"):
        kk.linear_logprobs(tokens=tokens, impl=impl, cache_bytes=-1, **student)
