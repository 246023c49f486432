"""The memory check of the preflight: compares the estimate of `plan` with this run's device."""

import os
from collections.abc import Sequence

from kdrl_train.config import TrainConfig
from kdrl_train.model import lora
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.self_teacher import LiveTeacher
from kdrl_train.start.estimate.case import Case, Placement
from kdrl_train.start.estimate.devices import memory_bytes
from kdrl_train.start.estimate.memory import by_moment, causes, memory_terms
from kdrl_train.start.estimate.shapes import largest_first, read_model, served_heads, shape_of

FAR = 1.1
"""An estimate of more than this many times the device's memory is a failure; one between 1 and this
is a warning. In two real runs the estimate, which reckons with the longest completions that are
allowed, was 0.9 and 1.02 times the memory that they took."""
GB = 1e9


def check_memory(
    config: TrainConfig, policy: Policy, teachers: Sequence[Teacher | LiveTeacher], ranks: int
) -> str:
    """Compare the most memory that one of `ranks` processes needs with what its device has.

    teachers: those of this process.

    Raises: UserWarning if it needs more than the device has, ValueError if it needs far more; both
        name the settings that make it smaller. UserWarning too if it cannot be estimated.
    """
    device = policy.device
    try:
        terms = memory_terms(_case(config, policy, teachers, ranks))
    except ValueError as error:
        return f"not estimated: {error}"
    except Exception as error:  # a model of a kind that nobody has thought of: it may still train
        raise UserWarning(f"not estimated: {type(error).__name__}: {error}") from error
    moments = by_moment(terms)
    worst = max(moments, key=lambda moment: moments[moment])
    peak, ranks_here = moments[worst], int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = memory_bytes(device, ranks_here)
    lengths = f"{config.data.max_prompt_tokens:,} + {config.sampling.max_new_tokens:,}"
    comparison = (
        f"{peak / GB:,.2f} GB at its worst ({worst}), estimated for lengths up to {lengths} "
        f"tokens; {device} has {total / GB:,.2f} GB"
    )
    if peak <= total:
        return comparison
    remedies = "; ".join(f"{term.name}: {term.remedy}" for term in causes(terms, total))
    message = (
        f"{comparison} for each of {ranks} process(es): {remedies}. `python -m "
        "kdrl_train plan` shows every term, for any number of GPUs (torchrun)"
    )
    if peak <= FAR * total:
        raise UserWarning(f"may not fit: {message}")
    raise ValueError(f"the run must fit the memory of its device, got {message}")


def _case(
    config: TrainConfig, policy: Policy, teachers: Sequence[Teacher | LiveTeacher], ranks: int
) -> Case:
    """Return what the estimate is computed from.

    Raises: ValueError for settings that the estimate does not model.
    """
    if config.optim.head_impl == "reference" or config.model.attention == "eager":
        raise ValueError("optim.head_impl reference and model.attention eager are not modelled")
    if config.model.tensor_parallel > 1:
        raise ValueError("model.tensor_parallel is not modelled")
    if config.engine.kind in ("continuous", "vllm"):
        raise ValueError(f"engine.kind {config.engine.kind} is not modelled")
    policy_model, adapters, head_rank = policy.model, 0, 0
    if config.model.lora.rank:  # its shape is that of its base
        model = config.model
        policy_model = read_model(model.policy, "model.policy", model.trust_remote_code)
        adapters = lora.count(policy_model, model.lora)
        head_rank = lora.head_rank(policy_model, model.lora)
    shapes = largest_first(
        shape_of(policy_model if isinstance(teacher, LiveTeacher) else teacher.model, "the teacher")
        for teacher in teachers
    )
    return Case(
        run=config,
        choice=policy.choice,
        policy=shape_of(policy_model, "model.policy"),
        adapters=adapters,
        head_rank=head_rank,
        teacher=shapes[0] if shapes else None,
        other_teachers=shapes[1:],
        served=served_heads(config),
        placement=Placement(
            gpus=ranks,
            cpu=policy.device.type == "cpu",
            teacher_weights="cpu" if config.model.offload_teacher else "sharded",
            offload_policy=config.model.offload_policy,
        ),
    )
