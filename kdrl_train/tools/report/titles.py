"""Names the numbers of metrics.jsonl for the page: titles and captions of curves, columns."""

from collections.abc import Iterable, Mapping

CURVES = {
    "Reward": {
        "reward": "reward, mean",
        "accuracy": "right completions, share",
        "eval_avg_at_k": "held-out avg@k",
        "eval_pass_at_k": "held-out pass@k",
        "eval_maj_at_k": "held-out maj@k",
        "groups_with_signal": "groups with different rewards, share",
    },
    "Teacher": {
        "kl_teacher": "KL to the teacher, nats per token",
        "topk_divergence": "divergence over the teacher's likeliest tokens, nats per token",
        "k2": "k2 = l²/2, mean over tokens",
        "kd_coef": "beta, weight of distillation (kd_coef)",
        "policy_coef": "weight of the policy gradient (policy_coef)",
        "kd_share": "distilled tokens, share",
        "kd_selected": "distilled tokens that the method selects, share",
        "kd_flip_share": "tokens pushed the other way by distillation, share",
        "rl_grad_norm": "norm of the policy gradient",
        "kd_grad_norm": "norm of the distillation gradient",
        "rl_kd_cosine": "cosine of the two gradients",
    },
    "Responses": {
        "response_length": "response length, tokens",
        "truncated": "responses cut at max_new_tokens, share",
        "entropy": "entropy, nats per token",
        "eval_length": "held-out response length, tokens",
        "eval_truncated": "held-out responses cut, share",
    },
    "Optimisation": {
        "loss": "loss",
        "grad_norm": "gradient norm, before clipping",
        "clip_fraction": "clipped tokens, share",
        "learning_rate": "learning rate",
        "sketch_noise": "relative noise of the sketched gradient",
        "sketch_entries": "entries of the sketch a token",
        "sketch_flat_share": "tokens too flat to be sketched, share",
    },
    "Health": {
        "sampler_mismatch_mean": "sampler mismatch, mean, nats",
        "sampler_mismatch_max": "sampler mismatch, largest, nats",
        "sampler_weight_mean": "sampler correction, mean weight",
        "sampler_limited": "sampler correction, weights at the cap, share",
        "verifier_timeout": "verifier timeouts",
        "verifier_unparseable": "completions without a readable answer",
        "verifier_error": "failed rewards",
        "tokens_per_s": "tokens per second",
        "seconds": "seconds per step",
        "peak_memory_bytes": "peak memory, bytes",
    },
}
"""Key of metrics.jsonl -> title, by heading."""
CAPTIONS = {
    "k2": "l is the teacher log-ratio, log p - log q.",
    "kd_selected": "Of the tokens of distilled completions, those that the method distils.",
    "kd_flip_share": "Tokens whose advantage minus the pull of distillation has the other sign.",
    "sketch_noise": (
        "Error that the sketch adds to the gradient of a hidden state, relative to its norm; its "
        "mean is 0. A noise of s makes the square of this gradient 1 + s² times as large: 0.1 is "
        "normal and adds 1%. Where it stays above, lower model.head_threshold."
    ),
    "sketch_entries": "Each costs a row of W and one of X; flat distributions have more.",
    "sketch_flat_share": (
        "Their gradient is exact, as sparse products would cost more. Where nearly all are, the "
        "vocabulary is too small or the policy too unsure for a sketch to save anything."
    ),
    "sampler_mismatch_mean": "Mean |log p trainer - log p sampler| over sampled tokens.",
    "sampler_mismatch_max": "Largest |log p trainer - log p sampler| of a sampled token.",
    "sampler_weight_mean": "Mean of p trainer / p sampler over tokens, capped.",
}
"""Key of metrics.jsonl -> caption, for curves whose title does not say enough."""
TABLED = {
    "eval_avg_at_k": "avg@k",
    "eval_pass_at_k": "pass@k",
    "accuracy": "right, share",
    "reward": "reward",
    "kl_teacher": "KL to teacher, nats",
    "response_length": "response tokens",
    "truncated": "cut, share",
    "entropy": "entropy, nats",
    "grad_norm": "gradient norm",
    "sketch_noise": "noise of the sketch",
    "tokens_per_s": "tokens/s",
}
"""Key of metrics.jsonl -> column of the table of final values."""


def base_of(key: str) -> tuple[str, str]:
    """Return the key whose title a key of several parts shares, and the name that it adds.

    They are eval_avg_at_k and aime of eval/aime/avg_at_k, and kl_teacher and code of
    kl_teacher/code.
    """
    first, _, rest = key.partition("/")
    name, _, kind = rest.rpartition("/")
    return (f"eval_{kind}", name) if first == "eval" and name else (first, rest)


def with_names(titles: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """Return the title of each key of metrics.jsonl that `titles` names, or names the base of."""
    named: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(keys):
        base, name = base_of(key)
        if base in titles and name:
            named.setdefault(base, {})[key] = f"{titles[base]}: {name}"
    return {
        k: t for base in titles for k, t in ({base: titles[base]} | named.get(base, {})).items()
    }
