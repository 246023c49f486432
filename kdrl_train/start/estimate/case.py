"""A run on its devices, and what one process of it handles."""

from dataclasses import dataclass
from typing import Literal

import torch

from kdrl_kernels.plan import ChunkPlan, chunk_plan
from kdrl_train.config import TrainConfig
from kdrl_train.model import attention
from kdrl_train.start.estimate.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """On how many of which devices, and what is kept elsewhere."""

    gpus: int = 1
    """Processes, one for each GPU."""
    cpu: bool = False
    """The processes run on a CPU."""
    teacher_weights: Literal["sharded", "full", "cpu"] = "sharded"
    """Of an in-process teacher: a share on each GPU, all on each, or in the CPU's memory."""
    offload_policy: bool = False
    """The policy's shards, gradients and AdamW's moments are in the CPU's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run on its devices, and what one process of it handles."""

    run: TrainConfig
    policy: ModelShape
    teacher: ModelShape | None
    """None where the method has no distillation."""
    placement: Placement

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the policy."""
        return self.placement.gpus > 1

    @property
    def teacher_weights(self) -> Literal["sharded", "full", "cpu"]:
        """Where they are: one device has no share but the whole, a CPU no memory but its own."""
        placement = self.placement
        elsewhere = placement.teacher_weights == "cpu" and not placement.cpu
        if placement.teacher_weights == "sharded" and self.sharded:
            return "sharded"
        return "cpu" if elsewhere else "full"

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward and backward pass."""
        return getattr(torch, self.run.model.dtype)

    @property
    def stream_bytes(self) -> int:
        """A number of the residual stream: float32 under autocast, which keeps the weights so."""
        return self.dtype.itemsize if self.sharded else 4

    @property
    def rollouts(self) -> int:
        """Completions of one process in a step."""
        sampling = self.run.sampling
        return -(-sampling.prompts_per_step * sampling.group_size // self.placement.gpus)

    @property
    def batch(self) -> int:
        """Completions it generates at a time."""
        return min(self.run.sampling.batch_size, self.rollouts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.run.data.max_prompt_tokens + self.run.sampling.max_new_tokens

    @property
    def row(self) -> int:
        """T: tokens of the longest row; one sequence always fits."""
        budget = self.run.optim.micro_batch_tokens
        return max(self.longest, min(budget, self.rollouts * self.longest))

    @property
    def packed(self) -> bool:
        """Whether attention is our own: what `train` chooses unless it is told otherwise."""
        return self.run.model.attention in (None, attention.NAME)

    @property
    def masked(self) -> bool:
        """Whether attention in a packed row takes a [T, T] mask: only transformers' own SDPA."""
        return self.run.model.attention == "sdpa" and self.run.optim.micro_batch_tokens > 1

    def attention_width(self, model: ModelShape) -> int:
        """Numbers that a layer's attention keeps for each token: query, key, value and output."""
        q, kv = model.heads_width, model.kv_width
        if self.packed:
            varlen = not self.placement.cpu and self.dtype in attention.VARLEN_DTYPES
            return 4 * q if varlen else 5 * q
        return 4 * q if self.masked else 2 * q + 2 * kv

    def activation_bytes(self, model: ModelShape) -> int:
        """What a layer keeps for each token, without its mask: the table in memory.py."""
        b, s = self.dtype.itemsize, self.stream_bytes
        norms = (4 + s + b) * model.normed + (4 + b) * model.heads_normed
        return norms + b * (self.attention_width(model) + 4 * model.intermediate)

    def chunk_plan(self, tokens: int) -> ChunkPlan:
        """The one-pass head over so many tokens."""
        policy, teacher, optim, method = self.policy, self.teacher, self.run.optim, self.run.method
        kd = "k2" if method.kd == "reward" else method.kd  # its teacher is read as that of k2
        return chunk_plan(
            tokens,
            policy.hidden,
            policy.vocabulary,
            teacher=None if teacher is None else (teacher.hidden, teacher.vocabulary),
            kd=None if teacher is None else kd,
            kd_baseline=None if teacher is None else method.kd_baseline,
            dtype=self.dtype,
            device="cpu" if self.placement.cpu else "cuda",
            workspace_bytes=optim.workspace_bytes,
            impl=optim.head_impl,
        )
