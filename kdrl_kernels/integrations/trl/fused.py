"""Replaces the fused LM head that TRL gives a model: log-probabilities, and the loss in one pass.

B completions, C their positions, H hidden size, V vocabulary, N the tokens that are scored.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

import kdrl_kernels as kk
from kdrl_kernels.head_config import backbone
from kdrl_kernels.integrations.trl.head import ModelHead, model_head
from kdrl_kernels.integrations.trl.head_loss import (
    HeadTerms,
    Places,
    kd_loss,
    one_pass,
    places_of,
    rows_of,
)
from kdrl_kernels.integrations.trl.patch import HeadOptions, PartitionedHead
from kdrl_kernels.plan import Backward

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""transformers' names of the number of experts; Llama 4 has the second alone."""


class FusedHead:
    """Computes what stands above the backbone in a model's forward, in place of TRL's.

    model(..., labels=labels, fused_lm_head=True) returns TRL's FusedCausalLMOutput: log_probs and
    entropy where a label is not -100, with a gradient. While terms are set (computing), `loss` is
    theirs; log_probs then have no gradient if terms.joint.

    Args:
        temperature: of the sampler.
        float32: whether the head is computed in float32 outside of autocast.
        states: True returns the hidden states [B, T - 1, H] in the place of log_probs: a teacher's.
    """

    def __init__(self, temperature: float, *, float32: bool = False, states: bool = False) -> None:
        self.temperature = temperature
        self.float32 = float32
        self.states = states
        self.terms: HeadTerms | None = None
        self.metrics: dict[str, Tensor] = {}
        """Sums and counts of the last loss of terms."""
        self.values: dict[str, Tensor] = {}
        """Loss, log-probabilities and entropies of the last forward, without gradient: FSDP2 with
        mixed precision rounds what a forward returns to 16 bits."""

    def attach(self, model: Any) -> None:
        """Replace the forward of a transformers model that is called with fused_lm_head=True.

        Any other call goes to the forward that the model had.
        """
        forward, head = model.forward, self

        @functools.wraps(type(model).forward)  # generate reads the signature
        def fused_forward(
            model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any
        ) -> Any:
            if not fused_lm_head:
                return forward(*args, **kwargs)
            return head.forward(model, args, kwargs)

        model.forward = types.MethodType(fused_forward, model)

    @contextmanager
    def computing(self, terms: HeadTerms) -> Iterator[None]:
        """Let the forward inside the context compute the loss of terms."""
        self.terms, self.metrics = terms, {}
        try:
            yield
        finally:
            self.terms = None

    def forward(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> FusedCausalLMOutput:
        """Run the backbone of a model, then its head."""
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        outputs = backbone(model)(*args, **kwargs | {"use_cache": False})
        hidden = outputs.last_hidden_state
        if shifted is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        else:
            labels = shifted
        balance = _balance_loss(model, outputs, kwargs) if _has_router(kwargs) else None
        if self.states:
            return FusedCausalLMOutput(log_probs=hidden, aux_loss=balance)
        head = model_head(model, self.temperature, float32=self.float32)
        hidden, labels = hidden.to(head.weight.device), labels.to(head.weight.device)
        hidden, arithmetic = head.arithmetic(hidden)
        with arithmetic, head.gathered():
            if self.terms is None:
                output = _scores(head, hidden, labels)
                count = output.label_mask.sum().clamp(min=1) if items is None else items
                output.loss = -output.log_probs.sum() / count
            else:
                output = self._loss(self.terms, head, hidden, labels)
        if balance is not None and self.terms is None:
            output.loss = output.loss + getattr(config, "router_aux_loss_coef", 0.0) * balance
        output.aux_loss = balance
        fields = {name: output.get(name) for name in ("loss", "log_probs", "entropy")}
        self.values = {name: x.detach() for name, x in fields.items() if x is not None}
        return output

    def unrounded(self, output: FusedCausalLMOutput) -> FusedCausalLMOutput:
        """Give what a wrapper returned of the last forward the values that it had before.

        Gradients still go through the wrapper's tensors, where its hooks are.
        """
        for name, computed in self.values.items():
            returned = getattr(output, name)
            value = computed.to(returned.device)
            if returned.requires_grad:
                lost = torch.where(returned.detach() == value, 0, value - returned.detach())
                value = returned + lost
            setattr(output, name, value)
        return output

    def _loss(
        self, terms: HeadTerms, head: ModelHead, hidden: Tensor, labels: Tensor
    ) -> FusedCausalLMOutput:
        """Compute the loss of terms: of the last C positions, which the completions are."""
        C = terms.token_weights.shape[1]
        hidden, labels = hidden[:, -C:], labels[:, -C:]
        scored = labels != -100
        if terms.joint:
            places = places_of(scored & (terms.token_weights != 0))
            loss = one_pass(terms, head, hidden[places], labels[places], places)
            output = FusedCausalLMOutput(
                loss=loss.loss,
                log_probs=_spread(scored, places, loss.logprobs),
                entropy=_spread(scored, places, loss.entropy),
                label_mask=scored,
            )
            self.metrics = loss.metrics
            return output
        output = _scores(head, hidden, labels, terms.sketch)
        if terms.objective.kd is not None:
            output.loss, self.metrics = kd_loss(terms, head, hidden, labels, output.log_probs)
        return output


def _scores(
    head: ModelHead, hidden: Tensor, labels: Tensor, sketch: kk.Sketch | None = None
) -> FusedCausalLMOutput:
    """Compute log-probabilities and entropies of the labels, differentiable."""
    scored = labels != -100
    places = places_of(scored)
    hidden, tokens = hidden[places], labels[places]
    sketch = rows_of(sketch, places, labels.shape[1])
    if is_deepspeed_zero3_enabled():  # which frees the weight before backward computes logits again
        options = HeadOptions(head.temperature, head.softcap, frozenset(["entropy"]), 0, sketch)
        logprobs, entropy, _ = PartitionedHead.apply(
            hidden, head.weight, head.bias, tokens, options
        )
    else:
        backward: Backward = "exact" if sketch is None else "sketch"
        out = kk.linear_logprobs(
            hidden,
            head.weight,
            tokens,
            entropy=True,
            backward=backward,
            sketch=sketch,
            **head.options,
        )
        logprobs, entropy = out.logprobs, out.entropy
    return FusedCausalLMOutput(
        log_probs=_spread(scored, places, logprobs),
        entropy=_spread(scored, places, entropy),
        label_mask=scored,
    )


def _spread(like: Tensor, places: Places, values: Tensor | None) -> Tensor:
    """Put [N] values in their places of [B, C], and 0 elsewhere; differentiable, also for N = 0."""
    assert values is not None
    return values.new_zeros(like.shape).index_put(places, values)


def _has_router(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_router_logits"))


def _balance_loss(model: Any, outputs: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the load-balancing loss of a model with experts."""
    config = model.config.get_text_config()
    numbers = (getattr(config, name, None) for name in EXPERTS)
    experts = next((number for number in numbers if number), None) or model.num_experts
    return load_balancing_loss_func(
        outputs.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
