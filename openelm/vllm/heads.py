"""How many heads each layer has and how wide they are kept, for vLLM plans memory before there is a model."""

from __future__ import annotations

import copy
from typing import Any

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

ATTENTION_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of its attention on CPUs, up to 256


def kept_head_size(head_dim: int) -> int:
    """Return how many numbers of a head attention sees: the next size that it has; zeros fill what is added.

    Zeros add nothing to a product of query and key, and what they give for values is cut off: only the cache grows.
    """
    return next((size for size in ATTENTION_HEAD_SIZES if size >= head_dim), head_dim)


class OpenELMHeads(ModelArchConfigConvertorBase):
    """Describe a model layer by layer: `num_kv_heads` is a list, where vLLM looks for a number."""

    def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]]:
        """Return a config for each layer that differs from the model's in nothing but its heads."""
        config, layers = self.hf_text_config, []
        for query_heads, kv_heads in zip(config.num_query_heads, config.num_kv_heads, strict=True):
            layer = copy.copy(config)
            layer.num_query_heads, layer.num_kv_heads = [query_heads], [kv_heads]
            layers.append((layer, layer))
        return layers

    def get_total_num_attention_heads(self) -> int:
        heads: list[int] = self.hf_text_config.num_query_heads
        return max(heads)

    def get_total_num_kv_heads(self) -> int:
        heads: list[int] = self.hf_text_config.num_kv_heads
        return max(heads)

    def get_head_size(self) -> int:
        return kept_head_size(super().get_head_size())
