"""How fast the data stream makes tokens, beside the bare tokenizer on the same text."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sentencepiece import SentencePieceProcessor

from openelm.bench.measurement import Measurement, Progress
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.stream import BatchStream, DataConfig
from openelm.text.tokenizer import load_tokenizer, train_tokenizer

ROWS, LENGTH, LANES = 16, 512, 16
DOCUMENTS, WORDS, VOCABULARY = 300, 500, 2048
_CHUNK_DOCUMENTS = 100


@dataclass(frozen=True)
class Rates:
    """Tokens a second of one epoch after the other."""

    tokens: int
    bare: list[float]
    loader: list[float]


def measure_loader(repeats: int, progress: Progress) -> Measurement:
    """Measure the stream on generated text, in this process and on one core; the epoch of new words is not counted."""
    rates = loader_rates(generated_texts(DOCUMENTS, WORDS), VOCABULARY, repeats, progress)
    bare = median(rates.bare[1:])
    settings = {"threads": 1, "text_tokens": rates.tokens, "first_epoch_tokens_per_second": rates.loader[0]}
    return Measurement(
        "loader",
        tuple(rates.loader[1:]),
        "tokens/s",
        ceiling=bare,
        ceiling_from="bare tokenizer",
        settings=settings,
    )


def generated_texts(documents: int, words: int) -> list[str]:
    """Make documents of invented words whose frequencies fall as 1 / rank, the same every time."""
    draw = random.Random(0)
    syllables = [first + second for first in "bcdfglmnprstv" for second in ("a", "e", "i", "o", "u", "ar", "en", "is")]
    known = list(dict.fromkeys("".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(8_000)))
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    return [" ".join(draw.choices(known, weights, k=words)) + ".\n" for _ in range(documents)]


def loader_rates(texts: Sequence[str], vocabulary: int, epochs: int, progress: Progress) -> Rates:
    """Train a tokenizer on some texts, then time both ways through them, 100 texts in turns, on one core.

    Returns:
        1 + `epochs` rates each. In the first epoch every word is new; in the later ones most are known to the
        loader's tokenizer, as in a long run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "text.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        train_tokenizer(iter(texts), vocabulary).save(folder)
        bare = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        chunks = [list(texts[first : first + _CHUNK_DOCUMENTS]) for first in range(0, len(texts), _CHUNK_DOCUMENTS)]
        tokens = sum(len(ids) for chunk in chunks for ids in bare.encode(chunk))
        batches = max(1, tokens // len(chunks) // (ROWS * LENGTH))
        source = SourceConfig(name="text", paths=(str(folder / "*.jsonl"),))
        config = DataConfig(sources=(source,), lanes=LANES, min_characters=0, min_tokens=0, workers=0)
        rates = Rates(tokens, [], [])
        with BatchStream(
            config, build_manifest(config.sources), load_tokenizer(folder), folder, seed=0, rows=ROWS, length=LENGTH
        ) as stream:
            for epoch in range(1 + epochs):
                bare_seconds = loader_seconds = 0.0
                for chunk in chunks:
                    bare_seconds += _seconds(lambda c=chunk: bare.encode(c, num_threads=1))
                    loader_seconds += _seconds(lambda: [next(stream) for _ in range(batches)])
                rates.bare.append(tokens / bare_seconds)
                rates.loader.append(batches * len(chunks) * ROWS * LENGTH / loader_seconds)
                progress("loader", epoch + 1, 1 + epochs)
    return rates


def _seconds(work: Callable[..., Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
