"""Makes random problems for kdrl_loss, and solves them by any implementation and precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.objective import token_losses
from kdrl_kernels.token_rows import Rows
from tests.kernels.params import SEED
from tests.tolerance import assert_matches


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds inputs of kdrl_loss; tensors that carry a gradient are in `student`."""

    student: dict[str, Tensor]
    tokens: Tensor
    teacher: dict[str, Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    teacher_options: dict[str, Any] = field(default_factory=dict)

    def map(self, fn: Any) -> "Problem":
        """Apply fn to every floating-point tensor."""

        def over(values: dict[str, Any]) -> dict[str, Any]:
            return {k: fn(v) if _is_float(v) else v for k, v in values.items()}

        teacher = None if self.teacher is None else over(self.teacher)
        return replace(
            self, student=over(self.student), teacher=teacher, options=over(self.options)
        )

    def solve(self, upstream: float = 1.0, **options: Any) -> dict[str, Tensor]:
        """Return loss, per-token outputs and gradients of upstream · loss."""
        student = {k: v.detach().clone().requires_grad_() for k, v in self.student.items()}
        teacher = self.teacher and kk.TeacherHead(**self.teacher, **self.teacher_options)
        result = kk.kdrl_loss(
            student["hidden"],
            student["weight"],
            self.tokens,
            bias=student.get("bias"),
            teacher=teacher,
            **{**self.options, **options},
        )
        (result.loss * upstream).backward()
        names = ("logprobs", "teacher_logprobs", "kl", "forward_kl", "entropy")
        results = {"loss": result.loss.detach()} | {n: getattr(result, n) for n in names}
        results |= {f"d{k}": v.grad for k, v in student.items()}
        return {k: v for k, v in results.items() if v is not None}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def make_problem(
    N: int = 7,
    H: int = 16,
    V: int = 37,
    *,
    kd: str | None = "k2",
    V_t: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    off_policy: bool = True,
    bias: bool = True,
    server: bool = False,
    objective: dict[str, Any] | None = None,
    teacher_options: dict[str, Any] | None = None,
    **options: Any,
) -> Problem:
    """Make a problem whose logits spread over a few nats and whose maximum moves along V."""
    rng = torch.Generator().manual_seed(SEED + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    V_t = V if V_t is None else V_t
    vocab = min(V, V_t) if kd and not server else V
    student = {"hidden": randn(N, H), "weight": randn(V, H) * (2 / H**0.5)}
    if bias:
        student["bias"] = torch.linspace(0, 2, V)
    teacher, topk = None, str(kd).startswith("topk")
    if kd and not server and not topk:
        teacher = {"hidden": randn(N, H + 3), "weight": randn(V_t, H + 3) * (2 / H**0.5)}
    tokens = torch.randint(vocab, (N,), generator=rng)
    options |= {"advantages": randn(N), "token_weights": torch.rand(N, generator=rng) + 0.1}
    if kd:
        options["kd_weight"] = torch.rand(N, generator=rng)
    if server:
        options["teacher_logprobs"] = -randn(N).abs()
    if topk:
        options["teacher_topk"] = make_topk(N, V, rng, device)
    if off_policy:
        options["old_logprobs"] = randn(N) - 3
    options["objective"] = kk.Objective(**{"kd": kd, "kd_coef": 0.5, **(objective or {})})
    problem = Problem(student, tokens.to(device), teacher, options, teacher_options or {})
    return problem.map(lambda x: x.to(dtype).to(device))


def make_topk(
    N: int, V: int, rng: torch.Generator, device: str, K: int = 5
) -> tuple[Tensor, Tensor]:
    """Return a teacher's K likeliest tokens of each row and their log-probabilities, float32.

    Row 1 has one of them less, row 2 none.
    """
    logprobs, ids = (2 * torch.randn(N, V, generator=rng)).log_softmax(1).topk(K)
    ids[1:2, 3], logprobs[1:2, 3], ids[2:3] = -1, torch.nan, -1
    return ids.to(device), logprobs.to(device)


def assert_matches_definition(
    impl: str, *, seed: int = 0, upstream: float = 1.0, **kind: Any
) -> dict[str, Tensor]:
    """Assert that impl solves make_problem(**kind) as the reference does; return its results."""
    problem = make_problem(seed=seed, **kind)
    ours = problem.solve(upstream, impl=impl)
    assert_solves(problem, ours, upstream)
    return ours


def assert_solves(problem: Problem, ours: Mapping[str, Tensor], upstream: float = 1.0) -> None:
    """Assert that some results of a problem match the reference in float32 and in float64."""

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        results = problem.map(lambda x: x.to(dtype)).solve(upstream, impl="reference")
        return {name: results[name] for name in ours}

    def size(_: Mapping[str, Tensor]) -> dict[str, float]:
        exact = problem.map(Tensor.double).solve(upstream, impl="reference")
        return {"loss": loss_size(problem, exact)}

    assert_matches(ours, reference, size)


def loss_size(problem: Problem, results: Mapping[str, Tensor]) -> float:
    """Return sum_n |weighted loss of row n| / normalizer, which the loss's rounding relates to."""
    options = {k: v.double() if _is_float(v) else v for k, v in problem.options.items()}
    rows = Rows(
        results["logprobs"],
        options.get("old_logprobs"),
        options["advantages"],
        options.get("kd_weight"),
        results.get("teacher_logprobs"),
        results.get("kl"),
        results.get("entropy"),
        forward_kl=results.get("forward_kl"),
    )
    weights = options["token_weights"]
    total = (weights * token_losses(options["objective"], rows)).abs().sum()
    return float(total / options.get("normalizer", weights.sum()))
