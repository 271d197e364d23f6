"""A model folder's matrices to 4 or 8 bits a number, a matrix at a time; the result is a folder of mlx-lm's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from openelm.errors import ConfigError, DataError, NumericError
from openelm.generate.gptq import rounded_for_products, rounded_to_searched
from openelm.kernels.quantized import dequantised
from openelm.kernels.rms_norm import rms_norm
from openelm.model.config import ModelConfig
from openelm.model.folder import is_chat_tuned, open_model, save_weights
from openelm.model.quantized import BITS, GROUPS, Packed, Quantization, packed, rounded
from openelm.model.rotary import RotaryTable
from openelm.model.transformer import Layer, block
from openelm.model.weights import Weights
from openelm.text.tokenizer import Tokenizer, load_tokenizer

Method: TypeAlias = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")
CALIBRATION_TOKENS = 32_768
_CALIBRATION_LENGTH = 2048
_SPREAD = 8  # calibration rows are taken evenly from so many times as many tokens
_BATCH_ROWS = 8
_CPU = torch.device("cpu")
_EMBEDDING, _HEAD = "transformer.token_embeddings.weight", "lm_head.weight"
_LAYERS, _NORM = "transformer.layers.", "transformer.norm.weight"
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
        written: is told how many bytes of weights of how many are done.

    Raises:
        ConfigError: bits, group or method that there are not, or a model that is quantised already.
        CheckpointError: the folder is damaged, or `out` exists.
        DataError: there is too little calibration text.
        NumericError: weights or states are not finite; names the matrix.
    """
    if method not in METHODS:
        raise ConfigError(f"no method is called {method!r}", fix=f"methods: {', '.join(METHODS)}")
    model, weights = open_model(folder)
    if model.quantization is not None:
        what = f"the model is quantised already, to {model.quantization.bits} bits"
        raise ConfigError(what, file=folder, fix="give the model that it was made from")
    quantization = _chosen(bits, group, weights)
    tokenizer, bits, group = load_tokenizer(folder), quantization.bits, quantization.group_size
    if method == "gptq":
        rows = calibration_rows(calibration, tokenizer, model.config.max_context_length)
        pack_one = _Calibrated(model.config, weights, rows, quantization).pack
    else:

        def pack_one(name: str) -> Packed:
            return rounded(_finite(weights, name), bits, group)

    parts, done = packed(weights, bits, group, pack_one), 0
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


def calibration_rows(texts: Iterable[str], tokenizer: Tokenizer, context_tokens: int) -> Tensor:
    """Cut texts, one behind the other, into rows of tokens (R, T), and take some evenly: `CALIBRATION_TOKENS` in all.

    Raises:
        DataError: the texts do not fill one row.
    """
    length = min(context_tokens, _CALIBRATION_LENGTH)
    ids: list[int] = []
    for text in texts:
        ids += [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]
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
        self._states: list[Tensor] = []
        self._number, self._layer = -1, nn.Module()
        self._head = _EMBEDDING if config.share_input_output_layers else _HEAD
        rotary = RotaryTable(config.head_dim, config.rope_freq_constant, bf16_frequencies=config.rope_bf16_frequencies)
        self._rope = rotary.at(0, ids.shape[1], _CPU)

    @torch.no_grad()
    def pack(self, name: str) -> Packed:
        weight = _finite(self._weights, name)
        if name.startswith(_LAYERS):
            return self._in_layer(name, weight)
        if name == self._head:
            parts = rounded_for_products(weight, self._final_hessian(), self._bits, self._group, _HEAD_DAMPING)
        else:
            parts = rounded_to_searched(weight, self._bits, self._group)
        if name == _EMBEDDING:
            self._embed(dequantised(*parts, self._bits, self._group))
        return parts

    def _in_layer(self, name: str, weight: Tensor) -> Packed:
        number, *path, _ = name.removeprefix(_LAYERS).split(".")
        if not self._states:  # the embedding's rows are not whole groups
            self._embed(self._weights[_EMBEDDING].read())
        self._go_to(int(number))
        module = self._layer.get_submodule(".".join(path))
        parts = rounded_for_products(weight, self._hessian(module), self._bits, self._group)
        module.weight = nn.Parameter(dequantised(*parts, self._bits, self._group).float())
        return parts

    def _embed(self, table: Tensor) -> None:
        self._states = [table[batch].float() for batch in torch.split(self._ids, _BATCH_ROWS)]
        self._number = -1

    def _go_to(self, number: int) -> None:
        """Compute what goes into a layer, and load its weights in fp32."""
        while self._number < number:
            if self._number >= 0:
                self._states = self._run()
            self._number += 1
            prefix = f"{_LAYERS}{self._number}."
            own = {name: tensor for name, tensor in self._weights.items() if name.startswith(prefix)}
            with torch.device("meta"):
                self._layer = Layer(self._config, self._number)
            tensors = {name.removeprefix(prefix): tensor.read().float() for name, tensor in own.items()}
            self._layer.load_state_dict(tensors, assign=True)

    def _hessian(self, module: nn.Module) -> Tensor:
        """Sum x xᵀ over all inputs x of a projection."""
        columns = module.get_parameter("weight").shape[1]
        sums = torch.zeros(columns, columns)

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            sums.addmm_(rows.T, rows)

        hook = module.register_forward_pre_hook(add)
        self._run()
        hook.remove()
        return sums

    def _final_hessian(self) -> Tensor:
        """Sum x xᵀ over the states x that the output matrix is multiplied with, of the plain model."""
        before = self._states, self._number, self._layer
        self._embed(self._weights[_EMBEDDING].read())
        self._go_to(self._config.num_transformer_layers - 1)
        scale, sums = self._weights[_NORM].read().float(), torch.zeros(self._config.model_dim, self._config.model_dim)
        for states in self._run():
            rows = rms_norm(states, scale, self._config.rms_norm_eps).flatten(0, -2)
            sums.addmm_(rows.T, rows)
        self._states, self._number, self._layer = before
        return sums

    def _run(self) -> list[Tensor]:
        return [self._layer(states, self._rope, None, None, block) for states in self._states]


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
