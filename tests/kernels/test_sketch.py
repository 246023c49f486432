"""The sketched backward pass: unbiased by enumeration, bounded, the same wherever rows are cut."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import sketch as sketch_module
from kdrl_kernels.rows import tiles
from kdrl_kernels.sketch import uniform
from tests.kernels.params import F32, F64
from tests.kernels.problem import Problem, make_problem

M = 8192
"""Random numbers that stand for all of [0, 1): the middles of as many intervals."""
V = 70
"""Two blocks of columns, the second with a rest."""


def sketch_of(**options: Any) -> kk.Sketch:
    """Return a Sketch that no row is too flat for."""
    return kk.Sketch(**{"flat": math.inf, **options})


@pytest.fixture
def every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let row n have the n-th random number of M, and thresholds be as they are given."""
    middles = (torch.arange(M, dtype=F64) + 0.5) / M
    monkeypatch.setattr(sketch_module, "uniform", lambda _seed, rows: middles[rows])


def repeated(problem: Problem) -> Problem:
    """Return a problem of M rows, all of them the first row of one."""

    def first(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        tensors = {k: values[k] for k in names if isinstance(values.get(k), Tensor)}
        return values | {k: x[:1].expand(M, *x.shape[1:]) for k, x in tensors.items()}

    per_row = ("advantages", "token_weights", "kd_weight", "old_logprobs", "temperature")
    teacher = problem.teacher and first(problem.teacher, ("hidden",))
    return replace(
        problem,
        student=first(problem.student, ("hidden",)),
        tokens=problem.tokens[:1].expand(M),
        teacher=teacher,
        options=first(problem.options, per_row),
    )


CASES: dict[str, dict[str, Any]] = {
    "policy": {"kd": None},
    "k2": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "entropy": {"objective": {"entropy_coef": 0.3}},
    "rkl": {"kd": "rkl"},
    "fkl": {"kd": "fkl"},
    "jsd": {"kd": "jsd"},
    "mixture": {"kd": "rkl+fkl", "objective": {"fkl_share": 0.3}},
    "other vocabulary": {"kd": "fkl", "V_t": 66},
    "baseline": {"objective": {"kd_baseline": "kl"}},
    "truncation": {"truncation": kk.Truncation(top_k=20)},
    "all": {"kd": "rkl", "softcap": 4.0, "temperature": 1.3, "objective": {"entropy_coef": 0.1}},
}


@pytest.mark.usefixtures("every_number")
@pytest.mark.parametrize("threshold", [0.02, 0.3])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_mean_over_all_random_numbers_is_the_gradient(
    options: dict[str, Any], threshold: float
) -> None:
    problem = repeated(make_problem(1, H=5, V=V, dtype=F64, off_policy=False, **options))
    exact = problem.solve(impl="torch")
    sketch = sketch_of(threshold=threshold, scale=0)
    ours = problem.solve(impl="torch", backward="sketch", sketch=sketch)
    assert torch.equal(ours["loss"], exact["loss"])
    assert not torch.allclose(ours["dhidden"][0], exact["dhidden"][0], rtol=1e-3)
    for name in ("dhidden", "dweight", "dbias"):
        mean, right = ours[name], exact[name]
        if name == "dhidden":
            mean, right = mean.mean(dim=0), right.mean(dim=0)
        # the interval of an entry is right to one number in M, and its value is the threshold
        assert (mean - right).norm() / right.norm() < 30 * threshold / M, name


QUICK = ("policy", "all", "fkl")  # the others take a second each in the interpreter


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(x, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, x in CASES.items()
    ],
)
def test_triton_keeps_the_entries_that_pytorch_keeps(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles, of which the last has a rest."""
    for streams, softcap in itertools.product((1, 2), (False, True)):
        monkeypatch.setitem(tiles.TILES, (tiles.SKETCH, streams, softcap), tiles.Tile(1, 64, 4))
    more = {"V_t": 135} if "V_t" in options else {}
    problem = make_problem(6, H=12, V=140, device=device, **(options | more))
    sketch = {"backward": "sketch", "sketch": sketch_of(threshold=0.02, seed=1)}
    expected = problem.solve(impl="torch", **sketch)
    ours = problem.solve(impl="triton", **sketch)
    for name, value in expected.items():
        scale = value.abs().max()
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * scale.item())


@pytest.mark.usefixtures("every_number")
def test_log_probabilities_and_entropies_have_the_right_mean_for_a_later_loss() -> None:
    problem = repeated(make_problem(1, H=5, V=V, dtype=F64))
    gradients = {}
    for backward in ("exact", "sketch"):
        tensors = [x.clone().requires_grad_() for x in problem.student.values()]
        hidden, weight, bias = tensors
        sketch = sketch_of(threshold=0.1) if backward == "sketch" else None
        options: dict[str, Any] = {"bias": bias, "softcap": 5.0, "temperature": 0.8}
        options |= {"entropy": True, "impl": "torch", "backward": backward, "sketch": sketch}
        output = kk.linear_logprobs(hidden, weight, problem.tokens, **options)
        loss = output.logprobs.exp() + 0.7 * output.entropy**2
        loss.sum().backward()
        gradients[backward] = [x.grad for x in tensors]
    for mean, right in zip(gradients["sketch"], gradients["exact"], strict=True):
        if len(mean) == M:
            mean, right = mean.mean(dim=0), right.mean(dim=0)  # noqa: PLW2901
        assert (mean - right).norm() / right.norm() < 40 / M


@pytest.mark.parametrize("kd", [None, "rkl", "fkl", "jsd", "rkl+fkl"])
def test_below_every_entry_the_sketch_is_the_gradient(
    kd: str | None,
) -> None:
    problem = make_problem(9, V=V, kd=kd, dtype=F64, softcap=6.0)
    exact = problem.solve(impl="torch")
    sketch = sketch_of(threshold=2**-24, scale=0)
    ours = problem.solve(impl="torch", backward="sketch", sketch=sketch)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_both_kls_and_the_log_sum_exp_of_a_callers_loss(
    softcap: float | None,
) -> None:
    problem = make_problem(9, V=V, kd="rkl", dtype=F64, bias=False)
    teacher = kk.TeacherHead(**problem.teacher)
    temperature = torch.linspace(0.6, 1.4, 9, dtype=F64)

    def loss_fn(rows: kk.Rows) -> Tensor:
        distance = 0.3 * rows.kl + 0.5 * rows.forward_kl
        return distance + 1e-2 * rows.lse.square() - 0.2 * rows.entropy - rows.logprobs

    gradients = {}
    for threshold in (None, 2.0**-24, 0.01):
        tensors = [x.clone().requires_grad_() for x in problem.student.values()]
        options: dict[str, Any] = {"kl": "rkl+fkl", "lse": True, "entropy": True}
        options |= {"teacher": teacher, "softcap": softcap, "temperature": temperature}
        if threshold is not None:
            sketch = sketch_of(threshold=threshold, scale=0)
            options |= {"backward": "sketch", "sketch": sketch}
        kk.linear_token_loss(*tensors, problem.tokens, loss_fn, **options).loss.backward()
        gradients[threshold] = torch.cat([x.grad.flatten() for x in tensors])
    torch.testing.assert_close(gradients[2.0**-24], gradients[None], rtol=1e-9, atol=1e-12)
    error = (gradients[0.01] - gradients[None]).norm() / gradients[None].norm()
    assert 1e-4 < error < 0.5


def likely(problem: Problem, **options: Any) -> kk.LossOutput:
    """Return kdrl_loss of a problem, whose gradients are then in problem.student."""
    for tensor in problem.student.values():
        tensor.requires_grad_().grad = None
    tensors = dict(problem.student)
    inputs = tensors.pop("hidden"), tensors.pop("weight"), problem.tokens
    result = kk.kdrl_loss(*inputs, **tensors, **{**problem.options, **options})
    result.loss.backward()
    return result


def test_rows_of_dlogits_sum_to_zero() -> None:
    """So a component that all rows of the head share adds no noise to dX."""
    problem = make_problem(50, V=3000, kd=None, dtype=F64, objective={"entropy_coef": 0.1})
    likely(problem, backward="sketch", sketch=sketch_of())
    assert problem.student["bias"].grad.sum().abs() < 1e-15


def test_the_predicted_noise_is_the_error() -> None:
    problem = make_problem(64, H=96, V=4000, kd=None, bias=False, off_policy=False)
    likely(problem)
    exact = problem.student["hidden"].grad.clone()
    errors, predicted = [], []
    for seed in range(8):
        sketch = sketch_of(threshold=0.02, seed=seed)
        metrics = likely(problem, backward="sketch", sketch=sketch).metrics
        predicted.append(metrics["sketch_noise"].item())
        error = (problem.student["hidden"].grad - exact).norm() / exact.norm()
        errors.append(error.item())
    mean = sum(x**2 for x in errors) ** 0.5
    assert sum(x**2 for x in predicted) ** 0.5 == pytest.approx(mean, rel=0.15)
    assert 0.01 < errors[0] < 0.5


def test_a_row_has_at_most_so_many_entries() -> None:
    N, V, threshold = 20, 5000, 2.0**-6
    problem = make_problem(N, V=V, kd=None, bias=False, off_policy=False)
    problem.student["weight"].zero_()  # uniform rows
    sketch = sketch_of(threshold=threshold, scale=0)
    entries = likely(problem, backward="sketch", sketch=sketch).metrics["entries"].item()
    # systematic: one for each threshold of mass, one less or more, and the sampled token
    assert N / threshold * 0.97 < entries <= N * (1 / threshold + 2)


def test_the_threshold_grows_where_a_row_counts_less_() -> None:
    sketch = sketch_of(threshold=0.01, scale=2.0).of_head(torch.zeros(5, 1), 10)
    c = torch.tensor([2.0, -1.0, 0.5, 8.0, 0.0])
    grid = sketch.grid(slice(0, 5), 100_000, kk.token_rows.Coefficients(c))
    assert grid.thresholds.tolist() == [0.01, 0.02, 0.04, 0.01, float("inf")]


def test_random_numbers_are_those_of_splitmix64() -> None:
    """Worked out in integers of any size, as the reference implementation does."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden, rows = 0x9E3779B97F4A7C15, [0, 1, 7, 10**12, -3]
    for seed in (0, 12345, -1, 2**63):
        state = mix((seed + golden) % 2**64)
        expected = [(mix((state + row * golden) % 2**64) >> 11) / 2**53 for row in rows]
        assert uniform(seed, torch.tensor(rows)).tolist() == expected
    many = uniform(0, torch.arange(10_000))
    assert (many.sort().values - torch.arange(10_000) / 10_000).abs().max() < 0.03


@pytest.mark.parametrize("kd", [None, "rkl", "fkl"])
def test_entries_do_not_depend_on_where_rows_are_cut(kd: str | None) -> None:
    problem = make_problem(40, V=900, kd=kd, dtype=F64, normalizer=3.0)
    sketch = sketch_of(threshold=0.05, seed=7)
    whole = problem.solve(impl="torch", backward="sketch", sketch=sketch)
    chunks = problem.solve(
        impl="torch", backward="sketch", sketch=sketch, workspace_bytes=200_000 * (2 if kd else 1)
    )
    parts = []
    for rows in (torch.arange(23, 40), torch.arange(0, 23)):
        part = take_rows(problem, rows)
        sketch = sketch_of(threshold=0.05, seed=7, rows=rows)
        parts.append(part.solve(impl="torch", backward="sketch", sketch=sketch))
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(chunks[name], whole[name], rtol=1e-12, atol=1e-15)
        summed = parts[0][name] + parts[1][name]
        torch.testing.assert_close(summed, whole[name], rtol=1e-12, atol=1e-15)
    hidden = torch.cat([parts[1]["dhidden"], parts[0]["dhidden"]])
    torch.testing.assert_close(hidden, whole["dhidden"], rtol=1e-12, atol=1e-15)
    other = problem.solve(impl="torch", backward="sketch", sketch=sketch_of(threshold=0.05, seed=8))
    assert not torch.allclose(other["dhidden"], whole["dhidden"], rtol=1e-6)


def take_rows(problem: Problem, rows: Tensor) -> Problem:
    """Return some rows of a problem."""
    N = len(problem.tokens)

    def cut(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return values | {k: values[k][rows] for k in names if isinstance(values.get(k), Tensor)}

    per_row = ("advantages", "token_weights", "kd_weight", "old_logprobs")
    assert all(len(problem.options[name]) == N for name in per_row if name in problem.options)
    return replace(
        problem,
        student=cut(problem.student, ("hidden",)),
        tokens=problem.tokens[rows],
        teacher=problem.teacher and cut(problem.teacher, ("hidden",)),
        options=cut(problem.options, per_row),
    )


def test_the_three_functions_keep_the_same_entries() -> None:
    problem = make_problem(30, V=400, kd=None, dtype=F64, bias=False, off_policy=False)
    A, weights = (problem.options[name] for name in ("advantages", "token_weights"))
    sketch = sketch_of(threshold=0.03, seed=3, scale=0)
    likely(problem, backward="sketch", sketch=sketch)
    expected = [x.grad.clone() for x in problem.student.values()]
    hidden, weight = (x.detach().clone().requires_grad_() for x in problem.student.values())
    options: dict[str, Any] = {"backward": "sketch", "sketch": sketch}

    def loss_fn(rows: kk.Rows) -> Tensor:
        return -A[rows.index] * (rows.logprobs - rows.logprobs.detach()).exp()

    inputs = hidden, weight, problem.tokens
    result = kk.linear_token_loss(*inputs, loss_fn, token_weights=weights, **options)
    ours = torch.autograd.grad(result.loss, [hidden, weight])
    logprobs = kk.linear_logprobs(*inputs, mask=weights, **options).logprobs
    later = -(weights * A * logprobs).sum() / weights.sum()
    again = torch.autograd.grad(later, [hidden, weight], retain_graph=True)
    for first, second, third in zip(expected, ours, again, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(third, first, rtol=1e-10, atol=1e-13)
    twice = torch.autograd.grad(2 * later, [hidden, weight])
    torch.testing.assert_close(twice[1], 2 * again[1])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    problem = make_problem(12, V=300, kd="k2")
    sketch = sketch_of(threshold=0.1)
    expected = problem.solve(backward="sketch", sketch=sketch)
    tensors = {k: v.clone().requires_grad_(k != frozen) for k, v in problem.student.items()}
    teacher = kk.TeacherHead(**problem.teacher)
    options = {**problem.options, "backward": "sketch", "sketch": sketch, "teacher": teacher}
    inputs = tensors["hidden"], tensors["weight"], problem.tokens
    kk.kdrl_loss(*inputs, bias=tensors["bias"], **options).loss.backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name == frozen)
        if name != frozen:
            assert torch.equal(tensor.grad, expected[f"d{name}"])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, F32])
