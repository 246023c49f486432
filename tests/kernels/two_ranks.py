"""Makes a problem whose rows lie on two ranks, and a model of its head under each wrapper."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import kdrl_kernels as kk
from kdrl_kernels.sketch import COLUMNS_PER_ENTRY

N, H, H_T = 10, 6, 4
RANK_ROWS = [slice(0, 4), slice(4, N)]
ROWS = ("hidden", "teacher_hidden", "tokens", "advantages", "token_weights", "numbers")
SKETCHES = {
    "sketched": kk.Sketch(threshold=0.2, seed=1, flat=math.inf),
    # rows of |coefficient| > 0.5 are flat: they have min(1, |coefficient|) entries of 12 columns
    "partly sketched": kk.Sketch(threshold=1, seed=1, flat=0.5 * COLUMNS_PER_ENTRY["cpu"] / 12),
}

Tensors = dict[str, Tensor]


def whole_tensors(V: int) -> Tensors:
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


def with_adapter(tensors: Tensors) -> Tensors:
    """Add the two matrices of an adapter of rank 3."""
    V, rng = len(tensors["weight"]), torch.Generator().manual_seed(3)
    A, B = torch.randn(3 * H, generator=rng), torch.randn(3 * V, generator=rng)
    return tensors | {"A": A.double().view(3, H), "B": B.double().view(V, 3)}


def loss_of(name: str, tensors: Tensors, ranks: int = 1) -> Tensor:
    """Return this rank's loss: that of its rows, divided by the tokens of all ranks / ranks."""
    head = tensors["hidden"], tensors["weight"], tensors["tokens"]
    adapter = kk.LowRank(tensors["A"], tensors["B"], 0.7) if "A" in tensors else None
    total = torch.tensor((N - 2.0) / ranks, dtype=torch.float64)
    more: dict[str, Any] = {"adapter": adapter}
    *kind, name = name.rsplit(" ", 1)
    if kind:
        sketch = replace(SKETCHES[kind[0]], rows=tensors["numbers"])
        more |= {"backward": "sketch", "sketch": sketch}
    if name == "linear_logprobs":
        out = kk.linear_logprobs(*head, bias=tensors["bias"], entropy=True, **more)
        assert out.entropy is not None
        return -(out.logprobs * tensors["advantages"] + out.entropy.square()).sum() / total
    options: dict[str, Any] = {
        "bias": tensors["bias"],
        "token_weights": tensors["token_weights"],
        "normalizer": total,
        "teacher": kk.TeacherHead(tensors["teacher_hidden"], tensors["teacher_weight"]),
        **more,
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


def of_this_rank(tensors: Tensors) -> Tensors:
    """Select the rows of this rank."""
    rows = RANK_ROWS[dist.get_rank()]
    return tensors | {name: tensors[name][rows] for name in ROWS}


def sharded(tensors: Tensors, *names: str) -> Tensors:
    mesh = init_device_mesh("cpu", (2,))
    return tensors | {name: distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in names}


def averaged(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / 2


def full_gradient(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient of a DTensor as a plain tensor, after a check of its layout."""
    assert isinstance(gradient, DTensor)
    assert isinstance(like, DTensor)
    assert gradient.placements == like.placements
    assert gradient.to_local().shape == like.to_local().shape
    return gradient.full_tensor()


class HeadModel(nn.Module):
    """Holds an embedding, a layer and a head, whose weight goes to the loss: in forward or outside.

    tied: the head is the embedding. The rest is float64 noise, so that each weight matters.
    """

    def __init__(self, V: int, tied: bool) -> None:
        super().__init__()
        weight = whole_tensors(V)["weight"]
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
        return loss_of(name, cast | {"hidden": hidden, "weight": self.head.weight}, ranks)


Wrap = Callable[[HeadModel], nn.Module]


def fsdp2(own_group: bool, mesh: tuple[int, ...] = (2,), **options: Any) -> Wrap:
    def wrap(model: HeadModel) -> nn.Module:
        device_mesh = init_device_mesh(
            "cpu", mesh, mesh_dim_names=("copies", "shards")[-len(mesh) :]
        )
        groups = [model.layer, *([model.head] if own_group else []), model]
        for module in groups:
            fully_shard(module, mesh=device_mesh, **options)
        return model

    return wrap


def fsdp1(model: HeadModel) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def whole_gradient(name: str, parameter: nn.Parameter) -> Tensor:
    """Return the whole gradient of a parameter of any wrapper."""
    gradient = parameter.grad
    assert gradient is not None, name
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
