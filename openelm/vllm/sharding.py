"""Tensor parallelism: whether the widths of a model divide among processes, and what is held more than once."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.model.plan import LayerPlan


def kv_copies(plan: LayerPlan, processes: int) -> tuple[int, ...]:
    """Return how many times each KV head of each layer is held, so that every process has as many as the others.

    A process needs the KV heads that its query heads attend to. Where these do not divide among the processes, as the
    three of the 270M's first layer do not between two, each is held a few times and serves fewer query heads: the
    result is the same, the cache is larger.

    Raises:
        ConfigError: names a layer whose query heads or feed-forward width do not divide, and the numbers that do.
    """
    for layer, (heads, ffn_dim) in enumerate(zip(plan.query_heads, plan.ffn_dims, strict=True)):
        if heads % processes or ffn_dim % processes:
            common = gcd(*plan.query_heads, *plan.ffn_dims)
            allowed = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
            raise ConfigError(
                f"{processes} processes cannot share layer {layer}, of {heads} query heads and a feed-forward width "
                f"of {ffn_dim}",
                fix=f"--tensor-parallel-size of this model: {allowed}",
            )
    return tuple(processes // gcd(processes, heads) for heads in plan.kv_heads)


def with_copies(qkv: Tensor, query_heads: int, kv_heads: int, copies: int) -> Tensor:
    """Repeat every key and value head of a fused projection ((query_heads + 2 kv_heads) · head_dim, dim)."""
    heads = qkv.view(query_heads + 2 * kv_heads, -1, qkv.shape[1])
    query, keys_and_values = heads[:query_heads], heads[query_heads:]
    return torch.cat([query, keys_and_values.repeat_interleave(copies, dim=0)]).flatten(0, 1)
