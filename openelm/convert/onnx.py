"""ONNX with a key/value cache, node by node: nothing is traced, and one tensor is in memory at a time.

Inputs are `input_ids` and `position_ids` (B, T), `attention_mask` (B, P + T) with 1 where a position may be seen, and
for each layer i `past_key_values.i.key` and `.value` (B, KV heads of the layer, P, head size), P = 0 in the beginning.
Outputs are `logits` (B, T, V) and `present.i.key` and `.value`, the next call's past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openelm.convert.extras import needed
from openelm.convert.source import EMBEDDING, HEAD, Source
from openelm.files.hashed import HashedFile
from openelm.files.hashes import FileFacts
from openelm.model.config import ModelConfig
from openelm.model.rotary import RotaryTable
from openelm.model.weights import bytes_of

OPSET, IR_VERSION = 17, 8  # of 2021; what runtimes of all kinds read
_DATA, _ALIGNMENT = "model.onnx.data", 4096
_HIDDEN = -3.4028234663852886e38
"""The least fp32 number: what a hidden position adds to its score, so that a row of hidden ones is not NaN."""


def write_onnx(
    folder: Path, source: Source, written: Callable[[int], None] = lambda count: None
) -> dict[str, FileFacts]:
    """Write `model.onnx` and its weights, `model.onnx.data`; all numbers are fp32. Returns the latter's entry."""
    onnx = needed("onnx", extra="onnx")
    graph = _Graph(source.config)
    _model(graph, source.config, source.config.share_input_output_layers)
    end = 0
    for name, rows_first in graph.matrices.items():
        shape = source.weights[name].shape
        start = end + -end % _ALIGNMENT
        end = start + 4 * prod(shape)
        graph.stored(name, shape if rows_first else shape[::-1], start, end - start)
    with HashedFile(folder / _DATA, end) as file:
        for name, rows_first in graph.matrices.items():
            numbers = source.weights[name].read().float()
            file.write(bytes(-file.end % _ALIGNMENT))
            file.write(bytes_of(numbers if rows_first else numbers.t().contiguous()))
            written(source.weights[name].bytes)
    onnx.save(graph.finished(), folder / "model.onnx")
    return {_DATA: file.facts}


