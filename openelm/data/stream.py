"""Batches for training: the same at every number of worker processes, resumable after every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from openelm.config import Config
from openelm.data.document import BadRow, Drops, add_drops
from openelm.data.exclude import load_exclusions
from openelm.data.manifest import Manifest, SourceConfig
from openelm.data.manifest_file import Survey, load_surveys, manifest_of, survey_sources
from openelm.data.pieces import pieces_fingerprint
from openelm.data.process import CLOSE_SECONDS, WorkerProcess
from openelm.data.worker import Job, LaneGroup, Part
from openelm.errors import ConfigError, DataError, OpenELMError
from openelm.text.tokenizer import Tokenizer

IGNORED_TARGET = -100


class DataConfig(Config):
    """What to read and how; what changes what a model sees is in the fingerprint of its cursors."""

    sources: tuple[SourceConfig, ...] = ()
    """Bodies of text whose files are found and hashed at every start."""
    manifest: str | None = None
    """In place of sources: a file of `openelm data manifest`, whose files are known and only compared."""
    weights: dict[str, PositiveFloat] | None = None
    """With a manifest: its sources' shares of the training tokens, by name; 1 for those not named."""
    lanes: PositiveInt = 16
    """Virtual streams; the rows of a batch must be a multiple of them or divide them."""
    min_characters: NonNegativeInt = 200
    """Drop documents with fewer characters after normalisation."""
    min_tokens: NonNegativeInt = 256
    """Drop documents with fewer tokens, BOS and EOS counted."""
    workers: NonNegativeInt = 1
    """Processes that read and tokenise; 0: in the training process."""
    read_ahead_batches: PositiveInt = 4
    on_bad_row: Literal["error", "skip"] = "error"
    packing: Literal["documents", "apple"] = "documents"
    """`documents`: rows without gaps. `apple`: the published way, a padded row for each 2,048 words."""
    exclude_documents: tuple[str, ...] = ()
    """Lists written by `openelm data decontaminate` and `openelm data dedup`, of documents not to train on."""

    @field_validator("exclude_documents", mode="before")
    @classmethod
    def _one_list_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.sources) == (self.manifest is not None):
            raise ValueError("give either sources or a manifest")
        if self.weights and self.manifest is None:
            raise ValueError("weights are for a manifest's sources; give each of data.sources its own weight")
        return self

    def open_manifest(self) -> Manifest:
        """Return what `open_surveys` finds, without how it was found."""
        return manifest_of(self.open_surveys())

    def open_surveys(self, known: Sequence[Survey] = ()) -> tuple[Survey, ...]:
        """Find and hash the files of the sources, or read the manifest and compare its files.

        Args:
            known: what an earlier start found; files that did not change since are not read again.

        Raises:
            ConfigError: a source's name or weight is wrong.
            DataError: a file, or the manifest, is missing, changed, damaged or without text.
        """
        if self.manifest is None:
            return survey_sources(self.sources, on_bad_row=self.on_bad_row, known=known)
        surveys = load_surveys(Path(self.manifest), self.weights)
        manifest_of(surveys).check_unchanged()
        return surveys


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens for one step.

    Args:
        inputs: int64 (rows, length).
        targets: int64 (rows, length), the next token, or -100 where that is another document's first or padding.
        documents: int32 (rows, length), the index of each input's document within its row.
        target_bytes: UTF-8 bytes of text that the targets stand for.
        row_sha256: uint8 (rows, 32), the hash of each row's inputs, then targets, as little-endian int32.
        bad_rows: rows of the data that were passed over to fill these, in no order.
        examples: int64 (rows, most), of tuning data: the numbers of each row's examples in their order, then -1. A
            preference is two documents, 2k chosen and 2k + 1 rejected; any other example is one.
    """

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32]
    target_bytes: int
    row_sha256: npt.NDArray[np.uint8]
    bad_rows: tuple[BadRow, ...] = ()
    examples: npt.NDArray[np.int64] | None = None

    @property
    def sha256(self) -> str:
        """The hash of these rows."""
        return batch_sha256(self.row_sha256)


def batch_sha256(row_sha256: npt.NDArray[Any]) -> str:
    """Hash a whole batch: the SHA-256 of its rows' hashes, in row order."""
    return hashlib.sha256(row_sha256.tobytes()).hexdigest()


