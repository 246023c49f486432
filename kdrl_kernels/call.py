"""Defines the calls that every implementation takes, after their checks, and its row outputs."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kdrl_kernels.caller_loss import CallerLoss, TokenLoss
from kdrl_kernels.head import Head, Needs, StudentHead
from kdrl_kernels.plain import has_values
from kdrl_kernels.token_rows import Rows
from kdrl_kernels.truncation import Truncation

RowSet = slice | Tensor
"""Some of N rows: a slice, or their int64 indices."""
HAVE_NONZERO_STATIC = ("cpu", "cuda", "meta")
"""Devices on which PyTorch finds a known number of rows; elsewhere they are counted."""


def take(tensor: Tensor, rows: RowSet) -> Tensor:
    """Return tensor[rows]: a view for a slice, a copy for indices."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def size_of(rows: RowSet) -> int:
    """Return how many rows these are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


@dataclass(frozen=True, slots=True)
class RowOutputs:
    """Holds what a pass computes of each row, [N] in nats; None for what the call does not need."""

    logprobs: Tensor
    entropy: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    kl: Tensor | None = None
    forward_kl: Tensor | None = None
    lse: Tensor | None = None
    extra_logprobs: Tensor | None = None
    """[N, K]."""
    rest_logprob: Tensor | None = None
    topk_tokens: Tensor | None = None
    """[N, K] int64."""
    teacher_entropy: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "RowOutputs":
        """Apply fn to every field that is not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: fn(v) for k, v in values.items() if v is not None})

    def spread(self, rows: RowSet, N: int) -> "RowOutputs":
        """Spread the values of some rows to [N], with 0 (topk_tokens: -1) in the others."""
        if isinstance(rows, slice):
            return self

        def spread(values: Tensor) -> Tensor:
            fill = 0 if values.is_floating_point() else -1
            return values.new_full((N, *values.shape[1:]), fill).index_copy(0, rows, values)

        return self.map(spread)


@dataclass(frozen=True, slots=True)
class LogprobCall:
    """Holds the arguments of linear_logprobs after the checks that read no value."""

    head: StudentHead
    tokens: Tensor
    entropy: bool
    impl: str
    max_rows: int
    """Rows of logits that may be held at once."""
    cached: int
    """Rows whose logits are kept until backward."""
    needs: Needs
    truncation: Truncation | None = None
    extra_tokens: Tensor | None = None
    """[N, K] int64, other columns whose log-probabilities are computed; -1: none."""
    rest: bool = False
    """True computes the log of the probability on none of a row's extra_tokens, too."""
    topk: int = 0
    """Above 0, the extra_tokens are so many of the largest logits of each row, not an argument."""

    @property
    def has_ids(self) -> bool:
        """True where log-probabilities at K ids of each row are computed."""
        return self.extra_tokens is not None or self.topk > 0


