"""Builds a small copy of a model, on which its attention can be tested beyond every window.

The copy has the model's class and its configuration, with few layers (one of each type), narrow
ones, and every window, top-k, chunk and original length cut down to a few tokens. Its weights are
random. A test of 40 tokens on it shows what the model itself would do after 128,000.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from kdrl_kernels.head_config import backbone

WINDOW = 4
"""Tokens of every window, top-k, chunk and block of keys."""
ORIGINAL = 8
"""Tokens of the length after which rotary factors change."""
POSITIONS, VOCABULARY = 64, 64
"""Tokens of the longest sequence, and rows of the embedding."""
LAYERS = 4
"""Most layers of a model that does not list the types of its layers, without a longer period."""
PERIOD = re.compile(r"period|pattern|interval|_every|_freq")
"""Names of numbers of layers after which types repeat."""
LARGEST = 100_000_000
"""Most parameters of a miniature: more would take seconds and gigabytes."""

Rule = tuple[re.Pattern[str], Callable[[int], int]]


def _cut(pattern: str, largest: int) -> Rule:
    """Return the rule that numbers whose name has the pattern are at most `largest`."""
    return re.compile(pattern), lambda value: min(value, largest)


CHOSEN_KEYS = re.compile(r"index_top_?k|topk_blocks|block_topk")
"""Names of the number of keys, or of blocks of them, that a query chooses."""

LENGTHS: list[Rule] = [
    _cut(r"^original_max_position|^initial_context_length$|^llama_4_scaling_original", ORIGINAL),
    _cut(r"sliding_window$|window_size$|^keep_window|^local_window|^window$", WINDOW),
    _cut(
        r"^attention_chunk_size|^floor_scale$|index_top_?k|topk_blocks|^block_topk|index_block", 4
    ),
    _cut(r"^(mamba_)?chunk_size$|^block_size$|^attention_window", 8),
    _cut(r"^max_position_embeddings$|^n_positions$|^n_ctx$|^max_seq_len$|^context_length$", 64),
    _cut(r"vocab_size", VOCABULARY),
    (re.compile(r"_token_(id|index)$"), lambda _value: 0),
]
"""Rules that keep a model's kind and change its lengths. Token 0 is never drawn."""

EXPERTS = re.compile(
    r"(^|_)num_(local_|routed_|moe_)?experts$|^n_routed_experts$|^moe_num_experts$"
)
CHOSEN = re.compile(
    r"experts_per_tok(en)?$|^moe_(top_?)?k$|^top_k_experts$|^num_experts_per_token$"
)
GROUPS = re.compile(r"^n_group$|^topk_group$|^num_expert_groups?$|^topk_groups?$")

STATE_HEADS = re.compile(
    r"^mamba_n_heads$|^mamba_num_heads$|^n_mamba_heads$|^mamba_d_ssm$|^attention_hidden_size$"
)
"""Names of numbers that a layer's width divides or is a multiple of."""
STATE_GROUPS = re.compile(r"^mamba_n_?groups$|^n_groups$")

NARROW: list[Rule] = [
    _cut(
        r"intermediate_size|^ffn_dim$|^n_inner$|^ffn_hidden|^d_ff$|^expert_dim|^shared_expert", 64
    ),
    _cut(r"^(linear_num_key_heads)$", 2),
    _cut(r"^(linear_num_value_heads)$", 4),
]
"""Rules that make layers narrow and need no others."""


def miniature_config(config: Any, *, narrow: bool, short: bool) -> Any:
    """Copy a configuration, its parts included, and cut it down.

    narrow, short: whether heads and hidden size, and layers are cut too, which not every
    architecture allows.
    """
    small = copy.deepcopy(config)
    for part in _parts(small):
        _apply(part, [*LENGTHS, *NARROW])
        _all_experts(part)
        if short:
            _few_layers(part)
        if narrow:
            _few_heads(part)
        if getattr(part, "initializer_range", None):
            part.initializer_range = 0.5 / max(getattr(part, "hidden_size", 64), 1) ** 0.5
    return small


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _apply(part: Any, rules: list[Rule]) -> None:
    """Change the numbers of one configuration, and of the dicts in it, by the rules."""
    for name, value in list(vars(part).items()):
        setattr(part, name, _changed(name, value, rules))
    dynamic = "dynamic" in repr(getattr(part, "rope_parameters", None))
    if dynamic:  # there the factors change at the longest position
        part.max_position_embeddings = ORIGINAL