class _Graph:
    """Nodes, tensors and names of a graph that is being built; a node's output is named after what it computes."""

    def __init__(self, config: ModelConfig) -> None:
        from onnx import TensorProto, helper

        self.helper, self.proto, self.config = helper, TensorProto, config
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.named: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.matrices: dict[str, bool] = {}
        """Tensors of the model in the order in which they are used, and whether they lie as they were."""

    def node(self, operator: str, *inputs: str, count: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or a list of them."""
        names = [name] if name else [f"{operator.lower()}_{len(self.nodes)}_{index}" for index in range(count)]
        self.nodes.append(self.helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if count == 1 else names

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        from onnx import numpy_helper

        array = np.asarray(values, dtype)
        name = self.named.setdefault((array.dtype.str, array.shape, array.tobytes()), f"constant_{len(self.named)}")
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, *, rows_first: bool = True) -> str:
        self.matrices[name] = rows_first
        return name

    def stored(self, name: str, shape: Sequence[int], offset: int, size: int) -> None:
        """Say where a tensor lies in the file of weights."""
        tensor = self.proto(name=name, data_type=self.proto.FLOAT, dims=shape, data_location=self.proto.EXTERNAL)
        for key, value in (("location", _DATA), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        self.constants[name] = tensor

    def input(self, name: str, shape: Sequence[int | str], *, whole: bool = False) -> str:
        kind = self.proto.INT64 if whole else self.proto.FLOAT
        self.inputs.append(self.helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        self.outputs.append(self.helper.make_tensor_value_info(name, self.proto.FLOAT, shape))

    def finished(self) -> Any:
        graph = self.helper.make_graph(self.nodes, "openelm", self.inputs, self.outputs, list(self.constants.values()))
        opsets = [self.helper.make_opsetid("", OPSET)]
        return self.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="openelm")


def _model(graph: _Graph, config: ModelConfig, tied: bool) -> None:
    ids = graph.input("input_ids", ["batch", "length"], whole=True)
    positions = graph.input("position_ids", ["batch", "length"], whole=True)
    visible = graph.input("attention_mask", ["batch", "total"], whole=True)
    table = RotaryTable(config.head_dim, config.rope_freq_constant, bf16_frequencies=config.rope_bf16_frequencies)
    rotary = tuple(
        graph.node(
            "Unsqueeze", graph.node("Gather", graph.constant(part.numpy(), np.float32), positions), graph.constant([1])
        )
        for part in table.at(0, config.rope_max_length, torch.device("cpu"))
    )  # each (B, 1, T, head size / 2)
    hidden = _hidden(graph, ids, visible)
    graph.output("logits", ["batch", "length", config.vocab_size])
    x = graph.node("Gather", graph.weight(EMBEDDING), ids)
    for layer in range(config.num_transformer_layers):
        name = f"transformer.layers.{layer}"
        qkv = graph.node("MatMul", _norm(graph, x, f"{name}.attn_norm"), _projection(graph, f"{name}.attn.qkv_proj"))
        attended = _attention(graph, qkv, layer, rotary, hidden)
        x = graph.node("Add", x, graph.node("MatMul", attended, _projection(graph, f"{name}.attn.out_proj")))
        gate_up = graph.node("MatMul", _norm(graph, x, f"{name}.ffn_norm"), _projection(graph, f"{name}.ffn.proj_1"))
        gate, up = graph.node("Split", gate_up, count=2, axis=-1)
        gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        x = graph.node("Add", x, graph.node("MatMul", gated, _projection(graph, f"{name}.ffn.proj_2")))
    head = EMBEDDING if tied else graph.weight(HEAD)
    states = _norm(graph, x, "transformer.norm")
    graph.node("MatMul", states, graph.node("Transpose", head, perm=[1, 0]), name="logits")


def _projection(graph: _Graph, name: str) -> str:
    return graph.weight(f"{name}.weight", rows_first=False)


def _norm(graph: _Graph, x: str, name: str) -> str:
    squares = graph.node("ReduceMean", graph.node("Mul", x, x), axes=[-1], keepdims=1)
    root = graph.node("Sqrt", graph.node("Add", squares, graph.constant(graph.config.rms_norm_eps, np.float32)))
    return str(graph.node("Mul", graph.node("Div", x, root), graph.weight(f"{name}.weight")))


def _hidden(graph: _Graph, ids: str, visible: str) -> str:
    """Compute what is added to the scores: 0 where a query may see a key, (B, 1, 1, T, P + T)."""
    zero, one = graph.constant(0), graph.constant(1)
    length = graph.node("Gather", graph.node("Shape", ids), one)
    total = graph.node("Gather", graph.node("Shape", visible), one)
    keys = graph.node("Range", zero, total, one)
    queries = graph.node("Range", graph.node("Sub", total, length), total, one)
    past = graph.node("LessOrEqual", keys, graph.node("Unsqueeze", queries, graph.constant([1])))
    shown = graph.node("Unsqueeze", graph.node("Cast", visible, to=graph.proto.BOOL), graph.constant([1, 2, 3]))
    seen = graph.node("And", past, shown)
    return str(graph.node("Where", seen, graph.constant(0, np.float32), graph.constant(_HIDDEN, np.float32)))


def _attention(graph: _Graph, qkv: str, layer: int, rotary: tuple[str, ...], hidden: str) -> str:
    """Attend with grouped heads: queries of a group are a further axis, so that keys are never repeated."""
    config, plan = graph.config, graph.config.plan
    heads, kv_heads, size = plan.query_heads[layer], plan.kv_heads[layer], config.head_dim
    groups = heads // kv_heads
    split = graph.node("Reshape", qkv, graph.constant([0, 0, heads + 2 * kv_heads, size]))
    turned = graph.node("Transpose", split, perm=[0, 2, 1, 3])
    query, key, value = graph.node("Split", turned, graph.constant([heads, kv_heads, kv_heads]), count=3, axis=1)
    name = f"transformer.layers.{layer}.attn"
    if config.normalize_qk_projections:
        query, key = _norm(graph, query, f"{name}.q_norm"), _norm(graph, key, f"{name}.k_norm")
    query, key = _rotated(graph, query, rotary), _rotated(graph, key, rotary)
    kept = []
    for kind, new in (("key", key), ("value", value)):
        past = graph.input(f"past_key_values.{layer}.{kind}", ["batch", kv_heads, "past", size])
        kept.append(graph.node("Concat", past, new, axis=2, name=f"present.{layer}.{kind}"))
        graph.output(f"present.{layer}.{kind}", ["batch", kv_heads, "total", size])
    keys, values = (graph.node("Unsqueeze", part, graph.constant([2])) for part in kept)
    scaled = graph.node("Mul", query, graph.constant(size**-0.5, np.float32))
    grouped = graph.node("Reshape", scaled, graph.constant([0, kv_heads, groups, -1, size]))
    scores = graph.node("MatMul", grouped, graph.node("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    weights = graph.node("Softmax", graph.node("Add", scores, hidden), axis=-1)
    mixed = graph.node("Reshape", graph.node("MatMul", weights, values), graph.constant([0, heads, -1, size]))
    merged = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
    return str(graph.node("Reshape", merged, graph.constant([0, 0, heads * size])))


def _rotated(graph: _Graph, x: str, rotary: tuple[str, ...]) -> str:
    cos, sin = rotary
    first, second = graph.node("Split", x, count=2, axis=-1)
    left = graph.node("Sub", graph.node("Mul", first, cos), graph.node("Mul", second, sin))
    right = graph.node("Add", graph.node("Mul", second, cos), graph.node("Mul", first, sin))
    return str(graph.node("Concat", left, right, axis=-1))
