"""A config.json: explicit lists count, wrong ones are refused by name, hostile ones stay cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import CheckpointError, ConfigError, OpenELMError
from openelm.model.config import ModelConfig
from openelm.model.plan import LayerPlan, matched_openelm_plan, openelm_plan, uniform_plan
from openelm.model.sizes import ModelChoice, model_size

BASE: dict[str, Any] = {
    "model_type": "openelm",
    "vocab_size": 50,
    "num_transformer_layers": 3,
    "model_dim": 32,
    "head_dim": 8,
    "num_gqa_groups": 2,
    "ffn_dim_divisor": 8,
}
LISTS = {"num_query_heads": [2, 4, 6], "num_kv_heads": [2, 1, 3], "ffn_multipliers": [0.5, 0.25, 3.0]}


def test_lists_that_are_left_out_follow_the_rule() -> None:
    config = ModelConfig.parse({**BASE, "qkv_multipliers": [0.5, 1.5], "ffn_multipliers": [1.0, 3.0]})
    rule = openelm_plan(
        32, 8, 3, qkv_multipliers=(0.5, 1.5), ffn_multipliers=(1.0, 3.0), gqa_groups=2, ffn_dim_divisor=8
    )
    assert config.plan == rule
    assert config.ffn_multipliers == (1.0, 2.0, 3.0)


def test_explicit_lists_win_over_the_rule() -> None:
    plan = ModelConfig.parse({**BASE, **LISTS}).plan
    assert plan == LayerPlan(32, 8, query_heads=(2, 4, 6), kv_heads=(2, 1, 3), ffn_dims=(16, 8, 96))


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_list_of_wrong_length_is_refused_by_name(name: str, change: int) -> None:
    if name == "ffn_multipliers" and change < 0:
        change = -2  # two values are the ends of the rule
    values = [*LISTS[name], 1][: 3 + change]
    with pytest.raises(ConfigError, match=f"{name} has {3 + change} entries for 3 layers"):
        ModelConfig.parse({**BASE, **LISTS, name: values})


def test_query_heads_must_be_whole_groups() -> None:
    with pytest.raises(ConfigError, match="layer 1: 4 query heads are not a multiple of 3 KV heads"):
        ModelConfig.parse({**BASE, **LISTS, "num_kv_heads": [1, 3, 3]})


def test_a_config_without_bos_and_eos_is_possible() -> None:
    config = ModelConfig.parse({**BASE, "bos_token_id": None, "eos_token_id": None})
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


@pytest.mark.parametrize(
    "plan",
    [
        LayerPlan(20, 6, (2, 6, 3), (1, 2, 3), (7, 28, 49)),
        LayerPlan(20, 6, (1,), (1,), (1,)),
        LayerPlan(24, 4, (3, 3), (1, 3), (13, 17)),
        uniform_plan(96, 32, 5, query_heads=8, ffn_dim=272),
        model_size("3b").plan,
    ],
    ids=["odd", "one layer", "two layers", "uniform", "3b"],
)
def test_any_plan_can_be_written_as_a_config_and_read_back(plan: LayerPlan, tmp_path: Path) -> None:
    config = ModelConfig.from_plan(plan, vocab_size=77)
    assert config.plan == plan
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert ModelConfig.from_file(tmp_path / "config.json") == config


HOSTILE: list[dict[str, Any]] = [
    {"vocab_size": 10**12},
    {"vocab_size": 0},
    {"num_transformer_layers": 10**9},
    {"num_transformer_layers": 0},
    {"num_transformer_layers": -3},
    {"num_transformer_layers": 3.5},
    {"num_transformer_layers": None},
    {"model_dim": 10**400},
    {"model_dim": 0},
    {"head_dim": 7},
    {"head_dim": 0},
    {"head_dim": 10**9},
    {"num_gqa_groups": 0},
    {"num_query_heads": [2, 2, 10**9]},
    {"num_query_heads": [0, 2, 2]},
    {"num_query_heads": 5},
    {"num_query_heads": "222"},
    {"num_query_heads": {"0": 2}},
    {"num_query_heads": [2, 2, None]},
    {"num_kv_heads": 5},
    {"num_kv_heads": [1, 1, -1]},
    {"ffn_multipliers": 3},
    {"ffn_multipliers": "ab"},
    {"ffn_multipliers": ["a", "b"]},
    {"ffn_multipliers": [None, None]},
    {"ffn_multipliers": [1.0, float("inf")]},
    {"ffn_multipliers": [1.0, float("nan")]},
    {"ffn_multipliers": [1.0, 1e300, 1.0]},
    {"ffn_multipliers": [-1.0, 1.0, 1.0]},
    {"ffn_multipliers": []},
    {"qkv_multipliers": [0.5]},
    {"qkv_multipliers": [0.5, 1e300]},
    {"qkv_multipliers": [float("nan"), 1.0]},
    {"qkv_multipliers": [-1, -1]},
    {"qkv_multipliers": {}},
    {"ffn_dim_divisor": 0},
    {"ffn_dim_divisor": -8},
    {"ffn_with_glu": False},
    {"activation_fn_name": "gelu"},
    {"normalization_layer_name": "layer_norm"},
    {"normalize_qk_projections": "perhaps"},
    {"share_input_output_layers": "perhaps"},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": 0},
    {"rope_freq_constant": float("inf")},
    {"rope_freq_constant": -1},
    {"rope_max_length": 10**12},
    {"max_context_length": 0},
    {"bos_token_id": -5},
    {"eos_token_id": 10**9},
]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: f"{change}"[:60])
def test_a_hostile_value_is_refused_by_the_name_of_its_field(change: dict[str, Any], tmp_path: Path) -> None:
    (name,) = change
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **change}))
    with pytest.raises(OpenELMError, match=name) as caught:
        ModelConfig.from_file(tmp_path / "config.json")
    assert caught.value.file == tmp_path / "config.json"
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["vocab_size", "num_transformer_layers", "model_dim", "head_dim"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"missing key '{name}'"):
        ModelConfig.parse({key: value for key, value in BASE.items() if key != name})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model_type": "llama"}',
        b'{"model_type": ["openelm"]}',
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_file_that_is_no_openelm_config_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_file(tmp_path / "config.json")
    assert caught.value.file == tmp_path / "config.json"
    assert str(caught.value).isprintable()


def test_a_file_whose_values_fit_no_openelm_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **LISTS, "num_kv_heads": [1]}))
    with pytest.raises(CheckpointError, match="num_kv_heads has 1 entries for 3 layers"):
        ModelConfig.from_file(tmp_path / "config.json")


def test_a_choice_by_name_is_the_named_size_with_our_vocabulary_and_context() -> None:
    config = ModelChoice(size="270m", context=128, dim=64).config(300)
    assert config.plan == model_size("270m").plan
    assert (config.vocab_size, config.max_context_length, config.rope_max_length) == (300, 128, 256)


def test_a_choice_of_widths_follows_the_rule() -> None:
    choice = ModelChoice(
        layers=3,
        dim=64,
        head_dim=8,
        gqa_groups=2,
        qkv_multipliers=(1.0, 0.5),
        ffn_multipliers=(2.0, 1.0),
        ffn_dim_divisor=16,
    )
    rule = openelm_plan(
        64, 8, 3, qkv_multipliers=(1.0, 0.5), ffn_multipliers=(2.0, 1.0), gqa_groups=2, ffn_dim_divisor=16
    )
    assert choice.config(99).plan == rule


def test_a_uniform_choice_has_equal_layers_and_as_many_parameters() -> None:
    for size in ("tiny", "5m"):
        scaled, uniform = (ModelChoice(size=size, rule=rule).config(500).plan for rule in ("openelm", "uniform"))
        assert len(set(uniform.query_heads)) == len(set(uniform.ffn_dims)) == 1
        assert uniform.non_embedding_parameters == pytest.approx(scaled.non_embedding_parameters, rel=0.02)


@pytest.mark.parametrize("rule", ["openelm", "uniform"])
def test_a_choice_meets_its_budget(rule: str) -> None:
    choice = ModelChoice.parse(
        {"layers": 6, "dim": 128, "head_dim": 32, "ffn_dim_divisor": 16, "parameters": 2_000_000, "rule": rule}
    )
    assert choice.config(99).plan.non_embedding_parameters == pytest.approx(2_000_000, rel=0.02)


def test_a_budget_keeps_the_widths_of_the_named_size() -> None:
    found = ModelChoice(size="5m", parameters=5_100_000).config(99).plan
    assert found == matched_openelm_plan(256, 64, 6, 5_100_000, ffn_dim_divisor=64)


def test_a_budget_keeps_the_chosen_attention() -> None:
    fields: dict[str, Any] = {"layers": 4, "dim": 128, "head_dim": 16, "gqa_groups": 2, "ffn_dim_divisor": 16}
    free = ModelChoice(**fields, qkv_multipliers=(1.0, 1.0)).config(99).plan
    bound = ModelChoice(**fields, qkv_multipliers=(1.0, 1.0), parameters=free.non_embedding_parameters).config(99).plan
    assert bound.query_heads == free.query_heads


@pytest.mark.parametrize("parameters", [1, 10**12])
def test_a_budget_that_no_width_can_meet_is_refused(parameters: int) -> None:
    with pytest.raises(ConfigError):
        ModelChoice(layers=4, dim=128, head_dim=16, ffn_dim_divisor=16, parameters=parameters).config(99)


@pytest.mark.parametrize(
    "fields", [{"size": "271m"}, {"layers": 10**9}, {"dim": 10**9}, {"head_dim": 3}, {"context": 10**9}]
)
def test_an_impossible_choice_is_a_config_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ModelChoice.parse(fields).config(99)
