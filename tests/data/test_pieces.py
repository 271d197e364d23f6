"""Rows the published way, against the published steps written one after the other."""

from __future__ import annotations

import json
import re
import string
import sys
import unicodedata

import numpy as np
import pytest

from openelm.data.lanes import DocumentOrder
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.stream import DataConfig
from openelm.errors import ConfigError, DataError

SETTINGS = {"packing": "apple", "min_characters": 40, "min_tokens": 100}


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    """Documents of 0 to 6,200 words, some of them broken in the ways that ftfy mends."""
    random = np.random.Generator(np.random.PCG64(3))
    words = ["model", "schÃ¶n", "“quoted”", "cafe\u0301", "&lt;b&gt;", "...", "你好", "two\nlines", "", "ﬁne"]
    lengths = [0, 1, 3, 12, 2047, 2048, 2049, 4097, 6200, *random.integers(0, 400, 12)]
    texts = [f"{at:03d} " + " ".join(random.choice(words, length)) for at, length in enumerate(lengths)]
    return [
        *texts,
        "",
        "  \n",
        "a word " * 9,
        "x " * 2048,
        ". " * 3000 + "the end of it is long enough to be kept here " * 9,
    ]


def published_rows(text, tokenizer, length, min_characters, min_tokens):
    """Yield (inputs, targets) of a document's pieces, or the reason why one is dropped."""
    if not text.strip():
        yield "empty"
        return
    words = text.split(" ")
    for at in range(0, len(words), 2048):
        piece = " ".join(words[at : at + 2048])
        plain = "".join(letter for letter in piece.lower() if letter not in string.punctuation)
        plain = re.sub(r"\s+", " ", plain.strip())
        if not piece.strip():
            yield "empty"
            continue
        if len(plain) < min_characters:
            yield "too_few_characters"
            continue
        import ftfy

        ids = [tokenizer.bos_id, *tokenizer.encode(ftfy.fix_text(piece, normalization="NFC")), tokenizer.eos_id]
        if len(ids) < min_tokens:
            yield "too_few_tokens"
            continue
        ids = ids[: length + 1]
        padded = ids + [None] * (length + 1 - len(ids))
        yield padded[:-1], padded[1:]


def expected_of_lane(texts, order, lane, count, tokenizer, length, settings):
    rows, dropped, epoch = [], {}, 0
    while len(rows) < count:
        for _, row in order.documents(lane, epoch):
            for outcome in published_rows(
                texts[row], tokenizer, length, settings["min_characters"], settings["min_tokens"]
            ):
                if len(rows) == count:
                    return rows, dropped
                if isinstance(outcome, str):
                    dropped[outcome] = dropped.get(outcome, 0) + 1
                else:
                    rows.append(outcome)
        epoch += 1
    return rows, dropped


@pytest.mark.parametrize("length, lanes", [(512, 1), (12000, 2)])
def test_rows_are_those_of_the_published_steps(open_stream, write_jsonl, long_texts, tokenizer, length, lanes):
    path = write_jsonl(long_texts)
    source = build_manifest([SourceConfig(name="text", paths=(str(path),))]).sources[0]
    order = DocumentOrder(source, seed=4, lanes=lanes)
    stream = open_stream(path, seed=4, rows=lanes, lanes=lanes, length=length, **SETTINGS)
    batches = [next(stream) for _ in range(30)]
    drops: dict[str, int] = {}
    for lane in range(lanes):
        rows, dropped = expected_of_lane(long_texts, order, lane, 30, tokenizer, length, SETTINGS)
        for batch, (inputs, targets) in zip(batches, rows, strict=True):
            known = [token for token in inputs if token is not None]
            assert batch.inputs[lane, : len(known)].tolist() == known
            assert batch.targets[lane].tolist() == [-100 if token is None else token for token in targets]
        for reason, number in dropped.items():
            drops[reason] = drops.get(reason, 0) + number
    assert stream.counts() == {"text": drops}
    assert set(drops) == {"empty", "too_few_characters", "too_few_tokens"}


def test_a_row_holds_one_document_and_padding_is_no_target(open_stream, write_jsonl, tokenizer):
    text = "a document of some words and no more than these, which leaves room"
    batch = next(open_stream(write_jsonl([text]), rows=1, lanes=1, length=200, packing="apple"))
    assert not batch.documents.any()
    assert (batch.targets[0] != -100).sum() == len(text) + 1  # every byte, and EOS
    assert batch.target_bytes == len(text)


def test_text_is_mended_and_composed(open_stream, write_jsonl, tokenizer):
    batch = next(open_stream(write_jsonl(["schÃ¶n cafe\u0301"]), rows=1, lanes=1, length=40, packing="apple"))
    known = [int(token) for token in batch.targets[0] if token not in (-100, tokenizer.eos_id)]
    assert tokenizer.decode(known) == unicodedata.normalize("NFC", "schön café")


