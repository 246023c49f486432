"""One call after its checks: what every implementation takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from kdrl_kernels.head import Head
from kdrl_kernels.objective import EXACT_KD, Objective, Rows


@dataclass(frozen=True, slots=True)
class RowTerms:
    """[N] per-token results in nats; None where not asked for or not defined."""

    logprobs: Tensor
    entropy: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    kl: Tensor | None = None

    def detach(self) -> "RowTerms":
        """The same numbers outside the graph."""
        return self.map(Tensor.detach)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "RowTerms":
        """fn of every field that is there."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: fn(v) for k, v in found.items() if v is not None})


@dataclass(frozen=True, slots=True)
class LossCall:
    """Arguments of kdrl_loss after its checks.

    [N] floats are float32, or float64 where hidden is. Columns from vocab_size on are not used.
    """

    student: Head
    tokens: Tensor
    vocab_size: int
    objective: Objective
    weights: Tensor
    normalizer: Tensor
    """0-d."""
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    kd_weight: Tensor | None = None
    teacher: Head | None = None
    teacher_logprobs: Tensor | None = None
    entropy: bool = False
    workspace_bytes: int | None = None

    @property
    def exact_kd(self) -> bool:
        """The KD term needs the teacher's whole distribution."""
        return self.objective.kd in EXACT_KD

    @property
    def wants_entropy(self) -> bool:
        """Entropy is an output or a term of the loss."""
        return self.entropy or self.objective.entropy_coef != 0

    def drop_masked_rows(self) -> tuple["LossCall", Tensor]:
        """(the call without rows of weight 0, the numbers of its rows). Waits for a GPU."""
        active = self.weights.nonzero().squeeze(1)
        names = ("tokens", "weights", "advantages", "old_logprobs", "kd_weight", "teacher_logprobs")
        cut = {name: _take(getattr(self, name), active) for name in names}
        teacher = None if self.teacher is None else self.teacher.select(active)
        return replace(self, student=self.student.select(active), teacher=teacher, **cut), active

    def rows(self, terms: RowTerms, part: slice = slice(None)) -> Rows:
        """What the loss of the tokens in `part` depends on; terms hold only those tokens."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[part]

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
        )


def _take(tensor: Tensor | None, rows: Tensor) -> Any:
    return None if tensor is None else tensor.index_select(0, rows)
