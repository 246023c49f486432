"""Lists the benchmarked operations: what each computes, and the GEMMs that it needs at least."""

from dataclasses import dataclass

from bench.shapes import Shape
from kdrl_kernels.objective import Kd

FLOOR = "bare GEMMs"
FLOOR_RECOMPUTED = "bare GEMMs, logits twice"
"""Floor of an algorithm that projects again in its backward pass: 4u for GRPO."""
FLOORS = (FLOOR, FLOOR_RECOMPUTED)


@dataclass(frozen=True, slots=True)
class Op:
    """An operation that a training step does with the head. Its formula: definition.py."""

    name: str
    policy: bool = False
    """A clipped policy gradient. With a KD term it is strictly on-policy (ratio 1), as KDRL is;
    alone it has old log-probabilities."""
    kd: Kd | None = None
    """Distillation term of coefficient 1: "k2", "rkl", "fkl", "jsd", "rkl+fkl": the mean of both
    KLs, or "topk_rkl": the reverse KL on the teacher's best tokens, whose log-probabilities are
    inputs, and a bucket for the rest."""
    teachers: int = 1
    """Heads that make the teacher: 1, or 2, whose geometric mean it is."""
    entropy_weight: bool = False
    """Whether a token's divergence is multiplied by exp(-entropy) of the teacher."""
    cross_entropy: bool = False
    """-log p of the tokens. With neither term: log-probability and entropy, forward only."""
    frozen_head: bool = False
    """Whether the weight gets no gradient."""
    adapter: bool = False
    """Whether a low-rank matrix is added to the weight, and gets the gradient."""
    active: float = 1.0
    """Share of rows with an advantage that is not 0."""
    bar: float | None = None
    """Highest ratio to the floor that the design allows on the CPU."""
    sketch_bar: float | None = None
    """The same of a sketch of the gradient, whose own floor is the projections alone."""

    @property
    def gradients(self) -> tuple[str, ...]:
        """Name the inputs that get a gradient."""
        if not (self.policy or self.kd or self.cross_entropy):
            return ()
        adapter = ("adapter_a", "adapter_b") if self.adapter else ()
        return ("hidden", *adapter) if self.frozen_head else ("hidden", "weight", *adapter)

    @property
    def teacher_head(self) -> bool:
        """Say whether the teacher's logits are computed."""
        return self.kd not in (None, "topk_rkl")

    @property
    def floors(self) -> tuple[str, ...]:
        """Name the bare GEMMs that it is timed against; its ratio is to the first."""
        return FLOORS if self.gradients and not self.kd else (FLOOR,)

    @property
    def old_logprobs(self) -> bool:
        """Say whether it has old log-probabilities, so that the ratio is not 1."""
        return self.policy and self.kd is None

    def flop(self, shape: Shape) -> float:
        """Count the FLOP of the GEMMs alone; rows with a gradient of 0 need no gradient GEMM.

        Two teachers cost what one of twice the hidden size does. The GEMMs of an adapter are not
        counted: rank / H of a unit each.
        """
        gradients = len({"hidden", "weight"} & {*self.gradients})
        units = (
            1 + self.active * gradients + (shape.tau * self.teachers if self.teacher_head else 0)
        )
        return units * shape.unit_flop


OPS = (
    Op("logprob + entropy"),
    Op("GRPO", policy=True, bar=1.15, sketch_bar=0.47),
    Op("KDRL exact", policy=True, kd="rkl", bar=1.2, sketch_bar=0.63),
    Op("KDRL k2", policy=True, kd="k2", bar=1.2),
    Op("reverse KL", kd="rkl", bar=1.2),
    Op("forward KL", kd="fkl"),
    Op("JSD", kd="jsd"),
    Op("GRPO, half at 0", policy=True, active=0.5),
    Op("GRPO, frozen head", policy=True, frozen_head=True),
    Op("cross entropy", cross_entropy=True),
    Op("GRPO + top-64 reverse KL", policy=True, kd="topk_rkl", bar=1.2),
    Op("GRPO, head adapter", policy=True, frozen_head=True, adapter=True, bar=1.2),
    Op("GRPO + both KLs", policy=True, kd="rkl+fkl"),
    Op("KDRL, two teachers", policy=True, kd="rkl", teachers=2),
    Op("entropy-weighted reverse KL", kd="rkl", entropy_weight=True),
)
OPS_BY_NAME = {op.name: op for op in OPS}
KEY_OPS = tuple(OPS_BY_NAME[name] for name in ("GRPO", "KDRL exact"))
"""Operations that are measured on further shapes and profiles too."""
