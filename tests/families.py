"""Tests a small random model of each family, and writes the table of kdrl_train/model/README.md.

python tests/families.py            # all families: about a minute on one core
python tests/families.py phi3 opt   # prints the lines of a few
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kdrl_kernels.head_config import backbone
from kdrl_train.model import attention, choice
from kdrl_train.model.policy import CHOICE, HeadedModel
from kdrl_train.model.probe import probe

README = Path(__file__).parent.parent / "kdrl_train" / "model" / "README.md"
LENGTHS = (50, 80, 3, 20)
"""Tokens of the sequences of a pack, which must be what the model computes of each alone."""
BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 5,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 16,
    "num_key_value_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
ROUTED |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1}
INDEX = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 8}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
DELTA |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**HEAD, **WINDOW, **EXPERTS},
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {**HEAD, **WINDOW},
    "deepseek_v2": {**MLA, **ROUTED, "topk_method": "greedy"},
    "deepseek_v3": {**MLA, **ROUTED},
    "deepseek_v32": {**MLA, **ROUTED, **INDEX},
    "doge": {"keep_window_size": 16},
    "dots1": {**HEAD, **WINDOW, **ROUTED, "n_shared_experts": 1},
    "ernie4_5": HEAD,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": WINDOW,
    "falcon": {},
    "falcon_h1": {**MAMBA, **HEAD, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8},
    "gemma": HEAD,
    "gemma2": {**HEAD, **WINDOW},
    "gemma3_text": {**HEAD, **WINDOW},
    "gemma3n_text": {
        **HEAD,
        **WINDOW,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention"] * 2
        + ["full_attention"]
        + ["sliding_attention"] * 2
        + ["full_attention"],
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {
        **HEAD,
        **WINDOW,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    },
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": {**HEAD, **ROUTED},
    "glm_moe_dsa": {**MLA, **ROUTED, **INDEX},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"window_size": 16, "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gpt_oss": {**HEAD, **WINDOW, **EXPERTS},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {
        **MAMBA,
        **EXPERTS,
        "mamba_expand": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": {**HEAD, **EXPERTS, "moe_topk": 2},
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "llama4_text": {**HEAD, **EXPERTS, "attention_chunk_size": 16, "intermediate_size_mlp": 96},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minimax": {**HEAD, **EXPERTS, "block_size": 16},
    "ministral": {**HEAD, **WINDOW},
    "mistral": {**HEAD, **WINDOW},
    "mixtral": {**HEAD, **WINDOW, **EXPERTS},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "nemotron": {},
    "nemotron_h": {
        **HEAD,
        **ROUTED,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "mamba", "attention"],
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.1},
    "persimmon": {},
    "phi": {"attention_dropout": 0.1},
    "phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 64,
        "sliding_window": None,
    },
    "phimoe": {**EXPERTS, **WINDOW, "router_jitter_noise": 0.01, "input_jitter_noise": 0.1},
    "qwen2": {},
    "qwen2_moe": {
        **EXPERTS,
        **WINDOW,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "qwen3": HEAD,
    "qwen3_moe": {**HEAD, **EXPERTS},
    "qwen3_next": {**HEAD, **EXPERTS, **DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**HEAD, **DELTA},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 64, "context_length": 256},
    "seed_oss": {**HEAD, "residual_dropout": 0.1, "attention_dropout": 0.1},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**HEAD, **WINDOW},
    "xglm": {"ffn_dim": 96, "d_model": 64, "num_layers": 2, "attention_heads": 4},
    "xlstm": {"num_heads": 4, "head_dim": 16, "num_blocks": 2, "chunk_size": 16},
    "zamba2": {
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
}


def make(family: str, **settings: Any) -> Any:
    """Build a random model of a family, with wide weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(BASE | FAMILIES[family] | settings))
        return AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
def verdict(family: str) -> tuple[str, str, str]:
    """Return attention, rows and reason of one family, as `check` would say them."""
    try:
        model = make(family)
        draw = torch.Generator().manual_seed(0)
        ids = [torch.randint(6, 120, (1, n), generator=draw) for n in LENGTHS]
        alone = [backbone(model)(input_ids=x, use_cache=False).last_hidden_state[0] for x in ids]
        chosen = choice.choose(model, None, torch.device("cpu"), torch.float32)
        if chosen.attention != attention.default(model):
            model.set_attn_implementation(chosen.attention)
        setattr(model, CHOICE, chosen)
        wrapped = HeadedModel(model)
        probe(wrapped, "model.policy")
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        packed = wrapped.hidden(torch.cat(ids, dim=1), positions, None, LENGTHS)
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-3, atol=1e-3)
    except Exception as error:  # a family that cannot be trained is a line of the table
        return "-", "refused", f"{type(error).__name__}: {error}"
    rows = "packed" if chosen.packs else "one sequence a row"
    if chosen.longest is not None:
        rows += f", up to {chosen.longest} tokens"
    return str(chosen.attention), rows, chosen.reason


def main(families: list[str]) -> None:
    """Test families, print their lines, and write the table if they are all."""
    lines = ["| family | attention | rows | why |", "|---|---|---|---|"]
    for family in families or FAMILIES:
        name, rows, reason = verdict(family)
        reason = " ".join(reason.replace("|", "/").split())[:200]
        lines.append(f"| {family} | {name} | {rows} | {reason} |")
        print(lines[-1], flush=True)
    if not families:
        text = README.read_text(encoding="utf-8")
        before = text[: text.index("| family |")]
        README.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
