from __future__ import annotations

import json

import numpy as np
import pytest

from openelm.data.lanes import DocumentOrder
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.errors import ConfigError, DataError


def lane_streams(batches, lanes):
    """Put rows back into lanes: token ids, and how often each was a target."""
    ids, hits = [[] for _ in range(lanes)], [[] for _ in range(lanes)]
    place = 0
    for batch in batches:
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            lane = place % lanes
            ids[lane].extend(inputs)
            hits[lane].extend(targets != -100)
            place += 1
    return ids, hits


@pytest.mark.parametrize("rows, lanes", [(4, 4), (8, 4), (2, 8), (3, 1), (1, 70)])
def test_every_token_is_a_target_exactly_once_in_an_epoch(open_stream, write_jsonl, texts, tokenizer, rows, lanes):
    path = write_jsonl(texts)
    order = DocumentOrder(
        build_manifest([SourceConfig(name="text", paths=(str(path),))]).sources[0], seed=5, lanes=lanes
    )
    stream = open_stream(path, seed=5, rows=rows, lanes=lanes)
    batches = []
    while not all(cursor and cursor["sources"][0][0] >= 1 for cursor in stream.cursors()[1:]):
        batches.append(next(stream))
    expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    counts = [np.zeros(len(document), int) for document in expected]
    for lane, (ids, hits) in enumerate(zip(*lane_streams(batches, lanes), strict=True)):
        start = 0
        for _, row in order.documents(lane, 0):
            stop = start + len(expected[row])
            assert ids[start:stop] == expected[row]
            counts[row][0] += start > 0 and hits[start - 1]
            counts[row][1:] += hits[start : stop - 1]
            start = stop
    assert all(count[0] == 0 and (count[1:] == 1).all() for count in counts)


def test_documents_count_from_zero_in_each_row_and_change_at_each_beginning(open_stream, write_jsonl, texts, tokenizer):
    for batch, _ in zip(open_stream(write_jsonl(texts)), range(30), strict=False):
        starts = batch.inputs == tokenizer.bos_id
        starts[:, 0] = False
        np.testing.assert_array_equal(batch.documents, np.cumsum(starts, axis=1))
        # -100 exactly where the next input would begin a document
        np.testing.assert_array_equal(batch.targets[:, :-1] == -100, starts[:, 1:])
        following = np.where(starts[:, 1:], -100, batch.inputs[:, 1:])
        np.testing.assert_array_equal(batch.targets[:, :-1], following)


def test_target_bytes_counts_the_utf8_bytes_of_the_targets(open_stream, write_jsonl, texts, tokenizer):
    for batch, _ in zip(open_stream(write_jsonl(texts)), range(10), strict=False):
        known = batch.targets[batch.targets != -100]
        assert batch.target_bytes == sum(len(tokenizer.token_bytes(int(token))) for token in known)
        assert batch.target_bytes == (~np.isin(known, [tokenizer.bos_id, tokenizer.eos_id])).sum()


def test_the_seed_changes_the_order_and_nothing_else_does(open_stream, write_jsonl, texts):
    path = write_jsonl(texts)
    first, again, other = (next(open_stream(path, seed=seed)).sha256 for seed in (1, 1, 2))
    assert first == again != other


def test_a_new_epoch_has_a_new_order(write_jsonl, texts):
    source = build_manifest([SourceConfig(name="text", paths=(str(write_jsonl(texts)),))]).sources[0]
    order = DocumentOrder(source, seed=0, lanes=1)
    first, second = list(order.documents(0, 0)), list(order.documents(0, 1))
    assert sorted(first) == sorted(second) and first != second


def run(stream, steps):
    hashes, states = [], [json.dumps(stream.cursors())]
    with stream:
        for _ in range(steps):
            hashes.append(next(stream).sha256)
            states.append(json.dumps(stream.cursors()))
    return hashes, states


@pytest.mark.parametrize("rows, lanes, length", [(4, 4, 64), (2, 8, 150), (6, 3, 64)])
def test_resume_at_every_step_and_again_at_every_later_step(open_stream, write_jsonl, texts, rows, lanes, length):
    shape = {"rows": rows, "lanes": lanes, "length": length}
    path = write_jsonl([*texts, "", " "])
    manifest = build_manifest([SourceConfig(name="text", paths=(str(path),))])
    hashes, states = run(open_stream(path, manifest=manifest, **shape), 60)
    epochs = {cursor["sources"][0][0] for state in states for cursor in json.loads(state)[1:] if cursor}
    assert len(epochs) >= 2, "the run must pass the end of an epoch"
    assert any(cursor.get("offset") for cursor in json.loads(states[7])[1:]), "and stop inside documents"
    for step in range(60):
        once = open_stream(path, manifest=manifest, cursors=json.loads(states[step]), **shape)
        assert [next(once).sha256 for _ in range(min(3, 60 - step))] == hashes[step : step + 3]
        later = min(60, step + 3)
        assert json.dumps(once.cursors()) == states[later]
        twice = open_stream(path, manifest=manifest, cursors=once.cursors(), **shape)
        rest, rest_states = run(twice, 60 - later)
        assert rest == hashes[later:] and rest_states[-1] == states[-1]


