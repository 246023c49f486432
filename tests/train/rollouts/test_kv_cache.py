"""kv_cache: it holds what transformers' cache holds, and copies it seldom."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kdrl_train.config import SamplingConfig
from kdrl_train.rollouts import kv_cache, sampler
from kdrl_train.rollouts.kv_cache import RoomyLayer, roomy_cache
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and values of two heads, of different sizes."""
    return torch.randn(3, 2, tokens, 5), torch.randn(3, 2, tokens, 7)


def stand_in(config: Any, *, default: bool = True) -> Any:
    """Make what roomy_cache reads of a model."""
    return SimpleNamespace(
        config=config,
        forward=lambda past_key_values: past_key_values,
        _supports_default_dynamic_cache=lambda: default,
    )


def test_a_layer_holds_what_transformers_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", 6)
    ours, theirs = RoomyLayer(), DynamicLayer()
    changes: dict[int, Callable[[DynamicLayer], None]] = {
        3: lambda layer: layer.crop(-2),
        5: lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
        7: lambda layer: layer.batch_select_indices(torch.tensor([1, 1, 0])),
        12: lambda layer: layer.reset(),
    }
    for turn, tokens in enumerate([4, 1, 1, 1, 2, 1, 1, 1, 9, 1, 1, 1, 3, 1]):
        new = states(tokens)
        if turn in changes:
            changes[turn](ours)
            changes[turn](theirs)
        for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_token_does_not_copy_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", 8)
    layer, places = RoomyLayer(), []
    for tokens in [3] + [1] * 14:
        keys, _ = layer.update(*states(tokens))
        places.append(keys.data_ptr())
    assert [len(set(places[:6])), len(set(places[6:14])), len(set(places))] == [1, 1, 3]


def test_only_caches_of_keys_and_values_are_replaced() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    whole = roomy_cache(stand_in(Qwen2Config(**sizes)))
    assert whole is not None
    assert [type(layer) for layer in whole.layers] == [RoomyLayer, RoomyLayer]
    mixed = Qwen2Config(**sizes, layer_types=["sliding_attention", "full_attention"])
    mixed.sliding_window = 4
    halves = roomy_cache(stand_in(mixed))
    assert halves is not None
    assert [type(layer) for layer in halves.layers] == [DynamicSlidingWindowLayer, RoomyLayer]
    assert roomy_cache(stand_in(MistralConfig(**sizes, sliding_window=4))) is None
    assert roomy_cache(stand_in(MambaConfig(hidden_size=8, num_hidden_layers=2))) is None
    assert roomy_cache(stand_in(Qwen2Config(**sizes), default=False)) is None
    first = OpenAIGPTConfig(vocab_size=9, n_embd=8, n_head=2, n_layer=1)
    assert roomy_cache(AutoModelForCausalLM.from_config(first)) is None  # it takes none


def test_completions_are_those_of_transformers_cache(
    tiny: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", 8)
    model, made = tiny("qwen2", initializer_range=0.1), []
    request = SampleRequest(
        prompts=[[5], [20, 21, 22, 23, 24], [30, 31]],
        sampling=SamplingConfig(group_size=2, max_new_tokens=20, batch_size=4),
        seed=0,
        step=0,
    )
    monkeypatch.setattr(sampler, "roomy_cache", lambda m: made.append(roomy_cache(m)) or made[-1])
    ours = generate_rollouts(model, tokenizer, request)
    monkeypatch.setattr(sampler, "roomy_cache", lambda _: None)
    theirs = generate_rollouts(model, tokenizer, request)
    assert [cache.get_seq_length() > 8 for cache in made] == [True, True]
    assert ours.texts == theirs.texts
    for got, expected in zip(ours.logprobs, theirs.logprobs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
