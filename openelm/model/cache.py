"""The key/value cache: preallocated, owned by the caller, so one model can serve many callers at once."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.kernels.attention import attention
from openelm.model.plan import LayerPlan


class Attends(Protocol):
    """What attention asks of a cache."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep one layer's new keys and values, and attend to all that the queries may see; shapes as `attention`."""


class KeyValueCache:
    """Keys (after norm and rotation) and values of every layer, for `rows` sequences of equal position.

    Args:
        plan: gives each layer's KV heads and the head size.
        rows: sequences held side by side.
        length: tokens that fit in a row.
    """

    def __init__(
        self,
        plan: LayerPlan,
        rows: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shapes = [(rows, heads, length, plan.head_dim) for heads in plan.kv_heads]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = length
        self.used = 0
        """Tokens that every layer holds."""

    def row(self, index: int) -> Self:
        """Return one row as a cache over the same memory, with a count of its own; it is 0 at first."""
        row = object.__new__(type(self))
        row.keys, row.values = ([part[index : index + 1] for part in parts] for parts in (self.keys, self.values))
        row.length, row.used = self.length, 0
        return row

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append one layer's new keys and values; their positions see all up to their own, as in `attention`."""
        return attention(query, *self.append(layer, key, value))

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind the `used` ones; returns views of all of them.

        Args:
            key, value: shape (rows, KV heads, new tokens, head_dim).

        Raises:
            ConfigError: the row has no room left.
        """
        end = self.used + key.shape[2]
        if end > self.length:
            raise ConfigError(f"{end} tokens do not fit in a cache of {self.length}", fix="make the cache longer")
        self.keys[layer][:, :, self.used : end] = key
        self.values[layer][:, :, self.used : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens as held, once every layer has appended them."""
        self.used += tokens

    def truncate(self, tokens: int) -> None:
        """Forget everything after the first `tokens` tokens."""
        assert 0 <= tokens <= self.used
        self.used = tokens


class OfLast:
    """A cache as the last layer of a prompt sees it: all positions are kept, and only the last one attends."""

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append new keys and values as the cache does; the last query alone sees them."""
        return self._cache.attend(layer, query[:, :, -1:], key, value)
