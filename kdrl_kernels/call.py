"""The calls after their checks: what every implementation takes, and what it returns of rows."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kdrl_kernels.head import Head, Needs
from kdrl_kernels.objective import CallerLoss, Rows, TokenLoss

RowSet = slice | Tensor
"""Some of N rows: a slice, or their int64 numbers."""


def take(tensor: Tensor, rows: RowSet) -> Tensor:
    """tensor[rows]: a view for a slice, a copy for numbers."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def size_of(rows: RowSet) -> int:
    """How many rows these are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


@dataclass(frozen=True, slots=True)
class RowOutputs:
    """[N] per-token results in nats; None where not asked for or not defined."""

    logprobs: Tensor
    entropy: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    kl: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "RowOutputs":
        """fn of every field that is there."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: fn(v) for k, v in found.items() if v is not None})

    def spread(self, rows: RowSet, N: int) -> "RowOutputs":
        """[N] with these terms in `rows` and 0 elsewhere."""
        if isinstance(rows, slice):
            return self
        return self.map(lambda values: values.new_zeros(N).index_copy(0, rows, values))


@dataclass(frozen=True, slots=True)
class LogprobCall:
    """Arguments of linear_logprobs after the checks that read no value."""

    head: Head
    tokens: Tensor
    entropy: bool
    impl: str
    max_rows: int
    """Rows of logits that may be held at once."""
    cached: int
    """Rows whose logits are kept until backward."""
    needs: Needs


@dataclass(frozen=True, slots=True)
class LossCall:
    """Arguments of kdrl_loss or linear_token_loss after the checks that read no value.

    [N] floats are float32, or float64 where hidden is. Columns from vocab_size on are not used.
    """

    student: Head
    tokens: Tensor
    vocab_size: int
    loss: TokenLoss
    impl: str
    needs: Needs
    weights: Tensor | None = None
    """None: 1 each, and no row is looked at for a 0."""
    normalizer: Tensor | None = None
    """0-d; None: sum of the weights."""
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    kd_weight: Tensor | None = None
    teacher: Head | None = None
    teacher_logprobs: Tensor | None = None
    entropy: bool = False
    compact: bool = False
    """Rows of coefficient 0 are left out of dX and dW."""
    max_rows: int = 0
    """Rows of logits that may be held at once; the reference holds all."""

    @property
    def exact_kd(self) -> str | None:
        """The divergence that needs the teacher's whole distribution."""
        return self.loss.exact_kd

    @property
    def wants_entropy(self) -> bool:
        """Entropy is an output or a term of the loss."""
        return self.entropy or self.loss.entropy

    @property
    def row_outputs(self) -> list[str]:
        """The fields of RowOutputs that this call computes."""
        names = ["logprobs"]
        names += ["entropy"] if self.wants_entropy else []
        names += ["teacher_logprobs"] if self.teacher is not None else []
        names += ["kl"] if self.exact_kd is not None else []
        return names

    def active_rows(self) -> RowSet:
        """The rows of non-zero weight. With weights on a GPU, this waits for it."""
        everything = slice(0, len(self.tokens))
        if self.weights is None:
            return everything
        active = self.weights.nonzero().squeeze(1)
        return everything if len(active) == len(self.weights) else active

    def row_weights(self, rows: RowSet, dtype: torch.dtype) -> Tensor:
        """[C] weights of these rows, in dtype."""
        if self.weights is None:
            return torch.ones_like(take(self.tokens, rows), dtype=dtype)
        return take(self.weights, rows)

    def total(self, weights: Tensor) -> Tensor:
        """0-d, what the loss is divided by, where the weights of the active rows are these."""
        if self.normalizer is not None:
            return self.normalizer
        return weights.sum() if len(weights) else weights.new_ones(())

    def rows(self, terms: RowOutputs, rows: RowSet) -> Rows:
        """What the loss of these rows depends on; terms hold only them."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else take(tensor, rows)

        teacher_logprobs = terms.teacher_logprobs
        if teacher_logprobs is None:
            teacher_logprobs = cut(self.teacher_logprobs)
        return Rows(
            logprobs=terms.logprobs,
            old_logprobs=cut(self.old_logprobs),
            advantages=cut(self.advantages),
            kd_weight=cut(self.kd_weight),
            teacher_logprobs=teacher_logprobs,
            kl=terms.kl,
            entropy=terms.entropy,
            index=self._numbers(rows) if isinstance(self.loss, CallerLoss) else None,
        )

    def _numbers(self, rows: RowSet) -> Tensor:
        if isinstance(rows, Tensor):
            return rows
        return torch.arange(rows.start, rows.stop, device=self.tokens.device)
