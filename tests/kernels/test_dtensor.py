"""A head on two ranks (FSDP2, FSDP1, DDP, tensor parallelism) gives one process's numbers.

One recipe for all: normalizer = tokens of all ranks / ranks that hold different rows. Then the mean
of the ranks' losses and gradients is that of one process.
"""

import itertools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import kdrl_kernels as kk
from kdrl_kernels.head import gathered
from tests.tolerance import relative_error

N, H, H_T = 10, 6, 4
RANK_ROWS = [slice(0, 4), slice(4, N)]
DEADLINE_S = 60
CALLS = ["kdrl_loss", "linear_logprobs", "linear_token_loss"]
SKETCHES = {
    "sketched": kk.Sketch(threshold=0.2, seed=1, flat=math.inf),
    # rows of |coefficient| > 0.5 are flat: of one block of columns, threshold 1 / |coefficient|
    "partly sketched": kk.Sketch(threshold=1, seed=1, flat=0.5 * 64 / 12),
}

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
        "numbers": torch.arange(N) + 5,
    }


ROWS = ("hidden", "teacher_hidden", "tokens", "advantages", "token_weights", "numbers")


def _loss(name: str, tensors: Tensors, ranks: int = 1) -> Tensor:
    """Return this rank's loss: that of its rows, divided by the tokens of all ranks / ranks."""
    head = tensors["hidden"], tensors["weight"], tensors["tokens"]
    total = torch.tensor((N - 2.0) / ranks, dtype=torch.float64)
    backward: dict[str, Any] = {}
    *kind, name = name.rsplit(" ", 1)
    if kind:
        sketch = replace(SKETCHES[kind[0]], rows=tensors["numbers"])
        backward = {"backward": "sketch", "sketch": sketch}
    if name == "linear_logprobs":
        out = kk.linear_logprobs(*head, bias=tensors["bias"], entropy=True, **backward)
        assert out.entropy is not None
        return -(out.logprobs * tensors["advantages"] + out.entropy.square()).sum() / total
    options: dict[str, Any] = {
        "bias": tensors["bias"],
        "token_weights": tensors["token_weights"],
        "normalizer": total,
        "teacher": kk.TeacherHead(tensors["teacher_hidden"], tensors["teacher_weight"]),
        **backward,
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


def _averaged(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / 2


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
    loss = _loss(name, tensors, ranks=2)
    loss.backward()
    assert_close(_averaged(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    for key in ("weight", "bias"):
        full = _full(tensors[key].grad, tensors[key])
        assert_close(full, whole[key].grad, rtol=1e-12, atol=1e-12)
    mine = whole["hidden"].grad
    assert mine is not None
    # the loss of this rank alone: the backbone's wrapper divides by the ranks when it averages
    expected_rows = 2 * mine[RANK_ROWS[dist.get_rank()]]
    assert_close(tensors["hidden"].grad, expected_rows, rtol=1e-12, atol=1e-12)
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


class _Model(nn.Module):
    """Holds an embedding, a layer and a head, whose weight goes to the loss: in forward or outside.

    tied: the head is the embedding. The rest is float64 noise, so that each weight matters.
    """

    def __init__(self, V: int, tied: bool) -> None:
        super().__init__()
        weight = _tensors(V)["weight"]
        self.embedding = nn.Embedding(V, H, dtype=torch.float64)
        self.layer = nn.Linear(H, H, bias=False, dtype=torch.float64)
        self.head = nn.Linear(H, V, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.embedding.weight.copy_(weight.flip(0))
            self.layer.weight.copy_(torch.eye(H) + 0.1)
            self.head.weight.copy_(weight)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, name: str, tensors: Tensors, ranks: int, inside: bool) -> Tensor:
        hidden = self.layer(self.embedding(tensors["tokens"]).tanh())
        return self.loss(name, tensors, hidden, ranks) if inside else hidden

    def loss(self, name: str, tensors: Tensors, hidden: Tensor, ranks: int) -> Tensor:
        dtype = hidden.dtype
        cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
        return _loss(name, cast | {"hidden": hidden, "weight": self.head.weight}, ranks)


Wrap = Callable[[_Model], nn.Module]


def _fsdp2(own_group: bool, mesh: tuple[int, ...] = (2,), **options: Any) -> Wrap:
    def wrap(model: _Model) -> nn.Module:
        device_mesh = init_device_mesh(
            "cpu", mesh, mesh_dim_names=("copies", "shards")[-len(mesh) :]
        )
        groups = [model.layer, *([model.head] if own_group else []), model]
        for module in groups:
            fully_shard(module, mesh=device_mesh, **options)
        return model

    return wrap


def _fsdp1(model: _Model) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def _whole(name: str, parameter: nn.Parameter) -> Tensor:
    """Return the whole gradient of a parameter of any wrapper."""
    gradient = parameter.grad
    assert gradient is not None, name
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _check_model(
    wrap: Wrap, *, name: str = "kdrl_loss", tied: bool = False, inside: bool, V: int = 12
) -> None:
    """Every gradient is that of one process: head, layer and embedding, twice to see it add up."""
    plain, model = _Model(V, tied), _Model(V, tied)
    expected = plain(name, _tensors(V), 1, inside=True)
    (2 * expected).backward()
    wrapped = wrap(model)
    for _ in range(2):
        tensors = _of_this_rank(_tensors(V))
        loss = wrapped(name, tensors, 2, inside)
        if not inside:
            loss = model.loss(name, tensors, loss, 2)
        loss.backward()
    assert_close(_averaged(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    full = FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True)
    with full if isinstance(wrapped, FullyShardedDataParallel) else nullcontext():
        ours = dict(model.named_parameters())
        for key, theirs in plain.named_parameters():
            grad = theirs.grad
            assert_close(_whole(key, ours[key]), grad, rtol=1e-12, atol=1e-12, msg=f"{key}")


def _check_mixed(own_group: bool, inside: bool, tied: bool) -> None:
    """float32 shards that compute in bfloat16: as near to float64 as plain bfloat16 is, times 2."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    V = 12

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = _Model(V, tied).to(dtype)
        model("kdrl_loss", _tensors(V), 1, inside=True).backward()
        return {key: _whole(key, p).double() for key, p in model.named_parameters()}

    model = _Model(V, tied).float()
    _fsdp2(own_group, mp_policy=precision)(model)
    tensors = _of_this_rank(_tensors(V))
    loss = model("kdrl_loss", tensors, 2, inside)
    if not inside:
        loss = model.loss("kdrl_loss", tensors, loss, 2)
    loss.backward()
    exact, plain = gradients(torch.float64), gradients(torch.bfloat16)
    for key, parameter in model.named_parameters():
        ours = _whole(key, parameter)
        assert ours.dtype == torch.float32
        error, budget = (relative_error(x, exact[key]) for x in (ours, plain[key]))
        # either rounds every number to 8 bits; a factor of 2 would be an error of 0.5 or more
        assert error <= 2 * budget + torch.finfo(torch.bfloat16).eps, (key, error, budget)


def _check_tensor_parallel(name: str) -> None:
    """The ranks of tensor parallelism have the same rows: the gradient is that of one of them."""
    whole = _tensors(12)
    whole["weight"].requires_grad_()
    expected = _loss(name, whole)
    expected.backward()
    tensors = _sharded(_tensors(12), "weight")
    tensors["weight"].requires_grad_()
    loss = _loss(name, tensors)
    loss.backward()
    assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    full = _full(tensors["weight"].grad, tensors["weight"])
    assert_close(full, whole["weight"].grad, rtol=1e-12, atol=1e-12)


def _check_two_dimensions(data: int) -> None:
    """FSDP2 over `data` ranks of a head that tensor parallelism has cut over the others."""
    plain, model = _Model(12, tied=False), _Model(12, tied=False)
    plain("kdrl_loss", _tensors(12), 1, inside=True).backward()
    mesh = init_device_mesh("cpu", (data, 2 // data), mesh_dim_names=("data", "tensor"))
    cut = distribute_tensor(model.head.weight, mesh["tensor"], [Shard(0)])
    model.head.weight = nn.Parameter(cut)
    fully_shard(model.head, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    tensors = _of_this_rank(_tensors(12)) if data == 2 else _tensors(12)
    model("kdrl_loss", tensors, data, inside=True).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(_whole("", ours), theirs.grad, rtol=1e-12, atol=1e-12)


def _check_mean_of_16_bits() -> None:
    """Shards of float32 average a bfloat16 gradient in float32: 1 + 2^-8 is not rounded to 1."""
    weight = _sharded({"weight": torch.zeros(2, 1)}, "weight")["weight"].requires_grad_()
    whole = gathered(weight, torch.empty(0, 1, dtype=torch.bfloat16))
    assert whole.dtype == torch.bfloat16
    whole.backward(
        torch.tensor([[2.0], [2.0]] if dist.get_rank() else [[2**-7], [2**-7]]).bfloat16()
    )
    assert _full(weight.grad, weight).tolist() == [[1 + 2**-8], [1 + 2**-8]]


def _check_freed() -> None:
    """A weight that was kept from a forward pass is freed: refused, and not read."""
    model = _Model(12, tied=False)
    _fsdp2(own_group=True)(model)
    kept: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, _: kept.append(module.weight))
    model("kdrl_loss", _of_this_rank(_tensors(12)), 2, inside=False)  # makes `model` the root
    model.head(torch.zeros(1, H, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^weight must be in memory, got one that FSDP has freed"):
        _loss("kdrl_loss", _of_this_rank(_tensors(12)) | {"weight": kept[0]}, 2)
    model = _Model(12, tied=False)
    _fsdp1(model)  # its weight is a shard now, flat
    with pytest.raises(ValueError, match=r"^weight must be \[V, H\], .* of a shard of FSDP1, call"):
        _loss("kdrl_loss", _of_this_rank(_tensors(12)) | {"weight": model.head.weight}, 2)


def _check_refused(name: str, which: str) -> None:
    tensors = _sharded(_of_this_rank(_tensors(12)), which)
    with pytest.raises(TypeError, match=rf"^{which.replace('_', '.')} must be a plain tensor"):
        _loss(name, tensors)


CASES: dict[str, Callable[[], None]] = {
    "mean-of-16-bits": _check_mean_of_16_bits,
    "freed": _check_freed,
    "fsdp1-inside": lambda: _check_model(_fsdp1, inside=True),
    "fsdp1-inside-tied": lambda: _check_model(_fsdp1, inside=True, tied=True),
    "ddp-inside": lambda: _check_model(DistributedDataParallel, inside=True),
    "ddp-outside-tied": lambda: _check_model(DistributedDataParallel, inside=False, tied=True),
    "hybrid": lambda: _check_model(_fsdp2(own_group=True, mesh=(2, 1)), inside=False),
    "resharded-tied": lambda: _check_model(
        _fsdp2(own_group=False, reshard_after_forward=True), inside=False, tied=True
    ),
    "data-and-tensor": lambda: _check_two_dimensions(2),
    "tensor-and-data": lambda: _check_two_dimensions(1),
}
for _group, _inside, _tied in itertools.product((False, True), repeat=3):
    if not (_group and _tied):  # FSDP2 keeps tied weights in one group
        _id = f"{'own' if _group else 'root'}-{'inside' if _inside else 'outside'}-tied{_tied}"
        CASES[f"fsdp2-{_id}"] = lambda group=_group, inside=_inside, tied=_tied: _check_model(
            _fsdp2(group), inside=inside, tied=tied
        )
        CASES[f"mixed-{_id}"] = lambda a=_group, b=_inside, c=_tied: _check_mixed(a, b, c)
for _name in CALLS:
    for _V in (11, 12, 1):
        CASES[f"same-{_name}-V{_V}"] = lambda n=_name, V=_V: _check_same_as_one_process(n, V)
    CASES[f"own-group-{_name}"] = lambda n=_name: _check_model(
        _fsdp2(own_group=True), name=n, inside=False, V=11
    )
    CASES[f"tensor-parallel-{_name}"] = lambda n=_name: _check_tensor_parallel(n)
    CASES[f"communication-{_name}"] = lambda n=_name: _check_communication(n)
    CASES[f"refused-hidden-{_name}"] = lambda n=_name: _check_refused(n, "hidden")
for _kind, _call in itertools.product(SKETCHES, CALLS):
    _name = f"{_kind} {_call}"
    CASES[f"same-{_name}"] = lambda n=_name: _check_same_as_one_process(n, 12)
CASES["communication-sketched"] = lambda: _check_communication("partly sketched kdrl_loss")
CASES["fsdp2-sketched-tied"] = lambda: _check_model(
    _fsdp2(own_group=False), name="partly sketched kdrl_loss", inside=True, tied=True
)
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
