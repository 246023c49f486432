"""Puts every library that computes a part of the same job behind one interface.

A library offers pieces (log-probabilities, a divergence, a whole GRPO loss); an operation is put
together from the fewest of its pieces, or refused with the reason. Libraries are imported by
`load`, so that a missing one costs nothing and is named in the table.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from bench import definition
from bench.inputs import Inputs
from bench.machine import DEVICE
from bench.ops import Op

Setting = Mapping[str, Any]
"""Named arguments of a provider's calls, such as a chunk size."""
Outputs = dict[str, Tensor]
"""By name: "loss" 0-d, differentiable; and what there is of "logprobs", "entropy" and "kl" [N]."""
MODULES = ("home", "liger", "trl", "cce", "torch_lce", "verl", "fla", "quack", "unsloth", "flash")


class Refusal(Exception):  # noqa: N818 (nothing is wrong)
    """A provider does not do an operation; the message is the reason shown in the table."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A provider is one library, or one way to use it. Its calls take (inputs, ..., **setting)."""

    name: str
    package: str | None = None
    """Distribution on PyPI; None: nothing to install."""
    gpu_only: str | None = None
    """Why it does not run on a CPU."""
    settings: tuple[Setting, ...] = ({},)
    """Settings that are tried once each; the fastest is timed."""
    whole: Callable[..., Outputs] | None = None
    """(inputs, op, **setting) -> outputs of any operation, in one call."""
    score: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    """(hidden, weight, tokens, entropy: bool, **setting) -> log-probabilities [N], entropy [N]."""
    divergence: Callable[..., Tensor] | None = None
    """(inputs, "rkl", "fkl" or "jsd", **setting) -> divergence to the teacher, 0-d mean or [N]."""
    token_divergence: bool = False
    """Whether it is [N], so that each token's may have a weight."""
    topk_divergence: Callable[..., Tensor] | None = None
    """(inputs, **setting) -> definition.topk_reverse_kl, 0-d mean or [N]."""
    policy: Callable[..., Tensor] | None = None
    """(inputs, op, **setting) -> mean clipped policy-gradient loss, 0-d."""
    cross_entropy: Callable[..., Tensor] | None = None
    """(inputs, **setting) -> mean of -log p, 0-d."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """{operation or KD term: reason} of further refusals, beside what no piece computes."""


def load() -> list[Provider]:
    """Import the modules of all providers, installed or not, and return the providers."""
    every_provider: list[Provider] = []
    for name in MODULES:
        every_provider += importlib.import_module(f"bench.providers.{name}").PROVIDERS
    return every_provider


def version(provider: Provider) -> str | None:
    """Return the version of the provider's package; None without a package, or if not installed."""
    try:
        return metadata.version(provider.package) if provider.package else None
    except metadata.PackageNotFoundError:
        return None


def check(provider: Provider, op: Op) -> None:
    """Raise Refusal, with the reason, where the provider cannot do the operation here."""
    if provider.package and version(provider) is None:
        raise Refusal("not installed")
    if DEVICE == "cpu" and provider.gpu_only:
        raise Refusal(f"not supported: {provider.gpu_only}")
    for key in (op.name, op.kd or "", *_terms(op)):
        if key in provider.refused:
            raise Refusal(f"not supported: {provider.refused[key]}")
    if provider.whole is None:
        _check_pieces(provider, op)


def _terms(op: Op) -> list[str]:
    """Return the divergences that a provider without their mixture must add up."""
    return op.kd.split("+") if op.kd else []


def _check_pieces(provider: Provider, op: Op) -> None:
    needed = {
        "log-probabilities": (not op.gradients or op.kd == "k2", provider.score),
        "divergence": (op.teacher_head and op.kd != "k2", provider.divergence),
        "divergence of each token": (
            op.entropy_weight and provider.divergence is not None,
            provider.token_divergence or None,
        ),
        "teacher's entropy": (
            op.entropy_weight and provider.token_divergence,
            None if "logprob + entropy" in provider.refused else provider.score,
        ),
        "top-k divergence": (op.kd == "topk_rkl", provider.topk_divergence),
        "policy gradient": (op.policy, provider.policy or provider.score),
        "cross entropy": (op.cross_entropy, provider.cross_entropy or provider.score),
        "adapter on the head": (op.adapter, None),
    }
    missing = [
        name for name, (needs_piece, piece) in needed.items() if needs_piece and piece is None
    ]
    if missing:
        raise Refusal(f"not supported: no {' and no '.join(missing)}")


