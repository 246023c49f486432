"""Computes the fused head of every trainer of TRL by linear_logprobs.

GRPOTrainer, RLOOTrainer, SFTTrainer, DPOTrainer and KTOTrainer run their model's head through one
autograd function, which add_fused_lm_head looks up by name at each call. patch_trl() puts another
under this name; nothing else of TRL changes.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels import chunked_logprob
from trl.trainer import utils

import kdrl_kernels as kk
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.head import FLOATS16
from kdrl_kernels.plain import check_bytes, check_number
from kdrl_kernels.plan import Backward

log = logging.getLogger(__name__)

RANK_ROWS = 1 << 40
"""Numbers of rows of a sketch that a process has for itself."""
CAPPED_BYTES = 1 << 28
"""Bytes of float32 logits that are held at once for the mean of capped logits."""


def patch_trl(
    *,
    cache_bytes: int = 0,
    backward: Backward = "exact",
    sketch_threshold: float | None = None,
    sketch_seed: int = 0,
) -> "LeanHead":
    """Let TRL's trainers compute log-probabilities, entropies and their gradients by our head.

    It serves trainers that exist already and those made later, in this process, until
    unpatch_trl(). On a CPU it also lets TRL leave out positions without a label, as it does on a
    GPU. DPO and KTO log the mean logit; for a model that caps its logits (Gemma) this costs one
    more product of the head.

    Args:
        cache_bytes: as in linear_logprobs: memory for logits that backward then does not compute
            again. Must be 0 under DeepSpeed ZeRO-3.
        backward: "exact", or "sketch" for a sparse unbiased estimate of the gradient.
        sketch_threshold: Sketch.threshold of backward="sketch"; None: its default.
        sketch_seed: number of the first sketch; each call takes the next one.
    Returns: the patch, which as a context manager (`with patch_trl(): ...`) puts back what was in
        its place before: TRL's head, or another patch.
    Raises: ValueError for an option out of range, TypeError for one of another type.
    """
    check_bytes("cache_bytes", cache_bytes, optional=False)
    if backward not in ("exact", "sketch"):
        raise ValueError(f'backward must be "exact" or "sketch", got {backward!r}')
    if backward == "exact" and sketch_threshold is not None:
        raise ValueError(
            f'sketch_threshold must be None with backward="exact", got {sketch_threshold}'
        )
    check_number("sketch_seed", sketch_seed, whole=True)
    first = kk.Sketch(sketch_threshold, seed=sketch_seed) if backward == "sketch" else None
    head = LeanHead(cache_bytes, first)
    utils._ChunkedLogProbFunction = head
    utils._use_triton = _scores_labels_alone
    return head


def unpatch_trl() -> None:
    """Give TRL its own head back; without a patch this changes nothing."""
    utils._ChunkedLogProbFunction = chunked_logprob.ChunkedLogProbFunction
    utils._use_triton = chunked_logprob._use_triton


def _scores_labels_alone(device: torch.device) -> bool:
    """Say whether the positions without a label are taken out before the head."""
    return device.type == "cpu" or chunked_logprob._use_triton(device)


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """What a call needs beside its tensors."""

    temperature: float
    softcap: float | None
    outputs: frozenset[str]
    cache_bytes: int
    sketch: kk.Sketch | None

    @property
    def backward(self) -> Backward:
        return "exact" if self.sketch is None else "sketch"

    @property
    def entropy(self) -> bool:
        return "entropy" in self.outputs

    @property
    def topk(self) -> int | None:
        """1 where an output is read off the likeliest token of each row."""
        return 1 if self.outputs & {"is_top1", "log_sum_sq_probs"} else None


class LeanHead:
    """Stands in the place of TRL's ChunkedLogProbFunction, whose `apply` is all that TRL calls."""

    def __init__(self, cache_bytes: int, sketch: kk.Sketch | None) -> None:
        self.cache_bytes = cache_bytes
        self.sketch = sketch
        self.calls = 0
        """Calls so far: each has a sketch of its own."""
        self._told: set[str] = set()
        self._before = utils._ChunkedLogProbFunction, utils._use_triton

    def __enter__(self) -> "LeanHead":
        return self

    def __exit__(self, *_: object) -> None:
        utils._ChunkedLogProbFunction, utils._use_triton = self._before

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Iterable[str] = chunked_logprob.OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Return what TRL's function does.

        Args:
            hidden [N, H], weight [V, H], bias [V] or None, targets [N]: the head.
            temperature, final_logit_softcapping, logit_scale: logits are softcap(scale · (hidden ·
                weightᵀ + bias)) / temperature.
            chunk_size: of TRL's tiles; it is not used.
            outputs: names of what is returned beside the log-probabilities.
        Returns: log-probabilities, entropies, log(sum_v p²), mean logits and whether the target is
            the likeliest token, [N] each; None for what outputs does not name. The first two are
            differentiable.
        """
        softcap, scale = final_logit_softcapping, logit_scale
        reason = _not_ours(softcap, scale)
        if reason is not None:
            self._warn(reason)
            arguments = hidden, weight, bias, targets, temperature, chunk_size, softcap, scale
            theirs = chunked_logprob.ChunkedLogProbFunction.apply
            return theirs(*arguments, tuple(outputs))
        options = HeadOptions(
            temperature / scale,
            # cap · tanh(scale · z / cap) = scale · (cap / scale) · tanh(z / (cap / scale)): the
            # temperature has the first scale, so no hidden state is rounded for it
            None if softcap is None else softcap / scale,
            frozenset(outputs),
            self.cache_bytes,
            sketch=None,
        )
        tensors = *_in_dtype_of_step(hidden, weight, bias), targets
        if self.sketch is not None:
            return self._sketched(*tensors, options, self.sketch)
        self.calls += 1
        return _scores(*tensors, options)

    @torch.compiler.disable(reason="no two calls have the same sketch")
    def _sketched(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
        sketch: kk.Sketch,
    ) -> tuple[Tensor | None, ...]:
        """Return the five outputs, with a sketch whose errors no other call or process has."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        sketch = replace(sketch, seed=sketch.seed + self.calls, rows=rank * RANK_ROWS)
        self.calls += 1
        return _scores(hidden, weight, bias, targets, replace(options, sketch=sketch))

    def _warn(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.warning("TRL's own head stays in use: %s", reason)


def _not_ours(softcap: float | None, scale: float) -> str | None:
    """Say why TRL's function has to compute this call; None where ours does."""
    if scale <= 0:
        return f"logit_scale of the model must be positive for ours, got {scale}"
    if softcap is not None and softcap <= 0:
        return f"final_logit_softcapping of the model must be positive for ours, got {softcap}"
    return None


def _in_dtype_of_step(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round hidden states to autocast's dtype, as TRL does; weight and bias only where needed."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    dtype = hidden.dtype

    def fitting(tensor: Tensor) -> Tensor:
        pair = {tensor.dtype, dtype}
        mixed = torch.float32 in pair and pair & set(FLOATS16)
        return tensor if mixed else tensor.to(dtype)

    return hidden, fitting(weight), None if bias is None else fitting(bias)


def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> tuple[Tensor | None, ...]:
    """Return the five outputs of TRL's function."""
    if is_deepspeed_zero3_enabled():
        if options.cache_bytes:
            raise ValueError(
                f"cache_bytes of patch_trl must be 0 under ZeRO-3, got {options.cache_bytes}: its "
                "weight is there in forward alone, so backward computes all logits again"
            )
        logprobs, entropy, best = PartitionedHead.apply(hidden, weight, bias, targets, options)
    else:
        logprobs, entropy, best = _outputs(hidden, weight, bias, targets, options)
    squares = mean = top1 = None
    with torch.no_grad(), without_autocast(hidden.device):
        if "log_sum_sq_probs" in options.outputs:
            squares = _log_sum_squares(hidden, weight, bias, best, options)
        if "mean_logits" in options.outputs:
            mean = _mean_logits(hidden, weight, bias, options)
        if "is_top1" in options.outputs:
            top1 = best == targets
    return logprobs, entropy, squares, mean, top1


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return log-probabilities, entropies and the likeliest tokens, [N] each, or None."""
    scores = kk.linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=options.temperature,
        softcap=options.softcap,
        entropy=options.entropy,
        topk=options.topk,
        cache_bytes=options.cache_bytes,
        backward=options.backward,
        sketch=options.sketch,
    )
    best = scores.topk_tokens
    return scores.logprobs, scores.entropy, None if best is None else best[:, 0]


def _log_sum_squares(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, best: Tensor, options: HeadOptions
) -> Tensor:
    """Return log(sum_v p_v²) [N]: with p' at half the temperature, 2 log p - log p' of any token.

    That of the likeliest token is small, so little is lost in the difference. Costs two products.
    """
    first, second = (
        kk.linear_logprobs(
            hidden, weight, best, bias=bias, temperature=temperature, softcap=options.softcap
        ).logprobs
        for temperature in (options.temperature, options.temperature / 2)
    )
    return 2 * first - second


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions
) -> Tensor:
    """Return the mean of the logits over the vocabulary, [N]: by the mean row if none is capped."""
    dtype = accumulator(hidden.dtype)
    if options.softcap is not None:
        weight = weight.to(hidden.dtype)
        rows = max(1, CAPPED_BYTES // (4 * len(weight)))
        parts = [
            _capped(_product(part, weight, bias), options.softcap).mean(dim=1)
            for part in hidden.split(rows)
        ]
        return torch.cat(parts) / options.temperature
    mean = hidden.to(dtype) @ weight.mean(dim=0, dtype=dtype)
    if bias is not None:
        mean += bias.mean(dtype=dtype)
    return mean / options.temperature


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return logits [N, V] before scalars, in the accumulator's dtype."""
    logits = (hidden @ weight.T).to(accumulator(hidden.dtype))
    return logits if bias is None else logits.add_(bias)


def _capped(logits: Tensor, cap: float) -> Tensor:
    """Return cap · tanh(logits / cap), computed in place."""
    return logits.div_(cap).tanh_().mul_(cap)


class PartitionedHead(torch.autograd.Function):
    """Log-probabilities by a weight that is whole in forward, and gathered again for backward.

    ZeRO-3 frees the weight as soon as its reader is done. Forward therefore keeps nothing but its
    inputs, and backward takes the gradients of the sums that it then knows in one pass: 4u in all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = options
        outputs = _outputs(hidden, weight, bias, targets, options)
        if outputs[2] is not None:
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad[:3]
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 5

        def later_loss(rows: kk.Rows) -> Tensor:
            loss = torch.zeros_like(rows.logprobs)
            if grad_logprobs is not None:
                loss = loss + grad_logprobs[rows.index] * rows.logprobs
            if grad_entropy is not None and rows.entropy is not None:
                loss = loss + grad_entropy[rows.index] * rows.entropy
            return loss

        sketch = options.sketch
        with utils.maybe_gather_lm_head_ctx(weight, bias), torch.enable_grad():
            tensors = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip((hidden, weight, bias), needs, strict=True)
            ]
            loss = kk.linear_token_loss(
                tensors[0],
                tensors[1],
                targets,
                later_loss,
                bias=tensors[2],
                normalizer=1.0,
                temperature=options.temperature,
                softcap=options.softcap,
                entropy=grad_entropy is not None,
                backward=options.backward,
                sketch=None if sketch is None else replace(sketch, scale=0.0),
            ).loss
            trained = [x for x in tensors if x is not None and x.requires_grad]
            gradients = iter(torch.autograd.grad(loss, trained))
        return *(next(gradients) if need else None for need in needs), None, None
