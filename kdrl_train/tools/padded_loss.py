"""Computes the loss of `sft` on padded batches, and compares it with the model's own logits.

Batches are padded on the right: with causal attention no token sees a pad that follows it, so no
attention mask is needed. kdrl_kernels.linear_logprobs computes the loss, only on the tokens that
carry it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import kdrl_kernels as kk
from kdrl_kernels.head_config import backbone, head_scalars
from kdrl_train.copies import to_device
from kdrl_train.model import kept
from kdrl_train.tools.sft_batches import PaddedBatch, SolvedExample, collate

PROBE_LENGTHS = (9, 5)
"""Tokens of the two sequences of the comparison: the shorter one is padded."""
PROBE_TOLERANCE = 1e-3
"""Largest relative difference of the losses of a sequence, in float32."""


def target_logprobs(model: Any, batch: PaddedBatch) -> Tensor:
    """Computes the log-probabilities of batch.targets in nats, [N], differentiable."""
    device = model.device
    ids = to_device(batch.ids, device)
    kept.forget(model)
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = hidden.index_select(0, to_device(batch.predicts, device))
    head = model.get_output_embeddings()
    temperature, softcap = head_scalars(model.config.get_text_config())
    targets = to_device(batch.targets, device)
    return kk.linear_logprobs(
        hidden, head.weight, targets, bias=head.bias, temperature=temperature, softcap=softcap
    ).logprobs


def sft_loss(model: Any, batch: PaddedBatch) -> Tensor:
    """Sums the negative log-likelihood of batch.targets in nats, into a 0-d float32 tensor."""
    return -target_logprobs(model, batch).sum()


@torch.no_grad()
def require_same_loss(model: Any) -> None:
    """Compares the loss of a padded batch with that of each sequence alone, by the model's own
    logits.

    Raises: ValueError where they differ: something else than this module knows of stands before or
        behind its LM head, or its tokens see those behind them.
    """
    draw = torch.Generator().manual_seed(0)
    columns = len(model.get_output_embeddings().weight)
    ids = [torch.randint(columns, (n,), generator=draw) for n in PROBE_LENGTHS]
    batch = collate([SolvedExample([], one.tolist()) for one in ids], 0, learn_prompts=True)
    ours = -target_logprobs(model, batch)
    for one, losses in zip(ids, ours.split([n - 1 for n in PROBE_LENGTHS]), strict=True):
        placed = to_device(one, model.device)
        logits = model(input_ids=placed[None], use_cache=False).logits[0, :-1].float()
        theirs = cross_entropy(logits, placed[1:], reduction="none")
        error = ((losses - theirs).norm() / theirs.norm()).item()
        if not error <= PROBE_TOLERANCE:
            raise ValueError(
                "model must be causal and have logits = softcap(scale · hidden · weightᵀ + bias), "
                f"got {type(model).__name__}, whose own logits give losses that differ by "
                f"{error:.1e} (tolerance {PROBE_TOLERANCE:.0e}): name another model"
            )
