"""Cases of a vocabulary over ranks: losses, outputs and gradients are those of one process."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import BF16, F16, F32, F64, KDS
from tests.kernels.problem import Problem, assert_solves, make_problem
from tests.kernels.vocab_ranks import (
    H,
    N,
    V,
    assert_exact,
    joined,
    piece,
    problem_of,
    sizes_of_ranks,
    solve,
    spread,
    temperatures,
)
from tests.tolerance import assert_matches

BORDERS = {2: [0, 19, 20, 36], 3: [0, 4, 5, 33, 34, 36]}
"""Columns beside each border between ranks."""


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
    problem, sizes = problem_of(kd=kd), sizes_of_ranks()
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
        out = here.solve(compact=compact, workspace_bytes=8_000, vocab_group=dist.group.WORLD)
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


def _ids(problem: Problem) -> Tensor:
    """Return [N, 6] ids: at borders, the token, twice the same, none, and a row without any."""
    borders = torch.tensor(BORDERS[dist.get_world_size()])
    rows = torch.arange(N)
    near = borders[(rows[:, None] + torch.arange(3)) % len(borders)]
    last = torch.where(rows % 2 == 0, problem.tokens, -1)
    ids = torch.stack([*near.T, near[:, 0], (7 * rows) % V, last], dim=1)
    ids[2] = -1
    return ids


def _token_loss(rows: kk.Rows) -> Tensor:
    """Read every number of a row that carries a gradient, and the teacher's entropy."""
    assert rows.kl is not None
    assert rows.entropy is not None
    assert rows.lse is not None
    assert rows.teacher_entropy is not None
    value = rows.kl - rows.logprobs.exp() + 0.1 * rows.lse.square() - rows.entropy.sin()
    if rows.forward_kl is not None:
        value = value + rows.forward_kl.square()
    if rows.extra_logprobs is not None:
        assert rows.rest_logprob is not None
        factor = torch.arange(1, 7, dtype=value.dtype)
        value = value + (rows.extra_logprobs.exp() * factor).sum(dim=1) + rows.rest_logprob.sin()
    return value * rows.teacher_entropy


def _caller_results(problem: Problem, kl: str, **options: Any) -> dict[str, Tensor]:
    student = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
    assert problem.teacher is not None
    out = kk.linear_token_loss(
        student["hidden"],
        student["weight"],
        problem.tokens,
        _token_loss,
        bias=student["bias"],
        teacher=kk.TeacherHead(**problem.teacher),
        kl=kl,
        entropy=True,
        lse=True,
        teacher_entropy=True,
        token_weights=problem.options["token_weights"],
        **options,
    )
    out.loss.backward()
    names = ("logprobs", "teacher_logprobs", "kl", "forward_kl", "entropy", "lse")
    names += ("extra_logprobs", "rest_logprob")
    results = {name: getattr(out, name) for name in names} | {"loss": out.loss.detach()}
    results |= {f"d{name}": x.grad for name, x in student.items()}
    return {name: value for name, value in results.items() if value is not None}


def _check_token_loss(kl: str, ids: bool, **options: Any) -> None:
    problem = problem_of(kd="k2", off_policy=False).map(Tensor.double)
    if ids:
        options |= {"extra_tokens": _ids(problem), "rest": True}
    here = spread(problem, sizes_of_ranks(), sizes_of_ranks())
    ours = _caller_results(here, kl, vocab_group=dist.group.WORLD, **options)
    assert_exact(joined(ours), _caller_results(problem, kl, impl="reference", **options))


def _check_ids_in_float32(impl: str, kl: str) -> None:
    problem = problem_of(kd="k2", dtype=F32, off_policy=False)
    options: dict[str, Any] = {"extra_tokens": _ids(problem), "rest": True, "softcap": 3.0}
    here = spread(problem, sizes_of_ranks(), sizes_of_ranks())
    ours = joined(_caller_results(here, kl, impl=impl, vocab_group=dist.group.WORLD, **options))

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        cast = problem.map(lambda x: x.to(dtype))
        return _caller_results(cast, kl, impl="reference", **options)

    assert_matches(ours, reference)


