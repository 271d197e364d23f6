"""Products with matrices of few bits a number, held by groups of a row: w = scale · q + bias.

The layout is MLX's: words of 32 bits, the first number of a word in its lowest bits, and for each group of consecutive
numbers of a row a scale and a bias. It is also what `openelm quantize` writes.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from openelm.kernels.linear import linear, product
from openelm.kernels.native import call, runs_native
from openelm.kernels.precision import matmul_dtype, wide_dtype

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


def dequantised(
    words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int, *, out: Tensor | None = None
) -> Tensor:
    """Return the numbers that words stand for, (..., columns), in the scales' dtype; computed in fp32 at least."""
    shape = (*words.shape[:-1], words.shape[-1] * WORD_BITS // bits)
    if runs_native(scales, biases) and scales.dtype == biases.dtype and group % 16 == 0 and bits in (4, 8):
        parts = [part.contiguous() for part in (words, scales, biases)]
        out = scales.new_empty(shape) if out is None else out
        rows = out.numel() // max(1, shape[-1])
        call("dequantise", rows, shape[-1], group, bits, scales.dtype == torch.bfloat16, *parts, out)
        return out
    wide = torch.promote_types(scales.dtype, torch.float32)
    grouped = groups_of(unpack(words, bits), group).to(wide)
    found = (grouped * scales.to(wide)[..., None] + biases.to(wide)[..., None]).flatten(-2).to(scales.dtype)
    return found if out is None else out.copy_(found)


_kept = threading.local()  # memory for one matrix: fresh pages for each would cost more than its numbers


def quantized_linear(x: Tensor, words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
    """Multiply rows by a quantised weight: x (..., in), words (out, in · bits / 32) -> (..., out).

    Follows torch.autocast, as `linear` does. Nothing of it learns, but what x comes from may.
    """
    parts = (words, scales, biases, bits, group)
    if torch.compiler.is_compiling():
        return _compiled_linear(x, dequantised(*parts))
    if x.requires_grad and torch.is_grad_enabled():
        out: Tensor = _QuantizedLinear.apply(x, *parts)  # type: ignore[no-untyped-call]
        return out
    return linear(x, momentary(*parts))


def momentary(words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
    """Return the numbers that words stand for, (rows, columns), until this thread asks for those of others."""
    if scales.device.type != "cpu":  # memory costs nothing there, and a CUDA graph must not meet what others replace
        return dequantised(words, scales, biases, bits, group)
    columns = words.shape[1] * WORD_BITS // bits
    count, kept = words.shape[0] * columns, getattr(_kept, "numbers", None)
    if kept is None or kept.numel() < count or kept.dtype != scales.dtype:
        kept = _kept.numbers = scales.new_empty(count)
    out = kept[:count].view(words.shape[0], columns)
    return dequantised(words, scales, biases, bits, group, out=out)


class _QuantizedLinear(torch.autograd.Function):
    """Keeps the words; the backward pass dequantises them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
        ctx.save_for_backward(words, scales, biases)
        ctx.kind = bits, group
        return linear(x, momentary(words, scales, biases, bits, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = momentary(*ctx.saved_tensors, *ctx.kind).to(gradient.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        return product(rows, weight).view(*gradient.shape[:-1], -1), None, None, None, None, None


def _compiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply a single row without a matrix product: then the compiler makes one loop of it, which reads words.

    Several rows get a matrix of numbers first: in such a loop each row would read all words again.
    """
    if x.numel() != x.shape[-1]:
        return linear(x, weight)
    wide, dtype = wide_dtype(weight.dtype), matmul_dtype(x, weight)
    products = x.reshape(-1).to(dtype).to(wide) * weight.to(dtype).to(wide)
    return products.sum(-1).to(dtype).view(*x.shape[:-1], len(weight))
