"""Predicts the memory of one GPU, term by term, and the moment of a step that needs the most.

The model is a step of kdrl_train with transformers' `generate`. Over several GPUs FSDP2 shards the
float32 weights, gradients and moments: each layer is a group, and the rest (embedding, head, last
norm) is the root's group. One GPU holds the whole model and computes in bfloat16 by autocast.

The table says what a layer keeps for each token in transformers' modules under PyTorch's autograd,
without fused kernels. b is the bytes of a number in the compute dtype, s in the residual stream:

    norm of the stream, width H   (4 + s + b) H    float32 input, normalised, output
    norm of queries or keys       (4 + b) each
    attention, "packed"           b (2 q + 2 kv)   q, k, v and output; 4 q where PyTorch's kernel
                                                   needs k and v as wide as q; 5 q without it (CPU,
                                                   float32): the output exists twice
    attention, "sdpa"             b · 4 q          and a [T, T] mask of b bytes a number
    attention, others             b (2 q + 2 kv)   "eager" also a softmax [T, T] of each head, of
                                                   4 bytes, and of b where that is less
    gated MLP, width I            b · 4 I          gate, its activation, up, their product; one
                                                   without a gate: 2 I
    k chosen experts              b k (4 I + 2 H)  the same, and copies of the token to and fro
    SSM, linear attention         what fused kernels keep (mamba-ssm, flash-linear-attention): its
                                  inputs, convolved inputs, and 3 outputs. PyTorch's own loops keep
                                  at least twice as much

`generate` keeps of a token what its cache keeps: keys and values; of a layer with a sliding window
or chunks those of the window; one latent and one rotated key (MLA); nothing where a layer reads
another one's. An SSM, linear attention or convolution keeps a state of constant size.

Fragmentation (the reserve covers it), the CUDA context and NCCL's buffers are not modelled.
"""

from collections.abc import Sequence
from dataclasses import replace

from kdrl_train.start.estimate.case import Case, shorter_packs
from kdrl_train.start.estimate.composite import composite_terms
from kdrl_train.start.estimate.teacher_memory import served_head_terms, teacher_terms
from kdrl_train.start.estimate.terms import (
    ALWAYS,
    LARGER,
    MOMENTS,
    MORE_GPUS,
    ROLLOUT,
    UPDATE,
    WAIT,
    Term,
    product,
)

LOGIT_COPIES = 5
"""Tensors float32 [batch, V] that exist together while a token is sampled: logits, their copy, the
previous scores, the new scores, probabilities."""


def memory_terms(case: Case) -> list[Term]:
    """Lists what one GPU holds in bytes, each term with the moments at which it is held.

    Lengths are the longest that the configuration allows, not means.

    Raises: ValueError if the workspace is too small for the logits of one token.
    """
    return [
        *_states(case),
        *_passes(case),
        *_activations(case),
        *_head(case),
        *teacher_terms(case),
        *served_head_terms(case),
        *composite_terms(case),
        *_rollout(case),
    ]


def by_moment(terms: Sequence[Term]) -> dict[str, float]:
    """Sums the bytes held at each moment."""
    return {moment: sum(t.value for t in terms if moment in t.when) for moment in MOMENTS}


def loading_bytes(case: Case) -> float:
    """Returns the CPU memory of rank 0 while it reads the models, one after the other, to share
    them out."""
    copied = [case.dtype.itemsize * shape.parameters for shape in case.copied[:1]]
    average = 4 * case.policy.parameters * case.averaged
    return max(case.weight_bytes * case.policy.parameters, average, *copied)


def causes(terms: Sequence[Term], available_bytes: float) -> list[Term]:
    """Finds the terms to make smaller: for each moment that needs more than `available_bytes`, the
    largest terms that together are the excess."""
    too_large: list[Term] = []
    for moment, held in by_moment(terms).items():
        excess = held - available_bytes
        for term in sorted(terms, key=lambda t: -t.value):
            if excess > 0 and moment in term.when and term.remedy:
                excess -= term.value
                too_large += [term] if term not in too_large else []
    return too_large


