"""The forward pass and its gradients against a slow oracle: plain loops in float64, written from the paper's rules.

The oracle imports nothing of the model. Rotary angles are exact; their cosines and sines are rounded to fp32 once, as
the released code computes them in fp32; `exact_tables` leaves that rounding out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from openelm.model.cache import KeyValueCache
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM, Recompute

MakeModel = Callable[..., OpenELM]
EPS, BASE = 1e-6, 10_000.0


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + EPS).sqrt() * weight


def turned(x: Tensor, positions: Tensor, exact_tables: bool) -> Tensor:
    """Rotate component i against component i + size/2 by position · base^(-2i/size)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions.double() * BASE ** (-2 * i / x.shape[-1])
        cos, sin = angle.cos(), angle.sin()
        if not exact_tables:
            cos, sin = cos.float().double(), sin.float().double()
        out[:, i] = x[:, i] * cos - x[:, i + half] * sin
        out[:, i + half] = x[:, i + half] * cos + x[:, i] * sin
    return out


def oracle(
    weights: Mapping[str, Tensor],
    query_heads: Sequence[int],
    kv_heads: Sequence[int],
    tokens: Tensor,
    *,
    documents: Tensor | None = None,
    exact_tables: bool = False,
) -> Tensor:
    """Logits (T, V) of one row of tokens (T,)."""
    embedding = weights["transformer.token_embeddings.weight"]
    length = len(tokens)
    positions = torch.arange(length)
    hidden_from = positions[None, :] > positions[:, None]
    if documents is not None:
        hidden_from = hidden_from | (documents[None, :] != documents[:, None])
    x = embedding[tokens]
    for layer, (queries, keys) in enumerate(zip(query_heads, kv_heads, strict=True)):

        def w(name: str, layer: int = layer) -> Tensor:
            return weights[f"transformer.layers.{layer}.{name}.weight"]

        size = len(w("attn.q_norm"))
        fused = norm(x, w("attn_norm")) @ w("attn.qkv_proj").T
        heads = [fused[:, i * size : (i + 1) * size] for i in range(queries + 2 * keys)]
        mixed = []
        for head in range(queries):
            shared = head // (queries // keys)
            q = turned(norm(heads[head], w("attn.q_norm")), positions, exact_tables)
            k = turned(norm(heads[queries + shared], w("attn.k_norm")), positions, exact_tables)
            v = heads[queries + keys + shared]
            scores = (q @ k.T / size**0.5).masked_fill(hidden_from, -torch.inf)
            powers = (scores - scores.max(-1, keepdim=True).values).exp()
            mixed.append(powers / powers.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(mixed, -1) @ w("attn.out_proj").T
        both = norm(x, w("ffn_norm")) @ w("ffn.proj_1").T
        width = both.shape[-1] // 2
        gate, up = both[:, :width], both[:, width:]
        x = x + (gate / (1 + (-gate).exp()) * up) @ w("ffn.proj_2").T
    return norm(x, weights["transformer.norm.weight"]) @ embedding.T


def oracle_of(model: OpenELM, tokens: Tensor, **options: object) -> Tensor:
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    config = model.config
    return torch.stack(
        [oracle(weights, config.num_query_heads, config.num_kv_heads, row, **options) for row in tokens]  # type: ignore[arg-type]
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected."""
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def farthest(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_float64_is_the_oracle(make_model: MakeModel, tokens: Tensor, seed: int) -> None:
    model = make_model(torch.float64, seed=seed)
    with torch.no_grad():
        assert farthest(model(tokens), oracle_of(model, tokens)) <= 1e-12


def test_rounding_the_rotary_tables_to_fp32_costs_a_few_millionths(model: OpenELM, tokens: Tensor) -> None:
    with torch.no_grad():
        assert farthest(model(tokens), oracle_of(model, tokens, exact_tables=True)) <= 5e-6


def test_fp32_is_the_oracle_to_rounding(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        expected = oracle_of(model, tokens)
        assert farthest(model(tokens), expected) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_near_the_oracle_as_the_plain_formula_in_bf16(
    make_model: MakeModel, tokens: Tensor, seed: int
) -> None:
    model = make_model(torch.bfloat16, seed=seed)
    with torch.no_grad():
        expected, found = oracle_of(model, tokens), model(tokens)
        plain = torch.stack(
            [oracle(model.state_dict(), model.config.num_query_heads, model.config.num_kv_heads, row) for row in tokens]
        )
    assert found.dtype == plain.dtype == torch.bfloat16
    assert relative(found, expected) <= 1.1 * relative(plain, expected) <= 0.06


def test_autocast_keeps_the_residual_stream_wide_and_the_error_smaller(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, found = model.hidden(tokens), model(tokens)
    assert hidden.dtype == torch.float32
    assert relative(found, oracle_of(model, tokens)) <= 0.03


def test_packed_rows_are_the_oracle(model: OpenELM, tokens: Tensor) -> None:
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3], dtype=torch.int32)
    with torch.no_grad():
        found = model(tokens, documents=documents.expand(3, -1))
        assert farthest(found, oracle_of(model, tokens, documents=documents)) <= 1e-12


def test_a_single_token_and_a_single_layer_are_the_oracle(make_model: MakeModel) -> None:
    config = ModelConfig.parse(
        {"vocab_size": 9, "num_transformer_layers": 1, "model_dim": 8, "head_dim": 2, "ffn_dim_divisor": 4}
    )
    model = make_model(torch.float64, config=config)
    for tokens in (torch.tensor([[3]]), torch.tensor([[3, 8, 3]])):
        with torch.no_grad():
            assert farthest(model(tokens), oracle_of(model, tokens)) <= 1e-12


def test_far_positions_are_the_oracle_in_one_pass_and_through_the_cache(make_model: MakeModel) -> None:
    config = ModelConfig.parse(
        {
            "vocab_size": 11,
            "num_transformer_layers": 2,
            "model_dim": 8,
            "head_dim": 4,
            "num_gqa_groups": 2,
            "ffn_dim_divisor": 4,
        }
    )
    model = make_model(torch.float64, config=config)
    tokens = torch.randint(11, (1, 2100), generator=torch.Generator().manual_seed(3))  # beyond the first table's 2,048
    cache = KeyValueCache(config.plan, 1, 2100, dtype=torch.float64)
    with torch.no_grad():
        expected = oracle_of(model, tokens)
        assert farthest(model(tokens), expected) <= 1e-10
        model(tokens[:, :2040], cache=cache)
        for start, end in ((2040, 2047), (2047, 2048), (2048, 2049), (2049, 2100)):
            assert farthest(model(tokens[:, start:end], cache=cache), expected[:, start:end]) <= 1e-10


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_every_gradient_is_the_oracles(model: OpenELM, tokens: Tensor, recompute: Recompute) -> None:
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3], dtype=torch.int32)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    config = model.config
    expected = oracle(weights, config.num_query_heads, config.num_kv_heads, tokens[0], documents=documents)
    (-torch.log_softmax(expected, -1)[:, 5].sum()).backward()
    model.recompute = recompute
    found = model(tokens[:1], documents=documents[None])
    (-torch.log_softmax(found[0], -1)[:, 5].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        reference = weights[name].grad
        assert reference is not None
        assert farthest(parameter.grad, reference) <= 1e-10 * (1 + float(reference.abs().max())), name