def _check_forbidden_ids() -> None:
    """Ids of a rank whose columns are all forbidden have probability 0 and no gradient."""
    problem = problem_of(kd="k2", off_policy=False).map(Tensor.double)
    here = torch.arange(V) < sizes_of_ranks()[0]
    bias = torch.where(here, -math.inf, problem.student["bias"])
    problem = replace(problem, student=problem.student | {"bias": bias})
    ids = torch.tensor([[0, V - 1], [1, 1], [V - 2, -1]])[torch.arange(N) % 3]

    def results(problem: Problem, **options: Any) -> dict[str, Tensor]:
        student = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
        out = kk.linear_logprobs(**student, tokens=problem.tokens, extra_tokens=ids, **options)
        assert out.extra_logprobs is not None
        out.extra_logprobs.exp().sum().backward()
        gradients = {f"d{name}": x.grad for name, x in student.items()}
        return gradients | {"extra_logprobs": out.extra_logprobs.detach()}

    problem = replace(problem, tokens=problem.tokens.clamp_min(sizes_of_ranks()[0]))
    ours = joined(results(spread(problem, sizes_of_ranks(), None), vocab_group=dist.group.WORLD))
    assert_exact(ours, results(problem, impl="reference"))


def _check_adapter() -> None:
    """An adapter's A is whole, and its gradient the same on all ranks; B has the rows of weight."""
    problem = problem_of(kd="rkl", bias=False).map(Tensor.double)
    rng = torch.Generator().manual_seed(1)
    A, B = (torch.randn(size, generator=rng, dtype=F64) for size in ((2, H), (V, 2)))

    def results(problem: Problem, B: Tensor, **options: Any) -> dict[str, Tensor]:
        hidden, weight = (problem.student[name].clone() for name in ("hidden", "weight"))
        trained = {"hidden": hidden, "A": A.clone(), "weight": B.clone()}
        for tensor in trained.values():
            tensor.requires_grad_()
        assert problem.teacher is not None
        out = kk.kdrl_loss(
            hidden,
            weight,
            problem.tokens,
            teacher=kk.TeacherHead(**problem.teacher),
            adapter=kk.LowRank(trained["A"], trained["weight"], 0.5),
            **problem.options,
            **options,
        )
        out.loss.backward()
        return {f"d{name}": x.grad for name, x in trained.items()} | {"loss": out.loss.detach()}

    here, B_here = spread(problem, sizes_of_ranks(), sizes_of_ranks()), piece(B, sizes_of_ranks())
    ours = joined(results(here, B_here, vocab_group=dist.group.WORLD))
    assert_exact(ours, results(problem, B, impl="reference"))


def _check_logit_loss() -> None:
    """A loss of z_y alone has no gradient in the columns of other ranks, but rows of its own."""
    problem = problem_of(kd=None).map(Tensor.double)

    def results(problem: Problem, **options: Any) -> tuple[dict[str, Tensor], int]:
        weight = problem.student["weight"].clone().requires_grad_()
        out = kk.linear_token_loss(
            problem.student["hidden"],
            weight,
            problem.tokens,
            lambda rows: (rows.logprobs + rows.lse).square(),
            lse=True,
            **options,
        )
        out.loss.backward()
        return {"loss": out.loss.detach(), "dweight": weight.grad}, int(
            out.metrics["gradient_rows"]
        )

    ours, rows = results(spread(problem, sizes_of_ranks(), None), vocab_group=dist.group.WORLD)
    exact, exact_rows = results(problem, impl="reference")
    assert_exact(joined(ours), exact)
    assert rows == exact_rows == N


