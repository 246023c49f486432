"""The variance of a sketched gradient is that of the formula: measured over random numbers.

The head is the identity, so that dX is dL/dlogits itself and each of its columns can be compared.
"""

import math

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.objective import Kd
from tests.kernels.params import F64

DRAWS, V = 20_000, 100
THRESHOLD, A, BETA = 0.02, 0.5, 0.4
"""A is the largest coefficient of a row, and below 1: its threshold is higher by 1 / A."""


def sketched_rows(logits: Tensor, teacher: Tensor, token: int, kd: Kd | None) -> Tensor:
    """Return dL/dlogits [DRAWS, V] of one row, each sketched with another random number."""
    head, hidden = torch.eye(V, dtype=F64), logits.expand(DRAWS, V).clone().requires_grad_()
    out = kk.kdrl_loss(
        hidden,
        head,
        torch.full((DRAWS,), token),
        advantages=torch.full((DRAWS,), A, dtype=F64),
        normalizer=1.0,
        teacher=kk.TeacherHead(teacher.expand(DRAWS, V), head) if kd else None,
        objective=kk.Objective(kd=kd, kd_coef=BETA),
        backward="sketch",
        sketch=kk.Sketch(threshold=THRESHOLD, seed=3, flat=math.inf),
    )
    out.loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def exact_row(logits: Tensor, teacher: Tensor, token: int, kd: Kd | None) -> tuple[Tensor, Tensor]:
    """Return dL/dlogits of the row, and the probability with which each entry is kept."""
    p, q = logits.softmax(0), teacher.softmax(0)
    delta = torch.zeros_like(p)
    delta[token] = 1
    dz, a = -A * (delta - p), p
    if kd == "rkl":
        log_ratio = (p / q).log()
        dz = dz + BETA * p * (log_ratio - (p * log_ratio).sum())
    elif kd == "fkl":
        dz, a = dz + BETA * (p - q), (p + q) / 2
    return dz, (a / (THRESHOLD / A)).clamp(max=1)


@pytest.mark.parametrize("kd", [None, "rkl", "fkl"])
def test_the_variance_of_dx_is_that_of_the_formula(kd: Kd | None) -> None:
    """Of each column, and of all together, within four standard errors of a mean over draws."""
    rng = torch.Generator().manual_seed(1)
    logits, teacher = 2 * torch.randn(2, V, generator=rng, dtype=F64)
    token = int(logits.argsort()[-4])
    dz, chance = exact_row(logits, teacher, token, kd)
    errors = sketched_rows(logits, teacher, token, kd) - dz
    variance = dz.square() * (1 - chance) / chance
    sampled = (torch.arange(V) != token) & (chance < 1)
    certain = ~sampled if kd else torch.arange(V) == token
    assert 1 < (~sampled).sum() < V / 2

    # what is always kept makes up for the others, without a KL the token alone
    share = -errors[:, sampled].sum(dim=1, keepdim=True) / certain.sum()
    torch.testing.assert_close(errors[:, certain], share.expand(-1, int(certain.sum())))
    total = errors[:, sampled].square().sum(dim=1)
    standard_error = total.std() / math.sqrt(DRAWS)
    assert standard_error < 0.01 * variance[sampled].sum()
    assert abs(total.mean() - variance[sampled].sum()) < 4 * standard_error

    often = sampled & (chance > 0.02)  # kept in 400 draws: a mean is as good as normal
    kept, left_out = dz * (1 / chance - 1), dz  # the error of either
    fourth = chance * kept**4 + (1 - chance) * left_out**4
    standard_error = ((fourth - variance.square()) / DRAWS).sqrt()
    difference = errors.square().mean(dim=0) - variance
    assert (difference.abs() < 4 * standard_error)[often].all()
