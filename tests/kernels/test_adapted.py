"""Products with adapted matrices equal their formulas, gradients and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from openelm.kernels.adapted import adapted_linear, draw_kept
from openelm.kernels.cross_entropy import AdaptedHead, linear_cross_entropy

SCALE = 1.7


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor | None, kept: Tensor, again: float
) -> Tensor:
    seen = x * kept * again
    if magnitude is None:
        return x @ weight.T + SCALE * (seen @ down.T @ up.T)
    norms = torch.linalg.vector_norm(weight + SCALE * up @ down, dim=1).detach()
    factor = magnitude / norms
    return x @ weight.T + (factor - 1) * (seen @ weight.T) + factor * SCALE * (seen @ down.T @ up.T)


def operands(dtype: torch.dtype, *, dora: bool) -> tuple[Any, ...]:
    learned = [(2, 5, 12), (3, 12), (7, 3), *([(7,)] if dora else [])]
    weight = numbers(7, 12, seed=9, dtype=dtype)
    leaves = [numbers(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(learned)]
    return weight, leaves


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_product_and_gradients_equal_the_formula(dora: bool, dropout: float, dtype: torch.dtype, error: float) -> None:
    weight, leaves = operands(dtype, dora=dora)
    x, down, up, magnitude = (*leaves, None)[:4]
    torch.manual_seed(0)
    kept, again = draw_kept(x.reshape(-1, 12), dropout)
    expected = formula(x, weight, down, up, magnitude, kept.view(x.shape), again)
    torch.manual_seed(0)
    found = adapted_linear(x, lambda: weight, down, up, SCALE, magnitude, dropout=dropout)
    assert torch.allclose(found, expected, atol=error, rtol=error)
    upstream = numbers(*found.shape, seed=11, dtype=dtype)
    results = (torch.autograd.grad(result, leaves, upstream) for result in (found, expected))
    pairs = zip(*results, strict=True)
    assert all(torch.allclose(one, other, atol=10 * error, rtol=error) for one, other in pairs)


def test_the_gradient_of_lora_is_that_of_its_product() -> None:
    weight, leaves = operands(torch.float64, dora=False)
    assert gradcheck(lambda x, down, up: adapted_linear(x, lambda: weight, down, up, SCALE), leaves)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bf16_products_are_near_the_exact_ones(dora: bool) -> None:
    weight, leaves = operands(torch.float32, dora=dora)
    x, down, up, magnitude = (*leaves, None)[:4]
    expected = adapted_linear(x, lambda: weight, down, up, SCALE, magnitude)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapted_linear(x, lambda: weight, down, up, SCALE, magnitude)
    assert found.dtype == torch.bfloat16
    upstream = numbers(*found.shape, seed=11, dtype=torch.float32)
    near = torch.autograd.grad(found, leaves, upstream.bfloat16())
    exact = torch.autograd.grad(expected, leaves, upstream)
    pairs = zip((found.detach().float(), *near), (expected.detach(), *exact), strict=True)
    assert max(float((one - other).norm() / other.norm()) for one, other in pairs) < 0.02


def test_as_many_numbers_are_dropped_as_asked_for() -> None:
    torch.manual_seed(0)
    kept, again = draw_kept(torch.empty(1000, 1001), 0.1)
    assert abs(float(kept.double().mean()) - 0.9) < 0.001
    assert abs(again - 1 / 0.9) < 1e-4
    assert float((kept[1:] & kept[:-1]).double().mean()) == pytest.approx(0.81, abs=0.002)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_head_in_parts_gives_the_loss_of_the_whole(dtype: torch.dtype, error: float) -> None:
    hidden, columns, rows = (
        numbers(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate([(9, 8), (50, 3), (3, 8)])
    )
    weight, targets = numbers(50, 8, seed=5, dtype=dtype), torch.tensor([3, -100, 4, 49, 0, 7, -100, 8, 9])
    results = []
    for head in (AdaptedHead(weight, columns, rows, SCALE), weight + SCALE * columns @ rows):
        loss, nats = linear_cross_entropy(hidden, head, targets, z_loss=0.1)
        results.append((loss, nats, *torch.autograd.grad(loss, (hidden, columns, rows))))
    assert all(torch.allclose(one, other, rtol=error, atol=10 * error) for one, other in zip(*results, strict=True))
