"""Defines kdrl_loss."""

from dataclasses import replace

from torch import Tensor
from torch.distributed import ProcessGroup

from kdrl_kernels import checks, operators, option_checks, reference
from kdrl_kernels.adapter import LowRank
from kdrl_kernels.api.calls import loss_call, output, solved
from kdrl_kernels.batches import takes_batches
from kdrl_kernels.head import StudentHead, TeacherHead, gathered
from kdrl_kernels.metrics import row_metrics
from kdrl_kernels.objective import Objective
from kdrl_kernels.outputs import LossOutput
from kdrl_kernels.plan import Backward
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.tangents import refuses_tangents
from kdrl_kernels.truncation import Truncation
from kdrl_kernels.vocab_ranks import VocabRanks, takes_vocab_group


@takes_vocab_group
@refuses_tangents
@takes_batches
def kdrl_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    advantages: Tensor | None,
    token_weights: Tensor | None = None,
    active_rows: int | None = None,
    old_logprobs: Tensor | None = None,
    teacher: TeacherHead | None = None,
    teacher_logprobs: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    kd_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    adapter: LowRank | None = None,
    truncation: Truncation | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    extra_tokens: Tensor | None = None,
    compact: bool | None = None,
    workspace_bytes: int | None = None,
    backward: Backward = "exact",
    sketch: Sketch | None = None,
    impl: str | None = None,
    vocab_group: ProcessGroup | None = None,
) -> LossOutput:
    """Compute policy gradient, teacher KL and entropy bonus of N tokens in one pass over the head.

    loss = (1 / normalizer) · sum_n token_weights[n] · (PG + kd_coef · kd_weight[n] · s · KD
           - entropy_coef · entropy), where Objective defines each term.

    Gradients reach hidden, weight, bias and adapter. All other arguments are constants.

    Args:
        hidden, weight: [N, H] and [V, H]; or hidden [B, T, H], and every [N] is [B, T]. For these,
            bias ([V]), temperature (float or [N]), softcap, adapter, workspace_bytes, backward,
            sketch, impl and vocab_group see help(linear_logprobs). With a vocab_group the teacher's
            weight is whole, or has as many rows on each rank as weight, but for padding on the
            last.
        tokens: [N] int64, the sampled tokens. One outside [0, vocab_size) raises on a CPU; on a
            GPU it makes the loss NaN and is counted in metrics["bad_tokens"].
        advantages: [N] float; None with objective.policy "off".
        token_weights: [N] float, integer or bool, None: 1. Rows of weight 0 are never projected,
            may hold NaN, and give exactly zero gradient. A GPU is waited for once, unless
            active_rows says how many are not 0.
        active_rows: how many token_weights are not 0, where the caller knows it; None: they are
            counted. A wrong number raises on a CPU; on a GPU it makes the loss NaN, and
            metrics["bad_tokens"] counts the difference.
        old_logprobs: [N] float in nats, the policy's at sampling time; None: strictly on-policy
            (ratio 1).
        teacher: TeacherHead with N rows, for sampled or exact KD.
        teacher_logprobs: [N] float in nats, as a server returns them, for sampled KD without
            kd_baseline.
        teacher_topk: (ids [N, K] int64, logprobs [N, K] float in nats), K at most 512, for a top-k
            kd: tokens of each row and the teacher's log-probabilities of them, normalised over
            all tokens, not over these K; -1 for none. The ids are the teacher's best, or the
            student's (linear_logprobs(topk=K)), in [0, vocab_size). One that repeats in a row
            would count twice: it raises on a CPU, as does a row whose probabilities sum to more
            than 1.001.
        kd_weight: [N] float, integer or bool, schedule and mask of the KD term; None: 1.
        normalizer: number or 0-d tensor, e.g. the token count of the step, divided by the ranks
            where gradients are averaged over them; None: sum(token_weights).
        truncation: Truncation(top_k, top_p) of the student's sampler, or None: log-probabilities,
            entropy and KL are those of the tokens that it keeps. Not with a softcap, nor with
            "fkl", "rkl+fkl" and "topk_fkl", which would be infinite.
        vocab_size: number of columns that both models use; None: min(V, V_t). With a vocab_group
            all of these are sizes of the whole vocabulary.
        entropy: True also returns the entropy of each row.
        extra_tokens: [N, K] int64, K at most 512, in [0, vocab_size) or -1 for none: more tokens
            whose log-probabilities are returned. This loss does not read them. Must be None with
            teacher_topk, whose ids take its place.
        compact: True leaves rows whose logits have no gradient (clipped, or advantage 0 and no KD)
            out of dX and dW. On a GPU the host then waits, once a chunk, for the number of the
            others while the gradient kernel runs. None: True on a CPU and with token_weights.
    Returns: LossOutput. Its metrics are 0-d sums and counts, which mean_metrics turns into means;
        the table in kdrl_kernels/README.md, "Metrics", says what each is and where it is there:
        tokens, gradient_rows, bad_tokens, ratio_sum, ratio_max, clipped, entropy_sum; of a teacher
        kd_tokens, teacher_log_ratio_sum, k2_sum, kl_sum, kd_flipped, topk_divergence_sum; of a
        sketch flat_rows, entries, sketch_noise, sketch_variance_sum, sketch_square_sum.
    Raises: ValueError for a shape, device, token or option; TypeError for a type or dtype.
    Memory: as linear_logprobs, but two chunks of logits for exact KD and for kd_baseline. The
        forward pass computes the gradients and keeps them in float32 until backward rounds them
        once. Under no_grad it computes none.
    Source: KDRL, arXiv:2506.02208. Derivations: rows/README.md.
    """
    option_checks.check_objective(objective, teacher, teacher_logprobs, teacher_topk)
    weight, bias = gathered(weight, hidden), gathered(bias, hidden)
    student = StudentHead(hidden, weight, bias, temperature, softcap)
    option_checks.check_truncation(truncation, student, objective.topk_kd)
    if teacher_topk is not None and extra_tokens is not None:
        raise ValueError(
            "extra_tokens must be None with teacher_topk, whose ids they would be, got both"
        )
    if advantages is None and objective.policy != "off":
        raise ValueError(f"advantages must be [N] for policy={objective.policy!r}, got None")
    call = loss_call(
        student,
        tokens,
        objective,
        adapter=adapter,
        token_weights=token_weights,
        active_rows=active_rows,
        teacher=teacher,
        teacher_logprobs=teacher_logprobs,
        normalizer=normalizer,
        vocab_size=vocab_size,
        entropy=entropy,
        compact=compact,
        truncation=truncation,
        extra_tokens=extra_tokens,
        rest=teacher_topk is not None and objective.tail,
        teacher_topk=teacher_topk,
        workspace_bytes=workspace_bytes,
        impl=impl,
    )
    call = replace(
        call,
        advantages=checks.row_tensor("advantages", advantages, student),
        old_logprobs=checks.row_tensor("old_logprobs", old_logprobs, student),
        kd_weight=checks.row_tensor("kd_weight", kd_weight, student, mask=True),
    )
    sketch = option_checks.check_sketch(backward, sketch, call.impl, student)
    solve = reference.loss if call.impl == "reference" else operators.kdrl_loss
    if isinstance(vocab_group, VocabRanks):
        solve = vocab_group.loss
    loss, outputs, counts, more = solved(call, sketch, solve)
    used = None if call.weights is None else call.weights != 0
    rows = call.rows(outputs.map(Tensor.detach), slice(None))  # a number would fix N in a graph
    return output(loss, rows, used, row_metrics(objective, rows, used) | more, counts)
