"""Compares a model that is split at its head with the model's own logits."""

import torch
from torch import Tensor

from kdrl_train.model.policy import HeadedModel, _logit_scale

PROBE_LENGTHS = (7, 5)
"""Tokens of the two sequences of the start-up probe."""

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float64: 1e-6}
"""Largest RMS difference of the probe, as a share of the RMS of what is compared: well above the
rounding of a deep model in that dtype, well below what another formula or a leak would give."""


@torch.no_grad()
def probe(wrapped: HeadedModel, name: str, *, packed: bool = True) -> float:
    """Compare the head path with the model's own logits, and a pack with single sequences.

    Args:
        wrapped: policy or teacher.
        name: "model.policy" or "model.teacher", for the message.
        packed: whether packs will hold more than one sequence.
    Returns: RMS difference of the logits as a share of their RMS.
    Raises: ValueError when either comparison fails: the loss would be that of another model.
    """
    model, dtype = wrapped.model, wrapped.compute_dtype
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(wrapped.vocab_size, (1, n), generator=draw) for n in PROBE_LENGTHS]
    ids = [sequence.to(wrapped.device) for sequence in ids]
    positions = [torch.arange(n, device=wrapped.device)[None] for n in PROBE_LENGTHS]
    weight, bias = wrapped.head()
    single = [wrapped.hidden(i, p, None, [i.shape[1]]) for i, p in zip(ids, positions, strict=True)]
    head = [torch.nn.functional.linear(x, weight, bias).float() for x in single]
    ours = torch.cat(head) / wrapped.temperature
    if wrapped.softcap is not None:  # the scale is 1 here: temperature is that of sampling
        ours = torch.tanh(torch.cat(head) / wrapped.softcap) * wrapped.softcap / wrapped.temperature
    with wrapped.autocast():
        theirs = torch.cat([model(input_ids=i, use_cache=False).logits[0].float() for i in ids])
    theirs = theirs / (wrapped.temperature * _logit_scale(model.config.get_text_config()))
    probe_error = _relative_rms(ours, theirs)
    tolerance = PROBE_TOLERANCE[dtype]
    if not probe_error <= tolerance:
        raise ValueError(
            f"{name} must have logits = softcap(scale · hidden · weightᵀ + bias), got "
            f"{type(model).__name__}, whose own logits differ from that by {probe_error:.1e} of "
            f"their RMS (tolerance {tolerance:.0e}): its architecture does something else "
            "before or after its LM head and cannot be trained here"
        )
    if not packed:
        return probe_error
    together = wrapped.hidden(
        torch.cat(ids, dim=1), torch.cat(positions, dim=1), None, PROBE_LENGTHS
    )
    leak = _relative_rms(together.float(), torch.cat(single).float())
    if not leak <= tolerance:
        raise ValueError(
            f"{name} must keep packed sequences apart by their position ids, got "
            f"{type(model).__name__}, whose hidden states change by {leak:.1e} of their RMS when "
            "two sequences share a pack: set optim.micro_batch_tokens to 1 (one sequence a pack)"
        )
    return probe_error


def _relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """RMS of the difference as a share of the RMS of `theirs`."""
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
