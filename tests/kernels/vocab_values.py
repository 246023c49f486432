"""Cases of a vocabulary over ranks: losses, outputs and gradients are those of one process."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import chunks, gradients
from tests.kernels.params import BF16, F16, F32, KDS
from tests.kernels.problem import Problem, assert_solves, make_problem
from tests.kernels.vocab_ranks import (
    BORDERS,
    H,
    N,
    V,
    assert_exact,
    joined,
    problem_of,
    sizes_of_ranks,
    solve,
    spread,
    temperatures,
)


def _check_problem(problem: Problem, sharded_teacher: bool = True, **options: Any) -> None:
    problem = problem.map(Tensor.double)
    ours = solve(problem, sharded_teacher, upstream=3.0, **options)
    assert_exact(ours, problem.solve(3.0, **options | {"impl": "reference"}))


def _check_kd(kd: str | None, sharded_teacher: bool) -> None:
    _check_problem(problem_of(kd=kd), sharded_teacher)


def _check_options(kd: str, **kind: Any) -> None:
    _check_problem(problem_of(kd=kd, **kind), entropy=True)


def _check_borders() -> None:
    """Tokens beside each border between ranks, and a temperature of each row."""
    tokens = torch.tensor((2 * BORDERS[dist.get_world_size()])[:N])
    for kd in ("k2", "rkl"):
        _check_problem(replace(problem_of(kd=kd, temperature=temperatures()), tokens=tokens))


def _check_forbidden(kd: str, rank: int) -> None:
    """A bias of -inf forbids all columns of a rank, in both models, or a few of each rank."""
    problem, sizes = problem_of(kd=kd, temperature=temperatures()), sizes_of_ranks()
    columns = torch.arange(V)
    start = sum(sizes[:rank])
    forbidden = (
        (columns >= start) & (columns < start + sizes[rank]) if rank >= 0 else columns % 3 == 1
    )
    bias = torch.where(forbidden, -math.inf, problem.student["bias"])
    allowed = columns[~forbidden]
    assert problem.teacher is not None
    problem = replace(
        problem,
        student=problem.student | {"bias": bias},
        teacher=problem.teacher | {"bias": bias / 2},
        tokens=allowed[torch.arange(N) % len(allowed)],
    )
    _check_problem(problem)


def _check_one_sided(kd: str, model: str) -> None:
    """One model forbids all columns of a rank: a KL is right where it is finite, else infinite."""
    problem, sizes = problem_of(kd=kd).map(Tensor.double), sizes_of_ranks()
    bias = problem.student["bias"].clone()
    bias[: sizes[0]] = -math.inf
    head = {**getattr(problem, model), "bias": bias}
    tokens = problem.tokens.clamp_min(sizes[0])
    problem = replace(problem, **{model: head}, tokens=tokens)
    if kd == "jsd" or (kd, model) in (("rkl", "student"), ("fkl", "teacher")):
        _check_problem(problem)
        return
    kl = spread(problem, sizes, sizes).solve(vocab_group=dist.group.WORLD)["kl"]
    assert torch.equal(kl, torch.full_like(kl, math.inf))


def _check_far(kd: str) -> None:
    """Logits of one rank are 1e4 above those of others; the float64 difference stays exact."""
    problem = problem_of(kd=kd)
    bias = problem.student["bias"] + 1e4 * (torch.arange(V) >= sizes_of_ranks()[0])
    _check_problem(replace(problem, student=problem.student | {"bias": bias}))


def _check_same_distribution(kd: str) -> None:
    """A teacher that is the student has a divergence and a gradient of exactly 0."""
    problem = problem_of(kd=kd, objective={"policy": "off"}).map(Tensor.float)
    problem = replace(problem, teacher=dict(problem.student))
    for impl in ("torch", "triton"):
        results = solve(problem, impl=impl)
        assert not results["kl"].any()
        assert all(not results[f"d{name}"].any() for name in problem.student)


def _check_masked(everything: bool) -> None:
    problem = problem_of(kd="rkl").map(Tensor.double)
    rows = slice(None) if everything else [1, 4]
    weights, hidden = problem.options["token_weights"].clone(), problem.student["hidden"].clone()
    weights[rows], hidden[rows] = 0, torch.nan
    problem = replace(
        problem,
        student=problem.student | {"hidden": hidden},
        options=problem.options | {"token_weights": weights, "normalizer": 2.0},
    )
    _check_problem(problem)


def _check_chunks_and_rows_left_out() -> None:
    """Rows that clip have no gradient; chunks of few rows, whose number the ranks agree on."""
    problem = problem_of(kd="k2", objective={"clip_low": 0.0, "clip_high": 0.0, "kd_coef": 0.0})
    problem = problem.map(Tensor.double)
    for compact in (True, False):
        here = spread(problem, sizes_of_ranks(), sizes_of_ranks())
        budget = 8_000 + 4_000 * dist.get_rank()
        out = here.solve(compact=compact, workspace_bytes=budget, vocab_group=dist.group.WORLD)
        assert_exact(joined(out), problem.solve(impl="reference"))


def _check_no_rows() -> None:
    _check_problem(make_problem(0, H, V, kd="jsd", normalizer=1.0))


def _check_batches() -> None:
    """Hidden states [B, T, H], a frozen head, then a frozen backbone."""
    problem = problem_of(kd=None, off_policy=False).map(Tensor.double)
    exact = problem.solve(impl="reference")
    for trained in ("hidden", "weight"):
        here = spread(problem, sizes_of_ranks(), None).student
        here = {k: x.clone().requires_grad_(k == trained) for k, x in here.items()}
        flat = {k: v[None] if isinstance(v, Tensor) else v for k, v in problem.options.items()}
        out = kk.kdrl_loss(
            here["hidden"][None],
            here["weight"],
            problem.tokens[None],
            bias=here["bias"],
            vocab_group=dist.group.WORLD,
            **flat,
        )
        out.loss.backward()
        gradient = here[trained].grad
        assert gradient is not None
        results = joined({"loss": out.loss.detach(), f"d{trained}": gradient})
        assert_exact(results, {name: exact[name] for name in results})


def _check_dtype(impl: str, dtype: torch.dtype, kd: str | None) -> None:
    problem = problem_of(kd=kd, dtype=dtype, temperature=0.7)
    assert_solves(problem, solve(problem, impl=impl))


def _check_one_rank_writes_at_once() -> None:
    """Let the GEMM write dW in bfloat16 on the rank that has enough columns, and on no other."""
    on_gpu = patch.object(gradients, "is_on_gpu", return_value=True)
    with on_gpu, patch.object(chunks, "DIRECT_ELEMENTS", 18 * H):
        _check_dtype("torch", BF16, "rkl")


def _check_reference(kd: str | None) -> None:
    """The definition gathers the weights; so it has truncation, too."""
    problem = problem_of(kd=kd, V_t=V + 2).map(Tensor.double)
    truncation = kk.Truncation(top_p=0.8) if kd in (None, "rkl") else None
    ours = solve(problem, impl="reference", truncation=truncation)
    assert_exact(ours, problem.solve(impl="reference", truncation=truncation))


CASES: dict[str, Callable[[], None]] = {
    "borders": _check_borders,
    "masked": lambda: _check_masked(False),
    "all-masked": lambda: _check_masked(True),
    "chunks-and-rows-left-out": _check_chunks_and_rows_left_out,
    "no-rows": _check_no_rows,
    "batches": _check_batches,
    "one-rank-writes-at-once": _check_one_rank_writes_at_once,
    "baseline": lambda: _check_options("k2", objective={"kd_baseline": "kl"}),
    "server": lambda: _check_options("k2", server=True),
    "far-jsd": lambda: _check_far("jsd"),
}
for _kd, _sharded in itertools.product(KDS, (True, False)):
    CASES[f"{_kd}-{'sharded' if _sharded else 'whole'}"] = lambda k=_kd, s=_sharded: _check_kd(k, s)
for _kd in ("k2", "rkl", "fkl", "jsd"):
    CASES[f"capped-{_kd}"] = lambda k=_kd: _check_options(
        k, softcap=3.0, temperature=temperatures(), teacher_options={"softcap": 2.0}
    )
    CASES[f"shorter-teacher-{_kd}"] = lambda k=_kd: _check_options(k, V_t=V - 1)
    CASES[f"longer-teacher-{_kd}"] = lambda k=_kd: _check_options(k, V_t=V + 5)
    for _rank in (-1, 0, 1):
        CASES[f"forbidden-{_kd}-{_rank}"] = lambda k=_kd, r=_rank: _check_forbidden(k, r)
for _kd in ("rkl", "fkl", "jsd", "rkl+fkl"):
    CASES[f"same-distribution-{_kd}"] = lambda k=_kd: _check_same_distribution(k)

for _kd in KDS:
    CASES[f"reference-{_kd}"] = lambda k=_kd: _check_reference(k)
for _kd, _model in itertools.product(("rkl", "fkl", "jsd"), ("student", "teacher")):
    CASES[f"one-sided-{_kd}-{_model}"] = lambda k=_kd, m=_model: _check_one_sided(k, m)
for _dtype, _kd in [
    *((F32, kd) for kd in (None, "k2", "rkl", "fkl", "jsd")),
    *((F16, "rkl"), (F16, "jsd"), (BF16, "rkl")),
]:
    _id = f"torch-{str(_dtype).removeprefix('torch.')}-{_kd}"
    CASES[_id] = lambda d=_dtype, k=_kd: _check_dtype("torch", d, k)
for _dtype, _kd in [(F32, "k2"), (F32, "rkl"), (F32, "fkl"), (F32, "jsd"), (F16, "rkl")]:
    _id = f"triton-{str(_dtype).removeprefix('torch.')}-{_kd}"
    CASES[_id] = lambda d=_dtype, k=_kd: _check_dtype("triton", d, k)
