"""MLX: folders of Apple's own example, plain or quantised, and folders that mlx-lm loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.convert.corenet import published_name
from openelm.convert.hf import tokenizer_of
from openelm.convert.source import Source, config_of
from openelm.errors import CheckpointError
from openelm.model.weights import LazyTensor, open_safetensors

APPLE_WEIGHTS = "weights.safetensors"
_PACKED, _SCALES, _BIASES = ".weight", ".scales", ".biases"
_BITS = (2, 4, 8)


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


def unpacked(
    weights: Mapping[str, LazyTensor], quantization: Any, file: Path
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Give quantised matrices (affine, by groups of a row) back as the numbers that they stand for.

    Args:
        quantization: of the config, {"group_size": 64, "bits": 4}; None if nothing is packed.

    Raises:
        CheckpointError: the packed shapes do not fit it.
    """
    found, count = dict[str, LazyTensor](), 0
    for name, tensor in weights.items():
        stem = name.removesuffix(_PACKED)
        if name.endswith((_SCALES, _BIASES)) and name[: -len(_SCALES)] + _PACKED in weights:
            continue
        if tensor.dtype != torch.uint32:
            found[name] = tensor
            continue
        count += 1
        try:
            bits, group = int(quantization["bits"]), int(quantization["group_size"])
            scales, biases = weights[stem + _SCALES], weights[stem + _BIASES]
            rows, words = tensor.shape
            if bits not in _BITS or group < 1 or quantization.get("mode", "affine") != "affine":
                raise ValueError
            if scales.shape != biases.shape or scales.shape != (rows, words * (32 // bits) // group):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            what = f"{name} is quantised, but not by groups of 2, 4 or 8 bits as config.json would have to say"
            raise CheckpointError(what, file=file) from None
        found[name] = _dequantised(tensor, scales, biases, bits, group)
    return found, (f"{count} quantised matrices are the numbers that they stand for now",) if count else ()


def _dequantised(packed: LazyTensor, scales: LazyTensor, biases: LazyTensor, bits: int, group: int) -> LazyTensor:
    """w = scale * q + bias; the first number of a word is in its lowest bits."""
    shape = (packed.shape[0], packed.shape[1] * (32 // bits))

    def read() -> Tensor:
        words = packed.read().view(torch.int32)
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        numbers = (words[..., None] >> shifts) & ((1 << bits) - 1)
        grouped = numbers.view(shape[0], -1, group).float()
        whole = grouped * scales.read().float()[..., None] + biases.read().float()[..., None]
        return whole.view(shape).to(scales.dtype)

    return LazyTensor(scales.dtype, shape, read)


def _settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        context = values.get("max_context_length", 2048)
        if type(context) is not int or not 1 <= context <= 1 << 20:
            raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CheckpointError("not the config of an MLX model", file=path) from None
    return dict(values)
