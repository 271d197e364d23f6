"""The model folder: a Hugging Face folder with a manifest. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from openelm.errors import CheckpointError
from openelm.files import MANIFEST, canonical_json, publish_folder, verify_folder, write_atomic
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer

WEIGHTS, ORIGIN = "model.safetensors", "origin.json"
_METADATA = {"format": "pt"}  # transformers asks for it
_HEADER_BYTES_MAX = 16 << 20


def save_model(
    folder: Path,
    model: OpenELM,
    *,
    tokenizer: Tokenizer | None = None,
    card: str = "",
    origin: Mapping[str, object] | None = None,
    replace: bool = False,
) -> None:
    """Publish a model folder atomically: config, weights in the model's dtype, tokenizer, card, origin, manifest.

    Args:
        origin: plain data that says where the weights come from, for `origin.json`.

    Raises:
        CheckpointError: the folder exists and `replace` is false.
        DiskError: it cannot be written; nothing is left under its name.
    """
    config = model.config
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    with publish_folder(folder, replace=replace) as temporary:
        write_tensors(temporary / WEIGHTS, model.state_dict())
        write_json(temporary / "config.json", {**config.model_dump(mode="json"), "torch_dtype": dtype})
        write_json(temporary / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save(temporary)
        if card:
            write_atomic(temporary / "README.md", card.encode())
        if origin is not None:
            write_json(temporary / ORIGIN, origin)


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
    """Load a model folder; its manifest, if it has one, is verified first.

    Args:
        dtype: convert the weights; by default they keep the dtype of the file.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors do not fit the config; names all of them.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "no such model folder", file=folder, fix="give a folder with config.json and model.safetensors"
        )
    if (folder / MANIFEST).exists():
        verify_folder(folder, names=("config.json", WEIGHTS))
    config = ModelConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = OpenELM(config)
    check_header(folder / WEIGHTS, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    weights = read_tensors(folder / WEIGHTS)
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype).requires_grad_(True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: the file is missing or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        raise CheckpointError("missing, truncated or not a safetensors file", file=path) from None


def check_header(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a safetensors header with the expected names and shapes before anything is allocated.

    Raises:
        CheckpointError: lists the first missing, unexpected and misshapen tensors.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _HEADER_BYTES_MAX:
                raise ValueError
            header = json.loads(file.read(size))
        dtypes = {str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        found = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise CheckpointError(f"cannot read the weights: {error.strerror}", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise CheckpointError("damaged, or not a safetensors file", file=path, offset=0) from None
    problems = [
        *(f"dtype {dtype} cannot be computed with" for dtype in sorted(dtypes - {"F16", "BF16", "F32", "F64"})),
        *(f"missing {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"unexpected {name}" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} has shape {found[name]}, the config asks for {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError("; ".join(problems[:5]) + more, file=path, fix="the weights are of another model")


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and bytes, in name order: equal exactly when all bits are equal."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
