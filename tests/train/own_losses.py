"""Losses of a user's own, for tests: named by method.loss."""

from torch import Tensor

from kdrl_kernels import Objective, Rows
from kdrl_kernels.objective import token_losses
from kdrl_train.method.losses import TokenCoefficients, completion_mean
from kdrl_train.method.own_loss import token_loss


@token_loss(kd="k2")
def kdrl(rows: Rows, tokens: TokenCoefficients) -> Tensor:
    """Repeat the loss of the preset kdrl."""
    assert (tokens.advantages == rows.advantages).all()
    return token_losses(Objective(kd="k2", kd_coef=1.0), rows)


@token_loss(kd="rkl+fkl", entropy=True)
def mixture(rows: Rows, _: TokenCoefficients) -> Tensor:
    """Repeat the loss of kd "rkl+fkl" at the share 0.5, with entropy_coef 0.01."""
    objective = Objective(kd="rkl+fkl", kd_coef=1.0, entropy_coef=0.01)
    return token_losses(objective, rows)


@token_loss(sequence=completion_mean)
def early(rows: Rows, tokens: TokenCoefficients, *, half_life: float, scale: float = 1.0) -> Tensor:
    """Weight early tokens more, and each completion by its ratio."""
    assert rows.entropy is None
    assert tokens.sequence is not None
    weight = scale * 0.5 ** (tokens.positions / half_life) * tokens.sequence.exp() / tokens.lengths
    return -weight * tokens.advantages * rows.logprobs


def undeclared(rows: Rows, _: TokenCoefficients) -> Tensor:
    """Lack a declaration."""
    return rows.logprobs
