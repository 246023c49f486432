"""Makes the key-value cache of `generate`, with room for the tokens to come.

transformers' own layer joins all its keys and values with those of each new token, which copies
them: of T tokens it moves T² / 2, on a GPU more than attention reads.
"""

from inspect import signature
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 272
"""Tokens for which memory is reserved at a time; no power of 2, by which the heads of a token would
share the sets of a CPU's cache."""


class RoomyLayer(DynamicLayer):
    """The cache of a layer, whose keys and values are views of memory that has room for more."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.keys: Tensor
        self.values: Tensor
        self.memory: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states [B, heads, T, D] of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, past: Tensor, new: Tensor) -> Tensor:
        """Write `new` after `past`, in the memory of `past` if it has room there."""
        memory, length = self.memory.get(name), past.shape[-2] if past.numel() else 0
        end = length + new.shape[-2]
        inside = memory is not None and memory.data_ptr() == past.data_ptr()
        if memory is None or not inside or end > memory.shape[-2]:
            B, heads, _, D = new.shape
            memory = new.new_empty(B, heads, -(-end // ROOM) * ROOM, D)
            if length:
                memory[:, :, :length] = past
            self.memory[name] = memory
        memory[:, :, length:end] = new
        return memory[:, :, :end]


def roomy_cache(model: Any) -> DynamicCache | None:
    """Return an empty cache for a causal LM, or None where `generate` makes one of another kind.

    Layers with a sliding window keep transformers' own, which copies a window at most. The
    first GPT takes no cache.
    """
    if "past_key_values" not in signature(model.forward).parameters:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    kinds = {type(layer) for layer in cache.layers}
    ours = {DynamicLayer}
    if not model._supports_default_dynamic_cache() or not kinds & ours:
        return None
    if kinds - ours - {DynamicSlidingWindowLayer}:
        return None
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
