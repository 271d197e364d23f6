"""The published model, its training step and its generation, written plainly: what the benchmarks compare with.

Our own eager re-implementation from the description of the released code: fp32 RMSNorm in separate operations, one
fp32 rotary round trip a layer, repeated key and value heads, full logits, cross-entropy beside a z-loss on a masked
copy, autocast over fp32 parameters, default AdamW and clipping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainRMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed.type_as(x) * self.weight


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class PlainAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int, query_heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = (query_heads, kv_heads, kv_heads)
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(dim, sum(self.heads) * head_dim, bias=False)
        self.q_norm = PlainRMSNorm(head_dim)
        self.k_norm = PlainRMSNorm(head_dim)
        self.out_proj = nn.Linear(query_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """`past`: keys and values so far, none at first; replaced by those with the new ones joined to them."""
        rows, length, _ = x.shape
        before = past[0].shape[2] if past else 0
        qkv = self.qkv_proj(x).reshape(rows, length, sum(self.heads), self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        steps = torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim
        angles = torch.arange(before, before + length, device=x.device).float()[:, None] * (10000.0**-steps)
        angles = torch.cat((angles, angles), dim=-1)
        q = plain_rotary(q, angles.cos(), angles.sin())
        k = plain_rotary(k, angles.cos(), angles.sin())
        if past is not None:
            past[:] = k, v = [torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
        repeats = self.heads[0] // self.heads[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=length > 1)
        return self.out_proj(out.transpose(1, 2).reshape(rows, length, -1))


class PlainFeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.proj_2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(F.silu(gate) * up)


class PlainLayer(nn.Module):
    def __init__(self, dim: int, head_dim: int, query_heads: int, kv_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.attn_norm = PlainRMSNorm(dim)
        self.attn = PlainAttention(dim, head_dim, query_heads, kv_heads)
        self.ffn_norm = PlainRMSNorm(dim)
        self.ffn = PlainFeedForward(dim, ffn_dim)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), past)
        return x + self.ffn(self.ffn_norm(x))


class PlainModel(nn.Module):
    """The tied decoder; parameters carry the published names, so that our model's state dict loads as it is."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        query_heads: Sequence[int],
        kv_heads: Sequence[int],
        ffn_dims: Sequence[int],
        vocab_size: int,
    ) -> None:
        super().__init__()
        widths = zip(query_heads, kv_heads, ffn_dims, strict=True)
        self.transformer = nn.Module()
        self.transformer.token_embeddings = nn.Embedding(vocab_size, dim)
        self.transformer.layers = nn.ModuleList(PlainLayer(dim, head_dim, *width) for width in widths)
        self.transformer.norm = PlainRMSNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.token_embeddings(tokens)
        for layer in self.transformer.layers:
            x = layer(x)
        return F.linear(self.transformer.norm(x), self.transformer.token_embeddings.weight)


class PlainSpeaker(PlainModel):
    """The same with a cache that is copied for every token; a prompt is read at once, and has all its logits."""

    def empty_past(self) -> list[list[Tensor]]:
        return [[] for _ in self.transformer.layers]

    def next_logits(self, tokens: Tensor, past: list[list[Tensor]]) -> Tensor:
        """Return logits (rows, vocabulary) after the last of tokens (rows, length)."""
        x = self.transformer.token_embeddings(tokens)
        for layer, kept in zip(self.transformer.layers, past, strict=True):
            x = layer(x, kept)
        return F.linear(self.transformer.norm(x), self.transformer.token_embeddings.weight)[:, -1]


def plain_loss(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Mean cross-entropy plus the z-loss over a masked copy of the logits, as published."""
    logits, targets = logits.flatten(0, 1), targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=-100)
    keep = targets != -100
    masked = logits * keep[:, None]
    return loss + z_loss * torch.logsumexp(masked, dim=-1).square().sum() / keep.sum()


class PlainTrainer:
    """One published training step: autocast, full logits, clip at 1.0, default AdamW."""

    def __init__(self, model: PlainModel, precision: str) -> None:
        self.model, self.precision = model, precision
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = plain_loss(self.model(tokens), targets, z_loss=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
