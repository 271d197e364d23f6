"""The forward pass in vLLM's layers, under the published names. vLLM batches rows as one list of tokens.

Shapes: T tokens of all rows together, D dim, V vocabulary, Hq and Hk query and KV heads that this process holds of the
layer, E head size. With one process these are all of the layer's heads; see `sharding` for more.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from openelm.convert.source import shapes_of
from openelm.errors import ConfigError
from openelm.model.config import ModelConfig
from openelm.model.rotary import RotaryTable
from openelm.model.weights import LazyTensor, check_shapes
from openelm.vllm.heads import kept_head_size
from openelm.vllm.sharding import kv_copies, with_copies


class Rotary(RotaryEmbedding):
    """Rotary positions from our table, whose angles are computed in fp64; the first half turns against the second."""

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype) -> None:
        base = config.rope_freq_constant
        super().__init__(config.head_dim, config.head_dim, length, base, True, dtype, init_cache=False)
        table = RotaryTable(config.head_dim, base, bf16_frequencies=config.rope_bf16_frequencies)
        angles = torch.cat(table.at(0, length, torch.get_default_device()), dim=-1)
        self.register_buffer("cos_sin_cache", angles.to(dtype), persistent=False)


class OpenELMAttention(nn.Module):
    """Grouped-query attention with a paged cache; queries and keys are normalised by heads, then rotated."""

    def __init__(self, config: ModelConfig, layer: int, copies: int, rotary: Rotary, vllm: VllmConfig, prefix: str):
        super().__init__()
        dim, head_dim, eps = config.model_dim, config.head_dim, config.rms_norm_eps
        heads, kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        quantised: dict[str, Any] = {"bias": False, "quant_config": vllm.quant_config}
        self.qkv_proj = QKVParallelLinear(
            dim, head_dim, heads, kv_heads * copies, prefix=f"{prefix}.qkv_proj", **quantised
        )
        self.out_proj = RowParallelLinear(heads * head_dim, dim, prefix=f"{prefix}.out_proj", **quantised)
        self.q_norm, self.k_norm = RMSNorm(head_dim, eps=eps), RMSNorm(head_dim, eps=eps)
        self.rotary, self.head_dim, self.kept = rotary, head_dim, kept_head_size(head_dim)
        self.heads, self.kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.attend = Attention(
            self.heads,
            self.kept,
            head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm.cache_config,
            quant_config=vllm.quant_config,
            prefix=f"{prefix}.attend",
        )
        backend = self.attend.attn_backend
        if not backend.supports_head_size(self.kept):
            sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
            raise ConfigError(
                f"heads of {head_dim} numbers, but {backend.get_name()} of vLLM has {sizes}",
                fix="use another device or --attention-backend, or another runtime (docs/convert.md)",
            )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Attend from normalised states (T, D); returns (T, D)."""
        qkv, _ = self.qkv_proj(x)
        query, key, value = qkv.split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        query = self.q_norm(query.unflatten(-1, (self.heads, self.head_dim))).flatten(-2)  # (T, Hq · E)
        key = self.k_norm(key.unflatten(-1, (self.kv_heads, self.head_dim))).flatten(-2)  # (T, Hk · E)
        query, key = self.rotary(positions, query, key)
        attended = self.attend(self._wider(query), self._wider(key), self._wider(value))
        attended = attended.unflatten(-1, (self.heads, self.kept))
        projected: Tensor = self.out_proj(attended[..., : self.head_dim].flatten(-2))[0]
        return projected

    def _wider(self, x: Tensor) -> Tensor:
        """Fill the heads of states (T, heads · E) with zeros up to the size that attention sees."""
        return F.pad(x.view(x.shape[0], -1, self.head_dim), (0, self.kept - self.head_dim)).flatten(-2)


class OpenELMFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): the first half of `proj_1` gates the second."""

    def __init__(self, dim: int, ffn_dim: int, vllm: VllmConfig, prefix: str) -> None:
        super().__init__()
        quantised: dict[str, Any] = {"bias": False, "quant_config": vllm.quant_config}
        self.proj_1 = MergedColumnParallelLinear(dim, [ffn_dim, ffn_dim], prefix=f"{prefix}.proj_1", **quantised)
        self.proj_2 = RowParallelLinear(ffn_dim, dim, prefix=f"{prefix}.proj_2", **quantised)
        self.gate = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.proj_1(x)
        projected: Tensor = self.proj_2(self.gate(gate_up))[0]
        return projected


class OpenELMLayer(nn.Module):
    """One pre-norm block; the sum of all before it comes apart, for vLLM's norms add and normalise at once."""

    def __init__(self, config: ModelConfig, layer: int, copies: int, rotary: Rotary, vllm: VllmConfig, prefix: str):
        super().__init__()
        dim, eps = config.model_dim, config.rms_norm_eps
        self.attn_norm, self.ffn_norm = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)
        self.attn = OpenELMAttention(config, layer, copies, rotary, vllm, f"{prefix}.attn")
        self.ffn = OpenELMFeedForward(dim, config.plan.ffn_dims[layer], vllm, f"{prefix}.ffn")

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take what the block before gave (T, D) and the sum before it; return what this one gives, and the sum."""
        if residual is None:
            x, residual = self.attn_norm(x), x
        else:
            x, residual = self.attn_norm(x, residual)
        x, residual = self.ffn_norm(self.attn(positions, x), residual)
        return self.ffn(x), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class OpenELMModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, config: ModelConfig, copies: tuple[int, ...], prefix: str) -> None:
        super().__init__()
        limit = vllm_config.model_config.max_model_len
        if limit > config.rope_max_length:
            raise ConfigError(
                f"{limit} positions, but the model's rotary table ends at {config.rope_max_length}",
                fix=f"--max-model-len {config.rope_max_length} or less",
            )
        rotary = Rotary(config, limit, vllm_config.model_config.dtype)
        self.token_embeddings = VocabParallelEmbedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            OpenELMLayer(config, layer, copies[layer], rotary, vllm_config, f"{prefix}.layers.{layer}")
            for layer in range(config.num_transformer_layers)
        )
        self.norm = RMSNorm(config.model_dim, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Return the final normalised states (T, D)."""
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        normalised: Tensor = self.norm(x, residual)[0]
        return normalised


class OpenELMForCausalLM(nn.Module):
    """The language model as vLLM wants it; vLLM makes one in each of its tensor-parallel processes.

    Raises:
        ConfigError: the widths do not divide among the processes, there are no rotary positions for so long a row,
            vLLM's attention has no heads of this size on the device, or queries and keys are not normalised.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        found = vllm_config.model_config.hf_config
        fields = {name: getattr(found, name) for name in ModelConfig.model_fields if hasattr(found, name)}
        self.config, self.path = ModelConfig.parse(fields), Path(vllm_config.model_config.model)
        if not self.config.normalize_qk_projections:
            what = "queries and keys of this model are not normalised, which only a Llama has in vLLM"
            raise ConfigError(what, fix="give vLLM the Llama that it was converted from, or use openelm serve")
        self.copies = kv_copies(self.config.plan, get_tensor_model_parallel_world_size())
        self.transformer = OpenELMModel(
            vllm_config=vllm_config, config=self.config, copies=self.copies, prefix=_joined(prefix, "transformer")
        )
        if self.config.share_input_output_layers:
            self.lm_head = self.transformer.token_embeddings
        else:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.model_dim,
                quant_config=vllm_config.quant_config,
                prefix=_joined(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Look ids (T,) up in the embedding; returns (T, D)."""
        embedded: Tensor = self.transformer.token_embeddings(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the final normalised states (T, D) of tokens (T,) at their positions (T,) in their rows."""
        states: Tensor = self.transformer(input_ids, positions, inputs_embeds)
        return states

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Predict from states (N, D); returns logits (N, V), or None where another process gathers them."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters from tensors under the published names; returns the names that were filled.

        Raises:
            CheckpointError: names tensors that are missing, unknown or misshapen.
        """
        parameters, shapes = dict(self.named_parameters()), shapes_of(self.config)
        found: dict[str, LazyTensor] = {}
        for name, tensor in weights:
            found[name] = LazyTensor(tensor.dtype, tuple(tensor.shape), _already_read)
            if shapes.get(name) == tensor.shape:
                parameter: Any = parameters[name]
                load = getattr(parameter, "weight_loader", _copy)
                load(parameter, self._with_copies(name, tensor))
        check_shapes(found, shapes, self.path)
        return set(found)

    def _with_copies(self, name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("qkv_proj.weight"):
            return tensor
        layer = int(name.split(".")[2])
        heads, kv_heads = self.config.num_query_heads[layer], self.config.num_kv_heads[layer]
        return with_copies(tensor, heads, kv_heads, self.copies[layer])


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.data.copy_(tensor)


def _already_read() -> Tensor:
    raise AssertionError("vLLM reads weights itself")