def forward(provider: Provider, inputs: Inputs, op: Op, setting: Setting) -> Outputs:
    """Run the operation's forward pass; its "loss", where it has one, takes .backward().

    It is one call where the provider has `whole`, else the sum of the pieces that it needs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's code
        if provider.whole is not None:
            return provider.whole(inputs, op, **setting)
        return _composed(provider, _with_one_teacher(inputs, op), op, setting)


def _with_one_teacher(inputs: Inputs, op: Op) -> Inputs:
    """Return inputs in whose teacher's place two teachers are that one head which their mean is."""
    if op.teachers == 1:
        return inputs
    both_hidden, both_weights = inputs.two_teachers
    return replace(inputs, teacher_hidden=both_hidden / 2, teacher_weight=both_weights)


def _composed(provider: Provider, inputs: Inputs, op: Op, setting: Setting) -> Outputs:
    if not op.gradients:
        with torch.no_grad():
            return _score(provider, inputs, setting, entropy=True)
    outputs: Outputs = {}
    fused = provider.cross_entropy if op.cross_entropy else provider.policy
    if op.kd == "k2" or (fused is None and (op.policy or op.cross_entropy)):
        outputs = _score(provider, inputs, setting, entropy=False)
    losses: list[Tensor] = []
    if op.cross_entropy:
        losses.append(fused(inputs, **setting) if fused else -outputs["logprobs"].mean())
    if op.policy and "logprobs" in outputs:
        losses.append(definition.policy_loss(outputs["logprobs"], inputs, op).mean())
    elif op.policy:
        assert provider.policy is not None
        losses.append(provider.policy(inputs, op, **setting))
    if op.kd == "k2":
        with torch.no_grad():
            assert provider.score is not None
            teacher = inputs.teacher_hidden, inputs.shared_teacher_weight, inputs.tokens
            lq, _ = provider.score(*teacher, False, **setting)
        losses.append((outputs["logprobs"] - lq).square().mean() / 2)
    elif op.kd:
        terms = [_divergence(provider, inputs, kd, setting) for kd in _terms(op)]
        kl = sum(terms[1:], terms[0]) / len(terms)
        outputs |= {"kl": kl} if kl.ndim else {}
        losses.append((_entropy_weight(provider, inputs, op, setting) * kl).mean())
    return outputs | {"loss": sum(losses[1:], losses[0])}


def _entropy_weight(provider: Provider, inputs: Inputs, op: Op, setting: Setting) -> Tensor | float:
    """Return the weight of each token's divergence, by one more projection of the teacher."""
    if not op.entropy_weight:
        return 1.0
    assert provider.score is not None
    teacher = inputs.teacher_hidden, inputs.shared_teacher_weight, inputs.tokens
    with torch.no_grad():
        _, entropy = provider.score(*teacher, True, **setting)
    assert entropy is not None
    return (-entropy).exp()


def _divergence(provider: Provider, inputs: Inputs, kd: str, setting: Setting) -> Tensor:
    if kd == "topk_rkl":
        assert provider.topk_divergence is not None
        return provider.topk_divergence(inputs, **setting)
    assert provider.divergence is not None
    return provider.divergence(inputs, kd, **setting)


def _score(provider: Provider, inputs: Inputs, setting: Setting, entropy: bool) -> Outputs:
    assert provider.score is not None
    lp, h = provider.score(inputs.hidden, inputs.shared_weight, inputs.tokens, entropy, **setting)
    return {"logprobs": lp} | ({"entropy": h} if h is not None else {})