@pytest.mark.parametrize("rows, lanes", [(4, 4), (2, 8), (6, 3)])
def test_resume_at_every_row_is_the_undisturbed_stream(open_stream, write_jsonl, texts, monkeypatch, rows, lanes):
    monkeypatch.setattr("openelm.data.pieces.PIECE_WORDS", 16)  # so that short texts have many pieces
    path = write_jsonl([*texts, "", " "])
    manifest = build_manifest([SourceConfig(name="text", paths=(str(path),))])
    shape = {"rows": rows, "lanes": lanes, "length": 64, "manifest": manifest, **SETTINGS, "min_tokens": 64}
    stream = open_stream(path, **shape)
    hashes, states = [], [json.dumps(stream.cursors())]
    for _ in range(24):
        hashes.append(next(stream).sha256)
        states.append(json.dumps(stream.cursors()))
    inside = [place for state in states for cursor in json.loads(state)[1:] if cursor for place in cursor["sources"]]
    assert any(place[5] for place in inside), "the stream must stop inside documents"
    for step in range(24):
        again = open_stream(path, cursors=json.loads(states[step]), **shape)
        assert [next(again).sha256 for _ in range(min(4, 24 - step))] == hashes[step : step + 4]
        assert json.dumps(again.cursors()) == states[min(24, step + 4)]


def test_cursors_do_not_grow(open_stream, write_jsonl, texts):
    stream = open_stream(write_jsonl(texts), rows=1, lanes=1, length=64, **SETTINGS)
    numbers = []
    for _ in range(80):
        next(stream)
        (place,) = stream.cursors()[1]["sources"]
        numbers.append(len(place) + sum(map(len, stream.cursors()[1]["dropped"].values())))
    assert max(numbers) <= 6 + 3


def test_batches_are_the_same_for_every_number_of_workers(open_stream, write_jsonl, long_texts):
    path = write_jsonl(long_texts)
    outcomes = []
    for workers in (0, 2):
        with open_stream(path, rows=8, lanes=4, length=64, workers=workers, **SETTINGS) as stream:
            outcomes.append(([next(stream).sha256 for _ in range(2)], json.dumps(stream.cursors()), stream.counts()))
    assert outcomes[0] == outcomes[1]


def test_sources_share_the_tokens_that_are_not_padding_within_one_row(open_stream, write_jsonl, texts):
    paths = [write_jsonl([text + mark for text in texts], f"{mark}.jsonl") for mark in "AB"]
    sources = [
        {"name": path.stem, "paths": (str(path),), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)
    ]
    stream = open_stream(sources, lanes=1, rows=1, length=128, **SETTINGS)
    for _ in range(100):
        next(stream)
        first, second = (place[4] for place in stream.cursors()[1]["sources"])
        assert abs(first - 0.75 * (first + second)) <= 129


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: place[:5],
        lambda place: [*place[:5], -1],
        lambda place: [*place[:5], 2],
        lambda place: [*place[:5], 10**9],
    ],
)
def test_damaged_cursors_are_refused(open_stream, write_jsonl, damage):
    path = write_jsonl(["abcdef " * 3000])
    stream = open_stream(path, lanes=1, rows=1, packing="apple")
    next(stream)
    state = stream.cursors()
    state[1]["sources"] = [damage(state[1]["sources"][0])]
    with pytest.raises(DataError) as caught:
        open_stream(path, lanes=1, rows=1, packing="apple", cursors=state)
    assert caught.value.code == "E_CHANGED"


def test_a_run_does_not_go_on_with_another_packing_or_another_ftfy(open_stream, write_jsonl, texts, monkeypatch):
    path = write_jsonl(texts)
    cursors = open_stream(path, packing="apple").cursors()
    with pytest.raises(DataError, match="packing was 'apple'"):
        open_stream(path, cursors=cursors)
    monkeypatch.setattr("openelm.data.pieces.version", lambda name: "0.0")
    with pytest.raises(DataError, match="ftfy was"):
        open_stream(path, packing="apple", cursors=cursors)


def test_the_fingerprint_of_packed_documents_is_as_it_was(open_stream, write_jsonl, texts):
    fingerprint = open_stream(write_jsonl(texts)).cursors()[0]["fingerprint"]
    known = ("manifest", "tokenizer", "seed", "lanes", "rows", "length", "min_characters", "min_tokens")
    assert set(fingerprint) == set(known)


def test_without_ftfy_the_error_names_the_extra(open_stream, write_jsonl, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ConfigError, match="ftfy") as caught:
        open_stream(write_jsonl(texts), packing="apple")
    assert "openelm-framework[apple]" in caught.value.fix


def test_only_known_packings_are_allowed():
    with pytest.raises(ConfigError, match=r"packing.*'documents' or 'apple'"):
        DataConfig.parse({"sources": [{"name": "a", "paths": ["a"]}], "packing": "dense"})
