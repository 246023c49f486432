"""choice: a pack gives what the model's own attention gives of each sequence alone."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdrl_kernels.head_config import backbone
from kdrl_train.model import attention, choice, rotary
from kdrl_train.model.attention import Choice
from kdrl_train.model.load import checkpoint_activations
from kdrl_train.model.policy import CHOICE, HeadedModel
from kdrl_train.model.probe import probe
from tests.families import make

CPU = torch.device("cpu")
LENGTHS = (50, 80, 3, 20)


def chosen(model: Any, name: str | None = None) -> Choice:
    """Choose as load_model does, and set what was chosen."""
    result = choice.choose(model, name, CPU, torch.float32)
    model.set_attn_implementation(result.attention)
    setattr(model, CHOICE, result)
    return result


def some_ids() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(6, 120, (1, n), generator=draw) for n in LENGTHS]


def pack(wrapped: HeadedModel, ids: list[Tensor]) -> tuple[Tensor, ...]:
    lengths = [x.shape[1] for x in ids]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return wrapped.hidden(torch.cat(ids, dim=1), positions, None, lengths).split(lengths)


FAMILIES = {
    "qwen3": ("packed", True, ""),
    "mistral": ("packed", True, ""),
    "afmoe": ("packed", True, ""),
    "llama4_text": ("sdpa", False, "packed over packs differs by .* sdpa over packs differs"),
    "qwen2_moe": ("sdpa", True, "packed over packs differs by .* from the model's own on 5 tok"),
    "phimoe": ("sdpa", True, "packed over packs differs"),
    "deepseek_v32": ("sdpa", False, "its queries choose their keys"),
    "glm_moe_dsa": ("sdpa", False, "its queries choose their keys"),
    "doge": ("sdpa", False, r"no mask of the model's own, got one of \(1, 4, 40, 40\)"),
    "nemotron": ("sdpa", True, "the lengths of a pack, got none"),
    "phi3": ("packed", True, ""),
    "gpt_oss": ("eager", False, "eager over packs differs"),
    "falcon_h1": ("sdpa", False, "sdpa over packs differs"),
    "mamba": ("eager", False, "eager over packs differs"),
    "bloom": ("eager", False, "eager over packs differs"),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_pack_is_what_the_models_own_attention_computes(family: str) -> None:
    name, packs, reason = FAMILIES[family]
    model = make(family)
    body, ids = backbone(model), some_ids()
    expected = [body(input_ids=x, use_cache=False).last_hidden_state[0] for x in ids]
    result = chosen(model)
    assert (result.attention, result.packs) == (name, packs)
    assert re.search(reason, result.reason) if reason else not result.reason
    torch.testing.assert_close(pack(HeadedModel(model), ids), tuple(expected), rtol=1e-4, atol=1e-4)


def test_longrope_shares_a_row_up_to_its_original_length() -> None:
    model = make("phi3")
    result = chosen(model)
    assert (result.longest, result.share([64, 5]), result.share([65, 5])) == (64, True, False)
    assert "up to 64 tokens, a longer one has a row alone" in str(result)


@torch.no_grad()
def test_dynamic_factors_do_not_remember_the_row_before() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = make("llama", rope_parameters=rope, max_position_embeddings=40)
    ids = some_ids()
    alone = [make("llama", rope_parameters=rope, max_position_embeddings=40) for _ in ids]
    expected = [
        one.base_model(input_ids=x).last_hidden_state[0] for one, x in zip(alone, ids, strict=True)
    ]
    assert chosen(model).longest == rotary.longest(model.config) == 40
    wrapped = HeadedModel(model)
    for order in (ids, ids[::-1]):  # 50 after 80: transformers keeps the factors of 80
        states = pack(wrapped, order)
        for ours, theirs in zip(states, expected if order is ids else expected[::-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_named_attention_that_is_not_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"what Qwen2MoeForCausalLM does, got packed, which diff"):
        chosen(make("qwen2_moe"), "packed")
    assert str(chosen(make("qwen2_moe"), "eager")) == (
        "eager attention, packs keep their sequences apart"
    )


def test_what_packed_attention_would_leave_out_is_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, 2, 8, 4, generator=draw) for _ in range(3)]
    arguments = attention.packed_arguments([5, 3], CPU)
    mask = arguments.pop("attention_mask")
    module = torch.nn.Module()
    for name in ("indices", "block_indices", "softcap", "s_aux", "sinks", "position_bias", "new"):
        with pytest.raises(ValueError, match=rf"a window alone, got {name} too"):
            attention.attention(module, *heads, mask, **arguments, **{name: heads[0]})
    with pytest.raises(ValueError, match="a window alone, got indices too"):
        attention.attention(module, *heads, None, indices=heads[0])  # as in sampling
    with pytest.raises(ValueError, match="must be causal"):
        attention.attention(module, *heads, mask, **arguments, is_causal=False)
    with pytest.raises(ValueError, match="must get the lengths of a pack, got none"):
        attention.attention(module, *heads, mask)
    out, _ = attention.attention(module, *heads, mask, **arguments, position_ids=heads[0])
    assert out.is_contiguous()


NOISY = ["opt", "seed_oss", "phimoe", "phi", "mixtral"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", NOISY)
def test_training_draws_nothing(family: str, recompute: bool) -> None:
    model = make(family, **({"router_jitter_noise": 0.3} if family == "mixtral" else {}))
    ids = some_ids()[0]
    with torch.no_grad():
        expected = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    if recompute:
        checkpoint_activations(model)
    wrapped = HeadedModel(model).train()
    (first,) = pack(wrapped, [ids])
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, *pack(wrapped, [ids]))


def test_evaluation_does_not_change_weights() -> None:
    """RWKV would halve those of each sixth layer in evaluation, and an export would hold that."""
    model = make("rwkv", num_hidden_layers=7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = HeadedModel(model)
    pack(wrapped, some_ids())
    pack(wrapped.train(), some_ids())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_probe_refuses_noise() -> None:
    wrapped = HeadedModel(make("llama"))
    layer = wrapped.model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda x: torch.nn.functional.dropout(inner(x), 0.1)
    with pytest.raises(ValueError, match="must have logits"):
        probe(wrapped, "model.policy")
    layer.forward = lambda x: inner(x) + 1e-5 * torch.randn_like(x)  # below every tolerance
    with pytest.raises(ValueError, match=r"two runs of which differ by .* set dropout, jitter"):
        probe(wrapped, "model.policy")


def test_the_probe_sees_a_cap_that_small_logits_hardly_reach() -> None:
    model = make("recurrent_gemma")
    model.get_output_embeddings().weight.data *= 0.01
    wrapped = HeadedModel(model)
    assert wrapped.softcap == 30
    probe(wrapped, "model.policy", packed=False)
    wrapped.softcap = None
    with pytest.raises(ValueError, match="must have logits"):
        probe(wrapped, "model.policy", packed=False)


def test_the_probe_sees_a_leak_below_its_tolerance() -> None:
    wrapped = HeadedModel(make("llama"))
    layer = wrapped.model.model.layers[0].mlp
    inner = layer.forward

    def eight_before(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(inner(x), (0, 0, 8, 0))[:, : x.shape[1]]

    layer.forward = lambda x: inner(x) + 1e-5 * eight_before(x)
    with pytest.raises(ValueError, match="must keep packed sequences apart"):
        probe(wrapped, "model.policy")


def test_the_probe_sees_a_state_that_reads_a_later_token() -> None:
    wrapped = HeadedModel(make("llama"))
    layer = wrapped.model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda x: inner(x) + 1e-5 * inner(x).roll(-1, dims=1)  # below its tolerance
    with pytest.raises(
        ValueError, match=r"^model\.teacher must be causal, got LlamaForCausalLM, .*"
    ):
        probe(wrapped, "model.teacher", packed=False)


def test_a_bidirectional_model_is_refused() -> None:
    model = make("gemma3_text", use_bidirectional_attention=True)
    chosen(model)
    with pytest.raises(ValueError, match="when tokens behind them do: look in its"):
        probe(HeadedModel(model), "model.teacher")


def test_layers_between_states_and_head_are_refused() -> None:
    config = AutoConfig.for_model(
        "electra",
        is_decoder=True,
        vocab_size=40,
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    wrapped = HeadedModel(AutoModelForCausalLM.from_config(config).eval())
    expected = (
        r"^model\.policy must have an LM head .* 32, got ElectraForCausalLM with 16: its arch"
    )
    with pytest.raises(ValueError, match=expected):
        probe(wrapped, "model.policy")
