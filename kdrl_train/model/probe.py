"""Compares a model that is split at its head with the model's own logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_kernels.head_config import logit_scale
from kdrl_train.model.fsdp import full
from kdrl_train.model.miniature import EXPERTS, has_number
from kdrl_train.model.policy import HeadedModel

PROBE_LENGTHS = (7, 5)
"""Tokens of the two sequences of the start-up probe."""

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float64: 1e-6}
"""Largest RMS difference of the probe, as a share of the RMS of what is compared: well above the
rounding of a deep model in that dtype, well below what another formula or a leak would give."""

LARGE_LOGITS = 30.0
"""RMS of the logits at which caps are seen: models cap at 15 to 50."""


@torch.no_grad()
def probe(wrapped: HeadedModel, name: str, *, packed: bool = True) -> float:
    """Compare the head path with the model's own logits, a sequence with another end, training with
    evaluation, and a pack with single sequences. choice.py has tested the attention beyond its
    windows, on a miniature.

    Args:
        wrapped: policy or teacher.
        name: "model.policy" or "model.teacher", for the message.
        packed: whether packs will hold more than one sequence.
    Returns: RMS difference of the logits as a share of their RMS.
    Raises: ValueError when a comparison fails: the loss would be that of another model.
    """
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(wrapped.vocab_size, (1, n), generator=draw) for n in PROBE_LENGTHS]
    ids = [sequence.to(wrapped.device) for sequence in ids]
    single = [_states(wrapped, [sequence]) for sequence in ids]
    probe_error = _compare_logits(wrapped, name, ids, single)
    _compare_training(wrapped, name, ids[0], single[0])
    _compare_ends(wrapped, name, ids[0], single[0])
    if packed and wrapped.choice.share(PROBE_LENGTHS):
        _compare_packs(wrapped, name, ids, single)
    return probe_error


def _states(wrapped: HeadedModel, ids: Sequence[Tensor]) -> Tensor:
    """Compute the hidden states of a pack of sequences, each [1, T]."""
    lengths = [sequence.shape[1] for sequence in ids]
    positions = torch.cat([torch.arange(n, device=wrapped.device) for n in lengths])
    return wrapped.hidden(torch.cat(list(ids), dim=1), positions[None], None, lengths)


def _compare_logits(
    wrapped: HeadedModel, name: str, ids: list[Tensor], single: list[Tensor]
) -> float:
    """Compare softcap(scale · hidden · weightᵀ + bias) with the model's own logits.

    Twice: as they are, and with hidden states so large that a cap bends the logits.
    """
    states, width = torch.cat(single), _head(wrapped)[0].shape[1]
    if states.shape[1] != width:
        raise ValueError(
            f"{name} must have an LM head of the width of its hidden states, "
            f"{states.shape[1]:,}, got {type(wrapped.model).__name__} with {width:,}: its "
            "architecture has layers between the two and cannot be trained here"
        )
    errors = [_logits_error(wrapped, ids, states, 1.0)]
    weight, _ = _head(wrapped)
    rms = torch.nn.functional.linear(states, weight).float().square().mean().sqrt().item()
    errors.append(_logits_error(wrapped, ids, states, LARGE_LOGITS / max(rms, 1e-6)))
    if not math.isfinite(sum(errors)):
        raise ValueError(
            f"{name} must compute finite logits, got NaN or infinity from "
            f"{type(wrapped.model).__name__}: a weight of its files is not finite, or too large "
            f"for {wrapped.compute_dtype}: download the files again, or name another model"
        )
    tolerance = PROBE_TOLERANCE[wrapped.compute_dtype]
    if not max(errors) <= tolerance:
        raise ValueError(
            f"{name} must have logits = softcap(scale · hidden · weightᵀ + bias), got "
            f"{type(wrapped.model).__name__}, whose own logits differ from that by "
            f"{max(errors):.1e} of their RMS (tolerance {tolerance:.0e}): its architecture does "
            "something else before or after its LM head and cannot be trained here"
        )
    return errors[0]


def _head(wrapped: HeadedModel) -> tuple[Tensor, Tensor | None]:
    """Return the LM head's weight and bias, gathered where the vocabulary is split over ranks."""
    weight, bias = wrapped.head()
    return full(weight), None if bias is None else full(bias)


def _logits_error(wrapped: HeadedModel, ids: list[Tensor], states: Tensor, factor: float) -> float:
    """Return the RMS difference of the logits as a share of their RMS.

    factor: what the hidden states are multiplied by, ours and, before its LM head, the model's.
    """
    model, temperature = wrapped.model, wrapped.temperature
    weight, bias = _head(wrapped)
    head = torch.nn.functional.linear(states * factor, weight, bias).float()
    ours = head / temperature
    if wrapped.softcap is not None:
        ours = torch.tanh(head / wrapped.softcap) * wrapped.softcap / temperature
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, inputs: (inputs[0] * factor, *inputs[1:])
    )
    try:
        with wrapped.autocast():
            theirs = torch.cat([model(input_ids=i, use_cache=False).logits[0].float() for i in ids])
    finally:
        hook.remove()
    scale = logit_scale(model.config.get_text_config())
    return _relative_rms(ours, theirs / (temperature * scale))


def _compare_ends(wrapped: HeadedModel, name: str, ids: Tensor, states: Tensor) -> None:
    """Change the last tokens of a sequence: the states [T, H] before them must stay the same.

    A state that sees the token that it predicts gives log-probabilities of no use, in a teacher
    without any other sign.
    """
    for first in (ids.shape[1] // 2, ids.shape[1] - 1):
        other = ids.clone()
        other[:, first:] = (ids[:, first:] + 1) % wrapped.vocab_size
        change = _relative_rms(_states(wrapped, [other])[:first].float(), states[:first].float())
        if not change <= _allowed(wrapped):
            raise ValueError(
                f"{name} must be causal, got {type(wrapped.model).__name__}, whose hidden states "
                f"change by {change:.1e} of their RMS when tokens behind them do: look in its "
                "config.json for is_causal, is_decoder or use_bidirectional_attention, or name "
                "another model"
            )


def _allowed(wrapped: HeadedModel) -> float:
    """Return the largest change of a token's state, as a share of the RMS, by a token that it must
    not see: none to the bit, but for a model with experts, where how many tokens share an expert
    changes the rounding."""
    experts = has_number(wrapped.model.config, EXPERTS)
    return PROBE_TOLERANCE[wrapped.compute_dtype] if experts else 0.0


def _compare_training(wrapped: HeadedModel, name: str, ids: Tensor, evaluated: Tensor) -> None:
    """Run a sequence twice in training mode: the runs must be equal, and those of evaluation."""
    before = wrapped.training
    wrapped.train()
    devices = [wrapped.device] if wrapped.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        first, second = (_states(wrapped, [ids]) for _ in range(2))
    wrapped.train(before)
    noise = _relative_rms(second.float(), first.float())
    change = _relative_rms(first.float(), evaluated.float())
    if noise != 0 or not change <= PROBE_TOLERANCE[wrapped.compute_dtype]:
        raise ValueError(
            f"{name} must compute in training what it computes in evaluation, got "
            f"{type(wrapped.model).__name__}, two runs of which differ by {noise:.1e} of their RMS "
            f"in training, and by {change:.1e} from evaluation: set dropout, jitter and other "
            "noise to 0 in its config.json"
        )


def _compare_packs(
    wrapped: HeadedModel, name: str, ids: list[Tensor], single: list[Tensor]
) -> None:
    """Compare a pack with its sequences alone, and change one of them: the other stays the same."""
    first, second = _states(wrapped, ids).split(PROBE_LENGTHS)
    leak = _relative_rms(torch.cat([first, second]).float(), torch.cat(single).float())
    other = _states(wrapped, [ids[0], ids[1].flip(1)])[: PROBE_LENGTHS[0]]
    change = _relative_rms(other.float(), first.float())
    other = _states(wrapped, [ids[0].flip(1), ids[1]])[PROBE_LENGTHS[0] :]
    change = max(change, _relative_rms(other.float(), second.float()))
    tolerance = PROBE_TOLERANCE[wrapped.compute_dtype]
    if not (leak <= tolerance and change <= _allowed(wrapped)):
        raise ValueError(
            f"{name} must keep packed sequences apart by their position ids, got "
            f"{type(wrapped.model).__name__}, whose hidden states change by "
            f"{max(leak, change):.1e} of their RMS when "
            "two sequences share a pack: set optim.micro_batch_tokens to 1 (one sequence a pack)"
        )


def _relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """RMS of the difference as a share of the RMS of `theirs`."""
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