class BatchStream:
    """Yield batches without end; each epoch has a new order.

    A document is [BOS] + ids + [EOS]. A lane's documents follow each other without gaps, and its rows overlap
    by one token, so every token but a document's BOS is a target exactly once. Row r of batch t comes from
    lane (t · rows + r) mod lanes. Each worker process owns whole lanes.

    Args:
        tokenizer_path: where worker processes load the same tokenizer from.
        rows, length: the shape of a batch; `rows` must be a multiple of `config.lanes` or divide it.
        part: (k, n): give the rows r of each batch with r % n == k only, and read no lane but theirs;
            n must divide rows and lanes. The cursors of the other lanes stay as they were given.
        cursors: what `cursors()` returned; the next batch is the one that came after it.

    Raises:
        ConfigError: rows and lanes do not fit.
        DataError: E_CHANGED when data, tokenizer or settings differ from those the cursors were made with;
            E_WORKER when a worker process ends; and what the readers find.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        *,
        seed: int,
        rows: int,
        length: int,
        part: tuple[int, int] = (0, 1),
        cursors: list[dict[str, Any]] | None = None,
    ) -> None:
        _check_shape(rows, length, config.lanes, part[1])
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            fix = "use a tokenizer that has both"
            raise DataError("training documents need BOS and EOS tokens", fix=fix, code="E_TOKENIZER")
        manifest.check_unchanged()
        self._fingerprint = {
            "manifest": manifest.sha256,
            "tokenizer": tokenizer.sha256,
            "seed": seed,
            "lanes": config.lanes,
            "rows": rows,
            "length": length,
            "min_characters": config.min_characters,
            "min_tokens": config.min_tokens,
        }
        excluded = None
        if config.packing == "apple":
            self._fingerprint.update(pieces_fingerprint())
        if config.exclude_documents:
            excluded = load_exclusions(config.exclude_documents, manifest)
            self._fingerprint["exclude_documents"] = excluded.sha256
        self._step, self._cursors = restore_cursors(cursors, self._fingerprint, config.lanes)
        self._rows, self._lanes, self._part = rows, config.lanes, part
        self._byte_lengths = padded_byte_lengths(tokenizer.byte_lengths())
        job = Job(
            manifest, str(tokenizer_path), tokenizer.sha256, seed, config.lanes, rows, length,
            config.min_characters, config.min_tokens, config.on_bad_row, self._step, tuple(self._cursors),
            config.packing, excluded,
        )  # fmt: skip
        lanes = range(part[0], config.lanes, part[1])
        count = min(config.workers, len(lanes))
        shares = [lanes[worker :: max(1, count)] for worker in range(max(1, count))]
        self._owners = {lane: worker for worker, share in enumerate(shares) for lane in share}
        self._sources: list[_LaneProcess | LaneGroup] = []
        if not count:
            self._sources.append(LaneGroup(job, tokenizer, shares[0]))
        else:
            try:
                self._start(job, shares, config.read_ahead_batches)
            except BaseException:
                self.close()
                raise

    def _start(self, job: Job, shares: Sequence[Sequence[int]], ahead: int) -> None:
        workers = []
        for _ in shares:
            workers.append(_LaneProcess())
            self._sources.append(workers[-1])
        for worker, share in zip(workers, shares, strict=True):
            worker.begin(job, share, ahead)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        assert self._sources, "the stream is closed"
        try:
            parts = [source.next_part() for source in self._sources]
        except BaseException:
            self.close()
            raise
        first = self._step * self._rows
        places = range(first, first + self._rows)[self._part[0] :: self._part[1]]
        tokens, documents = parts[0].tokens, parts[0].documents
        if len(parts) > 1:
            owners = np.array([self._owners[place % self._lanes] for place in places])
            tokens, documents = np.empty((2, len(places), tokens.shape[1]), np.int32)
            for worker, part in enumerate(parts):
                tokens[owners == worker], documents[owners == worker] = part.tokens, part.documents
        for part in parts:
            for lane, cursor in part.cursors.items():
                self._cursors[lane] = cursor
        self._step += 1
        bad_rows = tuple(row for part in parts for row in part.bad_rows)
        return _batch(tokens, documents, self._byte_lengths, bad_rows)

    def cursors(self) -> list[dict[str, Any]]:
        """Return the state after the last batch returned, as plain data: a fingerprint, then each lane."""
        lanes = [{} if cursor is None else cursor for cursor in self._cursors]
        return [{"fingerprint": dict(self._fingerprint), "batches": self._step}, *lanes]

    def counts(self) -> Drops:
        """Count the documents that this part's lanes dropped before the last batch: source -> reason -> documents."""
        total: Drops = {}
        for cursor in filter(None, (self._cursors[lane] for lane in self._owners)):
            add_drops(total, cursor["dropped"])
        return total

    def close(self) -> None:
        """End the worker processes; none is left when this returns."""
        sources, self._sources = self._sources, []
        workers = [source for source in sources if isinstance(source, _LaneProcess)]
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.wait(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_shape(rows: int, length: int, lanes: int, parts: int) -> None:
    if rows < 1 or length < 1:
        raise ConfigError(f"a batch needs at least 1 row and 1 token (given: {rows} rows, length {length})")
    if rows % lanes and lanes % rows:
        fits = [count for count in range(1, rows + lanes + 1) if rows % count == 0 or count % rows == 0]
        nearest = sorted(fits, key=lambda count: abs(count - lanes))[:2]
        raise ConfigError(
            f"{rows} rows a batch and {lanes} lanes: one must be a multiple of the other",
            fix=f"set data.lanes to {' or '.join(map(str, nearest))}",
        )
    if rows % parts or lanes % parts:
        fix = f"make train.rows and data.lanes multiples of {parts}, or start fewer processes"
        raise ConfigError(f"{parts} processes cannot share {rows} rows a batch from {lanes} lanes", fix=fix)


def restore_cursors(
    cursors: Sequence[dict[str, Any]] | None, fingerprint: dict[str, Any], lanes: int
) -> tuple[int, list[dict[str, Any] | None]]:
    """Check a saved state against this stream's fingerprint; returns the step and the lanes' cursors."""
    if cursors is None:
        return 0, [None] * lanes
    try:
        saved, step = dict(cursors[0]["fingerprint"]), int(cursors[0]["batches"])
        places = [dict(cursor) or None for cursor in cursors[1:]]
    except (KeyError, TypeError, ValueError, IndexError):
        fix = "take the data state from an undamaged checkpoint"
        raise DataError("the data state is not one", fix=fix, code="E_CHANGED") from None
    differences = [
        f"{name} was {saved.get(name)!r} and is {fingerprint.get(name)!r}"
        for name in sorted(saved.keys() | fingerprint.keys())
        if saved.get(name) != fingerprint.get(name)
    ]
    if differences or len(places) != lanes or step < 0:
        what = "; ".join(differences) or "lanes are missing"
        fix = "put them back as they were, or start a new run"
        raise DataError(f"the run was started with other data or settings: {what}", fix=fix, code="E_CHANGED")
    return step, places


def _batch(
    tokens: npt.NDArray[np.int32],
    documents: npt.NDArray[np.int32],
    byte_lengths: npt.NDArray[np.int32],
    bad_rows: tuple[BadRow, ...],
) -> Batch:
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)  # below 0: padding
    rows = np.stack([tokens[:, :-1], np.where(same, tokens[:, 1:], IGNORED_TARGET)], axis=1).astype("<i4", copy=False)
    return batch_of(rows, np.maximum(documents[:, :-1], 0), byte_lengths, bad_rows)


