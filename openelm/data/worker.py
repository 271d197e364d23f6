"""The lanes one process owns; a worker process sends each step's rows up a pipe, a bounded number ahead."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from openelm.data.document import BadRow
from openelm.data.exclude import Exclusions
from openelm.data.lanes import DocumentOrder
from openelm.data.manifest import Manifest
from openelm.data.packing import Lane, RowSettings, Tokens
from openelm.data.pieces import PieceLane
from openelm.data.reading import SourceReader
from openelm.errors import DataError, OpenELMError
from openelm.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Job:
    """What every process of a stream must know; the same for all of them."""

    manifest: Manifest
    tokenizer_path: str
    tokenizer_sha256: str
    seed: int
    lanes: int
    rows: int
    length: int
    min_characters: int
    min_tokens: int
    on_bad_row: str
    first_step: int
    cursors: tuple[dict[str, Any] | None, ...]
    packing: str = "documents"
    excluded: Exclusions | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """One process's rows of a step, in row order.

    Args:
        tokens, documents: (rows, length + 1), as `Lane.row` fills them in.
        cursors: of their lanes, after the step.
        bad_rows: what was passed over to fill them.
    """

    tokens: Tokens
    documents: Tokens
    cursors: dict[int, dict[str, Any]]
    bad_rows: tuple[BadRow, ...]


class LaneGroup:
    """Some lanes of a stream, read step by step: row r of step t comes from lane (t · rows + r) mod lanes."""

    def __init__(self, job: Job, tokenizer: Tokenizer, numbers: Sequence[int]) -> None:
        self._job, self._step = job, job.first_step
        sources = job.manifest.sources
        orders = [DocumentOrder(source, seed=job.seed, lanes=job.lanes) for source in sources]
        self._lanes = {number: self._lane(orders, tokenizer, number) for number in numbers}

    def _lane(self, orders: Sequence[DocumentOrder], tokenizer: Tokenizer, number: int) -> Lane | PieceLane:
        job = self._job
        settings = RowSettings(job.length, job.min_characters, job.min_tokens, job.on_bad_row, job.excluded)
        readers = [SourceReader(order, number) for order in orders]
        make = PieceLane if job.packing == "apple" else Lane
        return make(number, readers, tokenizer, settings, job.cursors[number])

    def next_part(self) -> Part:
        """Read the rows of the next step that come from these lanes.

        Raises:
            DataError: what a lane meets in its files.
        """
        first = self._step * self._job.rows
        owners = [place % self._job.lanes for place in range(first, first + self._job.rows)]
        mine = [lane for lane in owners if lane in self._lanes]
        tokens, documents = np.empty((2, len(mine), self._job.length + 1), np.int32)
        for row, lane in enumerate(mine):
            self._lanes[lane].row(tokens[row], documents[row])
        self._step += 1
        cursors = {lane: self._lanes[lane].cursor() for lane in set(mine)}
        bad_rows = tuple(row for lane in cursors for row in self._lanes[lane].take_bad_rows())
        return Part(tokens, documents, cursors, bad_rows)


def main(descriptor: int) -> None:
    """Serve one worker process until the other end of the pipe is closed or its process is gone.

    The first message is (job, lane numbers, steps to read ahead); each later one asks for one more step.
    Answers are a Part, an OpenELMError, or the text of a traceback.
    """
    connection = Connection(descriptor)
    try:
        job, numbers, ahead = connection.recv()
        _serve(connection, job, numbers, ahead)
    except (EOFError, OSError):  # the stream was closed, or its process ended: nobody is left to tell
        return


def _serve(connection: Connection, job: Job, numbers: Sequence[int], ahead: int) -> None:
    try:
        tokenizer = load_tokenizer(Path(job.tokenizer_path))
        if tokenizer.sha256 != job.tokenizer_sha256:
            raise DataError(
                f"the tokenizer changed: SHA-256 {tokenizer.sha256}, expected {job.tokenizer_sha256}",
                fix="put the old tokenizer back",
                file=job.tokenizer_path,
                code="E_CHANGED",
            )
        group = LaneGroup(job, tokenizer, numbers)
        while True:
            if not ahead:
                connection.recv()
                ahead += 1
            part = group.next_part()
            connection.send(part)
            ahead -= 1
            while connection.poll():
                connection.recv()
                ahead += 1
    except OpenELMError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:  # a bug of ours: its traceback must not be lost with the process
        connection.send(traceback.format_exc())
    while True:  # stay until the other end closes, so that the answer above is read first
        connection.recv()
