"""Products with matrices of few bits a number, held by groups of a row: w = scale · q + bias.

The layout is MLX's: words of 32 bits, the first number of a word in its lowest bits, and for each group of consecutive
numbers of a row a scale and a bias. It is also what `openelm quantize` writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openelm.kernels.linear import linear

WORD_BITS = 32


def groups_of(numbers: Tensor, size: int) -> Tensor:
    """Cut rows (..., columns) into groups: (..., columns / size, size)."""
    return numbers.reshape(*numbers.shape[:-1], -1, size)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Put whole numbers of `bits` bits, (..., columns), into words: uint32 (..., columns · bits / 32)."""
    in_words = groups_of(numbers.int().contiguous(), WORD_BITS // bits)
    words = in_words[..., 0].clone(memory_format=torch.contiguous_format)
    for place in range(1, in_words.shape[-1]):
        words |= in_words[..., place] << bits * place
    return words.view(torch.uint32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Take the numbers out of uint32 words (..., W): int32 (..., W · 32 / bits)."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    numbers: Tensor = (words.view(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(-2)


def dequantised(words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
    """Return the numbers that words stand for, (..., columns), in the dtype of the scales; sums are fp32 at least."""
    wide = torch.promote_types(scales.dtype, torch.float32)
    grouped = groups_of(unpack(words, bits), group).to(wide)
    return (grouped * scales.to(wide)[..., None] + biases.to(wide)[..., None]).flatten(-2).to(scales.dtype)


def quantized_linear(x: Tensor, words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
    """Multiply rows by a quantised weight: x (..., in), words (out, in · bits / 32) -> (..., out).

    Follows torch.autocast, as `linear` does.
    """
    return linear(x, dequantised(words, scales, biases, bits, group))