def test_sixteen_bits_are_rounded_once(weight_dtype: torch.dtype) -> None:
    problem = make_problem(40, H=24, V=500, kd=None, bias=False, dtype=torch.bfloat16)
    wide = problem.map(lambda x: x.double())
    options = {"backward": "sketch", "sketch": sketch_of(threshold=0.05)}
    problem.student["weight"] = problem.student["weight"].to(weight_dtype)
    ours, right = problem.solve(**options), wide.solve(**options)
    for name in ("dhidden", "dweight"):
        assert ours[name].dtype == problem.student[name[1:]].dtype
        bound = 2**-8 if ours[name].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours[name].double(), right[name], rtol=bound, atol=1e-6)


def test_a_row_that_is_not_finite_is_not_lost() -> None:
    problem = make_problem(8, V=200, kd=None, off_policy=False)
    problem.student["hidden"][3] = torch.nan
    ours = problem.solve(backward="sketch", sketch=sketch_of())
    assert ours["loss"].isnan()
    assert ours["dhidden"][3].isnan().all()
    assert ours["dhidden"][[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    problem.options["token_weights"][3] = 0
    ours = problem.solve(backward="sketch", sketch=sketch_of())
    assert ours["loss"].isfinite()
    assert ours["dweight"].isfinite().all()
    assert ours["dhidden"][3].eq(0).all()


def test_no_rows_and_no_entries() -> None:
    problem = make_problem(4, V=60, kd=None)
    problem.options["token_weights"].zero_()
    ours = problem.solve(backward="sketch", sketch=sketch_of(), normalizer=1.0)
    assert ours["dhidden"].eq(0).all()
    assert ours["dweight"].eq(0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sketch_of(threshold=0), ValueError, r"threshold must be in \[2\^-24, 1\], got 0"),
        (lambda: sketch_of(threshold="1"), TypeError, "sketch.threshold"),
        (lambda: sketch_of(scale=-1.0), ValueError, "sketch.scale must be finite"),
        (lambda: sketch_of(rows=torch.ones(3)), TypeError, "sketch.rows must be int64"),
        (lambda: solve(backward="dense"), ValueError, 'must be "exact" or "sketch", got'),
        (lambda: solve(sketch=sketch_of()), ValueError, "sketch must be None with backward"),
        (lambda: solve(impl="reference", backward="sketch"), ValueError, "impl='reference'"),
        (
            lambda: solve(backward="sketch", sketch=sketch_of(rows=torch.arange(3))),
            ValueError,
            "sketch.rows must hold 4 numbers on cpu, one a row, got",
        ),
        (lambda: solve(backward="sketch", sketch=0.1), TypeError, r"a Sketch .* pass kk\.Sketch"),
    ],
)
def test_errors_name_the_argument(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def solve(**options: Any) -> dict[str, Tensor]:
    """Solve a small problem."""
    return make_problem(4, kd=None).solve(**options)


def test_a_second_derivative_raises() -> None:
    problem = make_problem(4, kd=None)
    hidden = problem.student["hidden"].requires_grad_()
    inputs = hidden, problem.student["weight"], problem.tokens
    loss = kk.linear_logprobs(*inputs, backward="sketch", sketch=sketch_of()).logprobs.sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
