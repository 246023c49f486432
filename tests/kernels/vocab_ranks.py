"""Cuts a problem of the whole vocabulary over the ranks of a group, and joins their results."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels.problem import Problem, make_problem
from tests.tolerance import relative_error

N, H, V = 7, 16, 37
SIZES = {2: [20, 17], 3: [5, 29, 3]}
"""Columns of each rank, by the number of ranks."""
BORDERS = {2: [0, 19, 20, 36], 3: [0, 4, 5, 33, 34, 36]}
"""Columns beside each border between ranks."""


def sizes_of_ranks() -> list[int]:
    return SIZES[dist.get_world_size()]


def piece(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Return this rank's rows."""
    return tensor.split(sizes)[dist.get_rank()].clone()


def spread(problem: Problem, sizes: list[int], teacher_sizes: list[int] | None) -> Problem:
    """Keep this rank's rows of the student's head, and of the teacher's where it has sizes."""

    def cut(head: dict[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
        return {k: x if k == "hidden" else piece(x, sizes) for k, x in head.items()}

    teacher = problem.teacher
    if teacher is not None and teacher_sizes is not None:
        teacher = cut(teacher, teacher_sizes)
    return replace(problem, student=cut(problem.student, sizes), teacher=teacher)


def joined(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the gradients of all ranks' rows together; check that the rest is the same bits."""
    everyone: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, results)
    joined = {}
    for name, value in results.items():
        each = [other[name] for other in everyone]
        if name in ("dweight", "dbias"):
            joined[name] = torch.cat(each)
        else:
            assert all(torch.equal(value, other) for other in each), f"{name} differs by rank"
            joined[name] = value
    return joined


def solve(problem: Problem, sharded_teacher: bool = True, **options: Any) -> dict[str, Tensor]:
    """Solve a problem of the whole vocabulary over the ranks."""
    sizes = sizes_of_ranks()
    teacher_sizes = None
    if sharded_teacher and problem.teacher is not None:
        last = len(problem.teacher["weight"]) - sum(sizes[:-1])
        teacher_sizes = [*sizes[:-1], last]
    here = spread(problem, sizes, teacher_sizes)
    return joined(here.solve(vocab_group=dist.group.WORLD, **options))


def assert_exact(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error = relative_error(ours[name], value)
        assert error <= 1e-12, f"{name}: {error:.1e}"


def problem_of(**kind: Any) -> Problem:
    return make_problem(N, H, V, **{"objective": {"entropy_coef": 0.1}} | kind)


def temperatures() -> Tensor:
    return torch.linspace(0.4, 2.0, N)
