"""The estimate of mixtures of experts, GPT-2, SSMs and hybrids: by hand, and by real models.

Of each family a small model is built, and `generate` runs: what its cache holds afterwards must be
what was read from the modules, to the number. Published counts hold for the real sizes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from kdrl_train.config import ModelConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.attention import Choice
from kdrl_train.start.estimate.case import Placement
from kdrl_train.start.estimate.devices import Device
from kdrl_train.start.estimate.memory import memory_terms
from kdrl_train.start.estimate.shapes import ModelShape, read_shape, shape_of
from kdrl_train.tools.plan import command
from kdrl_train.tools.plan.command import PlanConfig
from kdrl_train.tools.plan.speed import Lengths, time_terms
from tests.train.estimate_cases import SPECIAL, case_of, write_config

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MOE = ROUTED | {"num_local_experts": 8, "num_experts": 8}
MLA = {
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_state": 12, "mamba_chunk_size": 16}
DELTA = {
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 24,
}
PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
S, F = "sliding_attention", "full_attention"


class Family(NamedTuple):
    """A small model, and what was worked out by hand of its layers, in their order."""

    sizes: dict[str, Any]
    idle: int
    """Parameters of the experts that do not compute a token: (experts - chosen) · 3 · H · width."""
    cached: list[int]
    """Numbers that generate keeps of each token."""
    windows: list[int | None]
    state: list[int]
    convolved: list[int]


NONE, ALL = [0] * 4, [None] * 4
FAMILIES = {
    "gpt2": Family(  # no grouped queries: keys and values of 64
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 128, "n_positions": 256,
         "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        0, [128] * 4, ALL, NONE, NONE,
    ),
    "mixtral": Family(
        BASE | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
        4 * 6 * 3 * 64 * 96, [64] * 4, [8] * 4, NONE, NONE,
    ),
    "qwen3_moe": Family(  # every second layer is dense
        BASE | MOE | {"decoder_sparse_step": 2}, 2 * 6 * 3 * 64 * 32, [64] * 4, ALL, NONE, NONE
    ),
    "deepseek_v3": Family(  # the latent of 24 and the rotated key of 8; the first layer is dense
        BASE | ROUTED | MLA
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        3 * 6 * 3 * 64 * 32, [32] * 4, ALL, NONE, NONE,
    ),
    "gpt_oss": Family(  # experts have biases of 2 · 96 and 64
        BASE | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
        4 * 6 * (3 * 64 * 96 + 2 * 96 + 64), [64] * 4, [8, None, 8, None], NONE, NONE,
    ),
    "falcon_h1": Family(  # both in each layer: 8 heads of 8 with 12; 64 + 2 · 12 channels, 4 steps
        BASE | MAMBA2 | {"mamba_d_ssm": 64, "mamba_d_head": 8},
        0, [64] * 4, ALL, [8 * 8 * 12] * 4, [88 * 4] * 4,
    ),
    "qwen3_next": Family(  # 4 heads of 12 x 20; 2 · 2 · 12 + 4 · 20 channels, 4 steps
        BASE | MOE | DELTA,
        4 * 6 * 3 * 64 * 32, [0, 0, 0, 64], ALL, [960, 960, 960, 0], [512, 512, 512, 0],
    ),
    "mamba": Family(
        {"hidden_size": 64, "state_size": 12, "num_hidden_layers": 4, "vocab_size": 128},
        0, NONE, ALL, [128 * 12] * 4, [128 * 4] * 4,
    ),
    "bamba": Family(  # the Mamba layers: 8 heads of 16 with 12; 128 + 2 · 12 channels, 4 steps
        {key: size for key, size in BASE.items() if key != "head_dim"}
        | MAMBA2 | {"mamba_d_head": 16, "attn_layer_indices": [1, 3]},
        0, [0, 64, 0, 64], ALL, [1536, 0, 1536, 0], [608, 0, 608, 0],
    ),
    "gemma3n_text": Family(  # the last layer reads the keys and values of the third
        BASE | PER_LAYER
        | {"sliding_window": 8, "num_kv_shared_layers": 1, "laurel_rank": 4,
           "layer_types": [S, F, S, S], "intermediate_size": [96] * 4,
           "activation_sparsity_pattern": [0.0] * 4},
        0, [64, 64, 64, 0], [8, None, 8, 8], NONE, NONE,
    ),
    "gemma4_text": Family(  # the full layer has heads of 512
        BASE | PER_LAYER
        | {"sliding_window": 8, "num_kv_shared_layers": 0, "layer_types": [S, S, S, F]},
        0, [64, 64, 64, 2 * 2 * 512], [8, 8, 8, None], NONE, NONE,
    ),
    "llama4_text": Family(  # transformers computes every token in all experts
        BASE | {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 80,
                "attention_chunk_size": 8, "interleave_moe_layer_step": 2},
        0, [64] * 4, [8, 8, 8, None], NONE, NONE,
    ),
    "nemotron_h": Family(  # one of each kind: Mamba 2, experts without a gate, attention, MLP
        BASE | ROUTED
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 8,
           "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 12, "chunk_size": 16,
           "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 24,
           "n_group": 1, "topk_group": 1},
        6 * 2 * 64 * 32, [0, 0, 64, 0], ALL, [1536, 0, 0, 0], [608, 0, 0, 0],
    ),
    "lfm2": Family(  # convolutions over 3 tokens
        BASE | {"layer_types": ["conv", F, "conv", F]},
        0, [0, 64, 0, 64], ALL, NONE, [192, 0, 192, 0],
    ),
}  # fmt: skip
QUICK = ("mixtral", "deepseek_v3", "qwen3_next", "falcon_h1", "gemma3n_text", "mamba")
EACH = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
    for name in FAMILIES
]


def build(name: str) -> Any:
    special = SPECIAL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(name, **(special | FAMILIES[name].sizes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def numbers(states: dict[int, torch.Tensor | None]) -> int:
    return sum(state.numel() for state in states.values() if state is not None)


def kept_by_generate(model: Any, prompt: int, new: int) -> tuple[list[int], list[int], list[int]]:
    """Count what the cache of one completion holds: keys and values, states, convolutions."""
    ids = torch.arange(3, 3 + prompt)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
    )
    tokens, states, convolved = [], [], []
    for layer in out.past_key_values.layers:
        keys = getattr(layer, "keys", None)
        tokens.append(0 if keys is None else keys.numel() + layer.values.numel())
        states.append(numbers(getattr(layer, "recurrent_states", {})))
        convolved.append(numbers(getattr(layer, "conv_states", {})))
    return tokens, states, convolved


@pytest.mark.parametrize("name", EACH)
def test_a_layer_is_what_was_worked_out_and_what_generate_keeps(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    shape = shape_of(model, "model.policy")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = shape.each
    assert shape.layers_parameters - shape.active_parameters == family.idle
    assert [layer.cached_keys + layer.cached_values for layer in layers] == family.cached
    assert [layer.window for layer in layers] == family.windows
    assert [layer.state for layer in layers] == family.state
    assert [layer.convolved for layer in layers] == family.convolved
    prompt, new = 12, 3  # beyond the windows of 8, of which a cache keeps the last 7
    held = [min(prompt + new - 1, (window or 99) - 1) for window in family.windows]
    tokens, states, convolved = kept_by_generate(model, prompt, new)
    assert tokens == [n * width for n, width in zip(held, family.cached, strict=True)]
    assert (states, convolved) == (family.state, family.convolved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "llama4_text", "gemma4_text", "lfm2"]
)
def test_activations_are_what_autograd_keeps_to_a_quarter(name: str) -> None:
    model = build(name).train()
    model.set_attn_implementation("sdpa")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    T = 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.randint(3, 100, (1, T)), use_cache=False)
    kept_bytes = sum(t.untyped_storage().nbytes() for t in kept.values()) / T
    last_norm = 12 * 64
    assert estimated(model) + last_norm == pytest.approx(kept_bytes, rel=0.25)


def estimated(model: Any) -> int:
    """Return the bytes of a token in all layers, in float32, with a batch of one: no mask."""
    shape = shape_of(model, "model.policy")
    case = case_of_shape(shape)
    model_config = replace(case.run.model, attention="flash_attention_2")  # 2 q + 2 kv, as sdpa's
    case = replace(case, run=replace(case.run, model=model_config))
    return case.activation_bytes(shape)


def case_of_shape(shape: ModelShape) -> Any:
    """Make P = 2, G = 4, prompts of 6 and completions of 10 tokens; CPU, float32, no teacher."""
    return replace(case_of(DENSE, "tied"), policy=shape)


DENSE: dict[str, str] = {}


@pytest.fixture(autouse=True, scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("dense") / "tied"
    DENSE["tied"] = write_config(folder, "qwen2", **BASE)


@pytest.mark.parametrize(
    ("name", "sizes", "parameters", "active", "bytes_per_token"),
    [
        ("gpt2", {}, 124_439_808, 124_439_808, 2 * 12 * 2 * 768),
        ("mixtral", {}, 46_702_792_704, 12_879_925_248, 2 * 32 * 2 * 1024),
        # 671B, 37B, and 70.272 KB of cache a token in bfloat16 (arXiv:2412.19437, 2505.09343)
        ("deepseek_v3", {}, 671_026_404_352, 37_552_282_624, 70_272),
        ("gpt_oss", {}, 116_829_156_672, 5_711_982_912, 2 * 36 * 2 * 512),
    ],
    ids=["GPT-2", "Mixtral-8x7B", "DeepSeek-V3", "gpt-oss-120b"],
)
def test_published_counts(
    tmp_path: Path,
    name: str,
    sizes: dict[str, Any],
    parameters: int,
    active: int,
    bytes_per_token: int,
) -> None:
    shape = read_shape(write_config(tmp_path / "model", name, **sizes), "model.policy")
    assert shape.parameters == parameters
    assert shape.active_parameters + shape.root_parameters == active
    assert 2 * sum(x.cached_keys + x.cached_values for x in shape.each) == bytes_per_token


def test_a_window_and_a_state_bound_what_decoding_holds() -> None:
    """4 completions of 6 + 10 tokens: a window of 8 keeps 8 of 16 tokens, and all of a prompt."""
    terms = {
        name: {t.name: t.value for t in memory_terms(case_of_shape(shape_of(build(name), name)))}
        for name in ("gpt_oss", "qwen3_next", "mamba")
    }
    oss, next_, mamba = terms["gpt_oss"], terms["qwen3_next"], terms["mamba"]
    assert oss["keys and values of the prompts"] == 4 * 6 * 4 * 4 * 64
    assert oss["keys and values"] == 4 * 4 * 64 * (8 + 16 + 8 + 16)
    assert "states of the mixers" not in oss
    assert next_["keys and values"] == 4 * 16 * 4 * 64
    assert next_["states of the mixers"] == 4 * 3 * (4 * 960 + 4 * 512)
    assert mamba["keys and values"] == 0
    assert mamba["states of the mixers"] == 4 * 4 * (4 * 1536 + 4 * 512)


def test_eager_attention_keeps_its_weights_of_each_row() -> None:
    """Packs of 64 tokens, sequences of 16; 4 layers of 4 heads; float32 keeps no copy."""
    oss, mamba = (case_of_shape(shape_of(build(n), n)) for n in ("gpt_oss", "mamba"))
    apart, together = Choice("eager", packs=False), Choice("eager")
    sizes = {
        choice.packs: {t.name: t.value for t in memory_terms(replace(oss, choice=choice))}
        for choice in (apart, together)
    }
    assert sizes[False]["attention weights"] == 16 * 4 * 64 * 16
    assert sizes[True]["attention weights"] == 16 * 4 * 64 * 64
    assert sizes[False]["attention weights of the prompts"] == 4 * 4 * 4 * 6 * 6
    model = replace(oss.run.model, dtype="bfloat16", gradient_checkpointing=True)
    half = replace(oss, run=replace(oss.run, model=model), choice=apart, placement=Placement())
    assert {t.name: t.value for t in memory_terms(half)}["attention weights"] == 4 * 6 * 64 * 16
    names = {t.name for t in memory_terms(replace(mamba, choice=apart))}
    assert not any(name.startswith("attention weights") for name in names)
    alone = replace(oss, choice=Choice("sdpa", packs=False))
    assert not any("mask" in t.name and "prompts" not in t.name for t in memory_terms(alone))
    masked = {t.name for t in memory_terms(replace(oss, choice=Choice("sdpa")))}
    assert "masks of the layers" in masked


def test_plan_takes_the_attention_that_train_would(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "oss", "gpt_oss", **FAMILIES["gpt_oss"].sizes)
    config = PlanConfig(model=ModelConfig(policy=folder), method=PRESETS["grpo"])
    names = {term.name for term in command.make_estimate(config).memory}
    assert "attention weights" in names  # sdpa leaves its sinks out, and packs mix sequences


def test_the_time_of_a_mixture_counts_the_chosen_experts() -> None:
    """Mixtral's small sizes: 6 of 8 experts idle; 8 completions of 6 + 5 tokens, batches of 4."""
    shape = shape_of(build("mixtral"), "model.policy")
    case = replace(case_of_shape(shape), placement=Placement())
    device = Device(memory_bytes=1e9, flops=1e9, bandwidth=1e8, link=1e7)
    terms = time_terms(case, device, Lengths(prompt=6, response=5), launch_us=0)
    seconds = {term.name: term.value for term in terms}
    expert = 3 * 64 * 96
    attention = 64 * 64 * 2 + 64 * 32 * 2
    active = 4 * (attention + 2 * expert + 8 * 64 + 2 * 64)
    assert shape.active_parameters == active
    context = 8 - 8 * 8 / (2 * 11)  # the mean of 1, 2, ..., 8, 8, 8 in the limit of small steps
    forward = 88 * (2 * active + 4 * 4 * 64 * context)
    assert seconds["policy, forward and backward"] == pytest.approx(3 * forward / 1e9)
    read = active + 4 * 6 * expert * (1 - 0.75**3) + 128 * 64  # 4 tokens meet more experts than 1
    decode = 20 * max(4 * round(read) / 1e8, 2 * (active + 128 * 64) * 4 / 1e9)
    assert seconds["decode, weights"] == pytest.approx(decode)
    # 10 steps after 6 tokens: 2 until the window of 8 is full, then 8 over 8 tokens
    steps = 2 * 6 + 2 + 8 * 8
    assert seconds["decode, keys and values"] == pytest.approx(2 * 4 * 3 * steps * 4 * 4 * 64 / 1e8)


@pytest.mark.parametrize("name", EACH)
def test_plan_counts_it(name: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / name, name, **FAMILIES[name].sizes)
    config = PlanConfig(model=ModelConfig(policy=folder), method=PRESETS["grpo"], gpus=2)
    estimate = command.make_estimate(config)
    weights = next(t for t in estimate.memory if t.name == "weights, float32")
    assert weights.value == 4 * sum(p.numel() for p in build(name).parameters()) / 2
    assert estimate.fits


def test_a_layer_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "rwkv", "rwkv", hidden_size=64, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"got RwkvForCausalLM: RwkvBlock .* unknown kind"):
        read_shape(folder, "model.policy")
