"""Open a model in any layout, change what was asked for, and write it in any other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from openelm import huggingface
from openelm.convert.card import card, modelfile
from openelm.convert.corenet import open_corenet, write_corenet
from openelm.convert.extras import needed
from openelm.convert.gguf import open_gguf, write_gguf
from openelm.convert.hf import open_hf
from openelm.convert.llama import is_llama, open_llama
from openelm.convert.mlx import APPLE_WEIGHTS, open_apple_mlx
from openelm.convert.onnx import write_onnx
from openelm.convert.quantized import BITS, GROUP
from openelm.convert.source import EMBEDDING, HEAD, Source
from openelm.convert.targets import TARGETS
from openelm.errors import CheckpointError, ConfigError
from openelm.files.atomic import write_atomic
from openelm.files.hashes import FileFacts
from openelm.files.published import publish_folder
from openelm.model.folder import SHARD_BYTES, save_weights, write_json
from openelm.model.quantized import packed, rounded
from openelm.model.weights import LazyTensor, Weights
from openelm.text.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_FIX = "give a folder of Hugging Face, MLX or a Llama, a CoreNet .pt or a .gguf file"


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a model by what it is: a folder of Hugging Face, mlx-lm, Apple's MLX example or a Llama, `.pt`, `.gguf`.

    Raises:
        CheckpointError: it is none of these, is damaged, or holds a tensor that no OpenELM has, or lacks one.
    """
    if path.is_dir():
        yield _open_folder(path)
    elif path.suffix == ".gguf":
        yield open_gguf(path)
    elif path.suffix in _PICKLED:
        with open_corenet(path) as source:
            yield source
    else:
        raise CheckpointError("no such model", file=path, fix=_FIX)


def _open_folder(path: Path) -> Source:
    if (path / APPLE_WEIGHTS).exists():
        return open_apple_mlx(path)
    return open_llama(path) if is_llama(path) else open_hf(path)


def with_tokenizer(source: Source, tokenizer: Tokenizer) -> Source:
    """Attach a tokenizer, and say in the config which ids begin and end a text.

    Raises:
        ConfigError: it has more ids than the model has rows.
    """
    if tokenizer.vocab_size > source.config.vocab_size:
        what = f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {source.config.vocab_size:,} rows"
        raise ConfigError(what, fix="give the tokenizer that the model was trained with")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return replace(source, tokenizer=tokenizer, config=source.config.model_copy(update=ids))


def with_rows(source: Source, rows: int) -> Source:
    """Give the vocabulary another number of rows: the last ones are cut off, or rows of zeros put behind them.

    Apple's Hugging Face release has 32,000 rows, its training and MLX folders 32,128, of which the last 128 stand for
    no token. A row of zeros is a token of logit 0, which no text leads to but which takes a share of probability.

    Raises:
        ConfigError: ids of the tokenizer would have no row.
    """
    least = source.tokenizer.vocab_size if source.tokenizer is not None else 2
    if rows < least:
        raise ConfigError(f"{rows:,} rows for a vocabulary of {least:,} ids", fix="ask for as many or more")
    weights = dict(source.weights)
    for name in (EMBEDDING, HEAD):
        if name in weights:
            weights[name] = _resized(weights[name], rows)
    return replace(source, weights=weights, config=source.config.model_copy(update={"vocab_size": rows}))


def _resized(tensor: LazyTensor, rows: int) -> LazyTensor:
    def read() -> Tensor:
        whole = tensor.read()
        return torch.cat([whole[:rows], whole.new_zeros(max(0, rows - len(whole)), whole.shape[1])])

    return LazyTensor(tensor.dtype, (rows, tensor.shape[1]), read)


def with_dtype(source: Source, dtype: torch.dtype) -> Source:
    """Round all tensors to a dtype."""
    return replace(source, weights={name: tensor.to(dtype) for name, tensor in source.weights.items()})


@dataclass(frozen=True)
class Options:
    """What a conversion makes.

    Attributes:
        to: one of `targets.TARGETS`.
        dtype: one of `DTYPES`; None keeps the source's.
        quantize: how matrices are packed: a kind of GGUF, or bits a number for MLX; None leaves them alone.
        rows: of the vocabulary; None keeps them.
        chat_tuned: whether the model learned the chat format; None keeps what the source says.
        self_contained: put the modelling files for transformers into a Hugging Face folder.
        shard_bytes: most bytes of a file of weights, where a layout has several.
        replace: an existing folder that was published whole is replaced.
    """

    to: str
    dtype: str | None = None
    quantize: str | None = None
    rows: int | None = None
    chat_tuned: bool | None = None
    self_contained: bool = False
    shard_bytes: int = SHARD_BYTES
    replace: bool = False


