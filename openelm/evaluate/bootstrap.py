"""Intervals by resampling: how far a score would move with other text of the same kind."""

from __future__ import annotations

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_DRAWS_AT_ONCE = 1 << 20


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> tuple[float, float] | None:
    """Bootstrap a ratio of sums over units: the 95 % percentile interval of 10,000 resamples (Efron, 1979).

    numerators, denominators (units,) -> (low, high); None for fewer than 2 units, which show no spread.
    """
    units = len(numerators)
    if units < 2:
        return None
    generator = np.random.default_rng(seed)
    ratios: list[np.ndarray] = []
    resamples_at_once = max(1, _DRAWS_AT_ONCE // units)
    for first in range(0, RESAMPLES, resamples_at_once):
        shape = (min(resamples_at_once, RESAMPLES - first), units)
        drawn = generator.integers(units, size=shape)
        ratios.append(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
