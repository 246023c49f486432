"""Measures how the gradients of reward and distillation relate, with two additional passes.

Nothing of the step changes: accumulated gradients are stored and restored, no random number
is drawn, no weight moves. Memory: two gradients of the whole model.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import kdrl_kernels as kk
from kdrl_train.model.fsdp import reshard
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy

Gradient = list[Tensor | None]


def gradient_split(
    policy: Policy, batch: PackedBatch, normalizer: Tensor, teacher: kk.TeacherHead | None
) -> dict[str, float | None]:
    """Measure the policy gradient (RL) and the distillation gradient (KD) of one micro-batch: their
    norms, and the cosine of the angle between them; below 0 they pull against each other.

    Args:
        policy, batch, normalizer, teacher: of policy.forward. Under FSDP2 all ranks call it, each
            with a micro-batch of its own, and get the numbers of the reduced gradient.
    Returns: rl_grad_norm, kd_grad_norm, rl_kd_cosine. None: the method has no such term, or a loss
        of the user's own, which cannot be split; no token
        of the micro-batch is distilled, or, for the cosine, one of the two is 0.
    """
    goal, rl, kd = policy.objective, None, None
    if policy.loss_of_rows is not None and policy.loss_of_rows.users is not None:
        return {"rl_grad_norm": None, "kd_grad_norm": None, "rl_kd_cosine": None}
    if goal.policy != "off":
        alone = replace(goal, kd=None, kd_baseline=None, fkl_share=0.5, entropy_coef=0.0, tail=True)
        rl = _gradient(policy, replace(batch, teacher_logprobs=None), normalizer, None, alone)
    if goal.kd is not None and batch.needs_teacher:
        if teacher is None and batch.teacher_logprobs is None:  # distilled on another rank alone
            zeros = torch.zeros_like(batch.sampled_logprobs)
            batch = replace(batch, teacher_logprobs=zeros)
            if goal.topk_kd is not None:
                none = torch.full_like(batch.tokens, -1)[:, None]
                batch = replace(batch, topk_ids=none, topk_logprobs=zeros[:, None])
        alone = replace(goal, policy="off", entropy_coef=0.0)
        kd = _gradient(policy, batch, normalizer, teacher, alone)
    rl_norm = None if rl is None else _dot(rl, rl) ** 0.5
    kd_norm = None if kd is None else _dot(kd, kd) ** 0.5
    cosine = None
    if rl is not None and kd is not None and rl_norm and kd_norm:
        cosine = _dot(rl, kd) / (rl_norm * kd_norm)
    return {"rl_grad_norm": rl_norm, "kd_grad_norm": kd_norm, "rl_kd_cosine": cosine}


def _gradient(
    policy: Policy,
    batch: PackedBatch,
    normalizer: Tensor,
    teacher: kk.TeacherHead | None,
    goal: kk.Objective,
) -> Gradient:
    """Compute the gradient of one objective, by backward: FSDP2 does not hook autograd.grad."""
    reshard(policy)  # after a forward pass alone, parameters() are not those of the optimizer
    parameters = list(policy.parameters())
    accumulated = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    sketch, policy.sketch = policy.sketch, None  # its noise would count as a gradient
    try:
        policy(batch, normalizer, teacher, goal).loss.backward()
    finally:
        policy.sketch = sketch
    gradient = [p.grad for p in parameters]
    for p, grad in zip(parameters, accumulated, strict=True):
        p.grad = grad
    return gradient


def _dot(a: Gradient, b: Gradient) -> float:
    """Inner product over all parameters, in float64; shards are summed over the ranks."""
    pairs = zip(a, b, strict=True)
    parts = [(x * y).sum(dtype=torch.float64) for x, y in pairs if x is not None and y is not None]
    total = torch.stack(parts).sum()
    return (total.full_tensor() if isinstance(total, DTensor) else total).item()
