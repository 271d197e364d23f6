"""The config of OpenELM for transformers (arXiv 2404.14619). It needs transformers alone, to travel with weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig


def _multipliers(ends: Sequence[float], layers: int) -> list[float]:
    """Spread multipliers evenly over the layers, rounded to two decimals as the published shapes are."""
    first, last = ends
    step = (last - first) / (layers - 1) if layers > 1 else 0.0
    return [round(index * step + first, 2) for index in range(layers)]


def _round_to_multiple(value: float, divisor: int) -> int:
    """Round to the nearest multiple of the divisor, halves up, at least one, never below 90 % of the value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


_FIXED = {
    "ffn_with_glu": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
}


class OpenELMConfig(PreTrainedConfig):
    """Describe an OpenELM: every layer has its own number of heads and its own feed-forward width.

    Args:
        num_query_heads, num_kv_heads: one number a layer; left out, they follow the rule of layer-wise scaling from
            `qkv_multipliers` and `num_gqa_groups`.
        ffn_multipliers: the rule's two ends, or one value a layer, times `model_dim`, rounded to `ffn_dim_divisor`.
        normalize_qk_projections: whether queries and keys are normalised before they are rotated.
        share_input_output_layers: whether the output matrix is the embedding.
        rope_bf16_frequencies: whether rotary frequencies are rounded to bf16, as in the training of the published 3B.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "tie_word_embeddings": "share_input_output_layers",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        num_transformer_layers: int = 12,
        model_dim: int = 2048,
        head_dim: int = 128,
        qkv_multipliers: Sequence[float] = (0.5, 1.0),
        num_query_heads: Sequence[int] | None = None,
        num_kv_heads: Sequence[int] | None = None,
        num_gqa_groups: int = 4,
        ffn_multipliers: Sequence[float] = (0.5, 4.0),
        ffn_dim_divisor: int = 256,
        normalize_qk_projections: bool = True,
        share_input_output_layers: bool = True,
        rms_norm_eps: float = 1e-6,
        rope_freq_constant: float = 10000,
        rope_max_length: int = 4096,
        rope_bf16_frequencies: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, only in _FIXED.items():
            if (given := kwargs.pop(name, only)) != only:
                raise ValueError(f"{name} is {given!r}; every published OpenELM has {only!r}, and only that is here")
            setattr(self, name, only)
        layers = num_transformer_layers
        self.vocab_size, self.max_context_length = vocab_size, max_context_length
        self.num_transformer_layers, self.model_dim, self.head_dim = layers, model_dim, head_dim
        self.qkv_multipliers, self.num_gqa_groups = list(qkv_multipliers), num_gqa_groups
        widths = [model_dim * multiplier for multiplier in _multipliers(qkv_multipliers, layers)]
        heads = [_round_to_multiple(width, head_dim * num_gqa_groups) // head_dim for width in widths]
        self.num_query_heads = list(num_query_heads or heads)
        self.num_kv_heads = list(num_kv_heads or [heads // num_gqa_groups for heads in self.num_query_heads])
        spread = len(ffn_multipliers) == 2 and layers != 2
        self.ffn_multipliers = _multipliers(ffn_multipliers, layers) if spread else list(ffn_multipliers)
        self.ffn_dim_divisor = ffn_dim_divisor
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            if len(getattr(self, name)) != layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {layers} layers")
        # A file may say it in both words; both are true unless somebody took the two matrices apart.
        self.share_input_output_layers = kwargs.pop("tie_word_embeddings", True) and share_input_output_layers
        self.normalize_qk_projections, self.rms_norm_eps = normalize_qk_projections, rms_norm_eps
        self.rope_freq_constant, self.rope_max_length = rope_freq_constant, rope_max_length
        self.rope_bf16_frequencies = rope_bf16_frequencies
        self.initializer_range, self.use_cache = initializer_range, use_cache
        self.auto_map = kwargs.pop("auto_map", None) or {}  # trl reads it of every model that transformers lacks
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` says; `auto_map` is in it if Python files are in the folder."""
        values: dict[str, Any] = super().to_dict()
        return values if values.get("auto_map") else {k: v for k, v in values.items() if k != "auto_map"}

    @property
    def ffn_dims(self) -> list[int]:
        """The inner width of each layer's feed-forward."""
        return [_round_to_multiple(self.model_dim * m, self.ffn_dim_divisor) for m in self.ffn_multipliers]

    @property
    def num_attention_heads(self) -> int:
        """The most query heads of a layer, for programs that expect one number."""
        return max(self.num_query_heads)

    @property
    def num_key_value_heads(self) -> int:
        """The most KV heads of a layer, for programs that expect one number."""
        return max(self.num_kv_heads)
