"""A sketch with K ids of each row: its mean is the gradient, and the ids are exact entries."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.rows import tiles
from kdrl_kernels.rows.ids import IdStats
from kdrl_kernels.sketch import COLUMNS_PER_ENTRY, LEAST
from kdrl_kernels.token_rows import Coefficients
from tests.kernels.params import F32, F64
from tests.kernels.problem import Problem, make_problem
from tests.kernels.test_sketch import (
    M,
    every_number,  # noqa: F401 (a fixture)
    repeated,
    sketch_of,
)

V = 70
IDS = [3, 66, 3, -1, 10]
"""One of them twice, and one is the token."""
SIX_ENTRIES = 6 * COLUMNS_PER_ENTRY["cpu"] / V
"""Sketch.flat where rows of more than six entries are flat."""


def _loss(rows: kk.Rows) -> Tensor:
    """Return a loss of all there is of a row, whose derivatives differ from id to id."""
    weights = torch.tensor([0.5, -2, 1, 3, 0.7]).to(rows.logprobs)
    loss = 0.3 * rows.logprobs + (weights * rows.extra_logprobs.exp()).square().sum(dim=1)
    loss = loss + rows.extra_logprobs @ weights
    if rows.rest_logprob is not None:
        loss = loss - 0.6 * rows.rest_logprob
    if rows.entropy is not None:
        loss = loss + 0.2 * rows.entropy
    for kl in (rows.kl, rows.forward_kl):
        loss = loss if kl is None else loss + 0.5 * kl
    return loss


def _solve(problem: Problem, impl: str, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return loss, log-probabilities and gradients of linear_token_loss."""
    student = {k: v.detach().clone().requires_grad_() for k, v in problem.student.items()}
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)
    out = kk.linear_token_loss(
        tokens=problem.tokens, loss_fn=_loss, extra_tokens=ids, teacher=teacher, impl=impl,
        **student, **options,
    )  # fmt: skip
    out.loss.backward()
    names = ("loss", "extra_logprobs", "rest_logprob")
    results = {
        name: getattr(out, name).detach() for name in names if getattr(out, name) is not None
    }
    return results | {f"d{k}": v.grad for k, v in student.items()}


def _assert_mean(ours: dict[str, Tensor], exact: dict[str, Tensor], threshold: float) -> None:
    """Assert that the gradients of M rows with all random numbers are those of the exact rows."""
    for name in ("dhidden", "dweight", "dbias"):
        mean, right = ours[name], exact[name]
        if name == "dhidden":
            assert not torch.allclose(mean[0], right[0], rtol=1e-3, atol=0)
            mean, right = mean.mean(dim=0), right.mean(dim=0)
        assert (mean - right).norm() / right.norm() < 60 * max(threshold, 0.1) / M, name


CASES: dict[str, dict[str, Any]] = {
    "ids": {},
    "rest": {"rest": True},
    "entropy": {"rest": True, "entropy": True, "softcap": 4.0, "temperature": 0.8},
    "rkl": {"kl": "rkl"},
    "fkl": {"kl": "fkl", "rest": True},
    "jsd": {"kl": "jsd", "rest": True},
    "both": {"kl": "rkl+fkl", "entropy": True},
}


@pytest.mark.usefixtures("every_number")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_mean_over_all_random_numbers_is_the_gradient(options: dict[str, Any]) -> None:
    kd = "rkl" if options.get("kl") else None
    problem = repeated(make_problem(1, H=5, V=V, kd=kd, dtype=F64))
    problem.tokens[0] = 10
    problem = repeated(problem)
    ids = torch.tensor([IDS]).expand(M, -1)
    exact = _solve(problem, "torch", ids, **options)
    sketch = sketch_of(threshold=0.1, scale=0)
    ours = _solve(problem, "torch", ids, backward="sketch", sketch=sketch, **options)
    for name in exact.keys() - {"dhidden", "dweight", "dbias"}:
        assert torch.equal(ours[name], exact[name]), name
    _assert_mean(ours, exact, 0.1)


