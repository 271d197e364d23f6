"""The four published models: lists, counts, names. Golden values: their config.json files and arXiv 2404.14619."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from openelm.errors import ConfigError
from openelm.model.config import ModelConfig
from openelm.model.plan import multipliers, openelm_plan, round_to_multiple
from openelm.model.sizes import SIZES, model_size
from openelm.model.transformer import OpenELM


@dataclass(frozen=True)
class Published:
    layers: int
    dim: int
    head_dim: int
    heads: tuple[tuple[int, int], ...]  # (query heads, layers that have as many)
    ffn_dims: str
    parameters: dict[int, int]  # vocabulary -> all weights
    attention: int
    ffn: int
    norm: int
    kv_bytes: int
    betas: str


PUBLISHED = {
    "270m": Published(
        layers=16,
        dim=1280,
        head_dim=64,
        heads=((12, 5), (16, 7), (20, 4)),
        ffn_dims="768 1024 1280 1536 1792 2048 2560 2816 3072 3328 3584 3840 4352 4608 4864 5120",
        parameters={32_000: 271_527_168, 32_128: 271_691_008, 0: 230_567_168},
        attention=51_609_600,
        ffn=178_913_280,
        norm=44_288,
        kv_bytes=16_128,
        betas=".5 .73 .97 1.2 1.43 1.67 1.9 2.13 2.37 2.6 2.83 3.07 3.3 3.53 3.77 4.0",
    ),
    "450m": Published(
        layers=20,
        dim=1536,
        head_dim=64,
        heads=((12, 3), (16, 7), (20, 6), (24, 4)),
        ffn_dims="768 1024 1280 1536 1792 2304 2560 2816 3072 3328 3584 3840 4096 4352 4608 5120 5376 5632 5888 6144",
        parameters={32_000: 457_179_136, 32_128: 457_375_744, 0: 408_027_136},
        attention=89_456_640,
        ffn=318_504_960,
        norm=65_536,
        kv_bytes=23_296,
        betas=".5 .68 .87 1.05 1.24 1.42 1.61 1.79 1.97 2.16 2.34 2.53 2.71 2.89 3.08 3.26 3.45 3.63 3.82 4.0",
    ),
    "1.1b": Published(
        layers=28,
        dim=2048,
        head_dim=64,
        heads=((16, 3), (20, 7), (24, 8), (28, 6), (32, 4)),
        ffn_dims="1024 1280 1536 1792 2048 2304 2560 2816 3072 3328 3584 3840 4096 4608 4608 5120 5376 5632 5888 6144 "
        "6400 6656 6912 7168 7424 7680 7936 8192",
        parameters={32_000: 1_079_891_456, 32_128: 1_080_153_600, 0: 1_014_355_456},
        attention=221_511_680,
        ffn=792_723_456,
        norm=120_320,
        kv_bytes=43_264,
        betas=".5 .63 .76 .89 1.02 1.15 1.28 1.41 1.54 1.67 1.8 1.93 2.06 2.19 2.31 2.44 2.57 2.7 2.83 2.96 3.09 3.22 "
        "3.35 3.48 3.61 3.74 3.87 4.0",
    ),
    "3b": Published(
        layers=36,
        dim=3072,
        head_dim=128,
        heads=((12, 4), (16, 14), (20, 12), (24, 6)),
        ffn_dims="1536 1792 2048 2560 2816 3072 3328 3584 4096 4352 4608 4864 5120 5632 5888 6144 6400 6656 7168 7424 "
        "7680 7936 8192 8704 8960 9216 9472 9728 10240 10496 10752 11008 11264 11776 12032 12288",
        parameters={32_000: 3_036_647_424, 32_128: 3_037_040_640, 0: 2_938_343_424},
        attention=644_874_240,
        ffn=2_293_235_712,
        norm=233_472,
        kv_bytes=83_968,
        betas=" ".join(f"{tenths / 10}" for tenths in range(5, 41)),
    ),
}


@pytest.fixture(params=PUBLISHED)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def published_config(size: str) -> dict[str, object]:
    """The published config.json of a size, every field of it."""
    facts = PUBLISHED[size]
    query_heads = [heads for heads, layers in facts.heads for _ in range(layers)]
    return {
        "activation_fn_name": "swish",
        "architectures": ["OpenELMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openelm.OpenELMConfig",
            "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "ffn_dim_divisor": 256,
        "ffn_multipliers": [float(beta) for beta in facts.betas.split()],
        "ffn_with_glu": True,
        "head_dim": facts.head_dim,
        "initializer_range": 0.02,
        "max_context_length": 2048,
        "model_dim": facts.dim,
        "model_type": "openelm",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": 4,
        "num_kv_heads": [heads // 4 for heads in query_heads],
        "num_query_heads": query_heads,
        "num_transformer_layers": facts.layers,
        "qkv_multipliers": [0.5, 1.0],
        "rms_norm_eps": 1e-06,
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "share_input_output_layers": True,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": 32000,
    }


def test_heads_and_widths_are_the_published_lists(size: str) -> None:
    facts, plan = PUBLISHED[size], model_size(size).plan
    query_heads = tuple(heads for heads, layers in facts.heads for _ in range(layers))
    assert (plan.layers, plan.dim, plan.head_dim) == (facts.layers, facts.dim, facts.head_dim)
    assert plan.query_heads == query_heads
    assert plan.kv_heads == tuple(heads // 4 for heads in query_heads)
    assert plan.ffn_dims == tuple(int(width) for width in facts.ffn_dims.split())


def test_the_plan_rule_gives_the_same_as_the_named_size(size: str) -> None:
    facts = PUBLISHED[size]
    assert openelm_plan(facts.dim, facts.head_dim, facts.layers) == model_size(size).plan


def test_multipliers_are_the_published_list(size: str) -> None:
    facts = PUBLISHED[size]
    assert multipliers(0.5, 4.0, facts.layers) == tuple(float(beta) for beta in facts.betas.split())
    assert model_size(size).ffn_multipliers == tuple(float(beta) for beta in facts.betas.split())


def test_parameter_counts_are_the_published_ones(size: str) -> None:
    facts, config = PUBLISHED[size], model_size(size)
    plan = config.plan
    assert {vocab: plan.parameters(vocab) for vocab in facts.parameters} == facts.parameters
    assert config.parameters == facts.parameters[32_000]
    assert model_size(size, vocab_size=32_128).parameters == facts.parameters[32_128]
    assert plan.non_embedding_parameters == facts.parameters[0]
    split = (plan.attention_parameters, plan.ffn_parameters, plan.norm_parameters)
    assert split == (facts.attention, facts.ffn, facts.norm)


def test_a_token_takes_the_published_cache_bytes(size: str) -> None:
    assert model_size(size).plan.kv_bytes_per_token(2) == PUBLISHED[size].kv_bytes


def test_the_module_has_the_published_tensors(size: str) -> None:
    facts, config = PUBLISHED[size], model_size(size)
    with torch.device("meta"):
        tensors = OpenELM(config).state_dict()
    d, hd = facts.dim, facts.head_dim
    expected = {"transformer.token_embeddings.weight": (32_000, d), "transformer.norm.weight": (d,)}
    query_heads = [heads for heads, layers in facts.heads for _ in range(layers)]
    for layer, (heads, f) in enumerate(zip(query_heads, map(int, facts.ffn_dims.split()), strict=True)):
        expected |= {
            f"transformer.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (d,),
                "attn.qkv_proj": ((heads + 2 * (heads // 4)) * hd, d),
                "attn.q_norm": (hd,),
                "attn.k_norm": (hd,),
                "attn.out_proj": (d, heads * hd),
                "ffn_norm": (d,),
                "ffn.proj_1": (2 * f, d),
                "ffn.proj_2": (d, f),
            }.items()
        }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert len(tensors) == 8 * facts.layers + 2
    assert sum("norm" in name for name in tensors) == 4 * facts.layers + 1
    assert sum(tensor.numel() for tensor in tensors.values()) == facts.parameters[32_000]


def test_the_published_config_is_read_and_written_back(size: str) -> None:
    published = published_config(size)
    ours = {key: value for key, value in published.items() if key in ModelConfig.model_fields}
    config = ModelConfig.parse(ours)
    assert config == model_size(size)
    written = config.model_dump(mode="json")
    assert {key: written[key] for key in ours} == ours
    assert published.keys() - ours.keys() == {"auto_map", "torch_dtype", "transformers_version"}


def test_rounding_the_multipliers_gives_4608_twice_in_the_1b_model() -> None:
    assert model_size("1.1b").plan.ffn_dims[13:15] == (4608, 4608)


@pytest.mark.parametrize(
    ("size", "heads_differ", "ffn_differ"),
    [("270m", {5}, set()), ("450m", set(), set()), ("1.1b", {3, 10, 17}, {13, 14}), ("3b", {17}, set())],
)
def test_leaving_out_the_two_decimal_rounding_would_change_shapes(
    size: str, heads_differ: set[int], ffn_differ: set[int]
) -> None:
    plan, last = model_size(size).plan, PUBLISHED[size].layers - 1
    heads = [
        round_to_multiple(plan.dim * (0.5 + 0.5 * layer / last), 4 * plan.head_dim) // plan.head_dim
        for layer in range(plan.layers)
    ]
    ffn = [round_to_multiple(plan.dim * (0.5 + 3.5 * layer / last), 256) for layer in range(plan.layers)]
    assert {layer for layer in range(plan.layers) if heads[layer] != plan.query_heads[layer]} == heads_differ
    assert {layer for layer in range(plan.layers) if ffn[layer] != plan.ffn_dims[layer]} == ffn_differ


@pytest.mark.parametrize(
    ("name", "same"), [("OpenELM-1_1B", "1.1b"), ("1_1b", "1.1b"), ("270M", "270m"), ("openelm-3B", "3b")]
)
def test_a_size_has_the_names_people_use(name: str, same: str) -> None:
    assert model_size(name) == model_size(same)


def test_an_unknown_size_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        model_size("271m")
    assert "did you mean '270m'?" in caught.value.fix
    assert all(size in caught.value.fix for size in SIZES)