def _changed(name: str, value: Any, rules: list[Rule]) -> Any:
    """Change one value of a configuration: a number, a list of numbers, or a dict."""
    if isinstance(value, dict):
        return {key: _changed(str(key), inner, rules) for key, inner in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    for pattern, rule in rules:
        if pattern.search(name):
            if isinstance(value, int):
                return rule(value) if value > 0 else value
            numbers = all(isinstance(one, int) for one in value)
            return type(value)(map(rule, value)) if numbers else value
    return value


def _all_experts(part: Any) -> None:
    """Let few experts exist and each token use all of them.

    Then the tokens that share a matrix product do not depend on what they are, and another
    sequence in the pack does not even change the rounding.
    """
    numbers = {name: value for name, value in vars(part).items() if type(value) is int}
    chosen = [value for name, value in numbers.items() if CHOSEN.search(name)]
    count = min([*chosen, 4]) if chosen else 2
    for name, value in numbers.items():
        if EXPERTS.search(name) or CHOSEN.search(name):
            setattr(part, name, min(value, count))
        elif GROUPS.search(name):
            setattr(part, name, 1)


def has_number(config: Any, pattern: re.Pattern[str]) -> bool:
    """Say whether a configuration or a part of it has a number above 1 under such a name."""
    return any(
        pattern.search(name) and type(value) is int and value > 1
        for part in _parts(config)
        for name, value in vars(part).items()
    )


def _few_layers(part: Any) -> None:
    """Keep one layer of each type, the first and the last one, where the configuration lists them.

    A layer that shares the keys of an earlier one is of another type. Where types follow from a
    period instead, LAYERS stay, or as many as the period.
    """
    count = getattr(part, "num_hidden_layers", None)
    if not isinstance(count, int):
        return
    values = vars(part)
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == count}
    dense = min(values.get("first_k_dense_replace", None) or 0, count - 1)
    if not lists:
        periods = [v for n, v in values.items() if PERIOD.search(n) and type(v) is int]
        part.num_hidden_layers = min(count, max([LAYERS, *periods]))
    else:
        shared = count - (values.get("num_kv_shared_layers", None) or 0)
        rows = zip(*lists.values(), strict=True)
        kinds = [(i >= shared, i < dense, repr(row)) for i, row in enumerate(rows)]
        kept = sorted({kinds.index(kind) for kind in kinds} | {count - 1})
        for name, value in lists.items():
            setattr(part, name, [value[i] for i in kept])
        part.num_hidden_layers = len(kept)
        if shared < count:
            part.num_kv_shared_layers = sum(i >= shared for i in kept)
    if dense:
        part.first_k_dense_replace = 1


def _few_heads(part: Any) -> None:
    """Cut the number of heads to 4 and the hidden size with it; the size of a head stays.

    The heads of a state space layer become fewer by the same factor, since they divide its width.
    """
    heads, hidden = (getattr(part, n, None) for n in ("num_attention_heads", "hidden_size"))
    if type(hidden) is not int:
        return
    if type(heads) is int and heads > 4:
        size = getattr(part, "head_dim", None) or hidden // heads
        part.num_attention_heads = 4
        for name in ("num_key_value_heads", "num_kv_heads"):
            if type(getattr(part, name, None)) is int:
                setattr(part, name, max(1, 4 * getattr(part, name) // heads))
        part.hidden_size = min(hidden, 4 * size)
    elif hidden > 256 and type(heads) is not int:
        part.hidden_size = 256
        if type(getattr(part, "num_heads", None)) is int:  # of Mamba-2 and xLSTM
            part.num_heads = max(1, part.num_heads * 256 // hidden)
    for name, value in list(vars(part).items()):
        if type(value) is int and STATE_HEADS.search(name):
            setattr(part, name, max(1, value * part.hidden_size // hidden))
        elif type(value) is int and STATE_GROUPS.search(name):
            setattr(part, name, 1)


def miniature(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Build the miniature of a model, in evaluation mode, with its own attention.

    Raises: ValueError where no small copy can be built that computes: the model cannot be tested.
    """
    reasons = []
    for narrow, short in ((True, True), (False, True), (True, False), (False, False)):
        try:
            config = miniature_config(model.config, narrow=narrow, short=short)
            with torch.device("meta"):
                size = sum(p.numel() for p in _build(model, config, dtype).parameters())
            if size > LARGEST:
                raise ValueError(f"its small copy has {size:,} parameters")
            return _tried(_wide(_build(model, config, dtype).to(device).eval()))
        except Exception as error:  # what an impossible configuration raises is up to its code
            reasons.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"no small copy of it can be built ({reasons[0]})")


def _build(model: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build a model of the same class with random weights and its own attention."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        part._attn_implementation_internal = None
        vars(part).pop("quantization_config", None)
    return type(model)._from_config(config, dtype=dtype)


def _wide(model: Any) -> Any:
    """Add a little noise to vectors, and to what begins as zeros: gates and sinks then count."""
    for parameter in model.parameters():
        if parameter.ndim < 2 or not parameter.any():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def _tried(model: Any) -> Any:
    """Return a model that can compute. Raises whatever it raises."""
    ids = torch.arange(1, 12, device=model.device)[None]
    _ = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return model
