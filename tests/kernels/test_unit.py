"""The unit of float16 gradients: nothing overflows, little is lost, dW seldom changes its unit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import gradients
from kdrl_kernels.rows import eager
from kdrl_kernels.rows.streams import Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients
from kdrl_kernels.unit import LARGEST, START, first_unit, gradient_bound, next_unit
from tests.kernels.params import KDS
from tests.kernels.problem import make_problem

EXACT_KDS = [None, "rkl", "fkl", "jsd", "rkl+fkl"]
TERMS = ["logprobs", "entropy", "kl", "forward_kl", "lse", "extra", "rest"]
C, V, K = 60, 9, 3


def _cases() -> Iterator[tuple[str | None, str]]:
    for kd in EXACT_KDS:
        for term in TERMS:
            if (kd is not None or term != "kl") and (kd == "rkl+fkl" or term != "forward_kl"):
                yield kd, term


@pytest.mark.parametrize(("kd", "term"), list(_cases()))
def test_the_bound_holds_and_is_near(kd: str | None, term: str) -> None:
    """One term at a time, over rows from flat to sure of one token: at most 32 times too much."""
    rng = torch.Generator().manual_seed(0)
    widths = torch.logspace(-1, 1.5, C)[:, None]
    logits, teacher = (torch.randn(C, V, generator=rng) * widths for _ in range(2))
    temperature = torch.logspace(-1, 1, C)
    tokens, ids = torch.randint(V, (C,), generator=rng), torch.randint(V, (C, K), generator=rng)
    student = Stream(logits, temperature, None)
    q = None if kd is None else TeacherStream(teacher, 1.0, None, kd, 0.3)
    stats = eager.sweep(student, tokens, teacher=q, entropy=True, ids=ids, rest=True)
    both = ["kl", "forward_kl"] if kd == "rkl+fkl" else []  # a pair has both
    values = {name: torch.zeros(C) for name in ["logprobs", *both]}
    values[term] = torch.randn(*((C, K) if term == "extra" else (C,)), generator=rng)
    coef = stats.at_ids.live(Coefficients(**values))
    dz = torch.empty_like(logits)
    eager.gradient(student, tokens, stats, coef, out=dz, teacher=q)
    each = [
        gradient_bound(coef.map(lambda x, i=i: x[i : i + 1]), _row(stats, i), temperature[i])
        for i in range(C)
    ]
    largest = dz.abs().amax(dim=1)
    assert (largest <= torch.stack(each) * (1 + 1e-5)).all()
    assert gradient_bound(coef, stats, temperature) == torch.stack(each).max()
    assert gradient_bound(coef, stats, temperature) <= 32 * largest.max()


def _row(stats: eager.Stats, i: int) -> eager.Stats:
    names = ("max", "log_sum", "logprobs", "entropy", "kl", "forward_kl")
    values = {name: getattr(stats, name) for name in names}
    return eager.Stats(**{k: v if v is None else v[i : i + 1] for k, v in values.items()})


def test_an_infinite_kl_does_not_decide_about_the_others() -> None:
    stats = eager.Stats(*torch.zeros(3, 2), kl=torch.tensor([torch.inf, torch.inf]))
    coef = Coefficients(torch.tensor([3.0, 1.0]), kl=torch.tensor([0.0, 1.0]))
    assert gradient_bound(coef, stats, 1.0) == 3
    assert gradient_bound(Coefficients(torch.zeros(0)), eager.Stats(*torch.zeros(3, 0)), 1.0) == 0


@pytest.mark.parametrize("bound", [1.0, 1.9999, 3e-39, 1e-30, 7e30])
def test_a_unit_is_a_power_of_two_that_uses_the_range_of_float16(bound: float) -> None:
    value = torch.tensor(bound)
    unit = next_unit(first_unit(value), value)
    assert torch.frexp(unit).mantissa == 0.5
    assert value / unit < START
    assert value / unit >= START / 2 or unit == torch.finfo(torch.float32).tiny
    for growth in (1e-3, 1, LARGEST / START / 2):
        assert next_unit(unit, value * growth) == unit
    assert unit < next_unit(unit, torch.tensor(3e38)) < torch.inf


@pytest.mark.parametrize("bound", [torch.nan, torch.inf])
def test_what_is_no_number_gives_no_number(bound: float) -> None:
    unit = next_unit(torch.ones(()), torch.tensor(bound))
    assert unit == torch.inf
    assert next_unit(unit, torch.ones(())) == torch.inf


@pytest.mark.parametrize("kd", KDS)
def test_what_is_far_smaller_than_the_largest_is_kept(kd: str | None) -> None:
    """p of some columns is 1e-8, which float16 would round to 0 beside that of the token."""
    problem = make_problem(6, kd=kd, dtype=torch.float16, bias=False, off_policy=False)
    problem.student["weight"] = problem.student["weight"].float()
    problem.student["bias"] = torch.where(torch.arange(37) < 20, 0, -15.0)
    problem.tokens.clamp_(max=19)
    ours = problem.solve(impl="torch")["dweight"][20:].double()
    exact = problem.map(Tensor.double).solve(impl="reference")["dweight"][20:]
    if kd not in ("fkl", "rkl+fkl"):  # where q is large there
        assert exact.abs().max() < 1e-6
    assert (ours - exact).abs().max() <= 5e-3 * exact.abs().max()


@pytest.mark.parametrize(("growth", "passes"), [(1.0, 0), (4.0, 0), (2.0**-5, 0), (2.0**10, 1)])
def test_dw_changes_its_unit_for_large_growth_alone(
    growth: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks; the second has coefficients that are larger by a factor."""
    ratios = list[float]()

    def counted(gradient: Tensor, ratio: Tensor, _impl: str) -> None:
        ratios.append(float(ratio))
        gradient.mul_(ratio)

    monkeypatch.setattr(gradients, "scale_", counted)
    problem = make_problem(8, kd=None, dtype=torch.float16, bias=False, off_policy=False)
    sizes = torch.ones(8)
    sizes[4:] = growth
    options = {"advantages": sizes, "token_weights": None, "normalizer": 1.0}
    options |= {"objective": kk.Objective(kd=None)}
    budget = kk.chunk_plan(8, 16, 37, dtype=torch.float16, device="cpu").geometry.chunk_bytes(4)
    ours = problem.solve(impl="torch", workspace_bytes=budget, **options)
    exact = problem.map(Tensor.double).solve(
        impl="reference", **options | {"advantages": sizes.double()}
    )
    assert sum(ratio != 1 for ratio in ratios) == passes
    assert len(ratios) == 1
    for name in ("dhidden", "dweight"):
        error = (ours[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 2e-3, name
