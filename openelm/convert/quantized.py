"""Matrices of few bits a number, as MLX holds them: words of 32 bits, and a scale and a bias for each group."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openelm.convert.extras import needed
from openelm.errors import CheckpointError
from openelm.model.weights import LazyTensor, Weights

BITS = (2, 4, 8)
"""How wide a quantised number can be; MLX has 3, 5 and 6 too, whose numbers cross the ends of words."""
GROUP = 64
_PACKED, _SCALES, _BIASES = ".weight", ".scales", ".biases"


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
            if bits not in BITS or group < 1 or quantization.get("mode", "affine") != "affine":
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


def packed(weights: Weights, bits: int) -> dict[str, LazyTensor]:
    """Quantise the matrices whose rows are whole groups, by MLX itself; each becomes words, scales and biases."""
    found: dict[str, LazyTensor] = {}
    parts = functools.lru_cache(maxsize=1)(lambda name: _quantised(weights[name], bits))  # read one after the other
    for name, tensor in weights.items():
        if len(tensor.shape) == 1 or tensor.shape[1] % GROUP:
            found[name] = tensor
            continue
        stem, (rows, columns) = name.removesuffix(_PACKED), tensor.shape
        words, groups = (rows, columns * bits // 32), (rows, columns // GROUP)
        for index, kind in enumerate((_PACKED, _SCALES, _BIASES)):
            dtype, shape = (tensor.dtype, groups) if index else (torch.uint32, words)
            found[stem + kind] = LazyTensor(dtype, shape, lambda name=name, index=index: parts(name)[index])  # type: ignore[misc]
    return found


def _quantised(tensor: LazyTensor, bits: int) -> list[Tensor]:
    mx = needed("mlx.core", extra="mlx")
    whole = tensor.read()
    narrow = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}.get(whole.dtype)
    array = mx.array(whole.numpy()) if narrow is None else mx.array(whole.view(torch.uint16).numpy()).view(narrow)
    words, *others = mx.quantize(array, group_size=GROUP, bits=bits)
    plain = [part if narrow is None else part.view(mx.uint16) for part in others]
    return [torch.from_numpy(np.array(words)), *(torch.from_numpy(np.array(part)).view(whole.dtype) for part in plain)]