@pytest.mark.parametrize("name, value", [("seed", 9), ("length", 16), ("rows", 8), ("lanes", 2), ("min_tokens", 3)])
def test_cursors_of_another_run_are_refused_by_name(open_stream, write_jsonl, texts, name, value):
    path = write_jsonl(texts)
    cursors = open_stream(path).cursors()
    with pytest.raises(DataError, match=name) as caught:
        open_stream(path, cursors=cursors, **{name: value})
    assert caught.value.code == "E_CHANGED"


def test_cursors_of_other_data_are_refused(open_stream, write_jsonl, texts):
    cursors = open_stream(write_jsonl(texts)).cursors()
    with pytest.raises(DataError, match="manifest was"):
        open_stream(write_jsonl(texts[1:], "other.jsonl"), cursors=cursors)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: [],
        lambda state: state[:-1],
        lambda state: [{}, *state[1:]],
        lambda state: [state[0], {**state[1], "offset": 10**6}, *state[2:]],
        lambda state: [state[0], {**state[1], "offset": -1}, *state[2:]],
        lambda state: [state[0], {**state[1], "sources": []}, *state[2:]],
        lambda state: [state[0], {**state[1], "sources": [[0, 0]]}, *state[2:]],
        lambda state: [state[0], {"offset": 0}, *state[2:]],
    ],
)
def test_damaged_cursors_are_refused(open_stream, write_jsonl, texts, damage):
    path = write_jsonl(texts)
    stream = open_stream(path)
    next(stream)
    with pytest.raises(DataError) as caught:
        open_stream(path, cursors=damage(stream.cursors()))
    assert caught.value.code == "E_CHANGED"


def test_rows_and_lanes_must_fit(open_stream, write_jsonl, texts):
    with pytest.raises(ConfigError, match="6 rows a batch and 16 lanes") as caught:
        open_stream(write_jsonl(texts), rows=6, lanes=16)
    assert "18 or 12" in caught.value.fix


def test_a_tiny_corpus_feeds_many_lanes(open_stream, write_jsonl):
    stream = open_stream(write_jsonl(["one", "two"]), rows=16, lanes=16)
    assert next(stream).inputs.shape == (16, 32)


def test_one_huge_document_spans_many_rows(open_stream, write_jsonl, tokenizer):
    text = "x" * 1000
    stream = open_stream(write_jsonl([text]), rows=1, lanes=1, length=100)
    ids = np.concatenate([next(stream).inputs[0] for _ in range(10)])
    assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(text)][:1000]


def test_when_no_document_passes_the_filters_the_run_ends_with_the_reason(open_stream, write_jsonl, texts):
    stream = open_stream(write_jsonl(texts), min_tokens=10_000)
    with pytest.raises(DataError, match="too_few_tokens") as caught:
        next(stream)
    assert caught.value.exit_code == 3


def test_dropped_documents_are_counted_by_source_and_reason(open_stream, write_jsonl):
    texts = ["", "  \n", "!!! ??", "short", "a word or two more"]
    stream = open_stream(write_jsonl(texts), min_characters=3, min_tokens=10, lanes=1, rows=1, length=200)
    next(stream)
    passed = stream.cursors()[1]["sources"][0][0]  # whole epochs
    counts = stream.counts()["text"]
    assert set(counts) == {"empty", "too_few_characters", "too_few_tokens"}
    assert 2 * passed <= counts["empty"] <= 2 * passed + 2
    assert passed <= counts["too_few_tokens"] <= passed + 1


def test_sources_share_the_tokens_by_weight_within_one_document(open_stream, write_jsonl, texts, tokenizer):
    paths = [write_jsonl([text + mark for text in texts], f"{mark}.jsonl") for mark in "AB"]
    sources = [
        {"name": path.stem, "paths": (str(path),), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)
    ]
    stream = open_stream(sources, lanes=2, rows=2, length=128)
    longest = max(len(tokenizer.encode(text)) for text in texts) + 3
    for _ in range(100):
        next(stream)
        for cursor in stream.cursors()[1:]:
            first, second = (taken for *_, taken in cursor["sources"])
            assert abs(first - 0.75 * (first + second)) <= longest
    assert first + second > 10_000
