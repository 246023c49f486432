"""histogram: quantiles to the width of a bin, sums to the bit."""

import math

import numpy as np
import pytest
import torch

from kdrl_train.method.histogram import PERCENTILES, SIZE, histogram, quantiles


@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_quantiles_are_right_to_the_width_of_a_bin(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    values = scale * torch.randn(999, generator=draw, dtype=torch.float64).pow(3)
    exact = np.quantile(values.numpy(), np.array(PERCENTILES) / 100, method="inverted_cdf")
    # half a bin: 0.5e-4 at 0, half a percent far from it
    assert quantiles(histogram(values)) == [
        pytest.approx(x, rel=0.0051, abs=0.51e-4) for x in exact
    ]


def test_histograms_add_up_exactly() -> None:
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(1000, generator=draw, dtype=torch.float64)
    parts = sum(histogram(part) for part in reversed(values.split(7)))
    assert torch.equal(parts, histogram(values))
    assert parts.sum() == 1000


def test_zero_is_zero_and_the_ends_take_the_rest() -> None:
    values = torch.tensor([-math.inf, -1e9, 0.0, 1e-5, math.nan, 1e9, math.inf]).double()
    counts = histogram(values)
    assert counts.shape == (SIZE,)
    assert counts[[0, SIZE // 2, SIZE - 1]].tolist() == [2, 3, 2]
    assert quantiles(histogram(torch.zeros(3, dtype=torch.float64))) == [0.0] * 4
    assert quantiles(counts)[3] == pytest.approx(110, rel=0.01)


def test_what_does_not_count_is_left_out() -> None:
    values = torch.tensor([0.0, 1.0, math.nan, 2.0, math.inf]).double()
    counted = torch.tensor([True, False, False, True, False])
    assert torch.equal(histogram(values, counted), histogram(values[counted]))
