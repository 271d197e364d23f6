"""One more token for each of several sequences, through all layers in one call: generation on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openelm.kernels.native import call, runs_native

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_KINDS_OF_BITS = {8: 2, 4: 3}
GROUP = 64  # numbers of a quantised row that share a scale, as in cpp/few_rows.h


class Weight(NamedTuple):
    """A matrix (out, in) of fp32 or bf16, or of few bits with scales and biases (out, in / 64): `model.quantized`."""

    numbers: Tensor
    scales: Tensor | None = None
    biases: Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of a number."""
        if self.scales is None:
            return 8 * self.numbers.itemsize
        return 8 * self.numbers.nbytes // (self.scales.numel() * GROUP)

    def is_known(self) -> bool:
        """Tell whether the kernel takes it: another group size looks like other bits."""
        if self.scales is None:
            return runs_native(self.numbers) and self.numbers.is_contiguous()
        assert self.biases is not None
        return runs_native(self.scales, self.biases) and self.scales.dtype == self.biases.dtype and self.bits in (4, 8)

    def _described(self) -> list[Tensor | int]:
        if self.scales is None or self.biases is None:
            return [_KINDS[self.numbers.dtype], 0, self.numbers, 0, 0]
        is_bf16 = self.scales.dtype == torch.bfloat16
        return [_KINDS_OF_BITS[self.bits], is_bf16, self.numbers, self.scales, self.biases]


class Block(NamedTuple):
    """A layer's widths and weights, and its cache: keys and values (slots, KV heads, length, head_dim)."""

    query_heads: int
    kv_heads: int
    ffn_dim: int
    attn_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    ffn_norm: Tensor
    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight
    keys: Tensor
    values: Tensor


class DecodeKernel:
    """A model and its cache as the C++ kernel reads them; both must stay where they are in memory.

    Args:
        norm: scale of the final norm (D,); all norm scales are copied to fp32.
        head: the output matrix (V, D).
        cos, sin: of every position that fits in the cache, each (length, head_dim / 2), fp32.
    """

    def __init__(
        self, blocks: Sequence[Block], norm: Tensor, head: Weight, cos: Tensor, sin: Tensor, eps: float
    ) -> None:
        self._eps = eps
        self._vocabulary = len(head.numbers)
        length, head_dim = blocks[0].keys.shape[2:]
        self._held: list[Tensor] = []  # the addresses in the description are theirs
        widths = [len(blocks), len(norm), head_dim, self._vocabulary, length]
        entries: list[Tensor | int] = [*widths, blocks[0].keys.dtype == torch.bfloat16, norm.float()]
        entries += [cos.contiguous(), sin.contiguous(), *head._described()]
        for block in blocks:
            entries += block[:3]
            entries += (scale.float().contiguous() for scale in block[3:7])
            entries += (entry for weight in block[7:11] for entry in weight._described())
            entries += block[11:]
        self._held = [entry for entry in entries if isinstance(entry, Tensor)]
        numbers = [entry.data_ptr() if isinstance(entry, Tensor) else int(entry) for entry in entries]
        self._description = torch.tensor(numbers, dtype=torch.int64)

    def step(self, x: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Write each token's keys and values to its slot and position, and predict the next one.

        A token sees all positions of its slot up to its own; several of one slot are at positions one after the
        other. The caller answers for slots and positions.

        Args:
            x: embeddings (R, D), fp32; overwritten.

        Returns:
            Logits (R, V), fp32. Those of a token do not depend on the others, to the bit.
        """
        logits = torch.empty(len(x), self._vocabulary)
        where = torch.tensor((slots, positions), dtype=torch.int64)
        call("decode", self._description, self._eps, len(x), where[0], where[1], x, logits)
        return logits
