"""Estimates the time of one step, term by term, from the speeds that a device reaches.

Each term is work divided by a speed. Terms do not overlap (but see `totals`), and completions have
their mean length, except where a batch waits for its longest. The verifier (worker processes on the
CPU), data, logs and checkpoints are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kdrl_train.start.estimate.case import Case
from kdrl_train.start.estimate.devices import Device
from kdrl_train.start.estimate.shapes import ModelShape
from kdrl_train.start.estimate.terms import Term, number_text

CACHE_PASSES = 3
"""To add a token, the cache of a window, or of a model that keeps states too, is read and written,
and attention reads it again. Other keys and values stay where they are (rollouts/kv_cache.py):
attention alone reads them."""
ELEMENTWISE_PASSES = 4
"""The forward pass writes and reads what a layer keeps; backward does so with its gradient."""
STATE_FLOP = 6
"""For each number of an SSM's state: decay, add the input, multiply with the output's vector."""
ADAMW_PASSES = 10
"""float32 numbers that move for each parameter: AdamW reads w, g, m, v and writes w, m, v; clipping
reads g twice and writes it."""
HOST_BYTES_PER_S = 25e9
"""Speed between a GPU's memory and the CPU's, over PCIe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Holds the mean tokens of a prompt and of a response."""

    prompt: float
    response: float

    @property
    def sequence(self) -> float:
        """Sums prompt and response."""
        return self.prompt + self.response


def time_terms(case: Case, device: Device, lengths: Lengths, launch_us: float) -> list[Term]:
    """Lists the seconds of one step; all processes work at the same time.

    Args:
        launch_us: microseconds that Python and kernel launches take for each layer and token of
            `generate`.
    """
    terms = [
        *_rollout(case, device, lengths, launch_us),
        *_passes(case, device, lengths),
        *_head(case, device, lengths),
        *_optimizer(case, device),
        *_communication(case, device, lengths),
    ]
    return [term for term in terms if term.value]


def totals(terms: Sequence[Term]) -> tuple[float, float]:
    """Returns two sums of a step's seconds: without overlap, and with communication during the
    forward and backward passes."""
    parts = {part: sum(t.value for t in terms if part in t.when) for part in PARTS}
    hidden = min(parts["communication"], parts["teacher"] + parts["update"])
    return sum(parts.values()), sum(parts.values()) - hidden


PARTS = ("rollout", "teacher", "update", "optimizer", "communication")


def _compute(name: str, part: str, flop: float, formula: str, device: Device) -> Term:
    text = (
        f"{formula} = {number_text(flop / 1e12)} TFLOP / {number_text(device.flops / 1e12)} TFLOP/s"
    )
    return Term(name, flop / device.flops, text, (part,))


def _move(name: str, part: str, size: float, formula: str, rate: float) -> Term:
    text = f"{formula} = {number_text(size / 1e9)} GB / {number_text(rate / 1e9)} GB/s"
    return Term(name, size / rate, text, (part,))


def _rollout(case: Case, device: Device, lengths: Lengths, launch_us: float) -> list[Term]:
    """Times `generate`: a batch computes all its completions until the longest one ends."""
    policy, b, B = case.policy, case.dtype.itemsize, case.batch
    S = case.run.sampling.max_new_tokens
    batches = -(-case.rollouts // B)
    steps, weights = batches * S, round(policy.read_parameters(B))
    met = policy.active_parameters + policy.head_parameters
    seconds = max(b * weights / device.bandwidth, 2 * met * B / device.flops)
    read = batches * B * _cache_moved(case, lengths.prompt, S)
    prompts = case.rollouts * lengths.prompt
    shapes = f"{batches} x {B} completions · {S:,} steps"
    launches = steps * policy.layers * launch_us * 1e-6
    return [
        Term(
            "decode, weights",
            steps * seconds,
            f"{steps:,} steps · max({b} B · {weights:,} / {device.bandwidth / 1e9:,.4g} GB/s, "
            f"2 FLOP · {met:,} · {B} / {device.flops / 1e12:,.4g} TFLOP/s)",
            ("rollout",),
        ),
        _move("decode, keys and values", "rollout", read, shapes, device.bandwidth),
        Term(
            "decode, Python and kernel launches",
            launches,
            f"{steps:,} steps · {policy.layers} layers · {launch_us:g} us",
            ("rollout",),
        ),
        _compute(
            "prefill",
            "rollout",
            _forward_flop(policy, prompts, lengths.prompt),
            f"2 · {policy.active_parameters:,} · {prompts:,.0f} tokens, and attention",
            device,
        ),
    ]


def _cache_moved(case: Case, prompt: float, steps: int) -> float:
    """Counts the bytes that move of one completion's caches and states, summed over its steps."""
    b, states = case.dtype.itemsize, case.state_bytes(case.policy)
    total = float(CACHE_PASSES * steps * states)
    for layer in case.policy.each:
        size = case.stream_bytes * layer.cached_keys + b * layer.cached_values
        window = float("inf") if layer.window is None else layer.window
        growing = min(max(window - prompt, 0), steps)  # steps until the window is full
        full = (steps - growing) * window if growing < steps else 0
        passes = 1 if layer.window is None and not states else CACHE_PASSES
        total += passes * size * (growing * prompt + growing * growing / 2 + full)
    return total


