"""OpenELM for transformers (arXiv 2404.14619). Needs torch and transformers alone, so it can travel with weights.

Every layer has its own number of heads and its own feed-forward width. Parameters have the published names.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_openelm import OpenELMConfig


class OpenELMRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467): fp32 inside, rounded before it meets the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normalised.to(x.dtype) * self.weight


def rotary_tables(config: OpenELMConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, 1, T, head_dim / 2) in fp32; half of the components turn against the other half."""
    wide = torch.float32 if position_ids.device.type == "mps" else torch.float64
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=wide) / config.head_dim
    frequencies = float(config.rope_freq_constant) ** -exponents
    if config.rope_bf16_frequencies:
        frequencies = frequencies.to(torch.bfloat16).to(wide)
    angles = position_ids[:, None, :, None].to(wide) * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads (B, H, T, head_dim) to their positions, in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with all scores in memory; returns (B, T, H, head_dim) and the weights."""
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.float().softmax(-1).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OpenELMAttention(nn.Module):
    """Grouped-query attention; queries and keys are normalised by heads, if the config says so, and rotated."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads = config.num_query_heads[layer_idx], config.num_kv_heads[layer_idx]
        self.head_dim = config.head_dim
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling, self.is_causal = config.head_dim**-0.5, True
        self.qkv_proj = nn.Linear(config.model_dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        normed = config.normalize_qk_projections
        self.q_norm = OpenELMRMSNorm(self.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = OpenELMRMSNorm(self.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.out_proj = nn.Linear(self.heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rows, length, _ = x.shape
        heads = self.qkv_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = rotate(self.q_norm(query), *rotary), rotate(self.k_norm(key), *rotary)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.out_proj(attended.reshape(rows, length, -1)), weights


class OpenELMFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): the first half of `proj_1` gates the second."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.ffn_dims[layer_idx]
        self.proj_1 = nn.Linear(config.model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, dim=-1)
        gated: Tensor = self.proj_2(F.silu(gate) * up)
        return gated


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn = OpenELMFeedForward(config, layer_idx)
        self.attn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(self.attn_norm(x), attention_mask, rotary, past_key_values, **kwargs)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), weights


class OpenELMPreTrainedModel(PreTrainedModel):
    """What all OpenELM classes tell transformers about themselves."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["OpenELMDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as other models of transformers do; to a config that names the Python files, the files are added."""
        own_class = not self.is_remote_code()  # transformers adds the files of classes that came from a folder
        if own_class and self.config.auto_map and kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


class OpenELMModel(OpenELMPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: OpenELMConfig) -> None:
        if packed := getattr(config, "quantization", None):
            raise ValueError(
                f"the matrices are quantised ({packed}), which openelm and mlx-lm read and transformers does not; "
                "unpack them with `openelm convert MODEL --to hf -o OUT`"
            )
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            OpenELMDecoderLayer(config, index) for index in range(config.num_transformer_layers)
        )
        self.norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the final states (B, T, model_dim); all arguments as in other decoders of transformers."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_causal_mask(  # before there is a cache, with which it would not look for packed documents
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + past)[None]
        rotary = rotary_tables(self.config, position_ids)
        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, mask, rotary, past_key_values, **kwargs)
            hidden_states.append(x)
            attentions.append(weights)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x)
            if self._wants("output_hidden_states", output_hidden_states)
            else None,
            attentions=tuple(attentions) if self._wants("output_attentions", output_attentions) else None,
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()

    def _wants(self, name: str, given: bool | None) -> bool:
        return bool(getattr(self.config, name)) if given is None else given


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """The language model; its arguments are spelled out once more because transformers reads their names."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.token_embeddings.weight"}

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Predict the next token at every position, or at the last `logits_to_keep`; with labels, the mean loss too."""
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        wants_object = self.config.return_dict if return_dict is None else return_dict
        return result if wants_object else result.to_tuple()

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """Multiply states by the output matrix: the embedding with its adapter of peft, where the two are tied."""
        embedding = self.transformer.token_embeddings
        is_adapted = hasattr(embedding, "lora_embedding_A") and not hasattr(self.lm_head, "base_layer")
        if not (is_adapted and self.config.share_input_output_layers):
            logits: Tensor = self.lm_head(hidden_states)
            return logits
        everything = torch.arange(self.vocab_size, device=hidden_states.device)
        return F.linear(hidden_states, embedding(everything))
