"""Sequences that grow side by side, each in a slot of one preallocated cache: what generation computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.kernels.decode import Block, DecodeKernel
from openelm.kernels.packed import PackedMatrix
from openelm.model.cache import KeyValueCache
from openelm.model.packed import is_packed, pack_model
from openelm.model.static_step import StaticStep
from openelm.model.transformer import Layer, OpenELM

_TOKENS_AT_ONCE = 64
"""As many tokens go through the C++ kernel together, which reads the weights once for them; MOST_TOKENS at most."""


class Decoder:
    """A model and its cache: reads prompts, then a token of each of several sequences at a time.

    On CPUs for which C++ kernels are built, with a model that `pack_model` takes, a token's logits do not depend on the
    other sequences, to the bit; they read a packed copy of the weights, which takes as much memory again.

    Args:
        model: may be packed already (`model.packed.load_packed`); the copy is not made then.
        slots: sequences that have room side by side.
        length: tokens that fit in a slot.
        compiles: whether steps go through torch.compile where no C++ kernel takes them.

    Raises:
        ConfigError: `length` is beyond the model's rotary table.
    """

    def __init__(self, model: OpenELM, slots: int, length: int, *, compiles: bool = False) -> None:
        if length > model.config.rope_max_length:
            raise ConfigError(
                f"{length} positions, but the model's rotary table ends at {model.config.rope_max_length}",
                fix="use fewer tokens",
            )
        scale = model.transformer.norm.weight
        self._model, self.device = model if is_packed(model) else pack_model(model) or model, scale.device
        self._cache = KeyValueCache(model.config.plan, slots, length, dtype=scale.dtype, device=scale.device)
        self._rows = [self._cache.row(slot) for slot in range(slots)]
        self._kernel = _kernel(self._model, self._cache)
        self._static = StaticStep(self._model, self._cache, compiles=compiles)

    def used(self, slot: int) -> int:
        """Count the tokens that a slot holds."""
        return self._rows[slot].used

    def truncate(self, slot: int, tokens: int) -> None:
        """Forget everything in a slot after its first `tokens` tokens."""
        self._rows[slot].truncate(tokens)

    def clear(self, slot: int) -> None:
        """Forget a slot, numbers and all: where they are not finite, steps of fixed shapes must not read them."""
        for part in (*self._cache.keys, *self._cache.values):
            part[slot].zero_()
        self._rows[slot].used = 0

    def copy(self, source: int, slot: int, tokens: int) -> None:
        """Let a slot hold the first `tokens` tokens of another one, and nothing else."""
        for part in (*self._cache.keys, *self._cache.values):
            part[slot, :, :tokens] = part[source, :, :tokens]
        self._rows[slot].used = tokens

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int]) -> Tensor:
        """Append a stretch of a prompt to a slot; returns fp32 logits (V,) after its last token.

        Raises:
            ConfigError: the slot has no room for it.
        """
        tokens = torch.tensor([ids], device=self.device)
        return self._model.logits(self._model.last_state(tokens, self._rows[slot])[0]).float()

    def step(self, ids: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Append one token to each of `slots`; returns fp32 logits (R, V) after each.

        A slot that is named several times takes tokens that follow one another.

        Raises:
            ConfigError: a slot has no room left.
        """
        places = {slot: self.used(slot) for slot in slots}
        positions = []
        for slot in slots:
            positions.append(places[slot])
            places[slot] += 1
        if max(positions) >= self._cache.length:
            raise ConfigError(f"a slot of {self._cache.length} tokens is full", fix="make the cache longer")
        logits = self._computed(ids, slots, positions)
        for slot, used in places.items():  # not before: a step may fail
            self._rows[slot].used = used
        return logits

    def _computed(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        if self._kernel is None:
            with torch.inference_mode():
                return self._static.step(ids, slots, positions)
        if len(ids) <= _TOKENS_AT_ONCE:
            return self._kernel.step(ids, slots, positions)
        pieces = [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, len(ids), _TOKENS_AT_ONCE)]
        return torch.cat([self._kernel.step(ids[piece], slots[piece], positions[piece]) for piece in pieces])


def _kernel(model: OpenELM, cache: KeyValueCache) -> DecodeKernel | None:
    """Make the C++ kernel of a model that is packed for it."""
    if not is_packed(model):
        return None
    layers: Iterable[Layer] = model.transformer.layers  # type: ignore[assignment]
    blocks = [_block(layer, width, cache) for layer, width in zip(layers, model.config.plan.ffn_dims, strict=True)]
    norm, embedding = model.transformer.norm, _matrix(model.transformer.token_embeddings)
    cos, sin = model.rotary.at(0, cache.length, norm.weight.device)
    return DecodeKernel(blocks, norm.weight.detach(), embedding, _matrix(model.head), cos, sin, norm.eps)


def _block(layer: Layer, ffn_dim: int, cache: KeyValueCache) -> Block:
    attn, ffn = layer.attn, layer.ffn
    return Block(
        query_heads=attn.query_heads,
        kv_heads=attn.kv_heads,
        ffn_dim=ffn_dim,
        attn_norm=layer.attn_norm.weight.detach(),
        q_norm=None if attn.q_norm is None else attn.q_norm.weight.detach(),
        k_norm=None if attn.k_norm is None else attn.k_norm.weight.detach(),
        ffn_norm=layer.ffn_norm.weight.detach(),
        qkv=_matrix(attn.qkv_proj),
        out=_matrix(attn.out_proj),
        gate_up=_matrix(ffn.proj_1),
        down=_matrix(ffn.proj_2),
        keys=cache.keys[attn.layer],
        values=cache.values[attn.layer],
    )


def _matrix(module: Any) -> PackedMatrix:
    matrix: PackedMatrix = module.matrix
    return matrix
