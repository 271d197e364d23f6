"""The choice of a token in C++ against the plain one: the same token for the same number drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openelm.generate.sampling import SamplingConfig, draw, filter_logits
from openelm.kernels import native
from openelm.kernels.choice import choose_one, chooses

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="no C++ kernels were built for this CPU")

SIZES = (1, 7, 511, 512, 513, 5000, 32_003)


def some(size: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_greedy_takes_the_first_of_the_largest_and_its_own_probability(size: int, with_bias: bool) -> None:
    logits = some(size, size)
    bias = some(size, size + 1, 5.0) if with_bias else None
    biased = logits if bias is None else logits + bias
    wanted = int(biased.argmax())
    token_id, logprob = choose_one(logits, bias, 0.0, 0.0)
    assert token_id == wanted
    assert logprob == pytest.approx(float(logits.double().log_softmax(0)[wanted]), abs=2e-6 * (1 + abs(logprob)))


def test_of_equals_the_first_is_taken() -> None:
    logits = torch.zeros(1000)
    logits[[300, 700]] = 5.0
    assert choose_one(logits, None, 0.0, 0.0)[0] == 300


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.0, 30.0])
def test_a_draw_is_where_the_cumulative_distribution_reaches_the_number(size: int, temperature: float) -> None:
    """In float64 as the oracle; a number within rounding of the border between two tokens may fall to either."""
    logits, bias = some(size, 1), some(size, 2)
    weights = ((logits.double() + bias.double()) / temperature).softmax(0)
    ends = weights.cumsum(0)
    generator = torch.Generator().manual_seed(size)
    for uniform in [1.0, 2.0**-24, *(1.0 - torch.rand(200, generator=generator)).tolist()]:
        token_id, logprob = choose_one(logits, bias, temperature, uniform)
        assert weights[token_id] > 0
        assert ends[token_id] - weights[token_id] - 1e-6 <= uniform <= ends[token_id] + 1e-6
        assert logprob == pytest.approx(float(logits.double().log_softmax(0)[token_id]), abs=1e-5 * (1 + abs(logprob)))


def test_it_draws_what_the_plain_functions_draw() -> None:
    logits, config, same = some(32_000, 5), SamplingConfig(temperature=0.9), 0
    numbers = (1.0 - torch.rand(500, generator=torch.Generator().manual_seed(6))).tolist()
    for uniform in numbers:
        same += choose_one(logits, None, 0.9, uniform)[0] == int(draw(filter_logits(logits, config), uniform))
    assert same >= 498  # fp32 sums of 32,000 weights differ where a border is near


def test_what_has_no_weight_is_never_drawn() -> None:
    logits = torch.full((2000,), -1e4)
    logits[[3, 1500]] = 0.0
    for uniform in (1e-7, 0.25, 0.5, 0.75, 1.0):
        assert choose_one(logits, None, 1.0, uniform)[0] == (3 if uniform <= 0.5 else 1500)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_makes_the_probability_so(value: float, temperature: float) -> None:
    logits = some(1000, 1)
    logits[700] = value
    token_id, logprob = choose_one(logits, None, temperature, 0.5)
    assert 0 <= token_id < 1000 and not math.isfinite(logprob)


def test_only_rows_of_fp32_on_a_cpu_are_taken() -> None:
    assert chooses(torch.zeros(3))
    assert not chooses(torch.zeros(3, dtype=torch.float64))
    assert not chooses(torch.zeros(6)[::2])
    assert not chooses(torch.zeros(3, device="meta"))