@pytest.mark.usefixtures("every_number")
@pytest.mark.parametrize("lift", [0.0, 12.0], ids=["plain", "small_rest"])
def test_log_probabilities_have_the_right_mean_for_a_later_loss(lift: float) -> None:
    """Also where the rest is small: its entries are as many as those of a whole row."""
    problem = make_problem(1, H=5, V=V, kd=None, dtype=F64)
    problem.tokens[0] = 10
    problem.student["bias"][[3, 66, 10]] += lift
    problem = repeated(problem)
    results = {}
    for backward in ("exact", "sketch"):
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_logprobs(
            tokens=problem.tokens,
            extra_tokens=torch.tensor([IDS]).expand(M, -1),
            rest=True,
            entropy=True,
            backward=backward,
            sketch=sketch_of(threshold=0.1) if backward == "sketch" else None,
            **student,
        )
        rows = kk.Rows(
            out.logprobs,
            extra_logprobs=out.extra_logprobs,
            rest_logprob=out.rest_logprob,
            entropy=out.entropy,
        )
        _loss(rows).sum().backward()
        results[backward] = {f"d{k}": v.grad for k, v in student.items()}
    if lift:
        assert out.rest_logprob[0] < -5
    _assert_mean(results["sketch"], results["exact"], 0.1)


def test_thresholds_are_finer_where_the_rest_weighs_more_than_the_row() -> None:
    """r = 1 / 8: beside the ids the factor of p is 0.5 less 8 times the derivative in log r."""
    derivatives, expected = (0.0, 1 / 16, 0.25, 1.0), (1.0, 1.0, 0.25 / 1.5, 1 / 7.5)
    rest = torch.full((4,), 0.125, dtype=F64).log()
    ids = IdStats(torch.zeros(4, 1, dtype=torch.int64), rest[:, None], rest=rest)
    by_rest = torch.tensor(derivatives, dtype=F64)
    coef = Coefficients(0.5 - by_rest, rest=by_rest)
    sketch = kk.Sketch(0.01, scale=0).of_head(torch.zeros(4, 2), V)
    thresholds = sketch.grid(slice(0, 4), V, coef, ids).thresholds
    torch.testing.assert_close(thresholds, 0.01 * torch.tensor(expected, dtype=F64))
    unknown = sketch.grid(slice(0, 4), V, None, ids).thresholds
    torch.testing.assert_close(unknown, torch.full((4,), 0.01 / 8, dtype=F64))
    forward = sketch.grid(slice(0, 4), V, coef, ids, "fkl").thresholds
    torch.testing.assert_close(forward, thresholds.clamp(min=0.01 * (1 + 0.125) / 2))
    small = IdStats(ids.columns, ids.logprobs, rest=rest - 100)
    assert sketch.grid(slice(0, 4), V, coef, small).thresholds[1:].unique() == LEAST


