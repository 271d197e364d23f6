"""Adapters on a model: added, read, merged, saved as peft's folders and loaded from them."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openelm.adapters.config import EMBEDDING, PROJECTIONS, AdapterConfig
from openelm.adapters.description import (
    BASE,
    CONFIG,
    PREFIX,
    WEIGHTS,
    base_sha256,
    described,
    expected_base,
    module_of,
    read_description,
    short_card,
)
from openelm.errors import CheckpointError, ConfigError
from openelm.files.atomic import write_atomic
from openelm.files.published import MANIFEST, publish_folder, verify_folder
from openelm.model.folder import GENERATION, ORIGIN, read_tensors, write_json, write_tensors
from openelm.model.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from openelm.model.transformer import Linear, OpenELM
from openelm.model.weights import check_shapes, in_memory

if TYPE_CHECKING:
    from openelm.adapters.layers import Adapted


def add_adapter(model: OpenELM, config: AdapterConfig, *, seed: int) -> None:
    """Put a new adapter on a model, in place: nothing else of it learns any more, and it computes what it did.

    A is drawn as peft draws it, uniform up to fan_in^-1/2, and B is 0; of the embedding A is 0 and B normal. The
    draws depend on the seed and the shapes, and leave torch's generators alone.

    Args:
        seed: of the adapter's weights.

    Raises:
        ConfigError: peft is missing, the model has an adapter, the rank is larger than a matrix, or there is no such
            layer.
    """
    _check_fits(model, config)
    _inject(model, config)
    generator = torch.Generator().manual_seed(seed)
    for module in _adapted(model).values():
        down, up = (parameter.data for parameter in module.factors)
        drawn = torch.empty(down.shape if _is_linear(module) else up.shape)
        if _is_linear(module):
            bound = 1 / math.sqrt(down.shape[1])
            down.copy_(drawn.uniform_(-bound, bound, generator=generator))
            up.zero_()
        else:
            down.zero_()
            up.copy_(drawn.normal_(generator=generator))
        if config.kind == "dora":
            module.add_magnitude()


def adapter_weights(model: OpenELM) -> dict[str, Tensor]:
    """Return an adapter's weights under peft's names, as they are in its files; the tensors are the model's own."""
    found: dict[str, Tensor] = {}
    for name, module in _adapted(model).items():
        kinds = ("lora_A.weight", "lora_B.weight") if _is_linear(module) else ("lora_embedding_A", "lora_embedding_B")
        parts = dict(zip(kinds, module.factors, strict=True))
        if module.magnitude is not None:
            parts["lora_magnitude_vector"] = module.magnitude
        found |= {f"{PREFIX}{name}.{kind}": part.detach() for kind, part in parts.items()}
    return found


def published_name(name: str) -> str:
    """Return peft's name in a file for a parameter of an adapter, as `adapter_weights` has it."""
    short = PREFIX + name.replace(".default", "")
    return short.removesuffix(".weight") if short.endswith("lora_magnitude_vector.weight") else short


@torch.no_grad()
def merge_adapter(model: OpenELM, *, dtype: torch.dtype | None = None) -> None:
    """Add a model's adapter to its matrices, in place: it has plain modules again, which learn, and no adapter.

    The sums are taken in float64 and rounded once. Quantised matrices become plain ones, all of them.

    Args:
        dtype: of all weights afterwards; by default that which each has.

    Raises:
        ConfigError: the model has no adapter.
    """
    adapted = _adapted(model)
    if not adapted:
        raise ConfigError("the model has no adapter", fix="load one with load_adapter")
    for name, module in adapted.items():
        base = module.base_layer
        own = base.scales.dtype if isinstance(base, QuantizedMatrix) else base.weight.dtype
        model.set_submodule(name, _plain(module.merged_matrix().to(dtype or own), is_embedding=not _is_linear(module)))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedMatrix):
            model.set_submodule(
                name, _plain(module.whole_matrix(), is_embedding=isinstance(module, QuantizedEmbedding))
            )
    model.quantization, model.adapted = None, False
    del model.peft_config
    model.to(dtype).requires_grad_(True)


def save_adapter(
    folder: Path,
    model: OpenELM,
    config: AdapterConfig,
    *,
    base: Path,
    chat_tuned: bool = False,
    card: str = "",
    origin: Mapping[str, object] | None = None,
    replace: bool = False,
) -> None:
    """Publish an adapter's folder atomically, as peft lays it out, with a card, an origin and a manifest.

    Args:
        config: what the adapter was made with.
        base: the model folder that it stands on; its name goes into the folder as it is given.
        chat_tuned: the adapter learned the chat format; a model that it is merged into is published as one that did.
        card: the text of README.md; by default a few lines.
        origin: plain data for origin.json, which holds the hash of the base's weights too.

    Raises:
        CheckpointError: the folder exists and `replace` is false.
        ConfigError: the model has no adapter.
        DiskError: it cannot be written; nothing is left under its name.
    """
    weights = adapter_weights(model)
    if not weights:
        raise ConfigError("the model has no adapter that could be saved", fix="make one with add_adapter")
    with publish_folder(folder, replace=replace) as temporary:
        write_tensors(temporary / WEIGHTS, weights)
        write_json(temporary / CONFIG, described(config, str(base), _adapted(model)))
        write_json(temporary / ORIGIN, {**(origin or {}), BASE: base_sha256(base_weights(model))})
        if chat_tuned:
            write_json(temporary / GENERATION, {"chat_tuned": True})
        write_atomic(temporary / "README.md", (card or short_card(config, str(base))).encode())


