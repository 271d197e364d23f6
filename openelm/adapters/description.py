"""What an adapter's folder says of it: peft's adapter_config.json, and which weights it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.adapters.config import TARGETS, AdapterConfig
from openelm.errors import CheckpointError
from openelm.files.hashes import canonical_json
from openelm.model.folder import ORIGIN

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the model that it wraps."""
BASE = "base_sha256"
"""Where origin.json says which weights the adapter was made for: see `base_sha256`."""
_UNKNOWN = {
    "use_rslora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "bias": "none",
}
"""Settings of peft's LoRA, and the values that mean what AdapterConfig can say."""


def described(config: AdapterConfig, base: str, names: Iterable[str]) -> dict[str, Any]:
    """Return what peft's LoraConfig reads; `names` are the modules that are adapted."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.kind == "dora",
        "target_modules": list(config.targets) if config.layers is None else sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_description(folder: Path, names: Iterable[str]) -> AdapterConfig:
    """Read an adapter_config.json, of ours or of peft; `names` are the modules that have weights in its folder.

    Raises:
        CheckpointError: it is missing or damaged, or says what AdapterConfig cannot.
    """
    path = folder / CONFIG
    values = _object(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"peft_type is {values.get('peft_type')!r}; LORA can be read", file=path)
    for key, usual in _UNKNOWN.items():
        if values.get(key, usual) not in (usual, None, [], {}):
            raise CheckpointError(f"{key} is {values[key]!r}; only {usual!r} can be read", file=path)
    parts = [name.split(".") for name in names]
    layers = sorted({int(part[2]) for part in parts if len(part) > 3 and part[2].isdigit()})
    named = values.get("target_modules")
    everywhere = isinstance(named, list) and set(named) <= set(TARGETS) and values.get("layers_to_transform") is None
    return AdapterConfig.parse(
        {
            "kind": "dora" if values.get("use_dora") else "lora",
            "rank": values.get("r"),
            "alpha": values.get("lora_alpha"),
            "dropout": values.get("lora_dropout", 0.0),
            "targets": tuple(name for name in TARGETS if any(part[-1] == name for part in parts)),
            "layers": None if everywhere or not layers else tuple(layers),
        },
        file=path,
    )


def base_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash the weights that an adapter stands on, rounded to bf16: the same for a model and its copy in that dtype.

    Args:
        weights: by the names of the model folder.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_named(folder: Path) -> str:
    """Read which model an adapter says that it is of: a folder, or a name on the Hugging Face hub."""
    return str(_object(folder / CONFIG).get("base_model_name_or_path") or "")


def expected_base(folder: Path) -> str | None:
    """Read which weights an adapter was made for; None where its folder does not say, as those of peft."""
    expected = _object(folder / ORIGIN).get(BASE) if (folder / ORIGIN).exists() else None
    return None if expected is None else str(expected)


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError("missing, or not a JSON object", file=path, fix="give a folder that peft saved")
    return values


def module_of(name: str) -> str:
    """Name the module that a tensor of an adapter belongs to."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def short_card(config: AdapterConfig, base: str) -> str:
    """Write a card for people who find the folder."""
    kind = {"lora": "LoRA", "dora": "DoRA"}[config.kind]
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(base)}\ntags: [{config.kind}, openelm]\n---\n\n"
        f"# {kind} adapter\n\n"
        f"Rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}, on {', '.join(config.targets)}.\n"
        "`openelm adapter merge` makes a model of it; peft and transformers load it as it is.\n"
    )
