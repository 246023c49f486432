"""The policy's own weights as its teacher: as they are now, or as a moving average of them.

Such a teacher says something else than the policy where it reads another prompt
(data.teacher_template), or where its weights lag behind. Frozen weights of step 0 need nothing of
this: they are a Teacher like any other.
"""

from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.config import ModelConfig
from kdrl_train.config.models import SELF
from kdrl_train.copies import host_copies
from kdrl_train.model import lora
from kdrl_train.model.attention import Choice
from kdrl_train.model.folder import is_adapter
from kdrl_train.model.fsdp import reshard
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import HeadedModel, Policy, Teacher, teacher_head
from kdrl_train.model.tensor_parallel import local


def has_no_copy(config: ModelConfig) -> bool:
    """Say whether the policy's own weights are the teacher, or the reference, without a copy of
    them: those that are trained, and the base of adapters that begin at 0."""
    begins_at_base = config.lora.rank > 0 and not is_adapter(config.policy)
    frozen = SELF in (config.teacher, config.reference) and config.self_teacher == "frozen"
    return config.self_teacher == "live" or (frozen and begins_at_base)


class LiveTeacher:
    """The weights that are trained, without a gradient and without a copy.

    The pass runs as a forward of the policy, so that FSDP2 gathers its weights. The head is the
    policy's own, detached; nothing flows back from the teacher's side of the loss.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def model(self) -> Any:
        """The causal LM."""
        return self.policy.model

    @property
    def choice(self) -> Choice:
        """How the sequences of a pack are computed."""
        return self.policy.choice

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of its forward pass."""
        return self.policy.compute_dtype

    @property
    def vocab_size(self) -> int:
        """V: rows of the head, padding included."""
        return self.policy.vocab_size

    @property
    def softcap(self) -> float | None:
        """The bound of its logits, as HeadedModel has it."""
        return self.policy.softcap

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> kk.TeacherHead:
        """Return hidden [N, H] after the teacher's prompts, and the head [V, H]."""
        head: kk.TeacherHead = self.policy.call(lambda policy: teacher_head(policy, batch))
        return head


class BaseTeacher(LiveTeacher):
    """The weights of step 0 of a policy whose adapters began at 0: the policy without them, and no
    copy."""

    def __call__(self, batch: PackedBatch) -> kk.TeacherHead:
        """Return hidden [N, H] after the teacher's prompts, and the head [V, H]."""
        with lora.without_adapters(self.model):
            return super().__call__(batch)


class EmaTeacher(Teacher):
    """A copy of the policy in float32 that moves toward it after each optimiser step.

    After n steps its weights are d^n w_0 + (1 - d) sum_i d^(n-i) w_i, where w_i are the policy's
    after step i, but for rounding: a step that is less than half of the distance to the next
    float32 is lost, so a weight w is off by at most 2^-24 |w| / (1 - d), 6e-6 |w| at d = 0.99. In
    bfloat16 it would be 2^-8 |w| / (1 - d).

    Args:
        model, temperature, compute_dtype: as Teacher.
        decay: d, the share of itself that it keeps.
    """

    def __init__(
        self,
        model: Any,
        *,
        decay: float,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, temperature=temperature, compute_dtype=compute_dtype)
        self.decay = decay

    @torch.no_grad()
    def follow(self, policy: HeadedModel) -> None:
        """Move every weight toward the policy's, shard by shard."""
        reshard(self)  # what its last pass has gathered is stale from here on
        reshard(policy)
        mine = {name: _part(parameter) for name, parameter in self.named_parameters()}
        new = {name: _part(parameter) for name, parameter in policy.named_parameters()}
        near = {name for name, part in mine.items() if part.device == new[name].device}
        for name in near:
            mine[name].lerp_(new[name], 1 - self.decay)
        far = ((name, new[name]) for name in mine if name not in near)  # one of them is offloaded
        for name, part in host_copies(far, torch.float32):
            mine[name].lerp_(part.to(mine[name].device), 1 - self.decay)


def _part(parameter: Tensor) -> Tensor:
    """Return this rank's part of a weight, which shares its memory."""
    return local(parameter.detach())
