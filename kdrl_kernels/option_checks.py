"""Checks objective, teacher, truncation and sketch, as checks.py does other arguments."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.head import Head, TeacherHead, check_device
from kdrl_kernels.objective import Objective
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.truncation import Truncation


def check_objective(
    objective: Any, teacher: Any, teacher_logprobs: Tensor | None, teacher_topk: Any = None
) -> None:
    """Raise unless a teacher is passed where the objective has one, in the form it needs."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an Objective, got {type(objective).__name__}: pass "
            "kk.Objective(policy=..., kd=..., kd_coef=...)"
        )
    passed = [
        name
        for name, value in (("teacher", teacher), ("teacher_logprobs", teacher_logprobs))
        if value is not None
    ]
    if objective.topk_kd is None and teacher_topk is not None:
        raise ValueError(
            f"teacher_topk must be None for kd={objective.kd!r}, got a pair: name the divergence, "
            'objective=Objective(kd="topk_rkl"), "topk_fkl" or "topk_jsd"'
        )
    if objective.topk_kd is not None and teacher_topk is None:
        reads = {"teacher": objective.topk_kd.removeprefix("topk_"), "teacher_logprobs": "k2"}
        got = f"only {passed[0]}: use it with kd={reads[passed[0]]!r}" if passed else "None"
        raise ValueError(f"teacher_topk must be (ids, logprobs) for kd={objective.kd!r}, got {got}")
    if objective.kd is None and passed:
        raise ValueError(f"{passed[0]} must be None when objective.kd is None, got one: set kd")
    if objective.topk_kd is not None:
        if passed:
            raise ValueError(f"{passed[0]} must be None with teacher_topk, got both: leave it out")
        return
    if objective.kd is not None and not passed:
        exact = objective.exact_kd is not None
        which = "teacher=TeacherHead(...)" if exact else "teacher or teacher_logprobs"
        raise ValueError(
            f"{which} must be passed for kd={objective.kd!r}, got neither: "
            "Objective(kd=None) is for no teacher"
        )
    if objective.exact_kd is not None and teacher is None:
        what, remedy = f"the exact kd={objective.kd!r}", "kd='k2'"
        if objective.kd_baseline is not None:
            what, remedy = f"kd_baseline={objective.kd_baseline!r}", "kd_baseline=None"
        raise ValueError(
            f"teacher must be a TeacherHead for {what}, got teacher_logprobs: "
            f"use {remedy} with those"
        )


def check_teacher(teacher: Any, teacher_logprobs: Tensor | None, head: Head) -> None:
    """Raise unless one of the two at most is passed, with rows, device and precision of head."""
    if teacher is None:
        return
    if not isinstance(teacher, TeacherHead):
        raise TypeError(
            f"teacher must be a TeacherHead or None, got {type(teacher).__name__}: pass "
            "kk.TeacherHead(its last hidden states, the weight of its LM head), or "
            "teacher_logprobs of the tokens"
        )
    if teacher_logprobs is not None:
        raise ValueError("teacher_logprobs must be None when teacher is passed, got both")
    if (teacher.hidden.dtype == torch.float64) != (head.hidden.dtype == torch.float64):
        raise TypeError(
            f"teacher.hidden must be float64 if and only if hidden is: hidden is "
            f"{head.hidden.dtype}, got {teacher.hidden.dtype}"
        )
    if teacher.hidden.shape[:-1] != head.hidden.shape[:-1]:
        raise ValueError(
            f"teacher.hidden must have N = {head.hidden.shape[0]} rows, "
            f"got {list(teacher.hidden.shape)}"
        )
    check_device("teacher.hidden", teacher.hidden, "hidden", head.hidden)


def check_truncation(truncation: Any, head: Head, divergence: str | None = None) -> Any:
    """Return the truncation, or raise where it is none, or a head or a divergence has no such."""
    if truncation is None:
        return None
    if not isinstance(truncation, Truncation):
        raise TypeError(
            f"truncation must be a Truncation or None, got {type(truncation).__name__}: pass "
            "kk.Truncation(top_k=..., top_p=...)"
        )
    if head.softcap is not None:
        raise ValueError(
            f"truncation must be None with a softcap, got {truncation}: a softcap makes the -inf "
            "of a token that is left out finite"
        )
    if divergence is not None and "fkl" in divergence:
        raise ValueError(
            f"truncation must be None for {divergence!r}, got {truncation}: KL(q‖p) is infinite "
            "where the sampler leaves tokens of the teacher out"
        )
    return truncation


def check_sketch(backward: str, sketch: Sketch | None, impl: str, head: Head) -> Sketch | None:
    """Return the sketch that the backward pass uses; None: the exact gradient.

    Raises: ValueError for another backward, a sketch that would not be used, or an implementation
        or device that has none.
    """
    if backward not in ("exact", "sketch"):
        raise ValueError(f'backward must be "exact" or "sketch", got {backward!r}')
    if backward == "exact":
        if sketch is not None:
            raise ValueError('sketch must be None with backward="exact", got a Sketch')
        return None
    if impl == "reference" or head.hidden.device.type == "mps":  # MPS has no float64
        device = head.hidden.device.type
        raise ValueError(f'backward must be "exact" with impl={impl!r} on {device}, got "sketch"')
    if sketch is not None and not isinstance(sketch, Sketch):
        raise TypeError(
            f"sketch must be a Sketch or None, got {type(sketch).__name__}: pass "
            "kk.Sketch(seed=...)"
        )
    sketch = (sketch or Sketch()).of_head(head.hidden, len(head.weight))
    if head.hidden.dtype == torch.float16:  # an exact row would need a unit of its own
        return replace(sketch, flat=math.inf)
    return sketch
