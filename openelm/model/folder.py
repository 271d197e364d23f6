"""The model folder: a Hugging Face folder with a manifest. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from openelm.errors import CheckpointError
from openelm.files.atomic import write_atomic
from openelm.files.hashes import FileFacts, canonical_json
from openelm.files.published import MANIFEST, publish_folder, verify_folder
from openelm.model.config import ModelConfig
from openelm.model.quantized import Quantization, check_packed, hold_quantized
from openelm.model.transformer import OpenELM
from openelm.model.weights import (
    INDEX,
    WEIGHTS,
    LazyTensor,
    Weights,
    check_shapes,
    in_memory,
    open_weights,
    weight_files,
    write_safetensors,
)
from openelm.text.tokenizer import Tokenizer

ORIGIN, GENERATION = "origin.json", "generation_config.json"
SHARD_BYTES = 5_000_000_000
"""Most bytes of a file of weights; one tensor may take more."""
_AUTO_MAP = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModel": "modeling_openelm.OpenELMModel",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}
_METADATA = {"format": "pt"}  # transformers asks for it


def save_model(
    folder: Path,
    model: OpenELM,
    *,
    tokenizer: Tokenizer | None = None,
    chat_tuned: bool = False,
    card: str = "",
    origin: Mapping[str, object] | None = None,
    replace: bool = False,
) -> None:
    """Publish the folder of a model in memory; see `save_weights`."""
    weights = in_memory(model.state_dict())
    quantization = None if model.quantization is None else model.quantization.to_json()
    described: dict[str, Any] = {"card": card, "origin": origin, "quantization": quantization}
    save_weights(
        folder, model.config, weights, tokenizer=tokenizer, chat_tuned=chat_tuned, **described, replace=replace
    )


def save_weights(
    folder: Path,
    config: ModelConfig,
    weights: Weights,
    *,
    tokenizer: Tokenizer | None = None,
    chat_tuned: bool = False,
    card: str = "",
    origin: Mapping[str, object] | None = None,
    code: Mapping[str, bytes] | None = None,
    quantization: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    written: Callable[[int], None] = lambda count: None,
) -> None:
    """Publish a model folder atomically: config, weights, tokenizer, card, origin, manifest.

    Args:
        chat_tuned: the model learned the chat format, so the tokenizer gets its template.
        origin: plain data that says where the weights come from, for `origin.json`.
        code: Python files by name, with which transformers alone loads the folder; config.json then names them.
        quantization: how matrices are packed, for config.json under the name that mlx-lm gives it.
        shard_bytes: weights that take more are cut into several files, with an index.
        written: is told of every few bytes of weights on their way to the disk.

    Raises:
        CheckpointError: the folder exists and `replace` is false.
        DiskError: it cannot be written; nothing is left under its name.
    """
    dtype = next(str(tensor.dtype) for tensor in weights.values() if tensor.dtype.is_floating_point)
    described = {**config.model_dump(mode="json"), "torch_dtype": dtype.removeprefix("torch.")}
    if code:
        described["auto_map"] = _AUTO_MAP
    if quantization:
        described["quantization"] = dict(quantization)
    generation: dict[str, object] = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if chat_tuned:
        generation["chat_tuned"] = True
    known: dict[str, FileFacts] = {}
    with publish_folder(folder, replace=replace, known=known) as temporary:
        known |= _write_weights(temporary, weights, shard_bytes, written)
        write_json(temporary / "config.json", described)
        write_json(temporary / GENERATION, generation)
        if tokenizer is not None:
            tokenizer.save(temporary, chat_template=chat_tuned)
        if card:
            write_atomic(temporary / "README.md", card.encode())
        if origin is not None:
            write_json(temporary / ORIGIN, origin)
        for name, data in (code or {}).items():
            write_atomic(temporary / name, data)


def _write_weights(
    folder: Path, weights: Weights, shard_bytes: int, written: Callable[[int], None]
) -> dict[str, FileFacts]:
    """Write one file, or several and the index that says which tensor is where; returns what is known of them."""
    shards: list[dict[str, LazyTensor]] = [{}]
    held = 0
    for name, tensor in weights.items():
        if held and held + tensor.bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.bytes
    if len(shards) == 1:
        return {WEIGHTS: write_safetensors(folder / WEIGHTS, shards[0], _METADATA, written)}
    stem, suffix = WEIGHTS.split(".")
    index: dict[str, str] = {}
    facts = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        facts[name] = write_safetensors(folder / name, shard, _METADATA, written)
        index |= dict.fromkeys(shard, name)
    total = sum(tensor.bytes for tensor in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return facts


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    It is laid out in memory first: the library's own file writer hides why the disk refused.

    Raises:
        OSError: the disk is full or read-only.
    """
    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, _METADATA))


def write_json(path: Path, value: object) -> None:
    """Write plain data as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def load_model(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> OpenELM:
    """Load a model folder, quantised or not; its manifest, if it has one, is verified first.

    Args:
        dtype: convert the weights; by default they keep the dtype of the file. Quantised matrices keep their words.

    Raises:
        CheckpointError: a file is missing or damaged, the tensors do not fit the config, which names all of them, or
            the matrices are quantised in a way that is not ours.
    """
    return filled(*open_model(folder)).to(device=device, dtype=dtype)


def filled(model: OpenELM, found: Weights) -> OpenELM:
    """Read the weights that `open_model` found into its empty model."""
    model.load_state_dict({name: tensor.read() for name, tensor in found.items()}, assign=True)
    return model.requires_grad_(model.quantization is None)


def open_model(folder: Path) -> tuple[OpenELM, Weights]:
    """Open a model folder for `load_model`: an empty model on the meta device; its weights, checked and not read."""
    if not folder.is_dir():
        raise CheckpointError(
            "no such model folder", file=folder, fix="give a folder with config.json and model.safetensors"
        )
    if (folder / MANIFEST).exists():
        verify_folder(folder, names=("config.json", *weight_files(folder)))
    config = ModelConfig.from_file(folder / "config.json")
    quantization = Quantization.from_file(folder / "config.json")
    with torch.device("meta"):
        model = OpenELM(config)
        if quantization is not None:
            hold_quantized(model, quantization)
    found = open_weights(folder, packed=quantization is not None)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(found, expected, folder / weight_files(folder)[0])
    check_packed(found, model, folder / weight_files(folder)[0])
    return model, {name: found[name] for name in expected}


def is_chat_tuned(folder: Path) -> bool:
    """Read whether a folder's model learned the chat format: `chat_tuned` in generation_config.json.

    Without that key it counts as a base model. A chat template proves nothing: many folders have one for no reason.

    Raises:
        CheckpointError: the file is there and is not a JSON object.
    """
    path = folder / GENERATION
    if not path.exists():
        return False
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError("generation_config.json is not a JSON object", file=path)
    return values.get("chat_tuned") is True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: the file is missing or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        raise CheckpointError("missing, truncated or not a safetensors file", file=path) from None


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and bytes, in name order: equal exactly when all bits are equal."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