def _forward_flop(
    model: ModelShape, tokens: float, sequence: float, masked: float | None = None
) -> float:
    """Counts the FLOP of the layers' GEMMs, of attention, and of the states of other mixers.

    Args:
        sequence: tokens of a sequence, of which each reads those before it, at most a window.
        masked: keys of every token where a mask skips no work.
    """
    per_token = 2.0 * model.active_parameters
    for layer in model.each:
        window = min(layer.window or sequence, sequence)
        context = window - window * window / (2 * sequence) if masked is None else masked
        per_token += 2 * (layer.query + layer.output) * context
        per_token += STATE_FLOP * layer.state
    return tokens * per_token


def _passes(case: Case, device: Device, lengths: Lengths) -> list[Term]:
    """Times the layers, without heads: the teacher's forward, the policy's forward and backward."""
    policy, teacher = case.policy, case.teacher
    tokens = case.rollouts * lengths.sequence
    masked = case.pack_tokens if case.masked else None
    work = _forward_flop(policy, tokens, lengths.sequence, masked)
    layers = f"{policy.active_parameters:,} · {tokens:,.0f} tokens, and attention"
    kept = case.activation_bytes(policy)
    terms = [_passes_of_policy(case, work, tokens, layers, device)]
    terms += [
        _move(
            "policy, norms and activations",
            "update",
            ELEMENTWISE_PASSES * kept * tokens,
            f"{ELEMENTWISE_PASSES} passes · {kept:,} B · {tokens:,.0f} tokens",
            device.bandwidth,
        ),
    ]
    if case.run.model.gradient_checkpointing:
        terms.append(_compute("policy, recomputed", "update", work, f"2 · {layers}", device))
    for name, model in {"teacher": teacher, "reference": case.reference}.items():
        if model is not None:
            sequence = lengths.response + lengths.prompt * case.longer_prompt
            tokens = case.rollouts * sequence
            read = _forward_flop(model, tokens, sequence, masked)
            layers = f"2 · {model.active_parameters:,} · {tokens:,.0f} tokens, and attention"
            terms.append(_compute(f"{name}, forward", "teacher", read, layers, device))
    return terms


def _passes_of_policy(case: Case, work: float, tokens: float, layers: str, device: Device) -> Term:
    """Times forward and backward: 1, and 2 times its FLOP; 1 where the layers are frozen, and 3
    times those of their adapters."""
    name = "policy, forward and backward"
    if not case.adapters:
        return _compute(name, "update", 3 * work, f"6 · {layers}", device)
    flop = 2 * work + 6.0 * case.adapters * tokens
    formula = f"4 · {layers}; 6 · {case.adapters:,} of the adapters"
    return _compute(name, "update", flop, formula, device)