def _states(case: Case) -> list[Term]:
    """Lists what lasts from pack to pack: weights, gradients and the optimiser's moments."""
    placement, optim = case.placement, case.run.optim
    over = (placement.gpus, "GPUs")
    everything = (case.trained, "of the adapters" if case.adapters else "parameters")
    several_packs = case.rollouts * case.longest > case.pack_tokens
    if placement.offload_policy and not placement.cpu:
        return []
    remedy = f"{MORE_GPUS}, or --model.offload-policy"
    frozen: list[Term] = []
    if case.adapters:
        base = [(case.weight_bytes, "B"), (case.policy.parameters, "parameters")]
        frozen = [product("frozen weights", ALWAYS, base, over, remedy=remedy)]
    terms = [
        *frozen,
        product("weights, float32", ALWAYS, [(4, "B"), everything], over, remedy=remedy),
        product(
            "gradients, float32",
            (*(("teacher", *UPDATE) if several_packs else ()), "root", "optimizer"),
            [(4, "B"), everything],
            over,
            remedy=remedy,
        ),
    ]
    if moments := case.moment_bytes:
        name = "momentum" if optim.name == "sgd" else "AdamW moments"
        terms.append(product(name, ALWAYS, [(moments, "B"), everything], over, remedy=remedy))
    if placement.cpu:
        size = min(case.policy.largest, case.trained)
        largest = (size, "of the largest parameter")
        terms.append(product("AdamW temporaries", ("optimizer",), [(8, "B"), largest], over))
        if case.run.save_async:
            average = 4 if case.run.model.self_teacher == "ema" else 0
            copy = [(4 + moments + average, "B"), everything]
            terms.append(product("copy for the checkpoint", ALWAYS, copy, over, remedy=WAIT))
    else:
        step = [(4, "B"), everything]
        terms.append(product("AdamW temporaries", ("optimizer",), step, over, remedy=remedy))
    return terms


def _passes(case: Case) -> list[Term]:
    """Lists copies of the weights in the compute dtype, and gradients before they are sharded."""
    policy, b = case.policy, case.dtype.itemsize
    head = (policy.head_parameters, "head parameters")
    layer = (policy.layer_parameters, "parameters of a layer")
    root = (policy.root_parameters, "parameters outside the layers")
    if case.sharded:
        gathered = [
            product("gathered layers", ("backward",), [(2 * b, "B, two layers"), layer]),
            product("gathered root", (*UPDATE, "root"), [(b, "B"), root], remedy=LARGER),
        ]
        if case.adapters:  # whose gradients are small
            return gathered
        return [
            *gathered,
            product("a layer's gradient, whole", ("backward",), [(b + 4, "B"), layer]),
            product("the head's gradient, whole", ("backward",), [(b, "B"), head]),
            product("the root's gradient, whole", ("root",), [(b + 4, "B"), root], remedy=LARGER),
        ]
    if case.adapters:
        return []
    terms = [product("the embedding's gradient", ("root",), [(4, "B"), head])]
    if policy.tied:
        terms.append(product("the tied head's gradient", ("backward", "root"), [(4, "B"), head]))
    if b < 4:
        layers = (policy.layers_parameters, "parameters of the layers")
        terms.append(product("weights in bfloat16", UPDATE, [(b, "B"), layers], remedy=MORE_GPUS))
        terms.append(product("head in bfloat16", ("head",), [(b, "B"), head], remedy=LARGER))
    return terms


def _activations(case: Case) -> list[Term]:
    """Lists what the policy's layers keep of a pack for backward."""
    policy, b, s = case.policy, case.dtype.itemsize, case.stream_bytes
    tokens, layers = (case.pack_tokens, "tokens"), (policy.layers, "layers")
    fused = " (SSM, linear attention: with fused kernels)" if policy.scans else ""
    kept = (case.activation_bytes(policy), f"B, all layers{fused}")
    largest = (max(case.layer_bytes(layer) for layer in policy.each), "B")
    mask = [(b, "B"), tokens, tokens]
    last = (policy.hidden * (4 + s + 2 * b), "B")
    inner = (b * (2 * policy.inner + 2 * policy.hidden), "B")
    shorter = shorter_packs(case)
    terms = [
        product("last norm, hidden states", UPDATE, [tokens, last], remedy=shorter),
        product("a layer's backward", ("backward",), [tokens, inner], remedy=shorter),
    ]
    if case.run.model.gradient_checkpointing:
        stream = (s * policy.hidden, "B")
        terms.append(
            product("inputs of the layers", UPDATE, [layers, tokens, stream], remedy=shorter)
        )
        terms.append(
            product("one layer, recomputed", ("backward",), [tokens, largest], remedy=shorter)
        )
        masks = [product("a layer's mask", ("backward",), mask, remedy=shorter)]
    else:
        remedy = f"--model.gradient-checkpointing, or {shorter}"
        terms.append(product("activations", UPDATE, [tokens, kept], remedy=remedy))
        masks = [product("masks of the layers", UPDATE, [layers, *mask], remedy=remedy)]
    return [*terms, *(masks if case.masked else []), *_attention_weights(case)]


def _attention_weights(case: Case) -> list[Term]:
    """Lists what transformers' "eager" attention keeps of each pair of tokens in a row."""
    heads = [layer.heads for layer in case.policy.each]
    if not case.weights_bytes or not any(heads):
        return []
    recomputed = case.run.model.gradient_checkpointing
    kept = (max(heads), "heads of a layer") if recomputed else (sum(heads), "heads of all layers")
    each, shorter = (case.weights_bytes, "B"), shorter_packs(case)
    tokens, row = (case.pack_tokens, "tokens"), (case.row_tokens, "tokens of a row")
    when = ("backward",) if recomputed else UPDATE
    prompt = (case.run.data.max_prompt_tokens, "tokens")
    batch, largest = (case.batch, "completions"), (max(heads), "heads of a layer")
    return [
        product("attention weights", when, [kept, each, tokens, row], remedy=shorter),
        product(
            "attention weights of the prompts",
            ("prefill",),
            [batch, largest, each, prompt, prompt],
            remedy="lower sampling.batch_size or data.max_prompt_tokens",
        ),
    ]


