"""Adapters as mlx-lm reads them: `mlx_lm.load(model, adapter_path=FOLDER)`."""

from __future__ import annotations

from pathlib import Path

from openelm.adapters.adapter import read_adapter
from openelm.adapters.config import EMBEDDING
from openelm.adapters.description import CONFIG, base_named, module_of
from openelm.errors import ConfigError
from openelm.files.published import publish_folder
from openelm.model.folder import write_json, write_tensors
from openelm.model.quantized import Quantization

_NAMES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
}
"""peft's names and mlx-lm's; its factors lie the other way round."""


def save_mlx_adapter(folder: Path, adapter: Path, *, replace: bool = False) -> None:
    """Publish a folder for mlx-lm from an adapter's folder, of ours or of peft.

    mlx-lm makes layers of the modules that `keys` names, in full; `num_layers` only says where it looks for others.

    Raises:
        CheckpointError: the adapter cannot be read, or the folder exists and `replace` is false.
        ConfigError: mlx-lm has no such adapter: DoRA's of the embedding, whose lengths it takes by rows, or on a
            quantised base, whose packed columns it takes for the real ones.
        DiskError: it cannot be written; nothing is left under its name.
    """
    config, weights = read_adapter(adapter)
    if config.kind == "dora" and EMBEDDING in config.targets:
        what = f"mlx-lm takes DoRA's lengths of {EMBEDDING} by rows, this adapter has them by columns"
        raise ConfigError(what, fix="merge it: openelm adapter merge")
    described_base = Path(base_named(adapter)) / "config.json"
    if config.kind == "dora" and described_base.is_file() and Quantization.from_file(described_base) is not None:
        what = (
            "mlx-lm takes the packed columns of quantised matrices for the real ones, so that DoRA's lengths are wrong"
        )
        raise ConfigError(what, fix="merge it: openelm adapter merge")
    modules = sorted({module_of(name) for name in weights})
    tensors = {}
    for name, tensor in weights.items():
        module = module_of(name)
        kind = name.rpartition(f"{module}.")[2]
        tensors[f"{module}.{_NAMES[kind]}"] = tensor.t() if tensor.ndim == 2 else tensor
    described = {
        "fine_tune_type": config.kind,
        "num_layers": len({module.split(".")[2] for module in modules if ".layers." in module}),
        "lora_parameters": {
            "rank": config.rank, "scale": config.scale, "dropout": config.dropout, "keys": modules,
        },
    }  # fmt: skip
    with publish_folder(folder, replace=replace) as temporary:
        write_tensors(temporary / "adapters.safetensors", tensors)
        write_json(temporary / CONFIG, described)
