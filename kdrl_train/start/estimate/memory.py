"""Memory of one GPU, term by term, and the moment of a step at which it is most.

What is modelled: kdrl_train's step with transformers' `generate`. Over several GPUs FSDP2 shards
float32 weights, gradients and moments, each layer a group and the rest (embedding, head, last norm)
the root's; one GPU holds the model as it is, and computes in bfloat16 by autocast.

Activations that a layer keeps for each token, as transformers' modules and PyTorch's autograd do
without fused kernels, b bytes a number of the compute dtype, s of the residual stream:

    norm of the stream, width H   (4 + s + b) H    float32 input, normalised, output
    norm of queries or keys       (4 + b) each
    attention, our own "packed"   b · 4 q          q, k, v, output; k and v repeated to q each.
                                                   5 q without a variable-length kernel (CPU,
                                                   float32): the output of the batches, of the row
    attention, "sdpa"             b · 4 q          and its own [T, T] mask in b
    attention, others             b (2 q + 2 kv)
    gated MLP, width I            b · 4 I          gate, its activation, up, their product

Not modelled: fragmentation (the reserve is for it), the CUDA context, NCCL's buffers.
"""

from collections.abc import Sequence
from dataclasses import replace

from kdrl_train.start.estimate.case import Case
from kdrl_train.start.estimate.terms import Term, product

MOMENTS = {
    "prefill": "the prompts of a batch are read",
    "decode": "the last token of a batch is drawn",
    "teacher": "the teacher reads a row",
    "head": "the loss of a row, with all that its layers keep",
    "backward": "the gradient of the last layer, the first in backward",
    "root": "the gradient of embedding and head, the last in backward",
    "optimizer": "AdamW's step",
}
ALWAYS = tuple(MOMENTS)
UPDATE = ("head", "backward")
ROLLOUT = ("prefill", "decode")
LOGIT_COPIES = 5
"""float32 [batch, V] alive together while a token is drawn: logits, their copy, the last scores,
the new ones, probabilities."""
MORE_GPUS = "raise --gpus"
WAIT = "--no-save-async"
LARGER = "choose GPUs with more memory, or a smaller model"


def memory_terms(case: Case) -> list[Term]:
    """Bytes of one GPU; each term with the moments at which they are held.

    Lengths are the longest that the configuration allows, not means.

    Raises: ValueError for a workspace that does not hold a row of logits.
    """
    return [
        *_states(case),
        *_passes(case),
        *_activations(case),
        *_head(case),
        *_teacher(case),
        *_rollout(case),
    ]


def by_moment(terms: Sequence[Term]) -> dict[str, float]:
    """Bytes held at each moment."""
    return {moment: sum(t.value for t in terms if moment in t.when) for moment in MOMENTS}


def loading_bytes(case: Case) -> float:
    """CPU memory of rank 0 while it reads the models, one after the other, for all to shard."""
    teacher = 0 if case.teacher is None else case.dtype.itemsize * case.teacher.parameters
    return max(4 * case.policy.parameters, teacher)


def causes(terms: Sequence[Term], limit: float) -> list[Term]:
    """For each moment above `limit` bytes the largest terms, as many as exceed it."""
    found: list[Term] = []
    for moment, held in by_moment(terms).items():
        excess = held - limit
        for term in sorted(terms, key=lambda t: -t.value):
            if excess > 0 and moment in term.when and term.remedy:
                excess -= term.value
                found += [term] if term not in found else []
    return found


def _states(case: Case) -> list[Term]:
    """What lasts longer than a row, over the GPUs."""
    P, placement = case.policy.parameters, case.placement
    over = (placement.gpus, "GPUs")
    everything = (P, "parameters")
    several = case.rollouts * case.longest > case.row
    if placement.offload_policy and not placement.cpu:
        return []
    remedy = f"{MORE_GPUS}, or --model.offload-policy"
    terms = [
        product("weights, float32", ALWAYS, [(4, "B"), everything], over, remedy=remedy),
        product(
            "gradients, float32",
            (*(("teacher", *UPDATE) if several else ()), "root", "optimizer"),
            [(4, "B"), everything],
            over,
            remedy=remedy,
        ),
        product("AdamW moments", ALWAYS, [(8, "B"), everything], over, remedy=remedy),
    ]
    if placement.cpu:
        largest = (case.policy.largest, "of the largest parameter")
        terms.append(product("AdamW temporaries", ("optimizer",), [(8, "B"), largest], over))
        if case.run.save_async:
            copy = [(12, "B"), everything]
            terms.append(product("copy for the checkpoint", ALWAYS, copy, over, remedy=WAIT))
    else:
        step = [(4, "B"), everything]
        terms.append(product("AdamW temporaries", ("optimizer",), step, over, remedy=remedy))
    return terms


def _passes(case: Case) -> list[Term]:
    """Weights in the compute dtype, and gradients on their way to their shards."""
    policy, b = case.policy, case.dtype.itemsize
    head = (policy.head_parameters, "head parameters")
    layer = (policy.layer_parameters, "parameters of a layer")
    root = (policy.root_parameters, "parameters outside the layers")
    if case.sharded:
        return [
            product("gathered layers", ("backward",), [(2 * b, "B, two layers"), layer]),
            product("gathered root", (*UPDATE, "root"), [(b, "B"), root], remedy=LARGER),
            product("a layer's gradient, whole", ("backward",), [(b + 4, "B"), layer]),
            product("the head's gradient, whole", ("backward",), [(b, "B"), head]),
            product("the root's gradient, whole", ("root",), [(b + 4, "B"), root], remedy=LARGER),
        ]
    terms = [product("the embedding's gradient", ("root",), [(4, "B"), head])]
    if policy.tied:
        terms.append(product("the tied head's gradient", ("backward", "root"), [(4, "B"), head]))
    if b < 4:
        layers = (policy.layers_parameters, "parameters of the layers")
        terms.append(product("weights in bfloat16", UPDATE, [(b, "B"), layers], remedy=MORE_GPUS))
        terms.append(product("head in bfloat16", ("head",), [(b, "B"), head], remedy=LARGER))
    return terms


