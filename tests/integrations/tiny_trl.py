"""Small models, data and settings for TRL's trainers, without a network."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(116))]
"""The vocabulary: V = 120."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a word."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_model(seed: int = 0, std: float = 0.3, **changes: Any) -> LlamaForCausalLM:
    """Return a Llama of two layers in float32, whose next-token distributions are not flat."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(WORDS)}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**(sizes | ids | {"initializer_range": std} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def sentence(first: int, length: int) -> str:
    """Return some words, others for another first."""
    return " ".join(f"w{(first * 7 + 3 * place) % 116}" for place in range(length))


def prompts(rows: int = 12) -> Dataset:
    """Return prompts of different lengths."""
    return Dataset.from_list([{"prompt": sentence(row, 2 + row % 4)} for row in range(rows)])


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings that every trainer's configuration has: three steps on a CPU."""
    base = {"output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    base |= {"per_device_train_batch_size": 4, "activation_checkpointing": False, "bf16": False}
    base |= {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return base | changes


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def losses_and_norms(trainer: Any) -> list[tuple[float, float]]:
    """Return the logged loss and gradient norm of each step."""
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
