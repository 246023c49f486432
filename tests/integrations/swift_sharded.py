"""Compares sharded models (FSDP2) with whole ones, in log-probabilities, losses and gradients.

test_swift_head.py starts it with two processes. The first prints the largest error of each case.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdrl_kernels.integrations.swift.grpo import SwiftGRPOTrainer
from tests.integrations.test_swift_head import batch, distilled, make, stand


def sharded(model: Any, *, head: bool) -> Any:
    """Shard a model over both ranks; head: the LM head in a unit of its own."""
    mesh = init_device_mesh("cpu", (2,))
    for part in [*model.model.layers, *([model.lm_head] if head else [])]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def grpo(prepared: Callable[[Any], Any]) -> list[Tensor]:
    """Return log-probabilities, and gradients of a sum of which each rank weights its part."""
    model = prepared(make("Qwen2"))
    inputs, values = batch(padding_free=False)
    logprobs, _ = stand(SwiftGRPOTrainer, model)._get_per_token_logps_and_entropies_single(
        model, inputs, values, compute_entropy=True
    )
    return outcomes(model, logprobs[values.completion_mask])


def gkd(prepared: Callable[[Any], Any]) -> list[Tensor]:
    """Return the divergence and its gradients, those of each rank weighted."""
    student, teacher = prepared(make("Qwen2")), prepared(make("Llama", tie_word_embeddings=False))
    fsdp = isinstance(student.lm_head.weight, DTensor)
    return outcomes(student, distilled(student, teacher, is_fsdp_enabled=fsdp)[0])


def outcomes(model: Any, values: Tensor) -> list[Tensor]:
    """Return values, and the gradients of their sum, averaged over the ranks."""
    (values.sum() * (1 + dist.get_rank())).backward()
    gradients = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
            gradient = gradient / 2
        gradients.append(gradient)
    return [values.detach(), *gradients]


def main() -> None:
    """Compare both trainers, with the head in the root's unit and in its own."""
    dist.init_process_group("gloo")
    for case in (grpo, gkd):
        whole = case(lambda model: model)
        for head in (False, True):
            parts = case(lambda model, head=head: sharded(model, head=head))
            error = max((a - b).abs().max().item() for a, b in zip(parts, whole, strict=True))
            if dist.get_rank() == 0:
                print("error", f"{case.__name__}{'-head' * head}", error, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
