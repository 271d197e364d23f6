"""The whole forward pass, top to bottom.

Module names are the published ones (`transformer.layers.{i}.attn.qkv_proj.weight`, …), so a model folder is a
Hugging Face folder. Precision follows `torch.autocast`: with fp32 weights under bf16 autocast the projections
run in bf16 and the residual stream stays fp32; a model cast to bf16 runs in bf16 throughout.

Shapes: B rows, T tokens, D dim, V vocabulary, Hq and Hk query and KV heads of the layer, E head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openelm.errors import ConfigError
from openelm.kernels.attention import attention
from openelm.kernels.attention_gpu import Documents, visible_documents
from openelm.kernels.cross_entropy import AdaptedHead
from openelm.kernels.linear import keep_operands, linear
from openelm.kernels.precision import matmul_dtype
from openelm.kernels.rms_norm import rms_norm
from openelm.kernels.rotary import qk_norm_rope
from openelm.kernels.swiglu import swiglu
from openelm.model.cache import Attends, KeyValueCache, OfLast
from openelm.model.compiled import compiled, keep_products, widths_may_vary
from openelm.model.config import ModelConfig
from openelm.model.quantized import Quantization
from openelm.model.rotary import RotaryTable

Recompute: TypeAlias = Literal["none", "selective", "full"]
"""What training computes again in the backward pass instead of keeping it (arXiv 2205.05198 names the kinds).

none: nothing that takes time; on CPUs the layers' norms and gates, 1 % of the work for a quarter of the memory. full:
whole layers; each keeps its input only. selective: everything but the projections, half of the memory for 2 to 4 %
more work; a layer keeps its input, the residual stream between its blocks, what `qkv_proj` and `proj_1` give.
"""


class Linear(nn.Linear):
    """A projection without bias, through our kernel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: `OpenELM.initialise` draws every weight, from an explicit generator."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def keep_operands(self, x: Tensor) -> Tensor:
        """Keep what `forward` keeps for the backward pass, without the product."""
        return keep_operands(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467) with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise; `dtype` is that of the product which follows, so that x is rounded once and kept once."""
        return rms_norm(x, self.weight, self.eps, dtype)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head if the config says so, then rotated."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        plan = config.plan
        self.layer = layer
        self.query_heads, self.kv_heads = plan.query_heads[layer], plan.kv_heads[layer]
        self.qkv_proj = Linear(plan.dim, (self.query_heads + 2 * self.kv_heads) * plan.head_dim)
        self.eps = config.rms_norm_eps
        self.q_norm = RMSNorm(plan.head_dim, self.eps) if plan.normalizes_qk else None
        self.k_norm = RMSNorm(plan.head_dim, self.eps) if plan.normalizes_qk else None
        self.out_proj = Linear(self.query_heads * plan.head_dim, plan.dim)

    def forward(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: Attends | None,
        documents: Tensor | Documents | None,
    ) -> Tensor:
        """Attend with what `qkv_proj` gave; returns what `out_proj` takes."""
        q, k, v = qk_norm_rope(  # (B, Hq, T, E), (B, Hk, T, E), (B, Hk, T, E)
            qkv,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            *rope,
            self.query_heads,
            self.kv_heads,
            self.eps,
        )
        if cache is not None:
            return cache.attend(self.layer, q, k, v)
        return attention(q, k, v, documents=documents)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): the first half of `proj_1` gates the second."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj_1 = Linear(dim, 2 * ffn_dim)
        self.proj_2 = Linear(ffn_dim, dim)

    def forward(self, gate_up: Tensor) -> Tensor:
        """Gate what `proj_1` gave; returns what `proj_2` takes."""
        return swiglu(gate_up)


Stage: TypeAlias = Callable[..., Tensor]
"""Calls a function with tensors, and a projection with what it gives: `_at_once` or `_again`."""


def _at_once(function: Callable[..., Tensor], projection: nn.Module, *arguments: Any) -> Tensor:
    projected: Tensor = projection(function(*arguments))
    return projected


def _again(function: Callable[..., Tensor], projection: nn.Module, *arguments: Any) -> Tensor:
    """Keep the arguments only; the backward pass calls the function once more, but does not project again."""
    first, keep = True, getattr(projection, "keep_operands", None)  # other libraries' projections have none

    def stage(*arguments: Any) -> Tensor:
        nonlocal first
        if first or keep is None:
            first = False
            return _at_once(function, projection, *arguments)
        return keep(function(*arguments))  # type: ignore[no-any-return]

    return _checkpoint(stage, *arguments, draws=getattr(projection, "draws", False))


def _checkpoint(function: Callable[..., Tensor], *arguments: Any, draws: bool) -> Tensor:
    """Keep the arguments only; the backward pass calls once more, up to the last tensor that it needs, and what the
    function draws at random is the same again if we say that it `draws`."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=draws)
    return result


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn = FeedForward(config.model_dim, config.plan.ffn_dims[layer])

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: Attends | None,
        documents: Tensor | Documents | None,
        compute: Callable[..., Tensor],
    ) -> Tensor:
        """Compute with `block`, or with another way to do the same."""
        return compute(self, x, rope, cache, documents)


