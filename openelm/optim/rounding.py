"""Stochastic rounding to bf16, from generators that the seed, the step and the parameter decide."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_DROPPED = 16  # bits of an fp32 number that bf16 has not


def stochastically_rounded(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to one of the two nearest bf16 numbers, the nearer one more often: the mean is the number itself.

    The rounding that bf16 weights without fp32 copies need to take updates smaller than half of their last bit
    (arXiv 2010.06192). A random number of 16 bits is added below bf16's last bit, then the 16 bits are cut off.
    """
    words = torch.empty(-(-wide.numel() // 4), dtype=torch.int64, device=wide.device)
    words.random_(-(1 << 63), None, generator=generator)  # four numbers a word: half the time of one number a draw
    noise = words.view(torch.uint16)[: wide.numel()].view(wide.shape).to(torch.int32)
    bits = noise.add_(wide.contiguous().view(torch.int32))
    return bits.bitwise_and_(-1 << _DROPPED).view(torch.float32).to(torch.bfloat16)


def rounding_generator(seed: int, step: int, name: str, device: torch.device) -> torch.Generator:
    """Make the generator of one parameter's rounding at one step; no other state decides its numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
