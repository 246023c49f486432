"""Defines losses of a caller for linear_token_loss, and solves them through full logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import SEED

CallerTensors = dict[str, Tensor]
"""[N] tensors of the caller, which a loss reads at rows.index."""
N, H, V = 11, 16, 37
ROW_OUTPUTS = ("logprobs", "teacher_logprobs", "kl", "forward_kl", "entropy", "lse")
ROW_OUTPUTS += ("teacher_entropy",)
UNUSED = [0, 4, 5, 10]
"""Rows of weight 0 in a masked setup."""


def dapo(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Clip the ratio with a higher upper bound."""
    A = inputs["advantages"][rows.index]
    ratio = (rows.logprobs - inputs["old"][rows.index]).exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - 0.2, 1 + 0.28) * A)


def cispo(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Weight log-probabilities by a clipped ratio without gradient: no token loses its gradient."""
    ratio = (rows.logprobs.detach() - inputs["old"][rows.index]).exp().clamp(max=1.28)
    return -ratio * inputs["advantages"][rows.index] * rows.logprobs


def two_sided(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Bound the ratio of negative advantages too."""
    A = inputs["advantages"][rows.index]
    ratio = (rows.logprobs - inputs["old"][rows.index]).exp()
    return -torch.minimum(ratio.clamp(max=1.5) * A, ratio.clamp(1 - 0.2, 1 + 0.2) * A)


def sft(rows: kk.Rows, inputs: CallerTensors) -> Tensor:  # noqa: ARG001 (needs nothing of the caller)
    return -rows.logprobs


def bounded_kd(rows: kk.Rows, inputs: CallerTensors) -> Tensor:  # noqa: ARG001 (needs nothing of the caller)
    """Take the reverse KL on sampled tokens, with a coefficient that tanh keeps within ±0.5."""
    pull = 0.5 * torch.tanh((rows.logprobs - rows.teacher_logprobs) / 0.5)
    return pull.detach() * rows.logprobs


def exact_kl(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Add policy gradient and exact KL, with a weight of each row."""
    policy = -inputs["advantages"][rows.index] * rows.logprobs
    return policy + inputs["kd_weight"][rows.index] * rows.kl


def both_kls(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Weight KL(p‖q) and KL(q‖p) differently in each row, as AKL does, one of them not linearly."""
    share = inputs["kd_weight"][rows.index].to(rows.kl)
    return share * rows.kl + (1 - share) * rows.forward_kl.square() - rows.logprobs


def kl_and_entropy(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Use every quantity at once, none of them linearly."""
    return rows.kl.sqrt() * inputs["kd_weight"][rows.index] - rows.entropy * rows.logprobs


def entropy_bonus(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Add a bonus for entropy below a target to the policy gradient."""
    short = (inputs["target"][rows.index] - rows.entropy).relu()
    return short.square() - inputs["advantages"][rows.index] * rows.logprobs


def z_loss(rows: kk.Rows, inputs: CallerTensors) -> Tensor:
    """Keep log-sum-exp near 0, as PaLM does, beside the policy gradient."""
    return 0.1 * rows.lse.square() - inputs["advantages"][rows.index] * rows.logprobs


def where_the_teacher_is_sure(rows: kk.Rows, inputs: CallerTensors) -> Tensor:  # noqa: ARG001 (needs nothing of the caller)
    """Weight the KL, or the sampled one, by exp(-entropy of the teacher), less at each position."""
    sampled = (rows.logprobs - rows.teacher_logprobs).square() / 2
    distance = sampled if rows.kl is None else rows.kl
    distance = distance if rows.forward_kl is None else distance + rows.forward_kl
    return 0.9**rows.positions * (-rows.teacher_entropy).exp() * distance - rows.logprobs


@dataclass(frozen=True, slots=True)
class Case:
    """Holds a loss, and what linear_token_loss must compute for it."""

    loss: Callable[[kk.Rows, CallerTensors], Tensor]
    kl: str | None = None
    entropy: bool = False
    teacher: bool = False
    lse: bool = False
    teacher_entropy: bool = False


def _sure(kl: str | None, entropy: bool = False) -> Case:
    return Case(where_the_teacher_is_sure, kl, entropy, teacher=True, teacher_entropy=True)


CASES = {
    "dapo": Case(dapo),
    "cispo": Case(cispo),
    "two_sided": Case(two_sided),
    "sft": Case(sft),
    "bounded_kd": Case(bounded_kd, teacher=True),
    "rkl": Case(exact_kl, "rkl", teacher=True),
    "fkl": Case(exact_kl, "fkl", teacher=True),
    "jsd": Case(exact_kl, "jsd", teacher=True),
    "rkl_and_fkl": Case(both_kls, "rkl+fkl", entropy=True, teacher=True),
    "rkl_and_entropy": Case(kl_and_entropy, "rkl", entropy=True, teacher=True),
    "entropy": Case(entropy_bonus, entropy=True),
    "z_loss": Case(z_loss, lse=True),
    "teacher_entropy": _sure(None),
    "teacher_entropy_and_rkl": _sure("rkl", entropy=True),
    "teacher_entropy_and_fkl": _sure("fkl"),
    "teacher_entropy_and_jsd": _sure("jsd"),
    "teacher_entropy_and_both": _sure("rkl+fkl"),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """Holds arguments of one call; tensors that carry a gradient are in `student`."""

    case: Case
    student: dict[str, Tensor]
    tokens: Tensor
    inputs: CallerTensors
    teacher: dict[str, Any] | None
    options: dict[str, Any]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Setup":
        """Apply fn to every floating-point tensor."""

        def over(values: dict[str, Any]) -> dict[str, Any]:
            floats = {
                k for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()
            }
            return {k: fn(v) if k in floats else v for k, v in values.items()}

        return replace(
            self,
            student=over(self.student),
            inputs=over(self.inputs),
            teacher=self.teacher and over(self.teacher),
            options=over(self.options),
        )


def make_setup(
    case: Case, dtype: torch.dtype, device: str, *, masked: bool = False, seed: int = 0
) -> Setup:
    """Make a setup; masked has rows of weight 0 that hold NaN, and no option at its default."""
    rng = torch.Generator().manual_seed(SEED + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    V_t = V - 4  # columns beyond the smaller head do not exist
    vocab = V_t if case.teacher else V
    student = {"hidden": randn(N, H), "weight": randn(V, H) * (2 / H**0.5)}
    student["bias"] = torch.linspace(0, 2, V)
    teacher: dict[str, Any] | None = None
    if case.teacher:
        teacher = {"hidden": randn(N, H + 3), "weight": randn(V_t, H + 3) * (2 / H**0.5)}
    inputs = {
        "advantages": randn(N),
        "old": randn(N) - 3,
        "kd_weight": torch.rand(N, generator=rng),
    }
    inputs["target"] = torch.full((N,), 2.5)
    options: dict[str, Any] = {"kl": case.kl, "entropy": case.entropy, "lse": case.lse}
    if case.teacher_entropy:
        positions = torch.arange(N, device=device) % 4
        options |= {"teacher_entropy": True, "positions": positions}
    if masked:
        weights = torch.rand(N, generator=rng) + 0.1
        weights[UNUSED] = 0
        temperature = torch.linspace(0.6, 1.4, N)
        options |= {"token_weights": weights, "temperature": temperature, "jsd_alpha": 0.3}
        options |= {"normalizer": 5.5, "softcap": 4.0}
        student["hidden"][UNUSED] = torch.nan
        if teacher is not None:
            teacher["hidden"][UNUSED] = torch.nan
            teacher |= {"temperature": 1.3, "softcap": 5.0}
    tokens = torch.randint(vocab, (N,), generator=rng)
    setup = Setup(case, student, tokens.to(device), inputs, teacher, options)
    return setup.map(lambda x: x.to(dtype).to(device))


def smallest_budget(setup: Setup, impl: str, rows: int) -> int:
    """Return the smallest workspace that holds so many rows.

    By a CPU's plan: a GPU's has a buffer for many more rows.
    """
    hidden, weight = setup.student["hidden"], setup.student["weight"]
    teacher = setup.teacher and (setup.teacher["hidden"].shape[1], len(setup.teacher["weight"]))
    return kk.chunk_plan(
        rows,
        *(hidden.shape[1], len(weight)),
        teacher=teacher,
        kd="rkl" if setup.case.kl == "rkl+fkl" else setup.case.kl,
        dtype=hidden.dtype,
        device="cpu",
        impl="torch" if impl == "reference" else impl,
    ).workspace_bytes


def call(
    setup: Setup,
    loss_fn: Callable[[kk.Rows], Tensor] | None = None,
    *,
    impl: str = "torch",
    rows: int = 3,
    **options: Any,
) -> kk.LossOutput:
    """Call linear_token_loss in chunks of at most so many rows, without backward."""
    student, inputs = setup.student, setup.inputs
    teacher = setup.teacher and kk.TeacherHead(**setup.teacher)
    return kk.linear_token_loss(
        student["hidden"],
        student["weight"],
        setup.tokens,
        loss_fn or (lambda rows: setup.case.loss(rows, inputs)),
        bias=student["bias"],
        **{
            "teacher": teacher,
            "workspace_bytes": smallest_budget(setup, impl, rows),
            "impl": impl,
            **setup.options,
            **options,
        },
    )


def with_leaves(setup: Setup) -> Setup:
    student = {k: v.detach().clone().requires_grad_() for k, v in setup.student.items()}
    return replace(setup, student=student)


def results_of(setup: Setup, result: Any) -> dict[str, Tensor]:
    """Return loss, per-token outputs and the gradients of 0.7 · loss."""
    (result.loss * 0.7).backward()
    names = ("loss", *ROW_OUTPUTS)
    results = {name: getattr(result, name) for name in names}
    results |= {f"d{k}": v.grad for k, v in setup.student.items()}
    return {k: v.detach() for k, v in results.items() if v is not None}


def solve(setup: Setup, impl: str) -> dict[str, Tensor]:
    setup = with_leaves(setup)
    return results_of(setup, call(setup, impl=impl))


def logits(head: dict[str, Any], temperature: Any, softcap: Any, vocab: int) -> Tensor:
    z = head["hidden"] @ head["weight"][:vocab].T
    if "bias" in head:
        z = z + head["bias"][:vocab]
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    return z / temperature


def divergence(kind: str, logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    p, q = logp.exp(), logq.exp()
    if kind == "rkl":
        return (p * (logp - logq)).sum(1)
    if kind == "fkl":
        return (q * (logq - logp)).sum(1)
    logm = (alpha * q + (1 - alpha) * p).log()
    return alpha * (q * (logq - logm)).sum(1) + (1 - alpha) * (p * (logp - logm)).sum(1)


@dataclass(slots=True)
class Plain:
    """Holds what autograd through full logits gives, with the fields of LossOutput."""

    loss: Tensor
    logprobs: Tensor
    teacher_logprobs: Tensor | None
    kl: Tensor | None
    forward_kl: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    teacher_entropy: Tensor | None


def solve_plainly(setup: Setup) -> tuple[dict[str, Tensor], float]:
    """Solve with [N, V] logits of the rows of weight > 0; return results and size of the loss."""
    setup = with_leaves(setup)
    student, teacher, options = setup.student, setup.teacher, setup.options
    weights = options.get("token_weights", torch.ones_like(student["hidden"][:, 0]))
    index = weights.nonzero().squeeze(1)
    vocab = V if teacher is None else min(V, len(teacher["weight"]))
    tokens = setup.tokens[index][:, None]

    def logits_of(head: dict[str, Any], temperature: Any, softcap: Any) -> Tensor:
        temperature = temperature[index] if isinstance(temperature, Tensor) else temperature
        used = head | {"hidden": head["hidden"][index]}
        return logits(used, temperature, softcap, vocab)

    z = logits_of(student, options.get("temperature", 1.0), options.get("softcap"))
    logp = z.log_softmax(dim=1)
    rows = kk.Rows(logp.gather(1, tokens).squeeze(1), index=index)
    if teacher is not None:
        t = logits_of(teacher, teacher.get("temperature", 1.0), teacher.get("softcap"))
        logq = t.log_softmax(dim=1)
        rows = replace(rows, teacher_logprobs=logq.gather(1, tokens).squeeze(1))
        if setup.case.teacher_entropy:
            entropy = -(logq.exp() * logq).sum(1)
            rows = replace(rows, teacher_entropy=entropy, positions=options["positions"][index])
        if setup.case.kl:
            kinds, alpha = setup.case.kl.split("+"), options.get("jsd_alpha", 0.5)
            kl, *second = (divergence(kind, logp, logq, alpha) for kind in kinds)
            rows = replace(rows, kl=kl, forward_kl=second[0] if second else None)
    if setup.case.entropy:
        rows = replace(rows, entropy=-(logp.exp() * logp).sum(1))
    if setup.case.lse:
        rows = replace(rows, lse=z.exp().sum(1).log())
    losses = weights[index] * setup.case.loss(rows, setup.inputs)
    total = options.get("normalizer", weights.sum())

    def spread(values: Tensor | None) -> Tensor | None:
        return values if values is None else torch.zeros_like(weights).index_put((index,), values)

    fields = {name: spread(getattr(rows, name)) for name in ROW_OUTPUTS}
    size = float(losses.detach().abs().sum() / total)
    return results_of(setup, Plain(losses.sum() / total, **fields)), size
