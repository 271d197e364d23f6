"""What a conversion starts from: a config, tensors under the published names, a tokenizer, and what was odd."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openelm.errors import CheckpointError, ConfigError
from openelm.model.config import ModelConfig
from openelm.model.plan import LayerPlan
from openelm.model.transformer import OpenELM
from openelm.model.weights import Weights, check_shapes
from openelm.text.tokenizer import Tokenizer

EMBEDDING, HEAD = "transformer.token_embeddings.weight", "lm_head.weight"
_LAYER = re.compile(r"transformer\.layers\.(\d{1,3})\.")
_MOST_LAYERS = 512


@dataclass(frozen=True)
class Source:
    """A model in any layout, opened.

    Attributes:
        path: the file or folder that was given.
        layout: "hf", "mlx", "corenet", "gguf" or "llama".
        weights: under the published names of the Hugging Face release.
        packing: how its matrices are quantised, {"group_size": 64, "bits": 4}; `weights` are plain all the same.
        stored_bytes: of the weights as they are on disk, where that is not what `weights` take.
        notes: for the user: what was missing, wrong or left out, and what was done about it.
    """

    path: Path
    layout: str
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer | None = None
    chat_tuned: bool = False
    notes: tuple[str, ...] = ()
    packing: Mapping[str, int] | None = None
    stored_bytes: int | None = None

    def checked(self) -> Source:
        """Return itself, once its tensors are those that its config asks for.

        Raises:
            CheckpointError: names tensors that are missing, unknown or misshapen.
        """
        check_shapes(self.weights, shapes_of(self.config), self.path)
        return self


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, in the order in which they are written."""
    with torch.device("meta"):
        model = OpenELM(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def config_of(weights: Weights, file: Path, **fields: Any) -> ModelConfig:
    """Read every layer's widths off the shapes of its tensors; they follow the published rule if they can.

    Args:
        fields: values of the config that shapes do not tell.

    Raises:
        CheckpointError: a tensor is missing, or the shapes are those of no OpenELM.
    """
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    numbers = {int(match[1]) for match in map(_LAYER.match, shapes) if match}
    try:
        if len(numbers) > _MOST_LAYERS or numbers != set(range(len(numbers))):
            raise CheckpointError(f"layers {_gaps(numbers)} are missing", file=file)
        vocab_size, dim = shapes[EMBEDDING]
        (head_dim,) = shapes["transformer.layers.0.attn.q_norm.weight"]
        layers = [f"transformer.layers.{number}" for number in range(len(numbers))]
        query = tuple(shapes[f"{layer}.attn.out_proj.weight"][1] // head_dim for layer in layers)
        rows = (shapes[f"{layer}.attn.qkv_proj.weight"][0] // head_dim for layer in layers)
        plan = LayerPlan(
            dim=dim,
            head_dim=head_dim,
            query_heads=query,
            kv_heads=tuple((all_heads - heads) // 2 for all_heads, heads in zip(rows, query, strict=True)),
            ffn_dims=tuple(shapes[f"{layer}.ffn.proj_2.weight"][1] for layer in layers),
        )
        return _described(plan, vocab_size=vocab_size, share_input_output_layers=HEAD not in shapes, **fields)
    except KeyError as error:
        raise CheckpointError(f"missing {error.args[0]}", file=file, fix="this is not a whole OpenELM") from None
    except (ConfigError, ValueError, IndexError, ZeroDivisionError) as error:
        what = error.what if isinstance(error, ConfigError) else "the shapes are not those of an OpenELM"
        raise CheckpointError(what, file=file) from None


def _described(plan: LayerPlan, **fields: Any) -> ModelConfig:
    shape = {"num_transformer_layers": plan.layers, "model_dim": plan.dim, "head_dim": plan.head_dim}
    by_rule = ModelConfig.parse({**shape, **fields})
    return by_rule if by_rule.plan == plan else ModelConfig.from_plan(plan, **fields)


def _gaps(numbers: set[int]) -> str:
    missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers) if len(numbers) <= _MOST_LAYERS else []
    return ", ".join(map(str, missing[:5])) or f"{len(numbers)} of at most {_MOST_LAYERS}"
