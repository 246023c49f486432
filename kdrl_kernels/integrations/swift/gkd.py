"""GKD of ms-swift, whose divergence comes from the heads of student and teacher."""

from contextlib import ExitStack
from typing import Any

import torch
from swift.rlhf_trainers import GKDTrainer
from swift.rlhf_trainers.gkd_loss import DataSource, jsd_loss
from swift.rlhf_trainers.utils import profiling_decorator
from swift.trainers import disable_gradient_checkpointing
from swift.utils import get_logger
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_kernels.integrations.swift.head import SwiftHead, through_head

MOST_TOKENS = 512
"""Most tokens of a row beside the label whose log-probabilities linear_logprobs returns."""
Places = tuple[Tensor, ...]
"""Sequences and positions of the labelled tokens, [N] each; a GPU is waited for to count them."""
NEVER = -1e4
"""Log-probability in place of -inf, where a row has fewer than K likely tokens."""


class SwiftGKDTrainer(GKDTrainer):
    """Computes ms-swift's GKD without [tokens, vocabulary] logits of student and teacher.

    beta 0, 1 and between are exact forward KL, reverse KL and JSD by one kdrl_loss; gkd_logits_topk
    and a teacher's server are ms-swift's divergence over K tokens, renormalised, whose
    log-probabilities are those of linear_logprobs. Of two vocabularies the columns of both count;
    ms-swift fills up the smaller model's logits with the larger one's.
    """

    def _prepare_liger_loss(self) -> None:
        """Say that this loss is used, and refuse what it does not compute."""
        self.use_liger_gkd_loss = False
        size, config = self.template.sequence_parallel_size, self.model.config.get_text_config()
        if size > 1:
            raise ValueError(
                f"sequence_parallel_size must be 1 with the plugin of kdrl_kernels, got {size}"
            )
        if (self.gkd_logits_topk or 0) > MOST_TOKENS:
            raise ValueError(
                f"gkd_logits_topk must be at most {MOST_TOKENS} with the plugin of kdrl_kernels, "
                f"got {self.gkd_logits_topk}"
            )
        if self.args.sft_alpha > 0 and getattr(config, "output_router_logits", False):
            raise ValueError(
                "sft_alpha must be 0 where the model's loss has a term for its router, "
                f"got {self.args.sft_alpha}"
            )
        get_logger().info("divergence: kdrl_kernels.kdrl_loss, without logits")
        if self.teacher_model is not None:
            V_t = self.teacher_model.config.get_text_config().vocab_size
            if V_t != self._columns():
                get_logger().warning(
                    f"the student knows {self._columns()} tokens, the teacher {V_t}: those of both "
                    "count (ms-swift puts the larger one's logits into the other)"
                )

    @profiling_decorator
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 (of the host's signature)
    ) -> Any:
        """Return the mean over the labelled tokens of the divergence from the teacher."""
        student = dict(inputs["model_inputs"])
        teacher = dict(inputs["teacher_model_inputs"])
        if self.get_use_logits_to_keep(True):
            self.prepare_logits_to_keep(student)
            if not self.use_teacher_api:
                self.prepare_logits_to_keep(teacher)
        labels, places = _targets(student)
        _, of_teacher = _targets(teacher)
        if len(places[0]) != len(of_teacher[0]):
            raise ValueError(
                f"student and teacher must have as many labelled tokens, got {len(places[0])} "
                f"and {len(of_teacher[0])}"
            )
        sft_alpha = self.args.sft_alpha
        if inputs["gkd_batch"].data_source == DataSource.STUDENT:
            sft_alpha = 0.0
        target: Any
        if self.use_teacher_api:
            target = _served(inputs["gkd_batch"], of_teacher, self.temperature)
        else:
            target = self._teacher_rows(model, teacher, of_teacher)

        def loss(hidden: Tensor, head: SwiftHead) -> Tensor:
            rows, tokens = hidden[places], labels[places]
            value = self._divergence(rows, head, tokens, target)
            if sft_alpha > 0:
                out = kk.linear_logprobs(rows, head.weight, tokens, **head.options(1.0))
                value = value - sft_alpha * out.logprobs.sum() / max(len(tokens), 1)
            return value.expand(*hidden.shape[:2], 1)

        values = through_head(self.accelerator, model, student, loss)
        value = values[0, 0, 0]
        return (value, None) if return_outputs else value

    def _teacher_rows(
        self, model: nn.Module, inputs: dict[str, Any], places: Places
    ) -> kk.TeacherHead | tuple[Tensor, Tensor]:
        """Run the teacher: its head at the labelled tokens, or its K likeliest tokens of each."""
        K = self.gkd_logits_topk
        copy = self.is_fsdp_enabled or self.is_deepspeed_enabled
        kept: list[Any] = []

        def keep(hidden: Tensor, head: SwiftHead) -> Tensor:
            teacher = head.teacher(hidden[places], self.temperature, copy=copy and K is None)
            kept.append(teacher if K is None else _best(teacher, K, self._columns()))
            return hidden.new_empty(*hidden.shape[:2], 0)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if not self._is_self_distillation:
                model = self.teacher_model
                stack.enter_context(self.load_teacher_model_context())
            elif self._teacher_use_disable_adapter:
                stack.enter_context(self.accelerator.unwrap_model(model).disable_adapter())
            kwargs = self.args.gradient_checkpointing_kwargs
            stack.enter_context(disable_gradient_checkpointing(model, kwargs))
            through_head(self.accelerator, model, inputs, keep)
        (teacher,) = kept
        return teacher

    def _columns(self) -> int:
        """Return how many tokens the student knows."""
        columns: int = self.model.config.get_text_config().vocab_size
        return columns

    def _divergence(
        self, rows: Tensor, head: SwiftHead, tokens: Tensor, target: kk.TeacherHead | Any
    ) -> Tensor:
        """Return the mean divergence of N rows, 0 for none."""
        options = head.options(self.temperature)
        if isinstance(target, kk.TeacherHead):
            out = kk.kdrl_loss(
                rows,
                head.weight,
                tokens,
                advantages=None,
                teacher=target,
                normalizer=max(len(tokens), 1),
                objective=_objective(self.beta),
                **options,
            )
            return out.loss
        ids, logprobs = target
        covered = logprobs.isfinite().any(dim=-1).nonzero().squeeze(1)  # a server knows not all
        rows, ids, logprobs = rows[covered], ids[covered], logprobs[covered]
        scored = kk.linear_logprobs(rows, head.weight, ids[:, 0], extra_tokens=ids, **options)
        assert scored.extra_logprobs is not None
        likely = scored.extra_logprobs.masked_fill(ids < 0, NEVER)
        total: Tensor = jsd_loss(likely, logprobs, self.beta)
        return total / max(len(ids), 1)


