"""Makes configurations of models without weights, and runs small enough to compute by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from kdrl_train.config import DataConfig, ModelConfig, OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.attention import GROUPED
from kdrl_train.start.estimate.case import Case, Placement
from kdrl_train.start.estimate.memory import memory_terms
from kdrl_train.start.estimate.shapes import read_shape

ATTENTION = 2 * 8 + 2 * (4 if GROUPED else 8)
"""Numbers a token that attention keeps in bfloat16: 2 heads of queries, 1 of keys, each of 4."""
POLICY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
}
TEACHER = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
SPECIAL = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, family: str, **sizes: Any) -> str:
    """Writes a folder with a config.json and nothing else."""
    transformers.AutoConfig.for_model(family, **(SPECIAL | sizes)).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return str(folder)


def write_models(root: Path) -> dict[str, str]:
    """Writes a tied and an untied policy, their teacher, and a model of 7.6e9 parameters."""
    return {
        "tied": write_config(root / "tied", "qwen2", **POLICY, tie_word_embeddings=True),
        "untied": write_config(root / "untied", "qwen2", **POLICY, tie_word_embeddings=False),
        "teacher": write_config(root / "teacher", "llama", **TEACHER),
        "7b": write_config(root / "7b", "qwen2", **QWEN2_7B),
    }


def case_of(models: dict[str, str], policy: str, **changes: Any) -> Case:
    """Makes P = 2, G = 4, prompts of 6 and completions of 10 tokens; CPU, float32, no teacher."""
    run = TrainConfig(
        method=MethodConfig(kd=None),
        data=DataConfig(max_prompt_tokens=6),
        sampling=SamplingConfig(prompts_per_step=2, group_size=4, max_new_tokens=10, batch_size=4),
        optim=OptimConfig(micro_batch_tokens=64),
    )
    settings = {"run": run, "teacher": None, "placement": Placement(cpu=True)} | changes
    return Case(policy=read_shape(models[policy], "model.policy"), **settings)


def sharded_case(models: dict[str, str], **placement: Any) -> Case:
    """Makes case_of in bfloat16 on four GPUs: tied head, a teacher, layers recomputed."""
    case = case_of(models, "tied")
    model = ModelConfig(dtype="bfloat16", gradient_checkpointing=True)
    return replace(
        case,
        run=replace(case.run, model=model, method=MethodConfig(kd="rkl")),
        teacher=read_shape(models["teacher"], "model.teacher"),
        placement=Placement(gpus=4, **placement),
    )


def values(case: Case) -> dict[str, float]:
    """Return the bytes of each term of a case, whose names differ."""
    terms = memory_terms(case)
    assert len({term.name for term in terms}) == len(terms)
    return {term.name: term.value for term in terms}
