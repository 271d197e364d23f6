"""Simulate the data path of a run of trillions of tokens with the real lane code: python -m benchmarks.scale [CASE …].

Shards, blocks and documents of the published mixture are drawn from a stated distribution; their order, the windows,
the cursors and the mixture are computed by openelm/data as in a run, only the text is missing. `seek` and `memory` read
real files that they write into a temporary folder. Prints one JSON line a case.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.loader import memory_case, resident_bytes, seek_case, throughput_case, timed
from openelm.data.blocks import Blocks
from openelm.data.document import BLOCK_BYTES, Block, Document
from openelm.data.lanes import DocumentOrder, Position
from openelm.data.manifest import Manifest, Shard, Source
from openelm.data.manifest_file import Survey, read_manifest_file, write_manifest_file
from openelm.data.packing import Lane, RowSettings
from openelm.data.reading import SourceReader

LANES, WORKERS, LENGTH = 2048, 512, 2048
SEED, BYTES_PER_TOKEN = 0, 4
TIME_BINS = 20
GZIP_BLOCKS = 16  # a file of one gzip member is cut into at most this many blocks (data/readers/jsonl.py)


@dataclass(frozen=True)
class Body:
    """A published source: tokens and files as published, mean tokens a document assumed."""

    name: str
    tokens: float
    files: int
    document_tokens: int
    gzip: bool = False


MIXTURE = (
    Body("RefinedWeb", 665e9, 5534, 600),
    Body("RedPajama GitHub", 59e9, 98, 2000),
    Body("RedPajama Books", 26e9, 1, 120_000),
    Body("RedPajama ArXiv", 28e9, 100, 18_000),
    Body("RedPajama Wikipedia", 24e9, 1, 800),
    Body("RedPajama StackExchange", 20e9, 1, 700),
    Body("RedPajama C4", 175e9, 1024, 480),
    Body("PILE", 207e9, 1650, 1500),
    Body("The Stack", 411e9, 149, 1800, gzip=True),
    Body("Reddit", 89e9, 78, 230, gzip=True),
    Body("peS2o", 70e9, 26, 1800, gzip=True),
    Body("Gutenberg", 6e9, 3, 100_000, gzip=True),
    Body("Wikipedia and Wikibooks", 4.3e9, 2, 700, gzip=True),
)


def simulated_source(body: Body, *, gzip: bool, scale: float = 1.0) -> Source:
    """Draw a source: file sizes lognormal (sigma 0.3), documents a block Poisson, blocks as the readers cut them.

    Block.offset holds the block's number in the source instead of a byte, so that visits can be counted.
    """
    random = np.random.Generator(np.random.PCG64([SEED, *body.name.encode()]))
    sizes = random.lognormal(0.0, 0.3, body.files)
    sizes *= body.tokens * scale * BYTES_PER_TOKEN / sizes.sum()
    shards, number = [], 0
    for at, size in enumerate(sizes):
        count = GZIP_BLOCKS if gzip and body.gzip else max(1, round(size / BLOCK_BYTES))
        block_bytes = int(size / count)
        rows = np.maximum(1, random.poisson(block_bytes / (body.document_tokens * BYTES_PER_TOKEN), count)).tolist()
        blocks, first = [], 0
        for held in rows:
            blocks.append(Block(first, held, number, 0, block_bytes))
            first, number = first + held, number + 1
        shards.append(Shard(f"/{body.name}/{at}", f"{at}", "jsonl", int(size), 0, "0" * 64, first, Blocks(blocks)))
    return Source(body.name, tuple(shards), weight=body.tokens)


def simulated_mixture(*, gzip: bool = False, scale: float = 1.0) -> list[Source]:
    return [simulated_source(body, gzip=gzip, scale=scale) for body in MIXTURE]


def table_case(scale: float) -> dict[str, Any]:
    """Memory and time of what each worker process holds and does before its first batch."""
    before = resident_bytes()
    sources = simulated_mixture(scale=scale)
    held = resident_bytes()
    order_seconds, orders = timed(lambda: [DocumentOrder(source, seed=SEED, lanes=LANES) for source in sources])
    first_seconds, _ = timed(lambda: [order.stretches(0, Position()) for order in orders])
    order_bytes = resident_bytes() - held
    late = [Position(0, windows(order) * 95 // 100) for order in orders]
    seeks = {"first_5_percent": seek_seconds(orders, [Position()] * len(orders))}
    seeks["last_5_percent"] = seek_seconds(orders, late)
    dump_seconds, pickled = timed(lambda: pickle.dumps(Manifest(tuple(sources))))
    load_seconds, _ = timed(lambda: pickle.loads(pickled))
    hash_seconds, _ = timed(lambda: Manifest(tuple(sources)).sha256)
    surveys = [Survey(source, "jsonl", "error", BLOCK_BYTES, len(source.shards), "") for source in sources]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        write_seconds, _ = timed(lambda: write_manifest_file(file, surveys))
        file_bytes = file.stat().st_size
        read_seconds, _ = timed(lambda: read_manifest_file(file))
    return {
        "blocks": sum(len(shard.blocks) for source in sources for shard in source.shards),
        "documents": sum(source.rows for source in sources),
        "shards": sum(len(source.shards) for source in sources),
        "manifest_bytes": held - before,
        "order_bytes": order_bytes,
        "order_seconds": order_seconds,
        "first_permutations_seconds": first_seconds,
        "seek_seconds": seeks,
        "pickle_seconds": dump_seconds,
        "pickle_bytes": len(pickled),
        "unpickle_seconds": load_seconds,
        "hash_seconds": hash_seconds,
        "file_bytes": file_bytes,
        "file_write_seconds": write_seconds,
        "file_read_seconds": read_seconds,
    }


def seek_seconds(orders: Sequence[DocumentOrder], places: Sequence[Position]) -> float:
    """Time what a lane does to find its files, blocks and rows in every source; the median of 101."""
    pairs = list(zip(orders, places, strict=True))
    return median(timed(lambda: [order.stretches(7, place) for order, place in pairs])[0] for _ in range(101))


def windows(order: DocumentOrder, lane: int = 0) -> int:
    """Count the windows of a lane in an epoch by bisection: one past the end holds nothing."""
    low, high = 0, 1
    while order.stretches(lane, Position(0, high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if order.stretches(lane, Position(0, middle)) else (low, middle)
    return high


def order_case(scale: float, *, gzip: bool = False) -> dict[str, Any]:
    """Walk every lane through one epoch of every source: coverage, balance and spread of the shards over time."""
    lane_bytes, rows_seen, worst = np.zeros(LANES), 0, {}
    dispersions, empty_lanes = {}, {}
    for body in MIXTURE:
        source = simulated_source(body, gzip=gzip, scale=scale)
        walk = walk_source(DocumentOrder(source, seed=SEED, lanes=LANES), source)
        lane_bytes += walk.lane_bytes
        rows_seen += source.rows
        mean = walk.lane_bytes.mean()
        worst[body.name] = round(float(abs(walk.lane_bytes - mean).max() / mean), 4)
        if walk.dispersion is not None:
            dispersions[body.name] = round(walk.dispersion, 3)
        empty_lanes[body.name] = int((walk.lane_bytes == 0).sum())
    tokens = lane_bytes / BYTES_PER_TOKEN
    return {
        "layout": "json.gz of one member a file" if gzip else "blocks of 1 MiB",
        "documents_each_once": rows_seen,
        "lane_tokens": {"mean": tokens.mean(), "min": tokens.min(), "max": tokens.max(), "std": tokens.std()},
        "largest_lane_deviation": worst,
        "lanes_without_a_block_this_epoch": {name: count for name, count in empty_lanes.items() if count},
        "dispersion_of_shards_over_time": dispersions,
    }


@dataclass(frozen=True)
class Walk:
    """What one epoch of a source over all lanes looked like."""

    lane_bytes: npt.NDArray[np.float64]
    dispersion: float | None


def walk_source(order: DocumentOrder, source: Source) -> Walk:
    """Visit every slice of every lane in epoch 0 and count each row of each block.

    Raises:
        AssertionError: a row is missing or comes twice.
    """
    blocks = [block for shard in source.shards for block in shard.blocks]
    reached = [0] * len(blocks)
    when = np.zeros(len(blocks), np.float32)
    of_shard = np.repeat(np.arange(len(source.shards)), [len(shard.blocks) for shard in source.shards])
    lane_bytes = np.zeros(LANES)
    for lane in range(LANES):
        position, visits = Position(), []
        if not order.stretches(lane, position):
            continue
        while position.epoch == 0:
            for part in order.stretches(lane, position):
                number = part.block.offset
                assert reached[number] == part.first, "rows of a block come in order, each once"
                reached[number] = part.first + part.rows
                if part.first == 0:
                    visits.append(number)
                    lane_bytes[lane] += part.block.bytes
            position = order.next_slice(lane, position)
        when[visits] = (np.arange(len(visits)) + 0.5) / len(visits)
    assert reached == [block.rows for block in blocks], "every row of every block comes"
    return Walk(lane_bytes, dispersion(of_shard, when, len(source.shards)))


def dispersion(shard: npt.NDArray[Any], when: npt.NDArray[Any], shards: int) -> float | None:
    """Return the mean over shards of chi² of their blocks over equal bins of time, a degree of freedom.

    It is 1 for a uniform shuffle; None where there is one shard or one moment only.
    """
    bins = np.minimum((when * TIME_BINS).astype(int), TIME_BINS - 1)
    counts = np.bincount(shard * TIME_BINS + bins, minlength=shards * TIME_BINS).reshape(shards, TIME_BINS)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    used = expected.sum(0) > 0
    if shards < 2 or used.sum() < 2:
        return None
    chi = ((counts - expected)[:, used] ** 2 / expected[:, used]).sum(1)
    return float(chi.sum() / ((shards - 1) * (used.sum() - 1)))


def shuffle_case(scale: float) -> dict[str, Any]:
    """Serial correlation of the shard index along a lane and across the rows of a batch, beside a uniform shuffle."""
    source = simulated_source(MIXTURE[0], gzip=False, scale=scale)
    order = DocumentOrder(source, seed=SEED, lanes=LANES)
    lanes = [np.array([shard for shard, _ in order.documents(lane, 0)], np.float32) for lane in range(0, LANES, 512)]
    uniform = np.random.Generator(np.random.PCG64(SEED)).permutation(np.concatenate(lanes))
    lags = (1, 10, 1000, 5000, 20_000)
    shortest = min(map(len, lanes))
    count = min(64, min(windows(order, lane) for lane in (0, LANES - 1)))
    heads = np.array([first_shards(order, lane, count) for lane in range(LANES)], np.float32)  # (lanes, windows)
    return {
        "documents": sum(map(len, lanes)),
        "documents_a_window": round(sum(part.rows for part in order.stretches(0, Position()))),
        "correlation_in_a_lane": {lag: round(float(np.mean([correlation(x, lag) for x in lanes])), 4) for lag in lags},
        "correlation_uniform": {lag: round(correlation(uniform[:shortest], lag), 4) for lag in lags},
        "correlation_between_lanes_of_a_batch": round(correlation(heads.T.ravel(), 1), 4),
        "different_blocks_a_batch": len({b for lane in range(LANES) for b in first_blocks(order, lane)}),
    }


def correlation(values: npt.NDArray[Any], lag: int) -> float:
    return float(np.corrcoef(values[:-lag], values[lag:])[0, 1])


def first_shards(order: DocumentOrder, lane: int, count: int) -> list[int]:
    return [order.stretches(lane, Position(0, window))[0].shard for window in range(count)]


def first_blocks(order: DocumentOrder, lane: int) -> set[int]:
    return {part.block.offset for part in order.stretches(lane, Position())}


class Counted:
    """A tokenizer for texts that are numbers: how many tokens they have."""

    bos_id, eos_id = 1, 2

    def encode_array(self, text: str) -> Any:
        return np.zeros(int(text), np.int32)


class SimulatedReader(SourceReader):
    """The real order and cursor logic; documents are lengths drawn from an exponential with the source's mean."""

    def __init__(self, order: DocumentOrder, lane: int, document_tokens: int) -> None:
        super().__init__(order, lane)
        self._mean = document_tokens

    def _load(self, start: Position) -> None:
        rows: list[Any] = []
        for part in self._order.stretches(self._lane, start):
            random = np.random.Generator(np.random.PCG64([part.shard, part.block.offset, part.first]))
            lengths = 1 + random.exponential(self._mean, part.rows).astype(int)
            rows += [Document(str(length), self.source.name, "", row) for row, length in enumerate(lengths)]
        self._rows = [rows[place] for place in self._order.places(self._lane, start, len(rows))]
        self._loaded = start


