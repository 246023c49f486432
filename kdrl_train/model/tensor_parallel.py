"""Splits every layer of a model over neighbouring ranks, which compute the same tokens together.

transformers' plan of a model (`tp_plan`) names the projections to split: q, k, v, gate and up by
their outputs, o and down by their inputs. Embedding and LM head are split by rows of the vocabulary
(so they may be tied). Norms compute on every rank. torch's parallel styles do the splitting.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import kdrl_kernels as kk


class Unsplit(ParallelStyle):
    """Keeps the parameters of a module whole on every rank.

    They become DTensors all the same, on the mesh of the split ones: a norm over all gradients
    (clipping) and AdamW's foreach kernels take no tensors of several meshes.

    layout: Replicate where all ranks pass the same input; Shard(dim) where each passes its part of
        dim (its heads), so that the parameters' gradient is the sum over the ranks.
    """

    def __init__(self, layout: Placement) -> None:
        self.layouts = (layout,)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        leave: Any = self._leave  # Any: torch declares that it returns None
        return distribute_module(module, device_mesh, self._whole, self._enter, leave)

    def _whole(self, _name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            whole = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))

    def _enter(self, _module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, self.layouts, run_check=False), *inputs[1:]

    def _leave(self, _module: nn.Module, output: Any, _mesh: DeviceMesh) -> Tensor:
        return output.to_local()


STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "rowwise": RowwiseParallel(),
    "replicated_with_grad_allreduce": Unsplit(Shard(2)),  # norms of [B, T, heads, D]
}
"""transformers' name of a rule -> torch's style."""

HEADS = ("num_attention_heads", "num_key_value_heads")
"""Names in a model's configuration; a rank computes whole heads, and all that share a key."""


def styles_of(model: Any, ranks: int) -> dict[nn.Module, ParallelStyle]:
    """Return how each module with parameters is split over `ranks` ranks.

    Raises: ValueError naming model.tensor_parallel for a model that cannot be split so: its heads
        or projections are not divisible by the ranks, it has no plan, or a plan with other rules.
    """
    plan: dict[str, str] = model.tp_plan or {}
    if not plan:
        raise _refusal(model, ranks, "transformers has no tp_plan for it")
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rules = {name: plan[key] for name in modules if (key := _starred(name)) in plan}
    rules = {name: r for name, r in rules.items() if modules[name] not in (embedding, head)}
    blocks = {name.rpartition(".")[0] for name in rules}
    styles: dict[nn.Module, ParallelStyle] = {
        embedding: RowwiseParallel(input_layouts=Replicate()),
        head: ColwiseParallel(output_layouts=Replicate()),
    }
    for name, module in modules.items():
        if module in styles or not (module._parameters or name in rules):
            continue
        rule = rules.get(name)
        odd = any(_starred(f"{name}.{parameter}") in plan for parameter in module._parameters)
        # beside split modules its input, and hence its gradient, could be a part of the whole
        beside = any(f"{name}.".startswith(f"{block}.") for block in blocks)
        read_elsewhere = any(module.children()) or isinstance(module, nn.Conv1d)
        if odd or (rule is None and (beside or read_elsewhere)):
            raise _refusal(model, ranks, f"{name} has parameters that its tp_plan does not split")
        if rule is not None and rule not in STYLES:
            raise _refusal(model, ranks, f"its tp_plan has the rule {rule} for {name}")
        styles[module] = Unsplit(Replicate()) if rule is None else STYLES[rule]
    _require_divisible(model, ranks, rules)
    return styles


def split(
    modules: Iterable[nn.Module], styles: Mapping[nn.Module, ParallelStyle], mesh: DeviceMesh
) -> None:
    """Split modules in place. Tied weights stay tied: embedding and LM head are split alike.

    All ranks of the mesh hold the same whole tensors before.
    """
    whole = [(module, *pair) for module in modules for pair in module._parameters.items()]
    for module in dict.fromkeys(module for module, _, _ in whole):
        parallelize_module(module, mesh, styles[module], src_data_rank=None)
    parts: dict[int, nn.Parameter | None] = {}
    for module, name, parameter in whole:
        module._parameters[name] = parts.setdefault(id(parameter), module._parameters[name])


def _starred(name: str) -> str:
    """Replace the numbers of layers in a name by *, as in the plan's keys."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _require_divisible(model: Any, ranks: int, rules: Mapping[str, str]) -> None:
    """Raise ValueError unless each rank gets as many heads, inputs and outputs as any other."""
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in HEADS}
    for name, rule in rules.items():
        features = {"colwise": "out_features", "rowwise": "in_features"}.get(rule)
        if features is not None:
            sizes[f"{name}.{features}"] = getattr(model.get_submodule(name), features)
    for name, size in sizes.items():
        if isinstance(size, int) and size % ranks:
            raise ValueError(
                f"model.tensor_parallel must divide {name} = {size} of {type(model).__name__}, got "
                f"{ranks}: set it to a divisor; torchrun's other ranks share the tokens (FSDP2)"
            )


def _refusal(model: Any, ranks: int, why: str) -> ValueError:
    name = type(model).__name__
    return ValueError(f"model.tensor_parallel must be 1 for {name}, got {ranks}: {why}")


def teacher_rows(teacher: kk.TeacherHead, columns: int, ranks: int) -> kk.TeacherHead:
    """Return a teacher with this rank's rows of its head, which were split over `ranks` ranks.

    It is gathered where they are not those of a policy with so many columns, but for padding at
    the end.
    """
    ours, theirs = (math.ceil(rows / ranks) for rows in (columns, len(teacher.weight)))

    def part(tensor: Tensor) -> Tensor:
        if ours != theirs and isinstance(tensor, DTensor):
            return tensor.full_tensor()
        return local(tensor)

    bias = teacher.bias
    return replace(teacher, weight=part(teacher.weight), bias=None if bias is None else part(bias))


@overload
def local(tensor: Tensor) -> Tensor: ...
@overload
def local(tensor: None) -> None: ...
@overload
def local(tensor: Tensor | None) -> Tensor | None: ...
def local(tensor: Tensor | None) -> Tensor | None:
    """Return this rank's part of a DTensor, differentiable; another tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