@pytest.mark.parametrize("topk", [None, 4], ids=["ids", "topk"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_flat_rows_are_exact(dtype: torch.dtype, topk: int | None) -> None:
    """Without any sketched row, and beside rows of which the sketch holds all that is not tiny."""
    N = 20
    results = {}
    ids = torch.tensor([IDS]).expand(N, -1)
    for name, flat in (("exact", None), ("flat", 0.0), ("some", SIX_ENTRIES)):
        problem = make_problem(N, H=12, V=V, kd=None, dtype=dtype)
        if topk is None:  # some rows are so sure that a block counts nothing
            problem.student["hidden"][::2] *= 8
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        sketch = None if flat is None else kk.Sketch(threshold=2**-20, flat=flat)
        out = kk.linear_logprobs(
            tokens=problem.tokens,
            extra_tokens=None if topk else ids,
            topk=topk,
            rest=True,
            backward="exact" if flat is None else "sketch",
            sketch=sketch,
            **student,
        )
        extra = out.topk_logprobs if topk else out.extra_logprobs
        (extra.mean(dim=1) - out.rest_logprob + out.logprobs).sum().backward()
        results[name] = {k: v.grad for k, v in student.items()}
    for name in ("flat", "some"):
        for key, value in results["exact"].items():
            eps = torch.finfo(dtype).eps
            error = (results[name][key] - value).double().norm() / value.double().norm()
            assert error < 4 * max(eps, 1e-6), (name, key)


def test_an_id_of_probability_0_has_no_entry_that_is_nan() -> None:
    """One that a bias forbids, or the sampler leaves out, beside a gradient of the entropy."""
    N, results = 6, []
    problem = make_problem(N, H=5, V=V, kd=None, dtype=F64)
    problem.student["bias"][[3, 66]] = -torch.inf
    problem.tokens.fill_(10)
    for options in ({}, {"backward": "sketch", "sketch": kk.Sketch(2**-24, flat=math.inf)}):
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_logprobs(
            tokens=problem.tokens,
            extra_tokens=torch.tensor([[*IDS, 20]]).expand(N, -1),
            entropy=True,
            truncation=kk.Truncation(top_k=4),
            **options,
            **student,
        )
        (out.entropy.sum() + out.logprobs.sum() + out.extra_logprobs[:, 4].sum()).backward()
        results.append({k: v.grad for k, v in student.items()})
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_loss_that_reads_no_id_has_the_entries_it_has_without(impl: str, device: str) -> None:
    results = []
    for ids in (None, torch.tensor([IDS], device=device).expand(6, -1)):
        problem = make_problem(6, H=12, V=V, kd=None, device=device)
        sketch = sketch_of(threshold=0.1)
        ours = problem.solve(extra_tokens=ids, impl=impl, backward="sketch", sketch=sketch)
        results.append({k: v for k, v in ours.items() if k != "extra_logprobs"})
    without, with_ids = results
    for name, value in without.items():
        assert torch.equal(with_ids[name], value), name


@pytest.mark.parametrize("kl", ["fkl", "rkl+fkl"])
def test_triton_has_room_where_the_teacher_is_flat_on_a_small_rest(kl: str, device: str) -> None:
    """Nearly all of p is on the ids, and next to none of q: 1 / threshold + 2 + 5 entries a row."""
    N, columns, room = 2, 300, 20 + 2 + 5
    problem = make_problem(N, H=6, V=columns, kd="rkl", device=device)
    problem.student["bias"][[3, 66, 10]] += 25
    assert problem.teacher is not None
    problem.teacher["hidden"] *= 0
    ids = torch.tensor([IDS], device=device).expand(N, -1)
    grads = []
    for impl in ("torch", "triton"):
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_token_loss(
            student["hidden"],
            student["weight"],
            problem.tokens,
            lambda rows: rows.kl - 0.6 * rows.rest_logprob,
            bias=student["bias"],
            extra_tokens=ids,
            rest=True,
            kl=kl,
            teacher=kk.TeacherHead(**problem.teacher),
            impl=impl,
            backward="sketch",
            sketch=sketch_of(threshold=1 / 20, scale=0),
        )
        assert out.metrics["entries"] <= N * room
        out.loss.backward()
        grads.append(student["weight"].grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [CASES["rest"], CASES["jsd"]], ids=["rest", "jsd"])
def test_triton_keeps_the_entries_that_pytorch_keeps(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for streams in (1, 2):
        monkeypatch.setitem(tiles.TILES, (tiles.SKETCH, streams, False), tiles.Tile(1, 64, 4))
    problem = make_problem(6, H=12, V=140, kd="rkl" if "kl" in options else None, device=device)
    ids = torch.tensor([IDS], device=device).expand(6, -1).clone()
    ids[2] = -1
    options = options | {"backward": "sketch", "sketch": sketch_of(threshold=0.02, seed=1)}
    expected = _solve(problem, "torch", ids, **options)
    ours = _solve(problem, "triton", ids, **options)
    for name, value in expected.items():
        scale = value.abs().max()
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * scale.item())
