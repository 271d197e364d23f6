"""bf16 products on a CPU without bf16 units are what bf16 hardware computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openelm.kernels import precision
from openelm.kernels.linear import linear


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["fp32 units", "bf16 units"])
def bf16_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    has = bool(request.param)
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: has)
    return has


@pytest.mark.parametrize("rows", [1, 40, 1500])
def test_bf16_linear_is_the_rounded_product_of_rounded_numbers(rows: int, bf16_units: bool) -> None:
    x, weight = numbers(rows, 48), numbers(40, 48, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight)
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    assert found.dtype == torch.bfloat16
    # Rounding an fp32 sum instead of the exact one moves a value near a tie by one unit at most, and rarely.
    assert (found == exact.bfloat16()).float().mean() > 0.99
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 40, 1500])
def test_bf16_linear_gradients_are_products_of_rounded_numbers(rows: int, bf16_units: bool) -> None:
    x, weight, upstream = numbers(rows, 24), numbers(16, 24, seed=1), numbers(rows, 16, seed=2).bfloat16()
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight)
    out.backward(upstream)
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    x_exact = upstream.double() @ weight.bfloat16().double()
    weight_exact = upstream.double().T @ x.bfloat16().double()
    for found, exact in ((x.grad, x_exact.detach()), (weight.grad, weight_exact.detach())):
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-8 * float(exact.abs().max()))


def test_backward_inside_autocast_is_the_same_as_outside() -> None:
    gradients = []
    for inside in (True, False):
        x, weight = numbers(60, 8).requires_grad_(), numbers(4, 8, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            total = linear(x, weight).float().square().sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        gradients.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    x, weight = numbers(3, 8).double(), numbers(4, 8, seed=1).double()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight)
    torch.testing.assert_close(found, x @ weight.T)


def test_the_probe_of_the_cpu_answers_once_and_the_same() -> None:
    assert precision.cpu_multiplies_bf16() is precision.cpu_multiplies_bf16()
