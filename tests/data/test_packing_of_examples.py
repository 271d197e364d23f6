"""Examples packed into the rows of a batch: each once, in no more rows than are needed, and no wider than that asks."""

from __future__ import annotations

import numpy as np
import pytest

from openelm.data.example_stream import ExampleStream, pack, pack_evenly
from openelm.data.examples import Examples

SIZES = np.random.default_rng(0)
CASES = [SIZES.integers(1, 400, count).tolist() for count in (1, 2, 7, 32, 100)]


def width(sizes: list[int], rows: list[list[int]]) -> int:
    return max(sum(sizes[item] for item in row) for row in rows)


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("sizes", CASES, ids=len)
def test_every_item_is_in_one_row_and_every_row_fits(sizes: list[int], multiple: int) -> None:
    rows = pack_evenly(sizes, 512, multiple)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert width(sizes, rows) <= 512


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("sizes", CASES, ids=len)
def test_there_are_as_many_rows_as_packing_needs_and_the_multiple_asks_for(sizes: list[int], multiple: int) -> None:
    needed = len(pack(sizes, 512))
    assert len(pack_evenly(sizes, 512, multiple)) == needed + -needed % multiple


@pytest.mark.parametrize("sizes", CASES, ids=len)
def test_rows_are_never_wider_than_those_of_packing_alone(sizes: list[int]) -> None:
    assert width(sizes, pack_evenly(sizes, 512)) <= width(sizes, pack(sizes, 512))


def test_a_full_row_and_a_scrap_become_two_halves() -> None:
    sizes = [10] * 12
    assert width(sizes, pack(sizes, 100)) == 100
    assert width(sizes, pack_evenly(sizes, 100)) == 60


def test_rows_that_a_multiple_asks_for_hold_examples_too() -> None:
    rows = pack_evenly([10] * 8, 100, multiple=4)
    assert [len(row) for row in rows] == [2, 2, 2, 2]


def test_parts_of_a_batch_are_the_rows_of_the_whole_one() -> None:
    lengths = SIZES.integers(3, 60, 20)
    count = int(lengths.sum())
    examples = Examples(
        np.arange(count, dtype=np.int32),
        np.ones(count, np.bool_),
        np.cumsum(lengths),
        1,
        np.ones(count, np.int32),
        {},
        (),
    )
    settings = {"seed": 0, "rows": 16, "length": 64, "multiple": 2}
    whole, *parts = (
        next(ExampleStream(examples, **settings, part=part))  # type: ignore[arg-type]
        for part in ((0, 1), (0, 2), (1, 2))
    )
    for index, part in enumerate(parts):
        assert np.array_equal(part.inputs, whole.inputs[index::2])
        assert np.array_equal(part.targets, whole.targets[index::2])
