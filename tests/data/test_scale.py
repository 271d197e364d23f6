"""What must not grow with the data: the time to find a place, what is read there, memory; and how well it is mixed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openelm.data import reading
from openelm.data.blocks import Blocks
from openelm.data.document import Block
from openelm.data.lanes import DocumentOrder, Position
from openelm.data.manifest import Shard, Source, SourceConfig, build_manifest
from openelm.data.readers import jsonl


def source(shards: int, blocks: int, rows: int) -> Source:
    """Make a source of equal shards; a block's offset is its number."""
    made = []
    for shard in range(shards):
        cut = Blocks(Block(at * rows, rows, shard * blocks + at, 0, 1 << 20) for at in range(blocks))
        made.append(Shard(f"/{shard}", str(shard), "jsonl", 0, 0, "", rows * blocks, cut))
    return Source("text", tuple(made))


@pytest.fixture(scope="module")
def shards_in_order() -> list[np.ndarray[Any, Any]]:
    """The shard of each document of four lanes of 16, in order: 32 shards of 64 blocks of 20 documents."""
    order = DocumentOrder(source(32, 64, 20), seed=2, lanes=16)
    return [np.array([shard for shard, _ in order.documents(lane, 0)], float) for lane in range(4)]


def test_neighbours_further_apart_than_a_window_are_not_correlated(shards_in_order: Any) -> None:
    # a window is 4 blocks of 20 documents; 2,560 documents a lane: five standard errors are 0.1
    for lag in (160, 400, 1000):
        found = np.mean([np.corrcoef(lane[:-lag], lane[lag:])[0, 1] for lane in shards_in_order])
        assert abs(found) < 0.1


def test_neighbours_within_a_window_are_as_correlated_as_four_blocks_make_them(shards_in_order: Any) -> None:
    found = np.mean([np.corrcoef(lane[:-1], lane[1:])[0, 1] for lane in shards_in_order])
    assert found < 1 / 4 + 0.1  # two documents of a window come from the same one of its 4 blocks


def test_rows_of_a_batch_are_not_correlated() -> None:
    order = DocumentOrder(source(32, 64, 20), seed=2, lanes=64)
    heads = [order.stretches(lane, Position(0, window))[0].shard for window in range(8) for lane in range(64)]
    assert abs(np.corrcoef(heads[:-1], heads[1:])[0, 1]) < 0.2  # 512 pairs: 4.5 standard errors


def test_each_shard_is_spread_over_time_as_in_a_uniform_shuffle() -> None:
    order, bins = DocumentOrder(source(32, 64, 3), seed=2, lanes=16), 8
    counts = np.zeros((32, bins))
    for lane in range(16):  # 128 blocks a lane, in 32 windows of 4
        for window in range(32):
            for part in order.stretches(lane, Position(0, window)):
                counts[part.shard, window * bins // 32] += 1
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / (31 * 7)
    assert 0.6 < chi < 1.4  # 217 degrees of freedom: four standard deviations are 0.38


class Counted(Blocks):
    """Blocks that count how often one of them is asked for."""

    asked = 0

    def __getitem__(self, at: Any) -> Any:
        Counted.asked += 1
        return super().__getitem__(at)


@pytest.mark.faults
@pytest.mark.quick
def test_a_seek_looks_at_no_more_blocks_at_the_end_than_at_the_beginning() -> None:
    corpus = source(50, 80, 2)
    counted = Source(
        "text", tuple(Shard(s.path, s.name, s.format, 0, 0, "", s.rows, Counted(s.blocks)) for s in corpus.shards)
    )
    order = DocumentOrder(counted, seed=0, lanes=4)
    last = 4000 // 4 // 4 - 1
    asked = []
    for window in (0, last * 95 // 100, last):
        Counted.asked = 0
        assert len(order.stretches(3, Position(0, window))) == 4
        asked.append(Counted.asked)
    assert asked == [4, 4, 4]


@pytest.mark.faults
@pytest.mark.quick
def test_the_last_block_of_a_file_is_read_from_its_own_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{row}"}}\n' for row in range(2000)))
    shard = build_manifest([SourceConfig(name="text", paths=(str(path),))]).sources[0].shards[0]
    offsets, plain = [], jsonl.read_lines

    def noted(where: Path, offset: int, limit: int) -> Any:
        offsets.append(offset)
        return plain(where, offset, limit)

    monkeypatch.setattr(jsonl, "read_lines", noted)
    last = shard.blocks[-1]
    rows = list(reading.read_block(Source("text", (shard,)), shard, last))
    assert [row.text for row in rows] == [str(row) for row in range(last.first_row, 2000)]  # type: ignore[union-attr]
    assert offsets == [last.offset] and last.offset > 0.95 * path.stat().st_size


def test_the_order_holds_one_number_a_block_and_one_a_shard() -> None:
    order = DocumentOrder(source(40, 50, 1), seed=0, lanes=2)
    held = [value for name, value in vars(order).items() if name != "source" and hasattr(value, "__len__")]
    assert max(len(value) for value in held if not isinstance(value, str)) == 40


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_thousands_of_steps(open_stream: Any, write_jsonl: Any) -> None:
    path = write_jsonl([f"{at} " + "some words " * (at % 20) for at in range(400)])

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with open_stream(path, rows=4, lanes=4, length=32) as stream:
        for _ in range(600):  # more than an epoch: caches are full
            next(stream)
        before = resident_bytes()
        for _ in range(1400):
            next(stream)
        assert resident_bytes() - before < 8 << 20
        assert min(cursor["sources"][0][0] for cursor in stream.cursors()[1:]) >= 1
