"""A vocabulary over 2 or 3 ranks gives one process's numbers, the same bits on every rank."""

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import kdrl_kernels as kk
from kdrl_kernels import vocab_shard
from tests.kernels.params import BF16, F16, F32, KDS
from tests.kernels.problem import Problem, assert_solves, make_problem
from tests.tolerance import relative_error

N, H, V = 7, 16, 37
SIZES = {2: [20, 17], 3: [5, 29, 3]}
BORDERS = {2: [0, 19, 20, 36], 3: [0, 4, 5, 33, 34, 36]}
DEADLINE_S = 300


def _sizes() -> list[int]:
    return SIZES[dist.get_world_size()]


def _piece(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Return this rank's rows."""
    return tensor.split(sizes)[dist.get_rank()].clone()


def _spread(problem: Problem, sizes: list[int], teacher_sizes: list[int] | None) -> Problem:
    """Keep this rank's rows of the student's head, and of the teacher's where it has sizes."""

    def cut(head: dict[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
        return {k: x if k == "hidden" else _piece(x, sizes) for k, x in head.items()}

    teacher = problem.teacher
    if teacher is not None and teacher_sizes is not None:
        teacher = cut(teacher, teacher_sizes)
    return replace(problem, student=cut(problem.student, sizes), teacher=teacher)


def _joined(results: dict[str, Tensor]) -> dict[str, Tensor]:
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


def _solve(problem: Problem, sharded_teacher: bool = True, **options: Any) -> dict[str, Tensor]:
    """Solve a problem of the whole vocabulary over the ranks."""
    sizes = _sizes()
    teacher_sizes = None
    if sharded_teacher and problem.teacher is not None:
        last = len(problem.teacher["weight"]) - sum(sizes[:-1])
        teacher_sizes = [*sizes[:-1], last]
    here = _spread(problem, sizes, teacher_sizes)
    return _joined(here.solve(vocab_group=dist.group.WORLD, **options))


def _assert_exact(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error = relative_error(ours[name], value)
        assert error <= 1e-12, f"{name}: {error:.1e}"


def _check_problem(problem: Problem, sharded_teacher: bool = True, **options: Any) -> None:
    problem = problem.map(Tensor.double)
    ours = _solve(problem, sharded_teacher, upstream=3.0, **options)
    _assert_exact(ours, problem.solve(3.0, **options | {"impl": "reference"}))


def _problem(**kind: Any) -> Problem:
    return make_problem(N, H, V, **{"objective": {"entropy_coef": 0.1}} | kind)


def _check_kd(kd: str | None, sharded_teacher: bool) -> None:
    _check_problem(_problem(kd=kd), sharded_teacher)


def _check_options(kd: str, **kind: Any) -> None:
    _check_problem(_problem(kd=kd, **kind), entropy=True)


def _temperatures() -> Tensor:
    return torch.linspace(0.4, 2.0, N)


def _check_borders() -> None:
    """Tokens beside each border between ranks, and a temperature of each row."""
    tokens = torch.tensor((2 * BORDERS[dist.get_world_size()])[:N])
    for kd in ("k2", "rkl"):
        _check_problem(replace(_problem(kd=kd, temperature=_temperatures()), tokens=tokens))


def _check_forbidden(kd: str, rank: int) -> None:
    """A bias of -inf forbids all columns of a rank, in both models, or a few of each rank."""
    problem, sizes = _problem(kd=kd), _sizes()
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
    problem = _problem(kd=kd)
    bias = problem.student["bias"] + 1e4 * (torch.arange(V) >= _sizes()[0])
    _check_problem(replace(problem, student=problem.student | {"bias": bias}))


def _check_same_distribution(kd: str) -> None:
    """A teacher that is the student has a divergence and a gradient of exactly 0."""
    problem = _problem(kd=kd, objective={"policy": "off"}).map(Tensor.float)
    problem = replace(problem, teacher=dict(problem.student))
    for impl in ("torch", "triton"):
        results = _solve(problem, impl=impl)
        assert not results["kl"].any()
        assert all(not results[f"d{name}"].any() for name in problem.student)


def _check_masked(everything: bool) -> None:
    problem = _problem(kd="rkl").map(Tensor.double)
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
    problem = _problem(kd="k2", objective={"clip_low": 0.0, "clip_high": 0.0, "kd_coef": 0.0})
    problem = problem.map(Tensor.double)
    for compact in (True, False):
        here = _spread(problem, _sizes(), _sizes())
        out = here.solve(compact=compact, workspace_bytes=8_000, vocab_group=dist.group.WORLD)
        _assert_exact(_joined(out), problem.solve(impl="reference"))


def _check_no_rows() -> None:
    _check_problem(make_problem(0, H, V, kd="jsd", normalizer=1.0))


def _check_batches() -> None:
    """Hidden states [B, T, H], a frozen head, then a frozen backbone."""
    problem = _problem(kd=None, off_policy=False).map(Tensor.double)
    exact = problem.solve(impl="reference")
    for trained in ("hidden", "weight"):
        here = _spread(problem, _sizes(), None).student
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
        results = _joined({"loss": out.loss.detach(), f"d{trained}": gradient})
        _assert_exact(results, {name: exact[name] for name in results})


def _check_dtype(impl: str, dtype: torch.dtype, kd: str | None) -> None:
    problem = _problem(kd=kd, dtype=dtype, temperature=0.7)
    assert_solves(problem, _solve(problem, impl=impl))


def _check_two_runs() -> None:
    for kd in ("jsd", "k2"):
        problem = _problem(kd=kd, dtype=F32)
        first, second = _solve(problem), _solve(problem)
        assert all(torch.equal(first[name], second[name]) for name in first)


def _token_loss(rows: kk.Rows) -> Tensor:
    """Read every number of a row that carries a gradient."""
    assert rows.kl is not None
    assert rows.entropy is not None
    assert rows.lse is not None
    assert rows.forward_kl is not None
    value = rows.kl + rows.forward_kl.square() - rows.logprobs.exp() + 0.1 * rows.lse.square()
    return value - rows.entropy.sin()


def _caller_results(problem: Problem, **options: Any) -> dict[str, Tensor]:
    student = {k: x.clone().requires_grad_() for k, x in problem.student.items()}
    assert problem.teacher is not None
    out = kk.linear_token_loss(
        student["hidden"],
        student["weight"],
        problem.tokens,
        _token_loss,
        bias=student["bias"],
        teacher=kk.TeacherHead(**problem.teacher),
        kl="rkl+fkl",
        entropy=True,
        lse=True,
        token_weights=problem.options["token_weights"],
        **options,
    )
    out.loss.backward()
    names = ("logprobs", "teacher_logprobs", "kl", "forward_kl", "entropy", "lse")
    results = {name: getattr(out, name) for name in names} | {"loss": out.loss.detach()}
    return results | {f"d{name}": x.grad for name, x in student.items()}


def _check_token_loss(**options: Any) -> None:
    problem = _problem(kd="k2", off_policy=False).map(Tensor.double)
    here = _spread(problem, _sizes(), _sizes())
    ours = _caller_results(here, vocab_group=dist.group.WORLD, **options)
    _assert_exact(_joined(ours), _caller_results(problem, impl="reference", **options))


def _check_logit_loss() -> None:
    """A loss of z_y alone has no gradient in the columns of other ranks, but rows of its own."""
    problem = _problem(kd=None).map(Tensor.double)

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

    ours, rows = results(_spread(problem, _sizes(), None), vocab_group=dist.group.WORLD)
    exact, exact_rows = results(problem, impl="reference")
    _assert_exact(_joined(ours), exact)
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
        temperature=_temperatures().to(student["hidden"].dtype),
        entropy=True,
        **options,
    )
    assert out.entropy is not None
    (out.logprobs.exp() * torch.arange(N) + out.entropy.sin()).sum().backward()
    results = {"logprobs": out.logprobs.detach(), "entropy": out.entropy.detach()}
    return results | {f"d{name}": x.grad for name, x in student.items()}


def _check_logprobs(**options: Any) -> None:
    problem = _problem(kd=None).map(Tensor.double)
    here = _spread(problem, _sizes(), None)
    ours = _joined(_scores(here, vocab_group=dist.group.WORLD, **options))
    _assert_exact(ours, _scores(problem, impl="reference", **options))


def _check_same_logprobs() -> None:
    """linear_logprobs and kdrl_loss give the same bits: the ratio on-policy is exactly 1."""
    problem = _problem(kd=None, dtype=F32)
    here = _spread(problem, _sizes(), None)
    head = here.student["hidden"], here.student["weight"], problem.tokens
    options = {"bias": here.student["bias"], "vocab_group": dist.group.WORLD}
    scores = kk.linear_logprobs(*head, **options)
    out = kk.kdrl_loss(*head, **here.options, **options)
    assert torch.equal(out.logprobs, scores.logprobs)


def _check_traffic() -> None:
    """Between ranks go some numbers of each row, and dX once: no logits."""
    problem = _spread(_problem(kd="rkl", dtype=F32), _sizes(), _sizes())
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
    problem = _problem(kd=None, bias=False).map(Tensor.double)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(problem.student["weight"], mesh, [Shard(0)]))
    head = problem.student["hidden"], problem.tokens

    def loss(weight: Tensor) -> Tensor:
        options = {**problem.options, "vocab_group": mesh.get_group()}
        return kk.kdrl_loss(head[0], weight, head[1], **options).loss

    with pytest.raises(TypeError, match=r"^weight must be a plain tensor .* weight.to_local\(\)"):
        loss(weight)
    loss(weight.to_local()).backward()
    assert weight.grad is not None
    exact = problem.solve(impl="reference")["dweight"]
    assert relative_error(weight.grad.full_tensor(), exact) <= 1e-12


def _check_compiled() -> None:
    problem = _problem(kd=None).map(Tensor.double)
    here = _spread(problem, _sizes(), None)
    weight = here.student["weight"].clone().requires_grad_()

    @torch.compile(backend="eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"bias": here.student["bias"], "vocab_group": dist.group.WORLD}
        return 2 * kk.kdrl_loss(hidden + 0, weight, here.tokens, **here.options, **options).loss

    value = loss(here.student["hidden"], weight)
    value.backward()
    exact = problem.solve(2.0, impl="reference")
    ours = _joined({"loss": value.detach(), "dweight": weight.grad})
    _assert_exact(ours, {"loss": 2 * exact["loss"], "dweight": exact["dweight"]})


def _raises(kind: type[Exception], message: str, **changes: Any) -> None:
    """A call with changed arguments raises on this rank."""
    problem = changes.pop("problem", None) or _problem(kd="rkl")
    if changes.pop("spread", True):
        problem = _spread(problem, changes.pop("sizes", _sizes()), changes.pop("t_sizes", None))
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
    problem = _problem(kd=None)
    _solve(problem)  # the ranks still meet


def _check_differences() -> None:
    """What must be the same on all ranks raises on all where it is not."""
    first = dist.get_rank() == 0
    problem = _problem(kd=None, seed=0)
    fewer = make_problem(N - 1, H, V, kd=None, objective={"entropy_coef": 0.1})
    _raises(ValueError, r"^hidden must have the same number", problem=problem if first else fewer)
    weights = torch.ones(N) if first else torch.eye(N)[0]
    _raises(ValueError, r"^token_weights must be non-zero in the same", token_weights=weights)
    _raises(ValueError, r"^vocab_size must be the same", vocab_size=30 if first else None)
    for change in ({"entropy": first}, {"softcap": 9.0 if first else 8.0}, {"compact": first}):
        _raises(ValueError, r"^options, .* must be the same on all ranks", **change)
    _raises(
        ValueError, r"^options", objective=kk.Objective(kd="rkl", kd_coef=1.0 if first else 2.0)
    )


def _check_refused() -> None:
    sizes = _sizes()
    _raises(TypeError, r"^vocab_group must be a torch.distributed ProcessGroup", vocab_group="all")
    alone = dist.new_group([0])
    if dist.get_rank():
        _raises(TypeError, r"^vocab_group must be", vocab_group=alone)
    _raises(ValueError, r"^backward must be", backward="sketch")
    _raises(ValueError, r"^impl must be 'torch' or 'triton' with", impl="reference")
    _raises(ValueError, r"^truncation must be None with", truncation=kk.Truncation(top_k=3))
    _raises(ValueError, r"^vocab_size must leave each rank", vocab_size=sizes[0])
    _raises(ValueError, r"^vocab_size must be in \[1, 37\], got 38", vocab_size=38)
    uneven = [V - 2 * (len(sizes) - 1)] + [2] * (len(sizes) - 1)
    _raises(ValueError, r"^teacher.weight must be whole, or have as many rows", t_sizes=uneven)
    bad = replace(_problem(kd="rkl"), tokens=torch.full((N,), V))
    _raises(ValueError, r"^tokens must be in \[0, vocab_size\) with vocab_size = 37", problem=bad)


CASES: dict[str, Callable[[], None]] = {
    "borders": _check_borders,
    "masked": lambda: _check_masked(False),
    "all-masked": lambda: _check_masked(True),
    "chunks-and-rows-left-out": _check_chunks_and_rows_left_out,
    "no-rows": _check_no_rows,
    "batches": _check_batches,
    "two-runs": _check_two_runs,
    "token-loss": _check_token_loss,
    "token-loss-capped": lambda: _check_token_loss(softcap=3.0, temperature=_temperatures()),
    "logit-loss": _check_logit_loss,
    "logprobs": _check_logprobs,
    "logprobs-capped": lambda: _check_logprobs(softcap=2.0, workspace_bytes=5_000),
    "logprobs-cached": lambda: _check_logprobs(cache_bytes=1 << 20),
    "same-logprobs": _check_same_logprobs,
    "traffic": _check_traffic,
    "dtensor": _check_dtensor,
    "compiled": _check_compiled,
    "one-rank-refuses": _check_one_rank_refuses,
    "differences": _check_differences,
    "refused": _check_refused,
    "baseline": lambda: _check_options("k2", objective={"kd_baseline": "kl"}),
    "server": lambda: _check_options("k2", server=True),
    "far-jsd": lambda: _check_far("jsd"),
}
for _kd, _sharded in itertools.product(KDS, (True, False)):
    CASES[f"{_kd}-{'sharded' if _sharded else 'whole'}"] = lambda k=_kd, s=_sharded: _check_kd(k, s)
for _kd in ("k2", "rkl", "fkl", "jsd"):
    CASES[f"capped-{_kd}"] = lambda k=_kd: _check_options(
        k, softcap=3.0, temperature=_temperatures(), teacher_options={"softcap": 2.0}
    )
    CASES[f"shorter-teacher-{_kd}"] = lambda k=_kd: _check_options(k, V_t=V - 1)
    CASES[f"longer-teacher-{_kd}"] = lambda k=_kd: _check_options(k, V_t=V + 5)
    for _rank in (-1, 0, 1):
        CASES[f"forbidden-{_kd}-{_rank}"] = lambda k=_kd, r=_rank: _check_forbidden(k, r)
for _kd in ("rkl", "fkl", "jsd"):
    CASES[f"same-distribution-{_kd}"] = lambda k=_kd: _check_same_distribution(k)
for _dtype, _kd in itertools.product((F32, F16, BF16), (None, "k2", "rkl", "fkl", "jsd")):
    _id = f"torch-{str(_dtype).removeprefix('torch.')}-{_kd}"
    CASES[_id] = lambda d=_dtype, k=_kd: _check_dtype("torch", d, k)
for _dtype, _kd in [(F32, "k2"), (F32, "rkl"), (F32, "fkl"), (F32, "jsd"), (F16, "rkl")]:
    _id = f"triton-{str(_dtype).removeprefix('torch.')}-{_kd}"
    CASES[_id] = lambda d=_dtype, k=_kd: _check_dtype("triton", d, k)


def _rank(rank: int, folder: Path, world_size: int) -> None:
    """Run every case in this process, and write what failed to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = f"file://{folder / 'store'}"
    deadline = timedelta(seconds=DEADLINE_S)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=deadline
    )
    for name, check in CASES.items():
        try:
            check()
            outcome = "ok"
        except Exception as error:  # the other ranks go on too
            outcome = f"{type(error).__name__}: {error}"
        (folder / f"{name}-{rank}").write_text(outcome, encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES, ids="{} ranks".format)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """Return the folder to which all ranks wrote, and their number; end processes that hang."""
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    ranks = torch.multiprocessing.spawn(
        _rank, (folder, request.param), nprocs=request.param, join=False
    )
    end = time.monotonic() + DEADLINE_S
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, f"the ranks took longer than {DEADLINE_S} s"
    finally:
        for process in ranks.processes:
            process.kill()
    return folder, request.param


@pytest.mark.parametrize("case", CASES)
def test_ranks(case: str, outcomes: tuple[Path, int]) -> None:
    folder, ranks = outcomes
    texts = [(folder / f"{case}-{rank}").read_text(encoding="utf-8") for rank in range(ranks)]
    assert texts == ["ok"] * ranks