def _head(case: Case) -> list[Term]:
    """Lists what the one-pass head holds for a pack in which every token may carry a loss."""
    policy, plan, shorter = case.policy, case.chunk_plan(case.pack_tokens), shorter_packs(case)
    what = f"B: logits of {plan.rows:,} tokens, {plan.geometry.streams} buffer(s)"
    if case.run.model.head_backward == "sketch" and not case.placement.cpu:
        what += ", room for entries"
    tokens, H, V = (case.pack_tokens, "tokens"), (policy.hidden, "H"), (policy.vocabulary, "V")
    workspace = product(
        "workspace of the head",
        ("head",),
        [(plan.workspace_bytes, what)],
        remedy="lower optim.workspace_bytes",
    )
    if case.run.model.head_backward == "sketch":
        # once the workspace is free, tokens that are not sketched are added to dX and dW in float32
        sums = 4 * (case.pack_tokens + policy.vocabulary) * policy.hidden
        if sums > plan.workspace_bytes:
            workspace = product("dX and dW, float32", ("head",), [(sums, "B")], remedy=LARGER)
        each = f"B: {plan.entries / case.pack_tokens:g} entries a token, {case.flat_share:.0%} flat"
        return [
            workspace,
            product("entries of the sketch", UPDATE, [(plan.gradient_bytes, each)]),
            product("dX", ("backward",), [(case.dtype.itemsize, "B"), tokens, H], remedy=shorter),
        ]
    terms = [workspace, product("dX, float32", UPDATE, [(4, "B"), tokens, H], remedy=shorter)]
    if not case.adapters:
        terms.append(product("dW accumulator, float32", ("head",), [(4, "B"), V, H], remedy=LARGER))
    return terms


def _completion(case: Case) -> str:
    """Name the setting that bounds the longest completion that is sampled."""
    return ("sampling" if case.sampled[1] == case.longest else "eval") + ".max_new_tokens"


def _rollout(case: Case) -> list[Term]:
    """Lists what `generate` holds: it reads all prompts of a batch at once, then samples tokens."""
    policy, b, run = case.policy, case.dtype.itemsize, case.run
    if run.engine.kind == "vllm_server":  # the server runs on other devices
        return []
    prompt, length = case.sampled
    batch = (case.batch, "completions")
    per_token = (case.cache_bytes(policy, 1), "B")  # a window is cut once the prompt is read
    held = [(length, "tokens"), per_token]
    if any(layer.window is not None for layer in policy.each):
        held = [(case.cache_bytes(policy, length), f"B of {length:,} tokens, some in a window")]
    copied = max(layer.kept(length) * layer.cached_keys for layer in policy.each)
    inner = (3 * b * (policy.inner + policy.hidden), "B")
    fewer = "lower sampling.batch_size"
    terms = [
        product(
            "keys and values of the prompts",
            ("prefill",),
            [batch, (prompt, "tokens"), per_token],
            remedy=fewer,
        ),
        product(
            "a layer of the prompts",
            ("prefill",),
            [batch, (prompt, "tokens"), inner],
            remedy=f"{fewer} or data.max_prompt_tokens",
        ),
        product(
            "mask of padded prompts",
            ("prefill",),
            [(1 + b, "B"), batch, (prompt, "tokens"), (prompt, "tokens")],
            remedy=f"{fewer} or data.max_prompt_tokens",
        ),
        product(
            "keys and values",
            ("decode",),
            [batch, *held],
            remedy=f"{fewer} or {_completion(case)}",
        ),
        product(
            "a layer's keys, copied to grow",
            ("decode",),
            [batch, (case.stream_bytes, "B"), (copied, "numbers")],
        ),
        product(
            "logits of a token",
            ("decode",),
            [(4 * LOGIT_COPIES, "B"), batch, (policy.vocabulary, "V")],
            remedy=fewer,
        ),
    ]
    if states := case.state_bytes(policy):
        terms.append(product("states of the mixers", ROLLOUT, [batch, (states, "B")], remedy=fewer))
    if case.sharded or b < case.weight_bytes or run.engine.staleness:
        copy = [(b, "B"), (policy.parameters, "parameters")]
        terms.append(product("copy of the policy that samples", ROLLOUT, copy, remedy=LARGER))
    if run.engine.staleness:  # the next step is sampled during the update
        terms = [replace(t, when=ALWAYS) if "decode" in t.when else t for t in terms]
    return terms