def prepared(source: Source, options: Options, tokenizer: Tokenizer | None = None) -> Source:
    """Change what was asked for; nothing is read yet.

    Raises:
        ConfigError: the options do not fit the model.
    """
    if tokenizer is not None:
        source = with_tokenizer(source, tokenizer)
    if options.rows is not None:
        source = with_rows(source, options.rows)
    if options.dtype is not None:
        source = with_dtype(source, DTYPES[options.dtype])
    if options.chat_tuned is not None:
        source = replace(source, chat_tuned=options.chat_tuned)
    return source


def write(source: Source, out: Path, options: Options, written: Callable[[int], None] = lambda count: None) -> None:
    """Write a model in the layout that was asked for, as a folder that appears whole or not at all.

    Args:
        written: is told of every few bytes that were written.

    Raises:
        ConfigError: this model cannot be written so, or a package is missing.
        CheckpointError: the folder exists, or the source turns out to be damaged.
        DiskError: it cannot be written.
    """
    check_installed(options.to)
    _WRITERS[options.to](source, out, options, written)


def check_installed(to: str) -> None:
    """Import what writing a layout needs, so that it is missed before anything is done.

    Raises:
        ConfigError: it is not installed.
    """
    if (package := TARGETS[to]) is not None:
        needed(package, extra=package)


def _write_hf(source: Source, out: Path, options: Options, written: Callable[[int], None]) -> None:
    if options.quantize is not None:
        raise ConfigError("Hugging Face folders hold plain numbers", fix="quantise for --to mlx or --to gguf")
    _write_folder(source, source.weights, out, options, written)


def _write_mlx(source: Source, out: Path, options: Options, written: Callable[[int], None]) -> None:
    """The folder that mlx-lm reads is the one that Hugging Face reads, but for quantised matrices."""
    if source.config.rope_bf16_frequencies:
        raise ConfigError("mlx-lm rounds no rotary frequencies to bf16", fix="set rope_bf16_frequencies to false")
    if options.quantize is None:
        return _write_folder(source, source.weights, out, options, written)
    if options.quantize not in map(str, BITS):
        fix = f"bits: {', '.join(map(str, BITS))}"
        raise ConfigError(f"MLX numbers of {options.quantize} bits cannot be written", fix=fix)
    bits = int(options.quantize)
    weights = packed(source.weights, bits, GROUP, lambda name: rounded(source.weights[name].read(), bits, GROUP))
    return _write_folder(source, weights, out, options, written, {"group_size": GROUP, "bits": bits})


def _write_folder(
    source: Source,
    weights: Weights,
    out: Path,
    options: Options,
    written: Callable[[int], None],
    quantization: Mapping[str, int] | None = None,
) -> None:
    save_weights(
        out,
        source.config,
        weights,
        tokenizer=source.tokenizer,
        chat_tuned=source.chat_tuned,
        card=card(source),
        code=modelling_files() if options.self_contained else None,
        quantization=quantization,
        shard_bytes=options.shard_bytes,
        replace=options.replace,
        written=written,
    )


def _write_gguf(source: Source, out: Path, options: Options, written: Callable[[int], None]) -> None:
    known: dict[str, FileFacts] = {}
    with publish_folder(out, replace=options.replace, known=known) as folder:
        known["model.gguf"] = write_gguf(folder / "model.gguf", source, options.quantize, written)
        write_atomic(folder / "Modelfile", modelfile(source, "model.gguf").encode())


def _write_onnx(source: Source, out: Path, options: Options, written: Callable[[int], None]) -> None:
    known: dict[str, FileFacts] = {}
    with publish_folder(out, replace=options.replace, known=known) as folder:
        known |= write_onnx(folder, source, written)
        write_json(folder / "config.json", source.config.model_dump(mode="json"))
        if source.tokenizer is not None:
            source.tokenizer.save(folder, chat_template=source.chat_tuned)


def _write_corenet(source: Source, out: Path, options: Options, written: Callable[[int], None]) -> None:
    if not source.config.normalize_qk_projections:
        what = "CoreNet's checkpoints say the head size by norms of queries and keys, which this model lacks"
        raise ConfigError(what, fix="convert to hf, mlx or onnx")
    with publish_folder(out, replace=options.replace) as folder:
        write_corenet(folder / "checkpoint.pt", source.weights, written)
        if source.tokenizer is not None:
            source.tokenizer.save(folder, chat_template=source.chat_tuned)


_WRITERS = {
    "hf": _write_hf,
    "mlx": _write_mlx,
    "gguf": _write_gguf,
    "onnx": _write_onnx,
    "corenet": _write_corenet,
}


def modelling_files() -> dict[str, bytes]:
    """Return the files with which transformers loads the model where openelm is not installed, by name."""
    folder = Path(huggingface.__file__).parent
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*_openelm.py"))}
