"""Stochastic rounding: to one of the two neighbours, right on the average, and the same bits for the same keys."""

from __future__ import annotations

import math

import pytest
import torch

from openelm.optim.config import OptimizerConfig
from openelm.optim.optimizer import Optimizer
from openelm.optim.rounding import rounding_generator, stochastically_rounded

from .test_optimizer import QKV, bits, make_model

CPU = torch.device("cpu")


def generator(step: int = 0) -> torch.Generator:
    return rounding_generator(7, step, "name", CPU)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, -0.0, 2.0**-126, -(2.0**100), math.inf, -math.inf])
def test_bf16_numbers_stay_as_they_are(value: float) -> None:
    values = torch.full((1000,), value)
    rounded = stochastically_rounded(values, generator())
    assert torch.equal(rounded.float().view(torch.int32), values.view(torch.int32))


def test_nan_stays_nan() -> None:
    assert stochastically_rounded(torch.full((100,), math.nan), generator()).isnan().all()


def test_a_number_goes_to_one_of_its_two_neighbours() -> None:
    values = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    low = (values.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    high = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    rounded = stochastically_rounded(values, generator()).float()
    assert ((rounded == low) | (rounded == high)).all()
    assert (rounded == low).any() and (rounded == high).any()


@pytest.mark.parametrize("share", [0.0625, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_is_the_number_itself(share: float, sign: float) -> None:
    """A share of the way from 1 to 1 + 2^-7, 200,000 times: within five standard errors."""
    count, gap = 200_000, 2.0**-7
    value = sign * (1 + share * gap)
    mean = float(stochastically_rounded(torch.full((count,), value), generator()).double().mean())
    error = gap * math.sqrt(share * (1 - share) / count)
    assert abs(mean - value) < 5 * error


def test_seed_step_and_name_decide_the_numbers() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    found = [stochastically_rounded(values, rounding_generator(*key, CPU)) for key in keys]
    again = [stochastically_rounded(values, rounding_generator(*key, CPU)) for key in keys]
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert not any(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("weights", ["bf16", "bf16-stochastic"])
def test_updates_far_below_the_last_bit_add_up(weights: str) -> None:
    """600 updates of 1e-5 where bf16 numbers are up to 0.0039 apart: rounded to nearest none of them would be seen."""
    model = make_model()
    optimizer = Optimizer(OptimizerConfig.parse({"weights": weights, "weight_decay": 0.0}), model, seed=3)
    optimizer.load([(QKV, torch.full(model.state_dict()[QKV].shape, 0.75))])
    weight = dict(model.named_parameters())[QKV]
    weight.grad_dtype = torch.float32
    weight.grad = torch.ones(weight.shape)
    for step in range(600):
        optimizer.step(1e-5, step=step)
    assert weight.dtype == torch.bfloat16
    assert float(optimizer.weights()[QKV].float().mean()) == pytest.approx(0.75 - 600e-5, abs=5e-4)


def test_the_matrices_of_the_layers_are_bf16_and_nothing_else() -> None:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(weights="bf16"), model)
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert narrow == model.layer_matrices().keys()
    assert {value.dtype for value in (*optimizer.weights().values(), *optimizer.state().values())} == {torch.float32}


def test_wide_weights_are_given_for_a_while_and_taken_back() -> None:
    for kind in ("bf16", "bf16-stochastic"):
        model = make_model()
        optimizer = Optimizer(OptimizerConfig.parse({"weights": kind}), model)
        optimizer.load(make_model().state_dict().items())
        before, expected = bits(model.state_dict()), optimizer.weights()
        with optimizer.wide_weights():
            for name, value in model.state_dict().items():
                assert torch.equal(value, expected[name].float()), name
        assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
