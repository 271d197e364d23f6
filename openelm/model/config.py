"""The model's config: the published `config.json` fields, with every layer's widths explicit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from openelm.config import Config
from openelm.errors import CheckpointError, ConfigError
from openelm.model.plan import LayerPlan, PlanWithoutHeadNorms, multipliers, openelm_plan, round_to_multiple

# Bounds keep a hostile config.json from asking for absurd amounts of memory before its weights are checked.
Layers = Annotated[int, Field(ge=1, le=512)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Heads = tuple[Annotated[int, Field(ge=1, le=4_096)], ...]
_CONFIG_BYTES_MAX = 4 << 20
Multiplier = Annotated[float, Field(gt=0, le=64)]


class ModelConfig(Config):
    """Everything that fixes the model's shape, under the field names of the published `config.json`.

    `ffn_multipliers` may hold the rule's two ends or one value a layer; the head lists may be left out. The
    config always ends with all lists explicit, and explicit head lists win over the rule, as in the files
    that exist.
    """

    model_type: Literal["openelm"] = "openelm"
    architectures: tuple[str, ...] = ("OpenELMForCausalLM",)
    vocab_size: Annotated[int, Field(ge=2, le=1_048_576)]
    max_context_length: Annotated[int, Field(ge=1, le=1_048_576)] = 2048
    num_transformer_layers: Layers
    model_dim: Width
    head_dim: Annotated[int, Field(ge=2, le=1_024, multiple_of=2)]
    num_gqa_groups: Annotated[int, Field(ge=1, le=1_024)] = 4
    num_query_heads: Heads = ()
    num_kv_heads: Heads = ()
    qkv_multipliers: tuple[Multiplier, Multiplier] = (0.5, 1.0)
    ffn_multipliers: tuple[Multiplier, ...] = (0.5, 4.0)
    ffn_dim_divisor: Annotated[int, Field(ge=1, le=65_536)] = 256
    ffn_with_glu: Literal[True] = True
    activation_fn_name: Literal["swish"] = "swish"
    normalization_layer_name: Literal["rms_norm"] = "rms_norm"
    normalize_qk_projections: bool = True
    """Whether queries and keys are normalised before they are rotated, as in every published OpenELM."""
    share_input_output_layers: bool = True
    """Whether the output matrix is the embedding; otherwise it is `lm_head.weight`."""
    rms_norm_eps: Annotated[float, Field(gt=0, le=0.1)] = 1e-6
    rope_freq_constant: Annotated[float, Field(gt=1)] = 10_000
    rope_max_length: Annotated[int, Field(ge=1, le=16_777_216)] = 4096
    rope_bf16_frequencies: bool = False
    """Whether rotary frequencies are rounded to bf16, as they were while the published 3B was trained."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    @model_validator(mode="before")
    @classmethod
    def _make_lists_explicit(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        try:
            layers, dim, head_dim = (int(values[key]) for key in ("num_transformer_layers", "model_dim", "head_dim"))
            groups = int(values.get("num_gqa_groups", 4))
            ends = tuple(values.get("qkv_multipliers", (0.5, 1.0)))
            ffn = tuple(values.get("ffn_multipliers", (0.5, 4.0)))
            if not (1 <= layers <= 512 and dim > 0 and head_dim > 0 and groups > 0):
                return values
            spread = multipliers(ffn[0], ffn[1], layers) if len(ffn) == 2 and layers != 2 else None
            rule = openelm_plan(dim, head_dim, layers, qkv_multipliers=ends, gqa_groups=groups)
        except (KeyError, TypeError, ValueError, OverflowError):
            return values  # the field validators say what is wrong
        values["num_query_heads"] = values.get("num_query_heads") or rule.query_heads
        values["num_kv_heads"] = values.get("num_kv_heads") or rule.kv_heads
        if spread is not None:
            values["ffn_multipliers"] = spread
        return values

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            if (count := len(getattr(self, name))) != self.num_transformer_layers:
                raise ValueError(f"{name} has {count} entries for {self.num_transformer_layers} layers")
        for layer, (query, kv) in enumerate(zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            if query % kv:
                raise ValueError(f"layer {layer}: {query} query heads are not a multiple of {kv} KV heads")
        for name in ("bos_token_id", "eos_token_id"):
            if not -1 < (getattr(self, name) or 0) < self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is not in a vocabulary of {self.vocab_size}")
        return self

    @property
    def plan(self) -> LayerPlan:
        """The widths of every layer."""
        ffn_dims = (round_to_multiple(self.model_dim * m, self.ffn_dim_divisor) for m in self.ffn_multipliers)
        kind = LayerPlan if self.normalize_qk_projections else PlanWithoutHeadNorms
        return kind(
            dim=self.model_dim,
            head_dim=self.head_dim,
            query_heads=self.num_query_heads,
            kv_heads=self.num_kv_heads,
            ffn_dims=tuple(ffn_dims),
        )

    @property
    def parameters(self) -> int:
        untied = 0 if self.share_input_output_layers else self.vocab_size * self.model_dim
        return self.plan.parameters(self.vocab_size) + untied

    @classmethod
    def from_plan(cls, plan: LayerPlan, **fields: Any) -> ModelConfig:
        """Describe any plan by the published fields; `fields` are the others (`vocab_size`, …)."""
        divisor = gcd(*plan.ffn_dims)
        return cls.parse(
            {
                "num_transformer_layers": plan.layers,
                "model_dim": plan.dim,
                "head_dim": plan.head_dim,
                "num_gqa_groups": plan.query_heads[0] // plan.kv_heads[0],
                "num_query_heads": plan.query_heads,
                "num_kv_heads": plan.kv_heads,
                "ffn_multipliers": tuple(ffn / plan.dim for ffn in plan.ffn_dims),
                "ffn_dim_divisor": divisor,
                "normalize_qk_projections": plan.normalizes_qk,
                **fields,
            }
        )

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a `config.json`; keys that are not about the model's shape are left to those who wrote them.

        Raises:
            CheckpointError: the file is missing, is not a JSON object, or describes no OpenELM.
        """
        try:
            if path.stat().st_size > _CONFIG_BYTES_MAX:
                raise ValueError
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"cannot read the model's config: {error.strerror}", file=path, fix="give a model folder"
            ) from None
        except (ValueError, RecursionError):
            raise CheckpointError("config.json is not valid JSON", file=path) from None
        if not isinstance(values, dict) or values.get("model_type") != "openelm":
            raise CheckpointError(
                f"model_type is {values.get('model_type') if isinstance(values, dict) else None!r}, not 'openelm'",
                file=path,
                fix="give an OpenELM folder; openelm convert makes one of a Llama",
            )
        try:
            return cls.parse({key: value for key, value in values.items() if key in cls.model_fields}, file=path)
        except ConfigError as error:
            raise CheckpointError(error.what, file=path) from None
