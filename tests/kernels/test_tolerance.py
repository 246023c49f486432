"""The tolerance rule lets rounding pass and catches seeded bugs, also small ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdrl_kernels import gemm, gradients
from tests.kernels.problem import assert_matches_definition
from tests.tolerance import Float32Rounding, assert_matches, rounding_floors


def reference(dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute a sum that cancels, and a product."""
    x = torch.tensor([1.0, 1e-4, -1.0], dtype=torch.float64).to(dtype)
    return {"sum": x.sum(), "product": x * x}


def test_the_floor_of_a_sum_is_its_length_and_size() -> None:
    """The floors are sqrt(3) · 2 · u over the result 1e-4, and one rounding of each product."""
    floors = rounding_floors(reference, reference(torch.float64), {})
    assert floors["sum"] == pytest.approx(3**0.5 * 2.0001 * 2**-24 / 1e-4, rel=1e-6)
    assert floors["product"] == pytest.approx(2**-24, rel=1e-6)
    assert rounding_floors(reference, reference(torch.float64), {"sum": 2.0001})["sum"] < 2e-7


def test_nothing_is_added_to_float32_or_to_a_copy() -> None:
    x = torch.rand(5)
    with Float32Rounding(0):
        product, copy = x * 2, x.double().clone()
    assert torch.equal(product, x * 2)
    assert torch.equal(copy, x.double())


@pytest.mark.parametrize("error", [3e-4, float("nan")])
def test_an_error_beyond_the_floor_is_caught(error: float) -> None:
    ours = {name: value.float() for name, value in reference(torch.float64).items()}
    assert_matches(ours, reference)
    with pytest.raises(AssertionError, match="product: error"):
        assert_matches(ours | {"product": ours["product"] * (1 + error)}, reference)


def test_an_exact_zero_has_no_floor() -> None:
    def zero(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"x": torch.ones(2, dtype=dtype) - torch.ones(2, dtype=dtype)}

    assert_matches({"x": torch.zeros(2)}, zero)
    with pytest.raises(AssertionError, match="x: error"):
        assert_matches({"x": torch.tensor([0.0, 1e-9])}, zero)


def _ten_bits(logits: Tensor) -> Tensor:
    """Round to the mantissa of TF32, which a GPU's GEMM may do unasked."""
    return ((logits.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda logits: logits.bfloat16().float(),
    "float16": lambda logits: logits.half().float(),
    "tf32": _ten_bits,
    "one_part_in_a_hundred_thousand": lambda logits: logits * (1 + 1e-5),
}


@pytest.mark.parametrize("bug", PROJECTIONS)
@pytest.mark.parametrize("shape", [(7, 16, 37), (129, 31, 130), (4, 8, 3 * 4096 + 5)], ids=str)
def test_logits_of_too_few_bits_are_caught(
    shape: tuple[int, int, int], bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gemm.project

    def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        real(hidden, weight, out)
        out.copy_(PROJECTIONS[bug](out))

    N, H, V = shape
    assert_matches_definition("torch", kd="rkl", N=N, H=H, V=V)
    monkeypatch.setattr(gemm, "project", project)
    with pytest.raises(AssertionError, match="budget"):
        assert_matches_definition("torch", kd="rkl", N=N, H=H, V=V)


def test_a_gradient_of_too_few_bits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gradients.Gradients.add

    def add(self: gradients.Gradients, head: object, rows: object, dz: Tensor) -> None:
        real(self, head, rows, _ten_bits(dz.contiguous()))  # type: ignore[arg-type]

    monkeypatch.setattr(gradients.Gradients, "add", add)
    with pytest.raises(AssertionError, match="dhidden: error"):
        assert_matches_definition("torch", kd="rkl")
