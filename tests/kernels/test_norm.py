"""The norm of a flat tensor: exact to fp32, whatever its length, and the same bits on any number of threads."""

from __future__ import annotations

import math

import pytest
import torch

from openelm.kernels.norm import flat_norm


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8191, 8192, 8193, 3 * 8192, 100_003, 8192 * 8192 + 1])
def test_it_is_the_norm_in_float64(length: int) -> None:
    values = torch.rand(length, generator=torch.Generator().manual_seed(length)) - 0.3
    expected = math.sqrt(float(values.double().square().sum()))
    found = flat_norm(values)
    assert found.dtype == torch.float32 and found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_float64_stays_float64() -> None:
    values = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(flat_norm(values)) == pytest.approx(math.sqrt(float(values.square().sum())), rel=1e-14)


def test_threads_do_not_show_in_its_bits() -> None:
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.add(float(flat_norm(values)))
    torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 8192, 20_000])
def test_a_number_that_is_not_finite_shows(bad: float, place: int) -> None:
    values = torch.ones(20_001)
    values[place] = bad
    assert not math.isfinite(float(flat_norm(values)))


def test_a_negative_number_has_a_positive_norm() -> None:
    assert float(flat_norm(torch.tensor([-3.0]))) == 3.0
