"""Rotary position tables (RoPE, arXiv 2104.09864), always in fp32: rounded frequencies move far positions."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines for positions 0, 1, …; grown on demand and kept per device.

    Args:
        head_dim: all of it is rotated, first half against second half.
        base: the slowest pair of components turns at 1/base of the fastest one's rate.
        bf16_frequencies: round the rates to bf16; position 2,047 is then up to 2.5 rad off at head size 128.
    """

    def __init__(self, head_dim: int, base: float, *, bf16_frequencies: bool = False) -> None:
        self.head_dim, self.base, self.bf16_frequencies = head_dim, base, bf16_frequencies
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each of shape (length, head_dim / 2), for `length` positions from `start`."""
        table = self._tables.get(device)
        if table is None or table[0].shape[0] < start + length:
            table = self._tables[device] = self._compute(1 << max(11, (start + length - 1).bit_length()), device)
        return table[0][start : start + length], table[1][start : start + length]

    def _compute(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # a table made while sampling must also serve training
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
            frequencies = self.base**-exponents
            if self.bf16_frequencies:
                frequencies = frequencies.bfloat16().double()
            angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
            return angles.cos().float().to(device), angles.sin().float().to(device)
