"""The forward pass on a text, a projection at a time, with one layer's weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openelm.kernels.rms_norm import rms_norm
from openelm.model.config import ModelConfig
from openelm.model.rotary import RotaryTable
from openelm.model.transformer import Layer
from openelm.model.weights import Weights

EMBEDDING, LAYERS, NORM = "transformer.token_embeddings.weight", "transformer.layers.", "transformer.norm.weight"
_PROJECTIONS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
_BATCH_TOKENS = 4096


class Walk:
    """Goes from projection to projection in fp32, as `transformer.block` does; the one it stands at can be replaced.

    Args:
        ids: rows of tokens (R, T), which are whole documents to the model.
        table: the embedding; by default that of the weights.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ids: Tensor, table: Tensor | None = None) -> None:
        self._config, self._weights = config, weights
        rotary = RotaryTable(config.head_dim, config.rope_freq_constant, bf16_frequencies=config.rope_bf16_frequencies)
        self._rope = rotary.at(0, ids.shape[1], torch.device("cpu"))
        table = weights[EMBEDDING].read() if table is None else table
        batches = torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1]))
        self._states = [table[batch].float() for batch in batches]
        self._inputs: list[Tensor] = []
        self._steps = 0
        self._enter(0)

    def inputs_of(self, name: str) -> list[Tensor]:
        """Go on to the projection of this name, and return what it takes, in batches (rows, T, columns)."""
        number, _, path = name.removeprefix(LAYERS).removesuffix(".weight").partition(".")
        self._go_to(len(_PROJECTIONS) * int(number) + _PROJECTIONS.index(path))
        return self._inputs

    def replace(self, weight: Tensor) -> None:
        """Put another matrix into the projection that `inputs_of` went to."""
        self._projection.weight = nn.Parameter(weight.float())

    def last_states(self) -> list[Tensor]:
        """Go to the end, and return what the output matrix takes."""
        self._go_to(len(_PROJECTIONS) * self._config.num_transformer_layers)
        scale = self._weights[NORM].read().float()
        return [rms_norm(states, scale, self._config.rms_norm_eps) for states in self._states]

    @property
    def _projection(self) -> nn.Module:
        return self._layer.get_submodule(_PROJECTIONS[self._steps % len(_PROJECTIONS)])

    @torch.no_grad()
    def _go_to(self, steps: int) -> None:
        while self._steps < steps:
            projection, layer, kind = self._projection, self._layer, self._steps % len(_PROJECTIONS)
            for index, inputs in enumerate(self._inputs):
                projected = projection(inputs)
                if kind == 0:
                    self._inputs[index] = layer.attn(projected, self._rope, None, None)
                elif kind == 2:
                    self._inputs[index] = layer.ffn(projected)
                else:
                    self._states[index] += projected
            if kind == 1:
                self._inputs = [layer.ffn_norm(states) for states in self._states]
            self._steps += 1
            if kind == 3:
                self._enter(self._steps // len(_PROJECTIONS))

    def _enter(self, number: int) -> None:
        """Load a layer, where there is one."""
        if number == self._config.num_transformer_layers:
            self._inputs = []
            return
        prefix = f"{LAYERS}{number}."
        own = {name.removeprefix(prefix): self._weights[name] for name in self._weights if name.startswith(prefix)}
        with torch.device("meta"):
            self._layer = Layer(self._config, number)
        self._layer.load_state_dict({name: tensor.read().float() for name, tensor in own.items()}, assign=True)
        with torch.no_grad():
            self._inputs = [self._layer.attn_norm(states) for states in self._states]