def batch_of(
    rows: npt.NDArray[np.int32],
    documents: npt.NDArray[np.int32],
    byte_lengths: npt.NDArray[np.int32],
    bad_rows: tuple[BadRow, ...],
    examples: npt.NDArray[np.int64] | None = None,
) -> Batch:
    """Make a batch of its rows' inputs and targets, `<i4` (rows, 2, length).

    Args:
        byte_lengths: as `padded_byte_lengths` returns them.
    """
    digests = bytearray().join([hashlib.sha256(row).digest() for row in rows])
    inputs, targets = rows.transpose(1, 0, 2).astype(np.int64, order="C")
    target_bytes = int(byte_lengths[rows[:, 1]].sum(dtype=np.int64))
    row_sha256 = np.frombuffer(digests, np.uint8).reshape(len(rows), 32)
    return Batch(inputs, targets, documents, target_bytes, row_sha256, bad_rows, examples)


def padded_byte_lengths(byte_lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Append zeros at the end, where the index -100 of a target that is ignored falls."""
    return np.append(byte_lengths, np.zeros(-IGNORED_TARGET, np.int32))


class _LaneProcess(WorkerProcess):
    """A worker process that reads some lanes."""

    def __init__(self) -> None:
        fix = "is memory short? run the same command again to go on from the last checkpoint"
        super().__init__("openelm.data.worker", name="data worker process", fix=fix)

    def begin(self, job: Job, lanes: Sequence[int], ahead: int) -> None:
        """Say what to do; the first steps are read at once."""
        self.send((job, tuple(lanes), ahead))

    def next_part(self) -> Part:
        """Receive the next step's rows and allow one more to be read ahead.

        Raises:
            OpenELMError: the one raised in the worker; DataError E_WORKER if the process is gone.
        """
        answer = self.receive()
        if isinstance(answer, OpenELMError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a data worker failed:\n{answer}")
        assert isinstance(answer, Part)
        self.send(None)
        return answer
