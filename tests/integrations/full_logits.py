"""GRPOTrainer by full logits, with a teacher's exact KL: what others are compared with."""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from kdrl_kernels.integrations.trl.head import head_adapters

BETA = 0.1


class FullLogitsTrainer(GRPOTrainer):
    """Is GRPOTrainer by full logits, plus BETA · KL(policy, teacher) of each token by them.

    The KL is not multiplied by an importance ratio, and normalised as in the loss type dapo.
    """

    def __init__(self, *arguments: Any, teacher: Any = None, **options: Any) -> None:
        with head_adapters():
            super().__init__(*arguments, **options)
        self.teacher = teacher

    def _logprobs(self, model: Any, ids: Tensor, mask: Tensor, count: int, images: Any) -> Tensor:
        more = {} if images is None else {"pixel_values": images}
        logits = model(input_ids=ids, attention_mask=mask, **more).logits[:, -count - 1 : -1]
        return (logits.float() / self.temperature).log_softmax(-1)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        arguments = input_ids, attention_mask, logits_to_keep, pixel_values
        logp = self._logprobs(model, *arguments)
        chosen = logp.gather(2, input_ids[:, -logits_to_keep:, None]).squeeze(2)
        if self.teacher is not None:
            with torch.no_grad():
                logq = self._logprobs(self.teacher, *arguments)
            self.kl = (logp.exp() * (logp - logq)).sum(-1)
        return chosen, -(logp.exp() * logp).sum(-1), None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.teacher is None:
            return loss
        total = (self.kl * inputs["completion_mask"]).sum()
        return loss + BETA * total / inputs["num_items_in_batch"]
