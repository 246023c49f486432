"""Reads GSM8K as tokens of a vocabulary that is trained on it, and says which tokens are rare."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrl_train.tools.toy.models import EOS, train_tokenizer


@dataclass(frozen=True, slots=True)
class Corpus:
    """Holds the documents of GSM8K: question, solution, end token."""

    tokenizer: Any
    train: list[Tensor]
    """Token ids of each document, int64."""
    validation: Tensor
    """Token ids of all documents of test.jsonl, one after the other."""


def load_corpus(folder: Path, vocab_size: int) -> Corpus:
    """Read train.jsonl and test.jsonl; the merges of the tokenizer are learnt from the first.

    Raises: ValueError where the texts give fewer than vocab_size tokens.
    """
    texts = {name: _texts(folder / f"{name}.jsonl") for name in ("train", "test")}
    tokenizer = train_tokenizer(texts["train"], vocab_size)
    if len(tokenizer) != vocab_size:
        raise ValueError(f"texts must give {vocab_size} tokens, got {len(tokenizer)}")
    ids = {
        name: [torch.tensor(line) for line in tokenizer(lines)["input_ids"]]
        for name, lines in texts.items()
    }
    return Corpus(tokenizer, ids["train"], torch.cat(ids["test"]))


def stream_of(documents: list[Tensor], length: int, seed: int) -> Tensor:
    """Return the first tokens of all documents in an order drawn with the seed.

    Raises: ValueError where the documents have fewer than `length` tokens.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    stream = torch.cat([documents[i] for i in order])[:length]
    if len(stream) < length:
        raise ValueError(f"documents must have {length} tokens, got {len(stream)}")
    return stream


def is_rare(tokens: Tensor, seen: Tensor, below: int) -> Tensor:
    """Say of each token whether it occurs fewer than `below` times among those seen, as bool."""
    size = int(max(tokens.max(), seen.max())) + 1
    return torch.bincount(seen, minlength=size)[tokens] < below


def _texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [f"{row['question']}\n{row['answer']}{EOS}" for row in rows]
