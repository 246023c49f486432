"""A head sharded over two ranks (FSDP2) gives one process's numbers; each gather happens once."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close

import kdrl_kernels as kk

N, H, H_T = 10, 6, 4
RANK_ROWS = [slice(0, 4), slice(4, N)]
DEADLINE_S = 60
CALLS = ["kdrl_loss", "linear_logprobs", "linear_token_loss"]

Tensors = dict[str, Tensor]


def _tensors(V: int) -> Tensors:
    """Return a whole problem in float64, the same on each rank."""
    rng = torch.Generator().manual_seed(V)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    token_weights = randn(N).abs()
    token_weights[[2, 7]] = 0
    return {
        "hidden": randn(N, H),
        "weight": randn(V, H),
        "bias": randn(V),
        "teacher_hidden": randn(N, H_T),
        "teacher_weight": randn(V + 1, H_T),
        "tokens": torch.randint(V, (N,), generator=rng),
        "advantages": randn(N),
        "token_weights": token_weights,
    }


ROWS = ("hidden", "teacher_hidden", "tokens", "advantages", "token_weights")


def _loss(name: str, tensors: Tensors) -> Tensor:
    """Return this rank's loss: that of its rows, divided by the tokens of all ranks."""
    head = tensors["hidden"], tensors["weight"], tensors["tokens"]
    total = torch.tensor(N - 2.0, dtype=torch.float64)  # tokens of all ranks
    if name == "linear_logprobs":
        out = kk.linear_logprobs(*head, bias=tensors["bias"], entropy=True)
        assert out.entropy is not None
        return -(out.logprobs * tensors["advantages"] + out.entropy.square()).sum() / total
    options: dict[str, Any] = {
        "bias": tensors["bias"],
        "token_weights": tensors["token_weights"],
        "normalizer": total,
        "teacher": kk.TeacherHead(tensors["teacher_hidden"], tensors["teacher_weight"]),
    }
    if name == "linear_token_loss":
        A = tensors["advantages"]
        return kk.linear_token_loss(
            *head, lambda rows: rows.kl - A[rows.index] * rows.logprobs, kl="rkl", **options
        ).loss
    objective = kk.Objective(kd="rkl")
    return kk.kdrl_loss(
        *head, advantages=tensors["advantages"], objective=objective, **options
    ).loss


def _of_this_rank(tensors: Tensors) -> Tensors:
    """Select the rows of this rank."""
    rows = RANK_ROWS[dist.get_rank()]
    return tensors | {name: tensors[name][rows] for name in ROWS}


def _sharded(tensors: Tensors, *names: str) -> Tensors:
    mesh = init_device_mesh("cpu", (2,))
    return tensors | {name: distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in names}


