"""Projections whose products are taken in float8, through torchao."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from openelm.errors import ConfigError
from openelm.model.transformer import OpenELM

_CAPABILITY = (8, 9)
_MULTIPLE = 16  # cuBLAS's float8 products want widths of this


def check_float8(device: torch.device) -> None:
    """Tell whether products in float8 are possible.

    Raises:
        ConfigError: the device has none, or torchao is missing.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
        raise ConfigError(
            f"train.precision float8 needs CUDA capability 8.9 or more, which {name} has not",
            fix="train on an H100 or newer, or with train.precision=bf16",
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "train.precision float8 needs the package torchao", fix="pip install 'openelm-framework[float8]'"
        )


def use_float8(model: OpenELM, *, emulate: bool = False) -> list[str]:
    """Take the products of the layers' projections in float8, one scale a tensor; returns the names of the projections.

    Weights stay what they are, under their names. The embedding, which is the head, is no projection. Those whose
    widths are no multiples of 16 stay as they are.

    Args:
        emulate: round as float8 does, multiply in the wider dtype: on any device, and slowly.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen: list[str] = []

    def choose(module: nn.Module, name: str) -> bool:
        fits = isinstance(module, nn.Linear) and not any(width % _MULTIPLE for width in module.weight.shape)
        chosen.extend([name] if fits else [])
        return fits

    convert_to_float8_training(
        model.transformer.layers, module_filter_fn=choose, config=Float8LinearConfig(emulate=emulate)
    )
    return chosen
