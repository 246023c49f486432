"""Functions of a tile on Triton agree with float64, near 0 and where probabilities are 0."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")
import triton
import triton.language as tl

from kdrl_kernels.rows.kernel_math import capped, mixture_log2_ratios

SIZE = 4096
UNIT = 2.0**-23


@triton.jit
def _capped_kernel(x_ptr, out_ptr, cap, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, capped(tl.load(x_ptr + i), cap))


@triton.jit
def _mixture_kernel(p_ptr, q_ptr, out_ptr, alpha, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    p_over_m, q_over_m = mixture_log2_ratios(tl.load(p_ptr + i), tl.load(q_ptr + i), alpha)
    tl.store(out_ptr + i, p_over_m)
    tl.store(out_ptr + SIZE + i, q_over_m)


def _mixture(p: torch.Tensor, q: torch.Tensor, alpha: float, device: str) -> torch.Tensor:
    """Return log2 p/m and log2 q/m of log2 p and log2 q, [2, SIZE]."""
    out = torch.empty(2, SIZE, device=device)
    _mixture_kernel[(1,)](p.to(device), q.to(device), out, alpha, SIZE)
    return out.cpu()


@pytest.mark.parametrize("cap", [3.0, 30.0])
def test_capped_is_cap_times_tanh(cap: float, device: str) -> None:
    sizes = torch.cat([torch.logspace(-8, 0.5, SIZE // 4), torch.linspace(0.3, 12, SIZE // 4)])
    x = torch.cat([sizes, -sizes]) * cap
    out = torch.empty(SIZE, device=device)
    _capped_kernel[(1,)](x.to(device), out, cap, SIZE)
    exact = cap * torch.tanh(x.double() / cap)
    error = (out.cpu().double() - exact).abs() / exact.abs()
    assert error.max() < (3 if device == "cpu" else 7) * UNIT  # exp2 and rsqrt are rougher there
    slope = 1 - (out.cpu().double() / cap) ** 2
    assert (slope - (1 - (exact / cap) ** 2)).abs().max() < 4 * UNIT


def test_capped_at_the_ends(device: str) -> None:
    x = torch.zeros(SIZE)
    x[:6] = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38, -0.0])
    out = torch.empty(SIZE, device=device)
    _capped_kernel[(1,)](x.to(device), out, 5.0, SIZE)
    assert out[:2].tolist() == [5.0, -5.0]
    assert out[2].isnan()
    assert out[3:5].tolist() == [5.0, -5.0]
    assert not out[5:].any()


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.9])
def test_ratios_to_a_mixture(alpha: float, device: str) -> None:
    """Also where p and q are nearly equal: each ratio is right to its own size."""
    share = torch.tensor(alpha).double()  # as the kernel is given it
    q = torch.linspace(-30, -1, SIZE)
    steps = torch.logspace(-6, 1.4, SIZE // 2)
    p = q + torch.cat([steps, -steps.flip(0)])
    ratio = (p.double() - q.double()) * math.log(2)
    larger = torch.where(ratio < 0, 1 - share, share)
    t = -torch.log1p(larger * torch.expm1(-ratio.abs())) / math.log(2)
    exact = torch.stack(
        [t + ratio.clamp(max=0) / math.log(2), t - ratio.clamp(min=0) / math.log(2)]
    )
    error = (_mixture(p, q, alpha, device).double() - exact).abs()
    assert (error / (ratio.abs() + t.abs())).max() < 8 * UNIT


def test_ratios_where_a_probability_is_0(device: str) -> None:
    p = torch.full((SIZE,), -1.0)
    q = p.clone()
    p[:3] = torch.tensor([-torch.inf, -1.0, -torch.inf])
    q[:3] = torch.tensor([-1.0, -torch.inf, -torch.inf])
    p[3] = math.nan
    ratios = _mixture(p, q, 0.25, device)
    assert torch.isfinite(ratios[:, :3]).all()  # times exp2(-inf) they are 0
    assert ratios[1, 0] == pytest.approx(-math.log2(0.25), rel=1e-6)
    assert ratios[0, 1] == pytest.approx(-math.log2(0.75), rel=1e-6)
    assert ratios[:, 2].tolist() == [0, 0]
    assert ratios[:, 3].isnan().all()
    assert not ratios[:, 4:].any(), "equal distributions"
