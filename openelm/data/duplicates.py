"""Which documents say again what an earlier one says: exactly, or nearly so by MinHash."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from openelm.data.document import Document, Drops, add_drops
from openelm.data.filters import normalize
from openelm.data.manifest import Manifest, Shard, Source
from openelm.data.reading import read_block, reason_to_drop
from openelm.errors import ConfigError, DataError

Progress = Callable[[int], None]
_BUCKETS = 128  # files that are open at once; macOS allows a shell's programs 256
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4")])  # half a digest, a place


class Duplicate(NamedTuple):
    """A document to leave out, and the earlier one that says the same; shards count over all sources, in order."""

    shard: int
    row: int
    kept_shard: int
    kept_row: int


def all_shards(manifest: Manifest) -> list[tuple[Source, Shard]]:
    """List the shards of all sources, in order.

    Raises:
        DataError: two files have the same content and the same name, so that a list could not tell them apart.
    """
    shards = [(source, shard) for source in manifest.sources for shard in source.shards]
    seen: dict[tuple[str, str], str] = {}
    for _, shard in shards:
        other = seen.setdefault((shard.sha256, shard.name), shard.path)
        if other != shard.path:
            fix = "leave one of them out, or list the folder that holds both"
            raise DataError(f"{other} has the same name and content", fix=fix, file=shard.path)
    return shards


def documents_of(source: Source, shard: Shard, progress: Progress, drops: Drops) -> Iterator[Document | None]:
    """Yield a shard's rows in file order, None for one without text that can be read; tells the bytes of each block.

    Args:
        drops: filled in place with what is None (source, reason, number).

    Raises:
        DataError: the file is damaged or changed; E_EMPTY at the end of a source of which no row could be read.
    """
    for block in shard.blocks:
        for row in read_block(source, shard, block):
            reason = reason_to_drop(row, "skip")
            if reason is not None:
                add_drops(drops, {source.name: {reason: 1}})
            yield row if isinstance(row, Document) and reason is None else None
        progress(block.bytes)
    if shard is source.shards[-1] and sum(drops.get(source.name, {}).values()) == source.rows:
        raise _unreadable(source)


def _unreadable(source: Source) -> DataError:
    shard = next(shard for shard in source.shards if shard.rows)
    rows = (row for block in shard.blocks for row in read_block(source, shard, block))
    first = next((row for row in rows if isinstance(row, DataError)), DataError("it is empty", file=shard.path, line=1))
    fix = "give files with text"
    if first.code == "E_SCHEMA":
        fix = "say which key or column holds the text: --text-key, or text_key in a recipe"
    what = f"source {source.name!r}: none of its {source.rows:,} rows can be read; {first.what}"
    return DataError(what, fix=fix, file=first.file, line=first.line, code="E_EMPTY")


def exact_duplicates(manifest: Manifest, scratch: Path, progress: Progress, drops: Drops) -> list[Duplicate]:
    """Find documents whose normalised text (lower case, no punctuation, single spaces) was met before.

    Digests (SHA-256, of which 16 bytes are kept) go to 128 files in `scratch`, 24 bytes a document, and are
    compared one file at a time: memory is a 128th of that, plus the duplicates. `drops` is as in `documents_of`.
    """
    with ExitStack() as opened:
        files = [opened.enter_context((scratch / f"{number:02x}").open("wb")) for number in range(_BUCKETS)]
        for number, (source, shard) in enumerate(all_shards(manifest)):
            for row, document in enumerate(documents_of(source, shard, progress, drops)):
                text = normalize(document.text) if document else ""
                if text:
                    digest = hashlib.sha256(text.encode()).digest()
                    files[digest[0] % _BUCKETS].write(digest[:16] + struct.pack("<II", number, row))
    found: list[Duplicate] = []
    for number in range(_BUCKETS):
        found += _repeated(np.fromfile(scratch / f"{number:02x}", _RECORD))
    return sorted(found)


def _repeated(records: npt.NDArray[Any]) -> list[Duplicate]:
    records = np.sort(records, order=("high", "low", "shard", "row"))
    same = np.zeros(len(records), bool)
    same[1:] = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(records))))
    places = np.stack([records["shard"], records["row"], records["shard"][first], records["row"][first]], axis=1)
    return [Duplicate(*place) for place in places[same].tolist()]


@dataclass(frozen=True)
class MinHash:
    """Which documents are near enough: equal in all `hashes` of at least one of `bands` bands.

    A pair of Jaccard similarity s over n-word runs is found with probability 1 - (1 - s^hashes)^bands; the
    defaults, FineWeb's, find 0.8 with 92 % and 0.5 with 5 %.
    """

    words: int = 5
    bands: int = 14
    hashes: int = 8


def near_duplicates(
    manifest: Manifest, scratch: Path, progress: Progress, drops: Drops, settings: MinHash
) -> list[Duplicate]:
    """Find documents that are nearly equal to an earlier one, by datatrove's MinHash.

    What is similar to something similar is one group; its earliest document is kept. `drops` is as in `documents_of`.

    Raises:
        ConfigError: datatrove is not installed.
    """
    steps = _datatrove(scratch, settings)
    shards = all_shards(manifest)
    for number, (source, shard) in enumerate(shards):
        rows = documents_of(source, shard, progress, drops)
        steps.sign((document.text if document else "" for document in rows), number, len(shards))
    pairs = (pair for band in range(settings.bands) for pair in steps.pairs(band))
    return _groups(pairs)


Place = tuple[int, int]


def _groups(pairs: Iterator[tuple[Place, Place]]) -> list[Duplicate]:
    """Join pairs into groups; the root of a group is its first document."""
    parents: dict[Place, Place] = {}

    def root(place: Place) -> Place:
        while (parent := parents.setdefault(place, place)) != place:
            parents[place] = parents[parent]
            place = parent
        return place

    for one, other in pairs:
        first, second = sorted((root(one), root(other)))
        parents[second] = first
    return [Duplicate(*place, *root(place)) for place in sorted(parents) if root(place) != place]


class _datatrove:
    """The two steps of datatrove's pipeline that are needed, run in this process and without its logging."""

    def __init__(self, scratch: Path, settings: MinHash) -> None:
        try:
            from datatrove.data import Document as Text
            from datatrove.data import DocumentsPipeline
            from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
            from datatrove.utils.hashing import HashConfig
            from datatrove.utils.text import TextNormConfig
            from datatrove.utils.word_tokenizers import WordTokenizer
            from loguru import logger
        except ImportError as error:
            fix = "pip install 'openelm-framework[dedup]', or use `openelm data dedup exact`"
            raise ConfigError(f"MinHash needs the package {error.name}", fix=fix) from None

        class Words(WordTokenizer):  # datatrove's own need models that it downloads
            def word_tokenize(self, text: str) -> list[str]:
                return normalize(text).split()

            def sent_tokenize(self, text: str) -> list[str]:
                return [text]

            def span_tokenize(self, text: str) -> list[tuple[int, int]]:
                return [(0, len(text))]

        logger.disable("datatrove")
        self._text, self._pipeline, self._scratch, self._bands = Text, DocumentsPipeline, scratch, settings.bands
        config = MinhashConfig(
            n_grams=settings.words,
            num_buckets=settings.bands,
            hashes_per_bucket=settings.hashes,
            hash_config=HashConfig(precision=64, hash_fc="sha1"),
            norm_config=TextNormConfig(False, False, False, False, False),  # `Words` normalises, as everywhere here
        )
        signatures, pairs = str(scratch / "signatures"), str(scratch / "pairs")
        self._sign = MinhashDedupSignature(signatures, config=config, language=Words())  # type: ignore[arg-type]  # a code or a tokenizer
        self._compare = MinhashDedupBuckets(signatures, pairs, config=config)

    def sign(self, texts: Iterator[str], shard: int, shards: int) -> None:
        """Write the signatures of one shard's documents; a text of too few words has none."""
        documents = self._pipeline(self._text(text=text, id="") for text in texts)
        self._sign.run(documents, rank=shard, world_size=shards)

    def pairs(self, band: int) -> Iterator[tuple[Place, Place]]:
        """Yield pairs of (shard, row) that are equal in all hashes of a band."""
        self._compare.run(rank=band, world_size=self._bands)
        with (self._scratch / "pairs" / f"{band:05d}_00.dups").open("rb") as file:
            while data := file.read(16):
                one_shard, one_row, other_shard, other_row = struct.unpack("<4I", data)
                yield (one_shard, one_row), (other_shard, other_row)
