"""Quantised matrices of other layouts back to plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.errors import CheckpointError
from openelm.kernels.quantized import WORD_BITS, dequantised
from openelm.model.quantized import BIASES, SCALES, WORDS
from openelm.model.weights import LazyTensor

BITS = (2, 4, 8)
"""How wide a quantised number can be; MLX has 3, 5 and 6 too, whose numbers cross the ends of words."""
GROUP = 64


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
        stem = name.removesuffix(WORDS)
        if name.endswith((SCALES, BIASES)) and name[: -len(SCALES)] + WORDS in weights:
            continue
        if tensor.dtype != torch.uint32:
            found[name] = tensor
            continue
        count += 1
        try:
            bits, group = int(quantization["bits"]), int(quantization["group_size"])
            scales, biases = weights[stem + SCALES], weights[stem + BIASES]
            rows, words = tensor.shape
            if bits not in BITS or group < 1 or quantization.get("mode", "affine") != "affine":
                raise ValueError
            if not (scales.dtype.is_floating_point and scales.dtype == biases.dtype):
                raise ValueError
            if scales.shape != biases.shape or scales.shape != (rows, words * (WORD_BITS // bits) // group):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            what = f"{name} is quantised, but not by groups of 2, 4 or 8 bits as config.json would have to say"
            raise CheckpointError(what, file=file) from None
        found[name] = _plain(tensor, scales, biases, bits, group)
    return found, (f"{count} quantised matrices are the numbers that they stand for now",) if count else ()


def _plain(words: LazyTensor, scales: LazyTensor, biases: LazyTensor, bits: int, group: int) -> LazyTensor:
    def read() -> Tensor:
        return dequantised(words.read(), scales.read(), biases.read(), bits, group)

    return LazyTensor(scales.dtype, (words.shape[0], words.shape[1] * (WORD_BITS // bits)), read)