def _scores(problem: Problem, **options: Any) -> dict[str, Tensor]:
    student = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
    mask = torch.arange(N) != 3
    out = kk.linear_logprobs(
        student["hidden"],
        student["weight"],
        problem.tokens,
        mask=mask,
        bias=student["bias"],
        temperature=temperatures().to(student["hidden"].dtype),
        entropy=True,
        **options,
    )
    names = ("logprobs", "entropy", "extra_logprobs", "rest_logprob", "topk_logprobs")
    results = {name: getattr(out, name) for name in names}
    results = {name: value for name, value in results.items() if value is not None}
    loss = sum(
        (value.sin() * torch.arange(N).view(N, *[1] * (value.ndim - 1))).sum()
        for value in results.values()
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    results = {name: value.detach() for name, value in results.items()}
    if out.topk_tokens is not None:
        results["topk_tokens"] = out.topk_tokens
    return results | {f"d{name}": x.grad for name, x in student.items()}


def _check_logprobs(ids: bool = False, **options: Any) -> None:
    problem = problem_of(kd=None).map(Tensor.double)
    if ids:
        options |= {"extra_tokens": _ids(problem), "rest": True}
    here = spread(problem, sizes_of_ranks(), None)
    ours = joined(_scores(here, vocab_group=dist.group.WORLD, **options))
    assert_exact(ours, _scores(problem, impl="reference", **options))


def _check_equal_logits() -> None:
    """Of equal logits on two ranks the lowest column comes first among the likeliest."""
    weight = torch.arange(V).fmod(4)[:, None].double()
    hidden, tokens = torch.ones(2, 1, dtype=F64), torch.zeros(2, dtype=torch.int64)
    here = piece(weight, sizes_of_ranks())
    out = kk.linear_logprobs(hidden, here, tokens, topk=3, vocab_group=dist.group.WORLD)
    assert out.topk_tokens is not None
    assert out.topk_tokens.tolist() == [[3, 7, 11]] * 2


CASES: dict[str, Callable[[], None]] = {
    "borders": _check_borders,
    "masked": lambda: _check_masked(False),
    "all-masked": lambda: _check_masked(True),
    "chunks-and-rows-left-out": _check_chunks_and_rows_left_out,
    "no-rows": _check_no_rows,
    "batches": _check_batches,
    "forbidden-ids": _check_forbidden_ids,
    "adapter": _check_adapter,
    "equal-logits": _check_equal_logits,
    "logprobs-ids": lambda: _check_logprobs(ids=True),
    "logprobs-ids-cached": lambda: _check_logprobs(ids=True, cache_bytes=1 << 20, softcap=2.0),
    "logprobs-topk": lambda: _check_logprobs(topk=3, rest=True),
    "logit-loss": _check_logit_loss,
    "logprobs": _check_logprobs,
    "logprobs-capped": lambda: _check_logprobs(softcap=2.0, workspace_bytes=5_000),
    "logprobs-cached": lambda: _check_logprobs(cache_bytes=1 << 20),
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
for _kl, _with_ids in itertools.product(("rkl", "fkl", "jsd", "rkl+fkl"), (False, True)):
    _name = f"token-loss-{_kl}{'-ids' if _with_ids else ''}"
    CASES[_name] = lambda k=_kl, i=_with_ids: _check_token_loss(k, i)
    CASES[f"{_name}-capped"] = lambda k=_kl, i=_with_ids: _check_token_loss(
        k, i, softcap=3.0, temperature=temperatures()
    )
for _impl, _kl in [("torch", "rkl+fkl"), ("triton", "jsd"), ("triton", "fkl")]:
    CASES[f"ids-{_impl}-{_kl}"] = lambda i=_impl, k=_kl: _check_ids_in_float32(i, k)
for _dtype, _kd in itertools.product((F32, F16, BF16), (None, "k2", "rkl", "fkl", "jsd")):
    _id = f"torch-{str(_dtype).removeprefix('torch.')}-{_kd}"
    CASES[_id] = lambda d=_dtype, k=_kd: _check_dtype("torch", d, k)
for _dtype, _kd in [(F32, "k2"), (F32, "rkl"), (F32, "fkl"), (F32, "jsd"), (F16, "rkl")]:
    _id = f"triton-{str(_dtype).removeprefix('torch.')}-{_kd}"
    CASES[_id] = lambda d=_dtype, k=_kd: _check_dtype("triton", d, k)
