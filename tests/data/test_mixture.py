"""Sources get their weights in tokens, exactly to within one document of a lane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.mixture import choose_source
from openelm.data.stream import BatchStream, DataConfig
from openelm.text.tokenizer import ByteTokenizer, Tokenizer

WEIGHTS = st.lists(st.one_of(st.floats(1e-3, 1.0), st.sampled_from([1.0, 9.0, 100.0])), min_size=1, max_size=9)


def distance(tokens: list[int], weights: list[float]) -> float:
    """The largest distance of a source from its exact share, in tokens."""
    taken, share = np.array(tokens, float), np.array(weights) / sum(weights)
    return float(abs(share * taken.sum() - taken).max())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights=WEIGHTS, lane=st.integers(0, 20), seed=st.integers(0, 10**6), spread=st.sampled_from([1, 10, 5000]))
def test_each_source_stays_within_one_document_of_its_share(
    weights: list[float], lane: int, seed: int, spread: int
) -> None:
    lengths = np.random.Generator(np.random.PCG64(seed)).integers(1, spread + 1, 120).tolist()
    tokens, longest = [0] * len(weights), 0
    for length in lengths:
        tokens[choose_source(tokens, weights, lane, longest)] += length
        longest = max(longest, length)
        # a millionth of a document for the rounding of floats
        assert distance(tokens, weights) <= longest * (1 + 1e-6)


def test_a_heavy_source_does_not_wait_for_a_document_of_every_light_one() -> None:
    weights = [91.0] + [1.0] * 9
    tokens = [0] * 10
    for _ in range(10):
        tokens[choose_source(tokens, weights, 5, max(tokens) and 100)] += 100
    assert tokens[0] >= 800


def test_lanes_do_not_all_begin_with_one_source() -> None:
    assert {choose_source([0, 0, 0], [1.0, 1.0, 1.0], lane, 0) for lane in range(3)} == {0, 1, 2}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(weights=st.lists(st.sampled_from([0.05, 0.3, 1.0, 4.0]), min_size=3, max_size=5), stop=st.integers(0, 30))
def test_the_shares_hold_in_every_lane_also_after_a_resume(
    weights: list[float], stop: int, tmp_path_factory: Any, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    folder, texts = tmp_path_factory.mktemp("mixture"), [f"{at} " + "word " * (at * 7 % 50) for at in range(40)]
    sources = []
    for at, weight in enumerate(weights):
        (folder / f"{at}.jsonl").write_text("".join(json.dumps({"text": f"{at} {text}"}) + "\n" for text in texts))
        sources.append(SourceConfig(name=str(at), paths=(str(folder / f"{at}.jsonl"),), weight=weight))
    config = DataConfig(sources=tuple(sources), lanes=2, min_characters=0, min_tokens=0, workers=0)
    manifest = build_manifest(sources)

    def open_stream(cursors: list[dict[str, Any]] | None = None) -> BatchStream:
        shape: dict[str, Any] = {"seed": 1, "rows": 2, "length": 64, "cursors": cursors}
        return BatchStream(config, manifest, ByteTokenizer(), tokenizer_path, **shape)

    longest = max(len(tokenizer.encode(f"0 {text}")) for text in texts) + 2
    whole, parts = open_stream(), open_stream()
    for step in range(40):
        if step == stop:
            parts = open_stream(json.loads(json.dumps(parts.cursors())))
        assert next(whole).sha256 == next(parts).sha256
        for cursor in parts.cursors()[1:]:
            tokens = [place[4] for place in cursor["sources"]]
            assert distance(tokens, weights) <= longest
