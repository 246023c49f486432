"""Sequences cut over the ranks of a context-parallel group give one process's loss and gradients.

A token's loss reads its own hidden state alone, so the head needs nothing from the other ranks but
the token count of them all. A loss of whole sequences (GSPO) needs one sum a sequence beside it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.testing import assert_close

import kdrl_kernels as kk
from tests.kernels.rank_cases import assert_ok, run_cases

N, H, V = 14, 6, 11
PROMPT = slice(5, 9)
"""The prompt of the second sequence; of the first there is the end of its completion alone."""
SEQUENCE = [0] * 5 + [1] * 9
PIECES = {2: [slice(0, 8), slice(8, N)], 3: [slice(0, 5), PROMPT, slice(9, N)]}
"""Positions of each rank. With 2 ranks one has a sequence and a half; with 3 one has no loss."""
DEADLINE_S = 90

Tensors = dict[str, Tensor]
Loss = Callable[[Tensors, int], Tensor]


def _tensors() -> Tensors:
    """Return the whole problem in float64, the same on each rank."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    token_weights = torch.ones(N, dtype=torch.float64)
    token_weights[PROMPT] = 0
    return {
        "hidden": randn(N, H),
        "weight": randn(V, H),
        "teacher_hidden": randn(N, H),
        "teacher_weight": randn(V, H),
        "tokens": torch.randint(V, (N,), generator=rng),
        "sequence": torch.tensor(SEQUENCE),
        "advantages": randn(2)[SEQUENCE],
        "old_logprobs": -randn(N).abs(),
        "teacher_logprobs": -randn(N).abs(),
        "token_weights": token_weights,
    }


def _piece(tensors: Tensors) -> Tensors:
    """Select the positions of this rank."""
    rows = PIECES[dist.get_world_size()][dist.get_rank()]
    return {name: x if name.endswith("weight") else x[rows] for name, x in tensors.items()}


def _head(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return tensors["hidden"], tensors["weight"], tensors["tokens"]


def _options(tensors: Tensors, ranks: int) -> dict[str, Any]:
    """Return the arguments of both losses: weights, and the tokens of all ranks / ranks."""
    tokens = torch.tensor((N - 4) / ranks, dtype=torch.float64)
    return {"token_weights": tensors["token_weights"], "normalizer": tokens}


def _kdrl_loss(kd: str) -> Loss:
    def loss(tensors: Tensors, ranks: int) -> Tensor:
        exact = kk.TeacherHead(tensors["teacher_hidden"], tensors["teacher_weight"])
        return kk.kdrl_loss(
            *_head(tensors),
            advantages=tensors["advantages"],
            old_logprobs=tensors["old_logprobs"],
            teacher=exact if kd == "rkl" else None,
            teacher_logprobs=None if kd == "rkl" else tensors["teacher_logprobs"],
            objective=kk.Objective(kd=kd, kd_coef=0.5),
            **_options(tensors, ranks),
        ).loss

    return loss


def _token_loss(tensors: Tensors, ranks: int) -> Tensor:
    def loss_fn(rows: kk.Rows) -> Tensor:
        assert rows.entropy is not None
        return rows.entropy - tensors["advantages"][rows.index] * rows.logprobs.exp()

    return kk.linear_token_loss(
        *_head(tensors), loss_fn, entropy=True, **_options(tensors, ranks)
    ).loss


def _gspo(tensors: Tensors, ranks: int) -> Tensor:
    """Compute GSPO's loss on every rank, from the sums over the pieces of each sequence.

    The gradient of all_reduce adds up those of the ranks, which have the same loss: `ranks` times
    that of one process, as where the tokens of all ranks are divided by the ranks.
    """
    used = tensors["token_weights"] > 0
    logprobs = kk.linear_logprobs(*_head(tensors), mask=used).logprobs
    log_ratio = (logprobs - tensors["old_logprobs"]) * used
    columns = torch.stack([log_ratio, used.double(), tensors["advantages"] * used])
    sums = torch.zeros(3, 2, dtype=torch.float64).index_add(1, tensors["sequence"], columns)
    if ranks > 1:
        sums = all_reduce(sums)
    log_ratio, count, advantages = sums
    ratio, A = (log_ratio / count).exp(), advantages / count
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()


LOSSES: dict[str, Loss] = {
    "kdrl_loss-rkl": _kdrl_loss("rkl"),
    "kdrl_loss-k2": _kdrl_loss("k2"),
    "linear_token_loss": _token_loss,
    "gspo": _gspo,
}


def _check(loss_of: Loss) -> None:
    """The mean of losses and gradients over the ranks is that of one process."""
    ranks = dist.get_world_size()
    whole, piece = _tensors(), _piece(_tensors())
    for tensors in (whole, piece):
        tensors["hidden"].requires_grad_()
        tensors["weight"].requires_grad_()
    expected, loss = loss_of(whole, 1), loss_of(piece, ranks)
    expected.backward()
    loss.backward()
    gradient, ours = whole["hidden"].grad, piece["weight"].grad
    assert gradient is not None
    assert ours is not None
    mean = torch.cat([loss.detach()[None], ours.flatten()]) / ranks
    dist.all_reduce(mean)
    assert_close(mean[0], expected.detach(), rtol=1e-12, atol=1e-12)
    assert_close(mean[1:].view(V, H), whole["weight"].grad, rtol=1e-12, atol=1e-12)
    # the backbone's gradient is divided by the ranks when it is averaged
    rows = ranks * gradient[PIECES[ranks][dist.get_rank()]]
    assert_close(piece["hidden"].grad, rows, rtol=1e-12, atol=1e-12)


def _cases(_ranks: int) -> dict[str, Callable[[], None]]:
    return {name: partial(_check, loss_of) for name, loss_of in LOSSES.items()}


GROUPS = [2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=GROUPS, ids=lambda ranks: f"{ranks}-ranks")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """Return the number of ranks, and the folder to which all wrote."""
    ranks: int = request.param
    return ranks, run_cases(_cases, ranks, tmp_path_factory.mktemp("ranks"), DEADLINE_S)


@pytest.mark.parametrize("name", LOSSES)
def test_pieces_of_sequences_give_one_process_s_loss(name: str, outcomes: tuple[int, Path]) -> None:
    ranks, folder = outcomes
    assert_ok(folder, name, ranks)
