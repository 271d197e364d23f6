"""A model folder's matrices to 4 or 8 bits a number, a matrix at a time; the result is a folder of mlx-lm's layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from openelm.errors import ConfigError, DataError, NumericError
from openelm.generate.gptq import rounded_for_products, rounded_to_searched
from openelm.generate.walk import EMBEDDING, LAYERS, Walk
from openelm.kernels.quantized import dequantised
from openelm.model.config import ModelConfig
from openelm.model.folder import is_chat_tuned, open_model, save_weights
from openelm.model.quantized import BITS, GROUPS, Packed, Quantization, packed, rounded
from openelm.model.weights import LazyTensor, Weights
from openelm.text.tokenizer import Tokenizer, load_tokenizer

Method: TypeAlias = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")
CALIBRATION_TOKENS = 16_384
_CALIBRATION_LENGTH = 2048
_SPREAD = 16  # calibration rows are taken evenly from so many times as many tokens
_HEAD = "lm_head.weight"
_HEAD_DAMPING = 0.1  # the embedding's numbers count too


def quantize(
    folder: Path,
    out: Path,
    *,
    bits: int,
    group: int | None = None,
    method: Method = "rtn",
    calibration: Iterable[str] = (),
    written: Callable[[int, int], None] = lambda done, total: None,
) -> Quantization:
    """Publish a quantised copy of a model folder; returns how its matrices are held.

    Memory holds a layer in fp32, and with `gptq` the states of the calibration text and one matrix's Hessian.

    Args:
        group: numbers that share a scale; by default 64, or 32 where that leaves a matrix out and 32 does not.
        method: rtn rounds each number to the nearest, as MLX does to the bit; gptq rounds for the products with what
            `calibration` makes of each matrix's inputs.
        calibration: texts; `CALIBRATION_TOKENS` of them are used.
        written: is told how many bytes of how many are done.

    Raises:
        ConfigError: bits, group or method that there are not, or a model that is quantised already.
        CheckpointError: the folder is damaged, or `out` exists.
        DataError: there is too little calibration text.
        NumericError: weights or states are not finite; names the matrix.
    """
    model, weights = open_model(folder)
    if model.quantization is not None:
        what = f"the model is quantised already, to {model.quantization.bits} bits"
        raise ConfigError(what, file=folder, fix="give the model that it was made from")
    if method not in METHODS:
        raise ConfigError(f"no method is called {method!r}", fix=f"methods: {', '.join(METHODS)}")
    quantization, tokenizer, done = _chosen(bits, group, weights), load_tokenizer(folder), 0
    rows = None
    if method == "gptq":
        rows = calibration_rows(calibration, tokenizer, model.config.max_context_length)
    parts = _packed(model.config, weights, rows, quantization)
    total = sum(tensor.bytes for tensor in parts.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        written(done, total)

    save_weights(
        out,
        model.config,
        parts,
        tokenizer=tokenizer,
        chat_tuned=is_chat_tuned(folder),
        card=_card(folder, quantization, method),
        quantization=quantization.to_json(),
        written=advance,
    )
    return quantization


def _packed(config: ModelConfig, weights: Weights, rows: Tensor | None, kind: Quantization) -> dict[str, LazyTensor]:
    if rows is not None:
        return packed(weights, kind.bits, kind.group_size, _Calibrated(config, weights, rows, kind).pack)
    nearest = functools.partial(rounded, bits=kind.bits, group=kind.group_size)
    return packed(weights, kind.bits, kind.group_size, lambda name: nearest(_finite(weights, name)))


def calibration_rows(texts: Iterable[str], tokenizer: Tokenizer, context_tokens: int) -> Tensor:
    """Cut texts, one behind the other, into rows of tokens (R, T), and take some evenly: `CALIBRATION_TOKENS` in all.

    Raises:
        DataError: the texts do not fill one row.
    """
    length = min(context_tokens, _CALIBRATION_LENGTH)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.start_ids, *tokenizer.encode(text)]
        if len(ids) >= _SPREAD * CALIBRATION_TOKENS:
            break
    if len(ids) < length:
        what = f"the calibration text has {len(ids):,} tokens"
        raise DataError(what, fix=f"give {length:,} or more; {CALIBRATION_TOKENS:,} are used where there are as many")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    count = min(len(rows), max(1, CALIBRATION_TOKENS // length))
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


class _Calibrated:
    """Quantises matrices in the order of the model: each for the inputs that the quantised ones before it give.

    The output matrix is rounded for the states of the plain model: being the embedding, it comes first.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ids: Tensor, quantization: Quantization) -> None:
        self._config, self._weights, self._ids = config, weights, ids
        self._bits, self._group = quantization.bits, quantization.group_size
        self._head = EMBEDDING if config.share_input_output_layers else _HEAD
        self._table: Tensor | None = None
        self._walk: Walk | None = None

    def pack(self, name: str) -> Packed:
        weight = _finite(self._weights, name)
        if name.startswith(LAYERS):
            self._walk = self._walk or Walk(self._config, self._weights, self._ids, self._table)
            parts = rounded_for_products(weight, _hessian(self._walk.inputs_of(name)), self._bits, self._group)
            self._walk.replace(dequantised(*parts, self._bits, self._group))
            return parts
        if name == self._head:
            states = Walk(self._config, self._weights, self._ids).last_states()
            parts = rounded_for_products(weight, _hessian(states), self._bits, self._group, _HEAD_DAMPING)
        else:
            parts = rounded_to_searched(weight, self._bits, self._group)
        if name == EMBEDDING:
            self._table = dequantised(*parts, self._bits, self._group)
        return parts


def _hessian(inputs: list[Tensor]) -> Tensor:
    """Sum x xᵀ over the rows x of all inputs (…, columns)."""
    columns = inputs[0].shape[-1]
    sums = torch.zeros(columns, columns)
    for batch in inputs:
        rows = batch.view(-1, columns)
        sums.addmm_(rows.T, rows)
    return sums


def _chosen(bits: int, group: int | None, weights: Weights) -> Quantization:
    if bits not in BITS or group not in (None, *GROUPS):
        fix = f"bits: {', '.join(map(str, BITS))}; group: {', '.join(map(str, GROUPS))}"
        raise ConfigError(f"{bits} bits by groups of {group or max(GROUPS)} cannot be written", fix=fix)
    widths = [tensor.shape[1] for tensor in weights.values() if len(tensor.shape) == 2]
    fitting = [size for size in sorted(GROUPS, reverse=True) if not any(width % size for width in widths)]
    size = group or next(iter(fitting), max(GROUPS))
    if all(width % size for width in widths):
        raise ConfigError(f"no matrix of this model has rows of whole groups of {size}", fix="it cannot be quantised")
    return Quantization.parse({"bits": bits, "group_size": size})


def _finite(weights: Weights, name: str) -> Tensor:
    weight = weights[name].read()
    if not torch.isfinite(weight).all():
        raise NumericError(f"{name} holds numbers that are not finite", fix="the model is damaged")
    return weight


def _card(folder: Path, quantization: Quantization, method: Method) -> str:
    """Say on the model's own card what was done to it."""
    path = folder / "README.md"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else f"# {folder.name}\n"
    how = {"rtn": "each number to the nearest", "gptq": "for products with a calibration text (GPTQ, arXiv 2210.17323)"}
    bits, group = quantization.bits, quantization.group_size
    return (
        f"{text.rstrip()}\n\n## Quantised\n\nMatrices have {bits} bits a number, by groups of {group}, rounded "
        f"{how[method]}. openelm and mlx-lm read this folder; `openelm convert … --to hf` unpacks it for others.\n"
    )
