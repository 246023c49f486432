"""Reads from the modules of a decoder layer what it holds: parameters, caches, states, widths.

Every name here is one that transformers gives the modules of several families. The cache of a
layer is the one that `generate` makes for it: transformers.DynamicCache says which layers keep a
window of tokens, which keep a state of constant size, and which keep nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache

FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
"""Names of one projection to queries, keys and values."""
QUERIES = ("q_proj", "q_b_proj", "kv_proj", *FUSED)
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of the projection of attention's output."""
DOWN = ("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "output_linear")
"""Names of the last projection of an MLP."""
UP = (
    "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "v1", "fc1", "fc_in", "c_fc",
    "dense_h_to_4h", "input_linear",
)  # fmt: skip
"""Names of the first projections of an MLP."""
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_k")
COMPUTES_ALL = ("Llama4TextExperts",)
"""Experts through which transformers sends every token, with a weight of 0 for those not chosen."""
ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation")
IN_STEPS = {"gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu"}
"""Activations that transformers computes in several steps, of which autograd keeps results."""
STEPS_KEPT = 3
"""Results that autograd keeps of these steps, in widths of the MLP."""
SCAN_COPIES = 3
"""Outputs of a scan's width that a mixer keeps: of the scan, of its norm, and gated."""

Experts = dict[str, tuple[int, int]]
"""A layer's parameters of experts: how many experts, and how many of them compute a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Holds the sizes of one decoder layer. Counts of parameters are exact."""

    parameters: int
    active: int
    """Parameters that compute one token: of a mixture of experts, those of the chosen ones."""
    missed: float = 0.0
    """Share of the experts that one token does not meet."""
    normed: int
    """Widths of the norms over the residual stream, summed."""
    heads_normed: int
    """Widths of the norms inside attention (queries, keys, latents), summed."""
    heads: int = 0
    """Attention heads; 0 without attention."""
    query: int = 0
    """Attention heads times the width of a query; 0 without attention."""
    output: int = 0
    """Attention heads times the width of a value."""
    kv: int = 0
    """Key-value heads times the width of a key."""
    cached_keys: int = 0
    """Numbers of a token that generate keeps and that are rotated: keys, or MLA's shared key."""
    cached_values: int = 0
    """Numbers of a token that generate keeps beside them: values, or MLA's latent."""
    window: int | None = None
    """Tokens whose keys and values are kept at most; None: all."""
    state: int = 0
    """Numbers of a sequence that generate keeps whatever its length: SSM, linear attention."""
    convolved: int = 0
    """Numbers of a sequence that generate keeps as the past of a convolution."""
    intermediate: int = 0
    """Widths of the MLPs that one token meets, summed."""
    mlp_kept: int = 0
    """Numbers of a token that these MLPs keep for backward: 4 widths where they are gated."""
    routed: int = 0
    """Numbers of the copies of a token that go to its chosen experts and come back."""
    scanned: int = 0
    """Numbers of a token that a mixer without attention keeps for backward, with fused kernels."""

    def kept(self, tokens: int) -> int:
        """Counts the tokens whose keys and values are kept after `tokens`."""
        return tokens if self.window is None else min(tokens, self.window)

    @property
    def inner(self) -> int:
        """Counts the numbers of a token between the projections of MLP, experts and mixer."""
        return self.intermediate + self.routed + self.scanned


def layers_of(model: Any) -> list[nn.Module]:
    """Returns the decoder layers of a causal LM; those of a vision or audio tower are left out.

    Raises: ValueError for a model that names none in _no_split_modules.
    """
    blocks = set(model._no_split_modules or ())
    names = [name for name, module in model.named_modules() if type(module).__name__ in blocks]
    decoder = [n for n in names if not {"vision", "audio"} & set(n.replace("_", ".").split("."))]
    outer = [n for n in decoder if not any(n.startswith(f"{other}.") for other in decoder)]
    if not outer:
        raise ValueError("it names no decoder layers")
    return [model.get_submodule(name) for name in outer]


def layer_shapes(model: Any) -> list[LayerShape]:
    """Returns the sizes of every decoder layer.

    Raises: ValueError for a layer whose cache or state is of a kind that is not known.
    """
    text = model.config.get_text_config(decoder=True)
    layers, caches = layers_of(model), DynamicCache(config=text).layers
    if len(layers) != len(caches):
        raise ValueError(f"it has {len(layers)} layers, and {len(caches)} caches")
    return [_shape(*pair, text) for pair in zip(layers, caches, strict=True)]


def _shape(layer: nn.Module, cache: Any, config: Any) -> LayerShape:
    mixer, attention = _mixer(layer, cache), _attention(layer, cache)
    experts = _experts(layer, config)
    parameters = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    idle = sum(parameters[name] // n * (n - top) for name, (n, top) in experts.items())
    top_k = max((top for _, top in experts.values()), default=0)
    sizes = {} if attention is None else _attention_sizes(attention, cache, config)
    normed, heads_normed = _normed(layer, attention, sizes)
    first, last = _mlp_width(layer, (mixer, attention), experts, config.hidden_size)
    in_steps = IN_STEPS & {getattr(config, key, None) for key in ACTIVATIONS}
    clamped = any(hasattr(part, "limit") for part in layer.modules())  # GPT-OSS clamps in steps
    return LayerShape(
        parameters=sum(parameters.values()),
        active=sum(parameters.values()) - idle,
        missed=max((1 - top / n for n, top in experts.values()), default=0.0),
        normed=normed,
        heads_normed=heads_normed,
        intermediate=last,
        mlp_kept=2 * first + (STEPS_KEPT * last if in_steps or clamped else 0),
        routed=2 * top_k * config.hidden_size,
        **sizes,
        **({} if mixer is None else _mixer_sizes(mixer)),
    )


def _mixer(layer: nn.Module, cache: Any) -> nn.Module | None:
    """Returns the SSM, linear attention or convolution of a layer that keeps such a state."""
    if not hasattr(cache, "recurrent_states"):
        return None
    for module in layer.modules():
        if "A_log" in module._parameters or hasattr(module, "slope_rate"):
            return module
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            return module
    raise ValueError(f"{type(layer).__name__} keeps a state of an unknown kind")


def _attention(layer: nn.Module, cache: Any) -> nn.Module | None:
    """Returns the attention of a layer; None for one with another mixer, or none."""
    if hasattr(cache, "recurrent_states") and not _keeps_tokens(cache):
        return None
    for module in layer.modules():
        if any(_linear(module, name) for name in QUERIES):
            return module
    if _keeps_tokens(cache):
        raise ValueError(f"{type(layer).__name__} has attention of an unknown kind")
    return None


def _keeps_tokens(cache: Any) -> bool:
    """Says whether a layer's cache keeps keys and values: a DummyLayer keeps nothing."""
    return hasattr(cache, "keys") and type(cache).__name__ != "DummyLayer"


def _linear(module: nn.Module, *names: str) -> tuple[int, int] | None:
    """Returns the inputs and outputs of the first projection of these names; None without one."""
    for name in names:
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.ndim == 2:
            turned = type(getattr(module, name)).__name__ == "Conv1D"  # GPT-2's [inputs, outputs]
            outputs, inputs = reversed(weight.shape) if turned else weight.shape
            return inputs, outputs
    return None


def _attention_sizes(attention: nn.Module, cache: Any, config: Any) -> dict[str, Any]:
    """Reads the widths of queries, keys and values, and what of them generate keeps."""
    heads = config.num_attention_heads
    width = getattr(attention, "head_dim", None) or config.hidden_size // heads
    last = _linear(attention, *OUTPUTS)
    output = last[0] if last else heads * width
    latent, both = _linear(attention, "kv_b_proj"), _linear(attention, "kv_proj")
    fused = _linear(attention, *FUSED)
    key, value = _linear(attention, "k_proj"), _linear(attention, "v_proj")
    query, kept = output, (0, 0)
    if latent:  # MLA: one latent and one rotated key for all heads
        shared = _linear(attention, "kv_a_proj_with_mqa", "kv_a_proj")
        query = (_linear(attention, "q_b_proj", "q_proj") or (0, output))[1]
        kv, kept = query, ((shared[1] if shared else 0) - latent[0], latent[0])
    elif key:  # values that are the keys are kept as well (Gemma 4)
        kv, kept = key[1], (key[1], (value or key)[1])
    elif both or fused:
        kv = both[1] // 2 if both else ((fused or (0, 0))[1] - output) // 2
        kept = (kv, kv)
    else:  # as the config says; a layer that reads those of another one keeps none
        kv = (getattr(config, "num_key_value_heads", None) or heads) * width
        kept = (kv, kv)
    window = getattr(cache, "sliding_window", None)
    if not _keeps_tokens(cache):
        kept, window = (0, 0), getattr(attention, "sliding_window", None)
    sizes = {"heads": heads, "query": query, "output": output, "kv": kv, "window": window}
    return sizes | {"cached_keys": kept[0], "cached_values": kept[1]}


def _mixer_sizes(mixer: Any) -> dict[str, int]:
    """Reads the state of a mixer and what it keeps for backward."""
    convolutions = [m for m in mixer.modules() if isinstance(m, nn.Conv1d)]
    convolved = sum(m.in_channels * m.kernel_size[0] for m in convolutions)
    decay = mixer._parameters.get("A_log")
    if decay is not None and decay.ndim == 2:  # Mamba: [channels, state]
        state = decay.numel()
    elif hasattr(mixer, "ssm_state_size"):  # Mamba 2
        state = mixer.num_heads * mixer.head_dim * mixer.ssm_state_size
    elif hasattr(mixer, "head_k_dim"):  # gated delta rule
        state = mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
    elif hasattr(mixer, "slope_rate"):  # lightning attention
        state = mixer.num_attention_heads * mixer.head_dim**2
    elif convolutions and decay is None:  # a convolution alone
        state = 0
    else:
        raise ValueError(f"{type(mixer).__name__} keeps a state of an unknown kind")
    first = [m.weight.shape[0] for n, m in mixer.named_children() if n.startswith(("in_", "qkv"))]
    last = _linear(mixer, *OUTPUTS)
    scan = SCAN_COPIES * (last[0] if last else 0)
    channels = sum(m.in_channels for m in convolutions)
    return {"state": state, "convolved": convolved, "scanned": sum(first) + channels + scan}


def _experts(layer: nn.Module, config: Any) -> Experts:
    """Returns for each parameter of experts how many they are, and how many a token meets."""
    shares: Experts = {}
    for name, parameter in layer.named_parameters():
        module: Any = layer.get_submodule(name.rpartition(".")[0])
        kind = type(module).__name__
        if "Expert" not in kind or "Shared" in kind:
            continue
        count = getattr(module, "num_experts", None) or getattr(module, "moe_num_experts", None)
        tops = [getattr(module, "top_k", None) for module in layer.modules()]
        tops += [getattr(config, key, None) for key in TOP_K]
        top = count if kind in COMPUTES_ALL else next((t for t in tops if isinstance(t, int)), None)
        if not count or top is None or parameter.numel() % count:
            raise ValueError(f"{kind} has experts of an unknown kind")
        shares[name] = (count, min(top, count))
    return shares


def _mlp_width(
    layer: nn.Module, outside: Sequence[nn.Module | None], experts: Experts, hidden: int
) -> tuple[int, int]:
    """Sums what a token meets in the MLPs, dense, shared and chosen, besides the residual stream.

    Returns: outputs of their first projections, and inputs of their last ones.
    """
    other = {part for module in outside if module is not None for part in module.modules()}
    first = last = 0
    for name, module in layer.named_modules():
        for leaf in [] if module in other else (*UP, *DOWN):
            sizes = _linear(module, leaf)
            if sizes and f"{name}.{leaf}.weight" not in experts:
                first += sizes[1] if leaf in UP else 0
                last += sizes[0] if leaf in DOWN else 0
    for name, (count, top) in experts.items():
        parameter, leaves = layer.get_parameter(name), {*name.split(".")[-2:]}
        width = top * (parameter.numel() // count // hidden) if parameter.ndim > 2 else 0
        first += width if leaves & {*UP} else 0
        last += width if leaves & {*DOWN} else 0
    return first, last


def _normed(layer: nn.Module, attention: Any, sizes: dict[str, Any]) -> tuple[int, int]:
    """Sums the widths of a layer's norms: over the residual stream, and inside attention."""
    inside = {} if attention is None else dict(_norms(attention))
    stream = sum(size for module, size in _norms(layer) if module not in inside)
    heads = 0
    for name, module in [] if attention is None else attention.named_modules():
        size = inside.get(module, 0)
        one = size == getattr(attention, "head_dim", None) and not _linear(attention, "kv_b_proj")
        if one:  # for every head; the norms of MLA are of latents
            size = sizes["query"] if name.startswith("q") else sizes["kv"]
        heads += size
    return stream, heads


def _norms(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yields each norm that has a weight, and its width."""
    for part in module.modules():
        if "Norm" in type(part).__name__ and "weight" in part._parameters:
            yield part, part.get_parameter("weight").numel()
