"""A head on two ranks (FSDP2, FSDP1, DDP, tensor parallelism) gives one process's numbers.

One recipe for all: normalizer = tokens of all ranks / ranks that hold different rows. Then the mean
of the ranks' losses and gradients is that of one process.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import kdrl_kernels as kk
from kdrl_kernels.head import gathered
from tests.kernels.rank_cases import assert_ok, run_cases
from tests.kernels.two_ranks import (
    RANK_ROWS,
    SKETCHES,
    H,
    HeadModel,
    Wrap,
    averaged,
    fsdp1,
    fsdp2,
    full_gradient,
    loss_of,
    of_this_rank,
    sharded,
    whole_gradient,
    whole_tensors,
    with_adapter,
)
from tests.tolerance import relative_error

DEADLINE_S = 60
CALLS = ["kdrl_loss", "linear_logprobs", "linear_token_loss"]


def _communicated(fn: Callable[[], Any]) -> dict[str, int]:
    """Count how often each collective runs."""
    with CommDebugMode() as comm:
        fn()
    return {str(op).rsplit(".", 1)[-1]: n for op, n in comm.get_comm_counts().items() if n}


def _check_same_as_one_process(name: str, V: int, adapter: bool = False) -> None:
    make = (lambda V: with_adapter(whole_tensors(V))) if adapter else whole_tensors
    whole, head = make(V), ("A", "B", "bias") if adapter else ("weight", "bias")
    trained = ("hidden", *head)
    for key in trained:
        whole[key].requires_grad_()
    expected = loss_of(name, whole)
    expected.backward()

    tensors = sharded(of_this_rank(make(V)), *sorted({"weight", "teacher_weight", *head}))
    for key in trained:
        tensors[key].requires_grad_()
    loss = loss_of(name, tensors, ranks=2)
    loss.backward()
    assert_close(averaged(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    for key in head:
        full = full_gradient(tensors[key].grad, tensors[key])
        assert_close(full, whole[key].grad, rtol=1e-12, atol=1e-12)
    mine = whole["hidden"].grad
    assert mine is not None
    # the loss of this rank alone: the backbone's wrapper divides by the ranks when it averages
    expected_rows = 2 * mine[RANK_ROWS[dist.get_rank()]]
    assert_close(tensors["hidden"].grad, expected_rows, rtol=1e-12, atol=1e-12)
    assert tensors["teacher_weight"].grad is None


def _check_communication(name: str) -> None:
    """Each sharded tensor is gathered once; each one that is trained is reduce-scattered once."""
    tensors = sharded(of_this_rank(whole_tensors(12)), "weight")
    tensors["weight"].requires_grad_()
    tensors["hidden"].requires_grad_()
    losses: list[Tensor] = []
    forward = _communicated(lambda: losses.append(loss_of(name, tensors)))
    assert forward == {"all_gather_into_tensor": 1}, forward
    backward = _communicated(losses[0].backward)
    assert backward == {"reduce_scatter_tensor": 1}, backward

    tensors["weight"].requires_grad_(False)
    both = _communicated(lambda: loss_of(name, tensors).backward())
    assert both == {"all_gather_into_tensor": 1}, both


def _check_model(
    wrap: Wrap, *, name: str = "kdrl_loss", tied: bool = False, inside: bool, V: int = 12
) -> None:
    """Every gradient is that of one process: head, layer and embedding, twice to see it add up."""
    plain, model = HeadModel(V, tied), HeadModel(V, tied)
    expected = plain(name, whole_tensors(V), 1, inside=True)
    (2 * expected).backward()
    wrapped = wrap(model)
    for _ in range(2):
        tensors = of_this_rank(whole_tensors(V))
        loss = wrapped(name, tensors, 2, inside)
        if not inside:
            loss = model.loss(name, tensors, loss, 2)
        loss.backward()
    assert_close(averaged(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    full = FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True)
    with full if isinstance(wrapped, FullyShardedDataParallel) else nullcontext():
        ours = dict(model.named_parameters())
        for key, theirs in plain.named_parameters():
            grad = theirs.grad
            assert_close(whole_gradient(key, ours[key]), grad, rtol=1e-12, atol=1e-12, msg=f"{key}")


def _check_mixed(own_group: bool, inside: bool, tied: bool) -> None:
    """float32 shards that compute in bfloat16: as near to float64 as plain bfloat16 is, times 2."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    V = 12

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = HeadModel(V, tied).to(dtype)
        model("kdrl_loss", whole_tensors(V), 1, inside=True).backward()
        return {key: whole_gradient(key, p).double() for key, p in model.named_parameters()}

    model = HeadModel(V, tied).float()
    fsdp2(own_group, mp_policy=precision)(model)
    tensors = of_this_rank(whole_tensors(V))
    loss = model("kdrl_loss", tensors, 2, inside)
    if not inside:
        loss = model.loss("kdrl_loss", tensors, loss, 2)
    loss.backward()
    exact, plain = gradients(torch.float64), gradients(torch.bfloat16)
    for key, parameter in model.named_parameters():
        ours = whole_gradient(key, parameter)
        assert ours.dtype == torch.float32
        error, budget = (relative_error(x, exact[key]) for x in (ours, plain[key]))
        # either rounds every number to 8 bits; a factor of 2 would be an error of 0.5 or more
        assert error <= 2 * budget + torch.finfo(torch.bfloat16).eps, (key, error, budget)


