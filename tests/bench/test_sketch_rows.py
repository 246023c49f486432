"""Tests what is computed of the rows that a sketch samples: importance and tails."""

import math
from dataclasses import replace

import pytest
import torch

from bench.inputs import make_inputs
from bench.measures import importance, tails
from bench.shapes import TINY


def test_where_all_coefficients_are_one_all_choices_are_the_same() -> None:
    """|dL/dz| is p there. With a KL it is not, and its error is the smaller one."""
    inputs = make_inputs(TINY, "rl")
    inputs = replace(inputs, advantages=torch.ones_like(inputs.advantages))
    alone = importance.compare(inputs, 0.0, 2.0**-7)
    assert 0 < alone["flat_rows"] < 0.5
    for name in ("error_blocks", "error_dz"):
        assert alone[name] == pytest.approx(alone["error_p"], rel=1e-3)
    distilled = importance.compare(inputs, 1.0, 2.0**-7)
    assert distilled["error_blocks"] < 0.99 * distilled["error_p"]
    assert distilled["error_dz"] < 0.98 * distilled["error_blocks"]
    assert "| rl | 1 | 2^-7 |" in importance.table([distilled])


def test_the_error_of_one_entry() -> None:
    """An entry of 0.1 that is kept with probability 1/5, in a gradient whose squares sum to 1."""
    dz, chance = torch.tensor([[0.1, 0.0, 0.3]]), torch.tensor([[0.2, 0.0, 1.0]])
    assert importance.error(dz, chance, torch.tensor([0.75, 0.25])) == pytest.approx(0.2)


def test_the_lengths_of_a_block_are_shared_as_the_gradient_is() -> None:
    """Of blocks of 64 columns, the first has two entries; the second is all of the rest."""
    lengths, dz = torch.zeros(1, 67), torch.zeros(1, 67)
    lengths[0, [0, 1, 64]], dz[0, [0, 1, 66]] = torch.tensor([0.3, 0.1, 2.0]), 1.0
    dz[0, 1] = -3.0
    shared = importance.within_blocks(lengths, dz)
    assert shared.shape == dz.shape
    assert shared[0, [0, 1, 64, 66]].tolist() == pytest.approx([0.1, 0.3, 0.0, 2.0])
    assert shared.count_nonzero() == 3


def test_tails_of_rows_by_hand() -> None:
    """Five rows of two tokens: ln 2 nats. Five with a tenth over a thousand tokens: 1.016 nats."""
    two = torch.zeros(5, 2000)
    two[:, :2] = 0.5
    spread = torch.zeros(5, 2000)
    spread[:, 0], spread[:, 1:1001] = 0.9, 1e-4
    bands = tails.bands(torch.cat([two, spread]).clamp(min=1e-38).log())
    expected = {1: (0.0, 2.0), 2: (0.1, 1 + 0.1 * 2**11)}
    assert [place for place, band in enumerate(bands) if band] == [1, 2]
    for place, (tail, entries) in expected.items():
        band = bands[place]
        assert band is not None
        assert math.isclose(band["tail"], tail, abs_tol=1e-5)
        assert math.isclose(band["entries"], entries, rel_tol=1e-4)
    assert "| 1 to 2 | 10.00%, 206 |" in tails.table({"by hand": bands})
