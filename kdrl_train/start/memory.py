"""Preflight: will the run fit its device? The estimate of `plan`, for the device that is there."""

import os

from kdrl_train.config import TrainConfig
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.start.estimate.case import Case, Placement
from kdrl_train.start.estimate.devices import memory_bytes
from kdrl_train.start.estimate.memory import by_moment, causes, memory_terms
from kdrl_train.start.estimate.shapes import shape_of

FAR = 1.1
"""An estimate beyond this many times the device's memory fails; one above it is a warning. In two
real runs it was 0.9 and 1.02 times what they took, for the longest completions allowed."""
GB = 1e9


def check_memory(config: TrainConfig, policy: Policy, teacher: Teacher | None, ranks: int) -> str:
    """The most that one of `ranks` processes holds, beside what its device has.

    Raises: UserWarning where it is more than the device has, ValueError where it is far more, with
        the settings that make it smaller.
    """
    device = policy.device
    try:
        case = _case(config, policy, teacher, ranks)
    except ValueError as error:
        return f"not estimated: {error}"
    terms = memory_terms(case)
    moments = by_moment(terms)
    worst = max(moments, key=lambda moment: moments[moment])
    peak, here = moments[worst], int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = memory_bytes(device, here)
    lengths = f"{config.data.max_prompt_tokens:,} + {config.sampling.max_new_tokens:,}"
    found = (
        f"{peak / GB:,.2f} GB at its worst ({worst}), estimated for lengths up to {lengths} "
        f"tokens; {device} has {total / GB:,.2f} GB"
    )
    if peak <= total:
        return found
    remedies = "; ".join(f"{term.name}: {term.remedy}" for term in causes(terms, total))
    message = (
        f"{found} for each of {ranks} process(es): {remedies}. `python -m kdrl_train plan` shows "
        "every term, also for more GPUs (torchrun)"
    )
    if peak <= FAR * total:
        raise UserWarning(f"may not fit: {message}")
    raise ValueError(f"the run must fit the memory of its device, got {message}")


def _case(config: TrainConfig, policy: Policy, teacher: Teacher | None, ranks: int) -> Case:
    """Raises ValueError for what is not modelled."""
    if config.optim.head_impl == "reference" or config.model.attention == "eager":
        raise ValueError("optim.head_impl reference and model.attention eager are not modelled")
    if config.engine.kind in ("continuous", "vllm"):
        raise ValueError(f"engine.kind {config.engine.kind} is not modelled")
    return Case(
        run=config,
        policy=shape_of(policy.model, "model.policy"),
        teacher=None if teacher is None else shape_of(teacher.model, "model.teacher"),
        placement=Placement(
            gpus=ranks,
            cpu=policy.device.type == "cpu",
            teacher_weights="cpu" if config.model.offload_teacher else "sharded",
            offload_policy=config.model.offload_policy,
        ),
    )
