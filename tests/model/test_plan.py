"""Plans: the rounding rule, plans that meet a budget, and costs counted again from the real module."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openelm.model.cache import KeyValueCache
from openelm.model.config import ModelConfig
from openelm.model.plan import (
    LayerPlan,
    matched_openelm_plan,
    matched_uniform_plan,
    multipliers,
    openelm_plan,
    round_to_multiple,
    uniform_plan,
)
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM


def nearest_multiple(value: Fraction, divisor: int) -> int:
    """The rule in exact arithmetic: nearest multiple, halves up, at least one, not below 0.9 of the value."""
    nearest = max(divisor, math.floor(value / divisor + Fraction(1, 2)) * divisor)
    return nearest + divisor if nearest < Fraction(9, 10) * value else nearest


def test_rounding_is_the_exact_rule() -> None:
    for divisor in (1, 7, 64, 256):
        for quarters in range(1, 6 * divisor, max(1, divisor // 16)):
            value = Fraction(quarters, 2)
            assert round_to_multiple(float(value), divisor) == nearest_multiple(value, divisor)


@pytest.mark.parametrize(
    ("value", "divisor", "rounded"),
    [
        (1, 256, 256),
        (383, 256, 512),
        (384, 256, 512),
        (284, 256, 256),
        (285, 256, 512),
        (128, 256, 256),
        (640, 256, 768),
    ],
)
def test_rounding_by_hand(value: float, divisor: int, rounded: int) -> None:
    assert round_to_multiple(value, divisor) == rounded


@pytest.mark.parametrize("layers", [2, 3, 7, 16, 29, 100])
@pytest.mark.parametrize("ends", [(0.5, 4.0), (0.5, 1.0), (2.0, 1.0), (1.3, 1.3)])
def test_multipliers_are_a_rounded_linspace(ends: tuple[float, float], layers: int) -> None:
    assert multipliers(*ends, layers) == tuple(round(float(m), 2) for m in np.linspace(*ends, layers))


def test_a_single_layer_takes_the_first_multiplier() -> None:
    assert multipliers(0.5, 4.0, 1) == (0.5,)
    assert openelm_plan(512, 64, 1).ffn_dims == (256,)


def test_equal_ends_give_a_uniform_plan() -> None:
    plan = openelm_plan(512, 64, 4, qkv_multipliers=(1.0, 1.0), ffn_multipliers=(4.0, 4.0))
    assert plan == uniform_plan(512, 64, 4, query_heads=8, ffn_dim=2048)


@pytest.mark.parametrize("size", ["tiny", "5m", "270m"])
@pytest.mark.parametrize("share", [0.6, 0.8, 1.0, 1.7])
def test_a_matched_rule_is_the_nearest_of_all_that_the_rule_can_make(size: str, share: float) -> None:
    plan = model_size(size).plan
    budget = int(plan.non_embedding_parameters * share)
    found = matched_openelm_plan(plan.dim, plan.head_dim, plan.layers, budget, ffn_dim_divisor=64)
    every = (
        openelm_plan(
            plan.dim,
            plan.head_dim,
            plan.layers,
            ffn_multipliers=(0.5 * percent / 100, 4 * percent / 100),
            ffn_dim_divisor=64,
        )
        for percent in range(1, 400)
    )
    best = min(abs(other.non_embedding_parameters - budget) for other in every)
    assert abs(found.non_embedding_parameters - budget) == best
    assert best <= 0.02 * budget
    assert found.query_heads == plan.query_heads


@pytest.mark.parametrize("size", ["tiny", "5m", "270m", "450m", "1.1b", "3b"])
def test_a_matched_uniform_plan_is_within_half_a_width_step(size: str) -> None:
    plan = model_size(size).plan
    uniform = matched_uniform_plan(plan)
    half_step = 3 * plan.dim * 16 * plan.layers // 2
    assert abs(uniform.non_embedding_parameters - plan.non_embedding_parameters) <= half_step
    assert half_step <= 0.02 * plan.non_embedding_parameters
    assert len(set(uniform.query_heads)) == len(set(uniform.kv_heads)) == len(set(uniform.ffn_dims)) == 1
    assert (uniform.dim, uniform.head_dim, uniform.layers) == (plan.dim, plan.head_dim, plan.layers)
    assert uniform.query_heads[0] == 4 * uniform.kv_heads[0]


def test_parameters_are_those_of_the_module(odd_config: ModelConfig, model: OpenELM) -> None:
    plan, named = odd_config.plan, dict(model.named_parameters())

    def counted(wanted: Callable[[str], bool]) -> int:
        return sum(parameter.numel() for name, parameter in named.items() if wanted(name))

    assert plan.parameters(odd_config.vocab_size) == odd_config.parameters == counted(lambda name: True)
    assert plan.non_embedding_parameters == counted(lambda name: "embeddings" not in name)
    assert plan.attention_parameters == counted(lambda name: "_proj" in name)
    assert plan.ffn_parameters == counted(lambda name: "proj_" in name)
    assert plan.norm_parameters == counted(lambda name: "norm" in name)
    assert plan.matmul_parameters(odd_config.vocab_size) == counted(lambda name: "norm" not in name)


def test_cache_bytes_are_those_of_a_real_cache(odd_config: ModelConfig) -> None:
    cache = KeyValueCache(odd_config.plan, 2, 5, dtype=torch.bfloat16)
    bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.keys, *cache.values))
    assert bytes_held == 2 * 5 * odd_config.plan.kv_bytes_per_token(2)
    assert odd_config.plan.kv_bytes_per_token(4) == 2 * odd_config.plan.kv_bytes_per_token(2)


def counted_flops(model: OpenELM, tokens: int, cache: KeyValueCache | None = None) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, cache=cache)
    return counter.get_total_flops()


def test_decode_flops_are_those_that_run(odd_config: ModelConfig, model: OpenELM) -> None:
    plan, cache = odd_config.plan, KeyValueCache(odd_config.plan, 1, 9, dtype=torch.float64)
    for context in range(1, 10):
        assert counted_flops(model, 1, cache) == plan.decode_flops_per_token(31, context)


def test_forward_flops_are_the_sum_over_its_tokens(odd_config: ModelConfig, model: OpenELM) -> None:
    plan, length = odd_config.plan, 9
    decoded = sum(plan.decode_flops_per_token(31, context) for context in range(1, length + 1))
    assert plan.forward_flops_per_token(31, length) * length == decoded
    assert plan.training_flops_per_token(31, length) == 3 * plan.forward_flops_per_token(31, length)
    square = 4 * sum(plan.query_heads) * plan.head_dim * length * length  # the plain algorithm fills the whole square
    assert counted_flops(model, length) == 2 * length * plan.matmul_parameters(31) + square


def test_training_flops_are_three_forwards_in_the_products(odd_config: ModelConfig, model: OpenELM) -> None:
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert counter.get_total_flops() == 3 * counted_flops(model, 9)


def test_a_plan_is_a_value() -> None:
    plan = LayerPlan(dim=8, head_dim=2, query_heads=(2,), kv_heads=(1,), ffn_dims=(3,))
    assert plan == LayerPlan(8, 2, (2,), (1,), (3,))
    assert hash(plan) == hash(LayerPlan(8, 2, (2,), (1,), (3,)))
    assert plan.layers == 1