def _check_tensor_parallel(name: str) -> None:
    """The ranks of tensor parallelism have the same rows: the gradient is that of one of them."""
    whole = whole_tensors(12)
    whole["weight"].requires_grad_()
    expected = loss_of(name, whole)
    expected.backward()
    tensors = sharded(whole_tensors(12), "weight")
    tensors["weight"].requires_grad_()
    loss = loss_of(name, tensors)
    loss.backward()
    assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    full = full_gradient(tensors["weight"].grad, tensors["weight"])
    assert_close(full, whole["weight"].grad, rtol=1e-12, atol=1e-12)


def _check_two_dimensions(data: int) -> None:
    """FSDP2 over `data` ranks of a head that tensor parallelism has cut over the others."""
    plain, model = HeadModel(12, tied=False), HeadModel(12, tied=False)
    plain("kdrl_loss", whole_tensors(12), 1, inside=True).backward()
    mesh = init_device_mesh("cpu", (data, 2 // data), mesh_dim_names=("data", "tensor"))
    cut = distribute_tensor(model.head.weight, mesh["tensor"], [Shard(0)])
    model.head.weight = nn.Parameter(cut)
    fully_shard(model.head, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    tensors = of_this_rank(whole_tensors(12)) if data == 2 else whole_tensors(12)
    model("kdrl_loss", tensors, data, inside=True).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(whole_gradient("", ours), theirs.grad, rtol=1e-12, atol=1e-12)


def _check_mean_of_16_bits() -> None:
    """Shards of float32 average a bfloat16 gradient in float32: 1 + 2^-8 is not rounded to 1."""
    weight = sharded({"weight": torch.zeros(2, 1)}, "weight")["weight"].requires_grad_()
    whole = gathered(weight, torch.empty(0, 1, dtype=torch.bfloat16))
    assert whole.dtype == torch.bfloat16
    whole.backward(
        torch.tensor([[2.0], [2.0]] if dist.get_rank() else [[2**-7], [2**-7]]).bfloat16()
    )
    assert full_gradient(weight.grad, weight).tolist() == [[1 + 2**-8], [1 + 2**-8]]


def _check_freed() -> None:
    """A weight that was kept from a forward pass is freed: refused, and not read."""
    model = HeadModel(12, tied=False)
    fsdp2(own_group=True)(model)
    kept: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, _: kept.append(module.weight))
    model("kdrl_loss", of_this_rank(whole_tensors(12)), 2, inside=False)  # makes `model` the root
    model.head(torch.zeros(1, H, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^weight must be in memory, got one that FSDP has freed"):
        loss_of("kdrl_loss", of_this_rank(whole_tensors(12)) | {"weight": kept[0]}, 2)
    model = HeadModel(12, tied=False)
    fsdp1(model)  # its weight is a shard now, flat
    with pytest.raises(ValueError, match=r"^weight must be \[V, H\], .* of a shard of FSDP1, call"):
        loss_of("kdrl_loss", of_this_rank(whole_tensors(12)) | {"weight": model.head.weight}, 2)


def _check_refused(name: str, which: str) -> None:
    tensors = sharded(of_this_rank(whole_tensors(12)), which)
    with pytest.raises(TypeError, match=rf"^{which.replace('_', '.')} must be a plain tensor"):
        loss_of(name, tensors)


CASES: dict[str, Callable[[], None]] = {
    "mean-of-16-bits": _check_mean_of_16_bits,
    "freed": _check_freed,
    "fsdp1-inside": lambda: _check_model(fsdp1, inside=True),
    "fsdp1-inside-tied": lambda: _check_model(fsdp1, inside=True, tied=True),
    "ddp-inside": lambda: _check_model(DistributedDataParallel, inside=True),
    "ddp-outside-tied": lambda: _check_model(DistributedDataParallel, inside=False, tied=True),
    "hybrid": lambda: _check_model(fsdp2(own_group=True, mesh=(2, 1)), inside=False),
    "resharded-tied": lambda: _check_model(
        fsdp2(own_group=False, reshard_after_forward=True), inside=False, tied=True
    ),
    "data-and-tensor": lambda: _check_two_dimensions(2),
    "tensor-and-data": lambda: _check_two_dimensions(1),
}
for _group, _inside, _tied in itertools.product((False, True), repeat=3):
    if not (_group and _tied):  # FSDP2 keeps tied weights in one group
        _id = f"{'own' if _group else 'root'}-{'inside' if _inside else 'outside'}-tied{_tied}"
        CASES[f"fsdp2-{_id}"] = lambda group=_group, inside=_inside, tied=_tied: _check_model(
            fsdp2(group), inside=inside, tied=tied
        )
        CASES[f"mixed-{_id}"] = lambda a=_group, b=_inside, c=_tied: _check_mixed(a, b, c)
for _name in CALLS:
    for _V in (11, 12, 1):
        CASES[f"same-{_name}-V{_V}"] = lambda n=_name, V=_V: _check_same_as_one_process(n, V)
    CASES[f"adapter-{_name}"] = lambda n=_name: _check_same_as_one_process(n, 12, adapter=True)
    CASES[f"own-group-{_name}"] = lambda n=_name: _check_model(
        fsdp2(own_group=True), name=n, inside=False, V=11
    )
    CASES[f"tensor-parallel-{_name}"] = lambda n=_name: _check_tensor_parallel(n)
    CASES[f"communication-{_name}"] = lambda n=_name: _check_communication(n)
    CASES[f"refused-hidden-{_name}"] = lambda n=_name: _check_refused(n, "hidden")
for _kind, _call in itertools.product(SKETCHES, CALLS):
    _name = f"{_kind} {_call}"
    CASES[f"same-{_name}"] = lambda n=_name: _check_same_as_one_process(n, 12)
CASES["adapter-sketched"] = lambda: _check_same_as_one_process(
    "partly sketched linear_logprobs", 12, adapter=True
)
CASES["communication-sketched"] = lambda: _check_communication("partly sketched kdrl_loss")
CASES["fsdp2-sketched-tied"] = lambda: _check_model(
    fsdp2(own_group=False), name="partly sketched kdrl_loss", inside=True, tied=True
)
CASES["refused-teacher_hidden"] = lambda: _check_refused("kdrl_loss", "teacher_hidden")


def test_a_part_of_the_rows_is_flat() -> None:
    """So that the cases of a partial sketch add flat rows to sketched ones."""
    tensors = whole_tensors(12)
    out = kk.kdrl_loss(
        tensors["hidden"].requires_grad_(),
        tensors["weight"],
        tensors["tokens"],
        bias=tensors["bias"],
        advantages=tensors["advantages"],
        token_weights=tensors["token_weights"],
        teacher=kk.TeacherHead(tensors["teacher_hidden"], tensors["teacher_weight"]),
        objective=kk.Objective(kd="rkl"),
        backward="sketch",
        sketch=SKETCHES["partly sketched"],
    )
    assert 0 < out.metrics["flat_rows"] < out.metrics["gradient_rows"]


def _cases(_ranks: int) -> dict[str, Callable[[], None]]:
    return CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder to which both ranks wrote."""
    return run_cases(_cases, 2, tmp_path_factory.mktemp("ranks"), DEADLINE_S)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, outcomes: Path) -> None:
    assert_ok(outcomes, case, 2)
