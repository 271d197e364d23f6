from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from openelm.data.blocks import Blocks
from openelm.data.document import Block
from openelm.data.lanes import DocumentOrder, Position, permutation
from openelm.data.manifest import Shard, Source


def source(*shards: list[tuple[int, int]]) -> Source:
    """Make a source of shards of blocks of (rows, bytes)."""
    made = []
    for at, blocks in enumerate(shards):
        first, cut = 0, []
        for rows, size in blocks:
            cut.append(Block(first, rows, 0, 0, size))
            first += rows
        made.append(Shard(f"/{at}", str(at), "txt", 0, 0, "", first, Blocks(cut)))
    return Source("text", tuple(made))


CORPORA = {
    "forty files of one row": source(*[[(1, 100)]] * 40),
    "one row": source([(1, 10)]),
    "uneven blocks": source([(3, 50), (70, 9000), (1, 1)], [(11, 400)] * 5),
    "large blocks in slices": source([(100, 50 << 20), (7, 9 << 20)], [(2, 30 << 20)]),
    "many blocks": source([(2, 1000)] * 500),
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_every_document_comes_exactly_once_per_epoch(name, lanes):
    corpus = CORPORA[name]
    order = DocumentOrder(corpus, seed=1, lanes=lanes)
    everything = {(at, row): 1 for at, shard in enumerate(corpus.shards) for row in range(shard.rows)}
    for epoch in range(3):
        assert Counter(place for lane in range(lanes) for place in order.documents(lane, epoch)) == everything


@pytest.mark.parametrize("lanes", [3, 16])
def test_lanes_are_dealt_equally_many_blocks_over_epochs(lanes):
    order = DocumentOrder(CORPORA["forty files of one row"], seed=1, lanes=lanes)
    counts = [sum(len(list(order.documents(lane, epoch))) for epoch in range(5)) for lane in range(lanes)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == 200


def test_order_depends_on_seed_source_lane_and_epoch_only():
    corpus = CORPORA["uneven blocks"]
    order, again = (DocumentOrder(corpus, seed=4, lanes=3) for _ in range(2))
    list(again.documents(2, 5))  # what was asked before must not matter
    assert list(order.documents(1, 0)) == list(again.documents(1, 0))
    assert list(order.documents(1, 0)) != list(DocumentOrder(corpus, seed=5, lanes=3).documents(1, 0))


def test_the_order_is_the_same_in_every_version():
    words = np.frombuffer(hashlib.shake_256(b"key").digest(8 * 12), dtype="<u8").tolist()
    assert permutation("key", 12).tolist() == sorted(range(12), key=words.__getitem__)
    assert permutation("key", 12).tolist() == [10, 6, 5, 2, 0, 8, 11, 1, 3, 7, 9, 4]


def test_a_slice_stays_within_the_window_size():
    order = DocumentOrder(CORPORA["large blocks in slices"], seed=0, lanes=2)
    position = Position()
    for _ in range(50):
        stretches = order.stretches(0, position)
        size = sum(part.block.bytes * part.rows / part.block.rows for part in stretches)
        largest = max((part.block.bytes / part.block.rows for part in stretches), default=0)
        assert size <= (4 << 20) + largest * len(stretches)
        position = order.next_slice(0, position)


def test_shuffling_leaves_no_serial_correlation_and_spreads_shards():
    corpus = source(*[[(4, 1000)] * 16] * 32)  # 32 shards of 64 documents
    order = DocumentOrder(corpus, seed=0, lanes=4)
    for lane in range(4):
        shards = np.array([shard for shard, _ in order.documents(lane, 0)], float)
        assert abs(np.corrcoef(shards[:-64], shards[64:])[0, 1]) < 0.15
        halves = np.bincount(shards[: len(shards) // 2].astype(int), minlength=32)
        assert (halves > 0).sum() >= 24