def _shorter(case: Case) -> str:
    """How a row gets fewer tokens."""
    if case.row > case.longest:
        return "lower optim.micro_batch_tokens"
    return "lower sampling.max_new_tokens or data.max_prompt_tokens: a row holds one sequence"


def _activations(case: Case) -> list[Term]:
    """What the policy's layers keep of a row for backward."""
    policy, b, s = case.policy, case.dtype.itemsize, case.stream_bytes
    tokens, layers = (case.row, "tokens"), (policy.layers, "layers")
    kept = (case.activation_bytes(policy), "B")
    mask = [(b, "B"), tokens, tokens]
    last = (policy.hidden * (4 + s + 2 * b), "B")
    inner = (b * (2 * policy.intermediate + 2 * policy.hidden), "B")
    shorter = _shorter(case)
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
            product("one layer, recomputed", ("backward",), [tokens, kept], remedy=shorter)
        )
        masks = [product("a layer's mask", ("backward",), mask, remedy=shorter)]
    else:
        remedy = f"--model.gradient-checkpointing, or {shorter}"
        terms.append(product("activations", UPDATE, [layers, tokens, kept], remedy=remedy))
        masks = [product("masks of the layers", UPDATE, [layers, *mask], remedy=remedy)]
    return terms + (masks if case.masked else [])


def _head(case: Case) -> list[Term]:
    """The one-pass head on a row, every token of which may carry a loss."""
    policy, plan, shorter = case.policy, case.chunk_plan(case.row), _shorter(case)
    what = f"B: {plan.rows:,} rows, {plan.geometry.streams} buffer(s) of logits"
    tokens, H, V = (case.row, "tokens"), (policy.hidden, "H"), (policy.vocabulary, "V")
    return [
        product(
            "workspace of the head",
            ("head",),
            [(plan.workspace_bytes, what)],
            remedy="lower optim.workspace_bytes",
        ),
        product("dX, float32", UPDATE, [(4, "B"), tokens, H], remedy=shorter),
        product("dW accumulator, float32", ("head",), [(4, "B"), V, H], remedy=LARGER),
    ]


def _teacher(case: Case) -> list[Term]:
    """The teacher in this process, its passes and what they leave for the loss."""
    teacher, b = case.teacher, case.dtype.itemsize
    if teacher is None:
        return []
    everything, tokens = (teacher.parameters, "parameters"), (case.row, "tokens")
    head = (teacher.head_parameters, "head parameters")
    two_layers = 2 * teacher.layer_parameters + teacher.root_parameters
    inner = (3 * b * (teacher.intermediate + teacher.hidden), "B")
    terms = [
        product("teacher's hidden states", ("head",), [(b, "B"), tokens, (teacher.hidden, "H")]),
        product("a layer of the teacher", ("teacher",), [tokens, inner], remedy=_shorter(case)),
    ]
    if case.masked:
        mask = [(1 + b, "B"), tokens, tokens]
        terms.append(product("teacher's mask", ("teacher",), mask, remedy=_shorter(case)))
    if case.teacher_weights == "full":
        remedy = "--model.offload-teacher"
        return [product("teacher", ALWAYS, [(b, "B"), everything], remedy=remedy), *terms]
    if case.teacher_weights == "sharded":
        over = (case.placement.gpus, "GPUs")
        remedy = f"{MORE_GPUS}, or --model.offload-teacher"
        terms.append(product("teacher", ALWAYS, [(b, "B"), everything], over, remedy=remedy))
    gathered = [(b, "B"), (two_layers, "parameters: two layers, embedding, head")]
    return [
        *terms,
        product("teacher's layers, gathered", ("teacher",), gathered, remedy=LARGER),
        product("teacher's head, gathered", ("head",), [(b, "B"), head], remedy=LARGER),
    ]


def _rollout(case: Case) -> list[Term]:
    """`generate` on a batch of completions: it reads all prompts at once, then token by token."""
    policy, b, run = case.policy, case.dtype.itemsize, case.run
    if run.engine.kind == "vllm_server":  # it has devices of its own
        return []
    prompt, length = run.data.max_prompt_tokens, case.longest
    batch = (case.batch, "completions")
    pair = (case.stream_bytes + b) * policy.kv_width  # rotated keys are as wide as the stream
    per_token = (policy.layers * pair, "B")
    inner = (3 * b * (policy.intermediate + policy.hidden), "B")
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
            [batch, (length, "tokens"), per_token],
            remedy=f"{fewer} or sampling.max_new_tokens",
        ),
        product(
            "a layer's keys, copied to grow",
            ("decode",),
            [batch, (length, "tokens"), (case.stream_bytes * policy.kv_width, "B")],
        ),
        product(
            "logits of a token",
            ("decode",),
            [(4 * LOGIT_COPIES, "B"), batch, (policy.vocabulary, "V")],
            remedy=fewer,
        ),
    ]
    if case.sharded or b < 4 or run.engine.staleness:
        copy = [(b, "B"), (policy.parameters, "parameters")]
        terms.append(product("policy, whole, to sample", ROLLOUT, copy, remedy=LARGER))
    if run.engine.staleness:  # the update is beside it
        terms = [replace(t, when=ALWAYS) if "decode" in t.when else t for t in terms]
    return terms
