"""What linear_token_loss says of a loss that raises, or that reads other rows than its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, IMPLS
from tests.kernels.token_losses import CASES, call, make_setup, with_leaves

MIXED: dict[str, Callable[[kk.Rows], Tensor]] = {
    "logprobs": lambda rows: (rows.logprobs - rows.logprobs.mean()) ** 2,
    "entropy": lambda rows: -rows.logprobs + rows.entropy.flip(0),
    "kl": lambda rows: -rows.logprobs + torch.softmax(rows.kl, 0),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_a_loss_that_reads_other_rows_is_refused_on_a_cpu(
    name: str, impl: str, device: str
) -> None:
    if device != "cpu":
        pytest.skip("a GPU is not waited for")
    setup = with_leaves(make_setup(CASES["bounded_kd"], F32, device))
    with pytest.raises(
        ValueError, match=rf"from that row alone, .* \(rows\.{name}\), .* is not linear"
    ):
        call(setup, MIXED[name], impl=impl, kl="rkl", entropy=True, workspace_bytes=None)


def test_a_loss_of_tiny_and_infinite_gradients_is_not_taken_for_mixed(device: str) -> None:
    setup = with_leaves(make_setup(CASES["sft"], F32, device))
    scales = torch.tensor([1e-44, 3e-39, 1e-20, 1e30, torch.inf], device=device).repeat(3)

    def scaled(rows: kk.Rows) -> Tensor:
        return scales[rows.index] * (rows.logprobs * 1.1 - rows.logprobs * 1.0999)

    assert not call(setup, scaled, impl="torch").loss.isfinite()


def test_an_error_in_the_loss_is_not_hidden(device: str) -> None:
    setup = with_leaves(make_setup(CASES["dapo"], F32, device))
    with pytest.raises(KeyError, match="rewards"):
        call(setup, lambda rows: rows.logprobs * setup.inputs["rewards"])
