"""Matrices of 4 or 8 bits a number: what config.json says of them, how numbers are rounded, and the modules.

A quantised model folder is the one that mlx-lm writes and reads: `X.weight` holds words, `X.scales` and `X.biases` have
the model's dtype, and matrices whose rows are not whole groups stay as they are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from openelm.config import Config
from openelm.errors import CheckpointError, ConfigError
from openelm.kernels.quantized import WORD_BITS, dequantised, groups_of, momentary, pack, quantized_linear
from openelm.model.weights import LazyTensor, Weights

if TYPE_CHECKING:
    from openelm.model.transformer import OpenELM

BITS, GROUPS = (4, 8), (32, 64)
WORDS, SCALES, BIASES = ".weight", ".scales", ".biases"
"""What the names of a quantised matrix's parts end in."""
Packed: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Words, and scales and biases in the dtype of the matrix."""
_KEY, _SAME = "quantization", "quantization_config"  # mlx-lm writes both, with one content
_LEAST_SCALE = 1e-7  # MLX's
_FIX = (
    f"bits: {', '.join(map(str, BITS))}; group_size: {', '.join(map(str, GROUPS))}; mode: affine; all matrices alike "
    "(openelm convert … --to hf unpacks 2 bits too)"
)


class Quantization(Config):
    """How a model's matrices are held, under the names of mlx-lm's config."""

    bits: Literal[4, 8]
    group_size: Literal[32, 64] = 64
    mode: Literal["affine"] = "affine"

    @classmethod
    def from_file(cls, path: Path) -> Quantization | None:
        """Read what a `config.json` that is a model's says of quantisation; None where nothing is packed.

        Raises:
            CheckpointError: it says what this module cannot hold; names what is allowed.
        """
        values = json.loads(path.read_bytes())
        found, same = values.get(_KEY), values.get(_SAME)
        if found is None and same is None:
            return None
        if found is None or same not in (None, found):
            what = f"{_SAME} of config.json is not of mlx-lm: it wants {_KEY} beside it, with the same content"
            raise CheckpointError(what, file=path, fix=_FIX)
        try:
            return cls.parse(found if isinstance(found, Mapping) else {_KEY: found})
        except ConfigError as error:
            raise CheckpointError(f"{_KEY}: {error.what}", file=path, fix=_FIX) from None

    def to_json(self) -> dict[str, int]:
        """Return what config.json says."""
        return {"group_size": self.group_size, "bits": self.bits}


def rounded(weight: Tensor, bits: int, group: int) -> Packed:
    """Round a matrix to the nearest of the numbers between each group's least and largest, as MLX does, to the bit."""
    bins = (1 << bits) - 1
    grouped = groups_of(weight, group).float()
    low, high = grouped.aminmax(dim=-1)
    below = low.abs() > high.abs()  # the end that is farther from zero is met exactly
    scales = ((high - low) / bins).clamp(min=_LEAST_SCALE)
    scales = torch.where(below, scales, -scales)
    edge = torch.where(below, low, high)
    steps = (edge / scales).round()
    scales = torch.where(steps == 0, scales, edge / steps)
    biases = torch.where(steps == 0, 0.0, edge)
    numbers = ((grouped - biases[..., None]) / scales[..., None]).round().clamp(0, bins)
    return pack(numbers.flatten(-2), bits), scales.to(weight.dtype), biases.to(weight.dtype)


def packed(weights: Weights, bits: int, group: int, pack_one: Callable[[str], Packed]) -> dict[str, LazyTensor]:
    """Let words, scales and biases stand for each matrix whose rows are whole groups; other tensors stay.

    Args:
        pack_one: packs the matrix of a name, when its parts are read; they are, one after the other.
    """
    found: dict[str, LazyTensor] = {}
    parts = functools.lru_cache(maxsize=1)(pack_one)
    for name, tensor in weights.items():
        if len(tensor.shape) == 1 or tensor.shape[1] % group:
            found[name] = tensor
            continue
        stem, (rows, columns) = name.removesuffix(WORDS), tensor.shape
        shapes = ((rows, columns * bits // WORD_BITS), *[(rows, columns // group)] * 2)
        dtypes = (torch.uint32, tensor.dtype, tensor.dtype)
        for index, kind in enumerate((WORDS, SCALES, BIASES)):
            read = functools.partial(lambda name, index: parts(name)[index], name, index)
            found[stem + kind] = LazyTensor(dtypes[index], shapes[index], read)
    return found


class QuantizedMatrix(nn.Module):
    """A matrix (rows, columns) as words, scales and biases, which do not learn."""

    weight: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(self, rows: int, columns: int, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization
        words, groups = columns * quantization.bits // WORD_BITS, columns // quantization.group_size
        self.register_buffer("weight", torch.empty(rows, words, dtype=torch.uint32))
        self.register_buffer("scales", torch.empty(rows, groups))
        self.register_buffer("biases", torch.empty(rows, groups))

    def product(self, x: Tensor) -> Tensor:
        """Multiply rows by the matrix: x (..., columns) -> (..., rows)."""
        kind = self.quantization
        return quantized_linear(x, self.weight, self.scales, self.biases, kind.bits, kind.group_size)

    def momentary(self) -> Tensor:
        """Return the matrix (rows, columns), until this thread asks for another one so."""
        kind = self.quantization
        return momentary(self.weight, self.scales, self.biases, kind.bits, kind.group_size)

    def whole_matrix(self) -> Tensor:
        """Return the matrix (rows, columns) that the words stand for."""
        kind = self.quantization
        return dequantised(self.weight, self.scales, self.biases, kind.bits, kind.group_size)

    def rows(self, indices: Tensor) -> Tensor:
        """Look rows up: (...,) -> (..., columns)."""
        kind = self.quantization
        words = self.weight.view(torch.int32)[indices].view(torch.uint32)  # torch indexes few dtypes
        return dequantised(words, self.scales[indices], self.biases[indices], kind.bits, kind.group_size)


class QuantizedLinear(QuantizedMatrix):
    """A projection without bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class QuantizedEmbedding(QuantizedMatrix):
    """An embedding, which may be the output matrix too: then by `product`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows(tokens)


def hold_quantized(model: OpenELM, quantization: Quantization) -> None:
    """Put modules that hold words into the place of those whose matrices are quantised."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % quantization.group_size == 0:
            kind = QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
            rows, columns = module.weight.shape
            model.set_submodule(name, kind(rows, columns, quantization))
    model.quantization = quantization


def check_packed(found: Weights, model: OpenELM, file: Path) -> None:
    """Compare which tensors are words with what the model holds.

    Raises:
        CheckpointError: names one that should hold words and holds numbers, or the other way round.
    """
    for name, expected in model.state_dict().items():
        if (found[name].dtype == torch.uint32) != (expected.dtype == torch.uint32):
            given, wanted = (str(dtype).removeprefix("torch.") for dtype in (found[name].dtype, expected.dtype))
            raise CheckpointError(f"{name} is of {given}, the config asks for {wanted}", file=file)
