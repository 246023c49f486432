"""Calls a loss of the user's own on a few made-up rows, so that its mistakes stop a run before
anything is loaded."""

import math
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.token_rows import Rows
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.losses import MethodLoss, TokenCoefficients
from kdrl_train.method.own_loss import load_loss

LENGTHS = (3, 1)
"""Tokens of the two made-up completions."""


def try_loss(method: MethodConfig) -> None:
    """Load the loss that method.loss names, if any, and call it on all rows and on each alone.

    A step's losses are computed some rows at a time, so what a row's loss takes from other rows, a
    mean of the batch, would depend on how the step is cut.

    Raises: ValueError as load_loss, and for a loss that raises, that returns something else than
        one loss a row with a gradient, or whose rows depend on each other.
    """
    loss = load_loss(method)
    if loss is None:
        return
    rule, N = f"method.loss {method.loss} must", sum(LENGTHS)
    rows, tokens = made_up(method)
    with torch.random.fork_rng(devices=[]):
        if loss.sequence is not None:
            sequence = called(rule, lambda: of_sequence(loss, rows, tokens))
            if not isinstance(sequence, Tensor) or sequence.shape != (N,):
                raise ValueError(
                    f"{rule} have a sequence function that returns one number a token, [N] with N "
                    f"= {N}, got {shape_of(sequence)}: repeat that of a completion for its tokens"
                )
            tokens = replace(tokens, sequence=sequence.detach())
        whole = called(rule, lambda: loss.losses(rows, tokens))
        require_vector(rule, whole, N)
        if not whole.requires_grad:
            raise ValueError(
                f"{rule} return losses with a gradient in what it has declared, got constants: use "
                "rows.logprobs, which is not detached"
            )
        require_alone(rule, loss, rows, tokens, whole)


def require_alone(
    rule: str, loss: MethodLoss, rows: Rows, tokens: TokenCoefficients, whole: Tensor
) -> None:
    """Raise ValueError unless each row by itself has the loss that it has among all, `whole`."""
    for row, among in enumerate(whole.tolist()):
        index = torch.tensor([row])
        single = taken_rows(rows, index), tokens.take(index)
        part = called(rule, partial(loss.losses, *single))
        require_vector(rule, part, 1)
        alone = part.item()
        if not math.isclose(alone, among, rel_tol=1e-4, abs_tol=1e-6) and not math.isnan(alone):
            raise ValueError(
                f"{rule} compute the loss of a row from that row alone, got {alone:.6g} for a row "
                f"by itself and {among:.6g} for it among {len(whole)}: it gets some rows of a pack "
                "at a time; what needs a whole completion belongs into the sequence function"
            )


def require_vector(rule: str, losses: Any, count: int) -> None:
    """Raise ValueError for what is no vector of so many losses."""
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        raise ValueError(
            f"{rule} return one loss a row, [C] with C = {count}, got {shape_of(losses)}: the "
            "trainer weights and adds them up"
        )


def made_up(method: MethodConfig) -> tuple[Rows, TokenCoefficients]:
    """Make rows with all that a loss may have declared, and their coefficients."""
    draw = torch.Generator().manual_seed(0)
    N = sum(LENGTHS)

    def positive() -> Tensor:
        return 0.1 + torch.rand(N, generator=draw)

    logprobs, entropy, kl, forward_kl = (sign * positive() for sign in (-1, 1, 1, 1))
    counts = torch.tensor(LENGTHS)
    tokens = TokenCoefficients(
        advantages=torch.tensor([1.2, -0.8]).repeat_interleave(counts),
        kd_weight=torch.tensor([0.5, 0.3]).repeat_interleave(counts),
        sampled_logprobs=logprobs - 0.01,
        completion=torch.arange(len(counts)).repeat_interleave(counts),
        positions=torch.cat([torch.arange(n) for n in LENGTHS]),
        lengths=counts.repeat_interleave(counts),
    )
    exact = method.kd in ("rkl", "fkl", "jsd", "rkl+fkl")
    rows = Rows(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=-positive(),
        advantages=tokens.advantages,
        kd_weight=tokens.kd_weight,
        teacher_logprobs=None if method.kd is None else -positive(),
        kl=kl.requires_grad_() if exact else None,
        forward_kl=forward_kl.requires_grad_() if method.kd == "rkl+fkl" else None,
        entropy=entropy.requires_grad_(),
        index=torch.arange(N),
    )
    return rows, tokens


def taken_rows(rows: Rows, index: Tensor) -> Rows:
    """Return some of the rows."""
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return replace(rows, **{k: v[index] for k, v in values.items() if v is not None})


@torch.no_grad()
def of_sequence(loss: MethodLoss, rows: Rows, tokens: TokenCoefficients) -> Any:
    """Call a loss's function of whole completions, as a step does."""
    assert loss.sequence is not None
    assert rows.old_logprobs is not None
    return loss.sequence(rows.logprobs - rows.old_logprobs, tokens)


def called(rule: str, function: Callable[[], Any]) -> Any:
    """Call a function of the user's own; ValueError naming the line where it raises."""
    try:
        return function()
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        raise ValueError(
            f"{rule} take rows with what it has declared in token_loss, got {type(error).__name__} "
            f"in line {last.lineno} of {last.filename}: {error}"
        ) from error


def shape_of(value: Any) -> str:
    """Say what a function returned in place of a vector."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