def block(
    layer: Layer,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: Attends | None,
    documents: Tensor | Documents | None,
    cheap: Stage = _at_once,
    costly: Stage = _at_once,
) -> Tensor:
    """Compute a layer in four stages, of which attention is costly to compute again.

    Each ends with a projection, which need not be repeated: nothing keeps its result. Of a cache that is `OfLast` one
    position goes on.
    """
    dtype = matmul_dtype(x, layer.attn_norm.weight)
    qkv = cheap(layer.attn_norm, layer.attn.qkv_proj, x, dtype)
    if isinstance(cache, OfLast):
        x = x[:, -1:]
    x = x + costly(layer.attn, layer.attn.out_proj, qkv, rope, cache, documents)
    gate_up = cheap(layer.ffn_norm, layer.ffn.proj_1, x, dtype)
    x = x + cheap(layer.ffn, layer.ffn.proj_2, gate_up)
    return x


_block_keeping_attention = functools.partial(block, cheap=_again)
_block_in_stages = functools.partial(block, cheap=_again, costly=_again)
_block_of_products = functools.partial(keep_products, block)


class Transformer(nn.Module):
    """Embedding, layers and final norm; holds the parameters under their published names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(
            config.vocab_size, config.model_dim, _weight=torch.empty(config.vocab_size, config.model_dim)
        )
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_transformer_layers))
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)


class OpenELM(nn.Module):
    """A decoder-only language model with layer-wise scaled widths (arXiv 2404.14619).

    Weights are undefined until `initialise` or `load_state_dict` fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None if config.share_input_output_layers else Linear(config.model_dim, config.vocab_size)
        self.rotary = RotaryTable(
            config.head_dim, config.rope_freq_constant, bf16_frequencies=config.rope_bf16_frequencies
        )
        self.recompute: Recompute | tuple[Recompute, ...] = "none"
        """For all layers alike, or for each of them."""
        self.compiles = False
        """Whether layers run through torch.compile where gradients are taken; those with adapters never do."""
        self.quantization: Quantization | None = None
        """How matrices are held; `quantized.hold_quantized` sets it."""
        self.adapted = False
        """Whether some matrices have adapters, and nothing else learns; `adapters.add_adapter` sets it."""

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D) that training learns: the embedding itself, unless the config says otherwise; a
        quantised or adapted one is made at each call.

        Raises:
            ConfigError: the matrices are quantised and have no adapters; `logits` multiplies by those too.
        """
        if self.quantization is not None and not self.adapted:
            what = f"quantised weights cannot be trained; these have {self.quantization.bits} bits"
            fix = "train an adapter, the model that they were made from, or what openelm convert --to hf gives"
            raise ConfigError(what, fix=fix)
        matrix: Callable[[], Tensor] | None = getattr(self.head, "whole_matrix", None)
        weight: Tensor = self.head.weight if matrix is None else matrix()
        return weight

    @property
    def head_parts(self) -> Tensor | AdaptedHead:
        """What the loss takes for the output matrix: `head_weight`, or an adapted one in parts, which costs less."""
        return getattr(self.head, "parts", None) or self.head_weight

    @property
    def head(self) -> Any:
        """The module that holds the output matrix: the embedding, unless the config says otherwise."""
        return self.transformer.token_embeddings if self.lm_head is None else self.lm_head

    def layer_matrices(self) -> dict[str, int]:
        """Name the matrices of the layers, each with how many of equal size it holds, one below the other.

        `qkv_proj` holds one for each query, key and value head, `proj_1` gate and up.
        """
        plan, found = self.config.plan, dict[str, int]()
        for layer, (heads, kv_heads) in enumerate(zip(plan.query_heads, plan.kv_heads, strict=True)):
            counts = {"attn.qkv_proj": heads + 2 * kv_heads, "attn.out_proj": 1, "ffn.proj_1": 2, "ffn.proj_2": 1}
            found |= {f"transformer.layers.{layer}.{name}.weight": count for name, count in counts.items()}
        return found

    def forward(self, tokens: Tensor, *, cache: KeyValueCache | None = None, documents: Tensor | None = None) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens: ids (B, T); with a cache, the T tokens that follow the `cache.used` ones already in it.
            cache: appended to in place.
            documents: (B, T), equal where positions belong to the same document of a packed row; positions of
                other documents are not seen. Not for use with a cache.

        Returns:
            Logits (B, T, V).

        Raises:
            ConfigError: the positions do not fit in the cache or in the rotary table.
        """
        return self.logits(self.hidden(tokens, cache=cache, documents=documents))

    def hidden(
        self, tokens: Tensor, *, cache: KeyValueCache | None = None, documents: Tensor | Documents | None = None
    ) -> Tensor:
        """Return the final normalised states (B, T, D), from which `logits` predicts; see `forward`."""
        assert cache is None or documents is None
        start, length = (0 if cache is None else cache.used), tokens.shape[1]
        if start + length > self.config.rope_max_length:
            raise ConfigError(
                f"{start + length} positions, but the model's rotary table ends at {self.config.rope_max_length}",
                fix="use fewer tokens",
            )
        x = self.transformer.token_embeddings(tokens)
        rope = self.rotary.at(start, length, tokens.device)
        if documents is not None:
            documents = visible_documents(documents, matmul_dtype(x), tokens.device)
        if cache is None and torch.is_grad_enabled():
            x = self._learning(x, rope, documents)
        else:
            for layer in self.transformer.layers:
                x = layer(x, rope, cache, documents, block)
        if cache is not None:
            cache.advance(length)
        normalised: Tensor = self.transformer.norm(x)
        return normalised

    def last_state(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the final normalised state (B, D) after the last of the tokens (B, T) that follow those in `cache`.

        It is the last one of `hidden`. In the last layer, which is the widest, the others leave keys and values alone.
        """
        x, rope = self.transformer.token_embeddings(tokens), self.rotary.at(cache.used, tokens.shape[1], tokens.device)
        *layers, last = self.transformer.layers
        for layer in layers:
            x = layer(x, rope, cache, None, block)
        x = last(x, rope, OfLast(cache), None, block)
        cache.advance(tokens.shape[1])
        normalised: Tensor = self.transformer.norm(x[:, -1])
        return normalised

    def next_states(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[Attends], compute: Callable[..., Tensor] = block
    ) -> Tensor:
        """Return the final normalised states (R, D) of tokens (R,) at `positions` (R,), of sequences of their own.

        They pass the layers as one row; each layer's cache keeps them apart. See `Layer.forward` for `compute`.
        """
        cos, sin = self.rotary.at(0, self.config.rope_max_length, tokens.device)
        x, rope = self.transformer.token_embeddings(tokens[None]), (cos[positions], sin[positions])
        for layer, cache in zip(self.transformer.layers, caches, strict=True):
            x = layer(x, rope, cache, None, compute)
        normalised: Tensor = self.transformer.norm(x)[0]
        return normalised

    def _learning(self, x: Tensor, rope: tuple[Tensor, Tensor], documents: Tensor | Documents | None) -> Tensor:
        """Compute the layers as gradients want it."""
        layers = self.transformer.layers
        kinds = (self.recompute,) * len(layers) if isinstance(self.recompute, str) else self.recompute
        compiles = self.compiles and not self.adapted
        with widths_may_vary() if compiles else nullcontext():
            for layer, kind in zip(layers, kinds, strict=True):
                if compiles:
                    compute = compiled(_block_of_products if kind == "selective" else block)
                elif kind == "selective":
                    compute = _block_in_stages
                else:
                    compute = _block_keeping_attention if kind == "none" and x.device.type == "cpu" else block
                inputs = (x, rope, None, documents, compute)
                x = _checkpoint(layer, *inputs, draws=self.adapted) if kind == "full" else layer(*inputs)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply states (..., D) by the output matrix; returns (..., V)."""
        head = self.head
        product: Callable[[Tensor], Tensor] | None = getattr(
            head, "product", None
        )  # of quantised, packed, adapted ones
        return linear(hidden, head.weight) if product is None else product(hidden)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights as published, see `initial_weights`."""
        parameters = dict(self.named_parameters())
        for name, weight in self.initial_weights(generator):
            parameters[name].copy_(weight)

    def initial_weights(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, fp32 weight on the CPU) as published, one after the other: Normal(0, fan_in^-1/2), and
        (2 · layers · dim)^-1/2 for the projections that write to the residual stream; the embedding's fan-in is dim;
        norm scales are 1.

        Args:
            generator: a CPU generator; the draws depend on nothing but its state and the shapes.
        """
        residual_std = (2 * self.config.num_transformer_layers * self.config.model_dim) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                yield name, torch.ones(parameter.shape)
                continue
            writes_residual = name.endswith(("attn.out_proj.weight", "ffn.proj_2.weight"))
            std = residual_std if writes_residual else 1 / math.sqrt(parameter.shape[1])
            yield name, torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(std)
