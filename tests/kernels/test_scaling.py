"""A gradient times a number: one rounding, in place where it can be, and no pass for a 1."""

import pytest
import torch

from kdrl_kernels.scaling import scale_, scaled, scaled_
from tests.kernels.params import F16, F32

pytest.importorskip("triton", reason="no Triton on this platform")
from kdrl_kernels.rows import kernel_scale


def _x(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 43), (4, 32), (5, 77)], ids=str)
def test_the_kernel_rounds_once(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """One program of several blocks, several of one, and a rest."""
    x, factor = _x(*shape, device=device), torch.tensor(1 / 3, device=device)
    for most in (1, 2, 100):
        out = torch.empty_like(x, dtype=dtype)
        kernel_scale.scale(x, factor, out, block=32, most=most)
        torch.testing.assert_close(out, (x * factor).to(dtype), rtol=0, atol=0)
    for impl in ("torch", "triton"):
        ours = scaled(x, factor, dtype, impl)
        torch.testing.assert_close(ours, (x * factor).to(dtype), rtol=0, atol=0)
        copy = x.clone()
        result = scaled_(copy, factor, dtype, impl)
        assert (result is copy) == (dtype == F32)
        torch.testing.assert_close(result, ours, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan")])
def test_in_place_a_1_writes_nothing(factor: float, device: str) -> None:
    x, out = _x(300, device=device), torch.full((300,), -7.0, device=device)
    number = torch.tensor(factor, device=device)
    kernel_scale._scale_kernel[2,](x, number, out, 300, 2, IN_PLACE=True, BLOCK=32)
    expected = torch.full_like(out, -7.0) if factor == 1 else x * number
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_on_a_cpu_a_1_makes_no_pass_and_another_number_one() -> None:
    x = torch.ones(3)
    before = x._version
    assert scale_(x, torch.ones(())) is x
    assert x._version == before
    assert scale_(x, torch.tensor(0.5)).tolist() == [0.5] * 3
    assert x._version > before


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides_do_not_matter(impl: str, device: str) -> None:
    x, half = _x(4, 6, device=device), torch.tensor(0.5, device=device)
    view = x.clone().T
    torch.testing.assert_close(scaled(view, half, F16, impl), (x.T * 0.5).half())
    torch.testing.assert_close(scale_(view, half, impl), x.T * 0.5)
    assert scaled(x[:0], half, F16, impl).shape == (0, 6)
