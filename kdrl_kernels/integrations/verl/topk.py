"""Distils a response's tokens over the teacher's K best ones, without full logits.

verl's forward_kl_topk takes full logits; with fused kernels its FSDP engine asks the model's output
for fused_linear_aux instead, three numbers of each position. The fused forward gives them here: the
log-probabilities at the teacher's tokens come from the same pass over the head as all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_kernels.objective import TopkKd
from kdrl_kernels.topk import topk_divergence

KEY = "kdrl_topk"
"""Key of a batch's TopkTerm, and name of the fused forward's argument."""


@dataclass(frozen=True, slots=True)
class TopkTerm:
    """Says which divergence; kd, tail and jsd_alpha as in kdrl_kernels.Objective."""

    kd: TopkKd
    tail: bool = True
    jsd_alpha: float = 0.5


class TeacherTopk:
    """Holds the teacher's K tokens of each position, [1, T, K], for the fused forward.

    It is no dict, list or data class, so that FSDP does not round logprobs to 16 bits.
    """

    def __init__(self, term: TopkTerm, ids: Tensor, logprobs: Tensor) -> None:
        self.term, self.ids, self.logprobs = term, ids, logprobs

    def numbers(self, logprobs: Tensor, rest: Tensor | None) -> "TopkNumbers":
        """Compute divergence and masses from the student's log-probabilities at these ids.

        Args:
            logprobs: [1, T, K]. rest: [1, T], log of its probability on none of them, or None.
        """
        student, teacher = logprobs.flatten(0, 1), self.logprobs.to(logprobs).flatten(0, 1)
        logr = None if rest is None else rest.flatten()
        term = self.term
        with torch.no_grad():
            divergence = topk_divergence(term.kd, student, teacher, logr, term.jsd_alpha)
        value = divergence.value + slope(divergence.extra, student).sum(1)
        if logr is not None:
            assert divergence.rest is not None
            value = value + slope(divergence.rest, logr)
        masses = student.detach().exp().sum(1), teacher.exp().sum(1)
        return TopkNumbers(*(x.view(logprobs.shape[:2]) for x in (value, *masses)))


class TopkNumbers(NamedTuple):
    """What verl's engine reads of fused_linear_aux, [1, T] each."""

    distillation_losses: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


def slope(derivative: Tensor, variable: Tensor) -> Tensor:
    """Return zeros whose derivative in `variable` is `derivative`."""
    change = variable - variable.detach()
    return torch.where(derivative == 0, 0, derivative * change)


def install() -> None:
    """Let verl's FSDP engine pass a batch's teacher on; a second time changes nothing."""
    # a module that loads verl's engines
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: PLC0415

    prepare = FSDPEngineWithLMHead.prepare_model_inputs
    if not hasattr(prepare, "kdrl"):
        FSDPEngineWithLMHead.prepare_model_inputs = passing_teacher(prepare)


def passing_teacher(prepare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wrap prepare_model_inputs: the teacher's tokens of a KDRL run go to the model."""

    @wraps(prepare)
    def prepare_with_teacher(engine: Any, micro_batch: Any) -> Any:
        inputs, arguments = prepare(engine, micro_batch)
        if KEY in micro_batch.keys():  # noqa: SIM118 (a TensorDict iterates over its batch)
            check_engine(engine, micro_batch)
            ids, logprobs = (
                micro_batch[name].values()[None] for name in ("teacher_ids", "teacher_logprobs")
            )
            inputs[KEY] = TeacherTopk(micro_batch[KEY], ids.long(), logprobs)
        return inputs, arguments

    prepare_with_teacher.kdrl = True  # type: ignore[attr-defined]
    return prepare_with_teacher


def check_engine(engine: Any, micro_batch: Any) -> None:
    """Refuse an engine whose forward would leave the term out."""
    options = engine.model_config.fused_kernel_options or {}
    rules = {
        "model.use_fused_kernels=True": micro_batch["use_fused_kernels"],
        "model.fused_kernel_options.impl_backend=kdrl": options.get("impl_backend") == "kdrl",
        "model.use_remove_padding=True": micro_batch["use_remove_padding"],
        "ulysses_sequence_parallel_size=1": not engine.use_ulysses_sp,
    }
    missing = [rule for rule, holds in rules.items() if not holds]
    if missing:
        raise ValueError(f"a kdrl_topk loss_mode must be used with {' '.join(missing)}")
