"""Describes a run on its devices, and how much of it one process handles."""

from dataclasses import dataclass
from typing import Literal

import torch

from kdrl_kernels.plan import ChunkPlan, chunk_plan, usual_entries
from kdrl_kernels.sketch import COLUMNS_PER_ENTRY
from kdrl_train.config import TrainConfig
from kdrl_train.model import attention
from kdrl_train.model.attention import Choice
from kdrl_train.model.self_teacher import has_no_copy
from kdrl_train.start.estimate.layers import LayerShape
from kdrl_train.start.estimate.shapes import ModelShape

BLOCK = 256
"""Weights whose 8-bit moments share a scale, in bitsandbytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Says on how many devices a run is placed, and what it keeps in the memory of the CPU."""

    gpus: int = 1
    """Processes, one for each GPU."""
    cpu: bool = False
    """The processes run on a CPU."""
    teacher_weights: Literal["sharded", "full", "cpu"] = "sharded"
    """Where an in-process teacher's weights are: a share on each GPU, all of them on each GPU, or
    in the CPU's memory."""
    offload_policy: bool = False
    """Whether the policy's shards, its gradients and AdamW's moments are in the CPU's memory."""
    memory_bytes: int | None = None
    """Memory of a whole GPU, from which the rows of the head's chunks follow; None: that of the GPU
    that is here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Holds a run with its models' shapes and its devices, and derives what one process handles."""

    run: TrainConfig
    policy: ModelShape
    teacher: ModelShape | None
    """The largest of them; None where the method has no distillation."""
    served: tuple[ModelShape, ...] = ()
    """Teachers behind a URL of which the head is here."""
    placement: Placement
    other_teachers: tuple[ModelShape, ...] = ()
    """The others of several in-process teachers, which read other packs."""
    choice: Choice = Choice()  # noqa: RUF009 (frozen)
    """How the policy computes the sequences of a pack."""
    entries: float | None = None
    """Mean entries of a token's gradient, where the head's is sketched; None: those of RL."""
    adapters: int = 0
    """Parameters of the policy's adapters, with model.lora: they are trained, and the rest is
    frozen; 0: all of the policy is trained."""
    head_rank: int = 0
    """Rank of the adapter of the policy's head; 0: none."""
    flat: float | None = None
    """Share of tokens too flat to be sketched; None: all, where `entries` would cost more than
    model.head_flat allows, else none."""

    @property
    def sharded(self) -> bool:
        """Says whether FSDP2 shards the policy."""
        return self.placement.gpus > 1

    @property
    def teacher_weights(self) -> Literal["sharded", "full", "cpu"]:
        """Says where the teacher's weights really are.

        A run on one device does not shard them, and a run on a CPU has nowhere to move them to.
        """
        placement = self.placement
        offloaded = placement.teacher_weights == "cpu" and not placement.cpu
        if placement.teacher_weights == "sharded" and self.sharded:
            return "sharded"
        return "cpu" if offloaded else "full"

    @property
    def reference(self) -> ModelShape | None:
        """The model that reads every token beside the teacher, where there is model.reference."""
        if self.run.model.reference is None or not self.other_teachers:
            return None
        return self.other_teachers[0]

    @property
    def copied(self) -> tuple[ModelShape, ...]:
        """Returns the teachers whose weights are here in the compute dtype, the largest first: not
        the policy's own without a copy, and no average of them."""
        shapes = (() if self.teacher is None else (self.teacher,)) + self.other_teachers
        if not (has_no_copy(self.run.model) or self.averaged):
            return shapes
        sizes = [shape.parameters for shape in shapes]
        place = sizes.index(self.policy.parameters) if self.policy.parameters in sizes else 0
        return shapes[:place] + shapes[place + 1 :]

    @property
    def averaged(self) -> bool:
        """Says whether a float32 average of the policy's weights teaches."""
        return self.teacher is not None and self.run.model.self_teacher == "ema"

    @property
    def kept_parameters(self) -> int:
        """Counts the parameters of the other teachers that share the memory of the device."""
        moved = self.run.model.move_teachers and not (self.sharded or self.placement.cpu)
        if moved or self.teacher_weights == "cpu":
            return 0
        return sum(teacher.parameters for teacher in self.copied[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the forward and the backward pass."""
        return getattr(torch, self.run.model.dtype)

    @property
    def trained(self) -> int:
        """Counts the parameters that are trained."""
        return self.adapters or self.policy.parameters

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of a weight of the policy: one that is frozen has the compute dtype."""
        return self.dtype.itemsize if self.adapters else 4

    @property
    def moment_bytes(self) -> float:
        """Returns the bytes that the optimiser keeps for each parameter that is trained."""
        optim = self.run.optim
        if optim.name == "sgd":
            return 4.0 if optim.momentum else 0.0
        if optim.name.endswith("8bit"):  # and a float32 scale for each block of each moment
            return 2 * (1 + 4 / BLOCK)
        return 8.0

    @property
    def teaches_itself(self) -> bool:
        """Says whether the policy's own weights teach, without a copy of them."""
        return has_no_copy(self.run.model) and self.run.model.teacher_is_self

    @property
    def stream_bytes(self) -> int:
        """Returns the bytes of one number of the residual stream.

        One GPU keeps float32 weights and computes by autocast: its residual stream is float32.
        """
        return self.dtype.itemsize if self.sharded else self.weight_bytes

    @property
    def rollouts(self) -> int:
        """Counts the completions that one process handles in a step."""
        sampling = self.run.sampling
        return -(-sampling.prompts_per_step * sampling.group_size // self.placement.gpus)

    @property
    def batch(self) -> int:
        """Counts the completions that one process generates at the same time."""
        return min(self.run.sampling.batch_size, self.rollouts)

    @property
    def longest(self) -> int:
        """Counts the tokens of the longest prompt with the longest completion."""
        return self.run.data.max_prompt_tokens + self.run.sampling.max_new_tokens

    @property
    def sampled(self) -> tuple[int, int]:
        """Counts the tokens of the longest prompt that is sampled from, and of the longest one with
        its completion: of the training, or of an evaluation during it."""
        run = self.run
        held_out = run.eval.sampling(run.sampling).max_new_tokens
        prompts = [one.max_prompt_tokens for one in run.eval.sections.values()]
        whole = [prompt + held_out for prompt in prompts]
        return max([run.data.max_prompt_tokens, *prompts]), max([self.longest, *whole])

    @property
    def teacher_tokens(self) -> int:
        """Counts the tokens of the longest pack as the teacher reads it."""
        data = self.run.data
        if self.teacher is None or data.teacher_template is None:
            return self.pack_tokens
        read = max(data.max_teacher_prompt_tokens + self.run.sampling.max_new_tokens, self.longest)
        return max(read, min(self.run.optim.micro_batch_tokens, self.rollouts * read))

    @property
    def longer_prompt(self) -> float:
        """Returns how many times as long as the policy's prompts the teacher's are taken to be."""
        data = self.run.data
        if data.teacher_template is None:
            return 1.0
        return data.max_teacher_prompt_tokens / data.max_prompt_tokens

    @property
    def pack_tokens(self) -> int:
        """Counts T, the tokens of the longest pack; a pack always holds at least one sequence."""
        budget = self.run.optim.micro_batch_tokens
        return max(self.longest, min(budget, self.rollouts * self.longest))

    @property
    def attention(self) -> str | None:
        """Returns the name of the attention; None where nothing is masked or named.

        A sequence that is alone in its row needs no [T, T] mask of "sdpa".
        """
        alone = self.choice.attention == "sdpa" and not self.choice.packs
        return self.run.model.attention or (None if alone else self.choice.attention)

    @property
    def packed(self) -> bool:
        """Says whether attention is this package's "packed", which `train` uses by default."""
        return self.attention in (None, attention.NAME)

    @property
    def masked(self) -> bool:
        """Says whether attention over a pack takes a [T, T] mask: transformers' "sdpa" does."""
        return self.attention == "sdpa" and self.run.optim.micro_batch_tokens > 1

    @property
    def weights_bytes(self) -> int:
        """Returns the bytes that a head keeps for each pair of a query and a key: transformers'
        "eager" has a softmax in float32, and a copy of it in the compute dtype."""
        if self.attention != "eager":
            return 0
        return 4 + (self.dtype.itemsize if self.dtype.itemsize < 4 else 0)

    @property
    def row_tokens(self) -> int:
        """Counts the tokens of the longest row of attention."""
        return self.pack_tokens if self.choice.packs else self.longest

    def attention_width(self, layer: LayerShape) -> int:
        """Counts the numbers that attention keeps for each token: query, key, value, output."""
        q, kv = layer.query, layer.kv
        if self.packed:
            if self.placement.cpu or self.dtype not in attention.VARLEN_DTYPES:
                return 5 * q
            return 2 * q + 2 * kv if attention.GROUPED else 4 * q
        return 4 * q if self.masked else 2 * q + 2 * kv

    def layer_bytes(self, layer: LayerShape) -> int:
        """Returns the bytes that a layer keeps for each token, without a mask: see memory.py."""
        b, s = self.dtype.itemsize, self.stream_bytes
        norms = (4 + s + b) * layer.normed + (4 + b) * layer.heads_normed
        inner = layer.mlp_kept + layer.routed + layer.scanned
        return norms + b * (self.attention_width(layer) + inner)

    def activation_bytes(self, model: ModelShape) -> int:
        """Returns the bytes that all layers keep for each token, without masks."""
        return sum(self.layer_bytes(layer) for layer in model.each)

    def cache_bytes(self, model: ModelShape, tokens: int) -> int:
        """Returns the bytes of keys and values, or latents, that generate keeps of a completion.

        Rotated keys have the dtype of the residual stream.
        """
        b, s = self.dtype.itemsize, self.stream_bytes
        return sum(
            layer.kept(tokens) * (s * layer.cached_keys + b * layer.cached_values)
            for layer in model.each
        )

    def state_bytes(self, model: ModelShape) -> int:
        """Returns the bytes of the states of constant size that generate keeps of a completion.

        States of SSMs and linear attention are float32; the past of convolutions is not.
        """
        b = self.dtype.itemsize
        return sum(4 * layer.state + b * layer.convolved for layer in model.each)

    @property
    def row_entries(self) -> float:
        """Returns the mean entries of a token's gradient."""
        return usual_entries(self.dtype) if self.entries is None else self.entries

    @property
    def flat_share(self) -> float:
        """Returns the share of tokens whose gradient is exact although the head's is sketched."""
        if self.flat is not None:
            return self.flat
        columns = COLUMNS_PER_ENTRY["cpu" if self.placement.cpu else "cuda"] * self.row_entries
        return float(columns > self.run.model.head_flat * self.policy.vocabulary)

    @property
    def read_head(self) -> ModelShape | None:
        """Returns the largest teacher whose head this process reads; None: there is none."""
        heads = [shape for shape in (self.teacher, *self.served) if shape is not None]
        return max(heads, key=lambda shape: shape.head_parameters, default=None)

    def chunk_plan(self, tokens: int) -> ChunkPlan:
        """Returns the chunk plan of the one-pass head for a number of tokens."""
        policy, optim, method = self.policy, self.run.optim, self.run.method
        teacher = None if method.is_topk else self.read_head
        kd = "k2" if method.kd == "reward" else method.kd  # both need the same
        return chunk_plan(
            tokens,
            policy.hidden,
            policy.vocabulary,
            teacher=None if teacher is None else (teacher.hidden, teacher.vocabulary),
            kd=kd if method.is_topk or teacher is not None else None,
            kd_baseline=None if teacher is None else method.kd_baseline,
            dtype=self.dtype,
            device="cpu" if self.placement.cpu else "cuda",
            weight_grad=not self.adapters,
            adapter=self.head_rank,
            workspace_bytes=optim.workspace_bytes,
            memory_bytes=self.placement.memory_bytes,
            backward=self.run.model.head_backward,
            row_entries=0 if self.flat_share == 1 else self.row_entries,
            threshold=self.run.model.head_threshold,
            flat=self.flat_share,
            impl=optim.head_impl,
        )


def shorter_packs(case: Case) -> str:
    """Says which setting makes a pack shorter."""
    if case.pack_tokens > case.longest:
        return "lower optim.micro_batch_tokens"
    return "lower sampling.max_new_tokens or data.max_prompt_tokens: a pack holds one sequence"
