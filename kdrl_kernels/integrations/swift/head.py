"""Replaces the LM head of a model of ms-swift during one forward.

The model's own forward runs, with whatever its template, PEFT or a wrapper puts around it. Where
it calls its LM head, a function of the hidden states is computed instead of the logits. So the
weights are those of that moment, gathered by FSDP or ZeRO-3.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from swift.rlhf_trainers.utils import _ForwardRedirection
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_kernels.head_config import head_scalars
from kdrl_kernels.integrations.adapted_head import without_adapter

PROBES = (16.0, 256.0)
"""Logits that go through the model beside the values, to see what it does to logits: a cap of 15 to
50 bends the first, a cap of up to 1,000 the second."""

_probed: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class SwiftHead:
    """Holds the weights of an LM head, valid inside the call that replaces it.

    Args:
        weight, bias: [V, H] and [V] or None.
        config: of the text model, which says how it scales and caps its logits.
        adapter: the LoRA on the head, or None.
    """

    weight: Tensor
    bias: Tensor | None
    config: Any
    adapter: kk.LowRank | None = None

    def options(self, temperature: float) -> dict[str, Any]:
        """Return the keywords of kdrl_loss and linear_logprobs at a temperature of the sampler."""
        temperature, softcap = head_scalars(self.config, temperature)
        return {
            "bias": self.bias,
            "temperature": temperature,
            "softcap": softcap,
            "adapter": self.adapter,
        }

    def teacher(self, hidden: Tensor, temperature: float, *, copy: bool) -> kk.TeacherHead:
        """Return the head of a constant model with its hidden states [N, H].

        Args:
            copy: True where the weight is gone after the call, as where it is sharded.
        """
        weight, options = self.weight.detach(), self.options(temperature)
        adapter = options.pop("adapter")
        if adapter is not None:
            update = adapter.scale * (adapter.B.detach() @ adapter.A.detach())
            weight, copy = weight + update.to(weight.dtype), False
        return kk.TeacherHead(hidden, weight.clone() if copy else weight, **options)


HeadFunction = Callable[[Tensor, SwiftHead], Tensor]
"""From hidden states [B, T, H] and the head to the values [B, T', c] that take the logits' place.
"""


def through_head(
    accelerator: Any, model: nn.Module, inputs: dict[str, Any], function: HeadFunction
) -> Tensor:
    """Run the forward of a model, wrapped or not, and return what function makes of its head.

    Args:
        inputs: keywords of the model's forward, without labels.
        function: called once, in place of the head.
    Raises: ValueError where the head is not one linear layer called once, or where the model does
        something to its logits of which its config says nothing.
    """
    inner = accelerator.unwrap_model(model)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        config = inner.config.get_text_config()
        with _replaced(inner.get_output_embeddings(), config, function) as values:
            logits = inner.forward(*args, **kwargs).logits
        if len(values) != 1:
            raise ValueError(
                f"{type(inner).__name__} must call its LM head once a forward, got {len(values)} "
                "calls: train it without this plugin"
            )
        _check_logits(inner, logits, config)
        return values[0][..., : -len(PROBES)]

    values: Tensor = _ForwardRedirection()(model, inner, forward, **inputs)
    return values


@contextmanager
def _replaced(head: Any, config: Any, function: HeadFunction) -> Iterator[list[Tensor]]:
    """Compute function in place of a head; its outputs, after all other hooks, are collected."""
    linear, adapter = without_adapter(head)
    layer = linear if adapter is None else head  # whose hooks gather what is sharded
    before, values = vars(layer).get("forward"), []

    def forward(hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        rows = function(hidden, _head(head, config))
        probes = rows.new_tensor(PROBES).expand(*rows.shape[:-1], len(PROBES))
        return torch.cat([rows, probes], dim=-1)

    def collect(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        values.append(output)

    layer.forward, hook = forward, layer.register_forward_hook(collect)
    try:
        yield values
    finally:
        hook.remove()
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _head(layer: Any, config: Any) -> SwiftHead:
    """Return weight, bias and adapter of an LM head: a linear layer, or what PEFT made of one."""
    linear, adapter = without_adapter(layer)
    if type(linear).forward is not nn.Linear.forward:
        raise ValueError(
            f"the LM head must be a plain linear layer, got {type(linear).__name__}: train this "
            "model without this plugin"
        )
    return SwiftHead(linear.weight, linear.bias, config, adapter)


def _check_logits(model: nn.Module, logits: Tensor, config: Any) -> None:
    """Check, at the first forward, that the model scales and caps its logits as its config says."""
    if model in _probed or logits.numel() == 0:
        return
    temperature, softcap = head_scalars(config)
    last = logits[(-1,) * (logits.ndim - 1)]
    for probe, output in zip(PROBES, last[-len(PROBES) :].tolist(), strict=True):
        value = probe if softcap is None else softcap * math.tanh(probe / softcap)
        value /= temperature
        if not math.isclose(value, output, rel_tol=0.01):  # logits may have 16 bits
            raise ValueError(
                f"{type(model).__name__} must make of a logit {probe:g} what its config says, "
                f"{value:.4g}, got {output:.4g}: its code does something else to its logits; train "
                "it without this plugin"
            )
    _probed.add(model)