def simulated_lane(orders: Sequence[DocumentOrder], number: int, cursor: dict[str, Any] | None = None) -> Lane:
    pairs = zip(orders, MIXTURE, strict=True)
    readers = [SimulatedReader(order, number, body.document_tokens) for order, body in pairs]
    tokenizer: Any = Counted()
    return Lane(number, readers, tokenizer, RowSettings(LENGTH, 0, 0, "error"), cursor)


def mixture_case(scale: float, rows: int = 2000) -> dict[str, Any]:
    """Pack rows of some lanes with the real Lane: shares of the sources, size of the cursors, resume in the middle."""
    orders = [DocumentOrder(source, seed=SEED, lanes=LANES) for source in simulated_mixture(scale=scale)]
    weights = np.array([body.tokens for body in MIXTURE])
    weights /= weights.sum()
    off, longest, sizes, resumed = 0.0, 0, [], True
    for number in range(0, LANES, 256):
        lane, middle = simulated_lane(orders, number), None
        out = np.empty((2, LENGTH + 1), np.int32)
        for row in range(rows):
            lane.row(*out)
            if row == rows // 2:
                middle = json.loads(json.dumps(lane.cursor()))
        cursor = lane.cursor()
        again = simulated_lane(orders, number, middle)
        for _ in range(rows - rows // 2 - 1):
            again.row(*out)
        resumed &= again.cursor() == cursor
        taken = np.array([place[4] for place in cursor["sources"]])
        longest = max(longest, cursor["longest"])
        off = max(off, float(abs(taken - weights * taken.sum()).max()))
        sizes.append(len(json.dumps(cursor)))
    return {
        "lanes_walked": LANES // 256,
        "tokens_a_lane": rows * LENGTH,
        "largest_distance_from_exact_share_tokens": off,
        "longest_document_tokens": longest,
        "resume_in_the_middle_is_equal": resumed,
        "cursor_bytes_a_lane": round(sum(sizes) / len(sizes)),
        "cursor_bytes_all_lanes": round(LANES * sum(sizes) / len(sizes)),
    }


def main() -> None:
    cases: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "table": lambda options: table_case(options.scale),
        "order": lambda options: order_case(options.scale),
        "order-gz": lambda options: order_case(options.scale, gzip=True),
        "shuffle": lambda options: shuffle_case(options.scale),
        "mixture": lambda options: mixture_case(options.scale),
        "seek": lambda options: seek_case(options.documents),
        "memory": lambda options: memory_case(options.steps),
        "throughput": lambda options: throughput_case(),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of: {' '.join(cases)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the 1.8 T tokens (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=10_000_000, help="of `seek` (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40_000, help="of `memory` (default: %(default)s)")
    options = parser.parse_args()
    for name in options.cases or cases:
        seconds, result = timed(lambda: cases[name](options))  # noqa: B023
        machine = f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
        start = {"case": name, "date": date.today().isoformat(), "machine": machine, "scale": options.scale}
        print(json.dumps({**start, **result, "case_seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