def _head(case: Case, device: Device, lengths: Lengths) -> list[Term]:
    """Times the one-pass head over all tokens of the step: its GEMMs and its row kernels.

    The policy's GEMMs take 3u, u = 2·N·H·V FLOP; with a sketch 1u, 2u of the share of flat tokens
    and sparse products. The teacher's one takes tau·u, tau its share of u. Ratios of whole
    completions take 1u more where they are not 1.
    """
    chunk_plan = case.chunk_plan(round(case.rollouts * lengths.response))
    g = chunk_plan.geometry
    u = f"{g.N:,} · {g.H:,} · {g.V:,}"
    policy_flop = sum(flop for name, flop in chunk_plan.flop.items() if name != "teacher")
    gemms = policy_flop / (2 * g.N * g.H * g.V)
    terms = [
        _compute("head, GEMMs", "update", policy_flop, f"{gemms:.3g} · 2 · {u}", device),
        _move(
            "head, row kernels",
            "update",
            chunk_plan.row_work_bytes,
            "float32 logits",
            device.bandwidth,
        ),
        _move(
            "head, products of the sketch",
            "update",
            chunk_plan.product_bytes,
            f"{chunk_plan.entries / max(g.N, 1):g} entries a token, with W and X",
            device.bandwidth,
        ),
    ]
    config = case.run
    if config.method.reads_completions and (
        config.optim.updates_per_rollout > 1 or config.engine.staleness
    ):
        flop = 2.0 * g.N * g.H * g.V
        terms.append(_compute("head, ratios of completions", "update", flop, f"2 · {u}", device))
    if (head := case.read_head) is not None:
        formula = f"2 · {g.N:,} · {head.hidden:,} · {head.vocabulary:,}"
        flop = chunk_plan.flop["teacher"]
        if config.method.is_topk:  # a pass of its own finds the likeliest tokens
            flop = 2.0 * g.N * head.hidden * head.vocabulary
        terms.append(_compute("head, teacher's GEMM", "update", flop, formula, device))
    reference = case.reference
    if reference is not None:
        formula, flop = f"2 · {g.N:,} · {reference.hidden:,} · {g.V_t:,}", 2.0 * g.N * g.V_t
        flop *= reference.hidden
        terms.append(_compute("head, reference's GEMM", "update", flop, formula, device))
    return terms


def _optimizer(case: Case, device: Device) -> list[Term]:
    parameters = case.trained / case.placement.gpus
    size = 4 * ADAMW_PASSES * parameters
    formula = f"{ADAMW_PASSES} · 4 B · {case.trained:,} / {case.placement.gpus} GPUs"
    terms = [_move("AdamW and clip", "optimizer", size, formula, device.bandwidth)]
    if case.placement.offload_policy:
        size, formula = 8 * parameters, "gradients to the CPU, weights back"
        terms.append(_move("offloaded policy", "optimizer", size, formula, HOST_BYTES_PER_S))
    return terms


def _communication(case: Case, device: Device, lengths: Lengths) -> list[Term]:
    """Times FSDP2's collectives: in each pass a GPU receives, or sends, what the others hold."""
    policy, teacher, b = case.policy, case.teacher, case.dtype.itemsize
    pack_tokens = max(case.run.optim.micro_batch_tokens, lengths.sequence)
    packs = -(-case.rollouts * lengths.sequence // pack_tokens)
    others = (case.placement.gpus - 1) / case.placement.gpus

    def move(name: str, part: str, passes: float, size: int, parameters: int) -> Term:
        formula = f"{passes:,.0f} · {size} B · {parameters:,} · {others:.3f}"
        return _move(name, part, passes * size * parameters * others, formula, device.link)

    part = "communication"
    terms = [
        move("all-gather, policy", part, 2 * packs, b, policy.parameters),
        move("reduce-scatter, gradients", part, packs, 4, case.trained),
        move("weights to the sampler", "rollout", 1, b, policy.parameters),
    ]
    if teacher is not None and case.teacher_weights == "sharded":
        terms.append(move("all-gather, teacher", part, packs, b, teacher.parameters))
    if teacher is not None and case.teacher_weights == "cpu":
        size = packs * b * teacher.parameters
        formula = f"{packs:,.0f} packs · {b} B · {teacher.parameters:,}"
        terms.append(_move("teacher from the CPU", part, size, formula, HOST_BYTES_PER_S))
    return terms
