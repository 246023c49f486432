"""Cases of a vocabulary over ranks: what travels, what is refused, and the same bits."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import kdrl_kernels as kk
from kdrl_kernels import vocab_shard
from tests.kernels.params import F32
from tests.kernels.problem import make_problem
from tests.kernels.vocab_ranks import (
    H,
    N,
    V,
    assert_exact,
    joined,
    problem_of,
    sizes_of_ranks,
    solve,
    spread,
)
from tests.tolerance import relative_error


def _check_two_runs() -> None:
    for kd in ("jsd", "k2"):
        problem = problem_of(kd=kd, dtype=F32)
        first, second = solve(problem), solve(problem)
        assert all(torch.equal(first[name], second[name]) for name in first)


def _check_same_logprobs() -> None:
    """linear_logprobs and kdrl_loss give the same bits: the ratio on-policy is exactly 1."""
    problem = problem_of(kd=None, dtype=F32)
    here = spread(problem, sizes_of_ranks(), None)
    head = here.student["hidden"], here.student["weight"], problem.tokens
    options = {"bias": here.student["bias"], "vocab_group": dist.group.WORLD}
    scores = kk.linear_logprobs(*head, **options)
    out = kk.kdrl_loss(*head, **here.options, **options)
    assert torch.equal(out.logprobs, scores.logprobs)


def _check_traffic() -> None:
    """Between ranks go some numbers of each row, and dX once: no logits."""
    problem = spread(problem_of(kd="rkl", dtype=F32), sizes_of_ranks(), sizes_of_ranks())
    gathered: list[int] = []
    plain = vocab_shard.gather

    def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
        gathered.append(values.numel())
        return plain(values, group)

    vocab_shard.gather = gather
    try:
        reduced = _reduced(lambda: problem.solve(vocab_group=dist.group.WORLD))
    finally:
        vocab_shard.gather = plain
    assert gathered == [8 * N]  # student: max, sum, token, entropy; teacher: 3; KL
    assert reduced == [N * H]


def _reduced(fn: Callable[[], Any]) -> list[int]:
    """Return the number of elements of each all_reduce."""
    sizes: list[int] = []
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        fn()
    finally:
        dist.all_reduce = plain
    return sizes


def _check_dtensor() -> None:
    """A DTensor is refused with what to pass; its to_local() gets its gradient back."""
    problem = problem_of(kd=None, bias=False).map(Tensor.double)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(problem.student["weight"], mesh, [Shard(0)]))
    head = problem.student["hidden"], problem.tokens

    def loss(weight: Tensor, **more: Any) -> Tensor:
        options = {**problem.options, "vocab_group": mesh.get_group(), **more}
        return kk.kdrl_loss(head[0], weight, head[1], **options).loss

    with pytest.raises(TypeError, match=r"^weight must be a plain tensor .* weight.to_local\(\)"):
        loss(weight)
    for part, message in (
        (
            {"teacher": kk.TeacherHead(head[0], weight)},
            r"^teacher.weight .* teacher.weight.full_te",
        ),
        ({"adapter": kk.LowRank(weight[:1], weight[:, :1])}, r"^adapter.A .* pass adapter.A.full"),
        ({"adapter": kk.LowRank(head[0][:1], weight[:, :1])}, r"^adapter.B .* adapter.B.to_local"),
    ):
        # of one rank alone, too: it must not have begun to gather the tensor
        bad = {"temperature": -1.0} if dist.get_rank() else part
        says = r"^temperature must be positive" if dist.get_rank() else message
        with pytest.raises((TypeError, ValueError), match=says):
            loss(weight.to_local().detach(), **bad)
    loss(weight.to_local()).backward()
    assert weight.grad is not None
    exact = problem.solve(impl="reference")["dweight"]
    assert relative_error(weight.grad.full_tensor(), exact) <= 1e-12


def _check_compiled() -> None:
    problem = problem_of(kd=None).map(Tensor.double)
    here = spread(problem, sizes_of_ranks(), None)
    weight = here.student["weight"].clone().requires_grad_()

    @torch.compile(backend="eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"bias": here.student["bias"], "vocab_group": dist.group.WORLD}
        return 2 * kk.kdrl_loss(hidden + 0, weight, here.tokens, **here.options, **options).loss

    value = loss(here.student["hidden"], weight)
    value.backward()
    exact = problem.solve(2.0, impl="reference")
    ours = joined({"loss": value.detach(), "dweight": weight.grad})
    assert_exact(ours, {"loss": 2 * exact["loss"], "dweight": exact["dweight"]})


def _raises(kind: type[Exception], message: str, **changes: Any) -> None:
    """A call with changed arguments raises on this rank."""
    problem = changes.pop("problem", None) or problem_of(kd="rkl")
    if changes.pop("spread", True):
        problem = spread(
            problem, changes.pop("sizes", sizes_of_ranks()), changes.pop("t_sizes", None)
        )
    arguments = {"vocab_group": dist.group.WORLD} | changes
    with pytest.raises(kind, match=message):
        problem.solve(**arguments)


def _check_one_rank_refuses() -> None:
    """An error of one rank, before the pass, is told to the others, whatever raises it."""
    for change in ({"temperature": -1.0}, {"workspace_bytes": 1}, {"impl": "other"}):
        if dist.get_rank() == 1:
            _raises(ValueError, next(iter(change)), **change)
        else:
            _raises(ValueError, r"^the arguments must be valid on all ranks .* error on \[1\]")
    for size in (0, -1, 2**64):
        if dist.get_rank() == 1:
            _raises(ValueError, r"^vocab_size must be positive", vocab_size=size)
        else:
            _raises(ValueError, r"^the arguments must be valid on all ranks")
    problem = problem_of(kd=None)
    solve(problem)  # the ranks still meet


def _check_differences() -> None:
    """What must be the same on all ranks raises on all where it is not."""
    first = dist.get_rank() == 0
    problem = problem_of(kd=None, seed=0)
    fewer = make_problem(N - 1, H, V, kd=None, objective={"entropy_coef": 0.1})
    _raises(ValueError, r"^hidden must have the same number", problem=problem if first else fewer)
    weights = torch.ones(N) if first else torch.eye(N)[0]
    _raises(ValueError, r"^token_weights must be non-zero in the same", token_weights=weights)
    _raises(ValueError, r"^vocab_size must be the same", vocab_size=30 if first else None)
    other = 9.0 if first else 8.0
    for change in (
        {"entropy": first},
        {"softcap": other},
        {"compact": first},
        {"normalizer": other},
    ):
        (name,) = change
        _raises(ValueError, rf"^{name} must be the same on all ranks .* got \S+ and \S+$", **change)
    ids = torch.zeros(N, 3 if first else 2, dtype=torch.int64)
    _raises(ValueError, r"^extra_tokens .* 3\] and torch.int64 \[\d+, 2\]$", extra_tokens=ids)
    weights = torch.ones(N) if first else None
    _raises(ValueError, "^token_weights .* and None$", token_weights=weights)
    objective = kk.Objective(kd="rkl", kd_coef=1.0 if first else 2.0)
    _raises(ValueError, "^kd_coef must be the same .* got 1.0 and 2.0$", objective=objective)
    adapter = kk.LowRank(torch.ones(1, H), torch.ones(sizes_of_ranks()[dist.get_rank()], 1), other)
    here = spread(problem, sizes_of_ranks(), None)
    with pytest.raises(ValueError, match=r"^adapter.scale must be the same .* got 9.0 and 8.0$"):
        kk.linear_logprobs(
            **here.student, tokens=here.tokens, adapter=adapter, vocab_group=dist.group.WORLD
        )


def _check_refused() -> None:
    sizes = sizes_of_ranks()
    _raises(TypeError, r"^vocab_group must be a torch.distributed ProcessGroup", vocab_group="all")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    _raises(TypeError, r"got DeviceMesh: take .get_group\(\)$", vocab_group=mesh)
    alone = dist.new_group([0])
    if dist.get_rank():
        _raises(TypeError, r"^vocab_group must be", vocab_group=alone)
    _raises(ValueError, r"^backward must be", backward="sketch")
    _raises(ValueError, r"^truncation must be None with", truncation=kk.Truncation(top_k=3))
    _raises(ValueError, r"^vocab_size must leave each rank", vocab_size=sizes[0])
    _raises(ValueError, r"^vocab_size must be in \[1, 37\], got 38", vocab_size=38)
    uneven = [V - 2 * (len(sizes) - 1)] + [2] * (len(sizes) - 1)
    _raises(ValueError, r"^teacher.weight must be whole, or have as many rows", t_sizes=uneven)
    here = spread(problem_of(kd=None), sizes, None)
    call: Any = kk.linear_logprobs  # which has none
    with pytest.raises(TypeError, match="unexpected keyword argument 'vocab_size'"):
        call(**here.student, tokens=here.tokens, vocab_size=9, vocab_group=dist.group.WORLD)
    bad = replace(problem_of(kd="rkl"), tokens=torch.full((N,), V))
    _raises(ValueError, r"^tokens must be in \[0, vocab_size\) with vocab_size = 37", problem=bad)


def _check_whole_weight() -> None:
    """A weight that every rank has whole would count each token once a rank."""
    message = r"^weight must be the rows of one rank .* on the ranks 0 and 1: pass each"
    whole = problem_of(kd=None)
    _raises(ValueError, message, problem=whole, spread=False)
    with pytest.raises(ValueError, match=message):
        kk.linear_logprobs(**whole.student, tokens=whole.tokens, vocab_group=dist.group.WORLD)
    everyone = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    ours = vocab_shard._copies(
        everyone.to("meta"), everyone.to("meta")
    )  # as on a GPU: nothing is read
    assert ours.is_meta
    nothing = torch.zeros(2, 3), torch.full((2, 3), 1.0)
    assert not vocab_shard._copies(*nothing)
    assert not vocab_shard._copies(everyone, torch.tensor([[1.0, 2.0], [1.0, 3.0]]))


def _check_nothing_held() -> None:
    """Autograd's hooks, as of activation checkpointing, decide what lives until backward."""
    here = spread(problem_of(kd=None), sizes_of_ranks(), None)
    leaf = here.student["hidden"].requires_grad_()
    hidden = leaf * 1
    reference = weakref.ref(hidden)
    head = hidden, here.student["weight"], here.tokens
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        out = kk.linear_logprobs(*head, bias=here.student["bias"], vocab_group=dist.group.WORLD)
    del hidden, head
    assert reference() is None
    out.logprobs.sum().backward()
    assert leaf.grad is not None


CASES: dict[str, Callable[[], None]] = {
    "two-runs": _check_two_runs,
    "same-logprobs": _check_same_logprobs,
    "traffic": _check_traffic,
    "dtensor": _check_dtensor,
    "compiled": _check_compiled,
    "one-rank-refuses": _check_one_rank_refuses,
    "differences": _check_differences,
    "refused": _check_refused,
    "whole-weight": _check_whole_weight,
    "nothing-held": _check_nothing_held,
}
