"""GRPO of ms-swift, whose log-probabilities and entropies come from the head."""

from typing import Any

import torch
from swift.rlhf_trainers import GRPOTrainer
from swift.utils import get_logger
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_kernels.integrations.swift.head import SwiftHead, through_head


class SwiftGRPOTrainer(GRPOTrainer):
    """Computes ms-swift's GRPO, with or without a teacher, without [tokens, vocabulary] logits.

    Loss, advantages and metrics are those of ms-swift. use_liger_kernel says which layers of the
    model are Liger's; the loss is always ms-swift's own, so whatever Liger's loss lacks (a
    teacher, entropies, padding_free, delta) works beside it. Tokens outside of the completion mask
    are not projected, and get log-probability 0.
    """

    def _prepare_liger_loss(self) -> None:
        """Say that this loss is used, and refuse what it does not compute."""
        self.use_liger_loss = False
        size = self.template.sequence_parallel_size
        if size > 1:
            raise ValueError(
                f"sequence_parallel_size must be 1 with the plugin of kdrl_kernels, got {size}"
            )
        get_logger().info("log-probabilities: kdrl_kernels.linear_logprobs, without logits")

    def _get_per_token_logps_and_entropies_single(
        self,
        model: nn.Module,
        model_inputs: dict[str, Any],
        grpo_batch: Any,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities [B, T] of the completions, and their entropies or None."""
        T = grpo_batch.logits_to_keep
        tokens, mask = model_inputs["input_ids"][:, -T:], self._row_mask(grpo_batch)
        inputs = dict(model_inputs)
        if "use_cache" in self.model_kwarg_keys:
            inputs["use_cache"] = False
        if "logits_to_keep" in self.model_kwarg_keys:
            inputs["logits_to_keep"] = T + 1

        def rows(hidden: Tensor, head: SwiftHead) -> Tensor:
            out = kk.linear_logprobs(
                hidden[:, -(T + 1) : -1],
                head.weight,
                tokens,
                mask=mask,
                entropy=compute_entropy,
                **head.options(self.temperature),
            )
            columns = [out.logprobs] if out.entropy is None else [out.logprobs, out.entropy]
            return torch.stack(columns, dim=-1)

        values = through_head(self.accelerator, model, inputs, rows)
        logprobs = values[..., 0]
        entropies = values[..., 1].detach() if compute_entropy else None
        if self.template.padding_free:
            lengths = grpo_batch.seq_lengths
            return self._unpad_logps_and_entropies(
                logprobs, entropies, T, len(lengths), lengths, compute_entropy
            )
        return logprobs, entropies

    def _row_mask(self, grpo_batch: Any) -> Tensor:
        """Return the completion mask [B, T], or [1, T] where sequences follow without padding."""
        mask: Tensor = grpo_batch.completion_mask
        if not self.template.padding_free:
            return mask
        lengths = grpo_batch.seq_lengths.tolist()
        rows = [row[len(row) - n :] for row, n in zip(mask, lengths, strict=True)]
        return torch.cat(rows)[None]
