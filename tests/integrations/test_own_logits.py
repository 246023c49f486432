"""A model whose code makes other logits than its configuration says is refused."""

from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kdrl_kernels.integrations.own_logits import require_own_logits
from tests.integrations.trl_runs import OLD_NAMES

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 8}


def small(family: str, **values: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | values)
    return AutoModelForCausalLM.from_config(config).train()


def gemma3(**values: Any) -> Any:
    """Make a Gemma 3 that sees images, of 4 tokens."""
    config = transformers.Gemma3Config(
        text_config=SIZES | values,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return transformers.Gemma3ForConditionalGeneration(config).train()


class Doubled(transformers.Qwen2ForCausalLM):
    """Doubles its logits, and its configuration says nothing of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class OnGpuAlone(Doubled):
    """Does not run on a CPU, as with the attention of another device, unless it is small."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.vocab_size > 64:
            raise RuntimeError("no kernel for a CPU")
        return super().forward(*args, **kwargs)


def test_a_cap_that_the_code_does_not_read_is_refused() -> None:
    require_own_logits(gemma3(), "model")
    require_own_logits(small("gemma3_text", final_logit_softcapping=2.0), "model")
    for cap in (2.0, 50.0):
        with pytest.raises(
            ValueError,
            match=rf"^teacher_model must compute .* got Gemma3ForConditionalGeneration, .* take the"
            rf" scale 1 or the soft cap {cap:g} out of its configuration",
        ):
            require_own_logits(gemma3(final_logit_softcapping=cap), "teacher_model")


@pytest.mark.parametrize("kind", [Doubled, OnGpuAlone])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_code_that_does_something_else_is_refused(kind: type, device: str) -> None:
    """Where the model itself does not run, a small copy of it shows what its code does."""
    with torch.device(device):
        model = kind(transformers.Qwen2Config(**SIZES | {"vocab_size": 65}))
    with pytest.raises(ValueError, match=f"got {kind.__name__}, .* RMS is .*: name another model"):
        require_own_logits(model, "model")
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    for model in (small("phi"), small("cohere", logit_scale=0.1), small("gemma2")):
        require_own_logits(model.to(dtype), "model")


def test_an_adapter_on_the_head_counts() -> None:
    model = get_peft_model(small("qwen2"), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    require_own_logits(model.get_base_model(), "model")


def test_adalora_on_the_head_is_refused() -> None:
    """Its lora_A are parameters, not layers."""
    config = AdaLoraConfig(target_modules=["lm_head"], total_step=10)
    model = get_peft_model(small("qwen2"), config).get_base_model()
    with pytest.raises(ValueError, match="must be one plain LoRA without dropout, got SVDLinear"):
        require_own_logits(model, "model")


def test_nothing_is_left_changed() -> None:
    model = small("qwen2", attention_dropout=0.5)
    model.lm_head.eval()
    with torch.device("meta"):
        elsewhere = small("qwen2")
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    require_own_logits(model, "model")
    require_own_logits(elsewhere, "model")  # by a small copy, whose weights are drawn
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks
