"""GGUF, of llama.cpp and Ollama: one table of names, read both ways."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openelm.convert.extras import needed
from openelm.convert.gguf_file import GGUF, PLAIN, read_gguf
from openelm.convert.gguf_tokenizer import tokenizer_fields, tokenizer_from
from openelm.convert.source import EMBEDDING, HEAD, Source, config_of
from openelm.errors import CheckpointError, ConfigError
from openelm.files.hashed import HashedFile
from openelm.files.hashes import FileFacts
from openelm.model.config import ModelConfig
from openelm.model.weights import LazyTensor, Weights

ARCHITECTURE = "openelm"
_WHOLE = {"token_embd.weight": EMBEDDING, "output_norm.weight": "transformer.norm.weight", "output.weight": HEAD}
_IN_LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "attn_qkv.weight": "attn.qkv_proj.weight",
    "attn_q_norm.weight": "attn.q_norm.weight",
    "attn_k_norm.weight": "attn.k_norm.weight",
    "attn_output.weight": "attn.out_proj.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_down.weight": "ffn.proj_2.weight",
}
KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
"""What matrices can be written as, each with llama.cpp's name for such a file."""
_KIND_OF = {torch.float64: "f32", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_GATE, _UP, _GATE_UP = "ffn_gate.weight", "ffn_up.weight", "ffn.proj_1.weight"
_BLOCK = re.compile(r"blk\.(\d{1,3})\.(.+)")
_LAYER = re.compile(r"transformer\.layers\.(\d{1,3})\.(.+)")


def open_gguf(path: Path) -> Source:
    """Open a GGUF file; quantised matrices are the numbers that they stand for.

    Raises:
        CheckpointError: it is damaged, of another architecture, or its metadata and tensors disagree.
    """
    file = read_gguf(path)
    if (found := file.fields.get("general.architecture")) != ARCHITECTURE:
        raise CheckpointError(f"general.architecture is {found!r}, not 'openelm'", file=path)
    weights = _one_dtype(_published(file.tensors, path))
    context = _field(file, "context_length", int, path)
    fields = {
        "max_context_length": context,
        "rope_max_length": 2 * context,
        "rms_norm_eps": _decimal(_field(file, "attention.layer_norm_rms_epsilon", float, path)),
        "rope_freq_constant": _decimal(_field(file, "rope.freq_base", float, path)),
    }
    tokenizer = tokenizer_from(file.fields, path)
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = config_of(weights, path, **fields, **ids)
    _compare(file, config, path)
    chat_tuned = "tokenizer.chat_template" in file.fields
    return Source(path, "gguf", config, weights, tokenizer, chat_tuned).checked()


def _published(tensors: Weights, path: Path) -> dict[str, LazyTensor]:
    """Rename all tensors; gate and up become the two halves of `proj_1`."""
    weights = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if name in _WHOLE:
            weights[_WHOLE[name]] = tensor
        elif match and match[2] in _IN_LAYER:
            weights[f"transformer.layers.{int(match[1])}.{_IN_LAYER[match[2]]}"] = tensor
        elif match and match[2] == _GATE:
            up = tensors.get(f"blk.{match[1]}.{_UP}")
            if up is None or up.shape != tensor.shape:
                raise CheckpointError(f"missing or misshapen blk.{match[1]}.{_UP}", file=path)
            weights[f"transformer.layers.{int(match[1])}.{_GATE_UP}"] = _stacked(tensor, up)
        elif not (match and match[2] == _UP):
            raise CheckpointError(f"unexpected {name}", file=path, fix="the file is of another model")
    return weights


def _stacked(gate: LazyTensor, up: LazyTensor) -> LazyTensor:
    shape = (2 * gate.shape[0], *gate.shape[1:])
    return LazyTensor(gate.dtype, shape, lambda: torch.cat([gate.read(), up.read().to(gate.dtype)]))


def _one_dtype(weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Give all tensors one dtype. Norms are fp32 in these files: they get the matrices' dtype if they lose nothing."""
    kinds = {tensor.dtype for tensor in weights.values() if len(tensor.shape) > 1}
    narrow = kinds.pop() if len(kinds) == 1 else torch.float32
    norms = [tensor for tensor in weights.values() if len(tensor.shape) == 1 and tensor.dtype != narrow]
    if narrow != torch.float32 and any(_loses(norm.read(), narrow) for norm in norms):
        narrow = torch.float32
    return {name: tensor.to(narrow) for name, tensor in weights.items()}


def _loses(tensor: Tensor, dtype: torch.dtype) -> bool:
    return not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _field(file: GGUF, name: str, kind: type, path: Path) -> Any:
    value = file.fields.get(f"{ARCHITECTURE}.{name}")
    if type(value) is not kind:
        raise CheckpointError(f"{ARCHITECTURE}.{name} is {value!r}, not {kind.__name__}", file=path)
    return value


def _decimal(value: float) -> float:
    """Return the number that somebody wrote, of which the file holds the nearest fp32."""
    return float(f"{value:.7g}")


def _compare(file: GGUF, config: ModelConfig, path: Path) -> None:
    """Check what the file says of its shapes against its tensors."""
    for name, expected in _shape_fields(config).items():
        value = file.fields.get(f"{ARCHITECTURE}.{name}", expected)
        if isinstance(expected, list) and type(value) is int:
            value = [value] * config.num_transformer_layers
        if value != expected:
            what = f"{ARCHITECTURE}.{name} is {value!r}, but the tensors have {expected!r}"
            raise CheckpointError(what, file=path)


def _shape_fields(config: ModelConfig) -> dict[str, Any]:
    plan = config.plan
    return {
        "block_count": plan.layers,
        "embedding_length": plan.dim,
        "feed_forward_length": list(plan.ffn_dims),
        "attention.head_count": list(plan.query_heads),
        "attention.head_count_kv": list(plan.kv_heads),
        "attention.key_length": plan.head_dim,
        "attention.value_length": plan.head_dim,
        "rope.dimension_count": plan.head_dim,
    }


def gguf_names(name: str) -> list[str]:
    """Give the GGUF names of a tensor of the Hugging Face release: one, or two that it is cut into."""
    whole = {published: short for short, published in _WHOLE.items()}
    in_layer = {published: short for short, published in _IN_LAYER.items()}
    if name in whole:
        return [whole[name]]
    match = _LAYER.fullmatch(name)
    assert match is not None
    parts = [_GATE, _UP] if match[2] == _GATE_UP else [in_layer[match[2]]]
    return [f"blk.{match[1]}.{part}" for part in parts]


def write_gguf(
    path: Path, source: Source, kind: str | None = None, written: Callable[[int], None] = lambda count: None
) -> FileFacts:
    """Write a GGUF file, holding few tensors at a time; returns its entry for a manifest.

    Args:
        kind: of the matrices, one of `KINDS`; None keeps their dtype. Norms are fp32.

    Raises:
        ConfigError: no such kind, rotary frequencies that llama.cpp does not have, queries and keys without norms, an
            output matrix of its own, or a tokenizer that is no SentencePiece model.
    """
    gguf = needed("gguf", extra="gguf")
    config = source.config
    if config.rope_bf16_frequencies:
        raise ConfigError("llama.cpp rounds no rotary frequencies to bf16", fix="set rope_bf16_frequencies to false")
    if not config.normalize_qk_projections:
        raise ConfigError("llama.cpp's OpenELM normalises queries and keys", fix="convert to hf, mlx or onnx")
    if not config.share_input_output_layers:
        raise ConfigError("llama.cpp's OpenELM has no output matrix of its own", fix="convert to hf, mlx or onnx")
    name = kind or _KIND_OF[source.weights[EMBEDDING].dtype]
    if name not in KINDS:
        raise ConfigError(f"no kind of GGUF matrices is called {name!r}", fix=f"kinds: {', '.join(KINDS)}")
    matrices = gguf.GGMLQuantizationType[name.upper()]
    read = functools.lru_cache(maxsize=1)(lambda name: source.weights[name].read())  # for both halves of one
    parts = [
        part
        for name, tensor in source.weights.items()
        for part in _parts(name, tensor.shape, functools.partial(read, name), matrices)
    ]
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType[KINDS[name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in _metadata(source).items():
        _add(writer, key, value)
    for part in parts:
        writer.add_tensor_info(part.name, part.packed, np.dtype(np.uint8), part.bytes, part.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()

    def padding(size: int) -> bytes:
        return bytes(-size % gguf.GGUF_DEFAULT_ALIGNMENT)

    sizes = (len(header), *(part.bytes for part in parts))
    with HashedFile(path, sum(size + len(padding(size)) for size in sizes)) as file:
        file.write(header + padding(len(header)))
        for part in parts:
            blocks = part.read()
            file.write(blocks.reshape(-1).data)
            file.write(padding(blocks.nbytes))
            written(blocks.nbytes)
    return file.facts


@dataclass(frozen=True)
class _Part:
    """A tensor of the file: its name, its type in ggml, and its blocks."""

    name: str
    kind: Any
    packed: tuple[int, ...]
    read: Callable[[], NDArray[np.uint8]]

    @property
    def bytes(self) -> int:
        return prod(self.packed)


def _parts(name: str, whole: tuple[int, ...], read_whole: Callable[[], Tensor], matrices: Any) -> list[_Part]:
    """Cut a tensor into those that GGUF has."""
    gguf = needed("gguf", extra="gguf")
    names = gguf_names(name)
    shape = (whole[0] // len(names), *whole[1:])
    kind = matrices if len(whole) > 1 else gguf.GGMLQuantizationType.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16  # rows that are no whole number of blocks, as llama.cpp leaves them
    packed = gguf.quant_shape_to_byte_shape(shape, kind)

    def reader(index: int) -> Callable[[], NDArray[np.uint8]]:
        def read() -> NDArray[np.uint8]:
            half = read_whole()[index * shape[0] : (index + 1) * shape[0]]
            return _blocks(half, kind).reshape(packed)

        return read

    return [_Part(short, kind, tuple(packed), reader(index)) for index, short in enumerate(names)]


def _blocks(tensor: Tensor, kind: Any) -> NDArray[np.uint8]:
    gguf = needed("gguf", extra="gguf")
    plain = PLAIN.get(int(kind))
    if plain is not None:
        return tensor.to(plain).contiguous().view(torch.uint8).numpy()
    blocks: NDArray[np.uint8] = gguf.quantize(tensor.float().numpy(), kind)
    return blocks


def _metadata(source: Source) -> dict[str, Any]:
    config = source.config
    shape = {f"{ARCHITECTURE}.{name}": value for name, value in _shape_fields(config).items()}
    tokenizer = source.tokenizer
    return {
        **shape,
        f"{ARCHITECTURE}.context_length": config.max_context_length,
        f"{ARCHITECTURE}.vocab_size": config.vocab_size,
        f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{ARCHITECTURE}.rope.freq_base": float(config.rope_freq_constant),
        **({} if tokenizer is None else tokenizer_fields(tokenizer, config.vocab_size, chat_tuned=source.chat_tuned)),
    }


def _add(writer: Any, name: str, value: Any) -> None:
    """Add a field by its type; whole numbers are u32, as llama.cpp's own converter writes them."""
    kinds: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](name, value)