def _objective(beta: float) -> kk.Objective:
    """Return the objective of ms-swift's beta: 0 forward KL, 1 reverse KL, else JSD."""
    if beta == 0:
        return kk.Objective(policy="off", kd="fkl", kd_coef=1.0)
    if beta == 1:
        return kk.Objective(policy="off", kd="rkl", kd_coef=1.0)
    return kk.Objective(policy="off", kd="jsd", kd_coef=1.0, jsd_alpha=beta)


def _targets(inputs: dict[str, Any]) -> tuple[Tensor, Places]:
    """Take the labels out of a model's inputs: the next token of each row, and where it counts."""
    labels = torch.roll(inputs.pop("labels"), shifts=-1, dims=1)
    return labels, (labels != -100).nonzero(as_tuple=True)


def _served(batch: Any, places: Places, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the K tokens of each labelled row that a server sent, and their log-probabilities."""
    return batch.teacher_topk_indices[places], batch.teacher_topk_logprobs[places] / temperature


def _best(teacher: kk.TeacherHead, K: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the teacher's K likeliest of its first columns [N, K] and their log-probabilities."""
    hidden, weight = teacher.hidden, teacher.weight[:columns]
    out = kk.linear_logprobs(
        hidden,
        weight,
        torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device),
        topk=K,
        bias=None if teacher.bias is None else teacher.bias[:columns],
        temperature=teacher.temperature,
        softcap=teacher.softcap,
    )
    assert out.topk_tokens is not None
    assert out.topk_logprobs is not None
    return out.topk_tokens, out.topk_logprobs.masked_fill(out.topk_tokens < 0, NEVER)
