"""Bits per byte against a naive oracle in float64, one document and one window at a time."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from openelm.errors import ConfigError, DataError, NumericError
from openelm.evaluate.bootstrap import ratio_interval
from openelm.evaluate.likelihood import Row, log_likelihoods, windows
from openelm.evaluate.score import Score, bits_per_byte, stretches
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer


def texts(count: int, seed: int, longest: int = 300) -> list[str]:
    generator = np.random.default_rng(seed)
    lengths = [1, 2, *generator.integers(3, longest, size=max(0, count - 2))][:count]
    return ["".join(generator.choice(list("abc dé☃"), size=length)) for length in lengths]


def naive_nats(model: OpenELM, ids: list[int], start_id: int, window: int, stride: int, vocab_size: int) -> float:
    """Score token by token: the window of a token is the one that a plain left-to-right scan gives it."""
    full, total, scored_up_to = [start_id, *ids], 0.0, 0
    while scored_up_to < len(ids):
        step = window if scored_up_to == 0 else stride
        end = min(scored_up_to + step, len(ids))
        context = full[max(0, end - window) : end]
        logits = model(torch.tensor([context]))[0, :, :vocab_size].log_softmax(-1)
        for position in range(scored_up_to, end):
            total -= logits[position - end, ids[position]].item()
        scored_up_to = end
    return total


@pytest.fixture(scope="module")
def exact(model: OpenELM) -> OpenELM:
    return copy.deepcopy(model).double()


@pytest.mark.parametrize(("window", "stride"), [(96, 48), (96, 96), (96, 1), (32, 7), (1, 1), (70, 64)])
def test_bits_per_byte_equals_the_naive_oracle(exact: OpenELM, tokenizer: Tokenizer, window: int, stride: int) -> None:
    documents = texts(4, seed=window, longest=150)
    score = bits_per_byte(exact, tokenizer, documents, window_tokens=window, stride_tokens=stride)
    nats = [naive_nats(exact, tokenizer.encode(text), 256, window, stride, 258) for text in documents]
    for document, expected in zip(score.per_document, nats, strict=True):
        assert document.nats == pytest.approx(expected, rel=1e-12)
    size = sum(len(text.encode()) for text in documents)
    assert score.value == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-12)
    assert score.perplexity == pytest.approx(math.exp(sum(nats) / score.tokens), rel=1e-12)
    assert (score.bytes, score.words) == (size, sum(len(text.split()) for text in documents))


def test_fp32_scores_are_close_to_float64(model: OpenELM, exact: OpenELM, tokenizer: Tokenizer) -> None:
    documents = texts(6, seed=1)
    values = [bits_per_byte(either, tokenizer, documents).value for either in (model, exact)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_every_token_is_scored_once_with_the_promised_context() -> None:
    for tokens in range(1, 40):
        for window in range(1, 15):
            for stride in range(1, window + 1):
                scored: list[int] = []
                for start, end, count in windows(tokens, window, stride):
                    assert 0 <= start < end <= tokens
                    assert end - start <= window
                    positions = range(end - count, end)
                    assert all(p - start + 1 >= min(p + 1, window - stride + 1) for p in positions)
                    scored += positions
                assert scored == list(range(tokens))


def test_scores_are_bitwise_equal_for_every_batch_size(model: OpenELM, tokenizer: Tokenizer) -> None:
    documents = texts(20, seed=2, longest=400)
    scores = [bits_per_byte(model, tokenizer, documents, batch_rows=rows) for rows in (1, 3, 4, 16)]
    assert all(score == scores[0] for score in scores)


def test_scores_do_not_depend_on_the_order_or_company_of_documents(model: OpenELM, tokenizer: Tokenizer) -> None:
    documents = texts(5, seed=3)
    together = bits_per_byte(model, tokenizer, documents).per_document
    backwards = bits_per_byte(model, tokenizer, documents[::-1]).per_document[::-1]
    alone = [bits_per_byte(model, tokenizer, [text]).per_document[0] for text in documents]
    nats = [[document.nats for document in scores] for scores in (together, backwards, alone)]
    assert nats[0] == nats[1] == nats[2]


def test_a_uniform_model_scores_log2_of_the_vocabulary_per_token(model: OpenELM, tokenizer: Tokenizer) -> None:
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.head_weight.zero_()
    score = bits_per_byte(uniform, tokenizer, texts(12, seed=4))
    assert score.value == pytest.approx(math.log2(258) * score.tokens / score.bytes, rel=1e-6)
    assert score.perplexity == pytest.approx(258, rel=1e-5)
    assert score.low == pytest.approx(score.value, rel=1e-6)
    assert score.high == pytest.approx(score.value, rel=1e-6)


def test_rows_are_scored_given_all_that_precedes_them(exact: OpenELM) -> None:
    generator = np.random.default_rng(0)
    rows = [Row(generator.integers(0, 258, size=size), scored, "row") for size, scored in ((2, 1), (97, 96), (70, 3))]
    for row, values in zip(rows, log_likelihoods(exact, rows, vocab_size=258), strict=True):
        logits = exact(torch.from_numpy(row.ids[None, :-1]))[0, :, :258].log_softmax(-1)
        expected = [logits[-row.scored + i, row.ids[-row.scored + i]].item() for i in range(row.scored)]
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_a_row_longer_than_the_context_is_a_config_error(model: OpenELM) -> None:
    with pytest.raises(ConfigError, match="exam question: 97 tokens"):
        log_likelihoods(model, [Row(np.zeros(98, dtype=np.int64), 1, "exam question")], vocab_size=258)


def test_the_interval_is_over_documents_from_ten_on_and_over_stretches_before(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    many = bits_per_byte(model, tokenizer, texts(10, seed=5))
    few = bits_per_byte(model, tokenizer, ["word " * 2600, "other " * 900], stride_tokens=96)
    single = bits_per_byte(model, tokenizer, ["too short for an interval"])
    assert (many.interval_over, many.units) == ("documents", 10)
    assert (few.interval_over, few.units) == ("stretches", 3 + 1)
    assert (single.interval_over, single.low, single.high) == ("none", None, None)
    for score in (many, few):
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.value <= score.high


def test_the_interval_shrinks_like_the_square_root_of_the_units() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.uniform(500, 1500, size=3200)
    bits = sizes * generator.normal(2.0, 0.3, size=3200)
    widths = []
    for units in (50, 200, 800, 3200):
        interval = ratio_interval(bits[:units], sizes[:units])
        assert interval is not None
        low, high = interval
        assert low < bits[:units].sum() / sizes[:units].sum() < high
        widths.append(high - low)
    assert all(1.5 < wide / narrow < 2.7 for wide, narrow in pairwise(widths))


def test_the_interval_agrees_with_the_normal_approximation_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = ratio_interval(values, np.ones(400))
    assert interval is not None
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(interval, [values.mean() - half, values.mean() + half], atol=0.05 * half)


def test_stretches_add_up_to_the_document() -> None:
    generator = np.random.default_rng(2)
    nats, sizes = generator.exponential(size=9000), generator.integers(0, 6, size=9000)
    for document_bytes in (int(sizes.sum()), int(sizes.sum()) - 1):
        pieces = stretches(nats, sizes, document_bytes)
        np.testing.assert_allclose(pieces.sum(axis=0), [nats.sum(), document_bytes], rtol=1e-12)
        assert np.all(np.abs(pieces[:, 1] - 4096) < 500)


def test_a_log_likelihood_that_is_not_finite_is_an_error_that_names_the_document(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head_weight[ord("z")] = torch.nan
        broken.head_weight[:, 0] = 0.0
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.transformer.token_embeddings.weight[ord("b")] = torch.inf
    with pytest.raises(NumericError, match=r"notes\.txt"):
        bits_per_byte(bad, tokenizer, ["aab"], ["notes.txt"])
    with pytest.raises(NumericError, match="document 1"):
        bits_per_byte(broken, tokenizer, ["aa", "z"])


def test_documents_that_cannot_be_scored_are_data_errors(model: OpenELM, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no document"):
        bits_per_byte(model, tokenizer, [])
    with pytest.raises(DataError, match="second is empty"):
        bits_per_byte(model, tokenizer, ["a", ""], ["first", "second"])
    with pytest.raises(DataError, match=r"document 1 is not valid Unicode at character 1"):
        bits_per_byte(model, tokenizer, ["a\ud800"])


@pytest.mark.parametrize(("window", "stride", "batch"), [(0, None, 1), (97, None, 1), (8, 9, 1), (8, 0, 1), (8, 8, 0)])
def test_lengths_that_are_not_allowed_are_config_errors(
    model: OpenELM, tokenizer: Tokenizer, window: int, stride: int | None, batch: int
) -> None:
    with pytest.raises(ConfigError):
        bits_per_byte(model, tokenizer, ["abc"], window_tokens=window, stride_tokens=stride, batch_rows=batch)


def test_a_score_becomes_plain_json(model: OpenELM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    score: Score = bits_per_byte(model, tokenizer, ["one two", "three"], ["a", "b"])
    read = json.loads(json.dumps(score.to_json(), allow_nan=False))
    assert (read["value"], read["documents"], read["tokens"]) == (score.value, 2, 12)
    assert [document["name"] for document in read["per_document"]] == ["a", "b"]
    assert read["per_document"][0]["bits_per_byte"] == score.per_document[0].bits_per_byte
