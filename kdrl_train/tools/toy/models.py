"""Makes small models: a tokenizer trained on texts, and a causal LM with random weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers

from kdrl_train.settings import PositiveFloat, PositiveInt, Switch, settings

PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|endoftext|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces of text that no merge joins: Qwen's rule, one digit at a time."""


@settings
class ArchitectureConfig:
    """Shape of a small causal LM."""

    family: Literal["qwen2", "qwen3", "llama"] = "qwen2"
    """Architecture, as transformers implements it."""
    hidden: PositiveInt = 256
    """H: width of the residual stream; a multiple of 2 * heads."""
    layers: PositiveInt = 4
    """Transformer blocks."""
    heads: PositiveInt = 4
    """Attention heads, each hidden / heads wide."""
    kv_heads: PositiveInt = 4
    """Key-value heads; divides heads."""
    intermediate: PositiveInt = 768
    """Width of the gated MLP."""
    tied: Switch = False
    """Share the LM head's weight with the embedding."""
    max_positions: PositiveInt = 1024
    """Longest sequence that the model is made for, in tokens."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary positions: wavelengths run from 2 pi to 2 pi * rope_theta tokens. For a
    small model use about the longest sequence: longer wavelengths carry no information."""

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                "hidden must be a multiple of 2 * heads (rotary positions need an even head "
                f"width), got hidden = {self.hidden}, heads = {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads = {self.heads}, got kv_heads = {self.kv_heads}"
            )


def small_architecture(hidden: int) -> ArchitectureConfig:
    """Returns the shape of a model for the made-up tasks, whose examples have up to 128 tokens."""
    return ArchitectureConfig(
        family="qwen3",
        hidden=hidden,
        layers=2,
        intermediate=hidden * 3 - hidden * 3 % 32,
        max_positions=128,
        rope_theta=100.0,
    )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path | None = None
) -> transformers.PreTrainedTokenizerFast:
    """Trains a byte-level BPE with pad, begin and end tokens, in which every digit is one token.

    Every text (in Unicode's NFC) is decoded as it was encoded, since all 256 bytes are in the
    vocabulary. Encoding adds no special token, and there is no chat template. The rules and the
    name of the end token are exactly Qwen's: AutoTokenizer uses them, whatever was saved, for a
    tokenizer in the folder of a Qwen2 model (transformers 5.23).

    Args:
        texts: the merges are learnt from them.
        vocab_size: most entries, at least 259; texts with few pairs to merge give fewer.
        folder: where the tokenizer is saved for AutoTokenizer; None: nowhere.
    Raises: ValueError for a vocab_size below 259.
    """
    special = [PAD, BOS, EOS]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(
            f"vocab_size must be at least {len(special) + len(alphabet)} (256 bytes and "
            f"{len(special)} special tokens), got {vocab_size}"
        )
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.normalizer = tokenizers.normalizers.NFC()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(architecture: ArchitectureConfig, tokenizer: Any, seed: int) -> Any:
    """Makes a causal LM with random weights, float32, on the CPU, for a tokenizer.

    Args:
        tokenizer: its vocabulary size and special ids are the model's.
        seed: determines the weights; the global random state does not change.
    Raises: ValueError if the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer must have an eos_token, got none in {tokenizer.name_or_path!r}: "
            "without it no solution ends; set eos_token in its tokenizer_config.json"
        )
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.AutoConfig.for_model(
        architecture.family,
        vocab_size=len(tokenizer),
        hidden_size=architecture.hidden,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.hidden // architecture.heads,  # Qwen3's default is 128
        intermediate_size=architecture.intermediate,
        max_position_embeddings=architecture.max_positions,
        tie_word_embeddings=architecture.tied,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(**special)
    return model.float()
