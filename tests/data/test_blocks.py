"""Block tables: a sequence of blocks like any other, in a tenth of the memory."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc

import pytest

from openelm.data.blocks import Blocks
from openelm.data.document import Block

DRAW = random.Random(5)
SMALL = [Block(*(DRAW.randrange(1 << 32) for _ in range(5))) for _ in range(50)]
TABLES = {
    "none": [],
    "one": [Block(0, 3, 0, 0, 90)],
    "small": SMALL,
    "large": [*SMALL, Block(1 << 32, 5, (1 << 63) - 1, 0, 0)],
}


@pytest.mark.parametrize("name", TABLES)
def test_blocks_are_the_sequence_they_were_made_from(name):
    plain = TABLES[name]
    blocks = Blocks(plain)
    assert list(blocks) == plain and len(blocks) == len(plain) and bool(blocks) == bool(plain)
    assert [blocks[at] for at in range(-len(plain), len(plain))] == plain * 2
    assert list(blocks[1:-1]) == plain[1:-1] and list(reversed(blocks)) == plain[::-1]
    assert blocks.rows == sum(block.rows for block in plain) and blocks.bytes == sum(block.bytes for block in plain)
    for at in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            blocks[at]


@pytest.mark.parametrize("name", TABLES)
def test_blocks_are_equal_by_what_they_hold_through_json_and_pickle(name):
    blocks = Blocks(TABLES[name])
    for again in (Blocks(json.loads(json.dumps(blocks.to_json()))), pickle.loads(pickle.dumps(blocks)), blocks[:]):
        assert again == blocks and hash(again) == hash(blocks)
    other = Blocks([*TABLES[name][:-1], Block(7, 7, 7, 7, 7)])
    assert other != blocks and blocks != TABLES[name]


def test_a_slice_without_the_large_numbers_is_equal_to_blocks_made_without_them():
    assert Blocks(TABLES["large"])[:-1] == Blocks(SMALL)


@pytest.mark.parametrize(
    "value",
    [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5], [1]], [["1", 2, 3, 4, 5]], [[1, 2, 3, 4, -1]], [[1.0, 2, 3, 4, 5]], [1], "12345",
     [[1, 2, 3, 4, None]], [[True] * 5], [[1, 2, 3, 4, 1 << 64]], [[]]],
)  # fmt: skip
def test_anything_but_five_whole_numbers_a_block_is_refused(value):
    with pytest.raises(ValueError):
        Blocks(value)


def test_a_block_takes_twenty_bytes_in_memory_and_in_a_pickle():
    rows = [(at, 1, at * 1000, 0, 1000) for at in range(10_000)]
    tracemalloc.start()
    try:
        blocks = Blocks(rows)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 20 * 10_000 + 2000
    assert len(pickle.dumps(blocks)) < 20 * 10_000 + 500