def load_adapter(model: OpenELM, folder: Path) -> AdapterConfig:
    """Put an adapter from a folder, of ours or of peft, on the model that it was made for, in place; see `add_adapter`.

    Returns:
        What the adapter is.

    Raises:
        CheckpointError: a file is missing or damaged; tensors are missing, unexpected or of other shapes; or the base
            is another one than the adapter's.
        ConfigError: peft is missing, or the model has an adapter.
    """
    config, found = read_adapter(folder)
    if (expected := expected_base(folder)) is not None and base_sha256(base_weights(model)) != expected:
        what = "the adapter was made for other weights than this model's"
        raise CheckpointError(what, file=folder / ORIGIN, fix=f"load the base that {CONFIG} names")
    check_shapes(in_memory(found), _shapes(model, config), folder / WEIGHTS)
    add_adapter(model, config, seed=0)
    for name, tensor in adapter_weights(model).items():
        tensor.copy_(found[name])
    return config


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter's folder: what it is, and its weights under peft's names.

    Raises:
        CheckpointError: a file is missing or damaged, or it is an adapter that we cannot hold.
    """
    if not folder.is_dir():
        raise CheckpointError("no such adapter", file=folder, fix=f"give a folder with {CONFIG} and {WEIGHTS}")
    if (folder / MANIFEST).exists():
        verify_folder(folder, names=(CONFIG, WEIGHTS))
    found = read_tensors(folder / WEIGHTS)
    return read_description(folder, {module_of(name) for name in found}), found


def base_weights(model: OpenELM) -> dict[str, Tensor]:
    """Return the weights under an adapter, by the names that the model folder has for them."""
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }


def _plain(weight: Tensor, *, is_embedding: bool) -> nn.Module:
    rows, columns = weight.shape
    if is_embedding:
        return nn.Embedding(rows, columns, _weight=weight)
    with torch.device("meta"):
        module = Linear(columns, rows)
    module.weight = nn.Parameter(weight)
    return module


def _adapted(model: OpenELM) -> dict[str, Adapted]:
    """Name the modules with adapters, in the model's order."""
    if not model.adapted:
        return {}
    from openelm.adapters.layers import AdaptedEmbedding, AdaptedLinear

    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear | AdaptedEmbedding)
    }


def _is_linear(module: Adapted) -> bool:
    return hasattr(module, "keep_operands")


def _check_fits(model: OpenELM, config: AdapterConfig) -> None:
    if model.adapted:
        raise ConfigError("the model has an adapter already", fix="merge it first")
    count = model.config.num_transformer_layers
    if beyond := [layer for layer in config.layers or () if layer >= count]:
        raise ConfigError(f"adapter.layers: there is no layer {beyond[0]}; layers are 0 to {count - 1}")
    shapes = {name: _shape(model.get_submodule(name)) for name in target_names(model, config)}
    name, least = min(((name, min(shape)) for name, shape in shapes.items()), key=lambda entry: entry[1])
    if config.rank > least:
        what = f"adapter.rank {config.rank} is more than the smaller side of {name}, {least}"
        raise ConfigError(what, fix=f"use at most {least}")


def target_names(model: OpenELM, config: AdapterConfig) -> list[str]:
    """Name the modules that an adapter changes."""
    layers = range(model.config.num_transformer_layers) if config.layers is None else sorted(set(config.layers))
    blocks = {name: "attn" if name in PROJECTIONS[:2] else "ffn" for name in config.targets if name != EMBEDDING}
    names = [f"transformer.layers.{layer}.{block}.{name}" for layer in layers for name, block in blocks.items()]
    return ([f"transformer.{EMBEDDING}"] if EMBEDDING in config.targets else []) + names


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, QuantizedMatrix):
        rows, groups = module.scales.shape
        return rows, groups * module.quantization.group_size
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)


def _shapes(model: OpenELM, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Say which tensors an adapter of this model has."""
    found: dict[str, tuple[int, ...]] = {}
    for name in target_names(model, config):
        rows, columns = _shape(model.get_submodule(name))
        if name.endswith(EMBEDDING):
            parts = {"lora_embedding_A": (config.rank, rows), "lora_embedding_B": (columns, config.rank)}
        else:
            parts = {"lora_A.weight": (config.rank, columns), "lora_B.weight": (rows, config.rank)}
        found |= {f"{PREFIX}{name}.{kind}": shape for kind, shape in parts.items()}
        if config.kind == "dora":
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = (columns if name.endswith(EMBEDDING) else rows,)
    return found


def _inject(model: OpenELM, config: AdapterConfig) -> None:
    """Let peft put its layers around the modules; their weights are undefined, and what learns is theirs alone."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("adapters need the package peft", fix="pip install 'openelm-framework[tune]'")
    from peft import LoraConfig, inject_adapter_in_model

    from openelm.adapters.layers import NAME, AdaptedEmbedding, AdaptedLinear

    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=target_names(model, config)
    )
    classes = {Linear: AdaptedLinear, QuantizedLinear: AdaptedLinear}
    settings._register_custom_module({**classes, nn.Embedding: AdaptedEmbedding, QuantizedEmbedding: AdaptedEmbedding})
    for name in target_names(model, config):
        module: Any = model.get_submodule(name)
        is_quantised, is_embedding = isinstance(module, QuantizedMatrix), isinstance(module, QuantizedEmbedding)
        if is_quantised:  # peft asks for its sides
            sides = _shape(module) if is_embedding else reversed(_shape(module))
            module.in_features, module.out_features = sides
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # of quantised modules, for which ours are made
        inject_adapter_in_model(settings, model, NAME)
    model.adapted = True
    model.requires_grad_(False)
    for module in _adapted(model).values():
        for parameter in module.factors:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
