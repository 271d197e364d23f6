"""Sampling against brute-force sums over the probabilities."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.errors import ConfigError
from openelm.generate.sampling import (
    SamplingConfig,
    choose,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

Logits = st.lists(st.integers(-12, 12), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / 4
)


def support(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


def probabilities(logits: torch.Tensor) -> list[float]:
    weights = [math.exp(value) for value in logits.tolist()]
    return [weight / sum(weights) for weight in weights]


@given(Logits, st.integers(1, 14))
@settings(max_examples=100, deadline=None)
def test_top_k_keeps_the_k_largest_and_their_ties(logits: torch.Tensor, k: int) -> None:
    values = logits.tolist()
    smallest = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert support(keep_top_k(logits, k)) == {i for i, value in enumerate(values) if value >= smallest}


@given(Logits, st.sampled_from([1e-9, 0.1, 0.3, 0.5, 0.77, 0.9, 0.999, 1.0]))
@settings(max_examples=100, deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_sum(logits: torch.Tensor, p: float) -> None:
    chances = probabilities(logits)
    order = sorted(range(len(chances)), key=lambda i: (-logits[i].item(), i))
    kept: set[int] = set()
    total = 0.0
    for index in order:
        if kept and total >= p - 1e-12:
            break
        kept.add(index)
        total += chances[index]
    assert support(keep_top_p(logits, p)) == (set(order) if p == 1.0 else kept)


def test_top_p_of_ties_keeps_the_lower_ids() -> None:
    assert support(keep_top_p(torch.zeros(8), 0.5)) == {0, 1, 2, 3}


@given(Logits, st.sampled_from([0.0, 0.05, 0.31, 0.77, 1.0]))
@settings(max_examples=100, deadline=None)
def test_min_p_keeps_tokens_near_the_most_likely_one(logits: torch.Tensor, fraction: float) -> None:
    differences = (logits - logits.max()).exp()
    assert support(keep_min_p(logits, fraction)) == {
        i for i, ratio in enumerate(differences.tolist()) if ratio >= fraction
    }


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([2.0, -2.0, 0.0, 3.0, -3.0])
    seen = torch.tensor([True, True, True, False, False])
    assert penalise_repetition(logits, seen, 4.0).tolist() == [0.5, -8.0, 0.0, 3.0, -3.0]
    assert torch.equal(penalise_repetition(logits, seen, 1.0), logits)


def test_filters_are_applied_in_the_documented_order() -> None:
    generator = torch.Generator().manual_seed(0)
    config = SamplingConfig(temperature=0.7, top_k=9, top_p=0.8, min_p=0.2, repetition_penalty=1.3)
    for _ in range(50):
        logits = 3 * torch.randn(20, generator=generator, dtype=torch.float64)
        seen = torch.rand(20, generator=generator) < 0.3
        expected = penalise_repetition(logits, seen, 1.3)
        expected = keep_min_p(keep_top_p(keep_top_k(expected / 0.7, 9), 0.8), 0.2)
        actual = filter_logits(logits, config, seen)
        assert support(actual) == support(expected)
        torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1))


def test_filters_work_on_many_rows_at_once() -> None:
    logits = 2 * torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=0.9, top_k=20, top_p=0.7, min_p=0.05)
    assert torch.equal(filter_logits(logits, config), torch.stack([filter_logits(row, config) for row in logits]))


@pytest.mark.parametrize("temperature", [0.001, 0.01, 100.0])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1)
    token = choose(torch.tensor([3e38, -3e38, 1e38, 0.0]), config, torch.Generator().manual_seed(0))
    assert token == 0


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64).log()
    drawn = [draw(logits, u).item() for u in (1e-9, 0.25, 0.2500001, 0.75, 0.7500001, 1.0)]
    assert drawn == [0, 0, 2, 2, 3, 3]


def test_draw_over_a_grid_hits_every_token_in_proportion() -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    points = 20_000
    grid = [draw(logits, (i + 1) / points).item() for i in range(points)]
    shares = torch.bincount(torch.tensor(grid), minlength=7) / points
    torch.testing.assert_close(shares.double(), logits.softmax(-1), atol=2 / points, rtol=0)


@given(st.integers(0, 2**24 - 1), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_draw_never_takes_a_token_of_probability_zero(step: int, kept: int) -> None:
    logits = torch.full((64,), -torch.inf)
    places = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:kept]
    logits[places] = torch.randn(kept, generator=torch.Generator().manual_seed(step + 1))
    for uniform in (1 - step / 2**24, 1.0, 2**-24):
        assert draw(logits, uniform).item() in set(places.tolist())


def test_a_draw_takes_one_number_from_its_generator_and_a_greedy_choice_none() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(5))
    generator, reference = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    choose(logits, SamplingConfig(temperature=0), generator)
    choose(logits, SamplingConfig(), generator)
    torch.rand((), generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_greedy_takes_the_largest_logit_after_the_penalty() -> None:
    logits, seen = torch.tensor([1.0, 5.0, 4.0]), torch.tensor([False, True, False])
    generator = torch.Generator()
    assert choose(logits, SamplingConfig(temperature=0), generator, seen) == 1
    assert choose(logits, SamplingConfig(temperature=0, repetition_penalty=2.0), generator, seen) == 2


BAD_VALUES = [
    *product(["temperature"], [math.nan, math.inf, -1.0, 1e-9, 101.0, "warm"]),
    *product(["top_k"], [0, -1, 1.5]),
    *product(["top_p"], [0.0, -0.1, 1.1, math.nan]),
    *product(["min_p"], [-0.1, 1.1, math.nan]),
    *product(["repetition_penalty"], [0.0, -1.0, math.inf, math.nan]),
    *product(["max_tokens"], [0, -5]),
    *product(["stop"], [("",), (1,)]),
    *product(["seed"], [-1, 2**63]),
    ("temprature", 1.0),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_bad_value_is_a_config_error_that_names_it(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        SamplingConfig.parse({key: value})
