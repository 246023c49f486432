"""Cases of a vocabulary over ranks: a caller's own loss, log-probabilities, and those at K ids."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, F64
from tests.kernels.problem import Problem
from tests.kernels.vocab_ranks import (
    BORDERS,
    H,
    N,
    V,
    assert_exact,
    joined,
    piece,
    problem_of,
    sizes_of_ranks,
    spread,
    temperatures,
)
from tests.tolerance import assert_matches


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
    assert_exact(ours, _scores(problem, **options | {"impl": "reference"}))


def _check_topk_objective(kd: str, tail: bool) -> None:
    """A divergence on the teacher's likeliest tokens, which lie on several ranks."""
    objective = {"kd": kd, "tail": tail, "kd_coef": 0.5}
    problem = problem_of(kd=None).map(Tensor.double)
    ids = _ids(problem)[:, :3]
    ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
    ids[:, 2] = (ids[:, 0] + 13) % V
    rng = torch.Generator().manual_seed(2)
    logq = torch.log_softmax(torch.randn(N, 5, generator=rng, dtype=F64), dim=1)[:, :3]
    topk = {"teacher_topk": (ids, logq), "objective": kk.Objective(**objective)}
    ours = joined(
        spread(problem, sizes_of_ranks(), None).solve(vocab_group=dist.group.WORLD, **topk)
    )
    assert_exact(ours, problem.solve(impl="reference", **topk))


def _check_equal_logits() -> None:
    """Of equal logits on two ranks the lowest column comes first among the likeliest."""
    weight = torch.arange(V).fmod(4)[:, None].double()
    hidden, tokens = torch.ones(2, 1, dtype=F64), torch.zeros(2, dtype=torch.int64)
    here = piece(weight, sizes_of_ranks())
    out = kk.linear_logprobs(hidden, here, tokens, topk=3, vocab_group=dist.group.WORLD)
    assert out.topk_tokens is not None
    assert out.topk_tokens.tolist() == [[3, 7, 11]] * 2


CASES: dict[str, Callable[[], None]] = {
    "logit-loss": _check_logit_loss,
    "forbidden-ids": _check_forbidden_ids,
    "adapter": _check_adapter,
    "equal-logits": _check_equal_logits,
    "logprobs": _check_logprobs,
    "logprobs-capped": lambda: _check_logprobs(softcap=2.0, workspace_bytes=5_000),
    "logprobs-cached": lambda: _check_logprobs(cache_bytes=1 << 20),
    "logprobs-ids": lambda: _check_logprobs(ids=True),
    "logprobs-ids-cached": lambda: _check_logprobs(ids=True, cache_bytes=1 << 20, softcap=2.0),
    "logprobs-topk": lambda: _check_logprobs(topk=3, rest=True),
    "logprobs-reference": lambda: _check_logprobs(ids=True, impl="reference"),
}
for _kl, _with_ids in itertools.product(("rkl", "fkl", "jsd", "rkl+fkl"), (False, True)):
    _name = f"token-loss-{_kl}{'-ids' if _with_ids else ''}"
    CASES[_name] = lambda k=_kl, i=_with_ids: _check_token_loss(k, i)
    CASES[f"{_name}-capped"] = lambda k=_kl, i=_with_ids: _check_token_loss(
        k, i, softcap=3.0, temperature=temperatures()
    )
for _kd, _tail in itertools.product(("topk_rkl", "topk_fkl", "topk_jsd"), (True, False)):
    CASES[f"{_kd}-{_tail}"] = lambda k=_kd, t=_tail: _check_topk_objective(k, t)
for _impl, _kl in [("torch", "rkl+fkl"), ("triton", "jsd"), ("triton", "fkl")]:
    CASES[f"ids-{_impl}-float32-{_kl}"] = lambda i=_impl, k=_kl: _check_ids_in_float32(i, k)
