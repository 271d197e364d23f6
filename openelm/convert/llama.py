"""Folders of Llamas (`LlamaForCausalLM` of transformers), which are OpenELMs without norms of queries and keys."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openelm.convert.hf import tokenizer_of
from openelm.convert.source import EMBEDDING, HEAD, Source, shapes_of
from openelm.errors import CheckpointError, ConfigError
from openelm.model.config import ModelConfig
from openelm.model.plan import PlanWithoutHeadNorms
from openelm.model.weights import LazyTensor, Weights, check_shapes, open_weights
from openelm.text.tokenizer import HuggingFaceTokenizer, Tokenizer

MODEL_TYPE = "llama"
_CONFIG_BYTES_MAX = 4 << 20
_LARGEST = 1 << 24
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
"""Fields of which an OpenELM can compute some values alone; the first of them is the default of transformers."""
_COMPUTED = ".rotary_emb.inv_freq"  # old folders hold the rotary frequencies, which follow from the config


def is_llama(folder: Path) -> bool:
    """Tell whether the `config.json` of a folder is that of a Llama; a damaged one is for others to refuse."""
    try:
        return bool(_settings(folder / "config.json").get("model_type") == MODEL_TYPE)
    except CheckpointError:
        return False


def open_llama(folder: Path) -> Source:
    """Open a folder with `config.json` and safetensors files; what comes of it computes the same.

    Raises:
        CheckpointError: a file is missing or damaged, the config asks for what no OpenELM does, or the tensors are not
            those that it asks for.
    """
    path = folder / "config.json"
    settings, tokenizer = _settings(path), tokenizer_of(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.puts_bos = _puts_bos(folder, tokenizer)
    try:
        config = llama_config(settings, tokenizer)
    except ConfigError as error:
        raise CheckpointError(error.what, file=path, fix=error.fix) from None
    found = {name: tensor for name, tensor in open_weights(folder).items() if not name.endswith(_COMPUTED)}
    notes = list(_notes(folder, settings, config))
    if config.share_input_output_layers and found.pop(HEAD, None) is not None:
        notes.append(f"{HEAD} is left out: tie_word_embeddings says that it is the embedding")
    weights = _published(found, config, path)
    return Source(folder, MODEL_TYPE, config, weights, tokenizer, notes=tuple(notes)).checked()


def llama_names(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Give, for each tensor of a model, the tensors of a Llama that lie in it one below the other, with their rows."""
    plan, table = config.plan, dict[str, dict[str, int]]()
    for layer, (heads, kv_heads, ffn) in enumerate(zip(plan.query_heads, plan.kv_heads, plan.ffn_dims, strict=True)):
        queries, keys = heads * plan.head_dim, kv_heads * plan.head_dim
        in_layer = {
            "attn_norm": {"input_layernorm": plan.dim},
            "attn.qkv_proj": {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
            "attn.out_proj": {"self_attn.o_proj": plan.dim},
            "ffn_norm": {"post_attention_layernorm": plan.dim},
            "ffn.proj_1": {"mlp.gate_proj": ffn, "mlp.up_proj": ffn},
            "ffn.proj_2": {"mlp.down_proj": plan.dim},
        }
        for name, parts in in_layer.items():
            theirs = {f"model.layers.{layer}.{part}.weight": rows for part, rows in parts.items()}
            table[f"transformer.layers.{layer}.{name}.weight"] = theirs
    table[EMBEDDING] = {"model.embed_tokens.weight": config.vocab_size}
    table["transformer.norm.weight"] = {"model.norm.weight": plan.dim}
    if not config.share_input_output_layers:
        table[HEAD] = {HEAD: config.vocab_size}
    return table


def _published(found: Weights, config: ModelConfig, path: Path) -> dict[str, LazyTensor]:
    """Stack tensors of a Llama to those of an OpenELM, once they are those that its config asks for."""
    names, shapes = llama_names(config), shapes_of(config)
    expected = {theirs: (rows, *shape[1:]) for name, shape in shapes.items() for theirs, rows in names[name].items()}
    check_shapes(found, expected, path)
    return {name: _stacked([found[theirs] for theirs in names[name]], shape) for name, shape in shapes.items()}


def _stacked(parts: Sequence[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return LazyTensor(dtype, shape, lambda: torch.cat([part.to(dtype).read() for part in parts]))


def llama_config(settings: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> ModelConfig:
    """Describe a Llama by the fields of an OpenELM; fields that are not given have the defaults of transformers.

    Args:
        settings: what `config.json` says.
        tokenizer: says which ids begin and end a text, where there is one.

    Raises:
        ConfigError: names a field of which no OpenELM computes the value.
    """
    for name, allowed in _ONLY.items():
        if (value := settings.get(name, allowed[0])) not in allowed:
            raise _refusal(name, value, allowed)
    heads, dim = _whole(settings, "num_attention_heads"), _whole(settings, "hidden_size")
    layers, kv_heads = _whole(settings, "num_hidden_layers"), _whole(settings, "num_key_value_heads", heads)
    context = _whole(settings, "max_position_embeddings", 2048)
    plan = PlanWithoutHeadNorms(
        dim=dim,
        head_dim=_whole(settings, "head_dim", dim // heads),
        query_heads=(heads,) * layers,
        kv_heads=(kv_heads,) * layers,
        ffn_dims=(_whole(settings, "intermediate_size"),) * layers,
    )
    return ModelConfig.from_plan(
        plan,
        vocab_size=_whole(settings, "vocab_size"),
        max_context_length=context,
        rope_max_length=context,
        rope_freq_constant=_rope_theta(settings),
        rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
        initializer_range=settings.get("initializer_range", 0.02),
        share_input_output_layers=settings.get("tie_word_embeddings", False),
        bos_token_id=_ids(settings, "bos_token_id", 1)[0] if tokenizer is None else tokenizer.bos_id,
        eos_token_id=_ids(settings, "eos_token_id", 2)[0] if tokenizer is None else tokenizer.eos_id,
    )


def _refusal(name: str, value: object, allowed: Sequence[Any]) -> ConfigError:
    choices = " or ".join(repr(choice) for choice in allowed)
    return ConfigError(f"{name} is {value!r}, and an OpenELM computes with {choices}", fix="give another model")


def _whole(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Read a count; null stands for the default, as in the files of transformers."""
    value = settings.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ConfigError(f"{name} is {value!r}, not a whole number from 1 on", fix="copy the folder again")
    return value


def _rope_theta(settings: Mapping[str, Any]) -> Any:
    """Find the base of the rotary frequencies, where old and new versions of transformers write it."""
    theta = settings.get("rope_theta", 10_000.0)
    for name in ("rope_scaling", "rope_parameters"):
        given = settings.get(name) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{name} is {given!r}, not an object", fix="copy the folder again")
        for key, only in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)):
            if (value := given.get(key, only)) != only:
                raise _refusal(f"{key} of {name}", value, (only,))
        theta = given.get("rope_theta", theta)
    if (factor := settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refusal("partial_rotary_factor", factor, (1.0,))
    return theta


def _ids(settings: Mapping[str, Any], name: str, default: int) -> list[Any]:
    """Read one id or several, of which the first counts; null is no id."""
    value = settings.get(name, default)
    return (value or [None]) if isinstance(value, list) else [value]


def _notes(folder: Path, settings: Mapping[str, Any], config: ModelConfig) -> Sequence[str]:
    found = []
    ends = _ids(settings, "eos_token_id", 2)
    if len(ends) > 1:
        found.append(f"of the ids {', '.join(map(str, ends))} that may end a text, {config.eos_token_id} does")
    if (folder / "chat_template.jinja").is_file():
        found.append("its chat template stays behind: chats are written in OpenELM's format here")
    return found


def _puts_bos(folder: Path, tokenizer: HuggingFaceTokenizer) -> bool:
    """Tell whether transformers begins a text with BOS: as `tokenizer_config.json` or the tokenizer itself says."""
    path = folder / "tokenizer_config.json"
    stated = _settings(path).get("add_bos_token") if path.exists() else None
    if stated is not None:
        return bool(stated) and tokenizer.bos_id is not None
    steps = json.loads(tokenizer.file_bytes).get("post_processor") or {}
    return any(
        "SpecialToken" in first for step in steps.get("processors", [steps]) for first in step.get("single", [])[:1]
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            raise ValueError
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError
    except OSError as error:
        raise CheckpointError(f"cannot read the model's config: {error.strerror}", file=path) from None
    except (ValueError, RecursionError):
        raise CheckpointError("config.json is not a JSON object", file=path) from None
    return values
