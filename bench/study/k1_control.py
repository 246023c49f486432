"""The control of the study: k1 as a loss, which kdrl_loss refuses (kdrl_kernels/objective.py)."""

from dataclasses import replace

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy


class K1Policy(Policy):
    """A policy whose distillation term is l = log p - log q itself, in the place of l² / 2.

    The derivative of l in log p is 1, so no teacher is in the gradient. On-policy the term takes
    the same weight off every token's advantage, whoever the teacher is, and its expected gradient
    is zero. The teacher's log-probabilities are in the value of the loss and in the metrics.
    """

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: PackedBatch,
        normalizer: Tensor,
        teacher: kk.TeacherHead | None,
        objective: kk.Objective,
    ) -> kk.LossOutput:
        """Return the loss of a pack with l for k2, and the metrics that k2 would have.

        A pack without distilled tokens has the loss of any other policy.
        """
        if objective.kd is None:
            return super().loss(hidden, weight, bias, batch, normalizer, teacher, objective)
        assert objective.kd == "k2", objective.kd
        assert batch.old_logprobs is None, "the runs of the study are strictly on-policy"
        policy = None if objective.policy == "off" else replace(objective, kd=None)

        def token_losses(rows: kk.Rows) -> Tensor:
            """Return the policy gradient of each row plus kd_coef · kd_weight · l, [C]."""
            assert rows.teacher_logprobs is not None
            scale = objective.kd_coef * batch.kd_weight[rows.index]
            log_ratio = rows.logprobs - rows.teacher_logprobs
            losses = scale * torch.where(scale == 0, 0, log_ratio)
            if policy is None:
                return losses
            return losses + policy.losses(replace(rows, advantages=batch.advantages[rows.index]))

        with torch.no_grad():
            as_k2 = super().loss(hidden, weight, bias, batch, normalizer, teacher, objective)
        out = kk.linear_token_loss(
            hidden,
            weight,
            batch.tokens,
            token_losses,
            token_weights=batch.token_weights,
            teacher=teacher,
            teacher_logprobs=batch.teacher_logprobs,
            normalizer=normalizer,
            bias=bias,
            temperature=self.temperature,
            softcap=self.softcap,
            vocab_size=self.sampled_vocab_size,
            entropy=True,
            workspace_bytes=self.workspace_bytes,
            impl=self.head_impl,
        )
        return replace(out, metrics=as_k2.metrics | out.metrics)  # its own numbers of rows
