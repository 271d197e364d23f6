"""Hugging Face folders: the published release, our own, and those of mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

from openelm.convert.quantized import unpacked
from openelm.convert.source import Source
from openelm.model.config import ModelConfig
from openelm.model.folder import is_chat_tuned
from openelm.model.plan import openelm_plan
from openelm.model.weights import open_weights
from openelm.text.tokenizer import Tokenizer, load_tokenizer


def open_hf(folder: Path) -> Source:
    """Open a folder with `config.json` and safetensors files.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those that the config asks for.
    """
    path = folder / "config.json"
    config, quantization = ModelConfig.from_file(path), json.loads(path.read_bytes()).get("quantization")
    weights, notes = open_weights(folder, packed=quantization is not None), _differences(config)
    stored_bytes = None
    if quantization is not None:
        stored_bytes = sum(tensor.bytes for tensor in weights.values())
        weights, unpacking = unpacked(weights, quantization, path)
        notes += unpacking
    about = (tokenizer_of(folder), is_chat_tuned(folder), notes)
    return Source(folder, "hf", config, weights, *about, packing=quantization, stored_bytes=stored_bytes).checked()


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Open the tokenizer of a folder, if it has one."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    return load_tokenizer(folder)


def _differences(config: ModelConfig) -> tuple[str, ...]:
    """Say where a config's lists are not what its rule gives; the lists count, and the tensors must fit them."""
    rule = openelm_plan(
        config.model_dim,
        config.head_dim,
        config.num_transformer_layers,
        qkv_multipliers=config.qkv_multipliers,
        gqa_groups=config.num_gqa_groups,
    )
    found = {"num_query_heads": config.num_query_heads, "num_kv_heads": config.num_kv_heads}
    given = {"num_query_heads": rule.query_heads, "num_kv_heads": rule.kv_heads}
    return tuple(
        f"{name} is a list of its own, not what qkv_multipliers give" for name in found if found[name] != given[name]
    )
