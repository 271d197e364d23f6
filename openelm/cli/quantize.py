"""`openelm quantize`: a model folder to 4 or 8 bits a number."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.progress import DownloadColumn

from openelm.cli.screen import Screen, WorkBar


def quantize(arguments: argparse.Namespace) -> int:
    """Quantise a model folder, and say what it takes on the disk and, if asked, what it is worth, before and after."""
    from openelm.errors import ConfigError
    from openelm.generate.quantize import Method
    from openelm.generate.quantize import quantize as write_quantized
    from openelm.model.device import reuse_freed_memory
    from openelm.model.weights import open_weights

    method: Method = arguments.method or ("rtn" if arguments.calibration is None else "gptq")
    if (method == "gptq") == (arguments.calibration is None):
        fix = "give --method gptq with --calibration TEXT, or neither"
        raise ConfigError(f"method {method} {'needs a' if method == 'gptq' else 'has no use for'} text", fix=fix)
    reuse_freed_memory()
    console, folder, out = Screen(), Path(arguments.model), Path(arguments.out)
    with WorkBar(console, DownloadColumn(), "{what}: {done:,} of {total:,} bytes") as bar:
        kind = write_quantized(
            folder,
            out,
            bits=arguments.bits,
            group=arguments.group,
            method=method,
            calibration=_texts(arguments.calibration),
            written=lambda done, total: bar("quantise", done, total),
        )
    before, after = (sum(t.bytes for t in open_weights(path, packed=True).values()) for path in (folder, out))
    console.print(f"{out}: {kind.bits} bits by groups of {kind.group_size}, {method}")
    console.print(f"weights {before:,} bytes before, {after:,} after, {before / after:.2f} times less")
    if arguments.evaluate is not None:
        _evaluate(folder, out, arguments.evaluate, console)
    return 0


def _texts(path: str | None) -> Iterator[str]:
    from openelm.data.manifest import SourceConfig
    from openelm.data.reading import read_documents

    if path is not None:
        sources = [SourceConfig.parse({"name": "calibration", "paths": [path]})]
        yield from (document.text for document in read_documents(sources))


def _evaluate(folder: Path, out: Path, path: str, console: Screen) -> None:
    """Score both folders in fp32, so that nothing but the weights differs."""
    import torch

    from openelm.evaluate.suites import evaluate_suite
    from openelm.model.folder import load_model
    from openelm.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    before, after = (
        evaluate_suite(f"bpb:{path}", load_model(model, dtype=torch.float32), tokenizer).value
        for model in (folder, out)
    )
    console.print(f"bits per byte {before:.4f} before, {after:.4f} after, {after / before - 1:+.3%}")
