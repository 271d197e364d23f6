"""The named sizes: the four published models and the small ones this project measures itself with."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field

from openelm.config import Config
from openelm.errors import ConfigError
from openelm.model.config import ModelConfig
from openelm.model.plan import LayerPlan, matched_openelm_plan, matched_uniform_plan

# layers, dim, head size (Table 9 of arXiv 2404.14619); 32,000 is the vocabulary of the Hugging Face release.
_PUBLISHED: dict[str, tuple[int, int, int]] = {
    "270m": (16, 1280, 64),
    "450m": (20, 1536, 64),
    "1.1b": (28, 2048, 64),
    "3b": (36, 3072, 128),
}
_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {"num_transformer_layers": 8, "model_dim": 512, "head_dim": 64, "vocab_size": 32_128},
    "5m": {
        "num_transformer_layers": 6,
        "model_dim": 256,
        "head_dim": 64,
        "vocab_size": 8_192,
        "ffn_dim_divisor": 64,
    },
}
SIZES = (*_SMALL, *_PUBLISHED)


def model_size(name: str, **fields: Any) -> ModelConfig:
    """Make the config of a named size; `fields` replace single values, such as `vocab_size=32128`.

    Raises:
        ConfigError: no such size; lists the names.
    """
    key = name.lower().removeprefix("openelm-").replace("_", ".")
    if key in _SMALL:
        return ModelConfig.parse({**_SMALL[key], **fields})
    if key in _PUBLISHED:
        layers, dim, head_dim = _PUBLISHED[key]
        shape = {
            "num_transformer_layers": layers,
            "model_dim": dim,
            "head_dim": head_dim,
            "vocab_size": 32_000,
        }
        return ModelConfig.parse({**shape, **fields})
    near = difflib.get_close_matches(key, SIZES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no size is called {name!r}", fix=f"{hint}sizes: {', '.join(SIZES)}")


Positive = Annotated[int, Field(ge=1)]


class ModelChoice(Config):
    """What a recipe says about the model: a named size, or its own depth and width under the published rule."""

    size: str | None = None
    """A named size; its depth, widths and multipliers then replace the ones below."""
    layers: Positive = 8
    dim: Positive = 512
    head_dim: Positive = 64
    gqa_groups: Positive = 4
    """Query heads per KV head."""
    qkv_multipliers: tuple[float, float] = (0.5, 1.0)
    ffn_multipliers: tuple[float, float] = (0.5, 4.0)
    ffn_dim_divisor: Positive = 256
    rule: Literal["openelm", "uniform"] = "openelm"
    """`uniform`: every layer alike, with as many parameters as the `openelm` rule gives."""
    parameters: Positive | None = None
    """A budget without embeddings: feed-forward widths are scaled to meet it."""
    context: Positive = 2048
    """Longest sequence, in tokens."""

    def config(self, vocab_size: int) -> ModelConfig:
        """Resolve to a model config.

        Raises:
            ConfigError: the size is unknown or the widths do not fit together.
        """
        fields: dict[str, Any] = {
            "vocab_size": vocab_size,
            "max_context_length": self.context,
            "rope_max_length": 2 * self.context,
        }
        if self.size is not None:
            config = model_size(self.size, **fields)
        else:
            config = ModelConfig.parse(
                {
                    "num_transformer_layers": self.layers,
                    "model_dim": self.dim,
                    "head_dim": self.head_dim,
                    "num_gqa_groups": self.gqa_groups,
                    "qkv_multipliers": self.qkv_multipliers,
                    "ffn_multipliers": self.ffn_multipliers,
                    "ffn_dim_divisor": self.ffn_dim_divisor,
                    **fields,
                }
            )
        plan = self._fitted(config)
        return config if plan == config.plan else ModelConfig.from_plan(plan, **fields)

    def _fitted(self, config: ModelConfig) -> LayerPlan:
        plan = config.plan
        if self.parameters is not None:
            plan = matched_openelm_plan(
                plan.dim,
                plan.head_dim,
                plan.layers,
                self.parameters,
                qkv_multipliers=config.qkv_multipliers,
                gqa_groups=config.num_gqa_groups,
                ffn_dim_divisor=config.ffn_dim_divisor,
            )
            if abs((found := plan.non_embedding_parameters) - self.parameters) > 0.1 * self.parameters:
                raise ConfigError(
                    f"{self.parameters:,} parameters cannot be met; nearest: {found:,}", fix="change layers or dim"
                )
        return plan if self.rule == "openelm" else matched_uniform_plan(plan)
