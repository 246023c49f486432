"""Rows too flat to be sketched: their gradient is exact, whatever the random number."""

import math
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_kernels import sketch as sketch_module
from kdrl_kernels.flat_rows import most_kept
from kdrl_kernels.head import Head
from kdrl_kernels.rows import tiles
from tests.kernels.params import F32, F64
from tests.kernels.problem import Problem, make_problem
from tests.kernels.test_sketch import CASES

BF16 = torch.bfloat16
N, H, V = 12, 16, 2000
FLAT = 0.3
"""Rows of more than 30 entries are flat then, on a CPU; a uniform one has 50 at 0.02."""


def mixed(V: int = V, **options: Any) -> Problem:
    """Return a problem whose rows of even number are peaked, the others flat."""
    problem = make_problem(N, H=H, V=V, bias=False, off_policy=False, **options)
    for head in (problem.student, problem.teacher or {"hidden": torch.ones(N, H)}):
        head["hidden"][::2] *= 3
        head["hidden"][1::2] *= 0.05
    return problem


@pytest.mark.parametrize("N", [7, 40], ids=["kept", "added up at once"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_where_all_rows_are_flat_the_gradient_is_exact(options: dict[str, Any], N: int) -> None:
    H = 28  # up to H / 4 rows are kept: some chunks before others are added up, or all
    problem = make_problem(N, H=H, V=150, dtype=F64, **options)
    problem.options["token_weights"][::3] = 0
    chunks = {"impl": "torch", "workspace_bytes": 400_000}
    exact = problem.solve(**chunks)
    ours = problem.solve(**chunks, backward="sketch", sketch=kk.Sketch(flat=0))
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kd", [None, "rkl", "fkl"])
def test_only_flat_rows_are_exact(kd: str | None) -> None:
    problem = mixed(kd=kd)
    exact = problem.solve(impl="torch")
    results = []
    for seed in range(3):
        sketch = kk.Sketch(threshold=0.02, seed=seed, scale=0, flat=FLAT)
        results.append(problem.solve(impl="torch", backward="sketch", sketch=sketch))
    for ours in results:
        difference = (ours["dhidden"] - exact["dhidden"]).norm(dim=1)
        scale = exact["dhidden"].norm(dim=1)
        assert (difference[1::2] < 1e-5 * scale[1::2]).all()
    sampled = [ours["dhidden"][::2] for ours in results]
    assert not torch.equal(sampled[0], sampled[1])


@pytest.mark.parametrize("H", [16, 64], ids=["added up at once", "kept"])
def test_sketched_and_flat_rows_add_up(H: int) -> None:
    """Rows so peaked that their sketch holds all that float64 sees, beside flat ones."""
    problem = make_problem(N, H=H, V=V, kd=None, dtype=F64, off_policy=False)
    problem.student["hidden"][::2] *= 400
    problem.student["hidden"][1::2] *= 0.05
    exact = problem.solve(impl="torch")
    sketch = kk.Sketch(threshold=0.01, scale=0, flat=FLAT)
    ours = problem.solve(impl="torch", backward="sketch", sketch=sketch)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


def test_triton_has_the_same_flat_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of columns, of which the last has a rest: twelve entries are many."""
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(sketch_module.COLUMNS_PER_ENTRY, kind, 16)
    monkeypatch.setitem(tiles.TILES, (tiles.SKETCH, 1, False), tiles.Tile(1, 128, 4))
    problem = mixed(V=200, kd=None, device=device)
    problem.student["hidden"][::2] *= 3
    exact = problem.solve(impl="torch")
    sketch = {"backward": "sketch", "sketch": kk.Sketch(threshold=0.02, scale=0)}
    ours, expected = (problem.solve(impl=impl, **sketch) for impl in ("triton", "torch"))
    for name, value in expected.items():
        scale = value.abs().max()
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * scale.item())
    difference = (ours["dhidden"] - exact["dhidden"]).norm(dim=1) / exact["dhidden"].norm(dim=1)
    assert (difference < 1e-5).sum() < N
    assert (difference[1::2] < 1e-5).all()


@pytest.mark.parametrize("kd", [None, "fkl"])
@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "likely ones first"])
def test_flat_are_rows_of_more_entries_than_the_limit(
    kd: str | None, in_order: bool, device: str
) -> None:
    """On average: Σ min(1, a / t), wherever the likely columns are."""
    threshold, options = 0.02, {"bias": False, "off_policy": False, "device": device}
    problem = make_problem(N, H=H, V=200, kd=kd, **options)
    problem.options["token_weights"] = None
    heads = [problem.student] + ([problem.teacher] if problem.teacher else [])
    p = []
    for head in heads:
        head["hidden"] *= torch.linspace(0.4, 1.5, N, device=device)[:, None]
        if in_order:
            head["hidden"] = head["hidden"].abs()
            head["weight"] = head["weight"].abs().sort(dim=0, descending=True).values
        p.append(torch.softmax((head["hidden"] @ head["weight"].t()).double(), dim=1))
    entries = (torch.stack(p).mean(dim=0) / threshold).clamp(max=1).sum(dim=1).sort().values
    for most in (entries[1::3] + entries[2::3]) / 2:
        columns = sketch_module.COLUMNS_PER_ENTRY[torch.device(device).type]
        sketch = kk.Sketch(threshold=threshold, scale=0, flat=most.item() * columns / 200)
        for impl in ("torch", "triton"):
            options = {**problem.options, "backward": "sketch", "sketch": sketch, "impl": impl}
            teacher = None if problem.teacher is None else kk.TeacherHead(**problem.teacher)
            inputs = problem.student["hidden"].clone().requires_grad_(), problem.student["weight"]
            out = kk.kdrl_loss(*inputs, problem.tokens, teacher=teacher, **options)
            assert out.metrics["flat_rows"] == (entries > most).sum()


def test_the_number_of_flat_rows_is_a_metric_and_no_matter_of_chance() -> None:
    problem = mixed(kd=None)
    tensors = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
    inputs = tensors["hidden"], tensors["weight"], problem.tokens
    for seed in range(4):
        sketch = kk.Sketch(threshold=0.02, seed=seed, scale=0, flat=FLAT)
        out = kk.kdrl_loss(*inputs, **problem.options, backward="sketch", sketch=sketch)
        assert out.metrics["flat_rows"] == N // 2
        assert out.metrics["gradient_rows"] == N
        assert out.metrics["entries"] <= N // 2 * (1 / 0.02 + 2)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"softcap": 40.0}])
def test_the_noise_counts_flat_rows_as_exact(options: dict[str, float]) -> None:
    problem = mixed(kd=None, **options)
    variance, square = {}, {}
    for flat in (FLAT, math.inf):
        tensors = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
        inputs = tensors["hidden"], tensors["weight"], problem.tokens
        sketch = kk.Sketch(threshold=0.02, scale=0, flat=flat)
        sketched = {**problem.options, "backward": "sketch", "sketch": sketch}
        metrics = kk.kdrl_loss(*inputs, **sketched).metrics
        variance[flat] = metrics["sketch_variance_sum"].item()
        square[flat] = metrics["sketch_square_sum"].item()
    assert square[FLAT] == pytest.approx(square[math.inf], rel=0.2)  # two estimates of sum dz²
    assert 0 < variance[FLAT] < 0.5 * variance[math.inf]


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_log_probabilities_and_entropies_for_a_later_loss(dtype: torch.dtype) -> None:
    problem = mixed(kd=None, dtype=dtype)
    temperature = torch.linspace(0.7, 1.3, N, dtype=dtype)
    mask = torch.arange(N) != 3
    gradients = {}
    for backward in ("exact", "sketch"):
        leaves = [x.clone().requires_grad_() for x in problem.student.values()]
        sketch = kk.Sketch(threshold=2**-24) if backward == "sketch" else None
        out = kk.linear_logprobs(
            *leaves,
            problem.tokens,
            mask=mask,
            temperature=temperature,
            entropy=True,
            workspace_bytes=500_000,
            backward=backward,
            sketch=sketch,
        )
        (out.logprobs.square().sum() + 0.3 * out.entropy.sum()).backward()
        gradients[backward] = [x.grad for x in leaves]
    bound = 2**-7 if dtype == BF16 else 1e-5 if dtype == F32 else 1e-9
    for ours, exact in zip(gradients["sketch"], gradients["exact"], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact, rtol=bound, atol=bound * exact.abs().max().item())


@pytest.mark.parametrize("weight_dtype", [BF16, F32])
@pytest.mark.parametrize("flat", [0, 0.5])
def test_sixteen_bits_are_rounded_once(weight_dtype: torch.dtype, flat: float) -> None:
    problem = mixed(kd=None, dtype=BF16)
    wide = problem.map(lambda x: x.double())
    problem.student["weight"] = problem.student["weight"].to(weight_dtype)
    options = {"backward": "sketch", "sketch": kk.Sketch(threshold=2**-24, flat=flat)}
    ours, right = problem.solve(**options), wide.solve()
    for name in ("dhidden", "dweight"):
        assert ours[name].dtype == problem.student[name[1:]].dtype
        bound = 0.01 * right[name].abs().max().item()  # dz has 8 bits, as in the exact gradient
        torch.testing.assert_close(ours[name].double(), right[name], rtol=2**-7, atol=bound)


def test_float16_rows_are_all_sketched() -> None:
    problem = mixed(kd=None, dtype=torch.float16)
    tensors = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
    inputs = tensors["hidden"], tensors["weight"], problem.tokens
    sketch = kk.Sketch(threshold=0.02, flat=0)
    out = kk.kdrl_loss(*inputs, **problem.options, backward="sketch", sketch=sketch)
    assert out.metrics["flat_rows"] == 0


def test_backward_twice_gives_the_same() -> None:
    for rows in (4, 5):  # kept, and added up at once
        problem = make_problem(rows, H=H, V=100, kd=None, bias=False)
        leaves = [x.clone().requires_grad_() for x in problem.student.values()]
        loss = kk.kdrl_loss(
            *leaves, problem.tokens, **problem.options, backward="sketch", sketch=kk.Sketch(flat=0)
        ).loss
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(3 * loss, leaves)
        for once, again in zip(first, second, strict=True):
            torch.testing.assert_close(3 * once, again)


def test_what_is_kept_takes_no_more_than_a_quarter_of_the_gradient_of_the_head() -> None:
    for dtype, rows in ((F32, H // 4), (BF16, H // 2), (F64, H // 4)):
        weight = torch.zeros(V, H, dtype=dtype)
        assert most_kept(Head(torch.zeros(1, H, dtype=dtype), weight)) == rows * V


@pytest.mark.parametrize(
    ("dtype", "V", "threshold"),
    [
        (BF16, 10**5, 5e-4),
        (F32, 10**5, 1e-4),
        (F64, 10**5, 1e-4),
        (F32, 8192, 2**-12),
        (BF16, 2, 1),
    ],
)
def test_the_default_threshold_is_coarser_for_operands_that_are(
    dtype: torch.dtype, V: int, threshold: float
) -> None:
    """And in a small vocabulary."""
    hidden = torch.zeros(2, 3, dtype=dtype)
    assert kk.Sketch().of_head(hidden, V).threshold == threshold
    assert kk.Sketch(0.25).of_head(hidden, V).threshold == 0.25


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sketch.flat must not be negative, got -0.1"):
        kk.Sketch(flat=-0.1)
