"""Defines what row work reads and returns: logits of one head or two, and their statistics."""

from dataclasses import dataclass, field, fields

from torch import Tensor

from kdrl_kernels.rows.ids import IdStats


@dataclass(frozen=True, slots=True)
class Stream:
    """Holds logits [C, V] of one head, as the GEMM left them, and what turns them into z.

    z = a / temperature, a = softcap(logits). `sweep` may overwrite the logits with what `gradient`
    of the same module expects; `resume_` overwrites them without computing statistics.
    """

    logits: Tensor
    temperature: float | Tensor
    softcap: float | None
    masses: Tensor | None = field(default=None, kw_only=True)
    """[C, blocks]: where given, a sweep of `eager` writes the sum of exp(d) of each block."""


@dataclass(frozen=True, slots=True)
class TeacherStream(Stream):
    """Holds the second stream of a sweep, and the divergence to it that is computed."""

    kd: str
    """"rkl", "fkl", "jsd" or "rkl+fkl"."""
    jsd_alpha: float = 0.5
    entropy: bool = False
    """True: the sweep computes the teacher's entropy as well."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Holds the statistics of each row that sweeps over one stream or two compute: [C], in nats.

    log p_v = (a_v - max) / temperature - log_sum. Their sum, the usual lse, would lose 1e-3 nat
    at |z| = 1e4.
    """

    max: Tensor
    """max_v a_v, before the temperature."""
    log_sum: Tensor
    """log(sum_v exp((a_v - max) / temperature))."""
    logprobs: Tensor
    entropy: Tensor | None = None
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    kl: Tensor | None = None
    """KL(p‖q) for "rkl" and "rkl+fkl", KL(q‖p) for "fkl", Jensen-Shannon for "jsd"."""
    mixture_kl: Tensor | None = None
    """KL(p‖m) for "jsd", which its gradient needs."""
    forward_kl: Tensor | None = None
    """KL(q‖p), beside kl, for "rkl+fkl"."""
    teacher_entropy: Tensor | None = None
    """A constant, which no gradient reads."""
    at_ids: IdStats | None = field(default=None, kw_only=True)
    """What is computed beside these numbers where a loss reads K columns of each row."""

    def lse(self, temperature: float | Tensor) -> Tensor:
        """Return log(sum_v exp(z_v)), [C], in the dtype of max, whatever that of temperatures."""
        return (self.max / temperature + self.log_sum).to(self.max.dtype)


NUMBERS = [field.name for field in fields(Stats) if field.name != "at_ids"]
"""The fields of Stats that are [C]. No gradient reads the last, the teacher's entropy."""
