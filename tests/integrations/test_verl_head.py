"""verl's own patch of a model, with the backend "kdrl", gives the numbers of full logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

pytest.importorskip("verl", reason="needs verl: bash tests/verl.sh")

from peft import LoraConfig, get_peft_model
from verl.models.transformers.monkey_patch import apply_monkey_patch

from tests.integrations import verl_host as host

pytestmark = [
    pytest.mark.verl,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = host.SIZES | SPECIAL
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2 tied": lambda: Qwen2Config(**(SIZES | {"tie_word_embeddings": True})),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "llama": lambda: LlamaConfig(**SIZES),
    "softcap": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0),
    "factor": lambda: CohereConfig(**SIZES, logit_scale=0.3),
    "divisor": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
    "bias": lambda: PhiConfig(**SIZES),
    "another backbone": lambda: GPTNeoXConfig(**SIZES),
}


def patch(model: Any, backend: str) -> None:
    apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend=backend)


def full_logits(model: Any, inputs: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Compute log-probability of the token that follows, and entropy, of each position."""
    logprobs = (model(**inputs, use_cache=False).logits / temperature).log_softmax(-1)
    tokens = inputs["input_ids"].roll(-1, 1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0], entropy


def scores_and_gradients(
    model: Any, outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    up = torch.randn(2, *outputs[0].shape, generator=rng, dtype=torch.float64)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum((part * factor).sum() for part, factor in zip(outputs, up, strict=True))
    grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    named = dict(zip(trained, grads, strict=True))
    used = {name: grad for name, grad in named.items() if grad is not None}
    return outputs[0].detach(), outputs[1].detach(), used


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_has_the_numbers_of_full_logits(family: str) -> None:
    model = host.tiny(FAMILIES[family]()).double()
    ids = torch.randint(3, host.V, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    theirs = scores_and_gradients(model, full_logits(model, inputs, 0.7))
    patch(model, "kdrl")
    out = model(**inputs, temperature=0.7, return_dict=True, use_cache=False)
    ours = scores_and_gradients(model, (out.log_probs, out.entropy))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


class Doubled(Qwen2ForCausalLM):
    """Doubles its logits, and its configuration says nothing of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_that_does_more_to_its_logits_is_refused(device: str) -> None:
    """On the meta device too, where verl makes the models of all ranks but the first."""
    with torch.device(device):
        model = Doubled(Qwen2Config(**SIZES))
    with pytest.raises(ValueError, match=r"^model must compute .*, got Doubled, whose own"):
        patch(model, "kdrl")


def test_packed_sequences_have_the_numbers_of_sequences_alone() -> None:
    model = host.tiny(Qwen2Config(**SIZES)).double()
    parts = [torch.randint(3, host.V, (1, length)) for length in (5, 3)]
    with torch.no_grad():
        alone = [full_logits(model, {"input_ids": part}, 1.0)[0][0, :-1] for part in parts]
        patch(model, "kdrl")
        packed = torch.cat(parts, 1)
        places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
        out = model(
            input_ids=packed,
            attention_mask=None,
            position_ids=places,
            shift_labels=packed.roll(-1, 1),
            temperature=1.0,
            return_dict=True,
            use_cache=False,
        )
    torch.testing.assert_close(out.log_probs[0, :4], alone[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.log_probs[0, 5:7], alone[1], rtol=1e-9, atol=1e-10)


def test_images_that_would_not_be_read_are_refused() -> None:
    model = host.tiny(Qwen2Config(**SIZES))
    patch(model, "kdrl")
    inputs = {"input_ids": torch.randint(3, host.V, (1, 7)), "return_dict": True}
    assert model(**inputs, pixel_values=None).log_probs.shape == (1, 7)
    with pytest.raises(
        ValueError, match=r"^pixel_values must be None .* Qwen2ForCausalLM reads te"
    ):
        model(**inputs, pixel_values=torch.ones(1, 3, 4, 4))


def test_an_adapter_on_the_head_counts_which_verls_own_leaves_out() -> None:
    base = host.tiny(Qwen2Config(**SIZES)).double()
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.3)
    inputs = {"input_ids": torch.randint(3, host.V, (2, 7))}
    theirs = scores_and_gradients(model, full_logits(model, inputs, 1.0))
    patch(base, "kdrl")
    out = model(**inputs, temperature=1.0, return_dict=True, use_cache=False)
    ours = scores_and_gradients(model, (out.log_probs, out.entropy))
    assert len(ours[2]) == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    with model.disable_adapter(), torch.no_grad():
        bare = model(**inputs, temperature=1.0, return_dict=True, use_cache=False).log_probs
        states = base.model(**inputs)[0]
        logprobs = (states @ base.lm_head.base_layer.weight.T).log_softmax(-1)
    expected = logprobs.gather(-1, inputs["input_ids"].roll(-1, 1)[..., None])[..., 0]
    torch.testing.assert_close(bare, expected, rtol=1e-9, atol=1e-10)


def test_verls_own_backend_leaves_a_soft_cap_out() -> None:
    """So the numbers of Gemma change from its to ours: this is why."""
    model = host.tiny(FAMILIES["softcap"]())
    inputs = {"input_ids": torch.randint(3, host.V, (2, 7))}
    with torch.no_grad():
        theirs = full_logits(model, inputs, 1.0)[0]
        forward = type(model).forward
        try:
            patch(model, "torch")
            out = model(**inputs, temperature=1.0, return_dict=True, use_cache=False)
        finally:
            type(model).forward = forward
    assert (out.log_probs - theirs).abs().max() > 1


def test_other_models_of_the_class_keep_their_forward() -> None:
    first, second = (host.tiny(Qwen2Config(**SIZES)) for _ in range(2))
    patch(first, "kdrl")
    ids = torch.randint(3, host.V, (1, 4))
    assert second(input_ids=ids, use_cache=False).logits.shape == (1, 4, host.V)
    with pytest.raises(ValueError, match="return_dict must be True"):
        first(input_ids=ids)
    embeds = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="input_ids, labels or shift_labels must be passed"):
        first(inputs_embeds=embeds, return_dict=True)


def vision_model() -> Any:
    text = SIZES | {"head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **SPECIAL)
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    return Qwen3VLForConditionalGeneration(config).double()


def test_a_vision_model_goes_through_verls_forward_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision_model()
    cls = type(model)
    monkeypatch.setattr(cls, "forward", cls.forward)  # which verl replaces, put back afterwards
    inputs = {"input_ids": torch.randint(3, host.V, (1, 7))}
    with torch.no_grad():
        theirs = full_logits(model, inputs, 0.7)
        patch(model, "kdrl")
        places = torch.arange(7).expand(4, 1, 7)
        out = model(**inputs, position_ids=places, temperature=0.7, return_dict=True)
    torch.testing.assert_close(out.log_probs, theirs[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.entropy, theirs[1], rtol=1e-9, atol=1e-10)


def test_a_vision_model_whose_head_does_more_is_refused() -> None:
    model = vision_model()
    model.config.text_config.final_logit_softcapping = 5.0
    with pytest.raises(ValueError, match='impl_backend must be another than "kdrl"'):
        patch(model, "kdrl")
