"""Computes verl's fused head by linear_logprobs, as another impl_backend: "kdrl".

verl's engines read two names of the output of a fused forward, log_probs and entropy, [1, packed
tokens] or [batch, tokens], and pass temperature, return_dict and, for packed inputs, the tokens
already shifted (shift_labels). verl's own backends take the weight of the head alone; here bias,
soft cap and scale of the logits, and an adapter on the head, count too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from verl.models.transformers import monkey_patch
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.utils.experimental import torch_functional

import kdrl_kernels as kk
from kdrl_kernels.head_config import backbone, head_scalars
from kdrl_kernels.integrations.adapted_head import without_adapter
from kdrl_kernels.integrations.own_logits import require_own_logits
from kdrl_kernels.integrations.verl.topk import KEY, TeacherTopk, TopkNumbers

BACKEND = "kdrl"
"""Value of actor_rollout_ref.model.fused_kernel_options.impl_backend."""

VISION = frozenset(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "qwen3_5", "qwen3_5_moe")
)
"""Types of models that have a fused forward of their own in verl, which calls FusedLinearForPPO."""

BACKBONE = (
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
)
"""Arguments that a fused forward passes on, those that verl's own does."""


@dataclass
class FusedOutput(CausalLMOutputForPPO):
    """What verl's engines read of a fused forward."""

    fused_linear_aux: TopkNumbers | None = None


def install() -> None:
    """Add the backend to verl's; a second time changes nothing."""
    if hasattr(monkey_patch.patch_forward_with_backends, "kdrl"):
        return
    original = monkey_patch.patch_forward_with_backends

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == BACKEND:
            patch_forward(model, original)
        else:
            original(model, use_fused_kernels, fused_kernels_backend)

    patch_forward_with_backends.kdrl = True  # type: ignore[attr-defined]
    monkey_patch.patch_forward_with_backends = patch_forward_with_backends
    torch_functional.FusedLinearForPPO = fused_linear(torch_functional.FusedLinearForPPO)


def patch_forward(model: Any, original: Any) -> None:
    """Give one model the fused forward; other models of its class keep theirs.

    original: verl's function, which knows the fused forward of each vision model.
    """
    scalars = head_scalars(model.config.get_text_config())
    if model.config.model_type not in VISION:
        require_own_logits(model, "model")
        model.forward = MethodType(fused_forward, model)
    elif scalars != (1.0, None) or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f'impl_backend must be another than "{BACKEND}" for {type(model).__name__}: its head '
            "has a bias, scale or soft cap, which verl's fused forward of this model leaves out"
        )
    else:
        original(model, True, "torch")
    model._verl_fused_kernels_backend = BACKEND  # where that forward looks for it


def fused_forward(
    self: Any,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the backbone, and the head by linear_logprobs; bound to a causal LM as its forward.

    Args:
        input_ids: [B, T].
        labels: [B, T], the tokens of these positions where they are not input_ids.
        shift_labels: [B, T], the token that follows each position, where the engine knows it.
        temperature: of the sampler.
        return_dict: must be True, as verl's engines pass it.
        kwargs: those of BACKBONE go to the backbone, a TeacherTopk to the head; no others, such as
            images, may be there.
    Returns: FusedOutput with log_probs and entropy, [B, T] in nats, and a top-k term.
    """
    if not return_dict:
        raise ValueError(f"return_dict must be True for a fused forward, got {return_dict}")
    refuse_unread(kwargs, type(self).__name__)
    passed = {name: kwargs[name] for name in BACKBONE if name in kwargs}
    outputs = backbone(self)(input_ids=input_ids, **passed)
    following = following_tokens(input_ids, labels, shift_labels)
    temperature, softcap = head_scalars(self.config.get_text_config(), float(temperature))
    layer, adapter = without_adapter(self.get_output_embeddings())
    teacher: TeacherTopk | None = kwargs.get(KEY)

    def scores(hidden: Tensor) -> tuple[Any, ...]:
        out = kk.linear_logprobs(
            hidden,
            layer.weight,
            following,
            bias=getattr(layer, "bias", None),
            temperature=temperature,
            softcap=softcap,
            adapter=adapter,
            entropy=True,
            extra_tokens=None if teacher is None else teacher.ids,
            rest=teacher is not None and teacher.term.tail,
        )
        return out.logprobs, out.entropy, out.extra_logprobs, out.rest_logprob

    log_probs, entropy, extra, rest = as_forward(layer, scores, outputs[0])
    return FusedOutput(
        fused_linear_aux=None if teacher is None else teacher.numbers(extra, rest),
        log_probs=log_probs,
        entropy=entropy,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def refuse_unread(kwargs: dict[str, Any], model: str) -> None:
    """Raise ValueError for arguments that neither the backbone nor the head would read."""
    unread = [name for name in kwargs if name not in (*BACKBONE, KEY) and kwargs[name] is not None]
    if unread:
        raise ValueError(
            f"{', '.join(unread)} must be None with impl_backend {BACKEND}, whose fused forward of "
            f"{model} reads text alone: set model.use_fused_kernels=False"
        )


def following_tokens(
    input_ids: Tensor | None, labels: Tensor | None, shift_labels: Tensor | None
) -> Tensor:
    """Return the token that follows each position, which the last one of a sequence has not."""
    if shift_labels is None:
        tokens = input_ids if labels is None else labels
        if tokens is None:
            raise ValueError("input_ids, labels or shift_labels must be passed, got none of them")
        shift_labels = torch.roll(tokens, shifts=-1, dims=-1)
    return shift_labels.long()


def as_forward(
    layer: Any, function: Callable[[Tensor], tuple[Any, ...]], hidden: Tensor
) -> tuple[Any, ...]:
    """Return function(hidden), called as the forward of an LM head that is a group of FSDP2.

    verl makes an untied head such a group. Its hooks then gather the weight before, and take the
    gradient after, in the dtypes and at the micro-batches that verl has set.
    """
    if not isinstance(layer, FSDPModule):
        return function(hidden)
    head: Any = layer
    head.forward = function
    try:
        outputs: tuple[Any, ...] = head(hidden)
    finally:
        del head.forward
    return outputs


def fused_linear(original: type[nn.Module]) -> type[nn.Module]:
    """Make the class that stands in the place of FusedLinearForPPO, for vision models."""

    class FusedLinear(original):  # type: ignore[misc, valid-type]
        """FusedLinearForPPO with one more backend."""

        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            self.leaves_it = impl_backend != BACKEND
            super().__init__(chunk_size, impl_backend if self.leaves_it else "torch")

        def forward(
            self,
            hidden_states: Tensor,
            vocab_weights: Tensor,
            input_ids: Tensor,
            temperature: float = 1.0,
        ) -> tuple[Tensor, Tensor]:
            if self.leaves_it:
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            scores = kk.linear_logprobs(
                hidden_states,
                vocab_weights,
                input_ids.long(),
                temperature=float(temperature),
                entropy=True,
            )
            assert scores.entropy is not None
            return scores.logprobs, scores.entropy

    return FusedLinear
