"""Attention over a pack equals attention over each of its sequences, however it is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from kdrl_train.config import ModelConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.model import attention
from kdrl_train.model.load import load_model
from kdrl_train.model.policy import Policy

LENGTHS = (5, 1, 17, 30, 16, 3, 31)
WINDOW = 8


def definition(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Compute attention as softmax(scores a token sees) · values, sequence by sequence, float64."""
    pieces, start = [], 0
    for length in LENGTHS:
        q, k, v = (x[0, :, start : start + length].double() for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * 0.3
        ones = torch.ones(length, length, dtype=torch.bool)
        seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
        pieces.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v)
        start += length
    return torch.cat(pieces, dim=1).transpose(0, 1)[None]


def variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *ends: Any,
    scale: float,
    window_size: tuple,
    enable_gqa: bool = False,
) -> Tensor:
    """Do on a CPU what varlen_attn promises."""
    if enable_gqa:
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    assert query.shape[1] == key.shape[1]
    assert ends[0].tolist() == [0, 5, 6, 23, 53, 69, 72, 103]
    assert ends[0] is ends[1]
    assert ends[2:] == (31, 31)
    assert (scale, window_size[1]) == (0.3, 0)
    whole = (x.transpose(0, 1)[None] for x in (query, key, value))
    return definition(*whole, None if window_size[0] < 0 else window_size[0] + 1)[0]


@pytest.mark.parametrize("window", [None, WINDOW, 31], ids=str)
@pytest.mark.parametrize("way", ["padded", "varlen", "grouped"])
def test_matches_the_definition(
    way: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GROUPED", way == "grouped")
    if way != "padded":
        monkeypatch.setattr(attention.varlen, "varlen_attn", variable_length)
        monkeypatch.setattr(attention, "_padded", None)
        monkeypatch.setattr(attention, "_has_varlen", lambda _query: True)
    draw = torch.Generator().manual_seed(0)
    T = sum(LENGTHS)
    query, key, value = (
        torch.randn(1, heads, T, 16, generator=draw).requires_grad_() for heads in (4, 2, 2)
    )
    upstream = torch.randn(1, T, 4, 16, generator=draw)
    arguments = attention.packed_arguments(LENGTHS, torch.device("cpu"))
    mask = arguments.pop("attention_mask")
    out, _ = attention.attention(
        torch.nn.Module(), query, key, value, mask, scaling=0.3, sliding_window=window, **arguments
    )
    gradients = torch.autograd.grad(out, (query, key, value), upstream.to(out.dtype))
    wide = [x.repeat_interleave(4 // x.shape[1], dim=1) for x in (query, key, value)]
    exact = definition(*wide, window)
    expected = torch.autograd.grad(exact, (query, key, value), upstream.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mixtral"])
def test_flash_attention_is_told_the_lengths_of_a_pack(
    family: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them it reads them from the positions, and waits for the device in each layer."""
    seen: list[dict[str, Any]] = []

    def flash(*inputs: Any, **arguments: Any) -> tuple[Tensor, None]:
        seen.append(arguments)
        return inputs[1].transpose(1, 2), None

    known = AttentionInterface._global_mapping
    monkeypatch.setitem(known, attention.FLASH, flash)
    model = tiny(family)
    model.config._attn_implementation_internal = attention.FLASH
    policy = Policy(model, MethodConfig())
    policy.hidden(torch.arange(1, 10)[None], torch.arange(9)[None], None, [4, 5])
    assert len(seen) == model.config.num_hidden_layers
    for arguments in seen:
        assert arguments["cu_seq_lens_q"].tolist() == [0, 4, 9]
        assert arguments["cu_seq_lens_k"] is arguments["cu_seq_lens_q"]
        assert (arguments["max_length_q"], arguments["max_length_k"]) == (5, 5)


FAMILIES = [
    ("qwen2", {}),
    ("llama", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 6}),
    ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_packed_logprobs_are_those_of_padded_batches(
    tiny: Callable[..., Any], family: str, settings: dict[str, Any]
) -> None:
    model = tiny(family, **settings)
    ids = [torch.randint(2, 258, (length,)) for length in LENGTHS]
    longest = max(LENGTHS)
    padded = torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x in ids])
    mask = torch.stack([(torch.arange(longest) < len(x)).long() for x in ids])
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask).logits
        expected = torch.cat([z[: len(x)] for z, x in zip(logits, ids, strict=True)])
        model.set_attn_implementation(attention.NAME)
        policy = Policy(model, MethodConfig(kd=None))
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        hidden = policy.hidden(torch.cat(ids)[None], positions, None, LENGTHS)
        weight, _ = policy.head()
        packed = hidden @ weight.T
    torch.testing.assert_close(
        packed.log_softmax(dim=1), expected.log_softmax(dim=1), rtol=1e-5, atol=1e-5
    )


def test_without_packed_lengths_it_is_sdpa(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen2")
    ids = torch.randint(2, 258, (2, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(attention.NAME)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_which_attention_is_chosen(
    folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    model = AutoModelForCausalLM.from_pretrained(folders["student"])
    for installed in (False, True):
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda answer=installed: answer)
        best = ["flash_attention_2"] * installed
        assert attention.preferred(model, gpu, torch.bfloat16) == [*best, "packed", "sdpa"]
        assert attention.preferred(model, gpu, torch.float32) == ["packed", "sdpa"]
        assert attention.preferred(model, cpu, torch.bfloat16) == ["packed", "sdpa"]
    loaded = load_model(
        str(folders["student"]), "model.policy", ModelConfig(device="cpu"), torch.float32
    )
    assert loaded.config._attn_implementation == "packed"
    named = ModelConfig(device="cpu", attention="sdpa")
    loaded = load_model(str(folders["student"]), "model.policy", named, torch.float32)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "stablelm"])
def test_a_model_that_computes_more_keeps_its_attention(
    tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path, family: str
) -> None:
    """These have capped scores, attention sinks, and code that passes no lengths on."""
    model = tiny(family)
    before = model.config._attn_implementation
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "model.policy", ModelConfig(device="cpu"), torch.float32)
    assert loaded.config._attn_implementation == before != "packed"
