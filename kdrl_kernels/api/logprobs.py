"""Defines linear_logprobs."""

from dataclasses import replace

from torch import Tensor
from torch.distributed import ProcessGroup

from kdrl_kernels import checks, logprobs, operators, option_checks, reference, sketched
from kdrl_kernels.adapter import LowRank, check_adapter
from kdrl_kernels.api.calls import adapted, geometry
from kdrl_kernels.batches import takes_batches
from kdrl_kernels.call import LogprobCall
from kdrl_kernels.chunks import free_bytes_of, max_rows, warn_of_few_rows
from kdrl_kernels.head import StudentHead, gathered, needs_gradient
from kdrl_kernels.outputs import LogprobOutput
from kdrl_kernels.plain import check_bytes, check_flag, has_values
from kdrl_kernels.plan import Backward
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.tangents import refuses_tangents
from kdrl_kernels.truncation import Truncation
from kdrl_kernels.vocab_ranks import VocabRanks, takes_vocab_group


@takes_vocab_group
@refuses_tangents
@takes_batches
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    adapter: LowRank | None = None,
    truncation: Truncation | None = None,
    entropy: bool = False,
    extra_tokens: Tensor | None = None,
    rest: bool = False,
    topk: int | None = None,
    workspace_bytes: int | None = None,
    cache_bytes: int = 0,
    backward: Backward = "exact",
    sketch: Sketch | None = None,
    impl: str | None = None,
    vocab_group: ProcessGroup | None = None,
) -> LogprobOutput:
    """Compute the log-probability of one token per row, and entropy, without [N, V] logits.

    z = softcap(hidden · weightᵀ + bias) / temperature
    logprobs[n] = z[n, tokens[n]] - log(sum_v exp(z[n, v]))

    Costs are told in u = 2 N H V FLOP, one product over the head; README is kdrl_kernels/README.md.

    Args:
        hidden: [N, H], float32, float16, bfloat16 or float64, contiguous or not. Or [B, T, H]:
            every [N] of arguments and outputs is then [B, T].
        weight: [V, H], on the device of hidden, in its dtype; or one of the two in float32 and the
            other in 16 bits, which computes in hidden's dtype, with a copy of weight in it, and
            gives each its gradient in its own dtype. A DTensor (FSDP2) is gathered once; its
            gradient has its layout, averaged over the ranks as FSDP2 averages the body's.
        tokens: [N] int64 in [0, V). One outside raises on a CPU; on a GPU, where raising would
            wait for the device, it makes every log-probability NaN.
        mask: [N] bool or number, None: all rows. Rows where it is 0 are never projected, may hold
            NaN and any token, and give 0 and no gradient. A GPU is waited for once.
        bias: [V], a tensor or DTensor as weight is, or None.
        temperature: positive float or [N] tensor, a constant: no gradient reaches it.
        softcap: positive float, cap in softcap(a) = cap · tanh(a / cap), or None.
        adapter: LowRank(A [r, H], B [V, r], scale), or None: z is then that of weight + scale · B ·
            A, and gradients reach hidden, A, B and bias. weight must not require a gradient,
            except under no_grad. A pass costs 2u instead of 3u, and holds no gradient [V, H] but a
            copy of weight and B, V (H + r) numbers in hidden's dtype.
        truncation: Truncation(top_k, top_p) of the sampler, or None: log-probabilities and entropy
            are those of the tokens that it keeps, renormalised. Not with a softcap.
        entropy: True also returns the entropy of each row.
        extra_tokens: [N, K] int64 in [0, V), K at most 512: more tokens whose log-probabilities are
            returned, with their gradient, as extra_logprobs [N, K]. -1: none, which gives 0. They
            may repeat, and the sampled token may be among them. One that a bias of -inf or the
            sampler forbids gives -inf, and no gradient. One outside: as in tokens.
        rest: True also returns rest_logprob [N], log of the probability on none of a row's
            extra_tokens, summed on its own, so precise where it is small. Below 2^-103 (float32;
            2^-970 in float64) it is -inf, without a gradient.
        topk: K in [1, min(512, V)] also returns the K likeliest tokens of each row, topk_tokens
            [N, K], a constant, and with their gradient their log-probabilities, topk_logprobs
            [N, K]. Not with extra_tokens, whose place they take in rest.
        workspace_bytes: bound of the memory beyond inputs, outputs and gradients. None: 256 MB on a
            CPU, where 16-bit weights are widened 16 MB at a time in addition; on a GPU 2,048 to
            8,192 rows of logits, by V and the memory of the whole card (README, "Memory").
        cache_bytes: where a gradient is needed, as many chunks as fit keep their float32 logits
            until backward, which then costs 3u instead of 4u for their rows, and gives the same
            bits. A compiled caller with a mask keeps the logits of all its rows, or none.
        backward: "exact"; or "sketch": an unbiased sparse sketch of dL/dlogits is multiplied in
            place of dX's and dW's GEMMs, 1u in all, and no logits are kept, whatever cache_bytes
            is. A graph of torch.compile breaks there.
        sketch: Sketch(threshold, seed, rows) of backward="sketch"; None: Sketch().
        impl: "triton", "torch" or "reference" (the definition, with full logits). None: Triton on
            GPU tensors, PyTorch elsewhere. A named one never falls back to another.
        vocab_group: torch.distributed ProcessGroup over which the rows of weight and bias are
            sharded, in the order of its ranks, evenly or not; None: weight is whole. All ranks must
            call and run the backward pass, with arguments that are equal to the bit but for weight,
            bias and an adapter's B, which is sharded too (RANKS.md beside README says what is
            compared). They get the outputs and the gradient of hidden of the whole vocabulary, and
            the gradients of their rows of weight and bias. topk is at most the rows of the smallest
            shard. Not with a DTensor (pass to_local()) nor backward="sketch", with
            truncation for impl="reference" alone, and not traced by torch.compile.
    Returns: LogprobOutput in nats, float32 (float64 for float64 inputs); differentiable once in
        hidden, weight, bias and adapter, for any later loss.
    Raises: ValueError for a shape, device, token or option; TypeError for a type or dtype.
    Memory: float32 logits of one chunk of rows; in backward float32 gradients, rounded once.
    Source: chunked recomputation; the log-sum-exp of arXiv:1805.02867. Maths: rows/README.md.
    """
    weight, bias = gathered(weight, hidden), gathered(bias, hidden)
    head = StudentHead(hidden, weight, bias, temperature, softcap)
    check_adapter(adapter, head)
    checks.check_tokens(tokens, head)
    check_bytes("workspace_bytes", workspace_bytes)
    check_bytes("cache_bytes", cache_bytes, optional=False)
    check_flag("entropy", entropy)
    impl = checks.choose_impl(impl, head)
    truncation = option_checks.check_truncation(truncation, head)
    sketch = option_checks.check_sketch(backward, sketch, impl, head)
    check_flag("rest", rest)
    K = checks.check_topk_size(topk, extra_tokens, head)
    ids = checks.check_extra_tokens(extra_tokens, rest and K == 0, head)
    used, N = checks.row_tensor("mask", mask, head, mask=True), len(tokens)
    used = used if has_values(tokens) else None
    active = slice(0, N) if used is None else used.nonzero().squeeze(1)
    if used is not None:
        head, tokens = head.select(active), tokens[active]
        ids = None if ids is None else ids[active]
        sketch = None if sketch is None else sketch.select(active)
    head = adapted(head, adapter, impl)
    needs = needs_gradient(head)
    call = LogprobCall(head, tokens, entropy, impl, 0, 0, needs, truncation, ids, rest, K)
    if impl != "reference":
        sizes, free = geometry(head, None, None, impl), free_bytes_of(hidden.device)
        rows = max_rows(sizes, workspace_bytes, free_bytes=free)
        if needs[1] and sketch is None:
            warn_of_few_rows(rows, len(tokens), hidden.device)
        cached = 0
        if any(needs) and sketch is None:
            mask_rows = None if used is None else N
            cached = logprobs.cached_rows(len(tokens), head, rows, cache_bytes, mask_rows)
        call = replace(call, max_rows=rows, cached=cached)
    if isinstance(vocab_group, VocabRanks):
        outputs = vocab_group.logprobs(call)
    elif impl == "reference":
        outputs = reference.linear_logprobs(call)
    elif sketch is not None and any(needs) and has_values(tokens):
        outputs = sketched.linear_logprobs(call, sketch)
    else:
        outputs = operators.linear_logprobs(call)
    outputs = outputs.spread(active, N)
    extra, rest_logprob = outputs.extra_logprobs, outputs.rest_logprob
    best = outputs.topk_tokens, extra if K else None
    extra = None if K else extra
    return LogprobOutput(outputs.logprobs, outputs.entropy, extra, rest_logprob, *best)
