"""A model whose matrices lie as the C++ kernels of generation read them, not as they are trained and saved."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openelm.errors import ConfigError
from openelm.kernels.native import kernels_name
from openelm.kernels.packed import Layout, PackedMatrix, memory_for
from openelm.model.folder import filled, load_model, open_model
from openelm.model.quantized import BIASES, SCALES, WORDS, QuantizedEmbedding, QuantizedLinear
from openelm.model.transformer import Linear, OpenELM
from openelm.model.weights import Weights, in_memory


class PackedModule(nn.Module):
    """A matrix that neither learns nor is saved."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def product(self, x: Tensor) -> Tensor:
        """Multiply rows by the matrix: x (..., columns) -> (..., rows)."""
        return self.matrix.product(x)

    @property
    def weight(self) -> Tensor:
        """Refuse: there is no matrix that could be trained or saved."""
        raise _for_generation_alone()

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise _for_generation_alone()


def _for_generation_alone() -> ConfigError:
    what = "the matrices of this model are packed for generation, and can be neither trained nor saved"
    return ConfigError(what, fix="use what load_model gives")


class PackedLinear(PackedModule):
    """A projection without bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class PackedEmbedding(PackedModule):
    """An embedding, which may be the output matrix too: then by `product`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.rows(tokens)


def is_packed(model: OpenELM) -> bool:
    """Tell whether a model comes from `pack_model` or `load_packed`."""
    return isinstance(model.transformer.token_embeddings, PackedModule)


def pack_model(model: OpenELM) -> OpenELM | None:
    """Pack a copy of a model for generation; what happens to the weights later is not seen.

    The copy takes as much memory again, and needs nothing of the model that was given, which may go. None where the
    kernels do not take all of it as it is: other devices and dtypes, adapters, weights shared by several processes.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(type(tensor) not in (nn.Parameter, Tensor) or tensor.device.type != "cpu" for tensor in tensors.values()):
        return None
    return _packed(model, in_memory(tensors))


def load_packed(folder: Path, *, device: torch.device | str = "cpu") -> OpenELM:
    """Load a model folder to generate with it and nothing else: packed, a matrix at a time, where there are kernels.

    Raises:
        CheckpointError: as `load_model`, which does the rest.
    """
    if torch.device(device).type == "cpu" and kernels_name() != "torch":
        model, weights = open_model(folder)
        return _packed(model, weights) or filled(model, weights)
    return load_model(folder, device=device)


def _packed(model: OpenELM, weights: Weights) -> OpenELM | None:
    """Pack what `weights` reads; of `model` the modules count, not what they hold."""
    layouts = {
        name: layout for name, module in model.named_modules() if (layout := _layout(name, module, weights)) is not None
    }
    taken = {name + suffix for name in layouts for suffix in (WORDS, SCALES, BIASES)}
    norms = [name for name, tensor in weights.items() if len(tensor.shape) == 1]
    kinds = {weights[name].dtype for name in norms}
    alike = all(
        weights[name + BIASES].dtype == weights[name + SCALES].dtype for name in layouts if name + BIASES in weights
    )
    known = all(layout.is_known for layout in layouts.values()) and kinds <= {torch.float32, torch.bfloat16}
    if not (weights.keys() <= {*taken, *norms} and known and alike):
        return None
    with torch.device("meta"):
        found = OpenELM(model.config)
    ends = list(accumulate(layout.bytes for layout in layouts.values()))
    memory = memory_for(ends[-1]).tensor_split(ends[:-1])
    for (name, layout), place in zip(layouts.items(), memory, strict=True):
        tensors = [weights[name + suffix].read() for suffix in (WORDS, SCALES, BIASES) if name + suffix in weights]
        is_embedding = isinstance(model.get_submodule(name), nn.Embedding | QuantizedEmbedding)
        kind = PackedEmbedding if is_embedding else PackedLinear
        found.set_submodule(name, kind(PackedMatrix(layout, *tensors, memory=place)))
    for name in norms:
        scale = nn.Parameter(weights[name].read().clone(), requires_grad=False)
        found.get_submodule(name.rpartition(".")[0]).weight = scale
    found.quantization = model.quantization
    return found


def _layout(name: str, module: nn.Module, weights: Weights) -> Layout | None:
    halves = 2 if name.endswith("ffn.proj_1") else 1  # gate and up
    if type(module) in (Linear, nn.Embedding):
        rows, columns = weights[name + WORDS].shape
        return Layout(rows, columns, weights[name + WORDS].dtype, halves=halves)
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        kind, scales = module.quantization, weights[name + SCALES]
        rows, groups = scales.shape
        return Layout(rows, groups * kind.group_size, scales.dtype, kind.bits, kind.group_size, halves)
    return None
