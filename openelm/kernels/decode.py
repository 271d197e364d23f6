"""One more token for each of several sequences, through all layers in one call: generation on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openelm.kernels.native import call
from openelm.kernels.packed import PackedMatrix

MOST_TOKENS = 96
"""So many go through a step at most, BLOCK of cpp/packed.h."""


class Block(NamedTuple):
    """A layer's widths and weights, and its cache: keys and values (slots, KV heads, length, head_dim).

    `q_norm` and `k_norm` are None where queries and keys are not normalised.
    """

    query_heads: int
    kv_heads: int
    ffn_dim: int
    attn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    ffn_norm: Tensor
    qkv: PackedMatrix
    out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    keys: Tensor
    values: Tensor


class DecodeKernel:
    """A model and its cache as the C++ kernel reads them; the cache must stay where it is in memory.

    Args:
        norm: scale of the final norm (D,); all norm scales are copied to fp32.
        embedding, head: the first and the last matrix (V, D), which may be one.
        cos, sin: of every position that fits in the cache, each (length, head_dim / 2), fp32.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: Tensor,
        embedding: PackedMatrix,
        head: PackedMatrix,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> None:
        self._eps = eps
        self._vocabulary = head.layout.rows
        length, head_dim = blocks[0].keys.shape[2:]
        widths = [len(blocks), len(norm), head_dim, length, blocks[0].keys.dtype == torch.bfloat16]
        entries: list[Tensor | PackedMatrix | int | None] = [*widths, norm.float(), cos.contiguous(), sin.contiguous()]
        entries += [embedding, head]
        for block in blocks:
            entries += block[:3]
            entries += (None if scale is None else scale.float().contiguous() for scale in block[3:7])
            entries += block[7:]
        self._held = [entry for entry in entries if not isinstance(entry, int)]  # the description has their addresses
        numbers = list[int]()
        for entry in entries:
            if isinstance(entry, PackedMatrix):
                numbers += entry.description.tolist()
            else:
                numbers.append(entry.data_ptr() if isinstance(entry, Tensor) else int(entry or 0))
        self._description = torch.tensor(numbers, dtype=torch.int64)

    def step(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Write each token's keys and values to its slot and position, and predict the next one.

        A token sees all positions of its slot up to its own; several of one slot are at positions one after the
        other. The caller answers for ids, slots and positions.

        Returns:
            Logits (R, V), fp32. Those of a token do not depend on the others, to the bit.
        """
        assert len(ids) <= MOST_TOKENS
        logits = torch.empty(len(ids), self._vocabulary)
        where = torch.tensor((ids, slots, positions), dtype=torch.int64)
        call("decode", self._description, self._eps, len(ids), where, logits)
        return logits
