"""Reads from a transformers config what stands between hidden · weightᵀ and the logits."""

from typing import Any

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""transformers' names of the cap of the logits: Gemma's and two others."""
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names of a factor of the logits: Cohere's, Muse's and Falcon-H1's."""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Names of a divisor: of the logits (Granite, MiniCPM), or of the hidden states (Inkling)."""
MULTIPLIES = ("hyperclovax",)
"""Model types that multiply the logits by logits_scaling."""
UNREAD = {"mpt": ("logit_scale",)}
"""Names that a model type has and its code does not read."""


def logit_scale(config: Any) -> float:
    """Return the factor between hidden · weightᵀ and the logits, before the soft cap.

    Args:
        config: of the text model (config.get_text_config()). A factor that is None or 0 is none.
    """
    scale, unread = 1.0, UNREAD.get(config.model_type, ())
    for name in FACTORS:
        scale *= 1.0 if name in unread else getattr(config, name, None) or 1.0
    for name in DIVISORS:
        divisor = getattr(config, name, None) or 1.0
        scale = scale * divisor if config.model_type in MULTIPLIES else scale / divisor
    return scale


def head_scalars(config: Any, temperature: float = 1.0) -> tuple[float, float | None]:
    """Return temperature and softcap of a head that gives the model's logits / temperature.

    A model computes softcap(scale · a), a head of ours softcap(a) / temperature, where softcap(a) =
    cap · tanh(a / cap). Both are the same for cap / scale and temperature / scale.

    Args:
        config: as logit_scale.
        temperature: of the sampler.
    Raises: ValueError for a model that gives no logits for the last rows of its head (Inkling):
        a head of ours would normalise over them.
    """
    known = getattr(config, "unpadded_vocab_size", None)
    if known is not None and known < (rows := config.vocab_size):
        raise ValueError(
            f"the LM head must have a logit for each row, got unpadded_vocab_size {known:,} of "
            f"{rows:,} rows in the configuration of {config.model_type}: call "
            f"model.resize_token_embeddings({known}) and save the model"
        )
    scale = logit_scale(config)
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    softcap = next((cap for cap in caps if cap), None)
    return temperature / scale, None if softcap is None else softcap / scale


def backbone(model: Any) -> Any:
    """Return the part of a causal LM below its LM head; the model itself where it has none.

    Llama4ForCausalLM and MllamaForCausalLM name another part as their base than they have.
    """
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def require_head_alone(model: Any) -> None:
    """Raise ValueError for a causal LM whose LM head does not stand on a backbone alone.

    It has no backbone, or weights that are in neither of the two (BERT's and ModernBERT's, which
    stand between them): a head of ours would leave these out.
    """
    parts = backbone(model), model.get_output_embeddings()
    if parts[0] is model or parts[1] is None:
        raise ValueError(
            f"the model must be an LM head on a backbone, got {type(model).__name__}, which has no "
            f"{'LM head' if parts[1] is None else 'backbone'} of its own: name another model"
        )
    known = {id(weight) for part in parts for weight in part.parameters()}
    others = [name for name, weight in model.named_parameters() if id(weight) not in known]
    if others:
        raise ValueError(
            f"the LM head must stand on the backbone alone, got {type(model).__name__} with "
            f"{others[0]} and {len(others) - 1} more weights beside them: name another model"
        )
