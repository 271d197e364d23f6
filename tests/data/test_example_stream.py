"""Every example comes whole, once an epoch, in rows that unpack to it, whatever is resumed or shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.data.example_stream import ExampleStream, pack
from openelm.data.examples import Examples
from openelm.data.stream import Batch, batch_sha256
from openelm.errors import ConfigError, DataError

LENGTH = 40
Sequences = tuple[tuple[list[int], list[bool]], ...]


def made(sizes: list[int], per_example: int = 1, seed: int = 0) -> Examples:
    """Make examples of random tokens, sizes in tokens of each sequence."""
    random = np.random.Generator(np.random.PCG64(seed))
    tokens = random.integers(1, 300, sum(sizes)).astype(np.int32)
    learned = random.random(sum(sizes)) < 0.5
    ends = np.cumsum(sizes).astype(np.int64)
    learned[ends - 1] = True
    bad_rows = ({"source": "a", "file": "a.jsonl", "line": 3, "offset": None, "code": "E_JSON", "sha256": None},)
    return Examples(tokens, learned, ends, per_example, np.arange(300, dtype=np.int32), {"a": {"E_JSON": 1}}, bad_rows)


def some(per_example: int = 1, count: int = 23) -> Examples:
    random = np.random.Generator(np.random.PCG64(5))
    return made(random.integers(2, LENGTH // per_example, count * per_example).tolist(), per_example)


def expected(examples: Examples, index: int) -> Sequences:
    """Say what the inputs and the learned targets of an example are."""
    return tuple(
        (one.tokens[:-1].tolist(), np.where(one.learned[1:], one.tokens[1:], -100).tolist())
        for one in examples.sequences(index)
    )


def unpacked(batch: Batch, per_example: int) -> list[tuple[int, Sequences]]:
    """Take the rows of a batch apart by their documents: (example, its sequences)."""
    assert batch.examples is not None
    found = []
    for inputs, targets, documents, numbers in zip(
        batch.inputs, batch.targets, batch.documents, batch.examples, strict=True
    ):
        present = numbers[numbers >= 0].tolist()
        assert numbers.tolist() == present + [-1] * (len(numbers) - len(present))
        count = len(present) * per_example
        assert (np.diff(documents) >= 0).all() and set(documents.tolist()) >= set(range(count))
        padding = documents >= count
        assert not inputs[padding].any() and (targets[padding] == -100).all() and (documents[padding] == count).all()
        sequences = [(inputs[documents == at].tolist(), targets[documents == at].tolist()) for at in range(count)]
        for place, example in enumerate(present):
            found.append((example, tuple(sequences[place * per_example : (place + 1) * per_example])))
    return found


def take(stream: ExampleStream, count: int) -> list[Batch]:
    return list(islice(stream, count))


def same(one: Batch, other: Batch) -> bool:
    names = ("inputs", "targets", "documents", "row_sha256", "examples")
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
    return arrays and (one.target_bytes, one.bad_rows) == (other.target_bytes, other.bad_rows)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, LENGTH // 2 + 1), min_size=2, max_size=40).filter(lambda sizes: len(sizes) % 2 == 0),
    per_example=st.sampled_from([1, 2]),
    rows=st.integers(1, 9),
    multiple=st.integers(1, 3),
)
def test_each_epoch_has_every_token_of_every_example_once(sizes, per_example, rows, multiple) -> None:
    examples = made(sizes, per_example)
    stream = ExampleStream(examples, seed=1, rows=rows, length=LENGTH, multiple=multiple)
    found = []
    for batch in take(stream, 2 * len(examples)):  # two epochs for each row of a batch
        assert len(batch.inputs) % multiple == 0 and batch.inputs.shape[1] <= LENGTH
        inside = unpacked(batch, per_example)
        assert len(inside) == rows
        found.append(sorted(inside))
    order = [example for batch in found for example, _ in batch]
    assert sorted(order) == sorted(list(range(len(examples))) * 2 * rows)
    for batch in found:
        assert all(sequences == expected(examples, example) for example, sequences in batch)


def test_an_epoch_ends_inside_a_batch_and_the_next_goes_on_there() -> None:
    examples = some(count=10)
    batches = take(ExampleStream(examples, seed=0, rows=4, length=LENGTH), 5)
    numbers = [{example for example, _ in unpacked(batch, 1)} for batch in batches]
    assert len(numbers[0] | numbers[1]) == 8
    assert set(range(10)) - (numbers[0] | numbers[1]) <= numbers[2]


def test_epochs_and_seeds_differ_in_their_order() -> None:
    examples = some(count=100)
    orders = []
    for seed in (0, 1):
        batches = take(ExampleStream(examples, seed=seed, rows=1, length=LENGTH), 200)
        numbers = [int(batch.examples[0, 0]) for batch in batches if batch.examples is not None]
        orders += [tuple(numbers[:100]), tuple(numbers[100:])]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)


@pytest.mark.parametrize("per_example", [1, 2])
def test_a_stream_resumed_anywhere_goes_on_as_if_nothing_happened(per_example: int) -> None:
    examples = some(per_example)
    options: dict[str, Any] = {"seed": 3, "rows": 5, "length": LENGTH, "multiple": 2}
    stream = ExampleStream(examples, **options)
    batches, cursors = [], [stream.cursors()]
    for batch in islice(stream, 12):
        batches.append(batch)
        cursors.append(json.loads(json.dumps(stream.cursors())))
    for step, saved in enumerate(cursors[:-1]):
        resumed = ExampleStream(examples, **options, cursors=saved)
        assert resumed.cursors() == saved
        assert all(map(same, take(resumed, 12 - step), batches[step:]))


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_together_are_the_whole(parts: int) -> None:
    examples = some(count=50)
    options: dict[str, Any] = {"seed": 3, "rows": 20, "length": LENGTH, "multiple": 4}
    whole = ExampleStream(examples, **options)
    streams = [ExampleStream(examples, **options, part=(k, parts)) for k in range(parts)]
    for _ in range(6):
        batch, shares = next(whole), [next(stream) for stream in streams]
        for name in ("inputs", "targets", "documents", "row_sha256", "examples"):
            together = np.empty_like(getattr(batch, name))
            for k, share in enumerate(shares):
                together[k::parts] = getattr(share, name)
            assert np.array_equal(together, getattr(batch, name)), name
        assert sum(share.target_bytes for share in shares) == batch.target_bytes
        assert [row for share in shares for row in share.bad_rows] == list(batch.bad_rows)
        assert all(stream.cursors() == whole.cursors() for stream in streams)
    assert [stream.counts() for stream in streams] == [whole.counts()] + [{}] * (parts - 1)


def test_a_pair_lies_in_one_row_chosen_before_rejected() -> None:
    examples = some(per_example=2)
    for batch in take(ExampleStream(examples, seed=0, rows=6, length=LENGTH), 8):
        assert all(sequences == expected(examples, example) for example, sequences in unpacked(batch, 2))


def test_neighbours_are_different_documents() -> None:
    examples = made([3] * 30)
    (batch,) = take(ExampleStream(examples, seed=0, rows=30, length=10), 1)
    assert batch.inputs.shape == (6, 10)
    assert (batch.documents == np.repeat(np.arange(5), 2)).all()


def test_columns_of_padding_alone_are_left_out() -> None:
    batch = next(ExampleStream(made([5, 8]), seed=0, rows=2, length=1000))
    assert batch.inputs.shape == (1, 11)
    assert batch.examples is not None and batch.examples.tolist() == [[1, 0]]


def test_bad_rows_come_with_the_first_batch_alone() -> None:
    examples = some()
    stream = ExampleStream(examples, seed=0, rows=4, length=LENGTH)
    assert [batch.bad_rows for batch in take(stream, 3)] == [examples.bad_rows, (), ()]
    assert stream.counts() == {"a": {"E_JSON": 1}}


def test_hashes_and_bytes_are_those_of_the_rows() -> None:
    import hashlib

    for batch in take(ExampleStream(some(), seed=0, rows=6, length=LENGTH, multiple=4), 3):
        rows = [np.stack(row).astype("<i4").tobytes() for row in zip(batch.inputs, batch.targets, strict=True)]
        digests = [hashlib.sha256(row).digest() for row in rows]
        assert batch.sha256 == hashlib.sha256(b"".join(digests)).hexdigest() == batch_sha256(batch.row_sha256)
        assert batch.target_bytes == batch.targets[batch.targets >= 0].sum()  # token t stands for t bytes here


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "other examples": lambda options: {**options, "examples": some(count=22)},
    "seed": lambda options: {**options, "seed": 4},
    "rows": lambda options: {**options, "rows": 6},
    "length": lambda options: {**options, "length": LENGTH + 1},
    "multiple": lambda options: {**options, "multiple": 4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cursor_of_other_data_or_settings_is_refused(name: str) -> None:
    options: dict[str, Any] = {"examples": some(), "seed": 3, "rows": 5, "length": LENGTH, "multiple": 2}
    stream = ExampleStream(**options)
    next(stream)
    with pytest.raises(DataError, match=name.split()[-1]) as caught:
        ExampleStream(**CHANGES[name](options), cursors=stream.cursors())
    assert caught.value.code == "E_CHANGED"


@pytest.mark.parametrize("damage", [[], [{}], [{"place": [0, 99]}], [{"batches": -1}], [{"batches": 2}]])
def test_a_damaged_cursor_is_refused(damage: list[dict[str, Any]]) -> None:
    examples = some()
    stream = ExampleStream(examples, seed=3, rows=5, length=LENGTH)
    cursors = [{**stream.cursors()[0], **damage[0]} if damage and damage[0] else {} for _ in damage]
    with pytest.raises(DataError) as caught:
        ExampleStream(examples, seed=3, rows=5, length=LENGTH, cursors=cursors)
    assert caught.value.code == "E_CHANGED"


@pytest.mark.parametrize(
    ("per_example", "length", "message"), [(1, 8, "an example can take 9"), (2, 13, "both answers .* 14")]
)
def test_an_example_that_no_row_can_hold_is_refused(per_example: int, length: int, message: str) -> None:
    examples = made([4, 5, 6, 10], per_example)
    with pytest.raises(ConfigError, match=message):
        ExampleStream(examples, seed=0, rows=2, length=length)
    next(ExampleStream(examples, seed=0, rows=2, length=length + 1))


@pytest.mark.parametrize("options", [{"rows": 0}, {"multiple": 0}, {"part": (0, 2)}, {"part": (0, 2), "multiple": 3}])
def test_numbers_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ExampleStream(some(), **{"seed": 0, "rows": 4, "length": LENGTH, **options})


@given(sizes=st.lists(st.integers(1, 50), max_size=60))
def test_packing_fills_rows_until_nothing_smaller_fits(sizes: list[int]) -> None:
    rows = pack(sizes, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    totals = [sum(sizes[item] for item in row) for row in rows]
    assert all(0 < total <= 50 for total in totals)
    assert all(
        totals[early] + sizes[item] > 50 for late, row in enumerate(rows) for item in row for early in range(late)
    )
