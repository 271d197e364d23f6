"""Adapters on a model: what learns, what they start as, what is computed again, and merging."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from openelm.adapters.adapter import adapter_weights, add_adapter, merge_adapter
from openelm.adapters.config import TARGETS, AdapterConfig
from openelm.errors import ConfigError
from openelm.model.decoding import Decoder
from openelm.model.transformer import Linear

from .conftest import (
    CONFIG,
    DORA,
    DORA_EVERYWHERE,
    LORA,
    TOKENS,
    adapted,
    disturb,
    furthest,
    loss_and_gradients,
    quantized,
    small,
)  # fmt: skip

pytest.importorskip("peft")
KINDS = pytest.mark.parametrize("config", [LORA, DORA, DORA_EVERYWHERE], ids=["lora", "dora", "dora-everywhere"])


@KINDS
def test_a_new_adapter_changes_nothing(config: AdapterConfig) -> None:
    model = small()
    with torch.no_grad():
        expected = model(TOKENS)
        add_adapter(model, config, seed=0)
        assert torch.allclose(model(TOKENS), expected, atol=1e-5)


@KINDS
def test_the_adapter_alone_learns(config: AdapterConfig) -> None:
    model = adapted(config)
    learning = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    assert learning == {tensor.data_ptr() for tensor in adapter_weights(model).values()}


def test_every_matrix_has_factors_of_its_own_widths() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_weights(adapted(LORA)).items()}
    for layer, (heads, kv_heads) in enumerate(zip(CONFIG.plan.query_heads, CONFIG.plan.kv_heads, strict=True)):
        name = f"base_model.model.transformer.layers.{layer}"
        assert shapes[f"{name}.attn.qkv_proj.lora_B.weight"] == ((heads + 2 * kv_heads) * 16, 4)
        assert shapes[f"{name}.ffn.proj_2.lora_A.weight"] == (4, CONFIG.plan.ffn_dims[layer])
    assert len(shapes) == 2 + 3 * 4 * 2


def test_layers_can_be_chosen() -> None:
    chosen = AdapterConfig(rank=4, targets=("qkv_proj",), layers=(0, 2))
    assert {name.split(".")[4] for name in adapter_weights(adapted(chosen))} == {"0", "2"}


def test_an_adapter_is_drawn_from_its_seed_alone() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = small()
        torch.rand(seed + 1)
        add_adapter(model, LORA, seed=seed)
        return adapter_weights(model)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_making_an_adapter_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    add_adapter(small(), DORA, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@KINDS
@pytest.mark.parametrize("recompute", ["selective", "full", ("none", "full", "selective")])
def test_what_is_computed_again_drops_the_same_numbers(config: AdapterConfig, recompute: Any, monkeypatch: Any) -> None:
    model = adapted(config.model_copy(update={"dropout": 0.3})).train()
    found = []
    for kind in ("none", recompute):
        model.recompute = kind
        torch.manual_seed(0)
        found.append(loss_and_gradients(model)[1])
    monkeypatch.setattr("openelm.model.transformer._block_keeping_attention", _plain_block())
    model.recompute = "none"
    torch.manual_seed(0)
    expected = loss_and_gradients(model)[1]
    assert max(furthest(gradients, expected) for gradients in found) < 1e-5


def _plain_block() -> Any:
    from openelm.model.transformer import block

    return block


def test_dropout_is_off_in_evaluation() -> None:
    model = adapted(LORA.model_copy(update={"dropout": 0.5})).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), model(TOKENS))
        model.train()
        assert not torch.equal(model(TOKENS), model(TOKENS))


@KINDS
def test_the_output_matrix_has_the_embeddings_adapter(config: AdapterConfig) -> None:
    model = adapted(config)
    with torch.no_grad():
        hidden = model.hidden(TOKENS)
        expected = hidden @ model.head_weight.T
        assert torch.allclose(model.logits(hidden), expected, atol=1e-5)
        model_embedding: Any = model.transformer.token_embeddings
        assert torch.allclose(model_embedding(torch.arange(300)), model.head_weight, atol=1e-5)


@KINDS
def test_the_head_in_parts_is_the_whole_head(config: AdapterConfig) -> None:
    model = adapted(config)
    (loss, found), (expected_loss, expected) = (loss_and_gradients(model, whole_head=whole) for whole in (False, True))
    assert torch.allclose(loss, expected_loss)
    assert furthest(found, expected) < 1e-5


def test_an_output_matrix_of_its_own_has_no_adapter() -> None:
    model = adapted(LORA, small(share_input_output_layers=False))
    assert model.lm_head is not None
    assert model.head_weight is model.lm_head.weight


@KINDS
def test_merged_is_adapted(config: AdapterConfig) -> None:
    model = adapted(config)
    with torch.no_grad():
        expected = model(TOKENS)
        merge_adapter(model)
        assert torch.allclose(model(TOKENS), expected, atol=1e-5)


def test_a_merged_model_is_a_plain_one() -> None:
    model = adapted(LORA)
    merge_adapter(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in small().modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == small().state_dict().keys()


def test_a_bf16_model_is_merged_with_one_rounding() -> None:
    model = adapted(LORA, small().to(torch.bfloat16))
    assert all(tensor.dtype == torch.float32 for tensor in adapter_weights(model).values())
    module: Any = model.get_submodule("transformer.layers.1.ffn.proj_1")
    down, up = (factor.detach().double() for factor in module.factors)
    expected = (module.base_layer.weight.double() + 2 * up @ down).to(torch.bfloat16)
    merge_adapter(model)
    assert torch.equal(model.get_submodule("transformer.layers.1.ffn.proj_1").weight, expected)


def test_steps_of_generation_see_the_adapter() -> None:
    model = adapted(LORA).eval()
    slots = Decoder(model, slots=1, length=32)
    slots.prefill(0, TOKENS[0, :20].tolist())
    found = slots.step([int(TOKENS[0, 20])], [0])
    with torch.no_grad():
        assert torch.allclose(found[0], model(TOKENS)[0, 20], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@KINDS
def test_on_quantised_matrices_it_is_that_on_what_they_stand_for(config: AdapterConfig, bits: int) -> None:
    model, plain = quantized(bits, small()), quantized(bits, small())
    dequantise(plain)
    results = []
    for one in (model, plain):
        adapted(config.model_copy(update={"dropout": 0.2}), one).train()
        torch.manual_seed(0)
        results.append((*loss_and_gradients(one), one.eval()(TOKENS).detach()))
    (loss, found, logits), (expected_loss, expected, expected_logits) = results
    assert torch.allclose(loss, expected_loss, rtol=1e-6)
    assert furthest(found, expected) < 1e-5
    assert torch.allclose(logits, expected_logits, atol=1e-5)


def test_gradients_pass_quantised_matrices_without_adapters() -> None:
    config = AdapterConfig(rank=4, dropout=0.0, targets=("qkv_proj",))
    model, plain = quantized(4, small()), quantized(4, small())
    dequantise(plain)
    found, expected = (loss_and_gradients(adapted(config, one))[1] for one in (model, plain))
    assert furthest(found, expected) < 1e-5


def test_a_quantised_model_merges_to_a_plain_one() -> None:
    model = adapted(AdapterConfig(rank=4, targets=("qkv_proj",)), quantized(8, small())).eval()
    with torch.no_grad():
        expected = model(TOKENS)
        merge_adapter(model)
        assert model.quantization is None
        assert isinstance(model.get_submodule("transformer.layers.0.ffn.proj_1"), Linear)
        assert torch.allclose(model(TOKENS), expected, atol=1e-5)


def dequantise(model: Any) -> None:
    """Let a quantised model hold plain matrices of the same numbers."""
    add_adapter(model, AdapterConfig(rank=1, targets=("qkv_proj",)), seed=0)
    merge_adapter(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 40}, "rank 40 is more than the smaller side of transformer.layers.0.attn.out_proj, 32"),
        ({"layers": (1, 3)}, "no layer 3; layers are 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        add_adapter(small(), AdapterConfig(**fields), seed=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"targets": ["lm_head"]}, "'lm_head' is no matrix with adapters; these are: token_embeddings, qkv_proj"),
        ({"targets": []}, "at least 1 item"),
        ({"kind": "ia3"}, "'lora' or 'dora'"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AdapterConfig.parse(fields)


def test_the_defaults_are_the_published_ones() -> None:
    config = AdapterConfig()
    assert (config.rank, config.alpha, config.dropout, config.targets) == (32, 32, 0.1, TARGETS)
    assert AdapterConfig(kind="dora").targets == TARGETS[1:]


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="has an adapter already"):
        disturb(model := adapted(LORA))
        add_adapter(model, LORA, seed=0)


def test_there_must_be_an_adapter_to_merge() -> None:
    with pytest.raises(ConfigError, match="has no adapter"):
        merge_adapter(small())


def test_without_peft_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'openelm-framework\[tune\]'"):
        add_adapter(small(), LORA, seed=0)


def test_a_frozen_matrix_gets_no_gradient() -> None:
    model = adapted(LORA)
    loss_and_gradients(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(model.get_submodule("transformer.layers.0.attn.qkv_proj.base_layer"), nn.Linear)