def _summed(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def _full(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient of a DTensor as a plain tensor, after a check of its layout."""
    assert isinstance(gradient, DTensor)
    assert isinstance(like, DTensor)
    assert gradient.placements == like.placements
    assert gradient.to_local().shape == like.to_local().shape
    return gradient.full_tensor()


def _communicated(fn: Callable[[], Any]) -> dict[str, int]:
    """Count how often each collective runs."""
    with CommDebugMode() as comm:
        fn()
    return {str(op).rsplit(".", 1)[-1]: n for op, n in comm.get_comm_counts().items() if n}


def _check_same_as_one_process(name: str, V: int) -> None:
    whole = _tensors(V)
    trained = ("hidden", "weight", "bias")
    for key in trained:
        whole[key].requires_grad_()
    expected = _loss(name, whole)
    expected.backward()

    tensors = _sharded(_of_this_rank(_tensors(V)), "weight", "bias", "teacher_weight")
    for key in trained:
        tensors[key].requires_grad_()
    loss = _loss(name, tensors)
    loss.backward()
    assert_close(_summed(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    for key in ("weight", "bias"):
        full = _full(tensors[key].grad, tensors[key])
        assert_close(full, whole[key].grad, rtol=1e-12, atol=1e-12)
    mine = whole["hidden"].grad
    assert mine is not None
    assert_close(tensors["hidden"].grad, mine[RANK_ROWS[dist.get_rank()]], rtol=1e-12, atol=1e-12)
    assert tensors["teacher_weight"].grad is None


def _check_communication(name: str) -> None:
    """Each sharded tensor is gathered once; each one that is trained is reduce-scattered once."""
    tensors = _sharded(_of_this_rank(_tensors(12)), "weight")
    tensors["weight"].requires_grad_()
    tensors["hidden"].requires_grad_()
    losses: list[Tensor] = []
    forward = _communicated(lambda: losses.append(_loss(name, tensors)))
    assert forward == {"all_gather_into_tensor": 1}, forward
    backward = _communicated(losses[0].backward)
    assert backward == {"reduce_scatter_tensor": 1}, backward

    tensors["weight"].requires_grad_(False)
    both = _communicated(lambda: _loss(name, tensors).backward())
    assert both == {"all_gather_into_tensor": 1}, both


def _check_tied() -> None:
    """The head is the embedding too: its gradient is the sum of both uses."""
    whole = _tensors(12)
    whole["weight"].requires_grad_()
    whole["hidden"] = whole["weight"][whole["tokens"]].tanh()
    expected = _loss("kdrl_loss", whole)
    expected.backward()

    tensors = _sharded(_of_this_rank(_tensors(12)), "weight")
    tensors["weight"].requires_grad_()
    embedding = kk.head.gathered(tensors["weight"])
    tensors["hidden"] = embedding[tensors["tokens"]].tanh()
    loss = _loss("kdrl_loss", tensors)
    loss.backward()
    assert_close(_summed(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    full = _full(tensors["weight"].grad, tensors["weight"])
    assert_close(full, whole["weight"].grad, rtol=1e-12, atol=1e-12)


class _Model(nn.Module):
    """Holds a layer and a head, whose weight forward passes to the loss."""

    def __init__(self, V: int, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(H, H, bias=False, dtype=torch.float64)
        self.head = nn.Parameter(_tensors(V)["weight"])
        self.name = name
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(H) + 0.1)

    def forward(self, tensors: Tensors) -> Tensor:
        hidden = self.layer(tensors["hidden"])
        return _loss(self.name, tensors | {"hidden": hidden, "weight": self.head})


def _check_fully_shard(name: str, V: int) -> None:
    """A module of FSDP2 gathers the parameters itself and averages gradients over the ranks."""
    plain, sharded = _Model(V, name), _Model(V, name)
    expected = plain(_tensors(V))
    expected.backward()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    loss = sharded(_of_this_rank(_tensors(V)))
    (loss * dist.get_world_size()).backward()
    assert_close(_summed(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert_close(_full(ours.grad, ours), theirs.grad, rtol=1e-12, atol=1e-12)
    # the head of a module outside its forward is a DTensor, whose gradient is the sum
    plain.zero_grad()
    sharded.reshard()
    sharded.zero_grad()
    _loss(name, _tensors(V) | {"weight": plain.head}).backward()
    _loss(name, _of_this_rank(_tensors(V)) | {"weight": sharded.head}).backward()
    assert_close(_full(sharded.head.grad, sharded.head), plain.head.grad, rtol=1e-12, atol=1e-12)


def _check_refused(name: str, which: str) -> None:
    tensors = _sharded(_of_this_rank(_tensors(12)), which)
    with pytest.raises(TypeError, match=rf"^{which.replace('_', '.')} must be a plain tensor"):
        _loss(name, tensors)


CASES: dict[str, Callable[[], None]] = {"tied": _check_tied}
for _name in CALLS:
    for _V in (11, 12, 1):
        CASES[f"same-{_name}-V{_V}"] = lambda n=_name, V=_V: _check_same_as_one_process(n, V)
    for _V in (11, 12):
        CASES[f"fully_shard-{_name}-V{_V}"] = lambda n=_name, V=_V: _check_fully_shard(n, V)
    CASES[f"communication-{_name}"] = lambda n=_name: _check_communication(n)
    CASES[f"refused-hidden-{_name}"] = lambda n=_name: _check_refused(n, "hidden")
CASES["refused-teacher_hidden"] = lambda: _check_refused("kdrl_loss", "teacher_hidden")


def _rank(rank: int, folder: Path) -> None:
    """Run every case in this process, and write what failed to a file."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    deadline = timedelta(seconds=DEADLINE_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=deadline)
    for name, check in CASES.items():
        try:
            check()
            outcome = "ok"
        except Exception as error:  # the other rank goes on too
            outcome = f"{type(error).__name__}: {error}"
        (folder / f"{name}-{rank}").write_text(outcome, encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder to which both ranks wrote; end processes that hang."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = torch.multiprocessing.spawn(_rank, (folder,), nprocs=2, join=False)
    end = time.monotonic() + DEADLINE_S
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, f"two ranks took longer than {DEADLINE_S} s"
    finally:
        for process in ranks.processes:
            process.kill()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, outcomes: Path) -> None:
    texts = [(outcomes / f"{case}-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert texts == ["ok", "ok"]
