"""OpenELM once more, as plain as can be: fp64, head by head, from the files of a folder; nothing of ours is used.

Written from the published description (arXiv 2404.14619 and the fields of the published config.json) as an oracle: what
it computes is exact beside fp32, so every difference from it is a rounding error or a fault of the other side.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def plain_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the fp64 logits (T, vocabulary) of token ids (T,)."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:

        def weight(name: str) -> Tensor:
            return file.get_tensor(name).double()

        embedding = weight("transformer.token_embeddings.weight")
        x = embedding[tokens]
        for number in range(config["num_transformer_layers"]):
            at = f"transformer.layers.{number}."
            shape = config["num_query_heads"][number], config["num_kv_heads"][number], config["head_dim"]
            normed = norm(x, weight(f"{at}attn_norm.weight"))
            heads = (normed @ weight(f"{at}attn.qkv_proj.weight").T).split(config["head_dim"], dim=1)
            norms = weight(f"{at}attn.q_norm.weight"), weight(f"{at}attn.k_norm.weight")
            mixed = attention(list(heads), *shape[:2], *norms, config["rope_freq_constant"])
            x = x + mixed @ weight(f"{at}attn.out_proj.weight").T
            gate, up = (norm(x, weight(f"{at}ffn_norm.weight")) @ weight(f"{at}ffn.proj_1.weight").T).chunk(2, dim=1)
            x = x + (gate / (1 + torch.exp(-gate)) * up) @ weight(f"{at}ffn.proj_2.weight").T
        return norm(x, weight("transformer.norm.weight")) @ embedding.T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weight


def attention(heads: list[Tensor], queries: int, keys: int, q_norm: Tensor, k_norm: Tensor, base: float) -> Tensor:
    """Attend head by head; the heads are those of queries, then of keys, then of values, each (T, head size)."""
    assert len(heads) == queries + 2 * keys
    rotated = [turned(norm(head, k_norm), base) for head in heads[queries : queries + keys]]
    length, size = heads[0].shape
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = []
    for number in range(queries):
        group = number * keys // queries
        scores = turned(norm(heads[number], q_norm), base) @ rotated[group].T / size**0.5
        mixed.append(scores.masked_fill(future, float("-inf")).softmax(dim=1) @ heads[queries + keys + group])
    return torch.cat(mixed, dim=1)


def turned(head: Tensor, base: float) -> Tensor:
    """Turn component k against component k + half by position · base^(-2k/size), as complex numbers."""
    length, size = head.shape
    rates = torch.tensor([base ** (-2 * pair / size) for pair in range(size // 2)], dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    pairs = torch.complex(head[:, : size // 2], head[:, size // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=1)