@dataclass(frozen=True, slots=True)
class LossCall:
    """Holds the arguments of kdrl_loss or linear_token_loss after the checks that read no value.

    [N] floats are float32, or float64 where hidden is. Columns from vocab_size on are not used.
    """

    student: StudentHead
    tokens: Tensor
    vocab_size: int
    loss: TokenLoss
    impl: str
    needs: Needs
    weights: Tensor | None = None
    """[N]; None: every weight is 1, and no row is left out."""
    active: int | None = None
    """How many weights are not 0, where the caller knows it."""
    normalizer: Tensor | None = None
    """0-d, divides the loss; None: the sum of the weights does."""
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    kd_weight: Tensor | None = None
    teacher: Head | None = None
    teacher_logprobs: Tensor | None = None
    entropy: bool = False
    compact: bool = False
    """True leaves rows whose coefficients are 0 out of dX and dW."""
    max_rows: int = 0
    """Rows of logits that may be held at once; the reference ignores it and holds all."""
    truncation: Truncation | None = None
    """What the student's sampler keeps; None: every token."""
    extra_tokens: Tensor | None = None
    """As in LogprobCall."""
    rest: bool = False
    teacher_topk: Tensor | None = None
    """[N, K], the teacher's log-probabilities at extra_tokens, where the loss is one of topk.py."""
    folded: bool = False
    """True multiplies coefficients with the scale of the loss, so that sums are not read for it."""
    direct: bool = False
    """True lets the GEMM of a call's only chunk write dW in the dtype of weight; with folded."""

    @property
    def exact_kd(self) -> str | None:
        """The divergence that needs the teacher's whole distribution."""
        return self.loss.exact_kd

    @property
    def wants_entropy(self) -> bool:
        """True where entropy is an output or part of the loss."""
        return self.entropy or self.loss.entropy

    @property
    def row_outputs(self) -> list[str]:
        """The fields of RowOutputs that this call computes."""
        names = ["logprobs"]
        names += ["entropy"] if self.wants_entropy else []
        names += ["teacher_logprobs"] if self.teacher is not None else []
        has_kl = self.exact_kd is not None or self.teacher_topk is not None
        names += ["kl"] if has_kl else []
        names += ["forward_kl"] if self.exact_kd == "rkl+fkl" else []
        names += ["extra_logprobs"] if self.extra_tokens is not None else []
        names += ["rest_logprob"] if self.rest else []
        return names

    def of_shapes(self) -> "LossCall":
        """Return this call; of tensors without values, one that needs none for its shapes."""
        if has_values(self.tokens):
            return self
        return replace(self, weights=None, compact=False, impl="torch")

    def active_rows(self) -> RowSet:
        """Return the rows of non-zero weight.

        With weights on a GPU, this waits for it, unless their number is known. Where that is wrong,
        rows are missing, or row 0 comes again: check_values sees it.
        """
        everything = slice(0, len(self.tokens))
        if self.weights is None or self.active == len(self.weights):
            return everything
        if self.active is not None and self.weights.device.type in HAVE_NONZERO_STATIC:
            return torch.nonzero_static(self.weights, size=self.active, fill_value=0).squeeze(1)
        active = self.weights.nonzero().squeeze(1)
        return everything if len(active) == len(self.weights) else active

    def row_weights(self, rows: RowSet, dtype: torch.dtype) -> Tensor:
        """Return the weights of these rows, [C] in dtype."""
        if self.weights is None:
            return torch.ones_like(take(self.tokens, rows), dtype=dtype)
        return take(self.weights, rows)

    def total(self, weights: Tensor) -> Tensor:
        """Return what divides the loss, 0-d, for these weights of the active rows."""
        if self.normalizer is not None:
            return self.normalizer
        return weights.sum() if len(weights) else weights.new_ones(())

    def rows(self, outputs: RowOutputs, rows: RowSet) -> Rows:
        """Return what the loss of these rows depends on; outputs hold these rows alone."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else take(tensor, rows)

        loss, teacher_logprobs = self.loss, outputs.teacher_logprobs
        if teacher_logprobs is None:
            teacher_logprobs = cut(self.teacher_logprobs)
        return Rows(
            logprobs=outputs.logprobs,
            old_logprobs=cut(self.old_logprobs),
            advantages=cut(self.advantages),
            kd_weight=cut(self.kd_weight),
            teacher_logprobs=teacher_logprobs,
            kl=outputs.kl,
            forward_kl=outputs.forward_kl,
            entropy=outputs.entropy,
            lse=outputs.lse,
            extra_logprobs=outputs.extra_logprobs,
            rest_logprob=outputs.rest_logprob,
            teacher_entropy=outputs.teacher_entropy,
            index=self._indices(rows) if isinstance(loss, CallerLoss) else None,
            positions=cut(loss.positions) if isinstance(loss, CallerLoss) else None,
        )

    def topk_logprobs(
        self, outputs: RowOutputs, rows: RowSet
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log p and log q at extra_tokens, -inf where there is none, and log r, if any."""
        assert self.extra_tokens is not None
        assert self.teacher_topk is not None
        assert outputs.extra_logprobs is not None
        none = take(self.extra_tokens, rows) < 0
        both = outputs.extra_logprobs, take(self.teacher_topk, rows)
        logp, logq = (x.masked_fill(none, -torch.inf) for x in both)
        return logp, logq, outputs.rest_logprob

    def _indices(self, rows: RowSet) -> Tensor:
        if isinstance(rows, Tensor):
            return rows
        return torch.arange(rows.start, rows.stop, device=self.tokens.device)
