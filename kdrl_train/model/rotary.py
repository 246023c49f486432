"""Rotary factors that depend on the longest sequence of a row (longrope, dynamic).

Up to the original length all sequences have the same factors and may share a row. Beyond it a short
sequence would get those of the longest one.
"""

from typing import Any

from torch import nn


def longest(config: Any) -> int | None:
    """Return the length up to which rotary factors are the same for all rows; None: any length.

    config: of the text model.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    lengths = []
    for one in layers:
        kind = str(one.get("rope_type", one.get("type")))
        if kind == "longrope":
            known = one.get("original_max_position_embeddings")
            lengths.append(known or config.max_position_embeddings)
        elif "dynamic" in kind:
            lengths.append(config.max_position_embeddings)
    return min(lengths, default=None)


def forget(model: nn.Module) -> None:
    """Undo what dynamic factors keep of a longer row before, which would change this one."""
    for module in model.modules():
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
            if getattr(module, name) > module.original_max_seq_len:
                prefix = name.removesuffix("max_seq_len_cached")
                factors = getattr(module, f"{prefix}inv_freq")
                original = getattr(module, f"{prefix}original_inv_freq").to(factors.device)
                module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
                setattr(module, name, module.original_max_seq_len)
