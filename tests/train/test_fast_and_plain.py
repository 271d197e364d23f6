"""Two hundred updates with the C++ kernels and with the plain formulas learn the same."""

from __future__ import annotations

import pytest
import torch

from openelm.bench.step import fixed_batch, trainer, update
from openelm.kernels import native
from openelm.model.config import ModelConfig
from openelm.model.plan import LayerPlan

STEPS, VOCABULARY, ROWS, LENGTH = 200, 96, 4, 48


def losses(config: ModelConfig) -> list[float]:
    """Train on rows that count upwards from random tokens in random strides, other ones in each step."""
    updater = trainer(config, ROWS, LENGTH, precision="fp32", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        first = torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator)
        stride = torch.randint(1, 6, (ROWS, 1), generator=generator)
        rows = (first + stride * torch.arange(LENGTH + 1)) % VOCABULARY
        found.append(update(updater, fixed_batch(rows)).cross_entropy)
    return found


@pytest.mark.skipif(native.kernels_name() == "torch", reason="the C++ kernels are not built for this CPU")
def test_loss_curves_of_both_agree_over_200_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LayerPlan(64, 16, (2, 4, 4), (1, 2, 2), (64, 96, 160))
    config = ModelConfig.from_plan(plan, vocab_size=VOCABULARY)
    fast = losses(config)
    monkeypatch.setattr(native, "_library", lambda: None)
    assert native.kernels_name() == "torch"
    plain = losses(config)
    assert fast != plain, "both ran the same kernels"
    assert fast[-1] < fast[0] / 2, "nothing was learned"
    # Rounding differs in the last of 24 bits; 200 updates of Adam, whose first ones are signs, grow it.
    assert max(abs(a - b) for a, b in zip(fast, plain, strict=True)) < 5e-3
    assert abs(sum(fast[-20:]) - sum(plain[-20:])) / 20 < 1e-3
