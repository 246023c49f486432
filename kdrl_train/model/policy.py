"""Splits a causal LM at its LM head: the policy, with the loss in its forward, and the teacher.

The policy's forward takes a pack to the loss, so that the head weight is read where FSDP2
has just gathered it, and no [T, V] logits exist. T fed tokens, N loss tokens, H hidden size,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_kernels.head_config import backbone, head_scalars
from kdrl_train.batch import TopkScores
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.histogram import histogram
from kdrl_train.model import attention, lora, noise, rotary
from kdrl_train.model.method_loss import LossOfRows, objective
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.tensor_parallel import local, teacher_rows
from kdrl_train.model.topk import likeliest, with_sampled

T = TypeVar("T")

CHOICE = "kdrl_choice"
"""The attribute of a loaded model that holds its attention.Choice."""


class HeadedModel(nn.Module):
    """A transformers causal LM split at its LM head: z = softcap(scale · (x Wᵀ + b)) / temperature.

    Dropout and other noise are switched off, also in training mode (noise.py): the loss is taken at
    the distribution that is sampled from. Output embeddings may be tied. softcap and scale are
    those of the config (kdrl_kernels.head_config); the attributes are cap / scale and temperature /
    scale, which give the same logits.

    Args:
        model: the causal LM, with get_output_embeddings() and a backbone.
        temperature: sampling temperature.
        compute_dtype: of the forward pass; float32 weights run under autocast if it is bfloat16.
    Raises: ValueError for a model without an LM head.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        name = type(model).__name__
        if model.get_output_embeddings() is None or backbone(model) is model:
            raise ValueError(f"the model must be a causal LM with an LM head, got {name}")
        self.model = model
        self.compute_dtype = compute_dtype
        config = model.config.get_text_config()
        self.temperature, self.softcap = head_scalars(config, temperature)
        self.device: torch.device = model.device
        """Where it computes; before it is sharded, and where FSDP2 offloads it, its weights are
        elsewhere."""
        self.vocab_group: dist.ProcessGroup | None = None
        """The ranks over which the rows of the LM head are split, a DTensor; None: it is whole."""
        self.choice: attention.Choice = getattr(model, CHOICE, attention.Choice())
        """How the sequences of a pack are computed; load_model chooses."""
        self._arguments = frozenset(signature(type(backbone(model)).forward).parameters)
        noise.silence(model)

    @property
    def vocab_size(self) -> int:
        """V: rows of the head, padding included."""
        return self.model.get_output_embeddings().weight.shape[0]

    def autocast(self) -> AbstractContextManager:
        """Enter the compute dtype: every forward of float32 weights runs inside this context."""
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the module; the model computes as in evaluation mode in both."""
        super().train(mode)
        if mode:
            noise.train_quietly(self.model)
        return self

    def call(self, function: Callable[[Any], T]) -> T:
        """Return function(self). fsdp.gathered calls it, as a forward that FSDP2 prepares."""
        return function(self)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the LM head in the compute dtype: weight [V, H], and bias [V] or None. An adapter
        of the head is merged into the weight."""
        weight, bias = self.head_without_adapter()
        adapter = self.head_adapter()
        if adapter is not None:
            weight = (weight + (adapter.B @ adapter.A) * adapter.scale).to(weight.dtype)
        return weight, bias

    def head_without_adapter(self) -> tuple[Tensor, Tensor | None]:
        """Return the LM head as `head` does, but for its adapter."""
        module = self.model.get_output_embeddings()
        bias = getattr(module, "bias", None)
        dtype = self.compute_dtype
        return module.weight.to(dtype), None if bias is None else bias.to(dtype)

    def trained_head(self) -> tuple[Tensor, Tensor | None]:
        """Return the parameters of the LM head, each as it is if it is trained.

        The loss rounds float32 ones to the compute dtype, as head_without_adapter does, and sums
        their gradient in float32: it is rounded to the compute dtype nowhere, and V H numbers are
        not read and written three more times (kdrl_kernels/rows/COST.md). Under FSDP2 they are in
        the compute dtype here.
        """
        module, dtype = self.model.get_output_embeddings(), self.compute_dtype
        weight, bias = module.weight, getattr(module, "bias", None)
        weight = weight if weight.requires_grad else weight.to(dtype)
        if bias is not None and not bias.requires_grad:
            bias = bias.to(dtype)
        return weight, bias

    def head_adapter(self) -> kk.LowRank | None:
        """Return the adapter that the LM head has, and computes with now."""
        return lora.head_adapter(self.model.get_output_embeddings())

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        index: Tensor | None,
        lengths: Sequence[int],
    ) -> Tensor:
        """Run the backbone on input_ids and position_ids [1, T]: states [N, H] at `index` [N].

        The sequences share a row where that is right, else each has a row alone.

        index: None takes all T. lengths: tokens of each sequence in the pack; they sum to T.
        """
        if self.choice.share(lengths):
            states = self._row(input_ids, position_ids, lengths)
        else:
            cuts = list(lengths)
            pairs = zip(input_ids.split(cuts, 1), position_ids.split(cuts, 1), cuts, strict=True)
            states = torch.cat([self._row(ids, places, [n]) for ids, places, n in pairs])
        if index is not None:
            states = states.index_select(0, index)
        return states.to(self.compute_dtype)

    def _row(self, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Run the backbone on one row [1, T] of sequences: states [T, H]."""
        text = self.model.config.get_text_config()
        more: dict[str, Any] = {}
        if text._attn_implementation == attention.NAME:
            more = attention.packed_arguments(lengths, input_ids.device)
        elif text._attn_implementation == attention.FLASH and "kwargs" in self._arguments:
            more = attention.flash_arguments(lengths, input_ids.device)
        if "position_ids" in self._arguments or "kwargs" in self._arguments:
            more["position_ids"] = position_ids  # else they are those of one sequence
        if self.choice.longest is not None:
            rotary.forget(self.model)
        with self.autocast():
            out = backbone(self.model)(input_ids=input_ids, use_cache=False, **more)
        return out.last_hidden_state[0]


class Teacher(HeadedModel):
    """A frozen model in evaluation mode: takes a pack to the kk.TeacherHead of its loss tokens."""

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, temperature=temperature, compute_dtype=compute_dtype)
        self.requires_grad_(requires_grad=False)
        self.eval()

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> kk.TeacherHead:
        """Return hidden [N, H_t] of the loss tokens, after the teacher's own prompts where it has
        some, and the head [V_t, H_t], at the policy's temperature."""
        return teacher_head(self, batch)


def teacher_head(model: HeadedModel, batch: PackedBatch) -> kk.TeacherHead:
    """Run a model as the teacher of a pack. Call it without gradients."""
    weight, bias = model.head()
    read = batch if batch.teacher_inputs is None else batch.teacher_inputs
    hidden = model.hidden(read.input_ids, read.position_ids, read.loss_index, read.lengths)
    return kk.TeacherHead(
        hidden,
        weight.detach(),
        bias=None if bias is None else bias.detach(),
        temperature=model.temperature,
        softcap=model.softcap,
    )


class PolicyOutput(NamedTuple):
    """Results of a forward; a tuple, so that PyTorch's tree functions find the loss: FSDP2 hooks
    its backward pass."""

    loss: Tensor
    """0-d, differentiable."""
    logprobs: Tensor
    """[N] nats, detached."""
    sums: dict[str, Tensor]
    """Sums over the tokens, computed by token_sums."""
    teacher_logprobs: Tensor | None = None
    """[N] nats, detached; None without a teacher."""


class Policy(HeadedModel):
    """The model that is trained, with the loss in its forward.

    Args:
        model, temperature, compute_dtype: as HeadedModel.
        method: the objective.
        vocab_size: columns of the head from here on are not part of the vocabulary; None: all are.
        workspace_bytes, head_impl, sketch: of kk.kdrl_loss; the sketch's rows are those of packs.
    """

    def __init__(
        self,
        model: Any,
        method: MethodConfig,
        *,
        vocab_size: int | None = None,
        workspace_bytes: int | None = None,
        head_impl: str | None = None,
        sketch: kk.Sketch | None = None,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, temperature=temperature, compute_dtype=compute_dtype)
        self.objective = objective(method, distil=method.kd is not None)
        self.objective_alone = objective(method, distil=False)
        self.loss_of_rows = LossOfRows.of(method)
        """Where the loss has parts that kk.Objective lacks."""
        self.topk = method.kd_topk
        self.sampled_vocab_size = vocab_size
        self.workspace_bytes = workspace_bytes
        self.head_impl = head_impl
        self.sketch = sketch

    def draw_sketch(self, seed: int, scale: float = 1.0) -> None:
        """Give the sketch of the head's gradient, if there is one, seed and scale of an update."""
        if self.sketch is not None:
            self.sketch = replace(self.sketch, seed=seed, scale=scale)

    def forward(
        self,
        batch: PackedBatch,
        normalizer: Tensor,
        teacher: kk.TeacherHead | None,
        goal: kk.Objective | None = None,
    ) -> PolicyOutput:
        """Compute the loss of one pack: the sum of its token losses / normalizer.

        Strictly on-policy, without batch.old_logprobs: the old log-probabilities are the detached
        new ones, so the ratio is 1.

        Args:
            batch: on the model's device.
            normalizer: 0-d, of the whole step: the loss of a step is the sum over its packs.
            teacher: its hidden states of the same tokens; None where no token is distilled, or
                where batch.teacher_logprobs came from a server.
            goal: another objective than the method's, for diagnostics.
        """
        weight, bias = self.trained_head()
        hidden = self.hidden(batch.input_ids, batch.position_ids, batch.loss_index, batch.lengths)
        if goal is None:
            distil = teacher is not None or batch.teacher_logprobs is not None
            goal = self.objective if distil else self.objective_alone
        out = self.loss(hidden, weight, bias, batch, normalizer, teacher, goal)
        return PolicyOutput(out.loss, out.logprobs, token_sums(out, batch), out.teacher_logprobs)

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: PackedBatch,
        normalizer: Tensor,
        teacher: kk.TeacherHead | None,
        goal: kk.Objective,
    ) -> kk.LossOutput:
        """Compute the loss of the tokens of a pack; a subclass may compute another one.

        Args:
            hidden, weight, bias: [N, H], [V, H] and [V] or None, hidden in the compute dtype, the
                others in it or in float32; under tensor parallelism these are DTensors.
                head_adapter is not merged into weight.
            The rest: as forward.
        """
        distil, sketch = goal.kd is not None, self.sketch
        if sketch is not None:  # the same numbers however completions are packed
            sketch = replace(sketch, rows=batch.token_numbers)
        group = self.vocab_group if sketch is None else None  # a sketch needs the gathered head
        if group is not None:
            teacher = None if teacher is None else teacher_rows(teacher, len(weight), group.size())
            weight, bias = local(weight), local(bias)
        best = self._likeliest(batch, teacher, goal, len(weight))
        head: dict[str, Any] = {
            "token_weights": batch.token_weights,
            "active_rows": batch.active_rows,
            "compact": self._compact(batch, goal, hidden.device),
            "teacher": teacher if distil and best is None else None,
            "teacher_logprobs": batch.teacher_logprobs if distil and best is None else None,
            "normalizer": normalizer,
            "bias": bias,
            "adapter": self.head_adapter(),
            "temperature": self.temperature,
            "softcap": self.softcap,
            "vocab_size": self.sampled_vocab_size,
            "entropy": True,
            "workspace_bytes": self.workspace_bytes,
            "backward": "exact" if sketch is None else "sketch",
            "sketch": sketch,
            "impl": self.head_impl,
            "vocab_group": group,
        }
        if self.loss_of_rows is not None:
            return self.loss_of_rows(hidden, weight, batch, goal, head)
        out = kk.kdrl_loss(
            hidden,
            weight,
            batch.tokens,
            advantages=None if goal.policy == "off" else batch.advantages,
            old_logprobs=batch.old_logprobs,
            teacher_topk=None if best is None else (best.ids, best.logprobs),
            kd_weight=batch.kd_weight if distil else None,
            objective=goal,
            **head,
        )
        return out if best is None else with_sampled(out, best.sampled, batch)

    def _compact(self, batch: PackedBatch, goal: kk.Objective, device: torch.device) -> bool | None:
        """Return `compact` of the head's functions: False where a GPU has nothing to leave out.

        The number of rows that have a gradient would be waited for. Without old log-probabilities
        the policy gradient clips none; distillation and an entropy bonus clip none anyway.
        """
        whole = goal.entropy_coef != 0 or (goal.kd is not None and batch.all_distilled)
        whole |= goal.policy != "off" and batch.all_learn and batch.old_logprobs is None
        whole &= self.loss_of_rows is None or not self.loss_of_rows.leaves_rows_out
        return False if whole and device.type != "cpu" else None

    def _likeliest(
        self, batch: PackedBatch, teacher: kk.TeacherHead | None, goal: kk.Objective, columns: int
    ) -> TopkScores | None:
        """Return the teacher's likeliest tokens, where the loss reads them: its own, or those that
        a server gave."""
        if goal.topk_kd is None:
            return None
        if teacher is None:
            return batch.teacher_topk
        return likeliest(teacher, batch.tokens, self.topk, self.sampled_vocab_size or columns)


def token_sums(out: kk.LossOutput, batch: PackedBatch) -> dict[str, Tensor]:
    """Sum over the tokens of a pack, on the device, float64; metrics.token_means divides the sums.

    Beside the sums of the loss there are sampler_mismatch_sum and sampler_mismatch_max, of
    |log p trainer - log p sampler| in nats, and teacher_log_ratio_histogram over the distilled
    tokens. All add up over micro-batches and ranks, but for metrics.LARGEST.
    """
    used = batch.token_weights > 0
    mismatch = (out.logprobs - batch.sampled_logprobs).abs().double().where(used, 0.0)
    means = ("ratio_max", "sketch_noise")
    sums = {name: value.double() for name, value in out.metrics.items() if name not in means}
    sums["sampler_mismatch_sum"] = mismatch.sum()
    sums["sampler_mismatch_max"] = mismatch.max() if len(mismatch) else mismatch.sum()
    if out.teacher_logprobs is not None:
        distilled = used & (batch.kd_weight > 0)
        log_ratio = (out.logprobs - out.teacher_logprobs).double()
        sums["teacher_log_ratio_histogram"] = histogram(log_ratio, distilled)
    return sums
