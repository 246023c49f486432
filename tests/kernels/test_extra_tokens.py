"""Log-probabilities at K ids, and that of the rest, match full logits in value and gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, IMPL_DTYPES
from tests.kernels.problem import make_problem
from tests.tolerance import assert_matches

N, V = 7, 37
IDS = torch.tensor(
    [
        [3, 36, 0, -1],
        [5, 5, -1, 5],  # repeated
        [-1, -1, -1, -1],
        [8, 1, 2, 30],
        [-1, 7, 7, 9],
        [0, 1, 2, 3],
        [20, 20, 20, 20],
    ]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "temperature_of_each_row": {"temperature": torch.linspace(0.5, 1.5, N)},
    "top_p": {"truncation": kk.Truncation(top_p=0.9)},
}


def _loss(rows: kk.Rows, inputs: dict[str, Tensor]) -> Tensor:
    """Return a loss that reads all there is of a row, with weights of both signs."""
    n = rows.index
    extra = torch.where(rows.extra_logprobs.isfinite(), rows.extra_logprobs, 0)
    loss = inputs["c"][n] * rows.logprobs + (inputs["ids"][n] * extra).sum(dim=1)
    loss = loss + (inputs["ids"][n] * extra.exp()).square().sum(dim=1)
    if rows.rest_logprob is not None:
        rest = torch.where(rows.rest_logprob.isfinite(), rows.rest_logprob, 0)
        loss = loss + inputs["r"][n] * rest
    if rows.entropy is not None:
        loss = loss + inputs["e"][n] * rows.entropy
    for kl in (rows.kl, rows.forward_kl):
        loss = loss if kl is None else loss + inputs["g"][n] * kl
    return loss


def _solve(
    impl: str,
    dtype: torch.dtype,
    cast: Any,
    device: str,
    *,
    ids: Tensor = IDS,
    kl: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return outputs and gradients of linear_token_loss."""
    kind = {"kd": kl} if kl in ("rkl", "fkl", "jsd") else {"kd": "rkl" if kl else None}
    problem = make_problem(N, dtype=dtype, device=device, **kind).map(cast)
    problem.tokens[0], problem.tokens[4] = 3, 7  # y is among the ids
    rng = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(N, generator=rng) for name in ("c", "r", "e", "g")}
    inputs["ids"] = torch.randn(N, ids.shape[1], generator=rng)
    inputs = {k: v.to(device).to(problem.student["hidden"].dtype) for k, v in inputs.items()}
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)
    out = kk.linear_token_loss(
        tokens=problem.tokens,
        loss_fn=lambda rows: _loss(rows, inputs),
        extra_tokens=ids.to(device),
        teacher=teacher,
        kl=kl,
        token_weights=problem.options["token_weights"],
        impl=impl,
        **student,
        **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    out.loss.backward()
    names = ("logprobs", "extra_logprobs", "rest_logprob", "entropy", "kl")
    results = {name: getattr(out, name) for name in names if getattr(out, name) is not None}
    return results | {f"d{name}": value.grad for name, value in student.items()}


def _assert_matches(impl: str, dtype: torch.dtype, device: str, **options: Any) -> None:
    ours = _solve(impl, dtype, lambda x: x, device, **options)

    def reference(cast: torch.dtype) -> dict[str, Tensor]:
        return _solve("reference", dtype, lambda x: x.to(cast), device, **options)

    assert_matches(ours, reference)


@pytest.mark.parametrize("rest", [False, True], ids=["ids", "rest"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_definition(
    impl: str, dtype: torch.dtype, options: dict[str, Any], rest: bool, device: str
) -> None:
    _assert_matches(impl, dtype, device, rest=rest, **options)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("rest", [False, True], ids=["ids", "rest"])
@pytest.mark.parametrize("kl", ["rkl", "fkl", "jsd", "rkl+fkl"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_beside_an_exact_divergence_and_entropy(
    impl: str, kl: str, rest: bool, softcap: float | None, device: str
) -> None:
    _assert_matches(impl, F32, device, kl=kl, rest=rest, entropy=True, softcap=softcap)
