"""Folders of Apple's MLX example, plain or quantised; mlx-lm reads Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openelm.convert.corenet import published_name
from openelm.convert.hf import tokenizer_of
from openelm.convert.quantized import unpacked
from openelm.convert.source import Source, config_of
from openelm.errors import CheckpointError
from openelm.model.weights import open_safetensors

APPLE_WEIGHTS = "weights.safetensors"


def open_apple_mlx(folder: Path) -> Source:
    """Open a folder that Apple's MLX example wrote: its names are CoreNet's, its config has three fields.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are those of no OpenELM.
    """
    path, config_path = folder / APPLE_WEIGHTS, folder / "config.json"
    weights = open_safetensors(path, packed=True)
    settings = _settings(config_path) if config_path.is_file() else {}
    weights, notes = unpacked(weights, settings.get("quantization"), path)
    named = {published_name(name): tensor for name, tensor in weights.items()}
    context = settings.get("max_context_length", 2048)
    config = config_of(named, path, max_context_length=context, rope_max_length=2 * context)
    return Source(folder, "mlx", config, named, tokenizer_of(folder), notes=notes).checked()


def _settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        context = values.get("max_context_length", 2048)
        if type(context) is not int or not 1 <= context <= 1 << 20:
            raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CheckpointError("not the config of an MLX model", file=path) from None
    return dict(values)
